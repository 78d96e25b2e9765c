"""LoRA: what is trained and what is not, merged checkpoints, exact resuming, files, mistakes."""

import contextlib
import copy
import io
import json
import re
from pathlib import Path

import pytest
import torch
from run_material import write_config
from tiny import FAMILIES, build, collate, gradients, token_rows, wrap

import run
from accounting import Shape
from checkpoint import build_model, load_run, read_weights, stored_weights
from lora import add_adapters, fingerprint, has_adapters, load_trained, merged_weights, trained
from recompute import recompute_blocks
from saving import disk_need
from taps import decoder_blocks
from utils import Lora, check_config, load_config

NEW = [56, 57, 58]  # of tests/tiny.py
LORA = {"r": 4, "alpha": 8, "dropout": 0.1}


def adapted(family: str, moved: bool = True, **options):
    """A wrapped model in float64 with adapters, whose every trained parameter has moved."""
    model = wrap(build(family))
    said = add_adapters(model, Lora(**{"r": 4} | options), NEW, seed=0)
    generator = torch.Generator().manual_seed(2)
    for parameter in trained(model).values() if moved else ():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model, said


def batch_of(n_latents=(2, 0, 3)) -> dict:
    return collate(token_rows(list(n_latents)), 4)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


# ---------------------------------------------------------------- the function


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_begin_at_zero_and_merged_weights_are_the_same_function(family):
    plain, batch = wrap(build(family)), batch_of()
    before = plain(**batch, full_logits=True).logits
    assert distance(adapted(family, moved=False)[0](**batch, full_logits=True).logits, before) < 1e-12
    model, _ = adapted(family)
    logits, names = model(**batch, full_logits=True).logits, plain.state_dict()
    weights = stored_weights(model)
    assert list(weights) == list(names) and all(weights[key].shape == names[key].shape for key in names)
    plain.load_state_dict(weights)
    assert distance(logits, before) > 0.5
    assert distance(plain(**batch, full_logits=True).logits, logits) < 1e-9
    pointers = {key: value.data_ptr() for key, value in weights.items()}
    tied = [key for key, value in names.items() if value.data_ptr() == names["embedding.weight"].data_ptr()]
    assert len({pointers[key] for key in tied}) == 1 and len(tied) == (2 if family == "llama" else 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_merged_weights_and_the_base_has_none(family):
    """B's gradient is scaling x (the merged weight's gradient) A^T; a new row's is that of its row."""
    model, _ = adapted(family)
    model(**batch_of()).loss.backward()
    plain = wrap(build(family))
    plain.load_state_dict(merged_weights(model))
    plain(**batch_of()).loss.backward()
    expected, got = gradients(plain), gradients(model)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    name = next(key for key in got if "layers.1" in key or "h.1" in key if ".lora_B." in key)
    A = dict(model.named_parameters())[name.replace("lora_B", "lora_A")]
    whole = expected[name.replace(".lora_B.default", "")]
    whole = whole.T if family == "gpt2" else whole  # Conv1D: inputs x outputs
    scaling = 32 / 4
    assert distance(got[name], scaling * whole @ A.T) < 1e-8 and got[name].abs().max() > 1e-4
    rows = next(key for key in got if key.endswith("new_rows"))
    assert distance(got[rows], expected[rows.replace("new_rows", "weight")][NEW]) < 1e-8
    assert got[rows][2].abs().max() == 0 if family == "llama" else got[rows].abs().max() > 1e-4  # thoughts feed no row


def test_the_number_of_trained_parameters():
    layers, r, d, hidden = 3, 4, 16, 64
    per_block = r * ((d + 3 * d) + (d + d) + (d + hidden) + (hidden + d))
    model, said = adapted("gpt2")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == layers * per_block + 3 * d
    assert said.startswith(f"LoRA: {layers * per_block + 3 * d} of ") and "rank 4, 3 rows of new tokens" in said
    model, said = adapted("llama", target_modules=["q_proj", "v_proj"])
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * r * ((16 + 16) + (16 + 8)) + 2 * 3 * 16
    assert "rows in and out" in said
    plain = wrap(build("gpt2"), "none")
    assert "rows" not in add_adapters(plain, Lora(r=2), [], seed=0)
    assert not any("new_rows" in name for name in plain.state_dict())


def test_frozen_weights_are_known_to_the_count_of_operations():
    """What a weight's own gradient costs is spared for all matrices but the updates."""
    base = build("gpt2")
    plain = Shape.of(base, decoder_blocks(base), frozen=True)
    assert not plain.frozen_parameters and not plain.frozen_head
    base = adapted("gpt2")[0].base_causallm
    shape = Shape.of(base, decoder_blocks(base), frozen=True)
    assert shape.frozen_parameters == plain.block_parameters < shape.block_parameters and shape.frozen_head


def test_pause_vectors_stay_trained_or_frozen():
    for mode, expected in (("learned_shared", True), ("frozen", False)):
        model = wrap(build("gpt2"), mode)
        add_adapters(model, Lora(), NEW, seed=0)
        assert ("pause_embedding" in trained(model)) == expected
        assert distance(merged_weights(model)["pause_embedding"], model.pause_embedding) == 0


def test_seeds_decide_the_beginning():
    first, again = (trained(adapted("gpt2", moved=False)[0]) for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    model = wrap(build("gpt2"))
    add_adapters(model, Lora(r=4), NEW, seed=1)
    assert any(not torch.equal(first[key], value) for key, value in trained(model).items())


def test_recomputed_blocks_keep_values_and_gradients():
    model, batch = adapted("llama")[0].train(), batch_of()
    again = copy.deepcopy(model)
    recompute_blocks(decoder_blocks(again.base_causallm))
    for each in (model, again):
        each(**batch).loss.backward()
    for (name, a), b in zip(gradients(model).items(), gradients(again).values()):
        assert distance(a, b) < 1e-12, name


def test_updates_of_another_model_or_other_weights_are_refused():
    model, _ = adapted("gpt2")
    state, base = {key: value.detach().clone() for key, value in trained(model).items()}, fingerprint(model)
    fresh, _ = adapted("gpt2", moved=False)
    load_trained(fresh, state, base)
    assert distance(fresh(**batch_of()).loss, model(**batch_of()).loss) == 0
    with pytest.raises(ValueError, match="another model or another lora"):
        load_trained(adapted("gpt2", r=2)[0], state, base)
    with torch.no_grad():
        next(p for p in fresh.parameters() if not p.requires_grad)[0, 0] += 1e-6
    with pytest.raises(ValueError, match="other weights now"):
        load_trained(fresh, state, base)


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory, small_data):
    """(folder of runs, maker of configs, what the run `whole` printed): three epochs with dropout, saved all along."""
    folder = tmp_path_factory.mktemp("lora")
    options = {"lora": LORA, "reset_optimizer": False, "max_val_samples": 4, "lr": 1e-2, "save_every_steps": 2}

    def make(name, **changes):
        return write_config(folder, small_data, name, **options | changes)

    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert run.main([make("whole")]) == 0
    return folder / "runs", make, out.getvalue()


def weights(folder: Path, n: int = 3) -> dict[str, torch.Tensor]:
    return read_weights(folder / f"checkpoint_{n}")


def test_only_targets_and_new_rows_move_and_checkpoints_are_plain_ones(lora_run):
    runs, make, said = lora_run
    start, tokenizer, ids, _ = build_model(load_config(make("whole")))
    before, after = start.state_dict(), weights(runs / "whole")
    assert list(after) == list(before)
    others = [i for i in range(len(tokenizer)) if i not in ids]
    for key, value in before.items():
        if "wte" in key or "lm_head" in key or key == "embedding.weight":
            assert torch.equal(after[key][others], value[others])
            assert (after[key][list(ids)[:2]] != value[list(ids)[:2]]).all(), "markers learn"
        elif re.search(r"(c_attn|c_proj|c_fc)\.weight", key):
            moved = torch.linalg.svdvals((after[key] - value).double())
            assert moved[0] > 1e-3 and moved[4] < 1e-5 * moved[0], "a change of rank 4"
        else:
            assert torch.equal(after[key], value), key
    assert re.search(r"^LoRA: \d+ of \d+ parameters are trained \([\d.]+%\): rank 4, 3 rows of new tokens$", said, re.M)


def test_a_merged_checkpoint_is_loaded_without_adapters(lora_run, capsys):
    runs, make, _ = lora_run
    model, _, _, config = load_run(runs / "whole" / "checkpoint_3")
    assert config.lora == Lora(**LORA) and not has_adapters(model)
    assert run.main([make("again"), "only_eval=True", "resume=2", f"load_model_path={runs / 'whole/checkpoint_3'}"]) == 0
    assert "LoRA" not in capsys.readouterr().out
    adapted_then, merged = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (runs / "whole/eval_3.jsonl", runs / "again/eval_prosqa_valid.jsonl")
    )
    assert [r["output"] for r in merged] == [r["output"] for r in adapted_then] and len(merged) == 4
    assert [r["target_logp"] for r in merged] == pytest.approx([r["target_logp"] for r in adapted_then], abs=1e-4)
    loaded = f"load_model_path={runs / 'whole/checkpoint_3'}"
    assert run.main([make("from-merged"), loaded, "num_epochs=1", "lora=null", "max_steps=1"]) == 0, "others start from it"


