"""Numbers that finished experiments left as JSON, wherever they lie below the study's folders.

An experiment `ood` of model m3 is looked up, in this order, in `ood/m3_ood.json`, `ood/results.json` under "m3", and
`results_summary.json` under "ood", "m3". Repeat r > 0 has the label `m3-s1`.

    findings = Findings([Path("results")])
    findings.accuracy("m3", 0)         # Level(percent=97, n=500) on the test set, or None
    findings.sensitivity("m3", 0)      # {"replay": Level, "recompute": Level}, drops in points
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from analysis.runlog import read_json

TEST_NAMES = ("test", "prosqa_test", "official_test")
TEST_ROWS = 500


class Level(NamedTuple):
    """Percent (or a difference in points) and the number of rows behind it."""

    percent: Fraction
    n: int | None

    def __str__(self) -> str:
        return f"{float(self.percent):.2f}"


def level(value: object, n: int | None = None, whole: int = 1) -> Level | None:
    """Read `{correct, n, accuracy, ci95}` or a bare accuracy. A bare number is a share of `whole`."""
    if isinstance(value, dict):
        n = value.get("n", value.get("total", n))
        if value.get("correct") is not None and n:
            return Level(Fraction(100 * int(value["correct"]), int(n)), int(n))
        value = value.get("accuracy")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return Level(Fraction(str(value)) * 100 / whole, n)


def scale_of(value: object) -> int:
    """1 if a clean accuracy is written as a fraction, 100 if in percent."""
    number = value.get("accuracy") if isinstance(value, dict) else value
    return 100 if isinstance(number, int | float) and number > 1 else 1


class Findings:
    """Result files below `places`; missing ones read as None, never as zero."""

    def __init__(self, places: Iterable[Path]):
        self.places = [place for place in dict.fromkeys(places) if place.is_dir()]

    @cached_property
    def _files(self) -> list[Path]:
        names = ("results_summary.json", "results.json", "exp0_sanity_result.json")
        files = {path for place in self.places for path in place.rglob("*.json")}
        return sorted(path for path in files if path.name in names or path.name.endswith(f"_{path.parent.name}.json"))

    def record(self, experiment: str, model: str, repeat: int = 0) -> dict | None:
        """The result object of one model in one experiment."""
        label = model + (f"-s{repeat}" if repeat else "")
        for path in self._files:
            if path.parent.name == experiment and path.name == f"{label}_{experiment}.json":
                record = read_json(path)
                return record[label] if isinstance(record.get(label), dict) else record
        for path in self._files:
            if path.parent.name == experiment and path.name == "results.json":
                if isinstance(found := read_json(path).get(label), dict):
                    return found
        for path in self._files:
            if path.name == "results_summary.json":
                if isinstance(found := read_json(path).get(experiment, {}).get(label), dict):
                    return found
        return None

    def sets(self, model: str, repeat: int = 0) -> dict[str, dict]:
        """`{evaluation set: result object}` of the OOD experiment."""
        record = self.record("ood", model, repeat) or {}
        objects = {name: value for name, value in record.get("sets", record).items() if isinstance(value, dict)}
        return {name: value for name, value in objects.items() if "n" in value | _inner(value)}

    def accuracy(self, model: str, repeat: int = 0) -> Level | None:
        """Exact match on all 500 test rows: from the OOD experiment, else the clean run of the full corruption one."""
        sets = self.sets(model, repeat)
        for name in TEST_NAMES:
            if name in sets:
                return exact_match(sets[name])
        record = self.record("corruption", model, repeat) or {}
        clean = record.get("clean_accuracy")
        found = level(clean, record.get("total_samples"), scale_of(clean))
        return found if found and found.n == TEST_ROWS else None

    def sensitivity(self, model: str, repeat: int = 0) -> dict[str, Level]:
        """Clean accuracy minus accuracy with all slots replaced, in points, by chain (`replay`, `recompute`)."""
        record = self.record("corruption", model, repeat) or {}
        clean_value, n = record.get("clean_accuracy"), record.get("total_samples")
        whole = scale_of(clean_value)
        clean, drops = level(clean_value, n, whole), {}
        for chain, key in (("replay", "forward_corruption"), ("recompute", "forward_corruption_recompute")):
            levels = record.get(key)
            last = level(levels[-1], n, whole) if isinstance(levels, list) and levels else None
            if clean and last:
                drops[chain] = Level(clean.percent - last.percent, last.n)
        return drops

    def sanity(self) -> dict | None:
        """The causal sanity record that gate 5 reads."""
        return next((read_json(path) for path in self._files if path.name == "exp0_sanity_result.json"), None)


def _inner(value: dict) -> dict:
    return next((inner for inner in value.values() if isinstance(inner, dict) and "n" in inner), {})


def exact_match(result: dict) -> Level | None:
    """Exact-match accuracy in a set's result object: its own `correct` of `n`, or a nested accuracy."""
    return level(result, whole=scale_of(result)) or set_level(result, "accuracy", "exact_match")


def set_level(result: dict, *names: str) -> Level | None:
    """The first of the named accuracies that a set's result object holds."""
    for name in names:
        if found := level(result.get(name), result.get("n"), scale_of(result.get(name))):
            return found
    return None
