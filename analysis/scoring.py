"""A checkpoint's losses and answers on held-out problems at one curriculum stage, with its thoughts in use and out of it.

    subject = Subject.load("runs/lahr/lahr-abc")
    problems = Problems.read("data/cot_val.json", subject.tokenizer)
    on, off = score(subject, problems, stage=3), score(subject, problems, stage=3, condition="inert")
    same_tokens(on, off)                        # CheckFailed where they are not about the same targets
    summary(on)["perplexity"], summary(off)["answer_loss"]

Every problem is scored, in its training form: question, slots, the steps that the stage keeps, answer. Conditions, all with the
same weights and the same targets:

    on         as trained
    inert      slots keep the latent token's own embedding; same ids and positions
    hidden     nobody behind a slot attends to it; same ids and positions
    swapped    slots take the thoughts of another problem with as many of them
    no_slots   no latent tokens, only the markers; what follows moves up

A target is named by (problem, its number among the problem's supervised tokens, token id), which is the same whether or not
there are slots before it; `sha256` is over the ordered list of these, as little-endian int64 triples. Models without slots
(chain of thought, answer only) have only "on", and without a curriculum are always at stage 0.

Shape letters: P problems, S slots, B rows, T columns, N supervised positions, D width, V vocabulary.
"""

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.command import CheckFailed
from analysis.interventions import NOWHERE, Patch, generator
from analysis.subject import Problems, Prompts, Subject
from dataset import MyCollator, clean_answer, extract_answer, get_cot_latent_dataset
from generation import Decoding, Row, decoded

CONDITIONS = ("on", "inert", "hidden", "swapped", "no_slots")
SCOPES = {"all": "", "answer": "answer_"}  # of targets, and what their fields begin with
HEAD_ROWS = 4096  # positions that meet the head at a time


@dataclass(frozen=True)
class Scores:
    """`records`: of each problem, in file order, `idx`, `n_tokens`, `loss` (summed nats), `n_right` (of the teacher-forced
    argmax), `answer_tokens`, `answer_loss`, `answer_right` (of `### answer<eos>` alone), `n_latents`, and of greedy decoding
    `correct` (exact match) and `generated_tokens` (latents and new tokens), None where it was not asked for."""

    label: str
    stage: int
    condition: str
    records: list[dict]
    sha256: str
    answer_sha256: str

    def column(self, name: str) -> np.ndarray:
        """One field of all records."""
        return np.array([record[name] for record in self.records])


@torch.no_grad()
def score(
    subject: Subject,
    problems: Problems,
    stage: int,
    condition: str = "on",
    *,
    exact_match: bool = True,
    batch_size: int | None = None,
    seed: int = 0,
) -> Scores:
    """Score all problems. `exact_match`: also decode answers; `seed`: of who takes whose thoughts when "swapped".

    Raises ValueError where the condition is unknown or the model has no slots, a row is longer than the model's positions,
    or a problem is the only one with so many thoughts and has nobody to swap with.
    """
    if condition not in CONDITIONS:
        raise ValueError(f"condition {condition!r} is unknown; known: {', '.join(CONDITIONS)}")
    if condition != "on" and not has_slots(subject):
        raise ValueError(f"{subject.path}: the model has no thoughts to take away; {condition} needs some")
    subject = replace(subject, batch_size=batch_size) if batch_size else subject
    rows = stage_rows(subject, problems, stage)
    if condition == "no_slots":
        rows = [without_slots(row, subject.ids.latent) for row in rows]
    _check_lengths(subject, problems, rows)
    prompts = prompts_of(rows, problems, subject.model.latent_token_id)
    edit = _edit(subject, prompts, condition, seed)
    hidden = condition == "hidden"
    scored = _teacher_forced(subject, rows, edit, hidden)
    assert edit is None or edit.n_hit == (prompts.slots != NOWHERE).sum(), "every slot must have met its vector"
    said = _greedy(subject, prompts, edit, hidden) if exact_match else {}
    latents = prompts.lengths().latents.tolist()
    records = [
        _record(i, loss_N, right_N, row["n_answer"], n_latents, said.get(i), problems.rows[i], subject.tokenizer)
        for i, (row, (loss_N, right_N), n_latents) in enumerate(zip(rows, scored, latents))
    ]
    hashes = targets_hash(rows), targets_hash(rows, answer_only=True)
    return Scores(f"{subject.path.parent.name}/{subject.path.name}", stage, condition, records, *hashes)


def has_slots(subject: Subject) -> bool:
    """Whether a model has thought slots at stages above 0."""
    return subject.config.markers and subject.config.c_thought > 0


# ---------------------------------------------------------------- what is scored


