"""How sure the models are: log-probabilities of the right and the wrong species behind `### Name is a`, and paired tests.

    python -m analysis.confidence --checkpoint runs/quickstart/m3_coconut runs/quickstart/m5_pause --output_dir results
    python -m analysis.confidence --study results/study-quickstart --sets test,ood_dag

A species is scored whole, all its pieces and the full stop, so options may begin alike. Two models of one repeat are compared
row by row (pair by pair where rows come in pairs) by Wilcoxon's signed-rank test, one family a pair of models and measure:
its sets. results.json holds the comparisons under "verification"; `compare(folder)` makes them from the files alone.
"""

import json
import math
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as `python analysis/confidence.py`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np  # noqa: E402

from analysis.eval_sets import chosen_sets, sets_flag  # noqa: E402
from analysis.experiment import Experiment, Task, share  # noqa: E402
from analysis.stats import bonferroni, wilcoxon  # noqa: E402
from files import read_jsonl  # noqa: E402
from tokens import question_hash  # noqa: E402

MODELS = ("m0", "m3", "m4", "m4b", "m5")
COMPARISONS = (("m3", "m5"), ("m3", "m4b"), ("m5", "m4b"), ("m3", "m4"), ("m5", "m0"))  # primary, secondary, noise floor, ...
MEASURES = ("target_logp", "margin")
SCORES = ("target_logp", "wrong_logp", "margin", "name_logp", "two_choice_correct")
NEAR_ZERO = math.log(0.9)  # median log-probability of `Name is a`, below which the prefix is not what was trained

# ---------------------------------------------------------------- one model


def parts(task: Task) -> dict[str, int]:
    return {name: len(problems) for name, problems in chosen_sets(task).items()}


def prepare(task: Task) -> dict:
    """Nothing to calibrate."""
    return {}


def measure(task: Task, ready: dict, part: str, numbers: list[int]) -> list[dict]:
    """SCORES of each row (see `two_choice.score_options`), and what it can be found by in another model's records."""
    problems = task.sets[part]
    records = []
    for i, scores in zip(numbers, task.subject.scores(task.subject.prompts(problems, numbers))):
        row = problems.rows[i]
        pair = {"pair_id": row["pair_id"]} if "pair_id" in row else {}
        records.append({"question_hash": question_hash(row), **pair, **{key: scores[key] for key in SCORES}})
    return records


def summarize(task: Task, ready: dict, records: list[dict]) -> dict:
    by_set = {name: [r for r in records if r["part"] == name] for name in parts(task)}
    scored = {name: [r for r in some if r["margin"] is not None] for name, some in by_set.items()}
    lost = {name: len(by_set[name]) - len(scored[name]) for name in by_set}
    return {
        "n_excluded": {f"{name}: the options do not fit": n for name, n in lost.items() if n},
        "sets": {name: set_result(some) for name, some in scored.items() if some},
        "records": str(task.out / f"{task.subject.label}_confidence.jsonl"),
    }


def set_result(records: list[dict]) -> dict:
    """Of one set, medians and means over rows: the right species' log-probability (`_lp`, nats) and probability, the same of
    the wrong species, the margin, and the name, which must come by itself."""
    target, wrong, margin, name = (np.array([r[key] for r in records]) for key in SCORES[:4])
    lp, probability = _middle(target), _middle(np.exp(target))
    return {
        "n": len(records),
        "two_choice": share(r["two_choice_correct"] for r in records),
        "median_lp": lp["median"],
        "mean_lp": lp["mean"],
        "prob_median": probability["median"],
        "prob_mean": probability["mean"],
        "wrong_lp": _middle(wrong),
        "wrong_prob": _middle(np.exp(wrong)),
        "margin": _middle(margin),
        "name_lp": {**_middle(name), "least": float(name.min())},
        "name_near_0": bool(np.median(name) > NEAR_ZERO),
    }


def _middle(values: np.ndarray) -> dict:
    return {"median": float(np.median(values)), "mean": float(values.mean())}


# ---------------------------------------------------------------- two models


