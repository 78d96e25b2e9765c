"""The table by stages: every column, counts and operations by hand, which checkpoints, exit codes."""

import json
import shutil

import numpy as np
import pytest
import torch
from lahr_material import lahr
from scoring_material import train_runs, with_other_letters
from tiny import build

from accounting import Shape, training_flops
from analysis.scoring import score, summary
from analysis.stage_table import COLUMNS, last_of_stages, main, steps_trained
from analysis.step_rates import step_flops, step_rates
from analysis.subject import Problems, Subject
from coconut import decoder_blocks
from tokens import TokenTable, get_dataset

FAST = ["--repeats", "3", "--steps", "1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, own_cache):
    return train_runs(tmp_path_factory.mktemp("runs"), ("abc", "cot"))


@pytest.fixture(scope="module")
def folder(runs, tmp_path_factory):
    """Where the command has written about both runs."""
    folder = tmp_path_factory.mktemp("out")
    command = [str(runs["cot"]), str(runs["abc"]), "--data", str(runs["data"]), *FAST]
    assert main([*command, "--output", str(folder / "new/stages.json")]) == 0
    return folder / "new"


@pytest.fixture(scope="module")
def rows(folder) -> list[dict]:
    return json.loads((folder / "stages.json").read_text())["rows"]


# ---------------------------------------------------------------- what is written


def test_every_column_is_there(rows, folder):
    assert [(row["run"], row["stage"]) for row in rows] == [("cot", 0), ("abc", 0), ("abc", 1), ("abc", 2)]
    for row in rows:
        assert COLUMNS.keys() <= row.keys()
        assert row["processed_tokens_per_s"] >= row["supervised_tokens_per_s"] > 0
        assert row["own_comparable_between_stages"] is False
        assert all(row[key] is not None for key in COLUMNS.keys() - {"routed_fraction"})
        assert row["step_ms_range"][0] <= row["step_ms"] <= row["step_ms_range"][1]
    assert [row["routed_fraction"] is None for row in rows] == [True, False, False, False]
    text = (folder / "stages.md").read_text()
    headings = {cell.strip() for line in text.splitlines() if line.startswith("| run") for cell in line.split("|")}
    assert {heading for heading, _ in COLUMNS.values()} <= headings
    assert "not comparable between stages" in text and text.count("| abc ") == 6
    notes = json.loads((folder / "stages.json").read_text())["notes"]
    assert "not comparable" in notes["own"]


def test_numbers_are_those_of_scoring(rows, runs):
    assert len({row["answer_sha256"] for row in rows}) == 1 and len({row["own_sha256"] for row in rows}) == 3
    subject = Subject.load(runs["abc"], "2")
    found = score(subject, Problems.read(runs["data"], subject.tokenizer), 1)
    row, wanted = rows[2], summary(found)
    assert (row["own_loss"], row["own_perplexity"]) == (wanted["loss"], wanted["perplexity"])
    assert all(row[key] == wanted[key] for key in ("answer_loss", "answer_perplexity", "exact_match"))
    assert row["checkpoint"].endswith("abc/checkpoint_2")
    assert (row["thoughts_mean"], row["thoughts_max"]) == (1.0, 1)
    assert (rows[3]["thoughts_mean"], rows[3]["thoughts_max"]) == (1.6, 2), "four of ten have but one step"


def test_steps_are_counted_from_the_log(rows, runs, tmp_path):
    """32 rows, 8 a batch; the plain run takes a step after each, the other after two."""
    assert [(row["steps_at_stage"], row["steps_total"]) for row in rows] == [(8, 8), (2, 2), (2, 4), (2, 6)]
    lines = (runs["abc"] / "metrics.jsonl").read_text().splitlines()
    again = [line for line in lines if '"step"' in line]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, *again, '{"event": "st']))
    assert steps_trained(tmp_path, 1, 2) == (2, 4), "what was done twice counts once"


def test_the_last_checkpoint_of_each_stage(runs, tmp_path):
    assert last_of_stages(runs["abc"]) == {0: 1, 1: 2, 2: 3} and last_of_stages(runs["cot"]) == {0: 2}
    copy = shutil.copytree(runs["abc"], tmp_path / "copy")
    (copy / "checkpoint_2").unlink()
    assert last_of_stages(copy) == {0: 1, 2: 3}, "a stage without a kept checkpoint has no row"


# ---------------------------------------------------------------- work by hand


def test_work_is_that_of_the_training_rows(runs):
    """One update of two micro-batches, all rows at stage 2; the model is trained on."""
    subject = Subject.load(runs["abc"], "3")
    subject.config = subject.config.model_copy(update={"uniform_prob": 0.0, "batch_size_training": 16})
    table = TokenTable(get_dataset(subject.config.train_path, subject.tokenizer))
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    found = step_rates(subject, table, 2, 2, repeats=3, steps=1, per_update=2)
    problems = Problems.read(subject.config.train_path, subject.tokenizer)
    encode = subject.tokenizer.encode
    supervised, question, latents = 0, 0, 0
    for row in problems.rows:
        supervised += sum(len(encode(step + "\n")) for step in row["steps"][2:]) + len(encode("### " + row["answer"])) + 1
        question += len(encode(row["question"] + "\n")) + 2
        latents += min(2, len(row["steps"]))
    assert found["supervised_tokens_per_step"] == supervised
    assert found["processed_tokens_per_step"] == supervised + question + latents
    assert found["rows_per_step"] == 32 and found["backbone_calls_per_step"] == 2 * (2 + 1)
    ratio = found["processed_tokens_per_s"] / found["supervised_tokens_per_s"]
    assert ratio == pytest.approx((supervised + question + latents) / supervised)
    assert found["samples_per_s"] * found["step_ms"] == pytest.approx(32 * 1000)
    after = subject.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"base_causallm.model.routers.1.score.weight", "base_causallm.model.routers.1.threshold"} <= changed


