"""Cognate column by column: any chunking, rows that come and go, thoughts through the wrapper, generation."""

import pytest
import torch
import torch.nn.functional as F
from cognate_material import LAYERS_BESIDE_BLOCKS, close, cognate, slow, tokens
from tiny import EOS, LATENT, collate, filled, gradients, token_rows, wrap
from transformers import DynamicCache, StaticCache

from attention import append_cache, join_rows, no_cache, select_rows
from coconut import decoder_blocks
from recompute import recompute_blocks

ANSWER = 4
RAGGED = [0, 2, 4, 1]
CACHES = {
    "append": lambda config: append_cache(config, 64),
    "append, too small": lambda config: append_cache(config, 3),
    "dynamic": lambda config: DynamicCache(config=config),
    "dynamic, without config": lambda config: DynamicCache(),
}
KINDS = {
    "window": {"attention_window": 4},
    "memory": {"specialization": "memory", "attention_window": 3},
    "speed": {"specialization": "speed"},
    "shallow": {"max_recursions": 1},
    "no recursion": {"max_recursions": 0},
    "whole depth": {"early_exit": False},
    "one decay": {"memory_decay": 0.99},
    "titans": {"memory_type": "titans", "halt_threshold": 0.6},
}


def chunked(model, ids, mask, lengths, cache):
    """(states, halting steps) of the model run over pieces of the columns."""
    states, steps, start = [], [], 0
    for n in lengths:
        seen = None if mask is None else mask[:, : start + n]
        out = model.model(input_ids=ids[:, start : start + n], attention_mask=seen, past_key_values=cache)
        states.append(out.last_hidden_state)
        steps.append(out.columns["halting_steps"])
        start += n
    return torch.cat(states, 1), torch.cat(steps, 1)


# ---------------------------------------------------------------- chunks


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_any_chunking_is_one_pass(kind, cache):
    model, ids = cognate(**KINDS[kind]), tokens(3, 17)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0  # left padding
    whole = model.model(input_ids=ids, attention_mask=mask, use_cache=False)
    steps, real = whole.columns["halting_steps"], mask.bool()
    for lengths in ([17], [16, 1], [1] * 17, [7, 1, 1, 8], [2, 3, 5, 7]):
        states, chunk_steps = chunked(model, ids, mask, lengths, CACHES[cache](model.config))
        close(states[real], whole.last_hidden_state[real])
        assert torch.equal(chunk_steps[real], steps[real])
        states, _ = chunked(model, ids[:1], None, lengths, CACHES[cache](model.config))
        close(states, whole.last_hidden_state[:1])
    if kind in ("window", "memory", "titans"):
        assert steps[real].unique().numel() > 1, "all tokens halt together: nothing is skipped here"


@torch.no_grad()
def test_the_cache_holds_its_layers_column_by_column():
    model, ids = cognate(), tokens(2, 9)
    for cache in (append_cache(model.config, 9), DynamicCache(config=model.config)):
        model(ids, past_key_values=cache)
        assert len(cache.layers) == model.config.num_hidden_layers + LAYERS_BESIDE_BLOCKS
        assert {layer.get_seq_length() for layer in cache.layers} == {9}
        trace = cache.layers[model.config.num_hidden_layers]
        assert trace.keys.shape == (2, 1, 9, model.config.memory_size) and trace.values.shape[-1] == 0
        cache.crop(-4)
        close(model(ids[:, 5:], past_key_values=cache).logits, model(ids, use_cache=False).logits[:, 5:])


@torch.no_grad()
def test_a_cache_that_keeps_nothing_is_no_cache():
    model, ids = cognate(), tokens(2, 9)
    expected = model.model(input_ids=ids, use_cache=False).last_hidden_state
    close(model.model(input_ids=ids, past_key_values=no_cache(model.config)).last_hidden_state, expected)


