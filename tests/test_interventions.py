"""Edits aim at tokens: at any padding, in any batch and any cut of the passes they touch what they name and nothing else."""

import numpy as np
import pytest
import torch
from tiny import LATENT, MODES, build, collate, token_rows, wrap

from analysis.interventions import NOWHERE, Patch, Recorder, chain, gaussian, identity, permutations
from analysis.subject import positions

ROWS = token_rows([2, 2, 2, 2])


def model_of(mode: str, **options):
    model = wrap(build("gpt2"), mode, **options)
    if model.pause_embedding is not None:
        model.pause_embedding.data.normal_(generator=torch.Generator().manual_seed(2))
    return model


def slots_of(rows) -> torch.Tensor:
    return positions([[t for t, token in enumerate(row) if token == LATENT] for row in rows])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_a_patch_meets_its_token_and_no_other(mode, layer):
    """Batched and padded, the fed embeddings and states change where and only where one unpadded row says so."""
    model, target = model_of(mode), [(1, 2), (3, 4)]  # (row, position)
    table = torch.full((len(ROWS), 1), NOWHERE)
    for row, position in target:
        table[row, 0] = position
    values = torch.randn(len(ROWS), 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    edit = Patch(layer, table, values)
    batch = collate(ROWS)
    del batch["position_ids"]
    with torch.no_grad():
        out = model.rollout(**batch, edit=edit).hidden_BTD
        assert edit.n_hit == len(target)
        for i, row in enumerate(ROWS):
            begin = int(batch["attention_mask"][i].argmax())
            one = Patch(layer, table[i : i + 1], values[i : i + 1])
            alone = model.rollout(torch.tensor([row]), edit=one).hidden_BTD[0]
            clean = model.rollout(torch.tensor([row])).hidden_BTD[0]
            assert torch.allclose(out[i, begin : begin + len(row)], alone, atol=1e-9)
            first = next((p for r, p in target if r == i), len(row))
            assert torch.allclose(alone[:first], clean[:first], atol=1e-12), "nothing before the patched token changes"
            assert first == len(row) or (alone[first:] - clean[first:]).abs().max() > 1e-3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("forced", [False, True])
def test_recorder_sees_slots_however_passes_are_cut(mode, forced):
    if forced and mode == "continuous":
        pytest.skip("continuous is a loop anyway")
    model, slots = model_of(mode, force_multipass=forced), slots_of(ROWS)
    recorder = Recorder((0, 2), slots, 16, torch.float64)
    batch = collate(ROWS)
    with torch.no_grad():
        fed = model.rollout(**batch, edit=recorder).inputs_embeds_BTD
    for i in range(len(ROWS)):
        begin = int(batch["attention_mask"][i].argmax())
        for k in range(2):
            assert torch.equal(recorder.states[0][i, k], fed[i, begin + slots[i, k]])
    assert recorder.states[2].abs().sum(-1).min() > 0


def test_replay_and_recompute_are_different_experiments_for_recycled_thoughts():
    """Noise in slot 0: with the clean vector given to slot 1 only slot 0 changes, without it slot 1 follows."""
    batch, slots = collate(ROWS), slots_of(ROWS)
    for mode, follows in [("continuous", True), ("learned_shared", False)]:
        model = model_of(mode)
        record = Recorder((0,), slots, 16, torch.float64)
        with torch.no_grad():
            model.rollout(**batch, edit=record)
            clean = record.states[0]
            noisy = clean.clone()
            noisy[:, 0] += 1.0
            for given, changed in [(slots, False), (slots.clone().index_fill_(1, torch.tensor([1]), NOWHERE), follows)]:
                after = Recorder((0,), slots, 16, torch.float64)
                model.rollout(**batch, edit=chain(Patch(0, given, noisy), after))
                assert torch.equal(after.states[0][:, 0], noisy[:, 0])
                assert torch.equal(after.states[0][:, 1], clean[:, 1]) != changed


def test_add_shifts_and_chain_applies_in_order():
    model, slots, batch = model_of("frozen"), slots_of(ROWS), collate(ROWS)
    one, record = torch.ones(len(ROWS), 2, 16, dtype=torch.float64), Recorder((0,), slots, 16, torch.float64)
    edit = chain(Patch(0, slots, 3 * one), Patch(0, slots, one, add=True), None, record)
    with torch.no_grad():
        model.rollout(**batch, edit=edit)
        assert torch.equal(record.states[0], 4 * one)
        same = model.rollout(**batch, edit=identity).hidden_BTD
        assert torch.equal(same, model.rollout(**batch).hidden_BTD)


def test_patches_leave_what_is_said_alone():
    """The edit acts on the prompt; tokens said behind it are fed as they are."""
    model = model_of("continuous")
    seen = []
    patch = Patch(0, slots_of(ROWS), torch.zeros(len(ROWS), 2, 16, dtype=torch.float64))

    def edit(layer, pass_, x):
        if pass_.begins is None:
            seen.append(patch(layer, pass_, x))
        return x

    model.generate(**collate(ROWS), max_new_tokens=4, edit=edit)
    assert seen and all(x is None for x in seen)


def test_draws_depend_on_row_slot_and_trial_only():
    all_rows, some = gaussian(3, [0, 1, 2, 7], 3, 8), gaussian(3, [7, 1], 2, 8)
    assert torch.equal(some[0], all_rows[3, :2]) and torch.equal(some[1], all_rows[1, :2])
    assert not torch.equal(gaussian(3, [7], 2, 8, trial=1), some[:1]) and not torch.equal(gaussian(4, [7], 2, 8), some[:1])
    assert abs(float(gaussian(0, list(range(50)), 4, 64).std()) - 1) < 0.02


@pytest.mark.parametrize("n, wanted, got", [(6, 10, 10), (3, 10, 5), (2, 10, 1)])
def test_permutations_are_different_and_none_is_the_identity(n, wanted, got):
    orders = permutations(0, 5, n, wanted)
    assert orders.shape == (got, n) and len({tuple(o) for o in orders}) == got
    assert all(sorted(o) == list(range(n)) and list(o) != list(range(n)) for o in orders)
    assert np.array_equal(orders, permutations(0, 5, n, wanted)) and (
        n == 2 or not np.array_equal(orders, permutations(0, 6, n, wanted))
    )
