"""Figures that are curves and bars over conditions: corruption, perturbation, training, and the verdict's inputs. JSON only.

    figure = corruption(read_summary(Path("results/study/final/results_summary.json")))

`figures.py` lists all figures; looks and panels are those of `drawing.py`.
"""

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.drawing import (
    INK,
    LINE,
    MUTED,
    bars,
    curve,
    empty,
    legend,
    look,
    panel,
    reference,
    rows_text,
    sheet,
    spread,
    styled,
    title_of,
)
from analysis.flags import leaves
from analysis.gathered import anchors, make, models, repeats

SLOT_MODELS = ("m3", "m4", "m4b", "m5")


# ---------------------------------------------------------------- 3: corruption


DIRECTIONS = (
    ("forward_corruption", "Slots 0 to k"),
    ("reverse_corruption", "Last k + 1 slots"),
    ("single_position", "Slot k alone"),
)
CHAINS = (("", "replay"), ("_recompute", "recompute"))


@styled
def corruption(summary: dict) -> Figure:
    """Accuracy with noise in thought slots, forward, reverse and single, in both chains; answers that permutations flip."""
    figure, axes = sheet(2, 4, height=2.9)
    for row, (suffix, chain) in enumerate(CHAINS):
        for column, (key, title) in enumerate(DIRECTIONS):
            _corruption_curves(axes[row, column], summary, key, suffix, f"{title} ({chain})")
        axes[row, 0].set_ylabel("exact match (%)")
    flips = (("permutation_flip_rate", "Any other order tried"), ("swap_follow_rate", "Other person's thoughts"))
    for row, (key, title) in enumerate(flips):
        _rates(axes[row, 3], summary, key, title, "answers that change (%)" if not row else "answers that follow (%)")
    legend(figure, axes[0, 0])
    return figure


def _corruption_curves(axes: Axes, summary: dict, key: str, suffix: str, title: str) -> None:
    counts, seeds = [], 0
    for model in SLOT_MODELS:
        found = repeats(summary, "corruption", model)
        curves = [r.get(key + suffix) or (r.get(key) if model != "m3" else None) for r in found]
        curves = [levels for levels in curves if levels]
        if not curves:
            continue
        clean = spread([r.get("clean_accuracy") for r in found])
        points = [clean, *(spread(levels) for levels in zip(*curves))]
        curve(axes, model, range(-1, len(points) - 1), points)
        counts += [level.get("n") for levels in curves for level in levels if level]
        seeds = max(seeds, len(curves))
    if not counts:
        return empty(axes, title, f"not measured\n{make(summary, 'corruption')}")
    panel(axes, title, rows_text(counts, seeds), "k", percent=True)
    _their_corruption(axes, summary, key, suffix)
    slots = int(axes.get_xlim()[1])
    axes.set_xticks(range(-1, slots + 1), ["clean", *range(slots + 1)])


def _their_corruption(axes: Axes, summary: dict, key: str, suffix: str) -> None:
    if summary.get("incomparable", True) or key != "forward_corruption" or suffix:
        return
    for model, mark in (("m3", "o"), ("m5", "s")):
        levels = [100 * right / n for right, n in anchors()["draw"]["corruption"][model]]
        axes.plot(range(-1, len(levels) - 1), levels, mark, ms=7, mfc="none", mec=MUTED, mew=0.8, zorder=1)
    axes.annotate("hollow: pipeline, recounted", (0.02, 0.04), xycoords="axes fraction", fontsize=7, color=MUTED)


def _rates(axes: Axes, summary: dict, key: str, title: str, y: str) -> None:
    """Bars of a rate; models where it cannot be anything else than it is are marked."""
    shown, counts = [], []
    for model in SLOT_MODELS:
        levels = [r[key] for r in repeats(summary, "corruption", model) if isinstance(r.get(key), dict)]
        value = spread(levels)
        if value is None:
            continue
        bars(axes, len(shown), model, value, 0.6)
        fixed = any(level.get("by_construction") for level in levels)
        if fixed:
            axes.text(len(shown), value.high + 3, "asserted", ha="center", fontsize=6.5, color=MUTED)
        shown.append(model)
        counts += [level.get("n") for level in levels]
    if not shown:
        return empty(axes, title, f"not measured\n{make(summary, 'corruption')}")
    panel(axes, title, rows_text(counts), "", y, percent=True)
    axes.set_xticks(range(len(shown)), shown)


# ---------------------------------------------------------------- 5: perturbation


PSR_KINDS = (("own", "own scale"), ("absolute", "one scale for all"), ("orthogonal", "at right angles"))


