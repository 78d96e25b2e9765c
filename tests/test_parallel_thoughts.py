"""Thoughts refined in parallel: exact from as many iterations as thoughts on, an approximation below."""

import pytest
import torch
from tiny import FAMILIES, LATENT, build, collate, gradients, token_rows, wrap

from passes import plan_passes


def outcome(model, batch):
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    return out, gradients(model)


@pytest.mark.parametrize("iterations", [4, 9])
@pytest.mark.parametrize("n_latents", [[4, 4], [0, 4, 2], [1]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_iterations_as_thoughts_are_exact(family, n_latents, iterations):
    batch, base = collate(token_rows(n_latents), 4), build(family)
    (expected, wanted), (out, got) = (outcome(wrap(base, latent_iterations=t), batch) for t in (None, iterations))
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.inputs_embeds, expected.inputs_embeds, rtol=1e-11, atol=1e-11)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-9, atol=1e-11)


def test_thought_k_is_exact_from_iteration_k_on_and_not_before():
    batch, base = collate(token_rows([5, 5])), build("gpt2")
    slots = (batch["input_ids"] == LATENT)[0].nonzero().flatten()
    exact = wrap(base)(**batch).inputs_embeds[:, slots]
    for iterations in range(1, 6):
        fed = wrap(base, latent_iterations=iterations)(**batch).inputs_embeds[:, slots]
        error = (fed - exact).abs().amax((0, 2))
        assert (error[:iterations] < 1e-11).all() and (error[iterations:] > 1e-3).all(), (iterations, error)


def test_one_iteration_leaves_the_later_slots_to_their_token():
    batch, model = collate(token_rows([3])), wrap(build("gpt2"), latent_iterations=1)
    slots = (batch["input_ids"] == LATENT)[0].nonzero().flatten()
    fed = model(**batch).inputs_embeds[0, slots]
    token = model.embedding(torch.tensor(LATENT))
    assert torch.equal(fed[1], token) and torch.equal(fed[2], token) and not torch.equal(fed[0], token)


def test_passes():
    latent = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 0, 0]], dtype=torch.bool)
    spans = [(p.start, p.stop, [s.k for s in p.slots], p.again) for p in plan_passes(latent, True, (0, 1), iterations=3)]
    slots = [0, 1, 2]
    assert spans == [(0, 2, [], False), (2, 5, slots, True), (2, 5, slots, True), (2, 6, slots, False)]
    assert len(plan_passes(latent, True, (0, 1), iterations=1)) == 2
    assert len(plan_passes(latent, True, (0, 1), iterations=50)) == 4, "more iterations than thoughts bring nothing"
    assert len(plan_passes(latent, False, (0, 1), iterations=3)) == 1


@pytest.mark.parametrize("iterations", [1, 2, 4])
def test_generation_goes_on_from_the_thoughts_of_training(iterations):
    """Greedy decoding equals the arg-max of a teacher-forced forward over what it wrote, iterations and all."""
    batch, model = collate(token_rows([4, 4], question=(4, 5), answer=0)), wrap(build("gpt2"), latent_iterations=iterations)
    model.eos_token_id = -1
    ids = model.generate(**batch, max_new_tokens=6)
    logits = model(ids).logits
    width = batch["input_ids"].shape[1]
    assert torch.equal(logits[:, width - 1 : -1].argmax(-1), ids[:, width:])


@pytest.mark.parametrize("mode,iterations", [("learned_shared", 2), ("continuous", 0), ("frozen", 1)])
def test_refused_where_it_means_nothing(mode, iterations):
    with pytest.raises(ValueError, match="latent_iterations must be at least 1, and needs feedback_mode continuous"):
        wrap(build("gpt2"), mode, latent_iterations=iterations)
