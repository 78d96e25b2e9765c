"""The append-only cache against the library's: values, gradients, what is copied, going back, rows; the additive mask."""

import pytest
import torch
import torch.nn.functional as F
from tiny import FAMILIES, build, collate, gradients, token_rows, with_other_attention, wrap
from transformers import DynamicCache, Llama4TextConfig, MistralConfig, MistralForCausalLM

import coconut
from attention import append_cache, appends_only, attention_bias, join_rows, select_rows, takes_bias

SIZES = (5, 1, 1, 3)  # columns of successive passes


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def passes(n_layers=2, seed=0):
    """Keys and values [2, 3, C, 4] of each pass and layer, leaves that want gradients."""
    torch.manual_seed(seed)
    return [
        [[torch.randn(2, 3, c, 4, dtype=torch.float64, requires_grad=True) for _ in "kv"] for _ in range(n_layers)]
        for c in SIZES
    ]


def attend(cache, states, keep=lambda i: True):
    """A loss that reads every pass's view of every layer, the later passes fed by the earlier ones."""
    total, carry = 0.0, 0.0
    for i, layers in enumerate(states):
        for layer, (k, v) in enumerate(layers):
            keys, values = cache.update(k + carry, v, layer)
            out = F.scaled_dot_product_attention(k * 1.5, keys, values)
            carry = out.mean()
            total = total + (out**2).sum() if keep(i) else total
    return total


@pytest.mark.parametrize("capacity", [10, 7, 1])
def test_values_and_gradients_equal_those_of_the_library(capacity):
    results = []
    for make in (DynamicCache, lambda config: append_cache(config, capacity)):
        states = passes()
        loss = attend(make(config=build("gpt2").config), states)
        loss.backward()
        results.append((loss, [x.grad for layers in states for pair in layers for x in pair]))
    close(results[0][0], results[1][0])
    assert len(results[0][1]) == 16
    for a, b in zip(results[0][1], results[1][1]):
        close(a, b)


def test_a_second_and_a_partial_backward_start_from_nothing():
    states = passes()
    loss = attend(append_cache(build("gpt2").config, 10), states)
    last, first = states[-1][0][0], states[0][0][0]
    (partial,) = torch.autograd.grad(loss, last, retain_graph=True)
    whole = [torch.autograd.grad(loss, [first, last], retain_graph=True) for _ in range(2)]
    for a, b in zip(*whole):
        close(a, b)
    close(partial, whole[0][1])
    reference = passes()
    slow = attend(DynamicCache(config=build("gpt2").config), reference)
    close(whole[0][0], torch.autograd.grad(slow, reference[0][0][0])[0])


def test_a_view_that_nothing_reads_is_no_obstacle():
    results = []
    for make in (DynamicCache, lambda config: append_cache(config, 10)):
        states = passes()
        attend(make(config=build("gpt2").config), states, keep=lambda i: i == 1).backward()
        results.append([x.grad for layers in states[:2] for pair in layers for x in pair])
    for a, b in zip(*results):
        close(a, b)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rollout_equals_the_one_on_the_library_cache(family, monkeypatch):
    batch, base = collate(token_rows([0, 3, 5, 1]), 4), build(family)
    runs = []
    for make in (None, lambda config, capacity: DynamicCache(config=config)):
        if make is not None:
            monkeypatch.setattr(coconut, "append_cache", make)
        model = wrap(base)
        out = model(**batch)
        out.loss.backward()
        runs.append((out.loss, out.inputs_embeds, gradients(model)))
    close(runs[0][0], runs[1][0])
    close(runs[0][1], runs[1][1])
    for name, gradient in runs[0][2].items():
        close(gradient, runs[1][2][name])


