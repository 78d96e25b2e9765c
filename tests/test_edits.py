"""The one hook: what an edit sees, what it changes, and that looking changes nothing."""

import pytest
import torch
from tiny import LATENT, MODES, build, collate, filled, gradients, pause_variants, token_rows, wrap

ANSWER = 4
RAGGED = [0, 3, 8, 1]
SHIFT = torch.linspace(-10, 10, 16, dtype=torch.float64)  # not the same everywhere: LayerNorm would take that out again
VARIANTS = ("continuous", "frozen", "learned_shared", "pause_curriculum", "forced")


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def variant(name, family="gpt2"):
    return wrap(build(family)) if name == "continuous" else pause_variants(build(family))[name]


def edit_of(layers=(0,)):
    """Decorator that says which layers an edit wants to see."""

    def named(edit):
        edit.layers = layers
        return edit

    return named


def at_slot(k, change):
    """The edit that sends slot k's embeddings ([rows, D]) through `change`; the same code for single and multi pass."""

    def edit(layer, pass_, x):
        for slot in pass_.slots:
            if slot.k == k:
                x = x.clone()
                x[slot.rows, slot.column - pass_.start] = change(x[slot.rows, slot.column - pass_.start])
        return x

    return edit


# ---------------------------------------------------------------- looking changes nothing


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("name", VARIANTS)
def test_identity_edit_changes_nothing_bit_for_bit(name, family):
    model, batch = variant(name, family), collate(token_rows(RAGGED), ANSWER)
    prompt = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids")}
    visits = []

    @edit_of((0, 1, 2, 3))
    def keep(layer, pass_, x):
        visits.append(layer)
        return None if len(visits) % 2 else x  # both ways to keep

    def everything(**options):
        model.zero_grad()
        out = model(**batch, full_logits=True, **options)
        out.loss.backward()
        grads = gradients(model)
        return [out.loss, out.logits, out.inputs_embeds, *grads.values(), model.generate(**prompt, **options)]

    clean = everything()
    edited = everything(edit=keep)
    assert all(torch.equal(a, b) for a, b in zip(clean, edited))
    assert set(visits) == {0, 1, 2, 3}
    assert not any(block._forward_hooks for block in model.base_causallm.modules())


def test_an_edit_that_raises_leaves_no_hook_behind():
    model, ids = variant("continuous"), collate(token_rows([2]))["input_ids"]

    @edit_of((1, 2, 3))
    def broken(layer, pass_, x):
        if layer == 2:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        model(ids, edit=broken)
    assert not any(module._forward_hooks for module in model.base_causallm.modules())


# ---------------------------------------------------------------- layer 0


@pytest.mark.parametrize("k", [0, 2, 7])
@pytest.mark.parametrize("name", VARIANTS)
def test_edit_of_slot_k_hits_exactly_that_slot(name, k):
    model, batch = variant(name), collate(token_rows(RAGGED), ANSWER)
    clean, edited = model(**batch), model(**batch, edit=at_slot(k, lambda x: x + SHIFT))
    slots = batch["input_ids"] == LATENT
    number = slots.cumsum(1) - 1
    aimed = slots & (number == k)
    assert aimed.any(1).tolist() == [n > k for n in RAGGED]
    difference = edited.inputs_embeds - clean.inputs_embeds
    close(difference[aimed], SHIFT.expand_as(difference[aimed]))
    # where thoughts read states, the edit travels on to the later slots; nowhere else
    follows = slots & (number > k) & aimed.any(1, keepdim=True) & (name == "continuous")
    assert (difference[follows].abs().amax(-1) > 1e-6).all()
    assert not difference[~aimed & ~follows].any()
    real, later = batch["attention_mask"].bool(), aimed.cumsum(1).bool()
    assert torch.equal(edited.logits[real & ~later], clean.logits[real & ~later])
    assert (edited.logits - clean.logits).abs().amax(-1)[real & later].gt(1e-9).all()


CHANGES = {"zero": torch.zeros_like, "scale": lambda x: -2 * x, "permute": lambda x: x.roll(1, 0)}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_edits_agree_between_single_and_multi_pass(family, name):
    change = CHANGES[name]
    batch = collate(token_rows(RAGGED), ANSWER)
    real = batch["attention_mask"].bool()
    models = pause_variants(build(family))
    clean = models["forced"](**batch).logits
    for k in (0, 1):
        single, multi = (models[way](**batch, edit=at_slot(k, change)) for way in ("learned_shared", "forced"))
        close(single.logits[real], multi.logits[real])
        close(single.loss, multi.loss)
    changed = (multi.logits - clean)[real].abs().max() > 1e-3
    assert changed == (name != "permute")  # all rows hold one vector


def test_an_edit_in_the_rollout_reaches_the_thoughts_computed_after_it():
    # by hand: change thought 0, let the rest of the chain be computed from it
    model, (row,) = variant("continuous"), token_rows([3])
    first = row.index(LATENT)
    changed = filled(model, row)[first] - 3
    embeds = filled(model, row).clone()
    embeds[first] = changed
    for column in (first + 1, first + 2):
        embeds[column] = model.base_causallm.base_model(inputs_embeds=embeds[None, :column]).last_hidden_state[0, -1]
    out = model(torch.tensor([row]), edit=at_slot(0, lambda x: x - 3))
    close(out.inputs_embeds[0], embeds)
    close(out.logits[0], model.base_causallm(inputs_embeds=embeds[None]).logits[0])


