"""Greedy decoding behind a rollout: batched and cached; rows end at their own EOS, leave, and make room for others.

    ids = model.generate(**batch, max_new_tokens=64)      # Coconut's method of that name calls `generate` here

    decoding, _ = Decoding.prefill(model, **batch, max_new_tokens=64)      # the same by hand, as evaluation does it
    while decoding.going():
        decoding.advance()
    new_ids = [row.new_ids for row in decoding.rows]

Shape letters: B rows, T columns of a prompt, P columns in the cache, C columns behind them, D width.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from attention import append_cache, appends_only, join_rows

READ_EVERY = {"cpu": 1}  # steps between two looks at the new tokens, each of which waits for the device
READ_EVERY_ELSEWHERE = 4
SPARE_COLUMNS = 16  # what `states_behind` may need behind rows that are done


@dataclass(eq=False)
class Row:
    """What the host knows of a row: whose it is, how far it may go, and its new tokens without EOS."""

    row_id: int
    n_prompt: int  # tokens of the prompt
    n_columns: int  # columns from its first token to the end of the prompt batch
    cap: int  # new tokens it may have: max_new_tokens, or what the model's positions leave
    new_ids: list[int] = field(default_factory=list)
    n_fed: int = 0  # columns behind the prompt, also those fed after its end
    embeds: list[Tensor] = field(default_factory=list)  # [1, D] as fed, one a fed token, where an edit may change them
    ended: bool = False

    @property
    def done(self) -> bool:
        return self.ended or len(self.new_ids) >= self.cap

    def take(self, tokens: list[int], eos: int) -> None:
        """Add tokens up to its end."""
        for token in tokens:
            self.ended = self.ended or token == eos
            if self.done:
                return
            self.new_ids.append(token)


@dataclass(eq=False)
class Decoding:
    """Rows that share a cache and take a step together. Each has a newest token, which is not fed yet.

    Rows stand at different positions. They may leave (`select`) and others join (`join`) where the cache is of the kind
    that `append_cache` makes (`movable`). Sliding windows that are not masked here count columns: such a batch stays as it is.
    """

    model: object
    edit: object
    rows: list[Row]
    cache: object
    n_columns: int  # P
    mask_BP: Tensor | None  # None: no padding
    position_B: Tensor  # of the next token
    state_BD: Tensor  # after the final norm, of the last fed column; it chose the newest token
    token_B: Tensor
    limit: int | None  # the model's positions

    @classmethod
    def prefill(
        cls,
        model,
        input_ids,
        attention_mask=None,
        position_ids=None,
        *,
        max_new_tokens: int,
        room: int = 0,
        edit=None,
        row_ids=None,
    ):
        """Run a batch of prompts ([B, T], best on the CPU; padded as a rollout takes it), and choose a token a row.

        `room`: columns to have space for behind the prompts if more than `max_new_tokens`. Returns (Decoding, the prompts'
        Rollout). Raises ValueError where a prompt is longer than the model's positions, or padded on the right of a
        sliding window that counts columns.
        """
        device, (B, T) = model.embedding.weight.device, input_ids.shape
        mask_BT = torch.ones(B, T, dtype=torch.long) if attention_mask is None else attention_mask.cpu()
        n_prompt_B = mask_BT.sum(1)
        limit, longest = getattr(model.base_causallm.config, "max_position_embeddings", None), int(n_prompt_B.max())
        if limit is not None and longest > limit:
            raise ValueError(f"a prompt of {longest} tokens exceeds the model's {limit} positions")
        n_columns_B = T - mask_BT.long().argmax(1)
        rows = [
            Row(row_id, n_prompt, n_columns, max_new_tokens if limit is None else min(max_new_tokens, limit - n_prompt + 1))
            for row_id, n_prompt, n_columns in zip(
                range(B) if row_ids is None else row_ids, n_prompt_B.tolist(), n_columns_B.tolist()
            )
        ]
        model.gen_forward_cnt = 0
        plan = model.plan(input_ids, mask_BT, position_ids, row_ids=[row.row_id for row in rows])
        last_B = T - 1 - mask_BT.flip(1).long().argmax(1)
        ends_together = bool((last_B == T - 1).all())
        input_ids, position_ids, mask_BT, n_prompt_B, last_B = (
            None if x is None else x.to(device) for x in (input_ids, position_ids, mask_BT, n_prompt_B, last_B)
        )
        cache = append_cache(model.base_causallm.config, T + max(max_new_tokens, room))
        if not (appends_only(cache) or ends_together):
            raise ValueError(
                "layers with a sliding window count columns under this attention (not under sdpa and eager), so prompts must "
                "end in one: decode rows with one number of latents at a time, padded with MyCollator(tokenizer, latent_id, "
                "left=True)"
            )
        prompts = model.rollout(input_ids, mask_BT, position_ids, plan=plan, cache=cache, edit=edit)
        state_BD = prompts.hidden_BTD[torch.arange(B, device=device), last_B]
        token_B = model.head(state_BD).argmax(-1)
        seen_BT = None if sum(row.n_prompt for row in rows) == B * T else mask_BT
        decoding = cls(model, edit, rows, cache, T, seen_BT, n_prompt_B, state_BD, token_B, limit)
        decoding._read([token_B])
        return decoding, prompts

    # ------------------------------------------------------------ steps

    def going(self) -> list[int]:
        """The rows (numbers within this batch) that are not done."""
        return [b for b, row in enumerate(self.rows) if not row.done]

    def advance(self) -> None:
        """A token for every row; a few of them where a look at the tokens makes the device wait.

        What rows that are done say meanwhile is dropped.
        """
        every = READ_EVERY.get(self.token_B.device.type, READ_EVERY_ELSEWHERE)
        left = min(row.cap - len(row.new_ids) for row in self.rows if not row.done)
        chosen = []
        for _ in range(min(every, left)):
            self._step()
            chosen.append(self.token_B)
        self._read(chosen)

    def _step(self) -> None:
        """Feed the newest tokens and choose the next ones."""
        position_B = self.position_B if self.limit is None else self.position_B.clamp(max=self.limit - 1)
        if self.mask_BP is not None:
            self.mask_BP = F.pad(self.mask_BP, (0, 1), value=1)
        fed = self.model.extend(
            self.token_B[:, None],
            self.cache,
            self.n_columns,
            self.mask_BP,
            position_B[:, None],
            edit=self.edit,
            row_ids=[row.row_id for row in self.rows],
        )
        self.n_columns, self.position_B = self.n_columns + 1, self.position_B + 1
        for row in self.rows:
            row.n_fed += 1
        if self.edit is not None:
            for row, x_1D in zip(self.rows, fed.inputs_embeds_BTD):
                row.embeds.append(x_1D)
        self.state_BD = fed.hidden_BTD[:, -1]
        self.token_B = self.model.head(self.state_BD).argmax(-1)

    def _read(self, chosen: list[Tensor]) -> None:
        for row, tokens in zip(self.rows, torch.stack(chosen, 1).tolist()):
            row.take(tokens, self.model.eos_token_id)

    # ------------------------------------------------------------ rows leave and join

    @property
    def movable(self) -> bool:
        """Whether rows may leave and join, and columns be taken off again."""
        return appends_only(self.cache)

    def worth_dropping(self) -> bool:
        """Whether so many rows are done that the others are better off in a cache of their own, which takes a copy."""
        return self.movable and 4 * (len(self.rows) - len(self.going())) >= len(self.rows)

    def select(self, numbers: list[int]) -> "Decoding":
        """Some of the rows, with a cache of their own (of all rows: this object)."""
        if len(numbers) == len(self.rows):
            return self
        rows = [self.rows[b] for b in numbers]
        room = max(SPARE_COLUMNS, *(row.cap - len(row.new_ids) for row in rows))
        index = torch.tensor(numbers, device=self.token_B.device)
        cache = append_cache(self.model.base_causallm.config, self.n_columns + room, len(self.cache.layers))
        for mine, layer in zip(cache.layers, self.cache.layers, strict=True):
            mine.replace(layer.keys[index], layer.values[index])
        return replace(
            self,
            rows=rows,
            cache=cache,
            mask_BP=None if self.mask_BP is None else self.mask_BP[index],
            position_B=self.position_B[index],
            state_BD=self.state_BD[index],
            token_B=self.token_B[index],
        )

    def join(self, other: "Decoding") -> None:
        """Take in the rows of `other`, which is used up. The shorter cache is padded on the left; positions stay."""
        # Columns before the first token of all rows of `other` are not worth carrying on.
        lead = other.n_columns - max(row.n_columns + row.n_fed for row in other.rows)
        for layer in other.cache.layers:
            layer.keys, layer.values = layer.keys[:, :, lead:], layer.values[:, :, lead:]
        n_columns = max(self.n_columns, other.n_columns - lead)
        masks = [self._mask(), other._mask()[:, lead:]]
        self.mask_BP = torch.cat([F.pad(mask, (n_columns - mask.shape[1], 0)) for mask in masks])
        join_rows(self.cache, other.cache)
        self.rows, self.n_columns = [*self.rows, *other.rows], n_columns
        for name in ("position_B", "state_BD", "token_B"):
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))

    def _mask(self) -> Tensor:
        full = self.mask_BP is None
        return self.token_B.new_ones(len(self.rows), self.n_columns) if full else self.mask_BP

    # ------------------------------------------------------------ looking ahead

    def states_behind(self, tails: list[list[int]], n_kept: list[int] | None = None) -> Tensor:
        """The states [B, C, D] of given tokens, one list a row, behind its prompt and its first `n_kept` new tokens.

        `n_kept` (default: all that were fed) must not exceed those. What follows a shorter list is arbitrary. The cache
        is left as it was; where it isn't `movable`, this object is used up, and all that was fed must be kept.
        """
        device, hidden = self.token_B.device, [0] * len(self.rows)
        if n_kept is not None:
            hidden = [row.n_fed - n for row, n in zip(self.rows, n_kept)]
        width = max(map(len, tails))
        ids_BC = torch.tensor([[*tail, *[0] * (width - len(tail))] for tail in tails])
        start = [row.n_prompt + row.n_fed - n for row, n in zip(self.rows, hidden)]
        position_BC = torch.tensor([[s + i if i < len(tail) else 0 for i in range(width)] for s, tail in zip(start, tails)])
        mask_BT = None
        if self.mask_BP is not None or any(hidden):
            end_B1 = torch.tensor([[self.n_columns - n] for n in hidden]).to(device)
            column_P = torch.arange(self.n_columns, device=device)
            mask_BT = F.pad(self._mask() * (column_P < end_B1), (0, width), value=1)
        row_ids = [row.row_id for row in self.rows]
        states = self.model.extend(
            ids_BC.to(device), self.cache, self.n_columns, mask_BT, position_BC.to(device), edit=self.edit, row_ids=row_ids
        )
        if self.movable:
            self.cache.crop(-width)
        return states.hidden_BTD


# ---------------------------------------------------------------- many rows


def decoded(waiting: deque, begin: Callable[[int], Decoding], n_slots: int) -> Iterator[tuple[Decoding, list[int]]]:
    """Decode everything that waits, up to `n_slots` rows at a time. Yields batches in which rows are done, and which.

    `begin(n)` takes one or more, at most n, from `waiting` and prefills them. It is called when fewer than half of the
    slots are in use. A yielded batch is as it was left until the next one is asked for.
    """
    live = None
    while waiting or live:
        going = live.going() if live else []
        refill = bool(waiting) and 2 * len(going) < n_slots
        if live and len(going) < len(live.rows) and (not going or live.movable and (refill or live.worth_dropping())):
            yield live, [b for b, row in enumerate(live.rows) if row.done]
            live = live.select(going) if going else None
        if refill and (live is None or live.movable):
            started = begin(n_slots - len(going))
            if live:
                started.join(live)
            live = started
        elif live:
            live.advance()


def generate(model, input_ids, attention_mask, max_new_tokens: int, position_ids, edit, row_ids):
    """See `Coconut.generate`. Returns (ids [B, T + new], embeddings [B, T + new, D])."""
    decoding, prompts = Decoding.prefill(
        model, input_ids, attention_mask, position_ids, max_new_tokens=max_new_tokens, edit=edit, row_ids=row_ids
    )
    rows, T = decoding.rows, input_ids.shape[1]
    while going := decoding.going():
        if decoding.worth_dropping():
            decoding = decoding.select(going)
        decoding.advance()
    width = max(len(row.new_ids) for row in rows)
    filled_up = [row.new_ids + [model.eos_token_id] * (width - len(row.new_ids)) for row in rows]
    new_BN = torch.tensor(filled_up, dtype=torch.long, device=input_ids.device)
    embeds_BTD = torch.cat([prompts.inputs_embeds_BTD, model.embedding(new_BN.to(model.embedding.weight.device))], 1)
    for b, row in enumerate(rows):
        n_fed = min(len(row.embeds), len(row.new_ids), row.cap - 1)  # a last token at the cap is chosen and not fed
        if n_fed:
            embeds_BTD[b, T : T + n_fed] = torch.cat(row.embeds[:n_fed])
    return torch.cat([input_ids, new_BN], 1), embeds_BTD
