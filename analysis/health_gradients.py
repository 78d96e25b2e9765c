"""Health checks of the gradient: one training step on real rows, and which parameters it leaves alone.

    gradients(patient)      no trainable parameter without one, all zero or not finite
    router_gradient, halting_gradient     that of the routers and of the halting head, by themselves

A gradient may be zero where mathematics says so: `allowed` names these, with the reason.
"""

import re

import torch

from analysis.health_patient import Patient, Result, not_applicable
from backbones.halting import HaltingHead
from backbones.routing import Router

ROWS = 8
SHOWN = 5


def allowed(config) -> dict[str, str]:
    """{pattern of a parameter's name: why its gradient is zero} for a backbone's config."""
    reasons = {r"\bk_proj\.bias$": "adds the same to all scores of a query"}
    if getattr(config, "memory_topk", None) == 1:
        reasons[r"\bmemory\.(query|query_norm|sub_keys|keys)\b"] = "one slot a head has weight 1 whatever its score"
    steps = getattr(config, "max_recursions", None)
    if steps is not None and (steps == 0 or not config.use_act or (steps == 1 and config.act_loss == "ponder")):
        reasons[r"\bact_head\b"] = "there is nothing to decide about halting"
    if steps == 0:
        reasons[r"\brecursion\.(refiner|updater)\b"] = "no refinement steps"
    return reasons


def gradients(patient: Patient) -> list[Result]:
    """Names of parameters that one training forward and backward leaves without a gradient."""
    norms, silent = _norms(patient), []
    reasons = allowed(patient.bare.config)
    excused = {name: why for name in norms for pattern, why in reasons.items() if re.search(pattern, name)}
    for name, norm in norms.items():
        what = "none" if norm is None else "zero" if norm == 0 else None if norm < float("inf") else "not finite"
        if what and (what == "not finite" or name not in excused):
            silent.append(f"{name} ({what})")
    some = ", ".join(silent[:SHOWN]) + (" ..." if len(silent) > SHOWN else "")
    detail = some or f"{len(norms)} parameters, {ROWS} rows of {patient.source}"
    figures = {"without": silent, "excused": excused}
    return [Result("gradients", len(silent), "0 parameters without", not silent, detail, figures)]


def router_gradient(patient: Patient) -> list[Result]:
    """The smallest norm of a router's weight gradient over routed layers."""
    return _smallest(patient, "router_gradient", Router, "score.weight", "no routed layers")


def halting_gradient(patient: Patient) -> list[Result]:
    """The norm of the halting head's weight gradient."""
    config = patient.bare.config
    idle = next((why for pattern, why in allowed(config).items() if "act_head" in pattern), None)
    return _smallest(patient, "halting_gradient", () if idle else HaltingHead, "logit.weight", idle or "no halting head")


def _smallest(patient: Patient, check: str, kind, weight: str, without: str) -> list[Result]:
    names = [f"{name}.{weight}" for name, module in patient.model.named_modules() if isinstance(module, kind)]
    if not names:
        return [not_applicable(check, without)]
    found = {name: _norms(patient)[name] or 0.0 for name in names}
    worst = min(found, key=found.get)
    ok = all(0 < norm < float("inf") for norm in found.values())
    return [Result(check, found[worst], "> 0, finite", ok, worst if not ok else f"least of {len(names)}", found)]


def _norms(patient: Patient) -> dict[str, float | None]:
    """The norm of every parameter's gradient after one training step's forward and backward; None where there is none."""
    if "gradient norms" in patient.shared:
        return patient.shared["gradient norms"]
    model = patient.model
    model.train()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(patient.seed)
            model(**patient.batch(patient.thinking[:ROWS])).loss.backward()
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        norms = {name: None if p.grad is None else p.grad.double().norm().item() for name, p in parameters.items()}
    finally:
        model.zero_grad(set_to_none=True)
        model.eval()
        getattr(patient.bare, "forget_scores", lambda: None)()
    return patient.shared.setdefault("gradient norms", norms)
