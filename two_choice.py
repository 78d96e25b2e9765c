"""Two-choice scores: for rows that name two options, which has the larger probability after the model's own steps.

    scores = score_options(model, rows, prompts, new_ids, tokenizer)      # given steps, each row from its start

An option's score is the summed log-probability of its own pieces and the full stop, behind `### Name is a`. Unlike
free-running accuracy it does not ask for a well-formed answer, and a coin scores 50 %.
"""

import sys
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from coconut import Coconut
from dataset import MyCollator
from generation import Decoding


def has_options(row: dict) -> bool:
    """Whether a row names a right and a wrong option by node (ProsQA)."""
    return all(key in row for key in ("idx_to_symbol", "root", "target", "neg_target"))


def wants_two_choice(config, rows: list[dict]) -> bool:
    """Whether options are to be scored: as the config says, by default where every row has them."""
    possible = all(map(has_options, rows))
    if config.two_choice is True and not possible:
        raise ValueError(f"two_choice: rows of {config.val_path} name no two options (root, target, neg_target); set auto")
    return possible and config.two_choice is not False


@dataclass(frozen=True)
class Options:
    """The tokens behind a row's prompt: its own steps, and after them either the right or the wrong answer.

    `n_name`: how many pieces `### Name is a` takes, with which every answer to the row begins.
    """

    steps: list[int]
    answers: tuple[list[int], list[int]]
    n_name: int

    @classmethod
    def of(cls, row: dict, new_ids: list[int], n_prompt: int, model: Coconut, tokenizer) -> "Options | None":
        """None where prompt and answer exceed the model's positions. Own steps are cut to what fits."""
        names = row["idx_to_symbol"]
        right, wrong, n_name = _answers(tokenizer, tuple(names), row["root"], row["target"], row["neg_target"])
        max_positions = getattr(model.base_causallm.config, "max_position_embeddings", None) or sys.maxsize
        room = max_positions - n_prompt - max(len(right), len(wrong))
        return cls(_own_steps(new_ids, tokenizer)[:room], (right, wrong), n_name) if room >= 0 else None


@lru_cache(maxsize=8192)
def _answers(tokenizer, names: tuple[str, ...], root: int, target: int, wrong: int) -> tuple[list[int], list[int], int]:
    """Pieces of the right and the wrong answer, and how many of them all answers about this person begin with."""
    answers = [tokenizer.encode(f"### {names[root]} is a {name}.", add_special_tokens=False) for name in names]
    n_name = next((i for i, pieces in enumerate(zip(*answers)) if len(set(pieces)) > 1), None)
    if n_name is None or answers[target] == answers[wrong]:
        options = f"{names[target]} and {names[wrong]}"
        raise ValueError(f"two_choice: {options} are the same tokens to this tokenizer; set two_choice: False")
    return answers[target], answers[wrong], n_name


def _own_steps(new_ids: list[int], tokenizer) -> list[int]:
    """The generated tokens before the first that holds a `#`; all of them and a newline where none does."""
    for i, token in enumerate(new_ids):
        if "#" in tokenizer.decode([token]):
            return new_ids[:i]
    return [*new_ids, *tokenizer.encode("\n", add_special_tokens=False)] if new_ids else []


