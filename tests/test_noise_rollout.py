"""The fast way through a sweep (one prefix, rows = questions x scales) says what one question and one scale at a time says."""

from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import EOS, LATENT, build, token_rows, wrap
from transformers import AutoModelForCausalLM, MistralConfig

from analysis.interventions import Patch
from analysis.noise_answers import Answering
from analysis.noise_operators import Noise
from analysis.noise_rollout import LayerThoughts, Prefix, clean_thoughts, shares_prefix, source_layer
from dataset import MyCollator

TOKENIZER = SimpleNamespace(pad_token_id=EOS, eos_token_id=EOS)
SCALES = (0.0, 0.5, 2.0)
NOISES = [
    Noise(),
    Noise("snr", schedule="linear"),
    Noise("dropout", passes="first"),
    Noise("gaussian", passes=(2,)),
    Noise("targeted", "opposite", at_step=2, schedule="adaptive"),
    Noise("orthogonal", at_step=2, schedule="none"),
]


def questions(n: int = 4, latents: int = 3) -> list[np.ndarray]:
    return [np.array(row) for row in token_rows([latents] * n, answer=0, question=(2, 9))]


def said(model, noise, tokens=None, **options) -> dict:
    tokens = questions() if tokens is None else tokens
    answering = Answering(model, TOKENIZER, noise, SCALES, max_new_tokens=5, **{"batch_size": 9} | options)
    found = list(answering.run(tokens, [f"q{i}" for i in range(len(tokens))]))
    assert len(found) == len(tokens) * len(SCALES) and not any(one.error for one in found), found[0].error
    return {(one.place, one.scale): one for one in found}


def agree(one: dict, other: dict) -> None:
    assert {key: x.new_ids for key, x in one.items()} == {key: x.new_ids for key, x in other.items()}
    for key in one:
        assert one[key].norms.keys() == other[key].norms.keys()
        for slot, norms in one[key].norms.items():
            assert norms == pytest.approx(other[key].norms[slot], rel=1e-9), (key, slot)


@lru_cache
def model_of(family: str, mode: str = "continuous", latent_norm: str = "none"):
    return wrap(build(family), mode, latent_norm=latent_norm)


ADAPTIVE = NOISES[4]
MODELS = [
    *[("gpt2", "continuous", "none", -1, noise) for noise in NOISES],
    *[("llama", "continuous", "match_embedding", -1, noise) for noise in (NOISES[0], ADAPTIVE)],
    *[("qwen2", "continuous", "none", 2, noise) for noise in (NOISES[1], ADAPTIVE)],
    *[("gpt2", "frozen", "none", -1, noise) for noise in (NOISES[3], ADAPTIVE)],
]


@pytest.mark.parametrize("chain", ["recompute", "replay"])
@pytest.mark.parametrize(("family", "mode", "latent_norm", "layer", "noise"), MODELS)
def test_fast_is_slow(family, mode, latent_norm, layer, noise, chain):
    model = model_of(family, mode, latent_norm)
    fast = said(model, noise, noise_layer=layer, chain=chain)
    agree(fast, said(model, noise, noise_layer=layer, chain=chain, one_at_a_time=True))
    assert len({tuple(x.new_ids) for x in fast.values()}) > 3  # not all the same answer


