"""How fast experiments are: answers under interventions in large batches against one sample at a time, and each one's seconds.

    python -m benchmarks.experiments --checkpoint runs/study-quickstart/m3_coconut [--data_dir DIR] [--num_samples 500]

The ratio is taken side by side in one process: the same corruption conditions of the same rows, in one call of all, and row
by row and condition by condition. Then all experiments of `analysis.measure` run on the checkpoint, in a folder that is thrown
away. Writes benchmarks/experiments_<device>.json and .md; seconds of different machines are not comparable.
"""

import argparse
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import torch

from analysis.experiment import Task
from analysis.interventions import NOWHERE, Patch, gaussian
from analysis.measure import EXPERIMENTS, experiment, flags
from analysis.subject import Subject

from . import table
from .timing import about, alternate, ratio, result

ROUNDS = 7


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.experiments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="run folder or file of a model with thoughts")
    parser.add_argument("--data_dir", type=Path, help="as the experiments' own")
    parser.add_argument("--num_samples", type=int, default=500, help="rows of each experiment (default: 500)")
    parser.add_argument("--rows", type=int, default=16, help="rows that the ratio is taken on (default: 16)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="folder of the results (default: benchmarks)")
    args = parser.parse_args(argv)
    try:
        subject = Subject.load(args.checkpoint)
        if not subject.n_thoughts:
            raise ValueError(f"{args.checkpoint} is {subject.label}, a model without thoughts; give m3, m4, m4b or m5")
        results = [batched_against_single(subject, args), *each_experiment(subject, args)]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    command = "python -m benchmarks.experiments " + " ".join(sys.argv[1:] if argv is None else argv)
    shape = f"{subject.label}, {subject.n_layers} layers x {subject.width}, {subject.n_thoughts} thoughts"
    described = about(command, subject.device, model=shape)
    table.write(args.out, f"experiments_{subject.device.type}", described, results, "experiments")
    print(table.as_markdown(described, results, "experiments"))
    return 0


def batched_against_single(subject: Subject, args: Namespace) -> dict:
    """Seconds of one sample at a time over seconds of one batch, for single-slot noise of every slot and none."""
    task = Task(
        experiment("corruption"), Namespace(data=None, num_samples=args.rows, seed=0, data_dir=args.data_dir), subject, Path()
    )
    prompts, alone = subject.prompts(task.problems), Subject(**vars(subject) | {"batch_size": 1})
    n_slots = subject.n_thoughts
    many = prompts.times(n_slots + 1)
    where = torch.full((len(many), n_slots), NOWHERE)
    for k in range(n_slots):
        where[k + 1 :: n_slots + 1, k] = many.slots[k + 1 :: n_slots + 1, k]
    noise = gaussian(0, many.numbers, n_slots, subject.width)

    def batched(_) -> None:
        subject.answers(many, Patch(0, where, noise))

    def single(_) -> None:
        for p in range(len(many)):
            alone.answers(many.take([p]), Patch(0, where[p : p + 1], noise[p : p + 1]))

    taken = alternate({"single": single, "batched": batched}, ROUNDS, subject.device)
    note = f"{len(prompts)} rows x {n_slots + 1} conditions, one at a time / together"
    return result(
        "answers under interventions",
        subject.label,
        batch_size=subject.batch_size,
        note=note,
        **ratio(taken, "single", "batched"),
    )


def each_experiment(subject: Subject, args: Namespace) -> list[dict]:
    """Seconds of every experiment that is defined for the model, and of all."""
    results, total = [], 0.0
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        shared = flags({"data_dir": args.data_dir, "num_samples": args.num_samples, "output_dir": folder})
        for name in EXPERIMENTS:
            if subject.key not in experiment(name).models:
                continue
            started, accept = time.perf_counter(), ["--accept", "timed alone"] if name == "causal_tracing" else []
            if experiment(name).main(["--checkpoint", str(args.checkpoint), *shared, *accept]):
                raise ValueError(f"{name} did not finish")
            seconds = time.perf_counter() - started
            total += seconds
            results.append(result(name, subject.label, seconds, "s", note=f"n = {args.num_samples}"))
    return [
        *results,
        result("all experiments", subject.label, total, "s", note=f"n = {args.num_samples}, self-checks included"),
    ]


if __name__ == "__main__":
    sys.exit(main())
