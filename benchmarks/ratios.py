"""Ratios of training steps and of generation, each side by side in one process.

P1               M3 step at the last stage / step of the library's GPT2LMHeadModel (full logits, its own loss), same tokens
P1 same kernels  the same, the library's model with our fused activation (compiled where ours is): what the rollout costs
P2               M5 step / our own CoT step (thoughts as ordinary tokens) on the same tokens
cache            M3 step on the cache that is appended to in place / on the library's cache, which is copied for every pass
ref              M3 step as n + 1 full passes without a cache (the slow oracle of the tests) / the library's step
P4               samples/s of batched, cached generation / of uncached generation of one sample at a time
P4 evaluation    the same, of evaluation's record-making over all rows / uncached generation

A step is forward and backward.
"""

import contextlib
import io
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
from transformers import DynamicCache

from accounting import Shape, training_flops
from coconut import Coconut, decoder_blocks
from compiled import compile_passes
from evaluate import generate_records
from microbatch import saved_bytes
from run import Run

from .material import Material, without_plan
from .timing import alternate, ratio, result

NO_TOKEN = -1  # as the token that ends a row: random weights write all they may


@dataclass(frozen=True)
class Sizes:
    """How much is measured: rows a step, rounds, and what makes the slow sides bearable.

    `every`: of the uncached generation only every n-th token is computed and its time counted n times. `at_most`: seconds
    for each ratio, once there are 7 rounds.
    """

    step_rows: int = 32
    pause_rows: int = 32
    oracle_rows: int = 32
    rounds: int = 15
    slow_rounds: int = 7
    prompts: int = 32
    new_tokens: int = 128
    every: int = 1
    evaluated_tokens: int | None = None  # leave P4 evaluation out
    at_most: float | None = None


# ---------------------------------------------------------------- steps


def measure_steps(material: Material, sizes: Sizes, label: str, compiled_by: str | None = None) -> list[dict]:
    """P1, P1 same kernels, P2 and ref of one shape in one precision; `compiled_by` is the backend of torch.compile."""
    m3, m5, cot = (material.ours(mode) for mode in ("continuous", "pause_curriculum", "none"))
    plain, same = material.plain(), material.same_kernels()
    note = None
    with torch._dynamo.config.patch(recompile_limit=64):  # three models and every kind of pass are compiled side by side
        if compiled_by is not None:
            note = compile_all([m3, m5, cot], same, compiled_by)

        def batches(run: Run, size: int, shortest: bool = False) -> list[dict]:
            return material.batches(run, 2 * sizes.rounds, size, shortest)

        def ours(run: Run, batches: list[dict]):
            return lambda i: step(run, run.model, batches[i % len(batches)])

        def library(model, batches: list[dict]):
            return lambda i: step(m3, model, without_plan(batches[i % len(batches)]), use_cache=False)

        def oracle(batches: list[dict]):
            return lambda i: backward(oracle_loss(m3, plain, without_plan(batches[i % len(batches)])), plain)

        B, P, R = sizes.step_rows, sizes.pause_rows, sizes.oracle_rows
        short = R < B
        whole, few = batches(m3, B), batches(m3, R, short)
        # Graphs are recorded at the first sight of a size, so everything is seen before it counts.
        warm_up = 2 * len(whole) if compiled_by and material.device.type == "cuda" else 1
        first = alternate(
            {"ours": ours(m3, whole), "plain": library(plain, whole), "same": library(same, whole),
             "copied": on_library_cache(ours(m3, whole))},
            sizes.rounds, material.device, warm_up, sizes.at_most,
        )  # fmt: skip
        kept = [saved_bytes(partial(work, 0)) for work in (ours(m3, whole), on_library_cache(ours(m3, whole)))]
        second = alternate(
            {"m5": ours(m5, batches(m5, P)), "cot": ours(cot, batches(cot, P))},
            2 * sizes.rounds, material.device, warm_up, sizes.at_most,
        )  # fmt: skip
        slow = {"oracle": oracle(few), "plain": library(plain, few)}
        third = alternate(slow, sizes.slow_rounds, material.device, 1, sizes.at_most)
    floor = least(m3, whole[: len(first["ours"])])
    return [
        result("P1", label, batch_size=B, floor=floor, note=note, **ratio(first, "ours", "plain")),
        result("P1 same kernels", label, batch_size=B, floor=floor, note=note, **ratio(first, "ours", "same")),
        result(
            "cache",
            label,
            batch_size=B,
            note=f"kept for backward: {kept[0] / kept[1]:.2f} x the bytes",
            **ratio(first, "ours", "copied"),
        ),
        result("P2", label, batch_size=P, note=note, **ratio(second, "m5", "cot")),
        result("ref", label, batch_size=R, note="the shortest rows" if short else None, **ratio(third, "oracle", "plain")),
    ]


def on_library_cache(work):
    """The same work on the library's cache."""

    def run(i: int) -> None:
        with patch("coconut.append_cache", lambda config, capacity: DynamicCache(config=config)):
            work(i)

    return run


def compile_all(runs: list[Run], plain, backend: str) -> str | None:
    """Compile the backbone that the runs share, and that of a plain model in the same way. Returns why not, or None."""
    first = runs[0]
    library = Coconut(plain, None, None, None, NO_TOKEN, "none")
    whys = [compile_passes(model, first.precision, backend) for model in (first.model, library)]
    for run in runs:
        run.model.compiled = first.model.compiled
    return next((f"not compiled: {why}" for why in whys if why), None)


