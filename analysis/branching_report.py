"""What an experiment with branches is shown as: lines of text, accuracy against coverage, path diversity by scale.

print(report(result))
coverage_figure(result, folder / "coverage_accuracy.png")
diversity_figure(result, folder / "path_diversity.png")
"""

from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from analysis.drawing import MODELS, MUTED, legend, look, panel, reference, sheet, styled
from analysis.noise_fits import strength
from analysis.tables import number, percent, table
from files import write_whole

DPI = 300

# ---------------------------------------------------------------- text


def report(result: dict) -> str:
    """A result as Markdown tables: every cell, the abstention curve at the temperature above 0, the paired tests."""
    info = result["experiment_info"]
    kind = "-".join(filter(None, (info["noise_type"], info["noise_direction"])))
    lines = [
        f"{info['num_branches']} branches with {kind} at slot {info['injection_step']} of {info['latent_passes']}, schedule "
        f"{info['schedule']}, {info['noise_chain']}; {info['checkpoint'] or info['model']}, {info['benchmark']}, "
        f"n = {info['num_questions']}, top_p {info['top_p']:g}; tokens: new ones a branch",
        "",
        cells_table(result["grid"]),
    ]
    for name, level in result["baselines"].items():
        lines.append(f"one greedy answer, {name}: {percent(level['accuracy'])}, {number(level['gen_tokens'], 3)} tokens")
    if result["accuracy_claimed"]:
        sampled = [cell for cell in result["grid"] if cell["temperature"]]
        lines += ["", abstention_table(sampled), paired_table(result["paired"])]
    return "\n".join(lines)


def cells_table(grid: list[dict]) -> str:
    head = ("scale, temperature", "majority", "95 %", "first", "logprob mass", "agreement", "D_K", "tokens", "failed")
    rows = []
    for cell in grid:
        named = [cell["aggregators"][name] for name in ("first", "logprob_mass")]
        low, high = cell["ci95"] or (None, None)
        rows.append(
            [
                f"{cell['noise_scale']:g}, {cell['temperature']:g}",
                percent(cell["accuracy"]),
                f"{percent(low)} .. {percent(high)}",
                *(percent(level and level["accuracy"]) for level in named),
                percent(cell["agreement"]),
                number(cell["d_k"], 3),
                number(cell["gen_tokens"], 3),
                f"{cell['branch_errors']}/{cell['branches']}",
            ]
        )
    return table(head, rows)


def abstention_table(grid: list[dict]) -> str:
    """Coverage and error by the agreement that is asked for."""
    rows = []
    for cell in grid:
        for point in cell["abstention"]:
            low, high = point["ci95"] or (None, None)
            said = (point["coverage"], point["accuracy"], low, high, point["error"])
            coverage, accuracy, low, high, error = map(percent, said)
            name = f"{cell['noise_scale']:g}, {cell['temperature']:g}"
            rows.append([name, point["threshold"], coverage, f"{point['answered']}", accuracy, f"{low} .. {high}", error])
    return table(("scale, temperature", "agreement from", "coverage", "answered", "accuracy", "95 %", "error"), rows)


def paired_table(tests: list[dict]) -> str:
    """McNemar's tests: first minus second in points, and p by Holm."""

    def named(cell: dict | None) -> str:
        return "one greedy answer" if cell is None else f"{cell['scale']:g}, {cell['temperature']:g}"

    rows = [
        [f"{test['what']}: {named(test['first'])}", named(test["second"]), str(test["n"]), percent(test.get("difference"))]
        + [number(test["p_value"], 2), number(test["p_holm"], 2)]
        for test in tests
    ]
    return table(("first", "second", "n", "first - second", "p", "p (Holm)"), rows)


# ---------------------------------------------------------------- figures


@styled
def coverage_figure(result: dict, path: Path) -> None:
    """Accuracy on answered questions against the share answered, a line a scale, a panel a temperature."""
    temperatures = sorted({cell["temperature"] for cell in result["grid"]})
    figure, panels = sheet(1, len(temperatures), height=3.8, width=5.2 * len(temperatures))
    info, clean = result["experiment_info"], result["baselines"]["clean"]
    for axes, temperature in zip(panels[0], temperatures):
        lowest_x, lowest_y = [100.0], [clean["accuracy_percent"]]
        for i, cell in enumerate(c for c in result["grid"] if c["temperature"] == temperature):
            points = [point for point in cell["abstention"] if point["accuracy"] is not None]
            style = look(MODELS[i % len(MODELS)])
            x, y = ([100 * point[key] for point in points] for key in ("coverage", "accuracy"))
            ends = 100 * np.array([point["ci95"] for point in points]).reshape(-1, 2).T
            error = np.clip([np.array(y) - ends[0], ends[1] - np.array(y)], 0, None)
            lowest_x, lowest_y = [*lowest_x, *x], [*lowest_y, *ends[0]]
            label = f"scale {cell['noise_scale']:g}" if cell["noise_scale"] else "no noise"
            line = {"color": style.colour, "ls": style.line, "marker": style.marker}
            axes.errorbar(x, y, error, **line, capsize=2, elinewidth=0.8, label=label)
        note = f"n = {info['num_questions']}, answered from 2 to {info['num_branches']} equal votes on"
        panel(axes, f"temperature {temperature:g}", note, "answered (%)", "right among answered (%)")
        axes.grid(axis="y")
        axes.set(xlim=_around(lowest_x), ylim=_around(lowest_y))
        reference(axes, clean["accuracy_percent"], "one greedy answer, no noise")
    legend(figure, panels[0, 0])
    _save(figure, path)


@styled
def diversity_figure(result: dict, path: Path) -> None:
    """D_K, its late part, and D_K over the mean norm, by scale. Temperature does not matter: tokens come after the thoughts."""
    names = {"d_k": "D_K", "d_k_late": "D_K, last half of the steps", "d_k_normalized": "D_K / mean norm"}
    figure, panels = sheet(1, len(names), height=3.2, width=11)
    info, style = result["experiment_info"], look("m3")
    for axes, (name, title) in zip(panels[0], names.items()):
        cells = [c for c in result["grid"] if not c["temperature"] and c[name] is not None]
        at = [strength(info["noise_type"], c["noise_scale"]) for c in cells]
        axes.plot(at, [c[name] for c in cells], color=style.colour, ls=style.line, marker=style.marker)
        x, y = "1 / snr" if info["noise_type"] == "snr" else "noise scale", "" if name == "d_k_normalized" else "L2 distance"
        panel(axes, title, f"n = {info['num_questions']}, {info['num_branches']} branches", x, y)
        axes.axhline(0, color=MUTED, lw=0.6)
    _save(figure, path)


def _around(values: list[float]) -> tuple[float, float]:
    """Limits of an axis in percent that ends at 100 and begins at a ten below all these values."""
    return max(-2, 10 * ((min(values) - 4) // 10)), 101.5


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(buffer := BytesIO(), format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    write_whole(path, buffer.getvalue())
    plt.close(figure)
