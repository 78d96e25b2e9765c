"""The pieces of the GPU benchmark: each measures for a few minutes at most and gives results, whatever the others do.

session = Session(options, Budget(540))
for piece in pieces(whole=False):
    results = piece.measure(session)        # None: the budget ended it, and it can be begun again
"""

import contextlib
import io
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch

from evaluate import validate
from utils import check_config

from .device import clear, facts, measure_ceilings, measure_memory
from .material import STAGE, WORDS, Material, Source, environment, filled_tokenizer, generate_data, model_folder
from .ratios import NO_TOKEN, Sizes, measure_generation, measure_steps
from .start_and_batches import STATES, measure_padding, measure_start
from .timing import ROUNDS, Budget, alternate, result, spread
from .whole_runs import VARIANTS, WHOLE, Place, measure_variant, whole_run

TINY_ROWS = (48, 16, 16)  # of train, valid and test
TINY_KEYS = {"max_new_tokens": 4, "max_val_samples": 4, "peak_tflops": 1.0}
PRECISIONS = {"fp32": {}, "tf32": {"tf32": True}, "bf16": {"bf16": True}, "bf16-compiled": {"bf16": True}}


@dataclass
class Session:
    """Where this call measures, with what, and how long it may.

    `data` and `tokenizer` are used where they exist; else rows are generated and the words of ProsQA are tokens. The model
    is GPT-2 124M, under `tiny` one of 2 layers x 64 and little of everything.
    """

    data: Path
    tokenizer: Path
    work: Path
    tiny: bool
    device: torch.device
    budget: Budget

    def __post_init__(self):
        self.work = self.work.resolve()
        self.work.mkdir(parents=True, exist_ok=True)
        os.environ |= environment(self.work / "cache")
        self.shape = "tiny 2x64" if self.tiny else "GPT-2 124M"

    @cached_property
    def generated(self) -> Path:
        """The folder of generated rows."""
        folder = self.work / ("data-tiny" if self.tiny else "data")
        generate_data(folder, TINY_ROWS if self.tiny else (17886, 300, 500))
        return folder

    @cached_property
    def source(self) -> Source:
        """300 validation rows and the tokenizer."""
        given = self.data.is_file()
        rows = self.data if given else self.generated / "prosqa_valid.json"
        name = f"{'official' if given else 'generated'} validation rows"
        if self.tiny:
            return Source(rows, name, WORDS, WORDS.name, max_rows=TINY_ROWS[1])
        if self.tokenizer.is_dir():
            return Source(rows, name, self.tokenizer, "gpt2")
        return Source(rows, name, filled_tokenizer(self.work / "words"), f"{WORDS.name}, filled up to GPT-2's vocabulary")

    @property
    def about(self) -> dict[str, str]:
        """What the reports say of rows and tokenizer."""
        return {"rows": self.source.rows_name, "tokenizer": self.source.tokenizer_name, "model": self.shape}

    @cached_property
    def place(self) -> Place:
        """Where run.py trains."""
        model = model_folder(self.work / "model", self.shape, self.source.tokenizer)
        place = Place(self.work, model, self.generated, self.source.rows)
        if not self.tiny:
            return place
        small = {"updates": 2, "log_every": 1, "warm_up": 1, "rows_per_update": 8, "keys": TINY_KEYS}
        return replace(place, **small, full_keys={"num_epochs": 2, "epochs_per_stage": 1, "max_train_samples": 16})

    def material(self, rows: Path | None = None, **keys) -> Material:
        return Material(self.shape, replace(self.source, rows=rows or self.source.rows), self.device, **keys)


@dataclass(frozen=True)
class Piece:
    """`seconds`: what it takes on an H100-class GPU, with some room."""

    name: str
    seconds: float
    what: str
    measure: Callable[[Session], list[dict] | None]
    by_parts: bool = False  # goes on where it was ended


# ---------------------------------------------------------------- what is measured


def ceilings(session: Session) -> list[dict]:
    small = {"side": 256, "copied_bytes": 10**6} if session.tiny else {}
    results = measure_ceilings(session.device, **small)
    return [results[0] | {"facts": facts(session.device)}, *results[1:]]


