"""A causal LM whose every weight is a decision: what its thoughts hold and which of them it reads is written down beforehand.

    wiring = Wiring(thoughts=(SOLVED, 0, None), reads=(1,))     # thought 1 copies thought 0; the answer is read from thought 1
    subject = stub_subject(tmp_path, wiring)                    # an analysis.subject.Subject around the real wrapper
    data = write_problems(tmp_path, n_rows=12, n_pairs=6)       # rows it solves: two disjoint chains

Experiments on it must find what was put in: a stub that reads thought 1 must lose its answer exactly where thought 1 is
replaced, or (when thoughts are computed again) something that thought 1 comes from.

A state has four parts: TOKEN, the word of this column; PAYLOAD, a word that a thought carries; INDEX, the thought's number;
SAID, what comes next. A thought is the state in front of it, as the wrapper feeds it: payload and index of the thought to come.
Words are those of backbones/prosqa_tiny, where a fact is `subject object .` and an answer `### person species .`. All blocks
but the last hand their input on; the last one reads what came out of them, from the cache, and writes PAYLOAD, INDEX and SAID.
So an edit of a slot's input, or of any block's output but the last, is what readers get to see.
"""

import argparse
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from conftest import ROOT
from torch import Tensor, nn
from transformers import GPT2Config

from analysis.experiment import Experiment, Task
from analysis.subject import Subject
from backbones import ThoughtIds, add_thought_tokens, load_tokenizer
from checkpoint import stored_weights
from coconut import Coconut
from data.prosqa_graph import NAMES, SPECIES
from data.prosqa_rows import draw_rows
from data.two_chain import TwoChain, draw_pair, draw_row
from utils import check_config

BACKBONE = str(ROOT / "backbones/prosqa_tiny")
SOLVED, HOP = "solved", "hop"
SURE = 20.0  # logit of what is said
KEYS = {"continuous": "m3", "frozen": "m4", "learned_shared": "m4b", "pause_curriculum": "m5"}


@dataclass(frozen=True)
class Wiring:
    """What the thoughts hold and what the answer is read from.

    thoughts: of each its payload's source: SOLVED (the answer, worked out from the question), HOP (one fact on from the
        thought before; the first from the person asked), the number of an earlier thought to copy, or None (nothing).
    reads: the thoughts whose payloads, added up, the answer names; none: it is worked out from the question.
    by: how a thought is found: by its `position` behind the marker, or by the `index` it carries, wherever it stands.
    """

    thoughts: tuple[str | int | None, ...]
    reads: tuple[int, ...] = ()
    by: str = "position"


# ---------------------------------------------------------------- the model


class HandWired(nn.Module):
    """The causal LM, as much of it as the wrapper and the analyses ask for."""

    def __init__(self, tokenizer, ids: ThoughtIds, wiring: Wiring, n_layers: int = 2):
        super().__init__()
        n, parts = len(tokenizer), 3 * len(tokenizer) + len(wiring.thoughts)
        eos = tokenizer.eos_token_id
        self.config = GPT2Config(
            vocab_size=n, n_embd=parts, n_layer=n_layers, n_head=1, n_positions=256, bos_token_id=eos, eos_token_id=eos
        )
        self.words = _Words(tokenizer, ids)
        self.embedding = nn.Embedding(n, parts)
        self.embedding.weight.data.copy_(torch.eye(n, parts))
        self.lm_head = nn.Linear(parts, n, bias=False)
        self.lm_head.weight.data.copy_(SURE * torch.eye(parts)[2 * n : 3 * n])
        self.base_model = _Body(n_layers, _Last(n_layers - 1, self.words, wiring, n))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head


