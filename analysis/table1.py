"""Table 1 of the Coconut paper (arXiv 2412.06769): ours beside theirs, with the tokens next to every accuracy.

    python -m analysis.table1 runs                                   # every evaluation on a test set in or below runs
    python -m analysis.table1 runs/gsm runs/prosqa --out results     # and table1.json, table1.md, table1.svg, table1.png

An evaluation is what `python run.py args/ROW_eval.yaml` leaves; runs of a row with other seeds are taken together. Checkpoints
that still write steps before the answer are lines of their own, `hybrid`. Rows that were not run show the paper's figures only.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

if __package__ in (None, ""):  # run as `python analysis/table1.py`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from analysis.command import command, parser_of  # noqa: E402
from analysis.drawing import INK, bars, panel, rows_text, save, sheet, spread, styled  # noqa: E402
from analysis.evaluations import COUNTED, ROWS, TASKS, Evaluation, find_evaluations, read_evaluation  # noqa: E402
from analysis.stats import seed_interval, wilson  # noqa: E402
from analysis.tables import table  # noqa: E402
from files import write_json, write_whole  # noqa: E402


class Published(NamedTuple):
    """Accuracy in percent with its standard deviation (None: not given), and new tokens a question."""

    accuracy: float
    std: float | None
    tokens: float


PAPER = {
    "gsm": {
        "cot": Published(42.9, 0.2, 25.0),
        "no_cot": Published(16.5, 0.5, 2.2),
        "icot": Published(30.0, None, 2.2),  # which the paper itself quotes
        "pause_token": Published(16.4, 1.8, 2.2),
        "coconut": Published(34.1, 1.5, 8.2),
        "wo_curriculum": Published(14.4, 0.8, 8.2),
        "wo_thought": Published(21.6, 0.5, 2.3),
        "pause_as_thought": Published(24.1, 0.7, 2.2),
    },
    "prontoqa": {
        "cot": Published(98.8, 0.8, 92.5),
        "no_cot": Published(93.8, 0.7, 3.0),
        "icot": Published(99.8, 0.3, 3.0),
        "pause_token": Published(77.7, 21.0, 3.0),
        "coconut": Published(99.8, 0.2, 9.0),
        "wo_curriculum": Published(52.4, 0.4, 9.0),
        "wo_thought": Published(99.9, 0.1, 3.0),
        "pause_as_thought": Published(100.0, 0.1, 3.0),
    },
    "prosqa": {
        "cot": Published(77.5, 1.9, 49.4),
        "no_cot": Published(76.7, 1.0, 8.2),
        "icot": Published(98.2, 0.3, 8.2),
        "pause_token": Published(75.9, 0.7, 8.2),
        "coconut": Published(97.0, 0.3, 14.2),
        "wo_curriculum": Published(76.1, 0.2, 14.2),
        "wo_thought": Published(95.5, 1.1, 8.2),
        "pause_as_thought": Published(96.6, 0.8, 8.2),
    },
    "arith_gsm": {},
}
HEAD = (
    "row",
    "ours, %",
    "95 % interval",
    "n",
    "seeds",
    "paper, %",
    "tokens",
    "with EOS",
    "latents",
    "paper's tokens",
    "remarks",
)
LOOKS = {"cot": "m1", "no_cot": "m2", "coconut": "m3", "wo_thought": "m0", "pause_as_thought": "m5"}
NOTES = """\
- ours: exact match; one run: Wilson's interval over questions; several: mean and Student's t interval over their seeds. A claim
  takes three seeds.
- tokens: new tokens a question without EOS, latents included, pause tokens and markers not; `with EOS` counts EOS too, where it
  came. The paper does not say which of the two it counts; gold answers have 2.11 (GSM8K), 2 (ProntoQA), 8.17 (ProsQA) tokens.
