"""The folder of one training run: its lock, what is written to it and kept, and where a run goes on.

    folder = RunFolder(config)
    folder.open(exclusive=True)              # refuses a second process, and a folder that holds another run
    folder.find_resume()                     # the newest state that can be read, if there is one
    folder.save_checkpoint(model, position)

`<save_path>/<name>/` holds
    checkpoint_N   weights after N epochs: one flat state dict of tensors, readable by the stock code
    state_N        JSON: what checkpoint_N is (epoch, mode, seed, resolved config, versions, size)
    last_state     weights, optimizer and position of the newest snapshot that checkpoint_N alone can't continue;
                   last_shards_STEP/ where the parameters are sharded (sharding.py), with sharded_N/ for unconsolidated weights
    run.json       the resolved config of the training run; best.json the best validated checkpoint
    metrics.jsonl  every step and evaluation; eval_N.jsonl the per-question records
"""

import fcntl
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint import (
    PHASE1_EPOCH,
    numbered_checkpoints,
    on_cpu,
    read_weights,
    read_whole,
    save_whole,
    stored_model,
    stored_weights,
    versions,
)
from coconut import Coconut
from files import read_json, read_jsonl, remove, write_json, write_jsonl
from lora import fingerprint, has_adapters, load_trained, trained
from utils import Config

