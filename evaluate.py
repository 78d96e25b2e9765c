"""Loss, accuracy and two-choice scores as per-example records, batched, and sharded exactly over ranks.

`evaluate` asks three questions about a set of rows, each row once, whatever the number of ranks: the mean cross-entropy of
the stage's training form, a greedy continuation with its answer after the last `#` (exact match: Coconut arXiv 2412.06769,
section 4.1), and which of two options has the larger probability. One rollout over a row's prompt serves all three:

    prompt | gold continuation      loss; taken off the cache again
           | own continuation       decoded together with other rows; rows that are done make room for the next prompts
           | own steps | option     twice, with what the model said behind its steps hidden

    records, loss = evaluate(model, prompts, rows, tokenizer, 32, 64, world, gold=training_rows, two_choice=True)
"""

import sys
import time
from collections import deque
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from coconut import Coconut
from dataset import (
    MyCollator,
    StageDataset,
    clean_answer,
    extract_answer,
    extract_steps,
    get_cot_latent_dataset,
    get_question_latent_dataset,
)
from files import write_jsonl
from generation import Decoding, Row, decoded
from tokens import question_hash
from two_choice import score_decoded, score_options, wants_two_choice
from world import World


def shard_batches(sizes: np.ndarray, batch_size: int, world: World) -> list[list[int]]:
    """This rank's batches of row numbers: rows sorted by size, cut into batches, dealt out in turn."""
    order = np.lexsort(np.atleast_2d(sizes)).tolist()
    return _cut(order, batch_size)[world.rank :: world.size]


def _cut(numbers: list[int], batch_size: int) -> list[list[int]]:
    return [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]


# ---------------------------------------------------------------- all three questions


@torch.no_grad()
def evaluate(
    model: Coconut,
    prompts: StageDataset,
    rows: list[dict],
    tokenizer,
    batch_size: int,
    max_new_tokens: int,
    world: World,
    precision: AbstractContextManager | None = None,
    *,
    gold: StageDataset | None = None,
    two_choice: bool = False,
    edit=None,
    quiet: bool = False,
) -> tuple[list[dict], float | None]:
    """Records of all rows, on every rank and in the order of the rows, and with `gold` the loss in nats per labelled token.

    Fields of a record: idx, question_hash, n_steps (of the gold), gold, prediction (None without `#`), correct,
    numerically_equal, cot_match, output (the continuation), n_latents, generated_tokens (latents and new tokens, without
    markers and EOS), and with `two_choice` those of `score_options`. `quiet` shows and prints nothing.

    `gold` are the rows in their training form. A row whose training form does not begin with its prompt (another number of
    latents) gets its loss from a rollout of its own.

    An `edit` acts on each prompt once, for all questions, and on all that follows. Passes behind the prompt have no slots,
    and hold rows that began at different times: `pass_.row_ids` says which; such a pass's index and columns say nothing
    about a row. An edit that keeps count or draws noise therefore depends on `batch_size`, and meets another number of
    passes here than in `evaluate_loss`.
    """
    lengths, collate = prompts.lengths(), MyCollator(tokenizer, prompts.latent_id, left=True)
    batches = shard_batches(np.stack([lengths.total, lengths.latents]), batch_size, world)
    waiting = deque(i for batch in batches for i in batch)
    hide = None if world.is_main and not quiet else True
    bar = tqdm(total=len(waiting), desc="Test Accuracy", disable=hide, leave=False)
    records, losses, apart = [], [], []

    def begin(n_free: int) -> Decoding:
        """Prefill the next prompts. They have one number of latents, so that they end in one column."""
        numbers = [waiting.popleft()]
        while waiting and len(numbers) < n_free and lengths.latents[waiting[0]] == lengths.latents[numbers[0]]:
            numbers.append(waiting.popleft())
        batch = [prompts[i] for i in numbers]
        tails = [] if gold is None else [_tail(gold[row["idx"]], row) for row in batch]
        room = max(map(len, tails), default=0)
        batch = collate(batch)
        row_ids = batch.pop("idx").tolist()
        decoding, _ = Decoding.prefill(model, **batch, max_new_tokens=max_new_tokens, room=room, edit=edit, row_ids=row_ids)
        if room and decoding.movable:
            losses.append(_tail_losses(decoding, tails))
        apart.extend(i for i, tail in zip(numbers, tails) if not (len(tail) and decoding.movable))
        return decoding

    with precision or nullcontext():
        for decoding, done in decoded(waiting, begin, batch_size):
            own = [decoding.rows[b] for b in done]
            made = [_record(rows[row.row_id], row, int(lengths.latents[row.row_id]), tokenizer) for row in own]
            if two_choice:
                asked = [rows[row.row_id] for row in own]
                if decoding.movable:
                    scores = score_decoded(decoding.select(done), asked, tokenizer)
                else:
                    given = [prompts[row.row_id] for row in own], [row.new_ids for row in own]
                    scores = score_options(model, asked, *given, tokenizer, edit)
                made = [record | score for record, score in zip(made, scores)]
            records += made
            bar.update(len(made))
            bar.set_description(f"Test accuracy: {np.mean([r['correct'] for r in records]):.2f}")
        if apart:
            apart = [apart[i] for i in np.argsort(gold.lengths(apart).total, kind="stable")]
            collate = MyCollator(tokenizer, prompts.latent_id)
            losses += _rollout_losses(model, gold, collate, _cut(apart, batch_size), world, edit)
    bar.close()
    loss = None
    if gold is not None:
        loss = _mean(losses, world)
        world.print(f"eval loss {loss}")
    if not quiet:
        correct, matches = (sum(r[key] for r in records) for key in ("correct", "cot_match"))
        print(f"Device {world.rank}: Cor={correct}, CoT={matches}, Total={len(records)}", flush=True)
    records = sorted(world.gather(records), key=lambda record: record["idx"])
    assert [r["idx"] for r in records] == list(range(len(prompts))), "each row must be evaluated exactly once"
    return records, loss


