"""Levels of corruption: which slots each replaces, and accuracies and margins of measured rows at all of them.

levels(3)["forward"]                               # [(0,), (0, 1), (0, 1, 2)]
found = Levels(subject, records).curves("gaussian", "recompute")
found["forward_corruption_recompute"][1]           # {"correct", "n", "accuracy", "ci95", "slots": [0, 1]}
"""

import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from scipy.stats import t

from analysis.experiment import share
from analysis.stats import mcnemar
from analysis.subject import Subject

CHAINS = ("replay", "recompute")
FIELDS = {"forward": "forward_corruption", "reverse": "reverse_corruption", "single": "single_position"}
ABLATIONS = ("zero", "mean", "resample")  # at all levels, in replay
SCALES = ("norm_matched", "cross_scale")  # all slots, and single ones, in replay
NO_OPS = ("mean", "resample")  # in pause modes, where all thoughts are one vector


# ---------------------------------------------------------------- which slots, in which chain


def levels(n: int) -> dict[str, list[tuple[int, ...]]]:
    """The slots that each level replaces: {"forward": [(0,), (0, 1), ...], "reverse": ..., "single": ...}."""
    return {
        "forward": [tuple(range(k + 1)) for k in range(n)],
        "reverse": [tuple(range(n - 1 - k, n)) for k in range(n)],
        "single": [(k,) for k in range(n)],
    }


def run_key(kind: str, slots: Sequence[int], chain: str, n: int, recycles: bool) -> str:
    """The name of a run of n thoughts; runs that are one function have one name.

    Chains differ only where a kept slot stands behind a replaced one and thoughts read states (`recycles`). Where they
    don't, all thoughts are one vector, so that the mean or another row's puts back what is there.
    """
    if not recycles and kind in NO_OPS:
        return "control/replay"
    inherited = recycles and any(k not in slots for k in range(slots[0], n))
    return f"{kind}/{','.join(map(str, slots))}/{chain if inherited else 'replay'}"


def planned(subject: Subject, kinds: Sequence[str], abbreviated: bool) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """All runs of a row, each once: {key: (kind, slots, chain)}. Controls replace none: they give all clean, or nothing."""
    n = subject.n_thoughts
    by_family, everything = levels(n), tuple(range(n))
    most = [slots for family in by_family.values() for slots in family]
    wanted = [("gaussian", everything, chain) for chain in CHAINS]
    if not abbreviated:
        wanted += [("gaussian", slots, chain) for chain in CHAINS for slots in most]
        wanted += [(kind, slots, "replay") for kind in ABLATIONS for slots in most]
        wanted += [(kind, s, "replay") for kind in SCALES if kind in kinds for s in (everything, *by_family["single"])]
    controls = {f"control/{chain}": ("control", (), chain) for chain in CHAINS}
    return {run_key(*run, n, subject.recycles): run for run in wanted} | controls


# ---------------------------------------------------------------- what rows say at them


