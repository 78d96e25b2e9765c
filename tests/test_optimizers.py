"""Muon and Grokfast: the filter, against torch's own optimizers, routing, presets, rates, states to the bit."""

import copy
import io
import re
from types import SimpleNamespace

import pytest
import torch
from tiny import build, wrap
from torch import nn
from transformers import PreTrainedModel

from optimizers import (
    PHASES,
    MuGrokfast,
    build_optimizer,
    can_skip,
    learning_rate,
    phase_preset,
    routes,
    set_rates,
    update_norms,
    with_preset,
)
from sharding import load_indexed_optimizer, load_whole_optimizer, optimizer_tensors


def settings(optimizer="mugrokfast", **changes) -> SimpleNamespace:
    plain = {"lr": 1e-4, "weight_decay": 0.01, "adam_beta2": 0.999, "use_lr_scheduler": False, "min_lr_ratio": 0.0}
    return SimpleNamespace(**plain | with_preset({"optimizer": optimizer} | changes))


def over(*matrices: nn.Parameter, strength=0.0, decay=0.98, rest=(), **muon) -> MuGrokfast:
    hidden = [{"params": list(matrices), "name": "hidden"}]
    others = [{"params": list(rest), "name": "rest"}] if rest else []
    return MuGrokfast(hidden, others, {"lr": 0.1, "weight_decay": 0.0} | muon, {"lr": 0.01}, strength, decay)


def parameter(*shape: int, seed: int = 0, scale: float = 1.0) -> nn.Parameter:
    return nn.Parameter(scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def seen_gradients(gradients, strength, decay=0.98) -> list[torch.Tensor]:
    """What the inner optimizers see, step by step."""
    weight, seen = parameter(2, 3), []
    optimizer = over(weight, strength=strength, decay=decay)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        seen.append(weight.grad)
    return seen


# ---------------------------------------------------------------------------------------------------- the filter


def test_a_constant_gradient_grows_from_the_first_step_on():
    gradient = torch.randn(2, 3)
    for seen in seen_gradients([gradient] * 20, strength=0.5):
        torch.testing.assert_close(seen, 1.5 * gradient)


def test_an_alternating_gradient_does_not_grow():
    gradient = torch.randn(2, 3)
    last = seen_gradients([gradient * (-1) ** i for i in range(400)], strength=0.5)[-1]
    torch.testing.assert_close(last, -gradient * (1 - 0.5 * 0.01), rtol=0.01, atol=1e-3)  # mu settles at -+(1 - a) / (1 + a) g


def test_the_filter_is_the_published_recurrence():
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(2, 3, generator=generator) for _ in range(6)]
    slow = gradients[0].clone()
    for i, (gradient, seen) in enumerate(zip(gradients, seen_gradients(gradients, strength=2.0, decay=0.9))):
        slow = slow if i == 0 else 0.9 * slow + 0.1 * gradient
        torch.testing.assert_close(seen, gradient + 2.0 * slow)


@pytest.mark.parametrize("strength, decay, message", [(-0.1, 0.98, "grokfast_lambda: -0.1"), (0.1, 1.0, "grokfast_alpha: 1.0")])
def test_a_filter_that_makes_no_sense_is_refused(strength, decay, message):
    with pytest.raises(ValueError, match=message):
        over(parameter(2, 3), strength=strength, decay=decay)


# ---------------------------------------------------------------------------------------------------- Muon and AdamW


def tiny_loss(model: nn.Module, step: int) -> torch.Tensor:
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(step))
    return model(input_ids=ids, labels=ids).loss


def train(model, optimizer, steps) -> None:
    for step in steps:
        tiny_loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_without_a_filter_it_is_torchs_muon_and_adamw(name):
    ours, theirs = build(name, dtype=torch.float32), build(name, dtype=torch.float32)
    config = settings("muon", muon_lr=0.02, lr=0.003, weight_decay=0.1)
    train(ours, build_optimizer(ours, config), range(4))
    route = routes(theirs)
    muon = torch.optim.Muon(route["hidden"], lr=0.02, weight_decay=0.1)
    adamw = torch.optim.AdamW(route["rest"], lr=0.003, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    for step in range(4):
        tiny_loss(theirs, step).backward()
        muon.step()
        adamw.step()
        theirs.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(weights(ours), weights(theirs)))
    for moved, start in zip(weights(ours), build(name, dtype=torch.float32).parameters()):
        assert not torch.equal(moved, start)


