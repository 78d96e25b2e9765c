"""What a study consists of: its YAML, the trainings that follow from it, and the jobs in their order.

plan = Plan(load_study_config(Path("args/study_quickstart.yaml")), quick=True)
plan.write()                       # study.json, which analyses and report read
jobs = plan.jobs()
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from analysis.jobs import Job
from analysis.measure import EXPERIMENTS, experiment, flags
from analysis.runs import LOG_STEMS
from analysis.settings_files import checked, read_yaml
from checkpoint import numbered_checkpoints, versions
from files import read_jsonl, write_json
from utils import Config, load_config

ORDER = ("m1", "m2", "m3", "m4", "m4b", "m5", "m0")
SCHEMA_VERSION = 1

# ---------------------------------------------------------------- the YAML


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Member(Strict):
    """One model of a study: its config, a seed for each repeat, and the config of the stage that it starts from."""

    config: str
    seeds: list[int] = Field(min_length=1)
    start: str | None = None  # trained once for each seed, for all models that name it
    hours: float = Field(0.0, ge=0)  # of one training, for --dry-run


class Made(Strict):
    """A command (arguments of python) that makes data files."""

    command: list[str]
    files: list[str] = Field(min_length=1)


class StudyConfig(Strict):
    """A study's YAML."""

    name: str
    results: str
    runs: str
    data_dir: str
    data: list[Made] = []
    models: dict[Literal["m0", "m1", "m2", "m3", "m4", "m4b", "m5"], Member]
    checkpoints: list[str] = ["final"]
    experiments: dict[str, dict[str, Any] | None] = {name: None for name in EXPERIMENTS}
    num_samples: int = Field(500, ge=1)
    processes: int = Field(1, ge=1)
    nproc_per_node: int = Field(1, ge=1)
    threads: int | None = Field(None, ge=1)
    start_hours: float = Field(0.0, ge=0)
    measure_hours: float = Field(0.0, ge=0)
    quick: list[str] = ["m1", "m3", "m5"]
    accept: str = ""


def load_study_config(path: Path) -> StudyConfig:
    """Read and check a study's YAML and every config that it names. ValueError with all problems in one line."""
    study = checked(StudyConfig, read_yaml(path, "study config"), path)
    if problems := [problem for key, member in study.models.items() for problem in _member_problems(key, member)]:
        raise ValueError(f"{path}: {'; '.join(problems)}")
    if problems := _study_problems(study):
        raise ValueError(f"{path}: {'; '.join(problems)}")
    return study


def _member_problems(key: str, member: Member) -> list[str]:
    problems = []
    for path in filter(None, (member.config, member.start)):
        try:
            found = load_config(path).model_key
        except ValueError as error:
            problems.append(f"models.{key}: {error}")
            continue
        if path == member.config and found != key:
            problems.append(f"models.{key}.config: {path} trains {found}")
    if len(set(member.seeds)) < len(member.seeds):
        problems.append(f"models.{key}.seeds: {member.seeds} has one twice")
    return problems


def _study_problems(study: StudyConfig) -> list[str]:
    problems = []
    if "m4b" in study.models and "m5" in study.models and set(study.models["m4b"].seeds) & set(study.models["m5"].seeds):
        problems.append("models.m4b.seeds: with a seed of m5's it is the same run, and the noise floor zero; add 10")
    for name in study.experiments:
        if name not in EXPERIMENTS:
            problems.append(f"experiments.{name}: unknown; known: {', '.join(EXPERIMENTS)}")
    for epoch in study.checkpoints:
        if epoch not in ("final", "best") and not epoch.isdigit():
            problems.append(f"checkpoints: {epoch!r} must be final, best or a number")
    return problems + [f"quick: {key} is not among the models" for key in study.quick if key not in study.models]


# ---------------------------------------------------------------- trainings


@dataclass(frozen=True)
class Training:
    """One run of a study. `start` is the training whose last checkpoint it begins from."""

    label: str
    model: str
    repeat: int
    seed: int
    path: str  # of its YAML
    config: Config
    folder: Path
    log: Path
    hours: float
    start: "Training | None" = None

    @property
    def epochs(self) -> int:
        return self.config.num_epochs

    @property
    def last_checkpoint(self) -> Path:
        return self.folder / f"checkpoint_{self.epochs}"

    def command(self, nproc_per_node: int) -> list[str]:
        """torchrun with run.py, the YAML, and what the study sets."""
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc_per_node}"]
        set_here = [f"seed={self.seed}", f"name={self.folder.name}", f"save_path={self.folder.parent}"]
        set_here += [f"load_model_path={self.start.last_checkpoint}"] if self.start else []
        return [*launch, "run.py", self.path, *set_here]

    def done(self) -> bool:
        """Whether the last checkpoint is there and validated, or the run ended early by its own rule."""
        events, kept = read_jsonl(self.folder / "metrics.jsonl"), numbered_checkpoints(self.folder)
        if not kept or not events:
            return False
        validated = {record["epoch"] for record in events if record["event"] == "eval"}
        return (kept[-1] == self.epochs and self.epochs - 1 in validated) or events[-1]["event"] == "end"

    def standing(self) -> str:
        """How far it is, from its metrics."""
        events = read_jsonl(self.folder / "metrics.jsonl")
        evals = [record for record in events if record["event"] == "eval"]
        epoch = max((record["epoch"] + 1 for record in events if record["event"] in ("step", "eval")), default=0)
        return f"epoch {epoch}/{self.epochs}" + (f", accuracy {evals[-1]['eval/acc']:.3f}" if evals else "")


