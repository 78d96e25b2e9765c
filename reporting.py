"""What a run tells while it runs: metrics.jsonl, wandb where it is configured, the progress line, the closing summary."""

import json
import os
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm


class Metrics:
    """Appends records to `<run folder>/metrics.jsonl` and sends their stock keys (those with a /) to wandb.

    Only rank 0 writes, and nobody under `debug`. Training never depends on wandb.
    """

    def __init__(self, config, folder: Path, enabled: bool):
        self.path, self.enabled, self.wandb = folder / "metrics.jsonl", enabled, None
        if enabled and wanted(config):
            self.wandb = open_wandb(config, folder)

    def log(self, **record) -> None:
        if not self.enabled:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps(record | {"time": round(time.time(), 3)}) + "\n")
        self._send({key: value for key, value in record.items() if "/" in key})

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


def wanted(config) -> bool:
    """Whether to open wandb: `wandb: True`, or auto and an account or WANDB_MODE is set up on this machine."""
    mode = config.wandb_mode or os.environ.get("WANDB_MODE")
    if config.wandb is False or mode == "disabled":
        return False
    netrc = Path.home() / ".netrc"
    account = os.environ.get("WANDB_API_KEY") or (netrc.is_file() and "wandb" in netrc.read_text())
    return config.wandb is True or bool(mode or account)


def open_wandb(config, folder: Path):
    """A wandb run that continues the folder's earlier one; None, with one line, where it can't be opened."""
    id_file = folder / "wandb_id"
    try:
        import wandb

        run = wandb.init(
            project=config.project,
            name=config.name,
            config=config.model_dump(),
            id=id_file.read_text() if id_file.is_file() else None,
            resume="allow",
            mode=config.wandb_mode or os.environ.get("WANDB_MODE") or "online",
            dir=folder,
            settings=wandb.Settings(init_timeout=60),
        )
        id_file.write_text(run.id)
        return run
    except Exception as error:  # a logging service must never stop training
        print(f"Warning: wandb is off ({' '.join(str(error).split())[:150]})", flush=True)
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
    """Samples, real tokens and seconds of training, over the whole run."""

    def __init__(self):
        self.started = time.time()
        self.samples = self.tokens = self.seconds = 0.0

    def add(self, samples: int, tokens: int, seconds: float) -> dict:
        """Count an epoch; returns its rates."""
        self.samples, self.tokens, self.seconds = self.samples + samples, self.tokens + tokens, self.seconds + seconds
        return {
            "tokens_per_s": tokens / max(seconds, 1e-9),
            "samples_per_s": samples / max(seconds, 1e-9),
            "seconds": seconds,
        }

    def print_summary(self, accuracies: dict[int, float], device: torch.device) -> None:
        """The closing lines: accuracy, time, rates, peak memory. `accuracies`: {epoch index: accuracy}."""
        if accuracies:
            last, best = max(accuracies), max(accuracies, key=lambda epoch: (accuracies[epoch], -epoch))
            print(f"Final accuracy {accuracies[last]:.4f} (epoch {last + 1}), best {accuracies[best]:.4f} (epoch {best + 1})")
        if self.seconds:
            print(
                f"Trained {self.samples:.0f} samples, {self.tokens:.0f} tokens in {self.seconds:.1f} s: "
                f"{self.samples / self.seconds:.1f} samples/s, {self.tokens / self.seconds:.0f} tokens/s"
            )
        print(f"Peak memory {peak_memory(device) / 1e9:.2f} GB; total time {time.time() - self.started:.1f} s", flush=True)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
