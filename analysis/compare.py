"""Whether two runs are the same to the bit, and if not, where they first differ.

    python -m analysis.compare runs/prosqa/prosqa-coconut runs/again/prosqa-coconut
    python -m analysis.compare runA runB --json difference.json --plot difference.png -v

Compares what both run folders hold: the rows, loss and gradient norm of every update, the evaluations, and every checkpoint_N.
These numbers decide; settings, versions and data files that differ are shown beside them, as what may have caused it. The first
difference is the earliest in training. Of updates done twice (a killed run that went on) the last counts, and whether they
repeated to the bit is said. NaN equals NaN. Updates count from 0, as `train/step` does, epochs from 1, as checkpoint_N does.

Exit code: 0 equal in all they share, 1 different, 2 nothing to compare or a mistake.
"""

import math
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as `python analysis/compare.py`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from analysis.command import command, parser_of  # noqa: E402
from analysis.differences import EVAL_FIELDS, Side, apart, differences, same, size  # noqa: E402
from files import write_json, write_whole  # noqa: E402


def verdict(result: dict) -> str:
    """One line."""
    first, counts = result["first_difference"], ", ".join(f"{n} {name}" for name, n in result["compared"].items())
    if result["equal"] is None:
        return "nothing to compare: the runs have no update, evaluation or checkpoint in common"
    line = f"equal to the bit: {counts} compared" if first is None else f"first difference: {describe(first)}"
    notes = []
    if result["further"]:
        losses = result["updates"]["train/loss"]
        more = f"{losses[result['further']] - losses['compared']} updates more"
        notes.append(f"{result['further'].upper()} goes further ({more}{', equal so far' if first is None else ''})")
    settings = [key for key, d in result["config"]["differ"].items() if d["matters"]]
    settings += [name for name, pair in result["config"]["versions"].items() if not same(pair["a"], pair["b"])]
    world = result["config"]["world_size"]
    settings += ["world size"] if world["a"] != world["b"] else []
    settings += [f"the file of {key}" for key, file in result["data"].items() if file["equal"] is False]
    notes += [f"settings that differ: {', '.join(settings)}"] if settings else []
    for name, redone in result["redone"].items():
        if redone["repeated"] < redone["updates"]:
            notes.append(f"{name.upper()} did not repeat its redone updates ({redone['repeated']} of {redone['updates']} did)")
    return "; ".join([line, *notes])


def describe(first: dict) -> str:
    """A difference and where it is."""
    if first["what"] == "weights":
        return f"weights of checkpoint_{first['epoch']}: {first['tensors']} of {first['of']} tensors, {most(first['most'])}"
    where = f"at update {first['update']} (epoch {first['epoch']})" if "update" in first else f"after epoch {first['epoch']}"
    return f"{first['what']} {where}: {first['a']} and {first['b']}" + by(first["difference"])


def by(difference: float | None) -> str:
    return "" if difference is None else f", {difference:+.3g}"


def most(tensor: dict) -> str:
    """How one tensor differs."""
    if "only_in" in tensor:
        return f"{tensor['name']} is only in {tensor['only_in'].upper()}"
    if "largest" not in tensor:
        return f"{tensor['name']} is {tensor['a']} and {tensor['b']}"
    return f"{tensor['name']} by up to {tensor['largest']:.3g} ({tensor['values']} of {tensor['of']} values)"


