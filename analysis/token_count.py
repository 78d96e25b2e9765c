"""Accuracy by number of thoughts and of reasoning steps: do more steps need more thoughts?

    python -m analysis.token_count --checkpoint runs/quickstart/m3_coconut --output_dir results
    python -m analysis.token_count --study results/study-quickstart --models m3,m5

Counts go from none to all N that training ended with, and beyond to 2 N (marked `extrapolated`: no model has seen that);
`no_markers` has neither thoughts nor markers. Another count moves everything behind it to other positions, so there is a
control in which nothing moves: N slots, of which all but the first c hold the embedding of the marker that closes them.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as `python analysis/token_count.py`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np  # noqa: E402
import torch  # noqa: E402

from analysis.eval_sets import ID, check_set, no_room  # noqa: E402
from analysis.experiment import Experiment, Task  # noqa: E402
from analysis.interventions import NOWHERE, Patch  # noqa: E402
from analysis.ood import levels_of  # noqa: E402
from analysis.stats import bootstrap_mean  # noqa: E402
from analysis.subject import Problems, Prompts, Subject  # noqa: E402

MODELS = ("m3", "m4b", "m5")
BARE = "no_markers"
NEAR_BEST = 0.02  # how far below the best accuracy the plateau begins
KEPT = ("correct", "margin", "two_choice_correct", "generated_tokens")

# ---------------------------------------------------------------- what is measured


def counts_of(n_thoughts: int) -> list[int]:
    """0 .. N, then three more up to 2 N (of six thoughts: 8, 10, 12)."""
    beyond = {n_thoughts + -(-n_thoughts * k // 3) for k in (1, 2, 3)}
    return [*range(n_thoughts + 1), *sorted(beyond - {n_thoughts})]


def sets_of(task: Task) -> dict[str, Problems]:
    """The test set and, where the data folder has it, `id_matched`, both checked."""
    found = {name: task.sets[name] for name in ("test", ID) if name in task.sets}
    for problems in found.values():
        check_set(problems.path, problems.sha256)
    return found


def parts(task: Task) -> dict[str, int]:
    return {name: len(problems) for name, problems in sets_of(task).items()}


def prepare(task: Task) -> dict:
    """{"counts": those that fit the model's positions, "skipped": {count: why it does not}}. ValueError where N does not."""
    n, every = task.subject.n_thoughts, counts_of(task.subject.n_thoughts)
    reasons = {c: [r for p in sets_of(task).values() if (r := no_room(task.subject, p, c))] for c in every}
    skipped = {c: found[0] for c, found in reasons.items() if found}
    if n in skipped:
        raise ValueError(f"{task.data_dir}: {skipped[n]} with all {n} thoughts; evaluate on shorter questions")
    return {"counts": [c for c in every if c not in skipped], "skipped": skipped}


def measure(task: Task, ready: dict, part: str, numbers: list[int]) -> list[dict]:
    """For each row {"counts": {count or no_markers: scores}, "control": {count: scores}}."""
    subject, problems = task.subject, task.sets[part]
    conditions = {str(c): subject.prompts(problems, numbers, c) for c in ready["counts"]}
    conditions[BARE] = subject.prompts(problems, numbers, 0, markers=False)
    records = [{"counts": {}, "control": {}} for _ in numbers]
    answers = iter(subject.answers(joined(list(conditions.values()))))
    for name in conditions:
        for record in records:
            record["counts"][name] = _kept(next(answers))
    full, n = subject.prompts(problems, numbers), subject.n_thoughts
    answers = iter(subject.answers(full.times(n), control(subject, full)))
    for record in records:
        record["control"] = {str(c): _kept(next(answers)) for c in range(n)}
    return records


def _kept(record: dict) -> dict:
    return {key: record[key] for key in KEPT}


def joined(some: list[Prompts]) -> Prompts:
    """Lists of prompts as one list."""
    columns = ([x for prompts in some for x in getattr(prompts, name)] for name in ("tokens", "rows", "numbers"))
    return Prompts(*columns, some[0].latent_id)


def control(subject: Subject, prompts: Prompts) -> Patch:
    """An edit for `prompts.times(N)`: condition c leaves c thoughts as they are and closes the other slots with the marker.

    The thoughts left come first, so replaying and recomputing them are the same.
    """
    n = prompts.slots.shape[1]
    slots_PK = prompts.slots.repeat_interleave(n, 0)
    left_P = torch.arange(n).repeat(len(prompts))
    slots_PK[torch.arange(n) < left_P[:, None]] = NOWHERE
    marker_D = subject.model.embedding(torch.tensor(subject.ids.end, device=subject.model.embedding.weight.device)).detach()
    return Patch(0, slots_PK, marker_D.expand(*slots_PK.shape, -1))


# ---------------------------------------------------------------- results


def summarize(task: Task, ready: dict, records: list[dict]) -> dict:
    n = task.subject.n_thoughts
    sets = {}
    for name, problems in sets_of(task).items():
        of_set = [r for r in records if r["part"] == name]
        sets[name] = set_result(of_set, problems.hops, n)
    return {
        "counts": ready["counts"],
        "extrapolated": [c for c in ready["counts"] if c > n],
        "skipped": {str(c): reason for c, reason in ready["skipped"].items()},
        "control_marker": task.subject.tokenizer.convert_ids_to_tokens(task.subject.ids.end),
        **sets["test"],
        "sets": sets,
    }


def set_result(records: list[dict], hops: np.ndarray, n_thoughts: int) -> dict:
    """Of one set: `matrix` and `control` {hops: {count: levels}}, `plateau_at` and `plateau_at_two_choice` {hops: count}, and
    `loss_with_fewer_than_hops`. Beside each number of hops there is `all`."""
    groups = {str(h): np.flatnonzero(hops == h) for h in sorted(set(hops.tolist()))} | {"all": np.arange(len(hops))}
    result = {
        key: {h: {c: levels_of([records[i][kind][c] for i in where]) for c in records[0][kind]} for h, where in groups.items()}
        for key, kind in (("matrix", "counts"), ("control", "control"))
    }
    for key, level in (("plateau_at", "exact_match"), ("plateau_at_two_choice", "two_choice")):
        result[key] = {h: plateau({c: cell[level] for c, cell in cells.items()}) for h, cells in result["matrix"].items()}
    fewer = {key: fewer_than_hops(records, hops, n_thoughts, key) for key in ("correct", "two_choice_correct")}
    return result | {"loss_with_fewer_than_hops": {"exact_match": fewer["correct"], "two_choice": fewer["two_choice_correct"]}}


def plateau(levels: dict[str, dict]) -> int | None:
    """The smallest number of thoughts whose accuracy is within NEAR_BEST of the best number's."""
    known = {int(c): level["accuracy"] for c, level in levels.items() if c != BARE and level["accuracy"] is not None}
    best = max(known.values(), default=None)
    return min((c for c, x in known.items() if x >= best - NEAR_BEST - 1e-12), default=None)


def fewer_than_hops(records: list[dict], hops: np.ndarray, n_thoughts: int, key: str) -> dict:
    """Accuracy with all thoughts minus the mean over all numbers below the row's steps (and below N), and minus that with
    one thought fewer than steps: {"value", "ci95", "n", ...} each, fractions, rows resampled."""
    found = {"mean": [], "one_fewer": []}
    for record, h in zip(records, hops.tolist()):
        most = min(h, n_thoughts)
        values = [record["counts"][str(c)][key] for c in (*range(most), n_thoughts) if str(c) in record["counts"]]
        if len(values) == most + 1 and most and None not in values:
            found["mean"].append(values[-1] - np.mean(values[:-1]))
            found["one_fewer"].append(float(values[-1]) - float(values[-2]))
    return {name: bootstrap_mean(x) if x else {"value": None, "n": 0} for name, x in found.items()}


EXPERIMENT = Experiment("token_count", MODELS, prepare, measure, summarize, __doc__, parts=parts, chunk=50)

if __name__ == "__main__":
    sys.exit(EXPERIMENT.main())
