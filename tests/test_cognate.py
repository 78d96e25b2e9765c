"""Cognate as a Hugging Face model: size, specializations, interface, causality, invariance; equations against slow ones."""

import pytest
import torch
import torch.nn.functional as F
from cognate_material import SHAPE, close, cognate, slow, tokens
from transformers import AutoConfig, AutoModelForCausalLM

from backbones import cognate as module
from backbones.cognate import CognateConfig, CognateForCausalLM, create_phase1_models
from coconut import decoder_blocks

# ---------------------------------------------------------------- size and specializations


def on_meta(config: CognateConfig) -> CognateForCausalLM:
    with torch.device("meta"):
        return CognateForCausalLM(config)


def formula(c: CognateConfig) -> int:
    V, d, f, m, h = c.vocab_size, c.hidden_size, c.intermediate_size, c.memory_size, c.gate_size
    blocks = c.num_hidden_layers * (4 * d * d + 3 * d * f + 2 * d)
    behind = 2 * d * m + (3 * d * h + h + d) + d + (24 * d * d + 20 * d) + (d + 1)
    return V * d + c.max_position_embeddings * d + blocks + behind


def test_the_default_has_25_623_681_parameters():
    counts = on_meta(CognateConfig()).count_parameters()
    assert counts == {
        "embeddings": 12_865_792 + 524_288,
        "backbone": 10_655_360,
        "trm": 1_577_984,
        "act_head": 257,
        "lm_head": 0,
        "total": 25_623_681,
    }
    assert sum(counts.values()) == 2 * counts["total"] and 0.50 < counts["embeddings"] / counts["total"] < 0.55


@pytest.mark.parametrize(
    ("config", "total"),
    [
        (CognateConfig.wide(), 32_571_041),
        (CognateConfig.wide(vocab_size=32_768), 26_974_561),
        (CognateConfig(**SHAPE), None),
        (CognateConfig(**SHAPE | {"memory_size": 5, "gate_size": 3, "max_recursions": 0}), None),
    ],
)
def test_the_presets_and_the_formula(config, total):
    assert on_meta(config).count_parameters()["total"] == formula(config) == (total or formula(config))


def test_the_head_is_counted_where_it_is_not_tied():
    counts = cognate(tie_word_embeddings=False).count_parameters()
    assert counts["lm_head"] == 60 * 16 and counts["total"] == formula(CognateConfig(**SHAPE)) + 60 * 16


@pytest.mark.parametrize(
    ("name", "table"),
    [("reasoning", (0.95, 4096, 0.7, 42)), ("memory", (0.9, 8192, 0.5, 1337)), ("speed", (0.5, 2048, 0.3, 2023))],
)
def test_specializations_are_those_of_the_table(name, table):
    config = module.Phase1Config(specialization=name)
    assert (config.halt_threshold, config.memory_half_life, config.surprise_threshold, config.seed) == table
    assert CognateConfig(specialization=name, halt_threshold=0.7).halt_threshold == 0.7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"specialization": "poetry"}, "specialization 'poetry' is unknown; known: reasoning, memory, speed"),
        ({"memory_type": "lstm"}, "memory_type 'lstm' is unknown; known: ema, titans"),
        ({"act_loss": "mse"}, "act_loss 'mse' is unknown; known: ponder, bce"),
        ({"max_recursions": 4}, "step_weights has 4 entries; max_recursions 4 needs one for each of 5 steps"),
        ({"hidden_size": 100}, "hidden_size 100 is not a multiple of refiner_heads 8"),
    ],
)
def test_configs_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        CognateConfig(**changes)


def test_the_three_models_are_made_under_their_own_seeds():
    torch.manual_seed(5)
    models = create_phase1_models("cpu", **SHAPE)
    after = torch.rand(1)
    again = create_phase1_models("cpu", **SHAPE)
    assert list(models) == ["reasoning", "memory", "speed"]
    tables = [model.model.embed_tokens.weight for model in models.values()]
    assert not torch.equal(tables[0], tables[1]) and not torch.equal(tables[1], tables[2])
    for name, model in models.items():
        assert model.config.specialization == name and type(model) is module.TRMTitansMAGModel
        assert torch.equal(model.model.embed_tokens.weight, again[name].model.embed_tokens.weight)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))  # the caller's random numbers go on as if nothing had been made


