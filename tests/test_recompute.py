"""Activation checkpointing of ours against plain training, over several passes; what it saves; what it refuses."""

import pytest
import torch
from test_attention import saved_bytes
from tiny import FAMILIES, build, collate, gradients, pause_variants, token_rows, with_other_attention, wrap
from transformers import MistralConfig, MistralForCausalLM

from coconut import decoder_blocks
from recompute import recompute_blocks


def both(make, batch, seed=0):
    """(loss, gradients) of plain training and of a recomputing copy."""
    results = []
    for again in (False, True):
        model = make().train()
        if again:
            recompute_blocks(decoder_blocks(model.base_causallm))
        torch.manual_seed(seed)
        loss = model(**batch).loss
        loss.backward()
        results.append((loss, gradients(model)))
    return results


def same(results):
    (loss, gradient), (other_loss, other) = results
    torch.testing.assert_close(loss, other_loss, rtol=1e-12, atol=1e-12)
    for name in gradient:
        torch.testing.assert_close(gradient[name], other[name], rtol=1e-12, atol=1e-12)
    assert sum(g.abs().sum() for g in other.values()) > 0.1


@pytest.mark.parametrize("iterations", [None, 1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_continuous_thoughts(family, iterations):
    batch = collate(token_rows([0, 4, 4, 2]), 4)
    same(both(lambda: wrap(build(family), latent_iterations=iterations), batch))


@pytest.mark.parametrize("name", ["learned_shared", "forced"])
def test_pause_modes(name):
    same(both(lambda: pause_variants(build("gpt2"))[name], collate(token_rows([3, 1]), 4)))


def test_dropout_draws_the_same_numbers_again():
    def make():
        model = wrap(build("gpt2"))
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
        return model

    batch = collate(token_rows([4, 4]), 4)
    same(both(make, batch))
    losses = {both(make, batch, seed)[0][0].item() for seed in (0, 1)}
    assert len(losses) == 2, "dropout must be on for the comparison to mean anything"


def test_it_keeps_a_fraction_of_the_bytes():
    batch = collate(token_rows([4] * 4, question=(40, 41)), 4)
    plain, again = wrap(build("gpt2")).train(), wrap(build("gpt2")).train()
    recompute_blocks(decoder_blocks(again.base_causallm))
    assert saved_bytes(lambda: again(**batch).loss) < 0.4 * saved_bytes(lambda: plain(**batch).loss)


def test_generation_is_untouched():
    model, again = wrap(build("gpt2")), wrap(build("gpt2"))
    recompute_blocks(decoder_blocks(again.base_causallm))
    batch = collate(token_rows([3, 2]))
    assert torch.equal(model.generate(**batch, max_new_tokens=5), again.generate(**batch, max_new_tokens=5))


def test_a_cache_that_cannot_be_redone_is_refused():
    config = MistralConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8,
    )  # fmt: skip
    model = wrap(with_other_attention(MistralForCausalLM(config))).train()
    recompute_blocks(decoder_blocks(model.base_causallm))
    with pytest.raises(ValueError, match="activation_checkpointing: layer 0 .* can't be done again"):
        model(**collate(token_rows([2, 2]), 4))
