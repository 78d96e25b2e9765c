"""How a run ends early with nothing lost: signals, and the exit codes that tell a scheduler what to do.

with StopSignals() as stop:           # SIGTERM, SIGUSR1 (SLURM's warning), SIGINT: raise Stopped ...
    with stop.deferred():             # ... but in here only take note
        while not stop.asked: ...
"""

import signal
import threading
from contextlib import contextmanager

DONE, NOT_FINITE, MISTAKE = 0, 1, 2
REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: what was reached is saved, and the same command goes on from there
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))


class Stopped(Exception):
    """The run was asked to end, and what it has reached is saved."""


class StopSignals:
    """Turns the signals that ask a process to end into `Stopped`, at once or, while deferred, when the caller looks.

    A second SIGINT (Ctrl-C) is never deferred. Outside the main thread nothing is installed.
    """

    def __init__(self):
        self.name: str | None = None
        self._deferred = False
        self._before: dict = {}

    @property
    def asked(self) -> bool:
        return self.name is not None

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take_note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take_note(self, number: int, _frame) -> None:
        again, self.name = self.asked, signal.Signals(number).name
        if not self._deferred or (again and number == signal.SIGINT):
            raise Stopped(f"stopped by {self.name}")

    @contextmanager
    def deferred(self):
        """Only take note of signals in here."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
