"""ProntoQA: the file of the published generator as JSON rows, or problems of the same form without any download.

    python data/prontoqa.py --raw 5hop_0shot_random.json --out data       # 9,000 / 200 / 800 rows, in the file's order
    python data/prontoqa.py --generate --out data                          # as many, made here
    python data/prontoqa.py --generate --sizes 900 100 100 --hops 3 --out data/small --raw-out data/small/raw.json
    python data/prontoqa.py --check data/prontoqa_test.json                # or a file of the generator

Both write prontoqa_{train,valid,test}.json. The first takes what github.com/asaparov/prontoqa writes at f0145b8 with

    python run_experiment.py --model-name json --model-size dummy --ordering random --num-trials 10000 \\
        --few-shot-examples 0 --ontology fictional --min-hops 5 --max-hops 5 --hops-skip 1

and writes the bytes of preprocessing/prontoqa.py of facebookresearch/coconut: the question and its query, sentences of the
chain of thought in pairs (11 make 6 steps, the last a single one), the answer. What --generate makes are other problems than
the published ones, and harder to guess (prontoqa_ontology.py says how); sidecars prontoqa_*.stats.json tell the two apart.
"""

import argparse
import hashlib
import json
import random
import sys
from pathlib import Path

from tqdm import tqdm

if __package__:
    from . import prontoqa_checks as pc
    from . import prosqa_rows as pr
    from .gsm import write_whole
    from .prontoqa_ontology import Example, draw_example
else:  # run as `python data/prontoqa.py`
    import prontoqa_checks as pc
    import prosqa_rows as pr
    from gsm import write_whole
    from prontoqa_ontology import Example, draw_example

Row = dict
SPLITS = ("train", "valid", "test")
SIZES = (9000, 200, 800)
FIELDS = {"question": str, "query": str, "chain_of_thought": list, "answer": str}
CELLS = [(holds, answer) for holds in (True, False) for answer in ("True", "False")]  # the property, the answer

# ---------------------------------------------------------------- the generator's file to rows


def convert(raw: dict, hops: int = 5) -> list[Row]:
    """One row {"question", "steps", "answer"} for each example, in order; `hops`: a chain has 2 hops + 1 sentences.

    ValueError that names the first bad example by its key.
    """
    rows = []
    for key, example in raw.items():
        test = example.get("test_example") if isinstance(example, dict) else None
        if not isinstance(test, dict):
            raise ValueError(f"{key}: no object `test_example`")
        for field, kind in FIELDS.items():
            if not isinstance(test.get(field), kind):
                raise ValueError(f"{key}: `{field}` is missing or no {kind.__name__}")
        chain = test["chain_of_thought"]
        if len(chain) != 2 * hops + 1 or not all(isinstance(sentence, str) for sentence in chain):
            raise ValueError(f"{key}: `chain_of_thought` must be {2 * hops + 1} sentences, has {len(chain)} (--hops is {hops})")
        if test["answer"] not in ("True", "False"):
            raise ValueError(f"{key}: `answer` must be 'True' or 'False', is {test['answer']!r:.40}")
        steps = [" ".join(chain[i : i + 2]) for i in range(0, len(chain), 2)]
        rows.append({"question": f"{test['question']} {test['query']}", "steps": steps, "answer": test["answer"]})
    return rows


def read_raw(path: Path) -> dict:
    """The examples of a generator's file; ValueError where it is none."""
    try:
        raw = json.loads(path.read_bytes())
    except ValueError as error:  # no JSON, or not UTF-8
        raise ValueError(f"{path}: no JSON ({error})") from None
    if not isinstance(raw, dict) or not raw:
        raise ValueError(f"{path}: expected an object of examples, example1 and so on")
    return raw


def named(path: Path, raw: dict, hops: int) -> list[Row]:
    """`convert`, with the file's name in its errors."""
    try:
        return convert(raw, hops)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def split_rows(rows: list[Row], sizes: tuple[int, int, int]) -> dict[str, list[Row]]:
    """The rows of each split, in order."""
    ends = [sum(sizes[:i]) for i in range(4)]
    return {split: rows[start:end] for split, start, end in zip(SPLITS, ends, ends[1:])}


def convert_file(args: argparse.Namespace) -> None:
    """`--raw`: three files, or none where anything is wrong."""
    rows = named(args.raw, read_raw(args.raw), args.hops)
    wanted = sum(args.sizes)
    if not args.allow_any_size and (len(rows) != 10_000 or wanted != 10_000):
        what = f"{len(rows)} examples" if len(rows) != 10_000 else f"--sizes of {wanted} rows"
        raise ValueError(f"{args.raw}: {what}, must be 10,000 (--num-trials 10000); else give --allow-any-size and --sizes")
    if len(rows) != wanted:
        raise ValueError(f"{args.raw}: {len(rows)} examples, but --sizes {' '.join(map(str, args.sizes))} make {wanted}")
    paths = targets(args)
    splits = split_rows(rows, args.sizes)
    write_whole({paths[split]: json.dumps(splits[split]) for split in SPLITS})
    for split, path in paths.items():
        path.with_suffix(".stats.json").unlink(missing_ok=True)  # of generated rows that were here before
        print(f"{path}: {len(splits[split])} rows")


def targets(args: argparse.Namespace) -> dict[str, Path]:
    """The file of each split. ValueError where a size is not positive, or a file is there and --force is not given."""
    if min(args.sizes) < 1:
        raise ValueError(f"--sizes {' '.join(map(str, args.sizes))}: every split needs at least one row")
    paths = {split: args.out / f"prontoqa_{split}.json" for split in SPLITS}
    present = [path for path in (*paths.values(), args.raw_out) if path and path.exists()]
    if present and not args.force:
        raise ValueError(f"{present[0]} exists; choose another --out or add --force")
    return paths


