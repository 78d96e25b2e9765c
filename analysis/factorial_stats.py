"""The statistics of three mechanisms, each on or off, over paired seeds: power, tests, contrasts, when to stop. No torch.

    print(power_text(5))                                         # before anything is trained
    found = compare(losses["ABC"], losses["baseline"])           # {seed: value}; paired t and Welch, with d_z
    holm_family({"ABC - AB": found, ...}, alpha=0.05)            # adds `p_holm` and `rejected`
    contrasts(losses)["A x B"]                                   # a value for each seed

A factor is A, B or C; a cell is named by the factors that are on, "baseline" where none is. One seed fixes everything that is
random in all cells, so cells are compared within seeds. Power is that of the noncentral t distribution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import combinations

import numpy as np
from scipy import stats
from scipy.optimize import brentq

from analysis.stats import holm, paired_t, welch

FACTORS = "ABC"
BASELINE = "baseline"
CELLS = (BASELINE, *("".join(on) for n in (1, 2, 3) for on in combinations(FACTORS, n)))
PRIMARY = ("ABC", BASELINE)
REMOVALS = (("ABC", "AB"), ("ABC", "AC"), ("ABC", "BC"))
FUTILE_AFTER, FUTILE_BELOW = 5, 0.1  # seeds, and |d_z|
EFFECT, WANTED = 0.5, 0.8  # the effect and the power that plans are told in
FAMILY = len(REMOVALS)

Seeds = Mapping[int, float]  # {seed: value}

# ---------------------------------------------------------------- power


def paired_power(n: int, d_z: float = EFFECT, alpha: float = 0.05) -> float:
    """The chance that a two-sided paired t test of n pairs finds a mean difference of `d_z` standard deviations."""
    return _power(n - 1, d_z * math.sqrt(n), alpha)


def two_sample_power(n: int, d: float = EFFECT, alpha: float = 0.05) -> float:
    """The same for two independent groups of n runs each; `d` is in their common standard deviation."""
    return _power(2 * n - 2, d * math.sqrt(n / 2), alpha)


def _power(df: int, noncentrality: float, alpha: float) -> float:
    """Of a two-sided t test. The far tail vanishes for large effects, where scipy finds no number for it."""
    limit = stats.t.ppf(1 - alpha / 2, df)
    return float(stats.nct.sf(limit, df, noncentrality) + np.nan_to_num(stats.nct.cdf(-limit, df, noncentrality)))


def pairs_needed(d_z: float = EFFECT, alpha: float = 0.05, power: float = WANTED) -> int:
    """How many pairs reach a power."""
    return _smallest(lambda n: paired_power(n, d_z, alpha), power)


def runs_needed(d: float = EFFECT, alpha: float = 0.05, power: float = WANTED) -> int:
    """How many runs in each of two independent groups reach a power."""
    return _smallest(lambda n: two_sample_power(n, d, alpha), power)


def _smallest(power_of, wanted: float) -> int:
    """The smallest n >= 2 with the wanted power, which grows with n."""
    high = 2
    while power_of(high) < wanted:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power_of(middle) >= wanted else (middle, high)
    return high


@lru_cache(64)
def detectable(n: int, alpha: float = 0.05, power: float = WANTED) -> float:
    """The smallest d_z that n pairs (at least 2) find with a power."""
    high = 1.0
    while paired_power(n, high, alpha) < power:
        high *= 2
    return float(brentq(lambda d_z: paired_power(n, d_z, alpha) - power, 0.0, high))


def power_of_design(n: int, alpha: float = 0.05) -> dict:
    """What n seeds can find, and how many an effect of half a standard deviation takes; needs no results."""
    sizes = sorted({n, 5, 10, 20} - {0, 1})
    return {
        "n": n,
        "alpha": alpha,
        "effect": EFFECT,
        "paired": paired_power(n, alpha=alpha) if n > 1 else None,
        "two_sample": two_sample_power(n, alpha=alpha) if n > 1 else None,
        "pairs_needed": pairs_needed(alpha=alpha),
        "runs_needed": runs_needed(alpha=alpha),
        "detectable": {str(k): {"alpha": detectable(k, alpha), "alpha/3": detectable(k, alpha / FAMILY)} for k in sizes},
    }


def power_text(n: int, alpha: float = 0.05) -> str:
    """`power_of_design` in words, to be read before anything is trained."""
    found = power_of_design(n, alpha)
    seeds = "1 seed" if n == 1 else f"{n} seeds"
    if n > 1:
        now = f"{100 * found['paired']:.0f} % paired, {100 * found['two_sample']:.0f} % if the same runs were not paired"
    else:
        now = "none, one seed has no spread"
    lines = [
        f"Power at {seeds} for d = {EFFECT} and alpha {alpha:g}, two-sided (noncentral t): {now}.",
        f"{100 * WANTED:.0f} % power at d = {EFFECT} takes {found['pairs_needed']} pairs, or {found['runs_needed']} runs in "
        "each of two unpaired arms.",
        f"Smallest d_z found with {100 * WANTED:.0f} % power (at alpha/{FAMILY}, the first step of Holm in family 1): "
        + ", ".join(f"n = {k}: {v['alpha']:.2f} ({v['alpha/3']:.2f})" for k, v in found["detectable"].items())
        + ".",
    ]
    return "\n".join(lines)


# ---------------------------------------------------------------- tests


def compare(first: Seeds, second: Seeds) -> dict:
    """first - second over the seeds that both have: the fields of `stats.paired_t`, with `seeds`, `differences`, `d_z` (mean
    over standard deviation of the differences; None without spread) and `welch`, the same runs unpaired.

    ValueError where they have no seed in common.
    """
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        raise ValueError("no seed has both cells; train one with: --seeds")
    a, b = [first[seed] for seed in seeds], [second[seed] for seed in seeds]
    return _tested(a, b) | {"seeds": seeds, "welch": welch(a, b)}


def one_sample(values: Seeds) -> dict:
    """Whether values (one a seed) are 0 on average; the fields of `compare`, without Welch's test."""
    seeds = sorted(values)
    return _tested([values[seed] for seed in seeds], [0.0] * len(seeds)) | {"seeds": seeds}


