"""P7: how long run.py takes from its start to the first update, and P6 of the batches: padding, and seconds to make them.

P7             run.py on 17,886 rows with GPT-2's tokens, not yet tokenised and from the cache; the model is tiny, so that the
               seconds are those of imports, reading, tokenising and planning
P6 padding     share of the positions of an epoch's batches that hold a token, with group_by_length (and without, for comparison)
P6 batches     seconds to order, build and plan all batches of an epoch of 17,886 rows
"""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from batches import epoch_batches, padding_share
from dataset import Lengths, get_cot_latent_dataset
from files import read_jsonl
from training import host_batch

from .material import ROOT, STAGE, Material, Source, environment, model_folder
from .timing import ROUNDS, alternate, result, spread

STATES = ("tokens not cached", "tokens cached")  # in this order
FIRST_UPDATE_WITHIN = 300  # seconds; later it is taken for stuck


# ---------------------------------------------------------------- P7


def measure_start(folder: Path, train_rows: Path, tokenizer: Path, states=STATES, overrides=()) -> list[dict]:
    """Start the real run.py once for each of `states` in an empty folder, and wait for its first update.

    The value is the time to the "start" record, which is written when all is ready; the first update itself is noted.
    ValueError with the end of the log where run.py fails.
    """
    model = model_folder(folder / "model", "GPT-2 2x64", tokenizer)
    command = [sys.executable, "run.py", "args/prosqa_coconut_1gpu.yaml", f"train_path={train_rows}"]
    command += [f"val_path={train_rows.with_name('prosqa_valid.json')}", f"model_id={model}", "from_scratch=True"]
    command += ["wandb=False", "log_every=1", *overrides]
    results = []
    for state in states:
        save = folder / state.replace(" ", "-")
        reached = first_update([*command, f"save_path={save}", "name=start"], save / "start", environment(folder / "cache"))
        note = f"first update done after {reached['step']:.1f} s"
        results.append(result("P7", state, reached["start"], "s", note=note, events=reached))
    return results


def first_update(command: list[str], run_folder: Path, variables: dict[str, str]) -> dict[str, float]:
    """Seconds from the start of a command to the first "start" and "step" record in its run folder; then it is ended."""
    log, metrics, reached = run_folder.parent.with_suffix(".log"), run_folder / "metrics.jsonl", {}
    with open(log, "w") as out:
        begun = time.perf_counter()
        process = subprocess.Popen(command, env=variables, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    try:
        while "step" not in reached:
            passed = time.perf_counter() - begun
            if process.poll() is not None or passed > FIRST_UPDATE_WITHIN:
                end = " | ".join(log.read_text(errors="replace").splitlines()[-3:])
                raise ValueError(f"run.py ended or hung {passed:.0f} s after its start, before its first update: {end}")
            reached |= {r["event"]: passed for r in read_jsonl(metrics) if r["event"] not in reached}
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    return {event: reached[event] for event in ("start", "step")}


# ---------------------------------------------------------------- P6, the batches


def measure_padding(material: Material, rows_name: str, batch_size: int, epochs: int = ROUNDS) -> list[dict]:
    """P6 padding of a material's rows at the first and last stage, and of lengths like those of GSM8K-Aug."""
    run = material.ours("continuous")
    sets = {f"{rows_name}, stage {s}": run.rows(get_cot_latent_dataset, s, material.table).lengths() for s in (0, STAGE)}
    sets |= {f"GSM8K-Aug lengths, {name}": lengths for name, lengths in gsm_lengths(40_000).items()}
    results = []
    for name, lengths in sets.items():
        grouped, mixed = (
            [100 * (1 - padding_share(lengths, order)) for order in orders(lengths, batch_size, epochs, group)]
            for group in (True, False)
        )
        note = f"without group_by_length {np.median(mixed):.1f} %"
        results.append(result("P6 padding", name, batch_size=batch_size, unit="%", note=note, **spread(grouped)))
    return results


def orders(lengths: Lengths, batch_size: int, epochs: int, group: bool):
    """The batches of some epochs."""
    for epoch in range(epochs):
        yield epoch_batches(len(lengths.total), batch_size, 0, epoch, lengths if group else None)


def gsm_lengths(n_rows: int, seed: int = 0) -> dict[str, Lengths]:
    """Rows of the token counts of GSM8K-Aug: questions of mean 58 and at most 183, steps of 28 and 89, answers of 3."""
    rng = np.random.default_rng(seed)
    question = np.clip(rng.lognormal(np.log(58) - 0.06, 0.35, n_rows), 8, 183).round().astype(np.int64)
    steps = np.clip(rng.lognormal(np.log(28) - 0.125, 0.5, n_rows), 5, 89).round().astype(np.int64)
    answer = np.full(n_rows, 3)
    stages = {}
    for name, text, n_latents in (("stage 0", steps, 0), ("last stage", 0 * steps, 6)):
        labelled, latents = text + answer, np.full(n_rows, n_latents)
        stages[name] = Lengths(question + 1, question + 2 + latents + labelled, labelled, latents)
    return stages


def measure_batches(source: Source, batch_size: int) -> list[dict]:
    """P6 batches of a training file, by one thread, as training has them made in the background."""
    material = Material("GPT-2 2x64", source, torch.device("cpu"), group_by_length=True)
    run = material.ours("continuous")

    def epoch(i: int) -> None:
        rows = run.rows(get_cot_latent_dataset, STAGE, run.train, epoch=i)
        for numbers in epoch_batches(len(rows), batch_size, 0, i, rows.lengths()):
            host_batch(run, rows, numbers)

    taken = alternate({"epoch": epoch}, ROUNDS, material.device)["epoch"]
    n_rows = len(material.rows)
    share = padding_share(material.rows.lengths(), epoch_batches(n_rows, batch_size, 0, 0, material.rows.lengths()))
    padding = result("P6 padding", f"{n_rows:,} rows, stage {STAGE}", 100 * (1 - share), "%", batch_size=batch_size)
    return [padding, result("P6 batches", f"{n_rows:,} rows, stage {STAGE}", batch_size=batch_size, unit="s", **spread(taken))]
