"""Checkpoint files: what is written, every row of the loading table, what is refused, what is found."""

import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_material import (
    METHODS,
    PAUSES,
    PLAIN,
    make_config,
    same,
    save,
    snapshot,
    touch,
    trained,
    write_backbone,
)
from conftest import ROOT

import backbones
from checkpoint import (
    build_model,
    find_checkpoint,
    load_run,
    load_strictly,
    numbered_checkpoints,
    read_weights,
    stored_weights,
)
from run_folder import Position, RunFolder


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> str:
    return write_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def config_for(backbone, tmp_path):
    """config_for(method, **changes): the config of a run in this test's folder."""
    return lambda method="coconut", **changes: make_config(tmp_path, backbone, method, **changes)


# ---------------------------------------------------------------------------------------------------- what is stored


@pytest.mark.parametrize("method", METHODS)
def test_stored_keys_are_the_stock_ones(config_for, method):
    model = build_model(config_for(method))[0]
    stored, hugging = stored_weights(model), set(model.base_causallm.state_dict())
    assert "transformer.wte.weight" in hugging and "lm_head.weight" in hugging
    if method in PLAIN or method == "all False":
        assert stored.keys() == hugging
        assert stored["lm_head.weight"].shape == ((67 if method in PLAIN else 70), 16)
        return
    extra = {"pause_embedding", "feedback_mode_id"} if method in PAUSES else set()
    assert stored.keys() == {f"base_causallm.{key}" for key in hugging} | {"embedding.weight"} | extra
    assert stored["embedding.weight"].shape == (70, 16)
    if extra:
        assert stored["pause_embedding"].shape == (16,)
        assert stored["feedback_mode_id"].dtype == torch.int64
        assert int(stored["feedback_mode_id"]) == 1 + PAUSES.index(method)


def test_only_a_new_model_says_what_its_new_rows_start_from(config_for, capsys):
    config = config_for(tokenizer=str(ROOT / "backbones/characters"))
    folder, model = RunFolder(config), trained(config)
    assert "`<<` is 2 tokens here" in capsys.readouterr().out
    folder.open(exclusive=True)
    path = folder.save_checkpoint(model, Position(epoch=1))
    loaded, _, ids, _ = build_model(config, path)
    assert capsys.readouterr().out == "" and same(stored_weights(loaded), stored_weights(model))
    assert loaded.embedding.weight.shape[0] > max(ids)


@pytest.mark.parametrize("method", METHODS)
def test_file_holds_tensors_only_and_the_tied_matrix_once(config_for, method):
    config = config_for(method)
    folder, model = RunFolder(config), build_model(config)[0]
    folder.open(exclusive=True)
    path = folder.save_checkpoint(model, Position(epoch=4, global_step=8))
    assert path == folder.path / "checkpoint_4"
    weights = torch.load(path, weights_only=True)
    assert all(type(value) is torch.Tensor for value in weights.values())
    unique = {tensor.data_ptr(): tensor.nbytes for tensor in stored_weights(model).values()}
    assert len(unique) < len(weights), "some keys are tied"
    with zipfile.ZipFile(path) as archive:
        stored = [entry.file_size for entry in archive.infolist() if "/data/" in entry.filename]
    assert sorted(stored) == sorted(unique.values())


def test_state_file_says_what_the_checkpoint_is(config_for):
    config = config_for("pause_curriculum")
    folder = RunFolder(config)
    folder.open(exclusive=True)
    folder.save_checkpoint(build_model(config)[0], Position(epoch=4, global_step=812))
    state = json.loads((folder.path / "state_4").read_text())
    expected = {"epoch": 3, "global_step": 812, "feedback_mode": "pause_curriculum", "model_key": "m5", "seed": 3,
                "stock_loadable": False, "config": config.model_dump()}  # fmt: skip
    assert {key: state[key] for key in expected} == expected
    assert state["versions"].keys() == {"code", "python", "torch", "transformers"}
    assert state["versions"]["torch"] == torch.__version__
    stored = stored_weights(build_model(config)[0])
    assert state["tensor_bytes"] == sum({t.data_ptr(): t.nbytes for t in stored.values()}.values())


@pytest.mark.parametrize("method, loadable", [("coconut", True), ("cot", True), ("frozen", False), ("learned_shared", False)])
def test_whether_the_stock_code_could_run_it(config_for, method, loadable):
    folder = RunFolder(config_for(method))
    folder.open(exclusive=True)
    folder.save_checkpoint(build_model(folder.config)[0], Position(epoch=1))
    assert json.loads((folder.path / "state_1").read_text())["stock_loadable"] is loadable


# ---------------------------------------------------------------------------------------------------- the loading table


