"""Noise on vectors: every identity of every type, the reference norms, schedules, draws, and which rows and slots are met."""

import math
import random

import numpy as np
import pytest
import torch
from tiny import END, EOS, FAMILIES, LATENT, START, build, collate, token_rows, wrap

from analysis.noise_operators import (
    NOISE_TYPES,
    Noise,
    NoiseEdit,
    NoisyRow,
    apply_noise_to_hidden_states,
    draw_generator,
    running_mean,
    scheduled_scale,
)
from attention import append_cache

D, NORM = 64, 8.16
SEEDED = Noise("gaussian_scaled", seed=3)
EVERY = [(name, None) for name in NOISE_TYPES] + [("targeted", "opposite"), ("targeted", "random_orthogonal")]


def vectors(n: int = 400, dtype=torch.float32) -> torch.Tensor:
    h = torch.randn(n, D, generator=torch.Generator().manual_seed(1))
    return (NORM * h / h.norm(dim=-1, keepdim=True)).to(dtype)


def noisy(h, scale, noise_type, direction=None, seed=0):
    return apply_noise_to_hidden_states(h, scale, noise_type, direction, torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- operators


@pytest.mark.parametrize(
    ("noise_type", "direction", "scale", "norm", "ratio"),
    [
        ("gaussian", None, 0.5, 3.98, None),
        ("gaussian_scaled", None, 0.5, 4.078, None),
        ("snr", None, 10, 0.816, None),
        ("snr", None, 0, 8156, None),
        ("uniform", None, 0.5, 2.31, None),
        ("orthogonal", None, 0.5, 4.078, 1.118),
        ("targeted", "opposite", 0.5, 4.078, 0.5),
    ],
)
def test_reference_norms(noise_type, direction, scale, norm, ratio):
    _, info = noisy(vectors(), scale, noise_type, direction)
    assert info["noise_norm"] == pytest.approx(norm, rel=0.01)
    assert info["original_norm"] == pytest.approx(NORM, rel=1e-3)
    assert ratio is None or info["norm_change_ratio"] == pytest.approx(ratio, rel=1e-3)


def test_gaussian_is_absolute_and_normal():
    h = vectors()
    noise = noisy(h, 0.3, "gaussian")[0] - h
    assert noise.std() == pytest.approx(0.3, rel=0.02) and abs(noise.mean()) < 0.01
    assert torch.allclose(noise, noisy(10 * h, 0.3, "gaussian")[0] - 10 * h, atol=1e-4)


@pytest.mark.parametrize(("noise_type", "factor"), [("gaussian_scaled", 0.7), ("snr", 1 / 0.7), ("orthogonal", 0.7)])
def test_relative_noise_has_the_asked_norm_on_every_vector(noise_type, factor):
    h = vectors() * torch.linspace(0.1, 5, 400)[:, None]  # all lengths
    scale = 0.7
    noise = noisy(h.double(), scale, noise_type)[0] - h.double()
    expected = h.double().norm(dim=-1) * factor
    assert torch.allclose(noise.norm(dim=-1), expected, rtol=1e-5)


def test_snr_info_holds_the_amplitude_ratio_and_norms():
    _, info = noisy(vectors(), 4.0, "snr")
    assert (info["target_snr"], info["actual_snr"]) == (4.0, pytest.approx(4.0, rel=1e-5))
    assert info["signal_power"] == pytest.approx(NORM, rel=1e-3) and info["noise_power"] == pytest.approx(NORM / 4, rel=1e-3)
    assert noisy(vectors(), -1.0, "snr")[1]["noise_norm"] == pytest.approx(1000 * NORM, rel=1e-3)


def test_uniform_stays_within_its_bounds():
    h = vectors()
    noise = noisy(h, 0.5, "uniform")[0] - h
    assert 0.49 < noise.abs().max() <= 0.5 + 1e-6 and abs(noise.mean()) < 0.01


@pytest.mark.parametrize(("noise_type", "direction"), [("orthogonal", None), ("targeted", "random_orthogonal")])
def test_orthogonal_noise_is_orthogonal(noise_type, direction):
    h = vectors()
    after, info = noisy(h, 2.0, noise_type, direction)
    assert torch.cosine_similarity(after - h, h, dim=-1).abs().max() < 1e-5
    assert after.norm(dim=-1).mean() / NORM == pytest.approx(math.sqrt(5), rel=1e-4)
    assert abs(info["orthogonality"]) < 1e-6


def test_targeted_stretches_and_shrinks():
    h = vectors()
    assert torch.allclose(noisy(h, 0.5, "targeted")[0], 1.5 * h) and torch.equal(
        noisy(h, 0.5, "targeted", "same")[0], noisy(h, 0.5, "targeted", seed=9)[0]
    )
    assert not noisy(h, 1.0, "targeted", "opposite")[0].any()
    assert noisy(h, 0.5, "targeted", "opposite")[1]["direction"] == "opposite"
    assert noisy(h, 0.5, "targeted")[1]["direction"] == "same"


def test_dropout_zeroes_a_share_and_keeps_the_rest_as_it_is():
    h = vectors()
    after, info = noisy(h, 0.3, "dropout")
    zero = after == 0
    assert zero.float().mean() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(after[~zero], h[~zero])
    assert info["dropout_prob"] == 0.3 and info["noise_norm"] == pytest.approx((after - h).norm(dim=-1).mean().item(), rel=1e-5)
    assert not noisy(h, 1.0, "dropout")[0].any() and noisy(h, 3.0, "dropout")[1]["dropout_prob"] == 1.0


@pytest.mark.parametrize(("noise_type", "direction"), [kind for kind in EVERY if kind[0] != "snr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_scale_0_gives_back_the_same_bits(noise_type, direction, dtype):
    h = vectors(20, dtype)
    h[0] = -0.0
    after = noisy(h, 0.0, noise_type, direction)[0]
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[h.element_size()]
    assert torch.equal(after.view(integers), h.view(integers))


@pytest.mark.parametrize(("noise_type", "direction"), EVERY)
def test_dtype_is_kept_and_nothing_is_written_in_place(noise_type, direction):
    for dtype in (torch.bfloat16, torch.float64):
        h = vectors(20, dtype)
        before = h.clone()
        after, info = noisy(h, 0.5, noise_type, direction)
        assert after.dtype == dtype and torch.equal(h, before) and not torch.equal(after, h)
        # the noise is that of float32, not of a coarse dtype
        fine, _ = noisy(before.float(), 0.5, noise_type, direction)
        assert torch.allclose(after.float(), fine, rtol=0.01, atol=0.05)
        assert info["perturbed_norm"] == pytest.approx(fine.norm(dim=-1).mean().item(), rel=1e-2)


def test_gradients_flow_through():
    h = vectors(4).requires_grad_()
    noisy(h, 0.5, "gaussian")[0].sum().backward()
    assert torch.equal(h.grad, torch.ones_like(h))


def test_unknown_names_and_nan_are_refused():
    h = vectors(2)
    with pytest.raises(ValueError, match="^Unknown noise_type"):
        apply_noise_to_hidden_states(h, 1.0, "pink")
    with pytest.raises(ValueError, match="^Unknown noise_direction"):
        apply_noise_to_hidden_states(h, 1.0, "targeted", "up")
    with pytest.raises(ValueError, match="NaN"):
        apply_noise_to_hidden_states(h, math.nan, "gaussian")
    with pytest.raises(ValueError, match="^Unknown schedule"):
        scheduled_scale("steep", 1.0, 0, 3)
    with pytest.raises(ValueError, match="needs the norm"):
        scheduled_scale("adaptive", 1.0, 0, 3)
    with pytest.raises(ValueError, match="noise_passes"):
        Noise(passes=(0,))


# ---------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("none", [0, 0, 0, 0]),
        ("constant", [2, 2, 2, 2]),
        ("linear", [2, 1.5, 1, 0.5]),
        ("cosine", [2, 1 + math.cos(math.pi / 4), 1, 1 - math.cos(math.pi / 4)]),
        ("exponential", [2 * math.exp(-0.5 * t) for t in range(4)]),
    ],
)
def test_schedules(schedule, expected):
    assert [scheduled_scale(schedule, 2.0, t, 4) for t in range(4)] == pytest.approx(expected)
    ratios = [scheduled_scale(schedule, 2.0, t, 4, noise_type="snr") for t in range(4)]  # acts on 1 / s
    assert [1 / ratio for ratio in ratios] == pytest.approx([x / 4 for x in expected])


def test_adaptive_follows_the_norm_against_its_running_mean():
    mean = running_mean(running_mean(None, 10.0), 20.0)
    assert mean == pytest.approx(11.0)
    assert scheduled_scale("adaptive", 2.0, 1, 4, norm=20.0, mean_norm=mean) == pytest.approx(2 * math.exp(-0.5) * 20 / 11)


@pytest.mark.parametrize(
    ("noise", "expected"),
    [
        (Noise(), [3, 3, 3, 3]),
        (Noise(passes="first"), [3, 0, 0, 0]),
        (Noise(passes=(2, 4)), [0, 3, 0, 3]),
        (Noise(at_step=2, schedule="none"), [0, 3, 0, 0]),
        (Noise(at_step=2, passes="first"), [0, 3, 0, 0]),
        (Noise(at_step=2, schedule="linear"), [0, 3, 3, 1.5]),
        (Noise("snr", schedule="linear"), [3, 3, 4.5, 9]),
        (Noise("snr", schedule="none"), [3, 0, 0, 0]),
    ],
)
def test_scale_of_each_slot(noise, expected):
    assert [noise.scale_at(k, 3.0, 4) for k in (1, 2, 3, 4)] == pytest.approx(expected)
    assert [noise.scale_at(k, 0.0, 4) for k in (1, 2, 3, 4)] == [0, 0, 0, 0]  # off, for snr too
    assert noise.first_slot == next(k for k, scale in enumerate(expected, start=1) if scale)


# ---------------------------------------------------------------- draws


def test_draws_are_named_by_a_stable_hash():
    assert draw_generator(0, "abc", 1, 2).initial_seed() == 10954422385385986744
    own = [
        draw_generator(*key).initial_seed() for key in ((0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1), (1, 1, 1, 0), (11, 1, 1, 1))
    ]
    assert len(set(own)) == len(own)


def edit_of(scales, noise=SEEDED, n_slots=2):
    return NoiseEdit(noise, [NoisyRow(f"q{i // len(scales)}", s, n_slots) for i, s in enumerate(scales * 3)])


def test_noise_of_a_row_depends_on_neither_batch_nor_order():
    h, rows = vectors(6), list(range(6))
    together = edit_of([0.5, 2.0]).noisy(0, h, rows)
    alone = torch.cat([edit_of([0.5, 2.0]).noisy(0, h[i : i + 1], [i]) for i in rows])
    order = [4, 0, 5, 2, 1, 3]
    shuffled = edit_of([0.5, 2.0]).noisy(0, h[order], order)
    assert torch.equal(together, alone) and torch.equal(shuffled, together[order])
    assert not torch.allclose(edit_of([0.5, 2.0]).noisy(1, h, rows), together)  # another slot, another draw
    other = NoiseEdit(Noise(seed=4), edit_of([0.5, 2.0]).rows).noisy(0, h, rows)
    assert not torch.allclose(other, together)


def test_scales_share_one_draw_and_branches_do_not():
    h = vectors(1).expand(4, D)
    rows = [NoisyRow("q", 0.5, 1), NoisyRow("q", 2.0, 1), NoisyRow("q", 0.5, 1, branch=1), NoisyRow("p", 0.5, 1)]
    noise = NoiseEdit(Noise(), rows).noisy(0, h, range(4)) - h
    assert torch.allclose(noise[1], 4 * noise[0], rtol=1e-4, atol=1e-4)
    cosines = torch.cosine_similarity(noise[:1], noise[2:], dim=-1)
    assert cosines.abs().max() < 0.6


def test_global_generators_are_left_alone():
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    for noise_type in NOISE_TYPES:
        apply_noise_to_hidden_states(vectors(2), 0.5, noise_type)
        edit_of([0.5], Noise(noise_type)).noisy(0, vectors(3), [0, 1, 2])
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == np.random.get_state()[1].tolist() and states[2] == random.getstate()


# ---------------------------------------------------------------- in the model


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_vector_fed_into_a_slot_changes(family):
    """The column before the slot keeps its keys, values and logits, exactly; rows without the slot keep all."""
    model = wrap(build(family))
    batch = collate(token_rows([2, 1, 2], answer=3))
    slot = int((batch["input_ids"] == LATENT).any(0).int().argmax()) + 1  # the second slot, which row 1 has not
    noise = Noise("gaussian_scaled", passes=(2,))
    caches, seen = [], []
    with torch.no_grad():
        for scale in (0.0, 1.0):
            edit = NoiseEdit(noise, [NoisyRow(i, scale, n) for i, n in enumerate([2, 1, 2])])
            cache = append_cache(model.base_causallm.config, batch["input_ids"].shape[1])
            seen.append(model.rollout(**batch, cache=cache, edit=edit))
            caches.append(cache)
        plain = model.rollout(**batch)
    clean, changed = seen
    assert torch.equal(clean.hidden_BTD, plain.hidden_BTD)  # scale 0 is no edit at all
    for before, after in zip(caches[0].layers, caches[1].layers):
        for name in ("keys", "values"):
            a, b = getattr(before, name), getattr(after, name)
            assert torch.equal(a[:, :, :slot], b[:, :, :slot])
            assert not torch.equal(a[0, :, slot:], b[0, :, slot:])
    logits = [model.head(x.hidden_BTD) for x in (clean, changed)]
    assert torch.equal(logits[0][:, :slot], logits[1][:, :slot])
    where = (clean.inputs_embeds_BTD != changed.inputs_embeds_BTD).any(-1)
    assert where.nonzero().tolist() == [[0, slot], [2, slot]]
    assert torch.equal(clean.hidden_BTD[1], changed.hidden_BTD[1])
    assert {START, END, EOS}.isdisjoint(batch["input_ids"][where].tolist())


def test_generation_takes_the_edit():
    model = wrap(build("gpt2"))
    batch = collate(token_rows([2, 2], answer=0), left=True)
    rows = [NoisyRow(i, 3.0, 2) for i in range(2)]
    clean = model.generate(**batch, max_new_tokens=8, output_embedding=True)
    edit = NoiseEdit(Noise(), rows)
    changed = model.generate(**batch, max_new_tokens=8, output_embedding=True, edit=edit)
    columns = batch["input_ids"][0] == LATENT
    assert not torch.equal(clean[1][:, : len(columns)][:, columns], changed[1][:, : len(columns)][:, columns])
    norm, size = edit.norms[0][1]
    assert size == pytest.approx(3 * norm, rel=1e-6) and edit.norms[1].keys() == {1, 2}
