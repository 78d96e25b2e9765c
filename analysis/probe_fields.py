"""The fields of a probing result, from the scores of its cells.

    found = Found(plan, cells)
    fields = found.slots() | found.selectivity() | found.controls() | found.advantage()

Tables are [layers + 1][slots] (or positions), fractions, and null where too few rows were there to measure. A null is
never counted as 0: means and peaks are over what was measured, and are null themselves where nothing was.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from analysis.probe_cells import Cell, Cells, Design, Plan, Unit, units
from analysis.probes import Score, majority, selectivity
from analysis.stats import bootstrap_mean, spearman, wilson

CONTROLS = ("inputs", "untrained")
LEVEL = 0.05  # of all cells together
BEYOND = 0.10  # by which a non-linear probe must beat the linear one
PAUSES = ("frozen", "learned_shared", "pause_curriculum")


def level(score: Score) -> dict:
    return wilson(score.right, score.n)


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are not None; None where all are."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def flat(table: Sequence[Sequence]) -> list:
    return [value for row in table for value in row]


class Found:
    """All fields of one checkpoint, a method for each group of them; `fit` comes first."""

    def __init__(self, plan: Plan, cells: Cells):
        self.plan, self.cells = plan, cells
        self.n_layers, self.n_slots = cells.tables["slots"].shape[1:3]
        assert self.n_slots == len(plan.own), "one own step a slot"
        self.layers, self.slots_ = range(self.n_layers), range(self.n_slots)

    def fit(self) -> None:
        """Linear probes of all designs, and the shuffles of the main ones."""
        plan, tables = self.plan, self.cells.tables
        wanted, own = [], [(k, plan.steps[t]) for k, t in enumerate(plan.own) if t in plan.steps]
        for k, design in own:
            wanted += [Unit("null", design, Cell("slots", layer, k)) for layer in self.layers]
            wanted += [unit for source in ("slots", "untrained") for unit in units(design, source, tables, [k])]
        for design in plan.steps.values():
            wanted += units(design, "inputs", tables)
        everywhere = [*plan.answerless.values(), *([plan.matched] if plan.matched else [])]
        for design in everywhere:
            wanted += [unit for source in ("slots", *CONTROLS) for unit in units(design, source, tables)]
        for design in (*plan.ends.values(), *plan.hops.values()):
            wanted += units(design, "slots", tables)
        self.cells.fit(wanted)

    def table(self, value: Callable[[int, int], float | None], columns: Iterable[int] | None = None) -> list[list]:
        columns = self.slots_ if columns is None else columns
        return [[value(layer, column) for column in columns] for layer in self.layers]

    def own(self, k: int) -> Design | None:
        """The design of a slot's own step, None where too few rows have it."""
        return self.plan.steps.get(self.plan.own[k])

    def own_score(self, source: str, layer: int, k: int) -> Score | None:
        design = self.own(k)
        return self.cells.score(design, Cell(source, layer, k), design.label) if design else None

    def read(self, source: str, design: Design, columns: Iterable[int]) -> list[list]:
        """Accuracy for the design's only label at all layers of some columns."""
        return self.table(lambda la, c: self.cells.score(design, Cell(source, la, c), design.label).accuracy, columns)

    # ------------------------------------------------------------ each slot's own step

    def slots(self) -> dict:
        """Accuracy, shuffles and peak of each slot for its own step; the same for steps counted from the end."""
        total = self.n_layers * self.n_slots
        null = {(la, k): self.null(la, k) for la in self.layers for k in self.slots_}
        significant = [[*cell] for cell, record in null.items() if record and record["p_value"] < LEVEL / total]
        designs = [self.own(k) for k in self.slots_]
        accuracy = self.accuracy("slots")
        return {
            "linear_probe_accuracy": accuracy,
            "permutation_p_values": self.table(lambda la, k: null[la, k] and null[la, k]["p_value"]),
            "shuffled_label_accuracy": self.table(lambda la, k: null[la, k] and null[la, k]["shuffled"]["mean"]),
            "n_shuffles": self.cells.n_shuffles,
            "p_threshold": LEVEL / total,
            "significant_cells": significant,
            "n_significant_cells": len(significant),
            "total_cells": total,
            "n_measured_cells": sum(x is not None for x in flat(accuracy)),
            **self.peak("slots"),
            "diagonal_peak_layers": [self.peak_layer_of(k) for k in self.slots_],
            "slot_steps": list(self.plan.own),
            "n_samples_per_position": [design.n if design else 0 for design in designs],
            "n_classes": [design.n_classes() if design else None for design in designs],
            "chance": [design.chance() if design else None for design in designs],
            "cells": [self.cell(la, k) for la in self.layers for k in self.slots_ if designs[k]],
            "from_end": self.from_end(),
        }

    def accuracy(self, source: str) -> list[list]:
        return self.table(lambda la, k: s.accuracy if (s := self.own_score(source, la, k)) else None)

    def null(self, layer: int, k: int) -> dict | None:
        return self.cells.record("null", self.own(k), Cell("slots", layer, k)) if self.own(k) else None

    def cell(self, layer: int, k: int) -> dict:
        """Everything about one measured cell."""
        null = self.null(layer, k)
        score = level(self.own_score("slots", layer, k))
        return {"layer": layer, "slot": k, **score, "p_value": null["p_value"], "shuffled": null["shuffled"]}

    def peak(self, source: str) -> dict:
        scored = [(la, k, self.own_score(source, la, k)) for la in self.layers for k in self.slots_ if self.own(k)]
        if not scored:
            return {"peak_layer": None, "peak_position": None, "peak_accuracy": None}
        layer, k, score = max(scored, key=lambda found: found[2].accuracy)
        return {"peak_layer": layer, "peak_position": k, "peak_accuracy": level(score)}

    def peak_layer_of(self, k: int) -> int | None:
        return max(self.layers, key=lambda la: self.own_score("slots", la, k).right) if self.own(k) else None

    def from_end(self) -> dict:
        """Step j counted from the end, 0 the answer, read at every slot: a table for each j."""
        ends = [self.plan.ends.get(t) for t in range(max(self.plan.own) + 1)]
        accuracy = [design and self.read("slots", design, self.slots_) for design in ends]
        return {
            "linear_probe_accuracy": accuracy,
            "n_samples": [d.n if d else 0 for d in ends],
            "n_classes": [d and d.n_classes() for d in ends],
            "chance": [d and d.chance() for d in ends],
        }

    # ------------------------------------------------------------ which step a slot tells

    def selectivity(self) -> dict:
        """Own step minus the best other step, on the same rows and folds, and which step each slot tells best."""
        design, most = self.plan.matched, self.plan.most
        table = self.table(lambda la, k: self.selective(design, most, la, k))
        slots = [self.told(k) for k in self.slots_ if design and self.plan.own[k] < most]
        above = [slot for slot in slots if slot["beats_controls"]]
        strength = spearman([s["slot"] for s in slots], [s["best_step"] for s in slots]) if slots else {"rho": None}
        return {
            "selectivity": table,
            "selectivity_rows": {"n": design.n if design else 0, "least_steps": most, "steps_compared": list(range(most or 0))},
            "mean_selectivity": mean(flat(table)),
            "max_cross_position_acc": self.table(lambda la, k: self.crossed(design, most, la, k)),
            "cross_leakage_front_to_back": [self.leaked(k) for k in self.slots_],
            "hops_fixed": {str(h): self.fixed(h) for h in self.plan.hops},
            "diagonal_pattern": 2 * sum(s["best_step"] == s["own_step"] for s in above) > len(above) if slots else None,
            "diagonal_strength": strength["rho"],
            "diagonal_slots": slots,
            "n_slots_above_controls": len(above) if slots else None,
        }

    def step_scores(self, design: Design, most: int, cell: Cell) -> list[Score]:
        return [self.cells.score(design, cell, f"step {t}") for t in range(most)]

    def selective(self, design: Design | None, most: int | None, layer: int, k: int) -> float | None:
        own = self.plan.own[k]
        if design is None or own >= most:
            return None
        return selectivity(self.step_scores(design, most, Cell("slots", layer, k)), own)

    def crossed(self, design: Design | None, most: int | None, layer: int, k: int) -> float | None:
        """The best accuracy for any other step."""
        if design is None:
            return None
        scores = self.step_scores(design, most, Cell("slots", layer, k))
        return max(score.accuracy for t, score in enumerate(scores) if t != self.plan.own[k])

    def leaked(self, k: int) -> float | None:
        """How well a slot tells a step that belongs to a slot in front of it: the best of these steps and of all layers."""
        front = range(min(self.plan.own[k], self.plan.most or 0))
        best = [self.cells.best(self.plan.matched, f"step {t}", "slots", [k])[0].accuracy for t in front]
        return max(best, default=None)

    def fixed(self, h: int) -> dict:
        """Own steps and selectivity among rows of exactly h steps, where a step from the start is also one from the end."""
        design, own = self.plan.hops[h], self.plan.own
        selective = self.table(lambda la, k: self.selective(design, h, la, k))
        accuracy = self.table(
            lambda la, k: self.step_scores(design, h, Cell("slots", la, k))[own[k]].accuracy if own[k] < h else None
        )
        return {
            "n": design.n,
            "linear_probe_accuracy": accuracy,
            "selectivity": selective,
            "mean_selectivity": mean(flat(selective)),
        }

    def told(self, k: int) -> dict:
        """The step that a slot tells best, from the start and from the end, and whether its controls tell it as well."""
        design, most = self.plan.matched, self.plan.most
        best = {
            kind: [self.cells.best(design, f"{kind} {t}", "slots", [k])[0].right for t in range(most)]
            for kind in ("step", "end")
        }
        step = int(np.argmax(best["step"]))
        against = self.against_controls(design, f"step {step}", [k])
        above = against["ci95"] is not None and against["ci95"][0] > 0
        about = {"slot": k, "own_step": self.plan.own[k], "best_step": step, "best_step_from_end": int(np.argmax(best["end"]))}
        return about | {"beats_controls": above, **against}

    # ------------------------------------------------------------ controls

    def against_controls(self, design: Design, label: str, columns: Iterable[int] | None = None) -> dict:
        """The best slot cell minus the best control cell, on the same rows, labels and folds, with an interval over rows.

        Controls are question positions, the untrained model's slots, and always saying the most frequent species. Both sides
        are the best of their cells by the same accuracies, so both are a little too high, and the interval is of these two cells.
        """
        _, cell = self.cells.best(design, label, "slots", columns)
        always = majority(design.labels[label], design.fold) == design.labels[label]
        others = [self.cells.best(design, label, source) for source in CONTROLS]
        others.append((Score(int(always.sum()), design.n, design.fingerprint), None))
        where = max(others, key=lambda found: found[0].right)[1]
        right = self.cells.right(design, cell, label)
        other_right = self.cells.right(design, where, label) if where else always
        score, other = (Score(int(x.sum()), design.n, design.fingerprint) for x in (right, other_right))
        interval = bootstrap_mean(right.astype(float) - other_right)
        return {
            "value": score - other,
            "ci95": interval["ci95"],
            "n": design.n,
            "slot_accuracy": level(score),
            "slot_cell": cell._asdict(),
            "control_accuracy": level(other),
            "control_cell": where._asdict() if where else {"source": "most frequent species"},
        }

    def controls(self) -> dict:
        """Question positions with the same labels, rows and folds as the slots, and the untrained model."""
        positions = range(self.cells.tables["inputs"].shape[2])
        by_step = {t: self.read("inputs", design, positions) for t, design in self.plan.steps.items()}
        best_input = {t: self.cells.best(design, design.label, "inputs") for t, design in self.plan.steps.items()}
        best = max(best_input, key=lambda t: best_input[t][0].accuracy, default=None)
        advantage = [self.beyond_inputs(k) for k in self.slots_]
        stacked = np.stack([np.array(table) for table in by_step.values()]) if by_step else None
        return {
            "input_position_probe_acc": stacked.max(0).tolist() if by_step else self.table(lambda la, p: None, positions),
            "input_position_probe_acc_by_step": {str(t): table for t, table in by_step.items()},
            "max_input_position_acc": best_input[best][0].accuracy if by_step else None,
            "max_input_position": (
                {"step": best, **best_input[best][1]._asdict(), **level(best_input[best][0])} if by_step else None
            ),
            "thought_minus_input_advantage": advantage,
            "mean_thought_advantage": mean(advantage),
            "untrained": {"linear_probe_accuracy": self.accuracy("untrained"), **self.peak("untrained")},
        }

    def beyond_inputs(self, k: int) -> float | None:
        """The slot's best layer minus the best question position, for the slot's step."""
        design = self.own(k)
        if design is None:
            return None
        return self.cells.best(design, design.label, "slots", [k])[0] - self.cells.best(design, design.label, "inputs")[0]

    def advantage(self) -> dict:
        """`controlled_advantage`: rows in which the step is not the answer; of the steps, the one that slots tell best."""
        by_step = {t: self.against_controls(design, design.label) for t, design in self.plan.answerless.items()}
        if not by_step:
            reason = "no step has enough rows in which it is not the answer"
            empty = dict.fromkeys(("value", "ci95", "slot_cell", "control_cell"))
            return {"controlled_advantage": {**empty, "n": 0, "reason": reason}, "answer_excluded": {}}
        best = max(by_step, key=lambda t: by_step[t]["slot_accuracy"]["accuracy"])
        return {
            "controlled_advantage": {"step": best, **by_step[best], "reason": None},
            "answer_excluded": {str(t): found for t, found in by_step.items()},
        }

    def layer0(self, mode: str) -> dict:
        """Layer 0 of a pause slot is one vector and a position. It must be at chance within its interval.

        Not an error where it is not: a position tells the question's length, and long species names make long questions.
        """
        if mode not in PAUSES:
            return {"skipped": f"{mode}: layer 0 of a thought is a state"}
        slots = [self.at_chance(k) for k in self.slots_ if self.own(k)]
        return {"passed": all(slot["at_chance"] for slot in slots) if slots else None, "slots": slots}

    def at_chance(self, k: int) -> dict:
        found, chance = self.cell(0, k), self.own(k).chance()
        return {**found, "chance": chance, "at_chance": bool(found["ci95"][0] <= chance)}

    # ------------------------------------------------------------ non-linear probes

    def nonlinear(self, which: str, grid: bool) -> dict:
        """MLPs at the cells of `which`: none, peak (the peak and its neighbours) or all; with `grid` 72 settings at 5 cells."""
        cells = {
            "none": [],
            "peak": self.around_peak(),
            "all": [(la, k) for la in self.layers for k in self.slots_ if self.own(k)],
        }
        chosen, searched = cells[which], self.around_peak(5) if grid else []
        self.cells.fit([Unit("mlp", self.own(k), Cell("slots", la, k)) for la, k in chosen], "MLPs")
        self.cells.fit([Unit("grid", self.own(k), Cell("slots", la, k)) for la, k in searched], "MLP grid")
        mlps = {(la, k): self.cells.record("mlp", self.own(k), Cell("slots", la, k)) for la, k in chosen}
        known = {
            cell: Score(r["right"], self.own(cell[1]).n, self.own(cell[1]).fingerprint)
            for cell, r in mlps.items()
            if r["converged"]
        }
        beyond = {cell: score - self.own_score("slots", *cell) for cell, score in known.items()}
        peak = max(known, key=lambda cell: known[cell].accuracy, default=None)
        return {
            "nonlinear_cells": which,
            "nonlinear_probe_accuracy": self.table(lambda la, k: known[la, k].accuracy if (la, k) in known else None),
            "nonlinear_peak_layer": peak and peak[0],
            "nonlinear_peak_position": peak and peak[1],
            "nonlinear_peak_accuracy": peak and level(known[peak]),
            "nonlinear_minus_linear": [{"layer": la, "slot": k, "advantage": x} for (la, k), x in beyond.items()],
            "nonlinear_advantage_cells": [[*cell] for cell, x in beyond.items() if x > BEYOND],
            "nonlinear_not_converged": [[*cell] for cell in mlps if cell not in known],
            "nonlinear_loss_curves": [{"layer": la, "slot": k, "folds": r["loss_curves"]} for (la, k), r in mlps.items()],
            "nonlinear_grid": [self.searched(la, k) for la, k in searched],
        }

    def around_peak(self, n: int | None = None) -> list[tuple[int, int]]:
        """The peak cell and those beside it; with `n`, as many, filled up with the best of the others."""
        peak = self.peak("slots")
        if peak["peak_layer"] is None:
            return []
        layer, slot = peak["peak_layer"], peak["peak_position"]
        known = [(la, k) for la in self.layers for k in self.slots_ if self.own(k)]
        known.sort(key=lambda cell: -self.own_score("slots", *cell).accuracy)
        near = [cell for cell in known if abs(cell[0] - layer) + abs(cell[1] - slot) <= 1]
        return near if n is None else [*near, *(cell for cell in known if cell not in near)][:n]

    def searched(self, layer: int, k: int) -> dict:
        design = self.own(k)
        found = self.cells.record("grid", design, Cell("slots", layer, k))
        accuracy = wilson(found["right"], design.n) if found["converged"] else None
        return {"layer": layer, "slot": k, "accuracy": accuracy, "chosen": found["chosen"]}
