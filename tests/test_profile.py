"""The profile of a run: what is read from its records, the table, the picture, and errors of the run."""

import json
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT
from matplotlib.image import imread

from analysis import profile
from utils import Config, load_config

CONFIG = {"save_path": "runs", "name": "m3", "coconut": True, "max_latent_stage": 2, "epochs_per_stage": 5, "num_epochs": 15}
DATA = {"train_path": "train.json", "val_path": "valid.json"}
PHASES = {"data": 0.001, "prefix": 0.010, "thoughts": 0.020, "suffix+head": 0.009, "backward": 0.055, "optimizer": 0.005}


def speed(stage: int = 2, updates: int = 1, **phases: float) -> dict:
    """A record of `updates` updates of 1,000 tokens in 1,250 positions, 50 labelled, 1 TFLOP each."""
    seconds = {name: updates * value for name, value in (PHASES | phases).items()}
    rate = updates / sum(seconds.values())
    return {
        "event": "speed", "epoch": 10, "stage": stage, "updates": updates, "phases": seconds,
        "seconds": sum(seconds.values()),
        "tokens_per_s": 1000 * rate, "samples_per_s": 8 * rate, "padded_share": 0.2, "supervised_share": 0.05,
        "flops": 1e12 * updates, "tflops_per_s": rate, "mfu": rate / 100, "time": 0.0,
    }  # fmt: skip


EPOCH = {"event": "train_epoch", "epoch": 10, "stage": 2, "n_latents": 3, "updates": 6, "seconds": 1.0}
EVAL = {"event": "eval", "epoch": 10, "stage": 2, "seconds": 1.5, "total": 32}
RECORDS = [{"event": "start"}, speed(prefix=7.0), *[speed() for _ in range(4)], speed(backward=0.155), EPOCH, EVAL]


@pytest.fixture
def yaml_file(tmp_path):
    path = tmp_path / "m3.yaml"
    path.write_text(yaml.safe_dump(CONFIG | DATA))
    return path


@pytest.fixture
def fake_run(tmp_path, monkeypatch):
    """Put a script in the place of run.py: it gets `overrides`, a dict of strings, and `folder`, its run folder."""

    def put(body: str) -> None:
        script = tmp_path / "run.py"
        script.write_text(
            "import json, pathlib, sys\n"
            "overrides = dict(arg.split('=', 1) for arg in sys.argv[2:])\n"
            "folder = pathlib.Path(overrides['save_path'], overrides['name'])\n"
            "folder.mkdir()\n" + body
        )
        monkeypatch.setattr(profile, "RUN", script)

    return put


def writes(records: list[dict]) -> str:
    lines = "".join(json.dumps(record) + "\n" for record in records)
    return (
        f"(folder / 'metrics.jsonl').write_text({lines!r} + '{{torn')\n"
        "(folder / 'run.json').write_text(json.dumps({'versions': {'torch': 'x'}}))\n"
        "print('Peak memory 1.25 GB; total time 3.0 s')\n"
    )


# ---------------------------------------------------------------- reading


def test_numbers_come_from_the_records_after_warm_up():
    found = profile.summarise(RECORDS, stage=2, warmup=1)
    assert (found["steps"], found["warmup"], found["n_latents"]) == (5, 1, 3)
    backward = found["phases"]["backward"]
    assert backward["share"] == pytest.approx((4 * 55 + 155) / 600)
    assert (backward["median_ms"], backward["min_ms"], backward["max_ms"]) == pytest.approx((55, 55, 155))
    assert found["phases"]["prefix"]["max_ms"] == pytest.approx(10), "the warm-up's seven seconds are out"
    assert found["update"] == pytest.approx({"median_ms": 100, "min_ms": 100, "max_ms": 200, "share": 1})
    assert [update["backward"] for update in found["updates"]] == pytest.approx([55, 55, 55, 55, 155])
    assert found["rates"] == pytest.approx(
        {"tokens_per_s": 5000 / 0.6, "samples_per_s": 40 / 0.6, "padded_share": 0.2, "supervised_share": 0.05,
         "tflop_per_update": 1.0, "tflops_per_s": 5 / 0.6, "mfu": 0.05 / 0.6}
    )  # fmt: skip
    assert found["evaluation"] == {"seconds": 1.5, "rows": 32}


