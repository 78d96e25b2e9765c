"""Where the parts of a ProsQA question stand among its tokens, for edits and probes that aim at them.

places = Places.of(row, tokenizer)
places.facts[3], places.person, places.on_path      # token positions, counted from the row's first token
"""

import re
from dataclasses import dataclass

_SENTENCE = re.compile(r"[^.?]+[.?]")
_ASKED = re.compile(r"\s*Is (\w+) a (\w+) or (?:a )?(\w+)\s*\?")


@dataclass(frozen=True)
class Places:
    """Token positions of a question: each fact's, those of the facts on the gold path, of the person asked, and the options'."""

    facts: list[list[int]]
    on_path: list[bool]  # one per fact
    person: list[int]
    options: list[list[int]]
    n_tokens: int  # of the question with its line end

    @property
    def all_facts(self) -> list[int]:
        """Positions of all fact tokens."""
        return [position for fact in self.facts for position in fact]

    @property
    def path(self) -> list[int]:
        """Positions of the facts on the gold path."""
        return [position for fact, on in zip(self.facts, self.on_path) if on for position in fact]

    @property
    def off_path(self) -> list[int]:
        """Positions of the other facts."""
        return [position for fact, on in zip(self.facts, self.on_path) if not on for position in fact]

    @classmethod
    def of(cls, row: dict, tokenizer) -> "Places":
        """Read them off the text. Raises ValueError where it is no ProsQA question."""
        text = row["question"] + "\n"
        sentences = list(_SENTENCE.finditer(row["question"]))
        asked = _ASKED.match(sentences[-1].group()) if sentences else None
        if asked is None:
            raise ValueError(f"no ProsQA question (facts, then `Is Tom a lempus or scrompus?`): {row['question'][-60:]!r}")
        spans = tokenizer(text, add_special_tokens=True, return_offsets_mapping=True)["offset_mapping"]

        def tokens(start: int, end: int) -> list[int]:
            return [i for i, (a, b) in enumerate(spans) if b > a and a < end and b > start]

        base, steps = sentences[-1].start(), {step.strip() for step in row["steps"]}
        facts = [(s.start() + len(s.group()) - len(s.group().lstrip()), s.end()) for s in sentences[:-1]]
        return cls(
            [tokens(*span) for span in facts],
            [s.group().strip() in steps for s in sentences[:-1]],
            tokens(base + asked.start(1), base + asked.end(1)),
            [tokens(base + asked.start(i), base + asked.end(i)) for i in (2, 3)],
            len(spans),
        )
