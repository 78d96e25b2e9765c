"""GSM8K from nothing to its lines of Table 1 (Coconut, arXiv 2412.06769); the same command goes on where it stopped.

    bash scripts/gsm_recipe.sh                                              # args/gsm_*.yaml, after scripts/get_gsm8k.sh
    bash scripts/gsm_recipe.sh --args-prefix arith_gsm                      # the offline stand-in, after data/arithmetic.py
    bash scripts/gsm_recipe.sh --rows no_cot,coconut,pause_as_thought --seed 1 --gpus 4 --dry-run
    bash scripts/gsm_recipe.sh --args-prefix prosqa --rows coconut,pause_as_thought    # other tasks have the same steps

Each row is trained, its checkpoint chosen on validation, and that one evaluated on the test set with `resume` N - 1, so that it
gets the latents of its training. Rows that start from the CoT run (on GSM8K those with a curriculum) bring it with them
and start from its best checkpoint by validation. Of a curriculum only checkpoints of the last stage are candidates: the best of
all is often an early one that still writes steps, a hybrid. Exit codes: those of run.py; 1 where there are only hybrids.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):  # run as `python analysis/gsm_recipe.py`
    sys.path[0] = str(ROOT)

from analysis.command import CheckFailed, command, parser_of  # noqa: E402
from analysis.evaluations import HYBRID_SHARE, ROWS, is_last_stage, read_evaluation, share_with_steps  # noqa: E402
from analysis.table1 import tasks_of, text_of, write  # noqa: E402
from config_rules import METHOD_FLAGS  # noqa: E402
from files import read_json, read_jsonl  # noqa: E402
from stopping import DONE, REQUEUE, StopSignals  # noqa: E402
from tokens import existing  # noqa: E402
from utils import Config, load_config  # noqa: E402

OTHER_NAMES = {"prosqa_cot": "prosqa_m1_cot", "prosqa_no_cot": "prosqa_m2_nocot", "prosqa_wo_thought": "prosqa_m0_nothought"}
OWN_KEYS = ("name", "seed", "save_path", "val_path", "load_model_path", "resume", "only_eval")  # which the recipe sets
SAME_KEYS = (*METHOD_FLAGS, "icot", "c_thought", "epochs_per_stage", "max_latent_stage", "pad_latent_to_max", "model_id")
Launch = Callable[[list[str]], int]  # run.py with these arguments; its exit code


class OnlyHybrids(CheckFailed):
    """No checkpoint of the last stage stopped writing steps."""


class Choice(NamedTuple):
    """A checkpoint file, after how many epochs, and its accuracy on the validation set."""

    file: Path
    epochs: int
    accuracy: float


@dataclass
class Row:
    """One row of the table: the files that train and evaluate it, and their configs with all overrides."""

    name: str
    train_file: Path
    test_file: Path
    train: Config
    test: Config
    overrides: list[str]
    test_overrides: list[str]
    start: "Row | None" = field(default=None, repr=False)  # whose best checkpoint it starts from

    @property
    def records(self) -> Path:
        """Where the evaluation on the test set leaves its records."""
        return self.test.run_dir / f"eval_{Path(self.test.val_path).stem}.jsonl"


# ---------------------------------------------------------------- what there is to do


def plan(prefix: str, rows: Sequence[str], seed: int = 0, overrides: Sequence[str] = ()) -> list[Row]:
    """The rows in the order of their training, the CoT run first where one starts from it.

    Raises ValueError where configs are missing, wrong, or do not belong together.
    """
    own = [override.partition("=")[0].strip() for override in overrides]
    for key in OWN_KEYS:
        if key in own:
            raise ValueError(f"{key}: the recipe sets it itself; use --seed, or --args-prefix with configs of your own")
    made = {name: make_row(prefix, name, seed, overrides) for name in rows}
    starting = [row for row in made.values() if row.train.load_model_path]
    if starting:
        cot = made.pop("cot", None) or make_row(prefix, "cot", seed, overrides)
        for row in starting:
            row.start = cot
        made = {"cot": cot} | made
    return list(made.values())


def make_row(prefix: str, name: str, seed: int, overrides: Sequence[str]) -> Row:
    """A row with its configs: `<prefix>_<name>_1gpu.yaml` where there is one, and `<prefix>_<name>_eval.yaml`."""
    if name not in ROWS:
        raise ValueError(f"--rows {name}: no row of Table 1; known: {', '.join(ROWS)}")
    base = Path(prefix if "/" in prefix else ROOT / "args" / prefix)
    base = base.with_name(OTHER_NAMES.get(f"{base.name}_{name}", f"{base.name}_{name}"))
    train_file = next((f for tail in ("_1gpu", "") if (f := base.with_name(f"{base.name}{tail}.yaml")).is_file()), None)
    test_file = base.with_name(f"{base.name}_eval.yaml")
    if train_file is None or not test_file.is_file():
        raise ValueError(f"{base}.yaml and {test_file.name} must both be there; --args-prefix names what is before _{name}")

    own, to_test = [*overrides], [*overrides]
    if seed:
        own += [setting("name", f"{load_config(train_file, own).name}-s{seed}"), f"seed={seed}"]
    train = load_config(train_file, own)
    to_test += [setting("save_path", train.save_path), setting("load_model_path", train.run_dir)]
    if seed:
        tail = "-eval" if load_config(test_file, to_test).name.endswith("-eval") else ""
        to_test += [setting("name", train.name + tail), f"seed={seed}"]
    test = load_config(test_file, to_test)
    differing = [key for key in SAME_KEYS if getattr(train, key) != getattr(test, key)]
    if differing:
        raise ValueError(f"{test_file}: {', '.join(differing)} must be as in {train_file}")
    return Row(name, train_file, test_file, train, test, own, to_test)


def setting(key: str, value: object) -> str:
    """An override whose value is text, whatever YAML would make of it."""
    return f"{key}={json.dumps(str(value))}"


def missing_data(rows: Sequence[Row]) -> list[str]:
    """What is wrong with the data files, one line a file, with the command that makes it."""
    found = {}
    for path in dict.fromkeys(p for row in rows for p in (row.train.train_path, row.train.val_path, row.test.val_path)):
        try:
            existing(path)
        except ValueError as error:
            found[path] = str(error)
    return list(found.values())


# ---------------------------------------------------------------- what is done


def epochs_done(row: Row) -> int:
    """How many epochs of a row have been trained and validated."""
    return max((record["epoch"] + 1 for record in events(row, "eval")), default=0)


def is_trained(row: Row) -> bool:
    return any(record["epoch"] >= row.train.num_epochs - 1 for record in events(row, "end"))


def events(row: Row, kind: str) -> list[dict]:
    """Records of one kind in a training run's metrics.jsonl."""
    return [record for record in read_jsonl(row.train.run_dir / "metrics.jsonl", "event") if record["event"] == kind]


