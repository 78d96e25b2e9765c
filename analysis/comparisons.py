"""Models compared on every evaluation set: row by row within a seed, and across seeds. No torch.

    found = compare_sets(collect(Path("results/study"), "final"))
    found["m3 - m5"]["sets"]["test"]["seeds"]          # Welch's test, equivalence, noise floor: the primary comparison
    found["m3 - m5"]["sets"]["test"]["rows"]["0"]      # exact McNemar test of the first repeats on the same rows

Accuracy is the two-choice one, which all models are asked alike. Rows that come in pairs (`swap_pairs`, `edge_pairs`) are not
independent: there a unit is a pair, right when both its rows are. A family of tests is one comparison over all its sets.
"""

from __future__ import annotations

import json
from pathlib import Path

from analysis import stats
from analysis.conditions import compare
from analysis.evidence import Evidence, parse_label

COMPARISONS = {  # first minus second, and what the comparison is for
    ("m3", "m5"): "primary",
    ("m3", "m4b"): "secondary",
    ("m5", "m4b"): "noise floor: one function, trained twice",
    ("m3", "m4"): "frozen pause",
    ("m5", "m0"): "extra positions",
    ("m1", "m3"): "chain of thought in text",
}
MARGINS = {"test": 3, "swap": 3}  # points, by kind of set; elsewhere:
MARGIN_ELSEWHERE = 5


def compare_sets(evidence: Evidence) -> dict[str, dict]:
    """{"m3 - m5": {"meaning", "sets": {name: {"kind", "margin", "seeds", "rows"}}}}: `seeds` in points, `rows` (by repeat) in
    fractions of the rows. Comparisons of which a model has no results are left out."""
    folder = evidence.folder / evidence.epoch / "ood"
    units = {label: read_units(folder / f"{label}_ood.jsonl", result) for label, result in evidence.results["ood"].items()}
    found = {}
    for (first, second), meaning in COMPARISONS.items():
        sets = {}
        for name, about in evidence.sets.items():
            margin = MARGINS.get("test" if name == "test" else about["kind"], MARGIN_ELSEWHERE)
            if seeds := across_seeds(evidence, name, first, second, margin):
                rows = by_rows(units, first, second, name)
                sets[name] = {"kind": about["kind"], "margin": margin, "seeds": seeds, "rows": rows}
        if sets:
            adjust(sets)
            found[f"{first} - {second}"] = {"meaning": meaning, "sets": sets}
    return found


def across_seeds(evidence: Evidence, name: str, first: str, second: str, margin: float) -> dict | None:
    """The numbers of `conditions.compare` and the equivalence test at ±margin; None where a model has no value."""
    numbers = compare(evidence, f"two_choice/{name}", first, second).numbers
    if "difference" not in numbers:
        return None
    a, b = ([v.value for v in evidence.quantity(f"two_choice/{name}").of(key)] for key in (first, second))
    same = stats.equivalence(a, b, margin)
    return numbers | {"equivalent": same["equivalent"], "equivalence_p": same["p_value"]}


def by_rows(units: dict[str, dict[str, dict[int, bool]]], first: str, second: str, name: str) -> dict[str, dict]:
    """{repeat: McNemar test} of the repeats that both models have, on the rows (or pairs) that both were asked."""
    found = {}
    for label, sets in sorted(units.items(), key=lambda item: parse_label(item[0])[1]):
        key, repeat = parse_label(label)
        other = second + (f"-s{repeat}" if repeat else "")
        if key != first or name not in sets or name not in units.get(other, {}):
            continue
        a, b = sets[name], units[other][name]
        both = sorted(a.keys() & b.keys())
        if both:
            found[str(repeat)] = stats.mcnemar([a[i] for i in both], [b[i] for i in both])
    return found


def adjust(sets: dict[str, dict]) -> None:
    """Adjusted p-values over the sets of one comparison: `p_holm` across seeds, `p_bonferroni` of the row tests of a repeat."""
    for name, p in stats.holm({name: one["seeds"]["p_value"] for name, one in sets.items()}).items():
        sets[name]["seeds"]["p_holm"] = p
    for repeat in sorted({repeat for one in sets.values() for repeat in one["rows"]}):
        family = {name: one["rows"][repeat]["p_value"] for name, one in sets.items() if repeat in one["rows"]}
        for name, p in stats.bonferroni(family).items():
            sets[name]["rows"][repeat]["p_bonferroni"] = p


def read_units(path: Path, result: dict) -> dict[str, dict[int, bool]]:
    """{set: {row or pair: right}} of one model's records; {} where they are not there."""
    found: dict[str, dict[int, bool]] = {}
    if not path.is_file():
        return found
    for line in path.read_text().split("\n")[1:]:
        if not line.endswith("}"):
            continue
        record = json.loads(line)
        name, right = record["part"], record.get("two_choice_correct")
        if name in result.get("sets", {}) and right is not None:
            found.setdefault(name, {})[record["idx"]] = bool(right)
    for name, rows in found.items():
        one = result["sets"][name]
        if one.get("n_pairs") and 2 * one["n_pairs"] <= one["n"]:
            found[name] = {i // 2: rows[i] and rows[i + 1] for i in rows if i % 2 == 0 and i + 1 in rows}
    return found
