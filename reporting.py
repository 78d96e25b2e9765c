"""What a run tells while it runs: metrics.jsonl, wandb where it is configured, the progress line, the closing summary."""

import errno
import json
import os
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from accounting import PHASES, Shape, Stopwatch, Throughput
from files import NoRoom

WANDB_SECONDS = 20  # to wait for its server at the start


class Metrics:
    """Appends records to `<run folder>/metrics.jsonl` and sends their stock keys (those with a /) and the rates to wandb.

    Only rank 0 writes, and nobody under `debug`. Training never depends on wandb.
    """

    def __init__(self, config, folder: Path, enabled: bool):
        self.path, self.enabled, self.wandb = folder / "metrics.jsonl", enabled, None
        self.unwritten, self.refused = "", None
        if enabled and wanted(config):
            self.wandb = open_wandb(config, folder)

    def log(self, **record) -> None:
        if not self.enabled:
            return
        self.unwritten += json.dumps(record | {"time": round(time.time(), 3)}) + "\n"
        try:
            append(self.path, self.unwritten)
            self.unwritten, self.refused = "", None
        except OSError as error:
            self.refused = error
        if record.get("event") == "speed":
            record = {f"speed/{key}": value for key, value in record.items() if isinstance(value, float)}
        self._send({key: value for key, value in record.items() if "/" in key})

    def check(self) -> None:
        """Raise NoRoom while the disk refuses records; they are kept, and the next one takes them along."""
        if self.refused is not None:
            raise NoRoom(f"cannot write {self.path} ({self.refused.strerror}): make room and start the same command again")

    def _send(self, values: dict) -> None:
        if self.wandb is None:
            return
        try:
            self.wandb.log(values)
        except Exception as error:  # a logging service must never stop training
            print(f"Warning: wandb is off from here on ({' '.join(str(error).split())[:150]})", flush=True)
            self.wandb = None

    def log_batch(self, rows: list[dict], tokenizer) -> None:
        """A few rows of an epoch's first batch as a wandb table: id, label and token of every position."""
        if self.wandb is None:
            return
        import wandb

        print("logging training data", flush=True)
        texts = []
        for row in rows:
            pairs = zip(row["input_ids"].tolist(), row["labels"].tolist())
            texts.append([row["idx"], "\n".join(f"{token} {label} {tokenizer.decode([token])!r}" for token, label in pairs)])
        self._send({"data_table": wandb.Table(columns=["step", "text"], data=texts)})

    def close(self) -> None:
        if self.wandb is None:
            return
        try:
            self.wandb.finish()
        except Exception as error:
            print(f"Warning: wandb did not finish ({' '.join(str(error).split())[:150]})", flush=True)


def append(path: Path, text: str) -> None:
    """Add text to the end of a file, all of it or nothing. OSError where the disk refuses."""
    with open(path, "ab", buffering=0) as file:
        size, data = file.tell(), text.encode()
        try:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)
            raise


def wanted(config) -> bool:
    """Whether to open wandb: `wandb: True`, or auto and an account or WANDB_MODE is set up on this machine."""
    mode = config.wandb_mode or os.environ.get("WANDB_MODE")
    if config.wandb is False or mode == "disabled":
        return False
    netrc = Path.home() / ".netrc"
    account = os.environ.get("WANDB_API_KEY") or (netrc.is_file() and "wandb" in netrc.read_text())
    return config.wandb is True or bool(mode or account)


def open_wandb(config, folder: Path):
    """A wandb run that continues the folder's earlier one; offline where the server can't be reached, else None."""
    id_file, wished = folder / "wandb_id", config.wandb_mode or os.environ.get("WANDB_MODE") or "online"
    reason = ""
    for mode in dict.fromkeys((wished, "offline")):
        try:
            import wandb

            run = wandb.init(
                project=config.project,
                name=config.name,
                config=config.model_dump(),
                id=id_file.read_text() if id_file.is_file() else None,
                resume="allow",
                mode=mode,
                dir=folder,
                settings=wandb.Settings(init_timeout=WANDB_SECONDS),
            )
            id_file.write_text(run.id)
            if mode != wished:
                print(f"Warning: wandb is offline ({reason}); later: wandb sync {folder}/wandb/offline-run-*", flush=True)
            return run
        except Exception as error:  # a logging service must never stop training
            reason = " ".join(str(error).split())[:150]
    print(f"Warning: wandb is off ({reason})", flush=True)
    return None