def memory(session: Session) -> list[dict]:
    return measure_memory(session.shape, session.source, session.device, 8 if session.tiny else 32)


def steps(precision: str, session: Session) -> list[dict]:
    tiny, label = session.tiny, f"{session.shape}, {precision.replace('-', ' ')}"
    compiled_by = None if precision != "bf16-compiled" else "eager" if tiny else "inductor"
    sizes = Sizes(4, 4, 2, rounds=2, slow_rounds=2) if tiny else Sizes(32, 32, 8, rounds=20, at_most=60)
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    try:
        return measure_steps(session.material(**PRECISIONS[precision]), sizes, label, compiled_by)
    finally:
        torch.set_float32_matmul_precision("highest")


def generation(session: Session) -> list[dict]:
    sizes = (
        Sizes(slow_rounds=2, prompts=4, new_tokens=4, evaluated_tokens=4)
        if session.tiny
        else Sizes(prompts=128, evaluated_tokens=32)
    )
    return measure_generation(session.material(bf16=True), sizes, f"{session.shape}, bf16")


def evaluation(session: Session) -> list[dict]:
    """Validation as run.py does it after an epoch, on 500 generated test rows.

    No row ends, so each writes as much as it may: 16 tokens, more than a trained model needs at the last stage (9 in the mean),
    and the default limit, which is the worst case.
    """
    rounds, material = 2 if session.tiny else ROUNDS, session.material(session.generated / "prosqa_test.json", bf16=True)
    run, results = material.ours("continuous"), []
    run.model.eval()
    run.model.eos_token_id = NO_TOKEN

    def validated(i: int) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            validate(run, STAGE * run.config.epochs_per_stage, None, with_loss=True)

    for new_tokens in (16, 128) if not session.tiny else (16,):
        changes = {"eval_batch_size": 128, "max_new_tokens": new_tokens}
        run.config = check_config(run.config.model_dump() | changes, "benchmark")
        taken = alternate({"validated": validated}, rounds, session.device)["validated"]
        shape = f"{new_tokens} new tokens, {len(material.prompts)} questions, loss and two-choice scores"
        results.append(result("evaluation", shape, batch_size=128, unit="s", **spread(taken)))
    return results


def start(session: Session) -> list[dict]:
    """Also the padding of batches, which needs no device."""
    place, rows = session.place, 8 if session.tiny else 32
    padding = measure_padding(Material(session.shape, session.source, torch.device("cpu")), session.source.rows_name, rows)
    states = STATES[:1] if session.tiny else STATES
    with tempfile.TemporaryDirectory(prefix="start-", dir=session.work) as folder:
        return padding + measure_start(Path(folder), place.data / "prosqa_train.json", session.source.tokenizer, states)


def pieces(whole: bool) -> list[Piece]:
    """All pieces in the order in which they are measured; with `whole`, the whole runs too."""
    found = [
        Piece("ceilings", 30, "facts of the device, bf16 matrix products, copies", ceilings),
        Piece("memory", 75, "P3: peak memory in fp32 and bf16, with and without activation checkpointing", memory),
        *(
            Piece(f"steps-{name}", 420 if "compiled" in name else 120, f"P1, P2, ref in {name}", partial(steps, name))
            for name in PRECISIONS
        ),
        Piece("generation", 180, "P4: batched cached generation against uncached", generation),
        Piece("evaluation", 90, "500 questions, as run.py validates", evaluation),
        *(
            Piece(
                f"run-{name}", 420 if variant.keys.get("compile") else 240, f"P5, P6: {variant.what}", partial(_variant, name)
            )
            for name, variant in VARIANTS.items()
        ),
        Piece("start", 90, "P7: start of run.py; P6: padding", start),
    ]
    if whole:
        found += [
            Piece(f"whole-{name}", 120, f"P5: all epochs of {name}, in as many calls as it takes", partial(_whole, name), True)
            for name in WHOLE
        ]
    return found


def _variant(name: str, session: Session) -> list[dict] | None:
    return measure_variant(name, session.place, session.budget)


def _whole(name: str, session: Session) -> list[dict] | None:
    return whole_run(name, session.place, session.budget)


def tidy(session: Session) -> None:
    """Between two pieces: nothing of the first remains."""
    torch.compiler.reset()
    clear(session.device)
