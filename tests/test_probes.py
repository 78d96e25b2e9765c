"""Probes against scikit-learn's estimators and slow references, on states whose content is known."""

import numpy as np
import pytest
from scipy.stats import kstest
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from analysis import probes
from analysis.probes import LinearProbe, Score, codes, folds, frequent, majority, p_value, selectivity, shuffles

SHAPES = [(60, 8, 4), (45, 80, 3), (50, 12, 2)]  # rows, width, classes: tall, wide, two classes


def coded(n: int, width: int, n_classes: int, strength: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a code of the class in it, on axes of unlike scale, and the classes."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % n_classes)
    states = rng.standard_normal((n, width)) + strength * rng.standard_normal((n_classes, width))[y]
    return states * rng.uniform(0.1, 10, width) + 3, y


def by_sklearn(states, y, fold, penalties) -> np.ndarray:
    predicted = np.empty_like(y)
    for number, penalty in enumerate(penalties):
        train = fold != number
        model = make_pipeline(StandardScaler(), RidgeClassifier(alpha=penalty)).fit(states[train], y[train])
        predicted[~train] = model.predict(states[~train])
    return predicted


def slow_penalty(states, y, grid) -> float:
    """Generalised cross-validation written out with the hat matrix."""
    x = StandardScaler().fit_transform(states)
    n, errors = len(y), []
    targets = np.eye(y.max() + 1)[y]
    for penalty in grid:
        hat = np.full((n, n), 1 / n) + x @ np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T)
        residual = targets - hat @ targets
        errors.append((residual**2).sum() / (n - np.trace(hat)) ** 2)
    return grid[int(np.argmin(errors))]


# ---------------------------------------------------------------- the estimator


def test_clusters_are_read_and_foreign_labels_are_not():
    assert probes.synthetic_clusters() > 0.99
    states, y = coded(500, 768, 10)
    fold = folds(y)
    probe = LinearProbe(states, fold)
    assert (probe.predict(y) == y).mean() > 0.99
    foreign = shuffles(y, fold, 1, seed=3)[0]
    assert (probe.predict(foreign) == foreign).mean() < 0.2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("penalty", [1.0, 50.0])
def test_every_shuffle_is_predicted_as_by_the_library(shape, penalty):
    states, y = coded(*shape)
    fold = folds(y)
    probe = LinearProbe(states, fold, penalty)
    for labels in (y, *shuffles(y, fold, 12, seed=0)):
        assert probe.predict(labels).tolist() == by_sklearn(states, labels, fold, [penalty] * 5).tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_penalty_is_chosen_inside_training_folds_for_every_shuffle(shape):
    states, y = coded(*shape, strength=0.4)
    fold, chosen = folds(y), set()
    probe = LinearProbe(states, fold)
    for labels in (y, *shuffles(y, fold, 8, seed=1)):
        penalties = [slow_penalty(states[fold != k], labels[fold != k], probes.PENALTIES) for k in range(5)]
        assert probe.chosen(labels) == penalties
        assert probe.predict(labels).tolist() == by_sklearn(states, labels, fold, penalties).tolist()
        chosen |= set(penalties)
    assert len(chosen) > 1, "labels that all choose alike test no choice"


@pytest.mark.parametrize("penalty", [None, 1.0])
def test_the_null_is_the_slow_one(penalty, monkeypatch):
    """All shuffles at once, in several chunks, equal one estimator a shuffle."""
    states, y = coded(48, 20, 4, strength=0.3)
    fold = folds(y)
    probe, shuffled = LinearProbe(states, fold, penalty), shuffles(y, fold, 25, seed=2)
    monkeypatch.setattr(probes, "CHUNK", 48 * 4 * 7)
    slow = [(by_sklearn(states, labels, fold, probe.chosen(labels)) == labels).sum() for labels in shuffled]
    assert probe.null(y, shuffled).tolist() == slow
    assert len(set(slow)) > 3


def test_states_that_say_nothing_are_worth_the_majority():
    y = np.array([0] * 30 + [1] * 10 + [2] * 10)
    fold = folds(y)
    predicted = LinearProbe(np.full((50, 6), 0.7, np.float32), fold).predict(y)
    assert predicted.tolist() == majority(y, fold).tolist() == [0] * 50


def test_a_class_that_training_lacks_is_never_said():
    states, y = coded(40, 5, 3)
    y[0] = 3  # alone: the fold that leaves it out does not know it
    predicted = LinearProbe(states, folds(y % 3)).predict(y)
    assert predicted[0] != 3


# ---------------------------------------------------------------- the null