def lines(result: dict, verbose: bool) -> list[tuple[str, str, str, str]]:
    """The table: what, A, B, result. Lines of one cell are headings."""
    config, rows = result["config"], [("", "A", "B", ""), ("config", "", "", "")]
    n_same = config["keys"] - len(config["differ"])
    rows += [("  keys", "", "", f"{n_same} of {config['keys']} equal" if config["recorded"] else "not recorded")]
    for key, d in sorted(config["differ"].items(), key=lambda item: not item[1]["matters"]):
        rows.append((f"  {key}", cut(d["a"]), cut(d["b"]), "differs" if d["matters"] else "differs; no number depends on it"))
    pairs = config["versions"] | {"world size": {s: ", ".join(map(str, config["world_size"][s])) or None for s in "ab"}}
    for name, pair in pairs.items():
        one, other = (pair[s] or "–" for s in "ab")
        rows.append((f"  {name}", one, other, "equal" if one == other else "differs"))

    rows.append(("data", "", "", ""))
    for key, file in result["data"].items():
        one, other = (f"{file[s]['sha256'][:12]} ({file[s]['rows']} rows)" if file[s] else "–" for s in "ab")
        rows.append((f"  {key}", one, other, {True: "equal", False: "differs", None: "not recorded"}[file["equal"]]))
    rows.append(series_line("row order", result["updates"]["rows"]))
    rows.append(("loss", "", "", ""))
    rows += [series_line(name, result["updates"][name]) for name in ("train/loss", "train/grad_norm")]
    rows += [series_line(name, result["evaluations"][name]) for name in EVAL_FIELDS]
    redone = result["redone"]
    repeats = [f"{redone[s]['repeated']} of {redone[s]['updates']}" for s in "ab"]
    first = [f"not in {s.upper()}: {describe({'what': 'loss'} | redone[s]['first'])}" for s in "ab" if redone[s]["first"]]
    rows.append(("  resumed updates", *repeats, "; ".join(["repeated exactly", *first])))

    rows.append(("weights", "", "", ""))
    held = result["checkpoints"]
    for n in sorted({*held["a"], *held["b"]}):
        weights = result["weights"].get(n)
        place = (f"  checkpoint_{n}", *("there" if n in held[s] else "–" for s in "ab"))
        if weights is None or not weights["differ"]:
            rows.append((*place, f"equal, {weights['tensors']} tensors" if weights else "not compared"))
            continue
        text = f"{len(weights['differ'])} of {weights['tensors']} tensors differ, distance {weights['distance']:.3g} "
        text += f"of a norm of {weights['norm']:.4g}; most: {most(weights['differ'][0])}"
        rows += [(*place, text), *(("", "", "", f"  {most(d)}") for d in (weights["differ"] if verbose else ()))]
    return rows


def cut(value, width: int = 40) -> str:
    """A value as text; of a long one the end, where paths differ."""
    text = str(value)
    return text if len(text) <= width else "…" + text[1 - width :]


def series_line(name: str, series: dict) -> tuple[str, str, str, str]:
    counts = (f"  {name}", str(series["a"] or "–"), str(series["b"] or "–"))
    if not series["compared"]:
        return (*counts, "nothing in common" if series["a"] and series["b"] else "not recorded")
    text, first, largest = f"{series['equal']} of {series['compared']} equal", series["first"], series["largest"]
    if first:
        text += f"; first {describe({'what': ''} | first).strip()}"
    if largest:
        where = f"at update {largest['update']}" if "update" in largest else f"after epoch {largest['epoch']}"
        text += f"; largest difference {largest['difference']:+.3g} {where}"
    return (*counts, text)


def strict(value):
    """A value for JSON, which knows no NaN and infinity: they become text."""
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def plot(result: dict, a: Path, b: Path, path: Path) -> None:
    """Absolute difference of the training losses against the update, equal ones left out, as a PNG."""
    from analysis.drawing import panel, plt, png, sheet, styled  # matplotlib takes longer than the comparison

    one, other = Side.read(a).updates, Side.read(b).updates
    both = sorted(one.keys() & other.keys())
    if not both:
        raise ValueError(f"--plot: {a} and {b} have no update in common")
    gaps = [(key[1], size(apart(one[key]["train/loss"], other[key]["train/loss"]))) for key in both]
    shown = [(update, gap) for update, gap in gaps if 0 < gap < math.inf]
    equal = f"{result['updates']['train/loss']['equal']} of {len(both)} losses equal"

    @styled
    def draw() -> bytes:
        figure, axes = sheet(1, 1, width=7.0)
        panel(axes[0, 0], f"{a.name} and {b.name}", equal, "update", "|difference of the loss| (nats)")
        if shown:
            axes[0, 0].semilogy(*zip(*shown), ".", ms=3)
        axes[0, 0].set_xlim(both[0][1] - 0.5, both[-1][1] + 0.5)
        content = png(figure)
        plt.close(figure)
        return content

    content = draw()
    write_whole(path, content)


@command
def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("a", type=Path, metavar="runA", help="run folder")
    parser.add_argument("b", type=Path, metavar="runB", help="run folder")
    parser.add_argument("--json", type=Path, help="write everything found to this file")
    parser.add_argument("--plot", type=Path, help="draw |difference of the losses| against the update to this PNG")
    parser.add_argument("-v", "--verbose", action="store_true", help="list every tensor that differs")
    args = parser.parse_args(argv)
    result = differences(args.a, args.b)
    print(verdict(result), f"A  {args.a}", f"B  {args.b}", sep="\n", end="\n\n")
    rows = lines(result, args.verbose)
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]).rstrip())
    if args.json:
        write_json(args.json, strict(result | {"verdict": verdict(result)}))
    if args.plot:
        plot(result, args.a, args.b, args.plot)
    return {True: 0, False: 1, None: 2}[result["equal"]]


if __name__ == "__main__":
    sys.exit(main())
