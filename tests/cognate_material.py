"""Tiny Cognate models for the tests, and the model's equations written out slowly, one column at a time.

model = cognate(attention_window=4)            # float64, dropout off, weights large enough to matter, in eval mode
states, steps = slow(model, embeds_TD)         # what enters the head, and where each token halts
"""

import torch
import torch.nn.functional as F

from backbones.cognate import CognateConfig, CognateForCausalLM
from backbones.window import rms

SHAPE = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 96,
    "attention_window": 6,
    "memory_size": 8,
    "gate_size": 8,
    "refiner_heads": 2,
    "bos_token_id": 59,
    "eos_token_id": 59,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "embedding_dropout": 0.0,
}
LAYERS_BESIDE_BLOCKS = 5  # memory, features, three answers


def cognate(seed: int = 0, dtype=torch.float64, **changes) -> CognateForCausalLM:
    """A random model whose tokens halt at different steps."""
    torch.manual_seed(seed)
    model = CognateForCausalLM(CognateConfig(**{**SHAPE, **changes})).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        model.model.act_head.logit.weight.mul_(3)
    return model.eval()


def tokens(n_rows: int, n_columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 56, (n_rows, n_columns), generator=torch.Generator().manual_seed(seed))


def _attention(q_TD, k_TD, v_TD, n_heads: int, window: int):
    out = []
    for t in range(len(q_TD)):
        first = max(0, t - window + 1)
        parts = []
        for q, k, v in zip(*(x.chunk(n_heads, -1) for x in (q_TD[t : t + 1], k_TD[first : t + 1], v_TD[first : t + 1]))):
            parts.append(torch.softmax(q @ k.T / q.shape[-1] ** 0.5, -1) @ v)
        out.append(torch.cat(parts, -1))
    return torch.cat(out)


def _reader(reader, x_TD, others_TD, window: int):
    mixed = _attention(reader.q_proj(x_TD), reader.k_proj(others_TD), reader.v_proj(others_TD), reader.n_heads, window)
    return reader.o_proj(mixed)


def _mixer(mixer, *inputs):
    return mixer.norm(inputs[0] + mixer.outer(F.relu(mixer.inner(torch.cat(inputs, -1)))))


def ema_loop(c_TBm: list, decay_m, m=0.0) -> list:
    """m_t = λ m_{t-1} + (1 - λ) c_t, one after the other."""
    traces = []
    for c in c_TBm:
        m = decay_m * m + (1 - decay_m) * c
        traces.append(m)
    return traces


def slow(model: CognateForCausalLM, embeds_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Evaluation of one row without padding: (states [T, D] that enter the head, halting step of each token)."""
    config, base = model.config, model.model
    T, w, eps = len(embeds_TD), config.attention_window, config.rms_norm_eps
    x = embeds_TD + base.embed_positions.weight[:T]
    for block in base.layers:
        a, s = block.attention, block.attention_norm(x)
        x = x + a.o_proj(_attention(a.q_proj(s), a.k_proj(s), a.v_proj(s), config.num_attention_heads, w))
        s = block.mlp_norm(x)
        x = x + block.mlp.down_proj(F.silu(block.mlp.gate_proj(s)) * block.mlp.up_proj(s))
    y = base.norm(x)

    m, longest = config.memory_size, config.memory_half_life
    half_life = torch.tensor([16 * (longest / 16) ** (i / (m - 1)) for i in range(m)], dtype=x.dtype)
    decay = 0.5 ** (1 / half_life)
    traces = ema_loop(list(base.memory.down(y)), decay)
    memory = base.memory.up(torch.stack([trace / (1 - decay ** (t + 1)) for t, trace in enumerate(traces)]))
    y, memory = rms(y, eps), rms(memory, eps)
    g = torch.sigmoid(base.gate.outer(F.relu(base.gate.inner(torch.cat([y, memory], -1)))))
    features = g * y + (1 - g) * memory

    refiner, updater = base.recursion.refiner, base.recursion.updater
    z = base.recursion.to_latent(features)
    answer = base.recursion.to_answer(z)
    going, unhalted, steps = torch.ones(T, dtype=torch.bool), torch.ones(T, dtype=x.dtype), torch.zeros(T, dtype=torch.long)
    for n in range(1, config.max_recursions + 1):
        new = z
        for _ in range(config.micro_steps):
            new_features = _reader(refiner.read_features, new, features, w)
            new = _mixer(refiner.mix, new, new_features, _reader(refiner.read_answers, new, answer, w))
        new_answer = _mixer(updater, answer, new)
        z, answer = torch.where(going[:, None], new, z), torch.where(going[:, None], new_answer, answer)
        steps[going] = n
        unhalted = unhalted * (1 - torch.sigmoid(base.act_head.logit(z)[:, 0]))
        going = going & (1 - unhalted < config.halt_threshold)
    return rms(answer, eps), steps


def close(a, b, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def at_labels(x_BT, labels):
    """[B, T, ...] at the columns whose next token is labelled."""
    rows, columns = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    return x_BT[rows, columns]
