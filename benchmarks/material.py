"""What is measured: models of a few shapes, and batches of ProsQA rows, made as training makes them.

source = Source(rows, "official validation rows", tokenizer_folder, "gpt2")
material = Material("GPT-2 124M", source, device, bf16=True)
ours = material.ours("continuous")           # a run.Run: the fused activation, plans made ahead on the CPU
plain = material.plain()                     # GPT2LMHeadModel with the same weights, as the library has it
loss = ours.model(**material.batches(ours, 1, 32)[0]).loss
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import backbones
from coconut import Coconut
from dataset import StageDataset, get_cot_latent_dataset, get_question_latent_dataset
from run import Run
from tokens import TokenTable, get_dataset, load_rows
from training import host_batch, on_device
from utils import check_config
from world import World

ROOT = Path(__file__).resolve().parents[1]
WORDS = ROOT / "backbones/prosqa_words"
STAGE = 6  # the last: every step is a thought
GPT2_VOCABULARY = 50257


class Dims(NamedTuple):
    """A GPT-2. `vocabulary`: fewer tokens than the tokenizer has; `words`: every word of ProsQA is a token."""

    layers: int
    width: int
    heads: int
    vocabulary: int | None = None
    words: bool = False


SHAPES = {
    "words 2x128": Dims(2, 128, 4, words=True),
    "4x256 V8000": Dims(4, 256, 8, vocabulary=8000),
    "GPT-2 124M": Dims(12, 768, 12),
    "GPT-2 2x64": Dims(2, 64, 2),
    "tiny 2x64": Dims(2, 64, 2, words=True),
}


def gpt2_config(dims: Dims, vocabulary: int, dropout: float = 0.1) -> GPT2Config:
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    sizes = {"n_layer": dims.layers, "n_embd": dims.width, "n_head": dims.heads, "vocab_size": vocabulary}
    return GPT2Config(**sizes, **rates, bos_token_id=vocabulary - 1, eos_token_id=vocabulary - 1)


# ---------------------------------------------------------------- rows and tokenizer


@dataclass(frozen=True)
class Source:
    """A file of rows and a tokenizer's folder, and what to call them in a report."""

    rows: Path
    rows_name: str
    tokenizer: Path
    tokenizer_name: str
    max_rows: int | None = None


def generate_data(folder: Path, sizes: tuple[int, int, int] = (17886, 300, 500)) -> None:
    """prosqa_{train,valid,test}.json of the official sizes in a folder, where they are not there yet."""
    if not (folder / "prosqa_test.json").is_file():  # which is written last
        command = [sys.executable, "data/prosqa.py", "--out", str(folder.resolve()), "--sizes", *map(str, sizes)]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def filled_tokenizer(folder: Path) -> Path:
    """The tokenizer of words with unused ones up to the number of GPT-2's, so that the head costs what GPT-2's does."""
    folder.mkdir(parents=True, exist_ok=True)
    described = json.loads((WORDS / "tokenizer.json").read_text())
    vocabulary = described["model"]["vocab"]
    vocabulary |= {f"unused{i}": i for i in range(len(vocabulary), GPT2_VOCABULARY)}
    (folder / "tokenizer.json").write_text(json.dumps(described))
    (folder / "tokenizer_config.json").write_text((WORDS / "tokenizer_config.json").read_text())
    return folder


def model_folder(folder: Path, shape: str, tokenizer: Path) -> Path:
    """A folder that run.py takes as `model_id` with `from_scratch`: a tokenizer and a config, no weights."""
    tokenizer = backbones.load_tokenizer(str(tokenizer))
    tokenizer.save_pretrained(folder)
    gpt2_config(SHAPES[shape], len(tokenizer)).save_pretrained(folder)
    return folder


def environment(cache: Path) -> dict[str, str]:
    """That of a process which keeps tokenised rows in a folder, and asks no hub."""
    return os.environ | {"HF_DATASETS_CACHE": str(cache.resolve()), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}


def _fold(table: TokenTable, n_words: int) -> None:
    """Map all tokens to fewer; rows keep their lengths."""
    for piece in (table.question, table.step, table.answer):
        piece.values = piece.values % n_words


# ---------------------------------------------------------------- models and batches


class Material:
    """Models of one shape with the same random weights, and rows at the last stage.

    Dropout is off in all of them: the library's model and ours then compute one function, and a step costs what it costs.

    Args:
        keys: config keys of run.py, e.g. bf16=True, which also decides the precision of `autocast`.
    """

    def __init__(self, shape: str, source: Source, device: torch.device, **keys):
        dims, self.shape, self.device = SHAPES[shape], shape, device
        self.tokenizer = backbones.load_tokenizer(str(WORDS if dims.words else source.tokenizer))
        ids = backbones.add_thought_tokens(self.tokenizer)
        size = dims.vocabulary or len(self.tokenizer)
        self.table = TokenTable(get_dataset(source.rows, self.tokenizer, source.max_rows))
        if size < len(self.tokenizer):
            n_words = size - len(ids)
            _fold(self.table, n_words)
            ids = backbones.ThoughtIds(*range(n_words, size))
            self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(0)
        self.ids = ids
        paths = {"name": "bench", "save_path": "-", "train_path": str(source.rows), "val_path": str(source.rows)}
        self.config = check_config({"coconut": True, "max_latent_stage": STAGE} | paths | keys, "benchmark")
        self.val_rows = load_rows(source.rows, source.max_rows)
        self._model_config = gpt2_config(dims, size, dropout=0.0)
        self._base = self.same_kernels()
        run = self.ours("continuous")
        self.rows: StageDataset = run.rows(get_cot_latent_dataset, STAGE, self.table)
        self.prompts: StageDataset = run.rows(get_question_latent_dataset, STAGE, self.table)

    def plain(self) -> GPT2LMHeadModel:
        """The library's model as it is; every call makes one, with the same weights."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return GPT2LMHeadModel(self._model_config).to(self.device).train()

    def same_kernels(self) -> GPT2LMHeadModel:
        """The library's model with the fused activation of our loader."""
        return backbones.fuse_activations(self.plain())

    def ours(self, mode: str) -> Run:
        """Our model of a feedback mode as run.py has it; all modes share one backbone."""
        eos = self._base.config.eos_token_id
        model = Coconut(self._base, self.ids.latent, self.ids.start, self.ids.end, eos, mode).to(self.device).train()
        world = World(0, 1, self.device)
        return Run(self.config, world, None, model, self.tokenizer, self.ids, self.val_rows, self.table, self.table)

    def numbers(self, i: int, size: int, shortest: bool = False) -> np.ndarray:
        """The rows of batch i: in the order of the file, or the shortest ones first; after the last the first again."""
        order = np.argsort(self.rows.lengths().total, kind="stable") if shortest else np.arange(len(self.rows))
        return order[np.arange(i * size, (i + 1) * size) % len(order)]

    def batches(self, run: Run, n: int, size: int, shortest: bool = False) -> list[dict]:
        """Batches for training `run`, on the device, with the plans that were made on the CPU: n, or as many as differ."""
        numbers = [self.numbers(i, size, shortest) for i in range(min(n, max(1, len(self.rows) // size)))]
        return [on_device(host_batch(run, self.rows, some), self.device) for some in numbers]

    def prompt_batch(self, numbers) -> dict:
        """Prompts for generation: on the CPU, where decoding reads them."""
        batch = self.prompts.batch(numbers, self.tokenizer.pad_token_id, left=True)
        batch.pop("idx")
        return batch


def without_plan(batch: dict) -> dict:
    """What the library's model takes of a batch."""
    return {key: value for key, value in batch.items() if key != "plan"}
