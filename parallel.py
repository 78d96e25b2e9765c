"""How processes train one model together: one alone, DDP, or FSDP2 (in sharding.py).

    parallel = make_parallel(model, world, config)
    for micro in range(n):
        with parallel.accumulating(last=micro == n - 1):
            (parallel.wrapped(**batch).loss * weight).backward()
    parallel.reduce_gradients()
    with parallel.whole():            # every parameter there, no collective until the end: ranks may do different work
        evaluate(...)

Ranks have batches with different numbers of thoughts, hence of passes: nothing in an update may depend on these.
"""

from contextlib import nullcontext

from torch.nn.parallel import DistributedDataParallel


class Alone:
    """One process."""

    sharded = False

    def __init__(self, model, world, config):
        self.model = self.wrapped = model

    def accumulating(self, last: bool):
        """The context of one micro-batch's forward and backward pass."""
        return nullcontext()

    def reduce_gradients(self) -> None:
        """After the last micro-batch: every rank gets the mean over ranks of the gradients."""

    def whole(self):
        """A context without collectives, in which ranks may run the model as they like."""
        return nullcontext()


class Ddp(Alone):
    """A whole model in every process; gradients are averaged as the last backward pass of an update goes on."""

    def __init__(self, model, world, config):
        super().__init__(model, world, config)
        devices = [world.device.index] if world.device.type == "cuda" else None
        # Buffers follow from what all ranks have seen; gradients live in the buckets that are reduced.
        options = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
        self.wrapped = DistributedDataParallel(model, devices, **options)

    def accumulating(self, last: bool):
        return nullcontext() if last else self.wrapped.no_sync()


def make_parallel(model, world, config):
    """Shard or replicate the model (on the CPU or its device) as the config says, and put it on the device."""
    if config.parallel == "fsdp2" and not config.only_eval:
        from sharding import Fsdp2  # takes most of a second to import

        return Fsdp2(model, world, config)
    return (Ddp if world.size > 1 and not config.only_eval else Alone)(model, world, config)
