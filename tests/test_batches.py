"""Which rows meet in a batch and how they are padded: draws of `uniform_prob`, epoch order, lengths, the collator."""

from collections import Counter
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dataset import MyCollator, StageDataset, TokenTable, drawn_stage, epoch_batches

START, END, LATENT, EOS = 90, 91, 92, 99
BARE = {"bare": True, "c_thought": 0}  # without markers


def settings(**values):
    defaults = {"max_latent_stage": 6, "c_thought": 1, "pad_latent_to_max": True, "no_cot": False}
    return SimpleNamespace(**defaults | {"uniform_prob": 0.0, "seed": 0} | values)


@pytest.fixture(scope="module")
def table():
    """70 rows with 0..6 steps of 1..3 tokens, questions of 1..9 tokens and answers of 2..4."""
    rng = np.random.default_rng(5)

    def text(low, high):
        return rng.integers(0, 80, rng.integers(low, high + 1)).tolist()

    return TokenTable(
        datasets.Dataset.from_dict(
            {
                "question_tokenized": [text(1, 9) for _ in range(70)],
                "steps_tokenized": [[text(1, 3) for _ in range((i + 3) % 7)] for i in range(70)],
                "answer_tokenized": [[*text(1, 3), EOS] for _ in range(70)],
                "merges": [False] * 70,
            }
        )
    )


def rows_of(table, stage, training=True, epoch=0, bare=False, **values):
    return StageDataset(stage, table, settings(**values), START, LATENT, END, bare, training, epoch)


# ---------------------------------------------------------------- uniform_prob


def plans(rows, order=None):
    return {i: rows.plan(i) for i in (order if order is not None else range(len(rows)))}


def test_draws_depend_on_seed_epoch_and_row_and_not_on_the_order_of_access(table):
    def draw(order=None, **options):
        return plans(rows_of(table, 1, uniform_prob=0.5, **options), order)

    first = draw()
    assert draw(order=np.random.default_rng(0).permutation(70).tolist()) == first
    assert len({tuple(draw(epoch=e, seed=s).values()) for e in range(3) for s in range(3)}) == 9
    rows = rows_of(table, 1, uniform_prob=0.5)
    assert all((rows[i]["input_ids"] == LATENT).sum() == first[i][1] for i in reversed(range(70)))


def first_of_batch(rows):
    return rows[0]


def test_draws_are_the_same_in_two_workers(table):
    rows = rows_of(table, 1, uniform_prob=0.7)
    workers = DataLoader(rows, batch_size=1, collate_fn=first_of_batch, num_workers=2, multiprocessing_context="fork")
    loaded = list(workers)
    assert len(loaded) == 70 and len({tuple(plan) for plan in plans(rows).values()}) > 7
    for i, row in enumerate(loaded):
        assert row["idx"] == i and row["input_ids"].tolist() == rows[i]["input_ids"].tolist()


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_share_of_draws_and_their_range(p):
    n = 20_000
    stages = Counter(drawn_stage(4, 9, settings(uniform_prob=p), 0, i) for i in range(n))
    share = 1 - stages.pop(9, 0) / n
    assert share == pytest.approx(p, abs=4 * (p * (1 - p) / n) ** 0.5)
    assert set(stages) == (set(range(5)) if p else set())  # from no step to all of them
    for count in stages.values():
        assert count == pytest.approx(p * n / 5, abs=5 * (n * p / 5) ** 0.5)


def test_a_draw_above_the_cap_removes_every_step(table):
    rows = rows_of(table, 0, uniform_prob=1.0, max_latent_stage=2, c_thought=2)
    seen = set()
    for i in range(70):
        drawn = drawn_stage(table.n_steps(i), 0, rows.configs, 0, i)
        seen.add(min(drawn, 3))
        assert rows.plan(i) == ((drawn, 2 * drawn) if drawn <= 2 else (table.n_steps(i), 4))
    assert seen == {0, 1, 2, 3}