class Levels:
    """Accuracies and margins of a set of rows at the levels of corruption."""

    def __init__(self, subject: Subject, rows: list[dict]):
        self.subject, self.rows, self.n = subject, rows, subject.n_thoughts
        self.everything = tuple(range(self.n))

    def only(self, wanted: Callable[[dict], bool]) -> "Levels":
        return Levels(self.subject, [row for row in self.rows if wanted(row)])

    def runs(self, kind: str, slots: tuple[int, ...], chain: str = "replay") -> list[dict] | None:
        """The run of every row; None if it was not measured."""
        key = run_key(kind, slots, chain, self.n, self.subject.recycles)
        return [row["runs"][key] for row in self.rows] if key in self.rows[0]["runs"] else None

    def level(self, kind: str, slots: tuple[int, ...], chain: str = "replay") -> dict | None:
        """{"correct", "n", "accuracy", "ci95", "slots"}."""
        runs = self.runs(kind, slots, chain)
        return runs and share(run["correct"] for run in runs) | {"slots": list(slots)}

    def margin(self, kind: str, slots: tuple[int, ...], chain: str = "replay") -> dict | None:
        """Mean margin in nats with interval, mean `change` against the clean run, and two-choice accuracy."""
        runs = self.runs(kind, slots, chain)
        if runs is None:
            return None
        both = [(run["margin"], row["clean"]["margin"]) for run, row in zip(runs, self.rows) if run["margin"] is not None]
        two_choice = share(after > 0 for after, _ in both)
        return mean([a for a, _ in both]) | {"change": mean([a - b for a, b in both]), "two_choice": two_choice}

    def curves(self, kind: str, chain: str = "replay") -> dict:
        """forward_corruption, reverse_corruption and single_position, a level for each k."""
        end = "_recompute" if chain == "recompute" else ""
        by_family = levels(self.n).items()
        return {FIELDS[family] + end: [self.level(kind, s, chain) for s in slots] for family, slots in by_family}

    def margins(self, kind: str, chain: str = "replay") -> dict:
        """margin_forward, margin_reverse and margin_single, likewise."""
        end = "_recompute" if chain == "recompute" else ""
        by_family = levels(self.n).items()
        return {f"margin_{family}{end}": [self.margin(kind, s, chain) for s in slots] for family, slots in by_family}

    def all_and_single(self, kind: str) -> dict:
        single = levels(self.n)["single"]
        return {
            "all_slots": self.level(kind, self.everything),
            "single_position": [self.level(kind, s) for s in single],
            "margin_all_slots": self.margin(kind, self.everything),
            "margin_single": [self.margin(kind, s) for s in single],
        }

    def accuracies(self) -> dict:
        """Clean accuracy and the curves of the main replacement."""
        clean = share(r["clean"]["correct"] for r in self.rows)
        both = self.curves("gaussian") | self.curves("gaussian", "recompute")
        return {"n": len(self.rows), "clean_accuracy": clean, **both}

    def drop(self, slots: tuple[int, ...], chain: str) -> dict:
        """Clean minus corrupted accuracy over the same rows, with its paired interval: see `stats.mcnemar`."""
        return mcnemar([r["clean"]["correct"] for r in self.rows], [r["correct"] for r in self.runs("gaussian", slots, chain)])

    def mean_drop(self, family: str, chain: str) -> float | None:
        """Clean accuracy minus the mean accuracy over a family's levels, a fraction; None unless all were measured."""
        by_level = [self.runs("gaussian", slots, chain) for slots in levels(self.n)[family]]
        if None in by_level:
            return None
        clean = np.mean([row["clean"]["correct"] for row in self.rows])
        return float(clean - np.mean([[run["correct"] for run in runs] for runs in by_level]))


def mean(values: Sequence[float | None]) -> dict:
    """{"mean", "ci95", "n"} of the values that are there, with Student's t interval."""
    values = [value for value in values if value is not None]
    if len(values) < 2:
        return {"mean": values[0] if values else None, "ci95": None, "n": len(values)}
    middle, half = float(np.mean(values)), student(len(values)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return {"mean": middle, "ci95": [middle - half, middle + half], "n": len(values)}


@cache
def student(n: int) -> float:
    """The 97.5 % quantile of Student's t for n values."""
    return float(t.ppf(0.975, n - 1))


def sensitivities(of: Levels) -> dict:
    """The label of each chain, and the mean drops behind it; null where levels were not measured."""
    drops = {chain: {family: of.mean_drop(family, chain) for family in FIELDS} for chain in CHAINS}
    clean = float(np.mean([r["clean"]["correct"] for r in of.rows]))
    labels = [
        None if drops[chain]["forward"] is None else label(clean, drops[chain]["forward"], drops[chain]["reverse"])
        for chain in CHAINS
    ]
    return {"sensitivity": labels[0], "sensitivity_recompute": labels[1], "mean_drop": drops}


def label(clean: float, forward: float, reverse: float) -> str:
    """How a model takes corruption, from its clean accuracy and its mean drops over forward and reverse levels (fractions)."""
    if clean < 0.1:
        return "too_low"
    if forward < 0.05 and reverse < 0.05:
        return "low"
    if forward > reverse + 0.1:
        return "high_sequential"
    return "reverse_sensitive" if reverse > forward + 0.1 else "high_uniform"
