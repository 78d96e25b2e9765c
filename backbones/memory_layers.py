"""Learned key-value memories that a decoder block reads beside its feed-forward part or in place of it.

    values = ValueTable(144, 256, fixed_lr=1e-3)
    memory = ProductKeyMemory(width=256, key_dim=128, n_sub_keys=12, heads=4, topk=8)
    m_BCD = memory(x_BCD, values.weight)             # to be added to the residual stream
    with counting_reads(model) as counts:            # {layer: how often each slot was read}
        model(**batch)
    share = utilisation(counts[4])                   # of slots that were read at least once, 0..1

Product keys (arXiv 1907.05242, gated as in arXiv 2412.09764): a slot's key is a pair of sub-keys, so the best of n * n slots
are found among the pairs of the best of 2 n sub-keys. The bank compares with every key; it is the dense form.

Shape letters: B rows, C columns, D width, N tokens, H heads, K key width, n sub-keys a side, M slots, t slots read a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ValueTable(nn.Module):
    """The vectors of M slots, `weight` [M, D]. They learn at the constant rate `fixed_lr`, in an optimizer group of their own."""

    def __init__(self, n_slots: int, width: int, fixed_lr: float | None = None):
        super().__init__()
        self.weight, self.fixed_lr = nn.Parameter(torch.empty(n_slots, width)), fixed_lr


class Memory(nn.Module):
    """What both kinds share: `read` says which slots ([N, H, t]) count how much; values are weighted rows of a table [M, D].

    `values` is None where the table is another's and comes with each call; `layer` is the number of the block that owns it.
    """

    def __init__(self, n_slots: int, values: ValueTable | None, layer: int):
        super().__init__()
        self.n_slots, self.values, self.layer = n_slots, values, layer
        self.counts_M: Tensor | None = None

    def read(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """(slots int64 [N, H, t], weights [N, H, t] that add up to 1 for a head)."""
        raise NotImplementedError

    def finish(self, x_ND: Tensor, y_ND: Tensor) -> Tensor:
        """What is added to the residual stream, from a token's state and what it read."""
        raise NotImplementedError

    def forward(self, x_BCD: Tensor, shared_values: Tensor | None = None, real_BC: Tensor | None = None) -> Tensor:
        """Read for each column of [B, C, D]; `shared_values` [M, D] where the memory has no table of its own. `real_BC`, false
        at padding, matters for counting only."""
        x_ND = x_BCD.flatten(0, -2)
        slots, weights = self.read(x_ND)
        if self.counts_M is not None:
            counted = slots if real_BC is None else slots[real_BC.flatten()]
            self.counts_M += torch.bincount(counted.flatten(), minlength=self.n_slots)
        values_MD = shared_values if self.values is None else self.values.weight
        y_ND = F.embedding_bag(
            slots.flatten(1), values_MD, per_sample_weights=weights.flatten(1).to(values_MD.dtype), mode="sum"
        )
        return self.finish(x_ND, y_ND).view_as(x_BCD)


class ProductKeyMemory(Memory):
    """n * n slots addressed by pairs of sub-keys; the heads' reads are summed, gated by the token and projected."""

    def __init__(
        self,
        width: int,
        key_dim: int,
        n_sub_keys: int,
        heads: int,
        topk: int,
        values: ValueTable | None = None,
        eps: float = 1e-6,
        layer: int = 0,
    ):
        super().__init__(n_sub_keys**2, values, layer)
        self.heads, self.topk, self.n_sub_keys = heads, min(topk, n_sub_keys), n_sub_keys
        self.query = nn.Linear(width, heads * key_dim, bias=False)
        self.query_norm = nn.RMSNorm(key_dim, eps)
        self.sub_keys = nn.Parameter(torch.empty(2, heads, n_sub_keys, key_dim // 2))
        self.gate = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def side_scores(self, x_ND: Tensor) -> Tensor:
        """Products of the two halves of each query with their sub-keys, [2, N, H, n]; a slot scores the sum of its pair."""
        query_ND = self.query(x_ND).to(self.query_norm.weight.dtype)  # autocast narrows it, and the norm wants one dtype
        query_NHK = self.query_norm(query_ND.unflatten(-1, (self.heads, -1)))
        halves = torch.stack(query_NHK.chunk(2, -1))
        return torch.einsum("anhk,ahmk->anhm", halves, self.sub_keys.to(halves.dtype))

    def read(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        # A pair of the best t of all pairs has both its halves among the best t of their sides.
        (left, right), (left_n, right_n) = self.side_scores(x_ND).topk(self.topk)
        scores, pair = (left[..., :, None] + right[..., None, :]).flatten(-2).topk(self.topk)
        first, second = left_n.gather(-1, pair // self.topk), right_n.gather(-1, pair % self.topk)
        return first * self.n_sub_keys + second, scores.softmax(-1)

    def finish(self, x_ND: Tensor, y_ND: Tensor) -> Tensor:
        return self.out(y_ND * F.silu(self.gate(x_ND)))


class BankMemory(Memory):
    """M slots compared by cosine with a token's query; a scalar gate looks at the token and at what it read.

    Cosines are scaled by sqrt(D), as products of vectors of unit RMS in attention are.
    """

    def __init__(self, width: int, n_slots: int, topk: int, values: ValueTable | None = None, layer: int = 0):
        super().__init__(n_slots, values, layer)
        self.topk = min(topk, n_slots)
        self.query = nn.Linear(width, width, bias=False)
        self.keys = nn.Parameter(torch.empty(n_slots, width))
        self.gate = nn.Sequential(nn.Linear(2 * width, width, bias=False), nn.SiLU(), nn.Linear(width, 1))

    def read(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        query_ND, keys_MD = F.normalize(self.query(x_ND), dim=-1), F.normalize(self.keys, dim=-1)
        scores, slots = (F.linear(query_ND, keys_MD) * keys_MD.shape[1] ** 0.5).topk(self.topk)
        return slots[:, None], scores.softmax(-1)[:, None]

    def finish(self, x_ND: Tensor, y_ND: Tensor) -> Tensor:
        return y_ND * self.gate(torch.cat([x_ND, y_ND.to(x_ND.dtype)], -1)).sigmoid()


# ---------------------------------------------------------------- what was read


@contextmanager
def counting_reads(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Count reads of every slot in every memory of a model meanwhile: {layer: int64 [M]}, padding left out."""
    memories = [module for module in model.modules() if isinstance(module, Memory)]
    for memory in memories:
        memory.counts_M = torch.zeros(memory.n_slots, dtype=torch.long, device=next(memory.parameters()).device)
    try:
        yield {memory.layer: memory.counts_M for memory in memories}
    finally:
        for memory in memories:
            memory.counts_M = None


def utilisation(counts_M: Tensor) -> float:
    """The share of slots that were read at least once, 0..1."""
    return (counts_M > 0).double().mean().item()
