"""Train or evaluate one model from one YAML file.

    python run.py args/prosqa_coconut_1gpu.yaml                          one process on CUDA, MPS or CPU
    torchrun --nproc_per_node=4 run.py args/prosqa_coconut.yaml          several GPUs (nccl), or CPU processes (gloo)
    python run.py args/prosqa_m5_pause.yaml lr=3e-4 name=m5-lr3e-4       any key may follow as key=value

The same command after an interruption goes on where the run stopped. Outputs go to <save_path>/<name>/: checkpoint_N after
every epoch, metrics.jsonl, eval_N.jsonl with one record a question; the log lines go to stdout, progress to stderr.
"""

import argparse
import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
import yaml
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import backbones
import dataset
import evaluate
from checkpoint import Position, RunFolder, build_model, find_checkpoint, read_last_state, read_weights
from optimizers import build_optimizer, learning_rate
from utils import Config, World, load_config, micro_seed, process_group, set_seed, write_json, whole_file


@dataclass
class Run:
    """Everything that training and evaluation share."""

    config: Config
    world: World
    folder: RunFolder
    model: torch.nn.Module
    tokenizer: object
    ids: backbones.ThoughtIds
    val_rows: list[dict]
    val: dataset.TokenTable
    train: dataset.TokenTable | None
    wandb: object = None
    tokens: float = 0.0
    samples: float = 0.0
    train_seconds: float = 0.0
    evaluated: dict[int, float] = field(default_factory=dict)

    @property
    def collate(self) -> dataset.MyCollator:
        return dataset.MyCollator(self.tokenizer, self.ids.latent)

    @property
    def eval_batch_size(self) -> int:
        return self.config.eval_batch_size or self.config.batch_size_training

    def precision(self):
        if self.config.bf16 is True:
            return torch.autocast(self.world.device.type, torch.bfloat16)
        return nullcontext()

    def rows(self, get, stage: int, table, **kwargs) -> dataset.StageDataset:
        ids = self.ids
        return get(stage, table, self.config, ids.start, ids.latent, ids.end, not self.config.markers, **kwargs)

    def log(self, **record) -> None:
        """One record to metrics.jsonl and, under its stock keys, to wandb."""
        if not self.world.is_main or self.config.debug:
            return
        self.folder.log(**record, time=round(time.time(), 3))
        if self.wandb is not None:
            self.wandb.log({key: value for key, value in record.items() if "/" in key})


# ---------------------------------------------------------------- start


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="run.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="keys and defaults:\n"
        + "\n".join(f"  {name:28}{'required' if f.is_required() else f.default}" for name, f in Config.model_fields.items()),
    )
    parser.add_argument("config", help="YAML file, one complete experiment (see args/)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the file")
    args = parser.parse_args(argv)
    try:
        config = load_config(args.config, args.overrides)
        with process_group(config.device) as world:
            world.print(f"Config: {yaml.safe_load(Path(args.config).read_text())}")
            execute(config, world)
        return 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def execute(config: Config, world: World) -> None:
    """Prepare, then train or evaluate."""
    started = time.time()
    set_seed(config.seed)
    if config.tf32:
        torch.set_float32_matmul_precision("high")
    folder = RunFolder(config)
    folder.path.mkdir(parents=True, exist_ok=True)
    if world.is_main and not config.only_eval and not config.debug:
        folder.open()

    resumed, position, weights, optimizer_state = load_start(config, world, folder)
    if not config.only_eval and not resumed and config.resume >= config.num_epochs:
        raise ValueError(f"resume: {config.resume} must be below num_epochs ({config.num_epochs}); nothing would be trained")
    model, tokenizer, ids, report = build_model(config, *weights)
    if report is not None:
        print(report, flush=True)
    print(f"Running FSDP on rank = {world.rank}, world size = {world.size}", flush=True)
    world.print(model)
    run = load_data(config, world, folder, model.to(world.device), tokenizer, ids)
    if config.bf16 == "pure":
        model.to(torch.bfloat16)

    if config.only_eval:
        validate(run, config.resume, f"eval_{config.val_path and Path(config.val_path).stem}.jsonl")
        return
    if world.is_main and not config.debug:
        folder.begin(model)
        run.wandb = open_wandb(config, folder)
    run.evaluated = world.from_main(folder.evaluations(position.epoch))
    run.log(event="start", epoch=position.epoch, step_in_epoch=position.step, world_size=world.size)
    world.print(f"Time to the first step: {time.time() - started:.1f} s after imports")
    train(run, position, optimizer_state, resumed)
    summarize(run, started)


