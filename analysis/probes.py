"""Probes: classifiers that try to read a label off states, and what their accuracy is worth. No torch.

    fold = folds(labels)                                # 5 of them, stratified, shuffled, seed 42
    probe = LinearProbe(states_ND, fold)                # any number of labels may follow
    right = probe.predict(labels) == labels             # bool [N], each row predicted by the fold that left it out
    null = probe.null(labels, shuffles(labels, fold, 5_000, seed=0))
    p = p_value(right.sum(), null)

A linear probe standardises on the training rows and fits a ridge classifier there (Hoerl & Kennard 1970): least squares on
one column a class, the largest score wins. The penalty is chosen on the training rows alone by generalised cross-validation
(Golub, Heath & Wahba 1979), the closed form of leaving one row out with all leverages equal. Scores are linear in the
labels, so one decomposition of a fold's states serves every labelling: thousands of shuffles are matrix products and each
goes through the same choice of the penalty, with the same folds, as the true labels do.

Shape letters: N rows, M training rows of a fold, H rows left out, D width, R rank, C classes, S labellings, A penalties.
"""

import hashlib
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

N_FOLDS, FOLD_SEED = 5, 42
LEAST_MEMBERS = 5  # rows of a class, so that every fold can hold one
PENALTIES = (1.0, 1e1, 1e2, 1e3, 1e4, 1e5)
CHUNK = 4_000_000  # numbers of a one-hot table made at a time

MLP = {"hidden_layer_sizes": (256,), "max_iter": 1000, "validation_fraction": 0.1, "n_iter_no_change": 10}
GRID_MLP = {"max_iter": 2000, "validation_fraction": 0.15, "n_iter_no_change": 20, "batch_size": 64}
GRID = {
    "hidden_layer_sizes": [(64,), (128,), (256,), (512,), (128, 64), (256, 128)],
    "learning_rate_init": [1e-4, 1e-3, 1e-2],
    "alpha": [1e-4, 1e-3, 1e-2, 1e-1],
}


# ---------------------------------------------------------------- rows, classes, folds


def frequent(labels: Sequence, least: int = LEAST_MEMBERS) -> np.ndarray:
    """bool [N]: rows whose class has at least `least` members."""
    counts = Counter(labels)
    return np.array([counts[label] >= least for label in labels], dtype=bool)


def codes(labels: Sequence) -> np.ndarray:
    """Classes as numbers 0 .. C-1, int64 [N], in alphabetical order."""
    return np.unique(np.asarray(labels), return_inverse=True)[1]


def folds(strata: Sequence) -> np.ndarray:
    """The fold that leaves a row out, int64 [N]: 5 folds in which every stratum has its share, shuffled with seed 42."""
    fold = np.empty(len(strata), dtype=np.int64)
    splitter = StratifiedKFold(N_FOLDS, shuffle=True, random_state=FOLD_SEED)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")  # it misses some folds, as it must
        for number, (_, left_out) in enumerate(splitter.split(np.zeros(len(strata)), strata)):
            fold[left_out] = number
    return fold


def shuffles(y: np.ndarray, fold: np.ndarray, n: int, seed: int) -> np.ndarray:
    """`n` random labellings [S, N]: labels change places within their folds.

    Folds were balanced on the true labels; a shuffle across folds would undo that, and be compared with a little less than
    what it stands for. Within folds every labelling is as likely as the true one if states say nothing: an exact test.
    """
    rng, shuffled = np.random.default_rng(np.random.SeedSequence((seed, len(y)))), np.tile(y, (n, 1))
    for number in np.unique(fold):
        here = np.flatnonzero(fold == number)
        shuffled[:, here] = rng.permuted(shuffled[:, here], axis=1)
    return shuffled


def p_value(n_right: int, null: np.ndarray) -> float:
    """(c + 1) / (S + 1), c = shuffles that are right as often or more (Phipson & Smyth 2010)."""
    return float((np.sum(null >= n_right) + 1) / (len(null) + 1))


# ---------------------------------------------------------------- the linear probe


