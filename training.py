"""The training loop: epochs of updates, each followed by a checkpoint and a validation.

`train_epoch` is one epoch; what stands between its two ruled lines is one update. Nothing in it waits for the device: losses
stay there until `Updates.flush` reads those of the last `log_every` updates, and the optimizer itself skips a step whose
loss or gradient is not finite, and every one after it.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.distributed as dist

from batches import batches_of_epoch, dealt, micro_batches, prefetched, updates_of_epoch
from compiled import PREFIX_MULTIPLE
from dataset import StageDataset, get_cot_latent_dataset
from evaluate import validate
from files import NoRoom
from monitoring import observed
from optimizers import WITH_MUON, build_optimizer, can_skip, set_rates, update_norms
from run_folder import Position
from stopping import Stopped
from updates import Updates
from utils import micro_seed


def train(run, position: Position, restore: Callable | None, resumed: bool) -> None:
    """All epochs of a `run.Run` from `position` on: train, save, validate.

    `restore(model, optimizer)` gives the first optimizer the state that it had there. Raises Stopped where a signal asked
    for the end, and NoRoom where the disk is full; what could be saved is saved then.
    """
    config, world, folder = run.config, run.world, run.folder
    if resumed:
        run.saver.catch_up(position)
    if resumed and position.step == 0 and 0 < position.epoch and position.epoch - 1 not in run.evaluated:
        finish_epoch(run, position)
    if position.epoch >= config.num_epochs:
        world.print(f"Nothing left to train: {position.epoch} of {config.num_epochs} epochs are done in {folder.path}")
        return

    optimizer, saver, stop = None, run.saver, run.stop
    try:
        while position.epoch < config.num_epochs and not stopped_early(run, position.epoch):
            if config.max_steps is not None and position.global_step >= config.max_steps:
                world.print(f"Stopped after max_steps: {config.max_steps} updates")
                break
            keeps = position.step > 0 or not starts_fresh(config, position.epoch)
            if optimizer is None or not keeps:
                optimizer = build_optimizer(run.model, config)
                if keeps and restore is not None:
                    restore(run.model, optimizer)
                restore = None
            with stop.deferred():
                finished = train_epoch(run, optimizer, position)
                if finished:
                    position.next_epoch()
                    saver.epoch_done(optimizer, position, alone=starts_fresh(config, position.epoch))
                else:
                    saver.snapshot(optimizer, position)
                run.meter.watch.mark("saving")
            if world.any(stop.asked):
                raise Stopped(f"Stopped by {world.gather([stop.name])[0] or 'a signal to another process'}")
            if not finished:
                stop_here(run, position)
                break
            finish_epoch(run, position)
        saver.wait()
    except NoRoom as error:
        saved = optimizer is not None and saver.last_words(optimizer, position)
        where = f"epoch {position.epoch + 1}, update {position.step}"
        what = f"saved at {where}" if saved else f"what came after the last save, up to {where}, is not saved"
        raise NoRoom(f"{error}; {what}") from None


def starts_fresh(config, epoch: int) -> bool:
    """Whether an epoch begins with a new optimizer: every one (stock), or each at a new stage."""
    new_stage = epoch > 0 and config.stage(epoch) != config.stage(epoch - 1)
    return config.reset_optimizer is True or (config.reset_optimizer == "stage" and new_stage)


def update_size(config, world, before: dict | None, position: Position) -> int:
    """Micro-batches of one update, over all processes; prints the effective batch size.

    `before` is run.json of the run that is resumed: its updates are kept whatever the number of processes is now. ValueError
    where the effective batch size can't be met, or would change within an epoch.
    """
    micro, size = config.batch_size_training, config.gradient_accumulation_steps * world.size
    if config.effective_batch_size:
        size, rest = divmod(config.effective_batch_size, micro)
        if rest or not size:
            raise ValueError(
                f"effective_batch_size: {config.effective_batch_size} is no multiple of batch_size_training ({micro})"
            )
    kept = (before or {}).get("micro_batches_per_update")
    if kept is not None:
        keys = ("batch_size_training", "gradient_accumulation_steps", "effective_batch_size")
        changed = [key for key in keys if before["config"][key] != getattr(config, key)]
        if not changed and kept != size:
            world.print(
                f"Note: updates stay those of {kept} micro-batches that this run began with; {world.size} processes now"
            )
            size = kept
        if position.step and (size, micro) != (kept, before["config"]["batch_size_training"]):
            raise ValueError(
                f"{', '.join(changed)}: cannot change within epoch {position.epoch + 1}, of which {position.step} updates of "
                f"{kept} x {before['config']['batch_size_training']} rows are done; change it when the epoch is over"
            )
    each = f"{micro} x {size // world.size} x {world.size}"
    if size % world.size:
        each = f"{micro} x {size} micro-batches, dealt out to {world.size} processes"
    world.print(f"Effective batch size: {micro * size} = {each}")
    if micro * size != 128 and not config.from_scratch:
        world.print("Warning: the published recipes use an effective batch size of 128 (set effective_batch_size: 128)")
    return size


# ---------------------------------------------------------------- one epoch


def train_epoch(run, optimizer, position: Position) -> bool:
    """One epoch from `position.step` on; False where `max_steps` or a signal ended it early.

    Which rows meet in which update depends on (seed, epoch) alone.
    """
    config, world, epoch, watch = run.config, run.world, position.epoch, run.meter.watch
    stage = config.stage(epoch)
    rows = run.rows(get_cot_latent_dataset, stage, run.train, epoch=epoch)
    parallel, per_update = run.parallel, run.micro_batches_per_update
    lengths, batches = rows.lengths(), batches_of_epoch(rows, per_update)
    skips = can_skip(optimizer) and not parallel.sharded
    watched = config.optimizer in WITH_MUON  # whose steps the clipping of gradients does not bound
    of_epochs = [updates_of_epoch(config, run.train, e, per_update) for e in range(config.num_epochs)]
    n_updates, n_latents = of_epochs[epoch], int(lengths.latents.max())
    earlier, total_updates = sum(of_epochs[:epoch]), sum(of_epochs)
    groups = [batches[i : i + per_update] for i in range(0, len(batches), per_update)]
    warmup = config.warmup_steps or round(config.warmup_epochs * n_updates)
    exact = config.latent_iterations is None or config.latent_iterations >= n_latents
    world.print(
        f"Epoch {epoch + 1} of {config.num_epochs}: stage {stage}, up to {n_latents} latents, {n_updates} updates"
        + ("" if exact else f"; approximate thoughts: {config.latent_iterations} parallel iterations")
    )
    run.metrics.log_batch([rows[i] for i in batches[0][:4]], run.tokenizer)
    log = Updates(run, rows, position, stage, n_latents, len(batches), per_update, earlier)
    left = n_updates - position.step
    if config.max_steps is not None:
        left = min(left, max(config.max_steps - position.global_step, 0))
    steps = range(position.step, position.step + left)
    ahead = prefetched(lambda numbers: host_batch(run, rows, numbers), micro_batches(groups, steps, lengths, world))
    bad = torch.zeros((), device=world.device)  # 1 from the first update on whose loss or gradient was not finite
    watch.restart()
    run.model.train()
    run.model.after_pass = lambda pass_, last: None if last else watch.mark("thoughts" if pass_.slots else "prefix")

    for step in steps:
        group, tokens = groups[step], [int(lengths.labelled[batch].sum()) for batch in groups[step]]
        places, n_micro = dealt(group, lengths, world), math.ceil(len(group) / world.size)
        loss_sum = torch.zeros((), dtype=world.wide, device=world.device)
        # ------------------------------------------------------------------ one update
        for micro in range(n_micro):
            filler = micro >= len(places)  # a rank without a micro-batch in the leftover group joins with weight 0
            place = len(group) + world.rank if filler else places[micro]
            batch = on_device(next(ahead), world.device)
            watch.mark("data")
            torch.manual_seed(micro_seed(config.seed, epoch, step * per_update + place))
            if run.model.compiled:
                torch.compiler.cudagraph_mark_step_begin()
            with parallel.accumulating(last=micro == n_micro - 1):
                with run.precision():
                    loss = parallel.wrapped(**batch).loss
                watch.mark("suffix+head")
                if filler:
                    weight = 0.0
                elif config.accumulation_norm == "tokens":
                    weight = tokens[place] * world.size / sum(tokens)
                else:
                    weight = world.size / per_update
                (loss * weight).backward()
            watch.mark("backward")
            if not filler:
                loss_sum += loss.detach().to(world.wide) * tokens[place]
        parallel.reduce_gradients()
        if world.size > 1:
            dist.all_reduce(loss_sum)
        grad_norm = clip_gradients(run.model, config.gradient_clip)
        bad = torch.maximum(bad, 1.0 - torch.isfinite(loss_sum + grad_norm).to(bad))
        rate = set_rates(optimizer, earlier + step, total_updates, warmup, config)
        log.add(step, group, tokens, rate, loss_sum, grad_norm)
        if skips:
            optimizer.found_inf = bad
        else:
            log.flush()  # which raises before a step that must not be
        with update_norms(optimizer) if watched and step % config.log_every == 0 else nullcontext({}) as norms:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if norms:
            norms = {f"train/update_norm{'' if name == 'all' else '_' + name}": float(norm) for name, norm in norms.items()}
            run.metrics.log(event="update_norm", epoch=epoch, **{"train/step": earlier + step}, **norms)
        if run.average is not None:
            run.average.update(run.model, position.global_step + log.pending - 1)
        if hasattr(run.model.base_causallm, "after_update"):  # buffers that follow what an update has seen
            run.model.base_causallm.after_update(lambda seen: torch.cat(world.gather([seen])))
        watch.mark("optimizer")
        # ------------------------------------------------------------------
        done, stopping = step + 1, world.any(run.stop.asked)
        save = config.save_every_steps and done < n_updates and not stopping
        save = save and (position.global_step + log.pending) % config.save_every_steps == 0
        if save or stopping or log.pending >= config.log_every or done == steps.stop:
            log.flush()
        if save:
            run.metrics.check()
            run.saver.snapshot(optimizer, position)
            watch.mark("saving")
        if stopping:
            break

    run.model.after_pass = None
    ahead.close()
    log.close()
    return position.step == n_updates


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
    if hasattr(norm, "full_tensor"):  # of sharded gradients
        norm = norm.full_tensor()
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return norm


# ---------------------------------------------------------------- between epochs


def finish_epoch(run, position: Position) -> None:
    """Validate what the last trained epoch left, keep it where only improvements are kept, and note the best."""
    config, epoch = run.config, position.epoch - 1
    if position.epoch % config.eval_every and position.epoch < config.num_epochs:
        return
    with run.evaluating():
        summary = validate(run, epoch, f"eval_{epoch + 1}.jsonl" if not config.debug else None, with_loss=True)
        summary |= observed(run, config.stage(epoch)) if run.world.is_main else {}
    run.alarms.evaluation(epoch, summary["eval/loss"])
    accuracy = summary["eval/acc"]
    least = 0.0 if config.select_by == "accuracy" else -math.inf  # stock: no accuracy of 0 is ever the best
    if run.score(summary) > max(map(run.score, run.evaluated.values()), default=least):
        if config.save_only_improve:
            run.saver.checkpoint(position)
        facts = {"stage": summary["stage"], "gen_tokens": summary["eval/gen_tokens"]}
        run.saver.best(epoch, accuracy, summary.get("eval/loss"), **facts)
    run.metrics.log(event="eval", epoch=epoch, **summary)
    run.metrics.check()
    run.evaluated[epoch] = summary
    run.world.barrier()
    run.meter.watch.mark("evaluation")


def stop_here(run, position: Position) -> None:
    """End a run at `max_steps`, within an epoch: say how good it is."""
    run.world.print(f"Stopped after max_steps: {run.config.max_steps} updates, in epoch {position.epoch + 1}")
    with run.evaluating():
        summary = validate(run, position.epoch, None, with_loss=True)
    run.metrics.log(event="eval", epoch=position.epoch, **summary)
    run.meter.watch.mark("evaluation")


def stopped_early(run, epoch: int) -> bool:
    """Whether the last `early_stop_patience` evaluations all failed to beat the best before them by `min_delta`."""
    patience, scores = run.config.early_stop_patience, [run.score(record) for _, record in sorted(run.evaluated.items())]
    if patience is None or len(scores) <= patience:
        return False
    stop = max(scores[-patience:]) <= max(scores[:-patience]) + run.config.min_delta
    if stop:
        run.world.print(f"Early stop after epoch {epoch}: no gain above {run.config.min_delta} in {patience} evaluations")
    return stop
