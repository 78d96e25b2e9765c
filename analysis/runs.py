"""What a training run left behind, log, metrics and folder, joined into one `Run`; and where a study's runs lie.

study = load_study(Path("logs"))
run = study[("m3", 0)]
run.evals[14]                      # Accuracy(correct=183, total=300), of epoch index 14: "line 15" of the log
run.train_means[14], run.folder / "checkpoint_15"
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from analysis.runlog import Accuracy, Log, Metrics, disagreement, read_json, read_log, read_metrics

LOG_STEMS = {
    "m1": "m1_cot",
    "m2": "m2_nocot",
    "m3": "m3_coconut",
    "m4": "m4_frozen",
    "m4b": "m4b_shared",
    "m5": "m5_pause",
    "m0": "m0_nothought",
}
RUN_NAMES = {
    "m1": "prosqa-cot",
    "m2": "prosqa-nocot",
    "m3": "prosqa-coconut",
    "m4": "prosqa-m4-frozen",
    "m4b": "prosqa-m4b-shared",
    "m5": "prosqa-m5-pause",
    "m0": "prosqa-m0-nothought",
}
MODELS = tuple(LOG_STEMS)
EPOCHS = 50  # of the calibrated recipe
OFFICIAL_VALID_ROWS, OFFICIAL_BATCH, OFFICIAL_UPDATES = 300, 128, 140


# ------------------------------------------------------------------------------------------------ one run


@dataclass
class Run:
    """One training run; `model` is m0..m5, `repeat` the number behind `-s` (0 without it)."""

    model: str
    repeat: int = 0
    log_path: Path | None = None
    folder: Path | None = None

    @property
    def label(self) -> str:
        return self.model + (f"-s{self.repeat}" if self.repeat else "")

    @cached_property
    def log(self) -> Log | None:
        return read_log(self.log_path) if self.log_path else None

    @cached_property
    def metrics(self) -> Metrics | None:
        path = self.folder / "metrics.jsonl" if self.folder else None
        return read_metrics(path) if path and path.is_file() else None

    @cached_property
    def info(self) -> dict:
        """`run.json`, or an empty dict for stock runs."""
        return read_json(self.folder / "run.json") if self.folder and (self.folder / "run.json").is_file() else {}

    @cached_property
    def config(self) -> dict:
        """The resolved config; for a stock run what its log printed."""
        recorded = self.info.get("config") or (self.metrics.start.get("config") if self.metrics else None)
        return recorded or (self.log.config if self.log else {})

    @cached_property
    def problem(self) -> str:
        """Why the accuracies cannot be trusted, or an empty string."""
        if self.log is None or self.metrics is None or not (self.log.accuracies or self.metrics.evals):
            return ""
        return disagreement(self.log, self.metrics)

    @cached_property
    def evals(self) -> dict[int, Accuracy]:
        """Validation accuracy by epoch index. "Line n" of the rules is epoch index n - 1."""
        if self.metrics is not None and self.metrics.evals:
            return {e: Accuracy(r["correct"], r["total"]) for e, r in sorted(self.metrics.evals.items())}
        return dict(enumerate(self.log.accuracies)) if self.log else {}

    @cached_property
    def train_means(self) -> dict[int, float]:
        """Mean training loss by epoch index, of finished epochs only."""
        if self.metrics is not None and self.metrics.epochs:
            pairs = ((e, r.get("train/loss_mean")) for e, r in sorted(self.metrics.epochs.items()))
            return {e: math.nan if loss is None else float(loss) for e, loss in pairs}
        losses = self.log.losses if self.log else {}
        return {e: math.fsum(b.values()) / len(b) for e, b in sorted(losses.items()) if e in self.evals}

    def stage(self, epoch: int) -> int:
        """Recorded stage of an epoch; without a record the one of the config (5 epochs a stage if it has none)."""
        if self.metrics is not None:
            for record in (self.metrics.epochs.get(epoch, {}), self.metrics.evals.get(epoch, {})):
                if "stage" in record:
                    return int(record["stage"])
        return planned_stage(self.model, epoch, int(self.config.get("epochs_per_stage") or 5))

    @property
    def last_epoch(self) -> int:
        """The number of epochs after which the run is complete: 50, but an uncalibrated run's own number."""
        return int(self.config.get("num_epochs") or EPOCHS) if self.uncalibrated else EPOCHS

    @cached_property
    def uncalibrated(self) -> list[str]:
        """Every recorded way in which the run departs from official data, GPT-2 124M and batch 128; [] if none."""
        config, found = self.config, []
        model_id = str(config.get("model_id", "openai-community/gpt2"))
        if Path(model_id).name != "gpt2" or config.get("from_scratch"):
            found.append(f"{self.label} trains {model_id}{' from scratch' if config.get('from_scratch') else ''}")
        batch = self._effective_batch()
        if batch and int(batch) != OFFICIAL_BATCH:
            found.append(f"{self.label} has effective batch {batch}, not {OFFICIAL_BATCH}")
        for key in ("max_train_samples", "max_val_samples", "debug"):
            if config.get(key):
                found.append(f"{self.label} has {key} {config[key]}")
        totals = {accuracy.total for accuracy in self.evals.values()} - {OFFICIAL_VALID_ROWS}
        if totals:
            found.append(f"{self.label} validates on {min(totals)} rows, not {OFFICIAL_VALID_ROWS}")
        # 17,886 rows in batches of 128 are 140 updates; a resumed epoch may record its own part only
        epochs = self.metrics.epochs.values() if self.metrics else ()
        updates = max((int(record.get("updates") or 0) for record in epochs), default=0)
        if updates and updates != OFFICIAL_UPDATES and not any("batch" in text for text in found):
            found.append(f"{self.label} makes {updates} updates an epoch, not {OFFICIAL_UPDATES}")
        return found

    def _effective_batch(self) -> int | None:
        """From the line printed at the start, the records, or (stock) config times the world size of the log."""
        log, config = self.log or Log(), self.config
        recorded = log.batch or self.info.get("effective_batch_size") or config.get("effective_batch_size")
        if recorded or not (log.world and config.get("batch_size_training")):
            return recorded
        return int(config["batch_size_training"]) * int(config.get("gradient_accumulation_steps") or 1) * log.world