def stage_rows(subject: Subject, problems: Problems, stage: int) -> list[dict]:
    """Training rows of a stage, all of exactly this one: `input_ids`, `labels`, `idx`, `n_answer` (labels of the answer)."""
    config, ids = subject.config.model_copy(update={"uniform_prob": 0.0}), subject.ids
    if stage < 0:
        raise ValueError(f"stage {stage}: stages begin at 0")
    stage = 0 if config.cot or config.no_cot else stage
    rows = get_cot_latent_dataset(stage, problems.table, config, ids.start, ids.latent, ids.end, not config.markers)
    return [rows[i] | {"n_answer": int(problems.table.answer.length(i))} for i in range(len(rows))]


def without_slots(row: dict, latent_id: int) -> dict:
    """A row without its latent tokens."""
    kept = row["input_ids"] != latent_id
    return row | {"input_ids": row["input_ids"][kept], "labels": row["labels"][kept]}


def prompts_of(rows: Sequence[dict], problems: Problems, latent_id: int | None) -> Prompts:
    """What stands before the first supervised token of each row."""
    tokens = [row["input_ids"][: int((row["labels"] != -100).argmax())] for row in rows]
    return Prompts(tokens, problems.rows, range(len(rows)), latent_id)


def targets_hash(rows: Sequence[dict], answer_only: bool = False) -> str:
    """SHA-256 of the ordered (problem, number among its supervised tokens or those of its answer, token id)."""
    digest = hashlib.sha256()
    for row in rows:
        targets_N = row["labels"][row["labels"] != -100]
        targets_N = targets_N[len(targets_N) - row["n_answer"] :] if answer_only else targets_N
        triples = np.stack([np.full_like(targets_N, row["idx"]), np.arange(len(targets_N)), targets_N], 1)
        digest.update(triples.astype("<i8").tobytes())
    return digest.hexdigest()


def _check_lengths(subject: Subject, problems: Problems, rows: Sequence[dict]) -> None:
    limit = getattr(subject.model.base_causallm.config, "max_position_embeddings", None)
    longest = max(rows, key=lambda row: len(row["input_ids"]))
    if limit is not None and len(longest["input_ids"]) > limit:
        raise ValueError(
            f"{problems.path}, row {longest['idx']}: {len(longest['input_ids'])} tokens exceed the {limit} positions of "
            f"{subject.path}; shorten it or leave it out"
        )


# ---------------------------------------------------------------- what fills the slots


def _edit(subject: Subject, prompts: Prompts, condition: str, seed: int) -> Patch | None:
    if condition == "inert":
        own_D = subject.model.embedding(torch.tensor(subject.ids.latent, device=subject.device))
        return Patch(0, prompts.slots, own_D.expand(*prompts.slots.shape, -1))
    if condition == "swapped":
        donor_P = donors(prompts.lengths().latents, seed)
        return Patch(0, prompts.slots, subject.thoughts(prompts)[donor_P].to(subject.device))
    return None


def donors(latents_P: np.ndarray, seed: int = 0) -> np.ndarray:
    """For each problem another one with as many thoughts, each taken once, int64 [P]; problems without any keep to themselves.

    Raises ValueError where there is no other.
    """
    donor_P = np.arange(len(latents_P))
    for n in sorted(set(latents_P.tolist()) - {0}):
        group = np.flatnonzero(latents_P == n)
        if len(group) == 1:
            raise ValueError(f"row {group[0]} is the only one with {n} thoughts and has none to swap with; score more rows")
        order = generator(seed, n).permutation(group)
        donor_P[order] = np.roll(order, 1)
    return donor_P


# ---------------------------------------------------------------- losses and answers


def _hide(batch: dict, latent_id: int | None) -> None:
    """Mask the slots; positions go on counting them."""
    batch["attention_mask"] = batch["attention_mask"] * (batch["input_ids"] != latent_id)


