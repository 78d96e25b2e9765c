"""Optimizers and schedules; metrics.jsonl and wandb."""

import math
import sys
import types

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from coconut import Coconut
from files import read_jsonl
from optimizers import build_optimizer, learning_rate
from reporting import Metrics, wanted
from utils import Config

MINIMAL = {"save_path": "out", "coconut": True, "train_path": "train.json", "val_path": "valid.json"}


# ---------------------------------------------------------------------------------------------------- optimizers


def settings(**changes) -> Config:
    return Config(MINIMAL | {"name": "x"} | changes)


def tiny_model(mode: str) -> Coconut:
    base = GPT2LMHeadModel(GPT2Config(vocab_size=12, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    return Coconut(base, 9, 10, 11, 0, mode)


@pytest.mark.parametrize("name, kind", [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
@pytest.mark.parametrize("mode", ["continuous", "frozen", "learned_shared"])
def test_optimizer_holds_exactly_the_trainable_parameters(mode, name, kind):
    model = tiny_model(mode)
    model.base_causallm.transformer.wpe.weight.requires_grad_(False)
    optimizer = build_optimizer(model, settings(optimizer=name, lr=0.5, weight_decay=0.25, adam_beta2=0.9))
    assert type(optimizer) is kind and len(optimizer.param_groups) == 1, "weight decay on all parameters"
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.25)
    assert name != "adamw" or group["betas"] == (0.9, 0.9)
    held = {id(p) for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    assert id(model.base_causallm.transformer.wpe.weight) not in held
    assert (id(model.pause_embedding) in held) == (mode == "learned_shared")


def test_unknown_optimizer_lists_the_known_ones():
    with pytest.raises(ValueError, match="'adamw', 'sgd', 'muon' or 'mugrokfast'"):
        settings(optimizer="adma")


def test_learning_rate_constant_by_default():
    assert {learning_rate(step, 100, 0, settings(lr=0.5)) for step in (0, 50, 99)} == {0.5}


def test_learning_rate_warms_up_without_a_zero_step():
    rates = [learning_rate(step, 100, 4, settings(lr=1.0)) for step in range(6)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_learning_rate_cosine():
    config = settings(lr=2.0, use_lr_scheduler=True, min_lr_ratio=0.1)
    rates = [learning_rate(step, 110, 10, config) for step in range(111)]
    assert rates[10] == 2.0 and rates[9] == 2.0 and rates[0] == pytest.approx(0.2)
    assert rates[60] == pytest.approx(2.0 * 0.55), "half way: the mean of both ends"
    assert rates[110] == pytest.approx(0.2) and learning_rate(200, 110, 10, config) == pytest.approx(0.2)
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))
    quarter = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))
    assert rates[35] == pytest.approx(2.0 * quarter)


# ---------------------------------------------------------------------------------------------------- reporting


@pytest.fixture
def no_account(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "keys, env, netrc, expected",
    [
        ({}, {}, "", False),
        ({}, {"WANDB_API_KEY": "k"}, "", True),
        ({}, {}, "machine api.wandb.ai\n", True),
        ({}, {}, "machine example.org\n", False),
        ({}, {"WANDB_MODE": "offline"}, "", True),
        ({}, {"WANDB_MODE": "disabled", "WANDB_API_KEY": "k"}, "", False),
        ({"wandb": True}, {}, "", True),
        ({"wandb": True}, {"WANDB_MODE": "disabled"}, "", False),
        ({"wandb": False}, {"WANDB_API_KEY": "k", "WANDB_MODE": "online"}, "", False),
        ({"wandb_mode": "offline"}, {}, "", True),
        ({"wandb_mode": "disabled", "wandb": True}, {}, "", False),
        ({"wandb_mode": "offline"}, {"WANDB_MODE": "disabled"}, "", True),
    ],
)
def test_when_wandb_is_wanted(no_account, monkeypatch, keys, env, netrc, expected):
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    if netrc:
        (no_account / ".netrc").write_text(netrc)
    assert wanted(settings(**keys)) is expected


def test_metrics_without_wandb_are_json_lines(no_account, tmp_path):
    metrics = Metrics(settings(), tmp_path, enabled=True)
    metrics.log(event="step", epoch=0, **{"train/loss": 1.5})
    metrics.log_batch([], None)
    metrics.log(event="end")
    metrics.close()
    first, second = read_jsonl(tmp_path / "metrics.jsonl")
    assert first.pop("time") <= second.pop("time")
    assert (first, second) == ({"event": "step", "epoch": 0, "train/loss": 1.5}, {"event": "end"})


def test_other_ranks_and_debug_write_nothing(no_account, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb([]))
    metrics = Metrics(settings(wandb=True), tmp_path, enabled=False)
    metrics.log(event="step")
    assert metrics.wandb is None and not (tmp_path / "metrics.jsonl").exists()


def fake_wandb(calls: list, **broken) -> types.ModuleType:
    """A stand-in for the wandb package that notes its calls; `broken`: functions that raise."""

    def note(name):
        def call(*args, **kwargs):
            calls.append((name, args, kwargs))
            if name in broken:
                raise broken[name]
            return types.SimpleNamespace(id="run-7", log=note("log"), finish=note("finish"))

        return call

    module = types.ModuleType("wandb")
    module.init, module.Settings, module.Table = note("init"), lambda **kw: kw, lambda **kw: kw
    return module


def test_wandb_gets_the_stock_keys_and_continues_its_run(no_account, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(calls))
    for _ in range(2):
        metrics = Metrics(settings(wandb=True), tmp_path, enabled=True)
        metrics.log(event="eval", epoch=3, correct=2, **{"eval/acc": 0.5, "eval/loss": 1.0})
        metrics.log(event="speed", epoch=3, updates=10, mfu=0.31, phases={"data": 0.1})
        metrics.close()
    inits = [kwargs for name, _, kwargs in calls if name == "init"]
    assert [kwargs["id"] for kwargs in inits] == [None, "run-7"]
    assert inits[0]["project"] == "coconut" and inits[0]["name"] == "x" and inits[0]["config"]["lr"] == 1e-4
    sent = [({"eval/acc": 0.5, "eval/loss": 1.0},), ({"speed/mfu": 0.31},)]
    assert [args for name, args, _ in calls if name == "log"] == sent * 2
    assert sum(name == "finish" for name, *_ in calls) == 2


@pytest.mark.parametrize("broken", ["absent", "init"])
def test_wandb_that_cannot_open_only_warns(no_account, tmp_path, monkeypatch, capsys, broken):
    module = None if broken == "absent" else fake_wandb([], init=RuntimeError("no\nnetwork"))
    monkeypatch.setitem(sys.modules, "wandb", module)
    metrics = Metrics(settings(wandb=True), tmp_path, enabled=True)
    metrics.log(event="step", **{"train/loss": 1.0})
    metrics.close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith("Warning: wandb is off")
    assert read_jsonl(tmp_path / "metrics.jsonl")[0]["train/loss"] == 1.0


def test_an_unreachable_wandb_server_leaves_an_offline_run(no_account, tmp_path, monkeypatch, capsys):
    module, calls = fake_wandb([]), []

    def init(**kwargs):
        calls.append(kwargs["mode"])
        if kwargs["mode"] == "online":
            raise RuntimeError("no network")
        return fake_wandb([]).init()

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    metrics = Metrics(settings(wandb=True), tmp_path, enabled=True)
    assert calls == ["online", "offline"] and metrics.wandb is not None
    assert "Warning: wandb is offline (no network); later: wandb sync" in capsys.readouterr().out


@pytest.mark.parametrize("broken", ["log", "finish"])
def test_wandb_that_fails_later_does_not_stop_training(no_account, tmp_path, monkeypatch, broken):
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb([], **{broken: RuntimeError("server gone")}))
    metrics = Metrics(settings(wandb=True), tmp_path, enabled=True)
    metrics.log(event="step", **{"train/loss": 1.0})
    metrics.close()
    assert read_jsonl(tmp_path / "metrics.jsonl")[0]["train/loss"] == 1.0