def generate_records(*args, **options) -> list[dict]:
    """The records of `evaluate`, which takes the same arguments."""
    return evaluate(*args, **options)[0]


@torch.no_grad()
def evaluate_loss(
    model: Coconut,
    rows: StageDataset,
    collate: MyCollator,
    batch_size: int,
    world: World,
    precision: AbstractContextManager | None = None,
    edit=None,
) -> float:
    """Cross-entropy in nats per labelled token over all rows (in their training form) and ranks, by whole rollouts."""
    batches = shard_batches(rows.lengths().total, batch_size, world)
    with precision or nullcontext():
        return _mean(_rollout_losses(model, rows, collate, batches, world, edit), world)


# ---------------------------------------------------------------- loss


def _tail(gold: dict, prompt: dict) -> np.ndarray:
    """What a training row has behind its prompt: tokens and labels, [n, 2]; [0, 2] where it does not begin with it."""
    n = len(prompt["input_ids"])
    begins = np.array_equal(gold["input_ids"][:n], prompt["input_ids"]) and (gold["labels"][:n] == -100).all()
    return np.stack([gold["input_ids"], gold["labels"]], 1)[n if begins else len(gold["labels"]) :]


def _tail_losses(decoding: Decoding, tails: list[np.ndarray]) -> Tensor:
    """Cross-entropy [N] at the labels of these continuations, right behind a prefill."""
    hidden_BCD = decoding.states_behind([tail[:, 0].tolist() for tail in tails])
    hidden_BCD = torch.cat([decoding.state_BD[:, None], hidden_BCD], 1)  # the first one is predicted by the prompt
    labels_BC = torch.full(hidden_BCD.shape[:2], -100)
    for labels_C, tail in zip(labels_BC, tails):
        labels_C[1 : 1 + len(tail)] = torch.from_numpy(tail[:, 1])
    return decoding.model.label_losses(hidden_BCD, labels_BC.to(hidden_BCD.device))[0]


def _rollout_losses(
    model: Coconut, rows: StageDataset, collate: MyCollator, batches: list[list[int]], world: World, edit
) -> list[Tensor]:
    """Cross-entropy [N] at the labels of each batch of training rows, by rollouts."""
    losses = []
    for numbers in batches:
        batch = collate([rows[i] for i in numbers])
        row_ids, labels = batch.pop("idx").tolist(), batch.pop("labels").to(world.device)
        batch = {key: value.to(world.device) for key, value in batch.items()}
        hidden_BTD = model.rollout(**batch, edit=edit, row_ids=row_ids).hidden_BTD
        losses.append(model.label_losses(hidden_BTD, labels)[0])
    return losses


def _mean(losses: list[Tensor], world: World) -> float:
    """Their mean over all ranks, summed up in float64."""
    total, tokens = sum(loss_N.cpu().double().sum().item() for loss_N in losses), sum(map(len, losses))
    total, tokens = world.sum(total, tokens)
    return total / max(tokens, 1)


# ---------------------------------------------------------------- records


