"""Batched, cached greedy decoding against a loop without batch and cache, and every way a row can end."""

import pytest
import torch
from tiny import EOS, FAMILIES, MODES, build, collate, filled, pause_variants, token_rows, wrap

NEW = 8
PROMPTS = {  # latents a row, and whether rows without latents are padded on the left
    "ragged": ([0, 3, 8, 1], False),
    "aligned": ([4, 4, 4], False),
    "right": ([0, 0, 0, 0], False),
    "left": ([0, 0, 0, 0], True),
    "one": ([3], False),
}


def greedy(model, row, new=NEW):
    """New tokens of one row: the thoughts filled by whole passes, then one whole, uncached pass a token."""
    base, tokens = model.base_causallm, []
    embeds = filled(model, row)
    while len(tokens) < new and len(embeds) <= base.config.max_position_embeddings:
        token = int(base(inputs_embeds=embeds[None], use_cache=False).logits[0, -1].argmax())
        if token == model.eos_token_id:
            break
        tokens.append(token)
        embeds = torch.cat([embeds, model.embedding.weight[[token]]])
    return tokens


def generate(model, batch, new=NEW, **options):
    """New tokens by row, EOS filler removed, after checking that the prompt is kept and filler is filler."""
    prompt = batch["input_ids"]
    ids = model.generate(**batch, max_new_tokens=new, **options)
    assert torch.equal(ids[:, : prompt.shape[1]], prompt)
    rows = []
    for row in ids[:, prompt.shape[1] :].tolist():
        end = row.index(model.eos_token_id) if model.eos_token_id in row else len(row)
        assert set(row[end:]) <= {model.eos_token_id}, "text after EOS"
        rows.append(row[:end])
    assert max(map(len, rows)) == ids.shape[1] - prompt.shape[1], "a column of filler only"
    return rows


def every_model(family):
    return {"continuous": wrap(build(family)), **pause_variants(build(family))}


@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_batched_cached_equals_unbatched_uncached(family, prompts):
    n_latents, left = PROMPTS[prompts]
    rows = token_rows(n_latents, answer=0)
    batch = collate(rows, left=left)
    by_mask = {key: batch[key] for key in ("input_ids", "attention_mask")}  # positions are counted where not given
    for model in every_model(family).values():
        expected = [greedy(model, row) for row in rows]
        assert generate(model, batch) == generate(model, by_mask) == expected
        if len(rows) == 1:
            assert generate(model, {"input_ids": batch["input_ids"]}) == expected


@pytest.mark.parametrize("mode", MODES)
def test_batch_composition_changes_no_row(mode):
    model, rows = wrap(build("llama"), mode), token_rows([0, 3, 8, 1, 3, 0], answer=0, question=(2, 12))
    alone = [generate(model, collate([row]))[0] for row in rows]
    assert len({tuple(tokens) for tokens in alone}) > 1
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1], [4, 2], [1, 1, 0]):
        assert generate(model, collate([rows[i] for i in order])) == [alone[i] for i in order]


# ---------------------------------------------------------------- ends


def ending_with(model, token):
    model.eos_token_id = token
    return model


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_eos_as_first_new_token_generates_nothing(mode):
    model, (row, other) = wrap(build("llama"), mode), token_rows([3, 1], answer=0)
    first = greedy(model, row)[0]
    ending_with(model, first)
    assert torch.equal(model.generate(torch.tensor([row])), torch.tensor([row]))
    expected = greedy(model, other)
    assert expected, "pick other rows: the second one must go on"
    assert generate(model, collate([row, other])) == [[], expected]


@torch.no_grad()
def test_no_text_after_eos_while_other_rows_go_on():
    model, rows = wrap(build("llama")), token_rows([3, 1, 0, 5, 2], answer=0)
    free = [greedy(model, row, 12) for row in rows]
    ended = set()
    for eos in {token for tokens in free for token in tokens}:
        expected = [greedy(ending_with(model, eos), row, 12) for row in rows]
        assert generate(model, collate(rows), 12) == expected
        ended |= {len(tokens) for tokens in expected}
    assert {0, 1, 2, 3, 12} < ended  # rows ended early, late and never


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rows_stop_where_the_model_has_no_more_positions(family):
    model, rows = ending_with(wrap(build(family, positions=14)), -1), token_rows([1, 6, 3], answer=0)
    expected = [greedy(model, row, 50) for row in rows]
    lengths = [len(tokens) for tokens in expected]
    assert lengths == [14 - len(row) + 1 for row in rows]  # the last position still predicts a token
    assert len(set(lengths)) == 3
    ending_with(model, max(set(range(60)).difference(*expected)))  # a token that none of them writes
    assert generate(model, collate(rows), 50) == expected


def test_a_prompt_longer_than_the_model_is_refused():
    model = wrap(build("gpt2", positions=12))
    row = torch.arange(12)[None]
    assert model.generate(row, max_new_tokens=5).shape == (1, 13)
    padded, mask = torch.full((1, 15), EOS), torch.zeros(1, 15, dtype=torch.long)
    padded[:, 3:], mask[:, 3:] = row, 1
    assert model.generate(padded, mask, max_new_tokens=5).shape == (1, 16)  # padding takes no positions
    with pytest.raises(ValueError, match="prompt of 13 tokens exceeds the model's 12 positions"):
        model.generate(torch.arange(13)[None])


# ---------------------------------------------------------------- what else it returns and counts


@pytest.mark.parametrize("stops", ["at EOS", "at max_new_tokens"])
@torch.no_grad()
def test_output_embedding_has_one_vector_for_every_token(stops):
    model, rows = wrap(build("llama")), token_rows([3, 1], answer=0)
    if stops == "at EOS":
        # each row stops at its own fourth token or earlier; none runs into max_new_tokens
        model, rows = ending_with(model, greedy(model, rows[0])[3]), rows[:1]
    batch = collate(rows)
    ids, embeds = model.generate(**batch, max_new_tokens=NEW, output_embedding=True)
    T = batch["input_ids"].shape[1]
    assert T < ids.shape[1] and (ids.shape[1] < T + NEW) == (stops == "at EOS")
    assert embeds.shape == (*ids.shape, 16)
    assert torch.equal(embeds[:, :T], model(**batch).inputs_embeds)
    assert torch.equal(embeds[:, T:], model.embedding(ids[:, T:]))


@pytest.mark.parametrize("n_latents", [[0, 0], [3, 1]], ids=str)
@pytest.mark.parametrize("name", ["continuous", "learned_shared", "forced"])
def test_gen_forward_cnt_counts_the_calls_of_the_backbone(name, n_latents):
    model, calls = every_model("gpt2")[name], []
    model.base_causallm.base_model.register_forward_hook(lambda *_: calls.append(1))
    ending_with(model, -1)
    passes = max(n_latents) + 1 if name != "learned_shared" else 1
    for _ in range(2):  # of the last generation, as in stock
        calls.clear()
        model.generate(**collate(token_rows(n_latents, answer=0)), max_new_tokens=NEW)
        assert len(calls) == passes + NEW - 1  # the last token is not fed
        assert model.gen_forward_cnt == len(calls)


def test_generation_leaves_no_gradient_and_no_state():
    model, batch = wrap(build("gpt2"), "learned_shared"), collate(token_rows([2, 3], answer=0))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ids, embeds = model.generate(**batch, output_embedding=True, synced_gpus=True)
    assert not embeds.requires_grad
    assert torch.equal(ids, model.generate(**batch))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