def load_start(config: Config, world: World, folder: RunFolder):
    """Where this process starts from: (resumed, position, (path, weights) for build_model, optimizer state)."""
    found = None
    if config.auto_resume and not config.only_eval and not config.debug:
        found = world.from_main(folder.find_resume() if world.is_main else None)
    if found is not None:
        path, position = found
        world.print("Warning: found previous run and gonna resume from that. the inputted `resume` argument is ignored!")
        print(f"Loading from previous run epoch_{position.epoch}!", flush=True)
        if path.name == "last_state":
            weights, optimizer_state = read_last_state(path)
            return True, position, (path, weights), optimizer_state
        if config.reset_optimizer is not True:
            world.print(f"Warning: no optimizer state beside {path.name}; the optimizer starts fresh")
        return True, position, (path, None), None
    path = None
    if config.load_model_path is not None:
        path = Path(world.from_main(str(find_checkpoint(config.load_model_path)) if world.is_main else None))
    if config.resume:
        if path is None:
            print(f"Warning: you want to skip the first {config.resume} but you are not loading any existing checkpoint!")
        print(f"Loading from {path} and skip the first {config.resume} epochs", flush=True)
    return False, Position(epoch=config.resume), (path, None), None


def load_data(config: Config, world: World, folder: RunFolder, model, tokenizer, ids) -> Run:
    """Tokenised data (rank 0 first, the others from its cache) and the checks that only lengths can answer."""
    limits = {"val_path": config.max_val_samples, "train_path": config.max_train_samples}
    if config.debug:
        limits = {"val_path": 32, "train_path": 5000}
    keys = ["val_path"] if config.only_eval else ["val_path", "train_path"]
    tables = {}
    for turn in (True, False):
        if world.is_main == turn:
            for key in keys:
                tables[key] = dataset.TokenTable(dataset.get_dataset(getattr(config, key), tokenizer, limits[key]))
        world.barrier()
    for key, table in tables.items():
        if table.merges:
            world.print(f"Note: in {table.merges} of {len(table)} rows of {key} tokens would merge across pieces; pieces are used")
    val_rows = dataset.load_rows(config.val_path, limits["val_path"])
    run = Run(config, world, folder, model, tokenizer, ids, val_rows, tables["val_path"], tables.get("train_path"))
    check_lengths(run)
    return run


def check_lengths(run: Run) -> None:
    """Refuse, before any compute, a row that would not fit the model's positions at some stage."""
    limit = backbones.max_positions(run.model.base_causallm)
    config = run.config
    last = config.stage(config.num_epochs - 1)
    thoughts = 0 if config.no_cot or config.cot else config.max_latent_stage * config.c_thought
    forms = [("val_path", run.rows(dataset.get_question_latent_dataset, last, run.val))]
    for key, table in {"val_path": run.val, "train_path": run.train}.items():
        forms += [(key, run.rows(dataset.get_cot_latent_dataset, s, table)) for s in {0, last} if table is not None]
    for key, rows in forms if limit else ():
        lengths = rows.lengths()[1]
        worst = int(lengths.argmax())
        if lengths[worst] > limit:
            raise ValueError(
                f"{key}: {getattr(config, key)}, row {worst} has {lengths[worst]} tokens (up to {thoughts} of them latents); "
                f"{config.model_id} has {limit} positions: leave the row out or use a longer model"
            )


