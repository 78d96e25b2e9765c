"""Reading the two accounts of a training run, its log and `metrics.jsonl`, and comparing them.

Logs come from a shell that appends stdout and stderr, so progress bars are torn apart by carriage returns and a resumed
run repeats epochs. In `metrics.jsonl` every record names its epoch; a stock log has line order only.

    log = read_log(Path("logs/m3_coconut.log"))
    log.accuracies[14]                 # Accuracy(correct=183, total=300): "line 15"
    disagreement(log, read_metrics(Path("runs/prosqa-coconut/metrics.jsonl")))     # "" or what differs
"""

from __future__ import annotations

import ast
import json
import math
import re
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

_ACCURACY = re.compile(r"^Accuracy on validation set: (\d+) / (\d+) = ")
_TRAINING = re.compile(r"Training Epoch: (\d+)/\d+, batch (\d+)/\d+ completed \(loss: ([^\s:)]+)")
_EVAL_LOSS = re.compile(r"^eval loss (\S+)")
_BATCH = re.compile(r"^Effective batch size: (\d+)")
_WORLD = re.compile(r"^Running FSDP on rank = \d+, world size = (\d+)")
_RESUMED = re.compile(r"^(Loading from previous run epoch_\d+!|Warning: found previous run)")
_ABORTED = re.compile(r"\bis not finite at epoch (\d+), update")  # training refuses such a step and ends
_NON_FINITE = re.compile(r"(?<![\w.])[-+]?(nan|inf|infinity)(?![\w.])", re.IGNORECASE)
_FREE_TEXT = ("Config:", "Question ", "Full output", "Extracted Output")  # lines that may hold such words as text


class Accuracy(NamedTuple):
    """Right answers of n; `percent` is exact, so that a threshold is met or missed without rounding."""

    correct: int
    total: int

    @property
    def percent(self) -> Fraction:
        return Fraction(100 * self.correct, self.total)

    def __str__(self) -> str:
        return f"{float(self.percent):.2f} ({self.correct}/{self.total})"


# ------------------------------------------------------------------------------------------------ the two sources


@dataclass
class Log:
    """What the log of one run says. Losses are keyed by (epoch index, batch): of repeated epochs the last one stays."""

    accuracies: list[Accuracy] = field(default_factory=list)
    losses: dict[int, dict[int, float]] = field(default_factory=dict)
    bad_losses: list[str] = field(default_factory=list)
    non_finite: list[str] = field(default_factory=list)
    aborted: list[int] = field(default_factory=list)
    config: dict = field(default_factory=dict)
    batch: int | None = None
    world: int | None = None
    starts: int = 0
    resumed: bool = False


def read_log(path: Path) -> Log:
    """Parse a log, split at newlines and carriage returns. A torn last line is no match and is not counted."""
    log = Log()
    for line in re.split(r"[\r\n]", path.read_text(errors="replace")):
        if match := _ACCURACY.match(line):
            if int(match[2]):
                log.accuracies.append(Accuracy(int(match[1]), int(match[2])))
        elif match := _TRAINING.search(line):
            log.losses.setdefault(int(match[1]) - 1, {})[int(match[2])] = _number(match[3])
        elif match := _EVAL_LOSS.match(line):
            if not math.isfinite(_number(match[1])):
                log.bad_losses.append(line)
        elif match := _ABORTED.search(line):
            log.aborted.append(int(match[1]))
        elif match := _BATCH.match(line):
            log.batch = int(match[1])
        elif match := _WORLD.match(line):
            log.world = int(match[1])
        elif line.startswith("Config: "):
            log.starts += 1
            log.config = _literal(line.removeprefix("Config: ")) or log.config
        log.resumed = log.resumed or bool(_RESUMED.match(line))
        if not line.startswith(_FREE_TEXT) and _NON_FINITE.search(line):
            log.non_finite.append(line.strip()[:80])
    return log


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan  # a loss that is no number is not finite


def _literal(text: str) -> dict:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {}
    return value if isinstance(value, dict) else {}


@dataclass
class Metrics:
    """`metrics.jsonl`, last record of an epoch (and step) only; `validations` keeps every one in file order."""

    validations: list[tuple[int, Accuracy]] = field(default_factory=list)
    evals: dict[int, dict] = field(default_factory=dict)
    epochs: dict[int, dict] = field(default_factory=dict)
    steps: dict[tuple[int, int], dict] = field(default_factory=dict)
    start: dict = field(default_factory=dict)
    starts: int = 0
    torn: bool = False

    def non_finite(self) -> list[tuple[int, str]]:
        """(epoch, key) of every NaN, Inf, or loss written as null."""
        found = []
        for record in [*self.steps.values(), *self.epochs.values(), *self.evals.values()]:
            for key, value in record.items():
                lost = value is None and key in ("train/loss", "train/loss_mean", "eval/loss")
                if lost or (isinstance(value, float) and not math.isfinite(value)):
                    found.append((record["epoch"], key))
        return found


def read_metrics(path: Path) -> Metrics:
    """Parse `metrics.jsonl`; lines torn by a killed process are left out.

    Raises:
        ValueError: a record of an epoch without its epoch, with the line number.
    """
    metrics = Metrics()
    for number, line in enumerate(path.read_text(errors="replace").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            metrics.torn = True
            continue
        event = record.get("event") if isinstance(record, dict) else None
        if event == "start":
            metrics.start, metrics.starts = record, metrics.starts + 1
        if event not in ("step", "train_epoch", "eval"):
            continue
        try:
            epoch = int(record["epoch"])
            if event == "step":
                metrics.steps[epoch, int(record["train/step"])] = record
            elif event == "train_epoch":
                metrics.epochs[epoch] = record
            else:
                metrics.evals[epoch] = record
                metrics.validations.append((epoch, Accuracy(int(record["correct"]), int(record["total"]))))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: {event} record lacks a sound {error}") from error
    return metrics


def disagreement(log: Log, metrics: Metrics) -> str:
    """Why log and file do not tell the same story, or an empty string.

    Extra log lines are fine where something explains them: a resume, or a torn record of the last validation.
    """
    printed = log.accuracies
    written = [accuracy for _, accuracy in metrics.validations]
    if printed == written:
        return ""
    if len(printed) == len(written):
        at = next(i for i, pair in enumerate(zip(printed, written, strict=True)) if pair[0] != pair[1])
        values = f"{printed[at]} in the log, {written[at]} in the file"
        return f"log and metrics.jsonl disagree: validation {at + 1} is {values}"
    repeats = log.resumed or log.starts > 1 or metrics.starts > 1 or len(metrics.evals) < len(written)
    final = [Accuracy(r["correct"], r["total"]) for _, r in sorted(metrics.evals.items())]
    if len(printed) > len(final) and (repeats or metrics.torn):
        rest = iter(printed)
        if all(accuracy in rest for accuracy in final):
            return ""
    return f"log and metrics.jsonl disagree: {len(printed)} validations in the log, {len(written)} in the file"


def read_json(path: Path) -> dict:
    """A JSON object, or ValueError naming the file."""
    try:
        value = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); remove or rewrite it") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return value
