"""Arithmetic word problems in the format of GSM8K-Aug: an offline STAND-IN, for trying things out where there is no network.

    python data/arithmetic.py --out data                                     # 20,000 / 500 / 1,319 rows
    python data/arithmetic.py --out data/small --sizes 2000 100 200 --seed 1 --text
    python data/arithmetic.py --check data/arith_gsm_test.json

writes arith_gsm_{train,valid,test}.json, each with a sidecar *.stats.json, and with --text the same rows as the text lines that
data/gsm.py reads. It is not GSM8K: the stories come from three templates, and an accuracy on them says nothing about GSM8K.
Steps are `<<expr=val>>` as there, one to eight in the proportions of its test set; answers are whole numbers, now and then
negative or with a comma as there. A problem with the same numbers in the same roles is the same problem, whoever it is about;
none is there twice, in a split or in two of them.
"""

import argparse
import hashlib
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

if __package__:
    from . import prosqa_rows as pr
    from .gsm import write_whole
else:  # run as `python data/arithmetic.py`
    import prosqa_rows as pr
    from gsm import write_whole

Row = dict
SPLITS = ("train", "valid", "test")
SIZES = (20_000, 500, 1319)
STEP_MIX = {1: 65, 2: 357, 3: 364, 4: 290, 5: 138, 6: 57, 7: 21, 8: 9}  # rows of the test set of GSM8K-Aug with so many steps
LARGEST = 50_000  # result of a step
COMMAS = 0.15  # of the answers from 1,000 on

PEOPLE = (
    "Ada",
    "Ben",
    "Chloe",
    "Dan",
    "Emma",
    "Felix",
    "Grace",
    "Hugo",
    "Iris",
    "Jonas",
    "Kira",
    "Leo",
    "Mona",
    "Nils",
    "Olga",
)
THINGS = ("marbles", "stickers", "shells", "buttons", "pencils", "coins", "stamps", "beads", "cards", "acorns", "stones")
BAGS = ("bags", "boxes", "jars", "packs", "baskets")
GOODS = ("notebooks", "pens", "apples", "mugs", "candles", "tickets", "plants", "socks", "cups", "brushes", "lamps", "maps")
VEHICLES = ("bus", "train", "truck", "boat", "cyclist")


class Draft(NamedTuple):
    """A problem before it is a row: question, steps (`16-3=13`), and the numbers in their roles."""

    question: str
    steps: list[str]
    key: tuple


# ---------------------------------------------------------------- three templates: draft(rng, n_steps)


