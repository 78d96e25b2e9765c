"""An exponential moving average of a model's weights, for evaluation (Polyak averaging).

    average = WeightAverage(model, decay=0.999)
    average.update(model, step)                 # after optimizer step number `step`, from 0
    with average.in_place_of(model):            # the model computes with the average in here
        evaluate(model)

The decay warms up as min(decay, (1 + step) / (10 + step)): else early averages would be little but the first weights.
"""

from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """The average of every floating-point parameter and buffer; what is no number is the model's own."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.values = [value.detach().clone() for value in _averaged(model)]

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take the weights after optimizer step number `step` (from 0) in."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [value.detach() for value in _averaged(model)], 1 - decay)

    @contextmanager
    @torch.no_grad()
    def in_place_of(self, model: nn.Module):
        """Exchange the model's values with the average, and back."""
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    def _exchange(self, model: nn.Module) -> None:
        for i, value in enumerate(_averaged(model)):
            self.values[i], value.data = value.data, self.values[i]

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The average by name."""
        return dict(zip(_names(model), self.values))

    def load(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Go on from a `state`. ValueError where names differ."""
        names = _names(model)
        if names != list(state):
            raise ValueError(f"the average is of other weights: {', '.join(sorted({*names} ^ state.keys())[:5])}")
        for value, saved in zip(self.values, state.values()):
            value.copy_(saved)


def _named(model: nn.Module):
    """Parameters and persistent buffers with a number to average, each once."""
    seen = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if value.is_floating_point() and id(value) not in seen:
            seen.add(id(value))
            yield name, value


def _averaged(model: nn.Module) -> list[Tensor]:
    return [value for _, value in _named(model)]


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in _named(model)]
