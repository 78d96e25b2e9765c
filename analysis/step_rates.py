"""What training steps of a checkpoint cost: seconds, tokens, passes, routed share, memory, floating-point operations.

    subject = Subject.load("runs/lahr/lahr-abc", epoch="20")
    measured = step_rates(subject, TokenTable(get_dataset(path, subject.tokenizer)), stage=3, epoch=19)
    measured["step_ms"], measured["processed_tokens_per_s"], measured["routed_fraction"]

A step is an update as the run made them: its rows and micro-batches, forward, backward, clipping, optimizer, in its precision;
in one process and without compilation. Batches lie on the device before the clock starts. The model is trained on by this, so
score it before.

Operations are those of forward and backward over real tokens, a multiply-add as two, as `accounting` counts them, but of
a block that skips tokens only those of the tokens it took, and of memories what they compare and read, not their size.

Shape letters: B rows, T columns, M routed layers.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from accounting import Shape, training_flops
from analysis.subject import Subject
from backbones.memory_layers import Memory, ValueTable
from backbones.routing import Router
from batches import batches_of_epoch
from coconut import Coconut, decoder_blocks
from dataset import get_cot_latent_dataset
from optimizers import build_optimizer
from recompute import recompute_blocks
from reporting import peak_memory
from tokens import TokenTable

REPEATS, STEPS, WARM_UP = 5, 8, 1  # timed repeats of so many updates each, after so many repeats that do not count
LEAST_REPEATS = 3


# ---------------------------------------------------------------- operations


class BlockCost(NamedTuple):
    """Multiply-adds of one block's matrices and memories for one token, and which routed layer it is (None: it takes all)."""

    per_token: int
    routed: int | None


def block_costs(base) -> list[BlockCost]:
    """Of every decoder block. Tables of values cost what is read of them."""
    numbers, width = {layer: i for i, layer in enumerate(_routed_layers(base))}, base.config.hidden_size
    return [BlockCost(_per_token(block, width), numbers.get(layer)) for layer, block in enumerate(decoder_blocks(base))]


def _per_token(block: nn.Module, width: int) -> int:
    tables = {id(p) for module in block.modules() if isinstance(module, ValueTable) for p in module.parameters()}
    matrices = sum(p.numel() for p in block.parameters() if p.ndim >= 2 and id(p) not in tables)
    reads = sum(getattr(module, "heads", 1) * module.topk for module in block.modules() if isinstance(module, Memory))
    return matrices + reads * width


def _routed_layers(base) -> list[int]:
    return list(getattr(base.config, "routed", []))


def step_flops(base, lengths_B: Sequence[int], selected_BM: np.ndarray | None, labelled: int) -> float:
    """FLOPs of forward and backward over rows of `lengths_B` real tokens, `labelled` of them supervised in all.

    `selected_BM`: how many tokens of each row each routed layer took; None for models without routing. With all tokens taken,
    and neither routers nor memories, this is `accounting.training_flops`.
    """
    blocks = list(decoder_blocks(base))
    shape, T_B = Shape.of(base, blocks), np.asarray(lengths_B, dtype=np.float64)
    total = training_flops(shape._replace(n_layers=0, block_parameters=0), T_B, labelled)  # the head
    one_layer = shape._replace(n_layers=1, d_model=0)
    for cost in block_costs(base):
        taken_B = T_B if cost.routed is None else selected_BM[:, cost.routed]
        total += training_flops(one_layer._replace(block_parameters=cost.per_token), taken_B, 0)
    routers = sum(
        p.numel() for module in base.modules() if isinstance(module, Router) for p in module.parameters() if p.ndim == 2
    )
    return total + 6.0 * routers * float(T_B.sum())


# ---------------------------------------------------------------- steps


class Step(NamedTuple):
    """One update: its micro-batches on the device, and its work."""

    batches: list[dict]
    rows: int
    supervised: int
    processed: int
    selected: int
    asked: int  # tokens x routed layers that could have been selected
    flops: float


def prepared(subject: Subject, table: TokenTable, stage: int, epoch: int, n: int, per_update: int) -> list[Step]:
    """The first n updates of an epoch of the run."""
    config, ids = subject.config, subject.ids
    rows = get_cot_latent_dataset(stage, table, config, ids.start, ids.latent, ids.end, not config.markers, epoch=epoch)
    batches = batches_of_epoch(rows, per_update)
    groups = [batches[i : i + per_update] for i in range(0, len(batches), per_update)]
    return [_step(subject, [rows.batch(numbers, subject.tokenizer.pad_token_id) for numbers in group]) for group in groups[:n]]


