"""The configs of Table 1: the stock values, one file a row, names that do not collide, token layouts, two updates of each."""

import json
import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

import backbones
import run
from analysis.evaluations import COUNTED, CURRICULUM, ROWS, is_last_stage, row_of
from analysis.gsm_recipe import OTHER_NAMES
from analysis.table1 import PAPER
from config_rules import METHOD_FLAGS
from dataset import get_cot_latent_dataset, get_question_latent_dataset
from tokens import TokenTable, get_dataset
from utils import Config, load_config

ARGS, TASKS, STAND_IN = ROOT / "args", ("gsm", "prontoqa", "prosqa"), "arith_gsm"
CHARACTERS = str(ROOT / "backbones/characters")
STOCK_KEYS = ("coconut", "cot", "c_thought", "epochs_per_stage", "max_latent_stage", "resume", "num_epochs", "load_model_path")
STOCK_KEYS += ("save_only_improve", "reset_optimizer", "val_path", "only_eval", "name")
COT_FILE, COCONUT_FILE = "YOUR_PATH_TO_COT_CHECKPOINT", "YOUR_PATH_TO_COCONUT_CHECKPOINT"
LOGIC = (True, False, 1, 5, 6)
STOCK = {  # the seven files of facebookresearch/coconut, under STOCK_KEYS
    "gsm_cot": (False, True, 0, 1, 0, 0, 25, "None", True, False, "gsm_valid", False, "gsm-cot"),
    "gsm_coconut": (True, False, 2, 3, 3, 3, 25, COT_FILE, False, True, "gsm_valid", False, "gsm-coconut"),
    "gsm_coconut_eval": (True, False, 2, 3, 3, 15, 25, COCONUT_FILE, False, True, "gsm_test", True, "gsm-coconut-eval"),
    "prontoqa_coconut": (*LOGIC, 0, 50, "None", False, True, "prontoqa_valid", False, "prontoqa-coconut"),
    "prontoqa_coconut_eval": (*LOGIC, 40, 50, COCONUT_FILE, False, True, "prontoqa_test", True, "prontoqa-coconut"),
    "prosqa_coconut": (*LOGIC, 0, 50, "None", False, True, "prosqa_valid", False, "prosqa-coconut"),
    "prosqa_coconut_eval": (*LOGIC, 40, 50, COCONUT_FILE, False, True, "prosqa_test", True, "prosqa-coconut"),
}


def stem(task: str, row: str) -> str:
    return OTHER_NAMES.get(f"{task}_{row}", f"{task}_{row}")


def raw(name: str) -> dict:
    return yaml.safe_load((ARGS / f"{name}.yaml").read_text())


def load(name: str, *overrides: str) -> Config:
    """A config of args/, its placeholders filled."""
    placeholders = [f"{key}=filled" for key, value in raw(name).items() if str(value).startswith("YOUR_PATH")]
    return load_config(ARGS / f"{name}.yaml", [*placeholders, *overrides])


def of_tasks(*tasks: str) -> list[str]:
    """Every config of some tasks, but for the other experiments of ProsQA."""
    files = [p.stem for task in tasks for p in ARGS.glob(f"{task}_*.yaml")]
    other = re.compile(r"prosqa_(m[345].*|llama8b_fsdp2)")
    return sorted({name for name in files if not other.fullmatch(name)})


# ---------------------------------------------------------------- files and values


@pytest.mark.parametrize("name", STOCK)
def test_stock_files_hold_the_stock_values(name):
    values = raw(name)
    expected = dict(zip(STOCK_KEYS, STOCK[name]))
    expected["val_path"] = f"data/{expected['val_path']}.json"
    assert {key: values[key] for key in STOCK_KEYS} == expected
    common = {
        "model_id": "openai-community/gpt2",
        "seed": 0,
        "bf16": False,
        "batch_size_training": 32,
        "lr": 1e-4,
        "debug": False,
    }
    common |= {"gradient_accumulation_steps": 1, "weight_decay": 0.01, "uniform_prob": 0.0, "pad_latent_to_max": True}
    common |= {"project": "coconut", "save_path": "YOUR_PATH_TO_SAVE_THE_MODEL", "no_thoughts": False, "no_cot": False}
    assert {key: values[key] for key in common} == common
    assert values["train_path"] == f"data/{name.split('_')[0]}_train.json"
    assert values.keys() == common.keys() | expected.keys() | {"train_path"}, "stock reads these keys and no other"