class LinearProbe:
    """Ridge classifiers on one table of states, for any labels of its rows; see the module.

    Args:
        states_ND: the states.
        fold: the fold that leaves each row out, int [N].
        penalty: fixed; None chooses among PENALTIES on the training rows of each fold.
    """

    def __init__(self, states_ND: np.ndarray, fold: np.ndarray, penalty: float | None = None):
        self.n, self.penalties = len(fold), np.array([penalty] if penalty is not None else PENALTIES)
        states_ND = np.asarray(states_ND, dtype=np.float64)
        self.folds = [_Fold(states_ND, fold == number, self.penalties) for number in np.unique(fold)]

    def predict(self, y: np.ndarray) -> np.ndarray:
        """The class of every row, int [N], predicted by the fold that left it out. `y`: class numbers [N]."""
        return self._predict(y[None])[0]

    def chosen(self, y: np.ndarray) -> list[float]:
        """The penalty of each fold."""
        return [float(self.penalties[fold.scores(*_one_hot(y[None, fold.train]))[1][0]]) for fold in self.folds]

    def null(self, y: np.ndarray, shuffled_SN: np.ndarray) -> np.ndarray:
        """How many rows are predicted right under each labelling, int64 [S]."""
        size = max(1, CHUNK // (self.n * (int(y.max()) + 1)))
        parts = (shuffled_SN[i : i + size] for i in range(0, len(shuffled_SN), size))
        return np.concatenate([(self._predict(part) == part).sum(1) for part in parts])

    def _predict(self, y_SN: np.ndarray) -> np.ndarray:
        predicted_SN = np.empty_like(y_SN)
        n_classes = int(y_SN.max()) + 1
        for fold in self.folds:
            scores_HSC, _ = fold.scores(*_one_hot(y_SN[:, fold.train], n_classes))
            predicted_SN[:, fold.left_out] = scores_HSC.argmax(2).T
        return predicted_SN


def _one_hot(y_SM: np.ndarray, n_classes: int | None = None) -> tuple[np.ndarray, int, int]:
    """One column a labelling and class, float32 [M, S * C], with S and C."""
    n, m = y_SM.shape
    n_classes = n_classes or int(y_SM.max()) + 1
    table = np.zeros((m, n * n_classes), dtype=np.float32)
    table[np.arange(m), y_SM + n_classes * np.arange(n)[:, None]] = 1
    return table, n, n_classes


class _Fold:
    """One fold's standardised states, decomposed: what turns labels of the training rows into scores of those left out.

    With X the centred training states = U diag(sqrt(l)) V', scores are mean(Y) + X_out V diag(sqrt(l) / (l + a)) U' Y.
    """

    def __init__(self, states_ND: np.ndarray, left_out: np.ndarray, penalties: np.ndarray):
        self.train, self.left_out = np.flatnonzero(~left_out), np.flatnonzero(left_out)
        scaler = StandardScaler().fit(states_ND[self.train])
        x_MD, out_HD = (scaler.transform(states_ND[rows]) for rows in (self.train, self.left_out))
        wide = x_MD.shape[1] >= len(x_MD)
        l_R, v = np.linalg.eigh(x_MD @ x_MD.T if wide else x_MD.T @ x_MD)
        seen = l_R > max(x_MD.shape) * np.finfo(np.float64).eps * max(l_R.max(), 1.0)
        l_R, v = l_R[seen], v[:, seen]
        u_MR, out_HR = (v, out_HD @ (x_MD.T @ v)) if wide else (x_MD @ v / np.sqrt(l_R), out_HD @ v * np.sqrt(l_R))
        self.u_RM, self.out_HR = u_MR.T.astype(np.float32), out_HR.astype(np.float32)
        self.shrink_RA = 1 / (l_R[:, None] + penalties)
        self.left_RA = penalties * self.shrink_RA  # the share of a direction that stays in the residual
        self.freedom_A = len(x_MD) - 1 - (1 - self.left_RA).sum(0)

    def scores(self, table: np.ndarray, n: int, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores of the rows left out, [H, S, C], and which penalty each labelling chose, [S]."""
        mean_SC = table.mean(0, dtype=np.float64)
        z_RSC = (self.u_RM @ table).reshape(len(self.u_RM), n, n_classes)
        chosen_S = np.zeros(n, dtype=np.int64)
        if len(self.freedom_A) > 1:
            power_RS = np.einsum("rsc,rsc->rs", z_RSC, z_RSC).astype(np.float64)
            total_S = len(table) * (1 - (mean_SC.reshape(n, n_classes) ** 2).sum(1))
            residual_SA = total_S[:, None] - power_RS.T @ (1 - self.left_RA**2)
            chosen_S = (residual_SA / self.freedom_A**2).argmin(1)
        z_RSC *= self.shrink_RA[:, chosen_S].astype(np.float32)[:, :, None]
        scores = self.out_HR @ z_RSC.reshape(len(z_RSC), n * n_classes) + mean_SC.astype(np.float32)
        return scores.reshape(len(self.left_out), n, n_classes), chosen_S


def majority(y: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """int [N]: the most frequent class of the training rows, which is what states that say nothing are worth."""
    predicted = np.empty_like(y)
    for number in np.unique(fold):
        predicted[fold == number] = np.bincount(y[fold != number]).argmax()
    return predicted


def synthetic_clusters(seed: int = 0) -> float:
    """Accuracy of the linear probe on 10 clusters of 50 points in 768 dimensions: the instrument's own check, above 0.99."""
    rng, y = np.random.default_rng(seed), np.repeat(np.arange(10), 50)
    points = rng.standard_normal((10, 768))[y] + rng.standard_normal((500, 768))
    return float((LinearProbe(points, folds(y)).predict(y) == y).mean())


# ---------------------------------------------------------------- the non-linear probe


def mlp_probe(states_ND: np.ndarray, y: np.ndarray, fold: np.ndarray, **changes) -> dict:
    """One hidden layer of 256, ReLU, stopped early: {"right": rows or None, "converged", "loss_curves": one a fold}.

    `right` is None where a fold reached the last iteration without stopping.
    """
    right, curves, converged = 0, [], True
    for number in np.unique(fold):
        train, model = fold != number, _mlp(MLP | changes)
        model.fit(states_ND[train], y[train])
        right += int((model.predict(states_ND[~train]) == y[~train]).sum())
        curves.append([round(float(loss), 4) for loss in model[-1].loss_curve_])
        converged &= model[-1].n_iter_ < model[-1].max_iter
    return {"right": right if converged else None, "converged": bool(converged), "loss_curves": curves}


def mlp_grid(states_ND: np.ndarray, y: np.ndarray, fold: np.ndarray, grid: dict | None = None, jobs: int = 1) -> dict:
    """As `mlp_probe`, with the settings of each fold chosen among 72 by 3-fold cross-validation inside its training rows."""
    right, chosen, converged = 0, [], True
    inner = StratifiedKFold(3, shuffle=True, random_state=FOLD_SEED)
    settings = {f"mlpclassifier__{key}": values for key, values in (grid or GRID).items()}
    for number in np.unique(fold):
        train = fold != number
        search = GridSearchCV(_mlp(GRID_MLP), settings, cv=inner, n_jobs=jobs).fit(states_ND[train], y[train])
        right += int((search.predict(states_ND[~train]) == y[~train]).sum())
        best = search.best_estimator_[-1]
        chosen.append({key.removeprefix("mlpclassifier__"): value for key, value in search.best_params_.items()})
        converged &= best.n_iter_ < best.max_iter
    return {"right": right if converged else None, "converged": bool(converged), "chosen": chosen}


def _mlp(settings: dict):
    return make_pipeline(StandardScaler(), MLPClassifier(early_stopping=True, random_state=FOLD_SEED, **settings))


# ---------------------------------------------------------------- comparing probes


@dataclass(frozen=True)
class Score:
    """What a probe got right, and on which rows and folds: scores of other rows or folds cannot be subtracted."""

    right: int
    n: int
    rows: str  # see `fingerprint`

    @property
    def accuracy(self) -> float:
        return self.right / self.n

    def __sub__(self, other: "Score") -> float:
        assert (self.n, self.rows) == (other.n, other.rows), "probes on different rows or folds cannot be compared"
        return self.accuracy - other.accuracy


def fingerprint(rows: np.ndarray, fold: np.ndarray) -> str:
    """A short name of these row ids in these folds."""
    both = np.stack([rows, fold]).astype(np.int64)
    return hashlib.sha256(both.tobytes()).hexdigest()[:16]


def selectivity(scores: Sequence[Score], own: int) -> float:
    """Accuracy for the own step minus the best for any other, on identical rows and folds (after Hewitt & Liang 2019)."""
    return min(scores[own] - other for step, other in enumerate(scores) if step != own)
