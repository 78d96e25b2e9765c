"""What two run folders have in common and where they differ, to the bit; `compare.py` says it in words.

    result = differences(Path("runs/a"), Path("runs/b"))
    result["equal"], result["first_difference"]         # True, None; or False, {"what": "loss", "epoch": 2, "update": 17, ...}

Rows, loss and gradient norm of every update, evaluations and every checkpoint_N decide; settings, versions and data files stand
beside them. Of updates done twice the last counts, and whether they came to the same loss again is kept. NaN equals NaN.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import numbered_checkpoints, read_weights
from files import read_json, read_jsonl
from utils import Config

# Keys that say where things lie or how often they are looked at: the numbers of a run do not depend on them.
NEUTRAL = {
    *("name", "save_path", "project", "wandb", "wandb_mode"),
    *("log_every", "save_every_steps", "keep", "async_save", "auto_resume", "save_training_state", "eval_batch_size"),
    "peak_tflops",
}
VERSIONS = ("torch", "transformers", "python", "code")
UPDATE_FIELDS = {"rows": "row order", "train/loss": "loss", "train/grad_norm": "gradient norm"}
EVAL_FIELDS = ("eval/acc", "eval/loss")
CHUNK = 1 << 22  # values of a tensor that are compared at a time
INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# ---------------------------------------------------------------- reading


@dataclass
class Side:
    """What one run folder tells. Updates are keyed by (epoch index, `train/step`), evaluations by (epoch index,)."""

    folder: Path
    about: dict = field(default_factory=dict)
    worlds: list[int] = field(default_factory=list)
    updates: dict[tuple, dict] = field(default_factory=dict)
    evaluations: dict[tuple, dict] = field(default_factory=dict)
    redone: dict = field(default_factory=lambda: {"updates": 0, "repeated": 0, "first": None})

    @classmethod
    def read(cls, folder: Path) -> "Side":
        """ValueError where the folder is none of a run, or where a file in it can't be read."""
        if not folder.is_dir():
            raise ValueError(f"no run folder at {folder}; name one, which has run.json and metrics.jsonl")
        side = cls(folder)
        if not (side.checkpoints or any((folder / name).is_file() for name in ("run.json", "metrics.jsonl"))):
            inside = sorted(path.parent.name for path in folder.glob("*/run.json"))
            hint = f"; it holds runs, name one of them: {', '.join(inside[:8])}" if inside else ""
            raise ValueError(f"{folder} is not a run folder (no run.json, metrics.jsonl or checkpoint_N in it){hint}")
        if (folder / "run.json").is_file():
            side.about = read_json(folder / "run.json")
        for record in read_jsonl(folder / "metrics.jsonl"):
            event = record.get("event")
            if event == "step":
                side._add(record)
            elif event == "eval":
                side.evaluations[(record["epoch"],)] = record
            elif event == "start" and record.get("world_size") not in side.worlds[-1:]:
                side.worlds.append(record.get("world_size"))
        return side

    def _add(self, record: dict) -> None:
        """An update; one that was done before must have come to the same loss."""
        key, redone = (record["epoch"], record["train/step"]), self.redone
        before = self.updates.get(key)
        if before is not None:
            repeated = same(before["train/loss"], record["train/loss"])
            redone["updates"], redone["repeated"] = redone["updates"] + 1, redone["repeated"] + repeated
            if not repeated and redone["first"] is None:
                redone["first"] = point(key, before["train/loss"], record["train/loss"])
        self.updates[key] = record

    @property
    def checkpoints(self) -> list[int]:
        return numbered_checkpoints(self.folder)

    @property
    def reach(self) -> tuple:
        """How far the run came, to be compared with another's."""
        checkpoint = (max(self.checkpoints, default=0) - 1, math.inf)
        return max(self.updates, default=checkpoint), max(self.evaluations, default=())


def same(a, b) -> bool:
    """Whether two values read from JSON are the same to the bit, with NaN equal to NaN."""
    return repr(a) == repr(b)


