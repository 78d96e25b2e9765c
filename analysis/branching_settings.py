"""The settings of branches: those of a noise experiment (noise_settings.py), and what belongs to branches alone.

    settings = read_settings(["args/noise_branch.yaml", "--checkpoint", "runs/prosqa/prosqa-coconut", "--num-branches", "7"])
    for name, one in settings.variants(): one.cells()       # every scale and none, at temperature 0 and at the given one

A YAML may have `variants: {name: {key: value}}`: experiments that change some keys, each with a folder of its own. A flag wins
over the file, also over its variants.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from analysis.branching_rollout import Cell
from analysis.noise_operators import Noise
from analysis.noise_settings import Settings, check_settings, parser
from analysis.settings_files import checked, read_yaml

DEFAULTS = {"schedule": "none", "scales": [0.0, 0.2, 0.5, 1.0]}
OWN_FLAGS = {
    "num_branches": "answers to each question (default: 5)",
    "temperature": "beside 0, which is always run (default: 0.7)",
    "top_p": "tokens are drawn from those that make up this probability (default: 0.9)",
    "sampling_seed": "of the tokens (default: 0)",
}
FIXED = ("checkpoint", "model", "data", "benchmark", "num_questions", "question_seed", "noise_layer", "output_dir")


class Own(BaseModel):
    """The keys that sweeps do not have."""

    model_config = ConfigDict(extra="forbid")

    num_branches: int = Field(5, ge=2)
    temperature: float = Field(0.7, gt=0, allow_inf_nan=False)  # 0 is always run beside it
    top_p: float = Field(0.9, gt=0, le=1)
    sampling_seed: int = 0


@dataclass(frozen=True)
class Branches:
    """One experiment with branches: the noise, a number of branches, and the grid of its cells."""

    settings: Settings
    own: Own

    @property
    def kind(self) -> tuple[str, str | None]:
        """Type and direction of the noise."""
        (kind,) = self.settings.kinds()
        return kind

    @property
    def noise(self) -> Noise:
        return self.settings.noise(*self.kind)

    def cells(self) -> list[Cell]:
        """{no noise, every scale} x {temperature 0, the other}."""
        scales = [0.0, *(s for s in self.settings.scales_of(*self.kind) if s != 0)]
        return [Cell(scale, temperature) for scale in scales for temperature in (0.0, self.own.temperature)]


@dataclass(frozen=True)
class BranchSettings:
    """What a command line asks for. `own`: the keys of each variant, {} where the YAML has no variants."""

    values: dict[str, Any]
    own: dict[str, dict[str, Any]]
    source: str

    @property
    def base(self) -> Branches:
        """The experiment without its variants' changes."""
        return _branches(self.values, self.source)

    def variants(self) -> list[tuple[str, Branches]]:
        """(name, experiment) of each variant; one without a name where there are none. ValueError for mistakes."""
        if not self.own:
            return [("", self.base)]
        return [(name, _branches(self.values | own, f"{self.source}: variants.{name}")) for name, own in self.own.items()]


def read_settings(argv: list[str], doc: str = "") -> BranchSettings:
    """Settings of a command line. ValueError: one line that names file and key."""
    made = parser(doc)
    made.prog = "python -m analysis.branching"
    for name, about in OWN_FLAGS.items():
        made.add_argument(f"--{name.replace('_', '-')}", f"--{name}", dest=name, help=about)
    return _merged(made.parse_args(argv))


def _merged(args: argparse.Namespace) -> BranchSettings:
    given = {name: value for name, value in vars(args).items() if value is not None}
    path = given.pop("config", None)
    held = {} if path is None else read_yaml(path)
    source = "command line" if path is None else str(path)
    own = held.pop("variants", None) or {}
    if not isinstance(own, dict) or not all(isinstance(changes, dict) for changes in own.values()):
        raise ValueError(f"{source}: variants: must be names, each with the keys that it changes")
    for name, changes in own.items():
        if Path(str(name)).name != str(name) or str(name) in (".", ".."):
            raise ValueError(f"{source}: variants: {name!r} must be a plain folder name")
        if fixed := [key for key in FIXED if key in changes]:
            raise ValueError(f"{source}: variants.{name}.{fixed[0]}: is the same for all variants; set it above them")
    own = {str(name): changes | {key: given[key] for key in changes if key in given} for name, changes in own.items()}
    settings = BranchSettings(DEFAULTS | held | given, own, source)
    settings.variants()
    return settings


def _branches(values: dict[str, Any], source: str) -> Branches:
    own = checked(Own, {key: values[key] for key in Own.model_fields if values.get(key) is not None}, source)
    settings = check_settings({key: value for key, value in values.items() if key not in Own.model_fields}, source)
    if settings.comprehensive or len(settings.kinds()) != 1:
        raise ValueError(f"{source}: noise_type: branches take one type; put several under `variants`")
    if not any(settings.scales or ()):
        raise ValueError(f"{source}: scales: one above 0 is needed; no noise is always run beside it")
    return Branches(settings, own)
