"""What traced runs say: checks of the instrument, and effects with their intervals, from the records of tracing.py.

    effect = mean(restored - corrupted) / mean(clean - corrupted)         margins in nats

is a ratio of means over rows (the mean of ratios is at the mercy of rows that hardly react), with a bootstrap interval over
rows (Efron 1979).

    check(group, records)          # raises CheckFailed where restoring everything, or nothing, does not do what it must
    found = summary(group, records)
    found["mean_ce"][layer][position], found["total_effect"], found["peak_layer"]
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.command import CheckFailed
from analysis.self_checks import TOLERANCE
from analysis.stats import bootstrap_mean, ratio_of_means
from analysis.tracing import Group

FLOOR = 0.5  # nats; a total effect whose interval reaches below is no effect to trace
NO_EFFECT = "no effect to trace"
STRONG = 0.3  # an effect that counts
MIN_ROWS = 10  # nothing is said of fewer
GATE = 0.01  # how far restoring all positions may be from 1, and restoring none from 0
EPSILON = 0.01  # nats; rows whose margin moves less do not react
ROUNDING = 1e-3  # an effect may lie outside [0, 1] by this much

# ---------------------------------------------------------------- gates


def check(group: Group, records: list[dict]) -> dict:
    """Restoring all positions at layer 0 must give the clean run (effect 1 ± 0.01), restoring none at any layer the corrupted
    one (effect 0 ± 0.01). Where a group does nothing, both are held to mean differences of 0.001 nats instead.

    Returns {"n", "allowed_nats", "away_nats"}, and as effects restore_all and restore_none. Raises CheckFailed.
    """
    if not records:
        return {"skipped": "no rows", "n": 0}
    clean, corrupted = (np.array([r[key] for r in records]) for key in ("clean", "corrupted"))
    back, none = np.array([r["all"][0] for r in records]), np.array([r["none"] for r in records])
    total = float((clean - corrupted).mean())
    allowed = max(GATE * abs(total), TOLERANCE)
    away = {
        "all positions restored at layer 0": float(np.abs(back - clean).mean()),
        "nothing restored": float(np.abs(none - corrupted[:, None]).mean(0).max()),
    }
    for what, nats in away.items():
        if not nats <= allowed:
            raise CheckFailed(f"{group.name}: {what}: {nats:.4g} nats away, {allowed:.4g} allowed (total effect {total:.4g})")
    found = {"n": len(records), "allowed_nats": allowed, "away_nats": dict(zip(("restore_all", "restore_none"), away.values()))}
    if abs(total) > TOLERANCE:
        found |= {"restore_all": float((back - corrupted).mean()) / total}
        found |= {"restore_none": float((none - corrupted[:, None]).mean(0).max()) / total}
    return found


# ---------------------------------------------------------------- effects


def total_effect(clean: Sequence[float], corrupted: Sequence[float]) -> dict:
    """{"value", "ci95", "n"}: mean of clean minus corrupted margin, in nats, with a bootstrap interval over rows."""
    if not len(clean):
        return {"value": None, "ci95": None, "n": 0}
    found = bootstrap_mean(np.asarray(clean, float) - np.asarray(corrupted, float))
    return {key: found[key] for key in ("value", "ci95", "n")}


def has_effect(total: dict) -> bool:
    """Whether the interval of a total effect lies above 0.5 nats."""
    return bool(total["ci95"]) and total["ci95"][0] > FLOOR


@dataclass
class Cells:
    """Effects by layer and position, with intervals, and each position's rows and total effect.

    None where fewer than 10 rows have the position, or these rows have no total effect to restore a share of.
    """

    value: list[list[float | None]]
    ci95: list[list[list[float] | None]]
    n: list[int]
    total: list[dict]

    @classmethod
    def of(cls, curves: list[list[list[float] | None]], clean: np.ndarray, corrupted: np.ndarray) -> "Cells":
        """`curves`: for each row and position the margin by layer, None where the row has no such position."""
        columns, totals, known = [], [], {}
        depth = max(len(curve) for row in curves for curve in row if curve is not None)
        for position in zip(*curves):
            rows = [i for i, curve in enumerate(position) if curve is not None]
            if tuple(rows) not in known:
                known[tuple(rows)] = total_effect(clean[rows], corrupted[rows])
            totals.append(known[tuple(rows)])
            columns.append([{"value": None, "ci95": None}] * depth)
            if len(rows) >= MIN_ROWS and has_effect(totals[-1]):
                layers, lower = np.array([position[i] for i in rows]).T, clean[rows] - corrupted[rows]
                columns[-1] = [ratio_of_means(restored - corrupted[rows], lower) for restored in layers]
        value, ci95 = ([[cell[key] for cell in layer] for layer in zip(*columns)] for key in ("value", "ci95"))
        return cls(value, ci95, [total["n"] for total in totals], totals)

    @property
    def filled(self) -> list[tuple[float, int, int]]:
        """Effect, layer and position of every cell that has one."""
        return [(x, i, p) for i, layer in enumerate(self.value) for p, x in enumerate(layer) if x is not None]

    @property
    def strong(self) -> float | None:
        """Share of the positions whose best layer has an effect above 0.3."""
        best: dict[int, float] = {}
        for value, _, position in self.filled:
            best[position] = max(value, best.get(position, value))
        return float(np.mean([x > STRONG for x in best.values()])) if best else None


RATIOS = """mean_ce ce_ci95 position_total_effect mean_ce_all ce_ci95_all mean_ce_from_end ce_ci95_from_end
position_counts_from_end peak_ce peak_ce_ci95 peak_layer peak_position peak_label ce_above_03_fraction
ce_above_03_fraction_from_end ce_in_range_fraction ce_ci_meets_range_fraction valid validity""".split()


def summary(group: Group, records: list[dict]) -> dict:
    """Everything that a group's records say, under the names of the result files.

    Where the interval of the total effect reaches below 0.5 nats, `effect` and all ratios are None, and `reason` says so. With
    fewer than 10 rows nothing is said, and there is no `effect` at all. `*_all`: all positions restored together, by layer.
    """
    clean, corrupted = (np.array([r[key] for r in records], dtype=float) for key in ("clean", "corrupted"))
    total = total_effect(clean, corrupted)
    about = {
        "n_traced": len(records),
        "total_effect": total,
        "mean_denominator": total["value"],
        "noise_std": group.noise_std,
        "max_positions": len(group.labels),
        "min_rows": MIN_ROWS,
        "position_labels": [f"{part} {i}" for part, i in group.labels],
        "position_counts": [sum(r["restored"][p] is not None for r in records) for p in range(len(group.labels))],
        "mean_positions_corrupted": float(np.mean([r["n_positions"] for r in records])) if records else None,
        "clean_gt_corrupt_fraction": float(np.mean(clean > corrupted)) if records else None,
        "epsilon_sensitivity_pct": 100 * float(np.mean(np.abs(clean - corrupted) < EPSILON)) if records else None,
        **dict.fromkeys(RATIOS),
        "parts": {name: _part(records, name) for name in group.names if len(group.names) > 1},
    }
    if len(records) < MIN_ROWS:
        return about | {"reason": f"{len(records)} rows traced, {MIN_ROWS} are needed"}
    if not has_effect(total):
        return about | {"effect": None, "reason": NO_EFFECT}
    cells = Cells.of([r["restored"] for r in records], clean, corrupted)
    together = Cells.of([[r["all"]] for r in records], clean, corrupted)
    if not cells.filled:
        return about | {"reason": f"no position of {MIN_ROWS} rows with an effect"}
    peak, layer, position = max(cells.filled, key=lambda cell: cell[0])
    in_range = float(np.mean([-ROUNDING <= x <= 1 + ROUNDING for x, *_ in cells.filled]))
    intervals = [ci95 for row in cells.ci95 for ci95 in row if ci95]
    meets = float(np.mean([low <= 1 and high >= 0 for low, high in intervals])) if intervals else None
    validity = {
        "clean above corrupted in > 80 % of rows": about["clean_gt_corrupt_fraction"] > 0.8,
        "effects in [0, 1] in > 95 % of cells": in_range > 0.95,
        "under 1 % of rows do not react": about["epsilon_sensitivity_pct"] < 1,
    }
    about |= {
        "effect": peak,
        "reason": None,
        "mean_ce": cells.value,
        "ce_ci95": cells.ci95,
        "position_total_effect": cells.total,
        "mean_ce_all": [layer[0] for layer in together.value],
        "ce_ci95_all": [layer[0] for layer in together.ci95],
        "peak_ce": peak,
        "peak_ce_ci95": cells.ci95[layer][position],
        "peak_layer": layer,
        "peak_position": position,
        "peak_label": about["position_labels"][position],
        "ce_above_03_fraction": cells.strong,
        "ce_in_range_fraction": in_range,
        "ce_ci_meets_range_fraction": meets,
        "valid": all(validity.values()),
        "validity": validity,
    }
    if len(group.names) > 1:  # bins of several parts mean the same in all rows, and have no common end
        return about
    end = Cells.of([_from_end(r["restored"]) for r in records], clean, corrupted)
    return about | {
        "mean_ce_from_end": end.value,
        "ce_ci95_from_end": end.ci95,
        "position_counts_from_end": end.n,
        "ce_above_03_fraction_from_end": end.strong,
    }


def _from_end(bins: list) -> list:
    """The bins of a row counted from its last one: those that are filled, in reverse."""
    filled = [curve for curve in bins if curve is not None][::-1]
    return filled + [None] * (len(bins) - len(filled))


def _part(records: list[dict], name: str) -> dict:
    """A part corrupted alone, and its states restored together where the whole group is corrupted, by layer."""
    rows = [r for r in records if name in r["parts"]]
    clean, corrupted = (np.array([r[key] for r in rows], dtype=float) for key in ("clean", "corrupted"))
    found = {"n": len(rows), "total_effect": total_effect(clean, [r["parts"][name]["corrupted"] for r in rows])}
    if len(rows) < MIN_ROWS or not has_effect(total_effect(clean, corrupted)):
        return found | {"mean_ce_all": None, "ce_ci95_all": None}
    cells = Cells.of([[r["parts"][name]["restored"]] for r in rows], clean, corrupted)
    return found | {"mean_ce_all": [x[0] for x in cells.value], "ce_ci95_all": [x[0] for x in cells.ci95]}
