"""The noise command on a real checkpoint: its files, baselines, stopping and going on, failures and mistakes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT

import run
from analysis import noise
from analysis.noise_results import counted
from analysis.noise_sweep import BASELINES
from analysis.subject import Problems, Subject
from stopping import REQUEUE

INFO = (
    "schema_version timestamp benchmark num_questions noise_type noise_direction noise_scales noise_passes noise_layer "
    "noise_chain schedule max_new_tokens device dtype model checkpoint latent_passes seeds versions"
).split()


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory, small_data) -> Path:
    from run_material import write_config

    folder = tmp_path_factory.mktemp("noise")
    assert run.main([write_config(folder, small_data, "m3", num_epochs=3)]) == 0
    return folder / "runs" / "m3"


@pytest.fixture(scope="module")
def rows(small_data) -> list[dict]:
    return json.loads((small_data / "prosqa_train.json").read_text())


@pytest.fixture
def asked(trained_run, rows, tmp_path):
    """asked(n, *flags): run the command on n questions; returns (exit code, output folder)."""

    def ask(n: int, *flags: str, out: str = "out", long: int = 0) -> tuple[int, Path]:
        data = tmp_path / f"questions_{n}_{long}.json"
        too_long = [row | {"question": f"{row['question']} {'yumpus ' * 700}"} for row in rows[:long]]
        data.write_text(json.dumps([*too_long, *rows[long:n]]))
        flags = (*flags, "--data", data, "--num-questions", "all", "--output-dir", tmp_path / out, "--device", "cpu")
        return noise.main(["--checkpoint", str(trained_run), *map(str, flags)]), tmp_path / out

    return ask


def content(path: Path) -> dict:
    """A result without what may differ between runs."""
    result = json.loads(path.read_text())
    result["experiment_info"].pop("timestamp")
    return result


# ---------------------------------------------------------------- files


def test_files_and_schema(asked, capsys):
    code, out = asked(
        8, "--scales", "0", "0.5", "50", "--checkpoint-interval", "5", "--save-results", "--noise-passes", "first"
    )
    assert code == 0
    names = {path.name for path in out.iterdir()}
    assert names >= {"final_results.json", "checkpoint_5.json", "checkpoint_8.json", "baselines.json"}
    assert any(name.startswith("results_2") for name in names)
    result = json.loads((out / "final_results.json").read_text())
    info = result["experiment_info"]
    assert set(INFO) <= info.keys() and info["noise_passes"] == "first" and info["seeds"]["noise"] == 0
    assert (info["noise_layer"], info["noise_chain"], info["schedule"], info["latent_passes"]) == (
        -1,
        "recompute",
        "constant",
        2,
    )
    assert list(result["accuracy_by_noise"]) == ["0", "0.5", "50"]
    level = result["accuracy_by_noise"]["0.5"]
    assert {"correct", "total", "errors", "accuracy", "accuracy_percent", "ci95", "gen_tokens"} <= level.keys()
    assert level["total"] == 8 and level["accuracy"] == level["correct"] / 8 and level["noise_norm"] > 0
    assert result["baselines"].keys() == set(BASELINES)
    question = result["questions"][0]
    assert {"question_id", "question", "expected_answer", "noise_tests"} == question.keys() and len(result["questions"]) == 8
    test = question["noise_tests"][1]
    assert {"noise_scale", "generated_text", "generated_answer", "is_correct", "success", "error"} <= test.keys()
    assert test["noise_norm"] == pytest.approx(0.5 * test["thought_norm"], rel=1e-5)
    texts = [[test["generated_text"] for test in q["noise_tests"]] for q in result["questions"]]
    assert any(clean != noisy for clean, _, noisy in texts)
    image = (out / "accuracy_decay_curve.png").read_bytes()
    assert int.from_bytes(image[image.index(b"pHYs") + 4 :][:4]) == pytest.approx(300 / 0.0254, abs=1)  # dots a metre
    assert "slots: first of 2" in capsys.readouterr().out


def test_clean_answers_are_those_of_evaluation(asked, trained_run):
    code, out = asked(8, "--scales", "0")
    assert code == 0
    subject = Subject.load(trained_run, device="cpu")
    problems = Problems.read(out.parent / "questions_8_0.json", subject.tokenizer)
    expected = [(r["output"], r["correct"]) for r in subject.answers(subject.prompts(problems))]
    tests = [q["noise_tests"][0] for q in json.loads((out / "final_results.json").read_text())["questions"]]
    assert [(t["generated_text"], t["is_correct"]) for t in tests] == expected


def test_baselines_are_what_they_are_called(asked):
    """Zeroed thoughts are targeted noise against them of scale 1."""
    flags = ("--noise-type", "targeted", "--noise-direction", "opposite", "--scales", "1")
    code, out = asked(8, *flags)
    assert code == 0
    result, held = (json.loads((out / name).read_text()) for name in ("final_results.json", "baselines.json"))
    texts = {name: [test["generated_text"] for test in tests] for name, tests in held["baselines"].items()}
    assert texts["zeroed"] == [q["noise_tests"][0]["generated_text"] for q in result["questions"]]
    assert len({tuple(text) for text in texts.values()}) >= 4


def test_each_type_has_its_folder_and_baselines_are_shared(asked):
    code, out = asked(3, "--noise-type", "snr", "dropout", "--scales", "0", "0.5")
    assert code == 0
    results = {path.parent.name: json.loads(path.read_text()) for path in out.glob("*/final_results.json")}
    assert results.keys() == {"snr", "dropout"}
    assert all(name == result["experiment_info"]["noise_type"] for name, result in results.items())
    assert results["snr"]["baselines"] == results["dropout"]["baselines"] and (out / "baselines.json").is_file()


def test_the_same_noise_in_another_batch(asked):
    flags = ("--noise-type", "gaussian", "--scales", "0.5", "5")
    small, large = (asked(8, *flags, "--batch-size", size, out=f"out{size}")[1] for size in (3, 100))
    questions = [content(out / "final_results.json")["questions"] for out in (small, large)]
    for a, b in zip(*questions):
        for one, other in zip(a["noise_tests"], b["noise_tests"]):
            assert one["generated_text"] == other["generated_text"]
            assert one["noise_norm"] == pytest.approx(other["noise_norm"], rel=1e-4)


# ---------------------------------------------------------------- stopping and going on


SLOW = ("--checkpoint-interval", "4", "--batch-size", "4", "--scales", *(str(i / 4) for i in range(40)))


def test_a_killed_and_a_stopped_run_go_on(asked, trained_run, tmp_path):
    _, whole = asked(16, *SLOW, out="whole")
    out, seen = tmp_path / "out", []
    command = [sys.executable, "analysis/noise.py", "--checkpoint", trained_run, "--data", tmp_path / "questions_16_0.json"]
    command += ["--num-questions", "all", "--device", "cpu", "--output-dir", out, *SLOW]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([*map(str, command)], cwd=ROOT, stdout=log, stderr=log)
    assert wait_for(lambda: (out / "checkpoint_4.json").is_file() or process.poll() is not None)
    process.kill()
    assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert not (out / "final_results.json").exists()

    def stop() -> None:
        seen.append(wait_for((out / "checkpoint_12.json").is_file))
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    thread = threading.Thread(target=stop)
    thread.start()
    code, _ = asked(16, *SLOW)
    thread.join()
    signal.signal(signal.SIGTERM, before)
    assert seen == [True] and code == REQUEUE and not (out / "final_results.json").exists()
    assert asked(16, *SLOW)[0] == 0
    assert content(out / "final_results.json")["questions"] == content(whole / "final_results.json")["questions"]
    stamp = (out / "final_results.json").stat().st_mtime_ns
    assert asked(16, *SLOW)[0] == 0 and (out / "final_results.json").stat().st_mtime_ns == stamp  # finished: only reported


def wait_for(condition, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_other_settings_do_not_go_on_with_a_file(asked, capsys):
    assert asked(4, "--scales", "0", "1")[0] == 0
    assert asked(4, "--scales", "0", "2")[0] == 2
    assert "noise_scales" in capsys.readouterr().err
    assert asked(4, "--scales", "0", "1", "--seed", "1")[0] == 2
    assert "seeds" in capsys.readouterr().err


def test_never_into_a_run_folder(asked, trained_run, capsys):
    assert asked(4, "--scales", "0", out=str(trained_run / "noise"))[0] == 2
    assert "run folder" in capsys.readouterr().err and not (trained_run / "noise").exists()


# ---------------------------------------------------------------- failures


def test_few_failures_are_errors_and_no_wrong_answers(asked):
    code, out = asked(30, "--scales", "0", "1", long=1)
    assert code == 0
    result = json.loads((out / "final_results.json").read_text())
    level = result["accuracy_by_noise"]["1"]
    assert (level["total"], level["errors"]) == (29, 1) and result["paired_with_clean"]["1"]["n"] == 29
    test = result["questions"][0]["noise_tests"][1]
    assert not test["success"] and test["generated_text"] is None and "positions" in test["error"]


def test_many_failures_claim_nothing(asked, capsys):
    code, out = asked(10, "--scales", "0", "1", long=2)
    assert code == 1 and "5 %" in capsys.readouterr().err
    result = json.loads((out / "final_results.json").read_text())
    assert not result["accuracy_claimed"] and result["fits"] is None
    assert result["accuracy_by_noise"]["1"]["accuracy"] is None and result["accuracy_by_noise"]["1"]["errors"] == 2
    assert not (out / "accuracy_decay_curve.png").exists()
    assert noise.report(result)  # a table without accuracies


def test_empty_text_is_a_wrong_answer():
    tests = [{"success": True, "is_correct": False, "generated_tokens": 0, "thought_norm": None, "noise_norm": None}]
    level = counted(tests)
    assert (level["total"], level["errors"], level["accuracy"], level["label"]) == (1, 0, 0.0, "Broken")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--scales", "-1"), "scales"),
        (("--noise-type", "pink"), "Unknown noise_type 'pink'"),
        (("--schedule", "steep"), "Unknown schedule"),
        (("--noise-layer", "9"), "noise_layer 9"),
        (("--noise-passes", "3", "--scales", "0", "1"), "slot 3"),
        (("--model", "x"), "one of them"),
        (("--benchmark", "mmlu"), "untrained models"),
    ],
)
def test_mistakes_are_one_line(asked, capsys, flags, said):
    assert asked(2, *flags)[0] == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ") and said in error[-1]
