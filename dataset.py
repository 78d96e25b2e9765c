"""Tokens of rows (tokens.py) -> curriculum stage -> padded batch, and the answer back out of the text.

A row of one stage (Coconut arXiv 2412.06769, section 3; labels are -100 up to and including the end marker):

    question \\n | <|start-latent|> latents <|end-latent|> | kept steps, each \\n | ### answer <eos>

Stage s drops the first s steps and inserts s * c_thought latents. With `icot` (stepwise internalisation, arXiv 2405.14838)
stage s drops the first s tokens of the steps, a few more by chance, and inserts nothing. The batches of a stage are
cut from flat token arrays when they are asked for (in which order: batches.py).

    rows = get_cot_latent_dataset(stage, TokenTable(get_dataset(path, tokenizer)), config, *ids)
    batch = rows.batch([5, 0, 7], tokenizer.pad_token_id)
"""

import random
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

from tokens import TokenTable, get_dataset

# ---------------------------------------------------------------- curriculum


def training_stage(n_steps, stage, configs) -> tuple:
    """(steps to drop from the front, latents to insert) of a training row with `n_steps` steps at a stage; also of arrays."""
    cap = configs.max_latent_stage
    if configs.no_cot:
        return n_steps, np.zeros_like(n_steps)
    most = cap if configs.pad_latent_to_max else np.minimum(n_steps, cap)
    drop = np.where(stage <= cap, np.minimum(stage, n_steps), n_steps)
    if getattr(configs, "latents_follow_steps", False):  # the latents of evaluation: never more than steps were dropped
        return drop, np.minimum(drop, cap) * configs.c_thought
    return drop, np.where(stage <= cap, stage, most) * configs.c_thought


def evaluation_latents(n_steps, stage: int, configs):
    """Latents of an evaluation prompt; also of an array."""
    if configs.no_cot:
        return np.zeros_like(n_steps)
    cap = configs.max_latent_stage
    return np.minimum(stage, cap if configs.pad_latent_to_max else np.minimum(n_steps, cap)) * configs.c_thought


def drawn_stage(n_steps: int, stage: int, configs, epoch: int, idx: int) -> int:
    """The stage of one row in one epoch: with chance `uniform_prob` a uniform draw from 0..n_steps (or 0..stage).

    Drawn from (seed, epoch, row), so neither workers nor ranks change it.
    """
    if configs.uniform_prob == 0:
        return stage
    draw = random.Random(f"{configs.seed}/{epoch}/{idx}")
    most = n_steps if getattr(configs, "uniform_range", "steps") == "steps" else stage
    return draw.randint(0, most) if draw.random() < configs.uniform_prob else stage


def removed_tokens(n_rows: int, stage: int, configs, epoch: int) -> np.ndarray:
    """Tokens that `icot` removes from the front of each row's steps, where there are so many; int64 [rows].

    `stage` tokens and o more, with p(o) proportional to exp(-icot_smoothing_lambda * o); from `icot_remove_all_beyond` on
    all. A row's o depends on (seed, epoch, row) alone.
    """
    if stage >= configs.icot_remove_all_beyond:
        return np.full(n_rows, np.iinfo(np.int32).max)
    uniform = np.random.default_rng((configs.seed, epoch)).random(n_rows)
    return stage + np.floor(-np.log1p(-uniform) / configs.icot_smoothing_lambda).astype(np.int64)


class Lengths(NamedTuple):
    """Per row, int64 [rows]: question and start marker, all columns, labelled positions, latents."""

    prefix: np.ndarray
    total: np.ndarray
    labelled: np.ndarray
    latents: np.ndarray

    def of(self, rows) -> "Lengths":
        """Those of some rows."""
        return Lengths(*(array[rows] for array in self))