def open_wandb(config: Config, folder: RunFolder):
    """A wandb run where asked for or configured; training never depends on it."""
    netrc = Path.home() / ".netrc"
    configured = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("online", "offline")
    configured = configured or config.wandb_mode or (netrc.is_file() and "wandb" in netrc.read_text())
    mode = config.wandb_mode or os.environ.get("WANDB_MODE") or "online"
    if config.wandb is False or mode == "disabled" or (config.wandb == "auto" and not configured):
        return None
    id_file = folder.path / "wandb_id"
    try:
        import wandb

        run_id = id_file.read_text() if id_file.is_file() else wandb.util.generate_id()
        run = wandb.init(
            project=config.project, name=config.name, config=config.model_dump(), id=run_id, resume="allow",
            mode=mode, dir=folder.path, settings=wandb.Settings(init_timeout=60),
        )  # fmt: skip
        id_file.write_text(run_id)
        return run
    except Exception as error:  # a logging service must never stop training
        print(f"Warning: wandb is off ({' '.join(str(error).split())[:150]})")
        return None


# ---------------------------------------------------------------- training


def train(run: Run, position: Position, optimizer_state: dict | None, resumed: bool) -> None:
    """All epochs from `position` on: train, save, validate."""
    config, world, folder = run.config, run.world, run.folder
    accumulation = config.gradient_accumulation_steps
    if config.effective_batch_size:
        accumulation, rest = divmod(config.effective_batch_size, config.batch_size_training * world.size)
        if rest or not accumulation:
            raise ValueError(
                f"effective_batch_size: {config.effective_batch_size} is no multiple of batch_size_training x processes "
                f"({config.batch_size_training} x {world.size})"
            )
    effective = config.batch_size_training * accumulation * world.size
    world.print(f"Effective batch size: {effective} = {config.batch_size_training} x {accumulation} x {world.size}")
    if effective != 128 and not config.from_scratch:
        world.print("Warning: the published recipes use an effective batch size of 128 (set effective_batch_size: 128)")

    if resumed and position.step == 0 and 0 < position.epoch and position.epoch - 1 not in run.evaluated:
        finish_epoch(run, position, validate_only=True)
    if position.epoch >= config.num_epochs:
        world.print(f"Nothing left to train: {position.epoch} of {config.num_epochs} epochs are done in {folder.path}")
        return

    trained = DistributedDataParallel(run.model, [world.device] if world.device.type == "cuda" else None) if world.size > 1 else run.model
    optimizer = None
    while position.epoch < config.num_epochs and not stopped_early(run, position.epoch):
        epoch = position.epoch
        new_stage = config.reset_optimizer == "stage" and epoch > 0 and config.stage(epoch) != config.stage(epoch - 1)
        if optimizer is None or (position.step == 0 and (config.reset_optimizer is True or new_stage)):
            optimizer = build_optimizer(run.model, config)
            if optimizer_state is not None and (position.step or not (config.reset_optimizer is True or new_stage)):
                optimizer.load_state_dict(optimizer_state)
            optimizer_state = None
        train_epoch(run, trained, optimizer, position, accumulation)
        position.epoch, position.step, position.loss_sum, position.loss_tokens = epoch + 1, 0, 0.0, 0.0
        if world.is_main and not config.debug and config.save_training_state:
            if config.reset_optimizer is not True or config.save_only_improve:
                folder.save_last_state(run.model, optimizer, position)
        if world.is_main and not config.debug and not config.save_only_improve:
            print("saving model.", flush=True)
            folder.save_checkpoint(run.model, position)
            if config.reset_optimizer is True:
                folder.drop_last_state()
        world.barrier()
        finish_epoch(run, position)


