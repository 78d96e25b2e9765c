"""The gates of the study, on both sides of every threshold: log fragments, checkpoint files, result files."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from analysis import gate_files, gate_result, gate_rules, gates  # noqa: E402
from analysis.runlog import Accuracy, disagreement, read_log, read_metrics  # noqa: E402
from analysis.runs import LOG_STEMS, RUN_NAMES, Run, load_study  # noqa: E402
from coconut import FEEDBACK_MODES, Continuous  # noqa: E402

D = 8
BASE = torch.linspace(-0.2, 0.3, D)
OTHER = torch.ones(D) - (torch.ones(D) @ BASE) / (BASE @ BASE) * BASE  # orthogonal to the base row
OTHER = OTHER / OTHER.norm()


# ------------------------------------------------------------------------------------------------ material


def fragment(epoch: int, correct: int, total: int = 300, loss: float = 0.5) -> str:
    """One epoch of a recorded log: bars torn by carriage returns, then the lines of the validation."""
    bars = "\r".join(
        f"Training Epoch: {epoch + 1}/50, batch {i}/559 completed (loss: {loss:.4f}:  {i}%|#| {i}/139" for i in range(3)
    )
    return (
        f"Training Epoch: {epoch + 1}:   0%|          | 0/139 [00:00<?, ?it/s]\r{bars}\nsaving model.\neval loss 0.41\n"
        f"Test Accuracy:   0%|          | 0/{total}\rTest accuracy: 0.61: 100%|#| {total}/{total}\r"
        "Question 0: Answer = 'Tom is a nan.' CoT = 'inf'\nFull output: 'nan inf'\n"
        f"Device 0: Cor={correct}, CoT=0, Total={total}\n"
        f"Accuracy on validation set: {correct} / {total} = {correct / total}\n"
        f"CoT match on validation set: 0 / {total} = 0.0\n"
    )


def log_text(corrects: list[int], **kwargs) -> str:
    return "Config: {'coconut': True, 'num_epochs': 50}\n" + "".join(
        fragment(epoch, correct, **kwargs) for epoch, correct in enumerate(corrects)
    )


def write_log(folder: Path, model: str, corrects: list[int], suffix: str = "", **kwargs) -> Path:
    path = folder / f"{LOG_STEMS[model]}{suffix}.log"
    path.write_text(log_text(corrects, **kwargs))
    return path


def ending(correct: int, lines: int = 50) -> list[int]:
    """`lines` validations, all unremarkable but the last."""
    return [200] * (lines - 1) + [correct]


def eval_record(epoch: int, correct: int, **more) -> dict:
    return {"event": "eval", "epoch": epoch, "correct": correct, "total": 300, "eval/loss": 0.4} | more


def write_metrics(folder: Path, records: list[dict], tail: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


def write_vector(folder: Path, number: int, vector: torch.Tensor | None, mode_id: int | None = 3) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(BASE, folder / "pause_init")
    state = {"base_causallm.weight": torch.zeros(2, 2)}
    state |= {} if vector is None else {"pause_embedding": vector}
    state |= {} if mode_id is None else {"feedback_mode_id": torch.tensor(mode_id)}
    torch.save(state, folder / f"checkpoint_{number}")


def call(capsys, *argv) -> tuple[int, str]:
    code = gates.main([str(arg) for arg in argv])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def records(folder: Path) -> list[dict]:
    return json.loads((folder / "gates.json").read_text())["records"]


def write_results(folder: Path, experiment: str, model: str, record: dict) -> None:
    (folder / experiment).mkdir(parents=True, exist_ok=True)
    (folder / experiment / f"{model}_{experiment}.json").write_text(json.dumps(record))


# ------------------------------------------------------------------------------------------------ reading


def test_line_numbers_survive_carriage_returns(tmp_path):
    log = read_log(write_log(tmp_path, "m3", list(range(100, 120))))
    assert [a.correct for a in log.accuracies] == list(range(100, 120))
    assert log.losses[14] == {0: 0.5, 1: 0.5, 2: 0.5}
    assert log.non_finite == [], "words in questions and outputs are text, not numbers"


def test_torn_last_line_of_a_log_is_no_line(tmp_path):
    path = tmp_path / "m3_coconut.log"
    path.write_text(log_text([180] * 14) + "Accuracy on validation set: 29")
    assert len(read_log(path).accuracies) == 14


def test_accuracy_is_exact():
    assert Accuracy(233, 300).percent - Accuracy(218, 300).percent == 5


def test_resumed_run_counts_the_last_of_repeated_epochs(tmp_path):
    log = tmp_path / "m3_coconut.log"
    log.write_text(log_text([200] * 13 + [150, 150]) + "Loading from previous run epoch_13!\n"
                   + fragment(13, 201) + fragment(14, 202))  # fmt: skip
    folder = tmp_path / RUN_NAMES["m3"]
    pairs = [(e, 200) for e in range(13)] + [(13, 150), (14, 150), (13, 201), (14, 202)]
    write_metrics(folder, [eval_record(e, c) for e, c in pairs])
    run = load_study(tmp_path)["m3", 0]
    assert run.problem == ""
    assert run.evals[14].correct == 202 and len(run.evals) == 15


def test_stock_log_without_metrics_uses_line_order(tmp_path, capsys):
    path = write_log(tmp_path, "m3", [100] * 14 + [200])
    assert call(capsys, "--gate", 3, "--log", path)[0] == 0


def test_torn_metrics_line_is_ignored_and_explains_an_extra_log_line(tmp_path):
    path = write_metrics(tmp_path, [eval_record(e, 200) for e in range(3)], tail='{"event": "eval", "epo')
    metrics = read_metrics(path)
    assert metrics.torn and len(metrics.evals) == 3
    log = read_log(write_log(tmp_path, "m3", [200] * 4))
    assert disagreement(log, metrics) == ""
    metrics.torn = False
    assert "4 validations in the log, 3 in the file" in disagreement(log, metrics)


@pytest.mark.parametrize("written", [[200] * 14 + [199], [200] * 16])
def test_disagreement_is_not_decidable_and_said(tmp_path, capsys, written):
    log = write_log(tmp_path, "m3", [200] * 15)
    write_metrics(tmp_path / "run", [eval_record(e, c) for e, c in enumerate(written)])
    code, out = call(capsys, "--gate", 3, "--log", log, "--run", tmp_path / "run")
    assert code == 2 and "GATE 3 NOT YET" in out and "disagree" in out


def test_folder_without_log_is_found(tmp_path, capsys):
    write_metrics(tmp_path / "anything-s2", [eval_record(e, 200) for e in range(15)])
    (tmp_path / "anything-s2" / "run.json").write_text('{"model_key": "m3", "config": {}}')
    assert list(load_study(tmp_path)) == [("m3", 2)]
    code, out = call(capsys, "--gate", 3, "--logs", tmp_path)
    assert code == 0 and "m3 repeat 2" in out


def test_run_folder_comes_from_the_printed_config(tmp_path):
    folder = tmp_path / "elsewhere" / "my-run"
    folder.mkdir(parents=True)
    config = {"save_path": str(tmp_path / "elsewhere"), "name": "my-run"}
    (tmp_path / "m5_pause.log").write_text(f"Config: {config}\n" + fragment(0, 100))
    assert load_study(tmp_path)["m5", 0].folder == folder


# ------------------------------------------------------------------------------------------------ gates 1 to 3b


@pytest.mark.parametrize(("correct", "code"), [(210, 0), (209, 1)])
def test_gate_1_reads_line_10(tmp_path, capsys, correct, code):
    path = write_log(tmp_path, "m1", [1] * 9 + [correct] + [1])
    got, out = call(capsys, "--gate", 1, "--log", path)
    assert got == code and f"({correct}/300)" in out and ">= 70" in out and "n=300" in out


def test_gate_1_waits_for_line_10(tmp_path, capsys):
    code, out = call(capsys, "--gate", 1, "--log", write_log(tmp_path, "m1", [250] * 9))
    assert code == 2 and "GATE 1 NOT YET" in out and "9 so far" in out


def test_third_failing_run_of_gate_1_stops_the_study(tmp_path, capsys):
    # the second call judges the first run once more
    for correct, stops in ((100, False), (100, False), (101, False), (102, True)):
        code, out = call(capsys, "--gate", 1, "--log", write_log(tmp_path, "m1", [correct] * 10))
        assert code == 1 and ("stop the study" in out) == stops


def gate_2(tmp_path, capsys, m1: list[int], m2: list[int], kept: int = 50) -> tuple[int, str]:
    for model, corrects in (("m1", m1), ("m2", m2)):
        write_log(tmp_path, model, corrects)
        (tmp_path / RUN_NAMES[model]).mkdir()
        for number in range(1, kept + 1):
            (tmp_path / RUN_NAMES[model] / f"checkpoint_{number}").touch()
    return call(capsys, "--gate", 2, "--log", tmp_path / "m1_cot.log")


@pytest.mark.parametrize(
    ("m1", "m2", "code", "note"),
    [
        (225, 225, 0, False),
        (240, 240, 0, False),
        (241, 241, 0, True),
        (224, 224, 0, True),
        (222, 222, 0, True),
        (221, 221, 1, False),
        (233, 218, 0, False),  # apart by exactly 5
        (233, 217, 1, False),
        (230, 245, 0, False),
        (230, 246, 1, False),
    ],
)
def test_gate_2_levels(tmp_path, capsys, m1, m2, code, note):
    got, out = gate_2(tmp_path, capsys, ending(m1), ending(m2))
    assert got == code and ("outside the expected" in out) == note


def test_gate_2_refuses_100_and_lost_checkpoints(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert gate_2(tmp_path / "a", capsys, [200] * 20 + [300] + [230] * 29, ending(230))[0] == 1
    code, out = gate_2(tmp_path / "b", capsys, ending(230), ending(230), kept=49)
    assert code == 1 and "50 kept" in out


def test_gate_2_needs_both_models(tmp_path, capsys):
    assert call(capsys, "--gate", 2, "--log", write_log(tmp_path, "m1", ending(230)))[0] == 2


@pytest.mark.parametrize(("correct", "code"), [(175, 0), (174, 1)])
def test_gate_3_reads_line_15(tmp_path, capsys, correct, code):
    """58.0 exactly does not pass, and neither neighbouring line is read."""
    path = write_log(tmp_path, "m3", [1] * 14 + [correct] + [1])
    got, out = call(capsys, "--gate", 3, "--log", path)
    assert got == code and f"GATE 3 {'PASS' if code == 0 else 'FAIL'}" in out


@pytest.mark.parametrize(("loss", "code"), [(0.75, 0), (0.7504, 1), (math.nan, 1), (math.inf, 1)])
def test_gate_3_divergence(tmp_path, capsys, loss, code):
    """1.5 times the lowest mean of the stage, from the recorded bars; epoch index 13 is in stage 2 with 10 to 12."""
    path = tmp_path / "m3_coconut.log"
    path.write_text("".join(fragment(e, 200, loss=loss if e == 13 else 0.5) for e in range(15)))
    assert call(capsys, "--gate", 3, "--log", path)[0] == code


def test_a_falling_first_stage_is_no_divergence(tmp_path, capsys):
    path = tmp_path / "m3_coconut.log"
    path.write_text("".join(fragment(e, 200, loss=4.0 / (1 + e % 5)) for e in range(15)))
    assert call(capsys, "--gate", 3, "--log", path)[0] == 0


def test_divergence_after_line_15_is_not_gate_3s(tmp_path, capsys):
    path = tmp_path / "m3_coconut.log"
    path.write_text("".join(fragment(e, 200, loss=9.0 if e == 16 else 0.5) for e in range(18)))
    assert call(capsys, "--gate", 3, "--log", path)[0] == 0


def test_gate_3_reads_losses_from_metrics(tmp_path, capsys):
    means = [{"event": "train_epoch", "epoch": e, "stage": e // 5, "train/loss_mean": 0.5} for e in range(15)]
    means[12]["train/loss_mean"] = None  # how a strict JSON writer spells NaN
    write_metrics(tmp_path / "run", [*means, *(eval_record(e, 200) for e in range(15))])
    code, out = call(capsys, "--gate", 3, "--run", tmp_path / "run")
    assert code == 1 and "diverging" in out


@pytest.mark.parametrize(
    ("correct", "shift", "code"), [(136, 0.011, 0), (135, 0.011, 1), (136, 0.009, 1), (136, None, 2)]
)
def test_gate_3b(tmp_path, capsys, correct, shift, code):
    path = write_log(tmp_path, "m5", [1] * 14 + [correct])
    if shift is not None:
        write_vector(tmp_path / "run", 15, BASE + shift * OTHER)
    (tmp_path / "run").mkdir(exist_ok=True)
    assert call(capsys, "--gate", "3b", "--log", path, "--run", tmp_path / "run")[0] == code


# ------------------------------------------------------------------------------------------------ gate 4 family


def test_gate_4_passes_on_either_difference_and_never_blocks(tmp_path, capsys):
    def judged(m3: int, m5: int, all_six: int | None) -> tuple[int, str]:
        for model, correct in (("m3", m3), ("m4", 200), ("m4b", 200), ("m5", m5)):
            write_log(tmp_path, model, ending(correct))
        for model, last in (("m3", all_six), ("m5", 90)):
            if last is not None and all_six is not None:
                levels = [{"correct": last, "n": 100}]
                write_results(tmp_path, "corruption", model, {
                    "clean_accuracy": {"correct": 95, "n": 100}, "forward_corruption": levels,
                    "forward_corruption_recompute": [{"correct": 0, "n": 100}], "sensitivity": "low",
                })  # fmt: skip
        return call(capsys, "--gate", 4, "--logs", tmp_path)

    assert judged(285, 270, None)[0] == 0, "m3 - m5 = 5 passes without the experiment"
    code, out = judged(285, 271, None)
    assert code == 2 and "NOT YET" in out
    code, out = judged(285, 271, 80)
    assert code == 0 and "GATE 4 PASS" in out, "sensitivities 15 and 5 differ by exactly 10"
    code, out = judged(285, 271, 81)
    assert code == 0 and "GATE 4 FAIL" in out and "evidence for curriculum + compute" in out and "[blocking]" not in out


def write_test_accuracy(folder: Path, label: str, correct: int) -> None:
    write_results(folder, "ood", label, {"test": {"correct": correct, "n": 500}})


@pytest.mark.parametrize(("m5", "code"), [(484, 0), (485, 1)])
def test_gate_4_id_single_seed(tmp_path, capsys, m5, code):
    write_test_accuracy(tmp_path, "m3", 470)
    write_test_accuracy(tmp_path, "m5", m5)
    assert call(capsys, "--gate", "4-id", "--logs", tmp_path)[0] == code


def test_gate_4_id_three_seeds_use_means(tmp_path, capsys):
    for suffix, m5 in (("", 490), ("-s1", 470), ("-s2", 484)):
        write_log(tmp_path, "m3", [200], suffix)
        write_test_accuracy(tmp_path, f"m3{suffix}", 470)
        write_test_accuracy(tmp_path, f"m5{suffix}", m5)
    code, out = call(capsys, "--gate", "4-id", "--logs", tmp_path)
    assert code == 0 and "mean of 3 seeds" in out and "+4.00" in out and "n=1500" in out
    write_test_accuracy(tmp_path, "m5-s1", 481)  # the mean is exactly 3
    assert call(capsys, "--gate", "4-id", "--logs", tmp_path)[0] == 1


def test_gate_4_id_accepted_with_a_reason(tmp_path, capsys):
    write_test_accuracy(tmp_path, "m3", 400)
    write_test_accuracy(tmp_path, "m5", 450)
    code, out = call(capsys, "--gate", "4-id", "--logs", tmp_path, "--accept", "known data fault")
    assert code == 0 and "GATE 4-id FAIL" in out and "accepted: known data fault" in out
    assert records(tmp_path)[-1]["accepted"] == "known data fault"
    assert call(capsys, "--gate", "3", "--logs", tmp_path, "--accept", "no")[0] == 2


@pytest.mark.parametrize(
    ("vector", "code"),
    [
        (BASE + 0.0101 * OTHER, 0),
        (BASE + 0.0099 * OTHER, 1),
        (BASE, 1),  # never trained
        (BASE * 0.5, 1),  # L2 far above 0.01, but only shrunk, as weight decay alone would
        (None, 1),
    ],
)
def test_gate_4b(tmp_path, capsys, vector, code):
    write_vector(tmp_path / RUN_NAMES["m5"], 50, vector)
    got, out = call(capsys, "--gate", "4b", "--run", tmp_path / RUN_NAMES["m5"])
    assert got == code
    assert vector is None or ("L2 from <<" in out and "without the part along <<" in out and "cosine" in out)


def test_gate_4b_reads_both_models_and_checks_the_mode(tmp_path, capsys):
    write_vector(tmp_path / RUN_NAMES["m5"], 50, BASE + OTHER, mode_id=3)
    write_vector(tmp_path / RUN_NAMES["m4b"], 50, BASE + OTHER, mode_id=3)
    for model in ("m5", "m4b"):
        write_log(tmp_path, model, ending(200))
    assert call(capsys, "--gate", "4b", "--logs", tmp_path)[0] == 1, "m4b's file says pause_curriculum"
    write_vector(tmp_path / RUN_NAMES["m4b"], 50, BASE + OTHER, mode_id=2)
    assert call(capsys, "--gate", "4b", "--logs", tmp_path)[0] == 0
    (tmp_path / RUN_NAMES["m4b"] / "checkpoint_50").write_bytes(b"torn")
    assert call(capsys, "--gate", "4b", "--logs", tmp_path)[0] == 2


def test_base_row_is_found_by_token(tmp_path, shared_data):
    """Without a recorded row: `<<` of the local base model, not a neighbouring number."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared_data / "golden_stock" / "tiny_gpt2"
    run = Run("m5", folder=tmp_path)
    run.config = {"model_id": str(folder)}
    row, source = gate_files.base_row(run)
    ids = AutoTokenizer.from_pretrained(folder).encode("<<", add_special_tokens=False)
    rows = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    assert torch.equal(row, rows[ids].mean(0)) and "<<" in source
    run.config["from_scratch"] = True
    assert gate_files.base_row(run)[0] is None, "a model drawn at random did not start from the stored row"


