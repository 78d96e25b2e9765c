"""What training costs: where the seconds go, how many floating-point operations it needs, and what share of the peak that is.

    watch, work, shape = Stopwatch(device), Throughput(), Shape.of(base_causallm, decoder_blocks(base_causallm))
    for batch in batches:
        ...
        watch.mark("data")                   # what went before was this; and so on after each part of the step
        work.count(shape, lengths=[377, 380], labelled=98, positions=2 * 380)
    phases = watch.read()                    # {"data": seconds, ...} since the last read
    rates = work.rates(sum(phases.values()), peak_flops(device, "bf16"))

Operations are counted for real tokens only, and a multiply-add as two; so padding, recomputation and logits that nobody asks
for lower the share of the peak (model FLOPs utilisation, MFU; PaLM, arXiv 2204.02311, appendix B).
"""

import re
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

PHASES = ("data", "prefix", "thoughts", "suffix+head", "backward", "optimizer", "evaluation", "saving")

# ---------------------------------------------------------------- seconds


class HostEvent:
    """The part of `torch.cuda.Event` that a stopwatch needs, by the host's clock."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock, self.at = clock, 0.0

    def record(self) -> None:
        self.at = self.clock()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "HostEvent") -> float:
        return 1000 * (end.at - self.at)


class Stopwatch:
    """Splits the time of training into named phases, without making the host wait for the device at every mark.

    On CUDA a mark is an event in the stream of kernels, which the device stamps when it gets there: work of the host that the
    device did not have to wait for costs nothing, and the phases add up to the wall time. Elsewhere the host's clock counts.

    Args:
        device: where the model runs.
        event: makes one event (default: what suits the device).
    """

    FOLD_AT = 256  # marks that may be pending before those already passed are added up, so that a long epoch holds few events

    def __init__(self, device: torch.device, event: Callable | None = None):
        cuda = torch.device(device).type == "cuda"
        self._make = event or (partial(torch.cuda.Event, enable_timing=True) if cuda else HostEvent)
        self._spare: list = []
        self._marks: deque = deque()  # (phase or None, event), oldest first
        self._seconds: dict[str, float] = {}
        self._origin = self._record()

    def mark(self, name: str) -> None:
        """Attribute the time since the mark before (or the restart) to the phase `name`."""
        self._marks.append((name, self._record()))
        if len(self._marks) > self.FOLD_AT:
            self._fold()

    def restart(self) -> None:
        """Let the next phase begin now; the time since the last mark belongs to none."""
        self._marks.append((None, self._record()))

    def read(self) -> dict[str, float]:
        """Seconds of every phase marked since the last read. Waits until the device has passed the last mark."""
        if self._marks:
            self._marks[-1][1].synchronize()
        self._fold()
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _record(self):
        event = self._spare.pop() if self._spare else self._make()
        event.record()
        return event

    def _fold(self) -> None:
        while self._marks and self._marks[0][1].query():
            name, event = self._marks.popleft()
            if name is not None:
                self._seconds[name] = self._seconds.get(name, 0.0) + self._origin.elapsed_time(event) / 1000
            self._spare.append(self._origin)
            self._origin = event


# ---------------------------------------------------------------- operations


class Shape(NamedTuple):
    """What the cost of a decoder depends on.

    `width` is that of attention (heads x head size), `vocab` the rows of the head, `block_parameters` the elements of the
    weight matrices of all blocks: 12 n_layers d_model^2 for GPT-2. `frozen_parameters` of these are not trained.
    """

    n_layers: int
    width: int
    d_model: int
    vocab: int
    block_parameters: int
    frozen_parameters: int = 0
    frozen_head: bool = False

    @classmethod
    def of(cls, base_causallm, blocks: Iterable[torch.nn.Module], frozen: bool = False) -> "Shape":
        """The shape of a Hugging Face causal LM with these decoder blocks. Dense models: all experts of a mixture count.

        `frozen`: weights that need no gradient now are none that training moves (LoRA); a model that was loaded to be
        evaluated says nothing of that.
        """
        config, blocks = base_causallm.config, list(blocks)
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        head = base_causallm.get_output_embeddings() or base_causallm.get_input_embeddings()
        matrices = [p for block in blocks for p in block.parameters() if p.ndim >= 2]
        still = sum(p.numel() for p in matrices if not p.requires_grad) if frozen else 0
        sizes = (config.num_attention_heads * head_size, config.hidden_size, head.weight.shape[0])
        return cls(len(blocks), *sizes, sum(p.numel() for p in matrices), still, frozen and not head.weight.requires_grad)


def training_flops(shape: Shape, lengths, labelled: int, full_head: bool = False) -> float:
    """FLOPs of forward and backward over rows of `lengths` real tokens with `labelled` supervised ones in all.

    6 * block_parameters * sum T + 6 * n_layers * width * sum T^2 + 6 * d_model * vocab * labelled

    The 6 is 2 forward and 4 backward for each weight and token; a frozen weight (LoRA) needs no gradient, which is 2 less.
    Attention counts the lower triangle, T^2 / 2 pairs, of the two products: half of what PaLM's formula and an uncausal
    kernel count. Left out: biases, norms, softmax, the embedding look-up and the optimizer. A thought adds its one token and
    nothing else, however many passes there are.

    Args:
        lengths: real tokens (thoughts included) of each row, any shape.
        labelled: supervised positions, the only ones that have to meet the head.
        full_head: what it costs with the head at every position, for comparison.
    """
    T = np.asarray(lengths, dtype=np.float64)
    at_head = T.sum() if full_head else labelled
    attention = shape.n_layers * shape.width * np.square(T).sum()
    head = shape.d_model * shape.vocab * at_head
    spared = 2 * (shape.frozen_parameters * T.sum() + head * shape.frozen_head)
    return float(6 * (shape.block_parameters * T.sum() + attention + head) - spared)


# ---------------------------------------------------------------- the peak

# Dense TFLOP/s with float32 accumulation, from NVIDIA's data sheets (where these give the sparse value: its half).
PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "B200": {"tf32": 1100, "bf16": 2250},
    "H200": {"fp32": 67, "tf32": 494, "bf16": 989},
    "H100 PCIe": {"fp32": 51, "tf32": 378, "bf16": 756},
    "H100": {"fp32": 67, "tf32": 494, "bf16": 989},
    "A100": {"fp32": 19.5, "tf32": 156, "bf16": 312},
    "L40S": {"fp32": 91.6, "tf32": 183, "bf16": 362},
    "RTX 4090": {"fp32": 82.6, "tf32": 82.6, "bf16": 165},
    "V100-SXM2": {"fp32": 15.7},
}
OTHER_CHIPS = re.compile(r"\b(MIG|NVL|Laptop|4090 D)\b")  # of the same name, but cut down


def peak_by_name(name: str, precision: str) -> float | None:
    """FLOP/s of a device by its CUDA name, e.g. "NVIDIA H100 80GB HBM3"; None where the table does not know it."""
    if OTHER_CHIPS.search(name):
        return None
    for fragment, peaks in PEAK_TFLOPS.items():  # the longer of two that fit stands first
        if re.search(rf"\b{fragment}\b", name):
            return peaks[precision] * 1e12 if precision in peaks else None
    return None


def peak_flops(device: torch.device, precision: str, override_tflops: float | None = None) -> float | None:
    """Peak FLOP/s of one device for matrix products in "fp32", "tf32" or "bf16".

    `override_tflops` (in 10^12) goes before the table. None where neither knows: CPUs, Apple GPUs, cards not in the table.
    """
    if override_tflops is not None:
        return override_tflops * 1e12
    device = torch.device(device)
    return peak_by_name(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None


# ---------------------------------------------------------------- both together


@dataclass
class Throughput:
    """The work of some batches, over all processes; with the seconds it took, the rates that metrics.jsonl holds."""

    samples: int = 0
    tokens: int = 0
    positions: int = 0
    labelled: int = 0
    flops: float = 0.0

    def count(self, shape: Shape, lengths, labelled: int, positions: int) -> None:
        """Add a batch: real tokens of each row, supervised tokens in all, and rows x columns as padded."""
        self.samples += len(lengths)
        self.tokens += int(np.sum(lengths))
        self.positions += int(positions)
        self.labelled += int(labelled)
        self.flops += training_flops(shape, lengths, labelled)

    def __iadd__(self, other: "Throughput") -> "Throughput":
        for name, amount in vars(other).items():
            setattr(self, name, getattr(self, name) + amount)
        return self

    def rates(self, seconds: float, peak: float | None = None) -> dict[str, float]:
        """The rates under their keys in metrics.jsonl; those of no time and shares of nothing are 0.

        `peak` is the FLOP/s of all processes' devices together; without it there is no "mfu" (a fraction).
        """

        def per(amount: float, whole: float) -> float:
            return amount / whole if whole > 0 else 0.0

        rates = {
            "seconds": seconds,
            "tokens_per_s": per(self.tokens, seconds),
            "samples_per_s": per(self.samples, seconds),
            "padded_share": per(self.positions - self.tokens, self.positions),
            "supervised_share": per(self.labelled, self.tokens),
            "flops": self.flops,
            "tflops_per_s": per(self.flops, seconds) / 1e12,
        }
        return rates if peak is None else rates | {"mfu": per(self.flops, seconds * peak)}
