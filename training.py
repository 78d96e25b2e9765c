"""The training loop: epochs of updates, each followed by a checkpoint and a validation.

`train_epoch` is one epoch; what stands between its two ruled lines is one update. Nothing in it waits for the device: losses
stay there until `Updates.flush` reads those of the last `log_every` updates, and the optimizer itself skips a step whose
loss or gradient is not finite, and every one after it.
"""

import math
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from accounting import Throughput
from batches import epoch_batches, prefetched
from checkpoint import Position
from compiled import PREFIX_MULTIPLE
from dataset import StageDataset, get_cot_latent_dataset, padded_layout
from evaluate import validate
from optimizers import build_optimizer, can_skip, learning_rate
from reporting import Progress
from utils import micro_seed, whole_file, write_json


def train(run, position: Position, accumulation: int, optimizer_state: dict | None, resumed: bool) -> None:
    """All epochs of a `run.Run` from `position` on: train, save, validate."""
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
        if config.max_steps is not None and position.global_step >= config.max_steps:
            world.print(f"Stopped after max_steps: {config.max_steps} updates")
            return
        keeps = position.step > 0 or not starts_fresh(config, position.epoch)
        if optimizer is None or not keeps:
            optimizer = build_optimizer(run.model, config)
            if keeps and optimizer_state is not None:
                optimizer.load_state_dict(optimizer_state)
            optimizer_state = None
        if not train_epoch(run, trained, optimizer, position, accumulation):
            stop_here(run, optimizer, position)
            return
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
        run.meter.watch.mark("saving")
        finish_epoch(run, position)


def starts_fresh(config, epoch: int) -> bool:
    """Whether an epoch begins with a new optimizer: every one (stock), or each at a new stage."""
    new_stage = epoch > 0 and config.stage(epoch) != config.stage(epoch - 1)
    return config.reset_optimizer is True or (config.reset_optimizer == "stage" and new_stage)


def accumulation_steps(config, world) -> int:
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


# ---------------------------------------------------------------- one epoch


def train_epoch(run, trained, optimizer, position: Position, accumulation: int) -> bool:
    """One epoch from `position.step` on; False where `max_steps` ended it early.

    Which rows meet in which update depends on (seed, epoch) alone.
    """
    config, world, epoch, watch = run.config, run.world, position.epoch, run.meter.watch
    stage = config.stage(epoch)
    rows = run.rows(get_cot_latent_dataset, stage, run.train, epoch=epoch)
    lengths = rows.lengths()
    batches = epoch_batches(
        len(rows), config.batch_size_training, config.seed, epoch, lengths if config.group_by_length else None
    )
    per_update = accumulation * world.size
    n_updates, n_latents = math.ceil(len(batches) / per_update), int(lengths.latents.max())
    groups = [batches[i : i + per_update] for i in range(0, len(batches), per_update)]
    warmup, total_updates = round(config.warmup_epochs * n_updates), config.num_epochs * n_updates
    exact = config.latent_iterations is None or config.latent_iterations >= n_latents
    world.print(
        f"Epoch {epoch + 1} of {config.num_epochs}: stage {stage}, up to {n_latents} latents, {n_updates} updates"
        + ("" if exact else f"; approximate thoughts: {config.latent_iterations} parallel iterations")
    )
    run.metrics.log_batch([rows[i] for i in batches[0][:4]], run.tokenizer)
    log = Updates(run, rows, position, stage, n_latents, len(batches), per_update)
    left = n_updates - position.step
    if config.max_steps is not None:
        left = min(left, max(config.max_steps - position.global_step, 0))
    steps = range(position.step, position.step + left)
    ahead = prefetched(lambda numbers: host_batch(run, rows, numbers), micro_batches(groups, steps, world))
    bad = torch.zeros((), device=world.device)  # 1 from the first update on whose loss or gradient was not finite
    watch.restart()
    run.model.train()
    run.model.after_pass = lambda pass_, last: None if last else watch.mark("thoughts" if pass_.slots else "prefix")

    for step in steps:
        group, tokens = groups[step], [int(lengths.labelled[batch].sum()) for batch in groups[step]]
        my_tokens, n_micro = tokens[world.rank :: world.size], math.ceil(len(group) / world.size)
        loss_sum = torch.zeros((), dtype=world.wide, device=world.device)
        # ------------------------------------------------------------------ one update
        for micro in range(n_micro):
            filler = micro >= len(my_tokens)  # a rank without a micro-batch in the leftover group joins with weight 0
            batch = on_device(next(ahead), world.device)
            watch.mark("data")
            torch.manual_seed(micro_seed(config.seed, epoch, step * per_update + micro * world.size + world.rank))
            if run.model.compiled:
                torch.compiler.cudagraph_mark_step_begin()
            with trained.no_sync() if world.size > 1 and micro < n_micro - 1 else nullcontext():
                with run.precision():
                    loss = trained(**batch).loss
                watch.mark("suffix+head")
                if filler:
                    weight = 0.0
                elif config.accumulation_norm == "tokens":
                    weight = my_tokens[micro] * world.size / sum(tokens)
                else:
                    weight = 1 / accumulation
                (loss * weight).backward()
            watch.mark("backward")
            if not filler:
                loss_sum += loss.detach().to(world.wide) * my_tokens[micro]
        if world.size > 1:
            dist.all_reduce(loss_sum)
        grad_norm = clip_gradients(run.model, config.gradient_clip)
        bad = torch.maximum(bad, 1.0 - torch.isfinite(loss_sum + grad_norm).to(bad))
        rate = learning_rate(epoch * n_updates + step, total_updates, warmup, config)
        log.add(step, group, tokens, rate, loss_sum, grad_norm)
        for parameters in optimizer.param_groups:
            parameters["lr"] = rate
        if can_skip(optimizer):
            optimizer.found_inf = bad
        else:
            log.flush()  # which raises before a step that must not be
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        watch.mark("optimizer")
        # ------------------------------------------------------------------
        save = run.writes and config.save_training_state and config.save_every_steps and step + 1 < n_updates
        save = save and (position.global_step + log.pending) % config.save_every_steps == 0
        if save or log.pending >= config.log_every or step + 1 == steps.stop:
            log.flush()
        if save:
            run.folder.save_last_state(run.model, optimizer, position)
            watch.mark("saving")

    run.model.after_pass = None
    ahead.close()
    log.close()
    return steps.stop == n_updates


