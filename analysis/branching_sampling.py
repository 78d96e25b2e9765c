"""Decoding that chooses tokens by chance, each row from numbers of its own, and knows how probable what it said is.

    decoding, _ = Decoding.prefill(model, **batch, max_new_tokens=64)
    decoding = Sampled.begin(copied(decoding, times=5), uniform_BN, temperature=0.7, top_p=0.9)
    rows = decoding.rows
    decoding.finish()
    [(row.new_ids, row.logprob) for row in rows]

Shape letters: B rows, N new tokens, P columns in the cache, V vocabulary.
"""

import hashlib
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from attention import append_cache
from generation import Decoding, Row


def uniforms(seed: int, question_id: str | int, branch: int, n: int) -> Tensor:
    """What chooses a branch's tokens: n numbers in [0, 1), float32, from a 64-bit hash of (seed, question id, branch)."""
    key = f"tokens|{seed}|{question_id}|{branch}".encode()
    own = torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()))
    return torch.rand(n, generator=own)


def nucleus(logits_BV: Tensor, top_p: float, uniform_B: Tensor) -> Tensor:
    """The token (int64 [B]) that a number in [0, 1) picks among the most likely ones, whose probabilities just reach `top_p`
    (Holtzman et al., arXiv 1904.09751)."""
    p_BV, token_BV = logits_BV.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before_BV = p_BV.cumsum(-1) - p_BV
    kept_BV = before_BV < top_p
    kept_BV[:, 0] = True
    reached_BV = (p_BV * kept_BV).cumsum(-1)
    place_B = (reached_BV <= uniform_B[:, None] * reached_BV[:, -1:]).sum(-1)
    place_B = place_B.clamp(max=kept_BV.sum(-1) - 1)  # where rounding takes the product to the whole sum
    return token_BV.gather(1, place_B[:, None])[:, 0]


@dataclass(eq=False)
class BranchRow(Row):
    """A row that also knows the log-probability of what it said, its end included, as the model has it (untempered)."""

    logprob: float = 0.0


@dataclass(eq=False)
class Sampled(Decoding):
    """Decoding that chooses tokens by chance; at temperature 0 the most likely ones. All rows begin together."""

    uniform_BN: Tensor | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    n_chosen: int = 0
    chosen_logprobs: list[Tensor] = field(default_factory=list)  # [B] each, of the tokens that no row has taken yet

    @classmethod
    def begin(cls, decoding: Decoding, uniform_BN: Tensor, temperature: float, top_p: float) -> "Sampled":
        """Choose the first token anew behind prompts that have just been prefilled."""
        held = {f.name: getattr(decoding, f.name) for f in fields(Decoding)}
        rows = [BranchRow(row.row_id, row.n_prompt, row.n_columns, row.cap) for row in decoding.rows]
        uniform_BN = uniform_BN.to(decoding.token_B.device)
        made = cls(**held | {"rows": rows}, uniform_BN=uniform_BN, temperature=temperature, top_p=top_p)
        made._choose()
        made._read([made.token_B])
        return made

    def _step(self) -> None:
        super()._step()
        self._choose()

    def _choose(self) -> None:
        logits_BV = self.model.head(self.state_BD).float()
        if self.temperature > 0:
            self.token_B = nucleus(logits_BV / self.temperature, self.top_p, self.uniform_BN[:, self.n_chosen])
        else:
            self.token_B = logits_BV.argmax(-1)
        self.chosen_logprobs.append(logits_BV.log_softmax(-1).gather(1, self.token_B[:, None])[:, 0])
        self.n_chosen += 1

    def _read(self, chosen: list[Tensor]) -> None:
        logprobs_BN = torch.stack(self.chosen_logprobs, 1).tolist()
        for row, tokens, logprobs in zip(self.rows, torch.stack(chosen, 1).tolist(), logprobs_BN):
            for token, logprob in zip(tokens, logprobs):
                row.logprob += 0.0 if row.done else logprob
                row.take([token], self.model.eos_token_id)
        self.chosen_logprobs.clear()

    def select(self, numbers: list[int]) -> "Sampled":
        made = super().select(numbers)
        if made is not self:
            made.uniform_BN = self.uniform_BN[torch.tensor(numbers, device=self.uniform_BN.device)]
        return made

    def finish(self) -> None:
        """Go on until all rows are done."""
        live = self
        while going := live.going():
            live = live.select(going) if live.worth_dropping() else live
            live.advance()


def copied(decoding: Decoding, times: int) -> Decoding:
    """Each row of a fresh prefill `times` times in a row, with a cache of their own; copy c of row b has id b * times + c."""
    at = torch.arange(len(decoding.rows), device=decoding.token_B.device).repeat_interleave(times)
    rows = [replace(row, row_id=b * times + c, new_ids=[]) for b, row in enumerate(decoding.rows) for c in range(times)]
    cache = append_cache(decoding.model.base_causallm.config, decoding.n_columns + rows[0].cap, len(decoding.cache.layers))
    for mine, layer in zip(cache.layers, decoding.cache.layers, strict=True):
        mine.replace(layer.keys[at], layer.values[at])
    each = {name: getattr(decoding, name)[at] for name in ("position_B", "state_BD", "token_B")}
    mask_BP = None if decoding.mask_BP is None else decoding.mask_BP[at]
    return replace(decoding, rows=rows, cache=cache, mask_BP=mask_BP, **each)
