"""Tiny random causal LMs and ragged batches for the tests: float64, dropout off, no downloads.

from tiny import EOS, LATENT, build, wrap
base = build("llama")                  # a Hugging Face model with vocabulary 60 and 96 positions
model = wrap(base, "learned_shared")   # Coconut around a copy of it, in eval mode
"""

import copy

import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from coconut import Coconut

START, END, LATENT, EOS = 56, 57, 58, 59  # tokens of a vocabulary of 60; text uses 0..55
FAMILIES = ("gpt2", "llama", "qwen2")
MODES = ("continuous", "frozen", "learned_shared", "pause_curriculum")


def build(name: str, vocab: int = 60, positions: int = 96, seed: int = 0, dtype=torch.float64, layers: int = 3):
    """A random model of width 16: "gpt2" (tied), "llama" (untied, grouped queries) or "qwen2" (tied)."""
    common = {"vocab_size": vocab, "bos_token_id": vocab - 1, "eos_token_id": vocab - 1}
    wide = common | {
        "max_position_embeddings": positions,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_dropout": 0.0,
    }
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = {
        "gpt2": lambda: GPT2Config(n_positions=positions, n_embd=16, n_layer=layers, n_head=4, **off, **common),
        "llama": lambda: LlamaConfig(tie_word_embeddings=False, **wide),
        "qwen2": lambda: Qwen2Config(tie_word_embeddings=True, **wide),
    }[name]()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():  # larger than the usual init: attention and norms that do something, tokens that vary
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.4)
    if dtype == torch.float64:
        norms_in_float64(model)
    return model.eval()


def norms_in_float64(model) -> None:
    """Put torch's RMSNorm, with the same weight, in place of the library's.

    That one computes in float32 whatever the dtype: a difference of 1e-16 may flip a rounding and come out as 1e-5 in a
    gradient. Without it Llama and Qwen2 can be held to the tolerance of GPT-2.
    """
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon"):
                exact = torch.nn.RMSNorm(norm.weight.shape, norm.variance_epsilon)
                exact.weight = norm.weight
                setattr(parent, name, exact)


def with_other_attention(model):
    """The model with an attention of another name than the wrapper knows masks of; it computes what SDPA does."""
    AttentionInterface.register("elsewhere", sdpa_attention_forward)
    AttentionMaskInterface.register("elsewhere", sdpa_mask)
    model.config._attn_implementation = "elsewhere"
    return model


def wrap(base, mode: str = "continuous", **options) -> Coconut:
    """`Coconut` around a copy of `base`, in eval mode."""
    return Coconut(copy.deepcopy(base), LATENT, START, END, EOS, feedback_mode=mode, **options).eval()


def token_rows(n_latents: list[int], seed: int = 1, answer: int = 4, question=(2, 7)) -> list[list[int]]:
    """One token list a row: a question of random length, the markers around n latents, `answer` tokens."""
    generator = torch.Generator().manual_seed(seed)

    def text(n: int) -> list[int]:
        return torch.randint(0, START, (n,), generator=generator).tolist()

    lengths = torch.randint(*question, (len(n_latents),), generator=generator).tolist()
    return [[*text(m), START, *[LATENT] * n, END, *text(answer)] for m, n in zip(lengths, n_latents)]


def collate(rows: list[list[int]], answer: int = 0, left: bool = False) -> dict[str, torch.Tensor]:
    """Pad so that first latents share a column (rows without any start in column 0, or end together if `left`).

    With `answer`, the last `answer` tokens of each row are labelled. Does not use the repository's collator on purpose.
    """
    first = [row.index(LATENT) if LATENT in row else None for row in rows]
    column = max((f for f in first if f is not None), default=0)
    shifts = [0 if f is None else column - f for f in first]
    if left and column == 0:
        shifts = [max(map(len, rows)) - len(row) for row in rows]
    width = max(shift + len(row) for shift, row in zip(shifts, rows))
    keys = ("input_ids", "attention_mask", "position_ids")
    batch = {key: torch.zeros(len(rows), width, dtype=torch.long) for key in keys}
    batch["input_ids"] += EOS
    if answer:
        batch["labels"] = torch.full((len(rows), width), -100)
    for b, (row, shift) in enumerate(zip(rows, shifts)):
        real = slice(shift, shift + len(row))
        batch["input_ids"][b, real] = torch.tensor(row)
        batch["attention_mask"][b, real] = 1
        batch["position_ids"][b, real] = torch.arange(len(row))
        if answer:
            batch["labels"][b, shift + len(row) - answer : shift + len(row)] = torch.tensor(row[-answer:])
    return batch


def gradients(model) -> dict[str, torch.Tensor]:
    """Gradients by parameter name; zeros where there is none."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def filled(model: Coconut, row: list[int]) -> torch.Tensor:
    """The embeddings [T, D] of one row, thoughts filled the slow way: a whole, uncached pass for each thought."""
    base = model.base_causallm
    embeds = list(base.get_input_embeddings()(torch.tensor(row)))
    for column in (column for column, token in enumerate(row) if token == model.latent_token_id):
        if model.feedback_mode == "continuous":
            whole = base(inputs_embeds=torch.stack(embeds)[None], use_cache=False, output_hidden_states=True)
            embeds[column] = whole.hidden_states[-1][0, column - 1]
        else:
            embeds[column] = model.pause_embedding
    return torch.stack(embeds)


def pause_variants(base) -> dict[str, Coconut]:
    """Every way to run the pause modes, around copies of one model, with one vector that is no token's embedding."""
    variants = {mode: wrap(base, mode) for mode in MODES[1:]}
    variants["forced"] = wrap(base, "learned_shared", force_multipass=True)
    vector = torch.randn(base.config.hidden_size, generator=torch.Generator().manual_seed(3)).to(base.dtype)
    for model in variants.values():
        model.pause_embedding.data.copy_(vector)
    return variants
