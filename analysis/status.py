"""Where runs stand: one line each with state, epoch, update, accuracy, loss, time left and age of the last record.

    python -m analysis.status runs/prosqa                 folders of runs, or run folders
    python -m analysis.status logs runs --width 100       with the queue of scripts/run_queue.sh; then GPU and disk

Reads run.json, the end of metrics.jsonl and the small files of the queue; only the standard library, so that it starts at once.
States: running, queued, done, failed (with its error below), stopped (goes on when started again), lost (ended without a
word: killed, or the machine went down; goes on when started again).
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

COLUMNS = ("run", "state", "epoch", "update", "accuracy", "loss", "time left", "last record")
TAIL_LIMIT = 8 << 20  # bytes of metrics.jsonl that are looked at, from its end
RECENT = 50  # records of speed that the time left is estimated from
FRESH = 600.0  # seconds: where locks can't be seen, a run with a younger record counts as running


@dataclass
class Standing:
    """What is known of one run. `events`: the last record of each kind; `speeds`: recent ones since its last start."""

    name: str
    folder: Path
    state: str = ""
    error: str = ""
    config: dict = field(default_factory=dict)
    rows: int | None = None
    events: dict[str, dict] = field(default_factory=dict)
    speeds: list[dict] = field(default_factory=list)  # newest first

    @property
    def updates_per_epoch(self) -> int | None:
        """From the last finished epoch; in the first one from the rows and the effective batch, where both are known."""
        if "updates" in self.events.get("train_epoch", {}):
            return self.events["train_epoch"]["updates"]
        batch = self.config.get("effective_batch_size")
        if batch is None and isinstance(self.config.get("batch_size_training"), int):
            world = self.events.get("start", {}).get("world_size", 1)
            batch = self.config["batch_size_training"] * self.config.get("gradient_accumulation_steps", 1) * world
        rows = min(filter(None, (self.rows, self.config.get("max_train_samples"))), default=None)
        return math.ceil(rows / batch) if rows and batch else None

    @property
    def done_updates(self) -> int | None:
        step = self.events.get("step", {}).get("train/step")
        return None if step is None else step + 1

    @property
    def all_updates(self) -> int | None:
        epochs, per_epoch = self.config.get("num_epochs"), self.updates_per_epoch
        if not epochs or not per_epoch:
            return None
        return min(filter(None, (epochs * per_epoch, self.config.get("max_steps"))))

    def seconds_left(self) -> float | None:
        """Updates left over the recent rate; evaluations between recent records count as part of it."""
        if self.done_updates is None or self.all_updates is None or not self.speeds:
            return None
        newest, oldest = self.speeds[0], self.speeds[-1]
        updates, seconds = sum(s.get("updates", 0) for s in self.speeds[:-1]), newest["time"] - oldest["time"]
        if len(self.speeds) == 1:
            updates, seconds = newest.get("updates", 0), newest.get("seconds", 0.0)
        if updates <= 0 or seconds <= 0:
            return None
        return max(self.all_updates - self.done_updates, 0) * seconds / updates

    def cells(self, now: float) -> tuple[str, ...]:
        """The run's line of the table."""
        last = max((record["time"] for record in self.events.values()), default=None)
        step, evaluation = self.events.get("step", {}), self.events.get("eval", {})
        epoch = max((r["epoch"] + 1 for r in (step, evaluation) if "epoch" in r), default=None)
        left = self.seconds_left() if self.state == "running" else None
        return (
            self.name,
            self.state,
            _of(epoch, self.config.get("num_epochs")),
            _of(self.done_updates, self.all_updates),
            _number(evaluation.get("eval/acc")),
            _number(step.get("train/loss")),
            "-" if left is None else duration(left),
            "-" if last is None else f"{duration(max(now - last, 0))} ago",
        )


def _of(value: int | None, whole: int | None) -> str:
    return "-" if value is None else f"{value}/{whole}" if whole else str(value)


def _number(value: float | None) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "-"


