"""The comparison of runs with a reference, on made-up runs whose differences are known."""

import json

import pytest

from analysis.variants import main


def write_run(folder, losses, correct, hashes=None):
    folder.mkdir(parents=True)
    steps = [{"event": "step", "epoch": i // 100, "train/step": i, "train/loss": x} for i, x in enumerate(losses)]
    lines = [*steps, {"event": "train_epoch", "epoch": 0, "seconds": 7.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers = zip(hashes or range(len(correct)), correct)
    (folder / "eval_prosqa_test.jsonl").write_text(
        "".join(json.dumps({"question_hash": str(h), "correct": c}) + "\n" for h, c in answers)
    )


@pytest.fixture
def folders(tmp_path):
    losses, right = [2 - 0.01 * i for i in range(150)], [i % 4 > 0 for i in range(200)]
    write_run(tmp_path / "ref/m1", losses, right)
    write_run(tmp_path / "variants/same/m1", losses, right)
    write_run(tmp_path / "variants/worse/m1", [x + 0.25 for x in losses], [i % 2 > 0 for i in range(200)])
    return tmp_path


def run(folders) -> int:
    return main([str(folders / "variants"), "--reference", str(folders / "ref"), "--out", str(folders / "out")])


def test_differences_of_accuracy_and_loss(folders, capsys):
    assert run(folders) == 0
    rows = {r["variant"]: r for r in json.loads((folders / "out/variants.json").read_text())["runs"]}
    same, worse = rows["same"], rows["worse"]
    assert same["equal_losses"] == same["updates"] == 150 and same["difference"] == {"mean": 0.0, "ci95": [0.0, 0.0]}
    assert worse["mean_loss_difference"] == pytest.approx(0.25) and worse["equal_losses"] == 0
    assert worse["difference"]["mean"] == pytest.approx(-0.25)
    low, high = worse["difference"]["ci95"]
    assert low < -0.25 < high < -0.15 and low > -0.35, "200 paired questions of which a quarter changed"
    assert rows["reference (float32)"]["test"]["correct"] == 150
    table = (folders / "out/variants.md").read_text()
    assert "equal to the bit" in table and "-25.0" in table and "same" in capsys.readouterr().out
    assert (folders / "out/loss_difference.png").stat().st_size > 5000


def test_accuracies_of_unfinished_runs_are_not_compared(folders, capsys):
    for name, epochs in (("same", 1), ("worse", 3)):
        folder = folders / "variants" / name / "m1"
        (folder / "run.json").write_text(json.dumps({"config": {"num_epochs": epochs}}))
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"event": "eval", "epoch": 0}) + "\n")
    assert run(folders) == 0
    rows = {r["variant"]: r for r in json.loads((folders / "out/variants.json").read_text())["runs"]}
    assert "difference" in rows["same"] and "test" not in rows["worse"] and rows["worse"]["updates"] == 150
    assert "worse (unfinished)" in capsys.readouterr().out


def test_other_questions_and_empty_folders_are_refused(folders, capsys):
    write_run(folders / "variants/other/m1", [1.0], [True, False], hashes=["x", "y"])
    assert run(folders) == 2
    assert "are of different questions" in capsys.readouterr().err
    assert main([str(folders / "nothing"), "--reference", str(folders / "ref"), "--out", str(folders / "out")]) == 2
    assert "holds no <variant>/<model>/" in capsys.readouterr().err