def choose(row: Row) -> Choice:
    """The best checkpoint on validation (the earliest of equals), of a curriculum among those of its last stage.

    Raises ValueError where there is none, and OnlyHybrids where all still write steps before the answer.
    """
    folder = row.train.run_dir
    accuracies = {record["epoch"]: record["eval/acc"] for record in events(row, "eval")}  # of a repeated epoch the last
    kept = {e: acc for e, acc in accuracies.items() if has_files(folder, e + 1)}
    last = {e: acc for e, acc in kept.items() if is_last_stage(row.train, e)}
    if not last:
        what = "checkpoint of the last stage" if kept else "checkpoint (save_only_improve keeps none while accuracy is 0)"
        raise ValueError(f"{folder} holds no {what} after {len(accuracies)} of {row.train.num_epochs} epochs; train it on")
    if row.name != "cot":
        shares = {e: share_with_steps(read_jsonl(folder / f"eval_{e + 1}.jsonl", "output")) for e in last}
        last = {e: acc for e, acc in last.items() if shares[e] <= HYBRID_SHARE}
        if not last:
            least = min(shares, key=shares.get)
            raise OnlyHybrids(
                f"every last-stage checkpoint in {folder} still writes steps before the answer (checkpoint_{least + 1} least: "
                f"in {100 * shares[least]:.1f} % of the validation set): hybrids, not {ROWS[row.name]}; train longer"
            )
    epoch = max(last, key=lambda epoch: (last[epoch], -epoch))
    return Choice(folder / f"checkpoint_{epoch + 1}", epoch + 1, last[epoch])


def has_files(folder: Path, epochs: int) -> bool:
    """Whether the weights after so many epochs and their records on validation are there."""
    return (folder / f"checkpoint_{epochs}").is_file() and (folder / f"eval_{epochs}.jsonl").is_file()


def is_tested(row: Row, choice: Choice) -> bool:
    """Whether the test records are those of this checkpoint, at its own stage."""
    side = row.records.with_suffix(".json")
    if not (side.is_file() and row.records.is_file()):
        return False
    about = read_json(side, "checkpoint", "config")
    newer = side.stat().st_mtime_ns >= choice.file.stat().st_mtime_ns
    return newer and about["checkpoint"] == str(choice.file) and about["config"]["resume"] == choice.epochs - 1


# ---------------------------------------------------------------- doing it


