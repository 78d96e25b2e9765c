"""Every statistic of the study: rows of one pair of models, seeds of two models, families of tests. No torch.

    wilson(485, 500)                               # {"correct", "n", "accuracy", "ci95"}, fractions
    mcnemar(m3_correct, m5_correct)                # same rows, one seed
    holm({"test": 0.845, "7-hop": 3.0e-7})         # one declared family
    welch([97.0, 96.4, 97.2], [96.6, 96.8, 95.9])  # seeds of two models, with 95 and 90 % intervals of the difference

scipy and statsmodels do the mathematics; what they do not have is written out with its source. Results are plain
dictionaries for JSON, in the units of what was handed in. What cannot be computed is None beside a `reason`; an input
that makes no sense is a ValueError; NaN never leaves this module. Tests on rows say nothing about training: a claim about
a kind of model needs seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as contingency_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_ind

RESAMPLES, SEED = 10_000, 42  # of every bootstrap
Z95 = 1.96

# ---------------------------------------------------------------- rows


def wilson(correct: int, n: int) -> dict:
    """{"correct", "n", "accuracy", "ci95"} of `correct` right answers to n rows, as fractions; Wilson's interval (1927).

    Raises ValueError where there are no rows: an accuracy of nothing is not 0.
    """
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"{correct} right of {n}: an accuracy needs at least one row, and no more right than rows")
    interval = stats.binomtest(int(correct), int(n)).proportion_ci(0.95, method="wilson")
    return {"correct": int(correct), "n": int(n), "accuracy": correct / n, "ci95": [interval.low, interval.high]}


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> dict:
    """Exact McNemar test of two models on the same rows: `first[i]`, `second[i]` say whether row i was answered right.

    See `mcnemar_counts`. Raises ValueError for anything but two equally long sequences of booleans: an accuracy does not
    say which rows were right, so that no paired test follows from it.
    """
    if not (isinstance(first, Sequence | np.ndarray) and isinstance(second, Sequence | np.ndarray)):
        raise ValueError("mcnemar takes right or wrong for each row of both models, not their accuracies")
    if len(first) != len(second):
        raise ValueError(f"mcnemar compares the same rows: {len(first)} of one model, {len(second)} of the other")
    if any(not isinstance(x, bool | np.bool_) for x in [*first, *second]):
        raise ValueError("mcnemar takes booleans, one a row, not accuracies or scores")
    a, b = np.asarray(first, bool), np.asarray(second, bool)
    return mcnemar_counts(int((a & ~b).sum()), int((~a & b).sum()), len(a))


def mcnemar_counts(b: int, c: int, n: int) -> dict:
    """Exact McNemar test, a two-sided binomial one (McNemar 1947), from b rows only the first model has right, c only the other.

    Returns {"n", "b", "c", "difference", "ci95", "p_value"}; difference d = (b - c) / n, a fraction of all n rows (discordant
    or not), with the interval d ± 1.96 sqrt(b + c - (b - c)² / n) / n. Without discordant rows p is 1.
    """
    if any(isinstance(x, bool) or not isinstance(x, int | np.integer) for x in (b, c, n)):
        raise ValueError(f"b {b}, c {c}, n {n}: mcnemar takes counts of rows, not accuracies")
    if min(b, c) < 0 or n < 1 or b + c > n:
        raise ValueError(f"b {b}, c {c}, n {n}: counts are not negative, and b + c rows lie among at least one of n")
    p = float(contingency_mcnemar([[0, b], [c, 0]], exact=True).pvalue) if b + c else 1.0
    d, half = (b - c) / n, Z95 * math.sqrt(b + c - (b - c) ** 2 / n) / n
    return {"n": int(n), "b": int(b), "c": int(c), "difference": d, "ci95": [d - half, d + half], "p_value": p}


def wilcoxon(first: Sequence[float], second: Sequence[float]) -> dict:
    """Paired Wilcoxon signed-rank test, two-sided (Wilcoxon 1945), of the differences first - second on the same rows.

    Zero differences are dropped and equal absolute differences share their mean rank; p is exact up to 50 differences
    without either, else by the normal approximation with tie correction, as scipy chooses. Returns `n`, `n_zeros`,
    `n_nonzero`, `n_ties` (nonzero differences that share their size with another), `t_plus`, `t_minus` (rank sums for the
    first and for the second), `wilcoxon_stat` (the smaller), `z_score` (positive: for the first), `p_value`,
    `rank_biserial` and `direction` (see `rank_biserial`), `hodges_lehmann` (median of the pairwise means of the nonzero
    differences), `median_diff`, `mean_diff`, `std_diff` (of all).
    """
    difference = _numbers(first, "first") - _numbers(second, "second", len(first))
    nonzero = difference[difference != 0]
    _, counts = np.unique(np.abs(nonzero), return_counts=True)
    about = {
        "n": len(difference),
        "n_zeros": len(difference) - len(nonzero),
        "n_nonzero": len(nonzero),
        "n_ties": int(counts[counts > 1].sum()),
        "median_diff": float(np.median(difference)),
        "mean_diff": float(difference.mean()),
        "std_diff": float(difference.std(ddof=1)) if len(difference) > 1 else None,
    }
    if not len(nonzero):
        names = ("t_plus", "t_minus", "wilcoxon_stat", "z_score", "p_value", "rank_biserial", "hodges_lehmann")
        return about | dict.fromkeys(names) | {"direction": 0, "reason": "all differences are zero"}
    ranks = stats.rankdata(np.abs(nonzero))
    t_plus, t_minus = float(ranks[nonzero > 0].sum()), float(ranks[nonzero < 0].sum())
    upper = stats.wilcoxon(nonzero, alternative="greater", method="asymptotic")  # its z keeps the sign
    walsh = np.add.outer(nonzero, nonzero)[np.triu_indices(len(nonzero))] / 2
    return about | {
        "t_plus": t_plus,
        "t_minus": t_minus,
        "wilcoxon_stat": min(t_plus, t_minus),
        "z_score": float(upper.zstatistic),
        "p_value": float(stats.wilcoxon(nonzero).pvalue),
        **rank_biserial(t_plus, t_minus),
        "hodges_lehmann": float(np.median(walsh)),
        "reason": None,
    }


def rank_biserial(t_plus: float, t_minus: float) -> dict:
    """{"rank_biserial": (T+ - T-) / (T+ + T-) (Kerby 2014), "direction": its sign, 1, 0 or -1}.

    The direction is never read off the median: rank sums and median may disagree.
    """
    if t_plus < 0 or t_minus < 0 or t_plus + t_minus == 0:
        raise ValueError(f"rank sums {t_plus} and {t_minus}: neither is negative, and not both are 0")
    return {"rank_biserial": (t_plus - t_minus) / (t_plus + t_minus), "direction": int(np.sign(t_plus - t_minus))}


def spearman(x: Sequence[float], y: Sequence[float]) -> dict:
    """Spearman's rank correlation with a two-sided p: {"n", "rho", "p_value", "reason"}; None for fewer than 3 or constants."""
    x = _numbers(x, "x")
    y = _numbers(y, "y", len(x))
    if len(x) < 3 or _equal(x) or _equal(y):
        reason = "fewer than 3 pairs" if len(x) < 3 else "one side is constant"
        return {"n": len(x), "rho": None, "p_value": None, "reason": reason}
    rho, p = stats.spearmanr(x, y)
    return {"n": len(x), "rho": float(rho), "p_value": float(p), "reason": None}