@torch.no_grad()
def test_rows_are_picked_joined_and_padded():
    model, ids, mask = cognate(), tokens(3, 14), torch.ones(3, 14, dtype=torch.long)
    mask[2, :4] = 0
    expected = model(ids, mask).logits
    first, second = append_cache(model.config, 14), append_cache(model.config, 14)
    model(ids[:2, :10], past_key_values=first)
    model(ids[2:, 4:10], past_key_values=second)
    select_rows(first, torch.tensor([1]))
    join_rows(first, second)
    again = model(ids[1:, 10:], mask[1:], past_key_values=first, position_ids=torch.tensor([[10], [6]]) + torch.arange(4))
    close(again.logits, expected[1:, 10:])


@torch.no_grad()
def test_columns_that_the_mask_hides_are_as_if_they_had_not_been():
    # What decoding does to look ahead from an earlier token: the window and the memory must step over hidden columns.
    for kind in ("window", "titans"):
        model, ids = cognate(**KINDS[kind]), tokens(2, 12)
        cache, kept = append_cache(model.config, 12), torch.cat([ids[:, :5], ids[:, 9:]], 1)
        model(ids[:, :9], past_key_values=cache)
        mask = torch.ones(2, 12, dtype=torch.long)
        mask[:, 5:9] = 0
        tail = model(ids[:, 9:], mask, past_key_values=cache, position_ids=torch.arange(5, 8)[None]).logits
        close(tail, model(kept).logits[:, 5:])


@torch.no_grad()
def test_a_four_dimensional_mask_is_the_two_dimensional_one():
    model, ids = cognate(), tokens(2, 10)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, :3] = 0
    seen = (mask.bool()[:, None] & torch.ones(10, 10, dtype=torch.bool).tril() | torch.eye(10, dtype=torch.bool))[:, None]
    additive = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, float("-inf"))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = model(ids, mask).logits[mask.bool()]
    for form in (seen, additive):
        close(model(ids, form, position_ids=positions).logits[mask.bool()], expected)


def test_what_a_cache_cannot_be_is_refused():
    model, ids = cognate(), tokens(1, 6)
    cache = append_cache(model.config, 6)
    model(ids[:, :4], past_key_values=cache)
    with pytest.raises(ValueError, match="covers 2 columns; with 4 in the cache and 2 new ones it must cover 6"):
        model(ids[:, 4:], torch.ones(1, 2), past_key_values=cache)
    with pytest.raises(ValueError, match="can't hold this model; use DynamicCache"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=8))


# ---------------------------------------------------------------- thoughts


def slow_thoughts(model, row):
    """The embeddings of one row, each thought the slow model's state of the column before it."""
    base = model.base_causallm
    embeds = list(base.get_input_embeddings()(torch.tensor(row)))
    for column in (column for column, token in enumerate(row) if token == LATENT):
        embeds[column] = slow(base, torch.stack(embeds[:column]))[0][-1]
    return torch.stack(embeds)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("n_latents", [RAGGED, [2, 2], [2], [0, 0]], ids=str)
def test_rollout_equals_the_slow_equations(n_latents, left):
    rows, model = token_rows(n_latents, seed=sum(n_latents)), wrap(cognate(attention_window=4))
    batch = collate(rows, ANSWER, left)
    logits, losses, embeds = [], [], []
    for row in rows:
        embeds.append(slow_thoughts(model, row))
        logits.append(model.base_causallm.lm_head(slow(model.base_causallm, embeds[-1])[0]))
        losses.append(F.cross_entropy(logits[-1][-ANSWER - 1 : -1], torch.tensor(row[-ANSWER:]), reduction="none"))
    loss = torch.cat(losses).mean()
    loss.backward()
    expected = gradients(model)
    model.zero_grad()
    out = model(**batch, full_logits=True)
    out.loss.backward()
    close(out.loss, loss)
    for b, real in enumerate(batch["attention_mask"].bool()):
        close(out.logits[b, real], logits[b])
        close(out.inputs_embeds[b, real], embeds[b])
    for name, gradient in gradients(model).items():
        close(gradient, expected[name])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_passes_over_thoughts_are_one_pass_over_what_was_fed(kind, training):
    model, batch = wrap(cognate(**KINDS[kind])).train(training), collate(token_rows(RAGGED), ANSWER)
    out = model(**batch, full_logits=True)
    plain = model.base_causallm(
        inputs_embeds=out.inputs_embeds, use_cache=False, attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
    )  # fmt: skip
    real = batch["attention_mask"].bool()
    close(out.logits[real], plain.logits[real])


