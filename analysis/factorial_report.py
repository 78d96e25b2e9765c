"""A factorial study's result: what all scored runs say together, as JSON, as tables (terminal and Markdown), as a picture.

result = gathered(plan)                          # reads results/<name>/scores/*.json
write(result, plan.out)                          # factorial.json, factorial.md, factorial.svg and .png
print(text(result))
"""

from pathlib import Path

from analysis.drawing import INK, LOOKS, MUTED, Look, panel, save, sheet, styled
from analysis.factorial_plan import Member, Plan
from analysis.factorial_stats import BASELINE, CELLS, analyse, power_of_design, power_text
from analysis.stats import seed_interval
from analysis.tables import number, percent, table
from checkpoint import versions
from files import read_json, write_json, write_whole

SCHEMA_VERSION = 1
PRIMARY = {"answer_loss": "answer loss (nats a token)", "exact_match": "exact match"}
SECONDARY = ("loss", "perplexity", "answer_perplexity", "perplexity_per_tflop")
COSTS = ("parameters", "passes", "train_flops", "flops", "wall_seconds", "train_seconds", "samples_per_s", "tokens_per_s")
SHARES = ("routed_fraction", "memory_utilisation")
NOTES = {
    "pairs": "A seed fixes initial weights, problems, split, order of rows and dropout in all cells, so cells are compared "
    "within seeds. Welch's test, which forgets the pairs, stands beside it.",
    "seeds": "Seeds on one fixed data set understate uncertainty: they show the noise of training, not that of the sample. "
    "Here training, validation and test rows are drawn anew with each seed; but sequence and multiplication have few held-out "
    "problems, of which large test sets take all every time.",
    "outcomes": "Two primary outcomes, each tested at alpha; a claim should hold in both. Family 1 asks what ABC loses without "
    "one mechanism (Holm over 3); family 2, the contrasts, is exploratory (Holm over 7).",
    "contrasts": "Main effect: mean with the mechanism minus mean without. Interaction: how much larger the effect of one is "
    "with the other than without (averaged over the third); of three, how much larger that is with the third.",
    "selection": "Checkpoints are chosen on validation rows among the epochs of the last stage; test rows are scored once.",
    "flops": "Forward and backward over real tokens, a multiply-add as 2; routed layers by the tokens they took, memories by "
    "what they compare and read. Of training: what the run counted densely, times the share that its test rows really need.",
    "perplexity_per_tflop": "Perplexity on the last stage's tokens over the TFLOPs of training: it falls with compute that "
    "buys nothing, too, so read it beside both.",
    "memory": "Memory read: the share of value rows that the test rows read at least once.",
    "wall": "Wall s: the whole run, start-up of Python excluded, with as many runs side by side as `processes` says.",
    "references": "Lines in brackets are outside the design: no test uses them.",
}

# ---------------------------------------------------------------- gathering


def gathered(plan: Plan) -> dict:
    """All statistics of the scored runs. ValueError where none is, or where cells of one seed saw other rows."""
    found = {m: read_json(m.scores, "answer_loss", "data") for m in plan.everyone if m.scores.is_file()}
    if not found:
        raise ValueError(f"{plan.out / 'scores'} holds no scores yet; train first, without --analyse-only")
    for member in found:
        member.check()
    for seed in {m.seed for m in found}:
        _check_paired({m: scores for m, scores in found.items() if m.seed == seed})
    rows = {
        name: _row({m.seed: s for m, s in found.items() if m.cell == name}) for name in dict.fromkeys(m.cell for m in found)
    }
    cells = {name: rows[name] for name in CELLS if name in rows}
    references = {name: rows[name] for name in plan.study.references if name in rows}
    seeds = sorted({m.seed for m in found if m.cell in cells})
    planned = {m.seed for m in plan.everyone}
    return {
        "schema_version": SCHEMA_VERSION,
        "name": plan.name,
        "base": plan.study.base,
        "overrides": plan.study.overrides,
        "data": plan.data.model_dump(),
        "alpha": plan.study.alpha,
        "seeds": seeds,
        "power": power_of_design(len(planned), plan.study.alpha),
        "unfinished": [m.label for m in plan.everyone if m not in found],
        "cells": cells,
        "references": {name: {"about": plan.study.references[name].about} | row for name, row in references.items()},
        "outcomes": {
            outcome: analyse({name: row["by_seed"][outcome] for name, row in cells.items()}, plan.study.alpha)
            for outcome in PRIMARY
        },
        "notes": NOTES,
        "versions": versions(),
    }