def train_epoch(run: Run, trained, optimizer, position: Position, accumulation: int) -> None:
    """One epoch from `position.step` on. Which rows meet in which update depends on (seed, epoch) alone."""
    config, world, epoch = run.config, run.world, position.epoch
    stage = config.stage(epoch)
    rows = run.rows(dataset.get_cot_latent_dataset, stage, run.train, epoch=epoch)
    prefix, lengths, labelled = rows.lengths()
    batches = dataset.epoch_batches(
        len(rows), config.batch_size_training, config.seed, epoch, prefix if config.group_by_length else None
    )
    per_update = accumulation * world.size
    n_updates = math.ceil(len(batches) / per_update)
    warmup = round(config.warmup_epochs * n_updates)
    if world.is_main and run.wandb is not None:
        log_data_table(run, rows, batches[0])
    if world.is_main and position.step == 0:
        print(f"Epoch {epoch + 1}/{config.num_epochs}: stage {stage}, {rows.plan(0)[1]} latents, {n_updates} updates", flush=True)
    bar = Progress(n_updates, position.step, epoch, config.num_epochs, len(batches), enabled=world.is_main)
    started, tokens, samples = time.time(), 0, 0
    run.model.train()

    for step in range(position.step, n_updates):
        group = batches[step * per_update : (step + 1) * per_update]
        group_tokens = sum(int(labelled[batch].sum()) for batch in group)
        mine = group[world.rank :: world.size]
        n_micro = math.ceil(len(group) / world.size)
        loss_sum = torch.zeros((), dtype=torch.float64)
        # ------------------------------------------------------------------ one update
        for micro in range(n_micro):
            filler = micro >= len(mine)  # a rank without a micro-batch in the leftover group joins with weight 0
            row_numbers = group[0] if filler else mine[micro]
            batch, n_tokens = device_batch(run, rows, row_numbers), int(labelled[row_numbers].sum())
            torch.manual_seed(micro_seed(config.seed, epoch, step * per_update + micro * world.size + world.rank))
            last = micro == n_micro - 1
            with nullcontext() if last or world.size == 1 else trained.no_sync():
                with run.precision():
                    loss = trained(**batch).loss
                tokens_share = n_tokens * world.size / group_tokens
                weight = 0.0 if filler else tokens_share if config.accumulation_norm == "tokens" else 1 / accumulation
                (loss * weight).backward()
            loss_sum += 0.0 if filler else loss.detach().double().cpu() * n_tokens
        (total,) = world.sum(loss_sum.item())
        grad_norm = clip_gradients(run.model, config.gradient_clip)
        if not (math.isfinite(total) and math.isfinite(grad_norm)):
            stop_on_nonfinite(run, rows, mine, epoch, step, total / group_tokens, grad_norm)
        rate = learning_rate(epoch * n_updates + step, config.num_epochs * n_updates, warmup, config)
        for parameters in optimizer.param_groups:
            parameters["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # ------------------------------------------------------------------
        position.step, position.global_step = step + 1, position.global_step + 1
        position.loss_sum, position.loss_tokens = position.loss_sum + total, position.loss_tokens + group_tokens
        tokens, samples = tokens + sum(int(lengths[b].sum()) for b in group), samples + sum(map(len, group))
        bar.update(step, min((step + 1) * per_update, len(batches)) - 1, total / group_tokens)
        run.log(
            event="step",
            epoch=epoch,
            stage=stage,
            lr=rate,
            **{"train/epoch": epoch + 1, "train/step": epoch * n_updates + step},
            **{"train/loss": total / group_tokens, "train/grad_norm": grad_norm},
        )
        every = config.save_every_steps
        if every and position.global_step % every == 0 and position.step < n_updates and config.save_training_state:
            if world.is_main and not config.debug:
                run.folder.save_last_state(run.model, optimizer, position)

    bar.close()
    seconds = time.time() - started
    run.tokens, run.samples, run.train_seconds = run.tokens + tokens, run.samples + samples, run.train_seconds + seconds
    run.log(
        event="train_epoch",
        epoch=epoch,
        stage=stage,
        n_latents=int(max(rows.plan(i)[1] for i in range(len(rows)))),
        updates=n_updates,
        tokens_per_s=tokens / max(seconds, 1e-9),
        samples_per_s=samples / max(seconds, 1e-9),
        seconds=seconds,
        **{"train/loss_mean": position.loss_sum / max(position.loss_tokens, 1)},
        **pause_distance(run),
    )


def device_batch(run: Run, rows: dataset.StageDataset, row_numbers) -> dict[str, torch.Tensor]:
    batch = run.collate([rows[i] for i in row_numbers])
    batch.pop("idx")
    pin = run.world.device.type == "cuda"
    return {k: (v.pin_memory() if pin else v).to(run.world.device, non_blocking=True) for k, v in batch.items()}


def clip_gradients(model, limit: float | None) -> float:
    """The norm of all gradients; clipped to `limit` where one is set."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return norm.item()


def stop_on_nonfinite(run: Run, rows, mine, epoch: int, step: int, loss: float, grad_norm: float) -> None:
    """Save this rank's micro-batches and raise FloatingPointError before the step spoils the weights."""
    path = run.folder.path / f"nonfinite_batch_rank{run.world.rank}"
    batches = [{k: torch.as_tensor(v) for k, v in run.collate([rows[i] for i in numbers]).items()} for numbers in mine]
    with whole_file(path, "wb") as file:
        torch.save({"epoch": epoch, "step": step, "batches": batches}, file)
    raise FloatingPointError(
        f"loss {loss} or gradient norm {grad_norm} is not finite at epoch {epoch}, update {step}; no step was taken, "
        f"the batch is in {path}: lower lr, set gradient_clip, or look at its rows (key idx)"
    )


def pause_distance(run: Run) -> dict:
    """How far the pause vector is from where it started (L2), for the pause modes."""
    init = run.folder.path / "pause_init"
    if run.model.pause_embedding is None or not run.world.is_main or not init.is_file():
        return {}
    start = torch.load(init, weights_only=True)
    return {"pause_l2": float((run.model.pause_embedding.detach().cpu() - start).norm())}


def log_data_table(run: Run, rows, row_numbers) -> None:
    """The epoch's first batch as a small wandb table: id, label and token of every position (bounded to 4 rows)."""
    import wandb

    run.world.print("logging training data")
    texts = []
    for i in islice(row_numbers, 4):
        row = rows[i]
        pairs = zip(row["input_ids"].tolist(), row["labels"].tolist())
        texts.append([i, "\n".join(f"{token} {label} {run.tokenizer.decode([token])!r}" for token, label in pairs)])
    run.wandb.log({"data_table": wandb.Table(columns=["step", "text"], data=texts)})


class Progress:
    """One tqdm bar on a terminal; where there is none, a plain line about every tenth of the epoch."""

    def __init__(self, n_updates: int, start: int, epoch: int, epochs: int, n_batches: int, enabled: bool):
        self.head, self.n_batches, self.n_updates = f"Training Epoch: {epoch + 1}", n_batches, n_updates
        self.epochs, self.lines = epochs, enabled and not sys.stderr.isatty()
        self.bar = tqdm(
            desc=self.head, total=n_updates, initial=start, dynamic_ncols=True, disable=not enabled or self.lines
        )

    def update(self, step: int, batch: int, loss: float) -> None:
        text = f"{self.head}/{self.epochs}, batch {batch}/{self.n_batches} completed (loss: {loss:.4f}"
        self.bar.set_description(text, refresh=False)
        self.bar.update()
        if self.lines and ((step + 1) % max(self.n_updates // 10, 1) == 0 or step == self.n_updates - 1):
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        self.bar.close()


# ---------------------------------------------------------------- evaluation


def finish_epoch(run: Run, position: Position, validate_only: bool = False) -> None:
    """Validate what the last trained epoch left, note the best, and save it where only improvements are kept."""
    config, epoch = run.config, position.epoch - 1
    if (epoch + 1) % config.eval_every and position.epoch < config.num_epochs:
        return
    best = max(run.evaluated.values(), default=0.0)
    summary = validate(run, epoch, f"eval_{epoch + 1}.jsonl", with_loss=True)
    improved = summary["eval/acc"] > best
    if run.world.is_main and improved and config.save_only_improve and not config.debug and not validate_only:
        print("saving model.", flush=True)
        run.folder.save_checkpoint(run.model, position, accuracy=summary["eval/acc"])
    if run.world.is_main and not config.debug and (run.folder.path / f"checkpoint_{epoch + 1}").is_file() and improved:
        write_json(
            run.folder.path / "best.json",
            {"file": f"checkpoint_{epoch + 1}", "epoch": epoch, "accuracy": summary["eval/acc"]},
        )
    run.log(event="eval", epoch=epoch, **summary)
    run.evaluated[epoch] = summary["eval/acc"]
    run.world.barrier()


def validate(run: Run, epoch: int, records_name: str, with_loss: bool = False) -> dict:
    """Greedy accuracy (and with `with_loss` the loss) on the validation rows at the stage of `epoch`; prints the stock lines."""
    config, world, started = run.config, run.world, time.time()
    stage = config.stage(epoch)
    run.model.eval()
    summary = {"stage": stage}
    if with_loss:
        rows = run.rows(dataset.get_cot_latent_dataset, stage, run.val, epoch=epoch)
        summary["eval/loss"] = evaluate.evaluate_loss(
            run.model, rows, run.collate, run.eval_batch_size, world, run.precision()
        )
        world.print(f"eval loss {summary['eval/loss']}")
    prompts = run.rows(dataset.get_question_latent_dataset, stage, run.val)
    max_new_tokens = config.max_new_tokens or (64 if "gsm" in config.val_path else 128)
    two_choice = evaluate.has_options(run.val_rows[0]) if config.two_choice == "auto" else config.two_choice
    records = evaluate.generate_records(
        run.model, prompts, run.val_rows, run.tokenizer, run.eval_batch_size, max_new_tokens, world, run.precision(), two_choice
    )
    summary |= {"n_latents": max(r["n_latents"] for r in records), **evaluate.summarize(records)}
    summary["seconds"] = time.time() - started
    if world.is_main:
        print_records(run, prompts, records, summary)
        if not config.debug:
            with whole_file(run.folder.path / records_name) as file:
                file.writelines(f"{evaluate.json_line(record)}\n" for record in records)
    return summary


def print_records(run: Run, prompts, records: list[dict], summary: dict) -> None:
    """The stock lines of an evaluation: the first five questions, the counts, and ours after them."""
    for record in records[:5]:
        row = run.val_rows[record["idx"]]
        prompt = run.tokenizer.decode(prompts[record["idx"]]["input_ids"])
        print(f"Question {record['idx']}: Answer = '{record['gold']}' CoT = '{chr(10).join(row['steps'])}'")
        print(f"Full output: '{prompt}{record['output']}'")
        print(f"Extracted Output: '{record['prediction'] or ''}'")
    total = summary["total"]
    print(f"Accuracy on validation set: {summary['correct']} / {total} = {summary['eval/acc']}")
    print(f"CoT match on validation set: {summary['cot_matches']} / {total} = {summary['eval/cot_em']}")
    print(f"Generated tokens per question: {summary['eval/gen_tokens']}")
    if "eval/two_choice_acc" in summary:
        print(f"Two-choice accuracy: {summary['eval/two_choice_acc']} (cross-entropy {summary['eval/two_choice_ce']:.4f})")
    sys.stdout.flush()


def stopped_early(run: Run, epoch: int) -> bool:
    """Whether the last `early_stop_patience` evaluations all failed to beat the best before them by `min_delta`."""
    patience, accuracies = run.config.early_stop_patience, [acc for _, acc in sorted(run.evaluated.items())]
    if patience is None or len(accuracies) <= patience:
        return False
    stop = max(accuracies[-patience:]) < max(accuracies[:-patience]) + run.config.min_delta
    if stop:
        run.world.print(f"Early stop after epoch {epoch}: no gain of {run.config.min_delta} in {patience} evaluations")
    return stop


def summarize(run: Run, started: float) -> None:
    """The last lines of a training run: accuracy, time, rates, memory."""
    if not run.world.is_main:
        return
    if run.evaluated:
        last, best = max(run.evaluated), max(run.evaluated, key=lambda epoch: (run.evaluated[epoch], -epoch))
        print(f"Final accuracy {run.evaluated[last]:.4f} (epoch {last + 1}), best {run.evaluated[best]:.4f} (epoch {best + 1})")
    if run.train_seconds:
        print(f"Trained {run.samples:.0f} samples, {run.tokens:.0f} tokens in {run.train_seconds:.1f} s: "
              f"{run.samples / run.train_seconds:.1f} samples/s, {run.tokens / run.train_seconds:.0f} tokens/s")  # fmt: skip
    if run.world.device.type == "cuda":
        print(f"Peak GPU memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
    else:
        import resource

        print(f"Peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")
    print(f"Total time {time.time() - started:.1f} s", flush=True)
    run.log(event="end", epoch=max(run.evaluated, default=-1), seconds=time.time() - started)
    if run.wandb is not None:
        run.wandb.finish()


if __name__ == "__main__":
    sys.exit(main())
