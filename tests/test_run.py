"""run.py as users start it: real torchrun processes, real kills, real files; single processes run in this one."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from golden.drift import read_record, report

import run
import training
from coconut import Coconut


def torchrun(n: int, *args: str, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", "run.py", *args]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, **kwargs)


def weights(tmp_path: Path, name: str, n: int = 3) -> dict[str, torch.Tensor]:
    return torch.load(tmp_path / "runs" / name / f"checkpoint_{n}", weights_only=True)


def records(tmp_path: Path, name: str, event: str) -> list[dict]:
    lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["event"] == event]


def distance(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


# ---------------------------------------------------------------- what a run is


def test_losses_follow_the_golden_curve(make, tmp_path):
    """A refactor leaves the 20-step loss curve alone (written by `python tests/golden/make.py --only losses`)."""
    assert run.main([make("golden", gradient_accumulation_steps=1, num_epochs=4, max_latent_stage=2)]) == 0
    losses = [r["train/loss"] for r in records(tmp_path, "golden", "step")][:20]
    assert len(losses) == 20
    moved = report("losses", read_record("losses"), {"losses": losses})
    assert moved is None, moved


def test_stock_lines_in_their_order(make, tmp_path, capsys):
    config = make("lines", num_epochs=2, reset_optimizer=False)
    assert run.main([config]) == 0
    assert run.main([config, "num_epochs=3"]) == 0
    lines = capsys.readouterr().out.split("\n")
    patterns = [
        r"Config: \{'batch_size_training': 8, .*\}$",
        r"Running FSDP on rank = 0, world size = 1$",
        r"Coconut\($",
        r"Effective batch size: 8 = 8 x 1 x 1$",
        r"saving model\.$",
        r"eval loss \d+\.\d+$",
        r"Device 0: Cor=\d+, CoT=\d+, Total=11$",
        r"Question 0: Answer = '\w+ is a \w+\.' CoT = '\w+ is a \w+\.$",
        r"Full output: '.*$",
        r"Extracted Output: '.*$",
        r"Accuracy on validation set: \d+ / 11 = [\d.]+$",
        r"CoT match on validation set: \d+ / 11 = [\d.]+$",
        r"Generated tokens per question: [\d.]+$",
        r"saving model\.$",
        r"Accuracy on validation set: \d+ / 11 = [\d.]+$",
        r"Warning: found previous run and gonna resume from that\. the inputted `resume` argument is ignored!$",
        r"Loading from previous run epoch_2!$",
        r"<All keys matched successfully>$",
        r"Accuracy on validation set: \d+ / 11 = [\d.]+$",
        r"Final accuracy [\d.]+ \(epoch 3\)",
    ]
    found = 0
    for line in lines:
        found += found < len(patterns) and re.match(patterns[found], line) is not None
    assert found == len(patterns), f"line not found, in order: {patterns[found]}"


def test_equal_seeds_make_the_two_learned_pauses_one_run(make, tmp_path):
    for mode in ("learned_shared", "pause_curriculum", "frozen"):
        assert run.main([make(mode, feedback_mode=mode, num_epochs=4)]) == 0
    shared, pause, frozen = (weights(tmp_path, m, 4) for m in ("learned_shared", "pause_curriculum", "frozen"))
    assert len(records(tmp_path, "learned_shared", "step")) >= 20
    ids = [int(w.pop("feedback_mode_id")) for w in (shared, pause, frozen)]
    assert ids == [2, 3, 1] and distance(shared, pause) == 0
    init = torch.load(tmp_path / "runs/frozen/pause_init", weights_only=True)
    assert torch.equal(frozen["pause_embedding"], init) and not torch.equal(pause["pause_embedding"], init)
    assert records(tmp_path, "pause_curriculum", "train_epoch")[-1]["pause_l2"] > 0


def test_without_thoughts_all_modes_are_one_function(make, tmp_path):
    """So one stage-0 run (all flags False) may serve M3, M4, M4b and M5."""
    flags = {"coconut": False, "cot": False, "no_cot": False, "no_thoughts": False}
    assert run.main([make("plain", num_epochs=1, **flags)]) == 0
    plain = weights(tmp_path, "plain", 1)
    for mode in ("continuous", "pause_curriculum"):
        assert run.main([make(mode, feedback_mode=mode, num_epochs=1)]) == 0
        base = {k.removeprefix("base_causallm."): v for k, v in weights(tmp_path, mode, 1).items() if "base" in k}
        assert distance(plain, base) == 0
        start = [f"load_model_path={tmp_path / 'runs/plain'}", "resume=1", f"name=from-{mode}"]
        assert run.main([make(mode, feedback_mode=mode), *start]) == 0
        assert records(tmp_path, f"from-{mode}", "step")[0]["epoch"] == 1


def test_a_new_optimizer_for_every_epoch_or_stage_or_none(make, monkeypatch):
    built = []
    build = training.build_optimizer
    monkeypatch.setattr(training, "build_optimizer", lambda *args: built.append(build(*args)) or built[-1])
    for reset, n in ((True, 4), ("stage", 2), (False, 1)):
        built.clear()
        changes = {"reset_optimizer": reset, "num_epochs": 4, "epochs_per_stage": 2, "max_val_samples": 1}
        assert run.main([make(f"reset-{reset}", **changes)]) == 0
        assert len(built) == n and len(set(map(id, built))) == n


def test_evaluating_the_file_gives_the_logged_accuracy(make, tmp_path, capsys):
    config = make("m3", num_epochs=3)
    assert run.main([config]) == 0
    logged = records(tmp_path, "m3", "eval")[-1]
    capsys.readouterr()
    assert run.main([config, "only_eval=True", f"load_model_path={tmp_path / 'runs/m3/checkpoint_3'}", "resume=2"]) == 0
    assert f"Accuracy on validation set: {logged['correct']} / 11 = {logged['eval/acc']}" in capsys.readouterr().out
    written = (tmp_path / "runs/m3/eval_prosqa_valid.jsonl").read_text()
    assert written == (tmp_path / "runs/m3/eval_3.jsonl").read_text() and written.count("\n") == 11


# ---------------------------------------------------------------- many processes


def test_two_ranks_equal_one_process_with_twice_the_accumulation(make, tmp_path):
    """Leftover group uneven (44 rows: 6 micro-batches in groups of 4), thoughts ragged between ranks, more than eight.

    SGD with momentum, because Adam blows the rounding noise of gradients that are zero (key biases) up to its step size.
    """
    ragged = {
        "optimizer": "sgd",
        "lr": 0.1,
        "uniform_prob": 0.5,
        "pad_latent_to_max": False,
        "c_thought": 3,
        "max_latent_stage": 3,
    }
    for norm in ("stock", "tokens"):
        common = ragged | {"accumulation_norm": norm}
        assert run.main([make(f"one-{norm}", gradient_accumulation_steps=4, **common)]) == 0
        done = torchrun(2, make(f"two-{norm}", gradient_accumulation_steps=2, **common))
        assert done.returncode == 0, done.stderr[-2000:]
        assert distance(weights(tmp_path, f"one-{norm}"), weights(tmp_path, f"two-{norm}")) < 1e-6
        one, two = (records(tmp_path, f"{n}-{norm}", "eval") for n in ("one", "two"))
        for a, b in zip(one, two):
            assert (a["correct"], a["total"], a["cot_matches"]) == (b["correct"], b["total"], b["cot_matches"])
            assert a["eval/loss"] == pytest.approx(b["eval/loss"], abs=1e-5)
        assert "Device 1: Cor=" in done.stdout and "Effective batch size: 32 = 8 x 2 x 2" in done.stdout
    whole = {"optimizer": "sgd", "lr": 0.1, "accumulation_norm": "tokens", "batch_size_training": 32}
    split = whole | {"batch_size_training": 8, "gradient_accumulation_steps": 4}
    for name, changes in (("whole", whole), ("split", split)):
        assert run.main([make(name, num_epochs=2, max_latent_stage=2, **changes)]) == 0
    assert distance(weights(tmp_path, "whole", 2), weights(tmp_path, "split", 2)) < 1e-6


def test_stock_yaml_under_torchrun(tmp_path, small_data):
    """The stock ProsQA files with nothing but paths changed, two ranks, into one folder: train, then evaluate."""
    data = {"data/prosqa_train.json": "train", "data/prosqa_valid.json": "valid", "data/prosqa_test.json": "test"}
    for name in ("prosqa_coconut", "prosqa_coconut_eval"):
        text = (ROOT / f"args/{name}.yaml").read_text()
        for path, split in data.items():
            text = text.replace(path, str(small_data / f"prosqa_{split}.json"))
        text = text.replace("openai-community/gpt2", str(tmp_path / "gpt2"))
        text = text.replace("YOUR_PATH_TO_SAVE_THE_MODEL", str(tmp_path / "runs"))
        text = text.replace("YOUR_PATH_TO_COCONUT_CHECKPOINT", str(tmp_path / "runs/prosqa-coconut/checkpoint_2"))
        (tmp_path / f"{name}.yaml").write_text(text)
    save_tiny_gpt2(tmp_path / "gpt2")
    done = torchrun(2, str(tmp_path / "prosqa_coconut.yaml"), "num_epochs=2", "epochs_per_stage=1", "max_new_tokens=8")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Running FSDP on rank = 1, world size = 2" in done.stdout
    assert run.main([str(tmp_path / "prosqa_coconut_eval.yaml"), "max_new_tokens=8"]) == 0
    assert (tmp_path / "runs/prosqa-coconut/eval_prosqa_test.jsonl").is_file()


def save_tiny_gpt2(folder: Path) -> None:
    """A GPT-2 of random weights and its tokenizer, for the real `from_pretrained` path."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "backbones/prosqa_words")
    tokenizer.save_pretrained(folder)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2)).save_pretrained(folder)


