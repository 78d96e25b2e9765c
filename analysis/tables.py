"""Tables that read well in a terminal and are Markdown at once.

print(table(("stage", "loss"), [["3", "0.895"], ["4", number(1.03)]]))
"""

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of a Markdown table with aligned columns; the first column is text, the others are set to the right."""
    widths = [max(3, *(len(line[i]) for line in (head, *rows))) for i in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))] for line in (head, *rows)
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:])) + "\n"


def number(value: float | None, digits: int = 4) -> str:
    """A number to so many significant digits, large ones whole, with commas; `–` where there is none."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction in percent."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def change(found: dict | None, digits: int = 1) -> str:
    """A relative change {"value", "ci95"} in percent, with its interval."""
    if not found or found["value"] is None:
        return "–"
    interval = " .. ".join(f"{100 * bound:+.{digits}f}" for bound in found["ci95"]) if found["ci95"] else "–"
    return f"{100 * found['value']:+.{digits}f} ({interval})"
