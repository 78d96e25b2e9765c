"""Rows -> tokens -> curriculum stage -> padded batch, and the answer back out of the text.

A row of one stage (Coconut arXiv 2412.06769, section 3; labels are -100 up to and including the end marker):

    question \\n | <|start-latent|> latents <|end-latent|> | kept steps, each \\n | ### answer <eos>

Stage s drops the first s steps and inserts s * c_thought latents. With `icot` (stepwise internalisation, arXiv 2405.14838)
stage s drops the first s tokens of the steps, a few more by chance, and inserts nothing. A file is tokenised once, through the
`datasets` cache; the batches of a stage are cut from flat token arrays when they are asked for (in which order: batches.py).

    rows = get_cot_latent_dataset(stage, TokenTable(get_dataset(path, tokenizer)), config, *ids)
    batch = rows.batch([5, 0, 7], tokenizer.pad_token_id)
"""

import gc
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

HOW_TO_MAKE = {
    "prosqa": "python data/prosqa.py --out {folder}",
    "quickstart": "bash scripts/quickstart.sh",
    "gsm": "bash scripts/get_gsm8k.sh --out {folder} (python data/gsm.py --raw FOLDER converts files that you have)",
    "arith_gsm": "python data/arithmetic.py --out {folder}",
    "prontoqa": "python data/prontoqa.py --generate --out {folder} (or --raw 5hop_0shot_random.json, the published generator's)",
    "ood": "python data/ood.py (--preset quickstart for the small ones)",
    "phase1": "python data/phase1.py --out {folder}",
    "cot": "python data/cot.py --output {folder}/cot.json --val_output {folder}/cot_val.json",
}

# ---------------------------------------------------------------- rows


def existing(path: str | Path) -> Path:
    """The path of a data file that is there. ValueError with the command that makes it where it is not."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"data file {path} is a folder; name a JSON file in it")
    if not path.is_file():
        hints = [how.format(folder=path.parent) for word, how in HOW_TO_MAKE.items() if word in str(path)]
        raise ValueError(f"data file {path} does not exist" + (f"; make it with: {hints[-1]}" if hints else ""))
    return path


@contextmanager
def no_garbage_collection():
    """For code that makes millions of small objects that all stay: looking for garbage among them takes as long again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def load_rows(path: str | Path, max_rows: int | None = None) -> list[dict]:
    """The rows of a data file, a JSON list of {"question": str, "answer": str, "steps": [str], ...}.

    Raises ValueError naming file, row and key: file missing (with the command that makes it), not JSON, empty, or a row
    with a missing key or a wrong type.
    """
    path = existing(path)
    try:
        rows = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"data file {path} is not JSON: {error}") from None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"data file {path} must hold a non-empty JSON list of rows")
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"data file {path}, row {i}: must be an object with question, answer and steps")
        for key, kind in {"question": str, "answer": str, "steps": list}.items():
            if key not in row:
                raise ValueError(f"data file {path}, row {i}: `{key}` is missing")
            if not isinstance(row[key], kind):
                raise ValueError(f"data file {path}, row {i}: `{key}` must be a {kind.__name__}, is {row[key]!r:.60}")
        if not all(isinstance(step, str) for step in row["steps"]):
            raise ValueError(f"data file {path}, row {i}: `steps` must be a list of strings")
        if type(row.get("level", 0)) is not int:
            raise ValueError(f"data file {path}, row {i}: `level` must be a whole number, is {row['level']!r:.60}")
    return rows[:max_rows]


def question_hash(row: dict) -> str:
    """Names a question across files and runs: 12 hex digits."""
    return hashlib.sha256(row["question"].encode()).hexdigest()[:12]


# ---------------------------------------------------------------- tokens