@pytest.mark.parametrize("task", [*TASKS, STAND_IN])
@pytest.mark.parametrize("row", ROWS)
def test_each_row_has_a_file_that_is_that_row_and_a_partner_for_its_test(task, row):
    train, test = load(stem(task, row)), load(f"{stem(task, row)}_eval")
    assert row_of(train) == row_of(test) == row
    assert not train.only_eval and test.only_eval
    assert (train.val_path, test.val_path) == (f"data/{task}_valid.json", f"data/{task}_test.json")
    free = {"name", "only_eval", "save_path", "load_model_path", "resume", "val_path", "effective_batch_size"}
    assert test.model_dump(exclude=free) == train.model_dump(exclude=free)
    latents = train.max_latent_stage * train.c_thought if train.markers else 0
    assert latents == (6 if row in (*COUNTED, "pause_token", "pause_as_thought") else 0)
    if row in (*COUNTED, *CURRICULUM, "icot", "pause_token"):
        assert is_last_stage(test, test.resume), "`resume` of the evaluation must give the last stage's latents"


BASES = {task: raw(f"{task}_coconut") for task in TASKS}
FLAG_OF = {"cot": "cot", "no_cot": "no_cot", "icot": "cot", "wo_curriculum": "coconut", "wo_thought": "no_thoughts"}
OWN_FILES = [(task, row) for task in TASKS for row in ROWS if row != "coconut" and f"{task}_{row}" not in OTHER_NAMES]


@pytest.mark.parametrize(("task", "row"), OWN_FILES)
def test_rows_change_the_coconut_file_as_the_table_says(task, row):
    base, values = BASES[task], raw(stem(task, row))
    last = base["max_latent_stage"] + 1
    no_stages = {"c_thought": 0, "epochs_per_stage": 1, "max_latent_stage": 0, "resume": 0, "load_model_path": "None"}
    changes = {
        "cot": no_stages | {"save_only_improve": True, "reset_optimizer": False},
        "icot": no_stages
        | {"icot": True, "icot_remove_per_epoch": 8, "icot_smoothing_lambda": 4, "icot_remove_all_beyond": 39, "lr": 1e-5}
        | {"reset_optimizer": "stage", "batch_size_training": 16, "gradient_accumulation_steps": 2, "num_epochs": 80},
        "pause_token": {"epochs_per_stage": 1, "resume": last, "num_epochs": base["num_epochs"] + last}
        | {"load_model_path": "None"},
        "wo_thought": {"load_model_path": "runs/gsm/gsm-cot" if task == "gsm" else "None"},
    }
    of_row = {"no_cot": "cot", "wo_curriculum": "pause_token", "pause_as_thought": "wo_thought"}.get(row, row)
    flags = {flag: flag == FLAG_OF.get(row) for flag in METHOD_FLAGS}
    expected = base | flags | changes[of_row]
    if (task, row) != ("gsm", "cot"):  # a stock file; the others say how many rows an update has, whatever the GPUs
        expected |= {"save_path": f"runs/{task}", "name": f"{task}-{row.replace('_', '-')}"}
        if row != "icot":
            del expected["gradient_accumulation_steps"]
            expected["effective_batch_size"] = 128
    else:
        expected["name"] = "gsm-cot"
    assert values | {"lr": float(values["lr"])} == expected


def test_no_two_files_share_a_run():
    owners: dict[tuple[str, str], list[str]] = {}
    for name in of_tasks(*TASKS, STAND_IN) + ["prosqa_m3_bf16", "prosqa_m4_frozen", "prosqa_m4b_shared", "prosqa_m5_pause"]:
        values = raw(name)
        owners.setdefault((values["save_path"], values["name"]), []).append(name)
    for run_name, names in owners.items():
        alone = [name for name in names if not name.endswith("_eval")]
        assert len(alone) <= 1, (run_name, names)
        evaluations = [name for name in names if name.endswith("_eval")]
        assert len(evaluations) <= 1, (run_name, names)
        if alone and evaluations:  # train and eval share a folder where the stock files do, on the tasks of logic
            assert evaluations == [f"{alone[0]}_eval"] and names[0].startswith(("prontoqa", "prosqa")), names


