"""The ablations as users start them: the plan, a small one that goes on where it was, scores with forced thoughts, mistakes."""

import io
import json
import os
import subprocess
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

import run
from analysis import ablations
from analysis.ablation_plan import Plan, load_ablations
from analysis.ablation_report import gathered, text
from analysis.stats import wilson
from analysis.subject import Problems, Subject
from files import read_json
from utils import load_config

TINY, FULL = ROOT / "args/ablations.yaml", ROOT / "args/ablations_full.yaml"
SMALL = {"num_epochs": 3, "max_latent_stage": 2, "batch_size_training": 16, "max_new_tokens": 5, "wandb": False}


def small_yaml(folder: Path, data: Path, **changes) -> Path:
    """Two sweeps of one value each, in a folder whose name wants quoting."""
    paths = {"train_path": str(data / "prosqa_train.json"), "val_path": str(data / "prosqa_valid.json")}
    common = {
        "base": str(ROOT / "args/quickstart_m3_coconut.yaml"), "start": str(ROOT / "args/quickstart_stage0.yaml"),
        "test": str(data / "prosqa_valid.json"), "overrides": {},
    }  # fmt: skip
    values = {
        "name": "it's small", "results": str(folder / "the results"), "runs": str(folder / "the runs"), "counts": [0, 1, 3],
        "sweeps": {
            "thoughts": common | {"key": "c_thought", "values": [2, 0]},
            "mixing": common | {"key": "uniform_prob", "values": [0.3]},
        },
        "quick": {"values": {"thoughts": [2]}, "overrides": SMALL | paths, "num_samples": 9},
    }  # fmt: skip
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(values | changes, sort_keys=False))
    return path


# ---------------------------------------------------------------- the plan


@pytest.mark.parametrize(("path", "seeds"), [(TINY, 1), (FULL, 3)], ids=["tiny", "full"])
def test_shipped_plans(path, seeds, monkeypatch):
    """Each training differs from its base in the swept key alone (and in where it begins and what it is called)."""
    monkeypatch.chdir(ROOT)
    plan = Plan(load_ablations(path))
    assert {p.value for p in plan.points if p.sweep == "c_thought"} == {0, 1, 2, 3}
    assert {p.value for p in plan.points if p.sweep == "uniform_prob"} == {0, 0.05, 0.3}
    assert plan.config.counts == [0, 1, 2, 3, 4, 5, 6] and len(plan.points) == 7 * seeds
    assert len({point.folder for point in plan.points}) == 7 * seeds and str(plan.out).startswith("ablation/results/")
    for point in plan.points:
        base = load_config(point.base).model_dump()
        other = {key for key, value in point.config.model_dump().items() if value != base[key]}
        assert other - {"name", "save_path", "seed", "load_model_path"} <= {point.sweep} and point.seed == point.config.seed
        assert getattr(point.config, point.sweep) == point.value
    if path == TINY:
        (start,) = plan.starts.values()
        assert {point.config.load_model_path for point in plan.points} == {str(start.last_checkpoint)}
        jobs = {job.name: job for job in plan.jobs()}
        assert all(jobs[f"train {p.label}"].needs == ("data 0", f"train {start.label}") for p in plan.points)
        assert sum(point.minutes for point in plan.points) / plan.config.processes <= 30


def test_the_plan_is_printed_and_nothing_trained(small_data, tmp_path, capsys):
    assert ablations.main([str(small_yaml(tmp_path, small_data)), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "thoughts-2-s0" in said and "uniform_prob=0.3" in said and "3 trainings, 3 left" in said
    assert not (tmp_path / "the runs").exists() and not (tmp_path / "the results").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": [0, -1]}, "none below 0"),
        ({"sweeps": {}}, "sweeps: dictionary should have at least 1 item"),
        ({"sweep": {}}, "sweep: unknown key"),
        ({"quick": {"values": {"speed": [1]}}}, "speed' is no sweep|speed is no sweep"),
        ({"quick": {"overrides": {"seed": 3}}}, "quick.overrides.seed: is set by the sweeps"),
        ({"quick": {"overrides": {"lrate": 3}}}, "lrate: unknown key"),
    ],
)
def test_mistakes(small_data, tmp_path, capsys, changes, message):
    with pytest.raises(ValueError, match=message):
        load_ablations(small_yaml(tmp_path, small_data, **changes))
    assert ablations.main([str(tmp_path / "small.yaml")]) == 2 and "Traceback" not in capsys.readouterr().err