@pytest.mark.parametrize("strength", [0.0, 2.0])
def test_a_filter_changes_the_steps(strength):
    model, plain = build("gpt2", dtype=torch.float32), build("gpt2", dtype=torch.float32)
    optimizer = build_optimizer(model, settings(grokfast_lambda=strength))
    train(model, optimizer, range(3))
    train(plain, build_optimizer(plain, settings("muon")), range(3))
    same = all(torch.equal(a, b) for a, b in zip(weights(model), weights(plain)))
    assert same == (strength == 0)
    assert all(("slow_gradient" in optimizer.state[p]) == (strength > 0) for p in model.parameters())


@pytest.mark.parametrize("shape", [(16, 16), (8, 32), (32, 8), (2, 3), (3, 2), (1, 7), (7, 1), (1, 1), (64, 3)], ids=str)
def test_an_update_is_nearly_orthogonal_for_any_shape_and_scale(shape):
    steps = []
    for scale in (1e-4, 1.0, 1e4):
        weight = nn.Parameter(torch.zeros(shape))
        optimizer = over(weight, lr=1.0)
        weight.grad = parameter(*shape, scale=scale).detach()
        optimizer.step()
        steps.append(weight.detach() / max(1, shape[0] / shape[1]) ** 0.5)
    found = torch.linalg.svdvals(steps[1])
    assert 0.4 < found.min() and found.max() < 1.6, found
    for step in steps:
        torch.testing.assert_close(step, steps[1], rtol=0.1, atol=0.1)  # bf16 inside
    aligned = (steps[1] * parameter(*shape).detach()).sum()
    assert aligned < 0, "it goes downhill"


# ---------------------------------------------------------------------------------------------------- routing


def names_in(model, group) -> set[str]:
    held = {id(p) for p in group}
    return {name for name, p in model.named_parameters() if id(p) in held}


