"""What must hold of a run folder after a fault: everything under a final name is readable, and a finished run is equal.

unreadable(folder)              # at any moment: [] or what can't be read
apart(folder, reference)        # at the end: "" or the first difference to a run that nobody disturbed
"""

from pathlib import Path

import torch

from checkpoint import numbered_checkpoints, read_weights, read_whole
from files import read_json, read_jsonl
from sharding import load_whole, read_index


def unreadable(folder: Path) -> list[str]:
    """What lies under a final name and can't be read: nothing must, at no moment."""
    readers = {"checkpoint_*": read_weights, "last_state": read_whole, "pause_init": read_whole, "state_*": read_json}
    readers |= {"*.json": read_json, "last_shards_*": read_index, "sharded_*": read_index, "eval_*.jsonl": read_records}
    problems = []
    for pattern, reader in readers.items():
        for path in sorted(folder.glob(pattern)):
            try:
                reader(path)
            except (ValueError, OSError) as error:
                problems.append(f"{path.name}: {error}")
    return problems


def read_records(path: Path) -> list[dict]:
    """The records of a file that must be whole, its last line included."""
    if not path.read_bytes().endswith(b"\n"):
        raise ValueError(f"{path} ends within a line")
    return read_jsonl(path)


def apart(run: Path, reference: Path, records: bool = True) -> str:
    """How a finished run differs from its reference, "" where nothing does. `records`: compare metrics.jsonl and best.json."""
    return next(_differences(run, reference, records), "")


def _differences(run: Path, reference: Path, records: bool):
    yield from unreadable(run)
    yield from (f"{path.name} was left" for path in run.glob(".tmp-*"))
    names = [sorted(f"checkpoint_{n}" for n in numbered_checkpoints(path)) for path in (run, reference)]
    snapshots = [sorted(path.name for path in folder.glob("last_*")) for folder in (run, reference)]
    for found, wanted in (names, snapshots):
        if found != wanted:
            yield f"files {found} instead of {wanted}"
    for name in names[1]:
        yield from _unequal(read_weights(run / name), read_weights(reference / name), name)
    for name in snapshots[1]:
        yield from _unequal(*(_snapshot(folder / name) for folder in (run, reference)), name)
    if not records:
        return
    for event, key in (("step", "train/step"), ("eval", "epoch"), ("train_epoch", "epoch")):
        found, wanted = (_last(folder, event, key) for folder in (run, reference))
        yield from _unequal(found, wanted, f"{event} records")
    for path in sorted(reference.glob("eval_*.jsonl")):
        if not (run / path.name).is_file() or (run / path.name).read_bytes() != path.read_bytes():
            yield f"{path.name} differs"
    for name in ["best.json", *(path.name for path in reference.glob("state_*"))]:
        found, wanted = (_told(folder / name) for folder in (run, reference))
        yield from _unequal(found, wanted, name)


def _snapshot(path: Path):
    if not path.is_dir():
        return read_whole(path)
    index = read_index(path)
    return {"position": index["position"], "tied": index["tied"], "tensors": load_whole(path)}


def _last(folder: Path, event: str, key: str) -> dict[int, dict]:
    """The last record of each update or epoch, without what depends on the clock."""
    timed = {"time", "seconds", "phases", "eval/samples_per_s", "peak_memory_gb"}
    keep = None if event != "train_epoch" else {"epoch", "stage", "n_latents", "updates", "train/loss_mean"}
    records = {record[key]: record for record in read_records(folder / "metrics.jsonl") if record["event"] == event}
    return {
        number: {k: v for k, v in record.items() if k not in timed and (keep is None or k in keep)}
        for number, record in sorted(records.items())
    }


def _told(path: Path) -> dict | None:
    """A small JSON file without what names its folder."""
    value = read_json(path) if path.is_file() else None
    return value and {k: v for k, v in value.items() if k not in ("config", "versions")}


def _unequal(found, wanted, name: str):
    """Yield where two nested values differ, to the bit."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        if found.keys() != wanted.keys():
            yield f"{name}: {sorted(map(str, found))[:20]} instead of {sorted(map(str, wanted))[:20]}"
            return
        for key in wanted:
            yield from _unequal(found[key], wanted[key], f"{name}.{key}")
    elif isinstance(wanted, torch.Tensor):
        same = isinstance(found, torch.Tensor) and found.dtype == wanted.dtype and found.shape == wanted.shape
        if not (same and torch.equal(found, wanted)):
            most = float((found.double() - wanted.double()).abs().max()) if same and wanted.numel() else "shape or type"
            yield f"{name} differs ({most})"
    elif isinstance(wanted, list | tuple) and isinstance(found, list | tuple) and len(found) == len(wanted):
        for i, (a, b) in enumerate(zip(found, wanted)):
            yield from _unequal(a, b, f"{name}[{i}]")
    elif found != wanted:
        yield f"{name}: {found!r} instead of {wanted!r}"
