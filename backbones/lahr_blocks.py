"""One block of a LAHR decoder: attention, then a feed-forward part, a memory or both; for all tokens or for selected ones.

    block = LahrBlock(config, layer=3)
    x_BCD = block(x_BCD, columns, cache=cache)                  # every token
    x_BCD = block(x_BCD, columns, cache=cache, route=route)     # those that a router selected; the others pass by

A skipped token leaves a key and a value in the cache all the same, so caches stay dense in position: the key has one channel
more, 0 or SKIPPED, against which every query holds sqrt(d), and nobody attends to it. Selected tokens are gathered from the
batch and computed alone, or all are computed and the others masked: one function.

Shape letters: B rows, C columns of a pass, T columns with those before it, D width, H heads, d head width, S selected tokens,
N query slots of a row (the selected tokens of the row with most), M slots of a memory.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from backbones.lahr_config import LahrConfig
from backbones.memory_layers import BankMemory, Memory, ProductKeyMemory, ValueTable
from backbones.routing import Picked, Route

SKIPPED = -1e3  # added to a score; -1e4 times sqrt(64) would overflow float16
HIDDEN = -1e4  # finite, so that rows of padding are not NaN


class Columns(NamedTuple):
    """What all blocks of one pass share."""

    bias: Tensor | None  # additive, [B or 1, 1, C, T]; None where nothing needs it
    plain: bool  # causal and nothing else, with nothing before: no bias needed where all columns are computed
    rope: tuple[Tensor, Tensor] | None  # cosines and sines, [B or 1, C, d / 2]
    real_BC: Tensor | None
    embeds_BCD: Tensor | None  # what entered the stack, where a memory reads that
    gathered: bool  # routed blocks compute selected tokens only


def attention_bias(real_BT: Tensor | None, n_past: int, n_columns: int, like: Tensor) -> Tensor:
    """The additive mask [B or 1, 1, C, T]: 0 where a column is not later and real, else HIDDEN."""
    key_T = torch.arange(n_past + n_columns, device=like.device)
    seen = key_T <= key_T[n_past:, None]
    seen = seen[None] if real_BT is None else seen & real_BT[:, None]
    return torch.where(seen, like.new_zeros(()), HIDDEN)[:, None]


def rotated(x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
    """Rotary positions on [..., H, d]; cosines and sines are [..., d / 2]."""
    if rope is None:
        return x
    cosine, sine = (table[..., None, :] for table in rope)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1).to(x.dtype)


# ---------------------------------------------------------------- one block


class Attention(nn.Module):
    """Causal self-attention without biases. In routed blocks keys carry the flag of skipped tokens in one channel more."""

    def __init__(self, config: LahrConfig, layer: int):
        super().__init__()
        self.n_heads, self.layer, self.scale = config.num_attention_heads, layer, config.head_dim**-0.5
        self.q, self.k, self.v, self.o = (nn.Linear(config.hidden_size, config.hidden_size, bias=False) for _ in range(4))

    def forward(self, x_BCD: Tensor, columns: Columns, cache: Cache | None, selected_BC: Tensor | None = None) -> Tensor:
        """Of all columns; where `selected_BC` is given, nobody attends to the others."""
        q, k, v = self._projected(x_BCD, columns.rope)
        if selected_BC is not None:
            flag_BC11 = ((~selected_BC).to(k.dtype) * SKIPPED)[..., None, None]
            q, k = self._asking(q), torch.cat([k, flag_BC11.expand(*k.shape[:3], 1)], -1)
        causal = columns.plain and x_BCD.shape[1] > 1
        return self.o(self._attended(q, k, v, None if columns.plain else columns.bias, causal, cache))

    def gathered(self, x_SD: Tensor, picked: Picked, columns: Columns, cache: Cache | None) -> Tensor:
        """Of the selected tokens alone, [S, D]; the others leave zeros and the flag in the cache."""
        (B, N), C = picked.column_BN.shape, columns.bias.shape[2]
        rope = columns.rope
        if rope is not None:
            rope = tuple(table.expand(B, -1, -1).flatten(0, 1)[picked.flat_S] for table in rope)
        q_SHd, k_SHd, v_SHd = self._projected(x_SD, rope)
        q, k = self._asking(q_SHd), F.pad(k_SHd, (0, 1))

        def spread(x_SHd: Tensor, where_S: Tensor, n: int, flag: float = 0.0) -> Tensor:
            rest = x_SHd.new_zeros(B * n, *x_SHd.shape[1:])
            rest[..., -1] = flag
            return rest.index_copy(0, where_S, x_SHd).unflatten(0, (B, n))

        q = spread(q, picked.place_S, N)
        k, v = spread(k, picked.flat_S, C, SKIPPED), spread(v_SHd, picked.flat_S, C)
        row_B1 = torch.arange(B, device=x_SD.device)[:, None] if len(columns.bias) > 1 else 0
        bias = columns.bias[:, 0][row_B1, picked.column_BN][:, None]
        out_BND = self._attended(q, k, v, bias, False, cache)
        return self.o(out_BND.flatten(0, 1).index_select(0, picked.place_S))

    def _projected(self, x: Tensor, rope) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (part(x).unflatten(-1, (self.n_heads, -1)) for part in (self.q, self.k, self.v))
        return rotated(q, rope), rotated(k, rope), v

    def _asking(self, q: Tensor) -> Tensor:
        """With the constant that meets the keys' flags; the scale of the scores takes it off again."""
        return F.pad(q, (0, 1), value=1 / self.scale)

    def _attended(self, q_BNHd, k_BCHd, v_BCHd, bias, causal: bool, cache: Cache | None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BNHd, k_BCHd, v_BCHd))
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        out = F.scaled_dot_product_attention(q, k, v, bias, is_causal=causal, scale=self.scale)
        return out.transpose(1, 2).flatten(2)


