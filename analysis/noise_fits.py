"""What an accuracy does as noise grows: three fitted curves, the scale at which it breaks down, and the picture.

    fits(x, accuracies)                    # {"exponential": {"parameters", "errors", "r2", ...}, "hyperbolic": ..., ...}
    breakdown(scales, accuracies, clean)   # the first scale below half of the clean accuracy, or None
    plot(result, Path("accuracy_decay_curve.png"))

x is the strength of the noise: the scale, for snr 1 / scale. Accuracies are fractions.
"""

import warnings
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from analysis.drawing import INK, LOOKS, MUTED, sheet, styled
from files import write_whole

CURVES: dict[str, tuple[str, Callable, tuple[str, ...]]] = {
    "exponential": ("a·exp(-b·x)", lambda x, a, b: a * np.exp(-b * x), ("a", "b")),
    "hyperbolic": ("a/(1 + b·x^c)", lambda x, a, b, c: a / (1 + b * np.power(x, c)), ("a", "b", "c")),
    "linear": ("a - b·x", lambda x, a, b: a - b * x, ("a", "b")),
}
BOUNDS = {"exponential": ([0, 0], [2, np.inf]), "hyperbolic": ([0, 0, 0.05], [2, np.inf, 20]), "linear": (-np.inf, np.inf)}
GOOD, DEGRADED = 60, 20  # percent, from where on
DPI = 300


def strength(noise_type: str, scale: float) -> float:
    """How strong the noise of a scale is: 1 / scale for snr (0 is off), the scale itself for all others."""
    return scale if noise_type != "snr" or scale == 0 else 1 / scale


def in_order(noise_type: str, scales: Sequence[float]) -> list[float]:
    """Scales from no noise to the strongest, each once."""
    return sorted(set(map(float, scales)), key=lambda scale: strength(noise_type, scale))


def label(accuracy: float) -> str:
    """Good, Degraded or Broken, by the accuracy (a fraction)."""
    percent = 100 * accuracy
    return "Good" if percent >= GOOD else "Degraded" if percent >= DEGRADED else "Broken"


def breakdown(
    scales: Sequence[float], accuracies: Sequence[float], clean: float, absolute: float | None = None
) -> float | None:
    """The first of the scales (weakest noise first) whose accuracy is below half the clean one, or below `absolute`."""
    line = clean / 2 if absolute is None else absolute
    return next((scale for scale, accuracy in zip(scales, accuracies) if accuracy < line), None)


def fits(x: Sequence[float], y: Sequence[float]) -> dict[str, dict]:
    """Least-squares fits: {"formula", "parameters", "errors" (standard, from the covariance), "r2", "reason"} for each curve.

    What cannot be fitted has None and a reason: no scipy, fewer than one point more than parameters, no convergence.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    return {name: {"formula": formula, **_fit(name, f, names, x, y)} for name, (formula, f, names) in CURVES.items()}


def _fit(name: str, f: Callable, names: tuple[str, ...], x: np.ndarray, y: np.ndarray) -> dict:
    nothing = {"parameters": None, "errors": None, "r2": None}
    try:
        from scipy.optimize import OptimizeWarning, curve_fit
    except ImportError:
        return nothing | {"reason": "scipy is not installed"}
    if len(x) <= len(names):
        return nothing | {"reason": f"{len(x)} points for {len(names)} parameters"}
    total = float(((y - y.mean()) ** 2).sum())
    if total == 0:
        return nothing | {"reason": "all accuracies are equal"}
    start = {"exponential": (y[0], 1 / max(x.max(), 1e-9)), "hyperbolic": (y[0], 1 / max(x.max(), 1e-9), 1.0)}
    start = [min(max(value, 1e-9), 1.9) if i == 0 else value for i, value in enumerate(start.get(name, (y[0], 0.0)))]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", OptimizeWarning)  # a covariance that cannot be estimated is a failed fit
            found, covariance = curve_fit(f, x, y, start, bounds=BOUNDS[name], maxfev=20_000)
    except (RuntimeError, ValueError, OptimizeWarning) as error:
        return nothing | {"reason": f"no fit: {' '.join(str(error).split())[:100]}"}
    r2 = 1 - float(((y - f(x, *found)) ** 2).sum()) / total
    errors = np.sqrt(np.diag(covariance))
    if not np.isfinite([*found, *errors, r2]).all():
        return nothing | {"reason": "no fit: its parameters have no finite errors"}
    return {
        "parameters": dict(zip(names, found.tolist())),
        "errors": dict(zip(names, errors.tolist())),
        "r2": r2,
        "reason": None,
    }


# ---------------------------------------------------------------- the picture


@styled
def plot(result: dict, path: Path) -> None:
    """accuracy_decay_curve.png of a result (see noise_results.py): points with Wilson intervals, baselines, fits."""
    info, levels = result["experiment_info"], result["accuracy_by_noise"]
    noise_type = info["noise_type"]
    points = [(strength(noise_type, float(scale)), level) for scale, level in levels.items()]
    x = np.array([at for at, _ in points])
    y = np.array([level["accuracy_percent"] for _, level in points])
    ends = 100 * np.array([level["ci95"] for _, level in points]).T
    figure, panels = sheet(1, 1, height=4.4, width=7.5)
    axes, colour = panels[0, 0], LOOKS["m3"].colour
    above = x[x > 0]
    if len(above) and above.max() / above.min() > 20:
        axes.set_xscale("symlog", linthresh=float(above.min()))
    error = np.clip([y - ends[0], ends[1] - y], 0, None)
    axes.errorbar(x, y, error, ls="", marker="o", color=colour, capsize=2.5, label="accuracy, 95 % (Wilson)", zorder=4)
    _fitted(axes, result["fits"], x)
    for name, style in (("clean", "-"), ("no_latents", "--")):
        level = result["baselines"].get(name)
        if level and level["accuracy"] is not None:
            axes.axhline(100 * level["accuracy"], color=MUTED, ls=style, lw=1, label=name.replace("_", " "))
    if result["breakdown"]["scale"] is not None:
        reference_x = strength(noise_type, result["breakdown"]["scale"])
        axes.axvline(reference_x, color=INK, ls=":", lw=1, label=f"breakdown at {result['breakdown']['scale']:g}")
    axes.set(xlim=(0, None), ylim=(0, 104))
    n = {level["total"] for level in levels.values()}
    direction = f" ({info['noise_direction']})" if info["noise_direction"] else ""
    axes.set_title(f"{noise_type}{direction}, {info['benchmark']}, n = {min(n)}")
    axes.set(xlabel="1 / snr" if noise_type == "snr" else "noise scale", ylabel="accuracy (%)")
    axes.legend(fontsize=7)
    figure.savefig(buffer := BytesIO(), format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    write_whole(path, buffer.getvalue())
    plt.close(figure)


def _fitted(axes, found: dict, x: np.ndarray) -> None:
    drawn = {name: fit for name, fit in found.items() if fit["parameters"]}
    if not drawn:
        return
    dense = np.unique([*np.linspace(x.min(), x.max(), 300), *np.geomspace(x[x > 0].min() / 100, x.max(), 300)])
    for (name, fit), colour in zip(drawn.items(), (LOOKS[key].colour for key in ("m5", "m4", "m1"))):
        y = 100 * CURVES[name][1](dense, **fit["parameters"])
        axes.plot(dense, y, color=colour, lw=1.2, label=f"{fit['formula']}, R² {fit['r2']:.3f}")
