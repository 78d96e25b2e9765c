"""Questions and answers for Cognate's first phase, "Q: ..." newline "A:": named data sets where they can be had, else generated.

    python data/phase1.py --out data/phase1                                     # generated arithmetic and equations, offline
    python data/phase1.py --datasets gsm8k svamp arc_easy --out data/phase1     # from the hub or its cache
    python data/phase1.py --datasets gsm8k piqa --test --out DIR                # a few rows, for trying out

Writes train.json and valid.json: rows with question, steps, answer, source, and level (0 foundation, 1 reasoning, 2 advanced;
`level_epochs` of run.py brings them in one after the other). A tenth of the questions, drawn by seed and never asked in
training, is for validation. Where a data set cannot be loaded, generated rows stand in for it, which is announced.
"""

import argparse
import hashlib
import os
import random
import re
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

if __package__:
    from . import cot
    from . import prosqa_rows as pr
else:  # run as `python data/phase1.py`
    import cot
    import prosqa_rows as pr

Row = dict
VAL_FRACTION, SEED = 0.1, 42
GENERATED, TEST_ROWS = 2000, 40  # rows that stand in for a data set; of --test
PRINTABLE = re.compile(r"[ -~\n]*")
LEVELS = ("foundation", "reasoning", "advanced")

# ---------------------------------------------------------------- what a data set's records say


def row(question: str, steps: list[str], answer: str) -> Row:
    """A row; `question` without "Q:"."""
    return {
        "question": f"Q: {question.strip()}\nA:",
        "steps": [s.strip() for s in steps if s.strip()],
        "answer": answer.strip(),
    }


def from_gsm8k(record: dict) -> Row:
    text, answer = record["answer"].rsplit("####", 1)
    return row(record["question"], re.sub(r"<<.*?>>", "", text).splitlines(), answer)


def from_svamp(record: dict) -> Row:
    answer = f"{float(record['Answer']):g}"
    return row(f"{record['Body']} {record['Question']}", [f"{record['Equation']} = {answer}"], answer)


def from_mbpp(record: dict) -> Row:
    return row(record["text"], [], record["code"])


def from_arc(record: dict) -> Row:
    choices = dict(zip(record["choices"]["label"], record["choices"]["text"]))
    listed = " ".join(f"({label}) {text}" for label, text in choices.items())
    return row(f"{record['question']} {listed}", [], choices[record["answerKey"]])


def from_piqa(record: dict) -> Row:
    return row(record["goal"], [], record[f"sol{record['label'] + 1}"])


def from_hellaswag(record: dict) -> Row:
    return row(record["ctx"], [], record["endings"][int(record["label"])])


def from_wikitext(record: dict) -> Row | None:
    first, stop, rest = record["text"].strip().partition(". ")
    return row(first + stop, [], rest) if rest else None


class Source(NamedTuple):
    """Where a data set lies on the hub, its level, how a record becomes a row, and how many rows of it count at most."""

    path: str
    config: str | None
    level: int
    convert: Callable[[dict], Row | None]
    at_most: int | None = None


SOURCES = {
    "gsm8k": Source("openai/gsm8k", "main", 0, from_gsm8k),
    "svamp": Source("ChilleD/SVAMP", None, 0, from_svamp),
    "mbpp": Source("google-research-datasets/mbpp", "full", 1, from_mbpp),
    "arc_easy": Source("allenai/ai2_arc", "ARC-Easy", 1, from_arc),
    "piqa": Source("ybisk/piqa", None, 2, from_piqa),
    "arc_challenge": Source("allenai/ai2_arc", "ARC-Challenge", 2, from_arc),
    "hellaswag": Source("Rowan/hellaswag", None, 2, from_hellaswag, 2000),
    "wikitext": Source("Salesforce/wikitext", "wikitext-2-raw-v1", 2, from_wikitext, 2000),
}

# ---------------------------------------------------------------- generated rows


def equations(rng: random.Random) -> Iterator[Row]:
    """Equations of one or two operations, whose steps are written as GSM8K writes them."""
    while True:
        a, b, c = (rng.randint(2, 60) for _ in range(3))
        first, sign = rng.choice([(a + b, "+"), (a * b, "*"), (max(a, b) - min(a, b), "-")])
        a, b = (max(a, b), min(a, b)) if sign == "-" else (a, b)
        steps = [f"{a} {sign} {b} = {first}"]
        if rng.random() < 0.5:
            steps.append(f"{first} + {c} = {first + c}")
            yield row(f"{a} {sign} {b} + {c} = ?", steps, str(first + c))
        else:
            yield row(f"{a} {sign} {b} = ?", steps, str(first))


