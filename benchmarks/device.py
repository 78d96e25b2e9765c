"""What a device can do at most, and how much of its memory a training step takes.

matmul    TFLOP/s of one large matrix product in bf16, the arithmetic ceiling that was measured here
copy      GB/s of a copy within the device's memory, bytes read and bytes written counted
P3        peak memory of M3 training steps of 32 rows at the last stage with AdamW, weights included
"""

import gc

import torch

from batches import epoch_batches
from coconut import decoder_blocks
from optimizers import build_optimizer
from recompute import recompute_blocks
from reporting import peak_memory
from training import host_batch, on_device

from .material import Material, Source
from .ratios import step
from .timing import ROUNDS, alternate, result, spread


def facts(device: torch.device) -> dict:
    """Name, memory and versions of a device."""
    if device.type != "cuda":
        return {"threads": torch.get_num_threads()}
    card = torch.cuda.get_device_properties(device)
    return {
        "name": card.name,
        "memory_gb": card.total_memory / 1e9,
        "multiprocessors": card.multi_processor_count,
        "capability": f"{card.major}.{card.minor}",
        "cuda": torch.version.cuda,
        "bf16": torch.cuda.is_bf16_supported(),
    }


def measure_ceilings(device: torch.device, side: int = 8192, copied_bytes: int = 4 * 10**9) -> list[dict]:
    """Both ceilings, on random data (zeros are faster)."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(copied_bytes // 4, device=device).normal_()
    target = torch.empty_like(source)
    works = {"matmul": lambda i: torch.matmul(a, b), "copy": lambda i: target.copy_(source)}
    taken = alternate(works, 3 * ROUNDS, device, warm_up=5)
    rates = {"matmul": (2 * side**3 / 1e12, "TFLOP/s"), "copy": (2 * source.numel() * 4 / 1e9, "GB/s")}
    sizes = {"matmul": f"bf16, {side} x {side} x {side}", "copy": f"{copied_bytes / 1e9:.3g} GB"}
    return [
        result(name, sizes[name], unit=unit, **spread([amount / t for t in taken[name]]))
        for name, (amount, unit) in rates.items()
    ]


def measure_memory(shape: str, source: Source, device: torch.device, rows: int = 32) -> list[dict]:
    """P3 in float32 and bf16 autocast, each with and without activation checkpointing.

    All batches of an epoch over the rows are run, so that the longest one is among them. Off CUDA it is the peak of the
    whole process, which never falls.
    """
    results = []
    for bf16 in (False, True):
        for recompute in (False, True):
            clear(device)
            peak, widest = train_once(Material(shape, source, device, bf16=bf16, activation_checkpointing=recompute), rows)
            label = f"{shape}, {'bf16' if bf16 else 'fp32'}" + (", activation checkpointing" * recompute)
            results.append(result("P3", label, peak / 1e9, "GB", batch_size=rows, note=f"widest batch {widest} columns"))
    clear(device)
    return results


def train_once(material: Material, rows: int) -> tuple[int, int]:
    """Train on every batch of an epoch; returns the peak in bytes and the columns of the widest batch."""
    run, device = material.ours("continuous"), material.device
    if run.config.activation_checkpointing:
        recompute_blocks(decoder_blocks(run.model.base_causallm))
    optimizer = build_optimizer(run.model, run.config)
    clear(device)
    widest = 0
    for numbers in epoch_batches(len(material.rows), rows, 0, 0):
        batch = on_device(host_batch(run, material.rows, numbers), device)
        widest = max(widest, batch["input_ids"].shape[1])
        step(run, run.model, batch, optimizer)
    return peak_memory(device), widest


def clear(device: torch.device) -> None:
    """Give back what is no longer in use, and begin a new peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
