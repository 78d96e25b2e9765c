"""Figures from JSON records; nothing here loads a model."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display on a rented box
import matplotlib.pyplot as plt  # noqa: E402

COLOURS = {
    "m1": "#4c72b0",
    "m2": "#8c8c8c",
    "m3": "#c44e52",
    "m4": "#ccb974",
    "m4b": "#8172b3",
    "m5": "#55a868",
    "m0": "#937860",
}


def training_curves(runs: list[dict], path: Path, chance: float | None = None) -> None:
    """Validation accuracy against epoch, one line a run, stage boundaries marked.

    Args:
        runs: [{"model_key", "label", "evaluations": [{"epoch", "stage", "correct", "total"}, ...]}], epochs 0-based.
        path: the PNG to write.
        chance: accuracy of guessing, in percent, drawn as a dotted line.
    """
    figure, axes = plt.subplots(figsize=(9, 4.8), layout="constrained")
    stages: dict[int, int] = {}
    for run in runs:
        points = run["evaluations"]
        percent = [100 * p["correct"] / p["total"] for p in points]
        label = f"{run['label']} (n = {points[0]['total']})"
        axes.plot(
            [p["epoch"] + 1 for p in points], percent, "o-", ms=3, color=COLOURS.get(run["model_key"], "#333333"), label=label
        )
        for p in points:
            stages[p["stage"]] = min(stages.get(p["stage"], p["epoch"]), p["epoch"])
    for stage, epoch in sorted(stages.items()):
        if stage:
            axes.axvline(epoch + 0.5, color="0.75", lw=1, zorder=0)
        axes.text(epoch + 0.6, 103, f"stage {stage}", fontsize=8, color="0.4")
    if chance is not None:
        axes.axhline(chance, color="0.4", lw=1, ls=":", label=f"guessing between the two options ({chance:.0f} %)")
    axes.set(xlabel="epoch", ylabel="exact match, validation (%)", ylim=(0, 108), xlim=(0.5, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="lower left", fontsize=8, framealpha=0.9)
    temporary = path.with_name(f".tmp-{path.name}")
    figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)
    temporary.replace(path)
