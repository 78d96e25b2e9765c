"""The parts of the noise command: untrained models, how answers are read, fits, the reader, presets, scripts, the guide."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from analysis import noise
from analysis.noise_asker import last_number, read_untrained, untrained, with_virtual_latents
from analysis.noise_fits import breakdown, fits, in_order, label
from analysis.noise_results import read_results
from analysis.noise_settings import EVERY, SWEEPS, Settings, asks_for_branches, read_settings
from backbones import ThoughtIds

# ---------------------------------------------------------------- untrained models


CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %} is a{% endif %}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Random models as folders: a GPT-2, and a Llama with a chat template."""
    made = {}
    for name in ("gpt2", "llama"):
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "backbones/prosqa_tiny")
        torch.manual_seed(0)
        ends = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.eos_token_id}
        if name == "gpt2":
            model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=512, **ends))
        else:
            sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
            model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=512, tie_word_embeddings=False, **sizes, **ends))
            tokenizer.chat_template = CHAT
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
    return made


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_an_untrained_model_thinks_in_virtual_slots(folders, small_data, name, tmp_path):
    flags = ["--data", small_data / "prosqa_train.json", "--num-questions", "4", "--benchmark", "prosqa", "--device", "cpu"]
    flags += ["--max-new-tokens", "5", "--scales", "0", "5", "--output-dir", tmp_path]
    assert noise.main(["--model", str(folders[name]), *map(str, flags)]) == 0
    result = json.loads((tmp_path / "final_results.json").read_text())
    info = result["experiment_info"]
    assert (info["latent_passes"], info["checkpoint"], info["model"]) == (8, None, str(folders[name]))
    asker = untrained(str(folders[name]), "prosqa", small_data / "prosqa_train.json", 4, device="cpu")
    thoughts, bare, plain = (asker.tokens(form)[0].tolist() for form in ("thoughts", "no_latents", "plain"))
    ids = asker.model
    at = thoughts.index(ids.latent_token_id)
    assert thoughts[at - 1] == ids.start_latent_id and thoughts[at : at + 9] == [ids.latent_token_id] * 8 + [ids.end_latent_id]
    assert [x for x in thoughts if x != ids.latent_token_id] == bare
    assert len(bare) == len(plain) + 2 and (thoughts[-1] == ids.end_latent_id) == (name == "gpt2")
    levels = result["accuracy_by_noise"]
    assert levels["5"]["total"] == 4 and levels["5"]["noise_norm"] == pytest.approx(5 * levels["5"]["thought_norm"], rel=1e-4)


def test_tokens_that_a_model_has_keep_their_rows(folders, tmp_path, small_data):
    asker = untrained(str(folders["gpt2"]), "prosqa", small_data / "prosqa_train.json", 2, device="cpu")
    base, tokenizer = asker.model.base_causallm, asker.tokenizer
    with torch.no_grad():
        base.get_input_embeddings().weight[asker.model.start_latent_id] = 0.5
    base.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = untrained(str(tmp_path), "prosqa", small_data / "prosqa_train.json", 2, device="cpu").model
    assert (again.embedding.weight[again.start_latent_id] == 0.5).all()


def test_virtual_latents_stand_between_adjacent_markers():
    row = {
        "input_ids": [5, 1, 2, 7],
        "attention_mask": [1, 1, 1, 1],
        "labels": [-100, -100, -100, 7],
        "position_ids": [0, 1, 2, 3],
    }
    ids = ThoughtIds(1, 2, 3)
    found = with_virtual_latents(row, ids, 2)
    assert found == {
        "input_ids": [5, 1, 3, 3, 2, 7],
        "attention_mask": [1] * 6,
        "labels": [-100, -100, -100, -100, -100, 7],
        "position_ids": [0, 1, 2, 3, 4, 5],
    }
    for other in ([5, 1, 3, 2, 7], [5, 1, 7, 2], [5, 2, 1]):  # latents of its own, or no adjacent markers
        assert with_virtual_latents({"input_ids": other}, ids, 2)["input_ids"] == other


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 5 + 7 = 12.", "12"),
        ("It is -3.50 now", "-3.50"),
        ("$1,234 in all", "1234"),
        ("10-7", "7"),
        ("a loss of -$20", "-20"),
        ("= .5", ".5"),
        ("none", None),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