@styled
def perturbation(summary: dict) -> Figure:
    """Answers that noise on reasoning states changes, against its size, by layer and kind of noise."""
    shown = models(summary, "psr")
    layers = sorted({layer for m in shown for r in repeats(summary, "psr", m) for layer in r.get("psr", {})}, key=int) or [
        "0",
        "",
    ]
    figure, axes = sheet(len(layers), len(PSR_KINDS), height=2.7)
    for row, layer in enumerate(layers):
        for column, (kind, what) in enumerate(PSR_KINDS):
            where = "slot input" if layer == "0" else f"output of block {layer}" if layer else "middle block"
            _psr_curves(axes[row, column], summary, shown, layer, kind, f"{where}, {what}")
        axes[row, 0].set_ylabel("answers that change (%)")
    legend(figure, max(axes.flat, key=lambda a: len(a.get_legend_handles_labels()[0])))
    return figure


def _psr_curves(axes: Axes, summary: dict, shown: list[str], layer: str, kind: str, title: str) -> None:
    counts, seeds, at, absent = [], 0, [], []
    for model in shown:
        found = [(r.get("psr", {}).get(layer) or {}).get(kind) for r in repeats(summary, "psr", model)]
        found = [levels for levels in found if levels]
        if not found:
            absent.append(model)
            continue
        sigmas = sorted(found[0], key=float)
        curve(axes, model, [float(s) for s in sigmas], [spread([levels.get(s) for levels in found]) for s in sigmas])
        at = sorted({*at, *map(float, sigmas)})
        counts += [level.get("n") for levels in found for level in levels.values() if level]
        seeds = max(seeds, len(found))
    if not counts:
        text = f"{', '.join(shown)}: no such noise, the state is the same in every row" if shown else "not measured"
        return empty(axes, title, text if shown else f"{text}\n{make(summary, 'psr')}")
    note = f"; none for {', '.join(absent)}" if absent else ""
    panel(axes, title, rows_text(counts, seeds) + note, "size of the noise, σ", percent=True)
    axes.set_xscale("log")
    axes.set_xticks(at, [f"{x:g}" for x in at])
    axes.minorticks_off()


# ---------------------------------------------------------------- 9: evidence


@dataclass(frozen=True)
class Finding:
    """One number of the verdict: mean or difference with intervals, its thresholds, and the noise floor."""

    quantity: str
    unit: str
    value: float | None
    ci95: list[float] | None
    ci90: list[float] | None
    floor: float | None
    n_seeds: dict[str, int]
    thresholds: tuple[float, ...]

    @property
    def title(self) -> str:
        """Of the panel that it belongs to."""
        if len(self.n_seeds) > 1:
            return f"Differences between models ({self.unit})"
        of_sets = self.quantity.startswith(("two_choice/", "exact_match/"))
        return f"Accuracy of one model ({self.unit})" if of_sets else f"Quantities of one model ({self.unit})"

    @property
    def label(self) -> str:
        return f"{self.quantity.split('/')[-1].replace('_', ' ')}: {' − '.join(self.n_seeds)}"


def evidence_of(verdict: dict) -> list[Finding]:
    """Every quantity that the rules read, once, with all its thresholds."""
    by_name: dict[tuple, list[dict]] = {}
    for rule in verdict["rules"].values():
        for leaf in leaves(rule["condition"]):
            by_name.setdefault((leaf["quantity"], tuple(leaf["models"])), []).append(leaf)
    found = []
    for (quantity, who), same in by_name.items():
        leaf = same[0]
        value = leaf.get("difference", leaf.get("mean"))
        floor = (leaf.get("noise_floor") or {}).get("value")
        limits = tuple(sorted({float(x["threshold"]) for x in same if x.get("threshold")}))
        seeds = {model: leaf["n_seeds"].get(model, 0) for model in who}
        found.append(Finding(quantity, leaf["unit"], value, leaf.get("ci95"), leaf.get("ci90"), floor, seeds, limits))
    return found


@styled
def evidence(summary: dict) -> Figure:
    """The verdict's inputs: differences and means with their intervals, thresholds and noise floors."""
    if not (verdict := summary.get("verdict")):
        figure, axes = sheet(1, 1, height=2.5)
        command = f"python -m analysis.verdict {summary['folder']} --epoch {summary['epoch']}"
        empty(axes[0, 0], "Inputs of the verdict", f"no verdict\n{command}")
        return figure
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in evidence_of(verdict):
        groups.setdefault((finding.title, finding.unit), []).append(finding)
    heights = [0.24 * len(group) + 0.95 for group in groups.values()]
    figure, axes = sheet(len(groups), 1, height=sum(heights) / len(groups), height_ratios=heights)
    for axis, ((title, unit), group) in zip(axes[:, 0], groups.items()):
        _forest(axis, group, title, unit)
    return figure