@pytest.mark.parametrize(("threshold", "share"), [(-1e9, 1.0), (1e9, 0.0)])
def test_routed_share_and_operations_follow_the_routers(runs, threshold, share):
    subject = Subject.load(runs["abc"], "3")
    base = subject.model.base_causallm
    base.model.routers["1"].threshold.fill_(threshold)
    table = TokenTable(get_dataset(subject.config.train_path, subject.tokenizer))
    found = step_rates(subject, table, 2, 2, repeats=3, steps=2)
    assert found["routed_fraction"] == share
    d, f, n = 32, 128, 6
    memory = d * 4 * 16 + 4 * n * 16 + 2 * d * d + 4 * 6 * d  # queries, keys, gate and out, reads (top 6 of 6)
    all_take = 4 * d * d + 3 * d * f + memory + d + share * (4 * d * d + 3 * d * f)
    linear = 6 * all_take * found["processed_tokens_per_step"] + 6 * d * 103 * found["supervised_tokens_per_step"]
    rest = found["flops_per_step"] - linear  # attention: 6 d T^2 of each row and layer, of rows of 30 to 90 tokens
    squares = rest / (6 * d * (1 + share)) / found["rows_per_step"]
    assert 30**2 < squares < 90**2


def test_operations_of_a_dense_model_are_those_of_accounting():
    lengths, labelled = [11, 7, 30], 13
    for base in (lahr(), build("gpt2"), build("llama")):
        wanted = training_flops(Shape.of(base, decoder_blocks(base)), lengths, labelled)
        assert step_flops(base, lengths, None, labelled) == pytest.approx(wanted)


def test_operations_of_selected_tokens():
    """Routed layers 1 and 3 of four, width 16: the rest of the model is that of the dense one."""
    lengths, d, f = [10, 20], 16, 24
    dense, routed = lahr(), lahr("mod")
    taken = np.array([[10, 2], [20, 5]])
    both = step_flops(routed, lengths, taken, 4)
    spared = 6 * (4 * d * d + 3 * d * f) * (30 - 7) + 6 * d * (10**2 + 20**2 - 2**2 - 5**2)
    routers = 6 * 2 * d * 30
    assert both == pytest.approx(step_flops(dense, lengths, None, 4) - spared + routers)
    predictor = step_flops(lahr("mod", mod_router="predictor"), lengths, taken, 4) - both
    assert predictor == pytest.approx(6 * 2 * (d * d / 4 + d / 4) * 30)


@pytest.mark.parametrize("share", [True, False])
def test_operations_of_a_memory_do_not_grow_with_its_values(share):
    """heads 2, top 3, sub-keys 5, key width 8: query, keys, gate and out, and the values read."""
    d, lengths = 16, [9, 4]
    memory = 2 * 8 * d + 2 * 5 * 8 + 2 * d * d + 2 * 3 * d
    more = step_flops(lahr("memory", memory_share_values=share), lengths, None, 3) - step_flops(lahr(), lengths, None, 3)
    assert more == pytest.approx(6 * memory * 13)
    bank = step_flops(lahr("memory", memory_type="bank", memory_slots=25), lengths, None, 3) - step_flops(
        lahr(), lengths, None, 3
    )
    assert bank == pytest.approx(6 * (d * d + 25 * d + 2 * d * d + d + 3 * d) * 13)


# ---------------------------------------------------------------- mistakes


def test_too_few_repeats_make_no_median(runs):
    with pytest.raises(ValueError, match="at least 3 repeats"):
        step_rates(Subject.load(runs["cot"]), None, 0, 0, repeats=2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"run": "nothing"}, "has no run.json"),
        ({"--data": "nothing.json"}, "does not exist"),
        ({"--train_data": "nothing.json"}, "does not exist"),
        ({"--repeats": "2"}, "must be at least 3"),
        ({"--output": "x.md"}, "must end in .json"),
    ],
)
def test_mistakes_are_one_line(runs, tmp_path, capsys, changes, words):
    values = {"run": runs["cot"], "--data": runs["data"], "--repeats": "3", "--output": tmp_path / "x.json"}
    for key, value in changes.items():
        values[key] = value if key == "--repeats" else tmp_path / value
    run = values.pop("run")
    assert main([str(run), *(str(word) for pair in values.items() for word in pair)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and words in errors[0]
    assert not (tmp_path / "x.json").exists()


def test_a_run_without_checkpoints_is_said(runs, tmp_path, capsys):
    shutil.copy(runs["cot"] / "run.json", tmp_path)
    assert main([str(tmp_path), "--data", str(runs["data"]), "--output", str(tmp_path / "x.json")]) == 2
    assert "holds no checkpoint_N" in capsys.readouterr().err


def test_other_answers_end_it(runs, tmp_path, capsys):
    other = with_other_letters(runs["cot"], tmp_path)
    command = [str(runs["cot"]), str(other), "--data", str(runs["data"]), "--output", str(tmp_path / "x.json"), *FAST]
    assert main([*command, "--no_exact_match"]) == 1
    assert "error: not the same answer targets" in capsys.readouterr().err and not (tmp_path / "x.json").exists()
