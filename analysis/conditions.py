"""Conditions on a study's evidence that hold, fail, or are undecided; put together so that a rule can say why. No torch.

    c = compare(evidence, "two_choice/ood_dag")            # m3 minus m5, with interval and noise floor
    rule = all_of("both", [differs(c, 5, better=True), negated(reaches(evidence, "permutation_flips", "m3", 5))])
    rule.holds, rule.strict                                # True, None: the second rests on a wide interval

Three values (Kleene): a missing number makes a condition undecided, never false, and a combination is decided as soon as no
completion of its undecided parts could change it. Beside that, a condition is `open` when its numbers are there, but the 90 %
interval also admits the opposite: it counts as the plan's rule says, and the report names it. `strict` is the value with all
open conditions taken as undecided.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from analysis.evidence import Evidence, Value
from analysis.stats import inside, noise_floor, paired_t, seed_interval, welch

SEEDS = 3  # of each model, for any claim
ROUNDING = 1e-9  # thresholds are met inclusively, whatever the last bit of a mean


@dataclass(frozen=True)
class Condition:
    """One condition, or several under an operator. `measured`: numbers for the report; `why`: what decided it, or did not."""

    name: str
    holds: bool | None
    rule: str = ""
    measured: dict = field(default_factory=dict)
    why: str = ""
    open: bool = False
    parts: tuple[Condition, ...] = ()
    least: int | None = None  # how many parts must hold; None: the one part must not

    @property
    def strict(self) -> bool | None:
        """`holds` with every open condition taken as undecided."""
        if not self.parts:
            return None if self.open else self.holds
        return _combined([part.strict for part in self.parts], self.least)

    def leaves(self) -> Iterator[Condition]:
        """The single conditions below this one, or itself."""
        if not self.parts:
            yield self
        for part in self.parts:
            yield from part.leaves()

    def unsettled(self) -> Iterator[Condition]:
        """The single conditions, undecided or open, on which this one's value rests."""
        if self.strict is not None:
            return
        if not self.parts:
            yield self
        for part in self.parts:
            yield from part.unsettled()

    def to_json(self) -> dict:
        """Plain values for JSON; of parts, `needs` says how many must hold."""
        about = {"name": self.name, "holds": self.holds, "strict": self.strict}
        if self.parts:
            needs = "none of" if self.least is None else "all of" if self.least == len(self.parts) else f"{self.least} of"
            return about | {"needs": needs, "parts": [part.to_json() for part in self.parts]}
        return about | {"rule": self.rule, "open": self.open, "why": self.why, **self.measured}


def _combined(values: Sequence[bool | None], least: int | None) -> bool | None:
    if least is None:
        (value,) = values
        return None if value is None else not value
    if values.count(True) >= least:
        return True
    return None if values.count(True) + values.count(None) >= least else False


def at_least(least: int, name: str, parts: Sequence[Condition]) -> Condition:
    """Whether at least so many parts hold."""
    assert parts, name  # nothing to hold is not the same as everything holding
    return Condition(name, _combined([part.holds for part in parts], least), parts=tuple(parts), least=least)


def all_of(name: str, parts: Sequence[Condition]) -> Condition:
    return at_least(len(parts), name, parts)


def any_of(name: str, parts: Sequence[Condition]) -> Condition:
    return at_least(1, name, parts)


def negated(part: Condition) -> Condition:
    return Condition(f"not: {part.name}", _combined([part.holds], None), parts=(part,))


# ---------------------------------------------------------------- two models


@dataclass(frozen=True)
class Comparison:
    """A quantity of two models over their seeds: `numbers` as the report shows them, or `why` there are too few.

    `floor`: abs(m4b - m5) of the same quantity with its numbers of seeds, None with `floor_why`.
    """

    name: str
    numbers: dict
    why: str = ""
    floor: dict | None = None
    floor_why: str = ""

    @property
    def difference(self) -> float:
        return self.numbers["difference"]