@pytest.mark.parametrize("steps", [8, 6], ids=["in mid-epoch", "between epochs"])
def test_an_interrupted_run_ends_with_the_same_weights(lora_run, steps):
    runs, make, _ = lora_run
    name = f"cut-{steps}"
    assert run.main([make(name, max_steps=steps)]) == 0
    state = torch.load(runs / name / "last_state", weights_only=True)
    assert all(re.search(r"lora_[AB]|new_rows", key) for key in state["model"]) and isinstance(state["base"], int)
    assert run.main([make(name)]) == 0
    whole, cut = weights(runs / "whole"), weights(runs / name)
    assert whole.keys() == cut.keys() and all(torch.equal(whole[key], cut[key]) for key in whole)


def test_a_new_optimizer_every_epoch_goes_on_with_the_same_updates(lora_run):
    runs, make, _ = lora_run
    assert run.main([make("fresh", reset_optimizer=True)]) == 0
    for n in (1, 2):
        assert run.main([make("fresh-cut", reset_optimizer=True, num_epochs=n)]) == 0
    assert run.main([make("fresh-cut", reset_optimizer=True)]) == 0
    a, b = weights(runs / "fresh"), weights(runs / "fresh-cut")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_going_on_takes_the_same_base_weights(lora_run, capsys):
    runs, make, _ = lora_run
    base = f"load_model_path={runs / 'whole/checkpoint_1'}"
    assert run.main([make("behind", num_epochs=1), base]) == 0
    assert run.main([make("behind", num_epochs=2), base]) == 0
    assert not torch.equal(weights(runs / "behind", 1)["embedding.weight"], weights(runs / "behind", 2)["embedding.weight"])
    capsys.readouterr()
    assert run.main([make("behind", num_epochs=3), f"load_model_path={runs / 'whole/checkpoint_2'}"]) == 2
    assert "give other weights now" in capsys.readouterr().err
    (runs / "behind/last_state").unlink()
    assert run.main([make("behind", num_epochs=3), base]) == 2
    error = capsys.readouterr().err
    assert "checkpoint_2 holds merged weights" in error and "load_model_path" in error and error.count("\n") == 1
    assert run.main([make("whole", lora={"r": 8}, num_epochs=4)]) == 2
    assert "holds another run (lora: " in capsys.readouterr().err


