"""Parameters in shards (FSDP2), and their checkpoints: each process writes its own part, any number of them reads.

    save_shards(folder / "sharded_3", tensors, facts, world)      # all ranks together; DTensors or plain tensors by name
    load_shards(folder / "sharded_3", tensors)                    # into tensors of any sharding, in place

    python sharding.py runs/prosqa/llama-coconut                  # every sharded_N of a run as the usual file checkpoint_N
    python sharding.py runs/prosqa/llama-coconut/sharded_3 --delete

A sharded checkpoint is a folder of safetensors files and an index.json with their checksums, renamed into place when all
is there: nothing in it is ever unpickled. All processes must see one file system.
"""

import argparse
import hashlib
import re
import shutil
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from checkpoint import save_whole, stored_model
from files import NoRoom, read_json, remove, write_json
from taps import decoder_blocks

INDEX = "index.json"


class Fsdp2:
    """Parameters, gradients and optimizer state in shards (torch's fully_shard; ZeRO stage 3, arXiv 1910.02054), with the
    methods of `parallel.Alone`.

    Left to itself it gathers and reduces at every call of a block, and ranks with different numbers of passes would wait for
    each other forever. So parameters are gathered once an update or evaluation, and gradients are reduced in one closing
    pass over a row of two tokens, alike on all ranks, with weight 0. `bf16: True` gathers and computes in bf16 and reduces
    in float32; the shards are float32.
    """

    sharded = True

    def __init__(self, model, world, config):
        self.model = self.wrapped = model
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if config.bf16 else MixedPrecisionPolicy()
        mesh = init_device_mesh(world.device.type, (world.size,))
        options = {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": False}
        for block in decoder_blocks(model.base_causallm):
            fully_shard(block, **options)
        fully_shard(model, **options)
        model.set_reshard_after_backward(False)
        model.set_requires_gradient_sync(False)
        self.device = world.device
        with torch.no_grad():
            self._closing_loss()  # the library wants to see the outermost module first
        self._each(FSDPModule.reshard)

    def accumulating(self, last: bool):
        return warnings_of_views_ignored()

    def reduce_gradients(self) -> None:
        self.model.set_requires_gradient_sync(True)
        (self._closing_loss() * 0.0).backward()
        self.model.set_requires_gradient_sync(False)
        self._each(FSDPModule.reshard)

    def _closing_loss(self) -> torch.Tensor:
        """A loss through every parameter, of one pass."""
        model, after_pass = self.model, self.model.after_pass
        model.after_pass = None
        ids = torch.full((1, 2), model.eos_token_id, device=self.device)
        with warnings_of_views_ignored():
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        model.after_pass = after_pass
        return loss

    @contextmanager
    def whole(self):
        self._each(FSDPModule.unshard)
        try:
            yield
        finally:
            self._each(FSDPModule.reshard)

    def _each(self, method) -> None:
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                method(module)


@contextmanager
def warnings_of_views_ignored():
    """Nobody here changes the wrapper's outputs in place, which is what the library warns of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        yield


# ---------------------------------------------------------------- tensors by name


def unique_tensors(module: torch.nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Parameters and buffers under the first of their names in the state dict, and {further name: first name}."""
    first, tensors, tied = {}, {}, {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
        else:
            first[id(tensor)], tensors[name] = name, tensor
    return {name: tensor.detach() for name, tensor in tensors.items()}, tied


def gathered_weights(module: torch.nn.Module, keep: bool) -> dict[str, torch.Tensor]:
    """The whole state dict on the CPU, tensor after tensor, where `keep` is true (rank 0); all ranks call this together."""
    tensors, tied = unique_tensors(module)
    whole = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            whole[name] = full.to("cpu", copy=True)
    return {name: whole[tied.get(name, name)] for name in module.state_dict()} if keep else {}


# ---------------------------------------------------------------- writing


def save_shards(path: Path, tensors: dict[str, torch.Tensor], facts: dict, world) -> None:
    """Write a sharded checkpoint, whole or not at all; all ranks call this together. `facts` go into its index.

    Raises NoRoom on every rank where the disk refuses.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    if world.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    world.barrier()
    try:
        with warnings.catch_warnings():  # about what a world of one does without
            warnings.simplefilter("ignore")
            dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True))
    except dcp.api.CheckpointException as error:
        reason = " ".join(str(next(iter(error.failures.values()))[0]).split())[:150]
        world.barrier()
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise NoRoom(f"cannot write {path} ({reason}): make room and start the same command again") from None
    world.barrier()
    mine = sorted(temporary.glob("*.safetensors"))[world.rank :: world.size]
    sums = dict(world.gather([(file.name, _checksum(file)) for file in mine]))
    if world.is_main:
        write_json(temporary / INDEX, facts | {"files": sums})
        remove(path)
        temporary.rename(path)
    world.barrier()


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- reading


def read_index(path: Path) -> dict:
    """The index of a sharded checkpoint, after its files were compared with it. ValueError where one is missing or damaged."""
    if not (path / INDEX).is_file():
        raise ValueError(f"{path} is not a sharded checkpoint: it has no {INDEX}")
    index = read_json(path / INDEX, "files", "tied")
    unknown = sorted({file.name for file in path.glob("*.safetensors")} - set(index["files"]))
    if unknown:
        raise ValueError(f"{path} holds {unknown[0]}, which its {INDEX} does not know; take it out")
    for name, wanted in index["files"].items():
        file = path / Path(name).name
        if not file.is_file() or _checksum(file) != wanted:
            raise ValueError(f"{file} is {'damaged' if file.is_file() else 'missing'}; use the checkpoint before it or a copy")
    return index


def load_shards(path: Path, tensors: dict[str, torch.Tensor], alone: bool = False) -> None:
    """Fill tensors (sharded in any way, or whole) by name; all ranks call this together, or one process `alone`."""
    with warnings.catch_warnings():  # that a process reads alone
        warnings.simplefilter("ignore")
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=alone)


def load_sharded_model(path: Path, model) -> None:
    """Fill a model whose parameters are sharded from a snapshot; all ranks call this together."""
    tensors, _ = unique_tensors(stored_model(model))
    load_shards(path, {f"model.{name}": tensor for name, tensor in tensors.items()})


def tensors_in(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Name -> (shape, type) of every tensor of a sharded checkpoint."""
    found = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    return {name: (value.size, value.properties.dtype) for name, value in found.items()}


def load_whole(path: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """All tensors whose names begin with `prefix`, whole, on the CPU, without it."""
    wanted = {name: spec for name, spec in tensors_in(path).items() if name.startswith(prefix)}
    tensors = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in wanted.items()}
    load_shards(path, tensors, alone=True)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


# ---------------------------------------------------------------- optimizer state, by the names of its parameters


def optimizer_tensors(model: torch.nn.Module, optimizer) -> dict[str, torch.Tensor]:
    """{"<parameter>.<field>": tensor} of everything an optimizer remembers."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {f"{names[p]}.{key}": value for p, fields in optimizer.state.items() for key, value in fields.items()}


def load_sharded_optimizer(path: Path, prefix: str, model: torch.nn.Module, optimizer) -> None:
    """Fill an optimizer over sharded parameters from a sharded checkpoint; all ranks call this together."""
    parameters, targets = dict(model.named_parameters()), {}
    for name, (size, dtype) in tensors_in(path).items():
        if name.startswith(prefix):
            parameter, key = name.removeprefix(prefix).rsplit(".", 1)
            p = parameters[parameter].detach()
            value = torch.zeros_like(p) if size == p.shape else torch.zeros(size, dtype=dtype, device=p.device)
            optimizer.state[parameters[parameter]][key] = targets[name] = value
    load_shards(path, targets)


def load_whole_optimizer(named: dict[str, torch.Tensor], model: torch.nn.Module, optimizer) -> None:
    """Fill an optimizer from whole tensors by name; over sharded parameters each process keeps its part."""
    parameters = dict(model.named_parameters())
    for name, value in named.items():
        parameter, key = name.rsplit(".", 1)
        p = parameters[parameter]
        value = value.to(p.device)
        if isinstance(p, DTensor) and value.shape == p.shape:
            value = distribute_tensor(value, p.device_mesh, p.placements)
        optimizer.state[p][key] = value


def load_indexed_optimizer(state: dict, model: torch.nn.Module, optimizer) -> None:
    """`load_whole_optimizer` from an optimizer's own state dict, which numbers its parameters."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    named = {f"{names[held[i]]}.{key}": value for i, fields in state["state"].items() for key, value in fields.items()}
    load_whole_optimizer(named, model, optimizer)


# ---------------------------------------------------------------- consolidation


def consolidate(path: Path) -> Path:
    """Write a run's `sharded_N` as the usual file `checkpoint_N` beside it. ValueError where it is none or is damaged."""
    number = re.fullmatch(r"sharded_(\d+)", path.name)
    if not number:
        raise ValueError(f"{path} is not a sharded checkpoint of a run: these are folders named sharded_N")
    tied = read_index(path)["tied"]
    tensors = load_whole(path)
    target = path.with_name(f"checkpoint_{number[1]}")
    save_whole(tensors | {name: tensors[first] for name, first in tied.items()}, target)
    return target


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="sharding.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN_OR_SHARDED_N")
    parser.add_argument("--delete", action="store_true", help="remove each sharded_N once its checkpoint_N is written")
    args = parser.parse_args(argv)
    try:
        for path in args.paths:
            folders = [path] if path.name.startswith("sharded_") else sorted(path.glob("sharded_*"))
            if not folders:
                raise ValueError(f"{path} holds no sharded_N; a run with parallel: fsdp2 and consolidate: False writes them")
            for folder in folders:
                print(f"{folder} -> {consolidate(folder)}", flush=True)
                if args.delete:
                    remove(folder)
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
