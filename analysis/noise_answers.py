"""Greedy answers to many questions at every scale of a noise: batches of questions x scales behind one shared prefix.

    answering = Answering(model, tokenizer, noise, scales, max_new_tokens=64)
    for said in answering.run(tokens, question_ids): ...       # Said(place, scale, new_ids, error, norms)

`one_at_a_time` asks each question at each scale alone and from its first column on: slow, and what the fast way must equal.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from analysis.interventions import Patch, chain
from analysis.noise_operators import Noise, NoiseEdit, NoisyRow
from analysis.noise_rollout import CHAINS, LayerThoughts, Prefix, clean_thoughts, shares_prefix, source_layer
from coconut import Coconut
from dataset import MyCollator
from generation import Decoding
from stopping import Stopped


@dataclass(frozen=True)
class Said:
    """What was said behind prompt `place` at a scale: the new tokens without EOS, or None and the error that came instead.

    `norms[slot]`: (norm of the vector, norm of its noise) of each slot that met noise.
    """

    place: int
    scale: float
    new_ids: list[int] | None
    error: str | None = None
    norms: dict[int, tuple[float, float]] = field(default_factory=dict)


@dataclass
class Answering:
    """Greedy answers to prompts at every scale of a noise.

    `batch_size` counts rows: prompts x scales. `chain`: see noise_rollout.py. `edit`: a further edit of whole prompts, by place
    in the list (baselines). `one_at_a_time`: see the module.
    """

    model: Coconut
    tokenizer: object
    noise: Noise = Noise()
    scales: Sequence[float] = (0.0,)
    max_new_tokens: int = 64
    batch_size: int = 100
    noise_layer: int = -1
    chain: str = "recompute"
    edit: object = None
    one_at_a_time: bool = False

    def __post_init__(self):
        if self.chain not in CHAINS:
            raise ValueError(f"noise_chain {self.chain!r}; known: {', '.join(CHAINS)}")
        self.layer = source_layer(self.model, self.noise_layer)
        self.shares = shares_prefix(self.model) and not self.one_at_a_time and self.edit is None
        self.collate = MyCollator(self.tokenizer, self.model.latent_token_id, left=True)

    @torch.no_grad()
    def run(self, tokens: Sequence[np.ndarray], question_ids: Sequence[str | int]) -> Iterator[Said]:
        """Answers in batches of like prompts; what raises is tried again in smaller ones, and alone becomes an error."""
        shapes = [_shape(x, self.model.latent_token_id) for x in tokens]
        order = sorted(range(len(tokens)), key=lambda i: (shapes[i], len(tokens[i])))
        size = 1 if self.one_at_a_time else max(1, self.batch_size // len(self.scales))
        groups = [(s,) for s in self.scales] if self.one_at_a_time else [tuple(self.scales)]
        for _, alike in groupby(order, key=shapes.__getitem__):
            for run in self._runs([*alike], tokens, size):
                for places in np.array_split(run, -(-len(run) // size)):  # of like size: a small last one takes as many steps
                    for scales in groups:
                        yield from self._tried(places.tolist(), tokens, question_ids, scales)

    @staticmethod
    def _runs(places: list[int], tokens: Sequence[np.ndarray], size: int) -> list[list[int]]:
        """Sorted prompts as runs of one length, which need no padding and no mask; short runs go with the next ones."""
        runs: list[list[int]] = []
        for _, same in groupby(places, key=lambda i: len(tokens[i])):
            if runs and 4 * len(runs[-1]) < size:
                runs[-1] += same
            else:
                runs.append([*same])
        return runs

    def _tried(self, places: list[int], tokens, question_ids, scales: tuple[float, ...]) -> Iterator[Said]:
        try:
            said = self._batch(places, tokens, question_ids, scales)
        except Stopped:
            raise
        except Exception as error:  # whatever a model or a device raises is a failure of these questions, not of the run
            if len(places) == 1 and len(scales) == 1:
                yield Said(places[0], scales[0], None, " ".join(f"{type(error).__name__}: {error}".split())[:500])
                return
            half = len(places) // 2
            parts = [(places[:half], scales), (places[half:], scales)] if half else [(places, (s,)) for s in scales]
            for part in parts:
                yield from self._tried(part[0], tokens, question_ids, part[1])
            return
        yield from said

    def _batch(self, places: list[int], tokens, question_ids, scales: tuple[float, ...]) -> list[Said]:
        times, latent_id = len(scales), self.model.latent_token_id
        n_slots = [int((tokens[i] == latent_id).sum()) for i in places]
        noisy = NoiseEdit(self.noise, [NoisyRow(question_ids[i], s, n) for i, n in zip(places, n_slots) for s in scales])
        if self.shares and n_slots[0] >= self.noise.first_slot:
            batch = self.collate([{"input_ids": tokens[i]} for i in places])
            prefix = Prefix.run(self.model, batch, self.noise.first_slot, self.layer, self.chain == "replay")
            decoding = prefix.continued(times, noisy, self.max_new_tokens)
        else:
            decoding = self._whole(places, tokens, noisy, times)
        said, finite = decoding.rows, decoding.state_BD.isfinite().all(-1).tolist()
        while decoding.going():
            if decoding.worth_dropping():
                decoding = decoding.select(decoding.going())
            decoding.advance()
        return [
            Said(places[r // times], scales[r % times], row.new_ids, None, noisy.norms.get(r, {}))
            if fine
            else Said(places[r // times], scales[r % times], None, "the model's states are not finite")
            for r, (row, fine) in enumerate(zip(said, finite))
        ]

    def _whole(self, places: list[int], tokens, noisy: NoiseEdit, times: int) -> Decoding:
        """Every copy from its first column on."""
        copies = [i for i in places for _ in range(times)]
        feed = None if self.layer is None else LayerThoughts(self.model, self.layer)
        held = _held(self.model, self.collate, [tokens[i] for i in copies], feed) if self.chain == "replay" else None
        outer = None if self.edit is None else _ByPlace(self.edit, copies)
        batch = self.collate([{"input_ids": tokens[i]} for i in copies])
        edit = chain(feed, held, outer, noisy)
        return Decoding.prefill(self.model, **batch, max_new_tokens=self.max_new_tokens, edit=edit)[0]


def _shape(tokens: np.ndarray, latent_id: int | None) -> tuple[int, int]:
    """Number of slots, and of tokens from the first one on: what must agree for rows to end in one column."""
    slots = np.flatnonzero(tokens == latent_id)
    return (len(slots), len(tokens) - int(slots[0])) if len(slots) else (0, 0)


def _held(model: Coconut, collate: MyCollator, tokens: Sequence[np.ndarray], feed) -> Patch:
    return Patch(0, *clean_thoughts(model, collate, tokens, feed))


class _ByPlace:
    """An edit that knows prompts by their place in a list, in a batch of some of them."""

    def __init__(self, edit, places: Sequence[int]):
        self.edit, self.places, self.layers = edit, places, getattr(edit, "layers", (0,))

    def __call__(self, layer: int, pass_, x_BCD: Tensor) -> Tensor | None:
        return self.edit(layer, replace(pass_, row_ids=tuple(self.places[i] for i in pass_.row_ids)), x_BCD)
