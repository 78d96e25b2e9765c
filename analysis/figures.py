"""The figures of a study, from JSON alone: nothing here loads a model.

    summary = read_summary(Path("results/study/final/results_summary.json"))
    for plate in PLATES:
        save(plate.draw(summary), Path("figures") / plate.name)

A panel whose results are not there is empty and names the command that makes them. Percent; intervals are over seeds (Student's
t) where there are several, else over rows (Wilson). `drawing.py` has the looks, `heatmaps.py` and `curves.py` the other figures.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import curves, heatmaps
from analysis.drawing import (
    INK,
    LINE,
    MUTED,
    bars,
    empty,
    legend,
    look,
    panel,
    png,
    reference,
    rows_text,
    sheet,
    spread,
    styled,
    swatches,
)
from analysis.gathered import anchors, make, models, repeats, sets_of, strongest_shortcut
from files import write_whole


@styled
def training_curves(runs: list[dict], path: Path, chance: float | None = None) -> None:
    """Validation accuracy against epoch, one line a run, stage boundaries marked.

    Args:
        runs: [{"model_key", "label", "evaluations": [{"epoch", "stage", "correct", "total"}, ...]}], epochs 0-based.
        path: the PNG to write.
        chance: accuracy of guessing, in percent, drawn as a dotted line.
    """
    figure, panels = sheet(1, 1, height=4.6, width=9)
    axes, stages = panels[0, 0], {}
    for run in runs:
        points, style = run["evaluations"], look(run["model_key"])
        label = f"{run['label']} (n = {points[0]['total']})"
        percent = [100 * p["correct"] / p["total"] for p in points]
        axes.plot(
            [p["epoch"] + 1 for p in points],
            percent,
            ls=style.line,
            marker=style.marker,
            ms=3.5,
            color=style.colour,
            label=label,
        )
        for p in points:
            stages[p["stage"]] = min(stages.get(p["stage"], p["epoch"]), p["epoch"])
    _stage_edges(axes, stages)
    if chance is not None:
        reference(axes, chance, f"guessing between the two options ({chance:.0f} %)")
    axes.set(xlabel="epoch", ylabel="exact match, validation (%)", ylim=(0, 108), xlim=(0.5, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    legend(figure, axes)
    write_whole(path, png(figure))
    plt.close(figure)


def _stage_edges(axes: Axes, first_epochs: dict[int, int]) -> None:
    """A line before the first epoch (0-based) of every stage, with the stage's number."""
    for stage, epoch in sorted(first_epochs.items()):
        if stage:
            axes.axvline(epoch + 0.5, color=LINE, lw=1, zorder=0)
        axes.text(epoch + 0.6, 103, f"stage {stage}" if not stage else str(stage), fontsize=7.5, color=MUTED)


# ---------------------------------------------------------------- 2: evaluation sets


@styled
def accuracy_bars(summary: dict) -> Figure:
    """Two-choice accuracy and exact match of every model on every set, with chance and the best shortcut."""
    names, shown = sets_of(summary), models(summary, "ood")
    figure, axes = sheet(2, 1, height=3.0)
    titles = (("two_choice", "Two-choice accuracy"), ("exact_match", "Exact match of the greedy answer"))
    for row, (measure, title) in enumerate(titles):
        if names:
            _bars_of(axes[row, 0], summary, names, shown, measure, title)
        else:
            empty(axes[row, 0], title, f"not measured\n{make(summary, 'ood')}")
    legend(figure, handles=[*swatches(shown), *([] if summary["incomparable"] else PUBLISHED.values())])
    return figure


def _bars_of(axes: Axes, summary: dict, names: dict[str, dict], shown: list[str], measure: str, title: str) -> None:
    width, counts, seeds = 0.8 / max(len(shown), 1), [], 0
    for place, name in enumerate(names):
        for i, model in enumerate(shown):
            levels = [r["sets"][name][measure] for r in repeats(summary, "ood", model) if name in r.get("sets", {})]
            value = spread(levels)
            at = place + (i - (len(shown) - 1) / 2) * width
            if value is not None:
                bars(axes, at, model, value, 0.92 * width)
            counts += [level.get("n") for level in levels]
            seeds = max(seeds, len(levels))
            _theirs(axes, summary, name, model, at)
        best = strongest_shortcut(names[name].get("shortcut_baselines") or {})
        if best:
            axes.plot([place - 0.46, place + 0.46], [best[1]] * 2, color=INK, lw=1.1, ls=(0, (4, 2)), zorder=6)
    what = "dotted: a coin between the options; dashed: the best rule that does not read who is asked"
    panel(axes, title, f"{rows_text(counts, seeds)}; {what}", "", "%", True)
    reference(axes, 50)
    axes.set_xticks(range(len(names)), [name.replace("_", "\n", 1) for name in names])
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.tick_params(axis="x", length=0)


HOLLOW = {"ls": "", "ms": 5, "mfc": "none", "mec": INK, "mew": 1}
PUBLISHED = {
    "coconut": Line2D([], [], marker="D", label="arXiv 2412.06769", **HOLLOW),
    "pipeline": Line2D([], [], marker="o", label="research-pipeline, one seed", **HOLLOW),
}


def _theirs(axes: Axes, summary: dict, name: str, model: str, at: float) -> None:
    """Published accuracies as hollow marks, on the test set of a study that can be compared."""
    if name != "test" or summary.get("incomparable", True):
        return
    drawn = anchors()["draw"]
    if model in drawn["coconut"]:
        axes.plot(at, drawn["coconut"][model][0], "D", zorder=7, **HOLLOW)
    if model in drawn["pipeline"]:
        right, n = drawn["pipeline"][model]
        axes.plot(at, 100 * right / n, "o", zorder=7, **HOLLOW)


# ---------------------------------------------------------------- all of them


@dataclass(frozen=True)
class Plate:
    """One figure of the report: its file name, title, and the experiment that it shows."""

    name: str
    title: str
    experiment: str
    draw: Callable[[dict], Figure]


PLATES = (
    Plate("1_probes", "Probes", "probing", heatmaps.probes),
    Plate("2_accuracy", "Accuracy on all sets", "ood", accuracy_bars),
    Plate("3_corruption", "Corruption and permutation", "corruption", curves.corruption),
    Plate("4_effects", "Causal effects", "causal_tracing", heatmaps.effects),
    Plate("5_perturbation", "Perturbation", "psr", curves.perturbation),
    Plate("6_token_counts", "Thought counts", "token_count", heatmaps.token_counts),
    Plate("7_training", "Training", "curriculum", curves.training),
    Plate("8_transplants", "Transplants by steps", "corruption", heatmaps.transplants),
    Plate("9_evidence", "Inputs of the verdict", "", curves.evidence),
)