def compare(evidence: Evidence, name: str, first: str = "m3", second: str = "m5") -> Comparison:
    """D = mean over seeds of `first` minus that of `second`, Welch's intervals, the seed-paired test, and the noise floor."""
    quantity = evidence.quantity(name)
    a, b = quantity.of(first), quantity.of(second)
    numbers = {"quantity": name, "unit": quantity.unit, "models": [first, second], "values": _by_label([*a, *b])}
    numbers |= {"n_seeds": {first: len(a), second: len(b)}}
    if a and b:
        numbers |= welch([v.value for v in a], [v.value for v in b])
        pairs = [(x.value, y.value) for x in a for y in b if x.repeat == y.repeat]
        numbers["paired"] = paired_t(*zip(*pairs)) if pairs else None
    floor, floor_why = floor_of(evidence, name)
    numbers["noise_floor"] = floor if floor else {"value": None, "reason": floor_why}
    return Comparison(name, numbers, _too_few(evidence, name, first, second), floor, floor_why)


def floor_of(evidence: Evidence, name: str) -> tuple[dict | None, str]:
    """({"value", "n_m4b", "n_m5"}, "") or (None, why not).

    m4b and m5 are one function: with the seed of an m5 run, an m4b run is that run again and measures no noise, so it is
    left out.
    """
    quantity = evidence.quantity(name)
    m4b, m5 = quantity.of("m4b"), quantity.of("m5")
    taken = {v.train_seed for v in m5} - {None}
    fresh = [v for v in m4b if v.train_seed not in taken]
    if m4b and not fresh:
        return None, "m4b has the seeds of m5: the same runs, no noise floor"
    if not (fresh and m5):
        gaps = quantity.missing_of("m4b", "m5")
        return None, f"no noise floor: {gaps[0]}" if gaps else "no noise floor: m4b or m5 has no value"
    return noise_floor([v.value for v in fresh], [v.value for v in m5]), ""


def differs(c: Comparison, d: float, better: bool = False) -> Condition:
    """abs(D) >= d, Welch's 95 % interval excludes 0, abs(D) > abs(m4b - m5); with `better` D must be above 0, too."""
    first, second = c.numbers["models"]
    who = f"{first} above {second}" if better else f"{first} and {second} differ"
    rule = f"{'D' if better else 'abs(D)'} >= {d:g}, 95 % interval without 0, above the noise floor"
    name, measured = f"{c.name}: {who} by {d:g}", c.numbers | {"threshold": d}
    if c.why:
        return Condition(name, None, rule, measured, c.why)
    size = (c.difference if better else abs(c.difference)) >= d - ROUNDING
    low, high = c.numbers["ci95"]
    clear = not low <= 0 <= high
    above = None if c.floor is None else abs(c.difference) > c.floor["value"] + ROUNDING
    holds = _combined([size, clear, above], 3)
    why = "; ".join(
        text
        for failed, text in (
            (not size, f"{'D' if better else 'abs(D)'} is below {d:g}"),
            (not clear, "the 95 % interval includes 0"),
            (above is False, "not above the noise floor"),
            (holds is None, c.floor_why),
        )
        if failed
    )
    reach = c.numbers["ci90"][1] >= d if better else not inside(c.numbers["ci90"], d)
    return Condition(name, holds, rule, measured, why, open=holds is False and reach)


def same(c: Comparison, d: float) -> Condition:
    """The 90 % interval of D lies inside ±d: two one-sided tests at 5 %."""
    name, rule = f"{c.name}: {' and '.join(c.numbers['models'])} the same within {d:g}", f"90 % interval inside ±{d:g}"
    if c.why:
        return Condition(name, None, rule, c.numbers | {"threshold": d}, c.why)
    low, high = c.numbers["ci90"]
    holds = inside((low, high), d - ROUNDING)
    why = "" if holds else f"the 90 % interval leaves ±{d:g}"
    return Condition(name, holds, rule, c.numbers | {"threshold": d}, why, open=not holds and low < d and high > -d)


def above_floor(c: Comparison) -> Condition:
    """D > abs(m4b - m5)."""
    name, rule = f"{c.name}: D above the noise floor", "D > abs(m4b - m5)"
    if c.why or c.floor is None:
        return Condition(name, None, rule, c.numbers, c.why or c.floor_why)
    holds = c.difference > c.floor["value"] + ROUNDING
    return Condition(name, holds, rule, c.numbers, "" if holds else "not above the noise floor")