def _check_paired(found: dict[Member, dict]) -> None:
    """ValueError where two runs of one seed had other data, or other targets."""
    (first, reference), *others = found.items()
    for member, scores in others:
        for what in ("data", "answer_sha256"):
            if scores[what] != reference[what]:
                raise ValueError(f"{member.label} and {first.label} differ in {what}; delete both run folders and train again")


def _row(scores: dict[int, dict]) -> dict:
    """{"n", "by_seed": {outcome: {seed: value}}, and of each outcome its mean and interval over seeds}."""
    seeds = sorted(scores)
    row = {"n": len(seeds), "by_seed": {}, "over_seeds": {}, "checkpoints": {s: scores[s]["checkpoint"] for s in seeds}}
    for key in (*PRIMARY, *SECONDARY, *COSTS, *SHARES):
        values = {seed: scores[seed][key] for seed in seeds}
        if None not in values.values():
            row["by_seed"][key], row["over_seeds"][key] = values, seed_interval(list(values.values()))
    routed = [scores[seed]["routed"] for seed in seeds if scores[seed]["routed"]]
    row["routed"] = {kind: sum(r[kind] for r in routed) / len(routed) for kind in routed[0]} if routed else None
    return row


# ---------------------------------------------------------------- telling


def text(result: dict) -> str:
    """The whole report: Markdown that reads well in a terminal."""
    alpha, n_test = result["alpha"], result["data"]["test_samples"]
    parts = [
        f"# {result['name']}: A (continuous thoughts) x B (Mixture of Depths) x C (memory)",
        power_text(result["power"]["n"], alpha),
        f"Seeds {', '.join(map(str, result['seeds']))}; {n_test} test problems each; "
        "intervals are 95 % over seeds (Student's t).",
    ]
    if result["unfinished"]:
        names = result["unfinished"]
        parts.append(f"**Unfinished, {len(names)}:** {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}.")
    parts += ["## Outcomes", table(*outcome_rows(result))]
    parts += ["## What was matched, and what it cost", table(*cost_rows(result))]
    for outcome, name in PRIMARY.items():
        found = result["outcomes"][outcome]
        percents = outcome == "exact_match"
        parts.append(f"## Tests: {name}" + (", differences in points" if percents else ""))
        for title, tests in (
            (f"Primary, alpha {alpha:g}", found["primary"]),
            ("Family 1: ABC against each removal (Holm over 3)", found["family_1"]),
            ("Family 2, exploratory: contrasts (Holm over 7)", found["family_2"]),
        ):
            if tests:
                parts += [f"{title}:", table(*test_rows(tests, percents))]
        futile = found["futility"]
        parts.append(f"Futility: {'stop' if futile['stop'] else 'go on'}; {futile['reason']}.")
        if found["missing"]:
            parts.append(f"Not computed, cells are missing: {', '.join(found['missing'])}.")
    parts += ["## How to read it", "\n".join(f"- {note}" for note in result["notes"].values())]
    about = [f"- {name}: {row['about']}" for name, row in result["references"].items() if row["about"]]
    return "\n\n".join(part.strip() for part in [*parts, *(["\n".join(about)] if about else [])]) + "\n"


def _lines(result: dict) -> dict[str, dict]:
    return result["cells"] | {f"({name})": row for name, row in result["references"].items()}


def outcome_rows(result: dict) -> tuple[list[str], list[list[str]]]:
    """Head and rows: a line a cell, references in brackets."""
    head = ["cell", "seeds", "answer loss", "interval", "exact match", "interval", "loss", "perplexity", "perplexity/TFLOP"]
    rows = []
    for name, row in _lines(result).items():
        loss, exact = (row["over_seeds"][key] for key in PRIMARY)
        others = [number(row["over_seeds"][key]["mean"]) for key in ("loss", "perplexity", "perplexity_per_tflop")]
        interval = interval_text(exact["ci95"], 100, ".1f")
        rows.append(
            [
                name,
                str(row["n"]),
                f"{loss['mean']:.4f}",
                interval_text(loss["ci95"], 1, ".4f"),
                percent(exact["mean"]),
                interval,
            ]
            + others
        )
    return head, rows


def cost_rows(result: dict) -> tuple[list[str], list[list[str]]]:
    """Head and rows: passes, size, work and time of every cell, means over seeds."""
    head = ["cell", "passes", "parameters", "train TFLOP", "wall s", "samples/s", "tokens/s", "routed", "question/thought/text"]
    rows = []
    for name, row in _lines(result).items():
        mean = {key: interval["mean"] for key, interval in row["over_seeds"].items()}
        kinds = row["routed"] and "/".join(f"{100 * row['routed'][kind]:.0f}" for kind in row["routed"])
        rows.append(
            [name, f"{mean['passes']:.3g}", f"{mean['parameters']:,.0f}", number(mean["train_flops"] / 1e12)]
            + [f"{mean['wall_seconds']:.0f}", number(mean["samples_per_s"]), number(mean["tokens_per_s"])]
            + [percent(mean.get("routed_fraction")), kinds or "–", percent(mean.get("memory_utilisation"))]
        )
    return [*head, "memory read"], rows