SHARDED = re.compile(r"sharded_(\d+)")
PHASE1_KEYS = {"raw_model_state_dict": "model", "optimizer_state_dict": "optimizer"}  # of a snapshot, in epoch_N.pt


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

    names = ("checkpoint_{}", "sharded_{}", "state_{}")  # of an epoch's files
    one_file = False  # whether what an epoch left is one file, from which training can go on

    def __init__(self, config: Config):
        self.path, self.config, self.tokenizer = config.run_dir, config, None
        self.metrics = self.path / "metrics.jsonl"
        self.resumed_from: str | None = None  # the name of what `find_resume` found
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
            remove(leftover)
        if self.metrics.is_file() and not self.metrics.read_bytes().endswith(b"\n"):
            records = read_jsonl(self.metrics)
            write_jsonl(self.metrics, records)

    def evaluations(self, up_to_epoch: int) -> dict[int, dict]:
        """{epoch index: record} of every validated epoch before `up_to_epoch`; of a repeated one the last."""
        evaluated = (r for r in read_jsonl(self.metrics, "event") if r["event"] == "eval")
        return {r["epoch"]: r for r in evaluated if r["epoch"] < up_to_epoch}

    def holds_states(self) -> bool:
        """Whether there is anything to go on from."""
        return bool(self.numbers() or self.snapshots())

    def before(self) -> dict | None:
        """run.json of the run that would be resumed here; None where there is nothing to resume or it does not say."""
        file = self.path / "run.json"
        return read_json(file, "config") if file.is_file() and self.holds_states() else None

    def micro_batch(self) -> int | None:
        """The micro-batch of the run that would be resumed here: rows meet in the same batches only if it is kept."""
        before = self.before()
        return before and before["config"]["batch_size_training"]

    # ------------------------------------------------------------ saving

    def begin(self, model: Coconut, **facts) -> None:
        """Write what the run is."""
        values = {"model_key": self.config.model_key, "config": self.config.model_dump(), "versions": versions()}
        write_json(self.path / "run.json", values | facts)
        if model.pause_embedding is not None and not (self.path / "pause_init").is_file():
            save_whole(model.pause_embedding.detach().cpu().clone(), self.path / "pause_init")

    def _refuse_other_run(self) -> None:
        before, now = self.before(), self.config.model_dump()
        if before is None:
            return
        before = before["config"]
        if now["batch_size_training"] == "auto":
            now["batch_size_training"] = before.get("batch_size_training")
        defaults = {key: f.get_default(call_default_factory=True) for key, f in Config.model_fields.items()}
        differing = [key for key in now if before.get(key, defaults[key]) != now[key]]
        identity = ("coconut", "cot", "no_thoughts", "no_cot", "feedback_mode", "model_id", "c_thought", "from_scratch")
        identity += ("model_options", "tokenizer", "lora", "icot")
        fatal = [f"{key}: {before.get(key)} -> {now[key]}" for key in differing if key in identity]
        if fatal:
            raise ValueError(f"{self.path} holds another run ({'; '.join(fatal)}); give this one another name or save_path")
        if differing:
            print("Warning: resuming with other settings: " + "; ".join(f"{k}: {before.get(k)} -> {now[k]}" for k in differing))

    def save_checkpoint(self, model: Coconut, position: Position, weights: dict | None = None) -> Path:
        """Write state_N, then checkpoint_N, for N = position.epoch epochs done. `weights`: copies made before (default: now)."""
        weights = stored_weights(model) if weights is None else weights
        self.describe(model, position, weights)
        path = self.path / f"checkpoint_{position.epoch}"
        save_whole(weights, path)
        return path

    def describe(self, model: Coconut, position: Position, weights: dict[str, torch.Tensor]) -> None:
        """Write state_N, which says what the weights after N = position.epoch epochs are."""
        sizes = {id(value): value.numel() * value.element_size() for value in weights.values()}
        state = {
            "epoch": position.epoch - 1,
            "global_step": position.global_step,
            "feedback_mode": model.feedback_mode,
            "model_key": self.config.model_key,
            "seed": self.config.seed,
            "tensor_bytes": sum(sizes.values()),
            "stock_loadable": self.config.plain or model.feedback_mode == "continuous",
            "config": self.config.model_dump(),
            "versions": versions(),
        }
        write_json(self.path / f"state_{position.epoch}", state)

    def save_last_state(self, model: Coconut, optimizer, position: Position, copies: dict | None = None) -> None:
        """Write everything that continuing from here needs, in one file. `copies`: of `training_state` (default: now)."""
        copies = training_state(model, optimizer) if copies is None else copies
        save_whole(copies | {"position": vars(position)}, self.path / "last_state")

    def drop_snapshots(self, but: str | None = None) -> None:
        """Remove snapshots that a checkpoint_N, or the one named `but`, has overtaken."""
        for path in self.snapshots():
            if path.name != but:
                remove(path)

    def snapshots(self) -> list[Path]:
        """Every `last_state` and `last_shards_STEP` here."""
        return [p for p in self.path.glob("last_*") if p.name == "last_state" or re.fullmatch(r"last_shards_\d+", p.name)]

    def tidy(self, keep: str) -> None:
        """Remove the checkpoints (and their state_N) that the policy does not keep; never the newest, never the best.

        `keep`: all, best, last K, every N. Weights left in shards (sharded_N) count like checkpoint_N.
        """
        numbers = self.numbers()
        word, n = (keep.split() + [0])[:2]
        wanted = {
            "all": numbers,
            "best": [],
            "last": numbers[-int(n) :],
            "every": [i for i in numbers if not i % max(int(n), 1)],
        }
        file = self.path / "best.json"
        best = read_json(file, "epoch")["epoch"] + 1 if file.is_file() else None
        for i in set(numbers) - {*wanted[word], best, numbers[-1] if numbers else None}:
            for name in self.names:
                remove(self.path / name.format(i))

    def numbers(self) -> list[int]:
        """After how many epochs there are weights here, ascending."""
        return sorted({*numbered_checkpoints(self.path), *numbered_checkpoints(self.path, SHARDED)})

    def has_weights(self, epochs: int) -> bool:
        """Whether the weights after so many epochs lie here."""
        return epochs in self.numbers()

    def note_best(self, record: dict, loss: float | None, model: Coconut) -> None:
        """Write best.json: the best validated epoch, its accuracy (and in some formats its loss), and its file."""
        write_json(self.path / "best.json", {"file": f"checkpoint_{record['epoch'] + 1}"} | record)

    def pause_distance(self, model: Coconut) -> dict[str, float]:
        """{"pause_l2": how far the pause vector is from where it started}; empty for modes without one."""
        init = self.path / "pause_init"
        if model.pause_embedding is None or not init.is_file():
            return {}
        pause_D = model.pause_embedding.detach()
        pause_D = pause_D.full_tensor() if hasattr(pause_D, "full_tensor") else pause_D
        return {"pause_l2": float((pause_D.float().cpu() - read_whole(init)).norm())}

    # ------------------------------------------------------------ resuming

    def readable(self, snapshots: Iterable[Path]) -> Iterator[tuple[Path, Position]]:
        """Those among some snapshots that are not damaged, with their positions."""
        for path in snapshots:
            try:
                yield path, Position(**snapshot_position(path))
            except ValueError as error:
                print(f"Warning: {error}; going on without it")

    def find_resume(self) -> tuple[Path, Position] | None:
        """The newest undamaged state to continue from: a snapshot or a checkpoint_N, whichever is further."""
        found = [(Position(epoch=n), self.path / f"checkpoint_{n}") for n in numbered_checkpoints(self.path)]
        found += [(position, path) for path, position in self.readable(self.snapshots())]
        for position, path in sorted(found, key=lambda c: (c[0].epoch, c[0].step, c[1].name.startswith("last")), reverse=True):
            self.resumed_from = path.name
            if is_snapshot(path):
                return path, position
            try:
                read_weights(path)
            except ValueError as error:
                print(f"Warning: {error}; falling back to the one before")
                continue
            side = self.path / f"state_{position.epoch}"
            try:
                position.global_step = read_json(side, "global_step")["global_step"] if side.is_file() else 0
            except ValueError as error:
                print(f"Warning: {error}; updates are counted from 0")
            return path, position
        return None


