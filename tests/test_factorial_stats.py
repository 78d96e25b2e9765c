"""The statistics of A x B x C: known answers, power by the noncentral t, contrasts by hand, Holm's order, futility."""

import math

import numpy as np
import pytest

from analysis import factorial_stats as fs

SEEDS = (42, 123, 456, 789, 1001, 1234, 2345, 3456, 4567, 5678)
KNOWN = {
    "baseline": "2.444583 2.437631 2.438980 2.455048 2.447429 2.445737 2.437438 2.443799 2.459758 2.455696",
    "A": "2.353017 2.317839 2.318841 2.343735 2.329773 2.305478 2.304630 2.375795 2.302261 2.352535",
    "ABC": "2.290757 2.290202 2.264228 2.272467 2.282197 2.278384 2.274681 2.278889 2.275246 2.292592",
}
CELLS = {name: dict(zip(SEEDS, map(float, values.split()))) for name, values in KNOWN.items()}


def test_the_known_answers():
    expected = {  # t, d_z
        ("A", "baseline"): (-14.5855, -4.612),
        ("ABC", "baseline"): (-45.5306, -14.398),
        ("ABC", "A"): (-6.8465, -2.165),
    }
    found = {pair: fs.compare(CELLS[pair[0]], CELLS[pair[1]]) for pair in expected}
    for pair, (t, d_z) in expected.items():
        assert (found[pair]["t"], found[pair]["d_z"]) == pytest.approx((t, d_z), abs=1e-3) and found[pair]["df"] == 9
    first = found["A", "baseline"]
    assert first["ci95"] == pytest.approx([-0.1342, -0.0982], abs=1e-4)
    assert (first["welch"]["t"], first["welch"]["df"]) == pytest.approx((-14.0344, 10.79), abs=1e-2)
    assert first["welch"]["t"] == pytest.approx(-14.0344, abs=1e-3)
    assert found["ABC", "A"]["p_value"] == pytest.approx(7.5e-5, abs=1e-6)
    family = fs.holm_family({" - ".join(pair): test for pair, test in found.items()})
    assert [test["rejected"] for test in family.values()] == [True] * 3


def test_pairs_are_seeds_and_not_places():
    """Cells may list their seeds in any order, and have others besides."""
    turned = {seed: CELLS["A"][seed] for seed in reversed(SEEDS)} | {7: 99.0}
    assert fs.compare(turned, CELLS["baseline"]) == fs.compare(CELLS["A"], CELLS["baseline"])
    with pytest.raises(ValueError, match="no seed has both"):
        fs.compare({1: 2.0}, {2: 2.0})


def test_power_is_that_of_the_noncentral_t():
    assert round(100 * fs.paired_power(5)) == 14 and round(100 * fs.two_sample_power(5)) == 11
    assert fs.pairs_needed() == 34 and fs.runs_needed() == 64
    for n, d_z, d_third in ((5, 1.68, 2.29), (10, 1.00, 1.22), (20, 0.66, 0.78)):
        assert round(fs.detectable(n), 2) == d_z and round(fs.detectable(n, 0.05 / 3), 2) == d_third
        assert fs.paired_power(n, fs.detectable(n)) == pytest.approx(0.8, abs=1e-9)
    assert abs(fs.detectable(5) - 1.25) > 0.4, "the normal approximation is too optimistic"


def test_power_agrees_with_drawn_samples():
    """Where the far tail is none, too: two pairs and a huge effect."""
    rng = np.random.default_rng(0)
    for n, d_z in ((2, 11.55), (5, 1.0)):
        x = rng.normal(d_z, 1, (100_000, n))
        t = x.mean(1) / (x.std(1, ddof=1) / math.sqrt(n))
        limit = {2: 12.7062, 5: 2.77645}[n]
        assert fs.paired_power(n, d_z) == pytest.approx((abs(t) > limit).mean(), abs=0.01)


def test_power_is_told_before_training_in_plain_words():
    said = fs.power_text(5)
    for words in (
        "14 % paired, 11 %",
        "34 pairs",
        "64 runs",
        "n = 5: 1.68 (2.29)",
        "n = 10: 1.00 (1.22)",
        "n = 20: 0.66 (0.78)",
    ):
        assert words in said
    assert "one seed has no spread" in fs.power_text(1)


