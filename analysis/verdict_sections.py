"""The report's first sections: what the data give away, the verdict with all its conditions, gates and red flags.

    section = shortcuts(summary)                       # of gathered.gather
    section.title, [block.kind for block in section.blocks]

Every sentence with a number is made from the summary. Sections whose results are missing say which command makes them.
"""

from __future__ import annotations

from collections.abc import Iterator

from analysis import gathered
from analysis.blocks import (
    NOTHING,
    Branch,
    Callout,
    Cell,
    Items,
    Picture,
    Section,
    Table,
    Text,
    Tree,
    interval,
    not_measured,
    number,
    signed,
    texts,
    yes_no,
)
from analysis.drawing import rows_text, spread
from analysis.flags import leaves, verdict_flags

DEPTH_RULES = ("farther from the nearer of nodes 0 and 1", "farthest person is farther", "nearest person is farther")
STATUS_TONES = {"PASS": "good", "CLEAR": "good", "FAIL": "bad", "RAISED": "bad", "NOT YET": "open", "NOT APPLICABLE": "muted"}


# ---------------------------------------------------------------- 1: shortcuts


def shortcuts(summary: dict) -> Section:
    """How far rules get that never read who is asked, beside how far models get."""
    section = Section("shortcuts", "What the data give away")
    sets = gathered.sets_of(summary)
    if not sets:
        section.blocks = [not_measured("No set was evaluated yet.", gathered.make(summary, "ood"))]
        return section
    section.blocks.append(Text(_shortcut_text(sets), "lead"))
    models = gathered.models(summary, "ood")
    rows = []
    for name, one in sets.items():
        best = gathered.strongest_shortcut(one.get("shortcut_baselines") or {})
        depth = [one["shortcut_baselines"][rule] for rule in DEPTH_RULES if rule in (one.get("shortcut_baselines") or {})]
        rows.append(
            [
                Cell(name, "head"),
                f"{one['n']:,}",
                number(max(depth)) if depth else NOTHING,
                f"{number(best[1])} {best[0]}" if best else NOTHING,
                *(_mean_of(summary, name, model) for model in models),
            ]
        )
    section.blocks.append(
        Table(
            "Rules that do not read who is asked, and the models' two-choice accuracy (%)",
            ["set", "n", "deeper option", "best such rule", *models],
            rows,
            "Deeper option: the best of three readings of depth. Models: mean over seeds; intervals are in the tables below. A "
            "coin has 50.",
            words=(0, 3),
        )
    )
    rules = list(dict.fromkeys(rule for one in sets.values() for rule in one.get("shortcut_baselines") or {}))
    by_rule = [[Cell(rule, "head"), *(number(one["shortcut_baselines"].get(rule)) for one in sets.values())] for rule in rules]
    section.blocks.append(
        Table(
            "Every rule on every set (% right, ties count half)",
            ["rule", *sets],
            by_rule,
            "The rules that search back from an option do read who is asked: right person within k hops, else a guess.",
        )
    )
    return section


def _shortcut_text(sets: dict[str, dict]) -> str:
    """What the rules say of this study's test rows, and of the official ones."""
    official, test = texts()["shortcuts"]["official"], sets.get("test") or {}
    baselines = test.get("shortcut_baselines") or {}
    found = {rule: x for rule, x in baselines.items() if rule in DEPTH_RULES}
    if not found:
        return official
    rule, right = max(found.items(), key=lambda item: item[1])
    here = (
        f"On the {test['n']:,} test rows of this study the rule “{rule}” is right in {right:.1f} % without reading who is asked"
    )
    if right >= 75:
        published = gathered.anchors()["draw"]["coconut"]["m3"][0]
        return (
            f"{here}. The {published:.1f} % published for COCONUT are {published - right:.1f} points more than that. {official}"
        )
    best, most = gathered.strongest_shortcut(baselines)
    coin = ", a coin's share" if abs(right - 50) <= 5 else ""
    return f"{here}{coin}; the best of all rules that ignore the person (“{best}”) is right in {most:.1f} %. {official}"


