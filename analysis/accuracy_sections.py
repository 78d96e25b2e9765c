"""The report's sections of accuracies: one table a set over seeds, and models compared on all of them.

section = accuracies(summary)                      # of gathered.gather
[table.title for table in section.blocks[1:]]
"""

from __future__ import annotations

from analysis import gathered
from analysis.blocks import (
    NOTHING,
    Cell,
    Section,
    Table,
    Text,
    interval,
    not_measured,
    number,
    over_seeds,
    p_text,
    signed,
    texts,
    yes_no,
)
from analysis.drawing import rows_text, spread, title_of


def accuracies(summary: dict) -> Section:
    """One table a set over seeds, then the comparisons."""
    section, sets = Section("accuracy", "Accuracies"), gathered.sets_of(summary)
    if not sets:
        section.blocks = [not_measured("No set was evaluated yet.", gathered.make(summary, "ood"))]
        return section
    section.blocks.append(Text(texts()["accuracy"]["what"]))
    for name, one in sets.items():
        section.blocks.append(_set_table(summary, name, one))
    section.sections = [_comparisons(summary)]
    return section


def _set_table(summary: dict, name: str, one: dict) -> Table:
    pairs = any(r["sets"].get(name, {}).get("both_right") for r in _ood(summary))
    rows = []
    for model in gathered.models(summary, "ood"):
        found = [r["sets"][name] for r in gathered.repeats(summary, "ood", model) if name in r["sets"]]
        if not found:
            continue
        tokens = [x["generated_tokens"] for x in found if x.get("generated_tokens") is not None]
        measures = ("two_choice", "exact_match", "format_failure", *(("both_right", "flipped") if pairs else ()))
        cells = [over_seeds([x.get(measure) for x in found]) for measure in measures]
        n = rows_text([x["n"] for x in found]).removeprefix("n = ")
        rows.append(
            [
                Cell(title_of(model), "head"),
                str(len(found)),
                n,
                *cells,
                number(sum(tokens) / len(tokens)) if tokens else NOTHING,
            ]
        )
    columns = ["model", "seeds", "n", "two-choice %", "exact match %", "no answer %"]
    columns += (["both of a pair right %", "answer flips in a pair %"] if pairs else []) + ["tokens said"]
    note = f"A coin has both rows of a pair right in 25 %. {one['n_pairs']:,} pairs." if pairs and one.get("n_pairs") else ""
    return Table(f"{name} ({str(one.get('kind')).replace('_', ' ')})", columns, rows, note)


def _ood(summary: dict) -> list[dict]:
    return [summary["ood"][label] for label in gathered.labels(summary, "ood")]


def _comparisons(summary: dict) -> Section:
    section = Section("comparisons", "Comparisons")
    section.blocks.append(Text(texts()["accuracy"]["comparisons"]))
    for pair, found in summary["comparisons"].items():
        title = f"{pair.replace(' - ', ' − ')}: {found['meaning']}"
        sets = sorted(found["sets"].items(), key=lambda item: gathered.set_order(item[0], item[1]["kind"]))
        rows = [_seeds_row(name, one) for name, one in sets]
        columns = ["set", "seeds", "difference", "95 %", "p", "p Holm", "noise floor", "90 %", "margin", "same"]
        section.blocks.append(Table(title, columns, rows, words=(0, 9)))
        repeats = list(dict.fromkeys(repeat for _, one in sets for repeat in one["rows"]))
        if repeats:
            rows = [_rows_row(name, one["rows"], repeats) for name, one in sets]
            columns = ["row by row", "n", *(text for repeat in repeats for text in (f"repeat {repeat}", "p Bonferroni"))]
            section.blocks.append(Table("", columns, rows))
    if not summary["comparisons"]:
        section.blocks.append(not_measured("No two models have the same set yet.", gathered.make(summary, "ood")))
    return section


def _seeds_row(name: str, one: dict) -> list:
    """A set's comparison across seeds."""
    seeds = one["seeds"]
    floor = (seeds.get("noise_floor") or {}).get("value")
    above = floor is not None and abs(seeds["difference"]) > floor
    return [
        Cell(name, "head"),
        "/".join(map(str, seeds["n_seeds"].values())),
        Cell(signed(seeds["difference"]), "strong" if above else ""),
        interval(seeds["ci95"], sign=True),
        p_text(seeds["p_value"]),
        p_text(seeds["p_holm"]),
        number(floor),
        interval(seeds["ci90"], sign=True),
        f"±{one['margin']:g}",
        yes_no(seeds["equivalent"], ("yes", "no", NOTHING)),
    ]


def _rows_row(name: str, tests: dict[str, dict], repeats: list[str]) -> list:
    """A set's McNemar tests: right by the first alone / by the second alone."""
    cells = []
    for repeat in repeats:
        test = tests.get(repeat)
        cells += [f"{test['b']} / {test['c']}", p_text(test["p_bonferroni"])] if test else [NOTHING, NOTHING]
    return [Cell(name, "head"), rows_text([test["n"] for test in tests.values()]).removeprefix("n = "), *cells]


# ---------------------------------------------------------------- sets against each other


def differences(summary: dict) -> list[Table]:
    """Each set minus id_matched, which has rows of the same generator: what is new in the set, and not in its making."""
    names = [name for name in gathered.sets_of(summary) if name != "id_matched"]
    rows = []
    for model in gathered.models(summary, "ood"):
        sets = [r["sets"] for r in gathered.repeats(summary, "ood", model)]
        found = [[x[name].get("difference_to_id_matched") for x in sets if name in x] for name in names]
        spreads = [spread([one | {"accuracy": one["value"]} for one in some if one]) for some in found]
        cells = [NOTHING if c is None else f"{signed(c.mean)} ({signed(c.low)} .. {signed(c.high)})" for c in spreads]
        counts = [n for some in found for one in some if one for n in one["n"]]
        rows.append([Cell(model, "head"), str(len(sets)), rows_text(counts).removeprefix("n = "), *cells])
    rows = [row for row in rows if set(row[3:]) - {NOTHING}]
    note = "Two-choice accuracy in points: mean over seeds, of one seed with both sets resampled."
    title = "Each set minus id_matched: new rows of the same generator, as hard as training's"
    return [Table(title, ["model", "seeds", "n", *names], rows, note)]