- hybrid: a checkpoint that still writes steps before the answer, or is not of the last stage. It is no Coconut without a chain.
- paper: Coconut, arXiv 2412.06769, Table 1; its iCoT on GSM8K is quoted there from arXiv 2405.14838.
"""

# ---------------------------------------------------------------- lines


def lines_of(task: str, evaluations: Sequence[Evaluation]) -> list[dict]:
    """The lines of one task, in the order of the table: runs of a row, its variants and hybrids, and rows that were not run.

    ValueError where two evaluations are of the same row and seed.
    """
    lines = []
    for row in ROWS:
        own = [evaluation for evaluation in evaluations if evaluation.row == row]
        keys = sorted({(bool(e.hybrid), e.variant) for e in own}, key=lambda key: (key[0], len(key[1]), key))
        lines += [line(task, row, [e for e in own if (bool(e.hybrid), e.variant) == key]) for key in keys]
        if (False, ()) not in keys and row in PAPER[task]:
            position = len(lines) - len(keys)
            lines.insert(position, not_run(task, row))
    return lines


def not_run(task: str, row: str) -> dict:
    """A row of the paper without one of ours."""
    remark = "quoted, not run" if row == "icot" else "not run"
    return {"row": row, "name": ROWS[row], "runs": [], "paper": PAPER[task][row]._asdict(), "remarks": [remark]}


def line(task: str, row: str, runs: Sequence[Evaluation]) -> dict:
    """One line from the runs of a row that differ in their seeds alone."""
    runs = sorted(runs, key=lambda run: run.trained.seed)
    twice = [seed for seed, times in Counter(run.trained.seed for run in runs).items() if times > 1]
    if twice:
        files = " and ".join(str(run.file) for run in runs if run.trained.seed == twice[0])
        raise ValueError(f"{files} are both {runs[0].name} on {TASKS[task]} with seed {twice[0]}; name the folders to be used")
    levels = [wilson(run.correct, run.n) for run in runs]
    over_seeds = seed_interval([100 * level["accuracy"] for level in levels])
    one = [100 * bound for bound in levels[0]["ci95"]]
    hybrid = next((run.hybrid for run in runs if run.hybrid), None)
    paper = None if hybrid else PAPER[task].get(row)
    near = paper is not None and paper.std is not None and abs(over_seeds["mean"] - paper.accuracy) <= 2 * paper.std
    return {
        "row": row,
        "name": runs[0].name,
        "variant": runs[0].variant,
        "accuracy": over_seeds["mean"],
        "ci95": over_seeds["ci95"] if len(runs) > 1 else one,
        "interval": "Student's t over seeds" if len(runs) > 1 else "Wilson over questions",
        "sd": over_seeds["sd"],
        "n": sorted({run.n for run in runs}),
        "gen_tokens": sum(run.gen_tokens for run in runs) / len(runs),
        "gen_tokens_eos": sum(run.gen_tokens_eos for run in runs) / len(runs),
        "latents": sum(run.latents for run in runs) / len(runs),
        "latents_counted": row in COUNTED,
        "hybrid": hybrid,
        "remarks": list(dict.fromkeys(remark for run in runs for remark in run.remarks)),
        "paper": paper and paper._asdict(),
        "within_two_std": near,
        "runs": [described(run, level) for run, level in zip(runs, levels)],
    }


def described(run: Evaluation, level: dict) -> dict:
    """One run as it stands in table1.json."""
    return {
        "records": str(run.file), "checkpoint": run.checkpoint, "seed": run.trained.seed, **level,
        "gen_tokens": run.gen_tokens, "gen_tokens_eos": run.gen_tokens_eos, "latents": run.latents,
        "share_with_steps": run.steps_share, "hybrid": run.hybrid,
    }  # fmt: skip


# ---------------------------------------------------------------- text


def cells(line: dict) -> tuple[str, ...]:
    """A line as text under `HEAD`."""
    paper, remarks = line["paper"], "; ".join(line["remarks"])
    published, tokens = "–", "–"
    if paper:
        published = f"{paper['accuracy']:.1f}" + (f" ± {paper['std']:.1f}" if paper["std"] is not None else ", quoted")
        tokens = f"{paper['tokens']:.1f}"
    if not line["runs"]:
        return (line["name"], *"––––", published, *"–––", tokens, remarks)
    latents = f"{line['latents']:.3g} {'included' if line['latents_counted'] else 'not included'}" if line["latents"] else "–"
    return (
        line["name"],
        f"{line['accuracy']:.1f}",
        "{:.1f} .. {:.1f}".format(*line["ci95"]),
        ", ".join(f"{n:,}" for n in line["n"]),
        ", ".join(str(run["seed"]) for run in line["runs"]),
        published,
        f"{line['gen_tokens']:.1f}",
        f"{line['gen_tokens_eos']:.1f}",
        latents,
        tokens,
        remarks,
    )


def text_of(tasks: dict[str, list[dict]]) -> str:
    """All tasks as Markdown tables that read well in a terminal."""
    parts = [f"## {TASKS[task]}\n\n{table(HEAD, [cells(line) for line in lines])}" for task, lines in tasks.items()]
    return "\n".join([*parts, NOTES])


def tasks_of(evaluations: Sequence[Evaluation]) -> dict[str, list[dict]]:
    """{task: its lines} of every task that was evaluated."""
    present = [task for task in TASKS if any(evaluation.task == task for evaluation in evaluations)]
    return {task: lines_of(task, [e for e in evaluations if e.task == task]) for task in present}


# ---------------------------------------------------------------- picture


@styled
def picture(tasks: dict[str, list[dict]], path: Path) -> None:
    """Bars: ours with their intervals, without hybrids and variants. Diamonds: the paper's, with standard deviations."""
    figure, axes = sheet(1, len(tasks), height=3.6, width=max(5.0, 4.2 * len(tasks)))
    for axis, (task, lines) in zip(axes[0], tasks.items()):
        plain = {line["row"]: line for line in lines if line["runs"] and not (line["hybrid"] or line["variant"])}
        counts = [run["n"] for line in plain.values() for run in line["runs"]]
        panel(axis, TASKS[task], f"bars: ours, {rows_text(counts)}; diamonds: the paper", y="exact match (%)", percent=True)
        for x, row in enumerate(ROWS):
            if row in plain:
                bars(axis, x, LOOKS.get(row, "custom"), spread(plain[row]["runs"]), 0.7)
            if row in PAPER[task]:
                accuracy, std, _ = PAPER[task][row]
                axis.errorbar(x, accuracy, std, fmt="D", ms=4, color=INK, mfc="white", mew=0.9, elinewidth=0.9, zorder=6)
        axis.set_xticks(range(len(ROWS)), ROWS.values(), rotation=40, ha="right")
        axis.set_xlim(-0.6, len(ROWS) - 0.4)
    save(figure, path)


