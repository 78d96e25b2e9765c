"""The report of a study, from its JSON alone: no model is loaded, and torch is not needed.

    python -m analysis.report results/study-quickstart [--epoch final|best|N]

Reads what lies below the study's folder (results of the experiments in FOLDER/EPOCH/..., study.json, gates.json) and writes

    EPOCH/results_summary.json      everything in one file
    report.html, report.md          the report, in one self-contained page and in Markdown; of other checkpoints report-EPOCH.html
    figures/*.svg, *.png            its figures

Without --epoch each kind of checkpoint that the study measured gets a report of its own: final and best never meet in a table.
The same JSON gives the same bytes. Exit code: 0 written; 2 a mistake in the command or the files.
"""

from __future__ import annotations

import html
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as `python analysis/report.py`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from jinja2 import Environment, FileSystemLoader, StrictUndefined  # noqa: E402
from markupsafe import Markup  # noqa: E402

from analysis import gathered  # noqa: E402
from analysis.accuracy_sections import accuracies  # noqa: E402
from analysis.blocks import TEMPLATES, Section  # noqa: E402
from analysis.command import command, parser_of  # noqa: E402
from analysis.drawing import inline, save  # noqa: E402
from analysis.experiment_sections import experiments  # noqa: E402
from analysis.figures import PLATES  # noqa: E402
from analysis.provenance_sections import anchors, checks, provenance  # noqa: E402
from analysis.runlog import read_json  # noqa: E402
from analysis.verdict_sections import gates, shortcuts, verdict  # noqa: E402
from files import write_whole  # noqa: E402

ORDER = (shortcuts, verdict, gates, accuracies, experiments, checks, anchors, provenance)


def as_markdown(text: object) -> str:
    """Text as Markdown shows it unchanged, also in a table's cell."""
    escaped = html.escape(str(text), quote=False)
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", escaped).replace("\n", " ")


def environment() -> Environment:
    """Templates: HTML escapes every value, Markdown those that pass its filter `md`."""
    loader, common = FileSystemLoader(TEMPLATES), {"trim_blocks": False, "undefined": StrictUndefined}
    env = Environment(loader=loader, autoescape=lambda name: name is not None and name.endswith(".html.j2"), **common)
    env.filters["md"] = as_markdown
    return env


def file_name(epoch: str) -> str:
    """Of the report of one kind of checkpoint, without its suffix."""
    return "report" if epoch == "final" else f"report-{epoch}"


def subtitle(summary: dict) -> str:
    """Models, seeds and checkpoints in a sentence."""
    labels = gathered.planned(summary)
    keys = list(dict.fromkeys(label.split("-")[0] for label in labels))
    quick = " A quick study: its budget is small, and so is what it can say." if summary["study"].get("quick") else ""
    return f"{len(labels)} runs of {len(keys)} models ({', '.join(keys)}), {summary['epoch']} checkpoints.{quick}"


def render(summary: dict, pictures: dict[str, str], others: Sequence[str] = ()) -> tuple[str, str]:
    """(HTML, Markdown) of a summary and its figures {name: SVG document}; `others`: further kinds of checkpoints with reports."""
    parts: list[Section] = [section(summary) for section in ORDER]
    common = {"name": summary["name"], "epoch": summary["epoch"], "subtitle": subtitle(summary), "sections": parts}
    env = environment()
    page = env.get_template("report.html.j2").render(
        **common,
        title=f"{summary['name']}: report",
        folder=summary["folder"],
        style=Markup((TEMPLATES / "report.css").read_text()),
        pictures={name: Markup(inline(svg, f"f{name.split('_')[0]}")) for name, svg in pictures.items()},
        others=[(epoch, f"{file_name(epoch)}.html") for epoch in others],
    )
    figures = file_name(summary["epoch"]).replace("report", "figures")
    text = env.get_template("report.md.j2").render(
        **common, figures=figures, others=[(epoch, f"{file_name(epoch)}.md") for epoch in others]
    )
    return page, re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def write(folder: Path, epoch: str, others: Sequence[str] = ()) -> list[Path]:
    """Write summary, figures and report of one kind of checkpoint; the paths of summary, page and Markdown.

    Raises ValueError where there are no results, or a file is not what it should be.
    """
    text = gathered.as_json(gathered.gather(folder, epoch))
    summary = json.loads(text)  # what is drawn is what the file holds
    name, figures = file_name(epoch), folder / file_name(epoch).replace("report", "figures")
    paths = [folder / epoch / "results_summary.json", folder / f"{name}.html", folder / f"{name}.md"]
    write_whole(paths[0], text)
    pictures = {plate.name: save(plate.draw(summary), figures / plate.name) for plate in PLATES}
    for path, content in zip(paths[1:], render(summary, pictures, others)):
        write_whole(path, content)
    return paths


def measured(folder: Path) -> list[str]:
    """Kinds of checkpoints that the study has results of, those of study.json first; [final] if none."""
    plan = read_json(folder / "study.json") if (folder / "study.json").is_file() else {}
    wanted = [*plan.get("checkpoints", []), "final", "best"]
    return [epoch for epoch in dict.fromkeys(wanted) if (folder / epoch).is_dir()] or ["final"]


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__, "python -m analysis.report")
    parser.add_argument("study", type=Path, help="a study's result folder")
    parser.add_argument("--epoch", help="which checkpoints: final, best or a number (default: all that were measured)")
    args = parser.parse_args(argv)
    found = measured(args.study)
    for epoch in [args.epoch] if args.epoch else found:
        paths = write(args.study, epoch, [other for other in found if other != epoch])
        print(f"Written: {', '.join(map(str, paths))} ({paths[1].stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
