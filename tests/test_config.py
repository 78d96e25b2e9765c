"""Configs that load: methods and modes, spellings, overrides, defaults, the stock files and our own."""

from pathlib import Path

import pytest
import yaml
from config_material import MINIMAL, config_of, errors
from conftest import ROOT

from utils import check_config, load_config

STOCK = """
project: coconut
save_path: YOUR_PATH_TO_SAVE_THE_MODEL
name: {name}
only_eval: {only_eval}
coconut: {coconut}
cot: {cot}
no_thoughts: False
no_cot: False
c_thought: {c_thought}
epochs_per_stage: {epochs_per_stage}
max_latent_stage: {max_latent_stage}
pad_latent_to_max: True
save_only_improve: {cot}
uniform_prob: 0.0
model_id: openai-community/gpt2
load_model_path: {load}
seed: 0
resume: {resume}
bf16: False
train_path: data/{data}_train.json
val_path: data/{data}_valid.json
reset_optimizer: {coconut}
batch_size_training: 32
debug: False
gradient_accumulation_steps: 1
num_epochs: {num_epochs}
lr: !!float "1e-4"
weight_decay: 0.01
"""
PROSQA = {"data": "prosqa", "c_thought": 1, "epochs_per_stage": 5, "max_latent_stage": 6}
GSM = {"data": "gsm", "c_thought": 2, "epochs_per_stage": 3, "max_latent_stage": 3}
STOCK_FORMS = {
    "prosqa-coconut": PROSQA | {"coconut": True, "cot": False, "load": None, "resume": 0, "num_epochs": 50},
    "gsm-cot": GSM | {"coconut": False, "cot": True, "load": None, "resume": 0, "num_epochs": 25},
    "gsm-coconut": GSM
    | {"coconut": True, "cot": False, "load": "YOUR_PATH_TO_COT_CHECKPOINT", "resume": 3, "num_epochs": 25},
    "gsm-coconut-eval": GSM
    | {"coconut": True, "cot": False, "load": "YOUR_PATH_TO_COCONUT_CHECKPOINT", "resume": 12, "num_epochs": 25},
}  # fmt: skip


def stock_text(name: str) -> str:
    return STOCK.format(name=name, only_eval=name.endswith("eval"), **STOCK_FORMS[name])


# ---------------------------------------------------------------------------------------------------- method and mode

FLAGS = ("coconut", "cot", "no_thoughts", "no_cot")


@pytest.mark.parametrize(
    "on, plain, markers, key",
    [
        (["coconut"], False, True, "m3"),
        (["cot"], True, False, "m1"),
        (["no_cot"], True, False, "m2"),
        (["no_thoughts"], True, False, "m0"),
        (["coconut", "no_thoughts"], True, False, "m0"),
        ([], True, True, "custom"),
    ],
)
def test_method_table(tmp_path, on, plain, markers, key):
    values = {k: v for k, v in MINIMAL.items() if k != "coconut"}
    config = config_of(tmp_path, values | {flag: flag in on for flag in FLAGS})
    assert (config.plain, config.markers, config.model_key) == (plain, markers, key)


@pytest.mark.parametrize(
    "on",
    [("coconut", "cot"), ("coconut", "no_cot"), ("cot", "no_cot"), ("cot", "no_thoughts"), ("no_thoughts", "no_cot"),
     ("coconut", "cot", "no_thoughts"), FLAGS],
)  # fmt: skip
def test_contradicting_flags(tmp_path, on):
    values = {k: v for k, v in MINIMAL.items() if k != "coconut"}
    assert f"{' and '.join(on)} contradict" in errors(tmp_path, values | dict.fromkeys(on, True))


def test_a_method_must_be_given_and_all_false_written_out(tmp_path):
    values = {k: v for k, v in MINIMAL.items() if k != "coconut"}
    assert "at least one of coconut, cot, no_thoughts, no_cot" in errors(tmp_path, values)
    assert "nothing is True" in errors(tmp_path, values | {"coconut": False})
    assert "nothing is True" in errors(tmp_path, values | {"coconut": False, "cot": False, "no_cot": False})


def test_another_problem_does_not_add_a_false_one_about_the_method(tmp_path):
    assert "method" not in errors(tmp_path, MINIMAL | {"coconut": "true", "num_epochs": 0})


@pytest.mark.parametrize(
    "mode, key", [("continuous", "m3"), ("frozen", "m4"), ("learned_shared", "m4b"), ("pause_curriculum", "m5")]
)
def test_feedback_mode_and_model_key(tmp_path, mode, key):
    config = config_of(tmp_path, MINIMAL | {"feedback_mode": mode})
    assert (config.feedback_mode, config.model_key) == (mode, key)


