"""Save, load, resume: the weights file, the training state beside it, and what the run was.

A run folder `<save_path>/<name>/` holds
    checkpoint_N   weights after N epochs: one flat state dict of tensors, readable by the stock code
    state_N        JSON: what checkpoint_N is (epoch, mode, seed, resolved config, versions, size)
    last_state     weights, optimizer and position of the newest snapshot that checkpoint_N alone can't continue
    run.json       the resolved config of the training run; best.json the best validated checkpoint
    metrics.jsonl  every step and evaluation; eval_N.jsonl the per-question records

Files are written under a temporary name and renamed; nothing is ever unpickled (`weights_only=True`).
"""

import fcntl
import json
import platform
import re
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

import backbones
from coconut import FEEDBACK_MODES, Coconut
from utils import PAUSE_MODES, Config, check_config, read_jsonl, whole_file, write_json

MODE_OF_ID = {cls.mode_id: name for name, cls in FEEDBACK_MODES.items() if cls.mode_id is not None}
IGNORED_KEY = re.compile(r"(^|\.)attn\.(masked_)?bias$")  # causal-mask buffers of old GPT-2 files


# ---------------------------------------------------------------- reading and writing weights


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """A flat state dict from a checkpoint file, on the CPU, without wrapper prefixes. ValueError if it is not one."""
    path = Path(path)
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} is not a readable checkpoint (torch.save of a flat state dict): cut short, or another kind of file"
        )
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises anything from EOFError to RuntimeError on damaged files
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is not a readable checkpoint (torch.save of a flat state dict): {reason}") from None
    if not isinstance(weights, dict) or not all(isinstance(v, torch.Tensor) for v in weights.values()) or not weights:
        raise ValueError(f"{path} is not a checkpoint: it must hold a flat dict of tensors")
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in weights.items()}


