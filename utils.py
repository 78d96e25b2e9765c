"""The run config (YAML + overrides, checked before any compute), and seeds.

config = load_config("args/prosqa_coconut_1gpu.yaml", ["lr=3e-4", "num_epochs=10"])
"""

import difflib
import os
import random
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from config_rules import FEEDBACK_NAMES, NO_PATH, contradictions
from optimizers import with_preset

PLACEHOLDER = re.compile(r"^YOUR_PATH")
YAML_NAMES = {"model_options": "model_config"}  # pydantic keeps the latter for itself


class Lora(BaseModel):
    """Train low-rank updates of a frozen backbone, and rows of its own for each new token (lora.py)."""

    model_config = ConfigDict(extra="forbid")

    r: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0, allow_inf_nan=False)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: Literal["auto"] | Annotated[list[str], Field(min_length=1)] = "auto"


class Config(BaseModel):
    """One run. The stock keys first, then the added ones; every key is a YAML key of the same name."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True, validate_default=False, protected_namespaces=())

    # stock keys
    project: str = "coconut"
    name: str
    save_path: str
    only_eval: bool = False
    coconut: bool = False
    cot: bool = False
    no_thoughts: bool = False
    no_cot: bool = False
    c_thought: int = Field(1, ge=0)
    epochs_per_stage: int = Field(1, ge=1)
    max_latent_stage: int = Field(0, ge=0)
    pad_latent_to_max: bool = True
    save_only_improve: bool = False
    uniform_prob: float = Field(0.0, ge=0, le=1)
    model_id: str = "openai-community/gpt2"
    load_model_path: str | None = None
    seed: int = 0
    resume: int = Field(0, ge=0)
    bf16: bool | Literal["pure"] = False
    train_path: str | None = None
    val_path: str
    reset_optimizer: bool | Literal["stage"] = False
    batch_size_training: int | Literal["auto"] = 32
    gradient_accumulation_steps: int = Field(1, ge=1)
    num_epochs: int = Field(25, ge=1)
    lr: float = Field(1e-4, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(0.01, ge=0)
    debug: bool = False

    # what fills a thought, and the backbone
    feedback_mode: str = Field("continuous", description=" | ".join(FEEDBACK_NAMES))
    force_multipass: bool = False
    from_scratch: bool = False
    model_options: dict[str, Any] = Field(default_factory=dict)
    tokenizer: str | None = None
    tf32: bool = False
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    compile: bool | Literal["always"] = False
    activation_checkpointing: bool = False
    latent_iterations: int | None = Field(None, ge=1)
    lora: Lora | None = Field(None, description="mapping of " + ", ".join(Lora.model_fields))

    uniform_range: Literal["steps", "stage"] = "steps"
    latents_follow_steps: bool = False
    latent_norm: Literal["none", "match_embedding"] = "none"

    icot: bool = False
    icot_remove_per_epoch: float = Field(8, gt=0)
    icot_smoothing_lambda: float = Field(4, gt=0)
    icot_remove_all_beyond: int = Field(39, ge=0)

    steps_per_epoch: int | None = Field(None, ge=1)
    level_epochs: list[Annotated[int, Field(ge=1)]] | None = None

    # batches
    effective_batch_size: int | None = Field(None, ge=1)
    accumulation_norm: Literal["stock", "tokens"] = "stock"
    group_by_length: bool = False
    eval_batch_size: int | None = Field(None, ge=1)
    max_new_tokens: int | None = Field(None, ge=1)
    max_train_samples: int | None = Field(None, ge=1)
    max_val_samples: int | None = Field(None, ge=1)
    eval_every: int = Field(1, ge=1)
    two_choice: bool | Literal["auto"] = "auto"

    # optimizer
    optimizer: Literal["adamw", "sgd", "muon", "mugrokfast"] = "adamw"
    optimizer_phase: int = 1
    muon_lr: float | None = Field(None, gt=0, allow_inf_nan=False)
    grokfast_lambda: float | None = Field(None, ge=0, allow_inf_nan=False)
    grokfast_alpha: float = Field(0.98, ge=0, lt=1)
    use_lr_scheduler: bool = False
    warmup_epochs: float = Field(0.0, ge=0)
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    adam_beta2: float = Field(0.999, gt=0, lt=1)
    gradient_clip: float | None = Field(None, gt=0)
    warmup_steps: int | None = Field(None, ge=1)
    warmup_from: float = Field(0.0, ge=0, le=1)
    min_lr: float | None = Field(None, ge=0)
    weight_ema: float | None = Field(None, gt=0, lt=1)
    select_by: Literal["accuracy", "loss"] = "accuracy"
    early_stop_patience: int | None = Field(None, ge=1)
    min_delta: float = Field(0.0, ge=0)
    max_steps: int | None = Field(None, ge=1)
    alarms: bool = False

    # processes
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    consolidate: bool = True

    # run folder and logging
    auto_resume: bool = True
    checkpoint_format: Literal["stock", "phase1"] = "stock"
    keep: str = Field("all", description="all | best | last K | every N")
    async_save: bool = True
    save_training_state: bool = True
    save_every_steps: int = Field(500, ge=0)
    log_every: int = Field(10, ge=1)
    peak_tflops: float | None = Field(None, gt=0)
    wandb: bool | Literal["auto"] = "auto"
    wandb_mode: Literal["online", "offline", "disabled"] | None = None

    def __init__(self, values: dict | None = None, /, **kwargs):
        super().__init__(**(values or {}), **kwargs)

    @field_validator("batch_size_training")
    @classmethod
    def _at_least_one_row(cls, value):
        if value != "auto" and value < 1:
            raise ValueError("must be at least 1, or auto")
        return value

    @field_validator("bf16", "reset_optimizer", "two_choice", "wandb", "compile", mode="before")
    @classmethod
    def _word_to_bool(cls, value):
        return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value

    @field_validator("load_model_path", "train_path", "tokenizer", mode="before")
    @classmethod
    def _nothing(cls, value):
        return None if value in NO_PATH else value

    @field_validator("keep")
    @classmethod
    def _known_policy(cls, value):
        if not re.fullmatch(r"all|best|(last|every) [1-9]\d*", value):
            raise ValueError("must be all, best, last K or every N")
        return value

    @property
    def tokenizer_id(self) -> str:
        """The hub id or folder of the tokenizer: that of the model unless `tokenizer` says otherwise."""
        return self.tokenizer or self.model_id

    @property
    def plain(self) -> bool:
        """A plain language model: no wrapper keys in its checkpoints, thoughts (if any) are ordinary tokens."""
        return self.no_thoughts or not self.coconut

    @property
    def markers(self) -> bool:
        """Whether the three thought tokens exist and the markers stand in the text."""
        return not (self.cot or self.no_thoughts or self.no_cot)

    @property
    def run_dir(self) -> Path:
        return Path(self.save_path) / self.name

    @property
    def model_key(self) -> str:
        """m1 .. m5, m0 for the study's models (feedback mode and method flags), else `custom`."""
        if self.no_thoughts:
            return "m0"
        if self.coconut:
            names = {"continuous": "m3", "frozen": "m4", "learned_shared": "m4b", "pause_curriculum": "m5"}
            return names[self.feedback_mode]
        return "custom" if self.icot else "m1" if self.cot else "m2" if self.no_cot else "custom"

    def stage(self, epoch: int) -> int:
        """The curriculum stage of an epoch (0-based); CoT and no-CoT have none. With `icot` the tokens scheduled for removal."""
        if self.icot:
            return min(int(self.icot_remove_per_epoch * epoch), self.icot_remove_all_beyond)
        return 0 if self.cot or self.no_cot else epoch // self.epochs_per_stage


