"""How training went: accuracy, losses and pause vector of every epoch, by stage, over seeds, and where m3 leaves m5.

    python -m analysis.curriculum --study results/study-prosqa --output_dir results/study-prosqa/final
    python -m analysis.curriculum --logs logs --runs runs --output_dir results

Reads each run's metrics.jsonl, or its log where there are none; no checkpoint and no torch. Of an epoch that a resumed run
repeated the last account counts, as everywhere. Epochs that several runs share (a first stage trained once, from which they
start) are read where they were trained. Writes curriculum/LABEL_curriculum.json and curriculum/results.json. Exit code 1: a
run's log and metrics disagree, and it has no result.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

if __package__ in (None, ""):  # run as `python analysis/curriculum.py`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from analysis.command import command, parser_of  # noqa: E402
from analysis.runlog import Accuracy, read_json  # noqa: E402
from analysis.runs import MODELS, Run, load_study  # noqa: E402
from analysis.stats import noise_floor, seed_interval, wilson  # noqa: E402
from files import write_json  # noqa: E402

SCHEMA_VERSION = 1
WITH_THOUGHTS = ("m3", "m4", "m4b", "m5")
SAME_TEXT = (("m3", "m5"), ("m3", "m4b"), ("m3", "m4"), ("m5", "m0"))  # compared at the same epochs
MEASURES = ("accuracy", "two_choice", "train_loss", "eval_loss", "vector_distance")
ROUNDING = 1e-9  # of a difference of accuracies
NOTE = (
    "The text left to write shrinks from stage to stage, so accuracies and losses of different stages are not comparable. "
    "m3, m4, m4b and m5 have the same text at each stage, m0 has it without markers and thoughts; m1 always writes all steps "
    "and m2 none, so they are compared with nobody here. Losses are means over the tokens of that text."
)

# ---------------------------------------------------------------- one run

_EPOCH = re.compile(r"Training Epoch: (\d+)/")
_EVAL_LOSS = re.compile(r"^eval loss (nan|inf|[-+\d.e]+)$")
_ACCURACY = re.compile(r"^Accuracy on validation set: (\d+) / (\d+) = ")


def validations(log: Path) -> dict[int, tuple[Accuracy, float | None]]:
    """{epoch index: (accuracy, loss)} of a log, by the training epoch that each validation follows.

    Of an epoch that a resumed run repeated the last one counts; an evaluation without training before it is of no epoch.
    """
    found, epoch, loss = {}, None, None
    for line in re.split(r"[\r\n]", log.read_text(errors="replace")):
        if line.startswith("Config: "):
            epoch = None
        elif match := _EPOCH.search(line):
            epoch = int(match[1]) - 1
        elif match := _EVAL_LOSS.match(line):
            loss = float(match[1])
        elif match := _ACCURACY.match(line):
            if epoch is not None and int(match[2]):
                found[epoch] = Accuracy(int(match[1]), int(match[2])), loss
            loss = None
    return found


def epochs_of(run: Run) -> list[dict]:
    """A record for every validated epoch: {"epoch" (index), "stage", "n_latents", and the `MEASURES`}.

    accuracy (exact match) and two_choice are {"correct", "n", "accuracy", "ci95"}, losses in nats per token, vector_distance
    the L2 of the pause vector from the `<<` row that it started as; None where a source has no such number.
    """
    if run.metrics is None:
        found = validations(run.log_path)
        losses = {e: list(batches.values()) for e, batches in run.log.losses.items()}
        return [
            _epoch(run, e, accuracy, train_loss=fmean(losses[e]) if losses.get(e) else None, eval_loss=loss)
            for e, (accuracy, loss) in sorted(found.items())
        ]
    made = []
    for e, record in sorted(run.metrics.evals.items()):
        trained, n = run.metrics.epochs.get(e, {}), record.get("two_choice_total")
        two_choice = wilson(round(n * record["eval/two_choice_acc"]), n) if n else None
        more = {"train_loss": trained.get("train/loss_mean"), "eval_loss": record.get("eval/loss"), "two_choice": two_choice}
        more |= {"vector_distance": trained.get("pause_l2"), "n_latents": record.get("n_latents")}
        made.append(_epoch(run, e, run.evals[e], **more))
    return made


def _epoch(run: Run, epoch: int, accuracy: Accuracy, n_latents: int | None = None, **more) -> dict:
    stage, config = run.stage(epoch), run.config
    if n_latents is None:  # a log does not say
        per_step = int(config.get("c_thought") or 1) if run.model in WITH_THOUGHTS else 0
        n_latents = min(stage, int(config.get("max_latent_stage") or 6)) * per_step
    record = {"epoch": epoch, "stage": stage, "n_latents": n_latents, **dict.fromkeys(MEASURES), **more}
    record["accuracy"] = wilson(*accuracy)
    return {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in record.items()}


def shared_start(run: Run) -> tuple[Path | None, list[dict]]:
    """(folder, epochs) of the training that a run started from: what it did not train itself."""
    given, done = run.config.get("load_model_path"), int(run.config.get("resume") or 0)
    if not done or not given or str(given) == "None":
        return None, []
    path = Path(str(given))
    folder = path.parent if path.name.startswith("checkpoint_") else path
    places = [folder] + ([run.folder.parent / folder.name] if run.folder else [])
    folder = next((place for place in places if (place / "metrics.jsonl").is_file()), None)
    if folder is None or (run.folder and folder.samefile(run.folder)):  # a run that goes on has its own epochs
        return None, []
    return folder, [{**e, "trained_by": folder.name} for e in epochs_of(Run(run.model, folder=folder)) if e["epoch"] < done]


def curve_of(run: Run) -> dict | None:
    """The result of one run; None where no epoch is validated yet. Raises ValueError where log and metrics disagree."""
    if run.problem:
        raise ValueError(run.problem)
    own, (folder, before) = epochs_of(run), shared_start(run)
    if not own:
        return None
    epochs = before + own
    n, thinks = {e["accuracy"]["n"] for e in epochs}, run.model in WITH_THOUGHTS
    return {
        "schema_version": SCHEMA_VERSION,
        "experiment": "curriculum",
        "model": run.label,
        "model_key": run.model,
        "repeat": run.repeat,
        "feedback_mode": run.config.get("feedback_mode", "continuous") if thinks else "none",
        "train_seed": run.config.get("seed"),
        "source": str(run.folder / "metrics.jsonl" if run.metrics else run.log_path),
        "started_from": str(folder) if folder else None,
        "versions": run.info.get("versions", {}),
        "data": {"file": run.config.get("val_path"), "n": max(n)},
        "n": max(n),
        "n_excluded": {},
        "gates": {"log_and_metrics_agree": {"passed": True, "compared": bool(run.log and run.metrics)}},
        "note": NOTE,
        "epochs": epochs,
        "stages": stage_means(epochs),
    }


def value_of(epoch: dict, measure: str) -> float | None:
    """A number of an epoch's record; of a level its accuracy, a fraction."""
    found = epoch[measure]
    return found["accuracy"] if isinstance(found, dict) else found