def test_evaluations_between_updates_and_other_stages_do_not_count():
    records = [speed(1, prefix=9.0), speed(), EVAL, speed(evaluation=1.5, saving=0.5), EPOCH, EVAL]
    found = profile.summarise(records, stage=2, warmup=0)
    assert found["steps"] == 2 and found["update"]["max_ms"] == pytest.approx(100)
    assert not {"evaluation", "saving"} & found["phases"].keys()
    assert found["rates"]["tokens_per_s"] == pytest.approx(10_000)
    assert found["rates"]["mfu"] == pytest.approx(0.1)


def test_shares_weigh_by_what_they_are_shares_of():
    small = speed() | {"tokens_per_s": 1000.0, "padded_share": 0.0, "supervised_share": 0.5}  # 100 of 100 positions, 50 labels
    found = profile.summarise([speed(), small], stage=2, warmup=0)["rates"]
    assert found["padded_share"] == pytest.approx(1 - 1100 / 1350)
    assert found["supervised_share"] == pytest.approx(100 / 1100)


def test_records_of_several_updates_and_unknown_peaks():
    records = [speed(updates=4), speed(updates=4)]
    del records[1]["mfu"]
    found = profile.summarise(records, stage=2, warmup=3)
    assert (found["steps"], found["warmup"]) == (4, 4) and found["update"]["median_ms"] == pytest.approx(100)
    assert "mfu" not in found["rates"] and found["evaluation"] is None
    with pytest.raises(ValueError, match="8 updates of stage 2 were recorded and 8 are warm-up"):
        profile.summarise(records, stage=2, warmup=8)


def test_labels_keep_their_distance_and_stay_inside():
    places = profile.spaced([1, 2, 3, 50, 98, 99], gap=15, width=100)
    assert places[0] >= 7.5 and places[-1] <= 92.5 and all(b - a >= 14.99 for a, b in zip(places, places[1:]))
    assert profile.spaced([20, 80], gap=15, width=100) == [20, 80], "labels with room stay where they belong"


# ---------------------------------------------------------------- the command


def test_the_run_is_short_and_of_one_stage(yaml_file, tmp_path):
    config = load_config(yaml_file)
    given = dict(text.split("=", 1) for text in profile.overrides_of(config, 2, 23, tmp_path, 67.0))
    assert given["max_steps"] == "23" and given["log_every"] == "1" and given["peak_tflops"] == "67.0"
    known = [f"{key}={value}" for key, value in given.items() if key in Config.model_fields]
    short = load_config(yaml_file, known)
    assert not short.auto_resume and not short.save_training_state and short.wandb is False and short.max_val_samples == 32
    assert short.early_stop_patience is None
    assert {short.stage(epoch) for epoch in range(short.resume, short.num_epochs)} == {2}
    assert short.num_epochs - short.resume >= 23, "an epoch may be a single update"
    assert "load_model_path" not in given, "a checkpoint that may be there is not touched"
    gone = config.model_copy(update={"load_model_path": str(tmp_path / "nowhere"), "max_val_samples": 5})
    given = dict(text.split("=", 1) for text in profile.overrides_of(gone, 0, 1, tmp_path, None))
    assert (given["load_model_path"], given["max_val_samples"], given["resume"]) == ("null", "5", "0")


