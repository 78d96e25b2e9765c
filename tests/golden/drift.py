"""Recorded numbers against measured ones, and which library to suspect where they differ.

report("llama", record, measured)   # None, or one line: "llama: logits moved by 3.1e-02 (tolerance 1e-06) at continuous/1/0/3:
    # ...; changed since they were recorded: transformers 5.23.0 -> 5.24.0 (torch 2.13.0, ... unchanged)"

A record is {"made_with": versions, part: numbers, ...}, numbers being any nest of lists, dicts, numbers and strings.
"""

import json
import platform
import re
from importlib.metadata import version
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
LIBRARIES = ("torch", "transformers", "tokenizers", "numpy")
# Largest difference that rounding on another processor explains; parts that are not named here are compared exactly.
TOLERANCE = {"init": 1e-4, "logits": 1e-6, "logits_float32": 1e-4, "losses": 1e-4}
STRICTER = {("gpt2", "logits"): 1e-9}  # float64 throughout: the other families compute angles and norms in float32


def made_with() -> dict[str, str]:
    """What numbers made here and now depend on, besides this repository."""
    versions = {name: version(name) for name in LIBRARIES} | {"torch": torch.__version__, "python": platform.python_version()}
    return versions | {"machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"}


def read_record(name: str) -> dict | None:
    """The record of a family; None where there is none."""
    path = HERE / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def report(name: str, record: dict, measured: dict, now: dict[str, str] | None = None) -> str | None:
    """One line that says what moved and what may have moved it; None where every measured part is as recorded.

    `now`: the versions that `measured` was made with (default: those running).
    """
    found = [difference(part, record.get(part), value, tolerance_of(name, part)) for part, value in measured.items()]
    found = [text for text in found if text]
    return f"{name}: {'; '.join(found)}; {blame(name, record['made_with'], now or made_with())}" if found else None


def tolerance_of(name: str, part: str) -> float:
    return STRICTER.get((name, part), TOLERANCE.get(part, 0))


def difference(part: str, recorded, measured, tolerance: float = 0) -> str | None:
    """How far one part of the numbers is from its record, and where most; None where it is within the tolerance."""
    old, new = dict(_leaves(recorded)), dict(_leaves(measured))
    if old.keys() != new.keys():
        gone, come = sorted(old.keys() - new.keys()), sorted(new.keys() - old.keys())
        texts = [f"{len(keys)} {word} ({keys[0]} ..)" for keys, word in ((gone, "gone"), (come, "new")) if keys]
        return f"{part} has other entries: {', '.join(texts)}"
    distances = {key: _distance(old[key], new[key]) for key in old}
    outside = {key: distance for key, distance in distances.items() if not distance <= tolerance}  # also nan
    if not outside:
        return None
    worst = max(outside, key=lambda key: (outside[key] != outside[key], outside[key]))
    if tolerance == 0:
        where = next(iter(outside))
        return f"{part}: {len(outside)} of {len(old)} entries differ, first {where}: {old[where]} recorded, {new[where]} now"
    values = (f"{x:.6g}" if isinstance(x, float) else repr(x) for x in (old[worst], new[worst]))
    return "{} moved by {:.1e} (tolerance {:.0e}) at {}: {} recorded, {} now".format(
        part, outside[worst], tolerance, worst, *values
    )


def blame(name: str, before: dict[str, str], now: dict[str, str]) -> str:
    """Which library or what else may have moved numbers made with the versions `before`, and how to find out."""
    known = [key for key in now if key in before and key != "machine"]
    changed = [key for key in known if before[key] != now[key]]
    same = ", ".join(f"{key} {now[key]}" for key in known if key not in changed) or "nothing"
    machine = before.get("machine", "an unknown machine")
    anew = f"where the new numbers are right, record them: python tests/golden/make.py --only {name}"
    elsewhere = "" if machine == now["machine"] else f"; recorded on {machine}, this is {now['machine']}"
    if not changed:
        suspect = "this code changed them" if not elsewhere else "this code or the machine changed them"
        return f"no library changed since they were recorded ({same}): {suspect}{elsewhere}; {anew}"
    text = "changed since they were recorded: " + ", ".join(f"{key} {before[key]} -> {now[key]}" for key in changed)
    text += f" ({same} unchanged){elsewhere}"
    if len(changed) > 1:
        pairs = [f"--{key} {_plain(before[key])},{_plain(now[key])}" for key in ("torch", "transformers") if key in changed]
        finder = f"bash scripts/test_matrix.sh {' '.join(pairs)} tests/test_golden.py" if pairs else "go back one by one"
        text += f"; to find which: {finder}"
    return f"{text}; {anew}"


def _plain(release: str) -> str:
    """A version as an index knows it: without the build's tag (2.13.0+cpu)."""
    return release.split("+")[0]


def _leaves(value, path: str = ""):
    if isinstance(value, dict | list) and value:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(item, f"{path}/{key}" if path else str(key))
    else:
        yield path, value


def _distance(old, new) -> float:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (old, new))
    return abs(old - new) if numbers else float(old != new)


def as_text(record: dict) -> str:
    """A record as JSON, lists of numbers on one line."""
    text = json.dumps(record, indent=1)
    return (
        re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()).replace("[ ", "[").replace(" ]", "]"), text) + "\n"
    )
