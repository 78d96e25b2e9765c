"""What all experiments share: the command line, gates first, rows that are measured once, and the files they leave.

An experiment is a module with three functions and a description of itself:

    EXPERIMENT = Experiment("corruption", ("m3", "m4", "m4b", "m5"), prepare, measure, summarize, __doc__)
    if __name__ == "__main__":
        sys.exit(EXPERIMENT.main())

    prepare(task) -> dict             calibration on the whole set, once a checkpoint (tensors may be in it)
    measure(task, ready, part, numbers) -> [record, ...]      one record for each row number of a part (a data set, ...)
    summarize(task, ready, records) -> dict                   the fields of the result, from records alone

Files, below --output_dir/NAME/: LABEL_NAME.jsonl grows as rows are measured (a restart skips what it holds),
LABEL_NAME.json is written when a checkpoint is done (a restart skips it), results.json holds all of them. Where a check
fails nothing of it is written but LABEL_NAME.failed.json with the reason, and the exit code is 1.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from analysis.command import CheckFailed, command, parser_of
from analysis.self_checks import self_checks
from analysis.subject import Problems, Subject
from analysis.summary import level
from checkpoint import versions
from files import read_jsonl, write_json, write_jsonl

SCHEMA_VERSION = 1
TEST_FILES = ("prosqa_test.json", "test.json")


# ---------------------------------------------------------------- one checkpoint's task


@dataclass
class Task:
    """One checkpoint in one experiment: the subject, the command's arguments, and the data."""

    experiment: "Experiment"
    args: argparse.Namespace
    subject: Subject
    out: Path  # --output_dir/NAME

    @property
    def seed(self) -> int:
        return self.args.seed

    @cached_property
    def data_dir(self) -> Path:
        """The folder of the data files: --data_dir, that of --data, or that of the checkpoint's own validation file."""
        if self.args.data_dir:
            return Path(self.args.data_dir)
        return Path(self.args.data or self.subject.config.val_path).parent

    @cached_property
    def problems(self) -> Problems:
        """The in-distribution test set: --data, or a test file in the data folder, else what the checkpoint validated on."""
        found = [self.data_dir / name for name in TEST_FILES if (self.data_dir / name).is_file()]
        path = self.args.data or (found[0] if found else self.subject.config.val_path)
        return Problems.read(path, self.subject.tokenizer, self.args.num_samples, name="test")

    @cached_property
    def sets(self) -> dict[str, Problems]:
        """The test set and every evaluation set of `data/ood.py` in the data folder: {name: problems}."""
        found = {"test": self.problems}
        for path in evaluation_files(self.data_dir):
            found[path.stem] = Problems.read(path, self.subject.tokenizer, self.args.num_samples)
        return found

    def about(self, name: str) -> dict:
        """What `data/ood.py` recorded of a set: its sidecar, {} where there is none."""
        path = self.problems.path if name == "test" else self.sets[name].path
        side = path.with_suffix(".stats.json")
        return json.loads(side.read_text()) if side.is_file() else {}

    def result_of(self, key: str) -> dict | None:
        """The finished result of another model's same repeat in this experiment, None where there is none yet."""
        label = key + (f"-s{self.subject.repeat}" if self.subject.repeat else "")
        path = self.out / f"{label}_{self.experiment.name}.json"
        return json.loads(path.read_text()) if path.is_file() else None


def evaluation_files(folder: Path) -> list[Path]:
    """The evaluation sets of a data folder or its `ood` folder: JSON files with a sidecar that names their kind."""
    found = []
    for place in (folder / "ood", folder):
        for side in sorted(place.glob("*.stats.json")):
            path = side.with_name(side.name.removesuffix(".stats.json") + ".json")
            if path.is_file() and json.loads(side.read_text()).get("kind"):
                found.append(path)
    return found


@lru_cache(maxsize=1)
def load_subject(path: Path, epoch: str, batch_size: int | None, device: str) -> Subject:
    """`Subject.load`; several experiments on one checkpoint load it once."""
    return Subject.load(path, epoch, batch_size, device)


# ---------------------------------------------------------------- an experiment


