"""The largest micro-batch that fits the memory, for `batch_size_training: auto`.

    micro = largest_micro_batch(candidates(128, world_size), step, device)

On CUDA each candidate is run for real, forward, backward and optimizer step; elsewhere running out of memory kills the
process, so there what a step keeps for its backward pass is measured on one and two rows and extended.
"""

from collections.abc import Callable

import torch

CPU_SHARE = 0.5  # of the free memory may go to activations
CPU_LARGEST = 32  # more rows bring no speed on a CPU


def candidates(effective: int, world_size: int) -> list[int]:
    """Micro-batches with which `world_size` processes reach the effective batch exactly, largest first.

    Raises ValueError where there is none.
    """
    per_process, rest = divmod(effective, world_size)
    if rest or not per_process:
        raise ValueError(f"effective_batch_size: {effective} is no multiple of the {world_size} processes")
    return [n for n in range(per_process, 0, -1) if per_process % n == 0]


def largest_micro_batch(sizes: list[int], step: Callable[[int], None], device: torch.device) -> int:
    """The first of `sizes` (largest first) for which `step(rows)`, a whole training step on the longest rows, fits.

    Raises ValueError where not even the last fits.
    """
    if device.type == "cuda":
        for size in sizes:
            try:
                step(size)
                torch.cuda.synchronize()
                return size
            except torch.OutOfMemoryError:
                continue
            finally:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        raise ValueError("batch_size_training: not even one row fits the GPU's memory; set activation_checkpointing: True")
    one, two = (saved_bytes(lambda n=n: step(n)) for n in (1, 2))
    room = CPU_SHARE * free_memory()
    fitting = [n for n in sizes if n <= CPU_LARGEST and one + (n - 1) * (two - one) <= room]
    if not fitting:
        raise ValueError(
            f"batch_size_training: one row keeps {one / 1e9:.2f} GB for its backward pass, and {room / 1e9:.2f} GB may be used; "
            "set activation_checkpointing: True"
        )
    return fitting[0]


def saved_bytes(work: Callable[[], object]) -> int:
    """Bytes that autograd keeps at most for the backward pass of what `work` computes, each storage once."""
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        work()
    return sum(kept.values())


def free_memory() -> int:
    """Bytes of main memory that can be had without swapping (Linux; elsewhere a careful 4 GB)."""
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":") for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return 4 * 10**9
