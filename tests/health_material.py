"""Three tiny run folders for the tests of the health checks: LAHR with all three mechanisms, Cognate, GPT-2; and sick copies.

    folders = trained(tmp_path_factory.getbasetemp())       # {"lahr": run folder, "cognate": ..., "gpt2": ...}
    failed = failing(folder, change, "causality,loss")      # names of failed checks after change(patient)

Six updates on word problems, so that nothing is learned: `TRAINED` makes the checks judge what is said all the same.
"""

import contextlib
import functools
import io
import json
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

import run
from analysis import health
from analysis.health_patient import Patient
from data.cot import make_rows, write_rows

SHAPE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 256}
BASE = {
    "from_scratch": True,
    "coconut": True,
    "epochs_per_stage": 1,
    "max_latent_stage": 1,
    "pad_latent_to_max": False,
    "batch_size_training": 8,
    "num_epochs": 2,
    "max_new_tokens": 4,
    "lr": 1e-3,
    "use_lr_scheduler": True,
    "wandb": False,
    "tokenizer": str(ROOT / "backbones/characters"),
}
LAHR = SHAPE | {"use_mod": True, "use_memory": True, "mod_capacity": 0.5, "memory_sub_keys": 12}
COGNATE = SHAPE | {"refiner_heads": 4, "memory_size": 16, "gate_size": 16, "intermediate_size": 48, "num_hidden_layers": 2}
MODELS = {
    "lahr": {"model_id": "lahr", "model_config": LAHR},
    "cognate": {"model_id": "cognate", "model_config": COGNATE, "optimizer": "mugrokfast"},
    "gpt2": {
        "model_id": str(ROOT / "backbones/characters"),
        "model_config": {"n_layer": 2, "n_embd": 32},
        "feedback_mode": "pause_curriculum",
    },
}
TRAINED = ("--trained_after", "1")


@functools.cache
def trained(base: Path) -> dict[str, Path]:
    """Train all three on the same word problems in a folder below `base`, once a test process."""
    folder = base / "health"
    folder.mkdir()
    paths = {"train_path": str(folder / "cot.json"), "val_path": str(folder / "cot_val.json")}
    write_rows(Path(paths["train_path"]), make_rows("basic", 24, "train", 0))
    write_rows(Path(paths["val_path"]), make_rows("basic", 12, "valid", 0))
    for name, changes in MODELS.items():
        config = folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump(BASE | paths | {"save_path": str(folder / "runs"), "name": name} | changes))
        assert run.main([str(config)]) == 0
    return {name: folder / "runs" / name for name in MODELS}


def examined(folder: Path, change=None, only: str | None = None, *flags: str) -> tuple[int, dict]:
    """The exit code of the command and what it wrote, of the loaded model after `change(patient)`."""
    load = Patient.load

    def changed(*args):
        patient = load(*args)
        if change is not None:
            change(patient)
        return patient

    output = folder / "health.json"
    output.unlink(missing_ok=True)
    call = ["--checkpoint", str(folder), "--num_samples", "12", *(["--only", only] if only else []), *flags]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(Patient, "load", changed)
        code = health.main(call)
    return code, json.loads(output.read_text())


def failing(folder: Path, change, only: str, *flags: str) -> set[str]:
    """The failed checks of the model after a change; without one there are none (test_health.py)."""
    code, sick = examined(folder, change, only, *flags)
    assert code == (1 if sick["failed"] else 0) and sick["healthy"] is not bool(sick["failed"])
    return {*sick["failed"]}


def results(said: dict) -> dict[str, dict]:
    """The checks of a report by name."""
    return {check["name"]: check for check in said["checks"]}
