"""What is written when: in the background and in order, what a policy keeps, what the disk must hold."""

import errno
import threading
from functools import partial

import pytest
import torch
from checkpoint_material import make_config, same, started, write_backbone

import run_folder
import saving
from checkpoint import numbered_checkpoints, read_weights, stored_weights
from files import NoRoom, read_json
from optimizers import build_optimizer
from parallel import Alone
from run_folder import Position
from saving import Saver, Writer
from world import World

ONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> str:
    return write_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def a_run(backbone, tmp_path):
    """a_run(**changes) -> (folder, model, optimizer, saver) of a run that has saved checkpoint_1."""

    def make(**changes):
        folder, model = started(make_config(tmp_path, backbone, **changes))
        return folder, model, build_optimizer(model, folder.config), Saver(folder, model, Alone(model, ONE, None), ONE, True)

    return make


# ---------------------------------------------------------------- in the background


def test_jobs_are_done_in_order_and_behind_the_back():
    gate, done = threading.Event(), []
    writer = Writer(background=True)
    writer.do(gate.wait, partial(done.append, 1), partial(done.append, 2))
    assert done == [], "the caller waited"
    gate.set()
    writer.wait()
    assert done == [1, 2]
    Writer(background=False).do(partial(done.append, 3))
    assert done[-1] == 3


def test_after_a_failure_nothing_more_is_written_and_it_is_raised_once():
    def fail():
        raise NoRoom("full")

    done, writer = [], Writer(background=True)
    writer.do(fail, partial(done.append, 1))
    with pytest.raises(NoRoom):
        writer.wait()
    writer.do(partial(done.append, 2))
    writer.wait()
    assert done == [], "there would be a gap"


@pytest.mark.parametrize("background", [True, False])
def test_what_was_left_undone_is_done_in_order_later(background):
    full, done, writer = [True], [], Writer(background)

    def first():
        if full:
            raise NoRoom("full")
        done.append(1)

    with pytest.raises(NoRoom):
        writer.do(first, partial(done.append, 2))
        writer.wait()
    with pytest.raises(NoRoom):
        writer.retry()
    full.clear()
    writer.retry()
    assert done == [1, 2]
    writer.do(partial(done.append, 3))
    writer.wait()
    assert done == [1, 2, 3]


def test_what_training_changes_after_the_call_is_not_in_the_file(a_run, monkeypatch):
    """Weights, optimizer state and position are those of the moment of the call."""
    folder, model, optimizer, saver = a_run(reset_optimizer=False)
    model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[-100, 6, 7]])).loss.backward()
    optimizer.step()
    gate, save = threading.Event(), run_folder.save_whole
    monkeypatch.setattr(run_folder, "save_whole", lambda *args: gate.wait() and save(*args))
    before, position = stored_weights(model), Position(2, 0, 20)
    moments = {k: v.clone() for k, v in optimizer.state[next(iter(optimizer.state))].items()}
    saver.epoch_done(optimizer, position, alone=False)
    optimizer.step()
    position.count(1.0, 1)
    gate.set()
    saver.wait()
    assert same(read_weights(folder.path / "checkpoint_2"), before) and not same(before, stored_weights(model))
    state = torch.load(folder.path / "last_state", weights_only=True)
    assert state["position"] == vars(Position(2, 0, 20)) and same(state["model"], before)
    assert all(torch.equal(state["optimizer"]["state"][0][k], v) for k, v in moments.items())


def test_best_is_not_noted_for_a_checkpoint_that_was_not_written(a_run, monkeypatch):
    folder, model, optimizer, saver = a_run(reset_optimizer=True)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("checkpoint.torch.save", full)
        saver.epoch_done(optimizer, Position(2, 0, 20), alone=True)
        saver.writer.pending[-1].result()
    with pytest.raises(NoRoom, match="make room and start the same command again"):
        saver.best(1, 1.0, None)
    assert not (folder.path / "best.json").exists() and numbered_checkpoints(folder.path) == [1]
    assert saver.last_words(optimizer, Position(2, 0, 20)), "there is room again"
    assert numbered_checkpoints(folder.path) == [1, 2] and (folder.path / "state_2").is_file()
    assert folder.find_resume()[1] == Position(2, 0, 20)


