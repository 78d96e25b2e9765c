"""Rows to padded tensors: draws of `uniform_prob`, lengths, the collator, and batches cut from the token arrays."""

from collections import Counter
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from tiny import build
from torch.utils.data import DataLoader

import dataset
from coconut import Coconut
from dataset import MyCollator, StageDataset, drawn_stage
from tokens import TokenTable

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
                "level": [0] * 70,
            }
        )
    )


def rows_of(table, stage, training=True, epoch=0, bare=False, **values):
    return StageDataset(stage, table, settings(**values), START, LATENT, END, bare, training, epoch)


# ---------------------------------------------------------------- uniform_prob


def latents_of(rows, order=None):
    """Row number -> latents in its tokens, the rows built in a certain order."""
    return {i: int((rows[i]["input_ids"] == LATENT).sum()) for i in (order if order is not None else range(len(rows)))}


def test_draws_depend_on_seed_epoch_and_row_and_not_on_the_order_of_access(table):
    def draw(order=None, **options):
        return latents_of(rows_of(table, 1, uniform_prob=0.5, **options), order)

    first = draw()
    assert draw(order=np.random.default_rng(0).permutation(70).tolist()) == first
    assert len({tuple(draw(epoch=e, seed=s).values()) for e in range(3) for s in range(3)}) == 9
    rows = rows_of(table, 1, uniform_prob=0.5)
    batch = rows.batch([5, 3, 60], 0)
    assert (batch["input_ids"] == LATENT).sum(1).tolist() == [first[i] for i in (5, 3, 60)]
    assert rows.lengths().latents.tolist() == list(first.values())


def test_rows_are_drawn_once_and_only_for_uniform_prob(table, monkeypatch):
    drawn = []
    monkeypatch.setattr(dataset, "drawn_stage", lambda *args: drawn.append(args[-1]) or drawn_stage(*args))
    for probability, expected in ((0.0, []), (0.5, list(range(70)))):
        rows = rows_of(table, 2, uniform_prob=probability)
        rows.lengths(), rows.batch([1, 2], 0), rows[7], rows.lengths([3])
        assert drawn == expected


def first_of_batch(rows):
    return rows[0]


def test_draws_are_the_same_in_two_workers(table):
    rows = rows_of(table, 1, uniform_prob=0.7)
    workers = DataLoader(rows, batch_size=1, collate_fn=first_of_batch, num_workers=2, multiprocessing_context="fork")
    loaded = list(workers)
    assert len(loaded) == 70 and len(set(zip(*rows.plans.tolist()))) > 7
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
        assert tuple(rows.plans[:, i]) == ((drawn, 2 * drawn) if drawn <= 2 else (table.n_steps(i), 4))
    assert seen == {0, 1, 2, 3}


def test_prompts_are_not_drawn(table):
    rows = rows_of(table, 2, training=False, uniform_prob=1.0)
    assert rows.plans[1].tolist() == [2] * 70


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
        some = np.array([60, 2, 2, 33])
        for array, part, of in zip(lengths, rows.lengths(some), lengths.of(some)):
            assert array[some].tolist() == part.tolist() == of.tolist()


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


# ---------------------------------------------------------------- batches from the token arrays


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "values",
    [{}, {"c_thought": 2}, {"pad_latent_to_max": False}, {"uniform_prob": 0.5}, {"no_cot": True}, BARE],
    ids=str,
)
def test_batches_are_those_of_the_collator(table, values, training, left):
    collator, rng = MyCollator(Tokens(pad=7), LATENT, left=left), np.random.default_rng(1)
    shifted = set()
    for stage in (0, 2, 7):
        rows = rows_of(table, stage, training, **values)
        for size in (1, 4, 32):
            numbers = rng.permutation(70)[:size]
            expected = collator([rows[i] for i in numbers])
            batch = rows.batch(numbers, 7, left)
            assert list(batch) == list(expected) and ("labels" in batch) == training
            for key, value in expected.items():
                assert batch[key].dtype == torch.int64 and torch.equal(batch[key], value), key
            shifted.add(bool((batch["attention_mask"][:, 0] == 0).any()))
    assert True in shifted or (not left and values in (BARE, {"no_cot": True}))  # left padding was among the cases


def test_a_batch_shares_no_memory_with_the_order_it_was_asked_for(table):
    order = np.arange(6)
    batch = rows_of(table, 2).batch(order[:3], 0)
    batch["idx"] += 10
    assert order.tolist() == list(range(6))


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stage", [0, 2, 7])
def test_rounded_batches_have_few_shapes_and_the_same_rows(table, stage, training, left):
    rows, multiple = rows_of(table, stage, training, uniform_prob=0.2), 8
    for start in range(0, 70, 14):
        numbers = np.arange(start, start + 14)
        plain, batch = rows.batch(numbers, 0, left), rows.batch(numbers, 0, left, multiple)
        latent, real = batch["input_ids"] == LATENT, batch["attention_mask"].bool()
        columns = set(latent.int().argmax(1)[latent.any(1)].tolist())
        assert len(columns) <= 1 and all(column % multiple == 0 for column in columns)
        n_before, n_after = plain["input_ids"].shape[1], batch["input_ids"].shape[1]
        assert n_after % (multiple // 4) == 0 and n_before <= n_after < n_before + 2 * multiple
        if not columns:  # all the padding is on one side, as without rounding
            assert real[:, -1 if left else 0].all()
        for key in batch.keys() - {"idx"}:
            assert torch.equal(batch[key][real], plain[key][plain["attention_mask"].bool()]), key
        assert not batch["position_ids"][~real].any()
        assert not training or (batch["labels"][~real] == -100).all()


@pytest.mark.parametrize("stage", [0, 2])
def test_rounding_changes_no_loss_and_no_continuation(table, stage):
    model = Coconut(build("gpt2", vocab=100), LATENT, START, END, EOS).eval()
    numbers = [3, 50, 12, 8, 40]

    def batch(training, multiple):
        made = rows_of(table, stage, training).batch(numbers, 0, left=not training, prefix_multiple=multiple)
        made.pop("idx")
        return made

    plain, rounded = batch(True, 1), batch(True, 64)
    assert rounded["input_ids"].shape[1] > plain["input_ids"].shape[1]
    assert model(**rounded).loss.item() == pytest.approx(model(**plain).loss.item(), rel=1e-9)
    continuations = []
    for multiple in (1, 64):
        prompts = batch(False, multiple)
        ids = model.generate(**prompts, max_new_tokens=6)
        continuations.append(ids[:, prompts["input_ids"].shape[1] :].tolist())
    assert continuations[0] == continuations[1] and len(continuations[0][0]) == 6
