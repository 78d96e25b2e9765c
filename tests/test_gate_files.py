"""What gates read from files: pause vectors (4b, 4c), data, configs and one step of every mode (0), strict loading."""

import json
import math
from hashlib import sha256

import pytest
import torch
from gate_material import BASE, OTHER, call, ending, write_log, write_vector

from analysis import gate_files
from analysis.runs import RUN_NAMES, Run
from coconut import FEEDBACK_MODES, Continuous


@pytest.mark.parametrize(
    ("vector", "code"),
    [
        (BASE + 0.0101 * OTHER, 0),
        (BASE + 0.0099 * OTHER, 1),
        (BASE, 1),  # never trained
        (BASE * 0.5, 1),  # L2 far above 0.01, but only shrunk, as weight decay alone would
        (None, 1),
    ],
)
def test_gate_4b(tmp_path, capsys, vector, code):
    write_vector(tmp_path / RUN_NAMES["m5"], 50, vector)
    got, out = call(capsys, "--gate", "4b", "--run", tmp_path / RUN_NAMES["m5"])
    assert got == code
    assert vector is None or ("L2 from <<" in out and "without the part along <<" in out and "cosine" in out)


def test_gate_4b_reads_both_models_and_checks_the_mode(tmp_path, capsys):
    write_vector(tmp_path / RUN_NAMES["m5"], 50, BASE + OTHER, mode_id=3)
    write_vector(tmp_path / RUN_NAMES["m4b"], 50, BASE + OTHER, mode_id=3)
    for model in ("m5", "m4b"):
        write_log(tmp_path, model, ending(200))
    assert call(capsys, "--gate", "4b", "--logs", tmp_path)[0] == 1, "m4b's file says pause_curriculum"
    write_vector(tmp_path / RUN_NAMES["m4b"], 50, BASE + OTHER, mode_id=2)
    assert call(capsys, "--gate", "4b", "--logs", tmp_path)[0] == 0
    (tmp_path / RUN_NAMES["m4b"] / "checkpoint_50").write_bytes(b"torn")
    assert call(capsys, "--gate", "4b", "--logs", tmp_path)[0] == 2


