"""The comparison of two runs, on real runs of run.py and on copies of them with one thing changed."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from run_material import write_config

import run
from analysis import compare, differences
from files import write_json
from utils import Config

TIED = ("base_causallm.transformer.wte.weight", "base_causallm.lm_head.weight", "embedding.weight")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_data, own_cache):
    """{"one", "other" seed, "short"er}: run folders. 6 updates an epoch, 3 epochs (2 of the short one)."""
    folder = tmp_path_factory.mktemp("compared")
    for name, changes in {"one": {}, "again": {"log_every": 1}, "other": {"seed": 1}, "short": {"num_epochs": 2}}.items():
        assert run.main([write_config(folder, small_data, name, **changes)]) == 0
    return {path.name: path for path in (folder / "runs").iterdir()}


@pytest.fixture
def pair(trained, tmp_path) -> tuple[Path, Path]:
    """Two copies of one run, whose updates say which rows they had."""
    folders = tmp_path / "a", tmp_path / "b"
    for folder in folders:
        shutil.copytree(trained["one"], folder)
        change(folder, lambda r: r.setdefault("rows", f"{r['train/step']:08x}") if r["event"] == "step" else None)
    return folders


def change(folder: Path, edit) -> None:
    """Let `edit` change the records of a run folder in place."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        edit(record)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def set_at(update: int, **values):
    """An edit of the record of one update."""
    return lambda r: r.update(values) if r.get("train/step") == update else None


def flip(path: Path, name: str, place: int = 0, bit: int = 0) -> float:
    """Flip one bit of a checkpoint; returns by how much the value changed."""
    weights = torch.load(path, weights_only=True)
    values = weights[name].view(-1)
    before = float(values[place])
    values.view(torch.int32)[place] ^= 1 << bit
    torch.save(weights, path)
    return abs(float(values[place]) - before)


def compared(a: Path, b: Path, capsys, *options: str) -> tuple[int, dict, str]:
    """(exit code, JSON, standard output) of the command."""
    file = a.parent / "difference.json"
    capsys.readouterr()
    code = compare.main([str(a), str(b), "--json", str(file), *options])
    return code, json.loads(file.read_text(), parse_constant=pytest.fail), capsys.readouterr().out


def test_the_same_seed_gives_the_same_run(trained, capsys):
    code, result, out = compared(trained["one"], trained["again"], capsys)
    assert code == 0 and result["equal"] is True
    assert out.startswith("equal to the bit: 18 updates, 3 evaluations, 3 checkpoints compared\n")
    assert {key for key, d in result["config"]["differ"].items() if not d["matters"]} == {"name", "log_every"}
    assert result["config"]["world_size"] == {"a": [1], "b": [1]}
    assert all(weights["tensors"] > 30 and not weights["differ"] for weights in result["weights"].values())


def test_another_seed_differs_from_the_first_update_on(trained, capsys):
    code, result, out = compared(trained["one"], trained["other"], capsys)
    assert code == 1 and result["equal"] is False
    first, losses = result["first_difference"], result["updates"]["train/loss"]
    assert (first["epoch"], first["update"]) == (1, 0) and first["what"] in ("row order", "loss")
    assert losses["first"]["b"] - losses["first"]["a"] == losses["first"]["difference"] != 0
    sizes = [abs(differences.apart(*pair)) for pair in zip(*map(losses_of, (trained["one"], trained["other"])))]
    assert abs(losses["largest"]["difference"]) == max(sizes) and losses["largest"]["update"] == sizes.index(max(sizes))
    assert all(len(weights["differ"]) == weights["tensors"] for weights in result["weights"].values())
    assert out.split("\n")[0].endswith("; settings that differ: seed")
    one, other = (torch.load(trained[name] / "checkpoint_3", weights_only=True) for name in ("one", "other"))
    distinct = [key for key in one if key not in TIED[1:]]
    distance = math.sqrt(sum(float((one[key].double() - other[key].double()).square().sum()) for key in distinct))
    assert result["weights"]["3"]["distance"] == pytest.approx(distance)


def losses_of(folder: Path) -> list[float]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [r["train/loss"] for r in records if r["event"] == "step"]


def test_one_flipped_bit_of_a_checkpoint_is_named(pair, capsys):
    name = "base_causallm.transformer.h.1.mlp.c_fc.weight"
    gap = flip(pair[1] / "checkpoint_2", name, place=77)
    code, result, out = compared(*pair, capsys, "-v")
    assert code == 1 and out.startswith("first difference: weights of checkpoint_2: 1 of 40 tensors, " + name)
    assert [len(weights["differ"]) for weights in result["weights"].values()] == [0, 1, 0]
    (tensor,) = result["weights"]["2"]["differ"]
    assert tensor == {"name": name, "values": 1, "of": 128 * 512, "largest": gap}
    assert result["weights"]["2"]["distance"] == pytest.approx(gap)
    flip(pair[1] / "checkpoint_3", name, place=70000 % (128 * 512), bit=31)
    flip(pair[1] / "checkpoint_3", "base_causallm.transformer.ln_f.bias")
    code, result, out = compared(*pair, capsys, "-v")
    assert "2 of 40 tensors differ" in out and out.count("ln_f.bias") == 1, "-v names those that are not the largest"
    assert "ln_f.bias" not in compared(*pair, capsys)[2]


