"""Recorded numbers: the stock code on a tiny GPT-2, and tiny models of every family, against silent drift of a library."""

import json

import pytest
import torch
from golden import families
from golden.drift import HERE, difference, read_record, report

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


# ---------------------------------------------------------------- tiny models of every family

NAMES = [*families.FAMILIES, *families.FOLDERS]
KNOWN = [name for name in families.FAMILIES if families.left_out(name) is None]


@pytest.mark.parametrize("name", NAMES)
def test_numbers_have_not_drifted(name):
    """Parameter names, initialisation, logits, greedy tokens, loss curves are as recorded, or the message says what moved."""
    if name in families.FAMILIES and name not in KNOWN:
        pytest.skip(families.left_out(name))
    record = read_record(name)
    assert record, f"nothing is recorded of {name}: python tests/golden/make.py --only {name}"
    moved = report(name, record, families.measure(name, salt=record.get("salt", 0)))
    assert moved is None, moved


@pytest.mark.parametrize("name", KNOWN)
def test_recorded_tokens_are_clear(name):
    """No rounding can choose another token: the smallest margin is far above it, and is that of the recorded tokens."""
    record = read_record(name)
    margin = families.smallest_margin(families.build_family(name, record["salt"]), record["tokens"])
    assert margin == pytest.approx(record["margin"], abs=1e-4) and record["margin"] > families.MARGIN


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_recorded_is_right(name):
    """Batched logits behind filled thoughts are those of whole passes over single rows, without padding and cache."""
    base = families.build_family(name, read_record(name)["salt"]).double()
    for mode in families.MODES["logits"]:
        slow, fast = families.slow_logits(base, mode), families.logits(base, mode)
        assert difference("logits", slow, fast, 1e-6) is None, mode


def test_every_record_is_compared():
    recorded = {path.stem for path in HERE.glob("*.json")}
    assert recorded <= {*NAMES, "losses"} and len(recorded) >= 9
