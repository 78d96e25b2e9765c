"""What is recorded of each backbone family: a tiny model, described as published checkpoints describe theirs, and its numbers.

from golden.families import measure
numbers = measure("llama")                                      # {"parameters": .., "init": .., "logits": .., ..}
numbers = measure("llama", ["logits"], rope_theta=20000.0)      # what another model would give

Everything goes the way of a run: config.json, `load_backbone`, weights saved and loaded, `Coconut`. Weights and tokens come
from integers, so that no random generator matters except in `init`, which is about one. One more family is one more entry of
FAMILIES and `python tests/golden/make.py --only NAME`.
"""

import contextlib
import io
import json
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
from tiny import END, EOS, LATENT, START, collate, filled, wrap
from transformers import CONFIG_MAPPING

from backbones import load_backbone
from optimizers import build_optimizer

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("parameters", "init", "logits", "logits_float32", "tokens", "losses")

# Keys and spellings are those of published config.json files, defaults left out where these leave them out.
_SIZES = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
_WIDE = dict(_SIZES, max_position_embeddings=160, bos_token_id=EOS, eos_token_id=EOS, initializer_range=0.02)
_GROUPED = dict(_WIDE, num_key_value_heads=2, hidden_act="silu", torch_dtype="bfloat16", use_cache=True)
_GPT2 = {"vocab_size": 60, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 160, "n_ctx": 160, "attn_pdrop": 0.0}
_GPT2 |= {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "layer_norm_epsilon": 1e-5, "bos_token_id": EOS, "eos_token_id": EOS}
_SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_SCALED |= {"original_max_position_embeddings": 32}
_LLAMA = dict(_GROUPED, model_type="llama", rms_norm_eps=1e-5)
_QWEN = dict(_GROUPED, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True)
_QUIET = dict.fromkeys(("attention_dropout", "hidden_dropout", "embedding_dropout"), 0.0)
FAMILIES = {
    "gpt2": dict(_GPT2, model_type="gpt2", activation_function="gelu_new"),
    "llama": dict(_LLAMA, rope_scaling=None, tie_word_embeddings=False),
    "llama3": dict(_LLAMA, rope_theta=500000.0, rope_scaling=_SCALED, head_dim=8, tie_word_embeddings=True),
    "qwen2": dict(_QWEN, model_type="qwen2", use_sliding_window=False, sliding_window=32, max_window_layers=2),
    "qwen3": dict(_QWEN, model_type="qwen3", head_dim=16, attention_bias=False, sliding_window=None, max_window_layers=3),
    "mistral": dict(_GROUPED, model_type="mistral", rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=24),
    "lahr": dict(_WIDE, model_type="lahr", dropout=0.0, use_mod=True, mod_capacity=0.5, use_memory=True, memory_sub_keys=8),
    "cognate": dict(_WIDE, model_type="cognate", refiner_heads=4, memory_size=16, gate_size=16, attention_window=24, **_QUIET),
}
FOLDERS = {"prosqa_tiny": ROOT / "backbones/prosqa_tiny", "prosqa_words": ROOT / "backbones/prosqa_words"}  # init only

TOKENS = [0, 7, 31, 58]  # whose logits are recorded
MODES = {"logits": ("continuous", "learned_shared"), "losses": ("continuous", "pause_curriculum")}
N_NEW, N_STEPS = 12, 20
MARGIN = 1e-2  # at least, between a recorded greedy token's logit and the next best one's: far above rounding


def left_out(name: str) -> str | None:
    """Why a family is not recorded: its model_type is unknown to the library and registered by nothing here."""
    model_type = FAMILIES[name]["model_type"]
    return None if model_type in CONFIG_MAPPING else f"{name}: model_type {model_type!r} is not registered with transformers"


# ---------------------------------------------------------------- material from integers


def integers(name: str, n: int) -> torch.Tensor:
    """`n` scattered integers in [0, 999983), int64, the same everywhere: cubes modulo a prime, begun where `name` says."""
    prime = 999983
    return (torch.arange(n) + zlib.crc32(name.encode()) % prime) ** 3 % prime


def fill(model, salt: int) -> None:
    """Set all parameters: norms around 1, all else around 0, large enough for attention and norms that do something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            wave = integers(f"{salt} {name}", parameter.numel()).double() / 499991.0 - 1
            is_norm = parameter.ndim == 1 and not name.endswith("bias")
            parameter.copy_((1 + 0.5 * wave if is_norm else 0.4 * wave).view_as(parameter))


def token_row(name: str, question: int, n_latents: int, answer: int = 0) -> list[int]:
    text = (integers(name, question + answer) % START).tolist()
    return [*text[:question], START, *[LATENT] * n_latents, END, *text[question:]]


def ragged(number: int) -> list[list[int]]:
    """Rows of 82, 49 and 21 tokens or so with three, one and four thoughts: the batch pads them on both sides."""
    shapes = enumerate([(70, 3), (41, 1), (9, 4)])
    return [token_row(f"batch {number} row {i}", question + number, latents, answer=6) for i, (question, latents) in shapes]


# ---------------------------------------------------------------- models


def build(folder: Path, config: dict, salt: int):
    """The family's model in float32 as a user has it: saved weights under a published config.json, loaded."""
    (folder / "config.json").write_text(json.dumps(config))
    fresh = load_backbone(str(folder), from_scratch=True)
    fill(fresh, salt)
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        fresh.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(config))  # not as this version of the library writes it
        return load_backbone(str(folder)).eval()