def get_dataset(path: str | Path, tokenizer, max_size: int | None = None):
    """Tokenise a file once, in pieces, through the `datasets` library's cache.

    Returns a `datasets.Dataset` with `question_tokenized` (with the tokenizer's own special tokens), `steps_tokenized`,
    `answer_tokenized` (ends with EOS), `merges` (whether encoding the whole text would merge tokens across pieces; looked at
    in the first thousand rows, which costs as much again), `level` (0 where a row has none) and `idx`.
    """
    from datasets import Dataset, Features, List, Value  # pandas and pyarrow: --help and errors need not wait for them
    from datasets.exceptions import DatasetGenerationError

    path = existing(path)
    identity = {
        "path": str(path),
        "content": hashlib.sha256(path.read_bytes()).hexdigest(),
        "vocabulary": hashlib.sha256(_tokenizer_text(tokenizer).encode()).hexdigest(),
        "max_size": max_size,
        "form": 2,
    }
    identity = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    tokens = List(Value("int64"))
    # Said, not guessed: the first rows of a file may have no steps.
    features = {name: tokens for name in ("question_tokenized", "answer_tokenized")}
    features |= {"steps_tokenized": List(tokens), "merges": Value("bool"), "level": Value("int64"), "idx": Value("int64")}
    try:
        return Dataset.from_generator(
            _tokenized_rows,
            features=Features(features),
            gen_kwargs={"path": str(path), "max_size": max_size, "tokenizer": tokenizer},
            fingerprint=identity,
        )
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None  # what `load_rows` found wrong


def _tokenizer_text(tokenizer) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))


def _tokenized_rows(path: str, max_size: int | None, tokenizer) -> Iterator[dict]:
    rows = load_rows(path, max_size)
    for start in range(0, len(rows), 1000):
        batch = rows[start : start + 1000]
        questions = _encode(tokenizer, [row["question"] + "\n" for row in batch], add_special_tokens=True)
        answers = _encode(tokenizer, ["### " + row["answer"] for row in batch])
        steps = iter(_encode(tokenizer, [step + "\n" for row in batch for step in row["steps"]]))
        texts = ["\n".join([row["question"], *row["steps"], "### " + row["answer"]]) for row in batch if start == 0]
        wholes = _encode(tokenizer, texts, add_special_tokens=True) if texts else [None] * len(batch)
        for i, (row, question, answer, whole) in enumerate(zip(batch, questions, answers, wholes)):
            row_steps = [next(steps) for _ in row["steps"]]
            yield {
                "question_tokenized": question,
                "steps_tokenized": row_steps,
                "answer_tokenized": [*answer, tokenizer.eos_token_id],
                "merges": whole is not None and [*question, *chain.from_iterable(row_steps), *answer] != whole,
                "level": row.get("level", 0),
                "idx": start + i,
            }


def _encode(tokenizer, texts: list[str], add_special_tokens: bool = False) -> list[list[int]]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"] if texts else []
    # The library's own batch call without offsets and masks: a third of the time to the first step.
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]


class TokenTable:
    """The columns of `get_dataset` as flat arrays: row i's pieces are slices, so a million rows cost no Python objects."""

    def __init__(self, dataset):
        columns = dataset.with_format("arrow")[:]
        self.question, self.answer = (_Ragged(columns[f"{name}_tokenized"]) for name in ("question", "answer"))
        steps = columns["steps_tokenized"].combine_chunks()
        self.step_start = _starts(steps)
        self.step = _Ragged(steps.flatten())
        self.merges, self.level = int(np.sum(columns["merges"].to_numpy())), columns["level"].to_numpy()

    def __len__(self) -> int:
        return len(self.question)

    def n_steps(self, i):
        """How many steps row i has; of an array of row numbers an array."""
        return self.step_start[i + 1] - self.step_start[i]

    def steps_span(self, i, skip) -> tuple:
        """Where the steps of row i from number `skip` on begin and end in `step.values`; also of arrays."""
        return self.step.start[self.step_start[i] + skip], self.step.start[self.step_start[i + 1]]

    def steps(self, i: int, skip: int) -> np.ndarray:
        """The tokens of row i's steps from number `skip` on, one after the other."""
        return self.step.values[slice(*self.steps_span(i, skip))]


class _Ragged:
    """Lists of tokens end to end; those of list i are values[start[i] : start[i + 1]]."""

    def __init__(self, column):
        column = column.combine_chunks() if hasattr(column, "combine_chunks") else column
        self.start, self.values = _starts(column), column.flatten().to_numpy()

    def __len__(self) -> int:
        return len(self.start) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.values[self.start[i] : self.start[i + 1]]

    def length(self, i):
        """How many tokens list i has; of an array of numbers an array."""
        return self.start[i + 1] - self.start[i]


def _starts(lists) -> np.ndarray:
    offsets = lists.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0]  # a slice of an Arrow array keeps the offsets of the whole


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