def apart(a, b) -> float | None:
    """b - a; None for values that are no numbers."""
    return b - a if isinstance(a, int | float) and isinstance(b, int | float) else None


def point(key: tuple, a, b) -> dict:
    """Where two values differ."""
    place = {"epoch": key[0] + 1} | ({"update": key[1]} if len(key) > 1 else {})
    return place | {"a": a, "b": b, "difference": apart(a, b)}


# ---------------------------------------------------------------- the four aspects


def compare_config(a: Side, b: Side) -> dict:
    """{"recorded", "keys": how many, "differ": {key: {"a", "b", "matters"}}, "versions": {name: {"a", "b"}}, "world_size"}.

    A key that one run's version did not know has the value it would have by default.
    """
    configs = [side.about.get("config") or {} for side in (a, b)]
    defaults = {key: f.default for key, f in Config.model_fields.items() if not f.is_required()}
    keys = sorted(configs[0].keys() | configs[1].keys())
    differ = {}
    for key in keys if all(configs) else ():
        one, other = (config.get(key, defaults.get(key)) for config in configs)
        if not same(one, other):
            same_file = key in ("train_path", "val_path") and data_file(a, b, key)["equal"]
            differ[key] = {"a": one, "b": other, "matters": key not in NEUTRAL and not same_file}
    versions = {name: {x: s.about.get("versions", {}).get(name) for x, s in (("a", a), ("b", b))} for name in VERSIONS}
    world_size = {"a": a.worlds, "b": b.worlds}
    return {"recorded": all(configs), "keys": len(keys), "differ": differ, "versions": versions, "world_size": world_size}


def data_file(a: Side, b: Side, key: str) -> dict:
    """The file a key of the config names: {"a", "b": {"file", "sha256", "rows"} or None, "equal": None if not recorded}."""
    one, other = ((side.about.get("data") or {}).get(key) for side in (a, b))
    return {"a": one, "b": other, "equal": one["sha256"] == other["sha256"] if one and other else None}


def compare_series(a: dict[tuple, dict], b: dict[tuple, dict], name: str) -> dict:
    """A field of the records of both: how many were compared and are equal, the first that differs, the largest difference."""
    one, other = ({key: record[name] for key, record in records.items() if name in record} for records in (a, b))
    both = sorted(one.keys() & other.keys())
    unequal = [point(key, one[key], other[key]) for key in both if not same(one[key], other[key])]
    with_size = [p for p in unequal if p["difference"] is not None]
    return {
        "a": len(one),
        "b": len(other),
        "compared": len(both),
        "equal": len(both) - len(unequal),
        "first": unequal[0] if unequal else None,
        "largest": max(with_size, key=lambda p: size(p["difference"])) if with_size else None,
    }


def size(difference: float) -> float:
    """How large a difference is; what is not a number is larger than all numbers."""
    return math.inf if math.isnan(difference) else abs(difference)


