"""Stepwise internalisation (`icot`): its schedule, what goes and what stays, offsets by chance, optimizer resets, resuming."""

import json
import math
from collections import Counter
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from config_material import errors

import run
from dataset import StageDataset, removed_tokens
from run_folder import read_state
from tokens import TokenTable
from training import starts_fresh
from utils import check_config

ICOT = {"cot": True, "coconut": False, "icot": True}
NEVER = 1e9  # a smoothing under which no token goes by chance
EOS = 99


def config_with(**values):
    plain = {"name": "x", "save_path": "out", "train_path": "t.json", "val_path": "v.json"}
    return check_config(plain | ICOT | values, "test")


@pytest.fixture(scope="module")
def table() -> TokenTable:
    """300 rows: steps of 1, 2 and 3 tokens, numbered 10, 11, .. from the left; every tenth row has none."""
    steps = [[[10], [11, 12], [13, 14, 15]] if i % 10 else [] for i in range(300)]
    columns = {
        "question_tokenized": [[1, 2, i % 7] for i in range(300)],
        "steps_tokenized": steps,
        "answer_tokenized": [[50, 51, EOS]] * 300,
        "merges": [False] * 300,
        "level": [0] * 300,
        "idx": list(range(300)),
    }
    return TokenTable(datasets.Dataset.from_dict(columns))


def rows_of(table, stage: int, training: bool = True, epoch: int = 0, **values) -> StageDataset:
    return StageDataset(stage, table, config_with(**values), 90, 92, 91, True, training, epoch)


# ---------------------------------------------------------------- the schedule


def test_tokens_go_epoch_by_epoch_up_to_the_bound_and_stay_gone():
    stages = [config_with().stage(epoch) for epoch in range(8)]
    assert stages == [0, 8, 16, 24, 32, 39, 39, 39], "8 an epoch; from 39 on all"
    slow = config_with(icot_remove_per_epoch=0.5, icot_remove_all_beyond=2)
    assert [slow.stage(epoch) for epoch in range(6)] == [0, 0, 1, 1, 2, 2]


def test_the_optimizer_is_new_where_more_is_removed():
    config = config_with(reset_optimizer="stage", icot_remove_per_epoch=0.5, icot_remove_all_beyond=2)
    assert [starts_fresh(config, epoch) for epoch in range(7)] == [False, False, True, False, True, False, False]


def test_icot_needs_cot_and_nothing_else(tmp_path):
    values = {"save_path": "out", "train_path": "t", "val_path": "v", "icot": True}
    for wrong in ({"coconut": True}, {"no_cot": True}, {"cot": True, "uniform_prob": 0.1}):
        assert "icot: shortens the chains of cot" in errors(tmp_path, values | wrong)
    assert "icot_smoothing_lambda" in errors(tmp_path, values | {"cot": True, "icot_smoothing_lambda": 0})
    config = config_with()
    assert config.plain and not config.markers and config.model_key == "custom", "no gate of the study takes it for its CoT"


# ---------------------------------------------------------------- what goes


def test_rows_lose_tokens_from_the_left_and_never_their_answer(table):
    kept = {0: [10, 11, 12, 13, 14, 15], 1: [11, 12, 13, 14, 15], 2: [12, 13, 14, 15], 5: [15], 6: [], 9: []}
    for stage, steps in kept.items():
        rows = rows_of(table, stage, icot_smoothing_lambda=NEVER)
        assert rows[3]["input_ids"].tolist() == [1, 2, 3, *steps, 50, 51, EOS]
        assert rows[3]["labels"].tolist() == [-100, -100, -100, *steps, 50, 51, EOS]
        assert rows[10]["input_ids"].tolist() == [1, 2, 3, 50, 51, EOS], "without steps there is nothing to lose"
    everything = rows_of(table, 4, icot_remove_all_beyond=4)
    assert everything[3]["input_ids"].tolist() == [1, 2, 3, 50, 51, EOS], "from the bound on all goes, more than is scheduled"


def test_prompts_are_the_question_at_every_stage(table):
    for stage in (0, 3, 39):
        rows = rows_of(table, stage, training=False, max_latent_stage=6)
        assert rows[3]["input_ids"].tolist() == [1, 2, 3]
        assert not rows.lengths().latents.any() and not rows.plans[1].any()


