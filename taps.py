"""The decoder blocks of any Hugging Face causal LM, and edits that are let in between them.

blocks = decoder_blocks(model)
with tapped(blocks[3], edit, 4, pass_):     # edit(4, pass_, x) sees, and may replace, what block 4 puts out
    ...
"""

from contextlib import contextmanager

from torch import Tensor, nn


def decoder_blocks(base_causallm) -> nn.ModuleList:
    """The decoder blocks of any Hugging Face causal LM, in order. Raises ValueError where they can't be told."""
    n_layers = base_causallm.config.num_hidden_layers
    lists = [m for m in base_causallm.base_model.children() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    if len(lists) != 1:
        raise ValueError(f"cannot tell the {n_layers} decoder blocks of {type(base_causallm).__name__}")
    return lists[0]


def edited(edit, layer: int, pass_, x: Tensor) -> Tensor:
    """What an edit makes of x: its replacement, or x where it returns None."""
    changed = edit(layer, pass_, x)
    return x if changed is None else changed


@contextmanager
def tapped(block: nn.Module, edit, layer: int, pass_):
    """Send the block's output through the edit. Blocks return a bare tensor or a tuple that starts with it."""

    def hook(module, args, output):
        if isinstance(output, tuple):
            return (edited(edit, layer, pass_, output[0]), *output[1:])
        return edited(edit, layer, pass_, output)

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def checkpoints_activations(model) -> bool:
    """Whether the library's own activation checkpointing is on."""
    new_name = "is_activation_checkpointing"  # since transformers 5.2x, where the old name warns
    return getattr(model, new_name if hasattr(model, new_name) else "is_gradient_checkpointing")


def refuse_scaled_logits(config) -> None:
    """The head is applied to gathered states, so models that rescale logits after it would silently differ: refuse."""
    for key, neutral in {
        "final_logit_softcapping": None,
        "logit_scale": 1,
        "logits_scaling": 1,
        "lm_head_multiplier": 1,
    }.items():
        value = getattr(config, key, neutral)
        if value is not None and value != neutral:
            raise ValueError(f"models that rescale their logits are not supported ({key} = {value})")
