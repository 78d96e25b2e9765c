"""Training curves from metrics or logs: resumed runs, shared starts, seeds, and the epoch at which m3 leaves m5."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from gate_material import eval_record, fragment, write_metrics

from analysis import curriculum
from analysis.curriculum import epochs_of, first_difference, over_seeds, stage_means, validations
from analysis.runs import LOG_STEMS, RUN_NAMES, Run


def trained(epoch: int, loss, **more) -> dict:
    return {"event": "train_epoch", "epoch": epoch, "stage": epoch // 5, "train/loss_mean": loss, **more}


def run_folder(place: Path, model: str, corrects: list[int], repeat: int = 0, seed: int = 0, first: int = 0, **config) -> Path:
    """A run folder of `model`, 300 rows, five epochs a stage; its loss is 1 / (epoch + 1), its vector at epoch / 10."""
    folder = place / (RUN_NAMES[model] + (f"-s{repeat}" if repeat else ""))
    lines = []
    for epoch, correct in enumerate(corrects, first):
        moved = {"pause_l2": epoch / 10} if model in ("m4b", "m5") else {}
        more = {"stage": epoch // 5, "n_latents": min(epoch // 5, 6), "two_choice_total": 300, "eval/two_choice_acc": 0.5}
        lines += [trained(epoch, 1 / (epoch + 1), **moved), eval_record(epoch, correct, **more)]
    write_metrics(folder, lines)
    (folder / "run.json").write_text(json.dumps({"model_key": model, "config": {"seed": seed, **config}}))
    return folder


def call(*argv) -> int:
    return curriculum.main([str(arg) for arg in argv])


def results(folder: Path) -> dict:
    return json.loads((folder / "curriculum" / "results.json").read_text())


# ---------------------------------------------------------------- one run


def test_every_epoch_of_a_run(tmp_path):
    folder = run_folder(tmp_path, "m5", [100 + 2 * e for e in range(12)])
    found = epochs_of(Run("m5", folder=folder))
    assert [e["epoch"] for e in found] == list(range(12)) and [e["stage"] for e in found] == [0] * 5 + [1] * 5 + [2] * 2
    last = found[11]
    assert last["n_latents"] == 2 and last["accuracy"]["correct"] == 122 and last["accuracy"]["n"] == 300
    assert last["two_choice"]["accuracy"] == 0.5 and last["eval_loss"] == 0.4
    assert last["train_loss"] == pytest.approx(1 / 12) and last["vector_distance"] == 1.1


def test_a_stage_mean_is_of_its_epochs_only(tmp_path):
    found = stage_means(epochs_of(Run("m5", folder=run_folder(tmp_path, "m5", [30] * 5 + [60, 90, 120, 150, 180] + [300]))))
    spans = [(s["stage"], s["first_epoch"], s["last_epoch"], s["n_epochs"]) for s in found]
    assert spans == [(0, 0, 4, 5), (1, 5, 9, 5), (2, 10, 10, 1)]
    assert [s["accuracy"] for s in found] == pytest.approx([0.1, 0.4, 1.0])
    assert found[1]["vector_distance"] == pytest.approx(0.7)
    assert found[1]["train_loss"] == pytest.approx(sum(1 / (e + 1) for e in range(5, 10)) / 5)


def test_numbers_that_are_not_there_are_null(tmp_path):
    folder = tmp_path / RUN_NAMES["m3"]
    write_metrics(
        folder, [trained(0, None), {"event": "eval", "epoch": 0, "correct": 1, "total": 2, "eval/loss": float("nan")}]
    )
    (one,) = epochs_of(Run("m3", folder=folder))
    assert one["train_loss"] is one["eval_loss"] is one["vector_distance"] is one["two_choice"] is None
    (mean,) = stage_means([one])
    assert mean["train_loss"] is None and mean["accuracy"] == 0.5


def test_a_resumed_run_counts_the_last_account_of_an_epoch(tmp_path):
    records = [(0, 10, 1.0), (1, 20, 2.0), (2, 30, 3.0), (1, 40, 4.0), (2, 50, 5.0)]
    lines = [line for e, c, loss in records for line in (trained(e, loss), eval_record(e, c))]
    folder = tmp_path / RUN_NAMES["m3"]
    write_metrics(folder, lines, tail='{"event": "eval", "ep')
    found = epochs_of(Run("m3", folder=folder))
    assert [(e["epoch"], e["accuracy"]["correct"], e["train_loss"]) for e in found] == [
        (0, 10, 1.0),
        (1, 40, 4.0),
        (2, 50, 5.0),
    ]


def test_a_resumed_log_is_read_by_epoch_not_by_line(tmp_path):
    log = tmp_path / "m3_coconut.log"
    text = "Config: {'max_latent_stage': 6, 'c_thought': 1}\n" + "".join(fragment(e, 100 + e, loss=0.9) for e in range(13))
    text += "Config: {'max_latent_stage': 6, 'c_thought': 1}\nLoading from previous run epoch_11!\n"
    text += fragment(11, 211, loss=0.2) + fragment(12, 212, loss=0.1) + fragment(13, 213)
    text += "Config: {'only_eval': True}\nAccuracy on validation set: 7 / 500 = 0.014\nAccuracy on validation set: 29"
    log.write_text(text)
    found = validations(log)
    assert [found[e][0].correct for e in range(14)] == [100 + e for e in range(11)] + [211, 212, 213] and len(found) == 14
    epochs = epochs_of(Run("m3", log_path=log))
    assert [e["stage"] for e in epochs] == [e // 5 for e in range(14)] and epochs[12]["n_latents"] == 2
    assert epochs[12]["train_loss"] == pytest.approx(0.1) and epochs[12]["eval_loss"] == 0.41
    assert epochs[12]["vector_distance"] is None


@pytest.mark.parametrize("model, latents", [("m1", 0), ("m0", 0), ("m3", 4), ("m5", 4)])
def test_a_log_knows_latents_from_its_config(tmp_path, model, latents):
    log = tmp_path / f"{LOG_STEMS[model]}.log"
    log.write_text("Config: {'max_latent_stage': 2, 'c_thought': 2, 'epochs_per_stage': 1}\n" + fragment(5, 10))
    (one,) = epochs_of(Run(model, log_path=log))
    assert one["n_latents"] == latents and one["epoch"] == 5 and one["stage"] == (0 if model == "m1" else 5)


@pytest.mark.parametrize("as_file", [False, True])
def test_epochs_of_a_shared_start_are_read_where_they_were_trained(tmp_path, as_file):
    start = run_folder(tmp_path, "m0", [10, 20, 30]).rename(tmp_path / "stage0-seed0")
    path = start / "checkpoint_2" if as_file else start
    run_folder(tmp_path, "m3", [70, 80], first=2, resume=2, load_model_path=str(path))
    found = curriculum.curve_of(Run("m3", folder=tmp_path / RUN_NAMES["m3"]))
    assert [(e["epoch"], e["accuracy"]["correct"]) for e in found["epochs"]] == [(0, 10), (1, 20), (2, 70), (3, 80)]
    assert [e.get("trained_by") for e in found["epochs"]] == ["stage0-seed0"] * 2 + [None] * 2
    assert found["started_from"] == str(start)


def test_a_run_that_goes_on_from_its_own_checkpoint_has_no_epoch_twice(tmp_path):
    folder = tmp_path / RUN_NAMES["m3"]
    run_folder(tmp_path, "m3", [10, 20, 30], resume=2, load_model_path=str(folder / "checkpoint_2"))
    found = curriculum.curve_of(Run("m3", folder=folder))
    assert [e["epoch"] for e in found["epochs"]] == [0, 1, 2] and found["started_from"] is None


def test_a_start_that_is_not_there_leaves_its_epochs_out(tmp_path):
    run_folder(tmp_path, "m3", [70], first=2, resume=2, load_model_path=str(tmp_path / "gone" / "checkpoint_2"))
    found = curriculum.curve_of(Run("m3", folder=tmp_path / RUN_NAMES["m3"]))
    assert [e["epoch"] for e in found["epochs"]] == [2] and found["started_from"] is None


# ---------------------------------------------------------------- seeds


def curves(tmp_path, **by_model) -> dict[str, list[dict]]:
    """{model: curves} of {model: [accuracies of a repeat, ...]}; m4b has other seeds than m5."""
    made = {}
    for model, repeats in by_model.items():
        seeds = [10 + r if model == "m4b" else r for r in range(len(repeats))]
        folders = [run_folder(tmp_path, model, corrects, r, seeds[r]) for r, corrects in enumerate(repeats)]
        made[model] = [curriculum.curve_of(Run(model, r, folder=folder)) for r, folder in enumerate(folders)]
    return made


def test_bands_say_how_many_seeds_each_epoch_has(tmp_path):
    found = over_seeds(curves(tmp_path, m5=[[90, 120, 150], [150, 150], [120, 180, 210]]), "epochs", "epoch")["m5"]
    assert [band["accuracy"]["n"] for band in found] == [3, 3, 2]
    first = found[0]["accuracy"]
    assert first["mean"] == pytest.approx(0.4) and first["sd"] == pytest.approx(0.1) and first["values"] == [0.3, 0.5, 0.4]
    assert first["ci95"] == pytest.approx([0.4 - 0.2484, 0.4 + 0.2484], abs=1e-4), "Student's t with two degrees of freedom"
    assert found[2]["vector_distance"]["mean"] == pytest.approx(0.2)
    (stage,) = over_seeds(curves(tmp_path / "b", m3=[[30] * 5, [60] * 5]), "stages", "stage")["m3"]
    assert stage["accuracy"]["values"] == pytest.approx([0.1, 0.2]) and stage["vector_distance"]["mean"] is None


def test_one_seed_has_a_mean_and_no_band(tmp_path):
    (band,) = over_seeds(curves(tmp_path, m3=[[90]]), "epochs", "epoch")["m3"]
    assert band["accuracy"] == {"n": 1, "values": [0.3], "mean": 0.3, "sd": None, "ci95": None}


# ---------------------------------------------------------------- where m3 leaves m5


def test_the_first_difference_exceeds_the_floor_of_its_epoch(tmp_path):
    """Epoch 1: 9 rows against a floor of 9 is none. Epoch 2: 12 against 6 is one, and goes away. From epoch 4 on it stays."""
    m3, m4b, m5 = [100, 109, 112, 100, 130, 140], [103, 109, 106, 100, 110, 101], [100, 100, 100, 100, 100, 100]
    found = first_difference(curves(tmp_path, m3=[m3], m4b=[m4b], m5=[m5]), "m3", "m5")
    assert (found["epoch"], found["stage"], found["lasting_epoch"], found["reason"]) == (2, 0, 4, None)
    assert found["difference"] == pytest.approx(12 / 300) and found["noise_floor"]["value"] == pytest.approx(6 / 300)
    assert [round(300 * e["difference"]) for e in found["epochs"]] == [0, 9, 12, 0, 30, 40]


def test_means_over_seeds_are_compared(tmp_path):
    """Seed 0 alone would differ by 60 at once; the mean of two seeds does at epoch 1."""
    both = curves(tmp_path, m3=[[160, 160], [40, 100]], m4b=[[101, 101], [103, 103]], m5=[[100, 100], [100, 100]])
    found = first_difference(both, "m3", "m5")
    assert found["epoch"] == 1 and found["difference"] == pytest.approx(0.1)
    assert found["epochs"][0]["difference"] == 0 and found["epochs"][0]["n_seeds"] == {"m3": 2, "m5": 2}


def test_no_difference_and_no_floor_are_null_with_a_reason(tmp_path):
    same = curves(tmp_path, m3=[[100, 101]], m4b=[[110, 110]], m5=[[100, 100]])
    found = first_difference(same, "m3", "m5")
    assert found["epoch"] is None and "no difference above the noise floor in 2 epochs" in found["reason"]
    del same["m4b"]
    found = first_difference(same, "m3", "m5")
    assert found["epoch"] is None and found["reason"] == "no noise floor: no run of m4b"
    assert [e["noise_floor"] for e in found["epochs"]] == [None, None] and len(found["epochs"]) == 2
    del same["m5"]
    assert "no epoch at which both" in first_difference(same, "m3", "m5")["reason"]


def test_a_copy_of_m5_is_no_noise_floor(tmp_path):
    """m4b trained with m5's seed is m5: every difference would exceed its floor of nothing."""
    both = curves(tmp_path, m3=[[200]], m4b=[[100]], m5=[[100]])
    both["m4b"][0]["train_seed"] = 0
    found = first_difference(both, "m3", "m5")
    assert found["epoch"] is None and "the same runs" in found["reason"]


