"""Weights files: reading, writing, which fits which model, and the model that a run's config and file make.

    model, tokenizer, ids, config = load_run("runs/prosqa/prosqa-coconut")      # a trained model, for analyses

Files are written under a temporary name and renamed. They carry a checksum for every tensor, which is compared before
anything is believed, and nothing is ever unpickled (`weights_only=True`).
"""

import platform
import re
import subprocess
import zipfile
from functools import lru_cache
from pathlib import Path

import torch
import transformers

import backbones
from coconut import FEEDBACK_MODES, Coconut
from config_rules import PAUSE_MODES
from files import read_json, whole_file
from lora import has_adapters, merged_weights
from utils import Config, check_config

MODE_OF_ID = {cls.mode_id: name for name, cls in FEEDBACK_MODES.items() if cls.mode_id is not None}
NUMBERED = re.compile(r"checkpoint_(\d+)")
PHASE1_BEST, PHASE1_EPOCH = "best_model.pt", re.compile(r"epoch_(\d+)\.pt")
IGNORED_KEY = re.compile(r"(^|\.)attn\.(masked_)?bias$")  # causal-mask buffers of old GPT-2 files


# ---------------------------------------------------------------- reading and writing weights


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """A flat state dict from a checkpoint file, on the CPU, without wrapper prefixes.

    ValueError where it is not one, is cut short, or is damaged anywhere.
    """
    weights = read_whole(path)
    if isinstance(weights, dict) and "model_state_dict" in weights:  # checkpoint_format: phase1
        weights = weights["model_state_dict"]
    if not isinstance(weights, dict) or not all(isinstance(v, torch.Tensor) for v in weights.values()) or not weights:
        raise ValueError(f"{path} is not a checkpoint: it must hold a flat dict of tensors")
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in weights.items()}


def read_whole(path: str | Path):
    """What torch.save wrote to a file, on the CPU, after the checksums of all its parts were compared.

    ValueError where the file is of another kind, cut short or damaged, or holds more than tensors and plain values.
    """
    path = Path(path)
    with open(path, "rb") as file:  # errors of the disk speak for themselves
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
        except Exception as error:  # of the format: damage can raise anything, from BadZipFile to UnicodeDecodeError
            kinds = "cut short, damaged, or another kind of file"
            raise ValueError(f"{path} is not a readable checkpoint: {kinds} ({error})") from None
    if damaged:
        raise ValueError(f"{path} is damaged: the checksum of {damaged} in it is wrong; use the checkpoint before it or a copy")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises anything from EOFError to RuntimeError on what it can't read
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is not a readable checkpoint (torch.save of a flat state dict): {reason}") from None


def save_whole(value, path: Path) -> None:
    """torch.save, whole or not at all. ValueError where the disk refuses."""
    with whole_file(path, "wb") as file:
        noting = _Noting(file)
        try:
            torch.save(value, noting)
        except RuntimeError as error:  # how torch's zip writer reports a failed write
            raise noting.error or OSError(str(error)) from None


class _Noting:
    """A file that remembers why it could not be written."""

    def __init__(self, file):
        self.file, self.error, self.flush = file, None, file.flush

    def write(self, data) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise


def stored_model(model: Coconut) -> torch.nn.Module:
    """The module whose state dict a checkpoint file holds: a plain language model is stored under its own names, unwrapped."""
    return model.base_causallm if model.feedback_mode == "none" else model


def stored_weights(model: Coconut) -> dict[str, torch.Tensor]:
    """What a checkpoint file of this model holds, as copies on the CPU in which tied tensors stay one storage."""
    module = stored_model(model)
    return merged_weights(module) if has_adapters(module) else on_cpu(module.state_dict())


def on_cpu(value, copies: dict | None = None):
    """Tensors, and dicts and lists of them, as copies on the CPU; what was one storage stays one."""
    copies = {} if copies is None else copies
    if isinstance(value, dict):
        return {key: on_cpu(part, copies) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_cpu(part, copies) for part in value)
    if not isinstance(value, torch.Tensor):
        return value
    key = (value.data_ptr(), value.shape)
    if key not in copies or not value.numel():
        copies[key] = value.detach().to("cpu", copy=True)
    return copies[key]