def test_gate_4c_is_about_bits_and_every_checkpoint(tmp_path, capsys):
    folder = tmp_path / RUN_NAMES["m4"]
    for number in (1, 25, 50):
        write_vector(folder, number, BASE.clone(), mode_id=1)
    assert call(capsys, "--gate", "4c", "--run", folder)[0] == 0
    nudged = BASE.clone()
    nudged[3] = torch.nextafter(nudged[3], torch.tensor(1.0))
    write_vector(folder, 25, nudged, mode_id=1)
    code, out = call(capsys, "--gate", "4c", "--run", folder)
    assert code == 1 and "checkpoint_25" in out
    assert not gate_files.same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({}, 0),
        ({"ce_above_03_fraction": 0.49}, 1),
        ({"clean_gt_corrupt_fraction": 0.8}, 1),
        ({"elapsed_seconds": 600}, 1),
        ({"n_traced": 49}, 2),
        ({"ce_above_03_fraction": None}, 2),
    ],
)
def test_gate_5(tmp_path, capsys, change, code):
    record = {"passed": True, "ce_above_03_fraction": 0.5, "clean_gt_corrupt_fraction": 0.82, "elapsed_seconds": 599}
    (tmp_path / "exp0_sanity_result.json").write_text(json.dumps(record | {"n_traced": 50} | change))
    got, out = call(capsys, "--gate", 5, "--logs", tmp_path)
    assert got == code and ("thresholds decide" in out) == (code != 0), "an edited `passed` decides nothing"


