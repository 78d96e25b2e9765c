"""Gates 0 to 5 of the curriculum study: rules on accuracies, checkpoints and experiment results.

"Line n" is the n-th validation of a run, epoch index n - 1. Accuracies and differences are compared as exact fractions.

    study = Study(load_study(Path("logs")), Findings([Path("results")]))
    for result in GATES["3"](study):
        print(result.status, result.checks[0].value)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from analysis import gate_files
from analysis.findings import Findings, Level
from analysis.gate_result import FAIL, NOT_YET, PASS, Check, Result, info, missing, not_applicable
from analysis.runlog import Accuracy
from analysis.runs import MODELS, Run
from checkpoint import numbered_checkpoints

ROOT = Path(__file__).resolve().parents[1]
EVIDENCE = "evidence for curriculum + compute"
SEEDS_FOR_MEANS = 3


@dataclass
class Study:
    """What the gates judge. `models`: those that the study trains; others read `not applicable`."""

    runs: dict[tuple[str, int], Run]
    findings: Findings
    models: tuple[str, ...] = MODELS
    data: Path = ROOT / "data"
    args: Path = ROOT / "args"
    accept: str = ""
    history: list[dict] = field(default_factory=list)  # earlier records of gates.json

    def run(self, model: str, repeat: int) -> Run:
        """The run, or one without log and folder, of which everything is missing."""
        return self.runs.get((model, repeat)) or Run(model, repeat)

    def repeats(self, *models: str) -> list[int]:
        """Repeats of which at least one of the models has a run; [0] if there is none."""
        return sorted({repeat for model, repeat in self.runs if model in models}) or [0]

    def absent(self, *models: str) -> list[str]:
        return [model for model in models if model not in self.models]


# ------------------------------------------------------------------------------------------------ shared pieces


def line_check(run: Run, line: int, name: str, rule: str, holds: Callable[[Fraction], bool]) -> Check:
    """A rule on validation `line` of a run."""
    name = f"{name} {run.label} line {line}"
    if run.problem:
        return missing(name, rule, f"agreement: {run.problem}")
    accuracy = run.evals.get(line - 1)
    if accuracy is None:
        return missing(name, rule, f"line {line} of {_source(run)} ({len(run.evals)} so far)")
    return Check(name, str(accuracy), rule, ok=holds(accuracy.percent), n=accuracy.total)


def _source(run: Run) -> str:
    return str(run.log_path.name if run.log_path else run.folder.name if run.folder else f"the log of {run.label}")


def diverging(run: Run, until: int) -> tuple[bool, str, list[Check]]:
    """Loss up to epoch index `until`: (diverging, where, checks).

    Diverging is a non-finite loss, or an epoch's mean training loss above 1.5 times the lowest mean that its stage had
    reached *before*: the first epochs of a stage, from which the loss falls, are no divergence.
    """
    bad = [f"epoch index {e}: {key}" for e, key in (run.metrics.non_finite() if run.metrics else []) if e <= until]
    if run.log:
        printed = ((e, x) for e, batches in run.log.losses.items() for x in batches.values())
        bad += [f"epoch index {e}: loss {x}" for e, x in printed if e <= until and not math.isfinite(x)]
        bad += run.log.bad_losses if run.metrics is None else []
        ends = (e for e in run.log.aborted if e <= until and e not in run.evals)  # a validated epoch was run again
        bad += [f"epoch index {e}: training stopped at a non-finite loss" for e in ends]
    worst, where, lowest = 0.0, "", {}
    means = {e: loss for e, loss in run.train_means.items() if e <= until}
    for epoch, loss in means.items():
        before = lowest.get(run.stage(epoch))
        if before and loss / before > worst:
            worst, where = loss / before, f"epoch index {epoch}"
        if math.isfinite(loss):
            lowest[run.stage(epoch)] = min(loss, before or math.inf)
    checks = [Check(f"{run.model} non-finite losses", str(len(bad)), "= 0", ok=not bad)]
    name = f"{run.model} loss over lowest of its stage"
    if worst:
        checks.append(Check(name, f"x{worst:.3f}", "<= 1.5", ok=worst <= 1.5, n=len(means)))
    else:
        checks.append(info(name, "no losses recorded"))
    return bool(bad) or worst > 1.5, where if worst > 1.5 else "; ".join(bad[:2]), checks


def _result(gate: str, runs: list[Run], checks: list[Check], notes: list[str] | None = None, **kwargs) -> Result:
    repeat = f" repeat {runs[0].repeat}" if runs[0].repeat else ""
    uncalibrated = [reason for run in runs for reason in run.uncalibrated]
    subject = ", ".join(run.model for run in runs) + repeat
    return Result(gate, subject, checks, notes or [], uncalibrated=uncalibrated, **kwargs)


# ------------------------------------------------------------------------------------------------ the gates


def gate_0(study: Study) -> list[Result]:
    """Files before training: data, configs, one step of every mode, recorded versions."""
    checks = gate_files.data_checks(study.data) + gate_files.config_checks(study.args, study.models)
    checks += gate_files.mode_checks()
    recorded = {run.label: run.info for run in study.runs.values() if run.info}
    if recorded:
        needed = {"torch", "transformers"}
        without = [label for label, record in recorded.items() if not needed <= set(record.get("versions", ()))]
        value = "none" if not without else ", ".join(without)
        checks.append(Check("runs without recorded versions", value, "none", ok=not without, n=len(recorded)))
    else:
        checks.append(missing("runs without recorded versions", "none", "a run.json (written when a run starts)"))
    reasons = [reason for run in study.runs.values() for reason in run.uncalibrated]
    return [Result("0", "files", checks, uncalibrated=reasons[:2])]


def gate_1(study: Study) -> list[Result]:
    """m1 learns at all. The third failing run stops the study."""
    if absent := study.absent("m1"):
        return [not_applicable("1", absent)]
    results = []
    for repeat in study.repeats("m1"):
        run = study.run("m1", repeat)
        result = _result("1", [run], [line_check(run, 10, "validation", ">= 70", lambda x: x >= 70)])
        first = run.metrics.start.get("time", "") if run.metrics else ""
        result.evidence = f"{first}{[a.correct for a in list(run.evals.values())[:10]]}"
        if result.status == FAIL:
            result.notes.append("check versions, data, effective batch")
            failed = {r.get("evidence") for r in study.history if r.get("gate") == "1" and r.get("status") == FAIL}
            if len(failed | {result.evidence}) >= 3:
                result.notes.append("third failing run of gate 1: stop the study")
        results.append(result)
    return results


def gate_2(study: Study) -> list[Result]:
    """m1 and m2 reach the published level, alike, with every checkpoint kept."""
    if absent := study.absent("m1", "m2"):
        return [not_applicable("2", absent)]
    return [_gate_2(study.run("m1", repeat), study.run("m2", repeat)) for repeat in study.repeats("m1", "m2")]


def _gate_2(m1: Run, m2: Run) -> Result:
    notes, checks = [], [line_check(m1, m1.last_epoch, "validation", ">= 74 (75 to 80)", lambda x: x >= 74)]
    checks.append(line_check(m2, m2.last_epoch, "validation", "known", lambda x: True))
    a, b = (_final(run) for run in (m1, m2))
    if a and (74 <= a.percent < 75 or a.percent > 80):
        notes.append(f"m1 at {float(a.percent):.2f} lies outside the expected 75 to 80")
    if a and b:
        gap = abs(a.percent - b.percent)
        checks.append(Check("abs(m1 - m2)", f"{float(gap):.2f}", "<= 5", ok=gap <= 5, n=a.total))
    else:
        checks.append(missing("abs(m1 - m2)", "<= 5", "the last line of m1 and m2"))
    for run in (m1, m2):
        full = [f"line {e + 1}" for e, accuracy in run.evals.items() if accuracy.percent == 100]
        name = f"{run.model} validations at 100"
        if run.evals:
            checks.append(Check(name, ", ".join(full[:2]) or "0", "= 0", ok=not full, n=len(run.evals)))
        wanted, kept = set(range(1, run.last_epoch + 1)), numbered_checkpoints(run.folder) if run.folder else []
        name, rule = f"{run.model} checkpoints", f"{len(wanted)} kept"
        if run.folder is None or (len(run.evals) < run.last_epoch and not wanted <= set(kept)):
            checks.append(missing(name, rule, f"the finished run folder of {run.label} (--runs)"))
        else:
            found = len(wanted & set(kept))
            checks.append(Check(name, str(found), rule, ok=found == len(wanted)))
    result = _result("2", [m1, m2], checks, notes)
    if result.status == FAIL:
        result.notes.append("check effective batch 128, reset_optimizer, data")
    return result


def _final(run: Run) -> Accuracy | None:
    return None if run.problem else run.evals.get(run.last_epoch - 1)


def gate_3(study: Study) -> list[Result]:
    """m3 survives the first two stages."""
    return _early(study, "3", "m3", 58)


def gate_3b(study: Study) -> list[Result]:
    """m5 survives the first two stages, and its vector learns."""
    return _early(study, "3b", "m5", 45)


def _early(study: Study, gate: str, model: str, threshold: int) -> list[Result]:
    if absent := study.absent(model):
        return [not_applicable(gate, absent)]
    results = []
    for repeat in study.repeats(model):
        run = study.run(model, repeat)
        check = line_check(run, 15, "validation", f"> {threshold}", lambda x: x > threshold)
        bad, where, losses = diverging(run, until=14)
        checks = [check] + (losses if run.evals or bad else [])
        notes = [f"diverging at {where}"] if bad else []
        if model == "m5":
            vector, source = gate_files.vector_moved(run, 15)
            checks, notes = checks + vector, notes + source
        result = _result(gate, [run], checks, notes)
        if result.status == FAIL:
            hint = "mode and gradient" if model == "m5" else "environment, effective batch, data; then halve lr"
            result.notes.append(f"check {hint}")
        results.append(result)
    return results


def gate_4(study: Study) -> list[Result]:
    """Either m3 beats m5, or m3 depends more on its thoughts. A failure is a finding and blocks nothing."""
    if absent := study.absent("m3", "m5"):
        return [not_applicable("4", absent)]
    return [_gate_4(study, repeat) for repeat in study.repeats("m3", "m4", "m4b", "m5")]


def _gate_4(study: Study, repeat: int) -> Result:
    runs = [study.run(model, repeat) for model in ("m3", "m4", "m4b", "m5") if model in study.models]
    checks, notes = [], ["passes if one of the two differences reaches its threshold"]
    for run in runs:
        check = line_check(run, run.last_epoch, "validation", "known", lambda x: True)
        checks.append(info(check.name, check.value, check.n))
    final = {run.model: _final(run) for run in runs}
    if final["m3"] and final["m5"]:
        gain = final["m3"].percent - final["m5"].percent
        checks.append(Check("validation m3 - m5", f"{float(gain):+.2f}", ">= 5", ok=gain >= 5, n=final["m3"].total))
    else:
        checks.append(missing("validation m3 - m5", ">= 5", "the last line of m3 and m5"))
    drops = {run.model: study.findings.sensitivity(run.model, repeat) for run in runs}
    for model, chains in drops.items():
        checks += [info(f"sensitivity {model}, {chain}", f"{drop}", drop.n) for chain, drop in chains.items()]
    name = "sensitivity m3 - m5, replay"
    if drops["m3"].get("replay") and drops["m5"].get("replay"):
        a, b = drops["m3"]["replay"], drops["m5"]["replay"]
        gain = a.percent - b.percent
        checks.append(Check(name, f"{float(gain):+.2f}", ">= 10", ok=gain >= 10, n=a.n))
    else:
        checks.append(missing(name, ">= 10", "corruption results of m3, m5 (analysis.corruption --abbreviated)"))
    verdicts = [check.ok for check in checks if check.decisive]
    status = PASS if True in verdicts else NOT_YET if None in verdicts else FAIL
    result = _result("4", runs, checks, notes, blocks="", forced=status)
    if status == FAIL:
        result.notes.append(EVIDENCE)
    return result


def gate_4_id(study: Study) -> list[Result]:
    """m5 must not beat m3 on the test set: single seeds, from three seeds on their means."""
    if absent := study.absent("m3", "m5"):
        return [not_applicable("4-id", absent)]
    pairs: dict[int, tuple[Level, Level]] = {}
    for repeat in range(max(study.repeats("m3", "m5")) + 1):
        levels = tuple(study.findings.accuracy(model, repeat) for model in ("m3", "m5"))
        if all(levels):
            pairs[repeat] = levels
    known = [study.run(model, repeat) for model in ("m3", "m5") for repeat in study.repeats(model)]
    checks = []
    for repeat, (m3, m5) in pairs.items():
        name = f"test m5 - m3{f', repeat {repeat}' if repeat else ''}"
        gap = m5.percent - m3.percent
        value, ok = f"{float(gap):+.2f} ({m5} - {m3})", gap < 3
        checks.append(info(name, value, m3.n) if len(pairs) >= SEEDS_FOR_MEANS else Check(name, value, "< 3", ok, m3.n))
    if len(pairs) >= SEEDS_FOR_MEANS:
        gap = sum(m5.percent - m3.percent for m3, m5 in pairs.values()) / len(pairs)
        n = sum(m3.n or 0 for m3, _ in pairs.values())
        checks.append(Check(f"test m5 - m3, mean of {len(pairs)} seeds", f"{float(gap):+.2f}", "< 3", ok=gap < 3, n=n))
    if not pairs:
        checks.append(missing("test m5 - m3", "< 3", "test accuracy of m3 and m5 (analysis.ood)"))
    uncalibrated = list(dict.fromkeys(reason for run in known for reason in run.uncalibrated))
    result = Result("4-id", "m3, m5", checks, uncalibrated=uncalibrated, accepted="")
    if result.status == FAIL:
        result.accepted = study.accept
        result.notes.append("m5 above m3: look for a bug first; --accept REASON continues and is reported")
    return [result]


def gate_4b(study: Study) -> list[Result]:
    """The learned pause vectors moved."""
    models = [model for model in ("m5", "m4b") if model in study.models]
    if not models:
        return [not_applicable("4b", ("m5", "m4b"))]
    return [
        _result("4b", [run], *gate_files.vector_moved(run, run.last_epoch))
        for model in models
        for run in (study.run(model, repeat) for repeat in study.repeats(model))
    ]


def gate_4c(study: Study) -> list[Result]:
    """The frozen pause vector did not move."""
    if absent := study.absent("m4"):
        return [not_applicable("4c", absent)]
    runs = [study.run("m4", repeat) for repeat in study.repeats("m4")]
    return [_result("4c", [run], *gate_files.vector_frozen(run)) for run in runs]


def gate_5(study: Study) -> list[Result]:
    """Causal tracing works on m1, where the effect is known to be; a failure blocks causal tracing only."""
    if absent := study.absent("m1"):
        return [not_applicable("5", absent)]
    found = study.findings.sanity()
    rules = [
        ("ce_above_03_fraction", "CoT positions with best effect > 0.3", ">= 0.5", lambda x: x >= 0.5),
        ("clean_gt_corrupt_fraction", "rows with clean > corrupted margin", "> 0.8", lambda x: x > 0.8),
        ("elapsed_seconds", "seconds", "< 600", lambda x: x < 600),
    ]
    n = int(found["n_traced"]) if found and found.get("n_traced") is not None else None
    checks = [Check("traced rows", str(n), ">= 50", ok=True if n >= 50 else None, n=n)] if n is not None else []
    for key, name, rule, holds in rules:
        value = found.get(key) if found else None
        if value is None:
            checks.append(missing(name, rule, f"{key} of exp0_sanity_result.json (analysis.causal_sanity)"))
        else:
            checks.append(Check(name, f"{value:.4g}", rule, ok=holds(value), n=n))
    run = study.run("m1", 0)
    result = _result("5", [run], checks, blocks="causal tracing")
    if found and isinstance(found.get("passed"), bool) and found["passed"] != (result.status == PASS):
        result.notes.append(f"the file says passed: {found['passed']}; the fixed thresholds decide")
    return [result]


GATES: dict[str, Callable[[Study], list[Result]]] = {
    "0": gate_0,
    "1": gate_1,
    "2": gate_2,
    "3": gate_3,
    "3b": gate_3b,
    "4": gate_4,
    "4-id": gate_4_id,
    "4b": gate_4b,
    "4c": gate_4c,
    "5": gate_5,
}
GATE_MODELS = {  # the models whose logs or folders a gate reads, its own one first
    "1": ("m1",),
    "2": ("m1", "m2"),
    "3": ("m3",),
    "3b": ("m5",),
    "4": ("m3", "m4", "m4b", "m5"),
    "4-id": ("m3", "m5"),
    "4b": ("m5", "m4b"),
    "4c": ("m4",),
    "5": ("m1",),
}
