"""Which columns of a batch go in which call of the backbone; read off the tokens, before anything is computed.

columns        q1 .. qm <bot> | t1 | t2 | .. | tn <eot> a1 .. |
one by one           0          1    2             n              plan_passes(latent_BT, cut=True, row_ids)
in parallel          0          1         (columns t1 .. tn)      ... iterations=T: T - 1 times over all slots
                                ..
                                T         (t1 .. tn <eot> a1 .. )
all at once          0                                            ... cut=False: no slot waits for a state
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """Thought slot k: its column in the batch and the rows that have it (bool [B], on the CPU)."""

    k: int
    column: int
    rows: Tensor


@dataclass(frozen=True)
class Pass:
    """One call of the backbone: columns start..stop-1, the thought slots among them, and the callers' row ids.

    `again`: a later pass computes these columns once more (parallel thoughts); their keys and values are dropped.
    `begins`: the column of each row's first token (int64 [B], on the CPU), so that an edit finds the tokens of a padded row;
    None behind a prompt, where rows that began at different times stand together.
    """

    index: int
    start: int
    stop: int
    slots: tuple[Slot, ...]
    row_ids: tuple[int, ...]
    again: bool = False
    begins: Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """What a batch asks of the rollout, read off its tokens on the CPU so that no pass waits for the device."""

    passes: tuple[Pass, ...]
    left_padded: bool  # some column before a real one is padding; right padding alone needs no mask under causal attention
    usual_positions: bool  # positions count the real columns
    labelled: tuple[Tensor, Tensor] | None = None  # rows [N] and columns [N] whose next token is labelled

    def pinned(self) -> "Plan":
        """With its indices in page-locked memory, from where `to` does not wait."""
        return self._with(lambda index: index.pin_memory())

    def to(self, device: torch.device) -> "Plan":
        """With its indices on a device."""
        return self._with(lambda index: index.to(device, non_blocking=True))

    def _with(self, change) -> "Plan":
        return replace(self, labelled=None if self.labelled is None else tuple(map(change, self.labelled)))


def plan_passes(
    latent_BT: Tensor, cut: bool, row_ids: tuple[int, ...], iterations: int | None = None, begins: Tensor | None = None
) -> tuple[Pass, ...]:
    """Cut the columns into passes.

    Args:
        latent_BT: bool, true at thought slots, on the CPU. Rows may have different numbers of slots, or none.
        cut: whether the feedback reads a hidden state, so that each slot starts a pass.
        row_ids: one id a row, handed on to edits.
        iterations: with `cut`, refine all slots in parallel this many times instead of one after the other.
        begins: the column of each row's first token, int64 [B], handed on to edits.

    Raises:
        ValueError: slots not contiguous in a row, not starting in one common column, or a slot in column 0.
    """
    n_B = latent_BT.sum(1)
    n, n_columns = int(n_B.max()), latent_BT.shape[1]
    if n == 0:
        return (Pass(0, 0, n_columns, (), row_ids, begins=begins),)
    first = int(latent_BT.any(0).int().argmax())
    aligned_BT = (torch.arange(n_columns) >= first) & (torch.arange(n_columns) < first + n_B[:, None])
    wrong = (latent_BT != aligned_BT).any(1).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"latent tokens must be contiguous and start in one common column ({first} here); rows {wrong[:10]} differ: "
            "pad the batch with MyCollator(tokenizer, latent_id)"
        )
    if first == 0:
        raise ValueError("a latent token stands in column 0; a thought needs a column before it")
    slots = [Slot(k, first + k, n_B > k) for k in range(n)]
    if not cut:
        spans = [(0, n_columns)]
    elif iterations is None:
        starts = [0, *(slot.column for slot in slots)]
        spans = list(zip(starts, [*starts[1:], n_columns]))
    else:
        spans = [(0, first), *[(first, first + n)] * (min(iterations, n) - 1), (first, n_columns)]
    later = [start for start, _ in spans[1:]] + [n_columns]
    return tuple(
        Pass(i, start, stop, tuple(s for s in slots if start <= s.column < stop), row_ids, later[i] < stop, begins)
        for i, (start, stop) in enumerate(spans)
    )