def stage_means(epochs: list[dict]) -> list[dict]:
    """For each stage its first and last epoch, their number, and the means of the `MEASURES` over them."""
    means = []
    for stage in sorted({e["stage"] for e in epochs}):
        within = [e for e in epochs if e["stage"] == stage]
        about = {"stage": stage, "first_epoch": within[0]["epoch"], "last_epoch": within[-1]["epoch"], "n_epochs": len(within)}
        for measure in MEASURES:
            values = [x for e in within if (x := value_of(e, measure)) is not None]
            about[measure] = fmean(values) if values else None
        means.append(about)
    return means


# ---------------------------------------------------------------- over seeds


def over_seeds(curves: dict[str, list[dict]], part: str, key: str) -> dict[str, list[dict]]:
    """{model: [...]}: mean, sd and t interval over the seeds that have a number, with how many they are.

    `part` and `key`: "epochs" by "epoch", or "stages" by "stage".
    """
    bands = {}
    for model, runs in curves.items():
        bands[model] = []
        for at in sorted({one[key] for run in runs for one in run[part]}):
            ones = [one for run in runs for one in run[part] if one[key] == at]
            band = {key: at, "stage": ones[0]["stage"] if len({one["stage"] for one in ones}) == 1 else None}
            for measure in MEASURES:
                values = [x for one in ones if (x := value_of(one, measure)) is not None]
                found = seed_interval(values) if values else {"n": 0, "values": [], "mean": None, "sd": None, "ci95": None}
                band[measure] = {name: found[name] for name in ("n", "values", "mean", "sd", "ci95")}
            bands[model].append(band)
    return bands


