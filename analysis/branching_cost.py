"""What K branches cost: works to be timed in turn, with the same questions, batches of questions, and grid cell.

works = branch_works(asker, (1, 5), batch_size=16)
taken = alternate(works, rounds=7, device=device)          # benchmarks/timing.py
result("branches", shape, **ratio(taken, "K = 5", "K = 1"))

python -m analysis.branching_cost --checkpoint runs/quickstart/m3_coconut       # the ratio, taken side by side
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as `python analysis/branching_cost.py`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from analysis.branching_rollout import Branching, Cell  # noqa: E402
from analysis.command import command, parser_of  # noqa: E402
from analysis.noise_asker import Asker, trained  # noqa: E402
from analysis.noise_operators import Noise  # noqa: E402

CELL = Cell(scale=0.5, temperature=0.7)


def branch_works(asker: Asker, numbers: Sequence[int] = (1, 5), batch_size: int = 16) -> dict[str, Callable[[int], object]]:
    """{"K = 1": work, ...}: each answers all of the asker's questions by that many branches; `batch_size` counts questions."""
    tokens, ids = asker.tokens(), [question.id for question in asker.questions]

    def work(k: int) -> Callable[[int], object]:
        branching = Branching(asker.model, k, Noise(schedule="none"), asker.max_new_tokens, batch_size=batch_size)
        return lambda number: list(branching.run(tokens, ids, [CELL]))

    return {f"K = {k}": work(k) for k in numbers}


@command
def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__, "python -m analysis.branching_cost")
    parser.add_argument("--checkpoint", type=Path, required=True, help="run folder or file of a model with thoughts")
    parser.add_argument("--data", type=Path, help="questions (default: the checkpoint's test file)")
    parser.add_argument("--num-questions", type=int, default=64, help="default: 64")
    parser.add_argument("--num-branches", type=int, default=5, help="default: 5")
    parser.add_argument("--batch-size", type=int, default=16, help="questions at a time (default: 16)")
    parser.add_argument("--rounds", type=int, default=7, help="default: 7")
    args = parser.parse_args(argv)
    asker = trained(args.checkpoint, data=args.data, num_questions=args.num_questions)
    works = branch_works(asker, (1, args.num_branches), args.batch_size)
    ratios = []
    for number in range(-1, args.rounds):  # the first round warms up
        seconds = []
        for work in works.values():
            started = time.perf_counter()
            work(number)
            seconds.append(time.perf_counter() - started)
        ratios += [seconds[1] / seconds[0]] if number >= 0 else []
    low, high = min(ratios), max(ratios)
    n_tokens = statistics.mean(len(x) for x in asker.tokens())
    print(f"K = {args.num_branches} against K = 1: {statistics.median(ratios):.2f} times ({low:.2f} .. {high:.2f}), "
          f"prompts of {n_tokens:.0f} tokens on average, {args.batch_size} at a time")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