@pytest.mark.parametrize("iterations", [None, 2])
@pytest.mark.parametrize("changes", [{}, {"act_loss": "bce"}, {"use_act": False}], ids=str)
def test_training_through_the_wrapper_minimises_the_models_own_loss(changes, iterations):
    model, batch = wrap(cognate(**changes), latent_iterations=iterations).train(), collate(token_rows([3, 3, 3]), ANSWER)
    out = model(**batch)
    out.loss.backward()
    through_the_wrapper = gradients(model)
    given = {key: batch[key] for key in ("attention_mask", "position_ids", "labels")}
    own = model.base_causallm(inputs_embeds=out.inputs_embeds, **given)
    close(out.loss, own.loss)
    assert own.loss_ce != own.loss
    still = {name for name, x in through_the_wrapper.items() if x.ndim > 1 and x.abs().amax() < 1e-12}
    assert still == (set() if model.base_causallm.config.use_act else {"base_causallm.model.act_head.logit.weight"})


def test_gradients_flow_through_two_thoughts_to_the_question():
    model, batch = wrap(cognate()).train(), collate(token_rows([2, 2]), ANSWER)
    seen = []

    def watch(layer, pass_, x):
        x.retain_grad()
        seen.append(x)

    model(**batch, edit=watch).loss.backward()
    assert len(seen) == 3 and all(x.grad.abs().amax() > 1e-6 for x in seen)


def test_recomputed_blocks_give_the_same_gradients():
    results, batch = [], collate(token_rows(RAGGED), ANSWER)
    for again in (False, True):
        model = wrap(cognate()).train()
        if again:
            recompute_blocks(decoder_blocks(model.base_causallm))
        loss = model(**batch).loss
        loss.backward()
        results.append((loss, gradients(model)))
    close(results[0][0], results[1][0], 1e-12)
    for name, gradient in results[0][1].items():
        close(gradient, results[1][1][name], 1e-12)


# ---------------------------------------------------------------- generation


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_batched_cached_decoding_equals_one_row_without_cache(kind):
    model, rows = wrap(cognate(**KINDS[kind])), token_rows([0, 3, 1], answer=0)
    base, expected = model.base_causallm, []
    for row in rows:
        embeds, new = filled(model, row), []
        while len(new) < 6:
            token = base(inputs_embeds=embeds[None], use_cache=False).logits[0, -1].argmax()
            if token == EOS:
                break
            new.append(int(token))
            embeds = torch.cat([embeds, model.embedding(token[None])])
        expected.append(new)
    batch = collate(rows)
    ids = model.generate(**batch, max_new_tokens=6)[:, batch["input_ids"].shape[1] :].tolist()
    assert [row[: row.index(EOS)] if EOS in row else row for row in ids] == expected


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@torch.no_grad()
def test_the_librarys_generate_with_and_without_cache(options):
    model, ids = cognate(), tokens(3, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    both = [model.generate(ids, attention_mask=mask, max_new_tokens=8, use_cache=cached, **options) for cached in (True, False)]
    assert torch.equal(*both) and both[0].shape[1] > 9
    alone = model.generate(ids[:1, 4:], attention_mask=mask[:1, 4:], max_new_tokens=8, **options)
    assert torch.equal(both[0][0, 4 : 4 + alone.shape[1]], alone[0])