# ---------------------------------------------------------------- interruptions


def kill_at(config: str, tmp_path: Path, name: str, condition) -> None:
    """Start run.py as a process and SIGKILL it once `condition(list of records)` holds; it must go on holding, for a busy
    machine may let a few records pass between two looks."""
    process = subprocess.Popen(
        [sys.executable, "run.py", config], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    metrics, deadline = tmp_path / "runs" / name / "metrics.jsonl", time.time() + 120
    while process.poll() is None and time.time() < deadline:
        whole = metrics.read_text().split("\n")[:-1] if metrics.is_file() else []
        if condition([json.loads(line) for line in whole]):
            break
        time.sleep(0.002)
    assert process.poll() is None, "the run ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize(
    "changes, condition",
    [
        # mid-epoch, Adam kept over epochs, from the snapshot of a few updates before
        (
            {"reset_optimizer": False, "save_every_steps": 2, "log_every": 1, "feedback_mode": "pause_curriculum"},
            lambda rs: sum(r["event"] == "step" for r in rs) >= 9,
        ),
        # between the end of an epoch's training and its validation, stock optimizer reset
        ({}, lambda rs: sum(r["event"] == "train_epoch" for r in rs) >= 2),
        # only improvements are kept: the weights to go on from are not in any checkpoint_N
        (
            {"save_only_improve": True, "reset_optimizer": "stage"},
            lambda rs: sum(r["event"] == "eval" for r in rs) >= 2,
        ),
    ],
    ids=["mid-epoch", "before-validation", "save-only-improve"],
)
def test_a_killed_run_ends_where_the_uninterrupted_one_does(make, tmp_path, changes, condition):
    assert run.main([make("whole", **changes)]) == 0
    config = make("killed", **changes)
    kill_at(config, tmp_path, "killed", condition)
    assert run.main([config]) == 0
    last = "last_state" if "save_only_improve" in changes else "checkpoint_3"
    whole, killed = (torch.load(tmp_path / "runs" / n / last, weights_only=True) for n in ("whole", "killed"))
    if last == "last_state":
        assert whole["position"] == killed["position"]
        assert str(whole["optimizer"]) == str(killed["optimizer"])
        whole, killed = whole["model"], killed["model"]
    assert distance(whole, killed) == 0
    keys = ("epoch", "stage", "correct", "eval/loss", "eval/two_choice_ce")
    final = [{r["epoch"]: {k: r[k] for k in keys} for r in records(tmp_path, n, "eval")} for n in ("whole", "killed")]
    assert final[0] == final[1] and len(final[0]) == 3
    assert not list((tmp_path / "runs/killed").glob(".tmp-*"))
    best = [tmp_path / "runs" / n / "best.json" for n in ("whole", "killed")]
    assert best[0].is_file() == best[1].is_file() and (not best[0].is_file() or best[0].read_text() == best[1].read_text())


