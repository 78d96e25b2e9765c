"""What the ablations consist of: their YAML, a training for each value of each sweep and seed, and the jobs in their order.

    plan = Plan(load_ablations(Path("args/ablations.yaml")), quick=True)
    jobs = plan.jobs()             # data, what runs start from, trainings
    plan.points[0].scores          # where the accuracies by forced number of thoughts go

A sweep changes one key of a base config and nothing else. Seeds are those of initial weights, order of rows and drawn stages.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from analysis.factorial_plan import FIXED, ROOT, Member, as_yaml
from analysis.jobs import Job
from analysis.settings_files import checked, read_yaml
from analysis.study_plan import Made
from utils import load_config

# ---------------------------------------------------------------- the YAML


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Sweep(Strict):
    """Values of one key of a config. `start`: a config that is trained once for each seed, whose checkpoint runs begin from."""

    key: str
    values: list[Any] = Field(min_length=1)
    base: str
    start: str | None = None
    overrides: dict[str, Any] = {}
    test: str
    minutes: float = Field(0.0, ge=0)  # of one training, for the plan


class Quick(Strict):
    """What --quick changes: `values` of sweeps by name, `overrides` of all configs."""

    values: dict[str, list[Any]] = {}
    overrides: dict[str, Any] = {}
    num_samples: int = Field(16, ge=1)


class AblationConfig(Strict):
    """The YAML of ablations."""

    name: str
    results: str = "ablation/results"
    runs: str
    data: list[Made] = []
    sweeps: dict[str, Sweep] = Field(min_length=1)
    seeds: list[int] = Field([0], min_length=1)
    counts: list[int] = Field(list(range(7)), min_length=1)
    num_samples: int | None = Field(None, ge=1)
    processes: int = Field(1, ge=1)
    nproc_per_node: int = Field(1, ge=1)
    quick: Quick = Quick()


def load_ablations(path: Path) -> AblationConfig:
    """Read and check a YAML and the config of every training. ValueError with all problems in one line."""
    found = checked(AblationConfig, read_yaml(path, "ablation config"), path)
    problems = []
    for name, sweep in found.sweeps.items():
        if Path(name).name != name or name in (".", ".."):
            problems.append(f"sweeps: {name!r} must be a plain folder name")
        if len({str(value) for value in sweep.values}) < len(sweep.values):
            problems.append(f"sweeps.{name}.values: {sweep.values} has one twice")
        if sweep.key in ("seed", "name", "save_path", *sweep.overrides):
            problems.append(f"sweeps.{name}.key: {sweep.key} is set elsewhere")
    if min(found.counts) < 0 or len(set(found.counts)) < len(found.counts):
        problems.append(f"counts: {found.counts} must be different numbers of thoughts, none below 0")
    if unknown := [name for name in found.quick.values if name not in found.sweeps]:
        problems.append(f"quick.values: {unknown[0]} is no sweep; there are {', '.join(found.sweeps)}")
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}")
    try:
        Plan(found)
        Plan(found, quick=True)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return found


# ---------------------------------------------------------------- one training


@dataclass(frozen=True, eq=False)
class Point(Member):
    """The training of one value of a sweep under a seed. `cell` is "<sweep>-<value>"."""

    sweep: str = ""
    value: Any = None
    data: str = ""  # the test file
    start: "Point | None" = None
    minutes: float = 0.0
    nproc_per_node: int = 1

    @property
    def test(self) -> Path:
        return Path(self.data)

    @property
    def last_checkpoint(self) -> Path:
        """What runs that start from this one load."""
        return self.folder / f"checkpoint_{self.config.num_epochs}"

    def command(self) -> list[str]:
        if self.nproc_per_node == 1:
            return super().command()
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.nproc_per_node}"]
        python, *rest = super().command()
        return [python, *launch, *rest]


# ---------------------------------------------------------------- the plan


class Plan:
    """All trainings: `points` in the order of sweeps, values and seeds, and the `starts` that they begin from.

    `quick` is the YAML's small version, with a run folder and results of its own.
    """

    def __init__(self, config: AblationConfig, quick: bool = False):
        self.config, self.quick = config, quick
        self.name = config.name + ("-quick" if quick else "")
        self.out, self.runs = Path(config.results) / self.name, Path(config.runs) / self.name
        self.num_samples = config.quick.num_samples if quick else config.num_samples
        self.starts: dict[str, Point] = {}
        self.points = [
            self._point(name, sweep, value, seed)
            for name, sweep in config.sweeps.items()
            for value in (config.quick.values.get(name, sweep.values) if quick else sweep.values)
            for seed in (config.seeds[:1] if quick else config.seeds)
        ]

    def _point(self, name: str, sweep: Sweep, value: Any, seed: int) -> Point:
        start = None
        if sweep.start:
            cell = f"start-{Path(sweep.start).stem}"
            start = self.starts.get(f"{cell}-s{seed}") or self._made(cell, sweep.start, seed, {})
            self.starts[start.label] = start
        given = {**sweep.overrides, sweep.key: value} | ({"load_model_path": str(start.last_checkpoint)} if start else {})
        about = {"sweep": name, "value": value, "data": sweep.test, "start": start, "minutes": sweep.minutes}
        return self._made(f"{name}-{value}", sweep.base, seed, given, **about)

    def _made(self, cell: str, base: str, seed: int, given: dict[str, Any], **about) -> Point:
        own = {"seed": seed, "name": f"{cell}-s{seed}", "save_path": str(self.runs)}
        overrides = {**(self.config.quick.overrides if self.quick else {}), **given, **own}
        if fixed := [key for key in self.config.quick.overrides if key in FIXED and key not in ("train_path", "val_path")]:
            raise ValueError(f"quick.overrides.{fixed[0]}: is set by the sweeps; leave it out")
        config = load_config(base, [f"{key}={as_yaml(x)}" for key, x in overrides.items()])
        path = base if Path(base).is_absolute() else str(ROOT / base)
        return Point(cell, seed, path, overrides, config, self.out, nproc_per_node=self.config.nproc_per_node, **about)

    def jobs(self) -> list[Job]:
        """Data first, then what runs start from, then the trainings; seeds one after the other."""
        data = [self._data_job(i, made) for i, made in enumerate(self.config.data)]
        have_data, logs = tuple(job.name for job in data), self.out / "logs"
        trainings = []
        for member in sorted([*self.starts.values(), *self.points], key=lambda m: (m.seed, m.start is not None)):
            needs = have_data + ((f"train {member.start.label}",) if member.start else ())
            log = logs / f"{member.label}.log"
            trainings.append(Job(f"train {member.label}", member.command(), log, member.done, needs, hours=member.minutes / 60))
        return [*data, *trainings]

    def _data_job(self, number: int, made: Made) -> Job:
        files, log = [Path(path) for path in made.files], self.out / "logs" / "data.log"
        return Job(f"data {number}", [sys.executable, *made.command], log, lambda: all(path.is_file() for path in files))
