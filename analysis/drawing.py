"""What all figures share: how a model looks, panels that state their n, and files that are the same bytes every time.

    figure, panels = sheet(1, 2)
    curve(panels[0], "m3", x, [spread(levels) for levels in by_x])
    empty(panels[1], "m5", "python -m analysis.corruption --study results/quickstart --models m5")
    save(figure, Path("figures/3_corruption"))         # .svg and .png

Models differ by colour (Okabe and Ito's, which colour-blind readers tell apart), line style, marker and hatch, so that grey
print tells them apart as well. Accuracies arrive as fractions and are drawn in percent.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import wraps
from io import BytesIO
from pathlib import Path
from textwrap import fill

import matplotlib

matplotlib.use("Agg")  # no display on a rented box
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from analysis.stats import seed_interval  # noqa: E402
from files import write_whole  # noqa: E402

INK, MUTED, LINE, PAPER = "#1d1c1a", "#6e6b66", "#d9d6d0", "#fefdfb"


@dataclass(frozen=True)
class Look:
    """How a model is drawn, and what it is called."""

    name: str
    colour: str
    line: str | tuple
    marker: str
    hatch: str


LOOKS = {
    "m1": Look("CoT", "#cc79a7", (0, (5, 1, 1, 1)), "P", "xx"),
    "m2": Look("no CoT", "#8a8a87", (0, (1, 2)), "X", "oo"),
    "m3": Look("COCONUT", "#d55e00", "-", "o", ""),
    "m4": Look("frozen pause", "#009e73", (0, (1, 1)), "D", "\\\\\\"),
    "m4b": Look("shared pause", "#56b4e9", "-.", "^", "..."),
    "m5": Look("pause curriculum", "#0072b2", "--", "s", "///"),
    "m0": Look("no thoughts", "#b88a00", (0, (3, 1, 1, 1, 1, 1)), "v", "++"),
    "custom": Look("", "#5f5c57", "-", "h", "--"),
}
MODELS = tuple(LOOKS)
STYLE = {
    "svg.fonttype": "none",  # text stays text: the page's font and theme, and a reader's search
    "svg.hashsalt": "report",
    "svg.image_inline": True,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that every machine measures text alike
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "text.color": INK,
    "axes.titlecolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "lines.markeredgewidth": 0.0,
}
ERROR = {"elinewidth": 0.9, "capsize": 2.2, "capthick": 0.9}


def look(model: str) -> Look:
    return LOOKS.get(model, LOOKS["custom"])


def title_of(model: str) -> str:
    """`m3 COCONUT`."""
    return f"{model} {look(model).name}".rstrip()


def styled(draw: Callable) -> Callable:
    """A function that draws in the style of the figures, and leaves matplotlib's settings as they were."""

    @wraps(draw)
    def inside(*args, **kwargs):
        with plt.rc_context(STYLE):
            return draw(*args, **kwargs)

    return inside


# ---------------------------------------------------------------- sheets and panels


@styled
def sheet(rows: int, columns: int, height: float = 2.9, width: float = 10.0, **kwargs) -> tuple[Figure, np.ndarray]:
    """A figure of rows x columns panels, each `height` inches high, and its axes as an array of that shape."""
    figure, axes = plt.subplots(rows, columns, figsize=(width, height * rows), squeeze=False, layout="constrained", **kwargs)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    return figure, axes


def panel(axes: Axes, title: str, n: str, x: str = "", y: str = "", percent: bool = False) -> None:
    """Title, number of rows, axis labels; `percent` scales the y axis 0..100 with a light grid."""
    axes.set_title(title, pad=18)
    note = axes.annotate(n, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points", fontsize=8, color=MUTED)
    note.set_in_layout(False)  # a long note must not make its panel narrow
    axes.set(xlabel=x, ylabel=y)
    if percent:
        axes.set_ylim(0, 104)
        axes.set_yticks(range(0, 101, 25))
        axes.grid(axis="y")
        axes.set_axisbelow(True)


def empty(axes: Axes, title: str, reason: str) -> None:
    """A panel without data: why, and the command that makes them."""
    axes.set_title(title, pad=18)
    axes.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(0, 1))
    for spine in axes.spines.values():
        spine.set(visible=True, color=LINE, linestyle=(0, (3, 3)))
    width = max(24, int(17 * inches(axes)))  # characters
    text = "\n".join(fill(part, width, break_long_words=False, break_on_hyphens=False) for part in reason.split("\n"))
    said = axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=7.5, color=MUTED, linespacing=1.5)
    said.set_in_layout(False)


def inches(axes: Axes) -> float:
    """About how wide a panel will be."""
    return axes.get_position().width * axes.figure.get_figwidth()


def reference(axes: Axes, percent: float, text: str = "") -> None:
    """A dotted horizontal line, such as chance, with its name at the right end."""
    axes.axhline(percent, color=MUTED, lw=1, ls=":", zorder=1)
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate(text, (1, percent), (0, 2), **place, ha="right", fontsize=7, color=MUTED)


# ---------------------------------------------------------------- values over seeds


@dataclass(frozen=True)
class Spread:
    """A value over seeds: mean, 95 % interval, the seeds' own values. Percent where it came from accuracies."""

    mean: float
    low: float
    high: float
    values: tuple[float, ...]


