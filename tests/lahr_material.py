"""Tiny random LAHR models for the tests: float64, no dropout, weights large enough that every part does something.

from lahr_material import CELLS, lahr
base = lahr("mod+memory", mod_router="predictor")      # vocabulary 60, 96 positions, width 16, 4 layers
"""

import torch
from transformers import AutoModelForCausalLM

from backbones.lahr import LahrConfig

FLAGS = {
    "plain": {},
    "mod": {"use_mod": True},
    "memory": {"use_memory": True},
    "mod+memory": {"use_mod": True, "use_memory": True},
}
CELLS = tuple(FLAGS)
CAUSAL = ("threshold", "predictor")
MODELS = [(cell, router) for cell in CELLS for router in (CAUSAL if "mod" in cell else CAUSAL[:1])]


def config(cell: str = "plain", **changes) -> LahrConfig:
    """Routed layers 1 and 3, a memory in layer 2."""
    shape = {
        "vocab_size": 60,
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "max_position_embeddings": 96,
        "dropout": 0.0,
        "memory_sub_keys": 5,
        "memory_heads": 2,
        "memory_topk": 3,
        "mod_capacity": 0.5,
        "init_seed": 0,
        "eos_token_id": 59,
    }
    return LahrConfig(**(shape | FLAGS[cell] | changes))


def lahr(cell: str = "plain", noise: float = 0.4, dtype=torch.float64, **changes):
    """A model of `config` in eval mode. Routers that go by a threshold or predictor select some tokens and not others."""
    model = AutoModelForCausalLM.from_config(config(cell, **changes)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    return model.eval()


def tokens(n_rows: int, n_columns: int, seed: int = 0) -> torch.Tensor:
    """Random text, [B, T]."""
    return torch.randint(0, 56, (n_rows, n_columns), generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def left_padded(rows: list[torch.Tensor], width: int) -> dict[str, torch.Tensor]:
    """Rows of token ids ([n] each) that end together."""
    ids, mask = torch.full((len(rows), width), 7), torch.zeros(len(rows), width, dtype=torch.long)
    for b, row in enumerate(rows):
        ids[b, width - len(row) :], mask[b, width - len(row) :] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def logits(model, ids, **options):
    """[B, T, V] of one uncached pass."""
    return model(ids, use_cache=False, **options).logits


def selected(model, ids, **options):
    """Who was selected in one uncached pass, bool [B, T, routed layers]."""
    return model(ids, use_cache=False, **options).columns["mod_selected"]
