"""What several processes bring, and what saving costs: real runs of run.py on the CPU, one thread each.

scaling   efficiency of two gloo processes: seconds of an update by one process, over twice those by two, with the same rows in
          every update
saving    share of an update's time for which it waits for saving, with snapshots far more often than the default of every 500
          updates; asynchronous, and (for comparison) not
"""

import itertools
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from files import read_jsonl

from .material import ROOT, WORDS, Source, environment, model_folder
from .timing import result, spread

WARM_UP = 2  # updates at the start of a run that do not count


class Load(NamedTuple):
    """A run: rows in a micro-batch, micro-batches in an update, updates, runs of each kind, and updates between two snapshots."""

    micro: int
    accumulated: int
    updates: int
    rounds: int
    save_every: int

    @property
    def rows(self) -> int:
        """Rows in an update, by however many processes."""
        return self.micro * self.accumulated


LOADS = {"words 2x128": Load(16, 2, 13, 7, 10), "GPT-2 124M": Load(2, 8, 5, 2, 3)}
QUICK = {"tiny 2x64": Load(4, 2, 5, 1, 2)}


class Runner:
    """Runs of one shape in folders of their own."""

    def __init__(self, folder: Path, shape: str, source: Source, load: Load):
        words = shape.startswith(("words", "tiny"))
        self.folder, self.shape, self.load = folder, shape, load
        self.model = model_folder(folder / f"{shape} model", shape, WORDS if words else source.tokenizer)
        self.source, self.numbers = source, itertools.count()

    def updates(self, processes: int, **keys) -> tuple[list[float], dict[str, float]]:
        """Seconds of the updates of one run, and its seconds by phase. ValueError with the log's end where it fails."""
        name = f"{self.shape} {next(self.numbers)}"
        values = {
            "coconut": True, "max_latent_stage": 6, "resume": 6, "from_scratch": True, "model_id": self.model,
            "train_path": self.source.rows, "val_path": self.source.rows, "max_val_samples": 2, "max_new_tokens": 1,
            "save_path": self.folder, "name": name, "num_epochs": 100, "max_steps": self.load.updates, "log_every": 1,
            "batch_size_training": self.load.micro, "effective_batch_size": self.load.rows, "group_by_length": True,
            "save_every_steps": 0, "wandb": False, "device": "cpu",
        }  # fmt: skip
        config = self.folder / f"{name}.yaml"
        config.write_text("".join(f"{key}: {value}\n" for key, value in (values | keys).items()))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "run.py"]
        variables = environment(self.folder / "cache") | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, str(config)], cwd=ROOT, env=variables, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"run.py failed: {' | '.join(done.stderr.splitlines()[-3:])}")
        records = [r for r in read_jsonl(self.folder / name / "metrics.jsonl") if r["event"] == "speed"][WARM_UP:]
        phases: dict[str, float] = {}
        for record in records:
            for phase, seconds in record["phases"].items():
                phases[phase] = phases.get(phase, 0.0) + seconds
        return [record["seconds"] for record in records], phases


def measure_scaling(runner: Runner) -> list[dict]:
    """The efficiency of two processes, run by run in turns."""
    shares, taken = [], {1: [], 2: []}
    for i in range(runner.load.rounds):
        for processes in (1, 2) if i % 2 == 0 else (2, 1):
            taken[processes].append(statistics.median(runner.updates(processes)[0]))
        shares.append(100 * taken[1][-1] / (2 * taken[2][-1]))
    alone, together = (statistics.median(taken[n]) for n in (1, 2))
    note = f"{alone:.3g} s an update by one process, {together:.3g} s by two"
    return [result("scaling", runner.shape, batch_size=runner.load.rows, unit="%", note=note, **spread(shares))]


def measure_saving(runner: Runner) -> list[dict]:
    """The share of time that an update waits for saving."""
    results, every = [], runner.load.save_every
    for asynchronous in (True, False):
        shares, medians, plain = [], [], []
        for _ in range(min(runner.load.rounds, 3)):
            seconds, phases = runner.updates(1, save_every_steps=every, async_save=asynchronous)
            shares.append(100 * phases.get("saving", 0.0) / sum(seconds))
            medians.append(statistics.mean(seconds))
            plain.append(statistics.mean(runner.updates(1)[0]))
        kind = "asynchronous" if asynchronous else "in turn"
        slower = statistics.median(a / b for a, b in zip(medians, plain))
        note = f"a snapshot every {every} updates; an update takes {slower:.3f} x its time without any"
        measure = "saving" if asynchronous else "saving in turn"
        results.append(result(measure, f"{runner.shape}, {kind}", unit="%", note=note, **spread(shares)))
    return results
