"""Thoughts that many noisy copies of a prompt share: run it to the first noisy slot once, copy its rows, and go on from there.

    columns   question <bot> | t1 | t2 | .. | tn <eot> | answer
    rows      B              | B x copies                            `Prefix.run`, then `continued`

    prefix = Prefix.run(model, batch, slot=1)
    decoding = prefix.continued(times=12, edit=NoiseEdit(noise, rows), max_new_tokens=64)      # generation.Decoding

Two experiments differ for thoughts that read hidden states: in `recompute` later thoughts follow from the noisy ones, in
`replay` they are held at their clean values before they meet noise of their own. Where thoughts read nothing they coincide.

Shape letters: B rows, T columns, C columns of one pass, S slots, D width, P prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from analysis.interventions import chain
from analysis.noise_operators import NoiseEdit
from attention import append_cache, appends_only
from coconut import Coconut
from dataset import MyCollator
from generation import Decoding, Row

CHAINS = ("recompute", "replay")

# ---------------------------------------------------------------- thoughts of another layer


def source_layer(model: Coconut, noise_layer: int) -> int | None:
    """The block whose output is fed back, from 1; None for the state after the final norm (-1, or the number of blocks).

    `noise_layer` counts the entries of `hidden_states`: 0 the embeddings, i the output of block i. Raises ValueError for
    entries that do not exist or are no thought, and where thoughts do not read states one after the other.
    """
    n = model.base_causallm.config.num_hidden_layers
    layer = noise_layer + n + 1 if noise_layer < 0 else noise_layer
    if not 1 <= layer <= n:
        raise ValueError(f"noise_layer {noise_layer}: this model has entries 1 to {n}, or -1 for the last")
    if layer == n:
        return None
    if not model.feedback.reads_hidden or model.latent_iterations is not None:
        raise ValueError(f"noise_layer {noise_layer}: needs thoughts that read hidden states one after the other; use -1")
    return layer


def as_fed(model: Coconut, state_BD: Tensor) -> Tensor:
    """A state as a slot gets it: scaled where the model's `latent_norm` says so."""
    if model.latent_norm != "match_embedding":
        return state_BD
    rms = state_BD.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-8)
    return state_BD * (model.embedding_rms() / rms)


class LayerThoughts:
    """The edit that feeds back the output of a block in place of the state after the final norm."""

    def __init__(self, model: Coconut, layer: int):
        self.model, self.layer, self.layers = model, layer, (0, layer)
        self.state_BD: Tensor | None = None  # of the last column of the newest pass

    def __call__(self, layer: int, pass_, x_BCD: Tensor) -> Tensor | None:
        if layer == self.layer:
            self.state_BD = x_BCD[:, -1]
            return None
        if not pass_.slots:
            return None
        (slot,) = pass_.slots
        assert slot.column == pass_.start, "a slot that reads the state before it begins a pass"
        thought_BD = as_fed(self.model, self.state_BD).to(x_BCD.dtype)
        first_BD = torch.where(slot.rows.to(x_BCD.device)[:, None], thought_BD, x_BCD[:, 0])
        return torch.cat([first_BD[:, None], x_BCD[:, 1:]], 1)


def clean_thoughts(model: Coconut, collate: MyCollator, tokens: Sequence[np.ndarray], feed=None) -> tuple[Tensor, Tensor]:
    """Positions of the slots (int64 [P, S], as many in every prompt) and the clean vectors in them [P, S, D]."""
    batch = collate([{"input_ids": x} for x in tokens])
    slots_PS = torch.from_numpy(np.stack([np.flatnonzero(x == model.latent_token_id) for x in tokens]))
    columns_PS = slots_PS + batch["attention_mask"].argmax(1)[:, None]
    device = model.embedding.weight.device
    plan = model.plan(**batch)
    rollout = model.rollout(**{key: value.to(device) for key, value in batch.items()}, plan=plan, edit=feed)
    return slots_PS, rollout.inputs_embeds_BTD[torch.arange(len(tokens))[:, None].to(device), columns_PS.to(device)]


class _Fed:
    """The edit that puts vectors [B, S, D] in the first columns of a pass."""

    layers = (0,)

    def __init__(self, vectors_BSD: Tensor):
        self.vectors_BSD = vectors_BSD

    def __call__(self, layer: int, pass_, x_BCD: Tensor) -> Tensor:
        return torch.cat([self.vectors_BSD.to(x_BCD.dtype), x_BCD[:, self.vectors_BSD.shape[1] :]], 1)


# ---------------------------------------------------------------- the shared prefix


def shares_prefix(model: Coconut) -> bool:
    """Whether the keys and values of a prefix can be kept and copied, and passes behind it be any run of columns."""
    config = model.base_causallm.config
    whole = getattr(model.base_causallm, "single_pass_only", False) or getattr(config, "mod_force_thoughts", False)
    return appends_only(append_cache(config, 1)) and model.latent_iterations is None and not whole


