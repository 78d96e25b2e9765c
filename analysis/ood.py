"""Every model on every evaluation set: greedy answers, two-choice margins, and what rules get that ignore the person asked.

    python -m analysis.ood --checkpoint runs/quickstart/m3_coconut --output_dir results
    python -m analysis.ood --study results/study-quickstart --models m3,m5 --sets test,ood_dag --token_counts 0,2,4

Sets are the test file and what `python data/ood.py` left beside it; all are checked before a model runs. Exact match reads
what a model says; the two-choice margin, which asks only which option is likelier, is the fair comparison of models that say
much with models that say little. LABEL_detailed_outputs.json shows every answer in full.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as `python analysis/ood.py`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np  # noqa: E402
from scipy.stats import bootstrap  # noqa: E402

from analysis.command import CheckFailed  # noqa: E402
from analysis.eval_sets import ID, blind, chosen_sets, no_room, sets_flag  # noqa: E402
from analysis.experiment import Experiment, Task, share  # noqa: E402
from analysis.stats import RESAMPLES, SEED  # noqa: E402
from data.ood_checks import FAIR  # noqa: E402
from data.prosqa_graph import sentence  # noqa: E402
from data.prosqa_rows import baselines  # noqa: E402
from dataset import clean_answer, extract_answer  # noqa: E402
from files import write_json  # noqa: E402

MODELS = ("m0", "m1", "m2", "m3", "m4", "m4b", "m5")
KINDS = ("target", "wrong_option", "third_entity", "no_hash")
PARSED = 0.95  # share of the answers that both readings must read alike
SHOWN = ("generated_tokens", "correct", "margin", "two_choice_correct", "kind")

# ---------------------------------------------------------------- rows


def kind_of(row: dict, output: str) -> str:
    """What a model's answer is (one of KINDS): the right sentence, the same about the wrong option, another one, or none."""
    said, symbols = extract_answer(output), row["idx_to_symbol"]
    if said is None:
        return "no_hash"
    if said == clean_answer(row["answer"]):
        return "target"
    wrong = sentence(symbols[row["root"]], symbols[row["neg_target"]])
    return "wrong_option" if said == clean_answer(wrong) else "third_entity"


def option_named(row: dict, output: str) -> str:
    """A second reading of an answer, to hold the first against: the one option that its words hold, whatever else it says."""
    if "#" not in output:
        return "no_hash"
    words, symbols = set(re.findall(r"\w+", output.rsplit("#", 1)[1])), row["idx_to_symbol"]
    options = {"target": symbols[row["target"]], "wrong_option": symbols[row["neg_target"]]}
    named = [kind for kind, option in options.items() if option in words]
    return named[0] if len(named) == 1 else "third_entity"


def writes_steps(output: str) -> bool:
    """Whether the text before the answer holds a sentence `X is a Y.`"""
    return bool(re.search(r"\w+ is a \w+\.", output.split("#")[0]))


def chosen_option(row: dict, record: dict) -> str:
    """The species that the margin is for."""
    return row["idx_to_symbol"][row["target" if record["two_choice_correct"] else "neg_target"]]


def wanted_counts(task: Task) -> dict[int, str | None]:
    """The numbers of thoughts of --token_counts other than all of them: {number: why it is skipped, or None}."""
    if not task.args.token_counts or not task.subject.n_thoughts:
        return {}
    try:
        counts = sorted({int(text) for text in task.args.token_counts.split(",")} - {task.subject.n_thoughts})
    except ValueError:
        raise ValueError(f"--token_counts {task.args.token_counts}: must be numbers of thoughts, like 0,2,4") from None
    if counts and counts[0] < 0:
        raise ValueError(f"--token_counts {counts[0]}: there are no fewer thoughts than 0")
    return {n: next(filter(None, (no_room(task.subject, p, n) for p in chosen_sets(task).values())), None) for n in counts}


def parts(task: Task) -> dict[str, int]:
    """A part for each set, and one more for each set and further number of thoughts: `test`, `test@2`."""
    sets = {name: len(problems) for name, problems in chosen_sets(task).items()}
    counts = [n for n, reason in wanted_counts(task).items() if reason is None]
    return sets | {f"{name}@{n}": size for n in counts for name, size in sets.items()}


def measure(task: Task, ready: dict, part: str, numbers: list[int]) -> list[dict]:
    """Records of `evaluate.evaluate`, with `kind`."""
    name, _, count = part.partition("@")
    problems = task.sets[name]
    prompts = task.subject.prompts(problems, numbers, int(count) if count else None)
    records = task.subject.answers(prompts)
    for i, record in zip(numbers, records):
        del record["idx"]  # the place among these prompts
        record["kind"] = kind_of(problems.rows[i], record["output"])
    return records


# ---------------------------------------------------------------- results