# ---------------------------------------------------------------- bootstrap over rows or clusters


def bootstrap_mean(values: Sequence[float], clusters: Sequence | None = None) -> dict:
    """Mean over rows with a percentile interval: {"value", "ci95", "n", "n_clusters", "reason"}.

    `clusters`: an id for each row (the pair a row belongs to); whole clusters are resampled. For paired models hand in the
    rows' differences. 10,000 resamples, seed 42 (Efron 1979).
    """
    values = _numbers(values, "values")
    return _bootstrap(values, np.ones_like(values), clusters)


def ratio_of_means(numerator: Sequence[float], denominator: Sequence[float], clusters: Sequence | None = None) -> dict:
    """mean(numerator) / mean(denominator), both resampled together: the effect of a restored state over the total effect.

    Returned as by `bootstrap_mean`. None with a reason where the mean denominator is not above 0; where only resamples
    reach 0, the ratio has no interval.
    """
    numerator = _numbers(numerator, "numerator")
    return _bootstrap(numerator, _numbers(denominator, "denominator", len(numerator)), clusters)


def _bootstrap(upper: np.ndarray, lower: np.ndarray, clusters: Sequence | None) -> dict:
    """sum(upper) / sum(lower) over resampled rows or clusters."""
    n = len(upper)
    if clusters is not None:
        if len(clusters) != n:
            raise ValueError(f"clusters: {len(clusters)} ids for {n} rows")
        names = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
        where = [names[name] for name in clusters]
        upper, lower = np.bincount(where, upper), np.bincount(where, lower)
    about = {"value": None, "ci95": None, "n": n, "n_clusters": len(upper) if clusters is not None else None}
    if lower.sum() <= 0:
        return about | {"reason": f"the denominator's mean is {lower.sum() / n:.3g}, not above 0"}
    about["value"] = float(upper.sum() / lower.sum())
    if len(upper) < 2:
        return about | {"reason": "a single row or cluster cannot be resampled"}
    rng = np.random.default_rng(SEED)
    seen = []  # sums of the denominator in all resamples

    def ratio(x, y, axis):
        total = y.sum(axis)
        seen.append(np.min(total))
        return x.sum(axis) / np.where(total > 0, total, 1)

    found = stats.bootstrap(
        (upper, lower), ratio, n_resamples=RESAMPLES, batch=500, paired=True, vectorized=True, method="percentile", rng=rng
    )
    if min(seen) <= 0:
        return about | {"reason": "the denominator is not above 0 in all resamples"}
    return about | {"ci95": [float(x) for x in found.confidence_interval], "reason": None}


