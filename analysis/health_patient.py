"""What the health checks look at: a checkpoint, rows of its data in the form it was trained on, and how far it was trained.

    patient = Patient.load("runs/lahr/lahr-abc")             # the rows of its config's val_path, or of data="file.json"
    batch = patient.batch(patient.thinking[:4])              # input_ids, attention_mask, position_ids, labels
    logits_BTV = patient.paths["wrapper"](batch)             # or "bare": the language model alone, as anyone else calls it
    return [Result("echo", 0.02, "<= 0.3", True, "of 512 labelled tokens")]        # what a check returns

Where there is no data file, rows are random token ids: enough for what must hold of any input, and nothing is said of text.

Shape letters: B rows, T columns, V vocabulary.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from analysis.subject import Problems, Subject
from backbones import max_positions
from checkpoint import find_checkpoint, numbered_checkpoints
from dataset import MyCollator, get_cot_latent_dataset, get_question_latent_dataset
from files import read_json, read_jsonl

# How far two computations of the same logits may be apart, in units of the logits' standard deviation.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
MOST_IN_FLOAT64 = 1e9  # parameters; larger models stay as they are
MOST_NEW_TOKENS = 32


@dataclass(frozen=True)
class Result:
    """What one check found. `ok` is None where nothing is judged, and `detail` says why; `figures` are for the JSON."""

    name: str
    value: float | int | str | None
    threshold: str
    ok: bool | None
    detail: str = ""
    figures: dict = field(default_factory=dict)

    @property
    def status(self) -> str:
        return {True: "ok", False: "FAIL", None: "not applicable"}[self.ok]


def not_applicable(name: str, reason: str, value=None, threshold: str = "", **figures) -> Result:
    """The result of a check that does not judge this checkpoint; a value may be reported all the same."""
    return Result(name, value, threshold, None, reason, figures)


@dataclass
class Patient:
    """A checkpoint with what is needed to examine it.

    `source` says where the rows are from; `why_untrained` is the reason why nothing that training brings is asked of it,
    or None; `real_text` is False for random ids.
    """

    subject: Subject
    problems: Problems | None
    source: str
    n_rows: int
    seed: int
    updates: int | None
    why_untrained: str | None
    shared: dict = field(default_factory=dict)  # what several checks need, computed once

    @classmethod
    def load(cls, path: str | Path, data=None, n_rows: int = 64, device="auto", seed: int = 0, trained_after: int = 100):
        """Load a run folder (its newest checkpoint) or a checkpoint file. ValueError where something named is missing."""
        path = Path(path)
        if not (path.is_dir() and numbered_checkpoints(path)):
            path = find_checkpoint(path)
        subject = Subject.load(path, device=device)
        subject.model.requires_grad_(True)
        problems, source = _problems(subject, data, n_rows)
        updates = _updates(subject)
        fresh = subject.config.from_scratch and subject.config.load_model_path is None
        untrained = fresh and updates is not None and updates <= trained_after
        why = f"untrained: {updates} updates; judged after more than {trained_after}" if untrained else None
        return cls(subject, problems, source, n_rows, seed, updates, why)

    # ------------------------------------------------------------ the model

    @property
    def model(self):
        """The wrapper, a `Coconut`."""
        return self.subject.model

    @property
    def bare(self):
        """The language model in it, called as others call it."""
        return self.model.base_causallm

    @property
    def folder(self) -> Path:
        return self.subject.path.parent

    @property
    def single_pass_only(self) -> str | None:
        """Why the model can't go on from a cache, where it can't."""
        return "this backbone only takes whole rows" if getattr(self.bare, "single_pass_only", False) else None

    @property
    def paths(self) -> dict[str, Callable[[dict], Tensor]]:
        """Both ways from a batch to logits [B, T, V]: through the wrapper with its thoughts, and of the bare model."""
        return {"wrapper": self._wrapper_logits, "bare": self._bare_logits}

    def _wrapper_logits(self, batch: dict) -> Tensor:
        given = batch["input_ids"], batch["attention_mask"], None, batch["position_ids"]
        return self.model(*given, full_logits=True).logits

    def _bare_logits(self, batch: dict) -> Tensor:
        given = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids")}
        return self.bare(**given, use_cache=False).logits

    @contextmanager
    def precise(self) -> Iterator[float]:
        """In float64 where the device has it and the model is not huge; yields the tolerance that goes with it.

        Else a rounding may send a token past a threshold or to another memory slot, and what is the same function looks like
        two.
        """
        before = self.model.embedding.weight.dtype
        possible = self.subject.device.type != "mps" and sum(p.numel() for p in self.model.parameters()) < MOST_IN_FLOAT64
        self.model.to(torch.float64 if possible else before)
        try:
            with torch.no_grad():
                yield TOLERANCE[self.model.embedding.weight.dtype]
        finally:
            self.model.to(before)

    # ------------------------------------------------------------ rows

    @property
    def real_text(self) -> bool:
        return self.problems is not None

    @property
    def why_not_judged(self) -> str | None:
        """Why nothing is asked of what the model says: it is untrained, or there is no text to say it about."""
        return self.why_untrained or (None if self.real_text else f"needs text; the rows are {self.source}")

    @property
    def stage(self) -> int:
        """The curriculum stage that the checkpoint was trained on last."""
        config, epoch = self.subject.config, self.subject.epoch
        return config.stage(config.num_epochs - 1 if epoch is None else epoch - 1)

    @cached_property
    def rows(self) -> list[dict]:
        """Rows as they were trained on at the checkpoint's stage: {"input_ids", "labels", "idx"}, int64 arrays."""
        return self._rows(self.stage)

    @cached_property
    def thinking(self) -> list[dict]:
        """The same at a stage where rows have thoughts, if the model ever has any."""
        return self._rows(max(self.stage, 1))

    @cached_property
    def prompts(self) -> list[dict]:
        """What the model is to go on from, as in evaluation: {"input_ids", "idx"}."""
        if self.problems is None:
            return [{"input_ids": row["input_ids"][: n_prefix(row)], "idx": row["idx"]} for row in self.rows]
        return list(self._dataset(get_question_latent_dataset, self.stage))

    @cached_property
    def gold(self) -> list[list[int]]:
        """How the data go on behind each prompt, as tokens without EOS."""
        eos = self.model.eos_token_id
        return [[t for t in row["input_ids"][n_prefix(row) :].tolist() if t != eos] for row in self.rows]

    def _rows(self, stage: int) -> list[dict]:
        rows = self._random_rows(stage) if self.problems is None else self._dataset(get_cot_latent_dataset, stage)
        limit = max_positions(self.bare)
        rows = [row for row in rows if limit is None or len(row["input_ids"]) <= limit]
        if len(rows) < 2:
            raise ValueError(f"data: {self.source} has {len(rows)} rows that fit the model's {limit} positions; two are needed")
        return rows

    def _dataset(self, get, stage: int):
        config, ids = self.subject.config.model_copy(update={"uniform_prob": 0.0}), self.subject.ids
        return get(stage, self.problems.table, config, ids.start, ids.latent, ids.end, not config.markers)

    def _random_rows(self, stage: int) -> list[dict]:
        """Questions of random length, markers and thoughts, an answer, EOS; all words random."""
        draw, config, ids = random.Random(self.seed), self.subject.config, self.subject.ids
        n_latents = min(stage, config.max_latent_stage) * config.c_thought if config.markers else 0
        rows = []
        for i in range(self.n_rows):
            middle = [ids.start, *[ids.latent] * n_latents, ids.end] if config.markers else []
            prefix = [*draw.choices(self.words, k=draw.randint(6, 14)), *middle]
            text = [*draw.choices(self.words, k=draw.randint(6, 14)), self.model.eos_token_id]
            row = np.array([*prefix, *text], dtype=np.int64)
            rows.append({"input_ids": row, "labels": np.where(np.arange(len(row)) < len(prefix), -100, row), "idx": i})
        return rows

    @cached_property
    def words(self) -> list[int]:
        """Every token id but markers, padding and EOS."""
        tokenizer = self.subject.tokenizer
        special = {*self.subject.ids, tokenizer.pad_token_id, tokenizer.eos_token_id, self.model.eos_token_id}
        size = min(len(tokenizer), len(self.model.embedding.weight))
        return [i for i in range(size) if i not in special]

    # ------------------------------------------------------------ batches

    def batch(self, rows: Sequence[dict], left: bool = False) -> dict[str, Tensor]:
        """Rows padded as in training (`left`: for generation), int64 [B, T] on the device, without `idx`."""
        batch = MyCollator(self.subject.tokenizer, self.model.latent_token_id, left=left)(list(rows))
        batch.pop("idx", None)
        return {key: value.to(self.subject.device) for key, value in batch.items()}

    def batches(self, rows: Sequence[dict], size: int = 8) -> Iterator[dict[str, Tensor]]:
        """All rows in batches."""
        for start in range(0, len(rows), size):
            yield self.batch(rows[start : start + size])

    def generated(self, prompts: Sequence[dict], max_new_tokens: int = MOST_NEW_TOKENS) -> list[list[int]]:
        """Greedy continuations, as tokens up to EOS."""
        batch, eos = self.batch(prompts, left=True), self.model.eos_token_id
        ids_BT = self.model.generate(
            batch["input_ids"], batch["attention_mask"], max_new_tokens, position_ids=batch["position_ids"]
        )
        new = [row[batch["input_ids"].shape[1] :] for row in ids_BT.tolist()]
        return [row[: row.index(eos)] if eos in row else row for row in new]