def _teacher_forced(subject: Subject, rows: Sequence[dict], edit, hidden: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each row the loss in nats (float64 [N]) and whether the argmax is right (bool [N]) at its supervised tokens."""
    model, collate = subject.model, MyCollator(subject.tokenizer, subject.model.latent_token_id)
    order = np.argsort([len(row["input_ids"]) for row in rows], kind="stable").tolist()
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for start in range(0, len(rows), subject.batch_size):
        batch = collate([rows[i] for i in order[start : start + subject.batch_size]])
        row_ids, labels_BT = batch.pop("idx").tolist(), batch.pop("labels")
        if hidden:
            _hide(batch, model.latent_token_id)
        plan = model.plan(**batch, row_ids=row_ids)
        batch = {key: value.to(subject.device) for key, value in batch.items()}
        hidden_BTD = model.rollout(**batch, plan=plan, edit=edit).hidden_BTD
        asked_BT = labels_BT[:, 1:] != -100
        loss_N, right_N = _at_targets(model, hidden_BTD[:, :-1][asked_BT.to(subject.device)], labels_BT[:, 1:][asked_BT])
        ends = np.cumsum(asked_BT.sum(1).numpy())[:-1]
        found |= zip(row_ids, zip(np.split(loss_N, ends), np.split(right_N, ends)))
    return [found[i] for i in range(len(rows))]


def _at_targets(model, states_ND: Tensor, targets_N: Tensor) -> tuple[np.ndarray, np.ndarray]:
    losses, rights = [], []
    for states, targets in zip(states_ND.split(HEAD_ROWS), targets_N.to(states_ND.device).split(HEAD_ROWS)):
        logits = model.head(states)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses.append(F.cross_entropy(logits, targets, reduction="none").double().cpu())
        rights.append((logits.argmax(-1) == targets).cpu())
    return torch.cat(losses).numpy(), torch.cat(rights).numpy()


def _greedy(subject: Subject, prompts: Prompts, edit, hidden: bool) -> dict[int, Row]:
    """What the model says behind each prompt, by its number."""
    model, most = subject.model, subject.config.max_new_tokens or 128
    lengths, collate = prompts.lengths(), MyCollator(subject.tokenizer, prompts.latent_id, left=True)
    waiting = deque(np.lexsort((lengths.total, lengths.latents)).tolist())

    def begin(n_free: int) -> Decoding:
        """Prompts with one number of slots end in one column."""
        numbers = [waiting.popleft()]
        while waiting and len(numbers) < n_free and lengths.latents[waiting[0]] == lengths.latents[numbers[0]]:
            numbers.append(waiting.popleft())
        batch = collate([prompts[i] for i in numbers])
        row_ids = batch.pop("idx").tolist()
        if hidden:
            _hide(batch, prompts.latent_id)
        decoding, _ = Decoding.prefill(model, **batch, max_new_tokens=most, edit=edit, row_ids=row_ids)
        if hidden:  # prefilling counts what is visible
            n_slots = int(lengths.latents[numbers[0]])
            decoding.position_B = decoding.position_B + n_slots
            for row in decoding.rows:
                row.n_prompt += n_slots
                row.cap = row.cap if decoding.limit is None else min(row.cap, decoding.limit - row.n_prompt + 1)
        return decoding

    return {d.rows[b].row_id: d.rows[b] for d, done in decoded(waiting, begin, subject.batch_size) for b in done}


def _record(idx: int, loss_N, right_N, n_answer: int, n_latents: int, said: Row | None, row: dict, tokenizer) -> dict:
    answer = slice(len(loss_N) - n_answer, None)
    output = None if said is None else tokenizer.decode(said.new_ids, skip_special_tokens=True)
    return {
        "idx": idx,
        "n_tokens": len(loss_N),
        "loss": float(loss_N.sum()),
        "n_right": int(right_N.sum()),
        "answer_tokens": n_answer,
        "answer_loss": float(loss_N[answer].sum()),
        "answer_right": int(right_N[answer].sum()),
        "correct": None if said is None else extract_answer(output) == clean_answer(row["answer"]),
        "output": output,
        "n_latents": n_latents,
        "generated_tokens": None if said is None else n_latents + len(said.new_ids),
    }


# ---------------------------------------------------------------- what is said of them


def summary(scores: Scores) -> dict:
    """`loss` (nats, mean over tokens), `perplexity` (its exponential, uncapped), `token_accuracy`, `n_tokens`; the same of the
    answers alone under `answer_loss` ...; `exact_match` (None where not asked for) and `n_samples`."""
    found = {"n_samples": len(scores.records)}
    for prefix in SCOPES.values():
        n_tokens = int(scores.column(f"{prefix or 'n_'}tokens").sum())
        loss = float(scores.column(f"{prefix}loss").sum() / n_tokens)
        found |= {
            f"{prefix}loss": loss,
            f"{prefix}perplexity": float(np.exp(loss)),
            f"{prefix}token_accuracy": int(scores.column(f"{prefix or 'n_'}right").sum()) / n_tokens,
            f"{prefix}n_tokens": n_tokens,
        }
    asked = scores.records[0]["correct"] is not None
    return found | {"exact_match": float(scores.column("correct").mean()) if asked else None}


def same_tokens(a: Scores, b: Scores, scope: str = "all") -> None:
    """Raise CheckFailed where two scores are not about the same targets; `scope`: "all" supervised ones, or "answer"."""
    names = [f"{x.label}, stage {x.stage}, {x.condition}" for x in (a, b)]
    field = "answer_tokens" if scope == "answer" else "n_tokens"
    counts = [(len(x.records), int(x.column(field).sum())) for x in (a, b)]
    hashes = [x.answer_sha256 if scope == "answer" else x.sha256 for x in (a, b)]
    if counts[0] == counts[1] and hashes[0] == hashes[1]:
        return
    sides = (f"{name}: {n} problems, {t} tokens, {h[:12]}" for name, (n, t), h in zip(names, counts, hashes))
    raise CheckFailed(f"not the same {scope if scope == 'answer' else 'supervised'} targets: {' | '.join(sides)}")