def test_synonym_is_stored_canonically(tmp_path):
    config = config_of(tmp_path, MINIMAL | {"feedback_mode": "pause_multipass"})
    assert (config.feedback_mode, config.model_key) == ("learned_shared", "m4b")
    assert config.model_dump()["feedback_mode"] == "learned_shared"


def test_unknown_mode_lists_the_known_ones(tmp_path):
    message = errors(tmp_path, MINIMAL | {"feedback_mode": "learned"})
    for mode in ("continuous", "frozen", "learned_shared", "pause_curriculum"):
        assert mode in message
    assert "is unknown" in errors(tmp_path, MINIMAL | {"feedback_mode": "none"}), "the wrapper's own name is no mode"


@pytest.mark.parametrize(
    "method", [{"cot": True}, {"no_cot": True}, {"coconut": True, "no_thoughts": True}, dict.fromkeys(FLAGS, False)]
)
def test_a_pause_mode_needs_coconut(tmp_path, method):
    values = {k: v for k, v in MINIMAL.items() if k != "coconut"} | method | {"feedback_mode": "frozen"}
    assert "feedback_mode: frozen needs coconut: True" in errors(tmp_path, values)


def test_no_thoughts_has_no_thoughts(tmp_path):
    assert config_of(tmp_path, MINIMAL | {"no_thoughts": True, "c_thought": 2}).c_thought == 0
    assert config_of(tmp_path, MINIMAL | {"c_thought": 2}).c_thought == 2


def test_stage():
    def stages(**method):
        config = check_config(MINIMAL | {"name": "x", "epochs_per_stage": 5} | method, "test")
        return [config.stage(epoch) for epoch in (0, 4, 5, 34, 49)]

    assert stages() == [0, 0, 1, 6, 9]
    assert stages(coconut=False, no_thoughts=True) == [0, 0, 1, 6, 9]
    assert stages(coconut=False, cot=True) == stages(coconut=False, no_cot=True) == [0] * 5


# ---------------------------------------------------------------------------------------------------- what is accepted


@pytest.mark.parametrize("spelling", ["1e-4", '"1e-4"', '!!float "1e-4"', "0.0001", "1.0e-4"])
def test_spellings_of_a_rate(tmp_path, spelling):
    assert config_of(tmp_path, yaml.safe_dump(MINIMAL) + f"lr: {spelling}\n").lr == 1e-4


@pytest.mark.parametrize("spelling", ["None", "null", "~", "", '""', '"None"'])
def test_spellings_of_no_checkpoint(tmp_path, spelling):
    assert config_of(tmp_path, yaml.safe_dump(MINIMAL) + f"load_model_path: {spelling}\n").load_model_path is None


def test_a_checkpoint_path_stays(tmp_path):
    assert config_of(tmp_path, MINIMAL | {"load_model_path": "runs/a/checkpoint_3"}).load_model_path == "runs/a/checkpoint_3"


def test_overrides_are_yaml_values(tmp_path):
    given = [
        "lr=3e-4",
        "num_epochs=10",
        "debug=true",
        "name=other",
        "load_model_path=None",
        "bf16=pure",
        "reset_optimizer=stage",
    ]
    config = config_of(tmp_path, MINIMAL, *given)
    assert (config.lr, config.num_epochs, config.debug, config.name, config.load_model_path) == (
        3e-4,
        10,
        True,
        "other",
        None,
    )
    assert (config.bf16, config.reset_optimizer) == ("pure", "stage")
    assert config_of(tmp_path, MINIMAL, "val_path=a=b.json").val_path == "a=b.json", "only the first = parts key and value"


@pytest.mark.parametrize(
    "override, complaint",
    [("lr", "must have the form key=value"), ("nm_epochs=3", "did you mean num_epochs?"),
     ("num_epochs=x", "num_epochs"), ("name=[a", "name"), ("=3", "unknown key")],
)  # fmt: skip
def test_bad_overrides(tmp_path, override, complaint):
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(ValueError) as refused:
        load_config(path, [override])
    assert complaint in str(refused.value)


def test_learning_rate_is_an_alias(tmp_path):
    assert config_of(tmp_path, MINIMAL | {"learning_rate": "2e-3"}).lr == 2e-3
    assert config_of(tmp_path, MINIMAL, "learning_rate=2e-3").lr == 2e-3