def compare(folder: Path) -> dict[str, dict]:
    """{"m3-m5": {set: {measure: test}}, "m3-m5-s1": ...} for all repeats of COMPARISONS that the folder holds finished.

    A test has the fields of `stats.wilcoxon` of first minus second (`direction` 1: the first model is surer), `higher` (its
    name), `p_bonferroni` over the sets of the comparison, `family_size`, `unit` (of which there are n: rows or pairs),
    `n_rows`, `n_excluded` (rows that only one of the models has), and of each model median, mean and the median's
    probability.
    """
    rows = finished_rows(folder)
    suffixes = sorted({"-" + label.partition("-")[2] if "-" in label else "" for label in rows})
    found = {}
    for suffix in suffixes:
        for first, second in COMPARISONS:
            if first + suffix in rows and second + suffix in rows:
                found[f"{first}-{second}{suffix}"] = compare_rows(first, rows[first + suffix], second, rows[second + suffix])
    return found


def finished_rows(folder: Path) -> dict[str, list[dict]]:
    """{label: records} of the models whose result and records in `folder` belong together."""
    found = {}
    for path in sorted(Path(folder).glob("*_confidence.json")):
        held = read_jsonl(path.with_suffix(".jsonl"))
        if held and held[0]["identity"] == json.loads(path.read_text())["identity"]:
            found[path.name.removesuffix("_confidence.json")] = held[1:]
    return found


def compare_rows(first: str, first_rows: list[dict], second: str, second_rows: list[dict]) -> dict[str, dict]:
    """{set: {measure: test}} of two models' records; see `compare`."""
    ours, theirs = (
        {(r["part"], r["idx"], r["question_hash"]): r for r in rows if r["margin"] is not None}
        for rows in (first_rows, second_rows)
    )
    both = [key for key in ours if key in theirs]
    sets = {}
    for name in dict.fromkeys(key[0] for key in both):
        keys = [key for key in both if key[0] == name]
        alone = sum(key[0] == name for key in ours.keys() ^ theirs.keys())
        about = {"unit": "pair" if "pair_id" in ours[keys[0]] else "row", "n_rows": len(keys), "n_excluded": alone}
        sets[name] = {
            measure: about | signed_rank(measure, first, [ours[key] for key in keys], second, [theirs[key] for key in keys])
            for measure in MEASURES
        }
    for measure in MEASURES:
        adjusted = bonferroni({name: found[measure]["p_value"] for name, found in sets.items()})
        for name, p in adjusted.items():
            sets[name][measure] |= {"p_bonferroni": p, "family_size": len(adjusted)}
    return sets


def signed_rank(measure: str, first: str, first_rows: list[dict], second: str, second_rows: list[dict]) -> dict:
    """One signed-rank test on the same rows of two models; members of a pair are not independent, so it takes their mean."""
    a, b = (np.array([r[measure] for r in rows]) for rows in (first_rows, second_rows))
    _, place = np.unique([r.get("pair_id", i) for i, r in enumerate(first_rows)], return_inverse=True)
    result = wilcoxon(*(np.bincount(place, x) / np.bincount(place) for x in (a, b)))
    result["higher"] = {1: first, -1: second, 0: None}[result["direction"]]
    unit = "lp" if measure == "target_logp" else measure
    for name, values in ((first, a), (second, b)):
        result |= {f"{name}_median_{unit}": float(np.median(values)), f"{name}_mean_{unit}": float(values.mean())}
        if unit == "lp":
            result[f"{name}_prob_median"] = float(np.exp(np.median(values)))
    return result


def verify(results: dict[str, dict]) -> dict:
    """Comparisons of all models so far, and for each whether its names came by themselves (else the prefix is wrong)."""
    folders = {Path(result["records"]).parent for result in results.values()}
    return {
        "names_near_0": {label: {k: x["name_near_0"] for k, x in r["sets"].items()} for label, r in results.items()},
        "comparisons": {key: found for folder in sorted(folders) for key, found in compare(folder).items()},
    }


EXPERIMENT = Experiment(
    "confidence", MODELS, prepare, measure, summarize, __doc__, parts=parts, arguments=sets_flag, verify=verify, chunk=500
)

if __name__ == "__main__":
    sys.exit(EXPERIMENT.main())
