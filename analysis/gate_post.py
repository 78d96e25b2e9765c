"""Checks after training and red flags of the curriculum study.

Checks 1 to 12 must all hold. Flags never block and are never silent: each is RAISED, CLEAR, or waits for a named input.

    for result in post_checks(study) + red_flags(study):
        print(result.gate, result.status)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from analysis import gate_files
from analysis.findings import exact_match, set_level
from analysis.gate_result import CLEAR, FAIL, NOT_YET, RAISED, Check, Result, missing
from analysis.gate_rules import GATES, Study, line_check
from analysis.runlog import read_log
from analysis.runs import EPOCHS, Run, planned_stage
from checkpoint import read_weights

LATENT_MODELS = ("m3", "m4", "m4b", "m5")
CURRICULUM_MODELS = ("m0", *LATENT_MODELS)
LN2 = 0.693
HOURS = 4


def _runs(study: Study, models: Iterable[str]) -> list[Run]:
    """Every repeat of the models that the study trains; an empty run stands for a missing model."""
    return [study.run(m, repeat) for m in models if m in study.models for repeat in study.repeats(m)]


def _post(number: int, title: str, runs: list[Run], checks: list[Check], notes: list[str] | None = None) -> Result:
    uncalibrated = list(dict.fromkeys(reason for run in runs for reason in run.uncalibrated))
    return Result(f"post {number}", title, checks, notes or [], uncalibrated=uncalibrated)


# ------------------------------------------------------------------------------------------------ after training


def post_checks(study: Study) -> list[Result]:
    """The twelve checks, in their order."""
    everyone, latent = _runs(study, study.models), _runs(study, LATENT_MODELS)
    last = [_last_line(run, 70 if run.model == "m1" else 40) for run in _runs(study, ("m1", "m4", "m4b", "m5"))]
    m1 = [line_check(run, run.last_epoch, "validation", ">= 74", lambda x: x >= 74) for run in _runs(study, ("m1",))]
    results = [
        _post(1, "species better than a coin from epoch index 15", latent, [_two_choice(run) for run in latent]),
        _post(2, "final checkpoint loads and computes", everyone, [_loads(run) for run in everyone]),
        _post(3, "last validation", everyone, last),
        _post(4, "m1 at the last epoch", _runs(study, ("m1",)), m1),
        _post(5, "stage and latents as planned", everyone, [_schedule(run) for run in everyone]),
        _post(6, "no NaN or Inf", everyone, [_finite(run) for run in everyone]),
    ]
    for number, model in ((7, "m4b"), (8, "m5")):
        runs = _runs(study, (model,))
        results.append(_post(number, f"{model} moved", runs, [c for run in runs for c in _vector(run)]))
    results.append(_post(9, "m5 does not recycle", _runs(study, ("m5",)), _no_recycling(study)))
    for number, title, gate in ((10, "m5 - m3 on test", "4-id"), (11, "m4 unchanged", "4c")):
        judged = GATES[gate](study)
        result = _post(number, title, [], [c for r in judged for c in r.checks], [n for r in judged for n in r.notes])
        result.uncalibrated = [text for r in judged for text in r.uncalibrated]
        result.accepted = next((r.accepted for r in judged), "")
        results.append(result)
    return [*results, _post(12, "re-evaluation equals the log", everyone, [_reevaluated(run) for run in everyone])]


def _two_choice(run: Run) -> Check:
    name, rule = f"{run.label} highest two-choice cross-entropy", f"< {LN2}"
    found = {e: r.get("eval/two_choice_ce") for e, r in _evals(run).items() if e >= 15}
    found = {e: loss for e, loss in found.items() if loss is not None}
    if not found:
        return missing(name, rule, f"eval/two_choice_ce from epoch index 15 in metrics.jsonl of {run.label}")
    worst = max(found, key=lambda e: math.inf if math.isnan(found[e]) else found[e])
    return Check(name, f"{found[worst]:.4f} (index {worst})", rule, ok=found[worst] < LN2, n=len(found))


def _evals(run: Run) -> dict[int, dict]:
    return run.metrics.evals if run.metrics else {}


def _loads(run: Run) -> Check:
    name, rule, number = f"{run.label} checkpoint_{run.last_epoch}", "strict, finite", run.last_epoch
    if run.folder is None or not (run.folder / f"checkpoint_{number}").is_file():
        return missing(name, rule, f"checkpoint_{number} of {run.label} (--runs)")
    value, rule, ok, detail = gate_files.strict_forward(run, number)
    return Check(name, value, rule, ok, detail=detail)


def _last_line(run: Run, threshold: int) -> Check:
    return line_check(run, run.last_epoch, "validation", f">= {threshold}", lambda x: x >= threshold)


def _schedule(run: Run) -> Check:
    """Recorded stage and latent count of every epoch against the plan, training and validation alike."""
    name, rule = f"{run.label} epochs off the plan", "= 0"
    records = [*(run.metrics.epochs.values() if run.metrics else ()), *_evals(run).values()]
    if not records:
        return missing(name, rule, f"metrics.jsonl of {run.label}")
    config, calibrated = run.config, not run.uncalibrated
    per_stage = 5 if calibrated else int(config.get("epochs_per_stage") or 5)
    cap = 6 if calibrated else int(config.get("max_latent_stage") or 6)
    per_step = 1 if calibrated else int(config.get("c_thought") or 1)
    off = []
    for record in records:
        epoch = int(record["epoch"])
        stage = planned_stage(run.model, epoch, per_stage)
        latents = min(stage, cap) * per_step if run.model in LATENT_MODELS else 0
        if (record.get("stage"), record.get("n_latents")) != (stage, latents):
            off.append(epoch)
    wanted = {int(r["epoch"]) for r in records}
    if calibrated and len(wanted) < EPOCHS and not off:
        return missing(name, rule, f"all {EPOCHS} epochs of {run.label} ({len(wanted)} so far)")
    value = str(len(off)) + (f" (first index {off[0]})" if off else "")
    return Check(name, value, rule, ok=not off, n=len(wanted))


def _finite(run: Run) -> Check:
    name = f"{run.label} NaN or Inf in log and metrics"
    if run.log is None and run.metrics is None:
        return missing(name, "= 0", f"log or metrics of {run.label}")
    found = list(run.log.non_finite) if run.log else []
    found += [f"{key} at epoch index {epoch}" for epoch, key in (run.metrics.non_finite() if run.metrics else [])]
    return Check(name, f"{len(found)}{f': {found[0][:40]}' if found else ''}", "= 0", ok=not found)


def _vector(run: Run) -> list[Check]:
    return gate_files.vector_moved(run, run.last_epoch)[0]


def _no_recycling(study: Study) -> list[Check]:
    """The code on a tiny model, and the mode that the final file names."""
    checks = [gate_files.recycling_check()]
    for run in _runs(study, ("m5",)):
        path = run.folder / f"checkpoint_{run.last_epoch}" if run.folder else None
        if path is None or not path.is_file():
            needs = f"checkpoint_{run.last_epoch} of {run.label} (--runs)"
            checks.append(missing(f"{run.label} feedback_mode_id", "= 3", needs))
            continue
        try:
            checks += gate_files.mode_check(read_weights(path), "m5")
        except ValueError as error:
            checks.append(missing(f"{run.label} feedback_mode_id", "= 3", str(error)))
    return checks


def _reevaluated(run: Run) -> Check:
    """Line of a log `<log stem>-reeval.log`, written by an evaluation-only run of the final file."""
    name, rule = f"{run.label} re-evaluated", "= logged"
    path = run.log_path.with_name(f"{run.log_path.stem}-reeval.log") if run.log_path else None
    logged = run.evals.get(run.last_epoch - 1)
    again = read_log(path).accuracies if path and path.is_file() else []
    if logged is None or run.problem or not again:
        wanted = path.name if path else f"the log of {run.label}"
        return missing(name, rule, f"{wanted} (run.py ... only_eval=True on checkpoint_{run.last_epoch})")
    return Check(name, str(again[-1]), f"= {logged.correct}/{logged.total}", ok=again[-1] == logged, n=logged.total)


# ------------------------------------------------------------------------------------------------ red flags


def red_flags(study: Study) -> list[Result]:
    """Every red flag: a check that is not ok raises it."""
    everyone = _runs(study, study.models)
    flags = [
        _flag("spike", "a stage starts above 3 x the last loss", _spikes(study), "check the optimizer reset"),
        _flag("collapse", "m3 at most 55 from epoch index 20 on", [_collapse(r) for r in _runs(study, ("m3",))]),
        _flag("leak", "an accuracy of 100", [_leak(study, r) for r in everyone], "look for the answer in the input"),
        _flag("m5-above-m3", "by 3 or more", _gaps(study, lambda gap: gap < 3, "< 3", ("m5",)), "treat as bug first"),
        _flag("slow", f"more than {HOURS} h a model", [_hours(r) for r in everyone], "GPU use, share of evaluation"),
        _flag("pause-equals-m3", "m4b or m5 within 3 of m3", _equal(study), "a result, not a bug"),
        _flag("probes", "all exactly 1/classes, or exactly 1", _probes(study), "broken extraction; leak"),
        _flag("ood-coin", "every OOD set near 50 two-choice", _coin(study), "no generalisation; check the prompts"),
    ]
    for name, title, reading in (
        ("one-family", "m3 better in only one experiment family", "no claim"),
        ("unused", "high selectivity, no causal effect", "information present but unused"),
        ("unordered", "OOD success, no order effect", "not sequential reasoning"),
    ):
        needs = "the verdict of all experiments (analysis.report)"
        flags.append(_flag(name, title, [missing("read from the report", "", needs)], reading))
    return flags


def _flag(name: str, title: str, checks: list[Check], reading: str = "") -> Result:
    verdicts = [check.ok for check in checks if check.decisive]
    status = RAISED if False in verdicts else CLEAR if verdicts and None not in verdicts else NOT_YET
    notes = [reading] if reading and status == RAISED else []
    shown = [check for check in checks if check.ok is False or not check.decisive] if status == RAISED else checks
    return Result(f"flag {name}", title, shown, notes, blocks="", forced=status)


def _spikes(study: Study) -> list[Check]:
    """One row a run: its largest jump of the mean training loss at a change of stage."""
    checks = []
    for run in _runs(study, CURRICULUM_MODELS):
        name, means = f"{run.label} largest jump at a stage change", run.train_means
        edges = [e for e in means if e - 1 in means and run.stage(e) != run.stage(e - 1) and means[e - 1] > 0]
        if not edges:
            checks.append(missing(name, "<= 3", f"training loss around a stage change of {run.label}"))
            continue
        worst = max(edges, key=lambda e: means[e] / means[e - 1])
        ratio = means[worst] / means[worst - 1]
        checks.append(Check(name, f"x{ratio:.2f} (index {worst})", "<= 3", ok=ratio <= 3, n=len(edges)))
    return checks


def _collapse(run: Run) -> Check:
    late = {e: accuracy for e, accuracy in run.evals.items() if e >= 20}
    name = f"{run.label} lowest validation from index 20"
    if not late or run.problem:
        return missing(name, "> 55", run.problem or f"line 21 of {run.label}")
    lowest = min(late.values(), key=lambda accuracy: accuracy.percent)
    return Check(name, str(lowest), "> 55", ok=lowest.percent > 55, n=lowest.total)


def _leak(study: Study, run: Run) -> Check:
    name, n_values = f"{run.label} accuracies at 100", len(run.evals)
    full = [f"line {e + 1}" for e, accuracy in run.evals.items() if accuracy.percent == 100]
    for key, result in study.findings.sets(run.model, run.repeat).items():
        accuracy = exact_match(result)
        n_values += 1
        full += [key] if accuracy and accuracy.percent == 100 else []
    if not n_values:
        return missing(name, "= 0", f"accuracies of {run.label}")
    return Check(name, ", ".join(full[:3]) or "0", "= 0", ok=not full, n=n_values)


def _gaps(study: Study, holds: Callable, rule: str, models: tuple[str, ...]) -> list[Check]:
    """Final validation and, where it is there, test accuracy of pause models minus m3's."""
    checks = []
    for model in models:
        for repeat in study.repeats("m3", model):
            other, m3 = study.run(model, repeat), study.run("m3", repeat)
            a, b = (None if r.problem else r.evals.get(r.last_epoch - 1) for r in (other, m3))
            name = f"{other.label} - m3"
            if a and b:
                gap = a.percent - b.percent
                checks.append(Check(f"{name}, last validation", f"{float(gap):+.2f}", rule, ok=holds(gap), n=a.total))
            else:
                needs = f"the last lines of {other.label} and {m3.label}"
                checks.append(missing(f"{name}, last validation", rule, needs))
            test = [study.findings.accuracy(key, repeat) for key in (model, "m3")]
            if all(test):
                gap = test[0].percent - test[1].percent
                checks.append(Check(f"{name}, test", f"{float(gap):+.2f}", rule, ok=holds(gap), n=test[0].n))
    return checks