def planned_stage(model: str, epoch: int, epochs_per_stage: int = 5) -> int:
    """Stage of the curriculum (study plan): none for CoT and no-CoT."""
    return 0 if model in ("m1", "m2") else epoch // epochs_per_stage


# ------------------------------------------------------------------------------------------------ finding runs


def parse_label(name: str, names: dict[str, str]) -> tuple[str, int] | None:
    """(model, repeat) of a log stem or run name such as `m4b_shared-s2`; None for foreign names."""
    match = re.fullmatch(r"(.+?)(?:-s(\d+))?", name)
    by_name = {value: key for key, value in names.items()}
    return (by_name[match[1]], int(match[2] or 0)) if match and match[1] in by_name else None


def find_folder(run: Run, runs: Path | None) -> Path | None:
    """The run folder: under `runs` by its name, else where the log's config says (seen from here or from the log)."""
    suffix = f"-s{run.repeat}" if run.repeat else ""
    config = run.log.config if run.log else {}
    name = str(config.get("name") or RUN_NAMES[run.model])
    names = dict.fromkeys([name, name + suffix, RUN_NAMES[run.model] + suffix])
    if run.repeat:
        names = {n: None for n in names if n.endswith(suffix)}
    places = [runs] if runs else []
    if not runs and config.get("save_path"):
        saved = Path(str(config["save_path"]))
        places = [saved] if saved.is_absolute() or run.log_path is None else [saved, run.log_path.parent / saved]
    if run.log_path is not None and not runs:
        places.append(run.log_path.parent)
    return next((place / n for place in places for n in names if (place / n).is_dir()), None)


def load_study(logs: Path, runs: Path | None = None) -> dict[tuple[str, int], Run]:
    """Every run of a study, by (model, repeat): `m3_coconut.log`, `m3_coconut-s1.log`, and folders with metrics.

    Raises:
        ValueError: `logs` or `runs` is no folder.
    """
    for place in filter(None, (logs, runs)):
        if not place.is_dir():
            raise ValueError(f"{place} is not a folder; give the folder that holds the study's logs or runs")
    study: dict[tuple[str, int], Run] = {}
    for path in sorted(logs.glob("*.log")):
        if key := parse_label(path.stem, LOG_STEMS):
            study[key] = Run(*key, log_path=path)
            study[key].folder = find_folder(study[key], runs)
    for place in dict.fromkeys(filter(None, (logs, runs))):
        for path in sorted(place.glob("*/metrics.jsonl")):
            key = folder_key(path.parent)
            if key and key not in study:
                study[key] = Run(*key, folder=path.parent)
    return study


def folder_key(folder: Path) -> tuple[str, int] | None:
    """(model, repeat) of a run folder: from its name, else from the model key in its `run.json`."""
    if key := parse_label(folder.name, RUN_NAMES) or parse_label(folder.name, LOG_STEMS):
        return key
    model = read_json(folder / "run.json").get("model_key") if (folder / "run.json").is_file() else None
    repeat = re.search(r"-s(\d+)$", folder.name)
    return (model, int(repeat[1]) if repeat else 0) if model in LOG_STEMS else None