def test_tokens_enter_on_the_scale_of_thoughts():
    torch.manual_seed(0)
    model = CognateForCausalLM(CognateConfig(**SHAPE | {"hidden_size": 64, "vocab_size": 500})).eval()
    ids = torch.randint(0, 500, (4, 30))
    for x in (model.get_input_embeddings()(ids), model(ids).hidden_states[-1]):
        assert 0.9 < x.square().mean().sqrt() < 1.1
    assert len(decoder_blocks(model)) == 2


# ---------------------------------------------------------------- interface


def test_what_comes_out_and_how_it_is_asked_for():
    model, ids = cognate(), tokens(2, 7)
    out = model(ids, labels=ids, return_all_steps=True)
    assert out.logits.shape == (2, 7, 60) and out["logits"] is out.logits
    assert out.halt_probs.shape == (2, 7, 4) and out.token_halting_steps.shape == (2, 7) and out.halting_steps.shape == (2,)
    assert 0 < out.halt_probs.amin() and out.halt_probs.amax() < 1
    assert set(out.token_halting_steps.unique().tolist()) <= {1, 2, 3}
    close(out.halting_steps, out.token_halting_steps.float().mean(1), 1e-6)
    assert model(ids[:1]).halting_steps.item() == out.halting_steps[0]
    for key in ("loss", "loss_ce", "loss_act", "loss_gate"):
        assert getattr(out, key).ndim == 0 and getattr(out, key).isfinite()
    assert out.step_losses.shape == (4,)
    assert [len(x) for x in (out.all_logits, out.all_y, out.all_z)] == [4, 4, 4] and out.all_z[0].shape == (2, 7, 16)
    for y, logits in zip(out.all_y, out.all_logits):
        close(model.lm_head(y), logits)
    halted = torch.stack(out.all_y, 2)[torch.arange(2)[:, None], torch.arange(7), out.token_halting_steps]
    close(out.hidden_states[-1], halted)
    assert model(ids).loss is None and model(ids, return_logits=False).logits is None
    assert torch.equal(model(ids, return_dict=False)[0], out.logits)
    assert len(model(ids, output_hidden_states=True).hidden_states) == 2 + 2
    assert model.get_config_dict()["model_type"] == "cognate" and model.reset_memory() is None


def test_mask_is_another_name_of_attention_mask():
    model, ids = cognate(), tokens(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    expected = model(ids, attention_mask=mask, labels=ids)
    assert torch.equal(model(ids, mask=mask).logits, expected.logits) and not torch.equal(model(ids).logits, expected.logits)
    close(expected.halting_steps[0], expected.token_halting_steps[0, 3:].float().mean(), 1e-6)
    with pytest.raises(ValueError, match="pass one of them"):
        model(ids, mask=mask, attention_mask=mask)


def test_embeddings_in_place_of_ids():
    model, ids = cognate(), tokens(2, 7)
    out = model(ids)
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, out.logits)
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": torch.zeros(2, 7, 16)}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(**wrong)


def test_more_tokens_than_positions_are_refused():
    model, ids = cognate(max_position_embeddings=8), tokens(1, 12)
    mask = torch.ones_like(ids)
    mask[:, :4] = 0
    assert model(ids, mask).logits.shape[1] == 12  # padding takes no positions
    for given in ({}, {"position_ids": torch.arange(12)[None]}):
        with pytest.raises(ValueError, match="the input needs 12 positions; the model has 8"):
            model(ids, **given)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"memory_type": "titans"}, {"act_target": "ema"}])
