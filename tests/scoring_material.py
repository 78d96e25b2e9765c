"""Tiny runs on made arithmetic, for the tests of the ablation and of the table by stages.

runs = train_runs(folder)           # {"abc": run folder, "pause": ..., "cot": ..., "data": held-out problems}
subject = loud(Subject.load(runs["abc"]))
"""

import json
import shutil
from pathlib import Path

import torch
import yaml
from conftest import ROOT

import run
from analysis.subject import Subject
from data import cot

PLAIN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256, "dropout": 0.0}
ROUTED = {"use_mod": True, "use_memory": True, "mod_capacity": 0.5, "memory_layers": [0], "memory_sub_keys": 6}
BASE = {
    "model_id": "lahr",
    "from_scratch": True,
    "model_config": PLAIN,
    "tokenizer": str(ROOT / "backbones/characters"),
    "coconut": True,
    "epochs_per_stage": 1,
    "max_latent_stage": 2,
    "num_epochs": 3,
    "batch_size_training": 8,
    "lr": 3e-3,
    "max_new_tokens": 8,
    "latents_follow_steps": True,
    "pad_latent_to_max": False,
    "uniform_prob": 0.3,
    "uniform_range": "stage",
    "wandb": False,
}
RUNS = {
    "abc": {"model_config": PLAIN | ROUTED, "gradient_accumulation_steps": 2},
    "pause": {"feedback_mode": "pause_curriculum"},
    "cot": {"coconut": False, "cot": True, "num_epochs": 2, "uniform_prob": 0.0},
}


def train_runs(folder: Path, names=tuple(RUNS)) -> dict[str, Path]:
    """Train some of RUNS on 32 problems; 10 more are held out."""
    for name, n, split in (("train", 32, "train"), ("held_out", 10, "valid")):
        rows = cot.make_rows("basic", n, split, 42)
        (folder / f"{name}.json").write_text(json.dumps([shortened(row) for row in rows]))
    for name in names:
        assert run.main([config(folder, name)]) == 0
    return {name: folder / "runs" / name for name in names} | {"data": folder / "held_out.json"}


def shortened(row: dict) -> dict:
    """With a short question and short steps, so that slow references are quick; every third problem has but one step."""
    steps = [step[-12:] for step in row["steps"]]
    return row | {"question": row["question"][-25:], "steps": steps[-1:] if row["idx"] % 3 == 0 else steps}


def config(folder: Path, name: str, **changes) -> str:
    """Write the YAML of one of RUNS, with changes."""
    paths = {"train_path": str(folder / "train.json"), "val_path": str(folder / "held_out.json")}
    path = folder / f"{name}.yaml"
    values = BASE | paths | {"save_path": str(folder / "runs"), "name": name} | RUNS.get(name, {}) | changes
    path.write_text(yaml.safe_dump(values))
    return str(path)


def loud(subject: Subject) -> Subject:
    """In float64, with weights so large that every thought matters."""
    subject.model.double()
    generator = torch.Generator().manual_seed(5)
    for parameter in subject.model.parameters():
        parameter += 0.25 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return subject


def with_other_letters(folder: Path, where: Path) -> Path:
    """A copy of a run whose tokenizer has exchanged two letters' numbers: rows of as many tokens, other targets."""
    tokenizer, other = where / "letters", where / "other"
    shutil.copytree(ROOT / "backbones/characters", tokenizer)
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    (tokenizer / "tokenizer.json").write_text(json.dumps(content))
    shutil.copytree(folder, other)
    for side in (*other.glob("state_*"), other / "run.json"):
        about = json.loads(side.read_text())
        about["config"]["tokenizer"] = str(tokenizer)
        side.write_text(json.dumps(about))
    return other
