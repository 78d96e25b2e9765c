"""How good a run was, and what a training step cost, at every stage of its curriculum; several runs side by side.

    python -m analysis.stage_table runs/lahr/lahr-cot runs/lahr/lahr-abc --data data/cot_val.json --output stages.json

For each stage the last checkpoint of that stage is scored on held-out problems (scoring.py), then trained on for some updates
with the clock running (step_rates.py). Loss and perplexity on a stage's own tokens are not comparable between stages: each has
other tokens, and the later ones begin nearer to the answer. The answers' tokens are common to all stages and runs. Writes JSON
and the table as Markdown beside it (.md). Exit code: 0 done, 1 where the answers' tokens differ, 2 a mistake.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as `python analysis/stage_table.py`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402

from analysis.command import command, parser_of  # noqa: E402
from analysis.scoring import Scores, same_tokens, score, summary  # noqa: E402
from analysis.step_rates import LEAST_REPEATS, REPEATS, STEPS, step_rates  # noqa: E402
from analysis.subject import Problems, Subject  # noqa: E402
from analysis.tables import number, percent, table  # noqa: E402
from checkpoint import numbered_checkpoints, versions  # noqa: E402
from files import read_json, read_jsonl, write_json, write_whole  # noqa: E402
from tokens import TokenTable, get_dataset  # noqa: E402
from utils import check_config  # noqa: E402

NOTES = {
    "own": "own_* are of the stage's own supervised tokens, other ones at each stage: not comparable between stages",
    "answer": "answer_* and exact_match are of the answers' tokens, the same in all rows of this table",
    "rates": "of training updates on the run's own rows at the stage (forward, backward, clipping, optimizer), in one process, "
    "not compiled, batches made beforehand, device synchronised, warm-up excluded: the median of the repeats",
    "processed": "positions that hold a token, thoughts included, each time the stack computes them",
    "backbone_calls_per_step": "of all micro-batches of an update",
    "routed_fraction": "tokens that routed layers took, of those they could have taken; null without routing",
    "peak_memory_bytes": "of the GPU while timed; without one the most that the process held up to then, earlier rows included",
    "flops_per_step": "forward and backward over real tokens, a multiply-add as two, routed layers by the tokens they took, "
    "memories by what they compare and read; computing anew (activation checkpointing, parallel thoughts) does not count",
    "steps": "updates in metrics.jsonl, at this stage and up to this checkpoint",
}


def _whole(value) -> str:
    return "–" if value is None else f"{value:,}"


COLUMNS = {  # key in the JSON: (heading, form)
    "run": ("run", str),
    "stage": ("stage", str),
    "thoughts_mean": ("thoughts", lambda value: f"{value:.2f}"),
    "thoughts_max": ("max", str),
    "steps_at_stage": ("steps", _whole),
    "steps_total": ("steps in all", _whole),
    "own_loss": ("own loss*", number),
    "own_perplexity": ("own perplexity*", number),
    "answer_loss": ("answer loss", number),
    "answer_perplexity": ("answer perplexity", number),
    "exact_match": ("exact match", percent),
    "supervised_tokens_per_s": ("supervised tokens/s", number),
    "processed_tokens_per_s": ("processed tokens/s", number),
    "samples_per_s": ("samples/s", number),
    "step_ms": ("step ms", number),
    "backbone_calls_per_step": ("backbone calls", number),
    "routed_fraction": ("routed", percent),
    "peak_memory_bytes": ("peak GB", lambda value: f"{value / 1e9:.2f}"),
    "flops_per_step": ("GFLOP/step", lambda value: number(value / 1e9)),
}
LAST_OF_QUALITY = "exact_match"  # columns after it are about cost
FOOTNOTE = "* on the stage's own tokens: not comparable between stages\n"

# ---------------------------------------------------------------- one run


def last_of_stages(folder: Path) -> dict[int, int]:
    """{stage: N of its last checkpoint_N} of a run folder, by its run.json. ValueError where there is none."""
    side = folder / "run.json"
    if not side.is_file():
        raise ValueError(f"{folder} is no run folder: it has no run.json; name the folder that holds checkpoint_N")
    config = check_config(read_json(side, "config")["config"], str(side))
    found = {config.stage(number - 1): number for number in numbered_checkpoints(folder)}
    if not found:
        raise ValueError(f"{folder} holds no checkpoint_N; train it first (a run with keep: best holds only one)")
    return found


def steps_trained(folder: Path, stage: int, number: int) -> tuple[int, int]:
    """Updates at a stage, and in all, that went into checkpoint_N; one that was done twice counts once."""
    steps = [event for event in read_jsonl(folder / "metrics.jsonl", "event") if event["event"] == "step"]
    done = {(event["epoch"], event["train/step"]): event["stage"] for event in steps if event["epoch"] < number}
    return sum(at == stage for at in done.values()), len(done)


def stage_row(folder: Path, stage: int, number: int, args: argparse.Namespace) -> tuple[dict, Scores]:
    """Everything about one stage of one run."""
    subject = Subject.load(folder, str(number), args.batch_size, args.device)
    problems = Problems.read(args.data, subject.tokenizer, args.num_samples)
    scores = score(subject, problems, stage, exact_match=not args.no_exact_match)
    found, latents = summary(scores), scores.column("n_latents")
    at_stage, total = steps_trained(folder, stage, number)
    path = args.train_data or subject.config.train_path
    if path is None:
        raise ValueError(f"{folder}: its config has no train_path; name its training data with --train_data")
    rows = TokenTable(get_dataset(path, subject.tokenizer, subject.config.max_train_samples))
    per_update = read_json(folder / "run.json").get("micro_batches_per_update") or subject.config.gradient_accumulation_steps
    sizes = {"repeats": args.repeats, "steps": args.steps, "per_update": per_update}
    row = {
        "run": folder.name,
        "stage": stage,
        "checkpoint": str(subject.path),
        "thoughts_mean": float(latents.mean()),
        "thoughts_max": int(latents.max()),
        "steps_at_stage": at_stage,
        "steps_total": total,
        "own_loss": found["loss"],
        "own_perplexity": found["perplexity"],
        "own_n_tokens": found["n_tokens"],
        "own_sha256": scores.sha256,
        "own_comparable_between_stages": False,
        **{key: found[key] for key in ("answer_loss", "answer_perplexity", "exact_match", "answer_n_tokens", "n_samples")},
        "answer_sha256": scores.answer_sha256,
    }
    return row | step_rates(subject, rows, stage, number - 1, **sizes), scores


# ---------------------------------------------------------------- the command


def shown(rows: Sequence[dict]) -> str:
    """The two halves of the table, how good and how fast."""
    keys = list(COLUMNS)
    cut = keys.index(LAST_OF_QUALITY) + 1
    halves = []
    for some in (keys[:cut], [*keys[:2], *keys[cut:]]):
        cells = [[COLUMNS[key][1](row[key]) for key in some] for row in rows]
        halves.append(table([COLUMNS[key][0] for key in some], cells))
    return f"{halves[0]}\n{FOOTNOTE}\n{halves[1]}"


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__, "python -m analysis.stage_table")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, in the order of the table")
    parser.add_argument("--data", type=Path, required=True, help="held-out problems (JSON)")
    parser.add_argument("--output", type=Path, required=True, help="JSON; the Markdown has the same name")
    parser.add_argument("--train_data", type=Path, help="the runs' training data, where it was moved (default: as they say)")
    parser.add_argument("--num_samples", type=int, help="first rows of the data (default: all)")
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"timed repeats, {LEAST_REPEATS} or more ({REPEATS})")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"updates of a repeat ({STEPS})")
    parser.add_argument("--batch_size", type=int, help="of scoring; training keeps the run's own")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no_exact_match", action="store_true", help="losses only: answers are not decoded")
    args = parser.parse_args(argv)
    if args.output.suffix != ".json":
        raise ValueError(f"--output {args.output}: must end in .json; the Markdown is named after it")
    for name, least in (("repeats", LEAST_REPEATS), ("steps", 1), ("num_samples", 1), ("batch_size", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least {least}")
    wanted = [(folder, stage, n) for folder in args.runs for stage, n in sorted(last_of_stages(folder).items())]
    rows, first = [], None
    for folder, stage, n in wanted:
        print(f"{folder.name}, stage {stage}: checkpoint_{n}", flush=True)
        row, scores = stage_row(folder, stage, n, args)
        first = first or scores
        same_tokens(first, scores, "answer")
        rows.append(row)
    device = "cuda" if torch.cuda.is_available() and args.device == "auto" else args.device.replace("auto", "cpu")
    settings = {"repeats": args.repeats, "steps": args.steps, "device": _device_name(torch.device(device))}
    result = {"schema_version": 1, "data": str(args.data), "settings": settings, "notes": NOTES, "rows": rows}
    text = shown(rows)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.output, result | {"versions": versions()})
    write_whole(args.output.with_suffix(".md"), text)
    print(f"\n{text}\nWritten: {args.output}, .md")
    return 0


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    sys.exit(main())
