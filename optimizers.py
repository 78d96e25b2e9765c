"""Optimizers by name, their groups and rates, and the learning-rate schedule as a function of the step (no state to lose).

    optimizer = build_optimizer(model, config)           # adamw, sgd, muon or mugrokfast; every trainable parameter once
    rate = set_rates(optimizer, step, total, warmup, config)
    with update_norms(optimizer) as norms:               # copies the weights: only on steps that are logged
        optimizer.step()

`muon` moves hidden matrices with torch.optim.Muon and all else with AdamW; `mugrokfast` amplifies slow gradients before
(Grokfast-EMA, arXiv 2405.20233). A module may set `fixed_lr`: its own parameters then keep this rate under any optimizer
and schedule.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

# Rates of `muon_lr` (hidden matrices) and `lr` (the rest), and the strength of the filter, by `optimizer_phase`.
PHASES: dict[int, dict[str, float]] = {
    1: {"muon_lr": 5e-3, "lr": 5e-4, "grokfast_lambda": 0.02},
    3: {"muon_lr": 5e-4, "lr": 5e-4, "grokfast_lambda": 0.1},
    5: {"muon_lr": 1e-3, "lr": 1e-3, "grokfast_lambda": 2.0},
    6: {"muon_lr": 1e-4, "lr": 1e-4, "grokfast_lambda": 0.2},
    7: {"muon_lr": 5e-4, "lr": 5e-4, "grokfast_lambda": 0.15},
}
WITH_MUON = ("muon", "mugrokfast")
NOT_HIDDEN = re.compile(r"wte|wpe|\w*embed\w*|\w*position\w*|\w*head")  # a part of a parameter's dotted name

# ---------------------------------------------------------------- by name


def build_optimizer(model: nn.Module, config) -> torch.optim.Optimizer:
    """The run's optimizer over exactly the trainable parameters; weight decay on all of them (stock).

    Each group carries `initial_lr`, which `set_rates` scales. Loading a state keeps the options of this config.
    """
    build = {"adamw": _adamw, "sgd": _sgd, "muon": _muon, "mugrokfast": _muon}[config.optimizer]
    optimizer = build(model, config)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]

    def keep_options(optimizer) -> None:
        for group, given in zip(optimizer.param_groups, options):
            group.update(given)

    optimizer.register_load_state_dict_post_hook(keep_options)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(held) == sorted(trained), "the optimizer must hold every trainable parameter once"
    return optimizer


def can_skip(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer leaves everything as it is when its `found_inf` (a tensor) is 1, without the host looking."""
    return bool(optimizer.defaults.get("fused"))


def _adamw(model: nn.Module, config):
    groups = [{"params": list(routes(model, hidden=False)["rest"])}, *_fixed_groups(model)]
    return torch.optim.AdamW(_with_parameters(groups), **_adamw_options(groups, config))


def _sgd(model: nn.Module, config):
    groups = [{"params": list(routes(model, hidden=False)["rest"])}, *_fixed_groups(model)]
    return torch.optim.SGD(_with_parameters(groups), lr=config.lr, momentum=0.9, weight_decay=config.weight_decay)


def _muon(model: nn.Module, config):
    route = routes(model)
    if not route["hidden"]:
        raise ValueError(f"optimizer: {config.optimizer} finds no hidden matrix to train in this model; use adamw")
    preset = phase_preset(getattr(config, "optimizer_phase", 1))
    muon_lr, strength = (getattr(config, key, None) for key in ("muon_lr", "grokfast_lambda"))
    groups = _with_parameters([{"params": route["rest"], "name": "rest"}, *_fixed_groups(model)])
    return MuGrokfast(
        [{"params": route["hidden"], "name": "hidden"}],
        groups,
        {"lr": preset["muon_lr"] if muon_lr is None else muon_lr, "weight_decay": config.weight_decay},
        _adamw_options(groups, config),
        strength=0.0 if config.optimizer == "muon" else preset["grokfast_lambda"] if strength is None else strength,
        decay=getattr(config, "grokfast_alpha", 0.98),
    )


