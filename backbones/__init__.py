"""Backbones and their tokenizers: any Hugging Face causal LM by id or folder, and the tiny ones that live here.

tokenizer = load_tokenizer("openai-community/gpt2")
ids = add_thought_tokens(tokenizer)
model = load_backbone("backbones/prosqa_tiny", from_scratch=True, seed=0)
grow_vocabulary(model, tokenizer, ids)
"""

import dataclasses
import difflib
import importlib.metadata
import re
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.activations import FastGELUActivation, NewGELUActivation

from backbones.cognate import CognateConfig
from backbones.lahr import LahrConfig

MINIMUM = {"torch": "2.11", "transformers": "5.17"}  # scripts/test_matrix.sh tries the oldest transformers
NAMES = {"lahr": LahrConfig, "cognate": CognateConfig}  # model_id of a config without a folder
THOUGHT_TOKENS = (
    "<|start-latent|>",
    "<|end-latent|>",
    "<|latent|>",
)  # added in this order: GPT-2 ids 50257, 50258, 50259


class ThoughtIds(NamedTuple):
    start: int | None = None
    end: int | None = None
    latent: int | None = None


def load_tokenizer(model_id: str):
    """The tokenizer of a hub id or folder, padding with EOS. Raises ValueError where it can't be loaded."""
    tokenizer = _from_hub(AutoTokenizer, model_id)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def add_thought_tokens(tokenizer) -> ThoughtIds:
    """Add the three tokens (as stock: `add_tokens`, not special) and find their ids by name; forks use another order."""
    tokenizer.add_tokens(list(THOUGHT_TOKENS))
    return ThoughtIds(*(tokenizer.convert_tokens_to_ids(token) for token in THOUGHT_TOKENS))


def load_backbone(model_id: str, from_scratch: bool = False, seed: int = 0, **config_changes):
    """A causal LM in float32: pretrained weights, or (from_scratch) random ones of the config under `seed`.

    `model_id`: a hub id, a folder, or one of `NAMES` for a config that `config_changes` alone describe.
    """
    if not from_scratch:
        return fuse_activations(_from_hub(AutoModelForCausalLM, model_id, dtype=torch.float32, **config_changes))
    config = _own_config(model_id, **config_changes) if model_id in NAMES else _from_hub(AutoConfig, model_id, **config_changes)
    if getattr(config, "init_seed", seed) is None:
        config.init_seed = seed  # weights by (seed, name), the same whatever else the model has
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # Not in the config's own dtype: bf16 draws are coarse, and differ between versions of torch.
        return fuse_activations(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def own_options(model_id: str, tokenizer) -> dict:
    """What one of `NAMES` must know of its tokenizer; nothing for models that come with a config."""
    if model_id not in NAMES:
        return {}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return {"vocab_size": len(tokenizer)} | special


def _own_config(model_id: str, size: str | None = None, **options):
    """The config of one of `NAMES`, of a named size if one is given. ValueError where an option is unknown."""
    kind = NAMES[model_id]
    unknown = sorted(options.keys() - {field.name for field in dataclasses.fields(kind)})
    if unknown:
        near = difflib.get_close_matches(unknown[0], [field.name for field in dataclasses.fields(kind)], 1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise ValueError(f"model_config: {', '.join(unknown)} unknown to {model_id}{hint}")
    return kind(**options) if size is None else kind.size(size, **options)


def fuse_activations(model):
    """Compute GELU's tanh form (GPT-2's `gelu_new`, `gelu_fast`) in one kernel instead of eight: the same function.

    Written out in elementary operations it keeps five copies of the widest activation for the backward pass.
    """
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if isinstance(module, NewGELUActivation | FastGELUActivation):
                setattr(parent, name, nn.GELU(approximate="tanh"))
    return model


def check_versions(installed=importlib.metadata.version) -> None:
    """ValueError where an installed library is older than the oldest supported; `installed`: name -> version."""
    for name, oldest in MINIMUM.items():
        release = re.match(r"(\d+)\.(\d+)", installed(name))
        if tuple(map(int, release.groups())) < tuple(map(int, oldest.split("."))):
            raise ValueError(
                f"{name} {installed(name)} is older than {oldest}, the oldest supported: pip install -r requirements.txt"
            )


def _from_hub(auto_class, model_id: str, **kwargs):
    check_versions()
    try:
        return auto_class.from_pretrained(model_id, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"model_id: cannot load {auto_class.__name__} from {model_id!r} (hub id or folder): {reason}"
        ) from None


def anchor_ids(tokenizer) -> list[int]:
    """The pieces of `<<`, from whose rows new tokens start: one token in GPT-2, several or none elsewhere."""
    if "<<" in tokenizer.get_vocab():
        return [tokenizer.convert_tokens_to_ids("<<")]
    return [i for i in tokenizer.encode("<<", add_special_tokens=False) if i != tokenizer.unk_token_id]


def anchor_row(weight_VD: torch.Tensor, tokenizer) -> torch.Tensor:
    """The row [D] of `<<`; the mean of its pieces' rows where it is several tokens, of all other words where it is none."""
    return weight_VD[_anchors(tokenizer)].mean(0)


@torch.no_grad()
def anchor_vector(embedding: nn.Module, tokenizer) -> torch.Tensor:
    """`anchor_row` as the embedding feeds it, [D]: some scale their rows."""
    return embedding(torch.tensor(_anchors(tokenizer), device=embedding.weight.device)).mean(0)


def _anchors(tokenizer) -> list[int]:
    new = {tokenizer.convert_tokens_to_ids(token) for token in THOUGHT_TOKENS}
    return anchor_ids(tokenizer) or [i for i in range(len(tokenizer)) if i not in new]


@torch.no_grad()
def grow_vocabulary(model, tokenizer, ids: ThoughtIds) -> None:
    """Resize to the tokenizer and set the rows of the thought tokens, input and output, to the row of `<<`."""
    resize_vocabulary(model, len(tokenizer))
    head = model.get_output_embeddings()
    for weight_VD in (model.get_input_embeddings().weight, *([] if head is None else [head.weight])):
        weight_VD[list(ids)] = anchor_row(weight_VD, tokenizer)
    pieces = anchor_ids(tokenizer)
    if len(pieces) != 1:
        print(f"`<<` is {len(pieces)} tokens here: new rows start as the mean row of {'these' if pieces else 'the vocabulary'}")


def resize_vocabulary(model, size: int) -> None:
    """Resize input and output embeddings to `size` rows."""
    if model.get_input_embeddings().weight.shape[0] != size:
        model.resize_token_embeddings(size, mean_resizing=False)


def max_positions(model) -> int | None:
    """How many positions the model has; None where there is no limit to respect."""
    return getattr(model.config, "max_position_embeddings", None)
