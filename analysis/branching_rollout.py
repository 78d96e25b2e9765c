"""K branches of each question: one prefix, an independent draw of noise a branch, tokens chosen by chance.

    columns   question <bot> .. | t of the injection .. tn <eot> | tokens
    rows      B                 | B x K                            `Prefix.run` once, `continued` for every cell

    branching = Branching(model, num_branches=5, noise=Noise("gaussian_scaled", schedule="none"), max_new_tokens=64)
    for place, cell, branches in branching.run(tokens, question_ids, [Cell(0.5, temperature=0.7)]): ...

    texts = generate_with_branching(model, ids, mask, 64, noise_scale=0.5)      # texts[b][k]: tokens of branch k

A branch is fixed by (seed, question id, branch): its noise by `noise_operators.draw_generator`, its tokens by
`branching_sampling.uniforms`, which shares nothing with it. Other branches, batches, cells and torch's global generator don't
matter. Scales and temperatures meet the same draws, so cells can be compared question by question.

Shape letters: B rows, K branches, S steps from the injection on, N new tokens, D width, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from analysis.branching_sampling import Sampled, copied, uniforms
from analysis.interventions import Patch, chain
from analysis.noise_operators import Noise, NoiseEdit, NoisyRow
from analysis.noise_rollout import CHAINS, LayerThoughts, Prefix, clean_thoughts, shares_prefix, source_layer
from attention import appends_only
from coconut import Coconut
from dataset import MyCollator
from generation import Decoding
from stopping import Stopped

# ---------------------------------------------------------------- branches


@dataclass(frozen=True)
class Cell:
    """A condition: the scale of the noise (0: none) and the temperature (0: greedy)."""

    scale: float
    temperature: float


@dataclass(frozen=True)
class Branch:
    """What a branch said: tokens without EOS, their untempered log-probability (nats, with EOS), and what was fed into its
    slots from the injection on (float32 [S, D]); or the error that came instead."""

    new_ids: list[int] | None
    logprob: float | None = None
    fed_SD: Tensor | None = None
    error: str | None = None


class FedThoughts(NoiseEdit):
    """`NoiseEdit` that keeps what is fed: `fed[slot]` [rows, D], slots from 1, all rows in their order."""

    def __init__(self, noise: Noise, rows: Sequence[NoisyRow]):
        super().__init__(noise, rows)
        self.fed: dict[int, Tensor] = {}

    def noisy(self, k: int, h_BD: Tensor, row_ids: Sequence[int], has_B: Tensor | None = None) -> Tensor:
        noisy_BD = super().noisy(k, h_BD, row_ids, has_B)
        self.fed[k + 1] = noisy_BD
        return noisy_BD

    def steps(self) -> Tensor:
        """float32 [rows, S, D] on the CPU; S = 0 where no slot is as late as the injection."""
        slots = [slot for slot in sorted(self.fed) if slot >= self.noise.at_step]
        if not slots:
            return torch.zeros(len(self.rows), 0, 1)
        return torch.stack([self.fed[slot] for slot in slots], 1).float().cpu()


@dataclass
class Branching:
    """See the module. `batch_size` counts questions; `one_at_a_time`: every branch alone, from its first column on, which is
    slow: the oracle. ValueError for options that make no sense."""

    model: Coconut
    num_branches: int = 5
    noise: Noise = Noise(schedule="none")
    max_new_tokens: int = 64
    top_p: float = 0.9
    sampling_seed: int = 0
    batch_size: int = 32
    noise_layer: int = -1
    chain: str = "recompute"
    one_at_a_time: bool = False

    def __post_init__(self):
        if self.num_branches < 1:
            raise ValueError(f"num_branches {self.num_branches}: at least 1")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p}: must be above 0, and 1 at most")
        if self.chain not in CHAINS:
            raise ValueError(f"noise_chain {self.chain!r}; known: {', '.join(CHAINS)}")
        self.layer = source_layer(self.model, self.noise_layer)
        pad = SimpleNamespace(pad_token_id=self.model.eos_token_id)
        self.collate = MyCollator(pad, self.model.latent_token_id, left=True)

    def run(
        self, tokens: Sequence[np.ndarray], question_ids: Sequence[str | int], cells: Sequence[Cell]
    ) -> Iterator[tuple[int, Cell, list[Branch]]]:
        """(place in `tokens`, cell, its K branches), batch by batch of like prompts.

        A batch that raises is tried again in halves, then question by question and branch by branch; a branch that raises
        alone, or whose states are not finite, has an error.
        """
        for places in self.batches(tokens):
            asked = [tokens[i] for i in places], [question_ids[i] for i in places]
            shared = _Shared(self, *asked)
            for cell in cells:
                for place, branches in zip(places, self._tried(*asked, cell, shared)):
                    yield place, cell, branches

    def batches(self, tokens: Sequence[np.ndarray]) -> list[list[int]]:
        """Places of prompts that can share a prefix: as many slots, as much behind them, and of like lengths."""
        shapes = [_shape(x, self.model.latent_token_id) for x in tokens]
        batches: list[list[int]] = []
        for i in sorted(range(len(tokens)), key=lambda i: (shapes[i], len(tokens[i]))):
            room = bool(batches) and len(batches[-1]) < (1 if self.one_at_a_time else self.batch_size)
            if room and shapes[batches[-1][0]] == shapes[i]:
                batches[-1].append(i)
            else:
                batches.append([i])
        return batches

    def _tried(self, tokens: list[np.ndarray], ids: list, cell: Cell, shared: "_Shared | None") -> list[list[Branch]]:
        half = 0
        if not self.one_at_a_time:
            try:
                return self.together(tokens, ids, cell, range(self.num_branches), shared)
            except Stopped:
                raise
            except Exception:  # whatever a model or a device raises fails the branches that raise it alone, not the run
                half = len(tokens) // 2
        if half:
            parts = (tokens[:half], ids[:half]), (tokens[half:], ids[half:])
            return [branches for part in parts for branches in self._tried(*part, cell, None)]
        return [[self._alone(x, i, cell, k) for k in range(self.num_branches)] for x, i in zip(tokens, ids)]

    def _alone(self, tokens: np.ndarray, question_id, cell: Cell, branch: int) -> Branch:
        try:
            return self.together([tokens], [question_id], cell, [branch], None)[0][0]
        except Stopped:
            raise
        except Exception as error:  # as above
            return Branch(None, error=" ".join(f"{type(error).__name__}: {error}".split())[:500])

    @torch.no_grad()
    def together(
        self,
        tokens: Sequence[np.ndarray],
        ids: Sequence[str | int],
        cell: Cell,
        branches: Sequence[int],
        shared: "_Shared | None" = None,
    ) -> list[list[Branch]]:
        """These branches of these prompts in one batch; raises what the model raises. `shared`: what they have in common."""
        n_slots = [int((x == self.model.latent_token_id).sum()) for x in tokens]
        noisy = [NoisyRow(i, cell.scale, n, k) for i, n in zip(ids, n_slots) for k in branches]
        edit = FedThoughts(self.noise, noisy)
        if self.one_at_a_time:
            decoding = self._whole([x for x in tokens for _ in branches], edit)
        else:
            decoding = (shared or _Shared(self, tokens, ids)).continued(len(branches), edit)
        uniform_BN = torch.stack([uniforms(self.sampling_seed, i, k, self.max_new_tokens) for i in ids for k in branches])
        decoding = Sampled.begin(decoding, uniform_BN, cell.temperature, self.top_p)
        rows = decoding.rows
        decoding.finish()
        found = [
            Branch(row.new_ids, row.logprob, fed_SD)
            if math.isfinite(row.logprob)
            else Branch(None, error="the model's states are not finite")
            for row, fed_SD in zip(rows, edit.steps())
        ]
        return [found[i : i + len(branches)] for i in range(0, len(found), len(branches))]

    def _whole(self, tokens: list[np.ndarray], edit: NoiseEdit) -> Decoding:
        """Prompts from their first column on, under an edit that knows them by their place here."""
        feed = None if self.layer is None else LayerThoughts(self.model, self.layer)
        held = None
        if self.chain == "replay" and (tokens[0] == self.model.latent_token_id).any():
            held = Patch(0, *clean_thoughts(self.model, self.collate, tokens, feed))
        batch = self.collate([{"input_ids": x} for x in tokens])
        return Decoding.prefill(self.model, **batch, max_new_tokens=self.max_new_tokens, edit=chain(feed, held, edit))[0]


class _Shared:
    """What all branches of a batch of prompts have in common in all cells: computed when first asked for, then copied."""

    def __init__(self, branching: Branching, tokens: Sequence[np.ndarray], ids: Sequence[str | int]):
        self.branching, self.tokens = branching, list(tokens)
        n_slots, at = int((tokens[0] == branching.model.latent_token_id).sum()), branching.noise.at_step
        self.noisy, self.prefix = n_slots >= at, None
        self.possible = shares_prefix(branching.model)

    def continued(self, times: int, edit: FedThoughts) -> Decoding:
        """Each prompt `times` times in a row, up to its first new token."""
        branching = self.branching
        if not self.possible:
            return branching._whole([x for x in self.tokens for _ in range(times)], edit)
        if self.prefix is None:
            self.prefix = self._run()
        if self.noisy:
            return self.prefix.continued(times, edit, branching.max_new_tokens)
        return copied(self.prefix, times)

    def _run(self) -> Prefix | Decoding:
        branching = self.branching
        batch = branching.collate([{"input_ids": x} for x in self.tokens])
        if self.noisy:
            at, replay = branching.noise.at_step, branching.chain == "replay"
            return Prefix.run(branching.model, batch, at, branching.layer, replay)
        feed = None if branching.layer is None else LayerThoughts(branching.model, branching.layer)
        prompts = Decoding.prefill(branching.model, **batch, max_new_tokens=branching.max_new_tokens, edit=feed)[0]
        assert appends_only(prompts.cache)
        return prompts


def _shape(tokens: np.ndarray, latent_id: int | None) -> tuple[int, int]:
    """Number of slots, and of tokens from the first one on."""
    slots = np.flatnonzero(tokens == latent_id) if latent_id is not None else []
    return (len(slots), len(tokens) - int(slots[0])) if len(slots) else (0, 0)


# ---------------------------------------------------------------- one call


@torch.no_grad()
def generate_with_branching(
    model: Coconut,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 64,
    num_branches: int = 5,
    temperature: float = 0.7,
    top_p: float = 0.9,
    noise_scale: float = 0.0,
    noise_type: str = "gaussian_scaled",
    noise_direction: str | None = None,
    noise_at_step: int = 1,
    *,
    question_ids: Sequence[str | int] | None = None,
    seed: int = 0,
    sampling_seed: int = 0,
    schedule: str = "none",
    lambda_decay: float = 0.5,
    noise_layer: int = -1,
    noise_chain: str = "recompute",
    one_at_a_time: bool = False,
) -> list[list[list[int]]]:
    """The new tokens, without EOS, of K branches of each prompt: K token lists a row of `input_ids` (int64 [B, T]).

    `attention_mask` ([B, T]) may pad on both sides. `noise_at_step`: the slot of the injection, from 1; `schedule`: of the
    slots behind it. `question_ids` (default: row numbers) and the seeds fix every draw. Raises ValueError for a negative
    scale or temperature, and RuntimeError where a branch fails.
    """
    if not noise_scale >= 0 or not temperature >= 0:
        raise ValueError(f"noise_scale {noise_scale}, temperature {temperature}: neither may be negative")
    noise = Noise(noise_type, noise_direction, "all", noise_at_step, schedule, lambda_decay, seed)
    options = {"noise_layer": noise_layer, "chain": noise_chain, "one_at_a_time": one_at_a_time}
    branching = Branching(model, num_branches, noise, max_new_tokens, top_p, sampling_seed, len(input_ids), **options)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    tokens = [row[real.bool()].cpu().numpy() for row, real in zip(input_ids, mask)]
    ids = range(len(tokens)) if question_ids is None else question_ids
    texts: list[list[list[int]]] = [[] for _ in tokens]
    for place, _, branches in branching.run(tokens, ids, [Cell(noise_scale, temperature)]):
        if failed := [branch.error for branch in branches if branch.error]:
            raise RuntimeError(f"row {place}: {len(failed)} of {num_branches} branches failed: {failed[0]}")
        texts[place] = [branch.new_ids for branch in branches]
    return texts