def saved_bytes(work) -> int:
    """Bytes that autograd keeps for the backward of `work`, each storage once."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = work()
    assert result is not None
    return sum(kept.values())


def test_the_prefix_is_stored_once_however_many_thoughts_follow(monkeypatch):
    """Keys and values are not copied again: the storage stays where it is, and training keeps far fewer bytes."""
    cache = append_cache(build("gpt2").config, 20)
    places = set()
    for layers in passes():
        keys, values = cache.update(*layers[0], 0)
        places.add((keys.data_ptr(), values.data_ptr()))
    assert len(places) == 1

    model, batch = wrap(build("gpt2")).train(), collate(token_rows([8] * 4, question=(60, 61)), 4)
    ours = saved_bytes(lambda: model(**batch).loss)
    monkeypatch.setattr(coconut, "append_cache", lambda config, capacity: DynamicCache(config=config))
    theirs = saved_bytes(lambda: model(**batch).loss)
    layers, columns, width, rows, size = 3, 60, 16, 4, 8
    one_copy = 2 * layers * columns * width * rows * size
    assert theirs - ours > 6 * one_copy, (theirs, ours, one_copy)


def test_crop_keeps_what_gradients_need_and_overwrites_without_them():
    config = build("gpt2").config
    first, second, third = (layers[0] for layers in passes()[:3])
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            cache = append_cache(config, 10)
            cache.update(*first, 0)
            old, _ = cache.update(*second, 0)
            before = old.clone()
            for layer in cache.layers[:1]:
                layer.crop(-1)
            new, _ = cache.update(*third, 0)
        close(new, torch.cat([first[0], third[0]], 2))
        assert torch.equal(old, before) == grad
        assert (new.data_ptr() == old.data_ptr()) != grad


def test_rows_are_picked_and_joined_with_the_shorter_padded_on_the_left():
    config = build("gpt2").config
    caches = []
    with torch.no_grad():
        for seed, n in ((1, 2), (2, 3)):
            cache = append_cache(config, 12)
            for layers in passes(3, seed)[:n]:
                for i, (k, v) in enumerate(layers):
                    cache.update(k, v, i)
            caches.append(cache)
        a, b = caches
        short, long = a.layers[1].keys.clone(), b.layers[1].keys.clone()
        select_rows(b, torch.tensor([1]))
        join_rows(a, b)
        new = torch.randn(3, 3, 1, 4, dtype=torch.float64)
        keys, _ = a.update(new, new, 1)
    width = long.shape[2]
    assert keys.shape == (3, 3, width + 1, 4) and width == short.shape[2] + 1
    close(keys[:2, :, 1:width], short)
    assert not keys[:2, :, :1].any()
    close(keys[2:, :, :width], long[1:])
    close(keys[:, :, width:], new)


def test_windows_are_masked_here_and_other_kinds_of_layers_stay_with_the_library():
    config = MistralConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8,
    )  # fmt: skip
    model = MistralForCausalLM(config)
    assert appends_only(append_cache(config, 4))
    assert takes_bias(model) and takes_bias(build("llama"))
    with_other_attention(model)
    assert not appends_only(append_cache(config, 4)) and not takes_bias(model)
    eager = build("gpt2")
    eager.set_attn_implementation("eager")
    assert appends_only(append_cache(eager.config, 4)) and not takes_bias(eager)
    chunks = Llama4TextConfig(num_hidden_layers=4, attn_implementation="sdpa")
    kinds = {type(layer).__name__ for layer in append_cache(chunks, 4).layers}
    assert kinds == {"AppendLayer", "DynamicSlidingWindowLayer"}


def test_a_window_counts_real_columns():
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1]])
    seen = (attention_bias(mask, 2, torch.float64, window=2)[:, 0] == 0).long().tolist()
    assert seen == [
        [[0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 0, 1]],  # column 3 is padding, and takes no place
        [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]],
    ]


def test_bias_is_the_causal_mask_with_padding():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    bias = attention_bias(mask, 1, torch.float64)
    assert bias.shape == (2, 1, 3, 4) and bias.dtype == torch.float64
    seen = (bias[:, 0] == 0).long().tolist()
    assert seen == [
        [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]],
        [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]],
    ]
    assert torch.isneginf(bias[bias != 0]).all()
