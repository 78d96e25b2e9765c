"""Train or evaluate one model from one YAML file.

    python run.py args/prosqa_coconut_1gpu.yaml                          one process on CUDA, MPS or CPU
    torchrun --nproc_per_node=4 run.py args/prosqa_coconut.yaml          several GPUs (nccl), or CPU processes (gloo)
    python run.py args/prosqa_m5_pause.yaml lr=3e-4 name=m5-lr3e-4       any key may follow as key=value

The same command after an interruption goes on where the run stopped. Outputs go to <save_path>/<name>/: checkpoint_N after
every epoch, metrics.jsonl, eval_N.jsonl with one record a question; the log lines go to stdout, progress to stderr.
"""

import argparse
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from torch.nn.parallel import DistributedDataParallel

import backbones
from checkpoint import Position, RunFolder, build_model, find_checkpoint, read_last_state
from coconut import Coconut
from dataset import (
    MyCollator,
    StageDataset,
    TokenTable,
    epoch_batches,
    get_cot_latent_dataset,
    get_dataset,
    load_rows,
)
from evaluate import validate, wants_two_choice
from optimizers import build_optimizer, learning_rate
from reporting import Meter, Metrics, Progress
from utils import Config, World, load_config, micro_seed, process_group, set_seed, whole_file, write_json


@dataclass
class Run:
    """Everything that training and evaluation share."""

    config: Config
    world: World
    folder: RunFolder
    model: Coconut
    tokenizer: object
    ids: backbones.ThoughtIds
    val_rows: list[dict]
    val: TokenTable
    train: TokenTable | None
    metrics: Metrics = None
    meter: Meter = field(default_factory=Meter)
    evaluated: dict[int, float] = field(default_factory=dict)

    @property
    def writes(self) -> bool:
        """Whether this process writes to the run folder."""
        return self.world.is_main and not self.config.debug

    def precision(self):
        """bf16 autocast over float32 master weights, or nothing."""
        autocast = self.config.bf16 is True
        return torch.autocast(self.world.device.type, torch.bfloat16) if autocast else nullcontext()

    def rows(self, get, stage: int, table: TokenTable, **kwargs) -> StageDataset:
        """The rows of a stage: `get` is get_cot_latent_dataset (training) or get_question_latent_dataset (prompts)."""
        ids = self.ids
        return get(stage, table, self.config, ids.start, ids.latent, ids.end, not self.config.markers, **kwargs)


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
    rank = 0
    try:
        config = load_config(args.config, args.overrides)
        with process_group(config.device) as world:
            rank = world.rank
            world.print(f"Config: {yaml.safe_load(Path(args.config).read_text())}")
            execute(config, world)
        return 0
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error{f' (rank {rank})' if rank else ''}: {error}", file=sys.stderr, flush=True)
        return 1 if isinstance(error, FloatingPointError) else 2


def execute(config: Config, world: World) -> None:
    """Prepare, then train or evaluate."""
    set_seed(config.seed)
    if config.tf32:
        torch.set_float32_matmul_precision("high")
    folder = RunFolder(config)
    if world.is_main:
        folder.open(exclusive=not config.only_eval and not config.debug)
    world.barrier()
    resumed, position, source, optimizer_state = find_start(config, world, folder)
    if not config.only_eval and not resumed and config.resume >= config.num_epochs:
        raise ValueError(f"resume: {config.resume} must be below num_epochs ({config.num_epochs}); nothing would be trained")
    val_rows, tables = load_data(config, world)  # what is wrong with the data is said before a model is loaded
    model, tokenizer, ids, report = build_model(config, *source)
    if report is not None:
        print(report, flush=True)
    print(f"Running FSDP on rank = {world.rank}, world size = {world.size}", flush=True)
    world.print(model)
    model.to(world.device, torch.bfloat16 if config.bf16 == "pure" else None)
    run = Run(config, world, folder, model, tokenizer, ids, val_rows, tables["val_path"], tables.get("train_path"))
    check_lengths(run)

    if config.only_eval:
        validate(run, config.resume, f"eval_{Path(config.val_path).stem}.jsonl")
        return
    accumulation = accumulation_steps(config, world)
    if run.writes:
        folder.begin(model)
    run.metrics = Metrics(config, folder.path, run.writes)
    run.evaluated = world.from_main(folder.evaluations(position.epoch) if world.is_main else None)
    run.metrics.log(event="start", epoch=position.epoch, step_in_epoch=position.step, world_size=world.size)
    train(run, position, accumulation, optimizer_state, resumed)
    if run.writes:
        run.meter.print_summary(run.evaluated, world.device)
    run.metrics.log(event="end", epoch=position.epoch - 1, seconds=time.time() - run.meter.started)
    run.metrics.close()