def load_config(path: str | os.PathLike, overrides: list[str] | tuple = ()) -> Config:
    """Read a YAML file and `key=value` overrides into a checked `Config`.

    Raises:
        ValueError: one message with every problem: the key, its value, what is allowed, and the nearest known key.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"config {path} is a folder; name one of the YAML files in it")
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        raise ValueError(f"config {path} does not exist" + (f"; did you mean {path.parent / near[0]}?" if near else ""))
    values = _parse(lambda: path.read_text(), str(path))
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{path} must hold `key: value` lines with words as keys (quote on, off, yes and no)")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"override {override!r} must have the form key=value")
        values[key.strip()] = _parse(lambda value=value: value, f"override {override!r}")
    return check_config(values, str(path), default_name=path.stem)


class _StrictLoader(yaml.SafeLoader):
    """YAML without tags that run code, and without a second value for a key."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.YAMLError(f"{', '.join(map(str, twice))} given twice")
        return super().construct_mapping(node, deep)


def _parse(read, source: str):
    try:
        return yaml.load(read(), _StrictLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{source} is not YAML: {' '.join(str(error).split())}") from None


def check_config(values: dict, source: str, default_name: str | None = None) -> Config:
    """Validate raw values (see `load_config`) and normalise them. `source` names them in the error."""
    values = dict(values)
    problems = ["lr: also given as learning_rate; keep one"] if {"lr", "learning_rate"} <= values.keys() else []
    if "learning_rate" in values:
        values["lr"] = values.pop("learning_rate")
    try:
        values = with_preset(values)
    except ValueError as error:
        problems.append(str(error))
    if "model_config" in values:
        values["model_options"] = values.pop("model_config")
    if default_name is not None and values.get("name") is None:
        values["name"] = default_name
    given = {key: value for key, value in values.items() if value is not None}
    problems += [f"{key}: replace the placeholder {v}" for key, v in given.items() if PLACEHOLDER.match(str(v))]
    config = None
    try:
        config = Config(given)
    except ValidationError as error:
        problems += [_explain(item) for item in error.errors()]
    problems += contradictions(given)
    if config is not None:
        if not config.only_eval and config.train_path is None:
            problems.append("train_path: missing (needed unless only_eval: True)")
        if Path(config.name).name != config.name or config.name in (".", ".."):
            problems.append(f"name: {config.name!r} must be a plain folder name")
    if problems:
        raise ValueError(f"{source}: " + "; ".join(dict.fromkeys(problems)))
    changes = {"feedback_mode": "learned_shared"} if config.feedback_mode == "pause_multipass" else {}
    if config.batch_size_training == "auto" and config.effective_batch_size is None:
        changes["effective_batch_size"] = 128
    return config.model_copy(update=changes | ({"c_thought": 0} if config.no_thoughts else {}))


def keys_and_defaults() -> str:
    """Every key of a config with its default and what is allowed, a line each."""
    fields, lines = Config.model_json_schema()["properties"], []
    for name, field in Config.model_fields.items():
        default = "required" if field.is_required() else field.get_default(call_default_factory=True)
        lines.append(f"  {YAML_NAMES.get(name, name):27} {default!s:22} {_allowed(fields[name])}".rstrip())
    return "\n".join(lines)


def _allowed(schema: dict) -> str:
    """What a JSON schema lets through, in words."""
    if "description" in schema and "$ref" not in schema:
        return schema["description"]
    if "anyOf" in schema:
        return " | ".join(_allowed(one) for one in schema["anyOf"] if one.get("type") != "null")
    if "enum" in schema or "const" in schema:
        return " | ".join(map(str, schema.get("enum", [schema.get("const")])))
    words = {"boolean": "True | False", "integer": "whole number", "number": "number", "string": "text"}
    if schema.get("type") == "array":
        return f"list of {_allowed(schema['items'])}"
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[key]:g}" for key, sign in bounds.items() if key in schema]
    return " ".join([words.get(schema.get("type"), "mapping"), " and ".join(limits)]).strip()


def _explain(item: dict) -> str:
    key = YAML_NAMES.get(str(item["loc"][0]), str(item["loc"][0]))
    fields = Config.model_fields
    if key == "lora" and len(item["loc"]) > 1:
        key, fields = f"lora.{item['loc'][1]}", {f"lora.{name}" for name in Lora.model_fields}
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, fields, 1)
        return f"{key}: unknown key" + (f", did you mean {near[0]}?" if near else "")
    if item["type"] == "missing":
        return f"{key}: missing"
    if item["type"] in ("dict_type", "list_type", "model_type") and item["loc"][0] in Config.model_fields:
        schema = Config.model_json_schema()["properties"][item["loc"][0]]
        return f"{key}: must be a {_allowed(schema)}, got {item['input']!r}"
    said = item["msg"].removeprefix("Value error, ")
    return f"{key}: {said[0].lower()}{said[1:]}, got {item['input']!r}"


# ---------------------------------------------------------------- seeds


def set_seed(seed: int) -> None:
    """Seed python, numpy and torch, and make cudnn deterministic (stock)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True


def micro_seed(*key: int) -> int:
    """A seed that depends on all of `key` (run seed, epoch, micro-batch ...), the same on every platform."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