def test_tied_tensors_are_one_and_the_sign_of_zero_is_a_bit(pair, capsys):
    for folder in pair:
        weights = torch.load(folder / "checkpoint_1", weights_only=True)
        assert len({weights[key].data_ptr() for key in TIED}) == 1
        weights[TIED[0]][0, 0] = 0.0
        torch.save(weights, folder / "checkpoint_1")
    assert compared(*pair, capsys)[0] == 0
    assert flip(pair[1] / "checkpoint_1", TIED[0], bit=31) == 0.0
    code, result, _ = compared(*pair, capsys)
    (tensor,) = result["weights"]["1"]["differ"]
    assert code == 1 and tensor["name"] in TIED and (tensor["values"], tensor["largest"]) == (1, 0.0)


def test_tensors_are_compared_piece_by_piece(monkeypatch):
    monkeypatch.setattr(differences, "CHUNK", 7)
    a = torch.randn(5, 6)
    b = a.clone()
    b[0, 3] += 2
    b[4, 5] -= 3
    found = differences.compare_tensors(a, b)
    assert (found["values"], found["of"]) == (2, 30)
    assert found["largest"] == pytest.approx(3, abs=1e-5) and found["squares"] == pytest.approx(13, abs=1e-4)
    assert differences.compare_tensors(a, a.clone()) is None
    assert differences.compare_tensors(a, a.half()) == {"a": "float32 [5, 6]", "b": "float16 [5, 6]"}
    for dtype in (torch.bfloat16, torch.int64, torch.bool):
        assert differences.compare_tensors(torch.ones(9).to(dtype), torch.ones(9).to(dtype)) is None
        assert differences.compare_tensors(torch.ones(9).to(dtype), torch.zeros(9).to(dtype))["values"] == 9


def test_one_edited_loss_is_named(pair, capsys):
    loss = losses_of(pair[0])[7]
    after = math.nextafter(loss, math.inf)
    change(pair[1], set_at(7, **{"train/loss": after}))
    code, result, out = compared(*pair, capsys)
    assert code == 1 and out.startswith(f"first difference: loss at update 7 (epoch 2): {loss} and {after}, +")
    assert result["updates"]["train/loss"]["equal"] == 17 and result["updates"]["rows"]["equal"] == 18
    assert result["first_difference"]["difference"] == after - loss > 0


def test_one_edited_row_hash_is_named(pair, capsys):
    change(pair[1], set_at(4, rows="00c0ffee"))
    code, result, out = compared(*pair, capsys)
    assert code == 1 and out.startswith("first difference: row order at update 4 (epoch 1): ") and "00c0ffee" in out
    change(pair[1], lambda r: r.pop("rows", None))
    code, _, out = compared(*pair, capsys)
    assert code == 0 and [line for line in out.split("\n") if "row order" in line and line.endswith("not recorded")]


def test_the_first_difference_is_the_earliest_in_training(pair, capsys):
    """A checkpoint comes after the updates of its epoch and before its evaluation."""
    change(pair[1], lambda r: r.update({"eval/loss": 9.5}) if (r["event"], r["epoch"]) == ("eval", 1) else None)
    _, result, out = compared(*pair, capsys)
    assert result["first_difference"]["what"] == "eval/loss" and "eval/loss after epoch 2" in out.split("\n")[0]
    flip(pair[1] / "checkpoint_2", "base_causallm.transformer.ln_f.weight")
    assert compared(*pair, capsys)[1]["first_difference"]["what"] == "weights"
    change(pair[1], set_at(11, **{"train/grad_norm": 9.5}))
    assert compared(*pair, capsys)[1]["first_difference"]["what"] == "gradient norm"
    change(pair[1], set_at(11, **{"train/loss": 9.5}))
    assert compared(*pair, capsys)[1]["first_difference"]["what"] == "loss"
    flip(pair[1] / "checkpoint_1", "base_causallm.transformer.ln_f.weight")
    assert compared(*pair, capsys)[2].startswith("first difference: weights of checkpoint_1: 1 of 40 tensors")


def test_a_shorter_run_is_equal_so_far(trained, capsys):
    code, result, out = compared(trained["short"], trained["one"], capsys)
    assert code == 0 and result["compared"] == {"updates": 12, "evaluations": 2, "checkpoints": 2}
    assert "B goes further (6 updates more, equal so far); settings that differ: num_epochs" in out.split("\n")[0]
    assert result["checkpoints"] == {"a": [1, 2], "b": [1, 2, 3]} and result["further"] == "b"


