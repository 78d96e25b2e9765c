"""Causal sanity (experiment 0, gate 5): does tracing find the steps of chain of thought, where the answer is known to lie?

    python -m analysis.causal_sanity --checkpoint runs/prosqa-cot --data data/prosqa_test.json --output_dir results

Of m1's own steps in front of `### Name is a`, at most 20 evenly spaced tokens are critical: all of them are corrupted with
noise of the token embeddings' scale, and each is restored alone at each layer, on the first 50 rows that are answered right.
Writes m1_causal_sanity.json and, beside it, exp0_sanity_result.json: `passed`, the criteria, and the values that gate 5 reads.
The criteria were fixed before any result; a failure blocks causal tracing only.
"""

import json
import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # run as `python analysis/causal_sanity.py`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from analysis import effects, tracing  # noqa: E402
from analysis.command import CheckFailed  # noqa: E402
from analysis.experiment import SCHEMA_VERSION, Experiment, Task  # noqa: E402
from files import write_json  # noqa: E402

RESULT = "exp0_sanity_result.json"
WANTED, MAX_POSITIONS = 50, 20
CRITERIA = {  # field: the rule, and whether a value meets it
    "n_traced": (f">= {WANTED}", lambda x: x >= WANTED),
    "total_effect_low": (f"> {effects.FLOOR}", lambda x: x > effects.FLOOR),
    "ce_above_03_fraction": (">= 0.5", lambda x: x >= 0.5),
    "clean_gt_corrupt_fraction": ("> 0.8", lambda x: x > 0.8),
    "elapsed_seconds": ("< 600", lambda x: x < 600),
}


def prepare(task: Task) -> dict:
    """The rows to trace, and the critical positions among their steps."""
    started, subject = time.time(), task.subject
    traced = tracing.rows_to_trace(subject, task.problems, WANTED)
    critical = [[row[i] for i in tracing.thin(len(row), MAX_POSITIONS)] for row in traced.steps]
    group = tracing.Group.of("steps", traced.asked, {"step token": critical}, MAX_POSITIONS)
    group.noise_std = float(subject.model.embedding.weight.float().std())
    return {"group": group, "traced": traced, "seconds": time.time() - started}


def measure(task: Task, ready: dict, part: str, numbers: list[int]) -> list[dict]:
    """All runs of the rows among `numbers` that are traced; of the others, why they are not."""
    started = time.time()
    found = tracing.trace_rows(task.subject, [ready["group"]], ready["traced"].status, numbers, task.seed)
    seconds = (time.time() - started) / len(numbers)
    return [record | {"seconds": seconds} for record in found]


def summarize(task: Task, ready: dict, records: list[dict]) -> dict:
    group, traced = ready["group"], ready["traced"]
    found = [r["groups"]["steps"] for r in records if r["status"] == "traced"]
    return {
        **effects.summary(group, found),
        **traced.counts(),
        "tracing_gates": {"steps": effects.check(group, found)},
        "corrupted": f"{MAX_POSITIONS} step tokens at most, evenly spaced",
        "mean_step_tokens": sum(map(len, traced.steps)) / len(traced.steps) if traced.steps else None,
        "measured_seconds": ready["seconds"] + sum(r["seconds"] for r in records),
    }


def verdict(result: dict) -> dict:
    """What gate 5 reads, judged by `CRITERIA`: `passed` where every value is there and meets its rule."""
    low = (result["total_effect"]["ci95"] or [None])[0]
    seconds = max(result["elapsed_seconds"], result["measured_seconds"])  # a run that was resumed has been at it for longer
    values = {key: result.get(key) for key in CRITERIA} | {"total_effect_low": low, "elapsed_seconds": seconds}
    criteria = {
        key: {"rule": rule, "value": values[key], "passed": values[key] is not None and holds(values[key])}
        for key, (rule, holds) in CRITERIA.items()
    }
    copied = (
        "model",
        "repeat",
        "feedback_mode",
        "checkpoint",
        "seed",
        "command",
        "versions",
        "data",
        "n_excluded",
        "total_effect",
    )
    copied += ("n_skipped", "n_wrong_answer", "reason")
    return {
        "schema_version": SCHEMA_VERSION,
        "passed": all(criterion["passed"] for criterion in criteria.values()),
        "criteria": criteria,
        **values,
        **{key: result[key] for key in copied},
    }


class CausalSanity(Experiment):
    """Leaves gate 5's file beside the results: that of the lowest repeat, or none where its checks failed."""

    def one(self, task: Task, output_dir: Path) -> dict:
        try:
            result = super().one(task, output_dir)
        except CheckFailed:
            (task.out / RESULT).unlink(missing_ok=True)
            raise
        finished = [json.loads(path.read_text()) for path in self.finished(task.out)]
        judged = verdict(min(finished, key=lambda found: found["repeat"]))
        write_json(task.out / RESULT, judged)
        failed = [f"{key} {c['value']} ({c['rule']})" for key, c in judged["criteria"].items() if not c["passed"]]
        print(f"{task.out / RESULT}: gate 5 {'passed' if judged['passed'] else 'not passed: ' + ', '.join(failed)}")
        return result


def verify(results: dict[str, dict]) -> dict:
    return {"passed": {label: verdict(result)["passed"] for label, result in results.items()}}


EXPERIMENT = CausalSanity("causal_sanity", ("m1",), prepare, measure, summarize, __doc__, verify=verify)

if __name__ == "__main__":
    sys.exit(EXPERIMENT.main())