def _adamw_options(groups: list[dict], config) -> dict:
    parameters = [p for group in groups for p in group["params"]]
    fused = bool(parameters) and parameters[0].device.type in ("cuda", "cpu")
    return {"lr": config.lr, "betas": (0.9, config.adam_beta2), "weight_decay": config.weight_decay, "fused": fused}


def _fixed_groups(model: nn.Module) -> list[dict]:
    fixed = routes(model)["fixed"]
    return [
        {"params": [p for p in fixed if fixed[p] == rate], "name": f"fixed {rate:g}", "lr": rate, "scheduled": False}
        for rate in sorted(set(fixed.values()))
    ]


def _with_parameters(groups: list[dict]) -> list[dict]:
    return [group for group in groups if group["params"]]


# ---------------------------------------------------------------- presets


def phase_preset(phase: int) -> dict[str, float]:
    """{"muon_lr", "lr", "grokfast_lambda"} of a training phase. ValueError that lists the known ones."""
    if not isinstance(phase, int) or phase not in PHASES:
        raise ValueError(f"optimizer_phase: {phase!r} is unknown; known: {', '.join(map(str, PHASES))}")
    return PHASES[phase]


def with_preset(values: dict) -> dict:
    """Raw config values with what `optimizer: muon` or `mugrokfast` takes from `optimizer_phase` (1), where not given."""
    if values.get("optimizer") not in WITH_MUON:
        return values
    given = {key: value for key, value in values.items() if value is not None}
    preset = {"adam_beta2": 0.95, **phase_preset(given.get("optimizer_phase", 1))}
    if values["optimizer"] == "muon":
        preset["grokfast_lambda"] = 0.0
    return preset | given


# ---------------------------------------------------------------- which parameter goes where


def routes(model: nn.Module, hidden: bool = True) -> dict:
    """The trainable parameters, each once, in the order of the model, by module and name.

    "hidden": matrices of linear maps inside the model, with more than one row and column; "rest": embeddings, positions, the
    head (also where it is tied), norms, biases, one-row matrices and parameters of other modules; with `hidden=False` the
    hidden ones, too. "fixed": {parameter: rate} of modules that set `fixed_lr`.
    """
    from transformers.pytorch_utils import Conv1D  # slow to import, and reading a config needs only the presets

    matrices = (nn.Linear, Conv1D, nn.MultiheadAttention)
    heads = [module.get_output_embeddings() for module in model.modules() if hasattr(module, "get_output_embeddings")]
    where: dict[nn.Parameter, bool] = {}
    fixed: dict[nn.Parameter, float] = {}
    for module_name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if getattr(module, "fixed_lr", None) is not None:
                fixed[parameter] = float(module.fixed_lr)
            inside = isinstance(module, matrices) and not any(module is head for head in heads)
            inside = inside and not any(NOT_HIDDEN.fullmatch(part) for part in module_name.split("."))
            matrix = parameter.ndim == 2 and min(parameter.shape) > 1
            where[parameter] = where.get(parameter, True) and inside and matrix
    free = [p for p in where if p not in fixed]
    return {
        "hidden": [p for p in free if hidden and where[p]],
        "rest": [p for p in free if not (hidden and where[p])],
        "fixed": fixed,
    }


# ---------------------------------------------------------------- Muon and AdamW behind a filter


