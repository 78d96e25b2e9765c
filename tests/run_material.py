"""A tiny run for the tests: data made by the real generator, a config, the real run.py."""

from pathlib import Path

import yaml
from conftest import ROOT

BASE = {
    "model_id": str(ROOT / "backbones/prosqa_tiny"),
    "from_scratch": True,
    "coconut": True,
    "c_thought": 1,
    "epochs_per_stage": 1,
    "max_latent_stage": 2,
    "batch_size_training": 8,
    "num_epochs": 3,
    "max_new_tokens": 12,
    "lr": 1e-3,
    "reset_optimizer": True,
    "wandb": False,
}


def write_config(tmp_path: Path, data: Path, name: str, **changes) -> str:
    """Write a YAML of `BASE` on a folder of data with changes; returns its path."""
    paths = {"train_path": str(data / "prosqa_train.json"), "val_path": str(data / "prosqa_valid.json")}
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(BASE | paths | {"save_path": str(tmp_path / "runs"), "name": name} | changes))
    return str(path)