def test_frozen_weights_in_bf16_and_updates_in_float32(lora_run, monkeypatch):
    runs, make, _ = lora_run
    seen = {}
    monkeypatch.setattr(run, "train", lambda a_run, *_: seen.update(model=a_run.model))
    assert run.main([make("pure", bf16="pure")]) == 0
    assert {(p.requires_grad, p.dtype) for p in seen["model"].parameters()} == {(True, torch.float32), (False, torch.bfloat16)}
    merged = stored_weights(seen["model"])
    assert {value.dtype for value in merged.values()} == {torch.bfloat16}
    monkeypatch.undo()
    assert run.main([make("pure", bf16="pure", num_epochs=1)]) == 0
    changed = weights(runs / "pure", 1)["embedding.weight"][-3:-1] != merged["embedding.weight"][-3:-1]
    assert changed.any()


def test_disk_need_counts_updates_not_the_model_for_resuming(lora_run):
    runs, make, _ = lora_run
    config = load_config(make("whole"))
    model, _, ids, _ = build_model(config)
    whole = sum(p.numel() * 4 for p in model.parameters())
    add_adapters(model, config.lora, list(ids), 0)
    updates = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    assert disk_need(config, model, 3) == (3 * whole, 2 * 3 * updates)
    assert (runs / "whole/checkpoint_3").stat().st_size == pytest.approx(whole, rel=0.05)
    assert (runs / "whole/last_state").stat().st_size == pytest.approx(3 * updates, rel=0.5)


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "lora, message",
    [
        ({"rank": 8}, "lora.rank: unknown key"),
        ({"aplha": 8}, "lora.aplha: unknown key, did you mean lora.alpha?"),
        ({"r": 0}, "lora.r: input should be greater than or equal to 1, got 0"),
        ({"dropout": 1.0}, "lora.dropout: input should be less than 1"),
        ({"target_modules": []}, "lora.target_modules: "),
        ("yes", "lora: must be a mapping of r, alpha, dropout, target_modules, got 'yes'"),
    ],
)
def test_a_wrong_key_is_one_clear_error(make, capsys, lora, message):
    assert run.main([make("wrong", lora=lora)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and len(error) < 400


@pytest.mark.parametrize(
    "key, value",
    [
        ("parallel", "fsdp2"),
        ("compile", True),
        ("weight_ema", 0.9),
        ("checkpoint_format", "phase1"),
        ("save_training_state", False),
        ("model_id", "lahr"),
    ],
)
def test_what_lora_does_not_go_with_is_refused(key, value):
    values = {"save_path": "runs", "name": "x", "coconut": True, "train_path": "t.json", "val_path": "v.json", "lora": {}}
    assert check_config(values, "test").lora == Lora()
    with pytest.raises(ValueError, match=rf"lora: cannot be combined with {key}"):
        check_config(values | {key: value}, "test")


def test_unknown_targets_name_the_known_ones(make, capsys):
    assert run.main([make("targets", lora={"target_modules": ["c_attn", "q_proj"]})]) == 2
    error = capsys.readouterr().err
    last = error.splitlines()[-1]
    assert last == "error: lora.target_modules: 'q_proj' is no linear map of GPT2LMHeadModel: c_attn, c_fc, c_proj"
    assert "Traceback" not in error