def find_start(config: Config, world: World, folder: RunFolder):
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


def load_data(config: Config, world: World) -> tuple[list[dict], dict[str, TokenTable]]:
    """The validation rows, and the tokens of each data file by its key (rank 0 first, the others from its cache)."""
    limits = {"val_path": config.max_val_samples, "train_path": config.max_train_samples}
    if config.debug:
        limits = {"val_path": 32, "train_path": 5000}
    val_rows = load_rows(config.val_path, limits["val_path"])
    wants_two_choice(config, val_rows)  # raises where it can't be done
    tokenizer = backbones.load_tokenizer(config.model_id)
    if config.markers:
        backbones.add_thought_tokens(tokenizer)
    tables = {}
    for turn in (True, False):
        if world.is_main == turn:
            for key in ["val_path"] if config.only_eval else ["val_path", "train_path"]:
                tables[key] = TokenTable(get_dataset(getattr(config, key), tokenizer, limits[key]))
        world.barrier()
    for key, table in tables.items():
        if table.merges:
            world.print(
                f"Note: in {table.merges} of {len(table)} rows of {key} tokens would merge across pieces; pieces are used"
            )
    return val_rows, tables


def check_lengths(run: Run) -> None:
    """Refuse, before any compute, a row that would not fit the model's positions at some stage."""
    config, limit = run.config, backbones.max_positions(run.model.base_causallm)
    for key, table in {"val_path": run.val, "train_path": run.train}.items():
        if table is None or limit is None:
            continue
        most_latents = config.max_latent_stage * config.c_thought
        longest = run.rows(get_cot_latent_dataset, 0, table).lengths().total.max() + most_latents
        # Dropped steps make room for latents; only where even this bound is too long are the stages looked at one by one.
        for stage in range(config.max_latent_stage + 2) if longest > limit else ():
            total = run.rows(get_cot_latent_dataset, stage, table).lengths().total
            worst = int(total.argmax())
            if total[worst] > limit:
                raise ValueError(
                    f"{key}: {getattr(config, key)}, row {worst} has {total[worst]} tokens at stage {stage}; "
                    f"{config.model_id} has {limit} positions: leave the row out or use a longer model"
                )


# ---------------------------------------------------------------- training


def train(run: Run, position: Position, accumulation: int, optimizer_state: dict | None, resumed: bool) -> None:
    """All epochs from `position` on: train, save, validate."""
    config, world, folder = run.config, run.world, run.folder
    if resumed and position.step == 0 and 0 < position.epoch and position.epoch - 1 not in run.evaluated:
        finish_epoch(run, position)
    if position.epoch >= config.num_epochs:
        world.print(f"Nothing left to train: {position.epoch} of {config.num_epochs} epochs are done in {folder.path}")
        return

    trained = run.model
    if world.size > 1:
        trained = DistributedDataParallel(run.model, [world.device.index] if world.device.type == "cuda" else None)
    optimizer = None
    while position.epoch < config.num_epochs and not stopped_early(run, position.epoch):
        keeps = position.step > 0 or not starts_fresh(config, position.epoch)
        if optimizer is None or not keeps:
            optimizer = build_optimizer(run.model, config)
            if keeps and optimizer_state is not None:
                optimizer.load_state_dict(optimizer_state)
            optimizer_state = None
        train_epoch(run, trained, optimizer, position, accumulation)
        position.next_epoch()
        if run.writes:
            # Whatever checkpoint_N alone can't continue goes into last_state, and goes first.
            needed = not starts_fresh(config, position.epoch) or config.save_only_improve
            if needed and config.save_training_state:
                folder.save_last_state(run.model, optimizer, position)
            if not config.save_only_improve:
                print("saving model.", flush=True)
                folder.save_checkpoint(run.model, position)
            if not needed:
                folder.drop_last_state()
        world.barrier()
        finish_epoch(run, position)


