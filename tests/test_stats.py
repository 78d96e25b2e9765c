"""The statistics against published values: R's documentation, scipy's, Newcombe 1998, Agresti, a public study's tests."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from analysis import stats

# R's data set `sleep` (Student 1908): extra hours of sleep of ten patients under two drugs
DRUG_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
DRUG_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
# R's help page of wilcox.test (Hollander & Wolfe 1973): depression scale of nine patients, first and second visit
VISIT_1 = [1.83, 0.50, 1.62, 2.48, 1.68, 1.88, 1.55, 3.06, 1.30]
VISIT_2 = [0.878, 0.647, 0.598, 2.05, 1.06, 1.29, 1.06, 3.14, 1.29]


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize(
    "correct, n, low, high",  # Newcombe 1998 (Statistics in Medicine 17:857), Table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson(correct, n, low, high):
    found = stats.wilson(correct, n)
    assert found["ci95"] == pytest.approx([low, high], abs=6e-5) and found["accuracy"] == pytest.approx(correct / n)
    assert (found["correct"], found["n"]) == (correct, n)


@pytest.mark.parametrize("correct, n", [(0, 0), (3, 2), (-1, 5)])
def test_no_accuracy_of_no_rows(correct, n):
    with pytest.raises(ValueError, match="at least one row"):
        stats.wilson(correct, n)


@pytest.mark.parametrize(
    "b, c, p",  # discordant rows and printed p of GitHub bmarti44/research-pipeline
    [
        (14, 12, 0.845),
        (120, 214, 3.0e-7),
        (122, 198, 2.5e-5),
        (235, 162, 2.9e-4),
        (139, 211, 1.4e-4),
        (10, 19, 0.136),
        (139, 124, 0.39),
        (141, 140, 1.0),
        (235, 156, 7.6e-5),
        (157, 193, 0.061),
    ],
)
def test_mcnemar_of_a_public_study(b, c, p):
    found = stats.mcnemar_counts(b, c, 1000)
    assert found["p_value"] == pytest.approx(p, rel=0.02)
    assert found["difference"] == (b - c) / 1000


def test_mcnemar_interval():
    """Agresti, Categorical Data Analysis (1990), approval of the prime minister, 1,600 asked twice: 4 points ± 1.96 x 0.95."""
    found = stats.mcnemar_counts(150, 86, 1600)
    assert found["difference"] == 0.04 and found["ci95"] == pytest.approx([0.0213, 0.0587], abs=1e-4)


def test_mcnemar_counts_rows():
    first = [True] * 7 + [False] * 3
    second = [True] * 4 + [False] * 4 + [True] * 2
    found = stats.mcnemar(first, second)
    assert (found["b"], found["c"], found["n"]) == (3, 2, 10)
    assert found == stats.mcnemar(np.array(first), np.array(second))
    same = stats.mcnemar(first, first)
    assert (same["p_value"], same["difference"], same["ci95"]) == (1.0, 0.0, [0.0, 0.0])


def test_mcnemar_refuses_accuracies():
    with pytest.raises(ValueError, match="not their accuracies"):
        stats.mcnemar(0.97, 0.966)
    with pytest.raises(ValueError, match="booleans"):
        stats.mcnemar([0.97, 0.96], [0.9, 0.8])
    with pytest.raises(ValueError, match="same rows"):
        stats.mcnemar([True], [True, False])
    with pytest.raises(ValueError, match="counts of rows"):
        stats.mcnemar_counts(0.97, 0.966, 500)
    with pytest.raises(ValueError, match="among at least one"):
        stats.mcnemar_counts(300, 300, 500)
    with pytest.raises(ValueError, match="among at least one"):
        stats.mcnemar([], [])


def test_wilcoxon_of_r():
    """R: wilcox.test(x, y, paired = TRUE, alternative = "greater") prints V = 40, p-value = 0.01953; two-sided: twice that."""
    found = stats.wilcoxon(VISIT_1, VISIT_2)
    assert (found["t_plus"], found["t_minus"], found["wilcoxon_stat"]) == (40, 5, 5)
    assert found["p_value"] == pytest.approx(2 * 0.01953, abs=2e-5)
    assert found["hodges_lehmann"] == pytest.approx(0.46)  # R, conf.int = TRUE: (pseudo)median
    assert found["rank_biserial"] == pytest.approx(35 / 45) and found["direction"] == 1
    # expected rank sum 9 * 10 / 4, variance 9 * 10 * 19 / 24
    assert found["z_score"] == pytest.approx((40 - 22.5) / 71.25**0.5)
    turned = stats.wilcoxon(VISIT_2, VISIT_1)
    assert turned["z_score"] == -found["z_score"] and turned["direction"] == -1 and turned["p_value"] == found["p_value"]


def test_wilcoxon_counts_ties_and_zeros():
    found = stats.wilcoxon([0, 0, 3, 1, -1, 5, 2], [0, 0, 0, 0, 0, 0, 0])
    assert (found["n"], found["n_zeros"], found["n_nonzero"], found["n_ties"]) == (7, 2, 5, 2)
    assert (found["t_plus"], found["t_minus"]) == (1.5 + 3 + 4 + 5, 1.5)
    assert found["median_diff"] == 1 and found["mean_diff"] == pytest.approx(10 / 7)


def test_direction_is_the_rank_sum_not_the_median():
    """Four small losses and three large gains: the median is negative, the rank sum is not."""
    found = stats.wilcoxon([-1, -2, -3, -4, 50, 60, 70], [0] * 7)
    assert found["median_diff"] < 0 < found["rank_biserial"] and found["direction"] == 1


@pytest.mark.parametrize(
    "plus, minus, r", [(281_714, 218_786, 0.1257), (273_814, 226_686, 0.0942), (271_317, 229_183, 0.0842), (3, 7, -0.4)]
)
def test_direction_of_published_rank_sums(plus, minus, r):
    found = stats.rank_biserial(plus, minus)
    assert found["rank_biserial"] == pytest.approx(r, abs=1e-4) and found["direction"] == (1 if plus > minus else -1)
    assert stats.rank_biserial(minus, plus)["direction"] == -found["direction"]


def test_wilcoxon_of_equal_scores_is_none_with_a_reason():
    found = stats.wilcoxon([1.0, 2.0], [1.0, 2.0])
    assert found["p_value"] is None and found["rank_biserial"] is None and found["direction"] == 0
    assert found["n_zeros"] == 2 and "zero" in found["reason"]
    with pytest.raises(ValueError, match="not both"):
        stats.rank_biserial(0, 0)
    assert stats.rank_biserial(5, 5)["direction"] == 0


def test_spearman():
    """scipy's documentation of spearmanr."""
    found = stats.spearman([1, 2, 3, 4, 5], [5, 6, 7, 8, 7])
    assert (found["rho"], found["p_value"]) == pytest.approx((0.8207826816681233, 0.08858700531354381))
    assert stats.spearman([1, 2, 3], [4, 4, 4])["rho"] is None and "constant" in stats.spearman([1, 2, 3], [4, 4, 4])["reason"]


