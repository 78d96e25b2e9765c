"""Runs, slow loops over single rows, scripted models and simulated ranks, for the tests of evaluation."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from conftest import ROOT
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, PreTrainedTokenizerFast

from checkpoint import build_model
from coconut import Coconut, Rollout
from data import two_chain
from data.prosqa_rows import draw_rows
from dataset import get_cot_latent_dataset, get_question_latent_dataset
from run import Run
from run_folder import RunFolder
from tokens import TokenTable, get_dataset
from utils import check_config
from world import World

ALONE = World(0, 1, torch.device("cpu"))
N_ROWS = 11


def draw(n: int = N_ROWS) -> list[dict]:
    """Rows of two and of three steps."""
    spec = two_chain.TwoChain(hops=(2, 3), nodes=(6, 8), species=12)
    drawn = draw_rows(lambda rng: two_chain.draw_row(rng, spec), n, 1, "valid", set())[0]
    assert {len(row["steps"]) for row in drawn} == {2, 3}
    return drawn


def make_a_run(folder: Path, val_rows: list[dict], world: World = ALONE, path: str = "valid.json", **changes) -> Run:
    """A `run.Run` on these rows, with a random float64 model that says many things."""
    file = folder / path
    file.write_text(json.dumps(val_rows))
    values = {
        "save_path": str(folder), "name": "run", "train_path": str(file), "val_path": str(file),
        "model_id": str(ROOT / "backbones" / "prosqa_words"), "from_scratch": True, "coconut": True,
        "c_thought": 1, "max_latent_stage": 3, "batch_size_training": 4, "max_new_tokens": 12,
    }  # fmt: skip
    config = check_config(values | changes, "test")
    model, tokenizer, ids, _ = build_model(config)
    model = model.double().eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    run_folder = RunFolder(config)
    run_folder.open(exclusive=False)
    table = TokenTable(get_dataset(str(file), tokenizer))
    return Run(config, world, run_folder, model, tokenizer, ids, val_rows, table, None)


def prompts_of(run: Run, stage: int):
    return run.rows(get_question_latent_dataset, stage, run.val)


@torch.no_grad()
def slow_logits(model: Coconut, ids: list[int], n_prompt: int | None = None) -> torch.Tensor:
    """[T, V] of one unpadded row, the slow way: a whole uncached pass of the library's model for every thought.

    Latent tokens behind the first `n_prompt` are said, not thought.
    """
    base = model.base_causallm
    embeds_TD = base.get_input_embeddings()(torch.tensor(ids))
    for column in [t for t, token in enumerate(ids[:n_prompt]) if token == model.latent_token_id]:
        if model.feedback_mode == "continuous":
            whole = base(inputs_embeds=embeds_TD[None], use_cache=False, output_hidden_states=True)
            embeds_TD[column] = whole.hidden_states[-1][0, column - 1]
        elif model.feedback_mode != "none":
            embeds_TD[column] = model.pause_embedding
    return base(inputs_embeds=embeds_TD[None], use_cache=False).logits[0]


class Ranks:
    """`size` worlds in as many threads that meet in `sum` and `gather`, as processes do."""

    def __init__(self, size: int):
        meeting, parts = threading.Barrier(size), {}

        def exchange(rank, value):
            parts[rank] = value
            meeting.wait(60)
            everything = [parts[r] for r in range(size)]
            meeting.wait(60)
            return everything

        class Rank(World):
            def sum(self, *values):
                return [float(sum(column)) for column in zip(*exchange(self.rank, values))]

            def gather(self, items):
                return [item for part in exchange(self.rank, items) for item in part]

        self.worlds = [Rank(rank, size, torch.device("cpu")) for rank in range(size)]

    def each(self, function) -> list:
        with ThreadPoolExecutor(len(self.worlds)) as pool:
            return list(pool.map(function, self.worlds))


FORMS = [
    ({}, 0),
    ({}, 2),
    ({"feedback_mode": "learned_shared"}, 2),
    ({"pad_latent_to_max": False}, 5),
    ({"coconut": False, "cot": True}, 0),
    ({"coconut": False, "cot": False, "no_thoughts": False, "no_cot": False}, 2),
]


def slow_loss(run: Run, stage: int) -> float:
    """Nats per labelled token, one row at a time and without padding."""
    total = tokens = 0
    for row in run.rows(get_cot_latent_dataset, stage, run.val):
        logp = slow_logits(run.model, row["input_ids"].tolist()).log_softmax(-1)
        for t in np.flatnonzero(row["labels"] != -100):
            total, tokens = total - logp[t - 1, row["labels"][t]].item(), tokens + 1
    return total / tokens


@torch.no_grad()
def slow_continuation(run: Run, prompt: list[int], max_new_tokens: int) -> list[int]:
    ids, model = list(prompt), run.model
    for _ in range(max_new_tokens):
        if len(ids) > model.base_causallm.config.max_position_embeddings:
            break
        token = int(slow_logits(model, ids, len(prompt))[-1].argmax())
        if token == model.eos_token_id:
            break
        ids.append(token)
    return ids[len(prompt) :]


class Scripted(torch.nn.Module):
    """A model that says what it is told, one text a row, and EOS behind it.

    A "state" is (row, number of the next token); it is computed from row ids and positions, so whatever leaves or joins
    a batch must keep these right.
    """

    feedback_mode = "none"
    base_causallm = SimpleNamespace(config=GPT2Config(n_layer=0))

    def __init__(self, tokenizer, texts: list[str]):
        super().__init__()
        self.eos_token_id, self.n_prompt = tokenizer.eos_token_id, {}
        self.texts = [[*encoded(tokenizer, text), tokenizer.eos_token_id] for text in texts]
        self.embedding = torch.nn.Embedding(len(tokenizer), 1)

    def plan(self, input_ids, attention_mask, position_ids, row_ids):
        self.n_prompt |= dict(zip(row_ids, attention_mask.sum(1).tolist()))
        return SimpleNamespace(row_ids=row_ids)

    def rollout(self, input_ids, attention_mask, position_ids, plan, cache, edit):
        return self.extend(input_ids, cache, 0, attention_mask, position_ids, row_ids=plan.row_ids)

    def extend(self, input_ids, cache, start, mask_BT, position_ids, edit=None, row_ids=None):
        row_BT = torch.tensor(row_ids)[:, None].expand_as(position_ids)
        number_BT = position_ids + 1 - torch.tensor([[self.n_prompt[i]] for i in row_ids])
        return Rollout(torch.stack([row_BT, number_BT], 2), self.embedding(input_ids), cache)

    def head(self, states):
        said = [self.texts[i][k] if k < len(self.texts[i]) else 0 for i, k in states.tolist()]
        return F.one_hot(torch.tensor(said), self.embedding.num_embeddings)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    characters = ["<eos>", *map(chr, range(32, 127)), "\n"]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def encoded(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)