def test_a_truncated_newest_checkpoint_falls_back_to_the_one_before(make, tmp_path, capsys):
    config = make("cut")
    assert run.main([config]) == 0
    whole, newest = weights(tmp_path, "cut"), tmp_path / "runs/cut/checkpoint_3"
    newest.write_bytes(newest.read_bytes()[:5000])
    (tmp_path / "runs/cut/checkpoint_best").write_text("stray")
    (tmp_path / "runs/cut/checkpoint_12.tmp").write_text("stray")
    capsys.readouterr()
    assert run.main([config]) == 0
    out = capsys.readouterr().out
    assert "checkpoint_3 is not a readable checkpoint" in out and "Loading from previous run epoch_2!" in out
    assert distance(whole, weights(tmp_path, "cut")) == 0
    assert run.main([config]) == 0
    assert "Nothing left to train: 3 of 3 epochs are done" in capsys.readouterr().out


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_nonfinite_loss_stops_before_the_step(make, tmp_path, capsys, monkeypatch, optimizer):
    """Also where it is noticed only updates later: nothing has moved since."""
    forward, build, built = Coconut.forward, training.build_optimizer, []
    monkeypatch.setattr(training, "build_optimizer", lambda *args: built.append(build(*args)) or built[-1])
    calls = []

    def poisoned(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        calls.append(self.training)
        return out._replace(loss=out.loss * math.nan) if len(calls) == 4 else out

    config = make("nan", optimizer=optimizer, log_every=5)
    assert run.main([config, "name=three", "max_steps=3"]) == 0
    monkeypatch.setattr(Coconut, "forward", poisoned)
    assert run.main([config]) == 1
    three, stopped = ([p for group in o.param_groups for p in group["params"]] for o in built)
    assert len(three) > 10 and all(torch.equal(a, b) for a, b in zip(three, stopped))
    assert len(calls) == (5 if optimizer == "adamw" else 4), "fused AdamW is asked later, SGD at once"
    error = capsys.readouterr().err
    assert "is not finite at epoch 0, update 3; no step was taken" in error
    saved = torch.load(tmp_path / "runs/nan/nonfinite_batch_rank0", weights_only=True)
    assert saved["step"] == 3 and saved["batches"][0]["input_ids"].shape[0] == 8 and len(saved["batches"][0]["idx"]) == 8
    assert [r["train/step"] for r in records(tmp_path, "nan", "step")] == [0, 1, 2]


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"epoch_per_stage": 2, "lr": "fast"}, ["epoch_per_stage", "did you mean epochs_per_stage", "lr"]),
        ({"cot": True}, ["coconut and cot contradict"]),
        ({"feedback_mode": "recycled"}, ["recycled", "continuous, frozen"]),
        ({"coconut": False, "cot": True, "feedback_mode": "frozen"}, ["frozen needs coconut: True"]),
        ({"save_path": "YOUR_PATH_TO_SAVE_THE_MODEL"}, ["save_path", "placeholder"]),
        ({"load_model_path": "nowhere/checkpoint_1"}, ["load_model_path", "nowhere"]),
        ({"model_id": "no/such-folder-here"}, ["model_id", "no/such-folder-here"]),
        ({"train_path": "data/nothing/prosqa_train.json"}, ["data/nothing/prosqa_train.json", "python data/prosqa.py"]),
        ({"val_path": "data"}, ["data file data is a folder"]),
        ({"load_model_path": "README.md"}, ["README.md is not a readable checkpoint", "another kind of file"]),
        ({"resume": 3}, ["resume", "num_epochs"]),
        ({"effective_batch_size": 12}, ["effective_batch_size", "12"]),
        ({"optimizer": "adam"}, ["optimizer", "adamw"]),
        ({"c_thought": 200}, ["row", "tokens", "256 positions"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_gives_one_line_and_leaves_nothing(make, tmp_path, capsys, monkeypatch, changes, words):
    monkeypatch.chdir(ROOT)
    assert run.main([make("bad", **changes)]) == 2
    error = capsys.readouterr().err
    errors = [line for line in error.split("\n") if line.startswith("error: ")]
    assert len(errors) == 1 and all(word in errors[0] for word in words), error
    assert not list(tmp_path.glob("runs/bad/checkpoint_*")) and not list(tmp_path.glob("runs/bad/run.json"))


def test_resuming_another_run_is_refused_but_evaluating_is_not(make, tmp_path, capsys):
    assert run.main([make("m3", num_epochs=1)]) == 0
    config = make("m3", num_epochs=2, c_thought=2, lr=5e-4)
    assert run.main([config]) == 2
    error = capsys.readouterr().err
    assert "c_thought: 1 -> 2" in error and "another name" in error
    assert run.main([config, "only_eval=True", f"load_model_path={tmp_path / 'runs/m3'}"]) == 0


def test_help_explains_the_keys(capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "max_latent_stage" in out and "key=value" in out
