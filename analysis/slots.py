"""Vectors put into thought slots, and what is answered then: the instrument of corruption.py and transplant.py.

    runs = [Run(0, "exchanged", slots, thoughts[0][[1, 0]])]        # prompt 0 with its two thoughts exchanged
    records = answer_runs(subject, prompts, runs)                   # one batched call for all runs of all prompts
    made = replacements(thoughts, Calibration.of(thoughts), None, seed, rows)["gaussian"]       # noise to put there instead

Shape letters: R rows, S slots, P runs, K positions, D width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from analysis.command import CheckFailed
from analysis.interventions import Patch, gaussian, generator, hits
from analysis.self_checks import TOLERANCE
from analysis.subject import Prompts, Subject, positions

CALIBRATION_ROWS = 100
DONOR = 1  # the trial under which rows to take thoughts from are drawn; noise is trial 0


# ---------------------------------------------------------------- runs


@dataclass(frozen=True)
class Run:
    """One run of a prompt (its `place` in a list of prompts): vectors [K, D] put `at` positions, the first `n_slots` of which
    (default: all) are thought slots."""

    place: int
    key: str
    at: Sequence[int]
    vectors_KD: Tensor
    n_slots: int | None = None


class SlotPatch(Patch):
    """A Patch of inputs that remembers which of its positions it met, and which of those columns hold a thought token."""

    def __init__(self, positions_PK: Tensor, values_PKD: Tensor):
        super().__init__(0, positions_PK, values_PKD)
        self.met_PK = torch.zeros(positions_PK.shape, dtype=torch.bool)
        self.thought_PK = self.met_PK.clone()

    def __call__(self, layer: int, pass_, x_BCD: Tensor) -> Tensor | None:
        changed = super().__call__(layer, pass_, x_BCD)
        if changed is not None:
            row_B, k_B, column_B = hits(pass_, self.positions_PK)
            holds_BC = torch.zeros(x_BCD.shape[:2], dtype=torch.bool)
            for slot in pass_.slots:
                holds_BC[:, slot.column - pass_.start] = slot.rows
            run_B = torch.tensor(pass_.row_ids)[row_B]
            self.met_PK[run_B, k_B] = True
            self.thought_PK[run_B, k_B] = holds_BC[row_B, column_B]
        return changed


def answer_runs(subject: Subject, prompts: Prompts, runs: Sequence[Run]) -> list[dict]:
    """The answers of all runs in one batched call: records of `Subject.answers`, and whether each run is `on_target`.

    That is, whether vectors went into the columns they were meant for: all of them, and into thoughts where slots were meant.
    """
    at_PK = positions([run.at for run in runs])
    values_PKD = torch.zeros(*at_PK.shape, subject.width)
    for values_KD, run in zip(values_PKD, runs):
        values_KD[: len(run.at)] = run.vectors_KD
    edit = SlotPatch(at_PK, values_PKD.to(subject.device))
    records = subject.answers(prompts.take([run.place for run in runs]), edit)
    met, thoughts = edit.met_PK.sum(1).tolist(), edit.thought_PK.sum(1).tolist()
    for record, run, n_met, n_thoughts in zip(records, runs, met, thoughts):
        n_slots = len(run.at) if run.n_slots is None else run.n_slots
        record["on_target"] = n_met == len(run.at) and n_thoughts == n_slots
    return records


def compared(record: dict, clean: dict) -> dict:
    """What is kept of a run: `correct`, `changed` (it says another thing than the clean run), and the margin in nats."""
    return {
        "correct": record["correct"],
        "changed": record["output"] != clean["output"],
        "margin": margin_of(record),
    }


def margin_of(record: dict) -> float | None:
    """The two-choice margin, to a millionth of a nat (more is rounding of the batch); None where options were not scored."""
    return None if record.get("margin") is None else round(record["margin"], 6)


def aim_of(records: Iterable[dict]) -> dict[str, int]:
    """How many edited runs there were, and how many of them met other columns than they meant."""
    hit = [record["on_target"] for record in records]
    return {"edited_runs": len(hit), "off_target": len(hit) - sum(hit)}


def require_no_op(subject: Subject, what: str, runs: Iterable[tuple[dict, float | None]]) -> bool:
    """Whether an exchange of thoughts can't change anything (pause modes); there CheckFailed if it did.

    `runs`: of each what `compared` kept, and the clean margin.
    """
    if subject.recycles:
        return False
    runs = list(runs)
    moved = max((abs(run["margin"] - clean) for run, clean in runs if clean is not None), default=0.0)
    changed = sum(run["changed"] for run, _ in runs)
    if changed or moved > TOLERANCE:
        mode = subject.model.feedback_mode
        raise CheckFailed(
            f"{subject.label} ({mode}): {what} must be an exact no-op, but {changed} of {len(runs)} answers changed, "
            f"margins by up to {moved:.2g} nats"
        )
    return True


def marked(fields: dict, by_construction: bool) -> dict:
    """Fields with a note in each object where they could not have come out otherwise."""
    if not by_construction:
        return fields
    return {k: v | {"by_construction": True} if isinstance(v, dict) else v for k, v in fields.items()}


# ---------------------------------------------------------------- what is put in place of a thought


@dataclass(frozen=True)
class Calibration:
    """Of the thoughts of the first rows: std over all entries, mean norm, and each slot's mean and variance [S, D]."""

    n: int
    std: float
    norm: float
    mean_SD: Tensor
    variance_SD: Tensor

    @classmethod
    def of(cls, thoughts_RSD: Tensor) -> "Calibration":
        some = thoughts_RSD[:CALIBRATION_ROWS].double()  # the mean of equal vectors is that vector, also in float32
        std, norm = float(some.std(correction=0)), float(some.norm(dim=-1).mean())
        return cls(len(some), std, norm, some.mean(0).float(), some.var(0, correction=0).float())


def replacements(
    thoughts_RSD: Tensor, calibration: Calibration, m3_std: float | None, seed: int, numbers: list[int]
) -> dict[str, Tensor]:
    """{kind: vectors [R, S, D]} for some rows, given the thoughts of all."""
    clean_RSD = thoughts_RSD[numbers]
    noise_RSD = gaussian(seed, numbers, *clean_RSD.shape[1:])
    slots, others = range(clean_RSD.shape[1]), len(thoughts_RSD) - 1
    donors = [[int(generator(seed, row, k, DONOR).integers(others)) for k in slots] for row in numbers]
    donor_RS = torch.tensor([[d + (d >= row) for d in of_row] for row, of_row in zip(numbers, donors)])
    made = {
        "gaussian": calibration.std * noise_RSD,
        "norm_matched": noise_RSD * (clean_RSD.norm(dim=-1) / noise_RSD.norm(dim=-1))[..., None],
        "resample": thoughts_RSD[donor_RS, torch.arange(len(slots))],
        "mean": calibration.mean_SD.expand_as(clean_RSD),
        "zero": torch.zeros_like(clean_RSD),
    }
    return made if m3_std is None else made | {"cross_scale": m3_std * noise_RSD}