def _equal(study: Study) -> list[Check]:
    return _gaps(study, lambda gap: abs(gap) >= 3, "apart >= 3", ("m4b", "m5"))


def _hours(run: Run) -> Check:
    name, rule = f"{run.label} hours", f"<= {HOURS}"
    records = [*run.metrics.epochs.values(), *run.metrics.evals.values()] if run.metrics else []
    seconds = [float(record["seconds"]) for record in records if record.get("seconds") is not None]
    if not seconds:
        return missing(name, rule, f"seconds in metrics.jsonl of {run.label}")
    spent = math.fsum(float(r.get("seconds") or 0) for r in run.metrics.evals.values()) / max(math.fsum(seconds), 1e-9)
    hours = math.fsum(seconds) / 3600
    return Check(name, f"{hours:.2f} ({spent:.0%} evaluation)", rule, ok=hours <= HOURS, n=len(run.metrics.epochs))


def _probes(study: Study) -> list[Check]:
    checks = []
    for run in _runs(study, LATENT_MODELS):
        name, rule = f"{run.label} probe cells", "not all alike"
        record = study.findings.record("probing", run.model, run.repeat) or {}
        cells = [x for row in record.get("linear_probe_accuracy") or [] for x in row if x is not None]
        if not cells:
            checks.append(missing(name, rule, f"probing results of {run.label} (analysis.probing)"))
            continue
        whole = 100 if max(cells) > 1 else 1
        classes = record.get("n_classes") or []
        classes = {c for row in (classes if isinstance(classes, list) else [classes]) for c in _flat(row)}
        chance = any(all(math.isclose(x / whole, 1 / c, abs_tol=1e-9) for x in cells) for c in classes if c)
        perfect = all(x == whole for x in cells)
        spread = f"{min(cells):.3g} to {max(cells):.3g}"
        value = "all exactly 1/classes" if chance else "all exactly 1" if perfect else spread
        checks.append(Check(name, value, rule, ok=not (chance or perfect), n=len(cells)))
    return checks


