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


def exit_code(error: ChildFailedError) -> int:
    """That of the process which failed first, for it makes the others fail; 75 where a signal killed it."""
    _, first = error.get_first_failure()
    return REQUEUE if first.exitcode < 0 else first.exitcode


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(__doc__)
    try:
        main(sys.argv[1:])
    except ChildFailedError as error:
        sys.exit(exit_code(error))
    except SignalException as error:
        print(f"interrupted: {error}", file=sys.stderr)
        sys.exit(REQUEUE)
