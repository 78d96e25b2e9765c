"""What a folder of runs has reached: one line a model with n and 95 % interval, and the picture of its training.

    python -m analysis.summary runs/quickstart --out results/quickstart [--models m1_cot m3_coconut]

Reads metrics.jsonl, run.json and the per-question records of each run folder; writes summary.json, summary.md, accuracy.png.
"""

import json
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as `python analysis/summary.py`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from analysis.command import command, parser_of  # noqa: E402
from analysis.figures import training_curves  # noqa: E402
from analysis.stats import wilson as level  # noqa: E402
from analysis.tables import table  # noqa: E402
from files import read_jsonl, write_json, write_whole  # noqa: E402

COLUMNS = ("model", "feedback", "latents", "set", "exact match", "95 % interval", "by steps", "tokens/question", "train s")


def read_run(folder: Path, test_records: str) -> dict:
    """Everything the summary says of one run folder. ValueError where it was never evaluated."""
    evaluations = {r["epoch"]: r for r in read_jsonl(folder / "metrics.jsonl") if r["event"] == "eval"}
    if not evaluations:
        raise ValueError(f"{folder} has no evaluation in metrics.jsonl; train it first")
    last, about = evaluations[max(evaluations)], json.loads((folder / "run.json").read_text())
    seconds = {r["epoch"]: r["seconds"] for r in read_jsonl(folder / "metrics.jsonl") if r["event"] == "train_epoch"}
    test = read_jsonl(folder / test_records)
    levels = {"validation": level(last["correct"], last["total"])}
    by_steps = {}
    if test:
        levels["test"] = level(sum(r["correct"] for r in test), len(test))
        scored = [r for r in test if r.get("margin") is not None]
        if scored:
            levels["test two-choice"] = level(sum(r["two_choice_correct"] for r in scored), len(scored))
        for steps in sorted({r["n_steps"] for r in test}):
            rows = [r["correct"] for r in test if r["n_steps"] == steps]
            by_steps[steps] = level(sum(rows), len(rows))
    return {
        "label": folder.name,
        "model_key": about["model_key"],
        "feedback_mode": "none" if about["model_key"] in ("m0", "m1", "m2", "custom") else about["config"]["feedback_mode"],
        "stage": last["stage"],
        "n_latents": last["n_latents"],
        "generated_tokens": sum(r["generated_tokens"] for r in test) / len(test) if test else last["eval/gen_tokens"],
        "train_seconds": sum(seconds.values()),
        "levels": levels,
        "test_by_steps": by_steps,
        "evaluations": [{k: evaluations[e][k] for k in ("epoch", "stage", "correct", "total")} for e in sorted(evaluations)],
        "versions": about["versions"],
    }


def cells(runs: list[dict]) -> list[tuple[str, ...]]:
    """Rows of text under `COLUMNS`: the test set where it was evaluated, else validation; by gold steps with n in brackets."""
    rows = []
    for run in runs:
        name = "test" if "test" in run["levels"] else "validation"
        exact = run["levels"][name]
        low, high = (f"{100 * bound:.1f}" for bound in exact["ci95"])
        steps = (f"{k}: {100 * x['accuracy']:.0f} ({x['n']})" for k, x in run["test_by_steps"].items())
        rows.append(
            (
                run["label"],
                run["feedback_mode"],
                str(run["n_latents"]),
                f"{name}, n = {exact['n']}",
                f"{100 * exact['accuracy']:.1f} %",
                f"{low} .. {high}",
                "  ".join(steps),
                f"{run['generated_tokens']:.1f}",
                f"{run['train_seconds']:.0f}",
            )
        )
    return rows


@command
def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("runs", type=Path, help="folder of run folders")
    parser.add_argument("--out", type=Path, required=True, help="where summary.json, summary.md and accuracy.png go")
    parser.add_argument("--models", nargs="+", help="run folders to show, in this order (default: all, by name)")
    parser.add_argument("--test-records", default="eval_prosqa_test.jsonl", help="file of a run folder with its test records")
    args = parser.parse_args(argv)
    names = args.models or sorted(p.parent.name for p in args.runs.glob("*/metrics.jsonl"))
    if not names:
        raise ValueError(f"{args.runs} holds no run folders (with a metrics.jsonl)")
    runs = [read_run(args.runs / name, args.test_records) for name in names]
    args.out.mkdir(parents=True, exist_ok=True)
    text = table(COLUMNS, cells(runs))
    print(text)
    write_json(args.out / "summary.json", {"schema_version": 1, "runs": runs})
    write_whole(args.out / "summary.md", text)
    training_curves(runs, args.out / "accuracy.png", chance=50.0)
    print(f"Written: {args.out}/summary.json, summary.md, accuracy.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
