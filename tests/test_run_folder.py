"""The run folder: its lock, leftovers, other runs, resuming, and a full disk."""

import errno
import json
import subprocess
import sys

import pytest
import torch
from checkpoint_material import make_config, same, started, touch, write_backbone

import checkpoint
import files
import run
from backbones.tiny import word_tokenizer, write
from checkpoint import build_model, numbered_checkpoints, stored_weights
from optimizers import build_optimizer
from run_folder import Position, RunFolder, read_snapshot
from world import World


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> str:
    return write_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def config_for(backbone, tmp_path):
    """config_for(method, **changes): the config of a run in this test's folder."""
    return lambda method="coconut", **changes: make_config(tmp_path, backbone, method, **changes)


# ---------------------------------------------------------------------------------------------------- the run folder


def test_second_opener_is_refused(config_for):
    config = config_for()
    first = RunFolder(config)
    first.open(exclusive=True)
    with pytest.raises(ValueError, match="another process is training in .*run"):
        RunFolder(config).open(exclusive=True)
    RunFolder(config).open(exclusive=False)
    first._lock.close()
    RunFolder(config).open(exclusive=True)


def test_lock_holds_against_another_process_and_ends_with_it(config_for):
    config = config_for()
    config.run_dir.mkdir(parents=True)
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
    code += "print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(config.run_dir / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another process is training"):
            RunFolder(config).open(exclusive=True)
    finally:
        holder.communicate(timeout=30)
    RunFolder(config).open(exclusive=True)


def test_a_file_in_the_way_of_the_folder_is_the_users_mistake(config_for, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="save_path"):
        RunFolder(config_for(save_path=str(tmp_path / "file"))).open(exclusive=True)


def test_leftovers_go_and_a_torn_line_is_repaired(config_for):
    config = config_for()
    touch(config.run_dir, ".tmp-checkpoint_3-77", "checkpoint_3", "notes.tmp")
    metrics = config.run_dir / "metrics.jsonl"
    torn = '{"event": "step", "epoch": 0}\n{"event": "eval", "epoch": 0, "eval/acc": 0.5}\n{"event": "st'
    metrics.write_text(torn)
    RunFolder(config).open(exclusive=False)
    assert metrics.read_text() == torn and (config.run_dir / ".tmp-checkpoint_3-77").exists(), "a reader changes nothing"
    folder = RunFolder(config)
    folder.open(exclusive=True)
    assert sorted(p.name for p in config.run_dir.iterdir()) == [".lock", "checkpoint_3", "metrics.jsonl", "notes.tmp"]
    assert metrics.read_text() == torn.rsplit("\n", 1)[0] + "\n"
    assert {epoch: r["eval/acc"] for epoch, r in folder.evaluations(1).items()} == {0: 0.5}


def test_evaluations_of_a_repeated_epoch_count_once(config_for):
    folder = RunFolder(config_for())
    folder.open(exclusive=True)
    records = [{"event": "eval", "epoch": epoch, "eval/acc": acc} for epoch, acc in [(0, 0.1), (1, 0.2), (1, 0.3), (2, 0.9)]]
    folder.metrics.write_text("".join(json.dumps(r) + "\n" for r in [*records, {"event": "step", "epoch": 1}]))
    assert {epoch: r["eval/acc"] for epoch, r in folder.evaluations(2).items()} == {0: 0.1, 1: 0.3}


@pytest.mark.parametrize(
    "method, changes, named",
    [
        ("cot", {}, ["coconut: True -> False", "cot: False -> True"]),
        ("frozen", {}, ["feedback_mode: continuous -> frozen"]),
        ("coconut", {"c_thought": 2}, ["c_thought: 1 -> 2"]),
        ("coconut", {"model_id": "elsewhere/gpt2"}, ["model_id: "]),
        ("no_thoughts", {}, ["no_thoughts: False -> True", "c_thought: 1 -> 0"]),
    ],
)
def test_another_run_in_the_same_folder_is_refused(config_for, method, changes, named):
    folder, _ = started(config_for("coconut"))
    before = (folder.path / "run.json").read_text()
    other = RunFolder(config_for(method, **changes))
    with pytest.raises(ValueError, match="holds another run") as refused:
        other.open(exclusive=True)
    assert all(part in str(refused.value) for part in named)
    assert (folder.path / "run.json").read_text() == before


