"""Activation checkpointing, block by block, that leaves the key/value cache right.

    recompute_blocks(decoder_blocks(model))     # from here on training keeps only what goes into each block

The library's own switch turns the cache off, which makes several passes over one batch silently wrong. Here a block is run
a second time in the backward pass from the cache state that it saw the first time (Chen et al., arXiv 1604.06174).
"""

import functools

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache


def recompute_blocks(blocks: nn.ModuleList) -> None:
    """Keep only the inputs of each decoder block while training, and compute the rest again for the gradients.

    Values and gradients are those of plain training (dropout included). Costs one more forward pass of the blocks. The
    cache must be one of `attention.append_cache`: ValueError at the first pass where a layer is of another kind.
    """
    for i, block in enumerate(blocks):
        block.forward = _recomputed(block.forward, i)


def _recomputed(forward, i: int):
    @functools.wraps(forward)
    def run(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        cache = next((x for x in (*args, *kwargs.values()) if isinstance(x, Cache)), None)
        layer = None if cache is None else cache.layers[i]
        if layer is not None and not hasattr(layer, "restore"):
            raise ValueError(
                f"activation_checkpointing: layer {i} keeps its cache as {type(layer).__name__}, which can't be done again"
            )
        state = None if layer is None else layer.state()

        def from_state(*args, **kwargs):
            if layer is not None:
                layer.restore(state)
            return forward(*args, **kwargs)

        return checkpoint(from_state, *args, use_reentrant=False, **kwargs)

    return run
