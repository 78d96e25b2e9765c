"""Which probes are fitted, on which rows and folds, and their scores, kept in a file so that a killed run goes on.

    plan = Plan.of(steps, own=[0, 1, 2], min_rows=100)         # steps: species of the gold steps, a list for each row
    cells = Cells({"slots": states_NLKD, ...}, path, identity)
    cells.fit(units(plan.steps[0], "slots", cells.tables))
    cells.score(plan.steps[0], Cell("slots", layer=3, column=0), "step 0")

A design is a set of rows, their folds, and one or several labels of each row; probes of one design can be compared. A cell is
where the states come from: a source (`slots`, `inputs`, `untrained`), a layer and a column (slot or question position).
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from analysis.probes import LinearProbe, Score, codes, fingerprint, folds, frequent, mlp_grid, mlp_probe, p_value, shuffles
from files import read_jsonl, write_jsonl

# ---------------------------------------------------------------- rows, folds and labels


@dataclass(frozen=True, eq=False)
class Design:
    """Rows (numbers in the table of states, int [n]), the fold of each, and labels {name: class numbers [n]}."""

    rows: np.ndarray
    fold: np.ndarray
    labels: dict[str, np.ndarray]

    @property
    def n(self) -> int:
        return len(self.rows)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.rows, self.fold)

    @cached_property
    def digest(self) -> str:
        """Of all that a score depends on here."""
        whole = [self.fingerprint, {name: y.tolist() for name, y in self.labels.items()}]
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:16]

    @property
    def label(self) -> str:
        """The name of its only label."""
        (name,) = self.labels
        return name

    @property
    def y(self) -> np.ndarray:
        """Its only label."""
        return self.labels[self.label]

    def n_classes(self) -> int:
        return len(np.unique(self.y))

    def chance(self) -> float:
        """The share of the most frequent class."""
        return float(np.bincount(self.y).max() / self.n)


@dataclass(frozen=True, eq=False)
class Plan:
    """All designs of a study of slots.

    Args:
        own: for each slot the step that it stands for.
        steps, ends: the design of step t counted from the start, or from the end (0 is the answer), for each t that enough
            rows have. One label, so folds are stratified by it, and rows of rare classes (fewer than 5 members) are left out.
        answerless: as `steps`, rows in which the step is not the answer.
        matched: for comparing steps, the rows that have at least `most` steps; labels `step 0` .. and `end 0` .. together.
            Folds are stratified by the number of steps, and no class is left out: what is rare for one step is not for
            another, and all must have the same rows.
        hops: as `matched`, rows of exactly that many steps.
        counts: {(steps or ends or answerless, t): (rows that have the step, of these in a rare class)}.
    """

    own: list[int]
    most: int | None
    steps: dict[int, Design]
    ends: dict[int, Design]
    answerless: dict[int, Design]
    matched: Design | None
    hops: dict[int, Design]
    counts: dict[tuple[str, int], tuple[int, int]]

    @classmethod
    def of(cls, steps: Sequence[Sequence[str]], own: Sequence[int], min_rows: int) -> "Plan":
        """Designs with fewer than `min_rows` rows are left out."""
        length = np.array([len(x) for x in steps])
        found: dict[str, dict[int, Design]] = {"steps": {}, "ends": {}, "answerless": {}}
        counts = {}
        for t in range(max(own) + 1):
            cases = {"steps": length > t, "ends": length > t, "answerless": length > t + 1}
            for kind, having in cases.items():
                rows = np.flatnonzero(having)
                labels = np.array([steps[i][-1 - t if kind == "ends" else t] for i in rows])
                common = frequent(labels)
                counts[kind, t] = len(rows), int((~common).sum())
                if common.sum() >= min_rows:
                    name = f"end {t}" if kind == "ends" else f"step {t}"
                    y = codes(labels[common])
                    found[kind][t] = Design(rows[common], folds(y), {name: y})
        enough = [m for m in range(2, int(length.max(initial=0)) + 1) if (length >= m).sum() >= min_rows]
        most = max(enough, default=None)
        matched = _compared(steps, np.flatnonzero(length >= most), most) if most else None
        fixed = [h for h in range(2, int(length.max(initial=0)) + 1) if (length == h).sum() >= min_rows]
        hops = {h: _compared(steps, np.flatnonzero(length == h), h, ends=False) for h in fixed}
        return cls(list(own), most, **found, matched=matched, hops=hops, counts=counts)


def _compared(steps: Sequence[Sequence[str]], rows: np.ndarray, most: int, ends: bool = True) -> Design:
    labels = {f"step {t}": codes([steps[i][t] for i in rows]) for t in range(most)}
    if ends:  # where all rows have as many steps, these are the same labels again
        labels |= {f"end {j}": codes([steps[i][-1 - j] for i in rows]) for j in range(most)}
    return Design(rows, folds([len(steps[i]) for i in rows]), labels)


# ---------------------------------------------------------------- cells


class Cell(NamedTuple):
    source: str
    layer: int
    column: int


class Unit(NamedTuple):
    """A piece of work: `linear` (all labels of a design), or of its only label `null` (shuffles), `mlp` or `grid`."""

    kind: str
    design: Design
    cell: Cell

    @property
    def key(self) -> str:
        return "/".join(map(str, (self.kind, self.design.digest, *self.cell)))


def units(design: Design, source: str, tables: dict[str, np.ndarray], columns: Iterable[int] | None = None) -> Iterator[Unit]:
    """Linear probes at all layers and (all, or these) columns of a source."""
    n_layers, n_columns = tables[source].shape[1:3]
    columns = range(n_columns) if columns is None else columns
    yield from (Unit("linear", design, Cell(source, layer, column)) for layer in range(n_layers) for column in columns)


class Cells:
    """Scores of cells, fitted once and kept in `path`, one JSON line each below one that says what they belong to.

    Args:
        tables: {source: states [rows, layers, columns, width]}.
        identity: what the scores depend on besides their design; a file of another identity is begun anew.
        penalty: of the ridge; None chooses it inside the training rows.
    """

    def __init__(self, tables, path: Path, identity: str, penalty: float | None = None, n_shuffles=5000, seed=0, title=""):
        self.tables, self.path, self.identity, self.title = tables, path, identity, title
        self.penalty, self.n_shuffles, self.seed = penalty, n_shuffles, seed
        held = read_jsonl(path)
        same = bool(held) and held[0].get("identity") == identity
        self.found = {record["key"]: record for record in held[1:]} if same else {}
        write_jsonl(path, [{"identity": identity}, *self.found.values()])

    def fit(self, wanted: Iterable[Unit], what: str = "probes") -> None:
        """Fit what is not known yet: cells side by side, one thread each; a grid's own fits in processes instead."""
        left = {unit.key: unit for unit in wanted if unit.key not in self.found}
        bar = tqdm(desc=f"{what} {self.title}", total=len(left), unit="cell", disable=None if left else True)
        lock = Lock()

        with warnings.catch_warnings(), threadpool_limits(1), open(self.path, "a") as file, bar:
            warnings.simplefilter("ignore", ConvergenceWarning)  # kept as `converged`

            def keep(unit: Unit) -> None:
                record = {"key": unit.key, **self._measured(unit)}
                with lock:
                    self.found[unit.key] = record
                    file.write(json.dumps(record) + "\n")
                    file.flush()
                    bar.update()

            with ThreadPoolExecutor(cores()) as pool:
                running = [pool.submit(keep, unit) for unit in left.values() if unit.kind != "grid"]
                try:
                    for done in as_completed(running):
                        done.result()
                finally:
                    pool.shutdown(cancel_futures=True)
            for unit in left.values():
                if unit.kind == "grid":
                    keep(unit)

    def _measured(self, unit: Unit) -> dict:
        design, states = unit.design, self.states(unit.design, unit.cell)
        if unit.kind == "mlp":
            return mlp_probe(states, design.y, design.fold)
        if unit.kind == "grid":
            return mlp_grid(states, design.y, design.fold, jobs=cores())
        probe = LinearProbe(states, design.fold, self.penalty)
        right = {name: int((probe.predict(y) == y).sum()) for name, y in design.labels.items()}
        if unit.kind == "linear":
            return {"right": right}
        null = probe.null(design.y, shuffles(design.y, design.fold, self.n_shuffles, self.seed))
        shuffled = {"mean": float(null.mean() / design.n), "highest": float(null.max() / design.n)}
        return {"p_value": p_value(right[design.label], null), "shuffled": shuffled}

    # ------------------------------------------------------------ reading

    def states(self, design: Design, cell: Cell) -> np.ndarray:
        """States of the design's rows, [n, width]."""
        return self.tables[cell.source][design.rows, cell.layer, cell.column]

    def record(self, kind: str, design: Design, cell: Cell) -> dict | None:
        """What was fitted, None where it was not."""
        return self.found.get(Unit(kind, design, cell).key)

    def score(self, design: Design, cell: Cell, label: str) -> Score:
        return Score(self.record("linear", design, cell)["right"][label], design.n, design.fingerprint)

    def right(self, design: Design, cell: Cell, label: str) -> np.ndarray:
        """bool [n]: rows that the linear probe of a cell predicts right (fitted again)."""
        y = design.labels[label]
        with threadpool_limits(1):
            return LinearProbe(self.states(design, cell), design.fold, self.penalty).predict(y) == y

    def best(self, design: Design, label: str, source: str, columns: Iterable[int] | None = None) -> tuple[Score, Cell]:
        """The highest score among the cells of a source; the first of equal ones."""
        scored = [(self.score(design, u.cell, label), u.cell) for u in units(design, source, self.tables, columns)]
        return max(scored, key=lambda pair: pair[0].right)


def cores() -> int:
    """How many threads may compute: those the process may use, fewer where OMP_NUM_THREADS says so."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(own, int(asked)) if asked.isdigit() and int(asked) else own