def load_strictly(module: torch.nn.Module, weights: dict[str, torch.Tensor], path: str | Path) -> str:
    """Load with exact key sets and shapes; tied copies may be missing. Returns torch's report line.

    Raises ValueError listing the first ten missing, unexpected or misshapen keys.
    """
    own = module.state_dict()
    weights = {key: value for key, value in weights.items() if key in own or not IGNORED_KEY.search(key)}
    present = {own[key].data_ptr() for key in weights if key in own}
    missing = [key for key in own if key not in weights and own[key].data_ptr() not in present]
    unexpected = [key for key in weights if key not in own]
    shapes = [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    problems = [
        f"{len(keys)} {what}: {', '.join(keys[:10])}{' ...' if len(keys) > 10 else ''}"
        for what, keys in {"missing keys": missing, "unexpected keys": unexpected, "other shapes": shapes}.items()
        if keys
    ]
    if problems:
        raise ValueError(f"{path} is a checkpoint of another architecture or vocabulary: {'; '.join(problems)}")
    return str(module.load_state_dict(weights, strict=False))


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint file that `load_model_path` names: a file, or in a folder the one in best.json, else the newest."""
    path = Path(path)
    if path.is_file():
        return path
    if path.is_dir():
        best = path / "best.json"
        files = [str(read_json(best, "file")["file"])] if best.is_file() else []
        files = [name for name in files if NUMBERED.fullmatch(name) or name == PHASE1_BEST]  # no path out of the folder
        files += [f"checkpoint_{n}" for n in reversed(numbered_checkpoints(path))]
        files += [f"epoch_{n}.pt" for n in reversed(numbered_checkpoints(path, PHASE1_EPOCH))]
        for name in files:
            if (path / name).is_file():
                print(f"load_model_path is a folder; taking {path / name}")
                return path / name
    folder = path if path.is_dir() else path.parent
    held = sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []
    shown = f"{folder} holds {', '.join(held[:20]) or 'nothing'}" if folder.is_dir() else f"{folder} does not exist either"
    if any(name.startswith("sharded_") for name in held):
        shown += f"; python sharding.py {folder} makes checkpoint files of its shards"
    raise ValueError(f"load_model_path: no checkpoint at {path}; {shown} (files are named checkpoint_N, N = epochs trained)")


def numbered_checkpoints(folder: Path, pattern: re.Pattern = NUMBERED) -> list[int]:
    """The N of every checkpoint_N (or of what else the pattern names), ascending; other names do not count."""
    names = (pattern.fullmatch(p.name) for p in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(match[1]) for match in names if match)


# ---------------------------------------------------------------- building a model


def build_model(config: Config, weights_path: Path | None = None, weights: dict | None = None):
    """Tokenizer, backbone, thought tokens, wrapper and weights of a run, on the CPU.

    Returns (model: Coconut, tokenizer, ids: ThoughtIds, report: torch's key report or None). A plain language model is
    wrapped too (feedback mode `none`), so that there is one forward. Raises ValueError where the file does not fit.
    """
    tokenizer = backbones.load_tokenizer(config.tokenizer_id)
    options = backbones.own_options(config.model_id, tokenizer) | config.model_options
    ids = backbones.add_thought_tokens(tokenizer) if config.markers else backbones.ThoughtIds()
    base = backbones.load_backbone(config.model_id, config.from_scratch, config.seed, **options)
    if weights_path is not None and weights is None:
        weights = read_weights(weights_path)
    wrapped_file = weights is not None and any(key.startswith("base_causallm") for key in weights)
    if wrapped_file and config.plain:
        raise ValueError(f"Cannot load coconut model weights into a causallm model ({weights_path})")

    report = None
    if weights is not None and not wrapped_file:
        embedding = next(
            key
            for key, value in base.state_dict().items()
            if value is base.get_input_embeddings().weight.data
            or value.data_ptr() == base.get_input_embeddings().weight.data_ptr()
        )
        rows = weights[embedding].shape[0] if embedding in weights else None
        grown = config.markers and rows == len(tokenizer)
        if grown:
            backbones.resize_vocabulary(base, rows)
        report = load_strictly(base, weights, weights_path)
        if config.markers and not grown:
            backbones.grow_vocabulary(base, tokenizer, ids)
    elif wrapped_file:
        backbones.resize_vocabulary(base, len(tokenizer))  # the rows are in the file
    elif config.markers:
        backbones.grow_vocabulary(base, tokenizer, ids)

    mode = "none" if config.plain else config.feedback_mode
    options = (mode, config.force_multipass, config.latent_iterations, config.latent_norm)
    model = Coconut(base, ids.latent, ids.start, ids.end, tokenizer.eos_token_id, *options)
    if model.pause_embedding is not None:
        model.pause_embedding.data.copy_(backbones.anchor_vector(base.get_input_embeddings(), tokenizer))
    if wrapped_file:
        weights = with_mode(weights, mode, weights_path)
        report = load_strictly(model, weights, weights_path)
    return model, tokenizer, ids, report


def with_mode(weights: dict, mode: str, path) -> dict:
    """The weights of a wrapped file, checked against the feedback mode that is to run them.

    A file names its mode by `feedback_mode_id`; no pause vector means `continuous`; a pause vector without an id (written
    by other code) is taken for the pause mode asked for.
    """
    found = "continuous" if "pause_embedding" not in weights else None
    if "feedback_mode_id" in weights:
        found = MODE_OF_ID.get(int(weights["feedback_mode_id"]), "unknown")
    if found is None and mode not in PAUSE_MODES:
        raise ValueError(
            f"{path} has a pause_embedding and does not say its mode; set feedback_mode to one of {', '.join(PAUSE_MODES)}"
        )
    if found is not None and found != mode:
        raise ValueError(
            f"{path} is a {found} checkpoint, the config says {mode}; set feedback_mode: {found} or load another file"
        )
    if found is None:
        weights = weights | {"feedback_mode_id": torch.tensor(FEEDBACK_MODES[mode].mode_id)}
    return weights


def load_run(path: str | Path, **changes):
    """A trained model from a checkpoint file or run folder, which knows its own config; for analyses.

    Returns (model in eval mode, tokenizer, ids, config). `changes` override config keys (model_id of a moved folder, say).
    """
    path = find_checkpoint(path)
    side = path.with_name(path.name.replace("checkpoint_", "state_"))
    side = side if side.is_file() and side != path else path.with_name("run.json")
    if not side.is_file():
        raise ValueError(
            f"{path} has no state_N or run.json beside it that says what it is; stock files need a YAML and run.py"
        )
    config = check_config(read_json(side, "config")["config"] | changes, str(side))
    model, tokenizer, ids, _ = build_model(config, path)
    return model.eval(), tokenizer, ids, config


@lru_cache(1)
def versions() -> dict[str, str]:
    """Versions of what decides the numbers, and of this code."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        code = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        code = ""
    return {
        "code": code or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