class MuGrokfast(torch.optim.Optimizer):
    """torch.optim.Muon and torch.optim.AdamW over groups of one optimizer, behind an exponential filter of the gradients.

    Before a step mu <- decay * mu + (1 - decay) * g, beginning with the first gradient, and g <- g + strength * mu in place:
    what stays over some 1 / (1 - decay) steps grows by 1 + strength, what alternates does not. With strength 0 there is no
    filter. The state of a parameter is that of its optimizer and `slow_gradient` (mu). Groups keep the rates that are
    written to them; `algorithm` says which of both moves them.

    Muon multiplies its rate by sqrt(max(1, rows / columns)) of the tensor as it is stored (GPT-2's Conv1D: inputs x outputs).
    """

    def __init__(self, hidden: list[dict], rest: list[dict], muon: dict, adamw: dict, strength: float, decay: float):
        if not strength >= 0:
            raise ValueError(f"grokfast_lambda: {strength} must not be negative")
        if not 0 <= decay < 1:
            raise ValueError(f"grokfast_alpha: {decay} must be at least 0 and less than 1")
        self.inner: dict[str, torch.optim.Optimizer] = {"muon": torch.optim.Muon(hidden, **muon)}
        if rest:
            self.inner["adamw"] = torch.optim.AdamW(rest, **adamw)
        groups = []
        for algorithm, optimizer in self.inner.items():
            extra = {"algorithm": algorithm, "grokfast_lambda": strength, "grokfast_alpha": decay}
            groups += [group | extra for group in optimizer.param_groups]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure=None):
        """Filter the gradients, then let both optimizers move their parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        begun = [pair for group in self.param_groups if group["grokfast_lambda"] > 0 for pair in self._filter(group)]
        for algorithm, optimizer in self.inner.items():
            # Loading a state replaces both; what the inner optimizers remember is kept here and nowhere else.
            optimizer.state = self.state
            optimizer.param_groups = [group for group in self.param_groups if group["algorithm"] == algorithm]
            optimizer.step()
        for parameter, slow in begun:  # only now: to AdamW a state that is not empty is one of its own
            self.state[parameter]["slow_gradient"] = slow
        return loss

    def _filter(self, group: dict) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """Filter a group's gradients; returns the parameters whose filter begins here, with its value."""
        begun = []
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            slow = self.state.get(parameter, {}).get("slow_gradient")
            if slow is None:
                slow = parameter.grad.clone()
                begun.append((parameter, slow))
            else:
                slow.lerp_(parameter.grad, 1 - group["grokfast_alpha"])
            parameter.grad.add_(slow, alpha=group["grokfast_lambda"])
        return begun


# ---------------------------------------------------------------- rates


def learning_rate(step: int, total: int, warmup: int, config, peak: float | None = None) -> float:
    """The rate of update `step` (from 0) of `total`, up to `peak` (config.lr): constant (stock), or warm-up, then cosine.

    The warm-up takes `warmup` updates, at most half of all. It goes from peak / warmup to the peak, or where the config has
    `warmup_from` from this share of it; the cosine ends at peak * min_lr_ratio, or at `min_lr` where the config has one.
    """
    peak = config.lr if peak is None else peak
    warmup, start = min(warmup, total // 2), getattr(config, "warmup_from", 0.0)
    if step < warmup:
        return peak * (start + (1 - start) * step / warmup) if start else peak * (step + 1) / warmup
    if not config.use_lr_scheduler:
        return peak
    progress = (step - warmup) / max(total - warmup, 1)
    least = getattr(config, "min_lr", None)
    ratio = config.min_lr_ratio if least is None else min(least / peak, 1.0)
    return peak * (ratio + (1 - ratio) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def set_rates(optimizer: torch.optim.Optimizer, step: int, total: int, warmup: int, config) -> float:
    """Give every group the rate of update `step` on its own scale; returns that of config.lr, for the log."""
    for group in optimizer.param_groups:
        peak = group["initial_lr"]
        group["lr"] = learning_rate(step, total, warmup, config, peak) if group.get("scheduled", True) else peak
    return learning_rate(step, total, warmup, config)


@contextmanager
def update_norms(optimizer: torch.optim.Optimizer) -> Iterator[dict[str, torch.Tensor]]:
    """Around `step()`: how far the weights moved (L2), {"all": norm, group name: norm}, tensors on the device, afterwards.

    Costs a copy of the weights for the while, and no waiting for the device.
    """
    groups = {group.get("name", f"group {i}"): group["params"] for i, group in enumerate(optimizer.param_groups)}
    before = {name: [p.detach().clone() for p in parameters] for name, parameters in groups.items()}
    norms: dict[str, torch.Tensor] = {}
    yield norms
    for name, parameters in groups.items():
        moved = torch.nn.utils.get_total_norm([p.detach() - old for p, old in zip(parameters, before[name])])
        norms[name] = moved.full_tensor() if hasattr(moved, "full_tensor") else moved
    norms["all"] = torch.stack([norm.to(torch.float32) for norm in norms.values()]).norm()
