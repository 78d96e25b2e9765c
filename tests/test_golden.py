"""Recorded numbers: the stock code on a tiny GPT-2, and a model made by formula, against silent drift of a library."""

import json

import pytest
import torch
from tiny import EOS, build, wrap

from backbones import add_thought_tokens, grow_vocabulary, load_backbone, load_tokenizer
from coconut import Coconut
from dataset import MyCollator


@pytest.fixture(scope="module")
def golden(shared_data):
    """The records and the model they are of: three tokens added, the row of `<<` copied into theirs; its tokenizer."""
    folder = shared_data / "golden_stock"
    records = json.loads((folder / "coconut_cases.json").read_text())
    tokenizer, base = load_tokenizer(str(folder / "tiny_gpt2")), load_backbone(str(folder / "tiny_gpt2"))
    ids = add_thought_tokens(tokenizer)
    grow_vocabulary(base, tokenizer, ids)
    assert ids._asdict() == records["special"]
    return records, Coconut(base.eval(), ids.latent, ids.start, ids.end, tokenizer.eos_token_id), tokenizer


def test_state_dict_equals_that_of_stock(golden):
    records, model, _ = golden
    ours = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert list(ours.items()) == list(records["keys"].items())


@pytest.mark.parametrize("number", range(6))
def test_loss_and_gradients_equal_those_of_stock(golden, number):
    records, model, _ = golden
    case, expected = records["cases"][number], records["cases"][number]["grad_norms"]
    batch = {key: torch.tensor(case[key]) for key in ("input_ids", "attention_mask", "position_ids", "labels")}
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], abs=1e-5)
    named = dict(model.named_parameters())
    norms = {name: named[name].grad.norm().item() for name in expected}
    assert norms == pytest.approx(expected, rel=1e-4) and len(norms) == 15


def test_all_cases_are_compared(golden):
    assert len(golden[0]["cases"]) == 6 and len(golden[0]["generate"]) == 12


def upto(tokens: list[int], eos: int) -> list[int]:
    return tokens[: tokens.index(eos)] if eos in tokens else tokens


def test_generated_tokens_equal_those_of_stock(golden):
    records, model, _ = golden
    for case in records["generate"]:
        ids = model.generate(torch.tensor([case["prompt"]]), max_new_tokens=12)[0].tolist()
        new = ids[len(case["prompt"]) :]
        assert upto(new, records["eos"]) == upto(case["new_tokens"], records["eos"])


@pytest.mark.parametrize("stage", [0, 3, 6])
def test_batched_generation_equals_stock(golden, stage):
    records, model, tokenizer = golden
    cases = [case for case in records["generate"] if case["stage"] == stage]
    rows = [{"input_ids": case["prompt"], "idx": i} for i, case in enumerate(cases)]
    for left in (False, True):
        batch = MyCollator(tokenizer, records["special"]["latent"], left=left)(rows)
        batch.pop("idx")
        new = model.generate(**batch, max_new_tokens=12)[:, batch["input_ids"].shape[1] :].tolist()
        for row, case in zip(new, cases):
            assert upto(row, records["eos"]) == upto(case["new_tokens"], records["eos"])


# ---------------------------------------------------------------- a model by formula

# Logits of tokens 0, 7, 31 and 58 in the last column of both rows, float64; equal to the slow oracle when recorded.
RECORDED = {
    ("gpt2", "continuous"): [
        [1.968731059531, -0.844899563286, 0.413613586807, 1.602674051343],
        [1.304695040456, -0.904244531133, -0.072084282633, 0.880879510807],
    ],
    ("gpt2", "learned_shared"): [
        [1.830071550601, -0.874027610380, 0.295366651690, 1.443145159991],
        [1.264503605019, -0.901854450414, -0.095467191685, 0.840340673179],
    ],
    ("llama", "continuous"): [
        [-0.317315071285, 0.390646442547, 0.189182469937, -0.124381525657],
        [-0.002423794206, 0.365914284391, 0.366343586598, 0.190070244074],
    ],
    ("llama", "learned_shared"): [
        [-0.137558302884, 0.264595648192, 0.177776135802, -0.003788760111],
        [-0.276898664105, 0.697525473849, 0.523655996675, 0.079168194085],
    ],
}


def by_formula(family):
    """A model whose weights come from sines, so that no random generator's version matters."""
    base = build(family)
    with torch.no_grad():
        for i, parameter in enumerate(base.parameters()):
            wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * 1.7 + i)
            parameter.copy_(wave.view_as(parameter) * 0.5 + (parameter.ndim == 1) * 0.5)
    return base


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("mode", ["continuous", "learned_shared"])
def test_logits_have_not_drifted(mode, family):
    ids = torch.tensor([[5, 9, 56, 58, 58, 58, 57, 11, 3], [EOS, 8, 56, 58, 57, 21, 40, 2, 30]])
    mask = torch.ones_like(ids)
    mask[1, 0] = 0
    logits = wrap(by_formula(family), mode)(ids, mask).logits[:, -1, [0, 7, 31, 58]]
    # The library computes rotary angles in float32, which not all CPUs round alike.
    tolerance = 1e-9 if family == "gpt2" else 1e-6
    expected = torch.tensor(RECORDED[family, mode], dtype=torch.float64)
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)