def micro_batches(groups: list, steps: range, world):
    """The rows of every micro-batch of this process over `steps`, in turn; a rank with none left repeats the first."""
    for step in steps:
        group = groups[step]
        for start in range(0, len(group), world.size):
            yield group[start + world.rank] if start + world.rank < len(group) else group[0]


def host_batch(run, rows: StageDataset, numbers) -> dict:
    """Rows as a padded batch on the host with its plan; pinned where it is to go to a GPU."""
    pad = run.tokenizer.pad_token_id
    batch = rows.batch(numbers, pad, prefix_multiple=PREFIX_MULTIPLE if run.model.compiled else 1)
    batch.pop("idx")
    plan = run.model.plan(**batch)
    if run.world.device.type == "cuda":
        batch = {key: value.pin_memory() for key, value in batch.items()}
        plan = plan.pinned()
    return batch | {"plan": plan}


def on_device(batch: dict, device: torch.device) -> dict:
    """A host batch on the device, without waiting for it."""
    plan = batch.pop("plan").to(device)
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()} | {"plan": plan}


def clip_gradients(model, limit: float | None) -> torch.Tensor:
    """The norm of all gradients, on the device; they are scaled down to `limit` where one is set."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return norm


class Updates:
    """What the updates of one epoch report: held on the device until `flush`, then counted, checked, shown and logged."""

    def __init__(self, run, rows, position: Position, stage: int, n_latents: int, n_batches: int, per_update: int):
        self.run, self.rows, self.position, self.stage, self.n_latents = run, rows, position, stage, n_latents
        self.n_batches, self.per_update, self.n_updates = n_batches, per_update, math.ceil(n_batches / per_update)
        self.lengths, self.multiple = rows.lengths(), PREFIX_MULTIPLE if run.model.compiled else 1
        main, epochs = run.world.is_main, run.config.num_epochs
        self.bar = Progress(self.n_updates, position.step, position.epoch, epochs, n_batches, enabled=main)
        self.held: list[tuple] = []

    @property
    def pending(self) -> int:
        return len(self.held)

    def add(self, step: int, group: list, tokens: list[int], rate: float, loss_sum, grad_norm) -> None:
        """An update's rows, labelled tokens a micro-batch, learning rate, and on the device its summed loss and norm."""
        self.held.append((step, group, tokens, rate, torch.stack([loss_sum, grad_norm.to(loss_sum.dtype)])))

    def flush(self) -> None:
        """Wait for the device, once, and report the updates held. FloatingPointError where one of them was not finite."""
        run, position, epoch = self.run, self.position, self.position.epoch
        held, self.held = self.held, []
        if not held:
            return
        values = torch.stack([update[-1] for update in held]).tolist()
        work = Throughput()
        for (step, group, tokens, rate, _), (loss_sum, grad_norm) in zip(held, values):
            mean_loss = loss_sum / sum(tokens)
            if not (math.isfinite(mean_loss) and math.isfinite(grad_norm)):
                stop_on_nonfinite(run, self.rows, group, epoch, step, mean_loss, grad_norm)
            position.count(loss_sum, sum(tokens))
            self.bar.update(step, min((step + 1) * self.per_update, self.n_batches) - 1, mean_loss)
            run.metrics.log(
                event="step", epoch=epoch, stage=self.stage, lr=rate,
                **{"train/epoch": epoch + 1, "train/step": epoch * self.n_updates + step,
                   "train/loss": mean_loss, "train/grad_norm": grad_norm},
            )  # fmt: skip
            for numbers, labelled in zip(group, tokens):
                some = self.lengths.of(numbers)
                _, width = padded_layout(some, multiple=self.multiple)
                work.count(run.meter.shape, some.total, labelled, len(numbers) * width)
        run.metrics.log(event="speed", epoch=epoch, stage=self.stage, updates=len(held), **run.meter.add(work))

    def close(self) -> None:
        """The epoch's record; a cut one gets its own when it goes on."""
        self.flush()
        self.bar.close()
        position, run = self.position, self.run
        run.metrics.log(
            event="train_epoch", epoch=position.epoch, stage=self.stage, n_latents=self.n_latents, updates=self.n_updates,
            **{"train/loss_mean": position.loss_sum / max(position.loss_tokens, 1)},
            **run.meter.close_epoch(), **run.folder.pause_distance(run.model),
        )  # fmt: skip


