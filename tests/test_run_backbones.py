"""LAHR and Cognate through run.py like any other model: train, evaluate, go on after a cut, load again."""

import json

import pytest
import torch
from conftest import ROOT

import run
from checkpoint import load_run

WORDS = str(ROOT / "backbones/prosqa_words")
SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 256}
COGNATE = SIZES | {"refiner_heads": 4, "memory_size": 16, "gate_size": 16, "intermediate_size": 64}
MODELS = {
    "lahr": SIZES | {"use_mod": True, "use_memory": True, "mod_capacity": 0.5, "memory_sub_keys": 6},
    "cognate": COGNATE,
}


def keys(model: str, **changes) -> dict:
    common = {"model_id": model, "model_config": MODELS[model], "tokenizer": WORDS, "num_epochs": 2, "reset_optimizer": False}
    return common | {"optimizer": "mugrokfast" if model == "cognate" else "adamw", "max_new_tokens": 4} | changes


@pytest.mark.parametrize("model", MODELS)
def test_a_cut_run_goes_on_to_the_same_weights(make, tmp_path, capsys, model):
    """Router thresholds, filter states and both optimizers of MuGrokfast among them; in mid-epoch."""
    assert run.main([make("whole", **keys(model))]) == 0
    config = make("cut", **keys(model))
    assert run.main([config, "max_steps=3"]) == 0 and run.main([config]) == 0
    files = [torch.load(tmp_path / "runs" / name / "checkpoint_2", weights_only=True) for name in ("whole", "cut")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    thresholds = [value for key, value in files[0].items() if key.endswith("threshold")]
    assert len(thresholds) == (2 if model == "lahr" else 0) and all(thresholds), "thresholds follow the scores"
    logged = [json.loads(line) for line in (tmp_path / "runs/whole/metrics.jsonl").read_text().splitlines()]
    best = next(r for r in logged if r["event"] == "eval" and r["epoch"] == 1)
    capsys.readouterr()
    load = f"load_model_path={tmp_path / 'runs/whole/checkpoint_2'}"
    assert run.main([config, "only_eval=True", "resume=1", load]) == 0
    assert f"(cross-entropy {best['eval/two_choice_ce']:.4f})" in capsys.readouterr().out


@pytest.mark.parametrize("model", MODELS)
def test_a_checkpoint_knows_what_it_is(make, tmp_path, model):
    assert run.main([make("m5", **keys(model, feedback_mode="pause_curriculum", num_epochs=1, lr=1e-9))]) == 0
    loaded, tokenizer, ids, config = load_run(tmp_path / "runs/m5")
    assert loaded.base_causallm.config.model_type == model and loaded.feedback_mode == "pause_curriculum"
    assert config.model_options == MODELS[model] and ids.latent == tokenizer.convert_tokens_to_ids("<|latent|>")
    row = loaded.embedding(torch.tensor(ids.latent))
    assert loaded.pause_embedding.norm().item() == pytest.approx(row.norm().item(), rel=0.2), (
        "a thought on another scale than tokens"
    )


def test_cells_of_one_seed_share_their_weights(make, tmp_path):
    """Adding a mechanism leaves all other weights as they begin: else cells would differ by their draw."""
    weights = {}
    for name, flags in {"plain": {}, "mod": {"use_mod": True}, "memory": {"use_memory": True}}.items():
        options = SIZES | flags
        assert run.main([make(name, **keys("lahr", model_config=options, num_epochs=1, lr=1e-12, weight_decay=0.0))]) == 0
        weights[name] = torch.load(tmp_path / "runs" / name / "checkpoint_1", weights_only=True)
    for name in ("mod", "memory"):
        shared = weights["plain"].keys() & weights[name].keys()
        assert len(shared) > 20 and weights[name].keys() > shared
        assert all(torch.allclose(weights["plain"][key], weights[name][key], atol=1e-9) for key in shared)


def test_what_is_wrong_with_the_options_is_one_line(make, capsys):
    for options, word in (
        ({"use_mdo": True}, "did you mean use_mod?"),
        ({"mod_router": "random"}, "random"),
        ({"size": "huge"}, "huge"),
    ):
        assert run.main([make("bad", **keys("lahr", model_config=options))]) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(error) == 1 and word in error[0]