def first_difference(curves: dict[str, list[dict]], first: str, second: str) -> dict:
    """Where validation accuracies of two models that are trained on the same text part: by more than the noise floor.

    Means over seeds at the same epoch, stage and rows; the floor is abs(m4b - m5) there (two trainings of one function).
    `epoch` is the first one with abs(difference) above it, `lasting_epoch` the first one from which on every epoch is;
    None with a `reason` where there is none.
    """
    fresh, why = _floor_runs(curves)
    found = []
    for epoch in sorted({e["epoch"] for run in curves.get(first, []) for e in run["epochs"]}):
        here = {model: _at(curves.get(model, []), epoch) for model in (first, second)}
        noise = {"m4b": _at(fresh, epoch), "m5": _at(curves.get("m5", []), epoch)}
        if not all(here.values()) or not _comparable([*here[first], *here[second]]):
            continue
        a, b = ([value_of(e, "accuracy") for e in here[model]] for model in (first, second))
        floor = None
        if all(noise.values()) and _comparable([*noise["m4b"], *noise["m5"], *here[first]]):
            floor = noise_floor(*([value_of(e, "accuracy") for e in noise[model]] for model in ("m4b", "m5")))
        record = {"epoch": epoch, "stage": here[first][0]["stage"], "n": here[first][0]["accuracy"]["n"]}
        record |= {"difference": fmean(a) - fmean(b), "noise_floor": floor, "n_seeds": {first: len(a), second: len(b)}}
        found.append(record)
    judged = [e for e in found if e["noise_floor"] is not None]
    beyond = [abs(e["difference"]) > e["noise_floor"]["value"] + ROUNDING for e in judged]
    about = {"first": first, "second": second, "epoch": None, "lasting_epoch": None, "reason": None, "epochs": found}
    if not found:
        return about | {"reason": f"no epoch at which both {first} and {second} validated the same rows at the same stage"}
    if not judged:
        return about | {"reason": why or "m4b and m5 have no epoch in common with them"}
    if not any(beyond):
        return about | {"reason": f"no difference above the noise floor in {len(judged)} epochs"}
    last_below = max((i for i, is_beyond in enumerate(beyond) if not is_beyond), default=-1)
    lasting = judged[last_below + 1]["epoch"] if last_below + 1 < len(judged) else None
    return (
        about
        | {key: judged[beyond.index(True)][key] for key in ("epoch", "stage", "difference", "noise_floor")}
        | {"lasting_epoch": lasting}
    )


def _floor_runs(curves: dict[str, list[dict]]) -> tuple[list[dict], str]:
    """The runs of m4b that are no second copies of m5's, and why there are none."""
    taken = {run["train_seed"] for run in curves.get("m5", [])} - {None}
    fresh = [run for run in curves.get("m4b", []) if run["train_seed"] not in taken]
    if fresh:
        return fresh, ""
    same = "no noise floor: m4b has the seeds of m5, so they are the same runs"
    return [], same if curves.get("m4b") else "no noise floor: no run of m4b"


def _at(runs: list[dict], epoch: int) -> list[dict]:
    return [e for run in runs for e in run["epochs"] if e["epoch"] == epoch]