@pytest.mark.parametrize("method", METHODS)
def test_own_file_round_trip(config_for, tmp_path, method):
    before = snapshot(stored_weights(trained(config_for(method))))
    path = save(before, tmp_path / "checkpoint_1")
    model, _, _, report = build_model(config_for(method), path)
    assert report == "<All keys matched successfully>"
    assert same(stored_weights(model), before)
    assert model.feedback_mode == {"coconut": "continuous"}.get(method, method if method in PAUSES else "none")


@pytest.mark.parametrize("method", ["coconut", "all False", *PAUSES])
def test_plain_file_of_the_base_vocabulary_then_new_rows(config_for, tmp_path, method):
    """A CoT start: the old rows come from the file, the new ones are its `<<` row."""
    before = snapshot(stored_weights(trained(config_for("cot"))))
    model, tokenizer, ids, report = build_model(config_for(method), save(before, tmp_path / "checkpoint_1"))
    assert report == "<All keys matched successfully>"
    after, anchor = (
        model.base_causallm.state_dict(),
        before["transformer.wte.weight"][tokenizer.convert_tokens_to_ids("<<")],
    )
    for key, value in before.items():
        assert torch.equal(after[key][: len(value)] if value.shape[0] == 67 else after[key], value), key
    for key in ("transformer.wte.weight", "lm_head.weight"):
        assert after[key].shape[0] == 70 and torch.equal(after[key][list(ids)], anchor.expand(3, -1))
    if method in PAUSES:
        assert torch.equal(model.pause_embedding, anchor), "the pause vector starts from the loaded `<<` row too"


@pytest.mark.parametrize("method", ["coconut", "all False"])
def test_plain_file_of_the_grown_vocabulary_keeps_its_new_rows(config_for, tmp_path, method):
    before = snapshot(stored_weights(trained(config_for("all False"))))
    model = build_model(config_for(method), save(before, tmp_path / "checkpoint_1"))[0]
    assert same(dict(model.base_causallm.state_dict()), before)


@pytest.mark.parametrize("method", PAUSES)
def test_pause_vector_starts_from_the_anchor_row_not_from_a_trained_latent_row(config_for, tmp_path, method):
    before = snapshot(stored_weights(trained(config_for("all False"))))
    model, tokenizer, ids, _ = build_model(config_for(method), save(before, tmp_path / "checkpoint_1"))
    anchor, latent = (before["transformer.wte.weight"][i] for i in (tokenizer.convert_tokens_to_ids("<<"), ids.latent))
    assert torch.equal(model.pause_embedding, anchor) and not torch.equal(anchor, latent)


def test_wrapped_file_may_miss_tied_keys(config_for, tmp_path):
    before = snapshot(stored_weights(trained(config_for("coconut"))))
    for gone in (
        ["embedding.weight"],
        ["embedding.weight", "base_causallm.lm_head.weight"],
        ["base_causallm.transformer.wte.weight"],
    ):
        fewer = {key: value for key, value in before.items() if key not in gone}
        model, _, _, report = build_model(config_for("coconut"), save(fewer, tmp_path / "checkpoint_1"))
        assert same(stored_weights(model), before)
        assert report.startswith("_IncompatibleKeys(missing_keys=[") and gone[0] in report


def test_plain_file_may_miss_the_tied_head(config_for, tmp_path):
    before = snapshot(stored_weights(trained(config_for("cot"))))
    fewer = {key: value for key, value in before.items() if key != "lm_head.weight"}
    for method in ("cot", "coconut"):
        model = build_model(config_for(method), save(fewer, tmp_path / "checkpoint_1"))[0]
        assert torch.equal(model.base_causallm.lm_head.weight[:67], before["lm_head.weight"])


