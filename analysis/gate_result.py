"""What a gate says: checks with value and threshold, a status, a table for the terminal, a record for `gates.json`.

result = Result("3", "m3", [Check("validation accuracy, line 15", "61.00", "> 58", ok=True, n=300)])
result.status                      # "PASS"
print(render([result], colour=False))
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from files import write_json

PASS, FAIL, NOT_YET, NOT_APPLICABLE = "PASS", "FAIL", "NOT YET", "NOT APPLICABLE"
RAISED, CLEAR = "RAISED", "CLEAR"  # red flags only: they inform and never block
SCHEMA_VERSION = 1
WIDTH = 120
_COLOURS = {PASS: "32", CLEAR: "32", FAIL: "31;1", RAISED: "31;1", NOT_YET: "33", NOT_APPLICABLE: "2"}


@dataclass(frozen=True)
class Check:
    """One measured value beside its threshold. `ok` None: not decidable yet; `decisive` False: shown only."""

    name: str
    value: str
    rule: str = ""
    ok: bool | None = None
    n: int | None = None
    decisive: bool = True
    detail: str = ""  # an error message in full, printed below the row

    @property
    def waits(self) -> bool:
        return self.value.startswith("needs ")

    @property
    def verdict(self) -> str:
        if not self.decisive:
            return ""
        return {True: "ok", False: "FAILS", None: "not yet"}[self.ok]


def info(name: str, value: str, n: int | None = None) -> Check:
    """A value that is printed and recorded but decides nothing."""
    return Check(name, value, n=n, decisive=False)


def missing(name: str, rule: str, needs: str) -> Check:
    """A check whose input is not there yet; `needs` names the input."""
    return Check(name, f"needs {needs}", rule)


@dataclass
class Result:
    """One gate for one subject (a model and repeat). `blocks` names what a failure stops; empty: nothing."""

    gate: str
    subject: str
    checks: list[Check]
    notes: list[str] = field(default_factory=list)
    blocks: str = "study"
    uncalibrated: list[str] = field(default_factory=list)
    accepted: str = ""
    forced: str = ""  # a status that does not follow from the conjunction of the checks
    evidence: str = ""  # names the measured run, so that judging it twice is not two failures

    @property
    def status(self) -> str:
        if self.forced:
            return self.forced
        verdicts = [check.ok for check in self.checks if check.decisive]
        if False in verdicts:
            return FAIL
        return PASS if verdicts and all(verdicts) else NOT_YET

    @property
    def blocking(self) -> bool:
        return self.status == FAIL and bool(self.blocks) and not self.uncalibrated and not self.accepted

    def record(self) -> dict:
        """The JSON form, as appended to `gates.json`."""
        return {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "gate": self.gate,
            "subject": self.subject,
            "status": self.status,
            "blocking": self.blocking,
            "blocks": self.blocks,
            "uncalibrated": self.uncalibrated,
            "accepted": self.accepted,
            "checks": [
                {"name": c.name, "value": c.value, "rule": c.rule, "n": c.n, "ok": c.ok, "decisive": c.decisive}
                | ({"detail": c.detail} if c.detail else {})
                for c in self.checks
            ],
            "notes": self.notes,
            "evidence": self.evidence,
        }


def not_applicable(gate: str, absent: Iterable[str]) -> Result:
    """A gate whose models the study does not train."""
    return Result(gate, "", [], [f"not part of this study: {', '.join(absent)}"], forced=NOT_APPLICABLE)


def render(results: list[Result], colour: bool) -> str:
    """The table a person reads: a `GATE 3 PASS  m3` line, then one aligned row a check, at most 120 wide."""
    lines = []
    for result in results:
        status = f"\033[{_COLOURS[result.status]}m{result.status}\033[0m" if colour else result.status
        tags = [tag for tag, on in (("blocking", result.blocking), ("uncalibrated", result.uncalibrated)) if on]
        kind, _, rest = result.gate.partition(" ")
        label = f"{kind.upper()} {rest}" if rest else f"GATE {result.gate}"
        lines.append(f"{label} {status}  {result.subject}{''.join(f'  [{tag}]' for tag in tags)}".rstrip())
        names, rules = ([getattr(c, key) for c in result.checks] for key in ("name", "rule"))
        words = {"FAILS": "raises it"} if kind == "flag" else {}
        values = ["-" if c.waits else c.value for c in result.checks]
        name_w, value_w, rule_w = (max(map(len, column), default=0) for column in (names, values, rules))
        for c, value in zip(result.checks, values, strict=True):
            count = f"n={c.n}" if c.n is not None else ""
            row = f"    {c.name:<{name_w}}  {value:<{value_w}}  {c.rule:<{rule_w}}  "
            end = c.value if c.waits else f"{count:<6}  {words.get(c.verdict, c.verdict)}"
            lines += _folded((row + end).rstrip())
            lines += _folded(f"        {c.detail}") if c.detail else []
        if result.accepted:
            lines += _folded(f"    accepted: {result.accepted}")
        if result.uncalibrated:
            lines += _folded(f"    uncalibrated: {'; '.join(result.uncalibrated)}")
        for note in result.notes:
            lines += _folded(f"    note: {note}")
    return "\n".join(lines)


def _folded(row: str) -> list[str]:
    """Rows wider than the terminal continue, indented, on the next line; column spacing stays as it is."""
    rows = []
    while len(row) > WIDTH:
        cut = row.rfind(" ", 12, WIDTH)
        cut = cut if cut > 0 else WIDTH
        rows.append(row[:cut].rstrip())
        row = " " * 8 + row[cut:].lstrip()
    return [*rows, row]


def read_records(path: Path) -> list[dict]:
    """Every record appended so far, oldest first; for one gate and subject the last one counts."""
    if not path.exists():
        return []
    try:
        return json.loads(path.read_text())["records"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a gate record file ({error}); move it or give another --out") from error


def append_records(path: Path, results: list[Result]) -> None:
    """Append to `gates.json`, replacing the file in one step."""
    records = read_records(path) + [result.record() for result in results]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"schema_version": SCHEMA_VERSION, "records": records})