class _Body(nn.Module):
    def __init__(self, n_layers: int, last: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList([*(_Block(i) for i in range(n_layers - 1)), last])

    def forward(self, inputs_embeds, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None):
        assert attention_mask is None or attention_mask.ndim == 2
        x_BCD = inputs_embeds
        for block in self.blocks:
            x_BCD = block(x_BCD, attention_mask, past_key_values)
        return SimpleNamespace(last_hidden_state=x_BCD)


class _Block(nn.Module):
    """Keeps its input in the cache, and hands it on."""

    def __init__(self, layer: int):
        super().__init__()
        self.layer = layer

    def forward(self, x_BCD: Tensor, mask_BT: Tensor | None, cache) -> Tensor:
        seen_BTD = x_BCD
        if cache is not None:
            states_BHCD = x_BCD[:, None]
            seen_BTD = cache.update(states_BHCD, states_BHCD[..., :1], self.layer)[0][:, 0]
        if mask_BT is not None:
            seen_BTD = seen_BTD * mask_BT[..., None]
        return self.write(x_BCD, seen_BTD)

    def write(self, x_BCD: Tensor, seen_BTD: Tensor) -> Tensor:
        return x_BCD.clone()


class _Last(_Block):
    """Writes the next thought in front of a slot, and what to say in front of a word."""

    def __init__(self, layer: int, words: "_Words", wiring: Wiring, n: int):
        super().__init__(layer)
        self.words, self.wiring, self.n = words, wiring, n

    def write(self, x_BCD: Tensor, seen_BTD: Tensor) -> Tensor:
        out_BCD, n = torch.zeros_like(x_BCD), self.n
        sure_BT, word_BT = seen_BTD[..., :n].max(-1)
        first = seen_BTD.shape[1] - x_BCD.shape[1]
        for b, (sure, word) in enumerate(zip(sure_BT.tolist(), word_BT.tolist())):
            words = [w if s > 0.5 else None for s, w in zip(sure, word)]
            for c in range(max(0, self.words.begin(words) - first), x_BCD.shape[1]):
                row = _Row(words[: first + c + 1], seen_BTD[b, : first + c + 1], self.words, self.wiring, n)
                out_BCD[b, c, n : 2 * n], out_BCD[b, c, 3 * n :] = row.thought_to_come()
                out_BCD[b, c, 2 * n : 3 * n] = row.said()
        return out_BCD


class _Words:
    """Numbers of the words that mean something."""

    def __init__(self, tokenizer, ids: ThoughtIds):
        def number(word: str) -> int:
            return tokenizer.encode(word, add_special_tokens=False)[-1]

        known = tokenizer.get_vocab()
        self.names = {number(name) for name in NAMES if name in known}
        self.species = {number(word) for word in SPECIES if word in known}
        self.asks, self.answer, self.stop = number("Is"), number("###"), number(".")
        self.eos, self.ids = tokenizer.eos_token_id, ids

    def begin(self, words: list[int | None]) -> int:
        """The first column that has anything to write: a marker, or an answer without any."""
        return min((words.index(word) for word in (*self.ids[:2], self.answer) if word in words), default=len(words))


@dataclass
class _Row:
    """One row up to one column: what a hand-wired attention head finds there. `words`: None where no word can be made out."""

    words: list[int | None]
    seen_TD: Tensor
    known: _Words
    wiring: Wiring
    n: int

    def __post_init__(self):
        ids = self.known.ids
        self.marker = self.words.index(ids.start) if ids.start in self.words else None
        self.thinking = self.marker is not None and ids.end not in self.words

    def word(self, number: int | None) -> Tensor:
        one = self.seen_TD.new_zeros(self.n)
        if number is not None:
            one[number] = 1.0
        return one

    def payload(self, k: int) -> Tensor:
        """What thought k carries, as it was fed."""
        n, slots_SD = self.n, self.seen_TD[self.marker + 1 : self.marker + 1 + len(self.wiring.thoughts)]
        place = k if self.wiring.by == "position" else int(slots_SD[:, 3 * n + k].argmax())
        return slots_SD[place, n : 2 * n]

    def next_fact(self, subject: int | None) -> int | None:
        """The object of the first fact about a subject."""
        facts = self.words[: self.words.index(self.known.asks)] if self.known.asks in self.words else []
        return next((b for a, b in zip(facts[::3], facts[1::3]) if a == subject and b in self.known.species), None)

    def asked(self) -> int | None:
        place = self.words.index(self.known.asks) + 1 if self.known.asks in self.words else 0
        return self.words[place] if place else None

    def guess(self) -> Tensor:
        """What stands in the first fact, word or not."""
        return self.seen_TD[1, : self.n]

    def hop(self, before: Tensor) -> Tensor:
        """One fact on; what leads nowhere, or is no word, stays as it is."""
        fact = self.next_fact(int(before.argmax())) if before.max() > 0.5 else None
        stays = self.guess() if before.argmax() == self.asked() else before
        return stays if fact is None else self.word(fact)

    def solved(self) -> Tensor:
        """The end of the chain of facts that begins with the person asked; without one, a guess."""
        reached, fact = None, self.next_fact(self.asked())
        for _ in range(len(self.words)):
            if fact is None:
                break
            reached, fact = fact, self.next_fact(fact)
        return self.guess() if reached is None else self.word(reached)

    def thought_to_come(self) -> tuple[Tensor, Tensor]:
        """Payload and index of the thought behind this column; zeros where none is."""
        k, sources = len(self.words) - 1 - (self.marker or 0), self.wiring.thoughts
        index = self.seen_TD.new_zeros(len(sources))
        if not self.thinking or k >= len(sources):
            return self.word(None), index
        index[k] = 1.0
        if sources[k] == SOLVED:
            return self.solved(), index
        if sources[k] == HOP:
            return self.hop(self.payload(k - 1)) if k else self.hop(self.word(self.asked())), index
        return self.word(None) if sources[k] is None else self.payload(sources[k]), index

    def said(self) -> Tensor:
        """`### person species .` and the end, behind the thoughts."""
        known, last = self.known, self.words[-1]
        if last == known.ids.end:
            return self.word(known.answer)
        if last == known.answer:
            return self.word(self.asked())
        if known.answer not in self.words:
            return self.word(None)
        if last in known.names:
            reads = self.wiring.reads if self.marker is not None else ()
            return sum((self.payload(k) for k in reads), self.word(None)) if reads else self.solved()
        return self.word(known.stop if last in known.species else known.eos)


# ---------------------------------------------------------------- a subject and its problems


def stub_subject(folder: Path, wiring: Wiring, mode: str = "continuous", n_layers: int = 2, batch_size: int = 100) -> Subject:
    """The stub behind the real wrapper, as a checkpoint of m3, m4, m4b or m5 (by mode), with as many thoughts as are wired."""
    tokenizer = load_tokenizer(BACKBONE)
    ids = add_thought_tokens(tokenizer)
    values = {"name": "stub", "save_path": str(folder), "train_path": "t.json", "val_path": "v.json", "model_id": BACKBONE}
    values |= {"from_scratch": True, "coconut": True, "c_thought": 1, "max_new_tokens": 8, "feedback_mode": mode}
    config = check_config(values | {"max_latent_stage": len(wiring.thoughts)}, "stub")
    base = HandWired(tokenizer, ids, wiring, n_layers)
    model = Coconut(base, ids.latent, ids.start, ids.end, tokenizer.eos_token_id, mode).eval().requires_grad_(False)
    path = folder / f"stub_{mode}" / "checkpoint_1"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(stored_weights(model) | {"wiring": torch.tensor(list(repr(wiring).encode()))}, path)
    return Subject(KEYS[mode], KEYS[mode], 0, path, 1, model, tokenizer, ids, config, batch_size)


def chains(hops: int) -> TwoChain:
    """Two disjoint chains of facts, and nothing else: whoever follows the facts can't go wrong."""
    return TwoChain(hops=(hops, hops), nodes=(2 * hops + 2, 2 * hops + 2), lam=1e-9, species=12)


def write_problems(folder: Path, n_rows: int = 12, n_pairs: int = 0, hops=(1, 2, 3)) -> Path:
    """A data folder with prosqa_test.json and, with `n_pairs`, the evaluation set ood/swap_pairs.json; its path.

    Rows have `hops` steps in turn.
    """
    data, seen = folder / "data", set()
    (data / "ood").mkdir(parents=True, exist_ok=True)

    def drawn(draw, n: int, split: str) -> list[list[dict]]:
        specs = [chains(hops[i % len(hops)]) for i in range(n)]
        return [draw_rows(partial(draw, spec=spec), 1, i, split, seen)[0] for i, spec in enumerate(specs)]

    (data / "prosqa_test.json").write_text(json.dumps([row for (row,) in drawn(draw_row, n_rows, "test")]))
    pairs = drawn(draw_pair, n_pairs, "swap")
    if pairs:
        members = [row | {"pair_id": i, "member": m} for i, pair in enumerate(pairs) for m, row in enumerate(pair)]
        (data / "ood" / "swap_pairs.json").write_text(json.dumps(members))
        (data / "ood" / "swap_pairs.stats.json").write_text(json.dumps({"kind": "swap", "pairs": True}))
    return data


def task_of(experiment: Experiment, subject: Subject, data: Path, out: Path, **flags) -> Task:
    """The task of an experiment on a subject that is no file, with the command line's defaults and `flags`."""
    argv = ["--checkpoint", str(subject.path), "--data_dir", str(data), "--output_dir", str(out)]
    args = experiment.parser().parse_args(argv)
    vars(args).update({"command": "test"} | flags)
    folder = out / experiment.name
    folder.mkdir(parents=True, exist_ok=True)
    return Task(experiment, argparse.Namespace(**vars(args)), subject, folder)