@pytest.mark.parametrize("method", [*PLAIN, "all False"])
def test_wrapped_file_does_not_go_into_a_plain_model(config_for, tmp_path, method):
    path = save(stored_weights(build_model(config_for("coconut"))[0]), tmp_path / "checkpoint_1")
    with pytest.raises(ValueError, match="^Cannot load coconut model weights into a causallm model"):
        build_model(config_for(method), path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("method", ["cot", "coconut", "frozen"])
def test_wrapper_prefixes_are_stripped(config_for, tmp_path, method, prefix):
    before = snapshot(stored_weights(trained(config_for(method))))
    path = save({prefix + key: value for key, value in before.items()}, tmp_path / "checkpoint_1")
    assert same(stored_weights(build_model(config_for(method), path)[0]), before)


@pytest.mark.parametrize("method", ["cot", "coconut"])
def test_mask_buffers_of_old_files_are_ignored(config_for, tmp_path, method):
    before = snapshot(stored_weights(trained(config_for(method))))
    base = "base_causallm." if method == "coconut" else ""
    old = {
        f"{base}transformer.h.0.attn.bias": torch.ones(4),
        f"{base}transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    model, _, _, report = build_model(config_for(method), save(before | old, tmp_path / "checkpoint_1"))
    assert same(stored_weights(model), before) and report == "<All keys matched successfully>"
    assert f"{base}transformer.h.0.attn.c_attn.bias" in before, "a real bias is not taken for one"


# ---------------------------------------------------------------------------------------------------- what is refused


def test_missing_unexpected_and_misshapen_keys_are_listed(config_for, tmp_path):
    weights = snapshot(stored_weights(build_model(config_for("cot"))[0]))
    del weights["transformer.h.0.attn.c_attn.bias"]
    weights |= {"extra.weight": torch.ones(2), "transformer.ln_f.bias": torch.ones(17)}
    path = save(weights, tmp_path / "checkpoint_1")
    with pytest.raises(ValueError) as refused:
        build_model(config_for("cot"), path)
    message = str(refused.value)
    for part in (str(path), "1 missing keys: transformer.h.0.attn.c_attn.bias", "1 unexpected keys: extra.weight",
                 "1 other shapes: transformer.ln_f.bias (17,) instead of (16,)"):  # fmt: skip
        assert part in message


def test_only_the_first_ten_keys_are_listed():
    module = torch.nn.ParameterDict({f"k{i:02}": torch.zeros(1) for i in range(12)})
    with pytest.raises(ValueError) as refused:
        load_strictly(module, {"zz": torch.zeros(1)}, "file")
    message = str(refused.value)
    assert "12 missing keys: k00, k01" in message and "k09 ..." in message and "k10" not in message


def test_refused_weights_leave_the_model_as_it_was():
    module = torch.nn.Linear(2, 2)
    before = snapshot(module.state_dict())
    with pytest.raises(ValueError):
        load_strictly(module, {"weight": torch.ones(2, 2)}, "file")
    assert same(dict(module.state_dict()), before)


def test_missing_key_is_no_tied_key_because_another_one_is_there():
    with pytest.raises(ValueError, match="1 missing keys: bias"):
        load_strictly(torch.nn.Linear(2, 2), {"weight": torch.ones(2, 2)}, "file")


@pytest.mark.parametrize("run_mode", PAUSES)
def test_foreign_pause_file_needs_its_mode_named(config_for, tmp_path, run_mode):
    weights = snapshot(stored_weights(trained(config_for("learned_shared"))))
    del weights["feedback_mode_id"]
    path = save(weights, tmp_path / "checkpoint_1")
    with pytest.raises(ValueError, match="frozen, learned_shared, pause_curriculum"):
        build_model(config_for("coconut"), path)
    model = build_model(config_for(run_mode), path)[0]
    assert model.feedback_mode == run_mode
    assert torch.equal(model.pause_embedding, weights["pause_embedding"])
    assert int(stored_weights(model)["feedback_mode_id"]) == 1 + PAUSES.index(run_mode)


@pytest.mark.parametrize("file_mode", ["coconut", *PAUSES])
@pytest.mark.parametrize("run_mode", ["coconut", *PAUSES])
def test_a_mode_that_contradicts_the_file_is_refused(config_for, tmp_path, file_mode, run_mode):
    path = save(stored_weights(build_model(config_for(file_mode))[0]), tmp_path / "checkpoint_1")
    if file_mode == run_mode:
        assert build_model(config_for(run_mode), path)[0].feedback_mode == config_for(run_mode).feedback_mode
        return
    named = [config_for(method).feedback_mode for method in (file_mode, run_mode)]
    with pytest.raises(ValueError, match=f"is a {named[0]} checkpoint, the config says {named[1]}"):
        build_model(config_for(run_mode), path)


@pytest.mark.parametrize("change", ["unknown id", "no vector"])
def test_damaged_mode_keys_are_refused(config_for, tmp_path, change):
    weights = snapshot(stored_weights(build_model(config_for("frozen"))[0]))
    if change == "unknown id":
        weights["feedback_mode_id"] = torch.tensor(9)
    else:
        del weights["pause_embedding"]
    with pytest.raises(ValueError):
        build_model(config_for("frozen"), save(weights, tmp_path / "checkpoint_1"))


class Bomb:
    def __init__(self, witness: Path):
        self.witness = str(witness)

    def __reduce__(self):
        return os.mkdir, (self.witness,)


def test_a_pickle_with_code_is_refused_and_never_runs(config_for, tmp_path):
    witness = tmp_path / "witness"
    path = save({"transformer.wte.weight": Bomb(witness)}, tmp_path / "checkpoint_1")
    with pytest.raises(ValueError, match="checkpoint_1 is not a readable checkpoint"):
        build_model(config_for("cot"), path)
    assert not witness.exists()
    torch.load(path, weights_only=False)
    assert witness.exists(), "the bomb works, so the test above means something"


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "list", "nested", "no tensors"])
def test_unreadable_files_are_refused(config_for, tmp_path, kind):
    path = tmp_path / "checkpoint_1"
    contents = {"list": [torch.ones(1)], "nested": {"model": {"a": torch.ones(1)}}, "no tensors": {}}
    if kind in contents:
        save(contents[kind], path)
    elif kind == "truncated":
        save(stored_weights(build_model(config_for("cot"))[0]), path)
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.write_text({"empty": "", "text": "hello"}[kind])
    with pytest.raises(ValueError, match=r"checkpoint_1 is not a (readable )?checkpoint") as refused:
        read_weights(path)
    assert "\n" not in str(refused.value)