def test_other_stages_and_other_rows_are_not_compared(tmp_path):
    both = curves(tmp_path, m3=[[200, 200, 200]], m4b=[[100, 100, 100]], m5=[[101, 101, 101]])
    both["m3"][0]["epochs"][0]["stage"] = 1
    both["m3"][0]["epochs"][1]["accuracy"]["n"] = 100
    found = first_difference(both, "m3", "m5")
    assert [e["epoch"] for e in found["epochs"]] == [2] and found["epoch"] == 2


def test_models_of_another_text_are_never_compared():
    assert not {"m1", "m2"} & {model for pair in curriculum.SAME_TEXT for model in pair}
    assert "not comparable" in curriculum.NOTE


# ---------------------------------------------------------------- the command


def test_a_study_end_to_end(tmp_path, capsys):
    study, place = tmp_path / "results" / "study", tmp_path / "runs"
    (study / "logs").mkdir(parents=True)
    by_label = {"m1": [200, 210], "m3": [100, 130], "m4": [90, 91], "m4b": [103, 104], "m5": [100, 101], "m0": [80, 90]}
    runs = []
    for model, corrects in by_label.items():
        folder = run_folder(place, model, corrects, seed=10 if model == "m4b" else 0)
        log = study / "logs" / f"{LOG_STEMS[model]}.log"
        log.write_text("".join(fragment(e, c) for e, c in enumerate(corrects)))
        runs.append({"label": model, "model": model, "repeat": 0, "folder": str(folder), "log": str(log)})
    runs.append({"label": "m3-s1", "model": "m3", "repeat": 1, "folder": str(place / "later"), "log": str(place / "later.log")})
    (study / "study.json").write_text(json.dumps({"runs": runs}))
    assert call("--study", study, "--output_dir", study / "final") == 0
    found = results(study / "final")
    assert list(found) == ["m1", "m3", "m4", "m4b", "m5", "m0", "verification"]
    assert found["m3"] == json.loads((study / "final" / "curriculum" / "m3_curriculum.json").read_text())
    assert found["m3"]["feedback_mode"] == "continuous" and found["m1"]["feedback_mode"] == "none"
    assert found["m3"]["experiment"] == "curriculum" and found["m3"]["n"] == 300 and found["m3"]["gates"]
    assert "--study" in found["m3"]["command"] and "not comparable" in found["m3"]["note"]
    assert found["verification"]["first_difference"]["m3-m5"]["epoch"] == 1
    assert [len(band) for band in found["verification"]["curves"].values()] == [2] * 6
    assert "6 runs" in capsys.readouterr().out


