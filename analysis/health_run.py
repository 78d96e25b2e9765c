"""Health checks of the run that made a checkpoint, from its folder: rates that reach the weights, validations that are real.

learning_rate(patient)      rates are positive, and change where a schedule is configured
weights_move(patient)       the checkpoint differs from the one before it, or from where training began, in every matrix
validation(patient)         losses are numbers, differ from epoch to epoch, and perplexities are their exponentials
disjoint(patient)           no question is in both the training and the validation file
"""

import math
import re
from pathlib import Path

from analysis.health_patient import Patient, Result, not_applicable
from checkpoint import build_model, find_checkpoint, read_weights, stored_weights
from files import read_jsonl
from optimizers import learning_rate as scheduled_rate
from tokens import load_rows, question_hash

TINY_LOSS = 1e-3  # below it four decimals hide what moves
MOST_OFF = 1e-3  # of the scheduled rate
SHOWN = 5


def _steps(patient: Patient) -> list[dict]:
    """Records of the updates that made the checkpoint, in their order; of a repeated one the last."""
    epochs = math.inf if patient.subject.epoch is None else patient.subject.epoch
    records = read_jsonl(patient.folder / "metrics.jsonl", "event")
    steps = {r["train/step"]: r for r in records if r["event"] == "step" and r["epoch"] < epochs}
    return [steps[number] for number in sorted(steps)]


def learning_rate(patient: Patient) -> list[Result]:
    """How many different rates the updates had; the last epoch's are those of the config's schedule."""
    name, steps, config = "learning_rate", _steps(patient), patient.subject.config
    if not steps:
        return [not_applicable(name, f"{patient.folder} has no record of updates")]
    rates = [r["lr"] for r in steps]
    sizes = {r["epoch"]: r["updates"] for r in read_jsonl(patient.folder / "metrics.jsonl") if r["event"] == "train_epoch"}
    n = max(sizes.values(), default=len(steps))  # updates of an epoch
    total, warmup = config.num_epochs * n, config.warmup_steps or round(config.warmup_epochs * n)
    planned = [scheduled_rate(r["train/step"], total, warmup, config) for r in steps]
    last = [i for i, r in enumerate(steps) if r["epoch"] == steps[-1]["epoch"]] if sizes else []
    off = max((abs(rates[i] - planned[i]) / planned[i] for i in last), default=0.0)
    norms = [r["train/update_norm"] for r in steps if "train/update_norm" in r]
    alive = all(math.isfinite(x) and x > 0 for x in (*rates, *norms))
    values, needs = len({*rates}), min(len({*planned}), 2)
    detail = f"{min(rates):.3g} to {max(rates):.3g} over {len(rates)} updates"
    detail += f"; the last epoch's {off:.1%} off the schedule" if off > MOST_OFF else ""
    detail += f"; update norms {min(norms):.3g} to {max(norms):.3g}" if norms else ""
    rule = f">= {needs} rates, all above 0"
    return [Result(name, values, rule, alive and values >= needs and off <= MOST_OFF, detail)]


def weights_move(patient: Patient) -> list[Result]:
    """The distance from the weights before, relative to their size; every matrix must have moved."""
    name, rule = "weights_move", "> 0, in every matrix"
    before, source = _weights_before(patient)
    if before is None:
        return [not_applicable(name, source, None, rule)]
    after = read_weights(patient.subject.path)
    shared = [
        key for key in after if key in before and after[key].shape == before[key].shape and after[key].is_floating_point()
    ]
    moved = sum((after[key].double() - before[key].double()).square().sum().item() for key in shared)
    size = sum(before[key].double().square().sum().item() for key in shared)
    distance = math.sqrt(moved / max(size, 1e-30))
    still = [key for key in shared if after[key].ndim > 1 and after[key].equal(before[key].to(after[key].dtype))]
    some = ", ".join(still[:SHOWN]) + (" ..." if len(still) > SHOWN else "")
    detail = f"relative to {source}" + (f"; did not move: {some}" if still else "")
    ok = math.isfinite(distance) and distance > 0 and not still
    return [Result(name, distance, rule, ok, detail, {"still": still})]


def _weights_before(patient: Patient) -> tuple[dict | None, str]:
    """Weights that the checkpoint was trained from, and which; or why there are none."""
    path, config = patient.subject.path, patient.subject.config
    if not (patient.folder / "run.json").is_file():
        return None, "no folder of a training run"
    number = re.search(r"(?<=_)\d+", path.name)
    previous = number and path.with_name(path.name.replace(number[0], str(int(number[0]) - 1)))
    if previous and previous.is_file():
        return read_weights(previous), previous.name
    if number and int(number[0]) <= config.resume:
        return None, "not trained here"
    try:
        start = find_checkpoint(config.load_model_path) if config.load_model_path else None
        return stored_weights(build_model(config, start)[0]), "the start of training"
    except ValueError as error:
        return None, f"where training began can't be made again: {error}"


def validation(patient: Patient) -> list[Result]:
    """How many validations are not to be believed: a loss that is no number or stands still, a perplexity of another loss."""
    name, rule = "validation", "0 doubtful"
    evals = {r["epoch"]: r for r in read_jsonl(patient.folder / "metrics.jsonl", "event") if r["event"] == "eval"}
    losses = {epoch: _of(record, "loss") for epoch, record in sorted(evals.items()) if _of(record, "loss") is not None}
    if not losses:
        return [not_applicable(name, f"{patient.folder} has no validation with a loss", None, rule)]
    doubts = [f"epoch {epoch + 1}: loss {loss}" for epoch, loss in losses.items() if not math.isfinite(loss)]
    for (a, first), (b, second) in zip(losses.items(), list(losses.items())[1:]):
        same = round(first, 4) == round(second, 4) if max(first, second) > TINY_LOSS else first == second
        doubts += [f"epochs {a + 1} and {b + 1}: loss {first:.4f} twice"] if same else []
    for epoch, loss in losses.items():
        perplexity = _of(evals[epoch], "perplexity")
        if perplexity is not None and not math.isclose(perplexity, math.exp(min(loss, 700)), rel_tol=1e-3):
            doubts.append(f"epoch {epoch + 1}: perplexity {perplexity:.4g} for loss {loss:.4g}")
    shown = ", ".join(f"{loss:.4f}" for loss in list(losses.values())[-SHOWN:])
    return [Result(name, len(doubts), rule, not doubts, "; ".join(doubts[:SHOWN]) or f"losses {shown}", {"losses": losses})]


def _of(record: dict, what: str) -> float | None:
    return next((record[key] for key in (f"eval/{what}", f"val/{what}") if record.get(key) is not None), None)


def disjoint(patient: Patient) -> list[Result]:
    """How many questions of the validation rows are among the training rows."""
    name, rule, config = "disjoint", "0 questions in both", patient.subject.config
    given = {"train": (config.train_path, config.max_train_samples), "val": (config.val_path, config.max_val_samples)}
    missing = [str(path) for path, _ in given.values() if not path or not Path(path).is_file()]
    if missing:
        return [not_applicable(name, f"data not found: {', '.join(missing)}", None, rule)]
    asked = {key: [question_hash(row) for row in load_rows(path, most)] for key, (path, most) in given.items()}
    both = {*asked["train"]} & {*asked["val"]}
    detail = f"{len(asked['val'])} validation rows, {len(asked['train'])} training rows"
    return [Result(name, len(both), rule, not both, detail)]
