"""Experiments with branches from the command line: the grid and its tests, what failed, what goes on, and mistakes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from run_material import write_config

import run
from analysis import branching, branching_cost
from analysis.branching_cost import branch_works
from analysis.branching_settings import read_settings
from analysis.noise_asker import trained as trained_asker
from analysis.stats import holm, mcnemar, wilson
from files import read_json

N = 24
FLAGS = ["--scales", "0.5", "2", "--num-branches", "3", "--num-questions", str(N), "--max-new-tokens", "8"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_data, own_cache) -> dict[str, Path]:
    """The run folder of a small model with two thoughts, a data file of many questions, and one with a question too long."""
    folder = tmp_path_factory.mktemp("branching")
    assert run.main([write_config(folder, small_data, "m3", num_epochs=6, lr=3e-3, batch_size_training=4)]) == 0
    rows = json.loads((small_data / "prosqa_train.json").read_text())
    long = rows[3] | {"question": " ".join([rows[3]["question"]] * 20)}
    files = {"long": [*rows[:3], long, *rows[3 : N - 1]], "few": [*rows[:3], long]}
    for name, some in files.items():
        (folder / f"{name}.json").write_text(json.dumps(some))
    return {"run": folder / "runs" / "m3", "data": small_data / "prosqa_train.json", "folder": folder} | {
        name: folder / f"{name}.json" for name in files
    }


def command(trained: dict, out: Path, *flags, data: str = "data") -> list[str]:
    return ["--checkpoint", str(trained["run"]), "--data", str(trained[data]), "--output-dir", str(out), *FLAGS, *flags]


@pytest.fixture(scope="module")
def result(trained, tmp_path_factory) -> tuple[Path, dict]:
    """One whole experiment: the folder and final_results.json."""
    out = tmp_path_factory.mktemp("whole") / "it's here"
    assert branching.main(command(trained, out, "--checkpoint-interval", "10")) == 0
    return out, read_json(out / "final_results.json")


# ---------------------------------------------------------------- what a result holds


def test_the_whole_grid_is_run(result):
    _, found = result
    cells = [(cell["noise_scale"], cell["temperature"]) for cell in found["grid"]]
    assert cells == [(s, t) for s in (0.0, 0.5, 2.0) for t in (0.0, 0.7)]
    info = found["experiment_info"]
    assert info["num_branches"] == 3 and info["noise_scales"] == [0, 0.5, 2] and info["schedule"] == "none"
    assert info["seeds"] == {"noise": 0, "questions": None, "swapped_thoughts": 0, "sampling": 0}
    needed = "schema_version timestamp benchmark num_questions noise_type noise_direction noise_passes noise_layer noise_chain"
    assert {*needed.split(), *"max_new_tokens device dtype model checkpoint latent_passes versions".split()} <= info.keys()
    assert list(found["accuracy_by_noise"]) == ["0", "0.5", "2"] and found["accuracy_claimed"]
    assert len(found["questions"]) == N and all(len(q["noise_tests"]) == 6 for q in found["questions"])


def test_votes_follow_from_the_branches(result):
    _, found = result
    seen = set()
    for question in found["questions"]:
        for test in question["noise_tests"]:
            answers = test["branch_answers"]
            assert len(answers) == len(test["branch_texts"]) == test["num_branches"] == 3
            counts = {answer: answers.count(answer) for answer in answers if answer is not None}
            assert test["vote_distribution"] == counts
            assert test["agreement"] == max(counts.values(), default=0) / 3
            assert test["is_correct"] == (test["majority_answer"] == question["expected_answer"])
            if test["noise_scale"] == 0 and test["temperature"] == 0:
                assert len(set(test["branch_texts"])) == 1 and test["d_k"] == 0
            elif test["noise_scale"]:
                assert test["d_k"] > 0 and min(test["d_k_pairwise"]) > 0
                assert test["d_k_pair_labels"] == ["(0,1)", "(0,2)", "(1,2)"]
            seen.add(test["agreement"])
    assert len(seen) > 1, "some questions have branches that disagree"
    for cell in found["grid"]:
        tests = [t for q in found["questions"] for t in q["noise_tests"] if t["temperature"] == cell["temperature"]]
        tests = [t for t in tests if t["noise_scale"] == cell["noise_scale"]]
        right = [t["is_correct"] for t in tests]
        assert cell["correct"] == sum(right) and cell["ci95"] == wilson(sum(right), N)["ci95"]
        assert [p["answered"] for p in cell["abstention"]] == [
            sum(3 * t["agreement"] >= k - 0.1 for t in tests) for k in (2, 3)
        ]
        if cell["temperature"]:
            level = found["accuracy_by_noise"][f"{cell['noise_scale']:g}"]
            assert all(level[key] == cell[key] for key in level)
        assert cell["gen_tokens"] > 0 and cell["gen_tokens_all_branches"] == pytest.approx(3 * cell["gen_tokens"])


def test_tests_are_paired_by_question(result):
    _, found = result
    kinds = [test["what"] for test in found["paired"]]
    assert kinds == ["noise"] * 4 + ["temperature"] * 3 + ["branches"] * 6
    by_cell = {
        (cell["noise_scale"], cell["temperature"]): [
            t["is_correct"]
            for q in found["questions"]
            for t in q["noise_tests"]
            if (t["noise_scale"], t["temperature"]) == (cell["noise_scale"], cell["temperature"])
        ]
        for cell in found["grid"]
    }
    for test in found["paired"][:7]:
        first, second = (by_cell[tuple(test[side].values())] for side in ("first", "second"))
        assert {key: test[key] for key in ("b", "c", "p_value")}.items() <= mcnemar(first, second).items()
    assert found["paired"][7]["first"] is None and found["paired"][7]["p_value"] == 1, "one greedy answer is K equal ones"
    adjusted = holm({str(i): test["p_value"] for i, test in enumerate(found["paired"])})
    assert [test["p_holm"] for test in found["paired"]] == list(adjusted.values())


def test_files_and_a_second_start(result, trained, capsys):
    out, found = result
    assert {"checkpoint_10.json", "checkpoint_20.json", "checkpoint_24.json", "report.md", "baselines.json"} <= {
        path.name for path in out.iterdir()
    }
    for name in ("coverage_accuracy.png", "path_diversity.png"):
        assert (out / name).stat().st_size > 20_000
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert branching.main(command(trained, out, "--checkpoint-interval", "10")) == 0
    said = capsys.readouterr().out
    assert "| 2, 0.7" in said and said.count("one greedy answer, ") == 5
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert branching.main(command(trained, out, "--seed", "4")) == 2
    assert "holds an experiment with other settings: seeds" in capsys.readouterr().err


# ---------------------------------------------------------------- stopped


def lasting(questions: list[dict]) -> list[dict]:
    """Records without what another batch rounds otherwise."""
    changing = ("branch_logprobs", "d_k", "d_k_late", "d_k_normalized", "d_k_pairwise")
    return [
        q | {"noise_tests": [{k: v for k, v in t.items() if k not in changing} for t in q["noise_tests"]]} for q in questions
    ]


def waited_for(path: Path, alive) -> None:
    deadline = time.monotonic() + 120
    while not path.is_file():
        assert alive() and time.monotonic() < deadline, "the experiment ended before its first checkpoint"
        time.sleep(0.005)


def test_a_killed_experiment_goes_on_to_the_same_answers(result, trained, tmp_path):
    flags = command(trained, tmp_path, "--checkpoint-interval", "2")
    process = subprocess.Popen([sys.executable, "-m", "analysis.branching", *flags], cwd=ROOT, env=os.environ)
    waited_for(tmp_path / "checkpoint_4.json", lambda: process.poll() is None)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "final_results.json").exists()
    held = read_json(max(tmp_path.glob("checkpoint_*.json"), key=lambda path: int(path.stem.split("_")[1])))
    held["questions"][0]["question"] = "as it was written"
    path = tmp_path / f"checkpoint_{len(held['questions'])}.json"
    path.write_text(json.dumps(held))
    assert branching.main(flags) == 0
    again = read_json(tmp_path / "final_results.json")["questions"]
    assert again[0]["question"] == "as it was written", "what was finished is not asked again"
    assert lasting(again)[1:] == lasting(result[1]["questions"])[1:]


def test_a_stopped_experiment_keeps_what_is_finished(trained, tmp_path, capsys):
    """SIGTERM in the midst of a part: exit code 75, and a checkpoint of the questions so far."""
    flags = command(trained, tmp_path, "--batch-size", "3", "--checkpoint-interval", "5")

    def stop():
        waited_for(tmp_path / "checkpoint_5.json", lambda: True)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert branching.main(flags) == 75
    thread.join()
    assert "the same command goes on from there" in capsys.readouterr().err
    numbers = [int(path.stem.split("_")[1]) for path in tmp_path.glob("checkpoint_*.json")]
    assert 5 <= max(numbers) < N and not (tmp_path / "final_results.json").exists()
    assert branching.main(flags) == 0 and len(read_json(tmp_path / "final_results.json")["questions"]) == N


# ---------------------------------------------------------------- failures


def test_a_failure_is_an_error_and_no_answer(trained, tmp_path):
    assert branching.main(command(trained, tmp_path, data="long")) == 0
    found = read_json(tmp_path / "final_results.json")
    for cell in found["grid"]:
        assert (cell["total"], cell["errors"], cell["branch_errors"]) == (N - 1, 1, 3) and cell["accuracy"] is not None
    failed = found["questions"][3]["noise_tests"][0]
    assert not failed["success"] and "exceeds the model's 256 positions" in failed["error"]
    assert failed["branch_texts"] == [None] * 3 and failed["majority_answer"] is None and failed["agreement"] == 0
    assert failed["d_k"] is None and failed["generated_text"] is None


def test_many_failures_claim_nothing(trained, tmp_path, capsys):
    assert branching.main(command(trained, tmp_path, data="few")) == 1
    assert "claims no accuracy" in capsys.readouterr().err
    found = read_json(tmp_path / "final_results.json")
    assert not found["accuracy_claimed"] and found["paired"] is None and len(found["questions"]) == 4
    for cell in found["grid"]:
        assert cell["accuracy"] is None and cell["abstention"] is None and cell["errors"] == 1


# ---------------------------------------------------------------- what it costs


def test_costs_are_of_the_same_questions(trained, capsys):
    asker = trained_asker(trained["run"], data=trained["data"], num_questions=5, max_new_tokens=4)
    for name, work in branch_works(asker, (1, 3), batch_size=2).items():
        found = work(0)
        assert sorted(place for place, _, _ in found) == [*range(5)]
        assert {len(branches) for _, _, branches in found} == {int(name.removeprefix("K = "))}
    flags = ["--num-questions", "4", "--rounds", "2", "--num-branches", "2", "--data", str(trained["data"])]
    assert branching_cost.main(["--checkpoint", str(trained["run"]), *flags]) == 0
    assert "K = 2 against K = 1: " in capsys.readouterr().out
    assert branching_cost.main(["--checkpoint", str(trained["folder"] / "nowhere")]) == 2


# ---------------------------------------------------------------- settings


def test_shipped_presets(trained, tmp_path):
    branch = read_settings([str(ROOT / "args/noise_branch.yaml"), "--checkpoint", "x"]).base
    assert branch.own.num_branches == 5 and branch.kind == ("gaussian_scaled", None) and branch.noise.schedule == "none"
    assert [(c.scale, c.temperature) for c in branch.cells()] == [(s, t) for s in (0, 0.2, 0.5, 1) for t in (0, 0.7)]
    ablation = dict(read_settings([str(ROOT / "args/noise_ablation.yaml"), "--checkpoint", "x", "--seed", "3"]).variants())
    assert [one.noise.at_step for name, one in ablation.items() if name.startswith("step")] == [1, 2, 3, 4]
    assert [one.own.num_branches for name, one in ablation.items() if name.startswith("branches")] == [3, 5, 7, 10]
    assert {one.settings.seed for one in ablation.values()} == {3} and len(ablation) == 13
    assert ablation["step_1"].settings.scales == [0.2] and ablation["branches_3"].settings.scales == [0.1]


def test_variants_have_folders_and_flags_win(trained, tmp_path, capsys):
    path = tmp_path / "two of them.yaml"
    values = {
        "scales": [1],
        "variants": {"late": {"injection_step": 2}, "never": {"injection_step": 9}, "k": {"num_branches": 4}},
    }
    path.write_text(yaml.safe_dump(values))
    flags = ["--checkpoint", trained["run"], "--data", trained["data"], "--output-dir", tmp_path / "out"]
    flags += ["--num-questions", 4, "--max-new-tokens", 5, "--num-branches", 2]
    assert branching.main([str(path), *map(str, flags)]) == 0
    late, k = (read_json(tmp_path / "out" / name / "final_results.json") for name in ("late", "k"))
    assert late["experiment_info"]["injection_step"] == 2 and k["experiment_info"]["num_branches"] == 2
    assert "never: left out, this model has 2 thoughts" in capsys.readouterr().out
    assert late["questions"][0]["noise_tests"][2]["d_k"] > 0 and (tmp_path / "out" / "baselines.json").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scales", "0"], "scales: one above 0 is needed"),
        (["--num-branches", "1"], "num_branches: input should be greater than or equal to 2"),
        (["--temperature", "0"], "temperature: input should be greater than 0"),
        (["--noise-type", "all"], "branches take one type"),
        (["--injection-step", "3"], "injection_step: this model has 2 thoughts"),
        (["--scales", "-1"], "input should be greater than or equal to 0, got '-1'"),
    ],
)
def test_mistakes(trained, tmp_path, capsys, flags, message):
    assert branching.main(command(trained, tmp_path / "out", *flags)) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "handed_on"),
    [
        (["--checkpoint", "it's mine"], "-m|analysis.branching|args/noise_branch.yaml|--checkpoint|it's mine|"),
        (["my own.yaml", "--seed", "1"], "-m|analysis.branching|my own.yaml|--seed|1|"),
        ([], "-m|analysis.branching|--help|"),
    ],
)
def test_the_script_hands_everything_on(tmp_path, given, handed_on):
    python = tmp_path / "says its arguments"
    python.write_text("#!/usr/bin/env bash\nprintf '%s|' \"$@\"\n")
    python.chmod(0o755)
    command = ["bash", str(ROOT / "scripts/run_branch_experiment.sh"), *given]
    done = subprocess.run(command, env=os.environ | {"PYTHON": str(python)}, capture_output=True, text=True, check=True)
    assert done.stdout == handed_on


def test_a_run_folder_is_no_place_for_results(trained, capsys):
    assert branching.main(command(trained, trained["run"] / "branches")) == 2
    assert "lies in the run folder" in capsys.readouterr().err
