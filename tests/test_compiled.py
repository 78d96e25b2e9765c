"""Compiled passes: that they are compiled, that they compute the same, and that they are given up in one line."""

import json
import shutil

import pytest
import torch
from tiny import LATENT, build, collate, gradients, pause_variants, token_rows, wrap
from torch._dynamo.testing import CompileCounterWithBackend

import run
from compiled import _trial_batch, compile_passes


@pytest.fixture(autouse=True)
def forget():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def outcome(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), gradients(model)


def same(plain, fast, batch):
    (loss, gradient), (other_loss, other) = outcome(plain, batch), outcome(fast, batch)
    torch.testing.assert_close(other_loss, loss, rtol=1e-9, atol=1e-9)
    for name in gradient:
        torch.testing.assert_close(other[name], gradient[name], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_sizes_change_without_compiling_again(family):
    counter = CompileCounterWithBackend("aot_eager")
    plain, fast = wrap(build(family, layers=1)).train(), wrap(build(family, layers=1)).train()
    assert compile_passes(fast, backend=counter) is None and fast.compiled
    after_trial = counter.frame_count
    assert after_trial >= 3, "a prefix, a thought and a last pass"
    for n_latents, question in (([3, 3], (9, 10)), ([4, 4], (20, 21)), ([2, 5, 1], (5, 9)), ([3, 3, 3, 3], (5, 30))):
        same(plain, fast, collate(token_rows(n_latents, question=question), 4))
    assert counter.frame_count == after_trial


def test_pause_modes():
    plain, fast = (pause_variants(build("gpt2", layers=1))["pause_curriculum"].train() for _ in range(2))
    assert compile_passes(fast, backend="aot_eager") is None
    same(plain, fast, collate(token_rows([3, 3]), 4))
    same(plain, fast, collate(token_rows([0, 0]), 4))


def test_evaluation_and_tapped_blocks_run_eagerly():
    counter = CompileCounterWithBackend("aot_eager")
    plain, fast = wrap(build("gpt2", layers=2)), wrap(build("gpt2", layers=2))
    assert compile_passes(fast, backend=counter) is None
    before, batch = counter.frame_count, collate(token_rows([3, 2]))
    assert torch.equal(fast.generate(**batch, max_new_tokens=4), plain.generate(**batch, max_new_tokens=4))

    def double(layer, pass_, x):
        return 2 * x if layer == 1 else None

    double.layers = (0, 1)
    batch = collate(token_rows([3, 2]), 4)
    losses = [model.train()(**batch, edit=double).loss for model in (plain, fast)]
    torch.testing.assert_close(*losses)
    assert not torch.isclose(losses[0], plain(**batch).loss) and counter.frame_count == before


def broken(graph, inputs):
    raise RuntimeError("this compiler\nis out of order")


def wrong(graph, inputs):
    def run(*args):
        return tuple(x * 1.1 if torch.is_tensor(x) and x.is_floating_point() else x for x in graph(*args))

    return run


@pytest.mark.parametrize("backend, reason", [(broken, "out of order"), (wrong, "differ from")])
def test_given_up_with_a_reason_and_without_a_trace(backend, reason):
    plain, fast = wrap(build("gpt2", layers=1)).train(), wrap(build("gpt2", layers=1)).train()
    why_not = compile_passes(fast, backend=backend)
    assert reason in why_not and "\n" not in why_not and not fast.compiled
    assert all(p.grad is None for p in fast.parameters()) and fast.training
    same(plain, fast, collate(token_rows([3, 2]), 4))


def test_the_trial_has_padding_and_thoughts_and_no_stray_latent():
    model = wrap(build("gpt2", layers=1))
    batch = _trial_batch(model)
    plan = model.plan(**batch)
    assert plan.left_padded and len(plan.passes) == 4
    assert int((batch["input_ids"] == LATENT).sum()) == 15


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs g++")
def test_the_real_compiler_and_the_config_key(tmp_path, make, capsys):
    """`compile: always` on a CPU, through run.py; `compile: True` stays off there and says so."""
    base = {"feedback_mode": "pause_curriculum", "num_epochs": 1, "max_steps": 2, "resume": 0, "max_val_samples": 2}
    losses = {}
    for value in (False, True, "always"):
        path = make(f"compile-{value}", **base, compile=value)
        assert run.main([path]) == 0
        lines = (tmp_path / "runs" / f"compile-{value}" / "metrics.jsonl").read_text().splitlines()
        losses[value] = [r["train/loss"] for r in map(json.loads, lines) if r["event"] == "step"]
        out = capsys.readouterr().out
        assert ("The passes are compiled" in out) == (value == "always")
        assert ("Note: the passes are not compiled: a CPU gains nothing" in out) == (value is True)
    assert losses[False] == losses[True] and len(losses["always"]) == 2
    assert losses["always"] == pytest.approx(losses[False], abs=1e-4)
