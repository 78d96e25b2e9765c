"""A few rows of every generated evaluation set, for the tests of sets and of their checks."""

from dataclasses import replace
from functools import cache

from data import ood
from data.ood_sets import PRESETS, SWAP_OFFICIAL, EvalSet

GENERATED = [(preset.name, name) for preset in PRESETS.values() for name in preset.sets if name != SWAP_OFFICIAL]
FEW = 6  # rows or pairs


def spec_of(preset: str, name: str, size: int = FEW) -> EvalSet:
    return replace(PRESETS[preset].sets[name], size=size)


@cache
def few_rows(preset: str, name: str) -> tuple[dict, ...]:
    """FEW rows or pairs of a set, whatever the rules make of them."""
    return tuple(ood.draw_once(name, spec_of(preset, name), 0, set())[0])
