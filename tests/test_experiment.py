"""What all experiments share: gates before results, each row measured once, the same files after a kill, clear mistakes."""

import json
import runpy
import shutil
import sys

import pytest
from conftest import ROOT

from analysis import experiment as harness
from analysis.command import CheckFailed
from analysis.experiment import Experiment, share
from analysis.interventions import Patch
from analysis.measure import EXPERIMENTS

MEASURED = []


def measure(task, ready, part, numbers):
    MEASURED.extend(numbers)
    prompts = task.subject.prompts(task.problems, numbers)
    return [{"correct": r["correct"], "margin": r["margin"]} for r in task.subject.answers(prompts)]


def summarize(task, ready, records):
    return {"accuracy": share(r["correct"] for r in records), "margins": [r["margin"] for r in records]}


def toy(**changes) -> Experiment:
    values = {"name": "toy", "models": ("m3", "m5"), "prepare": lambda task: {}, "measure": measure, "summarize": summarize}
    return Experiment(**values | {"doc": "A toy.", "chunk": 3} | changes)


@pytest.fixture
def command(tiny_runs, small_data, tmp_path):
    MEASURED.clear()
    harness.load_subject.cache_clear()
    data = str(small_data / "prosqa_valid.json")
    return lambda *more, run=tiny_runs["m3"]: ["--checkpoint", str(run), "--data", data, "--output_dir", str(tmp_path), *more]


def result(tmp_path, label="m3") -> dict:
    return json.loads((tmp_path / "toy" / f"{label}_toy.json").read_text())


def lasting(found: dict) -> dict:
    return {key: value for key, value in found.items() if key not in ("elapsed_seconds", "command")}


def test_a_result_says_where_it_comes_from(command, tiny_runs, tmp_path):
    assert toy().main(command()) == 0
    found = result(tmp_path)
    assert found["model"] == found["model_key"] == "m3" and found["n"] == found["accuracy"]["n"] == 11
    assert found["checkpoint"]["file"].endswith("checkpoint_3") and len(found["checkpoint"]["sha256"]) == 64
    assert found["feedback_mode"] == "continuous" and found["n_thoughts"] == 2 and found["n_layers"] == 3
    assert "analysis.toy" in found["command"] and found["versions"]["torch"] and found["schema_version"] == 1
    assert (
        found["gates"]["identity"]["passed"] and found["gates"]["recorded"]["correct"] == found["gates"]["recorded"]["recorded"]
    )
    both = json.loads((tmp_path / "toy" / "results.json").read_text())
    assert both["m3"] == found and "verification" in both


def test_finished_ones_are_skipped_until_something_changes(command, tmp_path, capsys):
    toy().main(command())
    assert MEASURED == list(range(11))
    toy().main(command())
    assert len(MEASURED) == 11 and "finished before" in capsys.readouterr().out
    for more, n in [(["--num_samples", "5"], 5), (["--seed", "1"], 11), (["--seed", "1", "--force"], 11)]:
        MEASURED.clear()
        assert toy().main(command(*more)) == 0
        assert len(MEASURED) == n


def test_a_killed_run_goes_on_with_the_next_row(command, tmp_path):
    """Interrupted in the middle, with a torn last line: no row is measured twice, and the result is the same."""
    toy().main(command())
    whole = result(tmp_path)
    shutil.rmtree(tmp_path / "toy")
    MEASURED.clear()

    def breaks(task, ready, part, numbers):
        if 6 in numbers:
            raise KeyboardInterrupt
        return measure(task, ready, part, numbers)

    with pytest.raises(KeyboardInterrupt):
        toy(measure=breaks).main(command())
    assert not (tmp_path / "toy" / "m3_toy.json").exists()
    with open(tmp_path / "toy" / "m3_toy.jsonl", "a") as file:
        file.write('{"part": "test", "idx": 6, "corr')
    MEASURED.clear()
    assert toy().main(command()) == 0
    assert MEASURED == [6, 7, 8, 9, 10] and lasting(result(tmp_path)) == lasting(whole)


def test_records_of_another_checkpoint_are_not_continued(command, tiny_runs, tmp_path):
    toy().main(command("--epoch", "2"))
    (tmp_path / "toy" / "m3_toy.json").unlink()
    MEASURED.clear()
    toy().main(command("--epoch", "3"))
    assert len(MEASURED) == 11