def build_family(name: str, salt: int = 0, **changes):
    """The tiny model of a family, or of its config with changes."""
    with TemporaryDirectory() as folder:
        return build(Path(folder), FAMILIES[name] | changes, salt)


# ---------------------------------------------------------------- numbers


def init(source: dict | Path) -> dict[str, list[float]]:
    """Mean, standard deviation and first three values of each parameter that a run from scratch with seed 0 starts with."""
    with TemporaryDirectory() as folder:
        if isinstance(source, dict):
            (Path(folder) / "config.json").write_text(json.dumps(source))
        model = load_backbone(folder if isinstance(source, dict) else str(source), from_scratch=True, seed=0)
    values = {name: parameter.detach().double().flatten() for name, parameter in model.named_parameters()}
    return {
        name: [x.mean().item(), x.std(correction=min(1, x.numel() - 1)).item(), *x[:3].tolist()] for name, x in values.items()
    }


def recorded_columns(rows: list[list[int]]) -> list[list[int]]:
    """Of each row of `ragged`, the positions whose logits are recorded: early, amid the question, both markers, the last."""
    return [[2, row.index(START) // 2, row.index(START), row.index(END), len(row) - 1] for row in rows]


@torch.no_grad()
def logits(base, mode: str) -> list:
    """Logits of TOKENS at `recorded_columns` of a batch that is padded on both sides, thoughts filled: rows x 5 x 4."""
    rows = ragged(0)
    batch = collate(rows)
    logits_BTV = wrap(base, mode)(**batch).logits
    begins = batch["attention_mask"].argmax(1).tolist()
    columns = recorded_columns(rows)
    return [logits_BTV[b, [begins[b] + c for c in columns[b]]][:, TOKENS].tolist() for b in range(len(rows))]


@torch.no_grad()
def slow_logits(base, mode: str) -> list:
    """The same without batch, padding, cache or wrapper: what `logits` must be."""
    rows, columns, model = ragged(0), recorded_columns(ragged(0)), wrap(base, mode)
    wholes = [base(inputs_embeds=filled(model, row)[None], use_cache=False).logits[0] for row in rows]
    return [whole_TV[cs][:, TOKENS].tolist() for whole_TV, cs in zip(wholes, columns)]


def prompts() -> dict[str, torch.Tensor]:
    """Prompts with three thoughts each, padded on the left."""
    return collate([token_row(f"prompt {i}", question, 3) for i, question in enumerate((66, 38, 17, 5))])


def new_tokens(base) -> list[list[int]]:
    """What is generated behind `prompts`; EOS fills rows that have ended."""
    batch = prompts()
    return wrap(base).generate(**batch, max_new_tokens=N_NEW)[:, batch["input_ids"].shape[1] :].tolist()


@torch.no_grad()
def smallest_margin(base, tokens: list[list[int]]) -> float:
    """The smallest gap between a token's logit and the next best one's, up to each row's EOS; 0 where a thought was written."""
    if any(LATENT in row for row in tokens):
        return 0.0  # the rollout would fill it
    new_BN = torch.tensor(tokens)
    ids_BT, mask_BT = (torch.cat(pair, 1) for pair in zip(list(prompts().values())[:2], (new_BN, torch.ones_like(new_BN))))
    best = wrap(base)(ids_BT, mask_BT).logits[:, -1 - new_BN.shape[1] : -1].topk(2).values
    gap_BN = best[..., 0] - best[..., 1]
    ends = [row.index(EOS) + 1 if EOS in row else len(row) for row in tokens]
    return min(gap_BN[b, :end].min().item() for b, end in enumerate(ends))


def losses(base, mode: str) -> list[float]:
    """Twenty updates of AdamW, as a run makes it, over four batches in turn.

    In float64: in float32 AdamW makes whole steps of what is rounding in a gradient near 0, and curves part by 1e-3.
    """
    model = wrap(base, mode).train()
    optimizer = build_optimizer(model, SimpleNamespace(optimizer="adamw", lr=2e-3, adam_beta2=0.999, weight_decay=0.01))
    curve = []
    for step in range(N_STEPS):
        loss = model(**collate(ragged(step % 4), answer=6)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


def measure(name: str, parts=PARTS, salt: int = 0, **changes) -> dict:
    """The chosen parts of a family's numbers, as JSON values; of a folder of backbones/ only `init`."""
    if name in FOLDERS:
        return {"init": init(FOLDERS[name])}
    base = build_family(name, salt, **changes)
    exact = build_family(name, salt, **changes).double()
    makers = {
        "parameters": lambda: {key: list(parameter.shape) for key, parameter in base.named_parameters()},
        "init": lambda: init(FAMILIES[name] | changes),
        "logits": lambda: {mode: logits(exact, mode) for mode in MODES["logits"]},
        "logits_float32": lambda: {mode: logits(base, mode) for mode in MODES["logits"]},
        "tokens": lambda: new_tokens(base),
        "losses": lambda: {mode: losses(exact, mode) for mode in MODES["losses"]},
    }
    return {part: makers[part]() for part in parts}
