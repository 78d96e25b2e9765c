"""Thoughts in the wrong place: their order changed within a row, or another row's put in their place.

Parts of the experiment `corruption` (python -m analysis.corruption), whose result holds their fields:

    permutation   up to 10 other orders of a row's own thoughts, and each pair of neighbours exchanged
    matched       thoughts of another row with as many steps; unmatched: of any other row
    swap_pairs    thoughts of the same facts and options with the other person asked: if thoughts carry the path, the answer
                  moves to the other option. Control: with the asked name's embeddings as well, the prompt is the other one

All slots are given (`replay`): no thought is computed from another's new neighbour. In pause modes every thought of every row
is one vector, so nothing can change: that is asserted, and the fields are marked `by_construction`.

Shape letters: R rows, S slots, K positions, D width.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from analysis.command import CheckFailed
from analysis.experiment import Task, share
from analysis.interventions import generator, permutations
from analysis.positions import Places
from analysis.slots import Run, aim_of, answer_runs, compared, margin_of, marked, require_no_op
from analysis.stats import bootstrap_mean
from analysis.subject import Problems, Subject
from data.ood_checks import check_swap_pair

ORDERS = 10  # random orders of a row's thoughts, if there are as many
PAIRS = 200  # donors and recipients of each kind
MATCHED, UNMATCHED, SWAP = "matched", "unmatched", "swap_pairs"
SWAP_COMMAND = "python data/ood.py --seed 0 (--preset quickstart for the data of scripts/quickstart.sh)"
SWAP_FIELDS = (
    "swap_follow_rate", "swap_control_follow_rate", "swap_name_only_follow_rate", "swap_transplant_clean_accuracy",
    "swap_transplant_accuracy", "swap_transplant_drop", "swap_margin_change", "swap_pairs_measured", "swap_control_equal",
)  # fmt: skip


# ---------------------------------------------------------------- permutation


def neighbours_exchanged(n: int) -> list[tuple[int, ...]]:
    """The orders of n that exchange 0 and 1, or 2 and 3, ..."""
    orders = []
    for i in range(0, n - 1, 2):
        order = list(range(n))
        order[i], order[i + 1] = i + 1, i
        orders.append(tuple(order))
    return orders


def random_orders(seed: int, row: int, n: int) -> list[tuple[int, ...]]:
    """Up to ORDERS different orders of a row's n thoughts, none of them its own."""
    return [tuple(order) for order in permutations(seed, row, n, ORDERS).tolist()]


def order_key(order: Sequence[int]) -> str:
    return f"permutation/{','.join(map(str, order))}"


def permutation_runs(seed: int, row: int, place: int, slots: list[int], thoughts_SD: Tensor) -> list[Run]:
    """All orders of one row; an order that is drawn and exchanges neighbours stands here once."""
    orders = dict.fromkeys([*random_orders(seed, row, len(slots)), *neighbours_exchanged(len(slots))])
    return [Run(place, order_key(order), slots, thoughts_SD[list(order)]) for order in orders]


def permutation_fields(subject: Subject, seed: int, records: list[dict]) -> dict:
    """Flips (answers that differ from the clean one) over rows' own runs; the mean rate has a bootstrap interval over rows."""
    n, partial = subject.n_thoughts, [order_key(order) for order in neighbours_exchanged(subject.n_thoughts)]
    by_row, partly, moved, everything = [], [], [], []
    for record in records:
        runs, clean = record["runs"], record["clean"]["margin"]
        drawn = [runs[order_key(order)] for order in random_orders(seed, record["idx"], n)]
        by_row.append([run["changed"] for run in drawn])
        partly += [runs[key]["changed"] for key in partial]
        moved += [abs(run["margin"] - clean) for run in drawn if clean is not None]
        everything += [(run, clean) for run in (*drawn, *(runs[key] for key in partial))]
    by_construction = require_no_op(subject, "permutation", everything)
    some = any(by_row)
    fields = {
        "permutation_flip_rate": share(any(flips) for flips in by_row) if some else share([]),  # rows with any flip
        "mean_permutation_flip_rate": bootstrap_mean([float(np.mean(flips)) for flips in by_row]) if some else None,
        "permutation_total_samples": sum(map(len, by_row)),
        "permutations_per_row": len(by_row[0]),
        "partial_permutation_flip_rate": share(partly),
        "partial_permutation_total_samples": len(partly),
        "mean_abs_margin_change": float(np.mean(moved)) if moved else None,
    }
    return marked(fields, by_construction)


# ---------------------------------------------------------------- matched and unmatched transplants