def test_answers_of_untrained_models_are_read_by_benchmark():
    row = {"idx_to_symbol": ["Tom", "lempus", "yumpus"], "root": 0, "target": 1, "neg_target": 2}
    assert read_untrained("prosqa", "Tom is a yumpus? No, a Lempus", row) == "Tom is a lempus."
    assert read_untrained("prontoqa", "True or false: FALSE", {}) == "False"
    assert read_untrained("mmlu", "A is wrong, so B.", {}) == "B" and read_untrained("mmlu", "Beta", {}) is None


def test_benchmarks_of_the_hub_need_the_cache(folders, tmp_path, capsys):
    flags = ["--model", str(folders["gpt2"]), "--benchmark", "gsm-symbolic", "--output-dir", str(tmp_path)]
    assert noise.main(flags) == 2
    assert "not in the datasets cache" in capsys.readouterr().err


# ---------------------------------------------------------------- fits, order, reader


def test_fits_find_the_curves_they_are_made_of():
    x = np.array([0, 0.5, 1, 2, 3, 5, 8])
    made = {"exponential": 0.8 * np.exp(-0.4 * x), "hyperbolic": 0.9 / (1 + 0.3 * x**1.5), "linear": 0.8 - 0.05 * x}
    wanted = {
        "exponential": {"a": 0.8, "b": 0.4},
        "hyperbolic": {"a": 0.9, "b": 0.3, "c": 1.5},
        "linear": {"a": 0.8, "b": 0.05},
    }
    for name, y in made.items():
        jitter = 0.002 * np.random.default_rng(0).standard_normal(len(x))
        found = fits(x, y + jitter)[name]
        assert found["r2"] > 0.999, name
        for key, value in wanted[name].items():
            assert abs(found["parameters"][key] - value) < 5 * found["errors"][key] + 1e-3 and found["errors"][key] < 0.1


def test_what_cannot_be_fitted_says_why(monkeypatch):
    assert "points" in fits([0, 1], [0.5, 0.4])["linear"]["reason"]
    assert "equal" in fits([0, 1, 2, 3], [0.5] * 4)["exponential"]["reason"]
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    assert fits([0, 1, 2, 3], [0.5, 0.4, 0.3, 0.1])["linear"]["reason"] == "scipy is not installed"


def test_breakdown_and_labels():
    scales, accuracies = [0, 1, 2, 5], [0.34, 0.3, 0.16, 0.1]
    assert breakdown(scales, accuracies, 0.34) == 2 and breakdown(scales, accuracies, 0.34, absolute=0.5) == 0
    assert breakdown(scales, [0.34, 0.3, 0.3, 0.3], 0.34) is None
    assert [label(x) for x in (0.6, 0.599, 0.2, 0.199)] == ["Good", "Degraded", "Degraded", "Broken"]


def test_snr_is_ordered_by_strength():
    assert in_order("snr", [0.01, 100, 0, 1]) == [0, 100, 1, 0.01] and in_order("gaussian", [5, 0, 1]) == [0, 1, 5]


@pytest.mark.parametrize(("accuracy", "units"), [(0.4, "fraction"), (40.0, "percent")])
def test_the_reader_states_the_units(tmp_path, accuracy, units):
    path = tmp_path / "fork.json"
    levels = {"0.0": {"accuracy": accuracy, "correct": 10, "total": 25}, "5.0": {"accuracy": 0, "correct": 0, "total": 25}}
    path.write_text(json.dumps({"accuracy_by_noise": levels}))
    found = read_results(path)
    assert found["units"] == units and found["accuracy_by_noise"]["0.0"]["accuracy"] == pytest.approx(0.4)
    levels["5.0"]["accuracy"], levels["5.0"]["correct"] = (20.0 if units == "fraction" else 0.2), 5
    path.write_text(json.dumps({"accuracy_by_noise": levels}))
    with pytest.raises(ValueError, match="fractions beside percent"):
        read_results(path)


