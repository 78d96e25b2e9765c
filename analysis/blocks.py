"""What a report is made of, before it is HTML or Markdown: sections of paragraphs, tables, lists, commands and figures.

    Section("gates", "Gates", [Text("All passed."), Table("Gates", ["gate", "status"], [["3", Cell("PASS", "good")]])])

Templates show blocks by their `kind`. Numbers come in as the JSON has them (fractions) and leave as percent with one decimal.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import ClassVar

import yaml

from analysis.drawing import spread

TEMPLATES = Path(__file__).with_name("templates")

NOTHING = "–"


@dataclass(frozen=True)
class Cell:
    """A table's cell: its text, a tone (good, bad, open, muted, strong, head), a link, or the face of code."""

    text: str
    tone: str = ""
    link: str = ""
    code: bool = False


@dataclass
class Text:
    """A paragraph. `tone`: lead, note or empty; `link`: where it can be read up."""

    text: str
    tone: str = ""
    link: str = ""
    kind: ClassVar[str] = "text"


@dataclass
class Table:
    """Rows of cells or strings; the columns in `words` hold text, the others numbers, aligned at their right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    note: str = ""
    words: Sequence[int] = (0,)
    kind: ClassVar[str] = "table"

    @property
    def cells(self) -> list[list[Cell]]:
        return [[cell if isinstance(cell, Cell) else Cell(str(cell)) for cell in row] for row in self.rows]


@dataclass
class Items:
    """A list."""

    items: Sequence[str]
    title: str = ""
    kind: ClassVar[str] = "items"


@dataclass(frozen=True)
class Branch:
    """A condition at its depth under a rule: whether it holds, its name, and the numbers that say so."""

    depth: int
    holds: bool | None
    text: str
    numbers: str = ""

    @property
    def word(self) -> str:
        return {True: "holds", False: "fails", None: "undecided"}[self.holds]


@dataclass
class Tree:
    """Conditions under conditions."""

    title: str
    branches: Sequence[Branch]
    kind: ClassVar[str] = "tree"


@dataclass
class Commands:
    """Commands to copy."""

    lines: Sequence[str]
    title: str = ""
    kind: ClassVar[str] = "commands"


@dataclass
class Callout:
    """What must not be overlooked. `tone`: good, bad, open or plain."""

    title: str
    lines: Sequence[str]
    tone: str = "plain"
    kind: ClassVar[str] = "callout"


@dataclass
class Picture:
    """A figure of `analysis.figures` by its name, with a caption."""

    name: str
    title: str
    caption: str
    kind: ClassVar[str] = "picture"


@dataclass
class Section:
    """A heading with blocks and sections below it; `anchor` is what links name."""

    anchor: str
    title: str
    blocks: list = field(default_factory=list)
    sections: list["Section"] = field(default_factory=list)


# ---------------------------------------------------------------- numbers as text


def signed(x: float | None, digits: int = 1) -> str:
    """`+1.5`, `−0.2`; a rounded zero has no sign."""
    if x is None:
        return NOTHING
    text = f"{x:+.{digits}f}"
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", "−")


def number(x: float | None, digits: int = 1) -> str:
    """`97.0`, `−0.2`; a rounded zero has no sign."""
    if x is None:
        return NOTHING
    text = f"{x:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def percent(level: dict | None) -> str:
    """`97.0` of {"accuracy": .97}; in percent, without the sign."""
    return NOTHING if not level or level.get("accuracy") is None else number(100 * level["accuracy"])


def interval(bounds: Sequence[float] | None, scale: float = 1.0, sign: bool = False, digits: int = 1) -> str:
    """`95.1 .. 98.2`; `scale` 100 for fractions."""
    if not bounds:
        return NOTHING
    return " .. ".join(signed(scale * x, digits) if sign else number(scale * x, digits) for x in bounds)


def level_text(level: dict | None) -> str:
    """`97.0 (95.1 .. 98.2)`: percent with the 95 % interval over rows."""
    return NOTHING if percent(level) == NOTHING else f"{percent(level)} ({interval(level['ci95'], 100)})"


def p_text(p: float | None) -> str:
    """Three decimals, or a power of ten below .001."""
    if p is None:
        return NOTHING
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}".replace("e-0", "e-")


def yes_no(holds: bool | None, words: tuple[str, str, str] = ("yes", "no", "undecided"), no: str = "muted") -> Cell:
    """A cell of three values; `no`: the tone of the second."""
    place = {True: 0, False: 1, None: 2}[holds]
    return Cell(words[place], ("good", no, "open")[place])


def over_seeds(levels: Sequence[dict | None]) -> str:
    """`97.0 (96.1 .. 97.9)`: the mean over seeds with its 95 % interval; of one seed the interval over rows."""
    found = spread(levels)
    return NOTHING if found is None else f"{number(found.mean)} ({number(found.low)} .. {number(found.high)})"


def not_measured(text: str, command: str) -> Callout:
    """What is missing, and what makes it."""
    return Callout("Not measured", [text, f"Make it with: {command}"], "open")


@cache
def texts() -> dict:
    """The report's fixed texts, templates/texts.yaml."""
    return yaml.safe_load((TEMPLATES / "texts.yaml").read_text())