# ------------------------------------------------------------------------------------------------ gate 0


def test_gate_0_modes_train_as_defined(monkeypatch):
    assert all(check.ok for check in gate_files.mode_checks())

    class Detached(Continuous):
        def forward(self, k, h_BD):
            return h_BD.detach()

    monkeypatch.setitem(FEEDBACK_MODES, "continuous", Detached)
    failing = [check.name for check in gate_files.mode_checks() if not check.ok]
    assert failing == ["continuous: gradient against difference"]


def test_gate_0_sees_a_vector_that_does_not_train(monkeypatch):
    monkeypatch.setitem(FEEDBACK_MODES, "pause_curriculum", FEEDBACK_MODES["frozen"])
    failing = [check.name for check in gate_files.mode_checks() if not check.ok]
    assert failing == ["pause_curriculum: vector after one step", "trainable counts against m3, width 16"]


def test_pause_curriculum_that_recycles_is_seen(monkeypatch):
    assert gate_files.recycling_check().ok
    cls = FEEDBACK_MODES["pause_curriculum"]

    class Recycling(cls):
        reads_hidden = True

        def forward(self, k, h_BD):
            return self.pause_embedding + h_BD

    monkeypatch.setitem(FEEDBACK_MODES, "pause_curriculum", Recycling)
    assert not gate_files.recycling_check().ok


