"""Edits for the one hook of the wrapper: put vectors in place of states, add noise, record; each aims at tokens, not columns.

A position counts the tokens of a row's own prompt, so an edit means the same at any padding and in any batch, and thought
slots are positions like others. Edits act on prompts only, not on what is said behind them.

    edit = Patch(0, slots_PK, vectors_PKD)                # layer 0: what fills the slots, for the prompts with ids 0 .. P-1
    edit = Patch(6, slots_PK, noise_PKD, add=True)        # noise on the output of block 6
    edit = chain(edit, other)

For thoughts that read hidden states, two experiments differ (`replay`: all slots are given, also those that keep their clean
vectors; `recompute`: only some are given and later thoughts follow from them). Both are a Patch: with all, or some, positions.

Shape letters: P prompts, K positions, B rows of a pass, C columns of a pass, D width.
"""

import numpy as np
import torch
from torch import Tensor

NOWHERE = -1  # a position that is not used


class Patch:
    """Replace (or with `add` shift) the states of a layer at given positions.

    Args:
        layer: 0 = the embeddings as fed, before positions are added; i = the output of block i.
        positions_PK: int64, for each prompt id its positions, NOWHERE where fewer than K.
        values_PKD: what to put there.
    """

    def __init__(self, layer: int, positions_PK: Tensor, values_PKD: Tensor, add: bool = False):
        assert positions_PK.shape == values_PKD.shape[:2], (positions_PK.shape, values_PKD.shape)
        self.layer, self.layers = layer, (layer,)
        self.positions_PK, self.values_PKD, self.add = positions_PK.cpu(), values_PKD, add
        self.n_hit = 0  # states replaced so far, so that a caller can tell that the edit met what it aimed at

    def __call__(self, layer: int, pass_, x_BCD: Tensor) -> Tensor | None:
        if layer != self.layer:
            return None
        row_B, k_B, column_B = hits(pass_, self.positions_PK)
        if not len(row_B):
            return None
        if not pass_.again:
            self.n_hit += len(row_B)
        values = self.values_PKD[torch.tensor(pass_.row_ids)[row_B], k_B].to(x_BCD)
        x_BCD = x_BCD.clone()
        row_B, column_B = row_B.to(x_BCD.device), column_B.to(x_BCD.device)
        x_BCD[row_B, column_B] = x_BCD[row_B, column_B] + values if self.add else values
        return x_BCD


class Recorder:
    """Keep the states of some layers at given positions: `states[layer]` is [P, K, D], zero at NOWHERE.

    Layer 0 is recorded as fed, before positions are added.
    """

    def __init__(self, layers, positions_PK: Tensor, width: int, dtype=torch.float32):
        self.layers, self.positions_PK = tuple(layers), positions_PK.cpu()
        self.states = {layer: torch.zeros(*positions_PK.shape, width, dtype=dtype) for layer in self.layers}

    def __call__(self, layer: int, pass_, x_BCD: Tensor) -> None:
        if layer in self.states:
            self.take(layer, pass_, x_BCD)

    def take(self, layer: int, pass_, x_BCD: Tensor) -> None:
        """Record the columns of a pass."""
        row_B, k_B, column_B = hits(pass_, self.positions_PK)
        if len(row_B):
            states = x_BCD[row_B.to(x_BCD.device), column_B.to(x_BCD.device)].detach()
            self.states[layer][torch.tensor(pass_.row_ids)[row_B], k_B] = states.to("cpu", self.states[layer].dtype)


def hits(pass_, positions_PK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which positions a pass holds: row of the pass, k, and column of the pass, each int64 [hits]."""
    if pass_.begins is None:
        return (torch.empty(0, dtype=torch.long),) * 3
    positions_BK = positions_PK[torch.tensor(pass_.row_ids)]
    column_BK = pass_.begins[:, None] + positions_BK - pass_.start
    inside_BK = (positions_BK != NOWHERE) & (column_BK >= 0) & (column_BK < pass_.stop - pass_.start)
    row_B, k_B = inside_BK.nonzero(as_tuple=True)
    return row_B, k_B, column_BK[row_B, k_B]


class chain:  # noqa: N801 - reads as a verb
    """Several edits, one after the other."""

    def __init__(self, *edits):
        self.edits = [edit for edit in edits if edit is not None]
        self.layers = tuple({layer for edit in self.edits for layer in getattr(edit, "layers", (0,))})

    def __call__(self, layer: int, pass_, x_BCD: Tensor) -> Tensor:
        for edit in self.edits:
            if layer in getattr(edit, "layers", (0,)):
                changed = edit(layer, pass_, x_BCD)
                x_BCD = x_BCD if changed is None else changed
        return x_BCD


def identity(layer: int, pass_, x_BCD: Tensor) -> Tensor:
    """The edit that changes nothing: what it does must be what no edit does."""
    return x_BCD.clone()


# ---------------------------------------------------------------- draws


def generator(seed: int, *key: int) -> np.random.Generator:
    """Randomness that depends on (seed, row, slot, trial ...) alone, not on batch size or order."""
    return np.random.default_rng(np.random.SeedSequence((seed, *key)))


def gaussian(seed: int, rows: list[int], n_positions: int, width: int, trial: int = 0) -> Tensor:
    """Standard normal float32 [rows, K, D], drawn per (seed, row, position, trial)."""
    noise = np.empty((len(rows), n_positions, width), dtype=np.float32)
    for i, row in enumerate(rows):
        for k in range(n_positions):
            noise[i, k] = generator(seed, row, k, trial).standard_normal(width, dtype=np.float32)
    return torch.from_numpy(noise)


def permutations(seed: int, row: int, n: int, how_many: int) -> np.ndarray:
    """Up to `how_many` different non-identity permutations of n, int64 [how_many, n], drawn for (seed, row)."""
    rng, found = generator(seed, row, n), {}
    most = int(np.prod(np.arange(1, n + 1))) - 1
    while len(found) < min(how_many, most):
        order = tuple(rng.permutation(n).tolist())
        if order != tuple(range(n)):
            found[order] = None
    return np.array(list(found), dtype=np.int64).reshape(-1, n)