def _comparable(epochs: list[dict]) -> bool:
    """Whether all are of one stage, so that the text is the same, and of as many rows."""
    return len({(e["stage"], e["accuracy"]["n"]) for e in epochs}) == 1


# ---------------------------------------------------------------- the command


def runs_of(args: argparse.Namespace) -> list[Run]:
    """The runs that --study or --logs names, those that have been started."""
    if bool(args.study) == bool(args.logs):
        raise ValueError("give either --study FOLDER or --logs FOLDER [--runs FOLDER]")
    if args.logs:
        found = list(load_study(args.logs, args.runs).values())
    else:
        plan = args.study / "study.json"
        if not plan.is_file():
            raise ValueError(f"{args.study} has no study.json; make it with: bash scripts/study.sh args/study_....yaml")
        found = []
        for run in read_json(plan)["runs"]:
            log, folder = Path(run["log"]), Path(run["folder"])
            given = log if log.is_file() else None, folder if folder.is_dir() else None
            found.append(Run(run["model"], run["repeat"], *given))
    found = [run for run in found if run.log is not None or run.metrics is not None]
    return sorted(found, key=lambda run: (MODELS.index(run.model), run.repeat))


def save(out: Path, results: dict[str, dict], unsound: dict[str, str], waiting: list[str]) -> None:
    """A file a run, and results.json with all of them; what concerns several runs is its `verification`."""
    for label, result in results.items():
        write_json(out / f"{label}_curriculum.json", result, allow_nan=False)
        (out / f"{label}_curriculum.failed.json").unlink(missing_ok=True)
    for label, reason in unsound.items():
        write_json(out / f"{label}_curriculum.failed.json", {"schema_version": SCHEMA_VERSION, "reason": reason})
        (out / f"{label}_curriculum.json").unlink(missing_ok=True)
    models = dict.fromkeys(result["model_key"] for result in results.values())
    curves = {model: [r for r in results.values() if r["model_key"] == model] for model in models}
    verification = {
        "note": NOTE,
        "log_and_metrics_disagree": unsound,
        "not_validated_yet": waiting,
        "first_difference": {f"{a}-{b}": first_difference(curves, a, b) for a, b in SAME_TEXT},
        "curves": over_seeds(curves, "epochs", "epoch"),
        "stage_means": over_seeds(curves, "stages", "stage"),
    }
    write_json(out / "results.json", {**results, "verification": verification}, allow_nan=False)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 1: some run has no sound account; 2: a mistake in the command, or nothing to read."""
    parser = parser_of(__doc__, "python -m analysis.curriculum")
    parser.add_argument("--study", type=Path, help="a study's result folder, whose study.json names its runs")
    parser.add_argument("--logs", type=Path, help="a folder of logs (m3_coconut.log, m3_coconut-s1.log, ...) instead")
    parser.add_argument("--runs", type=Path, help="with --logs: the folder of run folders (default: as the logs say)")
    parser.add_argument("--output_dir", type=Path, help="default: results, or with --study its folder final")
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(argv)
    typed = " ".join(["python", "-m", "analysis.curriculum", *argv])
    runs, results, unsound, waiting = runs_of(args), {}, {}, []
    for run in runs:
        try:
            found = curve_of(run)
        except ValueError as error:
            unsound[run.label] = str(error)
            continue
        if found is None:
            waiting.append(run.label)
        else:
            results[run.label] = found | {"command": typed}
    if not results and not unsound:
        raise ValueError(f"{args.study or args.logs}: no run has validated an epoch yet; train one first")
    out = (args.output_dir or (args.study / "final" if args.study else Path("results"))) / "curriculum"
    out.mkdir(parents=True, exist_ok=True)
    save(out, results, unsound, waiting)
    for label, reason in unsound.items():
        print(f"error: {label}: {reason}", file=sys.stderr)
    print(f"Written: {out}/results.json, {len(results)} runs")
    return int(bool(unsound))


if __name__ == "__main__":
    sys.exit(main())