def test_a_resumed_run_must_repeat(trained, small_data, capsys, tmp_path):
    """As killed before the third checkpoint: the third epoch is done again."""
    config = write_config(tmp_path, small_data, "one")
    shutil.copytree(trained["one"], tmp_path / "runs/one")
    for name in ("checkpoint_3", "state_3"):
        (tmp_path / "runs/one" / name).unlink()
    assert run.main([config]) == 0
    code, result, out = compared(trained["one"], tmp_path / "runs/one", capsys)
    assert code == 0 and result["redone"]["b"] == {"updates": 6, "repeated": 6, "first": None}
    assert result["redone"]["a"]["updates"] == 0
    assert re.search(r"resumed updates +0 of 0 +6 of 6 +repeated exactly\n", out)
    before_the_kill = iter([{"train/loss": 1.5}, {}])
    change(tmp_path / "runs/one", lambda r: r.update(next(before_the_kill)) if r.get("train/step") == 14 else None)
    code, result, out = compared(trained["one"], tmp_path / "runs/one", capsys)
    assert code == 0 and "B did not repeat its redone updates (5 of 6 did)" in out.split("\n")[0]
    first, loss = result["redone"]["b"]["first"], losses_of(trained["one"])[14]
    assert first == {"epoch": 3, "update": 14, "a": 1.5, "b": loss, "difference": loss - 1.5}


def test_nan_equals_nan(pair, capsys):
    name = "base_causallm.transformer.ln_f.weight"
    for folder, sign in zip(pair, (1, -1)):
        change(folder, lambda r: r.update({"eval/loss": math.nan}) if r["event"] == "eval" else None)
        weights = torch.load(folder / "checkpoint_3", weights_only=True)
        weights[name][3] = math.nan * sign
        torch.save(weights, folder / "checkpoint_3")
    assert compared(*pair, capsys)[0] == 0
    change(pair[1], lambda r: r.update({"eval/loss": 1.0}) if r["event"] == "eval" else None)
    flip(pair[1] / "checkpoint_3", name, place=3, bit=30)
    code, result, _ = compared(*pair, capsys)
    assert code == 1 and result["evaluations"]["eval/loss"]["first"]["a"] == "nan"
    assert result["weights"]["3"]["differ"][0]["largest"] == "nan"


def test_data_files_and_versions_are_told_and_do_not_decide(pair, capsys):
    for folder, sha in zip(pair, ("aa" * 32, "bb" * 32)):
        about = json.loads((folder / "run.json").read_text())
        files = {key: {"file": f"{folder.name}.json", "sha256": sha, "rows": 44} for key in ("train_path", "val_path")}
        files["val_path"]["sha256"] = "cc" * 32
        about["config"] |= {"train_path": folder.name, "val_path": folder.name}
        about["versions"]["torch"] = folder.name
        write_json(folder / "run.json", about | {"data": files})
    code, result, out = compared(*pair, capsys)
    assert code == 0 and (result["data"]["train_path"]["equal"], result["data"]["val_path"]["equal"]) == (False, True)
    assert out.split("\n")[0].endswith("settings that differ: train_path, torch, the file of train_path")
    assert not result["config"]["differ"]["val_path"]["matters"], "another place of the same file"


def test_a_key_that_an_older_version_did_not_know_has_its_default(pair, capsys):
    about = json.loads((pair[0] / "run.json").read_text())
    del about["config"]["latent_iterations"], about["config"]["lr"]
    write_json(pair[0] / "run.json", about)
    differ = compared(*pair, capsys)[1]["config"]["differ"]
    assert differ == {"lr": {"a": 1e-4, "b": 1e-3, "matters": True}}


def test_the_keys_without_an_effect_are_keys():
    assert differences.NEUTRAL <= Config.model_fields.keys()


def test_a_torn_line_is_left_out(pair, capsys):
    with open(pair[1] / "metrics.jsonl", "a") as file:
        file.write('{"event": "step", "epoch": 3, "train/st')
    assert compared(*pair, capsys)[0] == 0


def test_nothing_in_common_is_neither(pair, capsys):
    for path in [pair[1] / "metrics.jsonl", *pair[1].glob("checkpoint_*")]:
        path.unlink()
    code, result, out = compared(*pair, capsys)
    assert code == 2 and result["equal"] is None and out.startswith("nothing to compare: ")


def test_mistakes_are_one_line(pair, trained, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    cut = pair[1] / "checkpoint_2"
    cut.write_bytes(cut.read_bytes()[:5000])
    for a, b, words in (
        (pair[0], tmp_path / "nowhere", ["no run folder", "nowhere"]),
        (tmp_path / "empty", pair[0], ["empty is not a run folder"]),
        (trained["one"].parent, pair[0], ["is not a run folder", "name one of them: again, one, other, short"]),
        (*pair, [str(cut), "not a readable checkpoint"]),
    ):
        assert compare.main([str(a), str(b)]) == 2
        out, error = capsys.readouterr()
        assert error.startswith("error: ") and error.count("\n") == 1 and not out, error
        assert all(word in error for word in words), error


def test_the_picture(trained, capsys, tmp_path):
    assert compared(trained["one"], trained["other"], capsys, "--plot", str(tmp_path / "gap.png"))[0] == 1
    assert compared(trained["one"], trained["again"], capsys, "--plot", str(tmp_path / "none.png"))[0] == 0
    sizes = [(tmp_path / name).stat().st_size for name in ("gap.png", "none.png")]
    assert sizes[0] > sizes[1] > 2000 and (tmp_path / "gap.png").read_bytes().startswith(b"\x89PNG")