def test_gate_0_sizes_and_sets(tmp_path, shared_data):
    rows = json.loads((shared_data / "prosqa_valid.json").read_text())
    (tmp_path / "prosqa_valid.json").write_text(json.dumps(rows))
    (tmp_path / "prosqa_test.json").write_text(json.dumps(rows))
    (tmp_path / "ood_7hop.json").write_text(json.dumps(rows[:5]))
    found = {check.name: check for check in gate_files.data_checks(tmp_path)}
    assert found["rows of prosqa_valid.json"].ok and found["rows of prosqa_train.json"].ok is None
    assert found["rows of prosqa_test.json"].ok is False, "300 rows are not 500"
    assert found["ood_7hop invariants"].ok is False, "official rows have 3 to 6 hops"
    assert found["ood_7hop invariants"].detail


def test_gate_0_configs(tmp_path):
    values = "save_path: runs\ntrain_path: a.json\nval_path: b.json\ncoconut: True\n"
    (tmp_path / gate_files.CONFIGS["m3"]).write_text(values)
    (tmp_path / gate_files.CONFIGS["m4"]).write_text(values + "feedback_mode: learned_shared\n")
    (tmp_path / gate_files.CONFIGS["m5"]).write_text(values + "feedback_mod: pause_curriculum\n")
    m3, m4, m5 = gate_files.config_checks(tmp_path, ("m3", "m4", "m5"))
    assert m3.ok and not m4.ok and not m5.ok
    assert m4.value == "loads as m4b" and "feedback_mode" in m5.detail