# ---------------------------------------------------------------- command line


def write(tasks: dict[str, list[dict]], out: Path) -> None:
    """table1.json, table1.md, table1.svg and table1.png in a folder."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "table1.json", {"schema_version": 1, "tasks": tasks})
    write_whole(out / "table1.md", "# Table 1 (arXiv 2412.06769)\n\n" + text_of(tasks))
    picture(tasks, out / "table1")
    print(f"Written: {out}/table1.json, table1.md, table1.svg, table1.png")


@command
def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="run folders, or folders of them at any depth")
    parser.add_argument(
        "--out", type=Path, help="where table1.json, table1.md, table1.svg and table1.png go (default: nowhere)"
    )
    args = parser.parse_args(argv)
    found = [read_evaluation(file) for file in find_evaluations(args.folders)]
    for other in (evaluation for evaluation in found if evaluation.row is None):
        print(f"Note: {other.file} ({other.trained.feedback_mode}) is no row of Table 1", file=sys.stderr)
    tasks = tasks_of([evaluation for evaluation in found if evaluation.row])
    if not tasks:
        places = ", ".join(map(str, args.folders))
        raise ValueError(f"no evaluation on a test set below {places}; make one: python run.py args/prosqa_m1_cot_eval.yaml")
    print(text_of(tasks))
    if args.out:
        write(tasks, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
