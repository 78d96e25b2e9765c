"""Evaluation sets before use: which ones an experiment asks, and whether each is what its sidecar says.

sets = chosen_sets(task)               # {"test": problems, "ood_dag": ...}, all checked, or CheckFailed
reason = no_room(subject, sets["test"], n_thoughts=12)
"""

import argparse
import json
from functools import lru_cache
from pathlib import Path

import numpy as np

from analysis.command import CheckFailed
from analysis.experiment import Task
from analysis.subject import Problems, Subject
from data.edge_pairs import UNBALANCED, check_edge_pair
from data.ood_checks import FAIR, check_swap_pair, pairs_of
from data.prosqa_rows import baselines, check_rows
from tokens import load_rows

ID = "id_matched"  # new rows of the evaluation sets' generator, as hard as the training rows


def chosen_sets(task: Task) -> dict[str, Problems]:
    """The sets that --sets names (default: all of the data folder), each checked.

    Raises ValueError for a name that is unknown, CheckFailed for a set that is not what its sidecar says.
    """
    wanted = task.args.sets.split(",") if task.args.sets else list(task.sets)
    if unknown := [name for name in wanted if name not in task.sets]:
        raise ValueError(f"--sets {unknown[0]}: {task.data_dir} has {', '.join(task.sets)}; data/ood.py makes the others")
    chosen = {name: problems for name, problems in task.sets.items() if name in wanted}
    for problems in chosen.values():
        check_set(problems.path, problems.sha256)
    return chosen


def sets_flag(parser: argparse.ArgumentParser) -> None:
    """Add --sets."""
    parser.add_argument("--sets", help="sets to measure, by comma (default: test and all that data/ood.py left beside it)")


@lru_cache(maxsize=64)
def check_set(path: Path, sha256: str) -> None:
    """Raises CheckFailed unless the whole file holds sound problems, in pairs where its sidecar says so, that no rule blind
    to the person solves. Files without a `kind` in their sidecar, and those made from other files, may have such rules."""
    side = path.with_suffix(".stats.json")
    about = json.loads(side.read_text()) if side.is_file() else {}
    try:
        if about.get("sha256", sha256) != sha256:
            raise ValueError(f"{path}: changed since {side.name} was written; make it again with data/ood.py")
        rows = load_rows(path)
        hops = tuple(about["hops"]) if "hops" in about else None
        check_rows(rows, str(path), hops=hops, two_chain=about.get("two_chain", False))
        if about.get("pairs") and len(rows) % 2:
            raise ValueError(f"{path}: {len(rows)} rows are no pairs")
        for i, pair in enumerate(pairs_of(rows) if about.get("pairs") else ()):
            if [(row.get("pair_id"), row.get("member")) for row in pair] != [(i, 0), (i, 1)]:
                raise ValueError(f"{path}: rows {2 * i} and {2 * i + 1} must be the members 0 and 1 of pair {i}")
            (check_edge_pair if about["kind"] == "edge" else check_swap_pair)(*pair)
        if found := unfair(baselines(rows), about):
            raise ValueError(f"{path}: rules that ignore the person are no coins: {found}")
    except ValueError as error:
        raise CheckFailed(str(error)) from error


def unfair(found: dict[str, float], about: dict) -> dict[str, float]:
    """Rules blind to the person that are right more or less often than a set of this kind allows: {rule: percent}."""
    kind, pairs = about.get("kind"), about.get("pairs")
    if kind is None or (kind == "swap" and not pairs):
        return {}
    low, high = (50.0, 50.0) if pairs else FAIR
    exempt = {UNBALANCED} if kind == "edge" else set()
    return {rule: x for rule, x in blind(found).items() if rule not in exempt and not low <= x <= high}


def blind(found: dict[str, float]) -> dict[str, float]:
    """The baselines that do not read who is asked."""
    return {rule: x for rule, x in found.items() if not rule.startswith("search")}


def no_room(subject: Subject, problems: Problems, n_thoughts: int) -> str | None:
    """Why `n_thoughts` do not fit between the set's questions and answers; None where they do."""
    limit = getattr(subject.model.base_causallm.config, "max_position_embeddings", None)
    numbers = np.arange(len(problems))
    text = problems.table.question.length(numbers) + problems.table.answer.length(numbers)
    most = int(text.max()) + n_thoughts + 2
    return f"{most} tokens exceed the model's {limit} positions" if limit is not None and most > limit else None
