"""What a run saves and when, written behind the back of training.

    saver = Saver(run.folder, run.model, run.parallel, world, enabled=True)
    saver.snapshot(optimizer, position)       # all that going on from here needs
    saver.epoch_done(optimizer, position)     # checkpoint_N, with a snapshot before it where it alone can't be continued
    saver.wait()                              # until all of it lies on the disk

Copies are made at once; a thread of its own writes them, in the order in which they were asked for. After a write that
failed nothing more is written, so that no later file speaks of one that is not there, and no run goes on behind a gap; the next
call raises its error.
"""

import copy
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

from checkpoint import stored_model, stored_weights
from lora import OWN, has_adapters
from run_folder import Position, RunFolder, training_state


class Writer:
    """Does jobs one after another, in a thread of its own or (`background=False`) at once.

    After one that failed none is done, until `retry` does them all in their order.
    """

    def __init__(self, background: bool):
        self.thread = ThreadPoolExecutor(1, "saving") if background else None
        self.pending: list[Future] = []
        self.undone: list[Callable[[], object]] = []
        self.failed: Exception | None = None

    def do(self, *jobs: Callable[[], object]) -> None:
        """Queue jobs. Raises the error of one that failed."""
        self.check()
        for job in jobs:
            if self.thread is None:
                self._in_turn(job)
            else:
                self.pending.append(self.thread.submit(self._in_turn, job))
        if self.thread is None:
            self.check()

    def check(self) -> None:
        """Raise the error of a job that failed since the last look; it is raised once."""
        self.pending = [job for job in self.pending if not job.done()]
        error, self.failed = self.failed, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Until all is done. Raises the error of a job that failed."""
        for job in self.pending:
            job.result()
        self.check()

    def retry(self) -> None:
        """Do what was left undone. Raises the error of a job that fails again."""
        for job in self.pending:
            job.result()
        undone, self.undone, self.failed = self.undone, [], None
        for job in undone:
            self._in_turn(job)
        self.check()

    def _in_turn(self, job: Callable[[], object]) -> None:
        if not self.undone:
            try:
                job()
                return
            except Exception as error:  # raised in the caller's thread, at its next look
                self.failed = error
        self.undone.append(job)


class Saver:
    """Saves for all kinds of parallelism: sharded ones write together and at once, else rank 0 writes behind the back."""

    def __init__(self, folder: RunFolder, model, parallel, world, enabled: bool, average=None):
        self.folder, self.model, self.parallel, self.world, self.config = folder, model, parallel, world, folder.config
        self.average = average
        self.enabled = enabled and (world.is_main or parallel.sharded)
        self.writes = enabled and world.is_main
        self.writer = Writer(self.config.async_save and self.writes)

    def snapshot(self, optimizer, position: Position) -> None:
        """All that going on from `position` needs: `last_state`, or with sharded parameters `last_shards_STEP`."""
        if not (self.enabled and self.config.save_training_state):
            return
        self.writer.wait()  # no more than one set of copies at a time
        if self.parallel.sharded:
            self._snapshot_in_shards(optimizer, position)
        else:
            copies = training_state(self.model, optimizer, self.average)
            save = partial(self.folder.save_last_state, self.model, optimizer, copy.copy(position), copies)
            self.writer.do(save, partial(self.folder.drop_snapshots, "last_state"))

    def epoch_done(self, optimizer, position: Position, alone: bool) -> None:
        """Save what an epoch left; `alone`: checkpoint_N suffices to go on from here."""
        if not self.enabled:
            return
        if self.folder.one_file:
            if self.writes:
                self._one_file(optimizer, copy.copy(position))
            return
        alone = alone and not self.average and not self.config.lora  # checkpoint_N holds an average, or merged weights, then
        unconsolidated = self.parallel.sharded and not self.config.consolidate
        if not alone or self.config.save_only_improve or unconsolidated:
            self.snapshot(optimizer, position)
        if not self.config.save_only_improve:
            self.checkpoint(position)
        if alone and not self.config.save_only_improve and not unconsolidated and self.writes:
            self.writer.do(self.folder.drop_snapshots)

    def _one_file(self, optimizer, position: Position) -> None:
        print("saving model.", flush=True)
        self.writer.wait()
        with self.average.in_place_of(self.model) if self.average else nullcontext():
            weights = self.weights()
        save = partial(self.folder.save_epoch, position, weights, training_state(self.model, optimizer, self.average))
        self.writer.do(save, partial(self.folder.tidy, self.config.keep), self.folder.drop_snapshots)

    def checkpoint(self, position: Position) -> None:
        """The weights as checkpoint_N (or, sharded and not to be consolidated, as sharded_N); then what `keep` is done with."""
        if not self.enabled:
            return
        if self.writes:
            print("saving model.", flush=True)
        position = copy.copy(position)
        if self.parallel.sharded and not self.config.consolidate:
            self.writer.wait()
            self._weights_in_shards(position)
        else:
            with self.average.in_place_of(self.model) if self.average else nullcontext():
                weights = self.weights()
            if self.writes:
                self.writer.do(partial(self.folder.save_checkpoint, self.model, position, weights))
        if self.writes:
            self.writer.do(partial(self.folder.tidy, self.config.keep))

    def catch_up(self, position: Position) -> None:
        """What a kill right behind a snapshot, or behind a checkpoint_N, left undone."""
        there = self.world.from_main(self.folder.has_weights(position.epoch) if self.world.is_main else None)
        if position.step == 0 and position.epoch and not there and not self.config.save_only_improve:
            self.checkpoint(position)
        elif self.writes:
            self.writer.do(partial(self.folder.tidy, self.config.keep))
        if self.writes:
            self.writer.do(partial(self.folder.drop_snapshots, self.folder.resumed_from))

    def best(self, epoch: int, accuracy: float, loss: float | None, **facts) -> None:
        """Note the best epoch (its index), once its file is written. `facts`: what else best.json says of it."""
        if self.writes:
            record = {"epoch": epoch, "accuracy": accuracy} | facts
            self.writer.do(partial(self.folder.note_best, record, loss, self.model))

    def weights(self) -> dict:
        """Copies of the whole weights on the CPU, under the names of a checkpoint file; on rank 0, empty elsewhere."""
        if self.parallel.sharded:
            from sharding import gathered_weights

            return gathered_weights(stored_model(self.model), self.world.is_main)
        return stored_weights(self.model) if self.world.is_main else {}

    def wait(self) -> None:
        """Until all that was asked for is written. Raises NoRoom where the disk refused."""
        self.writer.wait()

    def close(self) -> None:
        """Let what was asked for be written, whatever else has gone wrong; say so where that fails."""
        try:
            self.wait()
        except ValueError as error:
            print(f"Warning: {error}", flush=True)

    def last_words(self, optimizer, position: Position) -> bool:
        """Once a write has failed: do what it left undone, and save the position if that works. Returns whether it did."""
        try:
            self.writer.retry()
            if self.parallel.sharded:  # which takes all ranks, and only one may be here
                return False
            self.snapshot(optimizer, position)
            self.wait()
        except ValueError:
            return False
        return self.enabled and self.config.save_training_state

    # ------------------------------------------------------------ sharded

    def _snapshot_in_shards(self, optimizer, position: Position) -> None:
        from sharding import optimizer_tensors, save_shards, unique_tensors

        tensors, tied = unique_tensors(stored_model(self.model))
        tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(self.model, optimizer).items()}
        facts = {"position": vars(position), "tied": tied}
        path = self.folder.path / f"last_shards_{position.global_step}"
        save_shards(path, tensors, facts, self.world)
        if self.writes:
            self.folder.drop_snapshots(path.name)

    def _weights_in_shards(self, position: Position) -> None:
        from sharding import save_shards, unique_tensors

        tensors, tied = unique_tensors(stored_model(self.model))
        if self.writes:
            self.folder.describe(self.model, position, tensors)
        save_shards(self.folder.path / f"sharded_{position.epoch}", tensors, {"tied": tied}, self.world)


def disk_need(config, model, epochs_left: int) -> tuple[int, int]:
    """(bytes that a run's checkpoints will take, bytes of its snapshot and of one file being written beside them)."""
    module = stored_model(model)
    tensors = module.state_dict(keep_vars=True)
    stored = {id(t): t.numel() * t.element_size() for name, t in tensors.items() if not OWN.search(name)}
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    one = sum(stored.values())
    word, n = (config.keep.split() + ["1"])[:2]
    saves = epochs_left
    kept = {"all": saves, "best": 2, "last": int(n) + 1, "every": saves // int(n) + 2}[word]
    moments = {"sgd": 1, "mugrokfast": 3}.get(config.optimizer, 2)
    weights = trained if has_adapters(module) else one * (1 + bool(config.weight_ema))
    snapshot = weights + moments * trained if config.save_training_state else 0
    return min(kept, saves) * one, 2 * snapshot


def announce_disk_need(config, model, epochs_left: int, folder) -> None:
    """Print what the run will write and what is free, before it starts; a warning where it will not fit."""
    checkpoints, rest = disk_need(config, model, epochs_left)
    free = shutil.disk_usage(folder).free
    print(f"Disk: {checkpoints / 1e9:.2f} GB of checkpoints (keep: {config.keep}) and {rest / 1e9:.2f} GB to resume from; "
          f"{free / 1e9:.2f} GB free in {folder}", flush=True)  # fmt: skip
    if checkpoints + rest > free:
        print("Warning: this will not fit; set keep: last 2 (or best), or save_path to a larger disk", flush=True)