def test_prompts_are_not_drawn(table):
    rows = rows_of(table, 2, training=False, uniform_prob=1.0)
    assert {rows.plan(i)[1] for i in range(70)} == {2}


# ---------------------------------------------------------------- lengths


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "values",
    [{}, {"c_thought": 2}, {"pad_latent_to_max": False}, {"uniform_prob": 0.5}, {"no_cot": True}, BARE],
    ids=str,
)
def test_lengths_are_those_of_the_rows_built(table, values, training):
    for stage in (0, 2, 7):
        rows = rows_of(table, stage, training, **values)
        lengths = rows.lengths()
        assert {array.dtype.name for array in lengths} == {"int64"}
        for i in range(70):
            ids = rows[i]["input_ids"].tolist()
            assert ids.count(LATENT) == lengths.latents[i] and len(ids) == lengths.total[i]
            assert lengths.labelled[i] == (rows[i]["labels"] != -100).sum() if training else lengths.labelled[i] == 0
            latest = len(table.question[i]) + (not values.get("bare"))  # after the start marker, where there is one
            assert lengths.prefix[i] == (ids.index(LATENT) if LATENT in ids else latest) == latest


# ---------------------------------------------------------------- the order of an epoch


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("n", "size"), [(103, 8), (64, 8), (5, 8), (1, 1), (2000, 16)])
def test_an_epoch_visits_each_row_once(n, size, grouped):
    lengths = np.random.default_rng(0).integers(5, 200, n) if grouped else None
    batches = epoch_batches(n, size, 0, 0, lengths)
    assert sorted(np.concatenate(batches).tolist()) == list(range(n))
    assert [len(batch) for batch in batches] == [size] * (n // size) + [n % size] * (n % size > 0)


@pytest.mark.parametrize("grouped", [False, True])
def test_epochs_and_seeds_have_orders_of_their_own(grouped):
    lengths = np.random.default_rng(0).integers(5, 200, 100) if grouped else None

    def order(seed, epoch):
        return tuple(np.concatenate(epoch_batches(100, 8, seed, epoch, lengths)).tolist())

    assert order(3, 4) == order(3, 4)
    assert len({order(seed, epoch) for seed in range(3) for epoch in range(3)} | {tuple(range(100))}) == 10


def test_grouping_by_length_pads_less_and_keeps_batches_shuffled():
    lengths = np.random.default_rng(0).integers(5, 200, 1003)

    def padding(batches):
        return sum((lengths[batch].max() - lengths[batch]).sum() for batch in batches)

    plain, grouped = (epoch_batches(1003, 8, 0, 0, given, window=20) for given in (None, lengths))
    assert padding(grouped) < 0.2 * padding(plain)
    assert len(grouped[-1]) == 3
    means = np.array([lengths[batch].mean() for batch in grouped[:-1]])
    assert 0.3 < (np.diff(means) > 0).mean() < 0.7  # short and long batches come mixed, not in rising runs
    members = {frozenset(batch.tolist()) for batch in grouped}
    assert members.isdisjoint(frozenset(b.tolist()) for b in epoch_batches(1003, 8, 0, 1, lengths, window=20))


# ---------------------------------------------------------------- the collator


class Tokens:
    """What the collator asks of a tokenizer."""

    def __init__(self, pad=0, eos=EOS):
        self.pad_token_id, self.eos_token_id = pad, eos


def collate(*rows, labels=False, collator=None):
    """The batch of token lists as lists; with `labels`, minus each token is its label."""
    arrays = [np.array(ids, dtype=np.int64) for ids in rows]
    rows = [{"input_ids": ids, "labels": -ids} if labels else {"input_ids": ids} for ids in arrays]
    batch = (collator or MyCollator(Tokens(), LATENT))(rows)
    assert all(value.dtype == torch.int64 for value in batch.values())
    return {key: value.tolist() for key, value in batch.items()}


L = LATENT


def test_first_latents_share_a_column():
    assert collate([1, 2, 3, L, L, 4], [5, L, 6], [7, 8, L, L, L, 9, 9], labels=True) == {
        "input_ids": [[1, 2, 3, L, L, 4, 0, 0], [0, 0, 5, L, 6, 0, 0, 0], [0, 7, 8, L, L, L, 9, 9]],
        "attention_mask": [[1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1, 1, 1]],
        "position_ids": [[0, 1, 2, 3, 4, 5, 0, 0], [0, 0, 0, 1, 2, 0, 0, 0], [0, 0, 1, 2, 3, 4, 5, 6]],
        "labels": [
            [-1, -2, -3, -L, -L, -4, -100, -100],
            [-100, -100, -5, -L, -6, -100, -100, -100],
            [-100, -7, -8, -L, -L, -L, -9, -9],
        ],
    }


@pytest.mark.parametrize("left", [False, True])
def test_rows_without_latents_are_not_shifted_beside_rows_with_some(left):
    assert collate([1, 2], [3, 4, 5, L, 6], [7, L], collator=MyCollator(Tokens(), LATENT, left=left)) == {
        "input_ids": [[1, 2, 0, 0, 0], [3, 4, 5, L, 6], [0, 0, 7, L, 0]],
        "attention_mask": [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 0]],
        "position_ids": [[0, 1, 0, 0, 0], [0, 1, 2, 3, 4], [0, 0, 0, 1, 0]],
    }