@dataclass
class Experiment:
    """See the module. `parts(task)` -> {part: number of rows} (default: the test set); `arguments(parser)` adds flags;
    `verify({label: result})` -> the "verification" entry of results.json; `chunk`: rows measured at a time;
    `version`: raise it when records change; `also`: another folder that gets results.json."""

    name: str
    models: tuple[str, ...]
    prepare: Callable[[Task], dict]
    measure: Callable[[Task, dict, str, list[int]], list[dict]]
    summarize: Callable[[Task, dict, list[dict]], dict]
    doc: str
    parts: Callable[[Task], dict[str, int]] = lambda task: {"test": len(task.problems)}
    arguments: Callable[[argparse.ArgumentParser], Any] = lambda parser: None
    verify: Callable[[dict[str, dict]], dict] = lambda results: {}
    chunk: int = 50
    version: int = 1
    also: str | None = None
    own_flags: tuple[str, ...] = field(default=(), init=False)

    # ------------------------------------------------------------ the command line

    def parser(self) -> argparse.ArgumentParser:
        parser = parser_of(self.doc, f"python -m analysis.{self.name}")
        what = parser.add_argument_group("what is measured")
        what.add_argument("--checkpoint", nargs="+", type=Path, help="checkpoint files or run folders")
        what.add_argument("--study", type=Path, help="a study's result folder instead, whose study.json names its runs")
        what.add_argument("--models", help=f"with --study: keys or labels, by comma (default: {','.join(self.models)})")
        what.add_argument("--epoch", default="final", help="of a run folder: final, best or a number N (default: final)")
        what.add_argument("--data", type=Path, help="test file (default: the one beside the checkpoint's validation file)")
        what.add_argument("--data_dir", type=Path, help="folder of the test file and the evaluation sets (data/ood.py)")
        what.add_argument("--num_samples", type=int, default=500, help="first rows of each set (default: 500)")
        how = parser.add_argument_group("how")
        how.add_argument("--output_dir", type=Path, help="default: results, or with --study its folder for the epoch")
        how.add_argument("--seed", type=int, default=0, help="of every random draw (default: 0)")
        how.add_argument("--batch_size", type=int, help="prompts at a time (default: by device)")
        how.add_argument("--device", default="auto", help="auto, cpu, cuda (default: auto)")
        how.add_argument("--force", action="store_true", help="measure again what is finished")
        before = {action.dest for action in parser._actions}
        self.arguments(parser)
        self.own_flags = tuple(action.dest for action in parser._actions if action.dest not in before)
        return parser

    @command
    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run from the command line. 0: all done; 1: a check failed; 2: a mistake in the command or its files."""
        argv = sys.argv[1:] if argv is None else list(argv)
        args = self.parser().parse_args(argv)
        args.command = " ".join(["python", "-m", f"analysis.{self.name}", *argv])
        return self.run(args)

    def run(self, args: argparse.Namespace) -> int:
        """Measure every checkpoint that the arguments name; see `main`."""
        if args.num_samples < 1:
            raise ValueError(f"--num_samples {args.num_samples}: at least one row")
        checkpoints, output_dir = named_checkpoints(args, self.models), args.output_dir
        output_dir = output_dir or (args.study / args.epoch if args.study else Path("results"))
        out = output_dir / self.name
        out.mkdir(parents=True, exist_ok=True)
        failed = False
        for path in checkpoints:
            subject = load_subject(path, args.epoch, args.batch_size, args.device)
            if subject.key not in self.models:
                raise ValueError(f"{path} is {subject.key}; analysis.{self.name} measures {', '.join(self.models)}")
            try:
                self.one(Task(self, args, subject, out), output_dir)
            except CheckFailed as error:
                write_json(out / f"{subject.label}_{self.name}.failed.json", {"schema_version": 1, "reason": str(error)})
                (out / f"{subject.label}_{self.name}.json").unlink(missing_ok=True)
                print(f"error: check failed, no result written: {error}", file=sys.stderr)
                failed = True
        self.collect(output_dir)
        return int(failed)

    def collect(self, output_dir: Path) -> None:
        """Write results.json of all checkpoints that are finished."""
        found = {
            p.name.removesuffix(f"_{self.name}.json"): json.loads(p.read_text()) for p in self.finished(output_dir / self.name)
        }
        for folder in filter(None, (self.name, self.also)):
            (output_dir / folder).mkdir(exist_ok=True)
            write_json(output_dir / folder / "results.json", found | {"verification": self.verify(found)})

    def finished(self, out: Path) -> list[Path]:
        """Result files of all checkpoints so far."""
        return sorted(out.glob(f"*_{self.name}.json"))

    # ------------------------------------------------------------ one checkpoint

    def one(self, task: Task, output_dir: Path) -> dict:
        """The result of one checkpoint, measured or found finished."""
        subject, args, started = task.subject, task.args, time.time()
        target = task.out / f"{subject.label}_{self.name}.json"
        identity = self.identity(task)
        if target.is_file() and not args.force and json.loads(target.read_text()).get("identity") == identity:
            print(f"{target}: finished before")
            return json.loads(target.read_text())
        target.unlink(missing_ok=True)  # what is measured again does not count as finished meanwhile
        checks = checks_once(task, output_dir / "self_checks" / f"{subject.label}.json")
        ready = self.prepare(task)
        records = self.records(task, ready, identity, target.with_suffix(".jsonl"))
        result = {
            "schema_version": SCHEMA_VERSION,
            "experiment": self.name,
            "model": subject.label,
            "model_key": subject.key,
            "repeat": subject.repeat,
            "feedback_mode": subject.model.feedback_mode,
            "checkpoint": {"file": str(subject.path), "sha256": subject.sha256, "epoch": subject.epoch},
            "seed": args.seed,
            "train_seed": subject.config.seed,
            "n_thoughts": subject.n_thoughts,
            "n_layers": subject.n_layers,
            "command": args.command,
            "versions": versions(),
            "data": {"file": str(task.problems.path), "sha256": task.problems.sha256, "n": len(task.problems)},
            "n": len(task.problems),
            "n_excluded": {},
            "gates": checks,
            **self.summarize(task, ready, records),
            "elapsed_seconds": time.time() - started,
            "identity": identity,
        }
        write_json(target, result)
        target.with_suffix(".failed.json").unlink(missing_ok=True)
        print(f"{target}: {len(records)} records in {time.time() - started:.1f} s")
        return result

    def identity(self, task: Task) -> str:
        """What a measurement depends on; records of another identity are not continued."""
        flags = {name: str(getattr(task.args, name)) for name in (*self.own_flags, "seed", "num_samples")}
        data = {name: task.sets[name].sha256 if name in task.sets else n for name, n in self.parts(task).items()}
        data |= {"test": task.problems.sha256}
        whole = [self.name, self.version, task.subject.sha256, flags, data]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]

    def records(self, task: Task, ready: dict, identity: str, path: Path) -> list[dict]:
        """The records of all parts, in order; those that `path` holds already are not measured again."""
        held = read_jsonl(path)
        same = bool(held) and held[0].get("identity") == identity and not task.args.force
        kept = {(record["part"], record["idx"]): record for record in held[1:]} if same else {}
        write_lines(path, [{"identity": identity}, *kept.values()])
        parts = self.parts(task)
        bar = tqdm(
            desc=f"{self.name} {task.subject.label}", total=sum(parts.values()), initial=len(kept), unit="row", disable=None
        )
        with open(path, "a") as file:
            for part, n in parts.items():
                for start in range(0, n, self.chunk):
                    # Always the same rows together: another batch's margins differ in the last digits.
                    numbers = list(range(start, min(n, start + self.chunk)))
                    if all((part, i) in kept for i in numbers):
                        continue
                    made = self.measure(task, ready, part, numbers)
                    assert len(made) == len(numbers), "one record a row"
                    for number, record in zip(numbers, made):
                        kept[part, number] = {**record, "part": part, "idx": number}
                    file.writelines(json.dumps(kept[part, number]) + "\n" for number in numbers)
                    file.flush()
                    bar.update(len(numbers))
        bar.close()
        records = [kept[part, i] for part, n in parts.items() for i in range(n)]
        return records


def write_lines(path: Path, records: Iterable[dict]) -> None:
    """A JSON-lines file, whole."""
    write_jsonl(path, records)


def checks_once(task: Task, path: Path) -> dict:
    """The self-checks of a checkpoint on the test set: run once for all experiments of an output folder."""
    key = {"checkpoint": task.subject.sha256, "data": task.problems.sha256, "seed": task.args.seed, "code": versions()}
    if path.is_file() and not task.args.force:
        held = json.loads(path.read_text())
        if held["key"] == key:
            return held["checks"]
    checks = self_checks(task.subject, task.problems, task.args.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"schema_version": SCHEMA_VERSION, "key": key, "checks": checks})
    return checks


def named_checkpoints(args: argparse.Namespace, models: tuple[str, ...]) -> list[Path]:
    """The checkpoint files or run folders that --checkpoint or --study and --models name.

    Raises ValueError where neither or both are given, or a study lacks what is asked for.
    """
    if bool(args.checkpoint) == bool(args.study):
        raise ValueError("give either --checkpoint FILE_OR_FOLDER ... or --study FOLDER")
    if args.checkpoint:
        return args.checkpoint
    plan = args.study / "study.json"
    if not plan.is_file():
        raise ValueError(f"{args.study} has no study.json; make it with: bash scripts/study.sh args/study_....yaml")
    runs = json.loads(plan.read_text())["runs"]  # [{"label", "model", "folder"}, ...]
    wanted = args.models.split(",") if args.models else list(models)
    found = [run for run in runs if run["label"] in wanted or run["model"] in wanted]
    found = [run for run in found if run["model"] in models or args.models]
    if not found:
        raise ValueError(f"--models {','.join(wanted)}: {plan} has {', '.join(run['label'] for run in runs)}")
    trained = [Path(run["folder"]) for run in found if any(Path(run["folder"]).glob("checkpoint_*"))]
    if not trained:
        raise ValueError(f"none of {', '.join(run['folder'] for run in found)} has a checkpoint; train the study first")
    return trained


# ---------------------------------------------------------------- numbers


def share(flags: Iterable[bool]) -> dict:
    """{"correct", "n", "accuracy", "ci95"} of booleans; accuracy and interval None where there are none."""
    flags = list(flags)
    return level(sum(map(bool, flags)), len(flags)) if flags else {"correct": 0, "n": 0, "accuracy": None, "ci95": None}