# ---------------------------------------------------------------- one model


def reaches(evidence: Evidence, name: str, model: str, d: float) -> Condition:
    """Mean over seeds >= d, and its 95 % interval above 0."""
    about, numbers, why = _level(evidence, name, model, d)
    title, rule = f"{name} of {model} at least {d:g}", f"mean >= {d:g}, 95 % interval above 0"
    if why:
        return Condition(title, None, rule, about, why)
    holds = numbers["mean"] >= d - ROUNDING and numbers["ci95"][0] > 0
    why = "" if holds else f"mean below {d:g}" if numbers["mean"] < d - ROUNDING else "the 95 % interval is not above 0"
    return Condition(title, holds, rule, about, why, open=not holds and numbers["ci90"][1] >= d)


def above_zero(evidence: Evidence, name: str, model: str, matters: float) -> Condition:
    """95 % interval of the mean above 0; if it is not, the question stays open while values of `matters` are admitted."""
    about, numbers, why = _level(evidence, name, model, 0)
    title, rule = f"{name} of {model} above 0", "95 % interval above 0"
    if why:
        return Condition(title, None, rule, about, why)
    holds = numbers["ci95"][0] > 0
    why = "" if holds else "the 95 % interval is not above 0"
    return Condition(title, holds, rule, about, why, open=not holds and numbers["ci90"][1] >= matters)


def mean_at_least(evidence: Evidence, name: str, model: str, limit: float) -> Condition:
    """Mean over seeds >= limit."""
    about, numbers, why = _level(evidence, name, model, limit)
    title, rule = f"{name} of {model} at least {limit:g}", f"mean >= {limit:g}"
    if why:
        return Condition(title, None, rule, about, why)
    holds = numbers["mean"] >= limit - ROUNDING
    why = "" if holds else f"mean below {limit:g}"
    return Condition(title, holds, rule, about, why, open=(numbers["ci90"][0] < limit <= numbers["ci90"][1]))


def mean_at_most(evidence: Evidence, name: str, model: str, limit: float, seeds: int = SEEDS) -> Condition:
    """Mean over seeds <= limit. A mean of a single seed, where that is enough, stays open."""
    about, numbers, why = _level(evidence, name, model, limit, seeds)
    title, rule = f"{name} of {model} at most {limit:g}", f"mean <= {limit:g}"
    if why:
        return Condition(title, None, rule, about, why)
    holds, ci90 = numbers["mean"] <= limit + ROUNDING, numbers["ci90"]
    why = "one seed only" if ci90 is None else "" if holds else f"mean above {limit:g}"
    return Condition(title, holds, rule, about, why, open=ci90 is None or ci90[0] <= limit < ci90[1])


def _level(evidence: Evidence, name: str, model: str, threshold: float, seeds: int = SEEDS) -> tuple[dict, dict, str]:
    """(numbers for the report, those of the mean, why there are too few)."""
    quantity = evidence.quantity(name)
    found = quantity.of(model)
    about = {"quantity": name, "unit": quantity.unit, "models": [model], "values": _by_label(found)}
    about |= {"n_seeds": {model: len(found)}, "threshold": threshold}
    numbers = seed_interval([v.value for v in found]) if found else {}
    about |= {key: numbers[key] for key in ("mean", "sd", "ci95", "ci90", "reason") if numbers}
    return about, numbers, _too_few(evidence, name, model, seeds=seeds)


def _too_few(evidence: Evidence, name: str, *models: str, seeds: int = SEEDS) -> str:
    """Why a quantity has not enough seeds of these models, or an empty string."""
    quantity = evidence.quantity(name)
    short = [model for model in models if len(quantity.of(model)) < seeds]
    if not short:
        return ""
    counts = ", ".join(f"{len(quantity.of(model))} of {seeds} seeds of {model}" for model in short)
    gaps = quantity.missing_of(*short)
    return counts + (f" ({gaps[0]})" if gaps else "")


def _by_label(values: Sequence[Value]) -> dict[str, dict]:
    """{label: {"value", "n", "ci95", "note"}}; n are rows, the interval is over rows."""
    return {v.label: {"value": v.value, "n": v.n, "ci95": v.ci95, "note": v.note} for v in values}