class StageDataset(torch.utils.data.Dataset):
    """The rows of one curriculum stage, built on access: int64 arrays `input_ids`, `labels` (training only), and `idx`."""

    def __init__(self, stage, base, configs, start_id, latent_id, end_id, no_special_marker, training, epoch=0):
        self.table = base if isinstance(base, TokenTable) else TokenTable(base)
        self.stage, self.configs, self.training, self.epoch = stage, configs, training, epoch
        self.latent_id, self.icot = latent_id, getattr(configs, "icot", False)
        self.markers = ([], []) if no_special_marker else ([start_id], [end_id])

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def removed(self) -> np.ndarray:
        """Tokens removed from the front of the steps that are kept, int64 [rows]."""
        return removed_tokens(len(self), self.stage, self.configs, self.epoch) if self.icot else np.zeros(len(self), np.int64)

    @cached_property
    def plans(self) -> np.ndarray:
        """Steps dropped and latents of every row, int64 [2, rows]."""
        n_steps, stage = self.table.n_steps(np.arange(len(self))), self.stage
        if self.icot:
            drop, latents = np.zeros_like(n_steps), 0
        elif not self.training:
            drop, latents = n_steps, evaluation_latents(n_steps, stage, self.configs)
        else:
            if self.configs.uniform_prob > 0:
                draws = (drawn_stage(n, stage, self.configs, self.epoch, i) for i, n in enumerate(n_steps.tolist()))
                stage = np.fromiter(draws, np.int64, len(self))
            drop, latents = training_stage(n_steps, stage, self.configs)
        return np.stack(np.broadcast_arrays(drop, latents))

    def pieces(self, i: int) -> list[np.ndarray]:
        """Row i: question, markers and latents, and in training the steps kept and the answer."""
        (drop, n_latents), (start, end) = self.plans[:, i].tolist(), self.markers
        prompt = [self.table.question[i], np.array([*start, *[self.latent_id] * n_latents, *end], dtype=np.int64)]
        return [*prompt, self.table.steps(i, drop)[self.removed[i] :], self.table.answer[i]] if self.training else prompt

    def __getitem__(self, i: int) -> dict:
        question, middle, *text = self.pieces(i)
        row = {"input_ids": np.concatenate([question, middle, *text]), "idx": i}
        if self.training:
            row["labels"] = row["input_ids"].copy()
            row["labels"][: len(question) + len(middle)] = -100
        return row

    def lengths(self, rows: Sequence[int] | None = None) -> Lengths:
        """How long rows (by default all) are, without building them."""
        rows = np.arange(len(self)) if rows is None else np.asarray(rows)
        start, end = map(len, self.markers)
        drop, latents = self.plans[:, rows]
        prefix, text = self.table.question.length(rows) + start, np.zeros_like(rows)
        if self.training:
            first, last = self.table.steps_span(rows, drop)
            text = np.maximum(last - first - self.removed[rows], 0) + self.table.answer.length(rows)
        return Lengths(prefix, prefix + latents + end + text, text, latents)

    def batch(
        self, row_numbers: Sequence[int], pad_id: int, left: bool = False, prefix_multiple: int = 1
    ) -> dict[str, torch.Tensor]:
        """What `MyCollator` makes of these rows, straight from the token arrays: int64 [B, T], `idx` [B].

        `prefix_multiple` gives compiled code few shapes, by further padding (see `padded_layout`).
        """
        rows = np.array(row_numbers, dtype=np.int64)
        lengths = self.lengths(rows)
        shift, width = padded_layout(lengths, left, prefix_multiple)
        position = np.arange(width) - shift[:, None]
        real = (position >= 0) & (position < lengths.total[:, None])
        ids = np.full(real.shape, pad_id, dtype=np.int64)
        ids[real] = np.concatenate([piece for i in rows.tolist() for piece in self.pieces(i)])
        batch = {"input_ids": ids, "attention_mask": real.astype(np.int64), "position_ids": position * real}
        if self.training:
            labelled = real & (position >= (lengths.total - lengths.labelled)[:, None])
            batch["labels"] = np.where(labelled, ids, -100)
        return {key: torch.from_numpy(array) for key, array in (batch | {"idx": rows}).items()}


def get_question_latent_dataset(
    scheduled_stage, base_dataset_valid, configs, start_id, latent_id, end_id, no_special_marker=False
) -> StageDataset:
    """Evaluation prompts of a stage (stock name)."""
    return StageDataset(
        scheduled_stage, base_dataset_valid, configs, start_id, latent_id, end_id, no_special_marker, training=False
    )


def get_cot_latent_dataset(
    scheduled_stage, base_dataset, configs, start_id, latent_id, end_id, no_special_marker=False, shuffle=False, epoch=0
) -> StageDataset:
    """Training rows of a stage (stock name). Order comes from `epoch_batches`; `shuffle` is accepted and has no effect."""
    return StageDataset(
        scheduled_stage,
        base_dataset,
        configs,
        start_id,
        latent_id,
        end_id,
        no_special_marker,
        training=True,
        epoch=epoch,
    )


# ---------------------------------------------------------------- batches