def stop_on_nonfinite(run, rows: StageDataset, group: list, epoch: int, step: int, loss: float, grad_norm: float) -> None:
    """Save this rank's micro-batches and raise FloatingPointError; the optimizer has not moved since that update."""
    path = run.folder.path / f"nonfinite_batch_rank{run.world.rank}"
    mine = group[run.world.rank :: run.world.size]
    batches = [rows.batch(numbers, run.tokenizer.pad_token_id) for numbers in mine]
    with whole_file(path, "wb") as file:
        torch.save({"epoch": epoch, "step": step, "batches": batches}, file)
    raise FloatingPointError(
        f"loss {loss} or gradient norm {grad_norm} is not finite at epoch {epoch}, update {step}; no step was taken, "
        f"the batch is in {path}: lower lr, set gradient_clip, or look at its rows (key idx)"
    )


# ---------------------------------------------------------------- between epochs


def finish_epoch(run, position: Position) -> None:
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
    run.meter.watch.mark("evaluation")


def stop_here(run, optimizer, position: Position) -> None:
    """End a run at `max_steps`, within an epoch: keep its state for the next start, and say how good it is."""
    run.world.print(f"Stopped after max_steps: {run.config.max_steps} updates, in epoch {position.epoch + 1}")
    if run.writes and run.config.save_training_state:
        run.folder.save_last_state(run.model, optimizer, position)
    run.meter.watch.mark("saving")
    summary = validate(run, position.epoch, None, with_loss=True)
    run.metrics.log(event="eval", epoch=position.epoch, **summary)
    run.meter.watch.mark("evaluation")


def stopped_early(run, epoch: int) -> bool:
    """Whether the last `early_stop_patience` evaluations all failed to beat the best before them by `min_delta`."""
    patience, accuracies = run.config.early_stop_patience, [acc for _, acc in sorted(run.evaluated.items())]
    if patience is None or len(accuracies) <= patience:
        return False
    stop = max(accuracies[-patience:]) <= max(accuracies[:-patience]) + run.config.min_delta
    if stop:
        run.world.print(f"Early stop after epoch {epoch}: no gain above {run.config.min_delta} in {patience} evaluations")
    return stop
