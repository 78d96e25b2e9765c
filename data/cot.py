"""Word and number problems with their steps: basic (four categories) and multi-step (seven), generated without any download.

    python data/cot.py                                                    # 500 basic problems, data/cot_training_data.json
    python data/cot.py --n_samples 1000 --output data/cot.json --val_samples 200          # and data/cot_val.json
    python data/cot.py --kind multistep --n_samples 510 --output data/multistep.json --val_samples 90
    python data/cot.py --check data/cot.json data/cot_val.json            # computes everything again, prints what is in it

A row has question, steps, answer, category, idx, and difficulty (basic) or n_steps (multi-step); all of it is printable
ASCII. Categories get equal shares; where one runs out of problems the others make up for it. A fifth of the problems of
every category, the same for every seed, is kept for validation: a problem, or a mirror of it, is never in both files.
With --use_api the steps are asked of Claude (package `anthropic`, key in ANTHROPIC_API_KEY); what it cannot give is generated.
"""

import argparse
import hashlib
import json
import os
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path

if __package__:
    from . import cot_api, cot_basic, cot_multistep
    from . import prosqa_rows as pr
    from .cot_problems import Category, Row, check_row
else:  # run as `python data/cot.py`
    import cot_api
    import cot_basic
    import cot_multistep
    import prosqa_rows as pr
    from cot_problems import Category, Row, check_row

KINDS = {"basic": cot_basic.CATEGORIES, "multistep": cot_multistep.CATEGORIES}
DEFAULT_OUTPUT = {"basic": "data/cot_training_data.json", "multistep": "data/cot_multistep.json"}
EVERY_CATEGORY = cot_basic.CATEGORIES | cot_multistep.CATEGORIES | cot_api.CATEGORIES
SPLITS = ("train", "valid")
HELD_OUT = 0.2  # of the keys of every category, for validation
MAX_MISSES = 10_000  # draws in a row without a new problem, where problems cannot be listed

# ---------------------------------------------------------------- which problems


def place(key: str) -> float:
    """Where a key lies in [0, 1), evenly, the same everywhere."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64


@cache
def by_place(category: Category) -> list[tuple]:
    """The numbers of every problem of a category whose problems can be listed, in the order of their keys' places."""
    keyed = {category.problem_key(numbers): numbers for numbers in category.space()}
    return [keyed[key] for key in sorted(keyed, key=place)]


def problems(category: Category, split: str, seed: int) -> Iterator[tuple]:
    """The numbers of new problems of a split, in an order of their own, until there are no more."""
    rng = random.Random(f"{seed} {split} {category.name}")
    validation = split == "valid"
    if category.space is not None:
        pool = by_place(category)
        held_out = round(HELD_OUT * len(pool))
        pool = pool[:held_out] if validation else pool[held_out:]
        rng.shuffle(pool)
        for numbers in pool:
            yield category.order(rng, numbers)
        return
    seen: set[str] = set()
    misses = 0
    while misses < MAX_MISSES:
        numbers = category.draw(rng)
        key = category.problem_key(numbers)
        misses += 1
        if (place(key) < HELD_OUT) == validation and key not in seen:
            seen.add(key)
            misses = 0
            yield numbers


def generated(category: Category, split: str, seed: int) -> Iterator[Row]:
    """The rows of `problems`."""
    for numbers in problems(category, split, seed):
        question, steps, answer = category.text(numbers)
        yield {"question": question, "steps": steps, "answer": answer, "category": category.name}


