"""The settings of a noise experiment: the keys of args/noise_*.yaml, the flags of the same names, and their defaults.

    settings = read_settings(["args/noise_quick.yaml", "--checkpoint", "runs/prosqa/prosqa-coconut", "--num-questions", "100"])
    settings.kinds()          # [("gaussian_scaled", None)]: types and directions, one sweep each
    settings.scales_of(*kind) # [0, 0.5, 1, ...]

A flag wins over the file. `num_questions: all` takes all of a test set.
"""

import argparse
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from analysis.command import parser_of
from analysis.noise_fits import in_order
from analysis.noise_operators import DIRECTIONS, NOISE_TYPES, SCHEDULES, Noise
from analysis.settings_files import checked, read_yaml

STOCHASTIC = ("gaussian", "gaussian_scaled", "snr", "uniform", "orthogonal", "dropout")  # targeted across is orthogonal
EVERY = (*((name, None) for name in STOCHASTIC), ("targeted", "same"), ("targeted", "opposite"))
ABSOLUTE = (0, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
RELATIVE = (0, 0.1, 0.2, 0.5, 1, 2, 5)
SWEEPS = {
    ("gaussian", None): ABSOLUTE,
    ("uniform", None): ABSOLUTE,
    ("gaussian_scaled", None): RELATIVE,
    ("targeted", "same"): RELATIVE,
    ("orthogonal", None): (*RELATIVE, 10),
    ("targeted", "random_orthogonal"): (*RELATIVE, 10),
    ("snr", None): (0, 100, 50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.01),
    ("targeted", "opposite"): tuple(i / 10 for i in range(11)),
    ("dropout", None): (0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1),
}

FLAGS = {
    "checkpoint": "run folder or checkpoint file of a trained model",
    "epoch": "of a run folder: final, best or a number N (default: final)",
    "model": "or an untrained model: hub id or folder",
    "virtual_latents": "thought slots of an untrained model (default: 8)",
    "device": "auto, cpu, cuda (default: auto)",
    "dtype": "float32, bfloat16, float16 or float64 (default: as loaded)",
    "batch_size": "rows at a time, questions x scales (default: by device)",
    "benchmark": "gsm8k, prontoqa, prosqa; untrained models also gsm-symbolic, mmlu (default: the checkpoint's test file, gsm8k)",
    "data": "another data file",
    "num_questions": "the first so many, or all (default: 50)",
    "question_seed": "a random sample instead of the first",
    "max_new_tokens": "default: the checkpoint's own; 512 for untrained models",
    "noise_type": "one or more types, or all (default: gaussian_scaled)",
    "noise_direction": "of targeted noise: same, opposite or random_orthogonal",
    "scales": "0 is no noise, for snr too (default: by type)",
    "noise_passes": "all, first, or slots counted from 1 (default: all)",
    "injection_step": "slot of the full scale, from 1; later ones follow the schedule (default: 1)",
    "schedule": "none, constant, linear, cosine, exponential or adaptive (default: constant)",
    "lambda_decay": "of the last two schedules (default: 0.5)",
    "noise_layer": "entry of hidden_states that is fed back; changes the clean baseline, too (default: -1)",
    "noise_chain": "recompute: later thoughts follow from noisy ones; replay: they are held (default: recompute)",
    "seed": "of the noise (default: 0)",
    "checkpoint_interval": "questions between two checkpoint_<n>.json (default: 50)",
    "output_dir": "default: results/noisy_coconut",
    "breakdown_absolute": "breakdown below this accuracy instead of half the clean one",
}
MANY = ("noise_type", "scales", "noise_passes")
SWITCHES = {
    "comprehensive": "all stochastic types, each below its own folder",
    "save_results": "also keep a dated copy, results_<time>.json",
}
Positive = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """Every key of the YAML; files that ask for branches (`num_branches`) have more, see branching.py."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True, protected_namespaces=())

    checkpoint: Path | None = None
    epoch: str = "final"
    model: str | None = None
    virtual_latents: Positive = 8
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    batch_size: Positive | None = None
    benchmark: str | None = None
    data: Path | None = None
    num_questions: Positive | Literal["all"] = 50
    question_seed: int | None = None
    max_new_tokens: Positive | None = None
    noise_type: list[str] = ["gaussian_scaled"]
    noise_direction: str | None = None
    scales: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None = Field(None, min_length=1)
    noise_passes: Literal["all", "first"] | list[Positive] = "all"
    injection_step: Positive = 1
    schedule: str = "constant"
    lambda_decay: float = Field(0.5, ge=0, allow_inf_nan=False)
    noise_layer: int = -1
    noise_chain: Literal["recompute", "replay"] = "recompute"
    seed: int = 0
    checkpoint_interval: Positive = 50
    output_dir: Path = Path("results/noisy_coconut")
    breakdown_absolute: float | None = Field(None, ge=0, le=1)
    comprehensive: bool = False
    save_results: bool = False

    @field_validator("noise_type", mode="before")
    @classmethod
    def _one_is_a_list(cls, value):
        return [value] if isinstance(value, str) else value

    @field_validator("scales", mode="before")
    @classmethod
    def _one_scale_is_a_list(cls, value):
        return [value] if isinstance(value, int | float) else value

    @field_validator("noise_passes", mode="before")
    @classmethod
    def _slots(cls, value):
        if isinstance(value, list) and len(value) == 1 and value[0] in ("all", "first"):
            return value[0]
        return [value] if isinstance(value, int) else value

    def kinds(self) -> list[tuple[str, str | None]]:
        """Types and directions to sweep. ValueError for unknown ones."""
        if self.comprehensive:
            return [(name, None) for name in STOCHASTIC]
        if self.noise_type == ["all"]:
            return list(EVERY)
        default = self.noise_direction or "same"
        kinds = [(name, default if name == "targeted" else None) for name in self.noise_type]
        for kind in kinds:
            Noise(*kind)
        return kinds

    def scales_of(self, noise_type: str, direction: str | None) -> list[float]:
        """The scales of a sweep, from no noise to the strongest."""
        return in_order(noise_type, self.scales or SWEEPS[noise_type, direction])

    def noise(self, noise_type: str, direction: str | None) -> Noise:
        """The noise of a sweep. ValueError for what does not exist."""
        passes = tuple(self.noise_passes) if isinstance(self.noise_passes, list) else self.noise_passes
        return Noise(noise_type, direction, passes, self.injection_step, self.schedule, self.lambda_decay, self.seed)

    @property
    def n_questions(self) -> int | None:
        return None if self.num_questions == "all" else self.num_questions


def parser(doc: str) -> argparse.ArgumentParser:
    """The command line: a YAML and flags, one a key."""
    made = parser_of(doc, "python -m analysis.noise")
    made.add_argument("config", nargs="?", type=Path, help="args/noise_*.yaml")
    for name, about in FLAGS.items():
        names = {f"--{name.replace('_', '-')}", f"--{name}"}
        made.add_argument(*sorted(names), dest=name, nargs="+" if name in MANY else None, help=about)
    for name, about in SWITCHES.items():
        made.add_argument(*sorted({f"--{name.replace('_', '-')}", f"--{name}"}), action="store_true", default=None, help=about)
    return made


def read_settings(argv: list[str], doc: str = "") -> Settings:
    """Settings of a command line. ValueError: one line with every problem."""
    given = vars(parser(doc).parse_args(argv))
    path = given.pop("config")
    values, source = ({}, "command line") if path is None else (read_yaml(path), str(path))
    return check_settings(values | {name: value for name, value in given.items() if value is not None}, source)


def asks_for_branches(argv: list[str]) -> bool:
    """Whether the YAML of a command line is about branches and votes: it has `num_branches`."""
    files = [Path(word) for word in argv if word.endswith((".yaml", ".yml"))]
    return any("num_branches" in read_yaml(path) for path in files[:1])


def check_settings(values: dict, source: str) -> Settings:
    """Validated settings; `source` names them in the error."""
    settings = checked(Settings, {key: value for key, value in values.items() if value is not None}, source)
    if (settings.checkpoint is None) == (settings.model is None):
        raise ValueError(f"{source}: give --checkpoint (a trained run) or --model (an untrained model), one of them")
    if settings.schedule not in SCHEDULES:
        raise ValueError(f"{source}: Unknown schedule {settings.schedule!r}; known: {', '.join(SCHEDULES)}")
    if settings.noise_direction not in (None, *DIRECTIONS):
        raise ValueError(f"{source}: Unknown noise_direction {settings.noise_direction!r}; known: {', '.join(DIRECTIONS)}")
    unknown = [name for name in settings.noise_type if name not in (*NOISE_TYPES, "all")]
    if unknown:
        raise ValueError(f"{source}: Unknown noise_type {unknown[0]!r}; known: {', '.join(NOISE_TYPES)}, or all")
    return settings
