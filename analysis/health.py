"""Is a checkpoint what it claims to be? Checks that fail on what went wrong in published models, on any backbone.

    python -m analysis.health --checkpoint runs/lahr/lahr-abc                    # newest checkpoint of a run folder, or a file
    python -m analysis.health --checkpoint runs/cognate/m/checkpoint_3 --data data/cot_val.json --output health.json
    python -m analysis.health --checkpoint runs/lahr/lahr-abc --only causality,loss,gradients

- the function: no logit sees a later token; one answer whatever the batch, its order, padding or cache; the loss is
  cross-entropy of the next token; every parameter gets a gradient
- what it says: no collapse into few tokens, no copying of the input
- its parts: halting depends on the token, routers keep their capacity and leave padding out, memories are read
- its run: rates reach the weights, validations move, training and validation rows are disjoint

Prints a table and writes it as JSON (default: health.json beside the checkpoint) with all figures. What cannot hold of a
model before it was trained (`--trained_after` updates) is shown and not judged. Exit code: 0 all is well, 1 a check failed,
2 a mistake in the call.
"""

import dataclasses
import math
import sys
from collections import Counter
from pathlib import Path

if __package__ in (None, ""):  # run as `python analysis/health.py`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402

from analysis.command import command, parser_of  # noqa: E402
from analysis.health_checks import CHECKS, chosen, run_checks  # noqa: E402
from analysis.health_patient import Patient, Result  # noqa: E402
from checkpoint import versions  # noqa: E402
from files import write_json  # noqa: E402

SCHEMA_VERSION = 1
COLUMNS = ("check", "value", "threshold", "status")


def table(results: list[Result]) -> list[str]:
    """Lines of text: check, value, threshold, status, and behind it what was seen, or why nothing is judged."""
    cells = [(r.name, shown(r.value), r.threshold, r.status, r.detail) for r in results]
    widths = [max(len(row[i]) for row in [COLUMNS, *cells]) for i in range(len(COLUMNS))]
    lines = ["  ".join(name.ljust(width) for name, width in zip(COLUMNS, widths)).rstrip()]
    for *row, detail in cells:
        lines.append("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), detail]).rstrip())
    return lines


def shown(value) -> str:
    """A value as the table has it."""
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def as_json(value):
    """Plain values; numbers that JSON does not have become words."""
    if isinstance(value, dict):
        return {str(key): as_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def report(patient: Patient, results: list[Result]) -> dict:
    """What is written: the checkpoint, every result with its figures, and what the model said."""
    failed = [r.name for r in results if r.ok is False]
    return {
        "schema_version": SCHEMA_VERSION,
        "checkpoint": str(patient.subject.path),
        "sha256": patient.subject.sha256,
        "backbone": patient.bare.config.model_type,
        "feedback_mode": patient.model.feedback_mode,
        "updates": patient.updates,
        "rows": patient.source,
        "n_rows": len(patient.rows),
        "seed": patient.seed,
        "healthy": not failed,
        "failed": failed,
        "checks": [as_json(dataclasses.asdict(r) | {"status": r.status}) for r in results],
        "outputs": patient.shared.get("outputs", []),
        "questions": patient.shared.get("questions", []),
        "versions": versions(),
    }


def print_report(patient: Patient, results: list[Result]) -> None:
    """The table, what the model said, and the verdict."""
    subject = patient.subject
    updates = "" if patient.updates is None else f", {patient.updates} updates"
    print(f"{subject.path}: {patient.bare.config.model_type}, thoughts: {patient.model.feedback_mode}{updates}")
    print(f"{len(patient.rows)} rows: {patient.source}")
    print("\n".join(table(results)))
    for said in patient.shared.get("questions", []):
        print(f"{said['prompt']!r} -> {said['output']!r} ({'right' if said['right'] else 'wrong'})")
    for said in patient.shared.get("outputs", []):
        print(f"{said['prompt']!r} -> {said['output']!r}")
    count = Counter(r.status for r in results)
    print(", ".join(f"{count[status]} {status}" for status in ("ok", "FAIL", "not applicable")))


@command
def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="a run folder (its newest checkpoint) or a checkpoint file"
    )
    parser.add_argument("--data", type=Path, help="rows to ask (default: the run's val_path, else random token ids)")
    parser.add_argument("--output", type=Path, help="default: health.json beside the checkpoint")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    parser.add_argument("--num_samples", type=int, default=64, help="rows that are looked at (default: 64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="checks by name, with commas: " + ", ".join(CHECKS))
    parser.add_argument("--trained_after", type=int, default=100, help="updates before a model is judged as trained (100)")
    args = parser.parse_args(argv)
    names = chosen(args.only.split(",") if args.only is not None else None)
    if args.num_samples < 2:
        raise ValueError(f"--num_samples: {args.num_samples}; at least 2 rows are needed")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: cuda is not available here; use cpu")
    sizes = args.num_samples, args.device, args.seed, args.trained_after
    patient = Patient.load(args.checkpoint, args.data, *sizes)
    results = run_checks(patient, names)
    print_report(patient, results)
    output = args.output or patient.folder / "health.json"
    write_json(output, report(patient, results))
    print(f"Written: {output}")
    return 1 if any(r.ok is False for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
