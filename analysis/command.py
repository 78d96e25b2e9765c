"""The frame of a command line: --help from the docstring of its module, a mistake as one line and an exit code.

@command
def main(argv=None) -> int:
    parser = parser_of(__doc__)
    ...
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable

from stopping import MISTAKE, REQUEUE, Stopped


class CheckFailed(Exception):
    """A checkpoint or an instrument is not what it should be: no result may be written."""

    exit_code = 1


def parser_of(doc: str, prog: str | None = None) -> argparse.ArgumentParser:
    """A parser that shows a docstring as it stands."""
    return argparse.ArgumentParser(prog=prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """A `main` that ends with a line on stderr where it raises.

    Exit code 2 for a mistake (ValueError, OSError), 1 for a failed check, 75 where a signal stopped what can go on.
    """

    @functools.wraps(main)
    def guarded(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except Stopped as stopped:
            print(f"{stopped}; the same command goes on from there", file=sys.stderr)
            return REQUEUE
        except (ValueError, OSError, CheckFailed) as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return getattr(error, "exit_code", MISTAKE)

    return guarded


def seed_list(said: str) -> list[int]:
    """`0,1` as numbers. ValueError for anything else."""
    try:
        return [int(seed) for seed in said.split(",")]
    except ValueError:
        raise ValueError(f"--seeds {said}: must be whole numbers by comma, as 0,1") from None
