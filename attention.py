"""What the passes over one batch share: keys and values that are appended to in place, and the mask of padding and windows.

    cache = append_cache(model.config, capacity=T)      # hand it to any causal LM as past_key_values; autograd accepts it

The library's `DynamicCache` concatenates: every pass copies all earlier columns, in every layer, and training keeps every
copy for the backward pass. Here a layer's keys are one buffer [B, H, capacity, d]; a pass writes its columns behind the
others and reads a view of what is there so far. Columns, once written, never change, so the views that earlier passes
saved for their backward stay right. Gradients of the views are added up from the last pass to the first.

Shape letters: B rows, H key/value heads, C columns of one pass, P columns before it, d width of a head.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


def append_cache(config, capacity: int, n_layers: int = 0) -> DynamicCache:
    """An empty cache for a causal LM's config. `capacity` columns fit without moving anything; more are allowed.

    Layers with a sliding window keep all columns, too: the mask says which ones a token sees. Layers that the library keeps in
    another form (chunks, recurrent states) stay what they are there. `n_layers`: at least so many; a backbone may keep more
    than its blocks do.
    """
    cache = _cache(config, lambda: AppendLayer(capacity))
    cache.layers += [AppendLayer(capacity) for _ in range(n_layers - len(cache.layers))]
    return cache


def concatenating_cache(config) -> DynamicCache:
    """`append_cache` as the library writes it, a new tensor a pass: what compiled passes can be trained through."""
    return _cache(config, DynamicLayer)


def no_cache(config) -> DynamicCache:
    """A cache that keeps nothing, for a single pass.

    Without any cache the library looks for packed sequences in the positions, which waits for the device.
    """
    return _cache(config, _KeepNothing)


def _cache(config, make: Callable[[], DynamicLayer]) -> DynamicCache:
    """The library's cache, with layers of another kind for all that keep keys and values by column."""
    cache = DynamicCache(config=config)
    windows = _windows(config, cache)
    cache.layers = [
        make() if type(layer) is DynamicLayer or window is not None else layer for layer, window in zip(cache.layers, windows)
    ]
    return cache


def _windows(config, cache: DynamicCache) -> list[int | None]:
    """How many positions a token sees in each layer of the library's cache, its own included; None: all, or no saying."""
    known = type(config).__module__.startswith("transformers.") and config._attn_implementation in ("sdpa", "eager")
    known = known and not getattr(config, "attention_chunk_size", None)  # chunks are cached alike and masked otherwise
    return [layer.sliding_window if known and type(layer) is DynamicSlidingWindowLayer else None for layer in cache.layers]


class _KeepNothing(DynamicLayer):
    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def state(self) -> None:
        """There is none."""

    def restore(self, state: None) -> None:
        """Nothing to go back to."""


def appends_only(cache: DynamicCache) -> bool:
    """Whether all layers are of the kind made here, so that rows can be picked, joined and padded."""
    return all(isinstance(layer, AppendLayer) for layer in cache.layers)


class _Buffer:
    """Storage of one layer's keys or values, and in the backward pass the sum of its views' gradients so far."""

    def __init__(self, like_BHCd: Tensor, capacity: int):
        B, H, _, d = like_BHCd.shape
        # Columns before heads in memory, as the projections of most models deliver them.
        self.storage_BHTd = like_BHCd.new_empty(B, capacity, H, d).transpose(1, 2)
        self.written = 0
        self.gradient_BHTd: Tensor | None = None
        self.task: int | None = None

    def write(self, new_BHCd: Tensor, start: int) -> Tensor:
        """Write columns from `start` on; returns the view of all columns up to their end."""
        self.written = start + new_BHCd.shape[2]
        # `.data`: an alias without a version counter, since what earlier views saved for backward does not change.
        self.storage_BHTd.data[:, :, start : self.written] = new_BHCd
        return self.storage_BHTd.data[:, :, : self.written]


class _Append(torch.autograd.Function):
    """new columns -> the view of all columns so far. Backward adds up the views' gradients, last pass first."""

    @staticmethod
    def forward(ctx, past_BHPd: Tensor | None, new_BHCd: Tensor, buffer: _Buffer, start: int) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.buffer, ctx.start, ctx.stop = buffer, start, start + new_BHCd.shape[2]
        return buffer.write(new_BHCd, start)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_BHTd: Tensor | None):
        # `past` is an input only so that this pass's gradient is added before the pass before it hands out its own.
        buffer, task = ctx.buffer, torch._C._current_graph_task_id()
        if buffer.task != task:  # the first of this backward pass: nothing is left from another one
            buffer.task, buffer.gradient_BHTd = task, None
        later_BHTd = buffer.gradient_BHTd
        total = grad_BHTd if later_BHTd is None else later_BHTd[:, :, : ctx.stop]
        if grad_BHTd is not None and later_BHTd is not None:
            total = total + grad_BHTd
        buffer.gradient_BHTd = total
        if ctx.start == 0:
            buffer.task = buffer.gradient_BHTd = None
        return None, None if total is None else total[:, :, ctx.start : ctx.stop], None, None


