"""Health checks of adaptive halting: whether tokens halt at different depths, for a reason, and at no cost.

    halting(patient)      variance of q, step values in use, rank correlation of steps with loss, accuracy given up

Applies to every model whose columns say "halt_logits" [B, T, S] and "halting_steps" [B, T]. None of it can hold of a model
that was not trained, whose values are shown all the same; a value that is not a number always fails.
"""

import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

from analysis.health_patient import Patient, Result, labelled, not_applicable, real

FEWEST_TOKENS = 32
LEAST_VARIANCE = 0.05
FEWEST_VALUES = 2
MOST_POINTS = 1.0
NAMES = ("halting_variance", "halting_values", "halting_rank", "halting_accuracy")
LIMITS = (f"> {LEAST_VARIANCE}", f">= {FEWEST_VALUES}", "> 0", f"<= {MOST_POINTS:g} points")


@torch.no_grad()
def halting(patient: Patient) -> list[Result]:
    """Four results; see `NAMES`."""
    seen = _seen(patient)
    if seen is None:
        return [not_applicable(name, "no halting") for name in NAMES]
    q, steps, asked, losses, accuracy = seen
    config = patient.bare.config
    fixed = None if getattr(config, "use_act", True) and getattr(config, "max_recursions", 2) > 1 else "every token halts alike"
    why = patient.why_not_judged or fixed
    few = f"{len(q)} tokens; at least {FEWEST_TOKENS} are needed" if len(q) < FEWEST_TOKENS else None

    variance = q.square().mean().item()
    values = steps.unique().tolist()
    rank = float(spearmanr(asked.numpy(), losses.numpy()).statistic) if len(asked.unique()) > 1 else None
    given_up = 100 * (accuracy["full"] - accuracy["halted"])
    mean = f"mean {steps.double().mean():.2f}"
    return [
        _result(0, variance, variance > LEAST_VARIANCE, why or few, f"of q at step 1 within rows, {len(q)} tokens"),
        _result(1, len(values), len(values) >= FEWEST_VALUES, why, f"steps {', '.join(map(str, values))}; {mean}"),
        _result(2, rank, rank is not None and rank > 0, why, f"steps with loss, {len(losses)} labelled tokens"),
        _result(
            3, given_up, given_up <= MOST_POINTS, why, f"full depth {accuracy['full']:.1%}, halted {accuracy['halted']:.1%}"
        ),
    ]


def _result(number: int, value, holds: bool, why_not: str | None, detail: str) -> Result:
    name, limit = NAMES[number], LIMITS[number]
    if value is not None and not math.isfinite(value):
        return Result(name, value, limit, False, f"not a number; {detail}")
    if why_not:
        return not_applicable(name, f"{why_not} ({detail})", value, limit)
    return Result(name, value, limit, holds, detail)


def _seen(patient: Patient):
    """Over all rows: q at step 1 less its row's mean, steps of real tokens, steps and losses of labelled tokens, and their
    accuracies at the halt and at full depth. None where the model does not halt."""
    q, steps, asked, losses, right = [], [], [], [], {"halted": [], "full": []}
    for batch in patient.batches(patient.rows):
        halted = _rollout(patient, batch)
        if halted.columns is None or not {"halt_logits", "halting_steps"} <= halted.columns.keys():
            return None
        seen_BT, steps_BT = real(batch), halted.columns["halting_steps"]
        q_BT = halted.columns["halt_logits"][..., min(1, halted.columns["halt_logits"].shape[-1] - 1)].sigmoid().double()
        row_mean_B1 = (q_BT * seen_BT).sum(1, keepdim=True) / seen_BT.sum(1, keepdim=True)
        q.append((q_BT - row_mean_B1)[seen_BT])
        steps.append(steps_BT[seen_BT])
        asked.append(steps_BT[labelled(batch)])
        for name, rollout in {"halted": halted, "full": None}.items():
            with _full_depth(patient.bare.config, name == "full"):
                rollout = rollout or _rollout(patient, batch)
            logits_NV = patient.model.head(rollout.hidden_BTD[labelled(batch)])
            targets_N = batch["labels"][:, 1:][labelled(batch)[:, :-1]]
            right[name].append(logits_NV.argmax(-1) == targets_N)
            if name == "halted":
                losses.append(F.cross_entropy(logits_NV, targets_N, reduction="none"))
    accuracy = {name: torch.cat(parts).double().mean().item() for name, parts in right.items()}
    return *(torch.cat(parts).cpu() for parts in (q, steps, asked, losses)), accuracy


def _rollout(patient: Patient, batch: dict):
    return patient.model.rollout(batch["input_ids"], batch["attention_mask"], batch["position_ids"])


@contextmanager
def _full_depth(config, on: bool):
    """Let every token take all steps, where the model's config has a word for it."""
    before = getattr(config, "early_exit", None)
    if on and before is not None:
        config.early_exit = False
    try:
        yield
    finally:
        if before is not None:
            config.early_exit = before
