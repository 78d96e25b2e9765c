"""Loss and accuracy as per-example records, batched, and sharded exactly over ranks: every row once, whatever the world.

Three questions are asked of a model on a set of rows:
- `evaluate_loss`: mean cross-entropy over all labelled tokens of the stage's training form;
- `generate_records`: greedy continuation, answer after the last `#`, exact match (Coconut arXiv 2412.06769, section 4.1);
- `score_options`: for rows that name two options, which has the larger probability after the model's own steps.
"""

import json
import sys
import time
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
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
    question_hash,
)
from utils import World, whole_file


def shard_batches(sizes: np.ndarray, batch_size: int, world: World) -> list[list[int]]:
    """This rank's batches of row numbers: rows sorted by size, cut into batches, dealt out in turn."""
    order = np.lexsort(np.atleast_2d(sizes)).tolist()
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return batches[world.rank :: world.size]


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
    """Cross-entropy in nats per labelled token over all rows and ranks."""
    total, tokens = 0.0, 0
    for batch_rows in shard_batches(rows.lengths().total, batch_size, world):
        batch = collate([rows[i] for i in batch_rows])
        row_ids, labels = batch.pop("idx").tolist(), batch.pop("labels").to(world.device)
        batch = {key: value.to(world.device) for key, value in batch.items()}
        with precision or nullcontext():
            hidden_BTD = model.rollout(**batch, edit=edit, row_ids=row_ids).hidden_BTD
            loss_N, _ = model.label_losses(hidden_BTD, labels)
        total, tokens = total + loss_N.cpu().double().sum().item(), tokens + len(loss_N)
    total, tokens = world.sum(total, tokens)
    return total / max(tokens, 1)


def generate_records(
    model: Coconut,
    prompts: StageDataset,
    rows: list[dict],
    tokenizer,
    batch_size: int,
    max_new_tokens: int,
    world: World,
    precision: AbstractContextManager | None = None,
    two_choice: bool = False,
    edit=None,
) -> list[dict]:
    """One record a row, on every rank, in the order of the rows.

    Fields: idx, question_hash, n_steps (of the gold), gold, prediction (None without `#`), correct, numerically_equal,
    cot_match, output (the continuation), n_latents, generated_tokens (latents and new tokens, without markers and EOS),
    and with `two_choice` those of `score_options`.
    """
    lengths = prompts.lengths()
    collate = MyCollator(tokenizer, prompts.latent_id, left=True)
    records = []
    batches = shard_batches(np.stack([lengths.total, lengths.latents]), batch_size, world)
    bar = tqdm(batches, desc="Test Accuracy", disable=None if world.is_main else True, leave=False)
    for batch_rows in bar:
        prompt_rows = [prompts[i] for i in batch_rows]
        batch = {key: value.to(world.device) for key, value in collate(prompt_rows).items() if key != "idx"}
        with precision or nullcontext():
            ids_BT = model.generate(**batch, max_new_tokens=max_new_tokens, edit=edit, row_ids=batch_rows)
        new_ids = [_before(row, model.eos_token_id) for row in ids_BT[:, batch["input_ids"].shape[1] :].tolist()]
        made = [_record(rows[i], i, new, int(lengths.latents[i]), tokenizer) for i, new in zip(batch_rows, new_ids)]
        if two_choice:
            with precision or nullcontext():
                scores = score_options(model, [rows[i] for i in batch_rows], prompt_rows, new_ids, tokenizer, world, edit)
            made = [record | score for record, score in zip(made, scores)]
        records += made
        bar.set_description(f"Test accuracy: {np.mean([r['correct'] for r in records]):.2f}")
    correct, matches = (sum(r[key] for r in records) for key in ("correct", "cot_match"))
    print(f"Device {world.rank}: Cor={correct}, CoT={matches}, Total={len(records)}", flush=True)
    records = sorted(world.gather(records), key=lambda record: record["idx"])
    assert [r["idx"] for r in records] == list(range(len(prompts))), "each row must be evaluated exactly once"
    return records


def _before(ids: list[int], stop: int) -> list[int]:
    return ids[: ids.index(stop)] if stop in ids else ids


def _record(row: dict, idx: int, new_ids: list[int], n_latents: int, tokenizer) -> dict:
    output = tokenizer.decode(new_ids, skip_special_tokens=True)
    gold, prediction = clean_answer(row["answer"]), extract_answer(output)
    return {
        "idx": idx,
        "question_hash": question_hash(row),
        "n_steps": len(row["steps"]),
        "gold": gold,
        "prediction": prediction,
        "correct": prediction == gold,
        "numerically_equal": prediction is not None and _same_number(prediction, gold),
        "cot_match": extract_steps(output) == "\n".join(row["steps"]).strip(),
        "output": output,
        "n_latents": n_latents,
        "generated_tokens": n_latents + len(new_ids),
    }


def _same_number(a: str, b: str) -> bool:
    try:
        return float(a) == float(b)
    except ValueError:
        return a == b


