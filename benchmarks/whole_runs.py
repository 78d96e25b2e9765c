"""P5 and P6 on real runs of run.py: all stages measured for a few updates and extrapolated, or all 50 epochs in pieces.

P5            minutes of 50 epochs of 17,886 rows, evaluated on 300 rows and saved after each, from measured stages
P5 update     milliseconds of one update of 128 rows at one stage, with the phases it consists of
P5 whole run  minutes of the run itself, which may be interrupted as often as one likes
P6 MFU        share of the device's peak that the whole run's real tokens need (see accounting.py)
P6 padding    share of positions that hold a token

One short run goes through all stages in turn, an epoch of a few updates each; so start, compilation, updates, evaluation and
saving are those of training itself. An untrained model writes as many tokens as it may: its evaluations are the longest.
"""

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from analysis.profile import STEP_PHASES, peak_memory_gb, summarise
from files import read_jsonl

from .material import ROOT, STAGE
from .timing import Budget, result

EPOCHS, EPOCHS_PER_STAGE, ROWS, UPDATE_ROWS, VALIDATION_ROWS = 50, 5, 17886, 128, 300
M3, M5 = "args/prosqa_coconut_1gpu.yaml", "args/prosqa_m5_pause.yaml"
FAST = {"bf16": True, "group_by_length": True, "batch_size_training": "auto", "compile": True}
WHOLE = {"m3": M3, "m5": M5}
TERMINATE_WITHIN = 5  # seconds


class Variant(NamedTuple):
    """A way to train: changed keys, what they are in words, and whether a few updates have to do."""

    keys: dict
    what: str
    slow: bool = False


VARIANTS = {
    "before": Variant({}, "M3 in float32, 32 rows at a time as they come, eager", slow=True),
    "eager": Variant(FAST | {"compile": False}, "M3 in bf16, the largest micro-batch, grouped by length, eager"),
    "compiled": Variant(FAST, "M3 in bf16, the largest micro-batch, grouped by length, compiled"),
}


