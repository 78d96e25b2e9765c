"""What trained LAHR cells reach on the test rows, and what they cost: one JSON file a run.

    python -m analysis.factorial_scores --test results/x/data/s0/test.json --out results/x/scores results/x/runs/A-s0 ...

The checkpoint is chosen on the validation rows among those trained on the whole curriculum, by the run's `select_by`; the test
rows are scored once, at the last stage. Costs are counted, not assumed: which tokens each layer took, which slots of a
memory were read, how often the backbone was called.

Shape letters: B rows, T columns, R routed layers.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as `python analysis/factorial_scores.py`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np  # noqa: E402
import torch  # noqa: E402

from accounting import Shape, training_flops  # noqa: E402
from analysis.command import command, parser_of  # noqa: E402
from analysis.scoring import score, stage_rows, summary  # noqa: E402
from analysis.step_rates import step_flops  # noqa: E402
from analysis.subject import Problems, Subject  # noqa: E402
from backbones.memory_layers import counting_reads, utilisation  # noqa: E402
from checkpoint import numbered_checkpoints, versions  # noqa: E402
from coconut import decoder_blocks  # noqa: E402
from dataset import MyCollator  # noqa: E402
from files import read_json, read_jsonl, write_json  # noqa: E402

# ---------------------------------------------------------------- which checkpoint


def selected(folder: Path) -> dict:
    """The eval record of the checkpoint that the validation rows choose, by the run's own `select_by`, the earliest on ties.

    Only epochs of the last stage count: at earlier ones the text still holds steps. A model without stages chooses among all.
    ValueError where no validated checkpoint is kept.
    """
    config, kept = read_json(folder / "run.json", "config")["config"], numbered_checkpoints(folder)
    staged = not (config["cot"] or config["no_cot"])
    first = config["max_latent_stage"] * config["epochs_per_stage"] if staged else 0
    evals = {r["epoch"]: r for r in read_jsonl(folder / "metrics.jsonl", "event") if r["event"] == "eval"}
    late = [r for epoch, r in sorted(evals.items()) if epoch >= first and epoch + 1 in kept]
    if not late:
        raise ValueError(f"{folder} keeps no validated checkpoint of its last stage; train it to its end, with keep: all")
    return min(late, key=lambda r: r["eval/loss"] if config["select_by"] == "loss" else -r["eval/acc"])


# ---------------------------------------------------------------- what it costs


@dataclass(frozen=True)
class Costs:
    """Of one teacher-forced pass over the test rows. `passes`: calls of the backbone, the most of any batch; `tokens`: real
    columns; `routed_fraction`: of (token, routed layer) pairs, None without routing, and `routed` by kind of token;
    `memory_utilisation`: the share of value rows read at least once, None without memory; `flops`: forward and backward over
    the real tokens, of routed layers those that they took; `dense_flops`: the same if every layer took every token and a
    memory cost its size, as metrics.jsonl counts."""

    passes: int
    tokens: int
    flops: float
    dense_flops: float
    routed_fraction: float | None
    routed: dict[str, float] | None
    memory_utilisation: float | None


@torch.no_grad()
def costs(subject: Subject, problems: Problems, stage: int) -> Costs:
    """Count what the rows of a stage make a LAHR model do."""
    model, base = subject.model, subject.model.base_causallm
    shape = Shape.of(base, decoder_blocks(base))
    rows, collate = stage_rows(subject, problems, stage), MyCollator(subject.tokenizer, model.latent_token_id)
    passes, n_real, work = 0, 0, np.zeros(2)
    took: dict[str, list[np.ndarray]] = {"question": [], "thought": [], "text": []}
    with counting_reads(model) as reads:
        for start in range(0, len(rows), subject.batch_size):
            batch = collate(rows[start : start + subject.batch_size])
            batch.pop("idx")
            text_BT, real_BT = batch.pop("labels") != -100, batch["attention_mask"].bool()
            thought_BT = batch["input_ids"] == (-1 if model.latent_token_id is None else model.latent_token_id)
            plan = model.plan(**batch)
            batch = {key: value.to(subject.device) for key, value in batch.items()}
            columns = model.rollout(**batch, plan=plan).columns
            lengths, labelled, taken_BR = real_BT.sum(1).tolist(), int(text_BT.sum()), None
            if columns is not None:
                taken_BTR = columns["mod_selected"].cpu() & real_BT[..., None]
                taken_BR = taken_BTR.sum(1).numpy()
                kinds = {"question": real_BT & ~thought_BT & ~text_BT, "thought": thought_BT, "text": text_BT}
                for kind, where_BT in kinds.items():
                    took[kind].append(taken_BTR[where_BT].numpy().ravel())
            work += step_flops(base, lengths, taken_BR, labelled), training_flops(shape, lengths, labelled)
            passes, n_real = max(passes, len(plan.passes)), n_real + sum(lengths)
    routed = {kind: np.concatenate(parts) for kind, parts in took.items() if sum(map(len, parts))}
    return Costs(
        passes=passes,
        tokens=n_real,
        flops=float(work[0]),
        dense_flops=float(work[1]),
        routed_fraction=float(np.concatenate(list(routed.values())).mean()) if routed else None,
        routed={kind: float(flags.mean()) for kind, flags in routed.items()} or None,
        memory_utilisation=utilisation(_slots(base.config, reads)) if reads else None,
    )


def _slots(config, reads: dict[int, torch.Tensor]) -> torch.Tensor:
    """How often each value row was read: one table for all layers, or one of each."""
    counts = list(reads.values())
    return torch.stack(counts).sum(0) if config.shares_values else torch.cat(counts)


# ---------------------------------------------------------------- what training took


def training_facts(folder: Path) -> dict:
    """From metrics.jsonl: seconds, tokens, samples and (dense) FLOPs of training, its rates, and `wall_seconds`.

    Rates are over the time of updates; evaluations and saving count in `wall_seconds` only, the sum over all starts. What a
    killed run did twice counts twice.
    """
    records = read_jsonl(folder / "metrics.jsonl", "event", "time")
    speed = [r for r in records if r["event"] == "speed"]
    seconds = sum(r["seconds"] for r in speed)
    tokens, samples = (sum(r[f"{what}_per_s"] * r["seconds"] for r in speed) for what in ("tokens", "samples"))
    wall, began = 0.0, None
    for record, following in zip(records, [*records[1:], {"event": "start"}]):
        began = record["time"] if record["event"] == "start" else began
        if following["event"] == "start" and began is not None:
            wall += record["time"] - began
    return {
        "train_seconds": seconds,
        "train_tokens": round(tokens),
        "train_samples": round(samples),
        "train_dense_flops": sum(r["flops"] for r in speed),
        "samples_per_s": samples / seconds if seconds else None,
        "tokens_per_s": tokens / seconds if seconds else None,
        "wall_seconds": wall,
    }


def scores_of(folder: Path, test: Path) -> dict:
    """Everything that a run contributes to the tables."""
    chosen, about = selected(folder), read_json(folder / "run.json", "config", "data")
    subject = Subject.load(folder, str(chosen["epoch"] + 1), device="cpu")
    stage = subject.config.max_latent_stage
    problems = Problems.read(test, subject.tokenizer)
    scores = score(subject, problems, stage)
    counted, training = costs(subject, problems, stage), training_facts(folder)
    found = summary(scores)
    train_flops = training["train_dense_flops"] * counted.flops / counted.dense_flops
    weights = list(subject.model.base_causallm.parameters())
    pause = subject.model.pause_embedding
    return {
        "schema_version": 1,
        "run": str(folder),
        "seed": subject.config.seed,
        "feedback_mode": subject.model.feedback_mode,
        "model_config": subject.config.model_options,
        "checkpoint": {"file": str(subject.path), "sha256": subject.sha256, "epoch": chosen["epoch"] + 1},
        "validation": {key: chosen[key] for key in ("eval/loss", "eval/acc", "total")},
        "data": {key: facts["sha256"] for key, facts in about["data"].items()} | {"test": problems.sha256},
        "stage": stage,
        "answer_sha256": scores.answer_sha256,
        "versions": versions(),
        **found,
        **asdict(counted),
        **training,
        "train_flops": train_flops,
        "perplexity_per_tflop": found["perplexity"] / (train_flops / 1e12),
        "parameters": sum(p.numel() for p in weights) + (0 if pause is None else pause.numel()),
    }


@command
def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__, "python -m analysis.factorial_scores")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--test", type=Path, required=True, help="test rows (JSON)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results, RUN.json each")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for folder in args.runs:
        found = scores_of(folder, args.test)
        write_json(args.out / f"{folder.name}.json", found)
        reached = f"answer loss {found['answer_loss']:.4f}, exact match {100 * found['exact_match']:.1f} %"
        print(f"{folder.name}: checkpoint {found['checkpoint']['epoch']}, {reached}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
