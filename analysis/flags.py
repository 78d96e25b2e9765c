"""Red flags that need the verdict of all experiments: what a reader must not claim although single numbers invite it.

    for record in verdict_flags(verdict):          # of verdict.json
        record["gate"], record["status"]           # "flag one-family", "RAISED"

Records have the form of gates.json. A condition without enough seeds leaves its flag at NOT YET.
"""

from __future__ import annotations

from collections.abc import Iterator

RAISED, CLEAR, NOT_YET = "RAISED", "CLEAR", "NOT YET"
FAMILIES = ("m3 better on 2 OOD sets", "DEP", "2 of CAUSAL")  # parts of row 1, by how their names begin


def leaves(condition: dict) -> Iterator[dict]:
    """The single conditions under a rule."""
    if "parts" not in condition:
        yield condition
    for part in condition.get("parts", []):
        yield from leaves(part)


def verdict_flags(verdict: dict) -> list[dict]:
    """The three flags of the plan that single gates cannot see."""
    return [_one_family(verdict), _unused(verdict), _unordered(verdict)]


def _one_family(verdict: dict) -> dict:
    """m3 better in exactly one of the families OOD, DEP, CAUSAL, PROBE, PSR, COUNT."""
    ood, dep, others = (
        next(part for part in verdict["rules"]["1"]["condition"]["parts"] if part["name"].startswith(name)) for name in FAMILIES
    )
    families = {"OOD": _any(part["holds"] for part in ood["parts"]), "DEP": dep["holds"]}
    families |= {name: part["holds"] for name, part in zip(("CAUSAL", "PROBE", "PSR", "COUNT"), others["parts"], strict=True)}
    found, waiting = ([name for name, holds in families.items() if holds is value] for value in (True, None))
    status = CLEAR if len(found) > 1 else NOT_YET if waiting else RAISED if found else CLEAR
    value = ", ".join(found) or "none"
    value += f"; undecided: {', '.join(waiting)}" if waiting else ""
    return _record(
        "one-family", "m3 better in only one experiment family", status, "families for m3", value, "not exactly 1", "no claim"
    )


def _unused(verdict: dict) -> dict:
    """Probes read more from m3's thoughts than from their controls, but putting the states back brings nothing back."""
    probe = _holds(verdict, "controlled_advantage")
    effect = _holds(verdict, "causal_peak")
    return _pair(
        "unused",
        "probes above controls, no causal effect",
        probe,
        effect,
        ("probes", "effect"),
        "information present but unused",
    )


def _unordered(verdict: dict) -> dict:
    """m3 is above chance on an OOD set, but the order of its thoughts does not matter."""
    success = _any(
        None if leaf["holds"] is None else not leaf["holds"]
        for leaf in leaves(verdict["rules"]["3"]["condition"])
        if leaf["models"] == ["m3"] and leaf["rule"].startswith("mean <=")
    )
    order = _holds(verdict, "permutation_flips")
    return _pair(
        "unordered", "OOD success, no order effect", success, order, ("OOD above 55", "order"), "not sequential reasoning"
    )


def _holds(verdict: dict, quantity: str) -> bool | None:
    """Whether m3's own condition on a quantity holds."""
    every = (leaf for rule in verdict["rules"].values() for leaf in leaves(rule["condition"]))
    return next((leaf["holds"] for leaf in every if leaf["quantity"] == quantity and leaf["models"] == ["m3"]), None)


def _any(values: Iterator[bool | None]) -> bool | None:
    values = list(values)
    return True if True in values else None if None in values else False


def _pair(name: str, title: str, first: bool | None, second: bool | None, what: tuple[str, str], reading: str) -> dict:
    """Raised where the first holds and the second does not."""
    status = CLEAR if first is False or second is True else NOT_YET if None in (first, second) else RAISED
    words = {True: "yes", False: "no", None: "undecided"}
    value = f"{what[0]}: {words[first]}, {what[1]}: {words[second]}"
    return _record(name, title, status, " and ".join(what), value, "the second if the first", reading)


def _record(name: str, title: str, status: str, check: str, value: str, rule: str, reading: str) -> dict:
    ok = {RAISED: False, CLEAR: True, NOT_YET: None}[status]
    checks = [{"name": check, "value": value, "rule": rule, "n": None, "ok": ok, "decisive": True}]
    notes = [reading] if status == RAISED else []
    return {"gate": f"flag {name}", "subject": title, "status": status, "blocking": False, "checks": checks, "notes": notes}
