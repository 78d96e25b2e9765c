"""Rows that leave a batch and rows that join it, against loops over single rows without batch and cache."""

from collections import deque

import pytest
import torch
from tiny import EOS, FAMILIES, build, collate, filled, pause_variants, token_rows, with_other_attention, wrap
from transformers import AutoModelForCausalLM, Qwen2Config

import generation
from generation import Decoding, decoded

NEW = 9
N_LATENTS = [3] * 9 + [0] * 8 + [1] * 3


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def moves(monkeypatch):
    """Which of `join` and `select` were called, with how many rows."""
    seen = []
    for name in ("join", "select"):
        real = getattr(Decoding, name)

        def spy(self, rows, real=real, name=name):
            seen.append((name, len(self.rows), len(rows.rows if name == "join" else rows)))
            return real(self, rows)

        monkeypatch.setattr(Decoding, name, spy)
    return seen


def sequence(model, row):
    """Embeddings [T, D] of a row, its thoughts filled by whole passes."""
    return filled(model, row)


def greedy(model, row, new=NEW):
    """New tokens of one row: one whole, uncached pass a token."""
    embeds, tokens = sequence(model, row), []
    limit = model.base_causallm.config.max_position_embeddings
    while len(tokens) < new and len(embeds) <= limit:
        token = int(model.base_causallm(inputs_embeds=embeds[None], use_cache=False).logits[0, -1].argmax())
        if token == model.eos_token_id:
            break
        tokens.append(token)
        embeds = torch.cat([embeds, model.embedding.weight[[token]]])
    return tokens


def start(model, rows, numbers, new=NEW, edit=None):
    batch = collate([rows[i] for i in numbers], left=True)
    return Decoding.prefill(model, **batch, max_new_tokens=new, edit=edit, row_ids=numbers)[0]


def decode(model, rows, n_slots, new=NEW, edit=None):
    """New tokens of all rows, through `decoded`."""
    waiting, found = deque(range(len(rows))), {}

    def begin(n_free):
        numbers = [waiting.popleft()]
        while waiting and len(numbers) < n_free and N_LATENTS[waiting[0]] == N_LATENTS[numbers[0]]:
            numbers.append(waiting.popleft())
        return start(model, rows, numbers, new, edit)

    for decoding, done in decoded(waiting, begin, n_slots):
        assert len(decoding.rows) <= n_slots and done
        for row in (decoding.rows[b] for b in done):
            assert row.done and row.row_id not in found
            found[row.row_id] = row.new_ids
    return [found[i] for i in range(len(rows))]


def with_many_ends(model, rows, say=greedy):
    """Let the token be EOS that ends the rows at the most different lengths; returns what the rows say then."""
    model.eos_token_id = -1
    free = [say(model, row) for row in rows]
    lengths = {eos: {t.index(eos) if eos in t else NEW for t in free} for eos in set(sum(free, []))}
    model.eos_token_id = max(lengths, key=lambda eos: (len(lengths[eos]), eos))
    assert len(lengths[model.eos_token_id]) >= 4 and NEW in lengths[model.eos_token_id]
    return [t[: t.index(model.eos_token_id)] if model.eos_token_id in t else t for t in free]


# ---------------------------------------------------------------- the same tokens, whoever shares the batch


