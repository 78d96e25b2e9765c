"""The micro-batch that fits: candidates that keep the effective batch, the estimate on a CPU, `auto` through run.py."""

import json

import pytest
import torch
from tiny import build, collate, token_rows, wrap

import microbatch
import run
from microbatch import candidates, largest_micro_batch, saved_bytes


def test_candidates_reach_the_effective_batch_exactly():
    assert candidates(128, 4) == [32, 16, 8, 4, 2, 1]
    assert candidates(12, 1) == [12, 6, 4, 3, 2, 1]
    for effective, world in ((10, 4), (3, 4)):
        with pytest.raises(ValueError, match=f"{effective} is no multiple of the {world} processes"):
            candidates(effective, world)


def test_saved_bytes_grow_with_the_rows():
    model = wrap(build("gpt2")).train()

    def kept(n):
        return saved_bytes(lambda: model(**collate(token_rows([3] * n, question=(30, 31)), 4)).loss)

    one, two, four = kept(1), kept(2), kept(4)
    assert four - two == pytest.approx(2 * (two - one), rel=0.02) and two > 1.5 * one


@pytest.mark.parametrize("room, expected", [(10.5e6, 8), (3.5e6, 2), (1.5e6, 1)])
def test_the_largest_that_fits_the_memory(monkeypatch, room, expected):
    """A step that keeps 1 MB a row."""
    monkeypatch.setattr(microbatch, "free_memory", lambda: room / microbatch.CPU_SHARE)

    def step(rows):
        x = torch.zeros(rows, 125_000, dtype=torch.float64, requires_grad=True)
        (x.exp()).sum().backward()

    assert largest_micro_batch([16, 8, 4, 2, 1], step, torch.device("cpu")) == expected


def test_nothing_fits(monkeypatch):
    monkeypatch.setattr(microbatch, "free_memory", lambda: 1000)
    step = lambda rows: torch.zeros(rows, 1000, requires_grad=True).exp().sum().backward()  # noqa: E731
    with pytest.raises(ValueError, match="set activation_checkpointing: True"):
        largest_micro_batch([2, 1], step, torch.device("cpu"))


def test_free_memory_is_that_of_this_machine():
    assert 10**8 < microbatch.free_memory() < 10**14


def test_auto_keeps_the_effective_batch_and_what_a_resumed_run_had(make, tmp_path, capsys, monkeypatch):
    config = make("auto", batch_size_training="auto", effective_batch_size=24, num_epochs=2)
    assert run.main([config, "num_epochs=1"]) == 0
    out = capsys.readouterr().out
    assert "batch_size_training: auto -> 24" in out and "Effective batch size: 24 = 24 x 1 x 1" in out
    stored = json.loads((tmp_path / "runs/auto/run.json").read_text())["config"]
    assert stored["batch_size_training"] == 24
    monkeypatch.setattr(microbatch, "CPU_LARGEST", 4)
    assert run.main([config]) == 0
    assert "Effective batch size: 24 = 24 x 1 x 1" in capsys.readouterr().out
    assert run.main([config, "name=small"]) == 0
    assert "Effective batch size: 24 = 4 x 6 x 1" in capsys.readouterr().out


def test_auto_is_128_by_default_and_at_odds_with_an_accumulation(make, capsys):
    assert run.main([make("auto", batch_size_training="auto", gradient_accumulation_steps=2)]) == 2
    assert "batch_size_training: auto sets the accumulation itself" in capsys.readouterr().err
    assert run.main([make("auto", batch_size_training=0)]) == 2
    assert "batch_size_training" in capsys.readouterr().err
    assert run.main([make("auto", batch_size_training="auto", max_steps=1)]) == 0
    assert "Effective batch size: 128 = 32 x 4 x 1" in capsys.readouterr().out