def starts_fresh(config: Config, epoch: int) -> bool:
    """Whether an epoch begins with a new optimizer: every one (stock), or each at a new stage."""
    new_stage = epoch > 0 and config.stage(epoch) != config.stage(epoch - 1)
    return config.reset_optimizer is True or (config.reset_optimizer == "stage" and new_stage)


def accumulation_steps(config: Config, world: World) -> int:
    """Micro-batches a process adds up for one update; prints the effective batch size. ValueError where it can't be met."""
    micro = config.batch_size_training * world.size
    accumulation = config.gradient_accumulation_steps
    if config.effective_batch_size:
        accumulation, rest = divmod(config.effective_batch_size, micro)
        if rest or not accumulation:
            raise ValueError(
                f"effective_batch_size: {config.effective_batch_size} is no multiple of batch_size_training x processes "
                f"({config.batch_size_training} x {world.size})"
            )
    world.print(f"Effective batch size: {micro * accumulation} = {config.batch_size_training} x {accumulation} x {world.size}")
    if micro * accumulation != 128 and not config.from_scratch:
        world.print("Warning: the published recipes use an effective batch size of 128 (set effective_batch_size: 128)")
    return accumulation


def train_epoch(run: Run, trained, optimizer, position: Position, accumulation: int) -> None:
    """One epoch from `position.step` on. Which rows meet in which update depends on (seed, epoch) alone."""
    config, world, epoch = run.config, run.world, position.epoch
    stage = config.stage(epoch)
    rows = run.rows(get_cot_latent_dataset, stage, run.train, epoch=epoch)
    lengths = rows.lengths()
    by_length = lengths.prefix if config.group_by_length else None
    batches = epoch_batches(len(rows), config.batch_size_training, config.seed, epoch, by_length)
    per_update = accumulation * world.size
    n_updates, n_latents = math.ceil(len(batches) / per_update), int(lengths.latents.max())
    warmup = round(config.warmup_epochs * n_updates)
    world.print(f"Epoch {epoch + 1} of {config.num_epochs}: stage {stage}, up to {n_latents} latents, {n_updates} updates")
    run.metrics.log_batch([rows[i] for i in batches[0][:4]], run.tokenizer)
    bar = Progress(n_updates, position.step, epoch, config.num_epochs, len(batches), enabled=world.is_main)
    started, first_step = time.time(), position.step
    run.model.train()

    for step in range(position.step, n_updates):
        group = batches[step * per_update : (step + 1) * per_update]
        mine = group[world.rank :: world.size]
        tokens = [int(lengths.labelled[batch].sum()) for batch in group]
        my_losses, my_tokens = [], tokens[world.rank :: world.size]
        n_micro = math.ceil(len(group) / world.size)
        # ------------------------------------------------------------------ one update
        for micro in range(n_micro):
            filler = micro >= len(mine)  # a rank without a micro-batch in the leftover group joins with weight 0
            batch = device_batch(run, rows, group[0] if filler else mine[micro])
            torch.manual_seed(micro_seed(config.seed, epoch, step * per_update + micro * world.size + world.rank))
            with trained.no_sync() if world.size > 1 and micro < n_micro - 1 else nullcontext():
                with run.precision():
                    loss = trained(**batch).loss
                if filler:
                    weight = 0.0
                elif config.accumulation_norm == "tokens":
                    weight = my_tokens[micro] * world.size / sum(tokens)
                else:
                    weight = 1 / accumulation
                (loss * weight).backward()
            my_losses.append(loss.detach())
        my_losses = torch.stack(my_losses).cpu().double().tolist()
        (loss_sum,) = world.sum(sum(n * loss for n, loss in zip(my_tokens, my_losses)))
        mean_loss, grad_norm = loss_sum / sum(tokens), clip_gradients(run.model, config.gradient_clip)
        if not (math.isfinite(mean_loss) and math.isfinite(grad_norm)):
            stop_on_nonfinite(run, rows, mine, epoch, step, mean_loss, grad_norm)
        rate = learning_rate(epoch * n_updates + step, config.num_epochs * n_updates, warmup, config)
        for parameters in optimizer.param_groups:
            parameters["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # ------------------------------------------------------------------
        position.count(loss_sum, sum(tokens))
        bar.update(step, min((step + 1) * per_update, len(batches)) - 1, mean_loss)
        run.metrics.log(
            event="step", epoch=epoch, stage=stage, lr=rate,
            **{"train/epoch": epoch + 1, "train/step": epoch * n_updates + step,
               "train/loss": mean_loss, "train/grad_norm": grad_norm},
        )  # fmt: skip
        if run.writes and config.save_training_state and config.save_every_steps and position.step < n_updates:
            if position.global_step % config.save_every_steps == 0:
                run.folder.save_last_state(run.model, optimizer, position)

    bar.close()
    done = [i for batch in batches[first_step * per_update :] for i in batch]
    run.metrics.log(
        event="train_epoch", epoch=epoch, stage=stage, n_latents=n_latents, updates=n_updates,
        **{"train/loss_mean": position.loss_sum / max(position.loss_tokens, 1)},
        **run.meter.add(len(done), int(lengths.total[done].sum()), time.time() - started),
        **run.folder.pause_distance(run.model),
    )  # fmt: skip


def device_batch(run: Run, rows: StageDataset, row_numbers) -> dict[str, torch.Tensor]:
    """Rows padded to a batch on this process's device."""
    batch = MyCollator(run.tokenizer, run.ids.latent)([rows[i] for i in row_numbers])
    batch.pop("idx")
    pin = run.world.device.type == "cuda"
    return {k: (v.pin_memory() if pin else v).to(run.world.device, non_blocking=True) for k, v in batch.items()}


def clip_gradients(model: Coconut, limit: float | None) -> float:
    """The norm of all gradients; they are scaled down to `limit` where one is set."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return norm.item()


def stop_on_nonfinite(run: Run, rows: StageDataset, mine, epoch: int, step: int, loss: float, grad_norm: float) -> None:
    """Save this rank's micro-batches and raise FloatingPointError, before the step spoils the weights."""
    path = run.folder.path / f"nonfinite_batch_rank{run.world.rank}"
    batches = [MyCollator(run.tokenizer, run.ids.latent)([rows[i] for i in numbers]) for numbers in mine]
    with whole_file(path, "wb") as file:
        torch.save({"epoch": epoch, "step": step, "batches": batches}, file)
    raise FloatingPointError(
        f"loss {loss} or gradient norm {grad_norm} is not finite at epoch {epoch}, update {step}; no step was taken, "
        f"the batch is in {path}: lower lr, set gradient_clip, or look at its rows (key idx)"
    )


def finish_epoch(run: Run, position: Position) -> None:
    """Validate what the last trained epoch left, keep it where only improvements are kept, and note the best."""
    config, epoch = run.config, position.epoch - 1
    if position.epoch % config.eval_every and position.epoch < config.num_epochs:
        return
    summary = validate(run, epoch, f"eval_{epoch + 1}.jsonl" if not config.debug else None, with_loss=True)
    accuracy = summary["eval/acc"]
    if run.writes and accuracy > max(run.evaluated.values(), default=0.0):
        if config.save_only_improve:
            print("saving model.", flush=True)
            run.folder.save_checkpoint(run.model, position)
        best = {"file": f"checkpoint_{epoch + 1}", "epoch": epoch, "accuracy": accuracy}
        write_json(run.folder.path / "best.json", best)
    run.metrics.log(event="eval", epoch=epoch, **summary)
    run.evaluated[epoch] = accuracy
    run.world.barrier()


def stopped_early(run: Run, epoch: int) -> bool:
    """Whether the last `early_stop_patience` evaluations all failed to beat the best before them by `min_delta`."""
    patience, accuracies = run.config.early_stop_patience, [acc for _, acc in sorted(run.evaluated.items())]
    if patience is None or len(accuracies) <= patience:
        return False
    stop = max(accuracies[-patience:]) <= max(accuracies[:-patience]) + run.config.min_delta
    if stop:
        run.world.print(f"Early stop after epoch {epoch}: no gain above {run.config.min_delta} in {patience} evaluations")
    return stop


if __name__ == "__main__":
    sys.exit(main())
