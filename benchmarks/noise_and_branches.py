"""How much time sharing saves: a noise sweep against one sample at a time, and several branches against one.

    python -m benchmarks.noise_and_branches --checkpoint runs/quickstart/m3_coconut

noise sweep   one question and one scale at a time, from the start / all questions at all scales on shared prefixes
branches      K = 5 branches of every question / one

Both sides of each ratio take turns in one process. The slow side of the sweep answers a part of the questions, whose seconds
are counted so many times. Writes benchmarks/noise/cost_<device>.json and .md.
"""

import argparse
import sys
from pathlib import Path

from analysis.branching_cost import branch_works
from analysis.noise_answers import Answering
from analysis.noise_asker import Asker, trained
from analysis.noise_operators import Noise

from . import table
from .timing import about, alternate, ratio, result

SCALES = (0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 50.0)
BRANCHES = 5


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.noise_and_branches",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="run folder or file of a model with thoughts")
    parser.add_argument("--data", type=Path, help="questions (default: the checkpoint's test file)")
    parser.add_argument("--num-questions", type=int, default=500, help="default: 500")
    parser.add_argument("--slow-questions", type=int, default=25, help="of these, answered one at a time (default: 25)")
    parser.add_argument("--rounds", type=int, default=7, help="default: 7")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/noise"), help="default: benchmarks/noise")
    args = parser.parse_args(argv)
    try:
        asker = trained(args.checkpoint, data=args.data, num_questions=args.num_questions)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    device = asker.model.embedding.weight.device
    results = [sweep(asker, args.slow_questions, args.rounds), branches(asker, args.rounds)]
    command = "python -m benchmarks.noise_and_branches " + " ".join(sys.argv[1:] if argv is None else argv)
    described = about(command, device, model=asker.name)
    args.out.mkdir(parents=True, exist_ok=True)
    table.write(args.out, f"cost_{device.type}", described, results, "cpu")
    print(table.as_markdown(described, results, "cpu"))
    return 0


def sweep(asker: Asker, n_slow: int, rounds: int) -> dict:
    """Samples a second of the sweep over those one at a time, on all scales."""
    device, tokens, ids = asker.model.embedding.weight.device, asker.tokens(), [q.id for q in asker.questions]

    def answering(n: int, **options):
        run = Answering(asker.model, asker.tokenizer, Noise(), SCALES, asker.max_new_tokens, asker.batch_size, **options)
        return lambda number: list(run.run(tokens[:n], ids[:n]))

    n_slow = min(n_slow, len(tokens))
    works = {"one at a time": answering(n_slow, one_at_a_time=True), "sweep": answering(len(tokens))}
    taken = alternate(works, rounds, device)
    note = f"{len(tokens)} questions x {len(SCALES)} scales; one at a time: {n_slow} of the questions"
    found = ratio(taken, "one at a time", "sweep", scale=len(tokens) / n_slow)
    return result("noise sweep", asker.name, batch_size=asker.batch_size, note=note, **found)


def branches(asker: Asker, rounds: int) -> dict:
    """The seconds of K branches over those of one."""
    works = branch_works(asker, (1, BRANCHES))
    taken = alternate(works, rounds, asker.model.embedding.weight.device)
    note = f"{len(asker.questions)} questions, 16 at a time, {BRANCHES} branches / 1"
    return result("branches", asker.name, note=note, **ratio(taken, f"K = {BRANCHES}", "K = 1"))


if __name__ == "__main__":
    sys.exit(main())