@pytest.mark.parametrize("mode", ["continuous", "learned_shared", "forced", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_do_not_depend_on_who_leaves_and_joins(family, mode, moves, monkeypatch):
    base = build(family)
    model = pause_variants(base)[mode] if mode in ("learned_shared", "forced") else wrap(base, mode)
    rows = token_rows(N_LATENTS, answer=0, question=(2, 12))
    if mode == "none":
        monkeypatch.setitem(globals(), "sequence", lambda model, row: model.embedding.weight[row])
    expected = with_many_ends(model, rows)
    assert decode(model, rows, 1) == expected and not any(name == "join" for name, *_ in moves)
    for n_slots in (3, 7, 64):
        assert decode(model, rows, n_slots) == expected
    assert any(name == "join" for name, *_ in moves) and any(n < before for name, before, n in moves if name == "select")
    for every in (2, 4):  # tokens are read every few steps only, as where reading makes the device wait
        monkeypatch.setitem(generation.READ_EVERY, "cpu", every)
        assert decode(model, rows, 7) == expected
        ids = model.generate(**collate(rows), max_new_tokens=NEW)[:, -NEW:].tolist()
        assert [t[: t.index(model.eos_token_id)] if model.eos_token_id in t else t for t in ids] == expected


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_at_the_end_of_the_positions(family, every, monkeypatch):
    monkeypatch.setitem(generation.READ_EVERY, "cpu", every)
    model, rows = wrap(build(family, positions=16)), token_rows(N_LATENTS, answer=0, question=(2, 11))
    model.eos_token_id = -1
    expected = [greedy(model, row, 50) for row in rows]
    assert [len(tokens) for tokens in expected] == [16 - len(row) + 1 for row in rows]
    model.eos_token_id = EOS if not any(EOS in tokens for tokens in expected) else min(set(range(60)).difference(*expected))
    for n_slots in (1, 3, 7, 64):
        assert decode(model, rows, n_slots, 50) == expected


def test_no_new_tokens_and_all_rows_silent(moves):
    model, rows = wrap(build("gpt2")), token_rows(N_LATENTS, answer=0)
    assert decode(model, rows, 4, new=0) == [[]] * len(rows)
    (said,) = {greedy(model, rows[0])[0]}
    model.eos_token_id = said
    silent = [row for row in rows if not greedy(model, row)]
    assert decode(model, silent, 1) == [[]] * len(silent) and silent
    calls = model.gen_forward_cnt
    assert calls == silent[-1].count(58) + 1, "no token is fed behind an EOS"


def test_columns_that_are_padding_for_all_are_not_carried_on():
    """Joined again and again, a cache is never wider than its longest row."""
    model, rows = wrap(build("llama")), token_rows([2] * 6, answer=0)
    model.eos_token_id = -1
    live = start(model, rows, [0], 60)
    for i in range(1, 6):
        for _ in range(7):
            live.advance()
        fresh = start(model, rows, [i], 60)
        fresh.join(live.select([0]) if i % 2 else live)  # the newest row needs fewer columns than the oldest
        live = fresh
        width = max(row.n_columns + row.n_fed for row in live.rows)
        assert live.n_columns == live.cache.get_seq_length() == live.mask_BP.shape[1] == width
        assert live.mask_BP.sum(1).tolist() == [row.n_prompt + row.n_fed for row in live.rows]
    while live.going():
        live.advance()
    assert {row.row_id: row.new_ids for row in live.rows} == {
        row.row_id: greedy(model, rows[row.row_id], 60) for row in live.rows
    }


# ---------------------------------------------------------------- edits


def row_edit(layers=(0, 2)):
    """Another change for every row: of its second thought, and of what it says."""

    def edit(layer, pass_, x):
        assert len(pass_.row_ids) == len(x)
        strength = torch.tensor([0.2 + i % 7 / 5 for i in pass_.row_ids], dtype=x.dtype)[:, None, None]
        wave = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype)
        if layer == 0 and pass_.slots:
            x = x.clone()
            for slot in (slot for slot in pass_.slots if slot.k == 1):
                x[:, slot.column - pass_.start] += (strength * wave)[:, 0] * slot.rows[:, None]
            return x
        return x + strength * wave.roll(3) if not pass_.slots and x.shape[1] == 1 else None

    edit.layers = layers
    return edit


@pytest.mark.parametrize("mode", ["continuous", "learned_shared"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_edits_meet_their_rows_wherever_these_are(family, mode, moves):
    model = wrap(build(family)) if mode == "continuous" else pause_variants(build(family))[mode]
    rows = token_rows(N_LATENTS, answer=0, question=(2, 12))

    def alone(model, row):
        options = {"max_new_tokens": NEW, "output_embedding": True, "edit": row_edit(), "row_ids": [rows.index(row)]}
        ids, embeds = model.generate(**collate([row]), **options)
        vectors.append(embeds[0, len(row) :])
        return ids[0, len(row) :].tolist()

    vectors = []
    expected = with_many_ends(model, rows, alone)
    assert expected != decode(model, rows, 7)
    moves.clear()
    for n_slots in (3, 7, 64):
        assert decode(model, rows, n_slots, edit=row_edit()) == expected
    assert {name for name, *_ in moves} == {"join", "select"}
    # The same in one batch whose rows leave, with the vectors that were fed.
    batch, moves[:] = collate(rows), []
    ids, embeds = model.generate(**batch, max_new_tokens=NEW, output_embedding=True, edit=row_edit(), row_ids=range(len(rows)))
    T = batch["input_ids"].shape[1]
    assert any(name == "select" for name, *_ in moves)
    for b, (new, vector) in enumerate(zip(expected, vectors)):
        assert ids[b, T : T + len(new)].tolist() == new and set(ids[b, T + len(new) :].tolist()) <= {model.eos_token_id}
        torch.testing.assert_close(embeds[b, T : T + len(new)], vector[: len(new)], rtol=1e-10, atol=1e-10)
        assert torch.equal(embeds[b, T + len(new) :], model.embedding(ids[b, T + len(new) :]))


# ---------------------------------------------------------------- looking ahead


@pytest.mark.parametrize("family", FAMILIES)
def test_states_behind_are_those_of_whole_passes(family):
    model, rows = wrap(build(family)), token_rows([3, 3, 3, 3, 3], answer=0, question=(2, 12))
    model.eos_token_id = -1
    live = start(model, rows, [0, 1, 2])
    tails = [[7, 8, 9, 10], [11], [], [12, 13], [14, 15, 16]]

    def check(live, n_kept=None):
        behind = tails[: len(live.rows)]
        states = live.states_behind(behind, n_kept)
        for b, (own, tail) in enumerate(zip(live.rows, behind)):
            said = own.new_ids[: own.n_fed if n_kept is None else n_kept[b]]
            embeds = torch.cat([filled(model, rows[own.row_id]), model.embedding.weight[[*said, *tail]]])
            whole = model.base_causallm.base_model(inputs_embeds=embeds[None], use_cache=False).last_hidden_state[0]
            torch.testing.assert_close(states[b, : len(tail)], whole[len(embeds) - len(tail) :], rtol=1e-11, atol=1e-11)

    check(live)
    for _ in range(3):
        live.advance()
    check(live)
    check(live, [3, 0, 2])
    fresh = start(model, rows, [3, 4])
    fresh.join(live)
    check(fresh)
    check(fresh, [0, 0, 1, 3, 2])
    check(fresh.select([1, 3, 2]), [0, 3, 1])
    while fresh.going():
        fresh.advance()
        check(fresh, [min(row.n_fed, len(row.new_ids)) for row in fresh.rows])
    assert [row.new_ids for row in fresh.rows] == [greedy(model, rows[i]) for i in (3, 4, 0, 1, 2)], "looking changes nothing"


# ---------------------------------------------------------------- caches of another kind


def sliding(vocab=60, positions=96):
    """A model whose first layer sees all columns and whose others the last five, with an attention that the library masks."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=positions, use_sliding_window=True, sliding_window=5, max_window_layers=1, bos_token_id=EOS,
        eos_token_id=EOS,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config).double().eval()
    for parameter in base.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.4)
    return with_other_attention(base)


def test_sliding_windows_decode_batch_by_batch(moves):
    model, rows = wrap(sliding()), token_rows(N_LATENTS, answer=0, question=(2, 12))
    expected = with_many_ends(model, rows)
    assert not start(model, rows, [0, 1]).movable
    moves.clear()
    for n_slots in (1, 4, 64):
        assert decode(model, rows, n_slots) == expected
        assert generation.generate(model, **collate(rows[:9]), max_new_tokens=NEW, edit=None, row_ids=None)[0].shape[0] == 9
    assert not moves
    with pytest.raises(ValueError, match="sliding window"):
        start(model, rows, [0, 18])  # three thoughts and one: the shorter row ends earlier