def design(effect, seeds=(0, 1, 2)) -> dict:
    """Cells whose value is effect(a, b, c, seed), with a, b, c 0 or 1."""
    return {name: {s: effect(*(int(f in name) for f in "ABC"), s) for s in seeds} for name in fs.CELLS}


def test_contrasts_of_added_effects():
    found = fs.contrasts(design(lambda a, b, c, seed: 10 + 2 * a + 3 * b - 5 * c + seed))
    assert list(found) == ["A", "B", "C", "A x B", "A x C", "B x C", "A x B x C"]
    for name, value in zip(found, (2, 3, -5, 0, 0, 0, 0)):
        assert list(found[name].values()) == pytest.approx([value] * 3), name


def test_contrasts_of_interacting_effects():
    """a b: 4 more where both are on. a b c: 8 more where all are."""
    two = fs.contrasts(design(lambda a, b, c, seed: 4 * a * b))
    assert {name: values[0] for name, values in two.items()} == {
        "A": 2, "B": 2, "C": 0, "A x B": 4, "A x C": 0, "B x C": 0, "A x B x C": 0,
    }  # fmt: skip
    three = fs.contrasts(design(lambda a, b, c, seed: 8 * a * b * c))
    assert three["A x B x C"][1] == 8 and three["A x B"][1] == 4 and three["A"][1] == 2
    with pytest.raises(ValueError, match="BC missing"):
        fs.contrasts({name: {0: 1.0} for name in fs.CELLS if name != "BC"})


def test_holm_stops_at_the_first_that_is_not_rejected():
    tests = {name: {"p_value": p} for name, p in {"late": 0.04, "first": 0.001, "second": 0.03}.items()}
    family = fs.holm_family(tests)
    assert [family[name]["rejected"] for name in ("first", "second", "late")] == [True, False, False]
    assert [family[name]["holm_step"] for name in ("first", "second", "late")] == pytest.approx([0.05 / 3, 0.025, 0.05])
    assert family["late"]["p_holm"] == pytest.approx(0.06), "0.04 meets 0.05, but not after 0.03 failed 0.025"
    alone = fs.holm_family({"a": {"p_value": 0.02}}, declared=["a", "b", "c"])
    assert alone["a"]["p_holm"] == pytest.approx(0.06) and list(alone) == ["a"], "a family does not shrink by what is missing"
    assert fs.holm_family({"a": {"p_value": None}})["a"]["rejected"] is None


def test_futility():
    flat = {"n": 5, "ci95": [-1.0, 1.0], "d_z": 0.05, "reason": None}
    assert fs.futility(flat)["stop"]
    assert not fs.futility(flat | {"n": 4})["stop"], "not before five seeds"
    assert not fs.futility(flat | {"d_z": -0.1})["stop"] and not fs.futility(flat | {"ci95": [0.1, 1.0]})["stop"]
    equal = {"n": 5, "ci95": [0.0, 0.0], "d_z": None, "reason": "all differences are equal"}
    assert fs.futility(equal)["stop"] and not fs.futility(equal | {"ci95": [0.2, 0.2]})["stop"]


def test_a_whole_analysis_and_one_with_cells_missing():
    rng = np.random.default_rng(1)
    noise = {(name, s): rng.normal(0, 0.01) for name in fs.CELLS for s in range(6)}
    cells = {
        name: {s: 3 - 0.5 * ("A" in name) + 0.1 * s + noise[name, s] for s in range(6)} for name in fs.CELLS
    }  # A alone brings something
    found = fs.analyse(cells)
    assert list(found["primary"]) == ["ABC - baseline"] and found["primary"]["ABC - baseline"]["rejected"]
    assert list(found["family_1"]) == ["ABC - AB", "ABC - AC", "ABC - BC"]
    assert [test["rejected"] for test in found["family_1"].values()] == [False, False, True]
    assert {name for name, test in found["family_2"].items() if test["rejected"]} == {"A"} and len(found["family_2"]) == 7
    assert len(found["against_baseline"]) == 7 and not found["missing"] and not found["futility"]["stop"]
    few = fs.analyse({name: cells[name] for name in ("baseline", "A", "BC")})
    assert not few["primary"] and not few["family_2"] and "ABC - BC" in few["missing"] and not few["futility"]["stop"]
    assert list(few["against_baseline"]) == ["A - baseline", "BC - baseline"]