# ---------------------------------------------------------------- presets and defaults


def test_default_sweeps():
    assert [name for name, _ in Settings(model="x", comprehensive=True).kinds()] == [
        *("gaussian", "gaussian_scaled", "snr", "uniform", "orthogonal", "dropout")
    ]
    settings = Settings(model="x", noise_type=["all"])
    assert settings.kinds() == list(EVERY) and SWEEPS.keys() >= set(EVERY)
    assert settings.scales_of("targeted", "opposite") == [i / 10 for i in range(11)]
    assert settings.scales_of("snr", None) == [0, 100, 50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.01]
    assert settings.output_dir == Path("results/noisy_coconut") and settings.num_questions == 50


@pytest.mark.parametrize(
    ("name", "n", "kinds", "passes", "scales"),
    [
        ("quick", 25, [("gaussian_scaled", None)], "first", [0, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 50]),
        ("types", 50, list(EVERY), "all", None),
        ("gsm", 900, [("gaussian_scaled", None)], "all", [*(i / 10 for i in range(11)), 1.25, 1.5, 1.75, 2, 2.5, 3]),
        ("full", 100, [("gaussian_scaled", None)], "all", [0, 1, 2, 5, 10]),
    ],
)
def test_presets(name, n, kinds, passes, scales):
    settings = read_settings([str(ROOT / f"args/noise_{name}.yaml"), "--model", "x", "--seed", "3"])
    assert (settings.num_questions, settings.kinds(), settings.noise_passes, settings.seed) == (n, kinds, passes, 3)
    assert scales is None or settings.scales_of(*kinds[0]) == pytest.approx(scales)


@pytest.mark.parametrize("name", ["quick", "types", "gsm", "full", "branch", "ablation"])
def test_presets_about_branches_are_handed_on(name):
    assert asks_for_branches([str(ROOT / f"args/noise_{name}.yaml"), "--model", "x"]) == (name in ("branch", "ablation"))


def test_the_scripts_are_fronts_of_the_command(tmp_path):
    """Their arguments arrive as they are, from any folder."""
    shown = tmp_path / "show"
    shown.write_text('#!/usr/bin/env bash\npwd\nprintf "%s\\n" "$@"\n')
    shown.chmod(0o755)
    folder, quick = "runs/a 'quoted' name", ["analysis/noise.py", "args/noise_quick.yaml"]
    for script, given, passed in (
        ("run_experiment.sh", ["--checkpoint", folder], ["analysis/noise.py", "--checkpoint", folder]),
        ("run_experiment.sh", [], ["analysis/noise.py", "--help"]),
        ("run_simple_experiment.sh", [folder, "--seed", "1"], [*quick, "--checkpoint", folder, "--seed", "1"]),
        ("run_simple_experiment.sh", ["--model", "x y"], [*quick, "--model", "x y"]),
        ("run_simple_experiment.sh", [], [*quick, "--help"]),
    ):
        environment = os.environ | {"PYTHON": str(shown)}
        command = ["bash", str(ROOT / "scripts" / script), *given]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines() == [str(ROOT), *passed]


def test_the_guide_names_every_type_and_its_picture():
    text = (ROOT / "analysis/NOISE_TYPES_GUIDE.md").read_text()
    for kind in EVERY:
        picture = f"noise_types/{'_'.join(filter(None, kind))}.svg"
        assert picture in text and (ROOT / "analysis" / picture).read_text().startswith("<?xml")
    assert "python -m analysis.noise_pictures" in text
