"""Results as Markdown: every value (a median) with its interval, its target, and whether it is met.

    print(as_markdown(about, results, "cpu"))

The targets of a CPU are met or missed on a CPU only, those of a GPU on one H100-class GPU; a run of another kind has none.
"""

import operator
from pathlib import Path

from files import write_json, write_whole

# {where: {measure or (measure, start of shape): (comparison, limit in the unit of the result)}}
TARGETS: dict[str, dict] = {
    "cpu": {
        ("P1", "words 2x128"): ("<=", 1.1),
        ("P1", "4x256 V8000"): ("<=", 0.8),
        ("P1", "GPT-2 124M"): ("<=", 0.8),
        "P2": ("<=", 1.0),
        "P4": (">=", 40),
        "P4 evaluation": (">=", 40),
        "P6 padding": (">=", 95),
        ("P7", "tokens not cached"): ("<=", 20),
        ("P7", "tokens cached"): ("<=", 8),
        "scaling": (">=", 85),
        "saving": ("<=", 5),
        "MoD": ("<=", 1.0),
        "memory": ("<=", 1.15),
        "EMA": (">=", 5),
        "halting": (">=", 1.0),
        "noise sweep": (">=", 10),
        "branches": ("<=", 2),
    },
    "gpu": {
        "P1": ("<=", 1.0),
        "P2": ("<=", 1.0),
        "P3": ("<=", 4),
        "P4": (">=", 100),
        "P4 evaluation": (">=", 100),
        "P5": ("<=", 15),
        "P5 whole run": ("<=", 15),
        "P6 MFU": (">=", 30),
        "P6 padding": (">=", 95),
        "P7": ("<=", 10),
        ("evaluation", "16 new tokens"): ("<=", 2),
    },
}
COMPARE = {"<=": operator.le, ">=": operator.ge}
DECIMALS = {"": 3, "s": 2, "ms": 1, "min": 1, "GB": 2, "%": 1, "TFLOP/s": 0, "GB/s": 0}


def target(result: dict, where: str) -> tuple[str, float] | None:
    """The comparison and limit for a result; None where it has none."""
    for key, wanted in TARGETS.get(where, {}).items():
        measure, shape = key if isinstance(key, tuple) else (key, "")
        if result["measure"] == measure and result["shape"].startswith(shape):
            return wanted
    return None


def verdict(result: dict, where: str) -> str:
    """ "met", "missed", "tie" where the 95 % interval of the median holds the target, or nothing where there is none."""
    wanted = target(result, where)
    if wanted is None:
        return ""
    meets = COMPARE[wanted[0]]
    if meets(result["value"], wanted[1]):
        return "met"
    return "tie" if any(meets(end, wanted[1]) for end in result.get("ci95", ())) else "missed"


def number(value: float, unit: str) -> str:
    text = f"{value:,.{DECIMALS[unit]}f}"
    return f"{text} {unit}" if unit else text


def as_table(results: list[dict], where: str) -> list[str]:
    """The lines of a Markdown table."""
    lines = ["| measure | of | B | value | 95 % interval | target | | |", "|---|---|---|---|---|---|---|---|"]
    for r in results:
        unit, wanted = r["unit"], target(r, where)
        low, high = r.get("ci95", (r.get("min"), r.get("max")))
        extremes = f"{number(low, unit)} .. {number(high, unit)}, {r['rounds']} rounds" if "min" in r else ""
        limit = "" if wanted is None else f"{wanted[0]} {wanted[1]:g}" + f" {unit}" * bool(unit)
        notes = [f"least possible {r['floor']:.2f}" if r.get("floor") else None, r.get("note")]
        said = "; ".join(note for note in notes if note)
        cells = [r["measure"], r["shape"], r.get("batch_size", ""), number(r["value"], unit), extremes, limit]
        lines.append(f"| {' | '.join(map(str, [*cells, verdict(r, where), said]))} |")
    return lines


def phase_table(results: list[dict]) -> list[str]:
    """Where an update's time goes, of every result that knows its phases: the median milliseconds of each."""
    split = [r for r in results if r.get("phases")]
    if not split:
        return []
    names = list(dict.fromkeys(name for r in split for name in r["phases"]))
    lines = [f"| ms per update | {' | '.join(names)} | together |", "|---" * (len(names) + 2) + "|"]
    for r in split:
        values = [f"{r['phases'][name]['median_ms']:.1f}" if name in r["phases"] else "" for name in names]
        lines.append(f"| {r['shape']} | {' | '.join(values)} | {r['value']:.1f} |")
    return lines


def as_markdown(about: dict[str, str], results: list[dict], where: str) -> str:
    """What was measured where, and both tables."""
    judged = [verdict(r, where) for r in results]
    kinds = [f"{judged.count(kind)} {kind}" for kind in ("met", "tie", "missed") if judged.count(kind)]
    counts = f"targets: {', '.join(kinds)}" if kinds else "no targets apply"
    phases = phase_table(results)
    lines = [*(f"- {key}: {value}" for key, value in about.items()), f"- {counts}", "", *as_table(results, where)]
    return "\n".join([*lines, *(["", *phases] if phases else []), ""])


def write(folder: Path, stem: str, about: dict[str, str], results: list[dict], where: str) -> None:
    """<stem>.json and <stem>.md in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{stem}.json", {"schema_version": 1, "where": where, "about": about, "results": results})
    write_whole(folder / f"{stem}.md", as_markdown(about, results, where))
