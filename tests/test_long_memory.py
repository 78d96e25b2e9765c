"""The EMA pool against the loop it replaces, and the Titans memory against its equations."""

import math

import pytest
import torch
import torch.nn.functional as F
from cognate_material import close, cognate, ema_loop, tokens

from backbones.cognate import CognateConfig
from backbones.long_memory import EmaPool, TitansMemory, decaying_average
from backbones.window import Shelf, Window

NO_SHELF = Shelf(None, 0)


def whole(x_BCD, mask=None) -> Window:
    return Window(4, mask, 0, x_BCD.shape[1], x_BCD.device)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---------------------------------------------------------------- the average


@pytest.mark.parametrize("chunk", [1, 3, 7, 128])
@pytest.mark.parametrize("past", [False, True])
def test_closed_form_equals_the_loop(chunk, past):
    c, log_decay = random(2, 23, 4), -torch.tensor([0.7, 0.05, 1e-3, 1e-5], dtype=torch.float64)
    m = random(2, 4, seed=1) if past else None
    c.requires_grad_()
    got = decaying_average(c, log_decay, None, m, chunk)
    expected = torch.stack(ema_loop(c.unbind(1), log_decay.exp(), 0.0 if m is None else m), 1)
    close(got, expected, 1e-12)
    weight = random(2, 23, 4, seed=2)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), c) for x in (got, expected))):
        close(a, b, 1e-12)


@pytest.mark.parametrize("chunk", [2, 5, 64])
def test_padding_neither_decays_nor_writes(chunk):
    c, log_decay = random(3, 19, 4), -torch.tensor([0.5, 0.1, 0.01, 0.001], dtype=torch.float64)
    real = random(3, 19, seed=3) > -0.3
    got = decaying_average(c, log_decay, real, None, chunk)
    for row, of_row, traces in zip(c, real, got):
        tight = torch.stack(ema_loop(row[of_row].unbind(0), log_decay.exp()))
        before = of_row.cumsum(0)
        expected = torch.where(before[:, None] > 0, tight[(before - 1).clamp(min=0)], 0.0)
        close(traces, expected, 1e-12)


def test_long_sequences_neither_overflow_nor_lose_digits():
    # λ^-n of the fastest channel is 2^128 behind 2048 tokens: without chunks float32 has no number for it.
    pool = EmaPool(CognateConfig())
    assert pool.chunk == 128
    c = random(1, 2048, 128, dtype=torch.float32) + 1
    log_decay = pool.log_decay(c)
    got = decaying_average(c, log_decay, None, None, pool.chunk)
    expected = torch.stack(ema_loop(c.double().unbind(1), log_decay.double().exp()), 1)
    close(got.double(), expected, 1e-5)


# ---------------------------------------------------------------- the pool


def test_half_lives_run_from_sixteen_tokens_to_the_specializations():
    for name, longest in (("reasoning", 4096), ("memory", 8192), ("speed", 2048)):
        pool = EmaPool(CognateConfig(specialization=name))
        half_life = -math.log(2) / pool.log_decay(torch.zeros((), dtype=torch.float64))
        assert len(half_life) == 128
        close(half_life[[0, -1]], torch.tensor([16.0, longest], dtype=torch.float64))
        ratios = half_life[1:] / half_life[:-1]
        close(ratios, ratios[:1].expand_as(ratios))


def test_one_decay_for_all_channels_is_the_originals():
    pool = EmaPool(CognateConfig(memory_decay=0.99))
    decay = pool.log_decay(torch.zeros((), dtype=torch.float64)).exp()
    close(decay, torch.full((128,), 0.99, dtype=torch.float64))
    assert round(-math.log(2) / math.log(0.99)) == 69 and 0.99**458 < 0.0101


def test_a_constant_input_is_remembered_at_full_strength_from_the_first_token():
    pool = EmaPool(CognateConfig(hidden_size=16, memory_size=8, specialization="memory")).double()
    y = random(1, 1, 16).expand(2, 40, 16)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :7] = 0
    read = pool(y, whole(y, mask), NO_SHELF)
    expected = pool.up(pool.down(y))
    close(read[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("kind", ["ema", "titans"])
@torch.no_grad()
def test_memory_is_causal_by_row_and_reaches_beyond_the_window(kind):
    model, ids = cognate(memory_type=kind, attention_window=2, num_hidden_layers=1, max_recursions=0), tokens(2, 12)
    before = model(ids).logits
    ids[0, 3] = (ids[0, 3] + 1) % 56
    moved = (model(ids).logits - before).abs().amax(-1)
    assert (moved[0, :3] < 1e-12).all() and (moved[1] < 1e-12).all()
    assert (moved[0, 3:] > 1e-9).all()  # through the memory alone from column 5 on


# ---------------------------------------------------------------- Titans


def titans(**changes) -> TitansMemory:
    torch.manual_seed(0)
    shape = {"hidden_size": 6, "memory_size": 4, "num_attention_heads": 1, "refiner_heads": 1}
    memory = TitansMemory(CognateConfig(memory_type="titans", **shape, **changes)).double()
    for parameter in memory.parameters():
        torch.nn.init.normal_(parameter)
    return memory


def by_gradient(memory, y_TD):
    """Reads of one sequence, with the gradient of the loss taken by autograd."""
    k, v, q = (F.normalize(proj(y_TD), dim=-1).detach() for proj in (memory.key, memory.value, memory.query))
    rates = memory.rates(y_TD).detach() - torch.tensor([0.0, 0.0, 4.0])
    M, S, reads, writes = torch.zeros(4, 4, dtype=torch.float64), 0.0, [], []
    for t, (eta, theta, alpha) in enumerate(rates.sigmoid()):
        M.requires_grad_()
        loss = (M @ k[t] - v[t]).square().sum()
        (gradient,) = torch.autograd.grad(loss, M)
        writes.append(loss.sqrt().item() > memory.threshold)
        S = eta * S - theta * gradient * writes[-1]
        M = ((1 - alpha) * M + S).detach()
        reads.append(M @ q[t])
    return memory.up(torch.stack(reads)), writes


@pytest.mark.parametrize("name", ["reasoning", "speed"])
def test_titans_descends_the_gradient_of_its_loss(name):
    memory, y = titans(specialization=name), random(3, 9, 6)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[2, :4] = 0
    read = memory(y, whole(y, mask), NO_SHELF)
    for row, of_row, mine in zip(y, mask.bool(), read):
        close(mine[of_row], by_gradient(memory, row[of_row])[0])


def test_titans_writes_only_what_surprises():
    memory, y = titans(surprise_threshold=0.9), random(1, 1, 6).expand(1, 5, 6)
    writes = by_gradient(memory, y[0])[1]
    assert writes[0] and not all(writes)  # the same token over and over soon surprises no more
    close(memory(y, whole(y), NO_SHELF)[0], by_gradient(memory, y[0])[0])


def test_every_parameter_of_titans_learns():
    model, ids = cognate(memory_type="titans").train(), tokens(2, 8)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.model.memory.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().amax() > 1e-12, name
