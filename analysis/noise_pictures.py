"""The pictures of NOISE_TYPES_GUIDE.md: what each type of noise does to the same vector, computed by the operators themselves.

    python -m analysis.noise_pictures [--out analysis/noise_types]

Two panels a type. Left: where 300 draws put one vector of two dimensions (arrow), at scale 0.5 (snr: 2). Right: the norms of the
noise and of the noisy vector against the scale, for vectors of 64 dimensions with norm 8, as multiples of it.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as `python analysis/noise_pictures.py`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from analysis.command import command, parser_of  # noqa: E402
from analysis.drawing import INK, LOOKS, MUTED, panel, sheet, styled, svg  # noqa: E402
from analysis.noise_operators import apply_noise_to_hidden_states, draw_generator  # noqa: E402
from analysis.noise_settings import EVERY, SWEEPS  # noqa: E402
from files import write_whole  # noqa: E402

DRAWS, NORM, WIDTH = 300, 8.0, 64
SHOWN = {"snr": 2.0}  # else 0.5
COLOUR = LOOKS["m3"].colour


def name_of(noise_type: str, direction: str | None) -> str:
    return "_".join(filter(None, (noise_type, direction)))


@styled
def picture(noise_type: str, direction: str | None) -> str:
    """The SVG document of one type."""
    figure, panels = sheet(1, 2, height=3.0, width=7.5)
    scale = SHOWN.get(noise_type, 0.5)
    _plane(panels[0, 0], noise_type, direction, scale)
    _norms(panels[0, 1], noise_type, direction)
    document = svg(figure)
    plt.close(figure)
    return document


def _plane(axes: Axes, noise_type: str, direction: str | None, scale: float) -> None:
    h_ND = torch.tensor([[1.2, 0.7]]).expand(DRAWS, 2)
    noisy, _ = apply_noise_to_hidden_states(
        h_ND, scale, noise_type, direction, draw_generator(0, name_of(noise_type, direction))
    )
    panel(axes, name_of(noise_type, direction).replace("_", " "), f"{DRAWS} draws, scale {scale:g}")
    axes.plot(*noisy.T.numpy(), ls="", marker="o", ms=2.5, color=COLOUR, alpha=0.45)
    axes.annotate("", h_ND[0].tolist(), (0, 0), arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1.4})
    axes.axhline(0, color=MUTED, lw=0.5)
    axes.axvline(0, color=MUTED, lw=0.5)
    axes.set(xlim=(-1.3, 3.3), ylim=(-1.2, 2.4), aspect="equal")


def _norms(axes: Axes, noise_type: str, direction: str | None) -> None:
    h_ND = torch.randn(200, WIDTH, generator=draw_generator(0, "vectors"))
    h_ND = NORM * h_ND / h_ND.norm(dim=-1, keepdim=True)
    scales = [s for s in SWEEPS[noise_type, direction] if s > 0 or noise_type != "snr"]
    seen = [apply_noise_to_hidden_states(h_ND, s, noise_type, direction, draw_generator(0, "norms"))[1] for s in scales]
    x = np.array([1 / s if noise_type == "snr" else s for s in scales])
    panel(axes, "Norms, as multiples of norm(h)", f"{WIDTH} dimensions", x="1 / snr" if noise_type == "snr" else "scale")
    noise, after = ([info[key] / NORM for info in seen] for key in ("noise_norm", "perturbed_norm"))
    axes.plot(x, noise, color=COLOUR, marker="o", label="noise")
    axes.plot(x, after, color=LOOKS["m5"].colour, ls="--", marker="s", label="noisy vector")
    axes.axhline(1, color=MUTED, lw=0.7)
    if x.max() > 5:
        axes.set_xscale("symlog", linthresh=0.1)
        axes.set_yscale("symlog", linthresh=1)
    axes.set_xlim(0, None)
    axes.set_ylim(0, None)
    axes.legend()


@command
def main(argv: list[str] | None = None) -> int:
    """Write <type>.svg of every type to a folder."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).with_name("noise_types"), help="default: analysis/noise_types"
    )
    out = parser.parse_args(argv).out
    out.mkdir(parents=True, exist_ok=True)
    for kind in EVERY:
        path = out / f"{name_of(*kind)}.svg"
        write_whole(path, picture(*kind))
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
