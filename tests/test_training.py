"""What a run reports while it trains, and the keys that change its speed and not its numbers."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import run
import training
from accounting import PHASES
from batches import dealt, micro_batches
from dataset import Lengths
from optimizers import build_optimizer, can_skip
from run_folder import Position
from utils import Config
from world import World


def records(tmp_path, name, event):
    lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["event"] == event]


def losses(tmp_path, name):
    return [r["train/loss"] for r in records(tmp_path, name, "step")]


def test_every_update_is_logged_whatever_log_every(make, tmp_path):
    for every in (1, 4, 100):
        assert run.main([make(f"every-{every}", log_every=every, num_epochs=2)]) == 0
        speed = records(tmp_path, f"every-{every}", "speed")
        assert [r["updates"] for r in speed if r["epoch"] == 0] == {1: [1] * 6, 4: [4, 2], 100: [6]}[every]
    assert losses(tmp_path, "every-1") == losses(tmp_path, "every-4") == losses(tmp_path, "every-100")
    assert len(losses(tmp_path, "every-4")) == 12


def test_where_the_time_goes_and_what_the_work_was(make, tmp_path, capsys):
    assert run.main([make("m3", num_epochs=2, group_by_length=True, peak_tflops=1.0, log_every=3)]) == 0
    first, second = records(tmp_path, "m3", "train_epoch")
    work = {"data", "suffix+head", "backward", "optimizer"}
    assert set(first["phases"]) >= work and not set(first["phases"]) & {"prefix", "thoughts"}, "stage 0 is one pass"
    assert set(second["phases"]) >= work | {"prefix"} and set(second["phases"]) <= set(PHASES)
    for epoch, record in enumerate((first, second)):
        parts = [r for r in records(tmp_path, "m3", "speed") if r["epoch"] == epoch]
        assert record["flops"] == pytest.approx(sum(r["flops"] for r in parts)) and record["flops"] > 1e8
        assert record["mfu"] == pytest.approx(record["tflops_per_s"]) and 0 < record["mfu"] < 1
        assert record["tokens_per_s"] * record["seconds"] == pytest.approx(
            sum(r["tokens_per_s"] * r["seconds"] for r in parts), rel=1e-6
        )
        assert 0 < record["padded_share"] < 0.3 and 0.05 < record["supervised_share"] < 0.6
    out = capsys.readouterr().out
    assert "MFU" in out and "evaluation" in out and "Peak memory" in out


def test_max_steps_ends_in_mid_epoch_and_the_run_can_go_on(make, tmp_path, capsys):
    assert run.main([make("whole")]) == 0
    config = make("cut")
    assert run.main([config, "max_steps=8"]) == 0
    out = capsys.readouterr().out
    assert "Stopped after max_steps: 8 updates, in epoch 2" in out
    assert len(losses(tmp_path, "cut")) == 8 and (tmp_path / "runs/cut/last_state").is_file()
    assert [r["epoch"] for r in records(tmp_path, "cut", "eval")] == [0, 1]
    assert not (tmp_path / "runs/cut/checkpoint_2").exists()
    assert run.main([config]) == 0
    assert losses(tmp_path, "cut") == losses(tmp_path, "whole")
    whole, cut = (torch.load(tmp_path / "runs" / name / "checkpoint_3", weights_only=True) for name in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_max_steps_at_the_end_of_an_epoch_trains_and_evaluates_no_more(make, tmp_path):
    assert run.main([make("exact"), "max_steps=6"]) == 0
    assert len(losses(tmp_path, "exact")) == 6 and (tmp_path / "runs/exact/checkpoint_1").is_file()
    assert [r["epoch"] for r in records(tmp_path, "exact", "eval")] == [0]


def test_recomputing_activations_changes_no_number(make, tmp_path):
    for value in (False, True):
        assert run.main([make(f"again-{value}", activation_checkpointing=value, num_epochs=3)]) == 0
    assert losses(tmp_path, "again-True") == pytest.approx(losses(tmp_path, "again-False"), abs=1e-6)
    assert run.main([make("both", activation_checkpointing=True, compile=True)]) == 2


def test_parallel_thoughts_are_named_approximate_and_are_exact_with_enough_iterations(make, tmp_path, capsys):
    said = {}
    for iterations in (None, 1, 2):
        assert run.main([make(f"T-{iterations}", latent_iterations=iterations)]) == 0
        said[iterations] = capsys.readouterr().out.count("approximate thoughts: 1 parallel iterations")
    assert said == {None: 0, 1: 1, 2: 0}, "at two latents one iteration is not enough"
    exact, one, two = (losses(tmp_path, f"T-{iterations}") for iterations in (None, 1, 2))
    assert two == pytest.approx(exact, abs=2e-4)
    assert one[:12] == pytest.approx(exact[:12], abs=2e-4) and max(abs(a - b) for a, b in zip(one[12:], exact[12:])) > 1e-3
    config = json.loads((tmp_path / "runs/T-1/state_3").read_text())["config"]
    assert config["latent_iterations"] == 1
    assert run.main([make("pause", feedback_mode="frozen", latent_iterations=2)]) == 2
    assert "latent_iterations: needs coconut: True and feedback_mode: continuous" in capsys.readouterr().err


@pytest.mark.parametrize("name, skips", [("adamw", True), ("sgd", False)])
def test_an_optimizer_that_can_skip_leaves_everything_as_it_is(name, skips):
    config = Config(name="x", save_path="x", val_path="x", coconut=True, optimizer=name, lr=0.1)
    model = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(model, config)
    assert can_skip(optimizer) == skips
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = str(optimizer.state_dict())
    if skips:
        model.weight.grad.fill_(math.nan)
        optimizer.found_inf = torch.ones(())
        optimizer.step()
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        assert str(optimizer.state_dict()) == state
        optimizer.found_inf = torch.zeros(())
    optimizer.step()
    assert not torch.equal(before["bias"], model.bias)


def test_batches_are_made_for_each_rank():
    groups = [[np.array([i]) for i in numbers] for numbers in ([0, 1, 2, 3], [4, 5, 6])]
    lengths = Lengths(*[np.array([9, 8, 7, 6, 5, 4, 3])] * 4)
    device = torch.device("cpu")
    made = [micro_batches(groups, range(2), lengths, World(rank, 2, device)) for rank in (0, 1)]
    mine = [[int(numbers[0]) for numbers in batches] for batches in made]
    assert mine == [[0, 3, 4, 4], [1, 2, 5, 6]], "a rank with none left repeats the first of the group"


# ---------------------------------------------------------------- the size of an update


def size_of(world_size: int, before=None, step: int = 0, **changes) -> int:
    from checkpoint_material import make_config

    config = make_config(Path("nowhere"), "nothing", **{"batch_size_training": 8} | changes)
    return training.update_size(config, World(0, world_size, torch.device("cpu")), before, Position(step=step))


def begun(world_size: int, **changes) -> dict:
    """run.json of a run that was begun so."""
    keys = {"batch_size_training": 8, "gradient_accumulation_steps": 1, "effective_batch_size": None} | changes
    return {"config": keys, "micro_batches_per_update": size_of(world_size, **changes)}


def test_updates_keep_their_size_with_another_number_of_processes(capsys):
    assert size_of(4) == 4 and size_of(1, begun(4)) == size_of(2, begun(4)) == size_of(3, begun(4)) == 4
    out = capsys.readouterr().out
    assert "Effective batch size: 32 = 8 x 2 x 2" in out and "dealt out to 3 processes" in out
    assert (
        size_of(2, effective_batch_size=48) == size_of(3, effective_batch_size=48) == size_of(5, effective_batch_size=48) == 6
    )
    with pytest.raises(ValueError, match="effective_batch_size: 20 is no multiple of batch_size_training"):
        size_of(1, effective_batch_size=20)


def test_a_size_that_is_changed_on_purpose_changes_between_epochs_only():
    assert size_of(1, begun(4), gradient_accumulation_steps=2) == 2
    assert size_of(1, {"config": {}}) == 1, "an older run does not say"
    assert size_of(2, begun(4), step=3) == 4
    with pytest.raises(ValueError, match="gradient_accumulation_steps: cannot change within epoch 1, .* 3 updates of 4 x 8"):
        size_of(1, begun(4), step=3, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="batch_size_training: cannot change within epoch"):
        size_of(1, begun(4), step=3, batch_size_training=4)


# ---------------------------------------------------------------- options that change what is trained


def test_averaged_weights_are_what_is_evaluated_and_stored(make, tmp_path, capsys):
    """The raw ones go on in last_state; a cut run ends with both as the whole one does."""
    changes = {"weight_ema": 0.9, "reset_optimizer": False, "num_epochs": 2}
    assert run.main([make("whole", **changes)]) == 0
    config = make("cut", **changes)
    assert run.main([config, "max_steps=3"]) == 0 and run.main([config]) == 0
    states = [torch.load(tmp_path / "runs" / name / "last_state", weights_only=True) for name in ("whole", "cut")]
    files = [torch.load(tmp_path / "runs" / name / "checkpoint_2", weights_only=True) for name in ("whole", "cut")]
    for key in files[0]:
        assert torch.equal(files[0][key], files[1][key]) and torch.equal(states[0]["model"][key], states[1]["model"][key])
    wte = "base_causallm.transformer.wte.weight"
    assert not torch.equal(files[0][wte], states[0]["model"][wte])
    assert torch.equal(files[0][wte], states[0]["average"][wte])
    logged = records(tmp_path, "whole", "eval")[-1]
    capsys.readouterr()
    load = f"load_model_path={tmp_path / 'runs/whole/checkpoint_2'}"
    assert run.main([config, "only_eval=True", load, "resume=1", "two_choice=True"]) == 0
    assert f"(cross-entropy {logged['eval/two_choice_ce']:.4f})" in capsys.readouterr().out


def test_an_average_is_there_before_what_a_kill_left_undone_is_done(make, tmp_path):
    """Killed between the snapshot and checkpoint_1: that holds the average as well when it is written at the next start."""
    changes = {"weight_ema": 0.9, "reset_optimizer": False, "num_epochs": 1}
    assert run.main([make("whole", **changes)]) == 0
    folder = tmp_path / "runs/whole"
    files = [folder / name for name in ("checkpoint_1", "eval_1.jsonl")]
    before = [torch.load(files[0], weights_only=True), files[1].read_text()]
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(line for line in lines if '"eval"' not in line))
    for file in files:
        file.unlink()
    assert run.main([make("whole", **changes)]) == 0
    after = torch.load(files[0], weights_only=True)
    assert all(torch.equal(before[0][key], after[key]) for key in after) and files[1].read_text() == before[1]


def test_the_best_checkpoint_and_the_early_stop_may_go_by_the_loss(make, tmp_path):
    changes = {"select_by": "loss", "early_stop_patience": 2, "min_delta": 0.4, "num_epochs": 12, "lr": 3e-3}
    assert run.main([make("by-loss", coconut=False, cot=True, **changes)]) == 0
    losses = [r["eval/loss"] for r in records(tmp_path, "by-loss", "eval")]
    best = json.loads((tmp_path / "runs/by-loss/best.json").read_text())
    assert best["epoch"] == losses.index(min(losses)) > 0, "accuracies are all 0 here"
    stops = [n for n in range(3, len(losses) + 1) if min(losses[n - 2 : n]) >= min(losses[: n - 2]) - 0.4]
    assert stops == [len(losses)] and len(losses) < 12


def test_the_rate_follows_its_schedule_to_the_end(make, tmp_path):
    changes = {"use_lr_scheduler": True, "warmup_steps": 4, "warmup_from": 0.1, "min_lr": 1e-6, "num_epochs": 3}
    assert run.main([make("rates", **changes)]) == 0
    rates = [r["lr"] for r in records(tmp_path, "rates", "step")]
    assert rates[0] == pytest.approx(1e-4) and rates[4] == pytest.approx(1e-3) == max(rates)
    assert rates[1:5] == sorted(rates[1:5]) and rates[4:] == sorted(rates[4:], reverse=True) and rates[-1] < 2e-5


@pytest.mark.parametrize(
    "keys, word", [({"warmup_steps": 2, "warmup_epochs": 1}, "warmup_steps"), ({"min_lr": 1e-6, "min_lr_ratio": 0.1}, "min_lr")]
)
def test_two_ways_to_say_one_thing_are_refused(make, capsys, keys, word):
    assert run.main([make("twice", **keys)]) == 2
    assert f"{word}: also given as" in capsys.readouterr().err


# ---------------------------------------------------------------- who computes which micro-batch


@pytest.mark.parametrize("n_processes", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_every_micro_batch_is_dealt_once_and_evenly(n, n_processes):
    widths = np.random.default_rng(n).integers(10, 100, 2 * n)
    lengths = Lengths(*[widths] * 4)
    group = [np.array([2 * i, 2 * i + 1]) for i in range(n)]
    hands = [dealt(group, lengths, World(rank, n_processes, torch.device("cpu"))) for rank in range(n_processes)]
    assert sorted(place for hand in hands for place in hand) == list(range(n))
    assert all(hand == sorted(hand) for hand in hands) and max(map(len, hands)) == -(-n // n_processes)


def test_dealing_by_width_leaves_less_to_wait_for():
    group, apart = [np.array([2 * i, 2 * i + 1]) for i in range(8)], {"dealt": 0, "in turn": 0}
    for seed in range(50):
        widths = np.random.default_rng(seed).integers(10, 100, 16)
        lengths = Lengths(*[widths] * 4)
        hands = [dealt(group, lengths, World(rank, 2, torch.device("cpu"))) for rank in range(2)]
        for name, places in {"dealt": hands, "in turn": [range(0, 8, 2), range(1, 8, 2)]}.items():
            first, second = (sum(int(widths[group[i]].max()) for i in hand) for hand in places)
            apart[name] += abs(first - second)
    assert apart["dealt"] < 0.5 * apart["in turn"]
