"""Optimizers by name, and the learning-rate schedule as a function of the step (no state to save or lose)."""

import math

import torch
from torch import nn


def build_optimizer(model: nn.Module, config) -> torch.optim.Optimizer:
    """The run's optimizer over exactly the trainable parameters; weight decay on all of them (stock)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = OPTIMIZERS[config.optimizer](parameters, config)
    held = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert held == sum(p.numel() for p in parameters), "the optimizer must hold every trainable parameter once"
    return optimizer


def can_skip(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer leaves everything as it is when its `found_inf` (a tensor) is 1, without the host looking."""
    return bool(optimizer.defaults.get("fused"))


def _adamw(parameters, config):
    fused = parameters[0].device.type in ("cuda", "cpu")
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=(0.9, config.adam_beta2), weight_decay=config.weight_decay, fused=fused
    )


def _sgd(parameters, config):
    return torch.optim.SGD(parameters, lr=config.lr, momentum=0.9, weight_decay=config.weight_decay)


OPTIMIZERS = {"adamw": _adamw, "sgd": _sgd}


def learning_rate(step: int, total: int, warmup: int, config) -> float:
    """The rate of update `step` (from 0) of `total`: constant (stock), or linear warm-up then cosine to lr * min_lr_ratio."""
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if not config.use_lr_scheduler:
        return config.lr
    progress = (step - warmup) / max(total - warmup, 1)
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
