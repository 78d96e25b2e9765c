"""A whole study as users start it: the plan, its mistakes, and a real one that is killed and goes on to the same report."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from run_material import write_config

from analysis.study import main
from analysis.study_plan import Plan, load_study_config

CONFIGS = {
    "m1": {"coconut": False, "cot": True, "c_thought": 0},
    "m3": {"feedback_mode": "continuous", "resume": 1},
    "m4b": {"feedback_mode": "learned_shared", "resume": 1},
    "m5": {"feedback_mode": "pause_curriculum", "resume": 1},
}
NAMES = {"m1": "m1_cot", "m3": "m3_coconut", "m4b": "m4b_shared", "m5": "m5_pause"}


@pytest.fixture
def study_yaml(tmp_path, small_data):
    """study_yaml(**changes): a study of tiny runs, by default M3 and M5 with one seed and two quick experiments."""

    def write(models=("m3", "m5"), seeds=None, **changes) -> Path:
        start = write_config(
            tmp_path, small_data, "stage0", coconut=False, cot=False, no_thoughts=False, no_cot=False, num_epochs=1
        )
        members = {}
        for key in models:
            path = write_config(tmp_path, small_data, NAMES[key], **CONFIGS[key])
            members[key] = {"config": path, "seeds": (seeds or {}).get(key, [10 if key == "m4b" else 0]), "hours": 0.5}
            members[key] |= {"start": start} if key != "m1" else {}
        values = {
            "name": "tiny", "results": str(tmp_path / "results"), "runs": str(tmp_path / "runs"), "data_dir": str(small_data),
            "models": members, "experiments": {"psr": {"sigmas": "1"}}, "num_samples": 2,
            "processes": 2, "threads": 1, "quick": list(models)[:1],
        }  # fmt: skip
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(values | changes))
        return path

    return write


def test_the_plan_trains_shared_stages_once_and_measures_in_order(study_yaml):
    path = study_yaml(("m5", "m4b", "m3", "m1"), {"m3": [0, 1], "m5": [0, 1], "m4b": [10]}, checkpoints=["final", "best"])
    plan = Plan(load_study_config(path))
    jobs = {job.name: job for job in plan.jobs()}
    assert [run.label for run in plan.runs] == ["m1", "m3", "m4b", "m5", "m3-s1", "m5-s1"]
    assert [name for name in jobs if "stage0" in name] == ["train stage0-seed0", "train stage0-seed10", "train stage0-seed1"]
    assert jobs["train m5-s1"].needs == ("train stage0-seed1",) and "seed=1" in jobs["train m5-s1"].command
    assert f"load_model_path={plan.starts['stage0-seed1'].last_checkpoint}" in jobs["train m5-s1"].command
    assert {"train m5-s1", "measure m3-s1 final", "measure m1 final"} <= set(jobs["measure m5-s1 final"].needs)
    assert "measure m3 best" in jobs and "causal_sanity" not in " ".join(jobs["measure m3 final"].command)
    few = Plan(load_study_config(path), models=["m3"], repeats=[1])
    assert [run.label for run in few.runs] == ["m3-s1"]
    quick = Plan(load_study_config(path), quick=True)
    assert [run.label for run in quick.runs] == ["m5"] and quick.results != plan.results


def test_mistakes_are_one_line_that_names_the_key(study_yaml, tmp_path, capsys):
    def error(path: Path, *more: str) -> str:
        assert main([str(path), *more]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1
        return message

    assert "does not exist" in error(tmp_path / "nothing.yaml")
    assert "experiments.coruption" in error(study_yaml(experiments={"coruption": None}))
    assert "nonsense" in error(study_yaml(nonsense=1))
    assert "noise floor" in error(study_yaml(("m4b", "m5"), {"m4b": [0], "m5": [0]}))
    assert "twice" in error(study_yaml(seeds={"m3": [1, 1]}))
    assert "checkpoints" in error(study_yaml(checkpoints=["last"]))
    swapped = yaml.safe_load(study_yaml().read_text())
    swapped["models"]["m3"]["config"] = swapped["models"]["m5"]["config"]
    (tmp_path / "swapped.yaml").write_text(yaml.safe_dump(swapped))
    assert "trains m5" in error(tmp_path / "swapped.yaml")
    assert "m0" in error(study_yaml(), "--models", "m0") and "repeats" in error(study_yaml(), "--seeds", "7")


def test_a_dry_run_says_what_is_left_and_touches_nothing(study_yaml, tmp_path, capsys):
    path = study_yaml(processes=2)
    before = sorted(tmp_path.rglob("*"))
    assert main([str(path), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"train m3 +0.50 h  to do", shown) and "about 1.0 h of work left: 0.5 h with 2 at a time" in shown
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["study_quickstart.yaml", "study_prosqa.yaml"])
def test_the_committed_studies_load(name):
    plan = Plan(load_study_config(ROOT / "args" / name))
    assert {run.model for run in plan.runs} >= {"m1", "m3", "m4", "m4b", "m5", "m0"}
    assert {run.repeat for run in plan.runs if run.model in ("m3", "m5")} == {0, 1, 2}


def start(path: Path) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "disabled"}
    command = [sys.executable, "-m", "analysis.study", str(path)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)


def lasting(folder: Path) -> dict:
    """What all result files say, without times, versions of a dirty tree, and commands."""

    def clean(value):
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items() if k not in ("elapsed_seconds", "seconds", "command", "versions")}
        return [clean(item) for item in value] if isinstance(value, list) else value

    names = ("results.json", "verdict.json")
    return {
        str(p.relative_to(folder)): clean(json.loads(p.read_text())) for p in sorted(folder.rglob("*.json")) if p.name in names
    }


def test_a_killed_study_goes_on_to_the_same_results(study_yaml, tmp_path):
    """Killed with its children while the experiments run; the uninterrupted study starts from the same trained runs."""
    path = study_yaml(("m3",))
    process, out = start(path), tmp_path / "results" / "final"
    deadline = time.time() + 300
    while not list(out.glob("*/m3_*.jsonl")) and process.poll() is None and time.time() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert list(out.glob("*/m3_*.jsonl")) and not (tmp_path / "results" / "report.html").exists()
    assert start(path).wait(300) == 0
    resumed = lasting(out)
    assert {"psr/results.json", "curriculum/results.json", "verdict.json"} <= resumed.keys()
    report = (tmp_path / "results" / "report.md").read_text()
    shutil.rmtree(out)
    assert start(path).wait(300) == 0
    assert lasting(out) == resumed
    assert (tmp_path / "results" / "report.md").read_text().splitlines()[:40] == report.splitlines()[:40]
