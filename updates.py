"""What the updates of an epoch report: counted, checked, shown and logged, without waiting for the device at each of them."""

import math
import shlex
import zlib

import numpy as np
import torch

from accounting import Throughput
from batches import dealt
from checkpoint import save_whole
from compiled import PREFIX_MULTIPLE
from dataset import StageDataset, padded_layout
from reporting import Progress
from run_folder import Position
from utils import micro_seed


class Updates:
    """What the updates of one epoch report: held on the device until `flush`, then counted, checked, shown and logged."""

    def __init__(
        self, run, rows, position: Position, stage: int, n_latents: int, n_batches: int, per_update: int, earlier: int
    ):
        self.run, self.rows, self.position, self.stage, self.n_latents = run, rows, position, stage, n_latents
        self.n_batches, self.per_update, self.n_updates = n_batches, per_update, math.ceil(n_batches / per_update)
        self.earlier = earlier  # updates of the epochs before
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
            run.alarms.update(self.earlier + step, mean_loss, grad_norm)
            position.count(loss_sum, sum(tokens))
            self.bar.update(step, min((step + 1) * self.per_update, self.n_batches) - 1, mean_loss)
            run.metrics.log(
                event="step", epoch=epoch, stage=self.stage, lr=rate, rows=f"{zlib.crc32(np.concatenate(group).tobytes()):08x}",
                **{"train/epoch": epoch + 1, "train/step": self.earlier + step,
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
    """Save this rank's micro-batches, and the weights, and raise FloatingPointError; nothing has moved since that update."""
    world, path = run.world, run.folder.path / f"nonfinite_batch_rank{run.world.rank}"
    command = f"python -m analysis.replay {shlex.quote(str(path))}"
    numbers = dealt(group, rows.lengths(), world)
    batches = [rows.batch(group[i], run.tokenizer.pad_token_id) for i in numbers]
    seeds = [micro_seed(run.config.seed, epoch, step * run.micro_batches_per_update + i) for i in numbers]
    save_whole({"epoch": epoch, "step": step, "batches": batches, "seeds": seeds}, path)
    weights = run.saver.weights()
    if world.is_main:
        save_whole(weights, run.folder.path / "nonfinite_weights")
    raise FloatingPointError(
        f"loss {loss} or gradient norm {grad_norm} is not finite at epoch {epoch}, update {step}; no step was taken, "
        f"the batch is in {path}: lower lr, set gradient_clip, or look at it with {command}"
    )