def test_the_auto_classes_save_and_load_it(changes, tmp_path):
    model, ids = cognate(specialization="speed", **changes), tokens(2, 9)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == model.config.to_diff_dict()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(loaded) is CognateForCausalLM and not loaded.training and loaded.config.halt_threshold == 0.5
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    close(loaded(ids).logits, model(ids).logits, 1e-12)  # a file's tensors lie elsewhere in memory, which rounds otherwise
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == model.config.tie_word_embeddings


def test_resizing_keeps_class_scale_and_tie():
    model, ids = cognate(), tokens(2, 9)
    before = model(ids).logits
    model.resize_token_embeddings(63, mean_resizing=False)
    table = model.get_input_embeddings()
    assert type(table).__name__ == "ScaledEmbedding" and model.lm_head.weight is table.weight and len(table.weight) == 63
    close(table(ids), 4 * table.weight[ids])
    close(model(ids).logits[..., :60], before)
    assert 0.1 < table.weight[60:].std() < 0.5  # drawn like the others: 1 / sqrt(16)


# ---------------------------------------------------------------- the function


@pytest.mark.parametrize("name", ["reasoning", "memory", "speed"])
@pytest.mark.parametrize("length", [1, 3, 14])
@torch.no_grad()
def test_it_computes_its_equations(name, length):
    # With states frozen behind the halt: what is skipped must make no difference.
    for seed in range(4):
        model, ids = cognate(seed, specialization=name, attention_window=3 + seed), tokens(2, length, seed)
        out = model(ids)
        for row, hidden, steps in zip(ids, out.hidden_states[-1], out.token_halting_steps):
            expected, expected_steps = slow(model, model.get_input_embeddings()(row))
            close(hidden, expected)
            assert torch.equal(steps, expected_steps)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["reasoning", "memory", "speed"])
@torch.no_grad()
def test_no_column_depends_on_a_later_one(name, training):
    generator = torch.Generator().manual_seed(7)
    for trial in range(6):
        length, window = (int(torch.randint(lo, 20, (), generator=generator)) for lo in (4, 1))
        model = cognate(trial, specialization=name, attention_window=window).train(training)
        ids, t = tokens(2, length, trial), int(torch.randint(length, (), generator=generator))
        before = model(ids, return_all_steps=True)
        ids[:, t] = (ids[:, t] + 1) % 56
        after = model(ids, return_all_steps=True)
        for a, b in zip((before.logits, *before.all_logits), (after.logits, *after.all_logits)):
            close(a[:, :t], b[:, :t], 1e-12)
            assert ((a - b)[:, t].abs().amax(-1) > 1e-9).all()


@torch.no_grad()
def test_the_window_of_one_layer_is_exact():
    model, ids = cognate(num_hidden_layers=1, max_recursions=0, attention_window=4), tokens(1, 12)
    model.model.memory.up.weight.zero_()
    before = model(ids).logits
    ids[0, 3] = (ids[0, 3] + 1) % 56
    moved = ((model(ids).logits - before)[0].abs().amax(-1) > 1e-9).nonzero().flatten().tolist()
    assert moved == [3, 4, 5, 6]


@pytest.mark.parametrize("name", ["reasoning", "memory", "speed"])
@torch.no_grad()
def test_rows_are_computed_by_themselves_and_again(name):
    model, ids = cognate(specialization=name), tokens(5, 11)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    first = model(ids).logits
    assert torch.equal(model(ids).logits, first)
    order = torch.tensor([3, 0, 4, 1, 2])
    close(model(ids[order]).logits, first[order])
    for row in range(5):
        close(model(ids[row : row + 1]).logits[0], first[row])
    padded = F.pad(ids, (6, 0), value=7)
    mask = F.pad(torch.ones_like(ids), (6, 0))
    mask[2:, :6] = torch.tensor([0, 0, 0, 0, 1, 1])
    close(model(padded, mask).logits[:2, 6:], first[:2])
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


# ---------------------------------------------------------------- depth


