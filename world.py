"""This process among its peers: rank, device, and the few things that ranks tell each other.

with process_group("auto") as world:      # torchrun's environment, or a world of one
    world.print("once")
    total = world.sum(3)
    if world.any(asked_to_stop): ...
"""

import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

_TORCHRUN = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}


@dataclass(frozen=True)
class World:
    """This process among its peers. One process without torchrun is a world of one."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def wide(self) -> torch.dtype:
        """The widest floating-point type of the device, for sums."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    def print(self, *args) -> None:
        if self.is_main:
            print(*args, flush=True)

    def sum(self, *values: float) -> list[float]:
        """Sums over ranks, in float64; by the hosts alone, so that no device is waited for."""
        if self.size == 1:
            return [float(v) for v in values]
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether the flag is true on some rank."""
        return self.sum(float(flag))[0] > 0

    def gather(self, items: list) -> list:
        """All ranks' items in one list, on every rank."""
        if self.size == 1:
            return items
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def from_main(self, value):
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=self.device if self.device.type == "cuda" else None)
        return box[0]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def _store(size: int) -> dist.Store:
    """Where the processes find each other; their launcher's, under a name of its own for every restart.

    torchrun keeps one store for all its restarts, and the addresses in it would be those of the processes before.
    """
    if size == 1:
        return dist.HashStore()
    store, _, _ = next(dist.rendezvous("env://"))
    return dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


@contextmanager
def process_group(device: str = "auto", always: bool = False):
    """Yield this process's `World`: nccl on CUDA, gloo for what hosts say to each other, nothing without torchrun.

    `always`: make a group for a world of one, too (sharded parameters need one).
    """
    size, rank, local_rank = (int(os.environ.get(key, default)) for key, default in _TORCHRUN.items())
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() and size == 1 else "cpu"
    place = torch.device(device, local_rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(place)
    grouped = size > 1 or always
    if grouped:
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=_store(size), rank=rank, world_size=size)
    try:
        yield World(rank, size, place)
    finally:
        if grouped:
            dist.destroy_process_group()