@torch.no_grad()
def score_options(
    model: Coconut, rows: list[dict], prompts: list[dict], new_ids: list[list[int]], tokenizer, edit=None
) -> list[dict]:
    """Scores of rows whose continuations are given.

    Returns margin (log P(target) - log P(wrong), nats), two_choice_correct, two_choice_ce (nats; log 2 is a coin) for each
    row, and what the margin is made of: target_logp, wrong_logp, and name_logp of `Name is a` behind `###`, which should be
    near 0. All are None where prompt and answer exceed the model's positions. `prompts` hold input_ids and idx, the row's number
    for edits.
    """
    found = [Options.of(*given, len(prompt["input_ids"]), model, tokenizer) for *given, prompt in zip(rows, new_ids, prompts)]
    scored = [(options, prompt) for options, prompt in zip(found, prompts) if options]
    if not scored:
        return [_scores(None) for _ in rows]
    options = [options for options, _ in scored]
    batch = MyCollator(tokenizer, model.latent_token_id, left=True)([prompt for _, prompt in scored])
    batch, row_ids = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids")}, batch["idx"].tolist()
    room = max(len(o.steps) + len(answer) for o in options for answer in o.answers)

    def begin() -> Decoding:
        return Decoding.prefill(model, **batch, max_new_tokens=0, room=room, edit=edit, row_ids=row_ids)[0]

    right = begin()
    wrong = right if right.movable else begin()
    found_scores = iter(_behind((right, wrong), options, [0] * len(options)))
    return [next(found_scores) if o else _scores(None) for o in found]


@torch.no_grad()
def score_decoded(decoding: Decoding, rows: list[dict], tokenizer) -> list[dict]:
    """What `score_options` returns of rows that are done (`rows`: theirs), from what their cache holds: see `movable`.

    Prompt and own steps are there already; what else a row said is hidden while each answer in turn is put behind them.
    """
    own = decoding.rows
    options = [Options.of(row, of.new_ids, of.n_prompt, decoding.model, tokenizer) for row, of in zip(rows, own)]
    if not any(options):
        return [_scores(None) for _ in rows]
    # The last new token may not have been fed, and the newline behind steps that end without one is not the model's.
    n_kept = [min(len(o.steps), len(of.new_ids), of.n_fed) if o else 0 for o, of in zip(options, own)]
    return _behind((decoding, decoding), options, n_kept)


def _behind(decodings: tuple[Decoding, Decoding], options: list[Options | None], n_kept: list[int]) -> list[dict]:
    """The scores of each row (of None: empty ones).

    `decodings`: whose rows get the right and the wrong answers, behind their first `n_kept` new tokens.
    """
    logp_2B2 = torch.zeros(2, len(options), 2, dtype=torch.float64)  # right and wrong, row, name and option
    for choice, decoding in enumerate(decodings):
        tails = [[*o.steps[n:], *o.answers[choice]] if o else [] for o, n in zip(options, n_kept)]
        labels_BC = torch.full((len(tails), max(map(len, tails))), -100)
        is_option_BC = torch.zeros_like(labels_BC)
        for b, (o, tail) in enumerate(zip(options, tails)):
            if o:
                start = len(tail) - len(o.answers[choice])
                labels_BC[b, start + 1 : len(tail)] = torch.tensor(o.answers[choice][1:])
                is_option_BC[b, start + o.n_name : len(tail)] = 1
        assert (labels_BC[:, 0] == -100).all(), "no row is asked for its first piece, the `###` of all answers"
        hidden_BCD = decoding.states_behind(tails, n_kept)
        loss_N, row_N = decoding.model.label_losses(hidden_BCD, labels_BC.to(hidden_BCD.device))
        logp_2B2[choice].index_put_((row_N.cpu(), is_option_BC[labels_BC != -100]), -loss_N.cpu().double(), accumulate=True)
    (right_B2, wrong_B2) = logp_2B2.tolist()
    return [_scores(r[1], w[1], r[0]) if o else _scores(None) for o, r, w in zip(options, right_B2, wrong_B2)]


def _scores(right: float | None, wrong: float = 0.0, name: float = 0.0) -> dict:
    if right is None:
        return dict.fromkeys(("margin", "two_choice_correct", "two_choice_ce", "target_logp", "wrong_logp", "name_logp"))
    margin = right - wrong
    return {
        "margin": margin,
        "two_choice_correct": margin > 0,
        "two_choice_ce": float(np.logaddexp(0, -margin)),
        "target_logp": right,
        "wrong_logp": wrong,
        "name_logp": name,
    }
