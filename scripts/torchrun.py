"""torchrun whose exit code is the run's own, for schedulers and scripts that act on it.

    python scripts/torchrun.py --nproc_per_node=4 run.py args/prosqa_coconut.yaml      # the arguments of torchrun

torchrun itself ends with 1 whatever happened. Here: the exit code of the run (see `python run.py --help`), and 75, start the
same command again, where a signal or a dead process ended it.
"""

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

REQUEUE = 75


def exit_code(failures: list[int]) -> int:
    """One code for several processes: 75 where one was killed or says so, else the first one's."""
    return REQUEUE if any(code < 0 or code == REQUEUE for code in failures) else failures[0]


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(__doc__)
    try:
        main(sys.argv[1:])
    except ChildFailedError as error:
        sys.exit(exit_code([failure.exitcode for failure in error.failures.values()]))
    except SignalException as error:
        print(f"interrupted: {error}", file=sys.stderr)
        sys.exit(REQUEUE)