def test_a_failing_check_writes_the_reason_and_no_result(command, tiny_runs, tmp_path, capsys):
    """The accuracy that training recorded is changed by one: the checkpoint is not what its folder says."""
    run = tmp_path / "m3_coconut"
    shutil.copytree(tiny_runs["m3"], run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["event"] == "eval":
            line["correct"] += 1
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert toy().main(command(run=run)) == 1
    assert not (tmp_path / "toy" / "m3_toy.json").exists() and not MEASURED
    assert "recorded" in json.loads((tmp_path / "toy" / "m3_toy.failed.json").read_text())["reason"]
    assert "check failed" in capsys.readouterr().err


def test_an_instrument_that_does_not_act_fails(command, monkeypatch, tmp_path):
    """Patches that replace nothing leave every answer alone, which must not pass for a result."""
    monkeypatch.setattr(Patch, "__call__", lambda self, layer, pass_, x: None)
    assert toy().main(command()) == 1
    assert "self_replay" in json.loads((tmp_path / "toy" / "m3_toy.failed.json").read_text())["reason"]


def test_an_experiment_can_refuse_its_own_result(command, tmp_path):
    def refuse(task, ready, records):
        raise CheckFailed("restoring everything restores nothing")

    assert toy().main(command()) == 0
    assert toy(summarize=refuse).main(command("--force")) == 1
    assert not (tmp_path / "toy" / "m3_toy.json").exists(), "an older result does not stay beside the refusal"


def test_checks_run_once_for_all_experiments(command, monkeypatch, tmp_path):
    toy().main(command())
    monkeypatch.setattr(harness, "self_checks", lambda *_: pytest.fail("checked again"))
    assert toy(name="other").main(command()) == 0


def test_mistakes_are_one_line(command, tiny_runs, tmp_path, capsys):
    def error(*argv) -> str:
        assert toy().main(list(argv)) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1
        return message

    assert "--checkpoint" in error()
    assert "no checkpoint" in error("--checkpoint", str(tmp_path / "nothing"))
    assert "m1" in error(*command(run=tiny_runs["m1"])) and "study.json" in error("--study", str(tmp_path))
    assert "does not exist" in error(*command("--data", str(tmp_path / "x.json")))
    assert "--num_samples" in error(*command("--num_samples", "0"))
    with pytest.raises(SystemExit) as ended:
        toy().main(["--help"])
    assert ended.value.code == 0 and "--num_samples" in capsys.readouterr().out


def test_a_study_names_its_checkpoints(command, tiny_runs, small_data, tmp_path):
    study = tmp_path / "study"
    study.mkdir()
    runs = [{"label": key, "model": key, "folder": str(tiny_runs[key])} for key in ("m1", "m3", "m5")]
    (study / "study.json").write_text(json.dumps({"runs": runs}))
    argv = ["--study", str(study), "--data", str(small_data / "prosqa_valid.json")]
    assert toy().main([*argv, "--models", "m5"]) == 0
    assert [p.name for p in (study / "final" / "toy").glob("*_toy.json")] == ["m5_toy.json"]
    assert toy().main(argv) == 0
    assert json.loads((study / "final" / "toy" / "results.json").read_text()).keys() == {"m3", "m5", "verification"}
    assert toy().main([*argv, "--models", "m4"]) == 2


@pytest.mark.parametrize("module", EXPERIMENTS)
@pytest.mark.parametrize("as_file", [False, True])
def test_every_experiment_starts_both_ways(module, as_file, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    monkeypatch.setattr(sys, "path", [str(ROOT / "analysis") if as_file else str(ROOT), *sys.path[1:]])
    with pytest.raises(SystemExit) as ended:
        if as_file:
            runpy.run_path(str(ROOT / "analysis" / f"{module}.py"), run_name="__main__")
        else:
            runpy.run_module(f"analysis.{module}", run_name="__main__", alter_sys=True)
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and "--num_samples" in shown and "--study" in shown


def test_a_share_of_nothing_is_no_number():
    assert share([True, False, True, True])["accuracy"] == 0.75
    assert share([]) == {"correct": 0, "n": 0, "accuracy": None, "ci95": None}
