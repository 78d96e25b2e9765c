"""The report's last sections: self-checks of the checkpoints, published numbers, provenance, and what is missing.

section = provenance(summary)                      # of gathered.gather
section.title, [block.kind for block in section.blocks]
"""

from __future__ import annotations

from analysis import gathered
from analysis.blocks import NOTHING, Callout, Cell, Commands, Items, Section, Table, Text, not_measured, texts


def checks(summary: dict) -> Section:
    """What every checkpoint passed before it was measured, and what a check stopped."""
    section, found = Section("checks", "Self-checks of every checkpoint"), summary["self_checks"]
    section.blocks.append(Text(texts()["checks"]["what"]))
    if summary["failed"]:
        lines = [f"{one['experiment']} of {one['label']}: {one['reason']}" for one in summary["failed"]]
        section.blocks.append(Callout("Stopped by a check, no result", lines, "bad"))
    names = list(dict.fromkeys(name for checked in found.values() for name in checked))
    rows = [[Cell(label, "head"), *(_check_cell(checked.get(name)) for name in names)] for label, checked in found.items()]
    if rows:
        columns = ["checkpoint", *(name.replace("_", " ") for name in names)]
        section.blocks.append(Table("", columns, rows, words=range(len(columns))))
    else:
        section.blocks.append(
            not_measured("No checkpoint was checked yet.", f"python -m analysis.measure --study {summary['folder']}")
        )
    return section


def _check_cell(check: dict | None) -> Cell:
    if check is None:
        return Cell(NOTHING, "muted")
    if check.get("skipped"):
        return Cell(f"not applicable: {check['skipped']}", "muted")
    told = (
        "answers_changed",
        "largest_margin_change",
        "largest_logit_change",
        "correct",
        "recorded",
        "clean_two_choice",
        "two_choice",
        "n",
    )
    numbers = ", ".join(f"{key.replace('_', ' ')} {check[key]:.3g}" for key in told if isinstance(check.get(key), int | float))
    note = f"; {check['note']}" if check.get("note") else ""
    return Cell(f"{'passed' if check['passed'] else 'FAILED'}: {numbers}{note}", "good" if check["passed"] else "bad")


def anchors(summary: dict) -> Section:
    """Published numbers, each table with its source."""
    section, held = Section("anchors", "Published numbers"), gathered.anchors()
    if summary["incomparable"]:
        lines = [f"{reason}." for reason in summary["incomparable"]]
        section.blocks.append(Callout("For reference only: not drawn beside this study's values", lines, "open"))
    else:
        section.blocks.append(
            Text("The figures show them as hollow marks beside this study's values, which come from the same recipe.")
        )
    for table in held["tables"]:
        source = held["sources"][table["source"]]
        rows = [[Cell(str(row[0]), "head"), *map(str, row[1:])] for row in table["rows"]]
        section.blocks.append(Table(table["title"], table["columns"], rows, table.get("note", "")))
        section.blocks.append(Text(f"Source: {source['name']}.", "note", source["url"]))
    return section


def provenance(summary: dict) -> Section:
    """Runs, checkpoints, data files, versions, commands, and what is missing."""
    section = Section("provenance", "Provenance")
    runs = {run["label"]: run for run in summary["study"].get("runs", [])}
    rows, files, commands, versions = [], set(), [], {}
    for name in gathered.EXPERIMENTS:
        for label in gathered.labels(summary, name):
            result = summary[name][label]
            if command := result.get("command"):
                commands.append(command)
            versions |= {" ".join(f"{k} {v}" for k, v in (result.get("versions") or {}).items()): None}
            for one in [
                result.get("data"),
                *(x.get("data") for x in (result.get("sets") or {}).values() if isinstance(x, dict)),
            ]:
                if one and one.get("file") and one.get("sha256"):
                    files.add((one["file"], one["sha256"]))
    for label in gathered.planned(summary):
        results = [summary[name][label] for name in gathered.EXPERIMENTS if label in summary[name]]
        point = next((r["checkpoint"] for r in results if r.get("checkpoint")), {})
        run, first = runs.get(label, {}), results[0] if results else {}
        cells = [
            run.get("config", NOTHING),
            str(run.get("seed", first.get("train_seed", NOTHING))),
            first.get("feedback_mode", NOTHING),
        ]
        cells += [point.get("file", NOTHING), str(point.get("epoch", NOTHING)), Cell(point.get("sha256", NOTHING), code=True)]
        rows.append([Cell(label, "head"), *cells])
    columns = ["run", "config", "seed", "feedback", "checkpoint", "epoch", "SHA-256"]
    section.blocks.append(Table(f"Runs and their {summary['epoch']} checkpoints", columns, rows, words=range(len(columns))))
    data = [[Cell(file, "head"), Cell(sha, code=True)] for file, sha in sorted(files)]
    section.blocks.append(Table("Data files", ["file", "SHA-256"], data, words=(0, 1)))
    section.blocks.append(Items(list(versions), "Versions"))
    section.blocks.append(Commands(list(dict.fromkeys(commands)), "Commands that measured"))
    section.sections = [missing(summary)]
    return section


def missing(summary: dict) -> Section:
    """What the study plans and lacks, with the command for each."""
    section, gaps = Section("missing", "What is missing"), summary["missing"]
    if not gaps:
        section.blocks = [Text("Nothing that the study plans.")]
        return section
    by_command: dict[str, list[str]] = {}
    for gap in gaps:
        by_command.setdefault(gap["experiment"], []).append(gap["label"])
    rows = [[Cell(name, "head"), ", ".join(labels)] for name, labels in by_command.items()]
    section.blocks.append(Table("", ["experiment", "missing of"], rows, words=(0, 1)))
    make = (gathered.make(summary, name, ",".join(labels)) for name, labels in by_command.items())
    section.blocks.append(Commands(list(make), "Commands"))
    return section