# ---------------------------------------------------------------- the plan


class Plan:
    """A study's trainings (`runs`, and the `starts` that several share) and its jobs.

    `models` and `repeats` restrict it; `quick` is the YAML's quick models with one seed, in a result folder of its own.
    Raises ValueError where nothing is left.
    """

    def __init__(
        self, study: StudyConfig, quick: bool = False, models: list[str] | None = None, repeats: list[int] | None = None
    ):
        self.study, self.quick = study, quick
        self.results = Path(study.results + ("-quick" if quick else ""))
        chosen = models or (study.quick if quick else list(study.models))
        if unknown := [key for key in chosen if key not in study.models]:
            raise ValueError(f"--models: {unknown[0]} is not in the study; it has {', '.join(study.models)}")
        repeats = [0] if quick else repeats
        self.starts: dict[str, Training] = {}
        # All first repeats before any second one: a study that is cut short is a study of fewer seeds.
        self.runs = sorted(
            (
                self._run(key, repeat)
                for key in chosen
                for repeat in range(len(study.models[key].seeds))
                if repeats is None or repeat in repeats
            ),
            key=lambda run: (run.repeat, ORDER.index(run.model)),
        )
        if not self.runs:
            raise ValueError("--seeds: no run is left; repeats are counted 0, 1, 2, ...")

    def _run(self, key: str, repeat: int) -> Training:
        member, suffix = self.study.models[key], f"-s{repeat}" if repeat else ""
        config, seed, start = load_config(member.config), member.seeds[repeat], None
        logs, runs = self.results / "logs", Path(self.study.runs)
        if member.start:
            first = load_config(member.start)
            name = f"{first.name}-seed{seed}"
            made = Training(
                name, "start", repeat, seed, member.start, first, runs / name, logs / f"{name}.log", self.study.start_hours
            )
            start = self.starts.setdefault(name, made)
        log = logs / f"{LOG_STEMS[key]}{suffix}.log"
        folder = runs / f"{config.name}{suffix}"
        return Training(key + suffix, key, repeat, seed, member.config, config, folder, log, member.hours, start)

    def write(self) -> None:
        """study.json: what analyses and the report need to know of the study."""
        runs = [
            {"label": run.label, "model": run.model, "repeat": run.repeat, "seed": run.seed}
            | {"config": run.path, "folder": str(run.folder), "log": str(run.log)}
            for run in self.runs
        ]
        about = {key: getattr(self.study, key) for key in ("name", "checkpoints", "data_dir", "num_samples", "accept")}
        about |= {"quick": self.quick, "experiments": list(self.study.experiments), "versions": versions(), "runs": runs}
        self.results.mkdir(parents=True, exist_ok=True)
        write_json(self.results / "study.json", {"schema_version": SCHEMA_VERSION, **about})

    # ------------------------------------------------------------ jobs

    def jobs(self) -> list[Job]:
        """Data first; a repeat's trainings; the measurements of each checkpoint as soon as what they need is there."""
        data = [self._data_job(i, made) for i, made in enumerate(self.study.data)]
        have_data = tuple(job.name for job in data)
        trainings: dict[str, Job] = {}
        for run in self.runs:
            for training in filter(None, (run.start, run)):
                needs = have_data + ((f"train {training.start.label}",) if training.start else ())
                command = training.command(self.study.nproc_per_node)
                name = f"train {training.label}"
                trainings.setdefault(name, Job(name, command, training.log, training.done, needs, training.hours))
        return [*data, *trainings.values(), *(self._measure_job(run, e) for e in self.study.checkpoints for run in self.runs)]

    def _data_job(self, number: int, made: Made) -> Job:
        files = [Path(path) for path in made.files]
        log = self.results / "logs" / "data.log"
        before = (f"data {number - 1}",) if number else ()
        return Job(f"data {number}", [sys.executable, *made.command], log, lambda: all(p.is_file() for p in files), before)

    def _measure_job(self, run: Training, epoch: str) -> Job:
        """All experiments on one checkpoint. Others' noise scales are m3's, and tracing waits for m1's causal sanity."""
        suffix, labels = f"-s{run.repeat}" if run.repeat else "", {other.label for other in self.runs}
        first = {"m1": [], "m3": ["m1", f"m1{suffix}"]}.get(run.model, ["m1", f"m1{suffix}", f"m3{suffix}"])
        needs = [f"measure {label} {epoch}" for label in dict.fromkeys(first) if label in labels]
        needs = [f"train {run.label}", *needs]
        names = [name for name in self.study.experiments if run.model in experiment(name).models]
        out = self.results / epoch
        shared = {"epoch": epoch, "data_dir": self.study.data_dir, "num_samples": self.study.num_samples, "output_dir": out}
        command = [sys.executable, "-m", "analysis.measure", "--checkpoint", str(run.folder), "--experiments", ",".join(names)]
        for name in names:
            command += [f"--set={name}.{flag}={value}" for flag, value in (self.study.experiments[name] or {}).items()]
        results = [out / name / f"{run.label}_{name}.json" for name in names]

        def done() -> bool:
            newest = max((p.stat().st_mtime for p in run.folder.glob("checkpoint_*")), default=float("inf"))
            return all(path.is_file() and path.stat().st_mtime > newest for path in results)

        log, hours = self.results / "logs" / f"measure-{run.label}-{epoch}.log", self.study.measure_hours
        return Job(f"measure {run.label} {epoch}", [*command, *flags(shared)], log, done, tuple(needs), hours)