# ---------------------------------------------------------------- seeds


def seed_interval(values: Sequence[float]) -> dict:
    """Mean over seeds with Student's t intervals: {"n", "values", "mean", "sd", "ci95", "ci90", "reason"}.

    One seed has a mean and no interval. Equal values have an interval without width, and the reason says so.
    """
    x = _numbers(values, "values")
    about = {"n": len(x), "values": x.tolist(), "mean": float(x.mean()), "sd": None, "ci95": None, "ci90": None}
    if len(x) == 1:
        return about | {"reason": "one seed has no spread"}
    about["sd"] = sd = float(x.std(ddof=1)) if not _equal(x) else 0.0
    for key, level in (("ci95", 0.95), ("ci90", 0.90)):
        half = float(stats.t.ppf(0.5 + level / 2, len(x) - 1)) * sd / math.sqrt(len(x))
        about[key] = [about["mean"] - half, about["mean"] + half]
    return about | {"reason": None if sd else "all seeds are equal: the interval has no width"}


def welch(first: Sequence[float], second: Sequence[float]) -> dict:
    """Welch's test (1947) of the mean of first minus that of second, seeds unpaired: the primary test between models.

    Returns {"mean_first", "mean_second", "difference", "n_first", "n_second", "t", "df", "p_value", "ci95", "ci90",
    "cohens_d", "reason"}. With a single seed on a side only means and difference are numbers; without any spread the
    intervals shrink to the difference, and t, p and Cohen's d do not exist.
    """
    a, b = _numbers(first, "first"), _numbers(second, "second")
    about = {"mean_first": float(a.mean()), "mean_second": float(b.mean()), "difference": float(a.mean() - b.mean())}
    about |= {"n_first": len(a), "n_second": len(b), **dict.fromkeys(("t", "df", "p_value", "ci95", "ci90", "cohens_d"))}
    if min(len(a), len(b)) < 2:
        return about | {"reason": f"a difference between {len(a)} and {len(b)} seeds has no interval: both need 2"}
    if _equal(a) and _equal(b):
        exact = [about["difference"]] * 2
        return about | {"ci95": exact, "ci90": exact, "reason": "no spread on either side: the interval has no width"}
    test = stats.ttest_ind(a, b, equal_var=False)
    pooled = math.sqrt(((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / (len(a) + len(b) - 2))
    return about | {
        "t": float(test.statistic),
        "df": float(test.df),
        "p_value": float(test.pvalue),
        "ci95": [float(x) for x in test.confidence_interval(0.95)],
        "ci90": [float(x) for x in test.confidence_interval(0.90)],
        "cohens_d": about["difference"] / pooled,  # Cohen 1988, pooled sd
        "reason": None,
    }


def paired_t(first: Sequence[float], second: Sequence[float]) -> dict:
    """Student's paired t test of first - second, pair by pair (the same seed).

    Returns {"n", "difference", "t", "df", "p_value", "ci95", "reason"}.
    """
    a = _numbers(first, "first")
    b = _numbers(second, "second", len(a))
    about = {"n": len(a), "difference": float((a - b).mean()), **dict.fromkeys(("t", "df", "p_value", "ci95"))}
    if len(a) < 2:
        return about | {"reason": "one pair has no spread"}
    if _equal(a - b):
        return about | {"ci95": [about["difference"]] * 2, "reason": "all differences are equal: the interval has no width"}
    test = stats.ttest_rel(a, b)
    interval = [float(x) for x in test.confidence_interval(0.95)]
    return about | {
        "t": float(test.statistic),
        "df": float(test.df),
        "p_value": float(test.pvalue),
        "ci95": interval,
        "reason": None,
    }


def equivalence(first: Sequence[float], second: Sequence[float], margin: float) -> dict:
    """Two one-sided Welch tests (Schuirmann 1987): is the difference of means inside ±margin?

    Returns {"margin", "difference", "ci90", "p_value", "equivalent", "reason"}. `equivalent` is whether the 90 % interval
    lies strictly inside, the same as p < 0.05; None where there is no interval.
    """
    if not margin > 0:
        raise ValueError(f"margin {margin}: equivalence needs a margin above 0")
    found = welch(first, second)
    about = {"margin": margin, "difference": found["difference"], "ci90": found["ci90"], "p_value": None}
    about["equivalent"] = inside(found["ci90"], margin)
    if found["p_value"] is None:
        return about | {"reason": found["reason"]}
    p, *_ = ttost_ind(np.asarray(first, float), np.asarray(second, float), -margin, margin, usevar="unequal")
    return about | {"p_value": float(p), "reason": None}


def inside(interval: Sequence[float] | None, margin: float) -> bool | None:
    """Whether an interval lies strictly inside ±margin; None without an interval."""
    return None if interval is None else -margin < interval[0] and interval[1] < margin


def noise_floor(m4b: Sequence[float], m5: Sequence[float]) -> dict:
    """abs(mean m4b - mean m5): two trainings of one function differ by run noise only, and a claim must exceed that."""
    a, b = _numbers(m4b, "m4b"), _numbers(m5, "m5")
    return {"value": float(abs(a.mean() - b.mean())), "n_m4b": len(a), "n_m5": len(b)}


# ---------------------------------------------------------------- families of tests


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Adjusted p of a declared family by Holm (1979), capped at 1; see `bonferroni`."""
    return _adjust(p_values, "holm")


def bonferroni(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """p times the size of the family, capped at 1. A test without a p (None) stays None, but counts as a member."""
    return _adjust(p_values, "bonferroni")


def _adjust(p_values: Mapping[str, float | None], method: str) -> dict[str, float | None]:
    for name, p in p_values.items():
        if p is not None and not 0 <= p <= 1:
            raise ValueError(f"{name}: p = {p} is no probability")
    if not p_values:
        return {}
    adjusted = multipletests([1.0 if p is None else p for p in p_values.values()], method=method)[1]
    return {name: None if p is None else float(q) for (name, p), q in zip(p_values.items(), adjusted)}


def _equal(x: np.ndarray) -> bool:
    """Whether all numbers are one number, but for rounding: what is left then is no spread."""
    return bool(np.ptp(x) <= 1e-12 * max(1.0, float(np.abs(x).max())))


def _numbers(values: Sequence[float], name: str, n: int | None = None) -> np.ndarray:
    """float64 [n]; ValueError for none, for another length than n, and for NaN or infinities."""
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name}: at least one number is needed, in one row")
    if n is not None and len(array) != n:
        raise ValueError(f"{name}: {len(array)} numbers for {n}; pairs are needed")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: number {int(np.flatnonzero(~np.isfinite(array))[0])} is not finite")
    return array