def test_mistakes_in_the_command(small_data, tmp_path, capsys):
    path = str(small_yaml(tmp_path, small_data))
    assert ablations.main([path, "--processes", "0"]) == 2 and ablations.main([path, "--full"]) == 2
    assert ablations.main([str(tmp_path / "nowhere.yaml")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_the_script_hands_everything_on(tmp_path):
    """Names with spaces and quotes arrive as they are."""
    python = tmp_path / "says its arguments"
    python.write_text("#!/usr/bin/env bash\nprintf '%s|' \"$@\"\n")
    python.chmod(0o755)
    command = ["bash", str(ROOT / "scripts/ablations.sh"), 'it\'s "my own".yaml', "--processes", "2"]
    done = subprocess.run(command, env=os.environ | {"PYTHON": str(python)}, capture_output=True, text=True, check=True)
    assert done.stdout == '-m|analysis.ablations|it\'s "my own".yaml|--processes|2|'


# ---------------------------------------------------------------- a real one


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_data, own_cache) -> tuple[Path, Plan]:
    """What the others start from and one sweep's training are made here, the other by the driver, in a process."""
    folder = tmp_path_factory.mktemp("ablations")
    path = small_yaml(folder, small_data)
    plan = Plan(load_ablations(path), quick=True)
    (start,), (first, _) = plan.starts.values(), plan.points
    for member in (start, first):
        assert run.main(member.command()[2:]) == 0
    said = io.StringIO()
    with redirect_stdout(said):
        assert ablations.main([str(path), "--quick", "--processes", "2"]) == 0
    assert "train thoughts-2-s0: started" not in said.getvalue() and "train mixing-0.3-s0: done" in said.getvalue()
    return path, plan


def test_scores_are_answers_with_so_many_thoughts(finished, small_data):
    _, plan = finished
    for point, trained_with in zip(plan.points, (4, 2)):
        scores = read_json(point.scores)
        assert scores["n_thoughts"] == trained_with and scores["data"]["n"] == 9
        assert list(scores["counts"]) == sorted({"0", "1", "3", str(trained_with)})
        subject = Subject.load(point.folder)
        problems = Problems.read(small_data / "prosqa_valid.json", subject.tokenizer, 9)
        for k, level in scores["counts"].items():
            prompts = subject.prompts(problems, n_thoughts=int(k))
            assert all((tokens == subject.ids.latent).sum() == int(k) for tokens in prompts.tokens)
            records = subject.answers(prompts)
            expected = wilson(sum(r["correct"] for r in records), 9)
            assert level == expected | {"gen_tokens": sum(r["generated_tokens"] for r in records) / 9}
        assert scores["counts"]["3"]["gen_tokens"] > scores["counts"]["0"]["gen_tokens"]


def test_tables_hold_every_value_and_count(finished):
    _, plan = finished
    result = read_json(plan.out / "ablations.json")
    assert list(result["sweeps"]) == ["thoughts", "mixing"] and not result["unfinished"]
    said = (plan.out / "ablations.md").read_text()
    rows = [line for line in said.splitlines() if line.startswith("| 2 ") or line.startswith("| 0.3 ")]
    assert [row.count(" / ") for row in rows] == [4, 4] and [row.count("*") for row in rows] == [0, 1]
    assert "k = 4" in said and said == text(gathered(plan))
    svg = (plan.out / "ablations.svg").read_text()
    assert "Accuracy by c_thought" in svg and "n = 9" in svg and (plan.out / "ablations.png").stat().st_size > 10_000


def test_a_second_start_does_nothing_again(finished, capsys):
    path, plan = finished
    files = [p for folder in (plan.runs, plan.out / "scores") for p in folder.rglob("*") if p.is_file()]
    before = {p: p.stat().st_mtime_ns for p in files}
    assert ablations.main([str(path), "--quick"]) == 0 and ablations.main([str(path), "--quick", "--analyse-only"]) == 0
    said = capsys.readouterr().out
    assert "2 trainings, 0 left" in said and "started" not in said and "scoring" not in said
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_lost_scores_are_measured_again(finished):
    path, plan = finished
    scores = plan.points[0].scores
    before = json.loads(scores.read_text())
    scores.unlink()
    assert ablations.main([str(path), "--quick", "--analyse-only"]) == 0
    assert read_json(plan.out / "ablations.json")["unfinished"] == ["thoughts-2-s0"]
    assert ablations.main([str(path), "--quick"]) == 0
    assert json.loads(scores.read_text()) == before and not read_json(plan.out / "ablations.json")["unfinished"]


def test_runs_with_other_settings_are_not_mixed_in(finished, capsys):
    path, _ = finished
    values = yaml.safe_load(path.read_text())
    values["quick"]["overrides"]["lr"] = 0.5
    other = path.with_name("other.yaml")
    other.write_text(yaml.safe_dump(values, sort_keys=False))
    assert ablations.main([str(other), "--quick"]) == 2
    assert "was trained with another lr" in capsys.readouterr().err