def test_fast_is_slow_behind_sliding_windows():
    """Copies keep which columns of a padded row a window shows."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MistralConfig(sliding_window=4, vocab_size=60, num_key_value_heads=2, eos_token_id=EOS, **sizes)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).double()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model = wrap(base)
    found = said(model, Noise(), batch_size=100)
    assert {k: x.new_ids for k, x in found.items()} == {
        k: x.new_ids for k, x in said(model, Noise(), one_at_a_time=True).items()
    }


def test_backbones_that_share_nothing_are_run_whole():
    model = wrap(build("gpt2"), latent_iterations=2)
    assert not shares_prefix(model)
    agree(said(model, Noise()), said(model, Noise(), one_at_a_time=True))


def test_batch_size_and_order_change_nothing():
    model, tokens = wrap(build("llama")), questions(6)
    by_id = said(model, Noise(), tokens, batch_size=2)
    agree(by_id, said(model, Noise(), tokens, batch_size=100))
    answering = Answering(model, TOKENIZER, Noise(), SCALES, 5, 7)
    turned = list(answering.run(tokens[::-1], [f"q{i}" for i in range(6)][::-1]))
    agree(by_id, {(5 - one.place, one.scale): replace(one, place=5 - one.place) for one in turned})


def test_questions_of_different_shapes_stand_in_one_list():
    model = wrap(build("gpt2"))
    tokens = [*questions(2, 3), *questions(2, 1), *questions(2, 0), np.append(questions(1, 3)[0], 5)]
    agree(said(model, Noise(passes=(2,)), tokens), said(model, Noise(passes=(2,)), tokens, one_at_a_time=True))


def test_noise_changes_answers_and_scale_0_does_not():
    model = wrap(build("gpt2"))
    found = said(model, Noise("gaussian"))
    plain = Answering(model, TOKENIZER, max_new_tokens=5).run(questions(), list("abcd"))
    assert {x.place: x.new_ids for x in plain} == {place: x.new_ids for (place, scale), x in found.items() if scale == 0}
    assert any(found[i, 0.0].new_ids != found[i, 2.0].new_ids for i in range(4))
    assert not found[0, 0.0].norms and found[0, 2.0].norms.keys() == {1, 2, 3}


def test_snr_0_is_off_in_the_driver():
    model = wrap(build("gpt2"))
    agree(
        {k: replace(v, norms={}) for k, v in said(model, Noise("snr")).items() if k[1] == 0},
        {k: replace(v, norms={}) for k, v in said(model, Noise("gaussian")).items() if k[1] == 0},
    )


def test_the_two_chains_differ_only_where_thoughts_read_states():
    reads, pauses = wrap(build("gpt2")), wrap(build("gpt2"), "frozen")
    noise, norms = Noise("gaussian", passes=(1, 3)), {}
    for name, model in (("reads", reads), ("pauses", pauses)):
        for chain in ("recompute", "replay"):
            norms[name, chain] = said(model, noise, chain=chain)[0, 2.0].norms
    assert norms["reads", "recompute"][1] == pytest.approx(norms["reads", "replay"][1])
    assert norms["reads", "recompute"][3][0] != pytest.approx(norms["reads", "replay"][3][0], rel=1e-3)
    assert norms["pauses", "recompute"] == norms["pauses", "replay"]


def test_another_layer_changes_what_is_fed_back():
    """Its vector is the entry of `hidden_states` at the column before the slot."""
    model = wrap(build("llama"))
    tokens, collate = questions(3), MyCollator(TOKENIZER, LATENT, left=True)
    assert source_layer(model, -1) is None and source_layer(model, 3) is None and source_layer(model, -2) == 2
    feed = LayerThoughts(model, 2)
    _, thoughts_PSD = clean_thoughts(model, collate, tokens, feed)
    prefix = torch.tensor(tokens[0][: list(tokens[0]).index(LATENT)])[None]
    states = model.base_causallm(prefix, output_hidden_states=True).hidden_states
    assert torch.allclose(thoughts_PSD[0, 0], states[2][0, -1])
    assert not torch.allclose(thoughts_PSD[0, 0], states[-1][0, -1])
    for wrong in (0, 4, -5):
        with pytest.raises(ValueError, match="noise_layer"):
            source_layer(model, wrong)
    with pytest.raises(ValueError, match="read hidden states"):
        source_layer(wrap(build("gpt2"), "frozen"), 1)


def test_the_prefix_is_computed_once_for_all_scales():
    model, columns = wrap(build("gpt2")), []
    model.after_pass = lambda pass_, last: columns.append((pass_.start, pass_.stop, len(pass_.row_ids)))
    said(model, Noise(), questions(3), batch_size=100)
    assert [rows for *_, rows in columns] == [3]  # one rollout of three rows; copies go on behind it


def test_a_shared_prefix_refuses_rows_that_differ():
    model, collate = wrap(build("gpt2")), MyCollator(TOKENIZER, LATENT, left=True)
    mixed = collate([{"input_ids": x} for x in (*questions(1, 3), *questions(1, 2))])
    with pytest.raises(ValueError, match="same columns"):
        Prefix.run(model, mixed)
    with pytest.raises(ValueError, match="3 thoughts"):
        Prefix.run(model, collate([{"input_ids": questions(1)[0]}]), slot=4)


def test_a_failure_is_the_error_of_its_question_alone():
    model, tokens = wrap(build("gpt2", positions=24)), questions(5)
    tokens[3] = np.concatenate([np.ones(30, dtype=np.int64), tokens[3]])
    for options in ({}, {"one_at_a_time": True}, {"edit": Patch(0, torch.full((5, 1), -1), torch.zeros(5, 1, 16))}):
        answering = Answering(model, TOKENIZER, Noise(), SCALES, 4, 100, **options)
        found = {(x.place, x.scale): x for x in answering.run(tokens, list("abcde"))}
        assert {place for (place, _), x in found.items() if x.error} == {3}
        assert "24 positions" in found[3, 0.5].error and found[3, 0.5].new_ids is None


def test_states_that_are_not_finite_are_failures():
    model = wrap(build("gpt2", dtype=torch.float32))
    answering = Answering(model, TOKENIZER, Noise("gaussian"), (0.0, 1e38), 4)
    found = {(x.place, x.scale): x for x in answering.run(questions(2), ["a", "b"])}
    assert found[0, 0.0].error is None and "not finite" in found[0, 1e38].error
