"""Accuracy by forced number of thoughts: the scores of one training, the tables of a sweep, and its figure.

    scores = forced_counts(subject, problems, [0, 1, 2, 3])      # {"0": {"accuracy", "ci95", "gen_tokens", ...}, ...}
    write(gathered(plan), plan.out)                              # ablations.json, ablations.md, ablations.svg and .png

`gen_tokens` are thoughts and new tokens, without markers and EOS; a number of thoughts that training never reached is marked.
"""

from pathlib import Path
from typing import Any

from analysis.ablation_plan import Plan, Point
from analysis.drawing import MODELS, curve, empty, panel, rows_text, save, sheet, spread, styled
from analysis.eval_sets import no_room
from analysis.stats import wilson
from analysis.subject import Problems, Subject
from analysis.tables import table
from analysis.token_count import joined
from files import read_json, write_json, write_whole

SCHEMA_VERSION = 1
LEGEND = (
    "k: thoughts forced at test. Cells: exact match in %, its 95 % interval (Wilson), / tokens generated, thoughts included. "
    "*: more thoughts than at any time in training."
)

# ---------------------------------------------------------------- one training


def forced_counts(subject: Subject, problems: Problems, counts: list[int]) -> dict[str, dict]:
    """Greedy accuracy with each number of thoughts forced: {count: {"correct", "n", "accuracy", "ci95", "gen_tokens"}}.

    Numbers that exceed the model's positions are {"reason"} instead.
    """
    reasons = {k: no_room(subject, problems, k) for k in counts}
    fitting = [k for k in counts if not reasons[k]]
    records = subject.answers(joined([subject.prompts(problems, n_thoughts=k) for k in fitting])) if fitting else []
    found: dict[str, dict] = {}
    for k in counts:
        if reasons[k]:
            found[str(k)] = {"reason": reasons[k]}
            continue
        place = fitting.index(k) * len(problems)
        own = records[place : place + len(problems)]
        level = wilson(sum(record["correct"] for record in own), len(own))
        found[str(k)] = level | {"gen_tokens": sum(record["generated_tokens"] for record in own) / len(own)}
    return found


def score(point: Point, counts: list[int], num_samples: int | None) -> dict:
    """Measure a training's last checkpoint on its test file and write its scores.

    The number of thoughts that training ended with is always among the counts.
    """
    subject = Subject.load(point.folder)
    problems = Problems.read(point.test, subject.tokenizer, num_samples)
    counts = sorted({*counts, subject.n_thoughts})
    result = {
        "schema_version": SCHEMA_VERSION,
        "label": point.label,
        "sweep": point.sweep,
        "value": point.value,
        "seed": point.seed,
        "checkpoint": {"file": str(subject.path), "sha256": subject.sha256, "epoch": subject.epoch},
        "data": {"file": str(problems.path), "sha256": problems.sha256, "n": len(problems)},
        "n_thoughts": subject.n_thoughts,
        "asked": {"counts": counts, "num_samples": num_samples},
        "counts": forced_counts(subject, problems, counts),
    }
    point.scores.parent.mkdir(parents=True, exist_ok=True)
    write_json(point.scores, result)
    return result


def is_scored(point: Point, counts: list[int], num_samples: int | None) -> bool:
    """Whether scores are there, younger than the checkpoints, with these counts of so many rows."""
    if not point.scored():
        return False
    asked = read_json(point.scores, "asked")["asked"]
    return {*counts} <= {*asked["counts"]} and asked["num_samples"] == num_samples


# ---------------------------------------------------------------- all of them


def gathered(plan: Plan) -> dict:
    """What is scored so far, by sweep and value; a list of what is not."""
    sweeps: dict[str, dict] = {}
    unfinished = []
    for point in plan.points:
        about = plan.config.sweeps[point.sweep]
        held = sweeps.setdefault(point.sweep, {"key": about.key, "base": about.base, "test": about.test, "values": {}})
        if is_scored(point, plan.config.counts, plan.num_samples):
            held["values"].setdefault(str(point.value), []).append(read_json(point.scores))
        else:
            unfinished.append(point.label)
    return {"schema_version": SCHEMA_VERSION, "name": plan.name, "sweeps": sweeps, "unfinished": unfinished}


def text(result: dict) -> str:
    """A table for each sweep: a row a value (and seed), a column a number of thoughts."""
    parts = [f"# Ablations: {result['name']}", ""]
    for name, sweep in result["sweeps"].items():
        runs = [run for of_value in sweep["values"].values() for run in of_value]
        if not runs:
            continue
        counts = sorted({int(k) for run in runs for k in run["counts"]})
        head = [sweep["key"], "seed", "trained with", "n", *(f"k = {k}" for k in counts)]
        rows = [
            [str(run["value"]), str(run["seed"]), str(run["n_thoughts"]), str(run["data"]["n"])]
            + [_cell(run["counts"].get(str(k)), k > run["n_thoughts"]) for k in counts]
            for run in runs
        ]
        parts += [f"## {name}: {sweep['base']}, tested on {sweep['test']}", "", table(head, rows)]
    parts.append(LEGEND)
    if result["unfinished"]:
        parts += ["", f"Unfinished: {', '.join(result['unfinished'])}"]
    return "\n".join(parts) + "\n"


def _cell(level: dict | None, beyond: bool) -> str:
    if level is None or "reason" in level:
        return "–"
    low, high = (100 * bound for bound in level["ci95"])
    return f"{100 * level['accuracy']:.1f} ({low:.1f}, {high:.1f}) / {level['gen_tokens']:.1f}" + ("*" if beyond else "")


@styled
def figure(result: dict):
    """A column a sweep: accuracy, and below it generated tokens, by forced number of thoughts; a line a value."""
    shown = {name: sweep for name, sweep in result["sweeps"].items() if sweep["values"]}
    made, panels = sheet(2, max(len(shown), 1), height=3.1, width=5.4 * max(len(shown), 1))
    for column, sweep in enumerate(shown.values()):
        upper, lower = panels[:, column]
        for model, (value, runs) in zip(MODELS, sweep["values"].items()):
            x = sorted({int(k) for run in runs for k in run["counts"]})
            label = f"{sweep['key']} {value}"
            curve(upper, model, x, [spread(_levels(runs, k)) for k in x], label)
            curve(lower, model, x, [spread(_levels(runs, k, "gen_tokens"), 1) for k in x], label)
        n = rows_text((run["data"]["n"] for runs in sweep["values"].values() for run in runs), _seeds(sweep))
        panel(upper, f"Accuracy by {sweep['key']}", n, "", "exact match (%)", percent=True)
        panel(lower, "Tokens generated, thoughts included", n, "thoughts forced at test", "tokens")
        upper.legend(fontsize=7)
    if not shown:
        for axes in panels[:, 0]:
            empty(axes, "Ablations", "nothing is scored yet\nbash scripts/ablations.sh")
    return made


def _levels(runs: list[dict], k: int, key: str | None = None) -> list[Any]:
    found = [run["counts"].get(str(k)) for run in runs]
    found = [level for level in found if level and "reason" not in level]
    return [level if key is None else float(level[key]) for level in found]


def _seeds(sweep: dict) -> int:
    return max(map(len, sweep["values"].values()))


def write(result: dict, out: Path) -> None:
    """ablations.json, ablations.md, and the figure."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "ablations.json", result)
    write_whole(out / "ablations.md", text(result))
    save(figure(result), out / "ablations")