def test_rows(tests: dict[str, dict], percents: bool) -> tuple[list[str], list[list[str]]]:
    """Head and rows: the paired test, Welch's beside it where there are two cells, and Holm's verdict within a family."""
    head = ["test", "seeds", "difference", "95 % interval", "t (df)", "paired p", "d_z", "Welch t (df)", "Welch p"]
    family = any("p_holm" in test for test in tests.values())
    scale, form = (100, "+.1f") if percents else (1, "+.4f")
    rows = []
    for name, test in tests.items():
        welch = test.get("welch") or {}
        rows.append(
            [name, str(test["n"]), format(scale * test["difference"], form), interval_text(test["ci95"], scale, form)]
            + [_t(test), number(test["p_value"], 2), "–" if test["d_z"] is None else f"{test['d_z']:+.2f}"]
            + [_t(welch), number(welch.get("p_value"), 2), *([number(test.get("p_holm"), 2)] if family else [])]
            + [{None: "–", True: "yes", False: "no"}[test["rejected"]]]
        )
    return [*head, *(["Holm p"] if family else []), "rejected"], rows


def _t(test: dict) -> str:
    return "–" if test.get("t") is None else f"{test['t']:+.2f} ({test['df']:.3g})"


def interval_text(interval: list[float] | None, scale: float, form: str) -> str:
    return "–" if interval is None else " .. ".join(format(scale * bound, form) for bound in interval)


# ---------------------------------------------------------------- the picture


@styled
def draw(result: dict, path: Path) -> None:
    """Cells with their seeds and intervals, and each cell's paired difference from the baseline: `path`.svg and .png."""
    figure, panels = sheet(2, 2, height=3.1)
    cells = list(result["cells"])
    looks = dict(zip(CELLS, LOOKS.values()))
    n_seeds = len(result["seeds"])
    n = f"{n_seeds} seed{'s' if n_seeds > 1 else ''}, {result['data']['test_samples']} problems each; bars: 95 % interval"
    for column, (outcome, title) in enumerate(PRIMARY.items()):
        scale = 100 if outcome == "exact_match" else 1
        unit = "percent" if scale == 100 else "nats a token"
        for at, name in enumerate(cells):
            row = result["cells"][name]
            points(panels[0, column], at, row["over_seeds"][outcome], scale, looks[name])
        panel(panels[0, column], title.capitalize(), n, y=unit)
        against = result["outcomes"][outcome]["against_baseline"]
        for name in cells:
            test = against.get(f"{name} - {BASELINE}")
            if test:
                shown = {"mean": test["difference"], "ci95": test["ci95"], "values": test["differences"]}
                points(panels[1, column], cells.index(name), shown, scale, looks[name])
        panels[1, column].axhline(0, color=MUTED, lw=1, ls=":")
        panel(panels[1, column], "Paired difference from baseline", "a point is a seed", y=unit)
        for axes in panels[:, column]:
            axes.set_xticks(range(len(cells)), cells)
            axes.set_xlim(-0.6, len(cells) - 0.4)
    panels[0, 1].set_ylim(bottom=0)
    save(figure, path)


def points(axes, at: float, found: dict, scale: float, look: Look) -> None:
    """One cell: every seed a point, their mean a mark with its interval."""
    values = [scale * value for value in found["values"]]
    shift = [at - 0.22 + 0.05 * (i - (len(values) - 1) / 2) for i in range(len(values))]
    axes.plot(shift, values, ls="", marker="o", ms=3, color=INK, alpha=0.45)
    mean, bounds = scale * found["mean"], [scale * bound for bound in found["ci95"] or [found["mean"]] * 2]
    error = [[max(mean - bounds[0], 0.0)], [max(bounds[1] - mean, 0.0)]]
    axes.errorbar(at, mean, error, color=look.colour, marker=look.marker, ms=6, elinewidth=1.2, capsize=3)


def write(result: dict, out: Path) -> None:
    """factorial.json, factorial.md, factorial.svg and factorial.png, each whole."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "factorial.json", result)
    write_whole(out / "factorial.md", text(result))
    draw(result, out / "factorial")
