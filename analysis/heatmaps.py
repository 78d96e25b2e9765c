"""Figures that are grids of cells: probes, causal effects, thought counts, transplants. They read the summary's JSON only.

    figure = probes(read_summary(Path("results/study/final/results_summary.json")))

Every cell shows its number, and lightness follows it, so that grey print reads alike. A cell without data is crossed out and
empty; it is not 0.
"""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from analysis.blocks import interval, number
from analysis.drawing import INK, LINE, MUTED, PAPER, empty, inches, panel, rows_text, sheet, styled, title_of
from analysis.gathered import make, repeats

SEQUENTIAL, DIVERGING = "Blues", "PuOr_r"
MOST_NUMBERS = 130  # cells of a panel that get their number written


def grid(axes: Axes, values: np.ndarray, low: float, high: float, cmap: str = SEQUENTIAL, digits: int = 0) -> None:
    """Cells of `values` [rows, columns], row 0 at the bottom; NaN is a cell without data."""
    colours, scale = colormaps[cmap], Normalize(low, high if high > low else low + 1)
    rows, columns = values.shape
    masked = np.ma.masked_invalid(values)
    axes.pcolormesh(masked, cmap=colours, norm=scale, edgecolors=LINE, linewidth=0.4)
    for y, x in zip(*np.nonzero(masked.mask & np.ones(values.shape, bool))):
        axes.plot([x + 0.3, x + 0.7], [y + 0.3, y + 0.7], color=MUTED, lw=0.6)
    if values.size <= MOST_NUMBERS:
        texts = [number(value, digits) for value in values[np.isfinite(values)]]
        width = 80 * inches(axes) / columns  # of a cell, in points
        size = min(7.5, max(4.0, width / (0.7 * max(map(len, texts), default=1))))
        for y, x in zip(*np.nonzero(np.isfinite(values))):
            red, green, blue, _ = colours(scale(values[y, x]))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            text = number(values[y, x], digits)
            axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=size, color="#ffffff" if dark else "#111111")
    axes.set(xlim=(0, columns), ylim=(0, rows))
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def ticks(axes: Axes, x: Sequence, y: Sequence) -> None:
    """Names of columns and rows, in the middle of their cells; of many every second or third."""
    for names, set_ticks in ((x, axes.set_xticks), (y, axes.set_yticks)):
        step = -(-len(names) // 14)
        set_ticks(np.arange(0, len(names), step) + 0.5, [str(name) for name in names[::step]])


def table_of(values: object) -> np.ndarray | None:
    """A list of lists of numbers and None as float64 [rows, columns]; None if it is no such table."""
    if not isinstance(values, list) or not values or not all(isinstance(row, list) and row for row in values):
        return None
    return np.array([[np.nan if x is None else float(x) for x in row] for row in values])


def mean_table(tables: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """Cell by cell mean over seeds, of those that have the cell."""
    found = [table for table in tables if table is not None]
    if not found or len({table.shape for table in found}) > 1:
        return found[0] if found else None
    stacked = np.stack(found)
    known = np.isfinite(stacked)
    total = np.where(known, stacked, 0).sum(0)
    return np.where(known.any(0), total / np.maximum(known.sum(0), 1), np.nan)


# ---------------------------------------------------------------- 1: probes


PROBED = ("m3", "m4", "m4b", "m5")


@styled
def probes(summary: dict) -> Figure:
    """Linear probe accuracy by layer and slot, the inputs' for comparison, and selectivity."""
    figure, axes = sheet(2, 5, height=3.1)
    found = {model: repeats(summary, "probing", model) for model in PROBED}
    by_model = {m: mean_table([table_of(r.get("linear_probe_accuracy")) for r in some]) for m, some in found.items()}
    by_input = mean_table([table_of(r.get("input_position_probe_acc")) for r in found["m3"]])
    every = [table for table in [*by_model.values(), by_input] if table is not None]
    high = 100 * max((np.nanmax(t) for t in every if np.isfinite(t).any()), default=1)
    for column, model in enumerate(PROBED):
        _layers(axes[0, column], summary, model, by_model[model], 0, high, found[model], "slot")
        _significant(axes[0, column], found[model])
        selectivity = mean_table([table_of(r.get("selectivity")) for r in found[model]])
        most = 100 * max(0.1, float(np.nanmax(np.abs(selectivity)))) if _any(selectivity) else 1
        _layers(axes[1, column], summary, model, selectivity, -most, most, found[model], "slot", "selectivity")
    _layers(axes[0, 4], summary, "m3", by_input, 0, high, found["m3"], "question position", "inputs")
    axes[1, 4].axis("off")
    axes[0, 0].set_ylabel("layer")
    axes[1, 0].set_ylabel("layer")
    return figure


def _significant(axes: Axes, found: list[dict]) -> None:
    """A dot in the corner of every cell that beats its shuffles in all seeds."""
    cells = [{tuple(cell) for cell in r.get("significant_cells") or []} for r in found]
    for layer, slot in sorted(set.intersection(*cells)) if cells else ():
        axes.plot(slot + 0.88, layer + 0.84, "o", ms=2.6, color=PAPER, mec=INK, mew=0.5)


def _any(table: np.ndarray | None) -> bool:
    return table is not None and bool(np.isfinite(table).any())


def _layers(axes, summary, model, table, low, high, found, x, what="") -> None:
    """One panel of layers x positions, in percent or points."""
    title = f"{model} {what}" if what else title_of(model)
    if not _any(table):
        reason = f"not measured\n{make(summary, 'probing', model)}" if not found else f"{model} has no {what or 'probe'} cells"
        return empty(axes, title, reason)
    selective = what == "selectivity"
    grid(axes, 100 * table, low, high, DIVERGING if selective else SEQUENTIAL)
    counts = [n for r in found for n in r.get("n_samples_per_position") or [r.get("n")]]
    panel(axes, title, rows_text(counts, len(found)), x)
    ticks(axes, range(table.shape[1]), range(table.shape[0]))


# ---------------------------------------------------------------- 4: causal effects


TRACED = ("m1", "m3", "m4b", "m5")


@styled
def effects(summary: dict) -> Figure:
    """Share of the total effect that one restored state brings back, by layer and position, at thoughts (m1: its own steps)."""
    figure, axes = sheet(1, len(TRACED), height=3.5, width_ratios=(2, 1, 1, 1))  # m1 has more positions
    for column, model in enumerate(TRACED):
        found = [r.get("groups", {}).get("thoughts") for r in repeats(summary, "causal_tracing", model)]
        _effect(axes[0, column], summary, model, [group for group in found if group])
    axes[0, 0].set_ylabel("layer")
    return figure


def _effect(axes: Axes, summary: dict, model: str, groups: list[dict]) -> None:
    if not groups:
        return empty(axes, title_of(model), f"not measured\n{make(summary, 'causal_tracing', model)}")
    table = mean_table([table_of(group.get("mean_ce")) for group in groups])
    if not _any(table):
        return empty(axes, title_of(model), "\n".join(_no_effect(group) for group in groups))
    grid(axes, table, 0, max(1.0, float(np.nanmax(table))), digits=2)
    drawn = [group for group in groups if group.get("mean_ce")]
    without = f"; no effect in {len(groups) - len(drawn)} more" if len(drawn) < len(groups) else ""
    panel(axes, title_of(model), rows_text([group.get("n_traced") for group in drawn], len(drawn)) + without, "position")
    ticks(axes, [str(label).split(" ")[-1] for label in drawn[0]["position_labels"]], range(table.shape[0]))


def _no_effect(group: dict) -> str:
    """`no effect to trace: total effect 0.01 nats (−0.02 .. 0.04), n = 200`."""
    total, text = group.get("total_effect") or {}, str(group.get("reason") or "no effect to trace")
    if total.get("value") is not None:
        text += f": total effect {number(total['value'], 2)} nats"
    if total.get("ci95"):
        text += f" ({interval(total['ci95'], digits=2)})"
    return f"{text}, n = {group.get('n_traced', 0)}"


# ---------------------------------------------------------------- 6: thought counts


COUNTED = ("m3", "m4b", "m5")


@styled
def token_counts(summary: dict) -> Figure:
    """Exact match by number of thoughts and of reasoning steps; counts above the trained number are marked."""
    figure, axes = sheet(1, len(COUNTED), height=2.9)
    for column, model in enumerate(COUNTED):
        found = repeats(summary, "token_count", model)
        matrices = [r["matrix"] for r in found if r.get("matrix")]
        if not matrices:
            empty(axes[0, column], title_of(model), f"not measured\n{make(summary, 'token_count', model)}")
            continue
        hops, counts = list(matrices[0]), list(next(iter(matrices[0].values())))
        tables = [
            _matrix(matrix, hops, counts, lambda cell: (cell.get("exact_match") or {}).get("accuracy")) for matrix in matrices
        ]
        grid(axes[0, column], 100 * mean_table(tables), 0, 100)
        beyond = {str(count) for r in found for count in r.get("extrapolated", [])}
        names = [{"no_markers": "none"}.get(c, f"{c}*" if c in beyond else c) for c in counts]
        rows = [
            cell["exact_match"]["n"] for matrix in matrices for cells in matrix.values() for cell in list(cells.values())[:1]
        ]
        panel(axes[0, column], title_of(model), rows_text(rows, len(found)) + "; * more than trained", "thoughts")
        ticks(axes[0, column], names, [h if not h.isdigit() else "1 step" if h == "1" else f"{h} steps" for h in hops])
    return figure


def _matrix(cells: dict, rows: Sequence[str], columns: Sequence[str], read: Callable[[dict], float | None]) -> np.ndarray:
    """A dictionary of dictionaries as a table; NaN where there is no cell or no value."""
    values = [[read(cells.get(row, {}).get(column) or {}) for column in columns] for row in rows]
    return np.array([[np.nan if x is None else float(x) for x in row] for row in values])


# ---------------------------------------------------------------- 8: transplants


TRANSPLANTED = ("m3", "m4", "m4b", "m5")


@styled
def transplants(summary: dict) -> Figure:
    """Accuracy with another row's thoughts, by the donor's and the recipient's number of steps."""
    figure, axes = sheet(1, len(TRANSPLANTED), height=2.9)
    for column, model in enumerate(TRANSPLANTED):
        found = [r for r in repeats(summary, "corruption", model) if r.get("transplant_by_hops")]
        if not found:
            empty(axes[0, column], title_of(model), f"not measured\n{make(summary, 'corruption', model)}")
            continue
        cells = [r["transplant_by_hops"] for r in found]
        sources = sorted({source for table in cells for source in table}, key=int)
        targets = sorted({target for table in cells for row in table.values() for target in row}, key=int)
        tables = [_matrix(table, targets, sources, lambda cell: cell.get("accuracy")) for table in map(_transposed, cells)]
        grid(axes[0, column], 100 * mean_table(tables), 0, 100)
        pairs = sum(level["n"] for table in cells for row in table.values() for level in row.values())
        certain = (found[0].get("cross_transplant_accuracy") or {}).get("by_construction")
        seeds = f"{len(found)} seed{'s' if len(found) > 1 else ''}"
        note = f"n = {pairs} pairs, {seeds}" + (", asserted no-op" if certain else "")
        panel(axes[0, column], title_of(model), note, "steps of the donor")
        ticks(axes[0, column], sources, targets)
    axes[0, 0].set_ylabel("steps of the recipient")
    return figure


def _transposed(cells: dict) -> dict:
    """{b: {a: cell}} of {a: {b: cell}}."""
    turned: dict[str, dict] = {}
    for a, row in cells.items():
        for b, cell in row.items():
            turned.setdefault(b, {})[a] = cell
    return turned
