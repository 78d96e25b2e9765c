"""Runs of a tiny GPT-2 on disk, for the tests of checkpoints and run folders."""

from pathlib import Path

import torch

from backbones.tiny import word_tokenizer, write
from checkpoint import build_model
from run_folder import Position, RunFolder
from utils import Config, check_config

METHODS = {
    "coconut": {"coconut": True},
    "cot": {"cot": True},
    "no_cot": {"no_cot": True},
    "no_thoughts": {"coconut": True, "no_thoughts": True},
    "all False": dict.fromkeys(("coconut", "cot", "no_thoughts", "no_cot"), False),
    "frozen": {"coconut": True, "feedback_mode": "frozen"},
    "learned_shared": {"coconut": True, "feedback_mode": "learned_shared"},
    "pause_curriculum": {"coconut": True, "feedback_mode": "pause_curriculum"},
}
PLAIN, PAUSES = ("cot", "no_cot", "no_thoughts"), ("frozen", "learned_shared", "pause_curriculum")


def write_backbone(folder: Path) -> str:
    """A folder with a GPT-2 of 67 tokens, 1 layer x 16, and no weights."""
    write(folder, word_tokenizer(), n_layer=1, n_embd=16, n_head=2, n_positions=64)
    return str(folder)


def make_config(folder: Path, backbone: str, method: str = "coconut", **changes) -> Config:
    """A checked config of a run `<folder>/run` of one of METHODS."""
    values = {"save_path": str(folder), "name": "run", "model_id": backbone, "from_scratch": True, "seed": 3}
    return check_config(values | {"train_path": "t.json", "val_path": "v.json"} | METHODS[method] | changes, "test")


def trained(config):
    """A model whose every weight has moved since it was built."""
    model = build_model(config)[0]
    torch.manual_seed(11)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def save(weights: dict, path: Path) -> Path:
    torch.save(weights, path)
    return path


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def snapshot(weights: dict) -> dict:
    return {key: value.clone() for key, value in weights.items()}


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("")


def started(config):
    """A run folder that has begun and saved one epoch."""
    folder, model = RunFolder(config), build_model(config)[0]
    folder.open(exclusive=True)
    folder.begin(model)
    folder.save_checkpoint(model, Position(epoch=1))
    return folder, model