def collection(rng: random.Random, n_steps: int) -> Draft:
    """Someone's things become more and fewer; every event takes one step, or two."""
    who, what, bag = rng.choice(PEOPLE), rng.choice(THINGS), rng.choice(BAGS)
    have = start = rng.randint(5, 120)
    told, steps, events = [f"{who} has {start} {what}."], [], []

    def step(expression: str, value: int) -> int:
        steps.append(f"{expression}={value}")
        return value

    while len(steps) < n_steps:
        kinds = ["find", "give", "times", "share"] + ["bags", "pay"] * (n_steps - len(steps) >= 2)
        kind = rng.choice(kinds)
        a, b = rng.randint(2, 60), rng.randint(2, 9)
        if kind == "find":
            told.append(rng.choice((f"Then {who} finds {a} more.", f"A friend brings {a} more {what}.")))
            have = step(f"{have}+{a}", have + a)
        elif kind == "give" and a < have:
            told.append(rng.choice((f"Then {who} gives away {a}.", f"{a} of the {what} get lost.")))
            have = step(f"{have}-{a}", have - a)
        elif kind == "times" and have * b <= LARGEST and b <= 5:
            told.append(f"A month later {who} has {b} times as many.")
            have = step(f"{have}*{b}", have * b)
        elif kind == "share" and have % b == 0 and have > b:
            told.append(f"{who} puts them into {b} equal piles and keeps only one of these.")
            have = step(f"{have}/{b}", have // b)
        elif kind == "bags":
            told.append(f"Then {who} buys {b} {bag} with {a} {what} each.")
            have = step(f"{have}+{step(f'{b}*{a}', b * a)}", have + b * a)
        elif kind == "pay" and a * b < have:
            told.append(f"Each of {b} children gets {a} of them.")
            have = step(f"{have}-{step(f'{b}*{a}', b * a)}", have - b * a)
        else:
            continue
        events.append((kind, a if kind in ("find", "give") else b if kind in ("times", "share") else (a, b)))
    question = " ".join([*told, f"How many {what} does {who} have now?"])
    return Draft(question, steps, ("collection", start, *events))


def shopping(rng: random.Random, n_steps: int) -> Draft:
    """Kinds of goods at their prices, their sum, and what is left of the money, or missing."""
    who = rng.choice(PEOPLE)
    n_kinds, summed, change = _products(rng, n_steps)
    bought = [(rng.randint(2, 15), rng.randint(2, 40), goods) for goods in rng.sample(GOODS, n_kinds)]
    steps, totals = _multiplied([(n, price) for n, price, _ in bought], summed)
    *others, last = (f"{n} {goods} at ${price} each" for n, price, goods in bought)
    cart = f"{', '.join(others)} and {last}" if others else last
    total = totals[-1]
    if not change:
        question = f"{who} buys {cart}. How many dollars does {who} pay in all?"
        return Draft(question, steps, ("shopping", *sorted(pair[:2] for pair in bought)))
    purse = max(1, total + rng.randint(-20, 100))
    steps.append(f"{purse}-{total}={purse - total}")
    question = (
        f"{who} has ${purse} in an account and pays from it for {cart}. "
        "How many dollars are left in the account (negative if it is overdrawn)?"
    )
    return Draft(question, steps, ("shopping", purse, *sorted(pair[:2] for pair in bought)))


def journey(rng: random.Random, n_steps: int) -> Draft:
    """Legs at their speeds, the whole way, and how often it is gone, or how far in a day."""
    what = rng.choice(VEHICLES)
    n_legs, summed, more = _products(rng, n_steps)
    legs = [(rng.randint(2, 12), rng.randint(8, 95)) for _ in range(n_legs)]
    steps, totals = _multiplied(legs, summed)
    total = totals[-1]
    told = f"A {what} goes " + ", then ".join(f"{hours} hours at {speed} km per hour" for hours, speed in legs) + "."
    if not more:
        return Draft(f"{told} How many kilometers is that in all?", steps, ("journey", *sorted(legs)))
    parts = [n for n in range(2, 13) if total % n == 0]
    if parts and rng.random() < 0.5:
        n = rng.choice(parts)
        steps.append(f"{total}/{n}={total // n}")
        told += f" It does so in {n} days, the same way every day. How many kilometers does it go in a day?"
        return Draft(told, steps, ("journey a day", n, *sorted(legs)))
    n = rng.randint(2, 12)
    steps.append(f"{total}*{n}={total * n}")
    told += f" It does all of this {n} times a month. How many kilometers does it go in a month?"
    return Draft(told, steps, ("journey a month", n, *sorted(legs)))


def _products(rng: random.Random, n_steps: int) -> tuple[int, bool, bool]:
    """How many products, whether they are summed, and whether a step follows, so that `n_steps` come out."""
    if n_steps <= 2:
        return 1, False, n_steps == 2
    last = n_steps > 3 and rng.random() < 0.5
    return n_steps - 1 - last, True, last


def _multiplied(pairs: Sequence[tuple[int, int]], summed: bool) -> tuple[list[str], list[int]]:
    """The steps of the products and of their sum, and the values of these steps."""
    values = [a * b for a, b in pairs]
    steps = [f"{a}*{b}={value}" for (a, b), value in zip(pairs, values)]
    if summed:
        steps.append(f"{'+'.join(map(str, values))}={sum(values)}")
        values.append(sum(values))
    return steps, values


TEMPLATES: tuple[Callable[[random.Random, int], Draft], ...] = (collection, shopping, journey)

# ---------------------------------------------------------------- rows


def draw_draft(rng: random.Random, n_steps: int) -> Draft:
    """A problem of one of the templates."""
    return rng.choice(TEMPLATES)(rng, n_steps)


def to_row(draft: Draft, comma: bool = False) -> Row:
    """{"question", "steps", "answer"}; `comma`: thousands are set off in the answer."""
    value = int(draft.steps[-1].rpartition("=")[2])
    answer = f"{value:,}" if comma else str(value)
    return {"question": draft.question, "steps": [f"<<{step}>>" for step in draft.steps], "answer": answer}


def make_rows(size: int, seed: int, split: str, seen: set[tuple]) -> list[Row]:
    """`size` rows. Row i depends on (seed, split, i) only; a problem of `seen` is drawn again, and `seen` grows.

    ValueError where no new problem is found.
    """
    rows = []
    for i in tqdm(range(size), desc=split, unit="row", disable=not sys.stderr.isatty()):
        draw = random.Random(f"{seed} {split} {i}")
        n_steps = draw.choices(list(STEP_MIX), list(STEP_MIX.values()))[0]
        comma = draw.random() < COMMAS
        for attempt in range(pr.MAX_DRAWS):
            draft = draw_draft(random.Random(f"{seed} {split} {i} {attempt}"), n_steps)
            if draft.key not in seen:
                break
        else:
            raise ValueError(f"{split} row {i}: no new problem in {pr.MAX_DRAWS} draws; ask for fewer rows")
        seen.add(draft.key)
        rows.append(to_row(draft, comma))
    return rows


def to_line(row: Row) -> str:
    """The row as a line of the Internalized CoT text files."""
    return f"{row['question']}||{' '.join(row['steps'])} #### {row['answer']}\n"


# ---------------------------------------------------------------- check and statistics


def value_of(expression: str) -> Fraction:
    """The exact value of numbers joined by + - * /, products and quotients first."""
    total = Fraction(0)
    for sign, term in re.findall(r"(^|[+-])(\d+(?:[*/]\d+)*)", expression):
        product = Fraction(1)
        for operation, number in re.findall(r"(^|[*/])(\d+)", term):
            product = product / int(number) if operation == "/" else product * int(number)
        total += -product if sign == "-" else product
    return total


def check_row(row: Row) -> None:
    """ValueError unless every step holds, uses numbers of the question or of steps before it, and the last has the answer."""
    known = {*re.findall(r"\d+", row["question"])}
    if not row["steps"]:
        raise ValueError("steps: there are none")
    for i, step in enumerate(row["steps"]):
        match = re.fullmatch(r"<<(\d+(?:[+*/-]\d+)+)=(-?\d+)>>", step)
        if not match:
            raise ValueError(f"steps: step {i}, {step!r:.60}, is not like <<16-3=13>>")
        if value_of(match[1]) != int(match[2]):
            raise ValueError(f"steps: step {i}: {match[1]} is {value_of(match[1])}, not {match[2]}")
        if unknown := [number for number in re.findall(r"\d+", match[1]) if number not in known]:
            raise ValueError(f"steps: step {i}: {unknown[0]} is neither in the question nor a step's value")
        known.add(match[2])
    if row["answer"].replace(",", "") != match[2]:
        raise ValueError(f"answer: {row['answer']!r:.40}, but the last step gives {match[2]}")


def check_rows(rows: Sequence[Row], where: str) -> None:
    """`check_row` of every row, and no question twice; the ValueError names `where` and the row."""
    first: dict[str, int] = {}
    for i, row in enumerate(rows):
        try:
            check_row(row)
        except KeyError as error:
            raise ValueError(f"{where}: row {i}: no key {error}; a row has question, steps, answer") from None
        except ValueError as error:
            raise ValueError(f"{where}: row {i}: {error}") from None
        if (before := first.setdefault(row["question"], i)) != i:
            raise ValueError(f"{where}: row {i}: question: it is that of row {before}")


def statistics(rows: Sequence[Row]) -> dict[str, float]:
    """Means and shares over the rows."""
    steps = Counter(len(row["steps"]) for row in rows)
    n = len(rows)
    operations = Counter(chain.from_iterable(re.findall(r"(?<=\d)[+*/-]", step) for row in rows for step in row["steps"]))
    return {
        "steps": sum(k * count for k, count in steps.items()) / n,
        **{f"steps = {k}": count / n for k, count in sorted(steps.items())},
        "words of the question": sum(len(row["question"].split()) for row in rows) / n,
        "characters of the steps": sum(len(" ".join(row["steps"])) for row in rows) / n,
        **{f"operations = {name}": count / operations.total() for name, count in sorted(operations.items())},
        "answers with a comma": sum("," in row["answer"] for row in rows) / n,
        "negative answers": sum(row["answer"].startswith("-") for row in rows) / n,
        "commonest answer": Counter(row["answer"] for row in rows).most_common(1)[0][1] / n,
    }


OFFICIAL = {f"steps = {k}": count / 1319 for k, count in STEP_MIX.items()}  # of the test set of GSM8K-Aug


# ---------------------------------------------------------------- files


def make_files(args: argparse.Namespace) -> None:
    """Draw, check, write the files with sidecars, and print what is in them.

    Test and validation rows are drawn first, so that they stay the same whatever the size of the training split.
    """
    if min(args.sizes) < 1:
        raise ValueError(f"--sizes {' '.join(map(str, args.sizes))}: every split needs at least one row")
    paths, seen = {split: args.out / f"arith_gsm_{split}.json" for split in SPLITS}, set()
    present = [path for path in paths.values() if path.exists()]
    if present and not args.force:
        raise ValueError(f"{present[0]} exists; choose another --out or add --force")
    made = {split: make_rows(size, args.seed, split, seen) for split, size in reversed(list(zip(SPLITS, args.sizes)))}
    texts = {}
    for split in SPLITS:
        rows, path = made[split], paths[split]
        check_rows(rows, f"generated {split} rows")
        texts[path] = json.dumps(rows)
        sidecar = {
            "file": path.name,
            "stand_in": "generated word problems in the format of GSM8K-Aug, not GSM8K",
            "rows": len(rows),
            "sha256": hashlib.sha256(texts[path].encode()).hexdigest(),
            "parameters": {"generator": "arithmetic", "seed": args.seed, "split": split},
            "statistics": statistics(rows),
        }
        texts[path.with_suffix(".stats.json")] = json.dumps(sidecar, indent=1) + "\n"
        if args.text:
            texts[path.with_suffix(".txt")] = "".join(map(to_line, rows))
    write_whole(texts)
    for split in SPLITS:
        print(f"{paths[split]}: {len(made[split])} rows of the STAND-IN, not GSM8K")
    print(pr.table(statistics(made["train"]), OFFICIAL, decimals=3))


def main(argv: list[str] | None = None) -> None:
    parser = pr.parser(__doc__, sizes=SIZES, out="data")
    parser.add_argument("--text", action="store_true", help="also write arith_gsm_*.txt, which data/gsm.py reads")
    parser.add_argument("--check", type=Path, metavar="FILE", help="verify this file and write nothing")
    args = parser.parse_args(argv)
    args.out = Path(args.out)
    if args.check:
        rows = pr.read_rows(args.check)
        check_rows(rows, str(args.check))
        print(f"{args.check}: {len(rows)} sound rows, none twice\n{pr.table(statistics(rows), OFFICIAL, decimals=3)}")
        return
    make_files(args)


if __name__ == "__main__":
    pr.run_cli(main)