def _tested(a: Sequence[float], b: Sequence[float]) -> dict:
    found = paired_t(a, b)
    d_z = None if found["t"] is None else found["t"] / math.sqrt(found["n"])
    return found | {"d_z": d_z, "differences": [float(x) for x in np.subtract(a, b)]}


def holm_family(tests: Mapping[str, dict], alpha: float = 0.05, declared: Sequence[str] = ()) -> dict[str, dict]:
    """The tests of one family with `p_holm` (adjusted), `holm_step` (the alpha that its own p met) and `rejected`.

    The smallest p meets alpha / n, the next alpha / (n - 1), and so on; after the first that is not rejected none is. A test
    without a p counts as a member, and so does one that was `declared` and is not there.
    """
    p_values = {name: tests.get(name, {}).get("p_value") for name in dict.fromkeys([*tests, *declared])}
    adjusted = holm(p_values)
    order = sorted(p_values, key=lambda name: (p_values[name] is None, p_values[name] or 0.0))
    step = {name: alpha / (len(order) - place) for place, name in enumerate(order)}
    return {
        name: test | {"p_holm": adjusted[name], "holm_step": step[name], "rejected": _rejected(adjusted[name], alpha)}
        for name, test in tests.items()
    }


def _rejected(p: float | None, alpha: float) -> bool | None:
    return None if p is None else p <= alpha


def futility(test: dict) -> dict:
    """Whether to stop: after `FUTILE_AFTER` seeds the interval covers 0 and |d_z| is below `FUTILE_BELOW`.

    Returns {"stop", "reason"}.
    """
    n, interval, d_z = test["n"], test["ci95"], test["d_z"]
    if n < FUTILE_AFTER:
        return {"stop": False, "reason": f"{n} of {FUTILE_AFTER} seeds: too early to say"}
    if interval is None or d_z is None:
        no_change = interval is not None and interval[0] <= 0 <= interval[1]
        return {"stop": no_change, "reason": test["reason"]}
    covers, small = interval[0] <= 0 <= interval[1], abs(d_z) < FUTILE_BELOW
    what = f"the interval {'covers' if covers else 'leaves out'} 0 and |d_z| = {abs(d_z):.2f}"
    return {"stop": covers and small, "reason": f"{what} {'<' if small else '>='} {FUTILE_BELOW} after {n} seeds"}


# ---------------------------------------------------------------- contrasts


def contrasts(cells: Mapping[str, Seeds]) -> dict[str, dict[int, float]]:
    """The seven contrasts {"A": {seed: value}, ..., "A x B x C": ...} of all eight cells, for the seeds that all have.

    A main effect is the mean with the factor minus the mean without it. An interaction of two is how much larger the effect of
    one is with the other than without it, averaged over the third; of three, how much larger that is with the third.
    """
    if absent := [name for name in CELLS if not cells.get(name)]:
        raise ValueError(f"contrasts need all eight cells; {', '.join(absent)} missing")
    seeds = sorted(set.intersection(*(set(cells[name]) for name in CELLS)))
    found = {}
    for n in (1, 2, 3):
        for on in combinations(FACTORS, n):
            share = 2 ** (n - 1) / 4
            sign = {name: math.prod(1 if factor in name else -1 for factor in on) for name in CELLS}
            found[" x ".join(on)] = {s: share * sum(sign[name] * cells[name][s] for name in CELLS) for s in seeds}
    return found


def analyse(cells: Mapping[str, Seeds], alpha: float = 0.05) -> dict:
    """All tests of one outcome: {"primary", "family_1", "family_2", "against_baseline", "futility", "missing"}.

    What cells are missing for is left out and named under "missing". `against_baseline` (each cell - baseline) is for the
    figure: intervals, outside of the families.
    """
    missing: list[str] = []

    def test(pair: tuple[str, str]) -> dict[str, dict]:
        first, second = (cells.get(name, {}) for name in pair)
        return {" - ".join(pair): compare(first, second)} if first.keys() & second.keys() else {}

    def family(pairs: Sequence[tuple[str, str]]) -> dict[str, dict]:
        found = {name: result for pair in pairs for name, result in test(pair).items()}
        missing.extend(name for name in map(" - ".join, pairs) if name not in found)
        return found

    primary = {name: t | {"rejected": _rejected(t["p_value"], alpha)} for name, t in family([PRIMARY]).items()}
    family_1 = holm_family(family(REMOVALS), alpha, [" - ".join(pair) for pair in REMOVALS])
    family_2, complete = {}, [set(cells.get(name, {})) for name in CELLS]
    if set.intersection(*complete):
        family_2 = holm_family({name: one_sample(values) for name, values in contrasts(cells).items()}, alpha)
    else:
        missing.append("the seven contrasts")
    against = {name: result for cell in CELLS[1:] for name, result in test((cell, BASELINE)).items()}
    stop = {"stop": False, "reason": "the primary comparison is not there"}
    return {
        "primary": primary,
        "family_1": family_1,
        "family_2": family_2,
        "against_baseline": against,
        "futility": futility(next(iter(primary.values()))) if primary else stop,
        "missing": missing,
    }