def test_base_row_is_found_by_token(tmp_path, shared_data):
    """Without a recorded row: `<<` of the local base model, not a neighbouring number."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared_data / "golden_stock" / "tiny_gpt2"
    run = Run("m5", folder=tmp_path)
    run.config = {"model_id": str(folder)}
    row, source = gate_files.base_row(run)
    ids = AutoTokenizer.from_pretrained(folder).encode("<<", add_special_tokens=False)
    rows = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    assert torch.equal(row, rows[ids].mean(0)) and "<<" in source
    run.config["from_scratch"] = True
    assert gate_files.base_row(run)[0] is None, "a model drawn at random did not start from the stored row"


def test_gate_4c_is_about_bits_and_every_checkpoint(tmp_path, capsys):
    folder = tmp_path / RUN_NAMES["m4"]
    for number in (1, 25, 50):
        write_vector(folder, number, BASE.clone(), mode_id=1)
    assert call(capsys, "--gate", "4c", "--run", folder)[0] == 0
    nudged = BASE.clone()
    nudged[3] = torch.nextafter(nudged[3], torch.tensor(1.0))
    write_vector(folder, 25, nudged, mode_id=1)
    code, out = call(capsys, "--gate", "4c", "--run", folder)
    assert code == 1 and "checkpoint_25" in out
    assert not gate_files.same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))


def test_post_loads_real_files_strictly(tmp_path, shared_data):
    """A run folder as the trainer writes it; a file with a foreign key is refused."""
    from checkpoint import build_model, stored_weights
    from utils import Config

    values = {
        "name": "r",
        "save_path": str(tmp_path),
        "train_path": "x",
        "val_path": "x",
        "coconut": True,
        "feedback_mode": "pause_curriculum",
        "model_id": str(shared_data / "golden_stock" / "tiny_gpt2"),
    }
    model = build_model(Config(values))[0]
    weights = stored_weights(model)
    (tmp_path / "state_1").write_text(json.dumps({"config": values}))
    run = Run("m5", folder=tmp_path)
    torch.save(weights, tmp_path / "checkpoint_1")
    assert gate_files.strict_forward(run, 1)[2] is True
    torch.save(weights | {"stray": torch.zeros(1)}, tmp_path / "checkpoint_1")
    value, _, ok, detail = gate_files.strict_forward(run, 1)
    assert ok is False and "stray" in detail
    torch.save({k: v * math.nan if v.is_floating_point() else v for k, v in weights.items()}, tmp_path / "checkpoint_1")
    assert gate_files.strict_forward(run, 1)[2] is False


def test_gate_0_modes_train_as_defined(monkeypatch):
    assert all(check.ok for check in gate_files.mode_checks())

    class Detached(Continuous):
        def forward(self, k, h_BD):
            return h_BD.detach()

    monkeypatch.setitem(FEEDBACK_MODES, "continuous", Detached)
    failing = [check.name for check in gate_files.mode_checks() if not check.ok]
    assert failing == ["continuous: gradient against difference"]


def test_gate_0_sees_a_vector_that_does_not_train(monkeypatch):
    monkeypatch.setitem(FEEDBACK_MODES, "pause_curriculum", FEEDBACK_MODES["frozen"])
    failing = [check.name for check in gate_files.mode_checks() if not check.ok]
    assert failing == ["pause_curriculum: vector after one step", "trainable counts against m3, width 16"]


def test_pause_curriculum_that_recycles_is_seen(monkeypatch):
    assert gate_files.recycling_check().ok
    cls = FEEDBACK_MODES["pause_curriculum"]

    class Recycling(cls):
        reads_hidden = True

        def forward(self, k, h_BD):
            return self.pause_embedding + h_BD

    monkeypatch.setitem(FEEDBACK_MODES, "pause_curriculum", Recycling)
    assert not gate_files.recycling_check().ok


def test_gate_0_sizes_and_sets(tmp_path, shared_data):
    rows = json.loads((shared_data / "prosqa_valid.json").read_text())
    (tmp_path / "prosqa_valid.json").write_text(json.dumps(rows))
    (tmp_path / "prosqa_test.json").write_text(json.dumps(rows))
    (tmp_path / "ood_7hop.json").write_text(json.dumps(rows[:5]))
    (tmp_path / "swap_official_mine.json").write_text(json.dumps(rows))
    found = {check.name: check for check in gate_files.data_checks(tmp_path)}
    assert found["rows of prosqa_valid.json"].ok and found["rows of prosqa_train.json"].ok is None
    assert found["rows of prosqa_test.json"].ok is False, "300 rows are not 500"
    assert found["ood_7hop invariants"].ok is False and "5 rows, must be 1000" in found["ood_7hop invariants"].detail
    assert found["swap_official_mine invariants"].ok and found["swap_official_mine invariants"].n == 300
    assert found["ood_dag invariants"].ok is None and "(data/ood.py)" in found["ood_dag invariants"].value


def test_gate_0_holds_sets_to_the_preset_they_name(tmp_path):
    """Sound quickstart sets pass; one whose rows, or whose sidecar, was changed does not."""
    from data.ood import make_sets
    from data.ood_sets import QUICKSTART

    make_sets(QUICKSTART, tmp_path / "ood", names=["swap_pairs", "ood_4hop"])
    found = {check.name: check for check in gate_files.set_checks(tmp_path)}
    assert {name: check.ok for name, check in found.items() if check.ok is not None} == {
        "swap_pairs invariants": True,
        "ood_4hop invariants": True,
    }
    assert found["ood_5hop invariants"].ok is None and "ood_7hop invariants" not in found

    pairs, side = tmp_path / "ood/swap_pairs.json", tmp_path / "ood/swap_pairs.stats.json"
    rows = json.loads(pairs.read_text())
    pairs.write_text(json.dumps([*rows[2:4], *rows[:2], *rows[4:]]))
    assert _detail(tmp_path, "swap_pairs") == "swap_pairs.json is not the file that swap_pairs.stats.json describes"
    side.unlink()
    assert "row 0: pair_id and member are (1, 0), must be (0, 0)" in _detail(tmp_path, "swap_pairs")
    deep, side = tmp_path / "ood/ood_4hop.json", tmp_path / "ood/ood_4hop.stats.json"
    sidecar = json.loads(side.read_text())
    deep.write_text(json.dumps(rows))
    text = deep.read_bytes()
    side.write_text(json.dumps(sidecar | {"hops": [1, 3], "sha256": sha256(text).hexdigest()}))
    assert "nodes, allowed are 10 to 10" in _detail(tmp_path, "ood_4hop"), "the preset decides, not the sidecar"
    side.write_text(json.dumps({"preset": "mine"}))
    (check,) = gate_files.set_checks(tmp_path)
    assert check.ok is None


def _detail(folder, name: str) -> str:
    (check,) = (check for check in gate_files.set_checks(folder) if check.name == f"{name} invariants")
    assert check.ok is False
    return check.detail


def test_gate_0_configs(tmp_path):
    values = "save_path: runs\ntrain_path: a.json\nval_path: b.json\ncoconut: True\n"
    (tmp_path / gate_files.CONFIGS["m3"]).write_text(values)
    (tmp_path / gate_files.CONFIGS["m4"]).write_text(values + "feedback_mode: learned_shared\n")
    (tmp_path / gate_files.CONFIGS["m5"]).write_text(values + "feedback_mod: pause_curriculum\n")
    m3, m4, m5 = gate_files.config_checks(tmp_path, ("m3", "m4", "m5"))
    assert m3.ok and not m4.ok and not m5.ok
    assert m4.value == "loads as m4b" and "feedback_mode" in m5.detail