def padded_layout(lengths: Lengths, left: bool = False, multiple: int = 1) -> tuple[np.ndarray, int]:
    """How rows stand in one batch: the padded columns before each of them, int64 [B], and the batch's width.

    Rows with latents end their prefixes in one column, the others begin at the left edge. `left`: where no row has
    latents all end in one column. That column, where there is one, is rounded up to `multiple`, the width to a quarter of it.
    """
    shift, aligned, before = np.zeros_like(lengths.total), lengths.latents > 0, lengths.prefix
    if left and not aligned.any():
        aligned, before = ~aligned, lengths.total
    if aligned.any():
        shift[aligned] = _round_up(before[aligned].max(), multiple) - before[aligned]
    return shift, int(_round_up((shift + lengths.total).max(), max(multiple // 4, 1)))


def _round_up(n, multiple: int):
    return -(-n // multiple) * multiple


class MyCollator:
    """Pad rows to a batch: on the left so that the first latents share a column, then on the right (stock name).

    Left padding has attention 0, position 0 and label -100. Rows without latents are not shifted. With `left=True` rows
    without any latent in the batch are padded on the left, for generation.
    """

    def __init__(self, tokenizer, latent_id: int | None = None, label_pad_token_id: int = -100, left: bool = False):
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.latent_id, self.label_pad, self.left = latent_id, label_pad_token_id, left

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        ids = [np.asarray(row["input_ids"]) for row in rows]
        first = [int(hits[0]) if len(hits := np.flatnonzero(x == self.latent_id)) else None for x in ids]
        column = max((f for f in first if f is not None), default=None)
        if column is None and self.left:
            column, first = max(map(len, ids)), [len(x) for x in ids]
        shifts = [0 if f is None else column - f for f in first]
        width = max(shift + len(x) for shift, x in zip(shifts, ids))
        batch = {
            "input_ids": torch.full((len(ids), width), self.pad_id),
            "attention_mask": torch.zeros((len(ids), width), dtype=torch.long),
            "position_ids": torch.zeros((len(ids), width), dtype=torch.long),
        }
        if "labels" in rows[0]:
            batch["labels"] = torch.full((len(ids), width), self.label_pad)
        for b, (row, x, shift) in enumerate(zip(rows, ids, shifts)):
            real = slice(shift, shift + len(x))
            batch["input_ids"][b, real] = torch.from_numpy(x)
            batch["attention_mask"][b, real] = 1
            batch["position_ids"][b, real] = torch.arange(len(x))
            if "labels" in row:
                batch["labels"][b, real] = torch.from_numpy(np.asarray(row["labels"]))
        if "idx" in rows[0]:
            batch["idx"] = torch.tensor([row["idx"] for row in rows])
        return batch


class COCONUTDataset(StageDataset):
    """A data file at one stage of the curriculum, without a config: training rows, or after `eval()` prompts.

        dataset = COCONUTDataset("data/cot.json", COCONUTTokenizer(), current_stage=2)
        dataset.set_stage(3)
        dataset[0]["input_ids"], dataset[0]["labels"]

    A row has c_thought * min(current_stage, its steps) thoughts.
    """

    def __init__(self, path: str | Path, tokenizer, current_stage: int = 0, c_thought: int = 1):
        ids = tokenizer.convert_tokens_to_ids(["<|start-latent|>", "<|latent|>", "<|end-latent|>"])
        table = TokenTable(get_dataset(path, tokenizer))
        most = int(table.n_steps(np.arange(len(table))).max())
        curriculum = SimpleNamespace(
            max_latent_stage=most, c_thought=c_thought, pad_latent_to_max=False, no_cot=False, uniform_prob=0,
            latents_follow_steps=True,
        )  # fmt: skip
        super().__init__(current_stage, table, curriculum, *ids, no_special_marker=False, training=True)

    def set_stage(self, stage: int) -> None:
        """Go to another stage."""
        self._change(stage=stage)

    def train(self) -> "COCONUTDataset":
        """Rows with the steps that are left, the answer and labels."""
        return self._change(training=True)

    def eval(self) -> "COCONUTDataset":
        """Prompts, which end behind the end marker."""
        return self._change(training=False)

    def _change(self, **values) -> "COCONUTDataset":
        vars(self).update(values)
        vars(self).pop("plans", None)
        return self


# ---------------------------------------------------------------- answers


def clean_answer(text: str) -> str:
    """What scoring compares: commas removed, stripped."""
    return text.replace(",", "").strip()


def extract_answer(continuation: str) -> str | None:
    """The text after the last `#` of a generated continuation, cleaned; None where there is no `#` (counted wrong)."""
    return clean_answer(continuation.rsplit("#", 1)[1]) if "#" in continuation else None


def extract_steps(continuation: str) -> str:
    """The reasoning text of a continuation: what stands before its first `#`, stripped."""
    return continuation.split("#")[0].strip()