@pytest.mark.parametrize("name", ["gsm_cot", "gsm_coconut", "prontoqa_coconut", "prosqa_coconut"])
def test_training_files_have_variants_for_one_gpu_and_for_a_quick_look(name):
    stock, single, quick = load(name), load(f"{name}_1gpu"), load(f"{name}_quick")
    assert single.effective_batch_size == quick.effective_batch_size == 128 and single.batch_size_training == 32
    free = {"save_path", "load_model_path", "effective_batch_size"}
    assert single.model_dump(exclude=free) == stock.model_dump(exclude=free)
    assert quick.model_dump(exclude=free | {"name", "num_epochs", "max_train_samples"}) == stock.model_dump(
        exclude=free | {"name", "num_epochs", "max_train_samples"}
    )
    assert quick.max_train_samples == 10_000
    assert quick.num_epochs == 6 if stock.cot else quick.stage(quick.num_epochs - 1) == 1 != quick.stage(quick.num_epochs)
    if name == "gsm_coconut":
        for coconut, cot in ((single, "gsm_cot_1gpu"), (quick, "gsm_cot_quick")):
            assert Path(coconut.load_model_path) == load(cot).run_dir


@pytest.mark.parametrize("task", TASKS)
def test_each_file_says_which_row_it_is_with_the_papers_figure_and_the_command(task):
    for row in ROWS:
        if f"{task}_{row}" in OTHER_NAMES:
            continue
        paper, text = PAPER[task][row], (ARGS / f"{stem(task, row)}.yaml").read_text()
        head = "\n".join(line for line in text.splitlines() if line.startswith("#")).replace("+-", "±")
        assert f"{paper.accuracy:.1f}" in head and "arXiv 2412.06769" in head and "Table 1" in head, (task, row)
        assert paper.std is None or f"± {paper.std:.1f}" in head
        assert f"args/{stem(task, row)}.yaml" in head or "torchrun" in head


