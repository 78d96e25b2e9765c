"""The guard against drift: numbers that moved are noticed, and the message names the library that may have moved them."""

import copy
import json
import sys

import golden.families
import pytest
import torch
from golden.drift import as_text, difference, made_with, read_record, report
from golden.families import FAMILIES, PARTS, left_out, measure

import coconut

BEFORE = {"torch": "2.13.0+cpu", "transformers": "5.23.0", "tokenizers": "0.23.3", "numpy": "2.4.6", "python": "3.11.7"}
BEFORE |= {"machine": "x86_64 AVX2"}
NEWER = {"transformers": "5.24.0"}
RECORD = {"made_with": BEFORE, "logits": [[0.5, -0.25], [1.0, 2.0]], "tokens": [[3, 4], [5, 59]], "losses": [2.0, 1.5]}
MEASURED = {part: RECORD[part] for part in ("logits", "tokens", "losses")}


def moved(changes=None, now=None, name="llama") -> str | None:
    """The report where `changes` were measured instead, under versions that differ by `now`."""
    return report(name, RECORD, MEASURED | (changes or {}), BEFORE | (now or {}))


# ---------------------------------------------------------------- what the message says


def test_equal_numbers_are_fine_whatever_changed():
    assert moved() is None and moved(now=NEWER | {"machine": "aarch64 DEFAULT"}) is None
    assert moved({"losses": [2.00005, 1.49995], "logits": [[0.5000005, -0.25], [1.0, 2.0]]}, NEWER) is None


def test_the_library_that_changed_is_named_with_what_moved():
    text = moved({"logits": [[0.5, -0.25], [1.031, 2.0]]}, NEWER)
    start = "llama: logits moved by 3.1e-02 (tolerance 1e-06) at 1/0: 1 recorded, 1.031 now; changed since they were recorded: "
    assert text.startswith(start + "transformers 5.23.0 -> 5.24.0 (torch 2.13.0+cpu, tokenizers 0.23.3, numpy 2.4.6, ")
    assert "to find which" not in text and text.endswith("python tests/golden/make.py --only llama")


def test_two_that_changed_are_both_named_and_how_to_find_which():
    text = moved({"losses": [2.0, 1.6]}, NEWER | {"torch": "2.14.0+cu130"})
    assert "torch 2.13.0+cpu -> 2.14.0+cu130, transformers 5.23.0 -> 5.24.0 (tokenizers" in text
    finder = "scripts/test_matrix.sh --torch 2.13.0,2.14.0 --transformers 5.23.0,5.24.0 tests/test_golden.py"
    assert f"to find which: bash {finder}" in text
    others = moved({"losses": [2.0, 1.6]}, {"numpy": "2.5.0", "python": "3.12.1"})
    assert "numpy 2.4.6 -> 2.5.0, python 3.11.7 -> 3.12.1 (torch" in others and "test_matrix" not in others


def test_without_a_changed_library_the_code_is_named():
    text = moved({"losses": [2.0, 1.501]})
    assert "losses moved by 1.0e-03 (tolerance 1e-04) at 1" in text
    assert "no library changed since they were recorded (torch 2.13.0+cpu, " in text and "this code changed them;" in text


def test_another_machine_is_named():
    text = moved({"losses": [2.0, 1.501]}, {"machine": "aarch64 DEFAULT"})
    assert "this code or the machine changed them; recorded on x86_64 AVX2, this is aarch64 DEFAULT" in text
    assert "recorded on x86_64 AVX2" in moved({"losses": [2.0, 1.501]}, NEWER | {"machine": "aarch64 DEFAULT"})


def test_all_parts_that_moved_are_listed_and_tokens_are_exact():
    text = moved({"losses": [2.0, 1.6], "tokens": [[3, 4], [6, 59]]}, NEWER)
    assert "tokens: 1 of 4 entries differ, first 1/0: 5 recorded, 6 now" in text and "losses moved by 1.0e-01" in text


@pytest.mark.parametrize("value", [[2.0], [2.0, 1.5, 1.0], [[2.0], 1.5], [2.0, None], [2.0, "1.5"], {"0": 2.0}, []])
def test_other_entries_are_noticed(value):
    assert "losses" in moved({"losses": value})


def test_nan_never_passes_and_comes_first():
    assert "losses moved by nan (tolerance 1e-04) at 0" in moved({"losses": [float("nan"), 9.0]})


def test_what_is_not_recorded_does_not_pass():
    assert "init has other entries" in moved({"init": {"a": [0.0, 1.0]}})


def test_gpt2_is_held_to_float64():
    nearly = {"logits": [[0.5 + 1e-8, -0.25], [1.0, 2.0]]}
    assert moved(nearly) is None and "(tolerance 1e-09)" in moved(nearly, name="gpt2")


def test_versions_are_those_running():
    now = made_with()
    assert now["torch"] == torch.__version__ and now["python"] == sys.version.split()[0] and now.keys() == BEFORE.keys()
    assert now["transformers"] == sys.modules["transformers"].__version__


def test_records_are_json_with_numbers_in_lines():
    text = as_text(RECORD)
    assert json.loads(text) == RECORD and "\n  [0.5, -0.25],\n" in text and text.endswith("\n")


# ---------------------------------------------------------------- real records, real models


@pytest.fixture(scope="module")
def llama():
    """What this machine measures of Llama."""
    return measure("llama", salt=read_record("llama")["salt"])