@pytest.mark.parametrize(
    "family, hidden",
    [
        ("gpt2", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
        (
            "llama",
            {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
            | {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
        ),
    ],
)
def test_hidden_matrices_are_found_by_module_and_name(family, hidden):
    model = build(family)
    found = names_in(model, routes(model)["hidden"])
    stem = "transformer.h" if family == "gpt2" else "model.layers"
    assert found == {f"{stem}.{layer}.{name}.weight" for layer in range(3) for name in hidden}
    rest = names_in(model, routes(model)["rest"])
    assert rest == {name for name, _ in model.named_parameters()} - found
    table = {"gpt2": "transformer.wte.weight", "llama": "lm_head.weight"}[family]
    assert table in rest, "though it is a matrix"


def test_routing_of_the_wrapper_and_of_frozen_parameters():
    model = wrap(build("gpt2"), "learned_shared")
    frozen = model.base_causallm.transformer.h[0].mlp.c_fc.weight
    frozen.requires_grad_(False)
    route = routes(model)
    assert len(route["hidden"]) == 11 and not any(p is frozen for p in route["hidden"] + route["rest"])
    assert any(p is model.pause_embedding for p in route["rest"])


class Odd(nn.Module):
    """Everything that is a matrix and not one to be made orthogonal, and one that is."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.position_table = nn.Linear(4, 4, bias=False)
        self.norm = nn.LayerNorm(4)
        self.router = nn.Linear(4, 1)
        self.narrow = nn.Linear(1, 4, bias=False)
        self.keys = nn.ParameterList([torch.zeros(4, 4)])
        self.mix = nn.MultiheadAttention(4, 2)
        self.lm_head = nn.Linear(4, 9, bias=False)
        self.memory = nn.Embedding(6, 4)
        self.memory.fixed_lr = 1e-3


def test_what_is_a_matrix_but_not_hidden():
    model = Odd()
    assert names_in(model, routes(model)["hidden"]) == {"mix.in_proj_weight", "mix.out_proj.weight"}
    assert not names_in(model, routes(model, hidden=False)["hidden"])


def test_a_tied_head_is_no_hidden_matrix():
    model = Odd()
    model.mix.out_proj.weight = model.position_table.weight
    assert names_in(model, routes(model)["hidden"]) == {"mix.in_proj_weight"}


class Headed(PreTrainedModel):
    """A model whose head nothing in its name gives away."""

    def __init__(self):
        from transformers import PretrainedConfig

        super().__init__(PretrainedConfig())
        self.inner, self.readout = nn.Linear(4, 4), nn.Linear(4, 9)

    def get_output_embeddings(self):
        return self.readout


def test_the_head_is_asked_for():
    model = Headed()
    assert names_in(model, routes(model)["hidden"]) == {"inner.weight"}


def test_a_model_without_hidden_matrices_is_refused():
    with pytest.raises(ValueError, match="optimizer: muon finds no hidden matrix .*; use adamw"):
        build_optimizer(nn.Embedding(4, 4), settings("muon"))


# ---------------------------------------------------------------------------------------------------- presets and rates


def rates(optimizer) -> dict:
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


@pytest.mark.parametrize(
    "phase, muon, adamw, strength",
    [(1, 5e-3, 5e-4, 0.02), (3, 5e-4, 5e-4, 0.1), (5, 1e-3, 1e-3, 2.0), (6, 1e-4, 1e-4, 0.2), (7, 5e-4, 5e-4, 0.15)],
)
def test_presets(phase, muon, adamw, strength):
    optimizer = build_optimizer(build("gpt2"), settings(optimizer_phase=phase))
    hidden, rest = optimizer.param_groups
    assert rates(optimizer) == {"hidden": muon, "rest": adamw}
    assert hidden["grokfast_lambda"] == rest["grokfast_lambda"] == strength and hidden["grokfast_alpha"] == 0.98
    assert (hidden["momentum"], hidden["nesterov"], hidden["weight_decay"]) == (0.95, True, 0.01)
    assert (rest["betas"], rest["weight_decay"]) == ((0.9, 0.95), 0.01)


@pytest.mark.parametrize("phase", [0, 2, 8, "3", None, [1]])
def test_an_unknown_phase_lists_the_known_ones(phase):
    with pytest.raises(ValueError, match=re.escape(f"optimizer_phase: {phase!r} is unknown; known: 1, 3, 5, 6, 7")):
        phase_preset(phase)


def test_a_preset_only_fills_what_is_not_given():
    values = {"optimizer": "mugrokfast", "lr": 0.3, "muon_lr": None, "adam_beta2": 0.9, "optimizer_phase": 5}
    assert with_preset(values) == PHASES[5] | {"optimizer": "mugrokfast", "lr": 0.3, "adam_beta2": 0.9, "optimizer_phase": 5}
    assert with_preset({"optimizer": "muon"})["grokfast_lambda"] == 0
    for other in ({"optimizer": "adamw"}, {"lr": 1.0}):
        assert with_preset(other) == other


def test_given_values_reach_the_optimizer():
    given = {
        "muon_lr": 2e-3,
        "lr": 7e-4,
        "grokfast_lambda": 0.3,
        "grokfast_alpha": 0.9,
        "adam_beta2": 0.99,
        "weight_decay": 0.5,
    }
    hidden, rest = build_optimizer(build("gpt2"), settings(**given)).param_groups
    assert (hidden["lr"], rest["lr"], hidden["weight_decay"], rest["weight_decay"]) == (2e-3, 7e-4, 0.5, 0.5)
    assert (hidden["grokfast_lambda"], hidden["grokfast_alpha"], rest["betas"]) == (0.3, 0.9, (0.9, 0.99))


def test_a_config_without_the_new_keys_gets_the_first_preset():
    config = SimpleNamespace(optimizer="mugrokfast", lr=1e-4, weight_decay=0.0, adam_beta2=0.95)
    hidden, rest = build_optimizer(build("gpt2"), config).param_groups
    assert (hidden["lr"], hidden["grokfast_lambda"], rest["lr"]) == (5e-3, 0.02, 1e-4)


def test_all_groups_follow_one_schedule_on_their_own_scale():
    config = settings(use_lr_scheduler=True, warmup_from=0.1, min_lr=1e-6)
    optimizer = build_optimizer(build("gpt2"), config)
    seen = []
    for step in range(101):
        logged = set_rates(optimizer, step, 100, 10, config)
        seen.append(rates(optimizer))
        assert logged == seen[-1]["rest"]
    assert seen[0] == {"hidden": pytest.approx(5e-4), "rest": pytest.approx(5e-5)}, "a tenth"
    assert seen[10] == {"hidden": 5e-3, "rest": 5e-4}
    assert seen[55]["hidden"] == pytest.approx((5e-3 + 1e-6) / 2), "half way"
    assert seen[100] == {"hidden": pytest.approx(1e-6), "rest": pytest.approx(1e-6)}
    for before, after in zip(seen[:10], seen[1:11]):
        assert after["hidden"] - before["hidden"] == pytest.approx(0.09 * 5e-3)


def test_real_steps_follow_the_rates():
    weight, bias = parameter(8, 8), parameter(8)
    optimizer = over(weight, rest=[bias], strength=0.02)
    lengths = []
    for rate in (0.1, 1.0, 1e-3):
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = rate, rate / 10
        weight.grad, bias.grad = parameter(8, 8, seed=1).detach(), torch.ones(8)
        with update_norms(optimizer) as norms:
            optimizer.step()
        lengths.append((float(norms["hidden"]) / rate, float(norms["rest"]) / rate))
    for hidden, rest in lengths:
        assert hidden == pytest.approx(lengths[0][0], rel=0.05)
        assert rest == pytest.approx(0.1 * 8**0.5, rel=0.01)


def test_warm_up_takes_at_most_half_of_all_updates():
    config = settings("adamw", lr=1.0, use_lr_scheduler=True)
    found = [learning_rate(step, 10, 100, config) for step in range(10)]
    assert found[:5] == [0.2, 0.4, 0.6, 0.8, 1.0] and found[5] == 1.0 > found[6] > found[9] > 0
    assert learning_rate(0, 1, 100, config) == 1.0, "a single update is made at the full rate"


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_a_module_may_keep_its_own_rate(name):
    model, config = Odd(), settings(name, lr=0.5, use_lr_scheduler=True)
    optimizer = build_optimizer(model, config)
    set_rates(optimizer, 90, 100, 10, config)
    own = optimizer.param_groups[-1]
    assert names_in(model, own["params"]) == {"memory.weight"} and own["lr"] == 1e-3
    assert all(group["lr"] < 0.05 for group in optimizer.param_groups[:-1])


# ---------------------------------------------------------------------------------------------------- state


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def restored_whole(state, named, model, optimizer) -> None:
    optimizer.load_state_dict(state)


def restored_by_number(state, named, model, optimizer) -> None:
    load_indexed_optimizer(state, model, optimizer)


def restored_by_name(state, named, model, optimizer) -> None:
    load_whole_optimizer(named, model, optimizer)


@pytest.mark.parametrize("restore", [restored_whole, restored_by_number, restored_by_name])
@pytest.mark.parametrize("name", ["muon", "mugrokfast"])
def test_a_restored_state_takes_the_same_next_steps_to_the_bit(name, restore):
    config = settings(name, optimizer_phase=5, muon_lr=0.02)
    model = build("gpt2", dtype=torch.float32)
    optimizer = build_optimizer(model, config)
    train(model, optimizer, range(3))
    state = through_a_file({"all": optimizer.state_dict(), "named": optimizer_tensors(model, optimizer)})
    other = copy.deepcopy(model)
    fresh = build_optimizer(other, config)
    restore(state["all"], state["named"], other, fresh)
    amnesic = copy.deepcopy(model)
    for one, its in ((model, optimizer), (other, fresh), (amnesic, build_optimizer(amnesic, config))):
        train(one, its, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(other)))
    assert not all(torch.equal(a, b) for a, b in zip(weights(model), weights(amnesic))), "the state matters"
    fields = {"exp_avg", "exp_avg_sq", "step", "momentum_buffer"} | ({"slow_gradient"} if name == "mugrokfast" else set())
    assert {key for values in fresh.state.values() for key in values} == fields
    assert len(fresh.state) == len(list(other.parameters()))


def test_a_restored_state_keeps_the_rates_and_options_of_the_config():
    model = build("gpt2", dtype=torch.float32)
    before = build_optimizer(model, settings(muon_lr=0.1, grokfast_lambda=0.5))
    train(model, before, range(1))
    set_rates(before, 5, 10, 0, settings(use_lr_scheduler=True))
    for name, key in (("mugrokfast", "slow_gradient"), ("muon", "momentum_buffer")):
        now = build_optimizer(model, settings(name, muon_lr=0.2, grokfast_lambda=0.25, weight_decay=0.3))
        now.load_state_dict(before.state_dict())
        hidden = now.param_groups[0]
        assert (hidden["lr"], hidden["initial_lr"], hidden["weight_decay"]) == (0.2, 0.2, 0.3)
        assert hidden["grokfast_lambda"] == (0.25 if name == "mugrokfast" else 0.0)
        assert key in now.state[hidden["params"][0]]


def test_an_adamw_state_of_before_groups_had_their_own_rate_can_be_loaded():
    model, config = build("gpt2", dtype=torch.float32), settings("adamw", lr=0.01, use_lr_scheduler=True)
    old = torch.optim.AdamW(model.parameters(), lr=0.7, fused=True)
    train(model, old, range(2))
    optimizer = build_optimizer(model, config)
    optimizer.load_state_dict(old.state_dict())
    assert set_rates(optimizer, 0, 10, 0, config) == optimizer.param_groups[0]["lr"] == 0.01
    assert optimizer.state[next(model.parameters())]["step"] == 2


def test_whether_a_step_can_be_left_out_on_the_device():
    model = build("gpt2", dtype=torch.float32)
    assert [can_skip(build_optimizer(model, settings(name))) for name in ("adamw", "sgd", "muon", "mugrokfast")] == [
        True,
        False,
        False,
        False,
    ]


# ---------------------------------------------------------------------------------------------------- size of updates


def test_update_norms_are_what_the_weights_moved():
    model = build("llama", dtype=torch.float32)
    optimizer, before = build_optimizer(model, settings()), weights(model)
    tiny_loss(model, 0).backward()
    with update_norms(optimizer) as norms:
        optimizer.step()
    moved = {id(p): (p.detach() - old).square().sum() for p, old in zip(model.parameters(), before)}
    for group in optimizer.param_groups:
        expected = sum(moved[id(p)] for p in group["params"]) ** 0.5
        torch.testing.assert_close(norms[group["name"]], expected)
    torch.testing.assert_close(norms["all"], sum(moved.values()) ** 0.5)
    assert norms.keys() == {"hidden", "rest", "all"} and norms["hidden"] > 0


def test_a_parameter_without_a_gradient_stays_and_begins_its_filter_later():
    used, unused = parameter(4, 4), parameter(4, 4, seed=1)
    optimizer, before = over(used, unused, strength=1.0), unused.detach().clone()
    used.grad = torch.ones(4, 4)
    optimizer.step()
    assert torch.equal(unused, before) and unused not in optimizer.state
    unused.grad = torch.ones(4, 4)
    optimizer.step()
    torch.testing.assert_close(unused.grad, 2 * torch.ones(4, 4))
    assert not torch.equal(unused, before)