# ---------------------------------------------------------------- blocks


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("name", ["continuous", "learned_shared", "forced"])
def test_taps_see_the_hidden_states_of_the_library_strictly_between_the_ends(name, family):
    model, batch = variant(name, family), collate(token_rows(RAGGED))
    seen = {}

    @edit_of((0, 1, 2, 3))
    def record(layer, pass_, x):
        assert x.shape[1] == pass_.stop - pass_.start
        seen.setdefault(layer, []).append(x)

    fed = model(**batch, edit=record).inputs_embeds
    taps = {layer: torch.cat(parts, 1) for layer, parts in seen.items()}
    base = model.base_causallm
    library = base(
        inputs_embeds=fed,
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
        output_hidden_states=True,
    ).hidden_states
    real = batch["attention_mask"].bool()
    assert torch.equal(taps[0], fed)  # GPT-2 adds position embeddings to this: not the library's entry 0
    for layer in (1, 2):
        close(taps[layer][real], library[layer][real])
    norm = base.base_model.ln_f if family == "gpt2" else base.base_model.norm
    assert (taps[3] - library[3])[real].abs().max() > 1e-2
    close(norm(taps[3])[real], library[3][real])


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_replaced_block_output_is_what_the_next_block_reads(family, layer):
    model, batch = variant("learned_shared", family), collate(token_rows([2, 2]))

    @edit_of((layer,))
    def negate(at, pass_, x):
        return None if at == 0 else -x  # layer 0 is always shown

    blocks = model.base_causallm.base_model.h if family == "gpt2" else model.base_causallm.base_model.layers
    edited = model(**batch, edit=negate)
    handle = blocks[layer - 1].register_forward_hook(
        lambda m, args, out: (-out[0], *out[1:]) if isinstance(out, tuple) else -out
    )
    by_hand = model(**batch)
    handle.remove()
    assert torch.equal(edited.logits, by_hand.logits)
    assert not torch.allclose(edited.logits, model(**batch).logits)


# ---------------------------------------------------------------- what a pass says


@pytest.mark.parametrize("name", VARIANTS)
def test_passes_name_columns_slots_and_row_ids(name):
    model, batch = variant(name), collate(token_rows(RAGGED, answer=0))
    given, T = (40, 41, 17, 3), batch["input_ids"].shape[1]
    seen = []

    def record(layer, pass_, x):
        assert layer == 0
        seen.append(pass_)

    def slots():
        found = [slot for pass_ in seen for slot in pass_.slots]
        assert all((batch["input_ids"][s.rows, s.column] == LATENT).all() for s in found)
        return [(slot.k, slot.rows.tolist()) for slot in found]

    model(**batch, edit=record)
    assert {p.row_ids for p in seen} == {(0, 1, 2, 3)}
    assert slots() == [(k, [n > k for n in RAGGED]) for k in range(8)]
    seen.clear()
    model.eos_token_id = -1
    model.generate(**batch, max_new_tokens=4, edit=record, row_ids=given)
    assert {p.row_ids for p in seen} == {given}
    assert len(slots()) == 8
    edges = [edge for p in seen for edge in (p.start, p.stop)]
    assert edges == sorted(edges) and edges[1:-1:2] == edges[2::2] and (edges[0], edges[-1]) == (0, T + 3)


@pytest.mark.parametrize("name", VARIANTS)
def test_pass_index_counts_the_calls_of_one_generation(name):
    model, batch, indices = variant(name), collate(token_rows([2, 2], answer=0)), []
    model.eos_token_id = -1
    model.generate(**batch, max_new_tokens=4, edit=lambda layer, pass_, x: indices.append(pass_.index))
    assert indices == list(range(len(indices)))


# ---------------------------------------------------------------- in generation


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_edits_act_in_generation(name):
    model = variant(name)
    model.eos_token_id = -1
    batch, shift = collate(token_rows(RAGGED, answer=0)), at_slot(0, lambda x: x + SHIFT)
    ids, embeds = model.generate(**batch, edit=shift, output_embedding=True, max_new_tokens=6)
    clean, T = model.generate(**batch, max_new_tokens=6), batch["input_ids"].shape[1]
    assert torch.equal(embeds[:, :T], model(**batch, edit=shift).inputs_embeds)
    assert torch.equal(ids[0], clean[0]) and not torch.equal(ids, clean)  # row 0 has no thought
    # the slow way: a whole pass a token over the edited embeddings
    for b, real in enumerate(batch["attention_mask"].bool()):
        fed = embeds[b, :T][real]
        for token in ids[b, T:].tolist():
            assert token == model.base_causallm(inputs_embeds=fed[None]).logits[0, -1].argmax()
            fed = torch.cat([fed, model.embedding.weight[[token]]])


def test_new_tokens_can_be_steered():
    model, batch = variant("continuous"), collate(token_rows([2, 0], answer=0))
    model.eos_token_id = -1
    T = batch["input_ids"].shape[1]
    clean = model.generate(**batch, max_new_tokens=6)

    @edit_of((3,))
    def steer(layer, pass_, x):
        return -x if layer == 3 and pass_.start >= T else None

    steered = model.generate(**batch, max_new_tokens=6, edit=steer)
    assert torch.equal(steered[:, : T + 1], clean[:, : T + 1])  # the first token comes from the prompt
    assert not torch.equal(steered, clean)


@pytest.mark.parametrize("mode", MODES)
def test_noise_from_the_callers_generator_is_reproducible(mode):
    model, batch = wrap(build("gpt2"), mode), collate(token_rows(RAGGED))

    def noisy(seed):
        generator = torch.Generator().manual_seed(seed)

        def add(layer, pass_, x):
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            slots = [s.column - pass_.start for s in pass_.slots]
            return torch.cat([x[:, [c]] + noise[:, [c]] * (c in slots) for c in range(x.shape[1])], 1)

        return model(**batch, edit=add).logits

    state = torch.get_rng_state()
    first, again, other = noisy(1), noisy(1), noisy(2)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