def test_logs_and_runs_by_folder(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "m3_coconut.log").write_text("Config: {}\n" + fragment(0, 100))
    run_folder(tmp_path / "runs", "m5", [120], repeat=2)
    assert call("--logs", tmp_path / "logs", "--runs", tmp_path / "runs", "--output_dir", tmp_path) == 0
    found = results(tmp_path)
    assert found["m3"]["source"].endswith("m3_coconut.log") and found["m5-s2"]["repeat"] == 2


def test_an_unsound_run_has_no_result_and_the_others_do(tmp_path, capsys):
    folder = run_folder(tmp_path, "m3", [100, 110])
    run_folder(tmp_path, "m5", [100, 110])
    assert call("--logs", tmp_path, "--output_dir", tmp_path) == 0
    (tmp_path / "m3_coconut.log").write_text(fragment(0, 100) + fragment(1, 111))
    assert call("--logs", tmp_path, "--output_dir", tmp_path) == 1
    assert "disagree" in capsys.readouterr().err and folder.is_dir()
    found = results(tmp_path)
    assert list(found) == ["m5", "verification"] and "m3" in found["verification"]["log_and_metrics_disagree"]
    assert not (tmp_path / "curriculum" / "m3_curriculum.json").exists(), "an older result does not stay"
    assert "disagree" in json.loads((tmp_path / "curriculum" / "m3_curriculum.failed.json").read_text())["reason"]


