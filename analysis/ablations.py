"""Ablations of thoughts: trainings with several `c_thought` and `uniform_prob`, tested with each number of thoughts forced.

    bash scripts/ablations.sh [--quick] [--full] [--processes N] [--dry-run]
    python -m analysis.ablations args/ablations.yaml --analyse-only          # tables again, from the scores on disk

Without a flag: args/ablations.yaml, a tiny GPT-2 from scratch on two-chain ProsQA, within an hour on two cores; --full:
args/ablations_full.yaml, GPT-2 on GSM8K and ProsQA. What is done is skipped, what was cut is resumed: start the same command
again. Below <results>/<name>: scores/, logs/, ablations.json, ablations.md, ablations.svg and .png. Exit code: 0 done, 1 a
training failed, 2 a mistake in the command or a config, 75 interrupted.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as `python analysis/ablations.py`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from analysis.ablation_plan import Plan, load_ablations  # noqa: E402
from analysis.ablation_report import gathered, is_scored, score, text, write  # noqa: E402
from analysis.command import command, parser_of  # noqa: E402
from analysis.jobs import run_jobs  # noqa: E402
from analysis.tables import table  # noqa: E402
from stopping import StopSignals  # noqa: E402

TINY, FULL = Path("args/ablations.yaml"), Path("args/ablations_full.yaml")


def plan_text(plan: Plan, processes: int) -> str:
    """What is done and what is left."""
    rows = []
    for point in plan.points:
        state = "done" if point.done() else "to resume" if point.folder.is_dir() else "to do"
        rows.append([point.label, point.overrides and f"{plan.config.sweeps[point.sweep].key}={point.value}", state])
    left = [point for point in plan.points if not point.done()]
    minutes = sum(point.minutes for point in left) / processes
    about = f", about {minutes:.0f} minutes with {processes} at a time" if minutes and not plan.quick else ""
    last = f"{len(plan.points)} trainings, {len(left)} left{about}; results in {plan.out}"
    return table(("training", "sets", "state"), rows) + "\n" + last


def run(plan: Plan, processes: int) -> list[str]:
    """Train and score everything. Returns the jobs that failed."""
    standing = {f"train {member.label}": member.standing for member in [*plan.starts.values(), *plan.points]}
    failed = run_jobs(
        plan.jobs(),
        processes,
        lambda job: standing.get(job.name, lambda: "running")(),
        environment={"OMP_NUM_THREADS": "1"} if processes > 1 else None,
    )
    for point in plan.points:
        if point.done() and not is_scored(point, plan.config.counts, plan.num_samples):
            print(f"scoring {point.label}", flush=True)
            score(point, plan.config.counts, plan.num_samples)
    return failed


@command
def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__, "scripts/ablations.sh")
    parser.add_argument("config", type=Path, nargs="?", help=f"a YAML like {TINY} (default)")
    parser.add_argument("--full", action="store_true", help=f"{FULL}: the sizes of the paper, for a GPU")
    parser.add_argument("--quick", action="store_true", help="the YAML's small version: seconds, and no findings")
    parser.add_argument("--processes", type=int, help="trainings side by side (default: the YAML's)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, and stop")
    parser.add_argument("--analyse-only", action="store_true", help="train and score nothing; tables from the scores on disk")
    args = parser.parse_args(argv)
    if args.full and args.config:
        raise ValueError(f"--full is {FULL}; name it, or {args.config}, but not both")
    config = load_ablations(args.config or (FULL if args.full else TINY))
    plan, processes = Plan(config, args.quick), config.processes if args.processes is None else args.processes
    if processes < 1:
        raise ValueError(f"--processes {processes}: at least 1")
    failed = []
    if not args.analyse_only:
        print(plan_text(plan, processes), flush=True)
        for member in [*plan.starts.values(), *plan.points]:
            member.check()
        if args.dry_run:
            return 0
        with StopSignals():
            failed = run(plan, processes)
    result = gathered(plan)
    write(result, plan.out)
    print("\n" + text(result))
    print(f"Written: {plan.out}/ablations.json, ablations.md, ablations.svg, ablations.png")
    if failed:
        print(f"error: not done: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