def refiner_calls(model, run) -> int:
    """How often the refiner is called, and (by `columns`) on how many columns."""
    calls = []
    handle = model.model.recursion.refiner.register_forward_hook(lambda m, args, out: calls.append(out.shape[:2].numel()))
    run()
    handle.remove()
    return len(calls), sum(calls)


@torch.no_grad()
def test_halted_tokens_cost_nothing():
    model, ids = cognate(), tokens(4, 20)
    whole = 2 * 80
    cost = {}
    for threshold in (0.0, 0.3, 0.6, 0.8, 0.9, 0.97, 1.1):
        model.config.halt_threshold = threshold
        cost[threshold] = refiner_calls(model, lambda: model(ids))
    assert cost[0.0] == (2, whole) and cost[1.1] == (6, 3 * whole)
    columns = [n for _, n in cost.values()]
    assert columns == sorted(columns) and len(set(columns)) >= 4
    model.train()
    model.config.halt_threshold = 0.0
    assert refiner_calls(model, lambda: model(ids)) == (6, 3 * whole)  # training never freezes states
    model.eval()
    model.config.early_exit = False
    assert refiner_calls(model, lambda: model(ids)) == (6, 3 * whole)


@torch.no_grad()
def test_mean_steps_do_not_rise_as_the_threshold_falls():
    model, ids = cognate(), tokens(4, 20)
    means = []
    for threshold in (1.1, 0.95, 0.9, 0.7, 0.5, 0.3, 0.0):
        model.config.halt_threshold = threshold
        means.append(model(ids).halting_steps.mean().item())
    assert means[0] == 3 and means[-1] == 1 and means == sorted(means, reverse=True) and len(set(means)) > 4
    by_name = {}
    for name in ("speed", "memory", "reasoning"):
        model.config.halt_threshold = CognateConfig(specialization=name).halt_threshold
        by_name[name] = model(ids).halting_steps.mean()
    assert by_name["speed"] < by_name["memory"] < by_name["reasoning"]


@torch.no_grad()
def test_the_whole_depth_and_no_depth():
    model, ids = cognate(specialization="speed"), tokens(2, 9)
    all_y = model.train()(ids, return_all_steps=True).all_y
    model.eval()
    model.config.early_exit = False
    out = model(ids)
    close(out.hidden_states[-1], all_y[-1])  # the states of training, as they are at the last step
    assert out.token_halting_steps.amin() == 1  # what would have been
    model.config.use_act = False
    assert set(model(ids).token_halting_steps.flatten().tolist()) == {3}
    shallow = cognate(max_recursions=0)
    out = shallow(ids, return_all_steps=True)
    close(out.hidden_states[-1], out.all_y[0])
    assert out.halt_probs.shape == (2, 9, 1) and refiner_calls(shallow, lambda: shallow(ids)) == (0, 0)


@torch.no_grad()
def test_thoughts_of_training_are_taken_at_the_halt():
    model, ids = cognate(specialization="speed").train(), tokens(2, 9)
    out = model(ids, return_all_steps=True)
    halted = torch.stack(out.all_y, 2)[torch.arange(2)[:, None], torch.arange(9), out.token_halting_steps]
    close(out.hidden_states[-1], halted)
    assert out.token_halting_steps.unique().numel() > 1


def test_gradient_checkpointing_acts_and_changes_nothing():
    losses, calls = [], []
    for again in (False, True):
        model, ids = cognate().train(), tokens(2, 9)
        if again:
            model.gradient_checkpointing_enable()
            model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append((loss, model.model.embed_positions.weight.grad))
    close(*(loss for loss, _ in losses))
    close(*(gradient for _, gradient in losses))
    assert len(calls) == 2  # once forward, once more for the gradients


def test_without_refinement_steps_every_parameter_still_has_a_gradient():
    """Else processes that train together would wait for those of the refiner."""
    model = cognate(max_recursions=0).train()
    model(tokens(2, 9), labels=tokens(2, 9)).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad.abs().max() == 0 for p in model.model.recursion.refiner.parameters())