def compare_tensors(a: Tensor, b: Tensor) -> dict | None:
    """None where equal; else {"values": how many differ, "of", "largest", "squares": sum of squared differences}.

    Tensors of another shape or type have no numbers, but say what they are: {"a", "b"}.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return {side: f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for side, x in (("a", a), ("b", b))}
    values, largest, squares = 0, 0.0, 0.0
    for x, y in zip(a.reshape(-1).split(CHUNK), b.reshape(-1).split(CHUNK)):
        x_bits, y_bits = (z.view(INTEGER[z.element_size()]) for z in (x, y))
        if torch.equal(x_bits, y_bits):
            continue
        other_bits = (x_bits != y_bits) & ~(x.isnan() & y.isnan())
        if other_bits.any():
            gaps = (y[other_bits].double() - x[other_bits].double()).abs()
            values, squares = values + len(gaps), squares + float(gaps.square().sum())
            largest = max(largest, float(gaps.max()), key=size)
    return {"values": values, "of": a.numel(), "largest": largest, "squares": squares} if values else None


def compare_weights(a: Path, b: Path) -> dict:
    """Two checkpoint files, tensor by tensor; of tied tensors, which are one storage in both files, only the first is named."""
    one, other = read_weights(a), read_weights(b)
    differ, pairs, squares = [], set(), 0.0
    for name in [*one, *(name for name in other if name not in one)]:
        if name not in one or name not in other:
            differ.append({"name": name, "only_in": "a" if name in one else "b"})
            continue
        pair = (one[name].data_ptr(), other[name].data_ptr(), one[name].shape)
        if pair in pairs:
            continue
        pairs.add(pair)
        found = compare_tensors(one[name], other[name])
        if found is not None:
            squares += found.pop("squares", 0.0)
            differ.append({"name": name} | found)
    differ.sort(key=lambda d: size(d.get("largest", math.nan)), reverse=True)
    tensors = len(pairs) + sum("only_in" in d for d in differ)
    return {"tensors": tensors, "differ": differ, "distance": math.sqrt(squares), "norm": norm(one) if differ else None}


def norm(weights: dict[str, Tensor]) -> float:
    """The length of all distinct tensors as one vector."""
    distinct = {(x.data_ptr(), x.shape): x for x in weights.values()}.values()
    return math.sqrt(sum(float(part.double().square().sum()) for x in distinct for part in x.reshape(-1).split(CHUNK)))


def differences(folder_a: Path, folder_b: Path) -> dict:
    """All aspects of two run folders (see the parts), "first_difference", and "equal" in all they share, None if that is nothing.

    Raises ValueError where a folder is none of a run or a file can't be read.
    """
    a, b = Side.read(Path(folder_a)), Side.read(Path(folder_b))
    both = sorted(set(a.checkpoints) & set(b.checkpoints))
    further = "a" if a.reach > b.reach else "b" if b.reach > a.reach else None
    result = {
        "schema_version": 1,
        "runs": {"a": str(a.folder), "b": str(b.folder)},
        "config": compare_config(a, b),
        "data": {key: data_file(a, b, key) for key in ("train_path", "val_path")},
        "updates": {name: compare_series(a.updates, b.updates, name) for name in UPDATE_FIELDS},
        "evaluations": {name: compare_series(a.evaluations, b.evaluations, name) for name in EVAL_FIELDS},
        "redone": {"a": a.redone, "b": b.redone},
        "weights": {n: compare_weights(a.folder / f"checkpoint_{n}", b.folder / f"checkpoint_{n}") for n in both},
        "checkpoints": {"a": a.checkpoints, "b": b.checkpoints},
        "further": further,
    }
    counts = {
        "updates": len(a.updates.keys() & b.updates.keys()),
        "evaluations": len(a.evaluations.keys() & b.evaluations.keys()),
        "checkpoints": len(both),
    }
    first = first_difference(result)
    equal = first is None if any(counts.values()) else None
    return result | {"compared": counts, "first_difference": first, "equal": equal}


def first_difference(result: dict) -> dict | None:
    """The earliest in training: {"what", "epoch", ...}; of one update its rows come before its loss and its gradient."""
    found = []
    for rank, (name, label) in enumerate(UPDATE_FIELDS.items()):
        if first := result["updates"][name]["first"]:
            found.append(((first["epoch"], first["update"], rank), {"what": label} | first))
    for n, weights in result["weights"].items():
        if weights["differ"]:
            most = {"what": "weights", "epoch": n, "tensors": len(weights["differ"]), "of": weights["tensors"]}
            found.append(((n, math.inf, 0), most | {"most": weights["differ"][0]}))
    for rank, name in enumerate(EVAL_FIELDS):
        if first := result["evaluations"][name]["first"]:
            found.append(((first["epoch"], math.inf, 1 + rank), {"what": name} | first))
    return min(found, key=lambda pair: pair[0])[1] if found else None