@pytest.mark.parametrize(
    "method, changes, named",
    [
        ("cot", {}, "coconut: True -> False"),
        ("frozen", {}, "feedback_mode: continuous -> frozen"),
        ("coconut", {}, "model_id"),
    ],
)
def test_resuming_another_run_names_the_keys_before_its_weights_are_tried(config_for, tmp_path, method, changes, named):
    """Else the first complaint is about key names or shapes in a file that the user never asked for."""
    folder, _ = started(config_for("coconut"))
    folder._lock.close()
    if named == "model_id":
        other = tmp_path / "other"
        write(other, word_tokenizer(), n_layer=2, n_embd=8, n_head=2, n_positions=64)
        changes = {"model_id": str(other)}
    with pytest.raises(ValueError, match="holds another run") as refused:
        run.execute(config_for(method, **changes), World(0, 1, torch.device("cpu")))
    assert named in str(refused.value)


def test_other_differences_only_warn(config_for, capsys):
    folder, model = started(config_for("coconut"))
    folder._lock.close()
    same = RunFolder(config_for("coconut"))
    same.open(exclusive=True)
    assert "Warning" not in capsys.readouterr().out
    same._lock.close()
    other = RunFolder(config_for("coconut", lr=0.5, num_epochs=99))
    other.open(exclusive=True)
    other.begin(model)
    out = capsys.readouterr().out
    assert "Warning: resuming with other settings" in out and "num_epochs: 25 -> 99" in out and "lr: 0.0001 -> 0.5" in out
    assert json.loads((folder.path / "run.json").read_text())["config"]["num_epochs"] == 99


def test_a_run_that_saved_nothing_can_be_replaced(config_for):
    folder, _ = started(config_for("coconut"))
    (folder.path / "checkpoint_1").unlink()
    RunFolder(config_for("cot")).begin(build_model(config_for("cot"))[0])
    assert json.loads((folder.path / "run.json").read_text())["model_key"] == "m1"


def test_pause_distance_counts_from_the_first_start(config_for):
    config = config_for("learned_shared")
    folder, model = started(config)
    assert folder.pause_distance(model) == {"pause_l2": 0.0}
    with torch.no_grad():
        model.pause_embedding.add_(0.5)
    RunFolder(config).begin(model)  # a restart does not move the origin
    assert folder.pause_distance(model)["pause_l2"] == pytest.approx(2.0)
    assert folder.pause_distance(build_model(config_for("coconut"))[0]) == {}


# ---------------------------------------------------------------------------------------------------- resuming


def last_state(folder: RunFolder, model, position: Position) -> None:
    folder.save_last_state(model, build_optimizer(model, folder.config), position)


def test_nothing_to_resume(config_for, tmp_path):
    folder = RunFolder(config_for())
    assert folder.find_resume() is None
    folder.open(exclusive=True)
    touch(folder.path, "checkpoint_best", "checkpoint_12.tmp", "checkpoint_", "xcheckpoint_3", "notes")
    assert folder.find_resume() is None


def test_resume_takes_whichever_is_further(config_for, capsys):
    folder, model = started(config_for())
    for n, step in ((2, 20), (10, 100), (9, 90)):
        folder.save_checkpoint(model, Position(epoch=n, global_step=step))
    touch(folder.path, "checkpoint_best", "checkpoint_12.tmp")
    assert folder.find_resume() == (folder.path / "checkpoint_10", Position(epoch=10, global_step=100))

    last_state(folder, model, Position(9, 3, 93, 1.5, 6.0))
    assert folder.find_resume()[0] == folder.path / "checkpoint_10", "an older snapshot does not count"
    for position in (Position(10, 0, 100), Position(10, 2, 102, 1.5, 6.0)):
        last_state(folder, model, position)
        assert folder.find_resume() == (folder.path / "last_state", position), "at the same place it knows more"
    folder.drop_snapshots()
    folder.drop_snapshots()
    assert folder.find_resume()[0] == folder.path / "checkpoint_10"
    assert "Warning" not in capsys.readouterr().out