def _forest(axes: Axes, found: list[Finding], title: str, unit: str) -> None:
    """One line a finding, the first on top."""
    seeds = sorted({n for f in found for n in f.n_seeds.values()})
    for place, f in enumerate(reversed(found)):
        y = place
        for limit in f.thresholds:
            for x in {limit, -limit} if len(f.n_seeds) > 1 else {limit}:
                axes.plot([x, x], [y - 0.35, y + 0.35], color=MUTED, lw=0.9, ls=":", zorder=1)
        if f.floor is not None:
            axes.fill_betweenx([y - 0.28, y + 0.28], -f.floor, f.floor, color=LINE, lw=0, zorder=0)
        if f.ci95:
            axes.plot(f.ci95, [y, y], color=INK, lw=1, zorder=3)
            axes.plot(f.ci90, [y, y], color=INK, lw=2.6, solid_capstyle="butt", zorder=3)
        if f.value is None:
            axes.text(0, y, "  not measured", va="center", fontsize=7, color=MUTED)
        else:
            style = look(next(iter(f.n_seeds)))
            axes.plot(
                f.value, y, style.marker if len(f.n_seeds) == 1 else "o", ms=5, mfc=style.colour, mec=INK, mew=0.8, zorder=4
            )
    axes.axvline(0, color=INK, lw=0.8, zorder=2)
    axes.set_yticks(range(len(found)), [f.label for f in reversed(found)])
    axes.set_ylim(-0.7, len(found) - 0.3)
    axes.tick_params(axis="y", length=0)
    intervals = "thick 90 %, thin 95 % interval; dotted: thresholds; grey: noise floor abs(m4b − m5)"
    note = f"{rows_text(seeds)} seed{'' if seeds == [1] else 's'}; {intervals}"
    panel(axes, title, note, unit)
    extent = [x for f in found for x in [*(f.ci95 or []), f.value, *f.thresholds] if x is not None]
    most = 1.1 * max([1e-9, *map(abs, extent)])
    least = -most if min([0, *extent]) < 0 or any(len(f.n_seeds) > 1 for f in found) else 0
    axes.set_xlim(least, most)


# ---------------------------------------------------------------- 7: training


@styled
def training(summary: dict) -> Figure:
    """Validation accuracy, training loss and distance of the learned vector by epoch: means over seeds, stages marked."""
    figure, axes = sheet(1, 3, height=3.2)
    curves = (
        ("accuracy", "Validation, exact match", "%", True),
        ("train_loss", "Training loss", "nats", False),
        ("vector_distance", "Learned vector", "L2 from its start", False),
    )
    for column, (key, title, unit, percent) in enumerate(curves):
        _training_curves(axes[0, column], summary, key, title, unit, percent)
    legend(figure, axes[0, 0])
    return figure


def _training_curves(axes: Axes, summary: dict, key: str, title: str, unit: str, percent: bool) -> None:
    stages: dict[int, int] = {}
    counts, seeds = [], 0
    for model in models(summary, "curriculum"):
        epochs = [{e["epoch"]: e for e in r["epochs"] if e.get(key) is not None} for r in repeats(summary, "curriculum", model)]
        epochs = [by_epoch for by_epoch in epochs if by_epoch]
        if not epochs:
            continue
        at = sorted(set.intersection(*map(set, epochs)))
        points = [spread([by_epoch[e][key] for by_epoch in epochs], 100 if percent else 1) for e in at]
        style, x = look(model), [e + 1 for e in at]
        axes.plot(
            x, [p.mean for p in points], ls=style.line, marker=style.marker, ms=3, color=style.colour, label=title_of(model)
        )
        if len(epochs) > 1:
            axes.fill_between(x, [p.low for p in points], [p.high for p in points], color=style.colour, alpha=0.15, lw=0)
        for e in at:
            stage = epochs[0][e].get("stage") or 0
            stages[stage] = min(stages.get(stage, e), e)
        counts += [level.get("n") for by_epoch in epochs for level in [by_epoch[e][key] for e in at] if isinstance(level, dict)]
        seeds = max(seeds, len(epochs))
    if not seeds:
        return empty(axes, title, f"not measured\n{make(summary, 'curriculum')}")
    panel(
        axes,
        title,
        rows_text(counts, seeds) if counts else f"n = {seeds} seed{'s' if seeds > 1 else ''}",
        "epoch",
        unit,
        percent,
    )
    for stage, epoch in stages.items():
        if stage:
            axes.axvline(epoch + 0.5, color=LINE, lw=1, zorder=0)
    if percent:
        reference(axes, 50, "a coin between the options")
    axes.xaxis.get_major_locator().set_params(integer=True)