class Progress:
    """One tqdm bar on a terminal; where there is none, a plain line about every tenth of the epoch."""

    def __init__(self, n_updates: int, start: int, epoch: int, epochs: int, n_batches: int, enabled: bool):
        self.head, self.n_batches, self.n_updates = f"Training Epoch: {epoch + 1}", n_batches, n_updates
        self.epochs, self.lines = epochs, enabled and not sys.stderr.isatty()
        self.bar = tqdm(desc=self.head, total=n_updates, initial=start, dynamic_ncols=True, disable=not enabled or self.lines)

    def update(self, step: int, batch: int, loss: float) -> None:
        text = f"{self.head}/{self.epochs}, batch {batch}/{self.n_batches} completed (loss: {loss:.4f}"
        self.bar.set_description(text, refresh=False)
        self.bar.update()
        if self.lines and ((step + 1) % max(self.n_updates // 10, 1) == 0 or step == self.n_updates - 1):
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        self.bar.close()


class Meter:
    """Time, work and rates of training, over the whole run, and what an epoch adds to it.

    `shape` and `peak` (FLOP/s of all processes' devices together, or None) are those of `accounting`.
    """

    def __init__(self, device: torch.device, shape: Shape, peak: float | None = None):
        self.device, self.shape, self.peak = device, shape, peak
        self.started, self.watch = time.monotonic(), Stopwatch(device)
        self.epoch, self.run = _Account(), _Account()

    def seconds(self) -> float:
        """Since the meter was made."""
        return time.monotonic() - self.started

    def add(self, work: Throughput) -> dict:
        """Count the work of some updates and the time since the last call; returns the rates and phases of both."""
        phases = self.watch.read()
        for account in (self.epoch, self.run):
            account.add(work, phases)
        return _rates(work, phases, self.peak)

    def close_epoch(self) -> dict:
        """The rates and phases of the epoch."""
        epoch, self.epoch = self.epoch, _Account()
        return _rates(epoch.work, epoch.phases, self.peak) | {"peak_memory_gb": peak_memory(self.device) / 1e9}

    def print_summary(self, accuracies: dict[int, float]) -> None:
        """The closing lines: accuracy, rates, where the time went, peak memory. `accuracies`: {epoch index: accuracy}."""
        if accuracies:
            last, best = max(accuracies), max(accuracies, key=lambda epoch: (accuracies[epoch], -epoch))
            print(f"Final accuracy {accuracies[last]:.4f} (epoch {last + 1}), best {accuracies[best]:.4f} (epoch {best + 1})")
        work, phases = self.run.work, self.run.phases
        rates = _rates(work, phases, self.peak)
        if work.samples:
            print(
                f"Trained {work.samples} samples, {work.tokens} tokens in {rates['seconds']:.1f} s: "
                f"{rates['samples_per_s']:.1f} samples/s, {rates['tokens_per_s']:.0f} tokens/s, "
                f"{rates['tflops_per_s']:.3g} TFLOP/s"
                + (f", MFU {100 * rates['mfu']:.1f} %" if "mfu" in rates else "")
                + f"; padding {100 * rates['padded_share']:.1f} %, supervised {100 * rates['supervised_share']:.1f} %"
            )
        for name, seconds in self.watch.read().items():  # what came after the last update
            phases[name] = phases.get(name, 0.0) + seconds
        total = sum(phases.values())
        if total:
            shares = (f"{name} {100 * phases[name] / total:.0f} %" for name in PHASES if name in phases)
            print(f"Time: {', '.join(shares)}")
        print(f"Peak memory {peak_memory(self.device) / 1e9:.2f} GB; total time {self.seconds():.1f} s", flush=True)


class _Account:
    def __init__(self):
        self.work, self.phases = Throughput(), {}

    def add(self, work: Throughput, phases: dict[str, float]) -> None:
        self.work += work
        for name, seconds in phases.items():
            self.phases[name] = self.phases.get(name, 0.0) + seconds


def _rates(work: Throughput, phases: dict[str, float], peak: float | None) -> dict:
    """Rates while training: validation and saving are shown among the phases, and do not count as time of training."""
    seconds = sum(s for name, s in phases.items() if name not in ("evaluation", "saving"))
    return work.rates(seconds, peak) | {"phases": phases}


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