def test_stock_folder_without_state_files_resumes(config_for):
    folder, model = started(config_for())
    folder.save_checkpoint(model, Position(epoch=3, global_step=30))
    for name in ("state_1", "state_3", "run.json"):
        (folder.path / name).unlink()
    assert folder.find_resume() == (folder.path / "checkpoint_3", Position(epoch=3))


def test_truncated_files_are_passed_over_with_a_message(config_for, capsys):
    folder, model = started(config_for())
    for n in (2, 3):
        folder.save_checkpoint(model, Position(epoch=n, global_step=10 * n))
    last_state(folder, model, Position(3, 1, 31))
    for name in ("checkpoint_3", "last_state"):
        path = folder.path / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert folder.find_resume() == (folder.path / "checkpoint_2", Position(epoch=2, global_step=20))
    out = capsys.readouterr().out
    assert "last_state is not a readable checkpoint" in out and "checkpoint_3 is not a readable checkpoint" in out
    for n in (1, 2):
        (folder.path / f"checkpoint_{n}").write_text("")
    assert folder.find_resume() is None


def test_last_state_gives_everything_back(config_for):
    folder, model = started(config_for("pause_curriculum"))
    optimizer = build_optimizer(model, folder.config)
    model(torch.tensor([[5, 6, model.latent_token_id, 7]]), labels=torch.tensor([[-100, -100, -100, 7]])).loss.backward()
    optimizer.step()
    folder.save_last_state(model, optimizer, Position(2, 1, 21))
    weights, restore = read_snapshot(folder.path / "last_state", sharded=False)
    assert same(weights, stored_weights(model))
    again = build_model(folder.config, folder.path / "last_state", weights)[0]
    assert same(stored_weights(again), stored_weights(model))
    restored = build_optimizer(again, folder.config)
    restore(again, restored)
    moments = [[v for v in s.values()] for s in optimizer.state.values()]
    assert moments and all(
        torch.equal(a, b) for mine, theirs in zip(moments, restored.state.values()) for a, b in zip(mine, theirs.values())
    )


def test_position_counts_updates():
    position = Position(epoch=2, global_step=20)
    position.count(6.0, 4)
    position.count(2.0, 4)
    assert position == Position(2, 2, 22, 8.0, 8.0)
    position.next_epoch()
    assert position == Position(3, 0, 22, 0.0, 0.0)


# ---------------------------------------------------------------------------------------------------- a full disk


def full_disk(value, file):
    file.write(b"half of it")
    raise OSError(errno.ENOSPC, "No space left on device")


def broken_zip(value, file):
    file.write(b"half of it")
    raise RuntimeError("PytorchStreamWriter failed writing file data/2")


@pytest.mark.parametrize("failure", [full_disk, broken_zip])
def test_failed_write_keeps_what_was_there_and_names_the_remedy(config_for, monkeypatch, failure):
    folder, model = started(config_for())
    last_state(folder, model, Position(1, 1, 1))
    names = sorted(p.name for p in folder.path.iterdir())
    before = {name: (folder.path / name).read_bytes() for name in ("checkpoint_1", "last_state")}
    monkeypatch.setattr(checkpoint.torch, "save", failure)
    for write_it in (
        lambda: folder.save_checkpoint(model, Position(epoch=1)),
        lambda: last_state(folder, model, Position(1, 2, 2)),
    ):
        with pytest.raises(
            ValueError, match=r"cannot write .*GB free in its folder: make room and start the same command again"
        ):
            write_it()
    assert {name: (folder.path / name).read_bytes() for name in before} == before
    assert sorted(p.name for p in folder.path.iterdir()) == names, "no temporary file stays"
    assert folder.find_resume() == (folder.path / "last_state", Position(1, 1, 1))


def test_full_disk_at_the_side_file_names_the_remedy_too(config_for, monkeypatch):
    folder, model = started(config_for())
    monkeypatch.setattr(files.json, "dump", lambda value, file, **_: full_disk(value, file.buffer))
    with pytest.raises(ValueError, match="make room"):
        folder.save_checkpoint(model, Position(epoch=2))
    assert numbered_checkpoints(folder.path) == [1]