def _on_cpu(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies on the CPU in which tied tensors stay one storage."""
    copies: dict = {}
    for tensor in weights.values():
        key = (tensor.data_ptr(), tensor.shape)
        copies.setdefault(key, tensor.detach().cpu())
    return {name: copies[tensor.data_ptr(), tensor.shape] for name, tensor in weights.items()}


def _save(value, path: Path) -> None:
    with whole_file(path, "wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:  # how torch's zip writer reports a failed write
            raise OSError(str(error)) from None


def stored_weights(model: Coconut) -> dict[str, torch.Tensor]:
    """What a checkpoint file of this model holds: a plain language model is stored under its own names, unwrapped."""
    return _on_cpu((model.base_causallm if model.feedback_mode == "none" else model).state_dict())


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
        files = [json.loads(best.read_text())["file"]] if best.is_file() else []
        for name in [*files, *(f"checkpoint_{n}" for n in reversed(numbered_checkpoints(path)))]:
            if (path / name).is_file():
                print(f"load_model_path is a folder; taking {path / name}")
                return path / name
    folder = path if path.is_dir() else path.parent
    held = sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []
    shown = f"{folder} holds {', '.join(held[:20]) or 'nothing'}" if folder.is_dir() else f"{folder} does not exist either"
    raise ValueError(f"load_model_path: no checkpoint at {path}; {shown} (files are named checkpoint_N, N = epochs trained)")


def numbered_checkpoints(folder: Path) -> list[int]:
    """The N of every checkpoint_N, ascending; other names do not count."""
    names = (re.fullmatch(r"checkpoint_(\d+)", p.name) for p in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(match[1]) for match in names if match)


# ---------------------------------------------------------------- building a model


def build_model(config: Config, weights_path: Path | None = None, weights: dict | None = None):
    """Tokenizer, backbone, thought tokens, wrapper and weights of a run, on the CPU.

    Returns (model: Coconut, tokenizer, ids: ThoughtIds, report: torch's key report or None). A plain language model is
    wrapped too (feedback mode `none`), so that there is one forward. Raises ValueError where the file does not fit.
    """
    tokenizer = backbones.load_tokenizer(config.model_id)
    ids = backbones.add_thought_tokens(tokenizer) if config.markers else backbones.ThoughtIds()
    base = backbones.load_backbone(config.model_id, config.from_scratch, config.seed)
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
    elif config.markers:
        backbones.grow_vocabulary(base, tokenizer, ids)

    mode = "none" if config.plain else config.feedback_mode
    options = (mode, config.force_multipass, config.latent_iterations)
    model = Coconut(base, ids.latent, ids.start, ids.end, tokenizer.eos_token_id, *options)
    if model.pause_embedding is not None:
        model.pause_embedding.data.copy_(backbones.anchor_row(base.get_input_embeddings().weight.data, tokenizer))
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
    config = check_config(json.loads(side.read_text())["config"] | changes, str(side))
    model, tokenizer, ids, _ = build_model(config, path)
    return model.eval(), tokenizer, ids, config


# ---------------------------------------------------------------- the run folder


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


@dataclass
class Position:
    """Where training stands: `epoch` epochs are done and `step` updates of the next one, `global_step` in all."""

    epoch: int = 0
    step: int = 0
    global_step: int = 0
    loss_sum: float = 0.0
    loss_tokens: float = 0.0

    def count(self, loss_sum: float, tokens: int) -> None:
        """One update is done; `loss_sum` in nats over `tokens` labelled tokens."""
        self.step, self.global_step = self.step + 1, self.global_step + 1
        self.loss_sum, self.loss_tokens = self.loss_sum + loss_sum, self.loss_tokens + tokens

    def next_epoch(self) -> None:
        self.epoch, self.step, self.loss_sum, self.loss_tokens = self.epoch + 1, 0, 0.0, 0.0


class RunFolder:
    """The folder of one training run. All writing happens on rank 0."""

    def __init__(self, config: Config):
        self.path, self.config = config.run_dir, config
        self.metrics = self.path / "metrics.jsonl"
        self._lock = None

    def open(self, exclusive: bool) -> None:
        """Create the folder; for training keep other processes out and clear what a killed one left half-written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"save_path: cannot make the folder {self.path}: {error.strerror}") from None
        if not exclusive:
            return
        self._refuse_other_run()
        self._lock = open(self.path / ".lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another process is training in {self.path}; stop it or give this run another name") from None
        for leftover in self.path.glob(".tmp-*"):
            leftover.unlink()
        if self.metrics.is_file() and not self.metrics.read_bytes().endswith(b"\n"):
            records = read_jsonl(self.metrics)
            with whole_file(self.metrics) as file:
                file.writelines(json.dumps(record) + "\n" for record in records)

    def evaluations(self, up_to_epoch: int) -> dict[int, float]:
        """{epoch index: accuracy} of every validated epoch before `up_to_epoch`; of a repeated one the last."""
        records = (r for r in read_jsonl(self.metrics) if r["event"] == "eval" and r["epoch"] < up_to_epoch)
        return {r["epoch"]: r["eval/acc"] for r in records}

    def micro_batch(self) -> int | None:
        """The micro-batch of the run that would be resumed here: rows meet in the same batches only if it is kept."""
        if not (numbered_checkpoints(self.path) or (self.path / "last_state").is_file()):
            return None
        return json.loads((self.path / "run.json").read_text())["config"]["batch_size_training"]

    # ------------------------------------------------------------ saving

    def begin(self, model: Coconut) -> None:
        """Write what the run is."""
        write_json(
            self.path / "run.json",
            {"model_key": self.config.model_key, "config": self.config.model_dump(), "versions": versions()},
        )
        if model.pause_embedding is not None and not (self.path / "pause_init").is_file():
            _save(model.pause_embedding.detach().cpu().clone(), self.path / "pause_init")

    def _refuse_other_run(self) -> None:
        file = self.path / "run.json"
        if not file.is_file() or not (numbered_checkpoints(self.path) or (self.path / "last_state").is_file()):
            return
        before, now = json.loads(file.read_text())["config"], self.config.model_dump()
        if now["batch_size_training"] == "auto":
            now["batch_size_training"] = before.get("batch_size_training")
        differing = [key for key in now if before.get(key) != now[key]]
        identity = ("coconut", "cot", "no_thoughts", "no_cot", "feedback_mode", "model_id", "c_thought", "from_scratch")
        fatal = [f"{key}: {before.get(key)} -> {now[key]}" for key in differing if key in identity]
        if fatal:
            raise ValueError(f"{self.path} holds another run ({'; '.join(fatal)}); give this one another name or save_path")
        if differing:
            print("Warning: resuming with other settings: " + "; ".join(f"{k}: {before.get(k)} -> {now[k]}" for k in differing))

    def save_checkpoint(self, model: Coconut, position: Position, **facts) -> Path:
        """Write state_N, then checkpoint_N, for N = position.epoch epochs done; earlier mid-epoch snapshots are obsolete."""
        path = self.path / f"checkpoint_{position.epoch}"
        weights = stored_weights(model)
        tensors = {value.data_ptr(): value.numel() * value.element_size() for value in weights.values()}
        state = {
            "epoch": position.epoch - 1,
            "global_step": position.global_step,
            "feedback_mode": model.feedback_mode,
            "model_key": self.config.model_key,
            "seed": self.config.seed,
            "tensor_bytes": sum(tensors.values()),
            "stock_loadable": self.config.plain or model.feedback_mode == "continuous",
            **facts,
            "config": self.config.model_dump(),
            "versions": versions(),
        }
        write_json(self.path / f"state_{position.epoch}", state)
        _save(weights, path)
        return path

    def save_last_state(self, model: Coconut, optimizer, position: Position) -> None:
        """Write everything that continuing from here needs, in one file."""
        weights, state = stored_weights(model), optimizer.state_dict()
        _save({"model": weights, "optimizer": state, "position": vars(position)}, self.path / "last_state")

    def drop_last_state(self) -> None:
        """Remove a snapshot that a checkpoint_N has overtaken."""
        (self.path / "last_state").unlink(missing_ok=True)

    def pause_distance(self, model: Coconut) -> dict[str, float]:
        """{"pause_l2": how far the pause vector is from where it started}; empty for modes without one."""
        init = self.path / "pause_init"
        if model.pause_embedding is None or not init.is_file():
            return {}
        start_D = torch.load(init, weights_only=True)
        return {"pause_l2": float((model.pause_embedding.detach().float().cpu() - start_D).norm())}

    # ------------------------------------------------------------ resuming

    def find_resume(self) -> tuple[Path, Position] | None:
        """The newest readable state to continue from: last_state or a checkpoint_N, whichever is further."""
        candidates = [(Position(epoch=n), self.path / f"checkpoint_{n}") for n in numbered_checkpoints(self.path)]
        last = self.path / "last_state"
        if last.is_file():
            try:
                position = torch.load(last, map_location="cpu", weights_only=True, mmap=True)["position"]
                candidates.append((Position(**position), last))
            except Exception as error:
                print(f"Warning: {last} is not readable ({' '.join(str(error).split())[:100]}); going on without it")
        for position, path in sorted(candidates, key=lambda c: (c[0].epoch, c[0].step, c[1] == last), reverse=True):
            if path == last:
                return path, position
            try:
                read_weights(path)
            except ValueError as error:
                print(f"Warning: {error}; falling back to the one before")
                continue
            side = self.path / f"state_{position.epoch}"
            if side.is_file():
                position.global_step = json.loads(side.read_text())["global_step"]
            return path, position
        return None


def read_last_state(path: Path) -> tuple[dict, dict]:
    """(weights, optimizer state) of a `last_state` file."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    return state["model"], state["optimizer"]