def _mean_of(summary: dict, name: str, model: str) -> str:
    levels = [r["sets"][name]["two_choice"] for r in gathered.repeats(summary, "ood", model) if name in r.get("sets", {})]
    found = spread(levels)
    return NOTHING if found is None else number(found.mean)


# ---------------------------------------------------------------- 2: verdict


def verdict(summary: dict) -> Section:
    """Which rule of the decision matrix fired and why, every rule with its conditions, and the evidence in numbers."""
    section, found = Section("verdict", "Verdict"), summary["verdict"]
    rules = found["rules"]
    row = found["verdict"]
    title = f"Row {row}: {found['meaning']}" if row in rules else f"{row[0].upper()}{row[1:]}: {found['meaning']}"
    seeds = ", ".join(f"{model} {n}" for model, n in found["seeds"].items())
    other = "the same" if found["by_other_measure"] == row else f"{found['by_other_measure']}"
    alone = {True: "holds (m0 and m5 are the same within 3 points)", False: "does not hold", None: "undecided"}
    lines = [
        f"Seeds: {seeds}. Sets are compared by {found['measure'].replace('_', '-')} accuracy; by the other measure: {other}.",
        f"Curriculum alone (m0 and m5 the same in distribution): {alone[found['curriculum_alone']['holds']]}.",
        *found["remarks"],
    ]
    lines += [f"Next: {', '.join(found['next_steps'])}."] if found["next_steps"] else []
    section.blocks.append(Callout(title, lines, "good" if found["settled"] and row in rules else "open"))
    section.blocks.append(Text(texts()["verdict"]["rules"]))
    rows = [
        [Cell(name, "head"), rule["meaning"], yes_no(rule["condition"]["holds"], ("holds", "fails", "undecided"))]
        + [Cell("fires", "strong") if rule["fired"] else ""]
        for name, rule in rules.items()
    ]
    section.blocks.append(Table("The decision matrix", ["row", "meaning", "condition", ""], rows, words=(0, 1, 2, 3)))
    open_ones = [f"{c['name']}: {c['why'] or 'the 90 % interval admits both'}" for c in found["undecided"] or found["rests_on"]]
    if open_ones:
        heading = "Undecided, and in the way of a verdict" if found["undecided"] else "The verdict rests on open conditions"
        section.blocks.append(Items(open_ones, heading))
    section.blocks.append(Picture("9_evidence", "Inputs of the verdict", texts()["verdict"]["numbers"]))
    conditions = Section("conditions", "Every rule with its conditions")
    for name, rule in rules.items():
        conditions.blocks.append(Tree(f"Row {name}: {rule['meaning']}", list(_branches(rule["condition"]))))
    conditions.blocks.append(Tree("Curriculum alone", list(_branches(found["curriculum_alone"]))))
    section.sections = [conditions, _quantities(found)]
    return section


def _branches(condition: dict, depth: int = 0) -> Iterator[Branch]:
    """Everything below a rule."""
    for part in condition.get("parts", []):
        needs = f" ({part['needs']})" if "parts" in part else ""
        yield Branch(depth, part["holds"], f"{part['name']}{needs}", "" if "parts" in part else _numbers(part))
        yield from _branches(part, depth + 1)


def _numbers(leaf: dict) -> str:
    """A single condition's value, intervals, noise floor, seeds and rows, and what decided it."""
    is_difference, digits = "difference" in leaf, 1 if leaf["unit"] == "points" else 2
    value = leaf.get("difference", leaf.get("mean"))
    found = []
    if value is not None:
        found.append(
            f"{'D' if is_difference else 'mean'} {(signed if is_difference else number)(value, digits)} {leaf['unit']}"
        )
    for key, name in (("ci95", "95 %"), ("ci90", "90 %")):
        found += [f"{name} {interval(leaf[key], sign=is_difference, digits=digits)}"] if leaf.get(key) else []
    floor = (leaf.get("noise_floor") or {}).get("value")
    found += [] if floor is None else [f"floor {number(floor, digits)}"]
    found.append("seeds " + "/".join(str(leaf["n_seeds"].get(model, 0)) for model in leaf["models"]))
    counts = {v["n"] for v in leaf["values"].values() if v["n"] is not None}
    found += [rows_text(counts)] if counts else []
    why = "; ".join(filter(None, [leaf["why"], "the 90 % interval admits both" if leaf.get("open") else ""]))
    return ", ".join(found) + (f": {why}" if why else "")