def follow(rows: Sequence[Row], launch: Launch) -> int:
    """Train, choose and test every row that is not done; the exit code of what failed, or 0. Raises what `choose` raises."""
    for row in rows:
        if is_trained(row):
            say(row, f"trained, {epochs_done(row)} epochs in {row.train.run_dir}")
        else:
            start = choose(row.start).file if row.start else None
            say(row, f"training in {row.train.run_dir}" + (f" from {start}" if start else ""))
            code = launch([str(row.train_file), *row.overrides, *([setting("load_model_path", start)] if start else [])])
            if code:
                return complain(row, "training", code)
        choice = choose(row)
        say(row, f"chosen {choice.file.name}, {100 * choice.accuracy:.1f} % on validation")
        if is_tested(row, choice):
            say(row, f"tested, records in {row.records}")
            continue
        which = [setting("load_model_path", choice.file), f"resume={choice.epochs - 1}"]  # of a key given twice the last counts
        code = launch([str(row.test_file), *row.test_overrides, *which])
        if code:
            return complain(row, "the evaluation", code)
    return 0


def say(row: Row, what: str) -> None:
    print(f"{ROWS[row.name]}: {what}", flush=True)


def complain(row: Row, what: str, code: int) -> int:
    then = "was interrupted; the same command goes on from there" if code == REQUEUE else f"failed (exit {code}), see above"
    print(f"error: {ROWS[row.name]}: {what} {then}", file=sys.stderr)
    return code


def show(rows: Sequence[Row], missing: Sequence[str]) -> None:
    """What is done and what is left, without doing anything."""
    for row in rows:
        source = f", from the best of {row.start.train.run_dir}" if row.start else ""
        state = "trained" if is_trained(row) else f"{epochs_done(row)} of {row.train.num_epochs} epochs"
        files = (os.path.relpath(file) for file in (row.train_file, row.test_file))
        say(row, f"train {next(files)} ({state}{source}); choose on validation; test {next(files)}")
    for line in missing:
        print(f"missing: {line}")


def launcher(gpus: int) -> Launch:
    """Starts run.py as a process of its own, several with torchrun, and hands on the signals that ask for an end."""
    several = [str(ROOT / "scripts/torchrun.py"), "--standalone", f"--nproc_per_node={gpus}"]

    def launch(arguments: list[str]) -> int:
        command = [sys.executable, *(several if gpus > 1 else []), str(ROOT / "run.py"), *arguments]
        child = subprocess.Popen(command)
        # Ctrl-C reaches the child by itself; a scheduler's signals may reach this process alone.
        handlers = {number: lambda *_: child.terminate() for number in (signal.SIGTERM, signal.SIGUSR1)}
        handlers[signal.SIGINT] = lambda *_: None
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            code = child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return REQUEUE if code < 0 else code

    return launch


@command
def main(argv: list[str] | None = None, launch: Launch | None = None) -> int:
    parser = parser_of(__doc__, "gsm_recipe.sh")
    parser.add_argument("--args-prefix", default="gsm", help="configs args/PREFIX_ROW.yaml; with a slash a path (default: gsm)")
    parser.add_argument("--rows", default="cot,coconut", help=f"rows of the table, of {','.join(ROWS)} (default: cot,coconut)")
    parser.add_argument("--seed", type=int, default=0, help="its runs are called NAME-sN (default: 0, without a suffix)")
    parser.add_argument("--gpus", type=int, default=1, help="processes of torchrun (default: 1, without torchrun)")
    parser.add_argument("--out", type=Path, help="where the table goes (default: results/PREFIX, with -sN)")
    parser.add_argument("--dry-run", action="store_true", help="say what is done and what is left, and do nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of every config")
    args = parser.parse_args(argv)
    with StopSignals():
        return recipe(args, launch or launcher(args.gpus))


def recipe(args: argparse.Namespace, launch: Launch) -> int:
    """Everything from the plan to the table; the exit code."""
    rows = plan(args.args_prefix, args.rows.split(","), args.seed, args.overrides)
    missing = missing_data(rows)
    if args.dry_run:
        show(rows, missing)
        return DONE
    if missing:
        raise ValueError("; ".join(missing))
    code = follow(rows, launch)
    if code:
        return code
    evaluations = [read_evaluation(row.records) for row in rows]
    tasks = tasks_of(evaluations)
    print("\n" + text_of(tasks))
    name = Path(args.args_prefix).name + (f"-s{args.seed}" if args.seed else "")
    write(tasks, args.out or Path("results") / name)
    hybrids = [f"{evaluation.name}: {evaluation.hybrid}" for evaluation in evaluations if evaluation.hybrid]
    if hybrids:
        raise OnlyHybrids("; ".join(hybrids))
    return DONE


if __name__ == "__main__":
    sys.exit(main())