# ---------------------------------------------------------------- generated rows


def cell(seed: int, split: str, i: int) -> tuple[bool, str]:
    """Whether the asked property of row i holds, and its answer: every four rows have all four cases, in a drawn order."""
    return random.Random(f"{seed} {split} cells {i // 4}").sample(CELLS, 4)[i % 4]


def generate(size: int, hops: int, seed: int, split: str, seen: set) -> list[tuple[Example, pc.Problem]]:
    """`size` examples, each checked. Row i depends on (seed, split, i) only; a problem of `seen` is drawn again; it grows."""
    made = []
    for i in tqdm(range(size), desc=split, unit="row", disable=not sys.stderr.isatty()):
        for attempt in range(pr.MAX_DRAWS):
            example = draw_example(random.Random(f"{seed} {split} {i} {attempt}"), hops, *cell(seed, split, i))
            (row,) = convert({"example": {"test_example": example}}, hops)
            problem = pc.check_row(row, hops=hops, rival=True)
            if problem.key not in seen:
                seen.add(problem.key)
                made.append((example, problem))
                break
        else:
            raise ValueError(f"{split} row {i}: no new problem in {pr.MAX_DRAWS} draws; ask for fewer rows or more --hops")
    return made


def generate_files(args: argparse.Namespace) -> None:
    """`--generate`: draw, check, write the three files with sidecars (and the raw file), and print what is in them.

    Test and validation rows are drawn first, so that they stay the same whatever the size of the training split.
    """
    paths, seen = targets(args), set()
    made = {split: generate(size, args.hops, args.seed, split, seen) for split, size in reversed(list(zip(SPLITS, args.sizes)))}
    for split, examples in made.items():
        if found := pc.shortcuts([problem for _, problem in examples]):
            raise ValueError(f"{split} rows can be guessed ({'; '.join(found)}); take another --seed")
    examples = [example for split in SPLITS for example, _ in made[split]]
    raw = {f"example{i}": {"test_example": example} for i, example in enumerate(examples, start=1)}
    rows = split_rows(convert(raw, args.hops), args.sizes)

    texts = {args.raw_out: json.dumps(raw, indent=1)} if args.raw_out else {}
    parameters = {"generator": "prontoqa", "hops": args.hops, "seed": args.seed}
    for split in SPLITS:
        texts[paths[split]] = json.dumps(rows[split])
        sidecar = {
            "file": paths[split].name,
            "rows": len(rows[split]),
            "sha256": hashlib.sha256(texts[paths[split]].encode()).hexdigest(),
            "parameters": parameters | {"split": split},
            "statistics": pc.statistics([problem for _, problem in made[split]]),
            "baselines": pc.baselines([problem for _, problem in made[split]]),
        }
        texts[paths[split].with_suffix(".stats.json")] = json.dumps(sidecar, indent=1) + "\n"
    write_whole(texts)
    for split in SPLITS:
        print(f"{paths[split]}: {len(rows[split])} rows")
    show([problem for _, problem in made["train"]])


# ---------------------------------------------------------------- check


def show(problems: list[pc.Problem]) -> None:
    """Print statistics and how far shallow rules get."""
    print(pr.table(pc.statistics(problems)))
    print("\npercent right, saying nothing counting half\n" + pr.table(pc.baselines(problems), decimals=1))


def check_file(path: Path, hops: int) -> None:
    """Verify every row (ValueError names the first bad one), then print statistics and shallow rules.

    A file of converted rows, or of the generator.
    """
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error})") from None
    if isinstance(value, dict):
        names, rows = list(value), named(path, value, hops)
    else:
        rows = pr.read_rows(path)
        names = [f"row {i}" for i in range(len(rows))]
    problems = []
    for name, row in zip(names, rows):
        try:
            problems.append(pc.check_row(row, hops=hops))
        except KeyError as error:
            raise ValueError(f"{path}: {name}: no key {error}; a row has question, steps, answer") from None
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from None
    if repeat := pc.first_repeat([problem.key for problem in problems]):
        raise ValueError(f"{path}: {names[repeat[1]]} is the problem of {names[repeat[0]]} again")
    print(f"{path}: {len(rows)} sound rows, none twice")
    show(problems)
    for shortcut in pc.shortcuts(problems):
        print(f"note: a shallow rule tells the answer: {shortcut}")


def main(argv: list[str] | None = None) -> None:
    parser = pr.Parser(__doc__)
    do = parser.add_mutually_exclusive_group(required=True)
    do.add_argument("--raw", type=Path, metavar="FILE", help="convert this file of the published generator")
    do.add_argument("--generate", action="store_true", help="make problems here")
    do.add_argument("--check", type=Path, metavar="FILE", help="verify this file and write nothing")
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder to write to (default: data)")
    parser.add_argument(
        "--sizes", type=int, nargs=3, default=SIZES, metavar=("TRAIN", "VALID", "TEST"), help="rows (default: 9000 200 800)"
    )
    parser.add_argument("--allow-any-size", action="store_true", help="with --raw: not 10,000 examples but what --sizes says")
    parser.add_argument("--hops", type=int, default=5, help="rules of a proof (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="of --generate: same seed, same bytes (default: 0)")
    parser.add_argument("--raw-out", type=Path, metavar="FILE", help="of --generate: the same as the generator's file would be")
    parser.add_argument("--force", action="store_true", help="overwrite files, be they the published ones")
    args = parser.parse_args(argv)
    args.sizes = tuple(args.sizes)
    if args.check:
        check_file(args.check, args.hops)
    elif args.raw:
        convert_file(args)
    else:
        generate_files(args)


if __name__ == "__main__":
    pr.run_cli(main)
