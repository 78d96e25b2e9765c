"""Train LAHR with continuous thoughts on a file of worked problems: a thin front of `python run.py args/lahr_coconut.yaml`.

    python data/cot.py --n_samples 1000 --output data/cot.json --val_samples 200
    python scripts/train_coconut.py --data_path data/cot.json --size small --max_stages 5 --steps_per_stage 500 \\
        --output_dir runs/small

Stages 0 .. max_stages, each of steps_per_stage updates; stage k puts thoughts in place of the first k steps. Validates after each
stage, on <data>_val.json where it lies beside the data, else on a tenth of the problems, which are then not trained on.
Everything else is a key of run.py; the resolved YAML is printed and kept as OUTPUT_DIR.yaml.
"""

import argparse
import json
import random
import re
import sys
from pathlib import Path

from front import call, keep, resolved, write_whole

SIZES = ("tiny", "small", "medium", "base", "xl")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", type=Path, required=True, help="JSON of question, steps, answer (data/cot.py)")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--max_stages", type=int, default=5, help="stages 0 to this one, inclusive (default: 5)")
    parser.add_argument("--steps_per_stage", type=int, default=500, help="updates (default: 500)")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/train_coconut"), help="default: runs/train_coconut")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--weight_decay", type=float, default=0.1)
    parser.add_argument("--warmup_steps", type=int, default=100)
    parser.add_argument("--max_seq_len", type=int, default=256, help="positions of the model (default: 256)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--resume", action="store_true", help="go on where the run in --output_dir stopped")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of run.py (feedback_mode=frozen)")
    args = parser.parse_intermixed_args(argv)
    try:
        return train(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def train(args: argparse.Namespace) -> int:
    """Prepare the data and the YAML, and launch run.py."""
    out = args.output_dir.resolve()
    config = out.with_name(f"{out.name}.yaml")
    if config.is_file() and not args.resume:
        raise ValueError(f"--output_dir {args.output_dir} holds a run; give --resume to go on with it, or another folder")
    train_path, val_path = with_validation(args.data_path, out, args.seed)
    values = resolved("lahr_coconut", {
        "save_path": str(out.parent), "name": out.name, "train_path": str(train_path), "val_path": str(val_path),
        "model_config": {"size": args.size, "max_position_embeddings": args.max_seq_len},
        "max_latent_stage": args.max_stages, "num_epochs": args.max_stages + 1, "epochs_per_stage": 1,
        "steps_per_epoch": args.steps_per_stage, "batch_size_training": args.batch_size, "lr": args.learning_rate,
        "weight_decay": args.weight_decay, "warmup_steps": args.warmup_steps, "seed": args.seed,
    })  # fmt: skip
    keep(values, config, may_change=True)
    return call("run.py", config, *args.overrides)


def with_validation(path: Path, out: Path, seed: int) -> tuple[Path, Path]:
    """(training file, validation file); made below `out` where there is no <path>_val.json."""
    path = path.resolve()
    beside = path.with_name(f"{path.stem}_val.json")
    if not path.is_file():
        raise ValueError(f"--data_path {path} does not exist; make it with: python data/cot.py --output {path}")
    if beside.is_file():
        return path, beside
    rows = read_rows(path)
    keys = sorted({problem(row) for row in rows})
    random.Random(seed).shuffle(keys)
    held_out = set(keys[: max(1, len(keys) // 10)])
    parts = {"train": [], "val": []}
    for row in rows:
        parts["val" if problem(row) in held_out else "train"].append(row)
    if not parts["train"]:
        raise ValueError(f"--data_path {path}: {len(keys)} problems are too few to keep some for validation")
    folder = out.with_name(f"{out.name}_data")
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        write_whole(folder / f"{name}.json", json.dumps(part))
    print(f"No {beside.name} beside the data: {len(parts['val'])} of {len(rows)} problems are kept for validation")
    return folder / "train.json", folder / "val.json"


def read_rows(path: Path) -> list[dict]:
    """The rows of a file. ValueError that names file and row where it is no list of problems; run.py checks the rest."""
    try:
        rows = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"--data_path {path} is not JSON ({error}); make it with: python data/cot.py --output FILE") from None
    if not isinstance(rows, list):
        raise ValueError(f"--data_path {path} must hold a JSON list of rows with question, steps and answer")
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("question"), str):
            raise ValueError(f"--data_path {path}, row {i}: `question` must be a str; see python data/cot.py --help")
    return rows


def problem(row: dict) -> str:
    """The same for a problem and its mirrors: its category and its numbers, sorted."""
    return f"{row.get('category', '')} {sorted(map(int, re.findall(r'[0-9]+', row['question'])))} " + re.sub(
        r"[0-9]+", "", row["question"]
    )


if __name__ == "__main__":
    sys.exit(main())
