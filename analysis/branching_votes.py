"""What K branches say together: votes, agreement, when to abstain, and how far their paths lie apart. No model here.

majority(["7", "8", "7", None, "8"])           # "7": the first seen of two with two votes
agreement(["7", "8", "7", None, "8"])          # 2/5; None is a branch without an answer: counted, and not voting
diversity(fed_KSD, branches=[0, 1, 2])         # {"d_k", "d_k_late", "d_k_normalized", "d_k_pairwise", "d_k_pair_labels"}
abstention(votes, num_branches=5)              # coverage and accuracy when only so many equal answers are an answer
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import numpy as np
from torch import Tensor

from analysis.stats import wilson

# ---------------------------------------------------------------- aggregators

Answers = Sequence[str | None]


def majority(answers: Answers, logprobs: Sequence[float | None] = ()) -> str | None:
    """The answer with the most votes, the first seen on ties; None where nobody has one."""
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes, key=votes.__getitem__, default=None)  # a Counter keeps the order, and max the first


def first(answers: Answers, logprobs: Sequence[float | None] = ()) -> str | None:
    """The answer of the first branch that has one."""
    return next((answer for answer in answers if answer is not None), None)


def logprob_mass(answers: Answers, logprobs: Sequence[float | None]) -> str | None:
    """The answer whose sequences are the most probable together: log-probabilities (nats) summed up in log space."""
    masses: dict[str, float] = {}
    for answer, logprob in zip(answers, logprobs, strict=True):
        if answer is not None:
            masses[answer] = float(np.logaddexp(masses.get(answer, -math.inf), logprob))
    return max(masses, key=masses.__getitem__, default=None)


AGGREGATORS = {"majority": majority, "first": first, "logprob_mass": logprob_mass}


def distribution(answers: Answers) -> dict[str, int]:
    """Votes by answer, in the order in which they were seen."""
    return dict(Counter(answer for answer in answers if answer is not None))


def agreement(answers: Answers) -> float:
    """Votes of the majority over all branches, failed ones included."""
    return max(distribution(answers).values(), default=0) / len(answers)


def canonical(answer: str | None, numbers: bool) -> str | None:
    """How an answer is counted: as it is, or for `numbers` by value, so that 72 and 72.0 are one."""
    if answer is None or not numbers:
        return answer
    try:
        value = float(answer)
    except ValueError:
        return answer
    return str(int(value)) if value.is_integer() else repr(value)


# ---------------------------------------------------------------- abstention


def abstention(votes: Sequence[tuple[int, bool]], num_branches: int) -> list[dict]:
    """What an answer is worth when it is given only at k or more equal votes, for k = 2 .. K.

    Args:
        votes: of each question how many branches agree on its majority answer, and whether that is right.

    Returns:
        [{"threshold" ("3/5"), "votes", "n", "answered", "coverage", "coverage_ci95", "correct", "accuracy", "ci95",
        "error"}], fractions with Wilson intervals; accuracy and error are of the answered ones, None where there are none.
    """
    curve = []
    for k in range(min(2, num_branches), num_branches + 1):
        right = [is_right for agreed, is_right in votes if agreed >= k]
        found = {"threshold": f"{k}/{num_branches}", "votes": k, "n": len(votes), "answered": len(right)}
        covered = wilson(len(right), len(votes)) if votes else {"accuracy": None, "ci95": None}
        found |= {"coverage": covered["accuracy"], "coverage_ci95": covered["ci95"]}
        level = wilson(sum(right), len(right)) if right else {"correct": 0, "accuracy": None, "ci95": None}
        found |= {key: level[key] for key in ("correct", "accuracy", "ci95")}
        curve.append(found | {"error": None if level["accuracy"] is None else 1 - level["accuracy"]})
    return curve


# ---------------------------------------------------------------- path diversity

D_K_FIELDS = ("d_k", "d_k_late", "d_k_normalized", "d_k_pairwise", "d_k_pair_labels")


def diversity(paths_KSD: Tensor, branches: Sequence[int]) -> dict:
    """How far apart K paths of S steps are, as L2 distances: mean over pairs of the mean over steps, `d_k`.

    `d_k_late` is over the last half of the steps (of an odd number the longer half; of one that one), `d_k_normalized` is
    d_k over the mean norm of all vectors, `d_k_pairwise` the pairs' means, and `d_k_pair_labels` their `branches`, "(0,1)".
    All None for fewer than two paths or no steps.
    """
    K, S = paths_KSD.shape[:2]
    if K < 2 or S == 0:
        return dict.fromkeys(D_K_FIELDS)
    paths = paths_KSD.double()
    pairs = list(combinations(range(K), 2))
    i, j = (list(side) for side in zip(*pairs))
    apart_PS = (paths[i] - paths[j]).norm(dim=-1)
    d_k, mean_norm = apart_PS.mean().item(), paths.norm(dim=-1).mean().item()
    return {
        "d_k": d_k,
        "d_k_late": apart_PS[:, S // 2 :].mean().item(),
        "d_k_normalized": d_k / mean_norm if mean_norm > 0 else None,
        "d_k_pairwise": apart_PS.mean(1).tolist(),
        "d_k_pair_labels": [f"({branches[a]},{branches[b]})" for a, b in pairs],
    }