# ------------------------------------------------------------------------------------------------ all, exit codes


@pytest.fixture
def no_gate_0(monkeypatch):
    """`all` without the file gate, whose inputs are the checkout's own."""
    monkeypatch.delitem(gate_rules.GATES, "0")


@pytest.mark.usefixtures("no_gate_0")
def test_all_on_a_study_in_progress(tmp_path, capsys):
    assert call(capsys, "--gate", "all", "--logs", tmp_path)[0] == 2, "an empty folder decides nothing"
    write_log(tmp_path, "m1", [220] * 10)
    code, out = call(capsys, "--gate", "all", "--logs", tmp_path)
    assert code == 0 and "GATE 1 PASS" in out and "GATE 2 NOT YET" in out
    write_log(tmp_path, "m3", [100] * 15)
    code, out = call(capsys, "--gate", "all", "--logs", tmp_path)
    assert code == 1 and "GATE 3 FAIL  m3  [blocking]" in out


@pytest.mark.usefixtures("no_gate_0")
def test_gate_5_stops_tracing_only(tmp_path, capsys):
    write_log(tmp_path, "m1", [220] * 10)
    record = {"n_traced": 50, "ce_above_03_fraction": 0.1, "clean_gt_corrupt_fraction": 0.1, "elapsed_seconds": 10}
    (tmp_path / "exp0_sanity_result.json").write_text(json.dumps(record))
    code, out = call(capsys, "--gate", "all", "--logs", tmp_path)
    assert code == 0 and "GATE 5 FAIL" in out
    assert call(capsys, "--gate", "5", "--logs", tmp_path)[0] == 1