class SwiGLU(nn.Module):
    """W2 (silu(W1 s) * W3 s)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.w1, self.w3 = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def new_memory(config: LahrConfig, layer: int) -> Memory:
    """The memory of a block, with a table of its own unless the model has one for all."""
    width, lr = config.hidden_size, config.memory_value_lr
    n_slots = config.memory_slots if config.memory_type == "bank" else config.memory_sub_keys**2
    values = None if config.shares_values else ValueTable(n_slots, width, lr)
    if config.memory_type == "bank":
        return BankMemory(width, n_slots, config.memory_topk, values, layer)
    shape = (width, config.memory_key_dim, config.memory_sub_keys, config.memory_heads, config.memory_topk)
    return ProductKeyMemory(*shape, values, config.rms_norm_eps, layer)


class LahrBlock(nn.Module):
    """Attention, then a feed-forward part, a memory, or both. `forward` returns the states after it, [B, C, D]."""

    def __init__(self, config: LahrConfig, layer: int):
        super().__init__()
        remembers = layer in config.remembering
        self.attention_norm, self.mlp_norm = (nn.RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(2))
        self.attention = Attention(config, layer)
        without_mlp = remembers and config.memory_mode == "replace"
        self.mlp = None if without_mlp else SwiGLU(config.hidden_size, config.intermediate_size)
        self.memory = new_memory(config, layer) if remembers else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x_BCD: Tensor,
        columns: Columns,
        cache: Cache | None = None,
        route: Route | None = None,
        values_MD: Tensor | None = None,
    ) -> Tensor:
        """`route`: which tokens to compute (None: all); `values_MD`: the memories' common table."""
        if route is None:
            attended = self.dropout(self.attention(self.attention_norm(x_BCD), columns, cache))
            return x_BCD + attended + self._feed(x_BCD + attended, columns, values_MD)
        if not columns.gathered:
            attended = self.dropout(self.attention(self.attention_norm(x_BCD), columns, cache, route.selected))
            change = attended + self._feed(x_BCD + attended, columns, values_MD)
            return x_BCD + ((route.gate * route.selected)[..., None] * change).to(x_BCD.dtype)
        picked = Picked.of(route.selected)
        flat_ND = x_BCD.flatten(0, 1)
        x_SD = flat_ND.index_select(0, picked.flat_S)
        attended = self.dropout(self.attention.gathered(self.attention_norm(x_SD), picked, columns, cache))
        change = attended + self._feed(x_SD + attended, columns, values_MD)
        change = route.gate.flatten().index_select(0, picked.flat_S)[:, None] * change
        return flat_ND.index_add(0, picked.flat_S, change.to(x_BCD.dtype)).view_as(x_BCD)

    def _feed(self, u: Tensor, columns: Columns, values_MD: Tensor | None) -> Tensor:
        normed = self.mlp_norm(u)
        out = 0.0 if self.mlp is None else self.mlp(normed)
        if self.memory is not None:
            asked = normed if columns.embeds_BCD is None else self.mlp_norm(columns.embeds_BCD)
            out = out + self.memory(asked, values_MD, columns.real_BC)
        return self.dropout(out)
