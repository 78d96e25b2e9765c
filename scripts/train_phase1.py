"""Train Cognate's first phase: a thin front of `python run.py args/cognate_{reasoning,memory,speed}.yaml`.

    python scripts/train_phase1.py --model reasoning --test --epochs 1       # does it run: CPU, a few rows, about a minute
    python scripts/train_phase1.py --all --datasets gsm8k svamp arc_easy     # the three specializations, 10 epochs each

Makes the data (data/phase1.py), trains, and asks the best checkpoint three questions; a model that has collapsed ends the command
with 1 (not under --test, which only shows the verdict). --checkpoint-dir/MODEL/ gets best_model.pt, epoch_N.pt, and the folder
best_model for `model_id:`. Every flag is a key of run.py; the resolved YAML is printed and kept beside that folder.
"""

import argparse
import shutil
import sys
from pathlib import Path

from front import call, keep, resolved

MODELS = ("reasoning", "memory", "speed")
DATASETS = ("gsm8k", "svamp", "mbpp", "arc_easy", "piqa", "wikitext", "arc_challenge", "hellaswag")
TEST_DATASETS = ("gsm8k", "piqa")
NEW_LEVELS_AFTER = (3, 6)  # epochs: foundation; with reasoning; with all


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", "--specialization", choices=MODELS, help="the one to train")
    parser.add_argument("--all", action="store_true", help="all three, one after the other")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, help="rows in a micro-batch; four make an update (default: 16; --test: 2)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=[], help="default: generated arithmetic, offline")
    parser.add_argument("--cache-dir", help="where the library `datasets` keeps what it has loaded")
    parser.add_argument("--checkpoint-dir", type=Path, default=Path("checkpoints/phase1"))
    parser.add_argument("--tokenizer", help="hub id or folder, e.g. openai-community/gpt2 (default: single characters)")
    parser.add_argument("--wandb-mode", choices=("online", "offline", "disabled"), default="offline")
    parser.add_argument("--no-validate", action="store_true", help="validate after the last epoch only")
    parser.add_argument("--no-curriculum", action="store_true", help="all levels of data from the first epoch on")
    parser.add_argument("--test", action="store_true", help="a few rows in batches of 2 on the CPU")
    parser.add_argument("--overwrite", action="store_true", help="remove what an earlier run left")
    parser.add_argument("--resume", action="store_true", help="go on, also with other settings")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of run.py (muon_lr=2e-3)")
    args = parser.parse_intermixed_args(argv)
    if not args.model and not args.all:
        print(f"error: give --model ({', '.join(MODELS)}) or --all", file=sys.stderr)
        return 1
    try:
        data = make_data(args)
        return max(train(name, data, args) for name in (MODELS if args.all else (args.model,)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def make_data(args: argparse.Namespace) -> Path:
    """Write train.json and valid.json, the same for the same flags; returns their folder."""
    folder = args.checkpoint_dir.resolve() / ("data_test" if args.test else "data")
    command = ["data/phase1.py", "--out", folder]
    datasets = args.datasets or (TEST_DATASETS if args.test else ())
    command += ["--datasets", *datasets] if datasets else []
    command += ["--cache_dir", args.cache_dir] if args.cache_dir else []
    command += (["--test"] if args.test else []) + (["--no-ascii"] if args.tokenizer else [])
    if call(*command):
        raise ValueError(f"data/phase1.py could not make {folder}")
    return folder


def train(name: str, data: Path, args: argparse.Namespace) -> int:
    """Train one specialization and judge it; the exit code."""
    out = args.checkpoint_dir.resolve()
    if args.overwrite:
        shutil.rmtree(out / name, ignore_errors=True)
    changes = {
        "save_path": str(out), "name": name, "train_path": str(data / "train.json"), "val_path": str(data / "valid.json"),
        "num_epochs": args.epochs, "batch_size_training": args.batch_size or (2 if args.test else 16),
        "device": "cpu" if args.test else args.device, "checkpoint_format": "phase1", "keep": "every 2",
        "wandb": True, "wandb_mode": args.wandb_mode, "eval_every": args.epochs if args.no_validate else 1,
        "level_epochs": None if args.no_curriculum or args.test else [*NEW_LEVELS_AFTER],
    }  # fmt: skip
    changes |= {"tokenizer": args.tokenizer} if args.tokenizer else {}
    changes |= {"max_new_tokens": 32} if args.test else {}
    values = resolved(f"cognate_{name}", changes)
    keep(values, out / f"{name}.yaml", may_change=args.resume or args.overwrite)
    code = call("run.py", out / f"{name}.yaml", *args.overrides)
    if code:
        return code
    verdict = call("-m", "analysis.health", "--checkpoint", out / name / "best_model.pt", "--only", "questions,variety,echo",
                   "--trained_after", "0")  # fmt: skip
    if args.test and verdict == 1:
        print("--test: this model has hardly been trained; the verdict above does not count")
        return 0
    return verdict


if __name__ == "__main__":
    sys.exit(main())