# ---------------------------------------------------------------- two choices


def has_options(row: dict) -> bool:
    """Whether a row names a right and a wrong option by node (ProsQA)."""
    return all(key in row for key in ("idx_to_symbol", "root", "target", "neg_target"))


def wants_two_choice(config, rows: list[dict]) -> bool:
    """Whether options are to be scored: as the config says, by default where every row has them."""
    possible = all(map(has_options, rows))
    if config.two_choice is True and not possible:
        raise ValueError(f"two_choice: rows of {config.val_path} name no two options (root, target, neg_target); set auto")
    return possible and config.two_choice is not False


@torch.no_grad()
def score_options(
    model: Coconut, rows: list[dict], prompts: list[dict], new_ids: list[list[int]], tokenizer, world: World, edit=None
) -> list[dict]:
    """Two-choice scores after each row's own generated steps, `### Name is a`.

    An option's score is the summed log-probability of its pieces; pieces that both options begin with cancel. Returns
    margin (log P(target) - log P(wrong), nats), two_choice_correct, two_choice_ce (nats; log 2 is a coin) for each row;
    all None where prompt and answer exceed the model's positions. Own steps are cut to what fits.
    """
    max_positions = getattr(model.base_causallm.config, "max_position_embeddings", None) or sys.maxsize
    sequences, scored = [], []
    for row, prompt, new in zip(rows, prompts, new_ids):
        symbols = row["idx_to_symbol"]
        answers = [
            tokenizer.encode(f"### {symbols[row['root']]} is a {symbols[row[option]]}.", add_special_tokens=False)
            for option in ("target", "neg_target")
        ]
        shared = next(i for i, (a, b) in enumerate(zip(*answers)) if a != b)
        room = max_positions - len(prompt["input_ids"]) - max(map(len, answers))
        if room < 0:
            continue
        scored.append(prompt["idx"])
        own_steps = _own_steps(new, tokenizer)[:room]
        for answer in answers:
            ids = np.concatenate([prompt["input_ids"], np.array([*own_steps, *answer], dtype=np.int64)])
            labels = np.full(len(ids), -100)
            labels[len(ids) - len(answer) + shared :] = answer[shared:]
            sequences.append({"input_ids": ids, "labels": labels})
    margins = {}
    if sequences:
        batch = MyCollator(tokenizer, model.latent_token_id)(sequences)
        batch = {key: value.to(world.device) for key, value in batch.items()}
        labels = batch.pop("labels")
        hidden_BTD = model.rollout(**batch, edit=edit, row_ids=np.repeat(scored, 2).tolist()).hidden_BTD
        loss_N, row_N = model.label_losses(hidden_BTD, labels)
        logp_B = torch.zeros(len(sequences), dtype=torch.float64).index_add_(0, row_N.cpu(), -loss_N.cpu().double())
        margins = dict(zip(scored, (logp_B[0::2] - logp_B[1::2]).tolist()))
    return [_scores(margins.get(prompt["idx"])) for prompt in prompts]


def _scores(margin: float | None) -> dict:
    known = margin is not None
    return {
        "margin": margin,
        "two_choice_correct": margin > 0 if known else None,
        "two_choice_ce": float(np.logaddexp(0, -margin)) if known else None,
    }


def _own_steps(new_ids: list[int], tokenizer) -> list[int]:
    """The generated tokens before the first that holds a `#`; all of them and a newline where none does."""
    for i, token in enumerate(new_ids):
        if "#" in tokenizer.decode([token]):
            return new_ids[:i]
    return [*new_ids, *tokenizer.encode("\n", add_special_tokens=False)] if new_ids else []


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
    config, world, started = run.config, run.world, time.time()
    stage = config.stage(epoch)
    batch_size = config.eval_batch_size or config.batch_size_training
    was_training = run.model.training
    run.model.eval()
    summary = {"stage": stage}
    if with_loss:
        rows = run.rows(get_cot_latent_dataset, stage, run.val, epoch=epoch)
        collate = MyCollator(run.tokenizer, run.ids.latent)
        summary["eval/loss"] = evaluate_loss(run.model, rows, collate, batch_size, world, run.precision())
        world.print(f"eval loss {summary['eval/loss']}")
    prompts = run.rows(get_question_latent_dataset, stage, run.val)
    max_new_tokens = config.max_new_tokens or (64 if "gsm" in config.val_path else 128)
    two_choice = wants_two_choice(config, run.val_rows)
    records = generate_records(
        run.model, prompts, run.val_rows, run.tokenizer, batch_size, max_new_tokens, world, run.precision(), two_choice
    )
    run.model.train(was_training)
    summary |= {
        "n_latents": max(r["n_latents"] for r in records),
        **summarize(records),
        "seconds": time.time() - started,
    }
    if world.is_main:
        _print_stock_lines(run, prompts, records, summary)
        if records_name is not None:
            with whole_file(config.run_dir / records_name) as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
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
