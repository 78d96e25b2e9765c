"""Every fault of scripts/chaos.sh in its smallest size, and that the script would see a loss."""

import json
import shutil

import chaos
import pytest
import torch
from chaos_checks import apart, unreadable
from chaos_damage import disk_refuses
from chaos_faults import KEPT
from chaos_scene import TEST, Outcome, Scene

from checkpoint import read_weights, save_whole


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    scene = Scene(tmp_path_factory.mktemp("chaos"), TEST, seed=0)
    yield scene
    scene.close()


ALWAYS = ("kill", "stop", "full-disk", "damage")
FAULTS = [pytest.param(name, marks=[] if name in ALWAYS else pytest.mark.slow) for name in chaos.FAULTS]


@pytest.mark.parametrize("name", FAULTS)
def test_a_run_survives(scene, name):
    outcome = chaos.FAULTS[name].happen(scene)
    if outcome.skipped:
        pytest.skip(outcome.skipped)
    assert not outcome.losses, "\n".join(outcome.losses)
    assert outcome.tries, "the fault did not happen"


def test_a_full_disk_where_none_can_be_mounted(scene):
    own, out = scene.of("limited"), Outcome("")
    disk_refuses(own, out, "limited", own.folder / "disk", {"faults": {"limit_files": [3_000_000]}}, lambda: None)
    assert out.tries == 1 and not out.losses, out.losses


def test_every_kind_of_loss_is_seen(scene, tmp_path):
    """One value of one tensor, an optimizer's state, a record, a file: without these the table would mean nothing."""
    reference = scene.reference(**KEPT).path

    def found(change) -> str:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(reference, tmp_path / "run")
        change(tmp_path / "run")
        return apart(tmp_path / "run", reference)

    def nudge_weight(run):
        weights = dict(read_weights(run / "checkpoint_2"))
        name = next(iter(weights))
        weights[name] = weights[name].clone()
        weights[name].view(-1)[7] = weights[name].view(-1)[7].nextafter(torch.tensor(9.0))
        save_whole(weights, run / "checkpoint_2")

    def nudge_optimizer(run):
        state = torch.load(run / "last_state", weights_only=True)
        state["optimizer"]["state"][0]["exp_avg"].view(-1)[0] += 1e-3
        save_whole(state, run / "last_state")

    def drop_record(run):
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        step = next(i for i, line in enumerate(lines) if '"train/step": 7' in line)
        (run / "metrics.jsonl").write_text("".join(lines[:step] + lines[step + 1 :]))

    assert found(lambda run: None) == ""
    assert "checkpoint_2" in found(nudge_weight) and "last_state.optimizer.state.0" in found(nudge_optimizer)
    assert "step records" in found(drop_record)
    assert "eval_2.jsonl" in found(lambda run: (run / "eval_2.jsonl").unlink())
    assert "checkpoint_1" in found(lambda run: (run / "checkpoint_1").unlink())
    assert ".tmp-x was left" in found(lambda run: (run / ".tmp-x").write_text(""))
    assert "run.json" in found(lambda run: (run / "run.json").write_text("{"))
    assert unreadable(reference) == []


def test_a_loss_is_printed_written_and_the_exit_code(monkeypatch, tmp_path, capsys):
    faults = {
        "held": chaos.chaos_faults.Fault("nothing", 1, lambda scene: Outcome("all", tries=2)),
        "lost": chaos.chaos_faults.Fault("weights gone", 2, lambda scene: Outcome("all", 1, ["run-3: checkpoint_1 differs"])),
        "broken": chaos.chaos_faults.Fault("no such luck", 1, lambda scene: 1 / 0),
    }
    for name, fault in faults.items():
        fault.function.__name__ = name
    monkeypatch.setattr(chaos, "FAULTS", faults)
    monkeypatch.setattr(chaos, "Scene", lambda folder, size, seed: Scene(folder, TEST, seed))
    monkeypatch.setattr(chaos.tempfile, "tempdir", str(tmp_path))
    out = tmp_path / "out"
    assert chaos.main(["--quick", "--out", str(out), "--only", "held"]) == 0
    assert not list(tmp_path.glob("chaos-*")), "nothing lost, nothing left"
    assert chaos.main(["--quick", "--out", str(out)]) == 1
    printed, written = capsys.readouterr().out, json.loads((out / "chaos.json").read_text())
    assert "weights gone: run-3: checkpoint_1 differs" in printed and "ZeroDivisionError" in printed
    assert [(r["fault"], r["tries"], len(r["losses"])) for r in written["faults"]] == [
        ("held", 2, 0),
        ("lost", 1, 1),
        ("broken", 0, 1),
    ]
    assert "| weights gone | 1 | 1 |" in (out / "chaos.md").read_text()
    assert chaos.main(["--only", "kil"]) == 2 and "no fault is called kil" in capsys.readouterr().err