def n_prefix(row: dict) -> int:
    """How many tokens of a row are not asked for."""
    return int((row["labels"] != -100).argmax())


def real(batch: dict) -> Tensor:
    """Which columns are tokens, bool [B, T]."""
    return batch["attention_mask"].bool()


def labelled(batch: dict) -> Tensor:
    """Which columns are to say a labelled token, bool [B, T]: those before it."""
    return torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))


def _problems(subject: Subject, data, n_rows: int) -> tuple[Problems | None, str]:
    """The rows of a data file, by default of the config's validation or training file; or why there are none."""
    if data is not None:
        return Problems.read(data, subject.tokenizer, n_rows), str(data)
    named = [path for path in (subject.config.val_path, subject.config.train_path) if path]
    for path in named:
        if Path(path).is_file():
            return Problems.read(path, subject.tokenizer, n_rows), str(path)
    return None, f"random token ids ({' and '.join(named)} not found)"


def _updates(subject: Subject) -> int | None:
    """How many updates made the checkpoint; None where nothing says so."""
    state = subject.path.with_name(subject.path.name.replace("checkpoint_", "state_"))
    if state != subject.path and state.is_file() and "global_step" in (said := read_json(state, "config")):
        return said["global_step"]
    steps = [r for r in read_jsonl(subject.path.parent / "metrics.jsonl", "event") if r["event"] == "step"]
    if subject.epoch is not None:
        steps = [r for r in steps if r["epoch"] < subject.epoch]
    return len({r["train/step"] for r in steps}) or None