def drawn_pairs(seed: int, hops: np.ndarray, matched: bool, most: int = PAIRS) -> list[tuple[int, int]]:
    """Up to `most` random (donor, recipient) pairs of rows, no row twice; `matched`: both have equally many steps."""
    rng = generator(seed, int(matched), most)
    groups = [np.flatnonzero(hops == h) for h in np.unique(hops)] if matched else [np.arange(len(hops))]
    pairs = []
    for group in groups:
        order = rng.permutation(group)
        pairs += zip(order[0::2].tolist(), order[1::2].tolist())
    return [pairs[i] for i in rng.permutation(len(pairs))[:most]]


def measure_pairs(task: Task, thoughts_RSD: Tensor, pairs: list[tuple[int, int]]) -> list[dict]:
    """A record for each (donor, recipient) of the test set: the recipient's answer with the donor's thoughts."""
    subject, problems = task.subject, task.problems
    prompts = subject.prompts(problems, [target for _, target in pairs])
    runs = [Run(i, "transplant", prompts.slots[i].tolist(), thoughts_RSD[source]) for i, (source, _) in enumerate(pairs)]
    clean, records = subject.answers(prompts), answer_runs(subject, prompts, runs)
    return [
        {
            "source": source,
            "target": target,
            "source_hops": int(problems.hops[source]),
            "target_hops": int(problems.hops[target]),
            "clean_correct": before["correct"],
            "clean_margin": margin_of(before),
            **aim_of([after]),
            **compared(after, before),
            "margin_change": _change(after, before),
            "follows_donor": moves(after, before, problems.rows[source], problems.rows[target]),
        }
        for (source, target), before, after in zip(pairs, clean, records)
    ]


def _change(after: dict, before: dict) -> float | None:
    return None if before.get("margin") is None else round(after["margin"] - before["margin"], 6)


def species(answer: str | None) -> str | None:
    """What an answer calls the person: `lempus` of `Tom is a lempus.`"""
    words = (answer or "").rstrip(" .").split()
    return words[-1] if words else None


def moves(after: dict, before: dict, donor: dict, recipient: dict) -> bool:
    """Whether an answer names what is right for the donor's problem and wrong for the recipient's own, and did not before."""
    wanted, own = species(donor["answer"]), species(recipient["answer"])
    return wanted != own and species(after["prediction"]) == wanted != species(before["prediction"])


def transplant_fields(subject: Subject, records: list[dict]) -> dict:
    """Accuracy against the recipient's answer, matched and unmatched, and both by (donor's, recipient's) number of steps."""
    fields = {}
    for part, name in ((MATCHED, "cross_transplant"), (UNMATCHED, "unmatched_transplant")):
        some = [record for record in records if record["part"] == part]
        by_construction = require_no_op(subject, f"{part} transplant", [(r, r["clean_margin"]) for r in some])
        changes = [r["margin_change"] for r in some if r["margin_change"] is not None]
        found = {
            f"{name}_accuracy": share(r["correct"] for r in some),
            f"{name}_follow_rate": share(r["follows_donor"] for r in some),
            f"{name}_margin_change": bootstrap_mean(changes) if changes else None,
        }
        fields |= marked(found, by_construction)
        fields |= {f"{name}_clean_accuracy": share(r["clean_correct"] for r in some), f"{name}_pairs": len(some)}
    cells: dict[str, dict[str, list[bool]]] = {}
    for record in records:
        if record["part"] in (MATCHED, UNMATCHED):
            cells.setdefault(str(record["source_hops"]), {}).setdefault(str(record["target_hops"]), []).append(
                record["correct"]
            )
    fields["transplant_by_hops"] = {
        a: {b: share(cells[a][b]) for b in sorted(cells[a], key=int)} for a in sorted(cells, key=int)
    }
    return fields


# ---------------------------------------------------------------- swap transplant


def partners(problems: Problems) -> dict[int, int]:
    """{row: the row of the same pair}; rows whose partner lies beyond the rows read are not in it.

    Raises ValueError where rows name no pair, or a pair is no swap pair.
    """
    members: dict[int, list[int]] = {}
    for i, row in enumerate(problems.rows):
        if "pair_id" not in row:
            raise ValueError(f"{problems.path}, row {i}: no pair_id; make the file again with: {SWAP_COMMAND}")
        members.setdefault(row["pair_id"], []).append(i)
    found = {}
    for a, b in (pair for pair in members.values() if len(pair) == 2):
        try:
            check_swap_pair(problems.rows[a], problems.rows[b])
        except ValueError as error:
            raise ValueError(f"{problems.path}, rows {a} and {b} are no swap pair: {error}") from error
        found |= {a: b, b: a}
    return found


