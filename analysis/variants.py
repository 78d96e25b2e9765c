"""Runs that differ from a reference in one thing: what that cost in accuracy, and how far their loss curves lie apart.

    python -m analysis.variants runs/quickstart-variants --reference runs/quickstart --out results/quickstart-variants

Reads <variants>/<variant>/<model>/ and <reference>/<model>/ (metrics.jsonl and the records of the test set) and writes
variants.json, variants.md and loss_difference.png. Differences are variant minus reference on the same questions, with a
95 % bootstrap interval over questions; another seed, where it is among the variants, shows how much means nothing.
"""

import json
import sys
from pathlib import Path

import numpy as np

if __package__ in (None, ""):  # run as `python analysis/variants.py`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scipy.stats import bootstrap  # noqa: E402

from analysis.command import command, parser_of  # noqa: E402
from analysis.drawing import plt, png  # noqa: E402
from analysis.summary import level  # noqa: E402
from analysis.tables import table  # noqa: E402
from files import read_jsonl, write_json, write_whole  # noqa: E402

COLUMNS = (
    "model",
    "variant",
    "exact match",
    "95 % interval",
    "difference",
    "95 % interval",
    "updates",
    "loss curve",
)
SMOOTH = 50  # updates whose losses are averaged before curves are compared


def losses(folder: Path) -> dict[tuple[int, int], float]:
    """{(epoch, update): training loss}; of an update trained twice (a resumed run) the later one."""
    steps = (r for r in read_jsonl(folder / "metrics.jsonl") if r["event"] == "step")
    return {(r["epoch"], r["train/step"]): r["train/loss"] for r in steps}


def correct(folder: Path, records: str) -> dict[str, bool]:
    """{question: whether it was answered right} of the test set; empty where it was not evaluated."""
    return {r["question_hash"]: r["correct"] for r in read_jsonl(folder / records)}


def finished(folder: Path) -> bool:
    """Whether a run was trained for all its epochs; true where nothing was trained (another run's weights, say)."""
    epochs = [r["epoch"] for r in read_jsonl(folder / "metrics.jsonl") if r["event"] == "eval"]
    about = folder / "run.json"
    return not about.is_file() or max(epochs, default=-1) + 1 >= json.loads(about.read_text())["config"]["num_epochs"]


def compare(variant: Path, reference: Path, records: str) -> dict:
    """One run beside its reference. ValueError where they answered different questions."""
    row: dict = {"model": variant.name, "variant": variant.parent.name}
    mine, theirs = correct(variant, records), correct(reference, records)
    row["finished"] = finished(variant)
    if mine and theirs and row["finished"]:
        if mine.keys() != theirs.keys():
            both = f"{variant / records} and {reference / records}"
            raise ValueError(f"{both} are of different questions; evaluate both on one set")
        row["test"] = level(sum(mine.values()), len(mine))
        changes = np.array([float(mine[key]) - float(theirs[key]) for key in mine])
        row["difference"] = {"mean": changes.mean(), "ci95": _interval(changes)}
    a, b = losses(variant), losses(reference)
    both = sorted(a.keys() & b.keys())
    row["updates"] = len(both)
    if both:
        curves = np.array([[a[key] for key in both], [b[key] for key in both]])
        row["equal_losses"] = int((curves[0] == curves[1]).sum())
        row["mean_loss_difference"] = float(np.abs(np.subtract(*smoothed(curves))).mean())
        row["curve"] = (smoothed(curves)[0] - smoothed(curves)[1]).tolist()
    return row


def _interval(changes: np.ndarray) -> list[float]:
    if not changes.any():
        return [0.0, 0.0]
    interval = bootstrap((changes,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return [float(interval.low), float(interval.high)]


def smoothed(curves: np.ndarray) -> np.ndarray:
    """Means over windows of `SMOOTH` updates of curves [n, updates] (of all updates where they are fewer)."""
    kernel = np.full(min(SMOOTH, curves.shape[1]), 1 / min(SMOOTH, curves.shape[1]))
    return np.stack([np.convolve(curve, kernel, mode="valid") for curve in curves])


def cells(rows: list[dict]) -> list[tuple[str, ...]]:
    """Rows of text under `COLUMNS`."""
    lines = []
    for row in rows:
        test, change = row.get("test"), row.get("difference")
        curve = f"{row['mean_loss_difference']:.2g}" if row["updates"] else "–"
        if row["updates"] and row["equal_losses"] == row["updates"]:
            curve = "equal to the bit"
        lines.append(
            (
                row["model"],
                row["variant"] + ("" if row["finished"] else " (unfinished)"),
                f"{100 * test['accuracy']:.1f} % (n = {test['n']})" if test else "–",
                " .. ".join(f"{100 * x:.1f}" for x in test["ci95"]) if test else "–",
                f"{100 * change['mean']:+.1f}" if change else "–",
                " .. ".join(f"{100 * x:+.1f}" for x in change["ci95"]) if change else "–",
                str(row["updates"]),
                curve,
            )
        )
    return lines


def draw(rows: list[dict], path: Path) -> None:
    """Difference of the smoothed loss curves against the update, one panel a model."""
    models = sorted({row["model"] for row in rows if row["updates"]})
    figure, panels = plt.subplots(1, len(models), figsize=(4.2 * len(models), 3.6), squeeze=False, layout="constrained")
    for axes, model in zip(panels[0], models):
        for row in rows:
            if row["model"] == model and row["updates"]:
                axes.plot(range(len(row["curve"])), row["curve"], lw=1, label=row["variant"])
        axes.axhline(0, color="0.4", lw=0.8)
        axes.set(title=model, xlabel="update", ylabel=f"loss minus reference, mean of {SMOOTH} (nats)")
        axes.legend(fontsize=8)
    write_whole(path, png(figure))
    plt.close(figure)


@command
def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("variants", type=Path, help="folder of variants, each a folder of run folders")
    parser.add_argument("--reference", type=Path, required=True, help="folder of the run folders to compare with")
    parser.add_argument("--out", type=Path, required=True, help="where variants.json, variants.md and the figure go")
    parser.add_argument("--test-records", default="eval_prosqa_test.jsonl", help="file of a run folder with its test records")
    args = parser.parse_args(argv)
    found = sorted(p for p in args.variants.glob("*/*") if any(p.glob("*.jsonl")))
    found = [p for p in found if (args.reference / p.name / "metrics.jsonl").is_file()]
    if not found:
        raise ValueError(f"{args.variants} holds no <variant>/<model>/ whose model {args.reference} holds, too")
    rows = [compare(p, args.reference / p.name, args.test_records) for p in found]
    models = sorted({p.name for p in found})
    rows += [compare(args.reference / model, args.reference / model, args.test_records) for model in models]
    for row in rows[len(found) :]:
        row["variant"] = "reference (float32)"
        row["updates"] = 0
        row.pop("difference", None)
    rows.sort(key=lambda row: (row["model"], "reference" not in row["variant"], row["variant"]))
    args.out.mkdir(parents=True, exist_ok=True)
    text = table(COLUMNS, cells(rows))
    print(text)
    draw(rows, args.out / "loss_difference.png")
    kept = [{key: value for key, value in row.items() if key != "curve"} for row in rows]
    write_json(args.out / "variants.json", {"schema_version": 1, "runs": kept})
    write_whole(args.out / "variants.md", text)
    print(f"Written: {args.out}/variants.json, variants.md, loss_difference.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