def _quantities(found: dict) -> Section:
    """What the cells of the matrix were read from, by model and seed; further accuracies have their own section."""
    rules = [rule["condition"] for rule in found["rules"].values()]
    read = {leaf["quantity"] for rule in rules for leaf in leaves(rule)}
    quantities = {name: q for name, q in found["evidence"]["quantities"].items() if name in read or "/" not in name}
    models = [m for m in gathered.MODELS if any(m in q["values"] for q in quantities.values())]
    rows, gaps = [], []
    for name, quantity in quantities.items():
        cells, counts, digits = [], set(), 1 if quantity["unit"] == "points" else 2
        for model in models:
            values = quantity["values"].get(model, [])
            counts |= {v["n"] for v in values if v["n"] is not None}
            cells.append(" / ".join(number(v["value"], digits) for v in values) or NOTHING)
        if any(quantity["values"].values()):
            rows.append(
                [Cell(name, "head"), quantity["meaning"], quantity["unit"], rows_text(counts).removeprefix("n = "), *cells]
            )
        by_reason: dict[str, list[str]] = {}
        for gap in quantity["missing"]:
            by_reason.setdefault(gap["why"], []).append(gap["label"])
        gaps += [f"{name}: {', '.join(labels)}: {why}" for why, labels in by_reason.items()]
    blocks: list = (
        [Table("", ["quantity", "meaning", "unit", "rows n", *models], rows, "Seeds one by one.", (0, 1, 2))] if rows else []
    )
    if gaps:
        blocks.append(Items(gaps, "Quantities that are missing (the commands stand at the end)"))
    return Section("evidence", "Evidence by model and seed", blocks)


# ---------------------------------------------------------------- 3: gates


def gates(summary: dict) -> Section:
    """Every gate as last judged, with values and thresholds; red flags apart, with those that follow from the verdict."""
    section, records = Section("gates", "Gates and red flags"), summary["gates"]
    own = verdict_flags(summary["verdict"])
    flags = [record for record in records if str(record["gate"]).startswith("flag")]
    others = [record for record in records if record not in flags]
    flags = [flag for flag in flags if flag["gate"] not in {one["gate"] for one in own}] + own
    if reasons := gathered.reasons(records):
        section.blocks.append(Callout("Uncalibrated", [texts()["gates"]["uncalibrated"], *reasons], "open"))
    if others:
        section.blocks.append(_gate_table("Gates", "gate", others))
    else:
        command = f"python -m analysis.gates --gate all --logs {summary['folder']}/logs --out {summary['folder']}/gates.json"
        section.blocks.append(not_measured("No gate was judged yet.", command))
    section.blocks.append(_gate_table("Red flags", "flag", flags))
    return section


def _gate_table(title: str, first: str, records: list[dict]) -> Table:
    rows = []
    for record in records:
        tags = [tag for tag in ("blocking", "uncalibrated") if record.get(tag)]
        status = Cell(", ".join([record["status"], *tags]), STATUS_TONES.get(record["status"], ""))
        head = [Cell(str(record["gate"]).removeprefix("flag "), "head"), record.get("subject", ""), status]
        for i, check in enumerate(record["checks"] or [{}]):
            holds = {True: "ok", False: "fails", None: "not yet"}[check.get("ok")] if check.get("decisive", False) else ""
            n = NOTHING if check.get("n") is None else f"{check['n']:,}"
            cells = [check.get("name", ""), check.get("value", ""), check.get("rule", ""), n]
            tone = {"ok": "good", "fails": "bad", "not yet": "open"}.get(holds, "")
            rows.append([*(head if i == 0 else ["", "", ""]), *cells, Cell(holds, tone)])
        notes = [*record.get("notes", []), *([f"accepted: {record['accepted']}"] if record.get("accepted") else [])]
        rows += [["", "", "", Cell(note, "muted"), "", "", "", ""] for note in notes]
    columns = [first, "of", "status", "check", "value", "threshold", "n", "holds"]
    return Table(title, columns, rows, words=(0, 1, 2, 3, 4, 5, 7))
