"""Alarms ring when they should and only then, and what a run says of its thoughts and its backbone follows the model."""

import json

import pytest
import torch
from conftest import ROOT

import run
from checkpoint import load_run
from monitoring import Alarms


def heard(losses=(), validations=(), norms=None) -> list[str]:
    said = []
    alarms = Alarms(True, said.append)
    for step, loss in enumerate(losses):
        alarms.update(step, loss, norms[step] if norms else 1.0)
    for epoch, loss in enumerate(validations):
        alarms.evaluation(epoch, loss)
    return said


def test_a_loss_that_rises_for_long_rings_once():
    falling = [2.0 - 0.002 * i for i in range(500)]
    assert heard(falling) == []
    assert heard([*falling, *[1.1] * 150]) == [], "not long enough"
    said = heard([*falling, *[2.0] * 600])
    assert len(said) == 1 and "running mean" in said[0]


def test_a_high_gradient_norm_warns_once_and_a_very_high_one_ends_the_run():
    assert len(heard([1.0] * 4, norms=[11, 12, 1, 13])) == 2, "again after it was quiet"
    with pytest.raises(FloatingPointError, match="51 is above 50 at update 1"):
        heard([1.0] * 2, norms=[1, 51])
    Alarms(False).update(0, 1.0, 1e9)


@pytest.mark.parametrize(
    ("losses", "word"),
    [
        ([1.0, 0.9, 0.96, 0.97], "second time"),
        ([1.0, 0.90001, 0.90002], "four decimals"),
        ([0.01, 0.005], "too low"),
    ],
)
def test_validations_that_tell_something(losses, word):
    said = heard(validations=losses)
    assert len(said) == 1 and word in said[0]


def test_validations_that_tell_nothing():
    assert heard(validations=[1.0, 0.9, 0.96, 0.88, 0.94, 0.9]) == []


LAHR = {
    "model_id": "lahr", "tokenizer": str(ROOT / "backbones/prosqa_words"), "max_new_tokens": 4, "num_epochs": 2,
    "model_config": {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "max_position_embeddings": 256,
                     "use_mod": True, "mod_capacity": 0.5, "mod_threshold_decay": 0.5},
}  # fmt: skip


def test_evaluations_tell_scales_and_routing(make, tmp_path):
    assert run.main([make("lahr", **LAHR)]) == 0
    records = [json.loads(line) for line in (tmp_path / "runs/lahr/metrics.jsonl").read_text().splitlines()]
    evaluated = [r for r in records if r["event"] == "eval"]
    assert [("thought/rms" in r, "mod/thought" in r) for r in evaluated] == [(False, False), (True, True)], "stage 0 has none"
    last = evaluated[-1]
    assert last["thought/rms"] == pytest.approx(1, abs=0.3), "after the final norm"
    assert last["embedding/rms"] == pytest.approx(0.02, rel=0.5)
    assert last["eval/perplexity"] == pytest.approx(2.718281828 ** last["eval/loss"])
    for key in ("mod/layer_1", "mod/layer_3", "mod/question", "mod/text"):
        assert 0 < last[key] < 1 and last[key] != evaluated[0][key], key


def test_no_alarm_is_no_reason_to_stop_a_stock_run(make, capsys):
    assert run.main([make("wild", lr=3.0, num_epochs=1)]) in (0, 1)
    assert "Warning: update" not in capsys.readouterr().out
    assert run.main([make("watched", lr=3.0, num_epochs=1, alarms=True)]) == 1
    assert "gradient norm" in capsys.readouterr().err


def test_latent_norm_feeds_states_on_the_scale_of_embeddings(make, tmp_path):
    assert run.main([make("scaled", latent_norm="match_embedding", num_epochs=1)]) == 0
    model, _, ids, config = load_run(tmp_path / "runs/scaled")
    assert config.latent_norm == "match_embedding"
    row = torch.tensor([[7, 8, 9, ids.start, ids.latent, ids.latent, ids.end, 5]])
    with torch.no_grad():
        fed = model.rollout(row).inputs_embeds_BTD[0, 4:6]
        model.latent_norm = "none"
        plain = model.rollout(row).inputs_embeds_BTD[0, 4:6]
    scale = model.embedding.weight.square().mean().sqrt()
    assert torch.allclose(fed.square().mean(-1).sqrt(), scale.expand(2), rtol=1e-5)
    assert torch.allclose(fed[0] / fed[0].norm(), plain[0] / plain[0].norm(), atol=1e-6), "the direction stays"
    assert plain[0].square().mean().sqrt() > 5 * scale


def test_latent_norm_needs_thoughts_that_are_fed_back(make, capsys):
    assert run.main([make("no", latent_norm="match_embedding", feedback_mode="frozen")]) == 2
    assert "latent_norm" in capsys.readouterr().err