@torch.no_grad()
def _step(subject: Subject, batches: list[dict]) -> Step:
    model, work, held = subject.model, np.zeros(6), []
    for batch in batches:
        batch.pop("idx")
        plan, real_BT = model.plan(**batch), batch["attention_mask"].bool()
        on_device = {key: value.to(subject.device) for key, value in batch.items()} | {"plan": plan.to(subject.device)}
        held.append(on_device)
        supervised = len(plan.labelled[0])
        processed = sum(int(real_BT[:, pass_.start : pass_.stop].sum()) for pass_ in plan.passes)
        selected_BM = selections(model, on_device, real_BT)
        taken, asked = (0, 0) if selected_BM is None else (selected_BM.sum(), real_BT.sum() * selected_BM.shape[1])
        flops = step_flops(model.base_causallm, real_BT.sum(1).tolist(), selected_BM, supervised)
        work += [len(real_BT), supervised, processed, int(taken), int(asked), flops]
    return Step(held, *(int(x) for x in work[:5]), float(work[5]))


def selections(model: Coconut, batch: dict, real_BT: Tensor) -> np.ndarray | None:
    """How many tokens of each row each routed layer takes in training, int64 [B, M]; None without routing."""
    if not _routed_layers(model.base_causallm):
        return None
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    columns = model.rollout(**inputs).columns
    return (columns["mod_selected"].cpu() & real_BT[..., None]).sum(1).numpy()


def step_rates(
    subject: Subject,
    table: TokenTable,
    stage: int,
    epoch: int,
    *,
    repeats: int = REPEATS,
    steps: int = STEPS,
    per_update: int = 1,
) -> dict:
    """Train on and measure. `epoch` (from 0) says which rows meet; `per_update`: micro-batches of an update.

    Rates are of the median repeat; `step_ms_range` is of all. Raises ValueError for fewer than three repeats.
    """
    if repeats < LEAST_REPEATS or steps < 1:
        raise ValueError(f"{repeats} repeats of {steps} steps: a median needs at least {LEAST_REPEATS} repeats of one step")
    model, config, device = subject.model, subject.config, subject.device
    torch.manual_seed(config.seed)
    if config.activation_checkpointing:
        recompute_blocks(decoder_blocks(model.base_causallm))
    model.to(torch.bfloat16 if config.bf16 == "pure" else None).requires_grad_(True).train()
    made = prepared(subject, table, stage, epoch, steps, per_update)
    optimizer = build_optimizer(model, config)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model.gen_forward_cnt = 0
    for _ in range(WARM_UP):
        for step in made:
            _train(subject, optimizer, step)
    calls = model.gen_forward_cnt / (WARM_UP * len(made))
    seconds = [_seconds(lambda: [_train(subject, optimizer, step) for step in made], device) for _ in range(repeats)]
    median = statistics.median(seconds)
    rows, supervised, processed, selected, asked = (sum(step[i] for step in made) for i in range(1, 6))
    return {
        "updates": len(made),
        "repeats": repeats,
        "supervised_tokens_per_s": supervised / median,
        "processed_tokens_per_s": processed / median,
        "samples_per_s": rows / median,
        "step_ms": 1000 * median / len(made),
        "step_ms_range": [1000 * bound / len(made) for bound in (min(seconds), max(seconds))],
        "backbone_calls_per_step": calls,
        "routed_fraction": selected / asked if asked else None,
        "peak_memory_bytes": peak_memory(device),
        "flops_per_step": sum(step.flops for step in made) / len(made),
        "supervised_tokens_per_step": supervised / len(made),
        "processed_tokens_per_step": processed / len(made),
        "rows_per_step": rows / len(made),
    }


def _train(subject: Subject, optimizer: torch.optim.Optimizer, step: Step) -> None:
    """One update, as training makes it."""
    model, config, device = subject.model, subject.config, subject.device
    for batch in step.batches:
        with torch.autocast(device.type, torch.bfloat16) if config.bf16 is True else nullcontext():
            loss = model(**batch).loss
        (loss / len(step.batches)).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if config.gradient_clip is not None:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.gradient_clip, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if hasattr(model.base_causallm, "after_update"):
        model.base_causallm.after_update()


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long `work()` takes, what it asks of the device included."""
    _synchronize(device)
    start = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()