def spread(levels: Iterable[dict | float | None], scale: float = 100.0) -> Spread | None:
    """Of the seeds' values: numbers, or levels {"accuracy", "ci95", ...}; None where there are none.

    Several seeds: mean and Student's t interval over seeds. One: its own interval over rows, or none.
    """
    found = [{"accuracy": level} if isinstance(level, int | float) else level for level in levels if level is not None]
    found = [level for level in found if level.get("accuracy") is not None]
    if not found:
        return None
    values = tuple(scale * level["accuracy"] for level in found)
    if len(values) > 1:
        over_seeds = seed_interval(values)
        return Spread(over_seeds["mean"], *over_seeds["ci95"], values)
    bounds = found[0].get("ci95") or [found[0]["accuracy"]] * 2
    return Spread(values[0], scale * bounds[0], scale * bounds[1], values)


def rows_text(counts: Iterable[int | None], seeds: int | None = None) -> str:
    """`n = 500`, `n = 298 to 500`, `n = 500, 3 seeds`."""
    counts = sorted({n for n in counts if n is not None})
    if not counts:
        return "n = 0"
    text = f"n = {counts[0]:,}" if len(counts) == 1 else f"n = {counts[0]:,} to {counts[-1]:,}"
    return text + (f", {seeds} seed{'s' if seeds > 1 else ''}" if seeds else "")


def curve(axes: Axes, model: str, x: Sequence[float], values: Sequence[Spread | None], label: str | None = None) -> None:
    """One model's line with its intervals; missing points are left out, single seeds are small marks."""
    shown = [(a, v) for a, v in zip(x, values) if v is not None]
    if not shown:
        return
    style, at = look(model), [a for a, _ in shown]
    mean = [v.mean for _, v in shown]
    errors = np.clip([[v.mean - v.low for _, v in shown], [v.high - v.mean for _, v in shown]], 0, None)
    axes.errorbar(
        at, mean, errors, color=style.colour, ls=style.line, marker=style.marker, **ERROR, label=label or title_of(model)
    )
    for a, v in shown:
        if len(v.values) > 1:
            axes.plot([a] * len(v.values), v.values, ls="", marker="_", ms=6, mew=0.8, color=style.colour, alpha=0.6)


def bars(axes: Axes, at: float, model: str, value: Spread, width: float) -> None:
    """One bar with its interval and its seeds."""
    style = look(model)
    axes.bar(at, value.mean, width, facecolor=style.colour, hatch=style.hatch, edgecolor=PAPER, lw=0, zorder=2)
    error = [[max(0.0, value.mean - value.low)], [max(0.0, value.high - value.mean)]]
    axes.errorbar(at, value.mean, error, color=INK, **ERROR, zorder=4)
    if len(value.values) > 1:
        axes.plot([at] * len(value.values), value.values, ls="", marker="o", ms=2.2, color=INK, zorder=5)


def swatches(models: Iterable[str]) -> list:
    """Legend entries of bars, hatched as they are."""
    patch = matplotlib.patches.Patch
    return [patch(facecolor=look(m).colour, hatch=look(m).hatch, edgecolor=PAPER, lw=0, label=title_of(m)) for m in models]


def legend(figure: Figure, axes: Axes | None = None, handles: list | None = None) -> None:
    """One legend below all panels: of the axes, or these handles; in rows of four where they are many."""
    handles = axes.get_legend_handles_labels()[0] if handles is None and axes is not None else handles
    if handles:
        columns = len(handles) if len(handles) <= 5 else 4
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=3.2)


# ---------------------------------------------------------------- files


@styled
def svg(figure: Figure) -> str:
    """The figure as an SVG document, the same bytes for the same data."""
    buffer = BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r"[ \t]+\n", "\n", buffer.getvalue().decode())


@styled
def png(figure: Figure) -> bytes:
    """The figure as a PNG on white paper."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=144, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


THEMED = {INK: "ink", MUTED: "muted", LINE: "line", PAPER: "paper"} | {v.colour: k for k, v in LOOKS.items()}


def inline(document: str, name: str) -> str:
    """An SVG document as an element of a page: colours of text, axes and models follow the page's theme.

    The page defines --ink, --muted, --line, --paper, --m0 ... --m5, --custom and --sans. Ids get `name` in front, so that
    several figures can stand in one page.
    """
    body = document[document.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.S)
    width, height = (float(x) for x in re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', body).groups())
    body = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", body, count=1)
    body = body.replace("<svg", f'<svg style="max-width:{width * 4 / 3:.0f}px;aspect-ratio:{width:g}/{height:g}"', 1)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r"url\(#", f"url(#{name}-", body)
    body = re.sub(r'href="#', f'href="#{name}-', body)
    body = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", "var(--sans)", body)
    return re.sub("|".join(THEMED), lambda found: f"var(--{THEMED[found[0]]})", body)


def save(figure: Figure, path: Path) -> str:
    """Write `path`.svg and `path`.png, close the figure, and return the SVG document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = svg(figure)
    figure.set_layout_engine("none")  # the layout is found; the PNG takes it over
    write_whole(path.with_name(path.name + ".svg"), document)
    write_whole(path.with_name(path.name + ".png"), png(figure))
    plt.close(figure)
    return document
