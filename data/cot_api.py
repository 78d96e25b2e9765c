"""Problems of data/cot.py whose steps are asked of Claude; the answers are computed here, and replies with another are left out.

    ask = Ask.open("claude-sonnet-4-5")      # None, and a message, where the package or the key is missing
    ask("What is 3 + 4 * 5?")                # (steps, answer), or None where the reply cannot be used

The package `anthropic` is imported only by `Ask.open`.
"""

import json
import os
import random
import re
from collections.abc import Callable, Iterator

if __package__:
    from .cot_problems import Category, Row
else:  # run as `python data/cot.py`
    from cot_problems import Category, Row

MODEL = "claude-sonnet-4-5"
KEY = "ANTHROPIC_API_KEY"
MAX_USELESS = 20  # replies in a row that cannot be used
REQUEST = (
    "Solve this problem in three to eight short steps, one sentence each. Reply with nothing but a JSON object "
    '{{"steps": [strings], "answer": string}} in plain ASCII, with * for multiplication and a bare number as the answer.\n\n{}'
)

TEMPLATES: dict[str, list[tuple[str, Callable[[int, int, int], int]]]] = {
    "arithmetic": [
        ("What is {a} + {b} * {c}?", lambda a, b, c: a + b * c),
        ("What is {a} * {b} - {c}?", lambda a, b, c: a * b - c),
        ("What is ({a} + {b}) * {c}?", lambda a, b, c: (a + b) * c),
        ("What is {a} * {b} + {b} * {c}?", lambda a, b, c: a * b + b * c),
        ("Add {a}, {b} and {c}, then double the sum. What is the result?", lambda a, b, c: 2 * (a + b + c)),
    ],
    "word_problem": [
        (
            "A baker fills {a} trays with {b} rolls each and sells {c} rolls. How many rolls are left, or missing if negative?",
            lambda a, b, c: a * b - c,
        ),
        ("Eva saves {a} dollars a week for {b} weeks and is given {c} more. How many has she?", lambda a, b, c: a * b + c),
        ("A class of {a} girls and {b} boys gets {c} pens a child. How many pens is that?", lambda a, b, c: (a + b) * c),
        ("A tank holds {a} liters. {b} liters a day flow in for {c} days. How many liters then?", lambda a, b, c: a + b * c),
        (
            "Tickets cost {a} dollars, for children {b}. What do {c} adults and {c} children pay?",
            lambda a, b, c: c * (a + b),
        ),
    ],
    "algebra": [
        ("Solve for x: x + {a} = {b} + {c}.", lambda a, b, c: b + c - a),
        ("Solve for x: x - {a} = {b} * {c}.", lambda a, b, c: a + b * c),
        ("Solve for x: x / {a} = {b} + {c}.", lambda a, b, c: a * (b + c)),
        ("If x = {a}, what is {b} * x + {c}?", lambda a, b, c: a * b + c),
        ("If x = {a} and y = {b}, what is x * y - {c} * x?", lambda a, b, c: a * b - c * a),
    ],
    "logical": [
        (
            "Tom is {a} years older than Ann, and Ann is {b} years older than Leo. Leo is {c}. How old is Tom?",
            lambda a, b, c: a + b + c,
        ),
        (
            "In a queue {a} people stand before Ida, {b} between Ida and Max, and {c} behind Max. How many people queue?",
            lambda a, b, c: a + b + c + 2,
        ),
        (
            "A bag holds {a} red, {b} blue and {c} green balls. How many must be drawn blindly to be sure of two colors?",
            lambda a, b, c: max(a, b, c) + 1,
        ),
        ("Every box holds {a} bags and every bag {b} coins. How many coins are in {c} boxes?", lambda a, b, c: a * b * c),
        (
            "A clock strikes {a} times, then {b} times, and {c} of all these strikes are not heard. How many are heard, or "
            "missing if negative?",
            lambda a, b, c: a + b - c,
        ),
    ],
}


def _category(name: str) -> Category:
    """numbers: (template, a, b, c)."""
    templates = TEMPLATES[name]

    def draw(rng: random.Random):
        most = 10 * rng.randint(1, 3)
        return rng.randrange(len(templates)), *(rng.randint(1, most) for _ in range(3))

    def text(numbers):
        template, a, b, c = numbers
        question, solve = templates[template]
        return question.format(a=a, b=b, c=c), [], str(solve(a, b, c))

    def read(question):
        for i, (template, _) in enumerate(templates):
            pattern = re.escape(template)
            for letter in "abc":
                pattern = pattern.replace(rf"\{{{letter}\}}", rf"(?P<{letter}>\d+)", 1).replace(
                    rf"\{{{letter}\}}", f"(?P={letter})"
                )
            if match := re.fullmatch(pattern, question):
                return i, *(int(match[letter]) for letter in "abc")
        return None

    return Category(name, text, read, draw=draw)


CATEGORIES = {name: _category(name) for name in TEMPLATES}


def difficulty(row: Row) -> int:
    """1, 2 or 3: the least d with all numbers of the problem in 1..10 d."""
    return -(-max(CATEGORIES[row["category"]].read(row["question"])[1:]) // 10)


# ---------------------------------------------------------------- asking


class Ask:
    """Calls the API; once it fails, `trouble` says why and nothing more is asked."""

    def __init__(self, client, model: str, errors: type[Exception]):
        self.client, self.model, self.errors = client, model, errors
        self.trouble = ""

    @classmethod
    def open(cls, model: str) -> "Ask | None":
        """None, with a message, where the package or the key is missing."""
        try:
            import anthropic
        except ImportError:
            print("--use_api needs the package `anthropic` (pip install anthropic): all rows are generated instead")
            return None
        if not os.environ.get(KEY):
            print(f"--use_api needs a key in the environment variable {KEY}: all rows are generated instead")
            return None
        return cls(anthropic.Anthropic(), model, anthropic.AnthropicError)

    def __call__(self, question: str) -> tuple[list[str], str] | None:
        messages = [{"role": "user", "content": REQUEST.format(question)}]
        try:
            reply = self.client.messages.create(model=self.model, max_tokens=1000, messages=messages)
        except self.errors as error:
            self.trouble = " ".join(str(error).split())[:200]
            return None
        return parsed("".join(getattr(block, "text", "") for block in reply.content))


def parsed(reply: str) -> tuple[list[str], str] | None:
    """(steps, answer) of a reply; None where it is not what was asked for."""
    try:
        value = json.loads(reply[reply.find("{") : reply.rfind("}") + 1])
        steps, answer = value["steps"], value["answer"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return None
    texts = [*steps, answer] if isinstance(steps, list) else [None]
    if len(texts) < 4 or not all(isinstance(text, str) and re.fullmatch(r"[ -~]+", text) for text in texts):
        return None
    return steps, answer.strip()


def answered(problems: Iterator[tuple], category: Category, ask: Ask) -> Iterator[Row]:
    """The problems that the API solves rightly; ends when it fails, or is wrong MAX_USELESS times in a row."""
    useless = 0
    for numbers in problems:
        question, _, answer = category.text(numbers)
        if ask.trouble:
            return
        reply = ask(question)
        if reply is None or reply[1] != answer:
            useless += 1
            if useless == MAX_USELESS and not ask.trouble:
                ask.trouble = f"{MAX_USELESS} replies in a row could not be used"
            continue
        useless = 0
        yield {"question": question, "steps": reply[0], "answer": answer, "category": category.name}