def test_shuffles_keep_the_balance_of_folds():
    y = np.repeat(np.arange(4), [5, 8, 12, 25])
    fold = folds(y)
    shuffled = shuffles(y, fold, 20, seed=0)
    for labels in shuffled:
        for number in range(5):
            assert sorted(labels[fold == number]) == sorted(y[fold == number])
    assert len({tuple(labels) for labels in shuffled}) == 20
    assert (shuffled == shuffles(y, fold, 20, seed=0)).all() and (shuffled != shuffles(y, fold, 20, seed=1)).any()


def test_p_counts_ties_and_itself():
    assert p_value(5, np.array([3, 5, 9, 4])) == 3 / 5
    assert p_value(10, np.array([3, 5, 9, 4])) == 1 / 5


def test_random_labels_give_uniform_p_values():
    rng, found = np.random.default_rng(7), []
    for _ in range(80):
        states, y = rng.standard_normal((60, 10)), rng.permutation(np.arange(60) % 3)
        fold = folds(y)
        probe = LinearProbe(states, fold)
        found.append(p_value((probe.predict(y) == y).sum(), probe.null(y, shuffles(y, fold, 99, seed=0))))
    assert kstest(found, "uniform").pvalue > 0.001 and 0.4 < np.mean(found) < 0.62
    assert np.mean(np.array(found) <= 0.1) < 0.2


def test_a_planted_code_is_beyond_all_shuffles():
    states, y = coded(90, 30, 3, strength=1.0)
    fold = folds(y)
    probe = LinearProbe(states, fold)
    assert p_value((probe.predict(y) == y).sum(), probe.null(y, shuffles(y, fold, 200, seed=0))) == 1 / 201


# ---------------------------------------------------------------- rows and folds


def test_folds_are_stratified_shuffled_and_of_seed_42():
    y = np.repeat(np.arange(3), [10, 15, 25])
    fold = folds(y)
    splits = StratifiedKFold(5, shuffle=True, random_state=42).split(y, y)
    assert all(np.flatnonzero(fold == k).tolist() == left_out.tolist() for k, (_, left_out) in enumerate(splits))
    assert all(np.bincount(y[fold == k]).tolist() == [2, 3, 5] for k in range(5))


def test_rare_classes_are_those_of_fewer_than_five():
    labels = ["impus"] * 5 + ["rompus"] * 4 + ["yimpus"] * 6
    assert frequent(labels).tolist() == [True] * 5 + [False] * 4 + [True] * 6
    assert codes(["b", "a", "b", "c"]).tolist() == [1, 0, 1, 2]


def test_scores_of_other_rows_or_folds_cannot_be_compared():
    rows, fold = np.arange(40), np.arange(40) % 5
    here = probes.fingerprint(rows, fold)
    scores = [Score(30, 40, here), Score(20, 40, here), Score(26, 40, here)]
    assert selectivity(scores, 0) == pytest.approx(4 / 40) and selectivity(scores, 1) == pytest.approx(-10 / 40)
    for other in (probes.fingerprint(rows + 1, fold), probes.fingerprint(rows, np.roll(fold, 1))):
        with pytest.raises(AssertionError, match="different rows"):
            selectivity([scores[0], Score(20, 40, other)], 0)


# ---------------------------------------------------------------- non-linear probes


def test_an_mlp_reads_what_no_line_divides():
    rng = np.random.default_rng(0)
    states = rng.choice([-1.0, 1.0], (400, 2)) + 0.1 * rng.standard_normal((400, 2))
    y = (states[:, 0] * states[:, 1] > 0).astype(int)
    fold = folds(y)
    assert (LinearProbe(states, fold).predict(y) == y).mean() < 0.7
    found = probes.mlp_probe(states, y, fold)
    assert found["converged"] and found["right"] > 380
    assert len(found["loss_curves"]) == 5 and all(curve[-1] < curve[0] for curve in found["loss_curves"])


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_an_mlp_that_did_not_converge_is_no_number():
    states, y = coded(60, 5, 2)
    found = probes.mlp_probe(states, y, folds(y), max_iter=3)
    assert found["right"] is None and not found["converged"]
    assert [len(curve) for curve in found["loss_curves"]] == [3] * 5


@pytest.mark.filterwarnings("ignore:Got `batch_size`")
def test_the_grid_is_the_one_announced_and_chooses_inside_training_folds():
    assert np.prod([len(values) for values in probes.GRID.values()]) == 72
    states, y = coded(100, 20, 2, strength=4.0)
    grid = {"hidden_layer_sizes": [(32,)], "learning_rate_init": [1e-6, 1e-2], "alpha": [1e-4]}
    found = probes.mlp_grid(states, y, folds(y), grid)
    assert found["right"] > 90
    assert [fold["learning_rate_init"] for fold in found["chosen"]] == [1e-2] * 5