# ---------------------------------------------------------------- bootstrap


def test_bootstrap_agrees_with_theory():
    """Mean of 400 coins: the interval is close to the normal one, mean ± 1.96 sd / sqrt(n)."""
    values = np.repeat([0.0, 1.0], [160, 240])
    found = stats.bootstrap_mean(values)
    half = 1.96 * (0.6 * 0.4 / 400) ** 0.5
    assert found["value"] == pytest.approx(0.6) and found["ci95"] == pytest.approx([0.6 - half, 0.6 + half], abs=0.004)
    assert found == stats.bootstrap_mean(values), "seeded"


def test_clusters_are_resampled_whole():
    """Each pair twice the same: as rows they look like twice the evidence, as clusters they are half the rows."""
    once = np.random.default_rng(0).normal(size=60)
    twice = np.repeat(once, 2)
    alone, rows = stats.bootstrap_mean(once), stats.bootstrap_mean(twice)
    clusters = stats.bootstrap_mean(twice, [f"pair {i // 2}" for i in range(120)])
    assert clusters["ci95"] == pytest.approx(alone["ci95"]) and (clusters["n"], clusters["n_clusters"]) == (120, 60)
    width = [found["ci95"][1] - found["ci95"][0] for found in (clusters, rows)]
    assert width[0] == pytest.approx(2**0.5 * width[1], rel=0.05)


def test_ratio_of_means_is_not_the_mean_of_ratios():
    found = stats.ratio_of_means([1.0, 1.0, 1.0, 0.02], [2.0, 2.0, 2.0, 0.001])
    assert found["value"] == pytest.approx(3.02 / 6.001)
    scaled = stats.ratio_of_means(np.linspace(1, 3, 50) * 0.25, np.linspace(1, 3, 50))
    assert scaled["ci95"] == pytest.approx([0.25, 0.25]), "numerator and denominator are resampled together"


def test_ratio_without_a_denominator_is_none():
    assert stats.ratio_of_means([1.0, 1.0], [1.0, -1.0])["value"] is None
    unsteady = stats.ratio_of_means([1.0, 1.0, 1.0], [4.0, -1.0, -1.0])
    assert unsteady["value"] == 1.5 and unsteady["ci95"] is None and "all resamples" in unsteady["reason"]
    assert stats.bootstrap_mean([3.0])["ci95"] is None
    with pytest.raises(ValueError, match="at least one"):
        stats.bootstrap_mean([])
    with pytest.raises(ValueError, match="not finite"):
        stats.bootstrap_mean([1.0, float("nan")])


# ---------------------------------------------------------------- seeds


