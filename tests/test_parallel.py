"""Several processes as users start them, under DDP and FSDP2: one function, whatever the number and kind."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import run
from checkpoint import read_weights

# Ranks have batches with different numbers of thoughts, some none, some more than eight; the last update is short.
# SGD with momentum, because Adam blows the rounding noise of gradients that are zero (key biases) up to its step size.
RAGGED = {
    "optimizer": "sgd",
    "lr": 0.1,
    "uniform_prob": 0.5,
    "pad_latent_to_max": False,
    "c_thought": 3,
    "max_latent_stage": 3,
    "reset_optimizer": False,
    "gradient_clip": 1.0,
}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def torchrun(*args: str, launcher: tuple = ("-m", "torch.distributed.run", "--standalone")) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *launcher, *args], cwd=ROOT, env=ENVIRONMENT, **pipes)


def finished(process: subprocess.Popen) -> str:
    out, error = process.communicate(timeout=150)
    assert process.returncode == 0, error[-2000:]
    return out


def weights(tmp_path, name: str, n: int = 3) -> dict:
    return read_weights(tmp_path / "runs" / name / f"checkpoint_{n}")


def records(tmp_path, name: str, event: str) -> list[dict]:
    lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["event"] == event]


def distance(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


# ---------------------------------------------------------------- FSDP2


@pytest.mark.parametrize("mode", ["continuous", pytest.param("pause_curriculum", marks=pytest.mark.slow)])
def test_two_sharded_ranks_equal_one_process(make, tmp_path, mode):
    """Ragged thoughts must not hang, gradients are those of the whole batch, and evaluation counts every row once."""
    assert run.main([make("one", gradient_accumulation_steps=4, feedback_mode=mode, **RAGGED)]) == 0
    config = make("two", gradient_accumulation_steps=2, feedback_mode=mode, parallel="fsdp2", **RAGGED)
    out = finished(torchrun("--nproc_per_node=2", "run.py", config))
    assert "Effective batch size: 32 = 8 x 2 x 2" in out
    assert distance(weights(tmp_path, "one"), weights(tmp_path, "two")) < 1e-6
    for a, b in zip(records(tmp_path, "one", "step"), records(tmp_path, "two", "step"), strict=True):
        assert b["train/loss"] == pytest.approx(a["train/loss"], abs=1e-5) and a["rows"] == b["rows"]
        assert b["train/grad_norm"] == pytest.approx(a["train/grad_norm"], abs=1e-5)
    for a, b in zip(records(tmp_path, "one", "eval"), records(tmp_path, "two", "eval"), strict=True):
        assert (a["correct"], a["total"], a["n_latents"]) == (b["correct"], b["total"], b["n_latents"])
        assert a["eval/loss"] == pytest.approx(b["eval/loss"], abs=1e-5)
        assert a["eval/two_choice_ce"] == pytest.approx(b["eval/two_choice_ce"], abs=1e-5)


def test_a_world_of_one_is_the_same_to_the_bit(make, tmp_path):
    """In shards, with blocks computed again, or neither; float32, where there is nothing to round differently."""
    options = {"plain": {}, "shards": {"parallel": "fsdp2"}, "again": {"parallel": "fsdp2", "activation_checkpointing": True}}
    for name, changes in options.items():
        assert run.main([make(name, gradient_accumulation_steps=2, **RAGGED, **changes)]) == 0
    assert distance(weights(tmp_path, "plain"), weights(tmp_path, "shards")) == 0
    assert distance(weights(tmp_path, "plain"), weights(tmp_path, "again")) < 1e-6


def test_bf16_computes_in_bf16_and_keeps_float32_shards(make, tmp_path):
    for name, changes in {"autocast": {}, "shards": {"parallel": "fsdp2"}, "float32": {"bf16": False}}.items():
        assert run.main([make(name, num_epochs=2, **{"bf16": True} | changes)]) == 0
    losses = {
        n: torch.tensor([r["train/loss"] for r in records(tmp_path, n, "step")]) for n in ("autocast", "shards", "float32")
    }
    assert (losses["shards"] - losses["autocast"]).abs().max() < 0.05 < losses["float32"][0] - losses["float32"][-1]
    assert (losses["shards"] - losses["float32"]).abs().max() > 1e-4, "bf16 would not round"
    stored = weights(tmp_path, "shards", 2)
    assert all(value.dtype == torch.float32 for value in stored.values())
    assert any((value != value.bfloat16().float()).any() for value in stored.values()), "the weights themselves were rounded"


def test_a_cut_run_goes_on_under_another_kind_of_parallelism(make, tmp_path):
    """AdamW with its state, in mid-epoch: plain to shards, shards to plain, shards to shards; to the bit."""
    changes = {"reset_optimizer": False, "num_epochs": 2, "feedback_mode": "learned_shared"}
    assert run.main([make("whole", **changes)]) == 0
    for first, second in (("ddp", "fsdp2"), ("fsdp2", "ddp"), ("fsdp2", "fsdp2")):
        name = f"{first}-{second}"
        config = make(name, **changes)
        assert run.main([config, f"parallel={first}", "max_steps=4"]) == 0
        names = {p.name for p in (tmp_path / "runs" / name).glob("last_*")}
        assert names == ({"last_state"} if first == "ddp" else {"last_shards_4"})
        assert run.main([config, f"parallel={second}"]) == 0
        assert distance(weights(tmp_path, "whole", 2), weights(tmp_path, name, 2)) == 0
        names = {p.name for p in (tmp_path / "runs" / name).glob("last_*")}
        assert names == ({"last_state"} if second == "ddp" else {"last_shards_12"}), "an overtaken snapshot stays"


@pytest.mark.parametrize(
    "changes, word",
    [({"compile": "always"}, "compile"), ({"batch_size_training": "auto"}, "auto"), ({"bf16": "pure"}, "bf16")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_shards_cannot_do_is_said_at_once(make, capsys, changes, word):
    assert run.main([make("no", parallel="fsdp2", **changes)]) == 2
    error = capsys.readouterr().err
    assert word in error and "parallel: fsdp2" in error


# ---------------------------------------------------------------- the number of processes


def test_the_number_of_processes_may_change(make, tmp_path):
    """2, then 1, then 3 processes (4 micro-batches: one has two of them): the rows of every update stay what they were."""
    changes = RAGGED | {"num_epochs": 3}
    assert run.main([make("whole", gradient_accumulation_steps=4, **changes)]) == 0
    config = make("changing", gradient_accumulation_steps=2, **changes)
    finished(torchrun("--nproc_per_node=2", "run.py", config, "max_steps=1"))
    assert run.main([config, "max_steps=3"]) == 0
    out = finished(torchrun("--nproc_per_node=3", "run.py", config))
    assert "Note: updates stay those of 4 micro-batches" in out
    assert "Effective batch size: 32 = 8 x 4 micro-batches, dealt out to 3 processes" in out
    assert [r["world_size"] for r in records(tmp_path, "changing", "start")] == [2, 1, 3]
    whole, changing = (
        {(r["epoch"], r["train/step"]): r["rows"] for r in records(tmp_path, n, "step")} for n in ("whole", "changing")
    )
    assert whole == changing and len(whole) == 6
    assert distance(weights(tmp_path, "whole"), weights(tmp_path, "changing")) < 1e-6


def test_two_nodes_are_two_ranks(make, tmp_path):
    """Two launchers that meet at an address, as on two machines; each takes its local rank 0 as device."""
    one = make("one-node", num_epochs=2)
    finished(torchrun("--nproc_per_node=2", "run.py", one))
    two = make("two-nodes", num_epochs=2)
    common = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_id=job-{os.getpid()}"]
    common += [f"--rdzv_endpoint=localhost:{free_port()}", "--local_addr=localhost", "run.py", two]
    nodes = [torchrun(*common, launcher=("-m", "torch.distributed.run")) for _ in range(2)]
    out = "".join(finished(node) for node in nodes)
    assert "rank = 0, world size = 2" in out and "rank = 1, world size = 2" in out
    assert distance(weights(tmp_path, "one-node", 2), weights(tmp_path, "two-nodes", 2)) == 0


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize(
    "changes, code", [pytest.param({}, 0, id="done", marks=pytest.mark.slow), pytest.param({"lr": "fast"}, 2, id="mistake")]
)
def test_the_launcher_ends_with_the_code_of_the_run(make, tmp_path, changes, code):
    config = make("code", num_epochs=1, **changes)
    process = torchrun("--standalone", "--nproc_per_node=2", "run.py", config, launcher=("scripts/torchrun.py",))
    process.communicate(timeout=100)
    assert process.returncode == code