def test_a_snapshot_goes_when_a_checkpoint_can_be_continued_alone(a_run):
    folder, model, optimizer, saver = a_run(reset_optimizer=True)
    saver.snapshot(optimizer, Position(1, 3, 13))
    saver.wait()
    assert (folder.path / "last_state").is_file()
    saver.epoch_done(optimizer, Position(2, 0, 20), alone=True)
    saver.wait()
    assert not (folder.path / "last_state").exists() and numbered_checkpoints(folder.path) == [1, 2]


# ---------------------------------------------------------------- keep


@pytest.mark.parametrize(
    "keep, kept",
    [
        ("all", [1, 2, 3, 4, 5, 6, 7]),
        ("last 1", [3, 7]),
        ("last 3", [3, 5, 6, 7]),
        ("best", [3, 7]),
        ("every 2", [2, 3, 4, 6, 7]),
        ("every 5", [3, 5, 7]),
    ],
)
def test_what_each_policy_keeps(a_run, keep, kept):
    """Epoch 3 is the best: it stays, and so does the newest, which the run goes on from."""
    folder, model, optimizer, saver = a_run(keep=keep, reset_optimizer=True)
    for n in range(2, 8):
        saver.epoch_done(optimizer, Position(n, 0, 10 * n), alone=True)
        if n == 3:
            saver.best(2, 0.9, None)
    saver.wait()
    assert numbered_checkpoints(folder.path) == kept
    assert sorted(int(p.name[6:]) for p in folder.path.glob("state_*")) == kept
    assert read_json(folder.path / "best.json")["file"] == "checkpoint_3"


@pytest.mark.parametrize("keep", ["last", "last 0", "last -1", "every", "none", "last 2 best", 3])
def test_unknown_policies_are_refused(backbone, tmp_path, keep):
    with pytest.raises(ValueError, match="keep: .*all, best, last K or every N"):
        make_config(tmp_path, backbone, keep=keep)


# ---------------------------------------------------------------- disk


@pytest.mark.parametrize("keep, files", [("all", 50), ("last 3", 4), ("best", 2), ("every 10", 7)])
def test_disk_need_is_what_the_files_take(a_run, keep, files):
    folder, model, optimizer, saver = a_run(keep=keep)
    checkpoints, rest = saving.disk_need(folder.config, model, 50)
    size = (folder.path / "checkpoint_1").stat().st_size
    assert checkpoints / files == pytest.approx(size, rel=0.5) and checkpoints % files == 0
    model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[-100, 6, 7]])).loss.backward()
    optimizer.step()
    saver.snapshot(optimizer, Position(1, 1, 1))
    saver.wait()
    assert rest / 2 == pytest.approx((folder.path / "last_state").stat().st_size, rel=0.5)


def test_fifty_checkpoints_of_gpt2_are_25_gb():
    """Counted on a model without memory: 124 million parameters, the tied matrix once."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from coconut import Coconut
    from utils import check_config

    with torch.device("meta"):
        model = Coconut(GPT2LMHeadModel(GPT2Config(vocab_size=50260)), 50259, 50257, 50258, 50256)
    config = check_config({"coconut": True, "name": "x", "save_path": "y", "train_path": "t", "val_path": "v"}, "test")
    checkpoints, rest = saving.disk_need(config, model, 50)
    assert checkpoints / 1e9 == pytest.approx(24.9, abs=0.1) and rest / 1e9 == pytest.approx(2.99, abs=0.05)


def test_a_disk_that_is_too_small_is_said_before_the_start(a_run, monkeypatch, capsys):
    folder, model, *_ = a_run()
    free = {"free": 10**12}
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: type("usage", (), free))
    saving.announce_disk_need(folder.config, model, 50, folder.path)
    out = capsys.readouterr().out
    assert out.startswith("Disk: ") and "1000.00 GB free" in out and "Warning" not in out
    free["free"] = 1000
    saving.announce_disk_need(folder.config, model, 50, folder.path)
    assert "Warning: this will not fit; set keep: last 2" in capsys.readouterr().out