def summarize(task: Task, ready: dict, records: list[dict]) -> dict:
    """The fields of the result; writes all answers in full beside it."""
    by_part: dict[str, list[dict]] = {part: [] for part in parts(task)}
    for record in records:
        by_part[record["part"]].append(record)
    found = {name: by_part[name] for name in chosen_sets(task)}
    write_outputs(task, found)
    wrong = [r for r in records if r["n_latents"] != int(r["part"].partition("@")[2] or task.subject.n_thoughts)]
    if wrong:
        raise CheckFailed(
            f"{task.subject.path}: {wrong[0]['n_latents']} thoughts in row {wrong[0]['idx']} of {wrong[0]['part']}"
        )
    sets = {name: set_result(task, name, found) for name in found}
    counts = wanted_counts(task)
    for name, result in sets.items() if counts else ():
        levels = {n: by_part[f"{name}@{n}"] for n, reason in counts.items() if reason is None}
        levels = sorted((levels | {task.subject.n_thoughts: by_part[name]}).items())
        extrapolated = {n: n > task.subject.n_thoughts for n, _ in levels}
        result["by_token_count"] = {str(n): levels_of(x) | {"extrapolated": extrapolated[n]} for n, x in levels}
    both = [(kind_of(row, r["output"]), option_named(row, r["output"])) for row, r in asked(task, found)]
    unscored = Counter(name for name, some in found.items() for r in some if r["margin"] is None)
    return {
        "n_excluded": {f"{name}: the options do not fit, no two-choice score": n for name, n in unscored.items()},
        "sets": sets,
        "token_counts_skipped": {str(n): reason for n, reason in counts.items() if reason},
        "thought_token_count_correct": not wrong,
        "rows_with_steps": share(writes_steps(r["output"]) for some in found.values() for r in some),
        "parser_accuracy": share(a == b for a, b in both if b != "no_hash"),
    }


def asked(task: Task, found: dict[str, list[dict]]) -> list[tuple[dict, dict]]:
    """(problem, record) of all rows."""
    return [(task.sets[name].rows[r["idx"]], r) for name, some in found.items() for r in some]


def levels_of(records: list[dict]) -> dict:
    """Accuracies {"n", "exact_match", "two_choice", "margin"} of some rows; margin: mean in nats."""
    scored = [r for r in records if r["margin"] is not None]
    return {
        "n": len(records),
        "exact_match": share(r["correct"] for r in records),
        "two_choice": share(r["two_choice_correct"] for r in scored),
        "margin": float(np.mean([r["margin"] for r in scored])) if scored else None,
    }


def set_result(task: Task, name: str, found: dict[str, list[dict]]) -> dict:
    """All that one set says of a model."""
    problems, about, records = task.sets[name], task.about(name), found[name]
    hops, usual = problems.hops, set(task.sets["test"].hops.tolist())
    kinds = Counter(r["kind"] for r in records)
    result = levels_of(records) | {
        "kind": about.get("kind", "test"),
        "data": {"file": str(problems.path), "sha256": problems.sha256},
        "format_failure": share(r["kind"] == "no_hash" for r in records),
        "kinds": {kind: kinds[kind] for kind in KINDS},
        "generated_tokens": float(np.mean([r["generated_tokens"] for r in records])),
        "by_hops": {str(h): levels_of([records[i] for i in np.flatnonzero(hops == h)]) for h in sorted({*hops.tolist()})},
        "shortcut_baselines": baselines(problems.rows),
    }
    if result["kind"] == "swap" and not usual >= set(hops.tolist()):
        result["hops_of_test"] = levels_of([r for r, h in zip(records, hops.tolist()) if h in usual])
    if pairs := paired(task, name, found):
        result |= pairs_result(pairs)
    if ID in found and name != ID:
        result["difference_to_id_matched"] = {"measure": "two_choice", **to_id("two_choice_correct", task, name, found)}
        result["difference_to_id_matched_exact_match"] = {"measure": "exact_match", **to_id("correct", task, name, found)}
    return result


# ---------------------------------------------------------------- pairs

Answered = tuple[dict, dict]  # problem and record


def paired(task: Task, name: str, found: dict[str, list[dict]]) -> list[tuple[Answered, Answered]]:
    """Two questions on one graph with the options' roles exchanged: a set's own pairs, or its rows and the file's they ask
    again about the other person. Pairs of which a row was not measured or not scored are left out."""
    problems, records = task.sets[name], found[name]
    rows = [(row, r) for row, r in zip(problems.rows, records) if r["margin"] is not None]
    if "pair_id" in problems.rows[0]:
        by_pair: dict[int, list[Answered]] = {}
        for row, record in rows:
            by_pair.setdefault(row["pair_id"], []).append((row, record))
        return [tuple(pair) for pair in by_pair.values() if len(pair) == 2]
    official = task.about(name).get("parameters", {}).get("official")
    if "official_row" not in problems.rows[0] or official != task.problems.path.name or "test" not in found:
        return []
    test = {r["idx"]: (task.problems.rows[r["idx"]], r) for r in found["test"] if r["margin"] is not None}
    return [(test[row["official_row"]], (row, r)) for row, r in rows if row["official_row"] in test]