def _flat(value) -> Iterable[int]:
    return value if isinstance(value, list) else [value]


def _coin(study: Study) -> list[Check]:
    """Near 50: the 95 % interval of the two-choice accuracy covers it, in every OOD set of a model."""
    checks = []
    for run in _runs(study, LATENT_MODELS):
        name, rule, levels = f"{run.label} OOD sets away from 50", ">= 1", []
        for key, result in study.findings.sets(run.model, run.repeat).items():
            found = set_level(result, "two_choice_accuracy", "two_choice")
            if key.startswith("ood_") and found and found.n:
                levels.append(found)
        if not levels:
            checks.append(missing(name, rule, f"two-choice accuracies of {run.label} (analysis.ood)"))
            continue
        away = sum(abs(float(x.percent) - 50) > 196 * math.sqrt(0.25 / x.n) for x in levels)
        checks.append(Check(name, f"{away} of {len(levels)}", rule, ok=away > 0, n=levels[0].n))
    return checks


def summary(results: list[Result]) -> str:
    """`3 PASS, 1 FAIL, 2 NOT YET`, with failures first."""
    order = (FAIL, RAISED, NOT_YET)
    counts = {status: sum(r.status == status for r in results) for status in dict.fromkeys(r.status for r in results)}
    ranked = sorted(counts, key=lambda status: order.index(status) if status in order else len(order))
    return ", ".join(f"{counts[status]} {status}" for status in ranked)
