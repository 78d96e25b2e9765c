"""Which rows meet in a batch, in which order, and making the batches ahead of their use.

lengths = rows.lengths()  # of a dataset.StageDataset
order = epoch_batches(len(rows), 32, seed=0, epoch=3, lengths=lengths)
for batch in prefetched(lambda numbers: rows.batch(numbers, pad_id), order):
    ...
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dataset import Lengths, StageDataset, padded_layout
from tokens import TokenTable
from utils import micro_seed

MOST_PADDING = 0.05
SMALL_WINDOW = 50  # batches
WINDOW_ROWS, MAX_WINDOWS = 8192, 4
STRIP_BATCHES = (1, 3, 9, 27, 81)
MASK_COST = 0.02  # a batch with left padding, whose attention needs a mask, counts as this much wider


def epoch_batches(n_rows: int, batch_size: int, seed: int, epoch: int, lengths: Lengths | None = None) -> list[np.ndarray]:
    """The batches of one epoch as row numbers: each row once, in an order fixed by (seed, epoch) and the lengths.

    Without `lengths` a plain shuffle. With them (group_by_length) rows of like length meet, no more than it takes to pad at
    most 5 %: a batch of equal lengths is a batch of like problems, and updates of one such batch learn worse from them (see
    benchmarks/LOG.md). Tried in turn, on the shuffled rows:

    1. windows of 50 batches, each sorted by prefix: what follows the question stays mixed;
    2. windows as large as possible, sorted by prefix: up to 4 of 8,192 rows or more, since one window of a large file
       would form nearly the same batches every epoch;
    3. the same windows, grouped by prefix and rest (`_bucketed`).

    The batches are shuffled. The one smaller batch is last.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(n_rows)
    if lengths is None or n_rows < batch_size:
        return [order[i : i + batch_size] for i in range(0, n_rows, batch_size)]
    # First latents share a column, so prefix and rest add up to a batch's width; without latents only the total counts.
    prefix = np.where(lengths.latents > 0, lengths.prefix, 0)
    rest = lengths.total - prefix
    by_length = order[np.lexsort((rest[order], prefix[order]))]
    first = rng.integers(n_rows // batch_size + 1) * batch_size  # the smaller batch is of some length, too
    smaller = by_length[first : first + n_rows % batch_size]
    whole = order[np.isin(order, smaller, invert=True)].reshape(-1, batch_size)
    small = np.split(whole, range(SMALL_WINDOW, len(whole), SMALL_WINDOW))
    large = np.array_split(whole, max(1, min(n_rows // WINDOW_ROWS, MAX_WINDOWS)))

    def sorted_by_prefix(rows):
        return rows[np.argsort(lengths.prefix[rows], kind="stable")].reshape(-1, batch_size)

    def bucketed(rows):
        return _bucketed(rows, prefix, rest, batch_size)

    for windows, cut in ((small, sorted_by_prefix), (large, sorted_by_prefix), (large, bucketed)):
        batches = np.concatenate([cut(window.ravel()) for window in windows])
        widths = prefix[batches].max(1) + rest[batches].max(1)
        if lengths.total[batches].sum() >= (1 - MOST_PADDING) * widths.sum() * batch_size:
            break
    return [*rng.permutation(batches), *([smaller] if len(smaller) else [])]


def numbers_of_epoch(config, table: TokenTable, epoch: int) -> np.ndarray:
    """The rows of an epoch: all; with `level_epochs` [a, b, ..] only those of level 0 up to epoch a, of 0 and 1 up to b, ..."""
    if not config.level_epochs:
        return np.arange(len(table))
    reached = sum(epoch >= last for last in config.level_epochs)
    numbers = np.flatnonzero(table.level <= reached)
    if not len(numbers):
        raise ValueError(f"level_epochs: {config.train_path} has no row of level {reached} or below, for epoch {epoch + 1}")
    return numbers


def batches_of_epoch(rows: StageDataset, per_update: int) -> list[np.ndarray]:
    """The row numbers of the batches of the epoch that `rows` are for, `per_update` of them an update.

    With `steps_per_epoch` as many passes over the rows as it takes, or a part of one.
    """
    config, numbers = rows.configs, numbers_of_epoch(rows.configs, rows.table, rows.epoch)
    lengths = rows.lengths(numbers) if config.group_by_length else None
    most = config.steps_per_epoch and config.steps_per_epoch * per_update
    batches: list[np.ndarray] = []
    while not batches or (most and len(batches) < most):
        seed = config.seed if not batches else micro_seed(config.seed, rows.epoch, len(batches))
        of_pass = epoch_batches(len(numbers), config.batch_size_training, seed, rows.epoch, lengths)
        batches += [numbers[batch] for batch in of_pass]
    return batches[:most]


def updates_of_epoch(config, table: TokenTable, epoch: int, per_update: int) -> int:
    """How many updates an epoch has."""
    if config.steps_per_epoch:
        return config.steps_per_epoch
    batches = math.ceil(len(numbers_of_epoch(config, table, epoch)) / config.batch_size_training)
    return math.ceil(batches / per_update)


def _bucketed(rows: np.ndarray, prefix: np.ndarray, rest: np.ndarray, batch_size: int) -> np.ndarray:
    """Rows of a window, in random order, as batches [n, batch_size]: the cheapest of a few ways to cut them.

    Rows are sorted by prefix, cut into strips of a few batches, and each strip is sorted by the rest: with narrow strips
    the prefixes of a batch are alike, with wide ones the rests. Each width is tried on all rows, and on those that are left
    when as many batches as possible are filled with rows of one prefix. These need no left padding and no mask.
    """
    rows = rows[np.argsort(prefix[rows], kind="stable")]
    _, first, count = np.unique(prefix[rows], return_index=True, return_counts=True)
    fills = np.arange(len(rows)) - np.repeat(first, count) < np.repeat(count // batch_size * batch_size, count)
    alone, mixed = rows[fills], rows[~fills]
    alone = alone[np.lexsort((rest[alone], prefix[alone]))]

    def strips(rows, n_batches):
        return rows[np.lexsort((rest[rows], np.arange(len(rows)) // (n_batches * batch_size)))]

    def cost(batches):
        prefixes, rests = prefix[batches], rest[batches]
        masked = prefixes.min(1) < prefixes.max(1)
        return ((prefixes.max(1) + rests.max(1)) * (1 + MASK_COST * masked)).sum()

    ways = [strips(rows, n) for n in STRIP_BATCHES]
    ways += [np.concatenate([alone, strips(mixed, n)]) for n in STRIP_BATCHES]
    return min((way.reshape(-1, batch_size) for way in ways), key=cost)


def padding_share(lengths: Lengths, batches: Iterable[np.ndarray], prefix_multiple: int = 1) -> float:
    """The share of positions in these batches that hold no token of a row, 0 to 1; of an epoch or of any part."""
    real = columns = 0
    for rows in batches:
        _, width = padded_layout(lengths.of(rows), multiple=prefix_multiple)
        real, columns = real + int(lengths.total[rows].sum()), columns + len(rows) * width
    return 1 - real / columns


def dealt(group: list, lengths: Lengths, world) -> list[int]:
    """Which of an update's micro-batches this process computes, as places in `group`, ascending.

    The widest are dealt first, to and fro, so that no process waits long for another.
    """
    width = [int(lengths.total[batch].max()) * len(batch) for batch in group]
    order = sorted(range(len(group)), key=lambda i: -width[i])
    turns = [order[i : i + world.size] for i in range(0, len(order), world.size)]
    seats = (world.rank if n % 2 == 0 else world.size - 1 - world.rank for n in range(len(turns)))
    return sorted(turn[seat] for turn, seat in zip(turns, seats) if seat < len(turn))


def micro_batches(groups: list, steps: range, lengths: Lengths, world):
    """The rows of every micro-batch of this process over `steps`, in turn; a rank with none left repeats the first."""
    for step in steps:
        group = groups[step]
        places = dealt(group, lengths, world)
        for micro in range(math.ceil(len(group) / world.size)):
            yield group[places[micro]] if micro < len(places) else group[0]


def prefetched(make: Callable, items: Iterable, depth: int = 4) -> Iterator:
    """make(item) of each item in order, made by one background thread while the caller works, up to `depth` ahead.

    An error in `make` is raised in the place of its result. Closing the generator (a `break` out of the loop over it does)
    drops what is not begun and waits for what is.
    """
    thread, pending = ThreadPoolExecutor(1, "prefetched"), deque()
    try:
        for item in items:
            pending.append(thread.submit(make, item))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)
