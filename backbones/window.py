"""A causal window over cached columns: which of them each new column sees, and where the cache keeps what they leave.

    window = Window(width=1024, attention_mask=mask_BT, n_past=P, n_new=C, device=device)
    shelf = Shelf(cache, first=L)                        # the layers behind those of the L blocks
    keys, values = shelf.add(keys_BHCd, values_BHCd)     # of all columns so far
    out_BHCd = attend(queries_BHCd, keys, values, window.mask)

Shape letters: B rows, C new columns, P columns before them, T = P + C, H heads, d width of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer


class Window:
    """Column j is visible to column i where j is real, not later than i, and fewer than `width` real columns before i.

    `attention_mask`: None (all real), [B, T] (0 at padding), or four-dimensional [B, 1, C, T], bool or additive; of the
    last, the columns that its last row sees count as real. Padding sees itself and whatever real columns are in reach.

    Attributes: `real_BT` (bool; None: all real), `mask` (bool [B or 1, 1, C, T]; None: plain causal attention).
    """

    def __init__(self, width: int, attention_mask: Tensor | None, n_past: int, n_new: int, device: torch.device):
        self.n_past, self.n_new = n_past, n_new
        n_columns = n_past + n_new
        if attention_mask is not None and attention_mask.shape[-1] != n_columns:
            raise ValueError(
                f"attention_mask covers {attention_mask.shape[-1]} columns; with {n_past} in the cache and {n_new} new ones "
                f"it must cover {n_columns}"
            )
        self.real_BT = None if attention_mask is None else real_columns(attention_mask)
        self.given = None
        if attention_mask is not None and attention_mask.ndim == 4:
            self.given = _as_bool(attention_mask)
        self.device = device
        plain = attention_mask is None and n_columns <= width and (n_past == 0 or n_new == 1)
        self.mask = None if plain else self._mask(width)

    @property
    def real_BC(self) -> Tensor | None:
        """Which of the new columns are real; None: all."""
        return None if self.real_BT is None else self.real_BT[:, self.n_past :]

    def count_BC(self) -> Tensor:
        """Real columns so far, the column itself among them where it is real: int64 [B or 1, C]."""
        if self.real_BT is None:
            return torch.arange(self.n_past + 1, self.n_past + self.n_new + 1, device=self.device)[None]
        return self.real_BT.cumsum(1)[:, self.n_past :]

    def rows(self, order_BA: Tensor) -> Tensor:
        """The mask [B, 1, A, T] of some of the new columns, A a row of the batch."""
        mask = self._mask(self.n_past + self.n_new) if self.mask is None else self.mask
        n_columns = mask.shape[-1]
        index = order_BA[:, None, :, None].expand(-1, 1, -1, n_columns)
        return mask.expand(len(order_BA), -1, -1, -1).gather(2, index)

    def _mask(self, width: int) -> Tensor:
        column_T = torch.arange(self.n_past + self.n_new, device=self.device)
        row_C = column_T[self.n_past :, None]
        seen = (column_T <= row_C)[None]
        rank_BT = column_T[None]
        if self.real_BT is not None:
            rank_BT = self.real_BT.cumsum(1)
            seen = seen & self.real_BT[:, None]
        seen = seen & (rank_BT[:, self.n_past :, None] - rank_BT[:, None] < width)
        seen = (seen | (column_T == row_C))[:, None]
        return seen if self.given is None else seen & self.given


def real_columns(attention_mask: Tensor) -> Tensor:
    """Which columns are tokens, bool [B, T], of a mask as `Window` takes it."""
    return attention_mask.bool() if attention_mask.ndim == 2 else _as_bool(attention_mask)[:, 0, -1]


def _as_bool(mask_BHCT: Tensor) -> Tensor:
    return mask_BHCT if mask_BHCT.dtype == torch.bool else mask_BHCT == 0


class Shelf:
    """The cache's layers from `first` on, filled one after the other; without a cache nothing is kept."""

    def __init__(self, cache: Cache | None, first: int):
        self.cache, self.layer = cache, first

    def read(self, like_BHCd: Tensor) -> Tensor:
        """The keys [B, H, P, d] that the next layer holds. Adding no columns is the cache's own way to say."""
        none = like_BHCd[:, :, :0]
        return self.cache.update(none, none[..., :0], self.layer)[0]

    def add(self, keys_BHCd: Tensor, values_BHCd: Tensor) -> tuple[Tensor, Tensor]:
        """Append to the next layer; keys and values of all columns so far."""
        if self.cache is None:
            return keys_BHCd, values_BHCd
        self.layer += 1
        return self.cache.update(keys_BHCd, values_BHCd, self.layer - 1)


def grow(cache: Cache, n_layers: int) -> None:
    """Append layers of the kind of layer 0 until there are `n_layers`; ValueError where it is not one that just grows."""
    if not cache.layers:
        return  # made without a config: it adds a layer at the first update of each
    first = cache.layers[0]
    if not isinstance(first, DynamicLayer) or first.is_sliding:
        raise ValueError(f"past_key_values: layers of kind {type(first).__name__} can't hold this model; use DynamicCache")
    room = (first.capacity,) if hasattr(first, "capacity") else ()
    while len(cache.layers) < n_layers:
        cache.layers.append(type(first)(*room))


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Scaled dot-product attention; without a mask plain causal (one query sees all). [B, H, C, d] -> [B, C, H * d]"""
    causal = mask is None and queries.shape[2] > 1
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=dropout, is_causal=causal)
    return out.transpose(1, 2).flatten(2)


def heads(x_BCD: Tensor, n_heads: int) -> Tensor:
    """[B, C, H * d] -> [B, H, C, d]"""
    return x_BCD.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def wide(x: Tensor) -> Tensor:
    """In float32 where it is half precision, else as it is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def rms(x: Tensor, eps: float) -> Tensor:
    """Scaled to root mean square 1 along the last dimension."""
    return F.rms_norm(x, x.shape[-1:], eps=eps)
