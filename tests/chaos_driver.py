"""The process under test: run.py with a fault built in, as a process of its own.

    python tests/chaos_driver.py '{"die_at_rename": [3, "before"]}' config.yaml key=value

The faults are JSON, {name of a function here: its arguments}. Nothing of the run itself is replaced: the functions wrap what
the operating system, the clock or the model's forward does and call it.
"""

import json
import os
import signal
import sys
import threading
import time
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tqdm import tqdm  # noqa: E402

import run  # noqa: E402  (chaos_scene's fork server imports this once, for all the processes that it starts)
from coconut import Coconut  # noqa: E402

tqdm.set_lock(threading.RLock())  # its lock between processes would be missed when one of them is killed


def die_at_rename(n: int, when: str, folder: str) -> None:
    """SIGKILL this process right before or right after it renames to, or removes, the n-th file (from 1) under a folder.

    Temporary files count only where they are renamed away; entries removed by a tree's walk (`dir_fd`) count as well.
    """
    seen = [0]

    def counted(original, takes_target: bool):
        def wrapper(*args, **kwargs):
            name = str(args[1] if takes_target else args[0])
            inside = "dir_fd" in kwargs or name.startswith(folder)
            if not inside or Path(name).name.startswith(".tmp-"):
                return original(*args, **kwargs)
            seen[0] += 1
            if seen[0] == n and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if seen[0] == n and when == "after":
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapper

    for name, takes_target in {"replace": True, "rename": True, "unlink": False, "rmdir": False}.items():
        setattr(os, name, counted(getattr(os, name), takes_target))


def jump_clock(n: int, seconds: float) -> None:
    """From the n-th training forward on (from 1), the wall clock is `seconds` off."""
    original, calls = time.time, _training_calls()
    time.time = lambda: original() + (seconds if calls[0] >= n else 0.0)


def poison(n: int) -> None:
    """The loss of the n-th training forward (from 1) is not a number."""
    calls = _training_calls()
    forward = Coconut.forward

    def poisoned(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        return out._replace(loss=out.loss * float("nan")) if self.training and calls[0] == n else out

    Coconut.forward = poisoned


def limit_files(n: int) -> None:
    """No file can grow beyond n bytes, as on a disk that is full."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))


def _training_calls() -> list[int]:
    """A counter, in a list, of the model's forward calls in training mode."""
    calls, forward = [0], Coconut.forward

    def counting(self, *args, **kwargs):
        calls[0] += self.training
        return forward(self, *args, **kwargs)

    Coconut.forward = counting
    return calls


FAULTS = {f.__name__: f for f in (die_at_rename, jump_clock, poison, limit_files)}


def work(entry: str, argv: list[str], environment: dict[str, str], faults: dict[str, list], output: str) -> None:
    """In a process of its own: `main` of a module with an environment and faults, its output appended to a file."""
    os.environ.clear()
    os.environ.update(environment)
    with open(output, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    for name, arguments in faults.items():
        FAULTS[name](*arguments)
    code = import_module(entry).main(argv)
    sys.stdout.flush()
    sys.exit(code)


if __name__ == "__main__":
    for fault, its_arguments in json.loads(sys.argv[1]).items():
        FAULTS[fault](*its_arguments)
    sys.exit(run.main(sys.argv[2:]))
