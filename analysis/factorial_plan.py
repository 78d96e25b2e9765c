"""What a factorial study consists of: its YAML, its eight cells and reference rows, the data of each seed, the jobs.

    plan = Plan(load_factorial(Path("args/lahr_factorial.yaml")), seeds=[0, 1], cells=["baseline", "A"])
    plan.make_data()                   # results/<name>/data/s<seed>/{train,val,test}.json
    jobs = plan.jobs()                 # a training for each cell and seed, then a seed's scores

A is `feedback_mode: continuous` (off: `pause_curriculum`, with the same markers, curriculum and data), B and C are `use_mod`
and `use_memory` of the backbone. A seed is that of initial weights, data, order of rows, and dropout, in all cells.
"""

import io
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from analysis.factorial_stats import BASELINE, CELLS
from analysis.jobs import Job
from analysis.settings_files import checked, explained, read_yaml
from checkpoint import numbered_checkpoints
from data import cot
from files import read_json, read_jsonl, write_json, write_whole
from utils import Config, load_config

ROOT = Path(__file__).resolve().parents[1]
SPLITS = ("train", "val", "test")
FIXED = ("seed", "name", "save_path", "train_path", "val_path", "feedback_mode")  # what cells and seeds set
FLAGS = {"B": "use_mod", "C": "use_memory"}

# ---------------------------------------------------------------- the YAML


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Data(Strict):
    """The rows of each seed, from data/cot.py."""

    kind: Literal["basic", "multistep"] = "basic"
    n_samples: int = Field(2000, ge=1)
    val_samples: int = Field(200, ge=1)
    test_samples: int = Field(400, ge=1)


class Reference(Strict):
    """A row outside the design: a cell with other keys of run.py's config (`model_config` is merged)."""

    cell: str = BASELINE
    overrides: dict[str, Any] = Field(min_length=1)
    about: str = ""

    @field_validator("cell")
    @classmethod
    def _known(cls, value):
        return _known_cells([value])[0]


class Quick(Strict):
    """What --quick changes."""

    cells: list[str] = [BASELINE, "ABC"]
    n_seeds: int = Field(2, ge=1)
    overrides: dict[str, Any] = {}
    data: dict[str, Any] = {}


class FactorialConfig(Strict):
    """A factorial study's YAML."""

    name: str
    results: str = "results"
    base: str
    overrides: dict[str, Any] = {}
    data: Data = Data()
    seeds: list[int] = Field([0, 1, 2, 3, 4], min_length=1)
    cells: list[str] = list(CELLS)
    references: dict[str, Reference] = {}
    processes: int = Field(1, ge=1)
    alpha: float = Field(0.05, gt=0, lt=1)
    futility_stop: bool = True
    minutes: float = Field(0.0, ge=0)  # of one training, for --dry-run
    quick: Quick = Quick()

    @field_validator("cells")
    @classmethod
    def _cells(cls, value):
        return _known_cells(value)

    @field_validator("seeds")
    @classmethod
    def _once(cls, value):
        if len(set(value)) < len(value):
            raise ValueError(f"{value} has one twice")
        return value


def _known_cells(names: Sequence[str]) -> list[str]:
    if unknown := [name for name in names if name not in CELLS]:
        raise ValueError(f"{unknown[0]!r} is no cell; known: {', '.join(CELLS)}")
    if not names:
        raise ValueError(f"at least one cell is needed; known: {', '.join(CELLS)}")
    return sorted(set(names), key=CELLS.index)