def measure_swap(task: Task, thoughts_RSD: Tensor, partner: dict[int, int], numbers: list[int]) -> list[dict]:
    """A record for each row: its answers with its partner's thoughts, with its partner's name, and with both."""
    subject, problems = task.subject, task.sets[SWAP]
    prompts = subject.prompts(problems, numbers)
    clean, runs = subject.answers(prompts), []
    for place, number in enumerate(numbers):
        donor, slots = partner.get(number), prompts.slots[place].tolist()
        if donor is None:
            continue
        runs.append(Run(place, "thoughts", slots, thoughts_RSD[donor]))
        names = exchanged_name(subject, problems, number, donor)
        for key, thoughts_SD in (("name", thoughts_RSD[number]), ("both", thoughts_RSD[donor])) if names else ():
            vectors_KD = torch.cat([thoughts_SD, names[1].to(thoughts_SD)])
            runs.append(Run(place, key, [*slots, *names[0]], vectors_KD, len(slots)))
    made = [
        {"clean_correct": c["correct"], "clean_prediction": c["prediction"], "clean_margin": margin_of(c), "runs": {}}
        | {"edited_runs": 0, "off_target": 0}
        for c in clean
    ]
    for run, record in zip(runs, answer_runs(subject, prompts, runs)) if runs else ():
        number = numbers[run.place]
        source, target = partner[number], number
        made[run.place] |= {
            "source": source,
            "target": target,
            "source_hops": int(problems.hops[source]),
            "target_hops": int(problems.hops[target]),
        }
        for name, count in aim_of([record]).items():
            made[run.place][name] += count
        made[run.place]["runs"][run.key] = compared(record, clean[run.place]) | {
            "prediction": record["prediction"],
            "margin_change": _change(record, clean[run.place]),
            "follows_donor": moves(record, clean[run.place], problems.rows[source], problems.rows[target]),
        }
    return made


def exchanged_name(subject: Subject, problems: Problems, number: int, donor: int) -> tuple[list[int], Tensor] | None:
    """Positions of the asked name in a row, and the embeddings [K, D] of its partner's; None if one has more tokens."""
    here, there = (Places.of(problems.rows[i], subject.tokenizer).person for i in (number, donor))
    if len(here) != len(there):
        return None
    tokens = torch.from_numpy(problems.table.question[donor][there])
    return here, subject.model.embedding.weight.detach().cpu()[tokens]


def swap_fields(subject: Subject, records: list[dict]) -> tuple[dict, dict[str, int]]:
    """(fields, excluded rows by reason) of the swap part.

    Follow rates count rows that name the other option, among pairs both of whose members are answered right when clean (whose
    thoughts can be said to hold the answer). Both members of a pair are recipients, so intervals resample pairs.
    Raises CheckFailed where the control does not give the partner's own answers.
    """
    whole = [r for r in records if r["runs"]]
    excluded = {"swap: partner beyond the rows read": len(records) - len(whole)}
    if not whole:
        return dict.fromkeys(SWAP_FIELDS) | {"swap_reason": "no whole pair among the rows read"}, excluded
    clean = {r["idx"]: r for r in records}
    named = [r for r in whole if "both" in r["runs"]]
    excluded["swap control: the two names have different numbers of tokens"] = len(whole) - len(named)
    equal = share(r["runs"]["both"]["prediction"] == clean[r["source"]]["clean_prediction"] for r in named)
    if named and equal["accuracy"] < 0.99:  # other batches may round a near tie the other way
        raise CheckFailed(f"{subject.label}: with the partner's name and thoughts, only {equal} rows give the partner's answer")

    def pairs_of(some: list[dict]) -> list[int]:
        return [min(r["source"], r["target"]) for r in some]

    def follow_rate(some: list[dict], key: str) -> dict:
        some = [r for r in some if r["clean_correct"] and clean[r["source"]]["clean_correct"]]
        flags = [r["runs"][key]["follows_donor"] for r in some]
        return share(flags) | {"bootstrap": bootstrap_mean(np.array(flags, float), pairs_of(some)) if flags else None}

    thoughts = [r["runs"]["thoughts"] for r in whole]
    by_construction = require_no_op(subject, "swap transplant", [(r["runs"]["thoughts"], r["clean_margin"]) for r in whole])
    lost = [float(r["clean_correct"]) - float(run["correct"]) for r, run in zip(whole, thoughts)]
    moved = [(r, run["margin_change"]) for r, run in zip(whole, thoughts) if run["margin_change"] is not None]
    found = {
        "swap_follow_rate": follow_rate(whole, "thoughts"),
        "swap_transplant_accuracy": share(run["correct"] for run in thoughts),
        "swap_transplant_drop": bootstrap_mean(lost, pairs_of(whole)),
        "swap_margin_change": bootstrap_mean([x for _, x in moved], pairs_of([r for r, _ in moved])) if moved else None,
    }
    fields = marked(found, by_construction) | {
        "swap_transplant_clean_accuracy": share(r["clean_correct"] for r in whole),
        "swap_control_follow_rate": follow_rate(named, "both"),
        "swap_name_only_follow_rate": follow_rate(named, "name"),
        "swap_control_equal": equal,
        "swap_pairs_measured": len(whole) // 2,
        "swap_reason": None,
    }
    return fields, excluded
