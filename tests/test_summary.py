"""The summary of runs: levels with n and interval from the records, the picture, and errors."""

import json

import pytest

from analysis import summary


def make_run(folder, accuracies=(0.2, 0.5), test=((1, True), (1, True), (2, True), (2, False))):
    folder.mkdir(parents=True)
    about = {"model_key": "m3", "config": {"feedback_mode": "continuous"}, "versions": {"torch": "x"}}
    (folder / "run.json").write_text(json.dumps(about))
    records = []
    for epoch, accuracy in enumerate(accuracies):
        records.append({"event": "train_epoch", "epoch": epoch, "seconds": 3.0})
        evaluation = {"event": "eval", "epoch": epoch, "stage": epoch, "n_latents": epoch, "eval/gen_tokens": 5.0}
        records.append(evaluation | {"correct": round(10 * accuracy), "total": 10})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"event": "ev')
    rows = [{"n_steps": n, "correct": c, "margin": 1.0, "two_choice_correct": c, "generated_tokens": 7} for n, c in test]
    (folder / "eval_prosqa_test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_wilson_interval():
    assert summary.level(8, 10)["ci95"] == pytest.approx([0.4901625, 0.9433178], abs=1e-6)


def test_numbers_come_from_the_records(tmp_path, capsys):
    make_run(tmp_path / "runs/m3_coconut")
    assert summary.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out/summary.json").read_text())["runs"][0]
    assert written["levels"]["test"] | {"ci95": 0} == {"correct": 3, "n": 4, "accuracy": 0.75, "ci95": 0}
    assert written["levels"]["validation"]["correct"] == 5 and written["train_seconds"] == 6.0
    assert {k: (v["correct"], v["n"]) for k, v in written["test_by_steps"].items()} == {"1": (2, 2), "2": (1, 2)}
    assert "1: 100 (2)  2: 50 (2)" in capsys.readouterr().out
    assert (tmp_path / "out/accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert "| m3_coconut | continuous | 1 | test, n = 4 | 75.0 % |" in " ".join(
        (tmp_path / "out/summary.md").read_text().split()
    )


def test_a_folder_without_runs_is_an_error(tmp_path, capsys):
    assert summary.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "holds no run folders" in capsys.readouterr().err and not (tmp_path / "out").exists()