class AppendLayer(DynamicLayer):
    """One layer of the cache: `keys` and `values` are views of the written part of a buffer each."""

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity
        self._buffers: list[_Buffer] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append [B, H, C, d] states; returns all states so far (the library's interface)."""
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        start = self.get_seq_length() if self.keys is not None else 0
        past, new = (self.keys, self.values), (key_states, value_states)
        if self._buffers is None or self._buffers[0].written != start or self._room() < start + key_states.shape[2]:
            # Nothing yet, a full buffer, or columns that someone else may still need behind ours: begin another one.
            if start:
                new = [torch.cat(pair, 2) for pair in zip(past, new)]
            past, start = (None, None), 0
            needed = new[0].shape[2]
            capacity = self.capacity if self.capacity >= needed else needed + needed // 4
            self._buffers = [_Buffer(states, capacity) for states in new]
        self.keys, self.values = (_Append.apply(p, n, b, start) for p, n, b in zip(past, new, self._buffers))
        return self.keys, self.values

    def _room(self) -> int:
        return self._buffers[0].storage_BHTd.shape[2]

    # ------------------------------------------------------------ going back

    def state(self) -> tuple:
        """Where the layer stands, for `restore`."""
        written = [buffer.written for buffer in self._buffers or ()]
        return self.is_initialized, self.keys, self.values, self._buffers, written

    def restore(self, state: tuple) -> None:
        """Go back to a `state`. What was written since is written over by the next updates, which must repeat it."""
        self.is_initialized, self.keys, self.values, self._buffers, written = state
        for buffer, n in zip(self._buffers or (), written):
            buffer.written = n

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` columns. While gradients are recorded, their storage stays untouched."""
        super().crop(tokens_to_remove)
        if not torch.is_grad_enabled():
            for buffer in self._buffers or ():
                buffer.written = self.keys.shape[2]

    def reset(self) -> None:
        super().reset()
        self._buffers = None

    # ------------------------------------------------------------ rows (without gradients)

    def replace(self, keys_BHPd: Tensor, values_BHPd: Tensor) -> None:
        """Hold these states from now on."""
        self.keys = self.values = self._buffers = None
        self.update(keys_BHPd, values_BHPd)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.replace(self.keys[indices], self.values[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.replace(self.keys.repeat_interleave(repeats, 0), self.values.repeat_interleave(repeats, 0))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)


def select_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Keep only these rows (indices) of a cache."""
    cache.batch_select_indices(rows)


def join_rows(cache: DynamicCache, other: DynamicCache) -> None:
    """Add the rows of `other`; the shorter one is padded with zero columns on the left, which the mask must hide."""
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        width = max(mine.get_seq_length(), theirs.get_seq_length())
        pairs = ((mine.keys, theirs.keys), (mine.values, theirs.values))
        mine.replace(*(torch.cat([F.pad(x, (0, 0, width - x.shape[2], 0)) for x in pair]) for pair in pairs))


# ---------------------------------------------------------------- masks

Mask = Tensor | dict[str, Tensor] | None


def visible(model, mask_BT: Tensor | None, start: int = 0) -> Mask:
    """What a causal LM is to be given as mask for columns `start` .. T-1, of which `mask_BT` says which are real.

    An additive mask [B, 1, T - start, T] where the model takes one as it is: it is made once for all passes, and no pass
    looks at values on the way, which would wait for the device. One for each kind of layer where some have a sliding window:
    these count positions, whatever padding lies between. Else, and for other attentions, `mask_BT`.
    """
    if mask_BT is None or not takes_bias(model):
        return mask_BT
    dtype = compute_dtype(model.get_input_embeddings().weight)
    windows = _windows(model.config, DynamicCache(config=model.config))
    by_window = {window: attention_bias(mask_BT, start, dtype, window) for window in set(windows)}
    if len(by_window) == 1:
        return by_window[windows[0]]
    return {kind: by_window[window] for kind, window in zip(model.config.layer_types, windows)}


def visible_to(seen: Mask, start: int, stop: int) -> Mask:
    """The part of `visible(model, mask_BT)` for the columns of one pass."""
    if seen is None:
        return None
    if isinstance(seen, dict):
        return {kind: visible_to(mask, start, stop) for kind, mask in seen.items()}
    return seen[:, :stop] if seen.ndim == 2 else seen[:, :, start:stop, :stop]


def cloned(mask: Mask) -> Mask:
    """The same in memory of its own."""
    if isinstance(mask, dict):
        return {kind: cloned(part) for kind, part in mask.items()}
    return None if mask is None else mask.clone()


def takes_bias(model) -> bool:
    """Whether a causal LM takes an additive mask [B, 1, C, T] as it is: the library's own models with plain SDPA.

    Those with sliding windows do so with eager attention, too (gpt-oss has no other).
    """
    config, cache = model.config, DynamicCache(config=model.config)
    windows = _windows(config, cache)
    return (
        type(model).__module__.startswith("transformers.")
        and config._attn_implementation in (("sdpa", "eager") if any(windows) else ("sdpa",))
        and not getattr(config, "alibi", False)
        and all(type(layer) is DynamicLayer or window is not None for layer, window in zip(cache.layers, windows))
    )


def attention_bias(mask_BT: Tensor, start: int, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """The additive mask [B, 1, T - start, T] of columns `start` .. T-1: 0 where a column is real and not later, else -inf.

    With a `window` also -inf from so many real columns back on. Every column sees itself, so that no row of padding is
    without any (which would be NaN).
    """
    n_columns = mask_BT.shape[1]
    column_T = torch.arange(n_columns, device=mask_BT.device)
    row_C = column_T[start:, None]
    seen_BCT = mask_BT.bool()[:, None] & (column_T <= row_C)
    if window is not None:
        count_BT = mask_BT.cumsum(1)
        seen_BCT &= count_BT[:, start:, None] - count_BT[:, None] < window
    seen_BCT |= column_T == row_C
    bias = torch.zeros((), dtype=dtype, device=mask_BT.device)
    return torch.where(seen_BCT, bias, float("-inf"))[:, None]


def compute_dtype(x: Tensor) -> torch.dtype:
    """What attention computes in: the autocast dtype where autocast is on, else that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