@dataclass
class Prefix:
    """Prompts up to the column before a slot; `continued` copies their rows and goes on from there.

    All prompts have the same number of slots, in the same columns, and end in one column. `batch`: the whole prompts on the
    CPU, as a collator makes them; `slot`: counted from 1.
    """

    model: Coconut
    batch: dict[str, Tensor]
    slot: int
    first: int  # column of slot 1
    n_slots: int
    cache: object
    state_BD: Tensor  # what the slot's thought is made of
    thoughts_BSD: Tensor | None  # clean vectors of this slot and all later ones, where they are not made from states
    layer_thoughts: LayerThoughts | None

    @classmethod
    @torch.no_grad()
    def run(cls, model: Coconut, batch: dict[str, Tensor], slot: int = 1, layer: int | None = None, replay: bool = False):
        """Run a batch up to a slot. `layer`: of `source_layer`; `replay`: hold all thoughts at their clean vectors.

        Raises ValueError where a prompt is longer than the model's positions, has no such slot, or rows differ in slots.
        """
        batch = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids")}
        latent_BT = batch["input_ids"] == model.latent_token_id
        n_slots, first = int(latent_BT[0].sum()), int(latent_BT[0].int().argmax())
        _check_positions(model, batch["attention_mask"])
        if not 1 <= slot <= n_slots:
            raise ValueError(f"slot {slot}: these prompts have {n_slots} thoughts")
        if (latent_BT != latent_BT[0]).any() or (batch["attention_mask"][:, -1] == 0).any():
            raise ValueError("prompts of a shared prefix must have their slots in the same columns and end in one column")
        cut, end = first + slot - 1, first + n_slots
        replay = replay or not model.feedback.reads_hidden
        part = {key: value[:, : end if replay else cut] for key, value in batch.items()}
        plan, device = model.plan(**part), model.embedding.weight.device
        cache = append_cache(model.base_causallm.config, end)
        feed = None if layer is None else LayerThoughts(model, layer)
        part = {key: value.to(device) for key, value in part.items()}
        rollout = model.rollout(**part, plan=plan, cache=cache, edit=feed)
        if replay:
            cache.crop(cut - end)
        state_BD = rollout.hidden_BTD[:, cut - 1] if feed is None else feed.state_BD
        thoughts_BSD = rollout.inputs_embeds_BTD[:, cut:] if replay else None
        return cls(model, batch, slot, first, n_slots, cache, state_BD, thoughts_BSD, feed)

    @torch.no_grad()
    def continued(self, times: int, edit: NoiseEdit, max_new_tokens: int, row_ids: Sequence[int] | None = None) -> Decoding:
        """Each row `times` times in a row, through its thoughts with their noise, to its first new token.

        `row_ids`: what `edit` knows the copies by; copy c of row b is number b * times + c, which is also the default.
        """
        model, device = self.model, self.state_BD.device
        B, T = self.batch["input_ids"].shape
        index = torch.arange(B).repeat_interleave(times)
        ids_BT, mask_BT, positions_BT = (self.batch[k][index] for k in ("input_ids", "attention_mask", "position_ids"))
        row_ids = tuple(range(len(index)) if row_ids is None else row_ids)
        padded = bool((mask_BT == 0).any())
        rows = [
            Row(i, n_prompt, T - begin, _cap(model, n_prompt, max_new_tokens))
            for i, n_prompt, begin in zip(row_ids, mask_BT.sum(1).tolist(), mask_BT.argmax(1).tolist())
        ]
        ids_BT, mask_BT, positions_BT, at = (x.to(device) for x in (ids_BT, mask_BT, positions_BT, index))
        cache = append_cache(model.base_causallm.config, T + max_new_tokens, len(self.cache.layers))
        for mine, layer in zip(cache.layers, self.cache.layers, strict=True):
            mine.replace(layer.keys[at], layer.values[at])
        state_BD, thoughts_BSD = self.state_BD[at], None if self.thoughts_BSD is None else self.thoughts_BSD[at]
        seen_BT = mask_BT if padded or getattr(model.base_causallm, "needs_mask", False) else None

        column = self.first + self.slot - 1
        while column < T:
            k, stop = column - self.first, column + 1
            if thoughts_BSD is not None:
                vectors = [edit.noisy(k + i, x_BD, row_ids) for i, x_BD in enumerate(thoughts_BSD.unbind(1))]
                stop = T
            else:
                vectors = [edit.noisy(k, model.feedback(k, as_fed(model, state_BD)), row_ids)]
                stop = T if k + 1 == self.n_slots else stop
            out = model.extend(
                ids_BT[:, column:stop],
                cache,
                column,
                None if seen_BT is None else seen_BT[:, :stop],
                positions_BT[:, column:stop],
                edit=chain(_Fed(torch.stack(vectors, 1)), self.layer_thoughts),
                row_ids=row_ids,
            )
            state_BD = out.hidden_BTD[:, -1] if self.layer_thoughts is None or stop == T else self.layer_thoughts.state_BD
            column = stop
        token_B = model.head(state_BD).argmax(-1)
        limit = getattr(model.base_causallm.config, "max_position_embeddings", None)
        n_prompt_B = mask_BT.sum(1)
        decoding = Decoding(model, None, rows, cache, T, mask_BT if padded else None, n_prompt_B, state_BD, token_B, limit)
        for row, token in zip(rows, token_B.tolist()):
            row.take([token], model.eos_token_id)
        return decoding


def _check_positions(model: Coconut, mask_BT: Tensor) -> None:
    limit, longest = getattr(model.base_causallm.config, "max_position_embeddings", None), int(mask_BT.sum(1).max())
    if limit is not None and longest > limit:
        raise ValueError(f"a prompt of {longest} tokens exceeds the model's {limit} positions")


def _cap(model: Coconut, n_prompt: int, max_new_tokens: int) -> int:
    limit = getattr(model.base_causallm.config, "max_position_embeddings", None)
    return max_new_tokens if limit is None else min(max_new_tokens, limit - n_prompt + 1)
