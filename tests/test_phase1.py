"""Cognate's first phase: its data, its checkpoint format through real runs, and the fronts of run.py as processes."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import ROOT
from transformers import AutoModelForCausalLM

import run
from analysis.subject import Subject
from backbones.cognate import CognateForCausalLM
from backbones.cognate_config import CognateConfig
from checkpoint import load_run
from data import phase1 as data

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "refiner_heads": 2, "memory_size": 8}
TINY |= {"gate_size": 8, "intermediate_size": 32, "max_recursions": 2, "max_position_embeddings": 640}
TINY |= {"attention_dropout": 0.0, "hidden_dropout": 0.0, "embedding_dropout": 0.0}
KEYS = {
    "coconut": False, "cot": True, "model_id": "cognate", "model_config": TINY, "num_epochs": 3, "optimizer": "mugrokfast",
    "tokenizer": str(ROOT / "backbones/prosqa_words"), "checkpoint_format": "phase1", "weight_ema": 0.9, "select_by": "loss",
    "reset_optimizer": False, "max_new_tokens": 4, "use_lr_scheduler": True, "warmup_epochs": 1, "warmup_from": 0.1,
    "log_every": 1,
}  # fmt: skip


# ---------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_data):
    """The run folder of three epochs."""
    from run_material import write_config

    folder = tmp_path_factory.mktemp("phase1")
    assert run.main([write_config(folder, small_data, "whole", **KEYS)]) == 0
    return folder / "runs/whole"


def test_the_files_are_plain_and_load_strictly(trained):
    assert not list(trained.glob("checkpoint_*")) and not (trained / "last_state").exists()
    state = torch.load(trained / "best_model.pt", map_location="cpu")  # its defaults unpickle nothing
    assert {"model_state_dict", "raw_model_state_dict", "optimizer_state_dict", "epoch", "global_step", "best_val_loss"} < {
        *state
    }
    assert isinstance(state["config"], dict) and state["config"]["model_id"] == "cognate"
    tokenizer = data_tokenizer()
    model = CognateForCausalLM(CognateConfig(**TINY, vocab_size=len(tokenizer), eos_token_id=0, bos_token_id=0))
    model.load_state_dict(state["model_state_dict"], strict=True)
    weights = (state["model_state_dict"], state["raw_model_state_dict"])
    assert any(not torch.equal(*(w[key] for w in weights)) for key in weights[0]), "validated: the average; raw: what goes on"


def data_tokenizer():
    from backbones import load_tokenizer

    return load_tokenizer(KEYS["tokenizer"])


def test_best_model_is_the_best_epoch(trained):
    evaluated = [r for r in map(json.loads, (trained / "metrics.jsonl").read_text().splitlines()) if r["event"] == "eval"]
    best = min(evaluated, key=lambda r: r["eval/loss"])
    state = torch.load(trained / "best_model.pt")
    assert state["epoch"] == best["epoch"] + 1 and state["best_val_loss"] == best["eval/loss"]
    of_epoch = torch.load(trained / f"epoch_{best['epoch'] + 1}.pt")["model_state_dict"]
    assert all(torch.equal(of_epoch[key], state["model_state_dict"][key]) for key in of_epoch)
    model, _, _, config = load_run(trained)
    assert config.checkpoint_format == "phase1"
    folder = AutoModelForCausalLM.from_pretrained(trained / "best_model").eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.allclose(folder(ids).logits, model.base_causallm(ids).logits, atol=1e-6)


def test_analyses_find_its_files(trained):
    assert Subject.load(trained).path.name == "epoch_3.pt" and Subject.load(trained).epoch == 3
    assert Subject.load(trained, "2").epoch == 2 and Subject.load(trained, "best").path.name == "best_model.pt"


def test_best_model_can_be_a_model_id(trained, make):
    keys = {"model_id": str(trained / "best_model"), "from_scratch": False, "num_epochs": 1, "reset_optimizer": False}
    assert run.main([make("after", coconut=True, max_new_tokens=4, **keys)]) == 0


@pytest.mark.parametrize("cut", ["in mid-epoch", "newest file damaged"])
def test_a_cut_run_goes_on_to_the_same_weights(trained, tmp_path, small_data, cut):
    from run_material import write_config

    config = write_config(tmp_path, small_data, "cut", **KEYS)
    assert run.main([config, *(["max_steps=8"] if "mid" in cut else [])]) == 0
    folder = tmp_path / "runs/cut"
    if "damaged" in cut:
        whole = (folder / "epoch_3.pt").read_bytes()
        (folder / "epoch_3.pt").write_bytes(whole[: len(whole) // 2])
    assert run.main([config]) == 0
    ours, theirs = (torch.load(path / "epoch_3.pt") for path in (folder, trained))
    for kind in ("model_state_dict", "raw_model_state_dict"):
        assert all(torch.equal(ours[kind][key], theirs[kind][key]) for key in theirs[kind])


def test_keys_that_do_not_fit(make, capsys):
    assert run.main([make("no", **KEYS | {"save_only_improve": True, "parallel": "fsdp2"})]) == 2
    said = capsys.readouterr().err
    assert "save_only_improve" in said and "parallel: fsdp2" in said


def test_update_norms_and_halting_are_logged(trained):
    records = list(map(json.loads, (trained / "metrics.jsonl").read_text().splitlines()))
    norms = [r for r in records if r["event"] == "update_norm"]
    steps = [r for r in records if r["event"] == "step"]
    assert len(norms) == len(steps) and all(r["train/update_norm"] > 0 for r in norms)
    assert [r["train/step"] for r in norms] == [r["train/step"] for r in steps]
    rate = [r["lr"] for r in steps]
    by_rate = sorted(zip(rate, (r["train/update_norm_hidden"] for r in norms)))
    assert by_rate[0][1] < by_rate[-1][1], "a Muon step is as long as its rate"
    evaluated = [r for r in records if r["event"] == "eval"]
    for key in ("act/avg_halting_steps", "act/q_variance", "act/halting_variance", "ltm/memory_usage", "gate/entropy"):
        assert len({r[key] for r in evaluated}) > 1 or key == "act/halting_variance" or "steps" in key, f"{key} is a constant"


# ---------------------------------------------------------------- data


def test_generated_rows_are_questions_and_answers():
    rows = data.generated(90, seed=1)
    assert rows == data.generated(90, seed=1) != data.generated(90, seed=2)
    assert all(r["question"].startswith("Q: ") and r["question"].endswith("\nA:") for r in rows)
    assert {r["level"] for r in rows} == {0, 1}
    for r in rows:
        if " = ?" in r["question"]:
            assert eval(r["question"].removeprefix("Q: ").split(" = ?")[0]) == int(r["answer"])


RECORDS = {
    "gsm8k": ({"question": "2 pens at 3?", "answer": "It is 2*3 = <<2*3=6>>6.\nSo 6.\n#### 6"}, ["It is 2*3 = 6.", "So 6."], "6"),
    "svamp": ({"Body": "Bo has 4.", "Question": "Two go?", "Equation": "( 4.0 - 2.0 )", "Answer": "2.0"},
              ["( 4.0 - 2.0 ) = 2"], "2"),
    "arc_easy": (
        {"question": "Hot?", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"}, [], "fire",
    ),
    "piqa": ({"goal": "Open", "sol1": "push", "sol2": "pull", "label": 1}, [], "pull"),
    "hellaswag": ({"ctx": "He", "endings": ["runs", "is"], "label": "0"}, [], "runs"),
    "mbpp": ({"text": "Add.", "code": "def f(a, b): return a + b"}, [], "def f(a, b): return a + b"),
    "arc_challenge": ({"question": "?", "choices": {"text": ["x"], "label": ["1"]}, "answerKey": "1"}, [], "x"),
    "wikitext": ({"text": " One. Two three. "}, [], "Two three."),
}  # fmt: skip


@pytest.mark.parametrize("name", data.SOURCES)
def test_records_of_the_named_sets(name):
    record, steps, answer = RECORDS[name]
    made = data.SOURCES[name].convert(record)
    assert (made["steps"], made["answer"]) == (steps, answer) and "<<" not in made["question"]


def test_splits_share_no_question_and_non_ascii_rows_go(tmp_path, monkeypatch, capsys):
    rows = [data.row(f"What is {i}?", [], str(i)) | {"level": 0, "source": "x"} for i in [*range(40), *range(40)]]
    monkeypatch.setattr(data, "generated", lambda n, seed: [*rows, data.row("café?", [], "1") | {"level": 0, "source": "x"}])
    data.main(["--out", str(tmp_path)])
    train, valid = ({r["question"] for r in json.loads((tmp_path / f"{name}.json").read_text())} for name in ("train", "valid"))
    assert len(train) == 36 and len(valid) == 4 and not train & valid
    assert "1 rows left out" in capsys.readouterr().out


def test_a_set_that_cannot_be_loaded_is_announced(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = data.load("svamp", 12, 0, str(tmp_path))
    assert "svamp CANNOT BE LOADED" in capsys.readouterr().err
    assert len(rows) == 12 and {r["source"] for r in rows} == {"generated for svamp"}


# ---------------------------------------------------------------- the fronts, as processes


def front(name: str, *arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, f"scripts/{name}.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


def test_train_phase1_test_ends_with_0_and_judges(tmp_path):
    tiny = yaml.safe_dump({"model_config": TINY | {"specialization": "speed"}}, default_flow_style=True, width=10000)
    override = tiny.strip()[1:-1].replace("model_config: ", "model_config=", 1)
    flags = ("--test", "--epochs", 1, "--checkpoint-dir", tmp_path, "--wandb-mode", "disabled")
    done = front("train_phase1", "--model", "speed", *flags, override, "alarms=False")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "best_model.pt" in done.stdout and "What is 25 + 17?" in done.stdout and "distinct" in done.stdout
    assert torch.load(tmp_path / "speed/best_model.pt")["config"]["seed"] == 2023


def test_other_settings_need_a_word(tmp_path):
    sys.path.insert(0, str(ROOT / "scripts"))
    from front import keep, resolved

    values = resolved("cognate_speed", {"num_epochs": 3, "alarms": None})
    assert values["num_epochs"] == 3 and "alarms" not in values and values["model_config"] == {"specialization": "speed"}
    keep(values, tmp_path / "speed.yaml", may_change=False)
    keep(values, tmp_path / "speed.yaml", may_change=False)
    with pytest.raises(ValueError, match="--overwrite, --resume"):
        keep(values | {"num_epochs": 4}, tmp_path / "speed.yaml", may_change=False)
    keep(values | {"num_epochs": 4}, tmp_path / "speed.yaml", may_change=True)
    assert yaml.safe_load((tmp_path / "speed.yaml").read_text())["num_epochs"] == 4


def test_train_phase1_needs_a_model():
    done = front("train_phase1", "--test")
    assert done.returncode == 1 and "--model" in done.stderr


def test_train_coconut_trains_every_stage(tmp_path):
    rows = [data.cot.make_rows("basic", 60, "train", 3)][0]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags = ("--data_path", tmp_path / "rows.json", "--size", "tiny", "--max_stages", 2, "--steps_per_stage", 3)
    flags += ("--output_dir", tmp_path / "out", "--batch_size", 4, "--warmup_steps", 2)
    done = front(
        "train_coconut",
        *flags,
        "max_new_tokens=4",
        "model_config={hidden_size: 16, num_attention_heads: 2, num_hidden_layers: 2}",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    records = list(map(json.loads, (tmp_path / "out/metrics.jsonl").read_text().splitlines()))
    assert [r["stage"] for r in records if r["event"] == "step"] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    train, val = (json.loads((tmp_path / f"out_data/{name}.json").read_text()) for name in ("train", "val"))
    assert len(train) + len(val) == 60 and val and not {r["question"] for r in train} & {r["question"] for r in val}
    refused = front("train_coconut", *flags)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "said"), [("# no JSON", "is not JSON"), ('{"a": 1}', "must hold a JSON list"), ('[{"q": 1}]', "row 0: `question`")]
)
def test_train_coconut_names_what_is_wrong_with_the_data(tmp_path, text, said):
    (tmp_path / "rows.json").write_text(text)
    done = front("train_coconut", "--data_path", tmp_path / "rows.json", "--output_dir", tmp_path / "out")
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out_data").exists()