# ---------------------------------------------------------------- token layouts


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Two rows of two steps and of one, the tokenizer and the ids of the three thought tokens."""
    path = tmp_path_factory.mktemp("rows") / "gsm_rows.json"
    two = {"question": "Q?", "steps": ["<<1+1=2>>", "<<2*3=6>>"], "answer": "6"}
    path.write_text(json.dumps([two, {"question": "R?", "steps": ["<<2*5=10>>"], "answer": "1,000"}]))
    tokenizer = backbones.load_tokenizer(CHARACTERS)
    ids = backbones.add_thought_tokens(tokenizer)
    return TokenTable(get_dataset(path, tokenizer)), tokenizer, ids


def drawn(material, config: Config, epoch: int, i: int = 0, prompt: bool = False) -> str:
    """A row of an epoch in characters: [ and ] for the markers, o for a latent, $ for EOS; line ends are spaces."""
    table, tokenizer, ids = material
    get = get_question_latent_dataset if prompt else get_cot_latent_dataset
    options = {} if prompt else {"epoch": epoch}
    rows = get(config.stage(epoch), table, config, ids.start, ids.latent, ids.end, not config.markers, **options)
    names = {ids.start: "[", ids.end: "]", ids.latent: "o", tokenizer.eos_token_id: "$"}
    return "".join(names.get(token) or tokenizer.decode([token]) for token in rows[i]["input_ids"].tolist())


STEPS = ("<<1+1=2>> <<2*3=6>> ", "<<2*3=6>> ", "")
GSM_CURRICULUM = {3: 1, 5: 1, 6: 2, 8: 2, 9: 3, 11: 3, 12: 4, 24: 8}  # epoch -> stage
LOGIC_CURRICULUM = {0: 0, 4: 0, 5: 1, 10: 2, 29: 5, 30: 6, 35: 7, 49: 9}


@pytest.mark.parametrize(("task", "c", "cap", "stages"), [("gsm", 2, 3, GSM_CURRICULUM), ("prontoqa", 1, 6, LOGIC_CURRICULUM)])
@pytest.mark.parametrize("row", ["coconut", "pause_as_thought", "wo_thought"])
def test_rows_with_a_curriculum_drop_a_step_a_stage(material, task, c, cap, stages, row):
    config = load(stem(task, row))
    for epoch, stage in stages.items():
        assert config.stage(epoch) == stage
        thoughts = "" if row == "wo_thought" else f"[{'o' * (min(stage, cap) * c)}]"
        steps = STEPS[min(stage, 2)] if stage <= cap else ""
        assert drawn(material, config, epoch) == f"Q? {thoughts}{steps}### 6$", (row, epoch)
        assert drawn(material, config, epoch, prompt=True) == f"Q? {thoughts}", (row, epoch)
    evaluation = load(f"{stem(task, row)}_eval")
    final = "" if row == "wo_thought" else "[oooooo]"
    assert drawn(material, evaluation, evaluation.resume, 1, prompt=True) == f"R? {final}", "six latents, also for one step"


@pytest.mark.parametrize("task", TASKS)
def test_rows_without_a_curriculum_look_the_same_in_every_epoch(material, task):
    expected = {
        "cot": ("Q? <<1+1=2>> <<2*3=6>> ### 6$", "Q? "),
        "no_cot": ("Q? ### 6$", "Q? "),
        "pause_token": ("Q? [oooooo]### 6$", "Q? [oooooo]"),
        "wo_curriculum": ("Q? [oooooo]### 6$", "Q? [oooooo]"),
    }
    for row, (text, prompt) in expected.items():
        config = load(stem(task, row))
        for epoch in (config.resume, config.num_epochs - 1):
            assert drawn(material, config, epoch) == text, (row, epoch)
            assert drawn(material, config, epoch, prompt=True) == prompt, (row, epoch)
        evaluation = load(f"{stem(task, row)}_eval")
        assert drawn(material, evaluation, evaluation.resume, prompt=True) == prompt


def test_icot_loses_characters_from_the_left_and_at_last_all(material):
    config = load("gsm_icot", "icot_smoothing_lambda=1e9", "icot_remove_all_beyond=17")  # no chance; characters are tokens
    assert [drawn(material, config, epoch) for epoch in range(4)] == [
        "Q? <<1+1=2>> <<2*3=6>> ### 6$",
        "Q? > <<2*3=6>> ### 6$",
        "Q? 6>> ### 6$",
        "Q? ### 6$",
    ]
    assert drawn(material, config, 2, 1) == "R? ### 1,000$", "eleven characters of steps, sixteen scheduled: the answer stays"
    assert drawn(material, config, 1, prompt=True) == "Q? "


# ---------------------------------------------------------------- two updates of every kind of row


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """tiny(name, *overrides): run.main on a config of args/, on twelve rows and weights of 1 layer x 16, for two updates."""
    folder = tmp_path_factory.mktemp("tiny")
    rows = [{"question": f"{i}+1?", "steps": [f"<<{i}+1={i + 1}>>"], "answer": str(i + 1)} for i in range(12)]
    (folder / "rows.json").write_text(json.dumps(rows))
    small = [f"save_path={folder}", f"model_id={CHARACTERS}", "from_scratch=True", "device=cpu", "wandb=False", "num_epochs=60"]
    small += [
        "model_config={n_layer: 1, n_embd: 16, n_head: 2}",
        f"train_path={folder}/rows.json",
        f"val_path={folder}/rows.json",
    ]
    small += ["batch_size_training=4", "effective_batch_size=4", "gradient_accumulation_steps=1", "max_new_tokens=2"]
    small += ["save_only_improve=False", "max_steps=2", "max_val_samples=2", "save_every_steps=1"]

    def train(name: str, *overrides: str) -> Path:
        assert run.main([str(ARGS / f"{name}.yaml"), *small, *overrides]) == 0
        return folder / raw(name)["name"]

    return train


@pytest.fixture(scope="module")
def tiny_cot(tiny) -> Path:
    """A checkpoint of the CoT row after one epoch."""
    return tiny("gsm_cot", "max_steps=3") / "checkpoint_1"


@pytest.mark.parametrize("row", [row for row in ROWS if row != "cot"])
def test_each_kind_of_row_trains_from_its_file(tiny, tiny_cot, row, capsys):
    capsys.readouterr()
    start = [f"load_model_path={tiny_cot}"] if raw(f"gsm_{row}")["load_model_path"] != "None" else []
    folder = tiny(f"gsm_{row}", *start)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step"]
    config = load(f"gsm_{row}")
    assert len(steps) == 2 and {line["epoch"] for line in steps} == {config.resume}
    assert {line["stage"] for line in steps} == {config.stage(config.resume)}
    assert all(0 < line["train/loss"] < 20 for line in steps)
    (evaluation,) = [line for line in lines if line["event"] == "eval"]
    assert evaluation["n_latents"] == {"coconut": 2, "pause_as_thought": 2, "wo_curriculum": 6, "pause_token": 6}.get(row, 0)
    assert (f"Loading from {tiny_cot}" in capsys.readouterr().out) == bool(start)
