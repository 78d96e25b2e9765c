"""Clocks and the form of a result: works timed in turn in one process, the median of their per-round ratios, the spread.

    taken = alternate({"ours": step, "plain": other_step}, rounds=15, device=device)
    result("P1", "GPT-2 124M", batch_size=4, **ratio(taken, "ours", "plain"))

Two works that take turns see the same machine, whatever else it does; so only their ratios are compared, never their seconds
in two processes.
"""

import datetime
import platform
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import torch
import transformers
from scipy.stats import quantile_test

ROUNDS = 7  # fewer do not make a median


class TimeIsUp(BaseException):
    """Raised in the main thread when a budget is spent; not an Exception, so that what handles errors lets it pass."""


class Budget:
    """Seconds that a command may take, from now on."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    @contextmanager
    def enforced(self, grace: float = 0.0):
        """Raise `TimeIsUp` in what is inside, `grace` seconds after the end. Not on Windows."""

        def stop(*_):
            raise TimeIsUp

        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, max(self.left + grace, 0.001))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long `work()` takes, what it asks of the device included."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def alternate(
    works: dict[str, Callable[[int], object]],
    rounds: int,
    device: torch.device,
    warm_up: int = 1,
    at_most: float | None = None,
) -> dict[str, list[float]]:
    """Seconds of every work in every round; they take turns, and each begins equally often.

    Args:
        works: callables that get the number of the round, 0 and up.
        warm_up: rounds before them that do not count, with the same numbers.
        at_most: seconds after which no further round is begun, once there are `ROUNDS`.
    """
    for i in range(warm_up):
        for work in works.values():
            work(i)
    names, taken, budget = list(works), {name: [] for name in works}, Budget(at_most or float("inf"))
    for i in range(rounds):
        if i >= ROUNDS and budget.left <= 0:
            break
        first = i % len(names)
        for name in names[first:] + names[:first]:
            taken[name].append(seconds(lambda: works[name](i), device))  # noqa: B023
    return taken


# ---------------------------------------------------------------- results


def spread(values: Sequence[float]) -> dict:
    """Median, smallest, largest and number of some values, under the keys of a result.

    From seven values on also `ci95`, the 95 % interval of the median by order statistics.
    """
    found = {"value": statistics.median(values), "min": min(values), "max": max(values), "rounds": len(values)}
    if len(values) < ROUNDS:
        return found
    interval = quantile_test(values, p=0.5).confidence_interval(0.95)
    return found | {"ci95": [float(interval.low), float(interval.high)]}


def ratio(taken: dict[str, list[float]], first: str, second: str, scale: float = 1.0) -> dict:
    """The ratios first / second of each round, times `scale`, and the median seconds of both."""
    ratios = [scale * a / b for a, b in zip(taken[first], taken[second])]
    return spread(ratios) | {"seconds": {name: statistics.median(taken[name]) for name in (first, second)}}


def result(measure: str, shape: str, value: float, unit: str = "", **more) -> dict:
    """One row of a table: what was measured, on what, the value in `unit`, and what else is known of it.

    Known keys of `more`: batch_size, min, max, rounds, floor, note; others stay in the JSON.
    """
    return {"measure": measure, "shape": shape, "value": float(value), "unit": unit} | more


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"


def about(command: str, device: torch.device, **more: str) -> dict[str, str]:
    """What a reader must know of the place where results were measured."""
    return {
        "command": command.strip(),
        "date": datetime.date.today().isoformat(),
        "device": device_name(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        **more,
    }