# ---------------------------------------------------------------- snapshots


def is_snapshot(path: Path) -> bool:
    """Whether a file or folder holds all that going on needs, not weights alone."""
    return path.name.startswith("last_") or PHASE1_EPOCH.fullmatch(path.name) is not None


def read_state(path: Path) -> dict:
    """What a last_state holds, or an epoch_N.pt under the same names. ValueError where a file is damaged or another."""
    state = read_whole(path)
    if isinstance(state, dict):
        state = {PHASE1_KEYS.get(key, key): value for key, value in state.items()}
    if not isinstance(state, dict) or not {"model", "optimizer", "position"} <= state.keys():
        raise ValueError(f"{path} is not a training state")
    return state


def training_state(model: Coconut, optimizer, average=None) -> dict:
    """Copies on the CPU of weights, optimizer state and the weights' average, which training can then go on changing.

    With LoRA only what is trained, and `base`, by which the frozen weights are known again.
    """
    module = stored_model(model)
    weights = (
        {"model": trained(module), "base": fingerprint(module)} if has_adapters(module) else {"model": module.state_dict()}
    )
    state = weights | {"optimizer": optimizer.state_dict()}
    return on_cpu(state | ({"average": average.state(model)} if average else {}))


def snapshot_position(path: Path) -> dict:
    """The position of a snapshot. ValueError where it is damaged anywhere."""
    if path.is_dir():
        from sharding import read_index

        index = read_index(path)
        if "position" not in index:
            raise ValueError(f"{path} is not a training state")
        return index["position"]
    return read_state(path)["position"]


def read_snapshot(path: Path, sharded: bool) -> tuple[dict | None, Callable]:
    """(weights, restore) of a snapshot, by processes that hold whole parameters or sharded ones.

    `restore(model, optimizer, average)` gives the optimizer, the weights' average, or both their state back; all ranks call
    it together. With neither it gives a model with adapters theirs; these are no weights, which are None then, as they are
    where the parameters must be sharded before `sharding.load_shards` can fill them.
    """
    if not path.is_dir() and not sharded:
        state = read_state(path)

        def restore(model, optimizer=None, average=None) -> None:
            if optimizer is not None:
                optimizer.load_state_dict(state["optimizer"])
            if average is not None and "average" in state:
                average.load(model, state["average"])
            if optimizer is None and average is None:
                load_trained(stored_model(model), state["model"], state["base"])

        return None if "base" in state else state["model"], restore
    import sharding as shards

    if not path.is_dir():
        state = read_whole(path)
        return state["model"], lambda model, optimizer, *_: shards.load_indexed_optimizer(state["optimizer"], model, optimizer)
    if sharded:
        return None, lambda model, optimizer, *_: shards.load_sharded_optimizer(path, "optimizer.", model, optimizer)
    weights, optimizer_state = (shards.load_whole(path, prefix) for prefix in ("model.", "optimizer."))
    tied = shards.read_index(path)["tied"]
    weights |= {name: weights[first] for name, first in tied.items()}
    return weights, lambda model, optimizer, *_: shards.load_whole_optimizer(optimizer_state, model, optimizer)