def duration(seconds: float) -> str:
    """Seconds in the largest two units: 45 s, 3 min 20 s, 5 h 02 min, 2 d 03 h."""
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if days:
        return f"{days:.0f} d {hours % 24:02.0f} h"
    if hours:
        return f"{hours:.0f} h {minutes % 60:02.0f} min"
    return f"{minutes:.0f} min {seconds % 60:02.0f} s" if minutes else f"{seconds:.0f} s"


# ---------------------------------------------------------------- a run's own files


def lines_from_end(path: Path, limit: int = TAIL_LIMIT, block: int = 1 << 16) -> Iterator[bytes]:
    """The lines of a file from the last to the first, read block by block, at most about `limit` bytes of them.

    What stands after the last newline is a line that is being written, and left out.
    """
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        stop, rest, torn = max(end - limit, 0), b"", True
        while end > stop:
            start = max(end - block, stop)
            file.seek(start)
            rest = file.read(end - start) + rest
            end = start
            first, *lines = rest.split(b"\n")
            if lines:
                yield from reversed(lines[:-1] if torn else lines)
                rest, torn = first, False
        if stop == 0 and not torn:
            yield rest


def records_from_end(path: Path) -> Iterator[dict]:
    """The records of a metrics.jsonl from the last one; damaged lines and missing files give none."""
    try:
        for line in lines_from_end(path):
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if (
                isinstance(record, dict)
                and isinstance(record.get("event"), str)
                and isinstance(record.get("time"), int | float)
            ):
                yield record
    except OSError:
        return


def read_run(name: str, folder: Path) -> Standing:
    """What a run folder says of itself; its state is left open."""
    run = Standing(name, folder)
    about = _json(folder / "run.json")
    run.config = about.get("config") or {}
    data = about.get("data") or {}
    run.rows = (data.get("train_path") or {}).get("rows")
    started = False
    for record in records_from_end(folder / "metrics.jsonl"):
        run.events.setdefault(record["event"], record)
        if record["event"] == "speed" and not started and len(run.speeds) < RECENT:
            run.speeds.append(record)
        started = started or record["event"] == "start"
        if started and {"step", "eval", "train_epoch"} <= run.events.keys():
            break
    return run


def _json(path: Path) -> dict:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def own_state(run: Standing) -> str:
    """The state of a run that no queue knows: from its last record, and from the lock that a training process holds."""
    lock, locks = run.folder / ".lock", Path("/proc/locks")
    if locks.is_file():
        held = lock.is_file() and f":{lock.stat().st_ino} " in locks.read_text()
    else:
        held = time.time() - max((r["time"] for r in run.events.values()), default=0.0) < FRESH
    last = max(run.events.values(), key=lambda record: record["time"], default={}).get("event")
    ended = {"end": "done", "stopped": "stopped"}.get(last)
    if last == "end" or not held:  # the lock outlives the last record by the time that Python takes to end
        return ended or "lost"
    return "running"


# ---------------------------------------------------------------- the files of scripts/run_queue.sh


def alive(pid_file: Path) -> bool:
    """Whether the process of a pid file runs, and is one of ours: numbers are given again, also after a restart."""
    try:
        pid = int(pid_file.read_text())
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    command = Path(f"/proc/{pid}/cmdline")
    try:
        return re.search(rb"run\.py|run_queue", command.read_bytes()) is not None
    except OSError:
        return not Path("/proc/self").exists()


def read_queue(logs: Path) -> list[Standing]:
    """The runs that a folder of logs knows of, in the order in which they were added; their states are those of the queue."""
    names = [path.stem for path in sorted(logs.glob("*.job"), key=lambda path: path.stat().st_mtime)]
    waiting = _fields(logs / "queue.list")
    works = alive(logs / "queue.pid")
    current = _fields(logs / "queue.current")[:1] if works else []
    return [_queued_run(logs, name, works and name in waiting, name in current) for name in names]