@pytest.mark.parametrize("part", PARTS)
def test_a_record_off_by_a_thousandth_fails_and_names_the_library(llama, part):
    record = copy.deepcopy(read_record("llama"))
    record["made_with"] = made_with() | {"transformers": "5.0.0"}
    assert report("llama", record, llama) is None
    leaf = record[part]
    while not isinstance(leaf, list) or isinstance(leaf[0], list):
        leaf = list(leaf.values())[-1] if isinstance(leaf, dict) else leaf[-1]
    leaf[-1] += 1e-3
    text = report("llama", record, llama)
    assert text.startswith(f"llama: {part}") and f"transformers 5.0.0 -> {made_with()['transformers']}" in text
    assert text.count("moved by") + text.count("entries differ") == 1


CHANGES = [
    ("gpt2", "logits", {"activation_function": "gelu"}),
    ("gpt2", "logits", {"layer_norm_epsilon": 1e-6}),
    ("gpt2", "logits", {"scale_attn_weights": False}),
    ("gpt2", "init", {"initializer_range": 0.021}),
    ("llama", "logits", {"hidden_act": "gelu"}),
    ("llama", "logits", {"rms_norm_eps": 1e-6}),
    ("llama", "logits_float32", {"rope_theta": 10500.0}),
    ("llama", "parameters", {"attention_bias": True}),
    ("llama3", "logits_float32", {"rope_scaling": None}),
    ("llama3", "logits_float32", {"rope_scaling": FAMILIES["llama3"]["rope_scaling"] | {"factor": 4.0}}),
    ("llama3", "parameters", {"tie_word_embeddings": False}),
    ("qwen2", "tokens", {"rope_theta": 10000.0}),
    ("qwen2", "logits_float32", {"use_sliding_window": True, "max_window_layers": 0}),
    ("qwen3", "logits", {"rms_norm_eps": 1e-5}),
    ("qwen3", "losses", {"rope_theta": 10000.0}),
    ("mistral", "logits_float32", {"sliding_window": None}),
    ("mistral", "logits_float32", {"sliding_window": 25}),
]


@pytest.mark.parametrize("name, part, changes", CHANGES, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_another_computation_is_noticed(name, part, changes):
    """What a library might change under a published config: each of these changes alone fails against the record."""
    record = read_record(name)
    text = report(name, record, measure(name, [part], record["salt"], **changes))
    assert text is not None and text.startswith(f"{name}: {part}"), text


def numbers_now(name: str, part: str) -> str | None:
    record = read_record(name)
    return report(name, record, measure(name, [part], record["salt"]))


@pytest.mark.parametrize("part", ["logits_float32", "tokens", "losses"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_mask_that_is_ignored_is_noticed(name, part, monkeypatch):
    monkeypatch.setattr(coconut, "visible", lambda base, mask_BT, start=0: None)
    assert numbers_now(name, part) is not None


def test_positions_that_count_padding_are_noticed(monkeypatch):
    """Only where positions are absolute: rotary angles depend on differences."""
    columns = lambda self, plan, input_ids, *_: torch.arange(input_ids.shape[1])[None]  # noqa: E731
    monkeypatch.setattr(coconut.Coconut, "_positions", columns)
    assert numbers_now("gpt2", "logits_float32") is not None and numbers_now("gpt2", "tokens") is not None


def test_another_default_of_the_optimizer_is_noticed(monkeypatch):
    def with_other_eps(model, config):
        optimizer = build(model, config)
        for group in optimizer.param_groups:
            group["eps"] = 1e-6
        return optimizer

    build = golden.families.build_optimizer
    assert numbers_now("qwen3", "losses") is None
    monkeypatch.setattr(golden.families, "build_optimizer", with_other_eps)
    assert numbers_now("qwen3", "losses") is not None


def test_another_random_stream_is_noticed_in_the_initialisation(monkeypatch):
    record = read_record("prosqa_tiny")
    assert report("prosqa_tiny", record, measure("prosqa_tiny")) is None
    monkeypatch.setattr(torch, "manual_seed", lambda seed, real=torch.manual_seed: real(seed + 1))
    assert "init moved by" in report("prosqa_tiny", record, measure("prosqa_tiny"))


# ---------------------------------------------------------------- recording


def test_a_family_unknown_to_the_library_is_left_out(monkeypatch):
    monkeypatch.setitem(FAMILIES, "new", {"model_type": "no-such-model"})
    assert left_out("new") == "new: model_type 'no-such-model' is not registered with transformers"
    assert left_out("llama") is None


def test_recording_again_gives_the_same_records(tmp_path, monkeypatch, capsys):
    from golden import drift, make

    committed = {name: read_record(name) for name in ("mistral", "prosqa_words")}
    monkeypatch.setitem(FAMILIES, "new", {"model_type": "no-such-model"})
    monkeypatch.setattr(make, "HERE", tmp_path)
    monkeypatch.setattr(drift, "HERE", tmp_path)
    for expected in ("first record: mistral", "mistral: as recorded before"):
        make.main(["--only", "mistral", "prosqa_words", "new"])
        said = capsys.readouterr().out
        assert expected in said and "left out: new: model_type 'no-such-model'" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mistral.json", "prosqa_words.json"]
    for name, record in committed.items():
        again = json.loads((tmp_path / f"{name}.json").read_text())
        assert again["made_with"] == made_with() and again.keys() == record.keys() and again.get("salt") == record.get("salt")
        for part in set(PARTS) & again.keys():
            assert difference(part, record[part], again[part], 1e-4) is None