@pytest.mark.parametrize(
    "line",
    [
        "Effective batch size: 64 = 32 x 2 x 1",
        "Config: {'model_id': 'backbones/prosqa_tiny'}",
        "Config: {'debug': True}",
        "Config: {'batch_size_training': 32}\nRunning FSDP on rank = 0, world size = 2",
    ],
)
def test_uncalibrated_is_shown_and_never_blocks(tmp_path, capsys, line):
    path = tmp_path / "m3_coconut.log"
    path.write_text(line + "\n" + "".join(fragment(e, 10) for e in range(15)))
    code, out = call(capsys, "--gate", 3, "--log", path)
    assert code == 0 and "GATE 3 FAIL" in out and "uncalibrated" in out and "[blocking]" not in out


def test_other_data_sizes_are_uncalibrated(tmp_path, capsys):
    small = write_log(tmp_path, "m3", [10] * 15, total=64)
    assert call(capsys, "--gate", 3, "--log", small)[0] == 0
    write_metrics(tmp_path / "run", [
        {"event": "train_epoch", "epoch": 0, "train/loss_mean": 0.5, "updates": 20},
        *(eval_record(e, 10) for e in range(15)),
    ])  # fmt: skip
    code, out = call(capsys, "--gate", 3, "--run", tmp_path / "run")
    assert code == 0 and "20 updates" in out


def test_models_outside_the_study(tmp_path, capsys):
    write_log(tmp_path, "m1", [220] * 10)
    code, out = call(capsys, "--gate", "4c", "--logs", tmp_path, "--models", "m1,m3,m5")
    assert code == 0 and "GATE 4c NOT APPLICABLE" in out


@pytest.mark.parametrize(
    "argv",
    [["--gate", "3"], ["--gate", "3", "--log", "absent.log"], ["--gate", "3", "--logs", "absent"],
     ["--gate", "3", "--logs", ".", "--models", "m9"]],
)  # fmt: skip
def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    code, out = call(capsys, *argv)
    assert code == 2 and out.startswith("error: ") and out.count("\n") == 1


def test_records_accumulate_and_damage_is_refused(tmp_path, capsys):
    path = write_log(tmp_path, "m3", [200] * 15)
    for expected in (1, 2):
        call(capsys, "--gate", 3, "--log", path)
        assert len(records(tmp_path)) == expected
    first = records(tmp_path)[0]
    assert first["status"] == "PASS" and first["checks"][0]["n"] == 300 and first["checks"][0]["rule"] == "> 58"
    assert not list(tmp_path.glob("*tmp*"))
    (tmp_path / "gates.json").write_text("[")
    code, out = call(capsys, "--gate", 3, "--log", path)
    assert code == 2 and "gates.json" in out and (tmp_path / "gates.json").read_text() == "["