def test_table_and_files(yaml_file, tmp_path, capsys, fake_run):
    fake_run(f"assert overrides['max_steps'] == '6' and overrides['lr'] == '0.5'\n{writes(RECORDS)}")
    assert profile.main([str(yaml_file), "--steps", "5", "--warmup", "1", "lr=0.5", "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    for pattern in ("backward 55.0 55.0 .. 155.0 62.5 %", "update 100.0 100.0 .. 200.0 100.0 %", "tokens/s 8,333", "MFU 8.3 %",
                    "padded share 20.0 %", "peak memory 1.25 GB", "evaluation 1.50 s for 32 rows"):  # fmt: skip
        assert pattern in " ".join(text.split()), pattern
    assert "m3, stage 2, 3 thoughts: 5 updates after 1 of warm-up on" in text
    folder = tmp_path / "out/m3-stage2"
    written = json.loads((folder / "profile.json").read_text())
    assert written["update"]["max_ms"] == pytest.approx(200) and written["config"]["lr"] == 0.5
    assert written["versions"] == {"torch": "x"} and written["peak_memory_gb"] == 1.25
    picture = imread(folder / "profile.png")[..., :3]
    assert picture.shape[1] > 1000 and len({tuple(p) for p in picture[::3, ::3].reshape(-1, 3).tolist()}) > 6
    assert {p.name for p in folder.iterdir()} == {"profile.json", "profile.png"}


@pytest.mark.parametrize(
    "body, told",
    [
        (
            "print('Config'); print('error: val_path: no such data', file=sys.stderr); sys.exit(2)",
            "failed: val_path: no such data",
        ),
        ("print('step 1'); raise RuntimeError('CUDA out of memory')", "failed: RuntimeError: CUDA out of memory"),
        ("sys.exit(3)", "failed: nothing was printed, code 3"),
        ("import os; print('step 1', flush=True); os.kill(os.getpid(), 9)", "was ended by SIGKILL (out of memory?)"),
    ],
)
def test_a_failed_run_is_told_in_one_line(yaml_file, tmp_path, capsys, fake_run, body, told):
    fake_run(body)
    assert profile.main([str(yaml_file), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: run.py {told}"
    assert not (tmp_path / "out").exists()


def test_mistakes_are_told_before_anything_runs(yaml_file, tmp_path, capsys):
    for arguments, told in (
        ([str(tmp_path / "gone.yaml")], "gone.yaml does not exist"),
        ([str(yaml_file), "lrr=1"], "lrr: unknown key, did you mean lr?"),
        ([str(yaml_file), "--steps", "0"], "--steps must be at least 1"),
        ([str(yaml_file), "coconut=False", "cot=True", "--stage", "1"], "--stage: 1, but a model with cot"),
    ):
        assert profile.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and told in error and error.count("\n") == 1


@pytest.mark.parametrize("how", [["-m", "analysis.profile"], ["analysis/profile.py"]])
def test_both_ways_to_start_it(how):
    done = subprocess.run([sys.executable, *how, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "suffix+head" in done.stdout, done.stderr


@pytest.mark.skipif("max_steps" not in Config.model_fields, reason="run.py cannot be cut short yet")
def test_a_real_run_from_end_to_end(tmp_path, capsys):
    command = [sys.executable, "data/two_chain.py", "--out", str(tmp_path), "--sizes", "40", "6", "2"]
    subprocess.run([*command, "--hops", "2", "3", "--nodes", "6", "8", "--species", "12"], cwd=ROOT, check=True)
    data = {"train_path": str(tmp_path / "prosqa_train.json"), "val_path": str(tmp_path / "prosqa_valid.json")}
    tiny = {"model_id": str(ROOT / "backbones/prosqa_tiny"), "from_scratch": True, "device": "cpu", "batch_size_training": 16}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG | data | tiny | {"max_new_tokens": 4, "save_path": str(tmp_path / "runs")}))
    arguments = ["--steps", "3", "--warmup", "1", "--peak", "0.1", "--out", str(tmp_path / "out")]  # 4 updates in 2 epochs
    assert profile.main([str(path), *arguments]) == 0, capsys.readouterr().err
    written = json.loads((tmp_path / "out/m3-stage2/profile.json").read_text())
    assert (written["steps"], written["warmup"], written["n_latents"]) == (3, 1, 2)
    assert list(written["phases"]) == list(PHASES) and all(p["median_ms"] > 0 for p in written["phases"].values())
    rates = written["rates"]
    assert 0 < rates["supervised_share"] < 1 and 0 <= rates["padded_share"] < 1
    assert rates["mfu"] == pytest.approx(rates["tflops_per_s"] / 0.1, rel=1e-6)
    assert written["evaluation"]["rows"] == 6 and written["peak_memory_gb"] > 0
    assert not (tmp_path / "runs").exists(), "the configured run folder is left alone"