def load_factorial(path: Path) -> FactorialConfig:
    """Read and check a study's YAML, and the config of every cell. ValueError with all problems in one line."""
    study = checked(FactorialConfig, read_yaml(path, "factorial config"), path)
    problems = [] if _plain(study.name) else [f"name: {study.name!r} must be a plain folder name"]
    for where, changes in {"overrides": study.overrides, "quick.overrides": study.quick.overrides}.items():
        if fixed := [key for key in FIXED if key in changes]:
            problems.append(f"{where}.{fixed[0]}: set by the cells, seeds and data; leave it out")
        if flags := [flag for flag in FLAGS.values() if flag in (changes.get("model_config") or {})]:
            problems.append(f"{where}.model_config.{flags[0]}: set by the cells; leave it out")
    if clash := [name for name in study.references if name in CELLS or not _plain(name)]:
        problems.append(f"references.{clash[0]}: must be a plain folder name, and not that of a cell")
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}")
    try:
        Plan(study)
        Plan(study, quick=True)
    except ValidationError as error:
        raise ValueError(f"{path}: quick.data: {explained(error)}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return study


def _plain(name: str) -> bool:
    return Path(name).name == name and name not in ("", ".", "..")


# ---------------------------------------------------------------- one training


@dataclass(frozen=True, eq=False)
class Member:
    """One training: a cell (or reference row) under a seed."""

    cell: str
    seed: int
    base: str
    overrides: dict[str, Any]
    config: Config
    out: Path  # of the study

    @property
    def label(self) -> str:
        return f"{self.cell}-s{self.seed}"

    @property
    def folder(self) -> Path:
        return self.config.run_dir

    @property
    def scores(self) -> Path:
        return self.out / "scores" / f"{self.label}.json"

    @property
    def test(self) -> Path:
        return self.out / "data" / f"s{self.seed}" / "test.json"

    def command(self) -> list[str]:
        """run.py with the base config and everything that the study sets."""
        return [sys.executable, str(ROOT / "run.py"), self.base, *(f"{k}={as_yaml(v)}" for k, v in self.overrides.items())]

    def done(self) -> bool:
        """Whether the run has come to its end."""
        events = read_jsonl(self.folder / "metrics.jsonl", "event")
        return bool(events) and events[-1]["event"] == "end" and bool(numbered_checkpoints(self.folder))

    def scored(self) -> bool:
        """Whether its scores are there, and younger than its checkpoints."""
        newest = max((p.stat().st_mtime for p in self.folder.glob("checkpoint_*")), default=float("inf"))
        return self.done() and self.scores.is_file() and self.scores.stat().st_mtime > newest

    def standing(self) -> str:
        """How far it is, from its metrics."""
        events = read_jsonl(self.folder / "metrics.jsonl", "event")
        epoch = max((record["epoch"] + 1 for record in events if record["event"] in ("step", "eval")), default=0)
        return f"epoch {epoch}/{self.config.num_epochs}"

    def check(self) -> None:
        """ValueError where its folder holds a run with other settings: rows of two designs in one table would be wrong."""
        path = self.folder / "run.json"
        if not path.is_file():
            return
        held, wanted = read_json(path, "config")["config"], self.config.model_dump()
        defaults = {key: field.get_default(call_default_factory=True) for key, field in Config.model_fields.items()}
        other = [
            f"{key} ({held.get(key, defaults[key])} there)" for key in wanted if held.get(key, defaults[key]) != wanted[key]
        ]
        if other:
            what = f"{', '.join(other[:3])}{' ...' if len(other) > 3 else ''}"
            raise ValueError(f"{self.folder} was trained with another {what}; delete it, or give the study another name")


def as_yaml(value: Any) -> str:
    """A value as one line of YAML, read back as it was: false is false, 1e-6 a number."""
    return yaml.safe_dump(value, default_flow_style=True, width=float("inf"), sort_keys=False).removesuffix("...\n").strip()


def merged(*changes: dict[str, Any]) -> dict[str, Any]:
    """Overrides on top of each other; `model_config` is merged key by key."""
    found: dict[str, Any] = {}
    for change in changes:
        inner = {**found.get("model_config", {}), **(change.get("model_config") or {})}
        found |= change | ({"model_config": inner} if inner else {})
    return found


def cell_settings(cell: str) -> dict[str, Any]:
    """What makes a cell: every factor is written out, on or off."""
    return {
        "feedback_mode": "continuous" if "A" in cell else "pause_curriculum",
        "model_config": {flag: factor in cell for factor, flag in FLAGS.items()},
    }


# ---------------------------------------------------------------- the plan


class Plan:
    """A study's trainings. `cells` and `seeds` restrict what is trained, `quick` is the YAML's small version in a folder of its
    own. `members` are trained, `everyone` is also what an earlier call may have trained. ValueError where nothing is left."""

    def __init__(
        self,
        study: FactorialConfig,
        quick: bool = False,
        seeds: Sequence[int] | None = None,
        cells: Sequence[str] | None = None,
    ):
        self.study, self.quick = study, quick
        self.name = study.name + ("-quick" if quick else "")
        self.out = Path(study.results) / self.name
        self.data = Data(**(study.data.model_dump() | study.quick.data)) if quick else study.data
        self.base_options = load_config(study.base).model_options
        all_seeds = study.seeds[: study.quick.n_seeds] if quick else study.seeds
        names = [name for name in study.cells if not quick or name in study.quick.cells]
        names += [] if quick else list(study.references)
        self.everyone = [self._member(name, seed) for seed in all_seeds for name in names]
        self.seeds = [seed for seed in all_seeds if seeds is None or seed in seeds]
        for what, chosen, known in (("--seeds", seeds, all_seeds), ("--cells", cells, names)):
            if wrong := [x for x in chosen or () if x not in known]:
                raise ValueError(f"{what}: {wrong[0]} is not in the study; it has {', '.join(map(str, known))}")
        self.members = [m for m in self.everyone if m.seed in self.seeds and (cells is None or m.cell in cells)]
        if not self.members:
            raise ValueError("no training is left; the study has no cell with such a seed")

    def _member(self, name: str, seed: int) -> Member:
        reference = self.study.references.get(name)
        folder = self.out / "data" / f"s{seed}"
        overrides = merged(
            {"model_config": self.base_options},
            self.study.overrides,
            self.study.quick.overrides if self.quick else {},
            cell_settings(reference.cell if reference else name),
            reference.overrides if reference else {},
            {"seed": seed, "name": f"{name}-s{seed}", "save_path": str(self.out / "runs")},
            {"train_path": str(folder / "train.json"), "val_path": str(folder / "val.json")},
        )
        config = load_config(self.study.base, [f"{key}={as_yaml(value)}" for key, value in overrides.items()])
        if config.model_id != "lahr":
            raise ValueError(f"base: {self.study.base} trains {config.model_id}; B and C are parts of lahr")
        return Member(name, seed, self.study.base, overrides, config, self.out)

    # ------------------------------------------------------------ data

    def make_data(self) -> None:
        """The rows of every seed; files that are there stay. A seed's test rows are in neither of its other files."""
        for seed in self.seeds:
            folder, sizes = self.out / "data" / f"s{seed}", self.data
            wanted = sizes.model_dump() | {"seed": seed}
            about = folder / "data.json"
            if about.is_file():
                if read_json(about) != wanted:
                    raise ValueError(
                        f"{folder} holds {json.dumps(read_json(about))}; delete it, or give the study another name"
                    )
                continue
            said = io.StringIO()
            with redirect_stdout(said):
                held_out = cot.make_rows(sizes.kind, sizes.val_samples + sizes.test_samples, "valid", seed)
                rows = {"train": cot.make_rows(sizes.kind, sizes.n_samples, "train", seed)}
                rows |= {"val": held_out[: sizes.val_samples], "test": held_out[sizes.val_samples :]}
                rows["test"] = [row | {"idx": i} for i, row in enumerate(rows["test"])]
                cot.check_rows({str(folder / f"{split}.json"): rows[split] for split in SPLITS})
            for split in SPLITS:
                cot.write_rows(folder / f"{split}.json", rows[split])
            write_json(about, wanted)
            write_whole(folder / "about.txt", said.getvalue())
            print(f"{folder}: {', '.join(f'{len(rows[split])} {split}' for split in SPLITS)}", flush=True)

    # ------------------------------------------------------------ jobs

    def jobs(self, seeds: Sequence[int] | None = None) -> list[Job]:
        """Trainings seed by seed, cells first, and the scores of a seed as soon as its trainings are there."""
        found = []
        for seed in self.seeds if seeds is None else seeds:
            members = sorted((m for m in self.members if m.seed == seed), key=lambda m: m.cell in self.study.references)
            hours = self.study.minutes / 60
            found += [
                Job(f"train {m.label}", m.command(), self.out / "logs" / f"{m.label}.log", m.done, hours=hours) for m in members
            ]
            needs = tuple(f"train {m.label}" for m in members)
            command = [sys.executable, "-m", "analysis.factorial_scores", "--out", str(self.out / "scores")]
            command += ["--test", str(members[0].test), *(str(m.folder) for m in members)] if members else []
            log = self.out / "logs" / f"score-s{seed}.log"
            found += [Job(f"score s{seed}", command, log, lambda ms=members: all(m.scored() for m in ms), needs)]
        return found