@pytest.mark.parametrize("latent", [LATENT, None])
def test_batches_without_latents_pad_right_or_left(latent):
    assert collate([1, 2, 3], [4], collator=MyCollator(Tokens(), latent)) == {
        "input_ids": [[1, 2, 3], [4, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "position_ids": [[0, 1, 2], [0, 0, 0]],
    }
    assert collate([1, 2, 3], [4, 5], collator=MyCollator(Tokens(), latent, left=True)) == {
        "input_ids": [[1, 2, 3], [0, 4, 5]],
        "attention_mask": [[1, 1, 1], [0, 1, 1]],
        "position_ids": [[0, 1, 2], [0, 0, 1]],
    }


def test_latents_are_ordinary_tokens_to_a_collator_without_their_id():
    assert collate([1, 2, L, 3], [L], collator=MyCollator(Tokens()))["input_ids"] == [[1, 2, L, 3], [L, 0, 0, 0]]


def test_padding_token_falls_back_to_eos_and_label_padding_can_be_chosen():
    assert collate([1, 2], [3], collator=MyCollator(Tokens(pad=None)))["input_ids"] == [[1, 2], [3, EOS]]
    assert collate([1, 2], [3], collator=MyCollator(Tokens(pad=0, eos=EOS)))["input_ids"] == [[1, 2], [3, 0]]
    assert collate([1, 2], [3], labels=True, collator=MyCollator(Tokens(), None, -7))["labels"] == [[-1, -2], [-3, -7]]


def test_batches_of_every_stage_are_aligned_and_give_the_rows_back(table):
    for stage in (0, 3, 8):
        rows = rows_of(table, stage, uniform_prob=0.3, pad_latent_to_max=False)
        picked = [rows[i] for i in range(70)]
        batch = MyCollator(Tokens(), LATENT)(picked)
        assert batch["idx"].tolist() == list(range(70))
        latent = batch["input_ids"] == LATENT
        assert len(set(latent.int().argmax(1)[latent.any(1)].tolist())) <= 1
        for b, (row, real) in enumerate(zip(picked, batch["attention_mask"].bool())):
            assert batch["input_ids"][b, real].tolist() == row["input_ids"].tolist()
            assert batch["labels"][b, real].tolist() == row["labels"].tolist()
            assert batch["position_ids"][b, real].tolist() == list(range(len(row["input_ids"])))
            assert not batch["position_ids"][b, ~real].any() and (batch["labels"][b, ~real] == -100).all()