def _record(row: dict, own: Row, n_latents: int, tokenizer) -> dict:
    output = tokenizer.decode(own.new_ids, skip_special_tokens=True)
    gold, prediction = clean_answer(row["answer"]), extract_answer(output)
    return {
        "idx": own.row_id,
        "question_hash": question_hash(row),
        "n_steps": len(row["steps"]),
        "gold": gold,
        "prediction": prediction,
        "correct": prediction == gold,
        "numerically_equal": prediction is not None and _same_number(prediction, gold),
        "cot_match": extract_steps(output).split() == " ".join(row["steps"]).split(),
        "output": output,
        "n_latents": n_latents,
        "generated_tokens": n_latents + len(own.new_ids),
    }


def _same_number(a: str, b: str) -> bool:
    try:
        return float(a) == float(b)
    except ValueError:
        return a == b


# ---------------------------------------------------------------- summary


def summarize(records: list[dict]) -> dict:
    """Counts and means of records, under the keys of metrics.jsonl."""
    summary = {
        "correct": sum(r["correct"] for r in records),
        "total": len(records),
        "eval/acc": float(np.mean([r["correct"] for r in records])),
        "cot_matches": sum(r["cot_match"] for r in records),
        "eval/cot_em": float(np.mean([r["cot_match"] for r in records])),
        "eval/gen_tokens": float(np.mean([r["generated_tokens"] for r in records])),
        "eval/numeric_acc": float(np.mean([r["numerically_equal"] for r in records])),
    }
    scored = [r for r in records if r.get("margin") is not None]
    if scored:
        summary["two_choice_total"] = len(scored)
        summary["eval/two_choice_acc"] = float(np.mean([r["two_choice_correct"] for r in scored]))
        summary["eval/two_choice_ce"] = float(np.mean([r["two_choice_ce"] for r in scored]))
    return summary


# ---------------------------------------------------------------- a run's validation


def validate(run, epoch: int, records_name: str | None, with_loss: bool = False) -> dict:
    """Greedy accuracy (and with `with_loss` the loss) on a run's validation rows at the stage of `epoch`.

    `run` is a `run.Run`. Prints the stock lines on rank 0, writes the records to the run folder under `records_name`
    (None: nowhere), and returns their summary.
    """
    config, world, started = run.config, run.world, time.monotonic()
    stage = config.stage(epoch)
    was_training = run.model.training
    run.model.eval()
    prompts = run.rows(get_question_latent_dataset, stage, run.val)
    gold = run.rows(get_cot_latent_dataset, stage, run.val, epoch=epoch) if with_loss else None
    max_new_tokens = config.max_new_tokens or (64 if "gsm" in config.val_path else 128)
    two_choice = wants_two_choice(config, run.val_rows)
    sizes = config.eval_batch_size or config.batch_size_training, max_new_tokens
    records, loss = evaluate(
        run.model, prompts, run.val_rows, run.tokenizer, *sizes, world, run.precision(), gold=gold, two_choice=two_choice
    )
    run.model.train(was_training)
    summary = {"stage": stage, "n_latents": max(r["n_latents"] for r in records), **summarize(records)}
    if with_loss:
        summary |= {"eval/loss": loss, "eval/perplexity": float(np.exp(loss))}
    seconds = time.monotonic() - started
    summary |= {"seconds": seconds, "eval/samples_per_s": len(records) / seconds}
    if world.is_main:
        _print_stock_lines(run, prompts, records, summary)
        if records_name is not None:
            write_jsonl(config.run_dir / records_name, records)
    return summary


def _print_stock_lines(run, prompts: StageDataset, records: list[dict], summary: dict) -> None:
    """The stock lines of an evaluation (the first five questions, the counts), and ours after them."""
    for record in records[:5]:
        prompt = run.tokenizer.decode(prompts[record["idx"]]["input_ids"])
        steps = "\n".join(run.val_rows[record["idx"]]["steps"])
        print(f"Question {record['idx']}: Answer = '{record['gold']}' CoT = '{steps}'")
        print(f"Full output: '{prompt}{record['output']}'")
        print(f"Extracted Output: '{record['prediction'] or ''}'")
    total = summary["total"]
    print(f"Accuracy on validation set: {summary['correct']} / {total} = {summary['eval/acc']}")
    print(f"CoT match on validation set: {summary['cot_matches']} / {total} = {summary['eval/cot_em']}")
    print(f"Generated tokens per question: {summary['eval/gen_tokens']}")
    if "eval/two_choice_acc" in summary:
        print(f"Two-choice accuracy: {summary['eval/two_choice_acc']} (cross-entropy {summary['eval/two_choice_ce']:.4f})")
    sys.stdout.flush()