def test_welch_of_r():
    """R: t.test(extra ~ group, data = sleep)."""
    found = stats.welch(DRUG_1, DRUG_2)
    assert found["t"] == pytest.approx(-1.8608, abs=5e-5) and found["df"] == pytest.approx(17.776, abs=5e-4)
    assert found["p_value"] == pytest.approx(0.07939, abs=5e-6)
    assert found["ci95"] == pytest.approx([-3.3654832, 0.2054832], abs=5e-8)
    assert (found["mean_first"], found["mean_second"]) == pytest.approx((0.75, 2.33))
    assert found["cohens_d"] == pytest.approx(-1.8608 / 5**0.5, abs=5e-5)  # equal sizes: d = t sqrt(2 / n)
    assert found["ci95"][0] < found["ci90"][0] < found["ci90"][1] < found["ci95"][1]


def test_paired_t_of_r():
    """R: with(sleep, t.test(extra[group == 1], extra[group == 2], paired = TRUE))."""
    found = stats.paired_t(DRUG_1, DRUG_2)
    assert found["t"] == pytest.approx(-4.0621, abs=5e-5) and found["df"] == 9
    assert found["p_value"] == pytest.approx(0.002833, abs=5e-7)
    assert found["ci95"] == pytest.approx([-2.4598858, -0.7001142], abs=5e-8)


def test_seed_interval_by_hand():
    """96, 97, 98: sd 1, standard error 0.57735; t at 97.5 % with 2 df 4.30265, at 95 % 2.91999 (any t table)."""
    found = stats.seed_interval([96, 97, 98])
    assert (found["mean"], found["sd"], found["n"]) == (97, 1, 3)
    assert found["ci95"] == pytest.approx([97 - 2.48414, 97 + 2.48414], abs=1e-5)
    assert found["ci90"] == pytest.approx([97 - 1.68586, 97 + 1.68586], abs=1e-5)


def test_equivalence_by_hand():
    """Means 97 and 96, both sd 1, n 3: standard error sqrt(2/3), df 4, t at 95 % 2.13185: 1 ± 1.74065."""
    first, second = [96, 97, 98], [95, 96, 97]
    found = stats.equivalence(first, second, 3)
    assert found["ci90"] == pytest.approx([1 - 1.74065, 1 + 1.74065], abs=1e-5) and found["equivalent"] is True
    # the larger p is that of (3 - 1) / 0.81650 = 2.44949 with 4 df: one-sided 0.03525
    assert found["p_value"] == pytest.approx(0.03525, abs=1e-5)
    for margin, equal in ((2.7, False), (2.8, True)):  # on both sides of 2.74065
        found = stats.equivalence(first, second, margin)
        assert found["equivalent"] is equal and (found["p_value"] < 0.05) is equal
    with pytest.raises(ValueError, match="margin"):
        stats.equivalence(first, second, 0)


def test_one_seed_has_no_interval():
    assert stats.seed_interval([97])["ci95"] is None and "one seed" in stats.seed_interval([97])["reason"]
    found = stats.welch([97], [96, 95])
    assert found["difference"] == 1.5 and found["ci95"] is None and found["p_value"] is None and "2" in found["reason"]
    assert stats.equivalence([97], [96, 95], 3)["equivalent"] is None
    assert stats.paired_t([97], [96])["ci95"] is None


def test_no_spread_has_no_p():
    found = stats.welch([97, 97, 97], [96, 96, 96])
    assert found["ci95"] == [1, 1] and found["p_value"] is None and found["cohens_d"] is None and found["reason"]
    assert stats.equivalence([97, 97, 97], [96, 96, 96], 3)["equivalent"] is True
    assert stats.seed_interval([0.1 + 0.2, 0.3, 0.3])["sd"] == 0
    assert stats.paired_t([1.1, 2.2, 3.3], [0.1, 1.2, 2.3])["p_value"] is None
    with pytest.raises(ValueError, match="pairs are needed"):
        stats.paired_t([1, 2], [1])


def test_noise_floor():
    assert stats.noise_floor([96, 98], [99, 99, 102]) == {"value": 3.0, "n_m4b": 2, "n_m5": 3}
    assert stats.noise_floor([99], [97])["value"] == stats.noise_floor([97], [99])["value"] == 2


# ---------------------------------------------------------------- families


def test_families():
    """R: p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm") and "bonferroni"."""
    family = dict(zip("abcde", (0.05, 0.01, 0.04, 0.02, 0.03)))
    assert stats.holm(family) == pytest.approx({"b": 0.05, "d": 0.08, "e": 0.09, "c": 0.09, "a": 0.09})
    assert stats.bonferroni(family) == pytest.approx({"b": 0.05, "d": 0.10, "e": 0.15, "c": 0.20, "a": 0.25})
    assert stats.bonferroni({"a": 0.4, "b": 0.5, "c": 0.9}) == {"a": 1, "b": 1, "c": 1}


def test_a_test_without_a_p_counts_as_a_member():
    assert stats.bonferroni({"a": 0.01, "b": None}) == {"a": pytest.approx(0.02), "b": None}
    assert stats.holm({}) == {}
    with pytest.raises(ValueError, match="b: p = 1.2"):
        stats.holm({"a": 0.1, "b": 1.2})


def test_statistics_and_verdict_need_no_torch():
    root = Path(__file__).resolve().parents[1]
    code = "import sys, analysis.stats, analysis.evidence, analysis.verdict; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