def test_a_run_without_a_validation_is_waited_for(tmp_path):
    run_folder(tmp_path, "m3", [100])
    write_metrics(tmp_path / RUN_NAMES["m5"], [{"event": "start"}])
    assert call("--logs", tmp_path, "--output_dir", tmp_path) == 0
    assert results(tmp_path)["verification"]["not_validated_yet"] == ["m5"]


def test_mistakes_are_one_line(tmp_path, capsys):
    for argv, named in [
        ((), "--study"),
        (("--study", tmp_path, "--logs", tmp_path), "either"),
        (("--study", tmp_path), "study.json"),
        (("--logs", tmp_path / "nowhere"), "not a folder"),
        (("--logs", tmp_path), "no run"),
    ]:
        assert call(*argv, "--output_dir", tmp_path) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and named in message and message.count("\n") == 1
    assert not (tmp_path / "curriculum").exists()


def test_real_runs_have_curves(tiny_runs, tmp_path):
    place = tiny_runs["m3"].parent
    assert call("--logs", place, "--output_dir", tmp_path) == 0
    found = results(tmp_path)
    for key in ("m0", "m1", "m3", "m4", "m4b", "m5"):
        recorded = [json.loads(line) for line in (tiny_runs[key] / "metrics.jsonl").read_text().splitlines()]
        evals = [record for record in recorded if record["event"] == "eval"]
        assert [e["accuracy"]["correct"] for e in found[key]["epochs"]] == [record["correct"] for record in evals]
        assert [e["n_latents"] for e in found[key]["epochs"]] == [record["n_latents"] for record in evals]
        assert all(e["two_choice"]["n"] == 11 and e["train_loss"] > 0 for e in found[key]["epochs"])
    distances = {key: [e["vector_distance"] for e in found[key]["epochs"]] for key in ("m3", "m4", "m5")}
    assert distances["m3"] == [None] * 3 and distances["m4"] == [0.0] * 3
    assert distances["m5"][2] > distances["m5"][1] > 0, "it moves as soon as there are slots"


@pytest.mark.parametrize("how", [["-m", "analysis.curriculum"], ["analysis/curriculum.py"]])
def test_it_starts_both_ways_and_needs_no_torch(tmp_path, how):
    run_folder(tmp_path, "m3", [100])
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    argv = [sys.executable, *how, "--logs", str(tmp_path), "--output_dir", str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert results(tmp_path)["m3"]["epochs"][0]["accuracy"]["correct"] == 100