def _queued_run(logs: Path, name: str, waiting: bool, current: bool) -> Standing:
    folder = Path(*_fields(logs / f"{name}.job")[2:3])
    run = read_run(name, folder if folder.is_absolute() else logs.parent / folder)
    code, _, word = _text(logs / f"{name}.exit").strip().partition(" ")
    if current or alive(logs / f"{name}.pid"):
        run.state = "running"
    elif waiting:
        run.state = "queued"
    else:
        run.state = word or own_state(run)
    if run.state == "failed":
        errors = re.findall(r"^(?:error.*|\w*Error: .*)$", _text(logs / f"{name}.log", last=1 << 14), re.MULTILINE)
        run.error = f"{name}: exit code {code}" + (f": {errors[-1]}" if errors else f"; see {logs / name}.log")
    return run


def _fields(path: Path) -> list[str]:
    """The NUL-terminated strings of a file of the queue."""
    return _text(path).split("\0")[:-1]


def _text(path: Path, last: int | None = None) -> str:
    """The text of a file, or of its last bytes; nothing where there is no file."""
    try:
        with open(path, "rb") as file:
            if last is not None:
                file.seek(max(file.seek(0, os.SEEK_END) - last, 0))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


# ---------------------------------------------------------------- all runs, and the machine


def find_runs(folders: list[Path]) -> list[Standing]:
    """All runs of folders of logs, run folders, and folders of those (two levels deep), each once.

    Raises ValueError for a folder that does not exist.
    """
    runs: dict[Path, Standing] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder; name run folders, folders of them, or the folder of logs")
        for run in read_queue(folder):
            runs.setdefault(run.folder.resolve(), run)
    for folder in folders:
        places = [folder, *sorted(folder.glob("*")), *sorted(folder.glob("*/*"))]
        for place in places:
            ours = (place / "run.json").is_file() or (place / "metrics.jsonl").is_file()
            if ours and place.resolve() not in runs:
                run = runs[place.resolve()] = read_run(place.name, place)
                run.state = own_state(run)
    return list(runs.values())


def table(rows: list[tuple[str, ...]], width: int) -> list[str]:
    """Aligned lines, none longer than `width`: names give way first, then the right-hand columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    too_wide = sum(widths) + 2 * (len(widths) - 1) - width
    widths[0] = max(widths[0] - max(too_wide, 0), min(widths[0], 12))
    rows = [(_cut(row[0], widths[0]), *row[1:]) for row in rows]
    return [_cut("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip(), width) for row in rows]


def _cut(text: str, width: int) -> str:
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"


def machine(folder: Path) -> str:
    """One line: each GPU with memory and use, where there is one, and the free space of a folder's disk."""
    query = ["nvidia-smi", "--query-gpu=name,memory.used,memory.total,utilization.gpu", "--format=csv,noheader,nounits"]
    parts = ["no GPU"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
        gpus = [line.split(", ") for line in lines if line.count(", ") == 3]
        parts = [f"{name} {_gigabytes(used)}/{_gigabytes(total)} GB, {use} %" for name, used, total, use in gpus] or parts
    except (OSError, subprocess.SubprocessError):
        pass  # no driver, or it does not answer: the runs are shown all the same
    return " | ".join([*parts, f"{shutil.disk_usage(folder).free / 1e9:.1f} GB of disk free"])


def _gigabytes(mebibytes: str) -> str:
    return f"{int(mebibytes) * 2**20 / 1e9:.1f}" if mebibytes.isdigit() else "?"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="run folders, folders of them, a folder of logs")
    parser.add_argument(
        "--width", type=int, default=shutil.get_terminal_size().columns, help="characters a line (default: all)"
    )
    args = parser.parse_args(argv)
    try:
        runs = find_runs(args.folders)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    now = time.time()
    lines = table([COLUMNS, *(run.cells(now) for run in runs)], args.width) if runs else ["no runs yet"]
    lines += [_cut(run.error, args.width) for run in runs if run.error]
    print("\n".join([*lines, _cut(machine(args.folders[0]), args.width)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