def shares(n: int, names: Sequence[str]) -> dict[str, int]:
    """n in equal parts, the first ones larger by one where it does not come out even."""
    return {name: n // len(names) + (i < n % len(names)) for i, name in enumerate(names)}


def collect(streams: dict[str, Iterator[Row]], n: int, split: str) -> list[Row]:
    """`n` rows in equal shares; where a stream ends the others make up for it, which is printed. Fewer where all end."""
    wanted, left, rows = shares(n, list(streams)), list(streams), []
    while left and len(rows) < n:
        for name, share in shares(n - len(rows), left).items():
            found = list(islice(streams[name], share))
            rows += found
            if len(found) < share:
                left.remove(name)
    have = Counter(row["category"] for row in rows)
    short = [f"{name} ({have[name]} of {wanted[name]})" for name in wanted if have[name] < wanted[name]]
    more = [f"{have[name] - wanted[name]} {name}" for name in wanted if have[name] > wanted[name]]
    if short and more:
        print(f"note: {split}: no more problems of {', '.join(short)}; instead {', '.join(more)} more")
    return rows


def make_rows(kind: str, n: int, split: str, seed: int, ask: "cot_api.Ask | None" = None) -> list[Row]:
    """`n` rows of a split, shuffled; the same for the same arguments. `ask`: where the steps come from, instead.

    ValueError where there are not as many problems.
    """
    rows: list[Row] = []
    if ask is not None:
        streams = {
            name: cot_api.answered(problems(category, split, seed), category, ask)
            for name, category in cot_api.CATEGORIES.items()
        }
        rows = collect(streams, n, split)
        rows = [row | {"idx": 0, "difficulty": cot_api.difficulty(row)} for row in rows]
        if len(rows) < n:
            print(f"note: {split}: {len(rows)} rows from the API ({ask.trouble}); {n - len(rows)} are generated")
    missing = n - len(rows)
    more = collect({name: generated(category, split, seed) for name, category in KINDS[kind].items()}, missing, split)
    if len(more) < missing:
        raise ValueError(f"{missing} {kind} problems for the {split} split: there are only {len(more)}; ask for fewer")
    for row in more:
        rows.append(row | {"idx": 0} | ({"difficulty": 1} if kind == "basic" else {"n_steps": len(row["steps"])}))
    random.Random(f"{seed} {split} order").shuffle(rows)
    for i, row in enumerate(rows):
        row["idx"] = i
    return rows


# ---------------------------------------------------------------- files


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write a JSON list, one row a line, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        partial.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_rows(files: dict[str, list[Row]]) -> None:
    """Compute every row of some files again and print a table of each; ValueError names the first row that is wrong.

    No problem may be there twice, neither as it is nor mirrored, within a file or in two of them.
    """
    first: dict[str, str] = {}
    twice = None
    for name, rows in files.items():
        keys = []
        for i, row in enumerate(rows):
            where = f"{name}: row {i}"
            keys.append(check_row(row, where, EVERY_CATEGORY))
            if row["idx"] != i:
                raise ValueError(f"{where}: `idx` is {row['idx']}")
            if keys[-1] in first:
                twice = twice or f"{where} is the problem of {first[keys[-1]]} again: {row['question']!r:.80}"
            first.setdefault(keys[-1], where)
        print(f"{name}: {len(rows)} rows, every answer right\n{table(rows, keys)}")
    if twice:
        raise ValueError(twice)


def table(rows: list[Row], keys: list[str]) -> str:
    """A line a category and one of all: rows, distinct problems, steps, characters, percent with the commonest answer."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        groups[row["category"]].append(i)
    lines = [f"{'category':15}{'n':>6}{'distinct':>10}{'steps':>12}{'characters':>20}{'majority %':>12}"]
    for name, members in [*sorted(groups.items()), *([("all", list(range(len(rows))))] if len(groups) > 1 else [])]:
        steps = [len(rows[i]["steps"]) for i in members]
        characters = [len("\n".join([rows[i]["question"], *rows[i]["steps"], rows[i]["answer"]])) for i in members]
        commonest = Counter(rows[i]["answer"] for i in members).most_common(1)[0][1]
        lines.append(
            f"{name:15}{len(members):6}{len({keys[i] for i in members}):10}{_range(steps, 2):>12}{_range(characters, 0):>20}"
            f"{100 * commonest / len(members):12.1f}"
        )
    return "\n".join(lines)


def _range(values: list[int], decimals: int) -> str:
    return f"{min(values)}-{max(values)} ({sum(values) / len(values):.{decimals}f})"


# ---------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> None:
    parser = pr.Parser(__doc__)
    parser.add_argument("--n_samples", type=int, default=500, help="training rows (default: 500)")
    parser.add_argument("--output", type=Path, help=f"training file (default: {' or '.join(DEFAULT_OUTPUT.values())})")
    parser.add_argument("--kind", choices=tuple(KINDS), default="basic")
    parser.add_argument("--seed", type=int, default=42, help="same seed, same bytes (default: 42)")
    parser.add_argument("--val_samples", type=int, default=0, metavar="N", help="validation rows (default: no validation file)")
    parser.add_argument("--val_output", type=Path, metavar="FILE", help="validation file (default: <output>_val.json)")
    parser.add_argument("--use_api", action="store_true", help="ask Claude for the steps of richer problems")
    parser.add_argument("--api_model", default=cot_api.MODEL, help=f"whom to ask (default: {cot_api.MODEL})")
    parser.add_argument("--check", type=Path, nargs="+", metavar="FILE", help="verify these files and write nothing")
    args = parser.parse_args(argv)
    if args.check:
        check_rows({str(path): pr.read_rows(path) for path in args.check})
        return
    paths, sizes = _plan(args)
    ask = cot_api.Ask.open(args.api_model) if args.use_api else None
    made = {paths[split]: make_rows(args.kind, sizes[split], split, args.seed, ask) for split in SPLITS if sizes[split]}
    check_rows({str(path): rows for path, rows in made.items()})
    for path, rows in made.items():
        write_rows(path, rows)


def _plan(args: argparse.Namespace) -> tuple[dict[str, Path], dict[str, int]]:
    """Where each split goes and how many rows it has. ValueError where the options do not fit."""
    if args.n_samples < 1:
        raise ValueError(f"--n_samples {args.n_samples}: at least 1")
    if args.val_samples < 0 or (args.val_output and not args.val_samples):
        raise ValueError(f"--val_samples {args.val_samples}: at least 1 for a validation file")
    output = args.output or Path(DEFAULT_OUTPUT[args.kind])
    for path in (output, args.val_output):
        if path and path.is_dir():
            raise ValueError(f"{path} is a folder; name a file")
    valid = args.val_output or output.with_name(f"{output.stem}_val.json")
    if valid.resolve() == output.resolve():
        raise ValueError(f"--val_output {valid}: that is the training file")
    return {"train": output, "valid": valid}, {"train": args.n_samples, "valid": args.val_samples}


if __name__ == "__main__":
    pr.run_cli(main)
