"""What a category of generated problems is, and what they share: rows from numbers, numbers back from rows, and their check.

addition = cot_basic.CATEGORIES["addition"]
addition.text((47, 38))                                  # ("What is 47 + 38?", ["Tens: 40 + 30 = 70.", ...], "85")
addition.read("What is 47 + 38?")                        # (47, 38)
check_row(row, "train.json: row 3", categories)          # computes everything again; the problem's key
"""

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal

Row = dict
Numbers = tuple  # what a problem is made of: numbers and words
EQUATION = re.compile(r"(\d[\d.+* -]*) = (\d[\d.]*\d|\d)")


@dataclass(frozen=True)
class Category:
    """One kind of problem.

    text(numbers) -> (question, steps, answer); no steps where they are asked of an API.
    read(question) -> the numbers again; None where the question is none of this category.
    key(numbers): the same for a problem and its mirrors.
    space() lists one problem of every key, and order(rng, numbers) gives one of its mirrors; or, where there are too many
    to list, draw(rng) -> numbers.
    """

    name: str
    text: Callable[[Numbers], tuple[str, list[str], str]]
    read: Callable[[str], Numbers | None]
    key: Callable[[Numbers], Numbers] = lambda numbers: numbers
    space: Callable[[], Iterable[Numbers]] | None = None
    order: Callable[[random.Random, Numbers], Numbers] = lambda rng, numbers: numbers
    draw: Callable[[random.Random], Numbers] | None = None

    def problem_key(self, numbers: Numbers) -> str:
        """Names a problem and its mirrors across files, splits and seeds."""
        return f"{self.name} {self.key(numbers)!r}"


def as_sorted(numbers: Numbers) -> Numbers:
    """The key of numbers whose order does not matter."""
    return tuple(sorted(numbers))


def in_any_order(rng: random.Random, numbers: Numbers) -> Numbers:
    """The numbers in a drawn order."""
    return tuple(rng.sample(numbers, len(numbers)))


def ints(pattern: str, text: str) -> tuple[int, ...] | None:
    """The groups of a pattern that matches all of a text, as integers; None where it does not."""
    match = re.fullmatch(pattern, text)
    return match and tuple(map(int, match.groups()))


def listed(words: Iterable) -> str:
    """`a, b and c`."""
    words = list(map(str, words))
    return " and ".join([", ".join(words[:-1]), *words[-1:]])


def two_places(value: Decimal) -> Decimal:
    """Rounded half up to two places, exactly."""
    return value.quantize(Decimal("0.01"), ROUND_HALF_UP)


# ---------------------------------------------------------------- checking


def check_row(row: Row, where: str, categories: dict[str, Category]) -> str:
    """Compute a row again from its question; returns its key. ValueError that names what is wrong and `where`.

    Besides the generator's own text, every equation in the steps is computed, and the last step must end with the answer.
    """
    for field, kind in {"question": str, "steps": list, "answer": str, "category": str, "idx": int}.items():
        if not isinstance(row.get(field), kind):
            raise ValueError(f"{where}: `{field}` is missing or no {kind.__name__}")
    question, steps, answer = row["question"], row["steps"], row["answer"]
    category = categories.get(row["category"])
    if category is None:
        raise ValueError(f"{where}: category {row['category']!r} is unknown; known: {', '.join(categories)}")
    texts = [question, *steps, answer]
    if len(steps) < 3 or not all(isinstance(text, str) and re.fullmatch(r"[ -~]+", text) for text in texts):
        raise ValueError(f"{where}: needs three steps or more, all of it printable ASCII")
    numbers = category.read(question)
    if numbers is None or category.text(numbers)[0] != question:
        raise ValueError(f"{where}: {question!r:.80} is no {category.name} question")
    _, right_steps, right_answer = category.text(numbers)
    if answer != right_answer:
        raise ValueError(f"{where}: the answer is {right_answer}, not {answer}")
    if right_steps:
        check_steps(steps, answer, where)
        if steps != right_steps:
            first = next((i for i, (a, b) in enumerate(zip(steps, right_steps)) if a != b), min(len(steps), len(right_steps)))
            raise ValueError(f"{where}: step {first} is not the one that this question has")
    if row.get("n_steps", len(steps)) != len(steps):
        raise ValueError(f"{where}: `n_steps` is {row['n_steps']}, but there are {len(steps)} steps")
    return category.problem_key(numbers)


def check_steps(steps: list[str], answer: str, where: str) -> None:
    """ValueError where an equation of a step does not hold, or the last step does not end with the answer."""
    for i, step in enumerate(steps):
        for left, right in EQUATION.findall(step):
            value = evaluate(left)
            if (two_places(value) if "." in right else value) != Decimal(right):
                raise ValueError(f"{where}: step {i}: {left} is {value}, not {right}")
    if not re.search(rf"(?<![\w.:]){re.escape(answer)}\.?$", steps[-1]):
        raise ValueError(f"{where}: the last step, {steps[-1]!r:.60}, does not end with the answer, {answer}")


def evaluate(expression: str) -> Decimal:
    """The exact value of sums and differences of products, such as `247 - 3 * 2.5`."""
    total = Decimal(0)
    for sign, term in re.findall(r"([+-]?) ?([\d.]+(?: \* [\d.]+)*)", expression):
        product = Decimal(1)
        for factor in term.split(" * "):
            product *= Decimal(factor)
        total += -product if sign == "-" else product
    return total
