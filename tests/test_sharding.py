"""Sharded checkpoints: what is in them, damage, and the way back to the usual file."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

import run
import sharding
from checkpoint import read_weights


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_data) -> Path:
    """A run whose weights were left in shards, beside the same run with its usual checkpoints."""
    from run_material import write_config

    folder, common = tmp_path_factory.mktemp("sharded"), {"feedback_mode": "learned_shared", "num_epochs": 2}
    for name, changes in {"usual": {}, "shards": {"parallel": "fsdp2", "consolidate": False, "keep": "last 1"}}.items():
        assert run.main([write_config(folder, small_data, name, **common, **changes)]) == 0
    return folder / "runs"


@pytest.fixture
def shards(trained, tmp_path) -> Path:
    """A copy of the run, to be damaged."""
    shutil.copytree(trained / "shards", tmp_path / "shards")
    return tmp_path / "shards"


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_shards_become_the_usual_file(trained, shards, capsys):
    """All names of the usual file, the tied ones too, with the same values; the mode's number and vector among them."""
    assert not list(shards.glob("checkpoint_*")), "consolidate: False writes no file"
    assert sharding.main([str(shards), "--delete"]) == 0
    assert "sharded_2 -> " in capsys.readouterr().out and not list(shards.glob("sharded_*"))
    ours, usual = read_weights(shards / "checkpoint_2"), read_weights(trained / "usual/checkpoint_2")
    assert same(ours, usual) and {"pause_embedding", "feedback_mode_id", "base_causallm.lm_head.weight"} <= ours.keys()
    assert (shards / "checkpoint_2").stat().st_size < 1.1 * (trained / "usual/checkpoint_2").stat().st_size, "ties were lost"


def test_the_consolidated_file_evaluates_as_recorded(trained, shards, tmp_path):
    """state_N was written with the shards: load_run needs nothing else."""
    from checkpoint import load_run

    sharding.consolidate(shards / "sharded_2")
    model, *_ = load_run(shards / "checkpoint_2")
    assert model.feedback_mode == "learned_shared"
    state = json.loads((shards / "state_2").read_text())
    usual = json.loads((trained / "usual/state_2").read_text())
    assert state["tensor_bytes"] == usual["tensor_bytes"] and state["global_step"] == usual["global_step"] == 12


def test_a_run_of_shards_says_how_to_consolidate(shards):
    from checkpoint import find_checkpoint

    with pytest.raises(ValueError, match=r"python sharding.py .* makes checkpoint files"):
        find_checkpoint(shards)


def test_keep_counts_shards_too(trained):
    assert [p.name for p in sorted((trained / "shards").glob("sharded_*"))] == ["sharded_2"]
    assert {p.name for p in (trained / "shards").glob("state_*")} == {"state_2"}


def test_nothing_is_stored_twice(shards):
    names = [name for file in (shards / "sharded_2").glob("*.safetensors") for name in load_file(file)]
    assert len(names) == len(set(names)) and "base_causallm.transformer.wte.weight" in names
    assert "base_causallm.lm_head.weight" not in names and "embedding.weight" not in names


# ---------------------------------------------------------------- damage


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("what", ["flipped", "cut", "missing", "extra", "index"])
def test_damage_is_found(shards, capsys, what):
    folder = shards / "sharded_2"
    file = next(folder.glob("*.safetensors"))
    if what == "flipped":
        flip(file, file.stat().st_size - 3)
    elif what == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif what == "missing":
        file.unlink()
    elif what == "extra":
        save_file({"embedding.weight": torch.zeros(2)}, folder / "more.safetensors")
    else:
        (folder / "index.json").write_text('{"files": ')
    assert sharding.main([str(folder)]) == 2
    error = capsys.readouterr().err
    named = {"extra": "more.safetensors", "index": "index.json"}.get(what, file.name)
    assert error.startswith("error: ") and named in error and error.count("\n") == 1
    assert not (shards / "checkpoint_2").exists()


def test_a_damaged_snapshot_is_passed_over(make, tmp_path, capsys):
    """The one before is used: here the checkpoint of epoch 1, and the run ends as it would have."""
    changes = {"parallel": "fsdp2", "num_epochs": 2, "save_every_steps": 4}
    assert run.main([make("whole", **changes)]) == 0
    config = make("damaged", **changes)
    assert run.main([config, "max_steps=10"]) == 0
    snapshot = tmp_path / "runs/damaged/last_shards_10"
    flip(next(snapshot.glob("*.safetensors")), 5000)
    assert run.main([config]) == 0
    out = capsys.readouterr().out
    assert "last_shards_10" in out and "is damaged" in out and "Loading from previous run epoch_1!" in out
    a, b = (read_weights(tmp_path / "runs" / name / "checkpoint_2") for name in ("whole", "damaged"))
    assert same(a, b)


def test_code_in_a_sharded_folder_never_runs(shards, tmp_path, capsys):
    """`.metadata` is what the library's own format unpickles."""

    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    (shards / "sharded_2/.metadata").write_bytes(pickle.dumps(Payload()))
    assert sharding.main([str(shards / "sharded_2")]) == 0
    assert not (tmp_path / "ran").exists()


def test_what_is_no_sharded_checkpoint_is_one_line(tmp_path, capsys):
    for path, word in (
        (tmp_path, "holds no sharded_N"),
        (tmp_path / "sharded_1", "index.json"),
        (ROOT / "README.md", "sharded_N"),
    ):
        assert sharding.main([str(path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and word in error and "Traceback" not in error


def test_help():
    done = subprocess.run([sys.executable, "sharding.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--delete" in done.stdout