@dataclass(frozen=True)
class Place:
    """Where runs find their data and model and leave their files, and how long they are."""

    work: Path
    model: Path  # a folder for model_id
    data: Path  # with prosqa_train.json
    val_path: Path
    updates: int = 36  # a stage
    log_every: int = 4
    warm_up: int = 8
    rows_per_update: int = UPDATE_ROWS
    keys: dict = field(default_factory=dict)  # for all runs
    full_keys: dict = field(default_factory=dict)  # for whole runs

    def overrides(self, name: str, save_path: Path, **more) -> list[str]:
        keys = {
            "name": name, "save_path": save_path.resolve(), "model_id": self.model.resolve(), "from_scratch": True,
            "train_path": (self.data / "prosqa_train.json").resolve(), "val_path": self.val_path.resolve(),
            "effective_batch_size": self.rows_per_update, "batch_size_training": max(1, self.rows_per_update // 4),
            "wandb": False,
        }  # fmt: skip
        return [f"{key}={value}" for key, value in (keys | more | self.keys).items()]


def run_py(yaml: str, overrides: list[str], log: Path, at_most: float) -> bool:
    """Run run.py to its end, or end it after `at_most` seconds and return False. ValueError with its error where it fails."""
    with open(log, "w") as out:
        command = [sys.executable, "run.py", yaml, *overrides]
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    try:
        process.wait(max(at_most, 0))
    except subprocess.TimeoutExpired:
        return False
    finally:
        end(process)
    if process.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        told = [line for line in lines if line.startswith("error")] or lines or ["nothing was printed"]
        raise ValueError(f"run.py ended with {process.returncode}: {told[-1].removeprefix('error: ')}")
    return True


def end(process: subprocess.Popen) -> None:
    """End a process that may still run: asked first, then killed."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(TERMINATE_WITHIN)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# ---------------------------------------------------------------- measured stages


def measure_variant(name: str, place: Place, budget: Budget) -> list[dict] | None:
    """One short run through all stages, and what 50 epochs would take; None where the budget ended it."""
    variant = VARIANTS[name]
    if variant.slow and place.updates > 12:
        place = replace(place, updates=12, log_every=1, warm_up=3)
    short = {
        "epochs_per_stage": 1, "num_epochs": STAGE + 1, "max_train_samples": place.updates * place.rows_per_update,
        "max_val_samples": VALIDATION_ROWS, "log_every": place.log_every, "auto_resume": False,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="run-", dir=place.work) as temporary:
        folder, log, begun = Path(temporary), Path(temporary) / "log", time.time()
        if not run_py(M3, place.overrides(name, folder, **short, **variant.keys), log, budget.left):
            return None
        records, printed = read_jsonl(folder / name / "metrics.jsonl"), log.read_text(errors="replace")
        micro = json.loads((folder / name / "run.json").read_text())["config"]["batch_size_training"]
    notes = [line.removeprefix("Note: the passes are ") for line in printed.splitlines() if "passes are not" in line]
    memory = peak_memory_gb(printed)
    notes += [] if memory is None else [f"peak memory {memory:.1f} GB"]
    return variant_results(name, records, place.warm_up, begun, micro, notes)


def variant_results(
    name: str, records: list[dict], warm_up: int, begun: float, micro: int | None = None, notes: list[str] = ()
) -> list[dict]:
    """The results of a short run from its metrics.jsonl; `begun` is the (unix) time of its start."""
    stages = [summarise([r for r in records if r.get("stage") == stage], stage, warm_up) for stage in range(STAGE + 1)]
    parts, rates = extrapolate(stages, records, begun)
    shape = f"{name}, {EPOCHS} epochs"
    told = ", ".join(f"{part} {seconds / 60:.1f}" for part, seconds in parts.items())
    whole = sum(parts.values()) / 60
    results = [
        result("P5", shape, whole, "min", batch_size=micro, note="; ".join([told, *notes]), parts=parts),
        result("P6 padding", shape, 100 * (1 - rates["padded_share"]), "%", batch_size=micro),
    ]
    if "mfu" in rates:
        note = f"{rates['tokens_per_s']:,.0f} tokens/s"
        results.append(result("P6 MFU", shape, 100 * rates["mfu"], "%", batch_size=micro, note=note))
    for s in stages:
        ms, note = s["update"], f"{s['rates']['tokens_per_s']:,.0f} tokens/s"
        more = {"min": ms["min_ms"], "max": ms["max_ms"], "rounds": len(s["updates"]), "batch_size": micro, "note": note}
        more |= {key: s[key] for key in ("phases", "rates", "evaluation")}
        results.append(result("P5 update", f"{name}, stage {s['stage']}", ms["median_ms"], "ms", **more))
    return results


def epochs_at(stage: int) -> int:
    """Epochs of the whole run at a stage; the last measured one stands for those after it, which have as many thoughts."""
    return sum(min(epoch // EPOCHS_PER_STAGE, STAGE) == stage for epoch in range(EPOCHS))


def extrapolate(stages: list[dict], records: list[dict], begun: float) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of each part of the whole run, and its rates while training, from summaries of all stages.

    Updates count with their mean. What the first ones of a stage took above it (graphs are recorded, memory is taken) is
    added once a stage, the start once.
    """
    n_updates = math.ceil(ROWS / UPDATE_ROWS)
    parts = {"start": next(r["time"] for r in records if r["event"] == "start") - begun}
    parts |= dict.fromkeys(("training", "first updates", "evaluation"), 0.0)
    tokens = positions = peak = 0.0
    for s in stages:
        epochs = epochs_at(s["stage"])
        mean = statistics.mean(sum(update.values()) for update in s["updates"]) / 1000
        seconds = epochs * n_updates * mean
        parts["training"] += seconds
        parts["first updates"] += max(0.0, warm_up_seconds(s, records) - s["warmup"] * mean)
        parts["evaluation"] += epochs * s["evaluation"]["seconds"] * VALIDATION_ROWS / s["evaluation"]["rows"]
        tokens += seconds * s["rates"]["tokens_per_s"]
        positions += seconds * s["rates"]["tokens_per_s"] / (1 - s["rates"]["padded_share"])
        peak += seconds * s["rates"].get("mfu", math.nan)
    savings = [r["phases"]["saving"] for r in records if r["event"] == "speed" and "saving" in r["phases"]]
    parts["saving"] = EPOCHS * statistics.median(savings)
    rates = {"tokens_per_s": tokens / parts["training"], "padded_share": 1 - tokens / positions}
    return parts, rates if math.isnan(peak) else rates | {"mfu": peak / parts["training"]}


def warm_up_seconds(summary: dict, records: list[dict]) -> float:
    """What the updates took that a stage's summary left out."""
    seconds, seen = 0.0, 0
    for r in records:
        if r["event"] == "speed" and r["stage"] == summary["stage"] and seen < summary["warmup"]:
            seconds, seen = seconds + sum(r["phases"].get(name, 0.0) for name in STEP_PHASES), seen + r["updates"]
    return seconds


# ---------------------------------------------------------------- whole runs


def whole_run(model: str, place: Place, budget: Budget) -> list[dict] | None:
    """Train one model through all its epochs, or go on with that; None where the budget ends it before it is done."""
    folder = place.work / "whole"
    folder.mkdir(exist_ok=True)
    overrides = place.overrides(f"whole-{model}", folder, **FAST | place.full_keys)
    if not run_py(WHOLE[model], overrides, folder / f"{model}.log", budget.left):
        return None
    return whole_run_results(model, read_jsonl(folder / f"whole-{model}" / "metrics.jsonl"))


def whole_run_results(model: str, records: list[dict]) -> list[dict]:
    """The results of a finished run: the time between the first and the last record of every start of it, and accuracy."""
    starts = [i for i, r in enumerate(records) if r["event"] == "start"]
    sessions = [records[a:b] for a, b in zip(starts, [*starts[1:], None])]
    seconds = sum(session[-1]["time"] - session[0]["time"] for session in sessions)
    epochs, accuracy = ({r["epoch"]: r for r in records if r["event"] == event} for event in ("train_epoch", "eval"))
    accuracy = {epoch: r["eval/acc"] for epoch, r in accuracy.items()}
    shape, last = f"{model}, {len(epochs)} epochs", accuracy[max(accuracy)]
    note = f"starts: {len(sessions)}; accuracy {100 * last:.1f} %"
    results = [result("P5 whole run", shape, seconds / 60, "min", note=note, accuracy=accuracy)]
    if all("mfu" in r for r in epochs.values()):
        trained = sum(r["seconds"] for r in epochs.values())
        mfu = sum(r["mfu"] * r["seconds"] for r in epochs.values()) / trained
        results.append(result("P6 MFU", shape, 100 * mfu, "%"))
    return results
