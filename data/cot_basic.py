"""The basic set of data/cot.py: addition, multiplication, sequence, comparison; problems of 3 or 4 steps."""

from itertools import combinations, combinations_with_replacement

if __package__:
    from .cot_problems import Category, as_sorted, in_any_order, ints, listed
else:  # run as `python data/cot.py`
    from cot_problems import Category, as_sorted, in_any_order, ints, listed


def add_text(numbers):
    """Sum of (a, b), by tens and ones."""
    a, b = numbers
    tens, ones = a // 10 * 10 + b // 10 * 10, a % 10 + b % 10
    steps = [
        f"Tens: {a // 10 * 10} + {b // 10 * 10} = {tens}.",
        f"Ones: {a % 10} + {b % 10} = {ones}.",
        f"Together: {tens} + {ones} = {a + b}.",
    ]
    return f"What is {a} + {b}?", steps, str(a + b)


def multiply_text(numbers):
    """Product of (a, b), by the tens and ones of b."""
    a, b = numbers
    tens, ones = b // 10 * 10, b % 10
    steps = [
        f"Split {b} in {tens} and {ones}: {a} * {tens} = {a * tens}.",
        f"The rest: {a} * {ones} = {a * ones}.",
        f"Together: {a * tens} + {a * ones} = {a * b}.",
    ]
    return f"What is {a} * {b}?", steps, str(a * b)


def sequence_text(numbers):
    """Member number n of (start, step, n)."""
    start, step, n = numbers
    question = f"A sequence begins {start}, {start + step} and grows evenly. What is number {n} of it?"
    steps = [
        f"The step is {start + step} - {start} = {step}.",
        f"To number {n} there are {n} - 1 = {n - 1} steps.",
        f"They add {n - 1} * {step} = {(n - 1) * step}.",
        f"Number {n} is {start} + {(n - 1) * step} = {start + (n - 1) * step}.",
    ]
    return question, steps, str(start + (n - 1) * step)


def read_sequence(question):
    """(start, step, n) of a question."""
    found = ints(r"A sequence begins (\d+), (\d+) and grows evenly\. What is number (\d+) of it\?", question)
    return found and (found[0], found[1] - found[0], found[2])


def compare_text(numbers):
    """The largest of three numbers."""
    a, b, c = numbers
    first, last = max(a, b), max(a, b, c)
    steps = [
        f"Of {a} and {b} the larger is {first}.",
        f"Of {first} and {c} the larger is {last}.",
        f"The largest is {last}.",
    ]
    return f"Which number is the largest: {listed(numbers)}?", steps, str(last)


CATEGORIES = {
    category.name: category
    for category in (
        Category(
            "addition",
            add_text,
            lambda question: ints(r"What is (\d+) \+ (\d+)\?", question),
            key=as_sorted,
            space=lambda: combinations_with_replacement(range(1, 101), 2),
            order=in_any_order,
        ),
        Category(
            "multiplication",
            multiply_text,
            lambda question: ints(r"What is (\d+) \* (\d+)\?", question),
            key=as_sorted,
            space=lambda: combinations_with_replacement(range(1, 21), 2),
            order=in_any_order,
        ),
        Category(
            "sequence",
            sequence_text,
            read_sequence,
            space=lambda: ((start, step, n) for start in range(1, 11) for step in range(1, 6) for n in range(3, 8)),
        ),
        Category(
            "comparison",
            compare_text,
            lambda question: ints(r"Which number is the largest: (\d+), (\d+) and (\d+)\?", question),
            key=as_sorted,
            space=lambda: combinations(range(1, 101), 3),
            order=in_any_order,
        ),
    )
}