def generated(n: int, seed: int) -> list[Row]:
    """`n` rows of arithmetic: equations, and basic and multi-step problems of data/cot.py; levels 0, 0 and 1."""
    parts = {kind: cot.make_rows(kind, max(n // 3, 1), "train", seed) for kind in ("basic", "multistep")}
    rows = [row(r["question"], r["steps"], r["answer"]) | {"level": kind == "multistep"} for kind in parts for r in parts[kind]]
    drawn = equations(random.Random(f"equations {seed}"))
    rows += [next(drawn) | {"level": 0} for _ in range(n - len(rows))]
    return [r | {"source": "generated", "level": int(r["level"])} for r in rows]


def load(name: str, n: int | None, seed: int, cache_dir: str | None) -> list[Row]:
    """The training rows of a named data set, or rows that stand in for it, which is said on stderr."""
    source = SOURCES[name]
    try:
        from datasets import load_dataset

        records = load_dataset(source.path, source.config, split="train", cache_dir=cache_dir)
        rows = [made | {"source": name, "level": source.level} for made in map(source.convert, records) if made]
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:120]
        print(f"*** {name} CANNOT BE LOADED ({reason}): GENERATED ARITHMETIC STANDS IN FOR IT ***", file=sys.stderr)
        salt = int.from_bytes(hashlib.sha256(name.encode()).digest()[:2])
        return [r | {"source": f"generated for {name}", "level": source.level} for r in generated(n or GENERATED, seed + salt)]
    most = min(x for x in (n, source.at_most, len(rows)) if x is not None)
    return random.Random(f"{name} {seed}").sample(rows, most)


def ask_no_hub_in_vain() -> None:
    """Without a network, look in the cache at once: the library would try again for half a minute, for each data set."""
    if os.environ.get("HF_HUB_OFFLINE"):
        return
    try:
        socket.create_connection(("huggingface.co", 443), timeout=5).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"


# ---------------------------------------------------------------- split and files


def split(rows: list[Row], seed: int, fraction: float) -> dict[str, list[Row]]:
    """{"train", "valid"} in a drawn order; of a question asked twice the first counts."""
    rows = list({r["question"]: r for r in reversed(rows)}.values())
    random.Random(f"{seed} split").shuffle(rows)
    n = round(fraction * len(rows))
    if not 0 < n < len(rows):
        raise ValueError(f"--val_fraction {fraction}: leaves {n} of {len(rows)} questions for validation")
    return {"valid": rows[:n], "train": rows[n:]}


def main(argv: list[str] | None = None) -> None:
    parser = pr.Parser(__doc__)
    parser.add_argument("--datasets", nargs="+", choices=SOURCES, default=[], help="default: generated rows alone")
    parser.add_argument("--out", type=Path, default=Path("data/phase1"), help="folder (default: data/phase1)")
    parser.add_argument("--n_samples", type=int, help=f"rows of each data set, and generated ones (default: all; {GENERATED})")
    parser.add_argument("--val_fraction", type=float, default=VAL_FRACTION, help="default: 0.1")
    parser.add_argument("--seed", type=int, default=SEED, help="default: 42")
    parser.add_argument("--cache_dir", help="where `datasets` keeps what it has loaded")
    parser.add_argument(
        "--ascii", action=argparse.BooleanOptionalAction, default=True, help="leave out rows of other characters"
    )
    parser.add_argument("--test", action="store_true", help=f"{TEST_ROWS} rows of each, for trying out")
    args = parser.parse_args(argv)
    n = TEST_ROWS if args.test else args.n_samples
    if n is not None and n < 4:
        raise ValueError(f"--n_samples {n}: at least 4")
    if args.datasets:
        ask_no_hub_in_vain()
    rows = [r for name in args.datasets for r in load(name, n, args.seed, args.cache_dir)]
    rows = rows or generated(n or GENERATED, args.seed)
    if args.ascii:
        kept = [r for r in rows if PRINTABLE.fullmatch("".join([r["question"], *r["steps"], r["answer"]]))]
        print(f"{len(rows) - len(kept)} rows left out that are not printable ASCII (--no-ascii keeps them)")
        rows = kept
    for name, part in split(rows, args.seed, args.val_fraction).items():
        part = [r | {"idx": i} for i, r in enumerate(part)]
        cot.write_rows(args.out / f"{name}.json", part)
        sources, levels = (Counter(r[key] for r in part) for key in ("source", "level"))
        described = ", ".join(f"{count} {source}" for source, count in sources.most_common())
        print(f"{args.out / name}.json: {len(part)} rows ({described}); "
              + ", ".join(f"{levels[i]} {level}" for i, level in enumerate(LEVELS)))  # fmt: skip


if __name__ == "__main__":
    pr.run_cli(main)
