"""Votes, abstention and path diversity against cases worked out by hand."""

import math

import pytest
import torch

from analysis.branching_votes import (
    AGGREGATORS,
    abstention,
    agreement,
    canonical,
    distribution,
    diversity,
    first,
    logprob_mass,
    majority,
)
from analysis.stats import wilson


def test_ties_go_to_the_first_seen():
    assert majority(["b", "a", "a", "b", None]) == "b" and majority(["a", "b", "b", "a", None]) == "a"
    assert majority([None, "c", "a", "a"]) == "a" and majority([None, None]) is None and majority([]) is None
    assert list(distribution(["b", None, "a", "b"]).items()) == [("b", 2), ("a", 1)]


def test_failed_branches_count_for_agreement_and_do_not_vote():
    assert agreement(["a", "a", None, "b", None]) == 2 / 5 and agreement(["a"] * 5) == 1 and agreement([None] * 5) == 0
    assert majority([None, None, None, "a", "b"]) == "a" and None not in distribution([None, "a"])


def test_the_aggregators_really_differ():
    """The first says x, most say y, and z alone is more probable than all of them together."""
    answers, logprobs = ["x", "y", "y", "z", None], [-5.0, -4.0, -4.0, -1.0, None]
    assert {name: choose(answers, logprobs) for name, choose in AGGREGATORS.items()} == {
        "majority": "y", "first": "x", "logprob_mass": "z"
    }  # fmt: skip
    assert first([None, "q", "y"], []) == "q"
    assert logprob_mass([None], [None]) is None


def test_probabilities_of_an_answer_are_summed():
    """Two sequences of 0.3 beat one of 0.5; far below float's range as well."""
    for shift in (0.0, -2000.0):
        logprobs = [math.log(0.5) + shift, math.log(0.3) + shift, math.log(0.3) + shift]
        assert logprob_mass(["one", "two", "two"], logprobs) == "two"
    assert logprob_mass(["one", "two", "two"], [math.log(p) for p in (0.5, 0.2, 0.2)]) == "one"


def test_numbers_vote_by_value():
    assert [canonical(x, True) for x in ("72.0", "72", "0.5", "no", None)] == ["72", "72", "0.5", "no", None]
    assert canonical("72.0", False) == "72.0"


def test_abstention_by_hand():
    """Ten questions: four unanimous and right, two of 4/5 of which one is right, three of 2/5 and wrong, one of 1/5, right."""
    votes = [(5, True)] * 4 + [(4, True), (4, False)] + [(2, False)] * 3 + [(1, True)]
    curve = {point["threshold"]: point for point in abstention(votes, 5)}
    assert list(curve) == ["2/5", "3/5", "4/5", "5/5"]
    assert [p["coverage"] for p in curve.values()] == [0.9, 0.6, 0.6, 0.4]
    assert [p["correct"] for p in curve.values()] == [5, 5, 5, 4]
    assert [p["accuracy"] for p in curve.values()] == pytest.approx([5 / 9, 5 / 6, 5 / 6, 1])
    assert [p["error"] for p in curve.values()] == pytest.approx([4 / 9, 1 / 6, 1 / 6, 0])
    assert curve["4/5"]["ci95"] == wilson(5, 6)["ci95"] and curve["4/5"]["coverage_ci95"] == wilson(6, 10)["ci95"]
    nobody = abstention([(1, False)], 3)[-1]
    assert nobody["coverage"] == 0 and nobody["answered"] == 0 and nobody["accuracy"] is None and nobody["error"] is None


def test_diversity_by_hand():
    """Three paths of three steps in the plane: 0 and 1 are 3, 4 and 0 apart, 0 and 2 are 0, 1 and 2, 1 and 2 are 3, 5 and 2."""
    zero = [[0.0, 1.0], [2.0, 0.0], [1.0, 1.0]]
    one = [[3.0, 1.0], [2.0, 4.0], [1.0, 1.0]]
    two = [[0.0, 1.0], [2.0, -1.0], [3.0, 1.0]]
    found = diversity(torch.tensor([zero, one, two]), [0, 1, 4])
    assert found["d_k_pair_labels"] == ["(0,1)", "(0,4)", "(1,4)"]
    assert found["d_k_pairwise"] == pytest.approx([7 / 3, 1.0, 10 / 3])
    assert found["d_k"] == pytest.approx((7 / 3 + 1 + 10 / 3) / 3)
    assert found["d_k_late"] == pytest.approx((4 / 2 + 3 / 2 + 7 / 2) / 3), "of three steps the last two"
    norms = [math.hypot(*x) for path in (zero, one, two) for x in path]
    assert found["d_k_normalized"] == pytest.approx(found["d_k"] / (sum(norms) / 9))
    four = diversity(torch.arange(8.0).view(2, 4, 1).square(), [0, 1])
    assert four["d_k_late"] == pytest.approx((36 - 4 + 49 - 9) / 2), "of four steps the last two"
    single = diversity(torch.tensor([zero, one])[:, :1], [0, 1])
    assert single["d_k_late"] == single["d_k"] == 3


def test_no_pairs_or_no_steps_have_no_diversity():
    for paths in (torch.zeros(1, 4, 3), torch.zeros(5, 0, 3), torch.zeros(0, 0, 1)):
        found = diversity(paths, list(range(len(paths))))
        assert list(found) == ["d_k", "d_k_late", "d_k_normalized", "d_k_pairwise", "d_k_pair_labels"]
        assert set(found.values()) == {None}
    assert diversity(torch.zeros(2, 3, 4), [0, 1])["d_k"] == 0