def test_lengths_and_batches_are_those_of_the_rows(table):
    rows = rows_of(table, 2, icot_smoothing_lambda=0.7)
    lengths, numbers = rows.lengths(), [4, 10, 3, 299]
    assert lengths.total.tolist() == [len(rows[i]["input_ids"]) for i in range(300)]
    assert lengths.labelled.tolist() == [int((rows[i]["labels"] != -100).sum()) for i in range(300)]
    assert len(set(lengths.total.tolist())) > 3, "several lengths are tried"
    batch = rows.batch(numbers, pad_id=0)
    for ids, mask, labels, i in zip(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], numbers):
        assert ids[mask].tolist() == rows[i]["input_ids"].tolist() and labels[mask].tolist() == rows[i]["labels"].tolist()


# ---------------------------------------------------------------- chance


def settings(smoothing: float = 4.0, seed: int = 0):
    return SimpleNamespace(icot_smoothing_lambda=smoothing, icot_remove_all_beyond=39, seed=seed)


@pytest.mark.parametrize("smoothing", [0.5, 4.0])
def test_offsets_decay_exponentially(smoothing):
    n = 200_000
    offsets = Counter((removed_tokens(n, 7, settings(smoothing), 3) - 7).tolist())
    assert min(offsets) == 0
    for o in range(3):
        expected = (1 - math.exp(-smoothing)) * math.exp(-smoothing * o)
        assert offsets[o] / n == pytest.approx(expected, abs=5 * math.sqrt(expected * (1 - expected) / n)), o


def test_offsets_depend_on_seed_epoch_and_row_alone():
    first = removed_tokens(1000, 7, settings(0.5), 3)
    assert np.array_equal(removed_tokens(1000, 7, settings(0.5), 3), first)
    assert np.array_equal(removed_tokens(600, 7, settings(0.5), 3), first[:600]), "other rows change nothing"
    assert np.array_equal(removed_tokens(1000, 9, settings(0.5), 3) - 2, first), "the schedule is added to"
    for other in (removed_tokens(1000, 7, settings(0.5, seed=1), 3), removed_tokens(1000, 7, settings(0.5), 4)):
        assert 0.2 < np.mean(other != first) < 0.9
    assert np.corrcoef(first[:-1], first[1:])[0, 1] < 0.1


def test_rows_of_another_epoch_lose_other_tokens(table):
    lengths = [rows_of(table, 1, epoch=epoch, icot_smoothing_lambda=0.7).lengths().total for epoch in (0, 0, 1)]
    assert np.array_equal(lengths[0], lengths[1]) and not np.array_equal(lengths[0], lengths[2])


# ---------------------------------------------------------------- a run


@pytest.fixture
def write_icot(make):
    more = {"num_epochs": 3, "icot_remove_per_epoch": 6, "icot_remove_all_beyond": 12, "icot_smoothing_lambda": 1.0}
    return lambda name, **changes: make(name, **ICOT | more | {"reset_optimizer": "stage"} | changes)


def logged(folder, event: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def test_a_run_shortens_its_chains_and_goes_on_exactly_within_an_epoch(write_icot, tmp_path):
    assert run.main([write_icot("whole")]) == 0
    folder = tmp_path / "runs" / "whole"
    assert [(e["stage"], e["n_latents"]) for e in logged(folder, "train_epoch")] == [(0, 0), (6, 0), (12, 0)]
    assert [(e["stage"], e["n_latents"]) for e in logged(folder, "eval")] == [(0, 0), (6, 0), (12, 0)]
    assert json.loads((folder / "run.json").read_text())["model_key"] == "custom"

    path = write_icot("cut")
    assert run.main([path, "max_steps=8"]) == 0  # six updates an epoch: two of the second
    cut = tmp_path / "runs" / "cut"
    position = read_state(cut / "last_state")["position"]
    assert (position["epoch"], position["step"], position["global_step"]) == (1, 2, 8)
    assert run.main([path]) == 0
    steps = [[(e["rows"], e["train/loss"]) for e in logged(f, "step")] for f in (folder, cut)]
    assert steps[0] == steps[1] and len(steps[0]) == 18
    one, other = (torch.load(f / "checkpoint_3", weights_only=True) for f in (folder, cut))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_an_answer_without_a_chain_remains_to_be_learned(write_icot, tmp_path):
    """Where all is removed from the start, an iCoT run is a no-CoT run, to the bit."""
    assert run.main([write_icot("icot", icot_remove_all_beyond=0, num_epochs=1)]) == 0
    assert run.main([write_icot("no_cot", icot=False, cot=False, no_cot=True, num_epochs=1)]) == 0
    one, other = (torch.load(tmp_path / "runs" / name / "checkpoint_1", weights_only=True) for name in ("icot", "no_cot"))
    assert all(torch.equal(one[key], other[key]) for key in one) and one.keys() == other.keys()