@pytest.mark.parametrize("key", ["only_eval", "bf16", "reset_optimizer", "two_choice", "wandb", "save_only_improve"])
def test_words_parse_as_written(tmp_path, key):
    method = {"coconut": "True", "cot": "false"}
    assert getattr(config_of(tmp_path, MINIMAL | method | {key: "False"}), key) is False
    assert getattr(config_of(tmp_path, MINIMAL | method | {key: "true"}), key) is True


def test_name_defaults_to_the_file_stem(tmp_path):
    config = config_of(tmp_path, MINIMAL, file="prosqa_m3.yaml")
    assert config.name == "prosqa_m3" and config.run_dir == Path("out/prosqa_m3")
    assert config_of(tmp_path, MINIMAL | {"name": 7}).name == "7"


def test_defaults(tmp_path):
    config = config_of(tmp_path, MINIMAL)
    defaults = {
        "project": "coconut", "only_eval": False, "cot": False, "c_thought": 1, "epochs_per_stage": 1,
        "max_latent_stage": 0, "pad_latent_to_max": True, "save_only_improve": False, "uniform_prob": 0,
        "model_id": "openai-community/gpt2", "load_model_path": None, "seed": 0, "resume": 0, "bf16": False,
        "reset_optimizer": False, "batch_size_training": 32,
        "gradient_accumulation_steps": 1, "num_epochs": 25, "lr": 1e-4, "weight_decay": 0.01, "debug": False,
        "feedback_mode": "continuous", "from_scratch": False, "auto_resume": True, "accumulation_norm": "stock",
        "gradient_clip": None, "early_stop_patience": None, "use_lr_scheduler": False, "force_multipass": False,
    }  # fmt: skip
    assert {key: getattr(config, key) for key in defaults} == defaults


@pytest.mark.parametrize("name", STOCK_FORMS)
def test_stock_files_load_once_placeholders_are_replaced(tmp_path, name):
    text = stock_text(name)
    message = errors(tmp_path, text)
    assert "save_path: replace the placeholder" in message
    assert ("load_model_path: replace" in message) == (STOCK_FORMS[name]["load"] is not None)
    assert "unknown" not in message and message.count(";") <= 1, "nothing else is wrong with it"
    for word in ("YOUR_PATH_TO_SAVE_THE_MODEL", "YOUR_PATH_TO_COT_CHECKPOINT", "YOUR_PATH_TO_COCONUT_CHECKPOINT"):
        text = text.replace(word, "elsewhere")
    config = config_of(tmp_path, text)
    assert (config.lr, config.name) == (1e-4, name)
    assert config.load_model_path == (None if STOCK_FORMS[name]["load"] is None else "elsewhere")
    for key, value in yaml.safe_load(text).items():
        assert key == "load_model_path" or getattr(config, key) == value


OTHERS = ("study", "lahr_factorial", "noise", "ablations")  # files of other commands
RUN_CONFIGS = sorted(p for p in (ROOT / "args").glob("*.yaml") if not p.name.startswith(OTHERS))


@pytest.mark.parametrize("path", RUN_CONFIGS, ids=lambda p: p.stem)
def test_every_config_of_the_repository_loads(path, tmp_path):
    text = path.read_text()
    for word in ("YOUR_PATH_TO_SAVE_THE_MODEL", "YOUR_PATH_TO_COT_CHECKPOINT", "YOUR_PATH_TO_COCONUT_CHECKPOINT"):
        text = text.replace(word, "elsewhere")
    config = config_of(tmp_path, text, file=path.name)
    assert config.only_eval or config.resume < config.num_epochs


def test_a_resolved_config_loads_again(tmp_path):
    config = config_of(tmp_path, MINIMAL | {"feedback_mode": "pause_multipass", "load_model_path": "None", "bf16": "pure"})
    assert check_config(config.model_dump(), "again") == config


def test_a_backbone_without_a_folder_needs_a_tokenizer_and_no_weights(tmp_path):
    values = {"name": "x", "save_path": str(tmp_path), "train_path": "t", "val_path": "v", "cot": True, "model_id": "lahr"}
    with pytest.raises(ValueError, match="model_id: lahr has no weights of its own.*tokenizer: missing; lahr has none"):
        check_config(values | {"tokenizer": "None"}, "test")
    config = check_config(values | {"tokenizer": "folder", "from_scratch": True, "model_config": {"size": "tiny"}}, "test")
    assert config.tokenizer_id == "folder" and config.model_options == {"size": "tiny"}
    assert check_config(config.model_dump(), "run.json") == config, "what run.json says must be read again"