# ---------------------------------------------------------------------------------------------------- finding a file


def test_find_checkpoint_takes_a_file_then_best_then_newest(tmp_path, capsys):
    folder = tmp_path / "run"
    touch(folder, "checkpoint_2", "checkpoint_10", "checkpoint_9", "checkpoint_best", "checkpoint_12.tmp", "state_10")
    assert find_checkpoint(folder / "checkpoint_2") == folder / "checkpoint_2"
    assert capsys.readouterr().out == ""
    assert find_checkpoint(str(folder)) == folder / "checkpoint_10", "by number, not by name"
    assert str(folder / "checkpoint_10") in capsys.readouterr().out, "the choice is printed"
    (folder / "best.json").write_text('{"file": "checkpoint_2", "epoch": 1, "accuracy": 0.5}')
    assert find_checkpoint(folder) == folder / "checkpoint_2"
    (folder / "best.json").write_text('{"file": "checkpoint_99"}')
    assert find_checkpoint(folder) == folder / "checkpoint_10", "a best file that is gone does not count"
    assert numbered_checkpoints(folder) == [2, 9, 10]


def test_missing_checkpoint_lists_what_the_folder_holds(tmp_path):
    folder = tmp_path / "run"
    touch(folder, "checkpoint_2", "notes.txt", ".lock")
    with pytest.raises(
        ValueError, match=r"load_model_path: no checkpoint at .*epoch_2; .*run holds checkpoint_2, notes.txt \("
    ):
        find_checkpoint(folder / "epoch_2")
    with pytest.raises(ValueError, match=r"nowhere does not exist either .*checkpoint_N"):
        find_checkpoint(tmp_path / "nowhere" / "checkpoint_1")
    touch(tmp_path / "empty")
    with pytest.raises(ValueError, match="empty holds nothing"):
        find_checkpoint(tmp_path / "empty")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", ["state_2", "run.json"])
def test_load_run_knows_mode_and_config_from_the_folder(config_for, method, side):
    config = config_for(method, c_thought=2, lr=3e-3)
    folder, model = RunFolder(config), trained(config)
    folder.open(exclusive=True)
    folder.begin(model)
    folder.save_checkpoint(model, Position(epoch=2))
    (folder.path / ({"state_2", "run.json"} - {side}).pop()).unlink()
    for path in (folder.path, folder.path / "checkpoint_2"):
        loaded, tokenizer, ids, loaded_config = load_run(path)
        assert loaded_config == config and loaded.feedback_mode == model.feedback_mode
        assert same(stored_weights(loaded), stored_weights(model))
        assert not loaded.training and loaded.latent_token_id == ids.latent
        assert len(tokenizer) == loaded.embedding.weight.shape[0]
    (folder.path / side).unlink()
    with pytest.raises(ValueError, match="no state_N or run.json beside it"):
        load_run(folder.path)


def test_load_run_takes_changes(config_for, backbone, tmp_path):
    config = config_for("frozen")
    folder = RunFolder(config)
    folder.open(exclusive=True)
    folder.save_checkpoint(build_model(config)[0], Position(epoch=1))
    moved = tmp_path / "moved"
    os.symlink(backbone, moved)
    assert load_run(folder.path, model_id=str(moved))[3].model_id == str(moved)
    with pytest.raises(ValueError, match="did you mean model_id"):
        load_run(folder.path, model_idd="x")


def test_the_thought_ids_of_a_plain_model_are_absent(config_for):
    model, tokenizer, ids, report = build_model(config_for("cot"))
    assert ids == backbones.ThoughtIds() and report is None and model.latent_token_id is None
    assert "<|latent|>" not in tokenizer.get_vocab()