def pairs_result(pairs: list[tuple[Answered, Answered]]) -> dict:
    """Levels over pairs: both members right (a coin: 25 %), and the chosen option changed with the question (a coin: 50 %)."""
    return {
        "n_pairs": len(pairs),
        "both_right": share(a["two_choice_correct"] and b["two_choice_correct"] for (_, a), (_, b) in pairs),
        "both_right_exact_match": share(a["correct"] and b["correct"] for (_, a), (_, b) in pairs),
        "flipped": share(chosen_option(*first) != chosen_option(*second) for first, second in pairs),
    }


def to_id(key: str, task: Task, name: str, found: dict[str, list[dict]]) -> dict:
    """Accuracy on a set minus that on `id_matched`: two sets of rows, so both are resampled, whole pairs at a time."""
    return difference_of_means(*(units(key, task.sets[x].rows, found[x]) for x in (name, ID)))


def units(key: str, rows: Sequence[dict], records: list[dict]) -> np.ndarray:
    """The values of what is independent: of each row, or the mean of each pair; rows without a value are left out."""
    values: dict[int, list[float]] = {}
    for i, (row, record) in enumerate(zip(rows, records)):
        if record[key] is not None:
            values.setdefault(row.get("pair_id", i), []).append(float(record[key]))
    return np.array([np.mean(x) for x in values.values()])


def difference_of_means(first: np.ndarray, second: np.ndarray) -> dict:
    """{"value", "ci95", "n"} of mean(first) - mean(second), two independent samples: percentile bootstrap (Efron 1979)."""
    about = {"value": None, "ci95": None, "n": [len(first), len(second)]}
    if not (len(first) and len(second)):
        return about
    about["value"] = float(first.mean() - second.mean())
    if min(len(first), len(second)) < 2:
        return about

    def difference(a, b, axis):
        return a.mean(axis) - b.mean(axis)

    options = {"n_resamples": RESAMPLES, "batch": 500, "vectorized": True, "method": "percentile"}
    found = bootstrap((first, second), difference, rng=np.random.default_rng(SEED), **options)
    return about | {"ci95": [float(x) for x in found.confidence_interval]}


# ---------------------------------------------------------------- all models


def write_outputs(task: Task, found: dict[str, list[dict]]) -> None:
    """LABEL_detailed_outputs.json: every answer of a model, in full."""
    subject = task.subject
    sets = {
        name: [
            {
                "idx": r["idx"],
                "question": task.sets[name].rows[r["idx"]]["question"],
                "ground_truth": r["gold"],
                "predicted": r["prediction"],
                "full_text": r["output"],
                **{key: r[key] for key in SHOWN},
            }
            for r in records
        ]
        for name, records in found.items()
    }
    about = {"schema_version": 1, "experiment": "ood", "model": subject.label}
    about["checkpoint"] = {"file": str(subject.path), "sha256": subject.sha256, "epoch": subject.epoch}
    write_json(task.out / f"{subject.label}_detailed_outputs.json", about | {"sets": sets})


def verify(results: dict[str, dict]) -> dict:
    """Whether the numbers of all models mean what they seem to mean."""
    steps = [r["rows_with_steps"]["accuracy"] for r in results.values() if r["model_key"] == "m1"]
    parsed = {label: r["parser_accuracy"]["accuracy"] for label, r in results.items()}
    files: dict[str, set[str]] = {}
    strays: dict[str, dict[str, float]] = {}
    for result in results.values():
        for name, one in result["sets"].items():
            files.setdefault(name, set()).add(one["data"]["sha256"])
            outside = {rule: x for rule, x in blind(one["shortcut_baselines"]).items() if not FAIR[0] <= x <= FAIR[1]}
            strays |= {name: outside} if outside else {}
    checks = {
        "thought_token_count_correct": all(r["thought_token_count_correct"] for r in results.values()),
        "m1_generates_cot": all(x > 0.5 for x in steps) if steps else None,
        "parser_accuracy_above_95": all(x is None or x > PARSED for x in parsed.values()),
        "same_files": all(len(found) == 1 for found in files.values()),
    }
    passed = all(x is not False for x in checks.values())
    return {"passed": passed, **checks, "parser_accuracy": parsed, "shortcuts_outside_45_to_55": strays}


def arguments(parser: argparse.ArgumentParser) -> None:
    sets_flag(parser)
    parser.add_argument("--token_counts", help="measure with these numbers of thoughts as well, by comma (default: none)")


def prepare(task: Task) -> dict:
    """Nothing to calibrate."""
    return {}


EXPERIMENT = Experiment(
    "ood", MODELS, prepare, measure, summarize, __doc__, parts=parts, arguments=arguments, verify=verify, chunk=250
)

if __name__ == "__main__":
    sys.exit(EXPERIMENT.main())