def step(run: Run, model, batch: dict, optimizer=None, **more) -> None:
    """Forward and backward of any model in the precision of a run; with an optimizer, its step too."""
    if run.model.compiled:
        torch.compiler.cudagraph_mark_step_begin()
    with run.precision():
        loss = model(**batch, **more).loss
    backward(loss, model, optimizer)


def backward(loss: torch.Tensor, model, optimizer=None) -> None:
    loss.backward()
    if optimizer is not None:
        optimizer.step()
    model.zero_grad(set_to_none=True)


def oracle_loss(run: Run, plain, batch: dict) -> torch.Tensor:
    """The loss of M3 by n + 1 full passes of the library's model without a cache, with all logits."""
    rest = {"attention_mask": batch["attention_mask"], "position_ids": batch["position_ids"], "use_cache": False}
    latent_BT = batch["input_ids"] == run.ids.latent
    with run.precision():
        embeds_BTD = plain.get_input_embeddings()(batch["input_ids"])
        for column in latent_BT.any(0).nonzero().flatten().tolist():
            hidden_BTD = plain.base_model(inputs_embeds=embeds_BTD, **rest).last_hidden_state
            here_BT = latent_BT & (torch.arange(latent_BT.shape[1], device=latent_BT.device) == column)
            embeds_BTD = torch.where(here_BT[..., None], hidden_BTD[:, column - 1 : column], embeds_BTD)
        return plain(inputs_embeds=embeds_BTD, labels=batch["labels"], **rest).loss


def least(run: Run, batches: list[dict]) -> float:
    """FLOPs with the head at labelled positions only / with it everywhere, on the same padded tokens: the least P1 can be."""
    base = run.model.base_causallm
    shape, with_labels, with_all = Shape.of(base, decoder_blocks(base)), 0.0, 0.0
    for batch in batches:
        lengths = [batch["labels"].shape[1]] * len(batch["labels"])
        labelled = int((batch["labels"] != -100).sum())
        with_labels += training_flops(shape, lengths, labelled)
        with_all += training_flops(shape, lengths, labelled, full_head=True)
    return with_labels / with_all


# ---------------------------------------------------------------- generation


def measure_generation(material: Material, sizes: Sizes, label: str) -> list[dict]:
    """P4, and P4 evaluation where `sizes` asks for it. Random weights end no row, so all write as much as they may."""
    run, device = material.ours("continuous"), material.device
    run.model.eval()
    run.model.eos_token_id = NO_TOKEN
    n_rows, n_prompts, every = len(material.prompts), sizes.prompts, sizes.every
    limits = {"warm_up": 1, "at_most": sizes.at_most}

    def uncached(new_tokens: int):
        return lambda i: uncached_tokens(run, middle_prompt(material, i, n_prompts), new_tokens, every)

    def cached(i: int) -> None:
        with run.precision():
            run.model.generate(**material.prompt_batch(material.numbers(i, n_prompts)), max_new_tokens=sizes.new_tokens)

    def evaluation(i: int) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            generate_records(
                run.model, material.prompts, material.val_rows, material.tokenizer,
                n_prompts, sizes.evaluated_tokens, run.world, run.precision(),
            )  # fmt: skip

    sampled = f", 1 of {every} uncached ones timed" if every > 1 else ""
    taken = alternate({"uncached": uncached(sizes.new_tokens), "cached": cached}, sizes.slow_rounds, device, **limits)
    gain = ratio(taken, "uncached", "cached", scale=n_prompts * every)
    note = f"{sizes.new_tokens} new tokens{sampled}"
    results = [result("P4", label, batch_size=n_prompts, note=note, **gain)]
    if sizes.evaluated_tokens:
        works = {"uncached": uncached(sizes.evaluated_tokens), "evaluation": evaluation}
        taken = alternate(works, sizes.slow_rounds, device, **limits)
        gain = ratio(taken, "uncached", "evaluation", scale=n_rows * every)
        note = f"{n_rows} rows, {sizes.evaluated_tokens} new tokens{sampled}"
        results.append(result("P4 evaluation", label, batch_size=n_prompts, note=note, **gain))
    return results


def middle_prompt(material: Material, i: int, size: int) -> torch.Tensor:
    """The prompt of middle length among those of batch i, [1, T] on the device."""
    numbers = material.numbers(i, size)
    middle = numbers[np.argsort(material.prompts.lengths(numbers).total)[size // 2]]
    return material.prompt_batch([middle])["input_ids"].to(material.device)


@torch.no_grad()
def uncached_tokens(run: Run, ids_BT: torch.Tensor, new_tokens: int, every: int = 1) -> torch.Tensor:
    """Greedy generation that computes every column again for every token; with `every` for each n-th only, then repeated.

    The ones left out would have been a little longer than those computed, so their time is not overestimated.
    """
    with run.precision():
        for _ in range(0, new_tokens, every):
            logits_BV = run.model.head(run.model.rollout(ids_BT).hidden_BTD[:, -1])
            ids_BT = torch.cat([ids_BT, logits_BV.argmax(-1, keepdim=True).expand(-1, every)], 1)
    return ids_BT
