"""LAHR inside the wrapper: all cells of feedback x token skipping x memory against a slow, obvious rollout."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lahr_material import CELLS, close, lahr
from tiny import LATENT, START, collate, filled, gradients, token_rows, wrap

from coconut import decoder_blocks
from recompute import recompute_blocks

ANSWER = 4
RAGGED = [0, 3, 5, 1]
FEEDBACK = ("continuous", "pause_curriculum")


def run(model, batch, **options):
    model.zero_grad()
    out = model(**batch, full_logits=True, **options)
    out.loss.backward()
    return out, gradients(model)


def slow(model, rows):
    """Row by row, without padding and cache: (logits, embeddings) of each row, and the loss over all answers."""
    logits, embeds, losses = [], [], []
    for row in rows:
        embeds.append(filled(model, row))
        logits.append(model.base_causallm(inputs_embeds=embeds[-1][None], use_cache=False).logits[0])
        losses.append(F.cross_entropy(logits[-1][-ANSWER - 1 : -1], torch.tensor(row[-ANSWER:]), reduction="none"))
    return logits, embeds, torch.cat(losses).mean()


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("feedback", FEEDBACK)
@pytest.mark.parametrize("cell", CELLS)
def test_wrapper_equals_the_slow_reference(cell, feedback, left):
    for options in ({}, {"position_type": "rope"}) + (({"mod_router": "predictor"},) if "mod" in cell else ()):
        rows, model = token_rows(RAGGED), wrap(lahr(cell, **options), feedback)
        batch = collate(rows, ANSWER, left)
        logits, embeds, loss = slow(model, rows)
        loss.backward()
        expected = gradients(model)
        out, got = run(model, batch)
        close(out.loss, loss)
        for b, real in enumerate(batch["attention_mask"].bool()):
            close(out.logits[b, real], logits[b])
            close(out.inputs_embeds[b, real], embeds[b])
        for name in expected:
            close(got[name], expected[name], 1e-8)


def test_the_cells_are_eight_functions():
    batch = collate(token_rows([3, 2]), ANSWER)
    losses = {wrap(lahr(cell), feedback)(**batch).loss.item() for cell in CELLS for feedback in FEEDBACK}
    assert len({round(loss, 6) for loss in losses}) == 8


@pytest.mark.parametrize("cell", CELLS)
def test_without_thoughts_it_is_the_plain_model(cell):
    model, batch = wrap(lahr(cell)), collate(token_rows([0, 0]), ANSWER)
    plain, real = model.base_causallm(**batch), batch["attention_mask"].bool()
    out = model(**batch)
    close(out.logits[real], plain.logits[real])
    close(out.loss, plain.loss)


@pytest.mark.parametrize("cell", CELLS)
def test_one_call_of_the_backbone_a_thought_and_one_more(cell):
    model, calls = wrap(lahr(cell)), []
    model.base_causallm.base_model.register_forward_hook(lambda *_: calls.append(1))
    for n_latents in ([0, 0], [2, 5, 1], [4]):
        calls.clear()
        model(**collate(token_rows(n_latents), ANSWER))
        assert len(calls) == max(n_latents) + 1


@pytest.mark.parametrize("cell", CELLS)
@torch.no_grad()
def test_what_stands_before_the_first_thought_ignores_their_number(cell):
    model, question = wrap(lahr(cell)), [3, 1, 4, 1, 5, START]
    heads = [model(torch.tensor([[*question, *[LATENT] * n, 9]])).logits[0, : len(question)] for n in range(4)]
    for head in heads[1:]:
        close(head, heads[0])


@pytest.mark.parametrize("cell", CELLS)
def test_the_answer_reaches_the_question_through_two_thoughts(cell):
    """Gradients at the question shrink to those of attention where the thoughts are cut off, and every pass has some."""
    batch, seen = collate(token_rows([2, 2]), ANSWER), {}
    for cut in (False, True):
        fed = []

        def edit(layer, pass_, x, cut=cut, fed=fed):
            x = x.detach() if cut and pass_.slots else x
            x.requires_grad_().retain_grad()
            fed.append(x)
            return x

        run(wrap(lahr(cell, mod_force_thoughts=False)), batch, edit=edit)
        seen[cut] = [x.grad for x in fed]
    assert len(seen[False]) == 3 and all(x.abs().amax() > 1e-6 for x in seen[False])
    close(seen[False][-1], seen[True][-1])
    assert (seen[False][0] - seen[True][0]).abs().amax() > 1e-6


@pytest.mark.parametrize("cell", CELLS)
def test_feedback_changes_slots_and_nothing_else_that_is_fed(cell):
    base, batch = lahr(cell), collate(token_rows(RAGGED))
    fed = {mode: wrap(base, mode)(**batch).inputs_embeds for mode in FEEDBACK}
    slots = batch["input_ids"] == LATENT
    differs = (fed["continuous"] != fed["pause_curriculum"]).any(-1)
    assert torch.equal(differs, slots)


@pytest.mark.parametrize("cell", CELLS)
@torch.no_grad()
def test_rows_with_other_numbers_of_thoughts_equal_single_rows(cell):
    model, rows = wrap(lahr(cell)), token_rows(RAGGED)
    batch = collate(rows)
    together = model(**batch).logits
    for b, row in enumerate(rows):
        close(together[b, batch["attention_mask"][b].bool()], model(torch.tensor([row])).logits[0])


def test_columns_of_all_passes_are_joined():
    model, batch = wrap(lahr("mod")), collate(token_rows([3, 2]))
    rollout = model.rollout(**batch)
    chosen = rollout.columns["mod_selected"]
    assert chosen.shape == (*batch["input_ids"].shape, 2)
    keys = {key: batch[key] for key in ("attention_mask", "position_ids")}
    plain = model.base_causallm(inputs_embeds=rollout.inputs_embeds_BTD, use_cache=False, **keys).columns
    real = batch["attention_mask"].bool()
    assert torch.equal(chosen[real], plain["mod_selected"][real]) and 0 < chosen[real].double().mean() < 1
    close(rollout.columns["mod_scores"][real], plain["mod_scores"][real])


@pytest.mark.parametrize("cell", CELLS)
def test_enough_parallel_iterations_are_the_thoughts_one_by_one(cell):
    """Columns computed again take the place of their first keys, flags and all, and are counted once."""
    batch, results = collate(token_rows(RAGGED), ANSWER), []
    for iterations in (None, 5):
        model = wrap(lahr(cell), latent_iterations=iterations).train()
        counted = []
        out, gradient = run(model, batch)
        model.base_causallm.after_update(lambda scores, counted=counted: counted.append(len(scores)) or scores)
        results.append((out.loss, gradient, counted))
    (loss, gradient, counted), (other_loss, other_gradient, other_counted) = results
    close(loss, other_loss)
    for name in gradient:
        close(gradient[name], other_gradient[name], 1e-8)
    assert counted == other_counted


def test_padding_on_the_right_is_routed_nowhere():
    batch = collate(token_rows([3, 1, 2]))
    real = batch["attention_mask"].bool()
    assert not real[:, -1].all(), "no row is padded on the right"
    chosen = wrap(lahr("mod", mod_capacity=0.9)).rollout(**batch).columns["mod_selected"]
    assert chosen[real].any() and not chosen[~real].any()


def test_thoughts_can_be_kept_from_being_skipped():
    batch = collate(token_rows([3, 1, 2]))
    thoughts = batch["input_ids"] == LATENT
    for forced in (False, True):
        model = wrap(lahr("mod", mod_force_thoughts=forced, mod_capacity=0.1))
        with torch.no_grad():
            for router in model.base_causallm.model.routers.values():
                router.threshold.fill_(1e9)  # nobody would be chosen
        chosen = model.rollout(**batch).columns["mod_selected"]
        assert bool(chosen[thoughts].all()) == forced and not chosen[~thoughts].any()


def test_topk_is_refused():
    with pytest.raises(ValueError, match="topk"):
        wrap(lahr("mod", mod_router="topk"))(**collate(token_rows([2, 2])))


@pytest.mark.parametrize("feedback", FEEDBACK)
@pytest.mark.parametrize("cell", CELLS)
@torch.no_grad()
def test_generation_is_that_of_uncached_single_rows(cell, feedback):
    model, rows = wrap(lahr(cell), feedback), token_rows(RAGGED, answer=0)
    batch = collate(rows)
    ids = model.generate(**batch, max_new_tokens=6)[:, batch["input_ids"].shape[1] :].tolist()
    for row, got in zip(rows, ids):
        embeds, expected = filled(model, row), []
        while len(expected) < 6:
            token = int(model.base_causallm(inputs_embeds=embeds[None], use_cache=False).logits[0, -1].argmax())
            if token == model.eos_token_id:
                break
            expected.append(token)
            embeds = torch.cat([embeds, model.embedding.weight[[token]]])
        assert got[: len(expected)] == expected and set(got[len(expected) :]) <= {model.eos_token_id}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("router", ["threshold", "predictor"])
def test_blocks_computed_twice_change_nothing_and_count_once(router, dropout):
    batch, results = collate(token_rows([3, 3, 2]), ANSWER), []
    for again in (False, True):
        model = wrap(lahr("mod+memory", mod_router=router, dropout=dropout)).train()
        if again:
            recompute_blocks(decoder_blocks(model.base_causallm))
        torch.manual_seed(0)
        _, gradient = run(model, batch)
        counted = []
        model.base_causallm.after_update(lambda scores, counted=counted: counted.append(scores) or scores)
        results.append((gradient, counted, copy.deepcopy(model.base_causallm.model.routers.state_dict())))
    (plain, counted, state), (twice, counted_twice, state_twice) = results
    for name in plain:
        close(plain[name], twice[name], 1e-12)
    assert [len(scores) for scores in counted] == [len(scores) for scores in counted_twice]
    assert len(counted) == (2 if router == "threshold" else 0)
    for name in state:
        close(state[name], state_twice[name], 1e-12)
    moved = [name for name in state if name.endswith("threshold") and state[name]]
    assert len(moved) == len(counted)


@pytest.mark.parametrize("cell", CELLS)
def test_training_reaches_every_parameter_and_the_threshold_sees_every_pass(cell):
    model, batch = wrap(lahr(cell)).train(), collate(token_rows([4, 4, 3, 2], question=(9, 12)), ANSWER)
    run(model, batch)
    for name, parameter in model.base_causallm.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name
    counted = []
    model.base_causallm.after_update(lambda scores: counted.append(len(scores)) or scores)
    assert counted == [batch["attention_mask"].sum()] * (2 if "mod" in cell else 0)
    run(model.eval(), batch)
    model.base_causallm.after_update(lambda scores: counted.append(len(scores)) or scores)
    assert not any(counted[2:]), "evaluation is not counted"