def test_table_is_narrow_and_plain(tmp_path, capsys):
    write_log(tmp_path, "m3", [200] * 15, suffix="-s1")
    for gate in ("all", "post", "flags"):
        _, out = call(capsys, "--gate", gate, "--logs", tmp_path)
        assert max(map(len, out.replace(str(tmp_path), "").splitlines())) <= gate_result.WIDTH
        assert "\033" not in out
    passed = gate_result.Result("3", "m3", [gate_result.Check("a", "1", "> 0", True)])
    coloured = gate_result.render([passed], colour=True)
    assert "\033[32mPASS" in coloured


def test_shell_script_passes_arguments_and_exit_code(tmp_path):
    logs = tmp_path / "with a space"
    logs.mkdir()
    write_log(logs, "m3", [100] * 15)
    (tmp_path / "python3").symlink_to(sys.executable)
    env = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    script = str(ROOT / "scripts" / "check_gates.sh")
    done = subprocess.run([script, str(logs), "--gate", "3"], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 1 and "GATE 3 FAIL" in done.stdout, done.stderr
    shown = subprocess.run([script, "--help"], capture_output=True, text=True, env=env)
    assert shown.returncode == 0 and "usage:" in shown.stdout
    assert subprocess.run([script], capture_output=True, env=env).returncode == 2


# ------------------------------------------------------------------------------------------------ post and flags


def results(capsys, tmp_path, gate: str) -> dict[str, dict]:
    call(capsys, "--gate", gate, "--logs", tmp_path)
    return {record["gate"]: record for record in records(tmp_path)}


def test_post_checks_from_metrics(tmp_path, capsys):
    def write(ce: float, latents: int, loss: float) -> None:
        (tmp_path / "gates.json").unlink(missing_ok=True)
        train, evals = [], []
        for epoch in range(50):
            plan = {"stage": epoch // 5, "n_latents": min(epoch // 5, 6) if epoch != 40 else latents}
            train.append({"event": "train_epoch", "epoch": epoch, "train/loss_mean": loss, "seconds": 100.0} | plan)
            evals.append(eval_record(epoch, 200, **{"eval/two_choice_ce": ce if epoch >= 15 else 0.7}, **plan))
        write_metrics(tmp_path / RUN_NAMES["m3"], train + evals)

    def statuses() -> list[bool | None]:
        found = results(capsys, tmp_path, "post")
        rows = [next(c for c in found[f"post {k}"]["checks"] if c["name"].startswith("m3 ")) for k in (1, 5, 6)]
        return [row["ok"] for row in rows]

    write(0.6929, 6, 0.4)
    assert statuses() == [True, True, True]
    write(0.693, 6, 0.4)
    assert statuses() == [False, True, True]
    write(0.6, 8, 0.4)
    assert statuses() == [True, False, True]
    write(0.6, 6, math.nan)
    assert statuses() == [True, True, False]


@pytest.mark.parametrize(("m1", "m5", "four", "three"), [(222, 120, "PASS", True), (221, 119, "FAIL", False)])
def test_post_levels(tmp_path, capsys, m1, m5, four, three):
    write_log(tmp_path, "m1", ending(m1))
    write_log(tmp_path, "m5", ending(m5))
    found = results(capsys, tmp_path, "post")
    assert found["post 4"]["status"] == four
    assert {c["name"]: c["ok"] for c in found["post 3"]["checks"]}["m5 m5 line 50"] is three
    assert found["post 2"]["status"] == "NOT YET" and found["post 12"]["status"] == "NOT YET"


@pytest.mark.parametrize(("again", "ok"), [(222, True), (223, False)])
def test_post_reevaluation(tmp_path, capsys, again, ok):
    write_log(tmp_path, "m1", ending(222))
    (tmp_path / "m1_cot-reeval.log").write_text(fragment(0, again))
    found = results(capsys, tmp_path, "post")
    assert {c["name"]: c["ok"] for c in found["post 12"]["checks"]}["m1 re-evaluated"] is ok


def test_post_loads_real_files_strictly(tmp_path, shared_data):
    """A run folder as the trainer writes it; a file with a foreign key is refused."""
    from checkpoint import build_model, stored_weights
    from utils import Config

    values = {
        "name": "r",
        "save_path": str(tmp_path),
        "train_path": "x",
        "val_path": "x",
        "coconut": True,
        "feedback_mode": "pause_curriculum",
        "model_id": str(shared_data / "golden_stock" / "tiny_gpt2"),
    }
    model = build_model(Config(values))[0]
    weights = stored_weights(model)
    (tmp_path / "state_1").write_text(json.dumps({"config": values}))
    run = Run("m5", folder=tmp_path)
    torch.save(weights, tmp_path / "checkpoint_1")
    assert gate_files.strict_forward(run, 1)[2] is True
    torch.save(weights | {"stray": torch.zeros(1)}, tmp_path / "checkpoint_1")
    value, _, ok, detail = gate_files.strict_forward(run, 1)
    assert ok is False and "stray" in detail
    torch.save({k: v * math.nan if v.is_floating_point() else v for k, v in weights.items()}, tmp_path / "checkpoint_1")
    assert gate_files.strict_forward(run, 1)[2] is False


def test_flags_from_logs(tmp_path, capsys):
    def flag(name: str, corrects: list[int], **last) -> str:
        (tmp_path / "gates.json").unlink(missing_ok=True)
        path = tmp_path / "m3_coconut.log"
        path.write_text("".join(fragment(e, c, loss=last.get(e, 0.2)) for e, c in enumerate(corrects)))
        return next(
            (c["ok"] for c in results(capsys, tmp_path, "flags")[f"flag {name}"]["checks"] if "m3" in c["name"]), None
        )

    assert flag("collapse", [100] * 20 + [166] * 5) is True
    assert flag("collapse", [200] * 24 + [165]) is False
    assert flag("leak", [299] * 3) is True
    assert flag("leak", [200, 300, 200]) is False


@pytest.mark.parametrize(("jump", "ok"), [(0.6, True), (0.61, False)])
def test_flag_spike_at_a_stage_change(tmp_path, capsys, jump, ok):
    text = "".join(fragment(e, 200, loss=jump if e == 5 else 0.2) for e in range(7))
    (tmp_path / "m3_coconut.log").write_text(text)
    checks = results(capsys, tmp_path, "flags")["flag spike"]["checks"]
    assert next(c["ok"] for c in checks if c["name"].startswith("m3")) is ok


@pytest.mark.parametrize(
    ("m5", "above", "equal"), [(208, "CLEAR", True), (209, "RAISED", False), (191, "CLEAR", False)]
)
def test_flags_between_models(tmp_path, capsys, m5, above, equal):
    write_log(tmp_path, "m3", ending(200))
    write_log(tmp_path, "m5", ending(m5))
    found = results(capsys, tmp_path, "flags")
    assert found["flag m5-above-m3"]["status"] == above
    assert (found["flag pause-equals-m3"]["status"] == "RAISED") == equal
    assert not any(record["blocking"] for record in found.values())
    assert found["flag unused"]["status"] == "NOT YET"


@pytest.mark.parametrize(("seconds", "ok"), [(14400, True), (14401, False)])
def test_flag_slow(tmp_path, capsys, seconds, ok):
    record = {"event": "train_epoch", "epoch": 0, "train/loss_mean": 0.5, "seconds": seconds}
    write_metrics(tmp_path / RUN_NAMES["m3"], [record])
    checks = results(capsys, tmp_path, "flags")["flag slow"]["checks"]
    assert next(c["ok"] for c in checks if c["name"] == "m3 hours") is ok


def test_flags_from_experiments(tmp_path, capsys):
    write_results(tmp_path, "probing", "m3", {"linear_probe_accuracy": [[25.0, None], [25.0, 25.0]], "n_classes": 4})
    write_results(tmp_path, "probing", "m5", {"linear_probe_accuracy": [[25.0, None], [25.0, 26.0]], "n_classes": 4})
    for model, correct in (("m3", 531), ("m5", 532)):  # 1,000 rows: 50 lies within 3.1 points
        coin = {"n": 1000, "two_choice_accuracy": {"correct": correct - 1, "n": 1000}}
        easy = {"n": 1000, "correct": 1000 if model == "m5" else 999}
        write_results(tmp_path, "ood", model, {"ood_7hop": coin, "id_matched": easy})
    found = results(capsys, tmp_path, "flags")
    assert {c["name"]: c["ok"] for c in found["flag probes"]["checks"]} == {"m3 probe cells": False}
    assert {c["name"]: c["ok"] for c in found["flag ood-coin"]["checks"]} == {"m3 OOD sets away from 50": False}
    assert {c["name"]: c["value"] for c in found["flag leak"]["checks"]} == {"m5 accuracies at 100": "id_matched"}
