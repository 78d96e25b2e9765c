"""Table 1 from run folders: levels and intervals, tokens, seeds, hybrids that are not called latent, what is quoted, files."""

import json
import shutil
from pathlib import Path

import pytest

from analysis import table1
from analysis.evaluations import find_evaluations, read_evaluation
from analysis.gsm_recipe import make_row
from analysis.table1 import cells, tasks_of

TEXT = {"cot": "<<1+1=2>>\n### 2"}


@pytest.fixture
def lay(tmp_path):
    """lay(task, row, ...): the folders that training and evaluating a row leave, without weights; returns the records' file."""

    def make(task="gsm", row="coconut", right=40, n=100, seed=0, epochs=None, outputs=None, tokens=2, latents=None, **changes):
        made = make_row(task, row, seed, [f"{key}={value}" for key, value in changes.items()])
        train, test = made.train, made.test
        epochs = train.num_epochs if epochs is None else epochs
        folder, evaluated = tmp_path / train.run_dir, tmp_path / test.run_dir
        folder.mkdir(parents=True, exist_ok=True)
        evaluated.mkdir(parents=True, exist_ok=True)
        size = train.effective_batch_size or 128
        facts = {"config": train.model_dump(), "micro_batches_per_update": size // train.batch_size_training}
        (folder / "run.json").write_text(json.dumps(facts))
        latents = (train.max_latent_stage * train.c_thought if train.markers else 0) if latents is None else latents
        outputs = outputs or [TEXT.get(row, "### 2")]
        record = {"n_latents": latents, "generated_tokens": latents + tokens}
        records = [record | {"idx": i, "correct": i < right, "output": outputs[i % len(outputs)]} for i in range(n)]
        file = evaluated / f"eval_{task}_test.jsonl"
        file.write_text("".join(json.dumps(r) + "\n" for r in records))
        about = {"checkpoint": str(folder / f"checkpoint_{epochs}"), "config": test.model_dump()}
        file.with_suffix(".json").write_text(json.dumps(about))
        return file

    return make


@pytest.fixture
def lines(tmp_path):
    """lines(): {name of a line: the line} of the only task below tmp_path."""

    def read() -> dict[str, dict]:
        ((_, found),) = tasks_of([read_evaluation(file) for file in find_evaluations([tmp_path])]).items()
        assert len({line["name"] for line in found}) == len(found) or any(line.get("variant") for line in found)
        return {line["name"]: line for line in found}

    return read


# ---------------------------------------------------------------- levels


def test_one_run_has_wilsons_interval_over_its_questions(lay, lines):
    lay(right=450, n=1319)
    line = lines()["Coconut"]
    assert line["n"] == [1319] and line["accuracy"] == pytest.approx(34.1168, abs=1e-3)
    p, n, z = 450 / 1319, 1319, 1.959964
    centre, half = (p + z * z / (2 * n)) / (1 + z * z / n), z / (1 + z * z / n) * (p * (1 - p) / n + (z / (2 * n)) ** 2) ** 0.5
    assert line["ci95"] == pytest.approx([100 * (centre - half), 100 * (centre + half)], abs=1e-3)
    assert line["paper"] == {"accuracy": 34.1, "std": 1.5, "tokens": 8.2} and line["within_two_std"]
    assert line["remarks"] == []
    assert cells(line)[:7] == ("Coconut", "34.1", "31.6 .. 36.7", "1,319", "0", "34.1 ± 1.5", "8.0")


def test_several_seeds_have_students_interval_over_seeds(lay, lines):
    for seed, right in enumerate((70, 80, 90)):
        lay("prosqa", "coconut", right=right, n=100, seed=seed)
    line = lines()["Coconut"]
    half = 4.302653 * 10 / 3**0.5
    assert line["accuracy"] == 80 and line["ci95"] == pytest.approx([80 - half, 80 + half], abs=1e-4)
    assert [run["seed"] for run in line["runs"]] == [0, 1, 2] and line["sd"] == pytest.approx(10)
    assert not line["within_two_std"] and line["remarks"] == ["100 of 500 test rows"]


def test_the_same_seed_twice_is_refused(lay, tmp_path, capsys):
    file = lay("prosqa", "coconut")
    shutil.copytree(file.parent, tmp_path / "copy")
    assert table1.main([str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "both Coconut on ProsQA with seed 0" in message and str(file) in message and message.count("\n") == 1


# ---------------------------------------------------------------- tokens


def test_latents_count_as_tokens_and_pause_tokens_do_not(lay, lines):
    for row in ("coconut", "pause_as_thought", "wo_curriculum", "pause_token", "wo_thought", "no_cot"):
        lay("gsm", row, tokens=2)
    lay("gsm", "cot", tokens=25)
    found = lines()
    tokens = {
        name: (line["gen_tokens"], line["gen_tokens_eos"], line["latents"]) for name, line in found.items() if line["runs"]
    }
    assert tokens == {
        "CoT": (25, 26, 0),
        "No-CoT": (2, 3, 0),
        "Pause token": (2, 3, 6),
        "Coconut": (8, 9, 6),
        "w/o curriculum": (8, 9, 6),
        "w/o thought": (2, 3, 0),
        "Pause as thought": (2, 3, 6),
    }
    assert cells(found["Coconut"])[8] == "6 included" and cells(found["Pause token"])[8] == "6 not included"


def test_an_answer_that_was_cut_has_no_eos(lay, lines):
    lay("gsm", "cot", tokens=64)  # all that GSM8K may generate
    line = lines()["CoT"]
    assert line["gen_tokens"] == line["gen_tokens_eos"] == 64


# ---------------------------------------------------------------- hybrids


def test_a_checkpoint_that_writes_steps_is_not_called_coconut(lay, lines):
    lay(outputs=["<<1+1=2>>\n### 2"], tokens=20, right=90)
    found = lines()
    assert found["Coconut"]["runs"] == [] and found["Coconut"]["remarks"] == ["not run"]
    hybrid = found["Coconut, hybrid"]
    assert hybrid["accuracy"] == 90 and hybrid["paper"] is None, "it is not compared with the paper's Coconut"
    assert hybrid["hybrid"] == "100.0 % of outputs write steps before the answer"


@pytest.mark.parametrize(("share", "is_hybrid"), [(0, False), (1, False), (2, True)])
def test_a_stray_step_is_said_and_more_are_a_hybrid(lay, lines, share, is_hybrid):
    lay(outputs=["A step. ### 2"] * share + ["### 2"] * (100 - share))
    found = lines()
    assert ("Coconut, hybrid" in found) == is_hybrid
    if share == 1:
        assert found["Coconut"]["remarks"][0] == "1.0 % of outputs write steps"


@pytest.mark.parametrize("row", ["no_cot", "wo_thought", "pause_as_thought", "wo_curriculum"])
def test_every_row_that_is_to_answer_at_once_can_be_a_hybrid(lay, row):
    assert read_evaluation(lay("prosqa", row, outputs=["Tom is a wumpus.\n### Tom is a lempus."])).hybrid
    assert read_evaluation(lay("prosqa", "cot", outputs=["Tom is a wumpus.\n### Tom is a lempus."])).hybrid is None


@pytest.mark.parametrize(("epochs", "stage"), [(6, 1), (12, 3), (13, None), (25, None)])
def test_a_checkpoint_of_an_early_stage_is_a_hybrid_whatever_it_writes(lay, epochs, stage):
    evaluation = read_evaluation(lay(epochs=epochs))
    expected = None if stage is None else f"checkpoint_{epochs} is of stage {stage}, in which chains are still trained"
    assert evaluation.hybrid == expected


def test_another_number_of_latents_is_said(lay, lines):
    lay(latents=4)
    assert "4.0 latents a question, the last stage has 6: wrong resume?" in lines()["Coconut"]["remarks"]


# ---------------------------------------------------------------- rows


def test_icot_is_quoted_unless_it_was_run(lay, lines):
    lay("gsm", "cot")
    line = lines()["iCoT"]
    assert line["remarks"] == ["quoted, not run"] and cells(line)[1] == "–" and cells(line)[5] == "30.0, quoted"
    lay("gsm", "icot", right=30)
    assert lines()["iCoT"]["accuracy"] == 30 and "quoted, not run" not in lines()["iCoT"]["remarks"]


def test_runs_that_depart_from_the_recipe_are_lines_of_their_own(lay, tmp_path):
    lay("prosqa", "coconut", right=97)
    departing = lay("prosqa", "pause_as_thought", right=50, max_train_samples=10_000, effective_batch_size=32)
    own = tasks_of([read_evaluation(file) for file in find_evaluations([tmp_path])])["prosqa"]
    of_row = [line for line in own if line["row"] == "pause_as_thought"]
    assert [len(line["runs"]) for line in of_row] == [0, 1], "the row itself was not run"
    assert of_row[1]["remarks"][:2] == ["10,000 training rows", "effective batch 32"]
    assert read_evaluation(departing).variant == ("10,000 training rows", "effective batch 32")


def test_the_stand_in_is_not_compared_with_the_paper(lay, tmp_path):
    lay("arith_gsm", "coconut")
    (own,) = tasks_of([read_evaluation(file) for file in find_evaluations([tmp_path])])["arith_gsm"]
    assert own["paper"] is None and own["variant"] == () and "the stand-in" in table1.text_of({"arith_gsm": [own]})


def test_other_feedback_modes_are_no_row(lay, tmp_path, capsys):
    file = lay("prosqa", "coconut", feedback_mode="pause_curriculum")
    assert read_evaluation(file).row is None
    lay("gsm", "cot")
    assert table1.main([str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "is no row of Table 1" in said.err and "ProsQA" not in said.out.split("- ours")[0]


# ---------------------------------------------------------------- what an evaluation is of


def test_records_without_a_side_file_belong_to_the_run_beside_them(lay):
    file = lay("gsm", "pause_as_thought")  # in gsm-pause-as-thought-eval
    file.with_suffix(".json").unlink()
    evaluation = read_evaluation(file)
    assert (evaluation.row, evaluation.checkpoint, evaluation.gen_tokens_eos) == ("pause_as_thought", None, 3)


def test_records_that_nothing_describes_are_refused(lay, tmp_path, capsys):
    file = lay("gsm", "cot")
    file.with_suffix(".json").unlink()
    (tmp_path / "runs/gsm/gsm-cot/run.json").unlink()
    assert table1.main([str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "neither run.json nor eval_gsm_test.json" in message and message.count("\n") == 1


def test_no_evaluation_is_a_mistake_with_the_command(tmp_path, capsys):
    assert table1.main([str(tmp_path)]) == 2
    assert "no evaluation on a test set" in capsys.readouterr().err
    assert table1.main([str(tmp_path / "nothing")]) == 2
    assert "is no folder" in capsys.readouterr().err


# ---------------------------------------------------------------- files


def test_all_four_files_say_the_same(lay, tmp_path, capsys):
    lay("gsm", "cot", right=43)
    lay("gsm", "coconut", right=34)
    lay("prosqa", "coconut", right=97)
    out = tmp_path / "out"
    assert table1.main([str(tmp_path / "runs"), str(tmp_path / "runs/gsm"), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    written = (out / "table1.md").read_text()
    assert printed.split("- ours")[0].strip() in written
    (row,) = [line for line in written.splitlines() if line.startswith("| Coconut ") and "34.1 ± 1.5" in line]
    assert [cell.strip() for cell in row.split("|")[2:8]] == ["34.0", "25.5 .. 43.7", "100", "0", "34.1 ± 1.5", "8.0"]
    found = json.loads((out / "table1.json").read_text())["tasks"]
    assert [len(found[task]) for task in ("gsm", "prosqa")] == [8, 8]
    assert {line["row"]: line.get("accuracy") for line in found["gsm"] if line["runs"]} == {"cot": 43.0, "coconut": 34.0}
    picture = (out / "table1.svg").read_text()
    assert "GSM8K" in picture and "ProsQA" in picture and "w/o curriculum" in picture
    assert Path(out / "table1.png").read_bytes().startswith(b"\x89PNG")
