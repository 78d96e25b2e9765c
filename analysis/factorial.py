"""The A x B x C study of LAHR in one command: data, eight cells x seeds, scores on test rows, statistics, report.

    bash scripts/factorial.sh args/lahr_factorial.yaml [--processes N] [--seeds 0,1] [--cells baseline,A] [--dry-run] [--quick]
    python -m analysis.factorial args/lahr_factorial.yaml --analyse-only        # statistics again, from the scores on disk

What can be found is printed before anything is trained. What is done is skipped, what was cut is resumed: start the same
command again. Below results/<name>: data/, runs/, logs/, scores/, factorial.json, factorial.md, factorial.svg and .png. Exit
code: 0 done, 1 a training failed, 2 a mistake in the command or a config, 75 interrupted.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as `python analysis/factorial.py`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from analysis.command import command, parser_of, seed_list  # noqa: E402
from analysis.factorial_plan import FLAGS, Plan, load_factorial  # noqa: E402
from analysis.factorial_report import gathered, text, write  # noqa: E402
from analysis.factorial_stats import FUTILE_AFTER, power_text  # noqa: E402
from analysis.jobs import run_jobs  # noqa: E402
from analysis.tables import table  # noqa: E402
from stopping import StopSignals  # noqa: E402


def plan_text(plan: Plan, processes: int, every_line: bool) -> str:
    """What is done and what is left, and with `every_line` each training with what it sets."""
    rows, left = [], [member for member in plan.members if not member.done()]
    for member in plan.members if every_line else ():
        options = member.config.model_options
        mode = member.config.feedback_mode if member.config.coconut else "–"
        state = "done" if member not in left else "to resume" if member.folder.is_dir() else "to do"
        rows.append([member.label, mode, *(str(options[flag]).lower() for flag in FLAGS.values()), str(member.seed), state])
    head = ["training", "feedback_mode", *FLAGS.values(), "seed", "state"]
    about = f"about {len(left) * plan.study.minutes / processes:.0f} minutes with {processes} at a time"
    last = f"{len(plan.members)} trainings, {len(left)} left: {about}; results in {plan.out}"
    return (table(head, rows) + "\n" if rows else "") + last


def train(plan: Plan, processes: int) -> tuple[list[str], bool]:
    """Train and score all seeds. Returns the jobs that failed and whether the study was stopped for futility, which is asked
    once, after the first `FUTILE_AFTER` seeds."""
    plan.make_data()
    standing = {f"train {member.label}": member.standing for member in plan.members}
    groups = [group for group in (plan.seeds[:FUTILE_AFTER], plan.seeds[FUTILE_AFTER:]) if group]
    left = []
    for number, group in enumerate(groups, start=1):
        said = run_jobs(
            plan.jobs(group),
            processes,
            lambda job: standing.get(job.name, lambda: "running")(),
            environment={"OMP_NUM_THREADS": "1"},
        )
        left += said
        if number < len(groups) and plan.study.futility_stop and not said and futile(gathered(plan)):
            return left, True
    return left, False


def futile(result: dict) -> bool:
    """Whether no primary outcome gives a reason to go on."""
    return all(found["futility"]["stop"] for found in result["outcomes"].values())


@command
def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__, "scripts/factorial.sh")
    parser.add_argument("config", type=Path, help="the study's YAML, args/lahr_factorial.yaml")
    parser.add_argument("--processes", type=int, help="trainings side by side, one thread each (default: the YAML's)")
    parser.add_argument("--seeds", help="only these seeds of the YAML, by comma")
    parser.add_argument("--cells", help="only these cells and references, by comma")
    parser.add_argument("--quick", action="store_true", help="the YAML's small version, in a result folder of its own")
    parser.add_argument("--dry-run", action="store_true", help="print power and plan, and stop")
    parser.add_argument("--analyse-only", action="store_true", help="train nothing; statistics from the scores on disk")
    args = parser.parse_args(argv)
    study = load_factorial(args.config)
    plan = Plan(study, args.quick, args.seeds and seed_list(args.seeds), args.cells and args.cells.split(","))
    processes = study.processes if args.processes is None else args.processes
    if processes < 1:
        raise ValueError(f"--processes {processes}: at least 1")
    left, stopped = [], False
    if not args.analyse_only:
        print(power_text(len(plan.seeds), study.alpha) + "\n")
        print(plan_text(plan, processes, args.dry_run), flush=True)
        for member in plan.members:
            member.check()
        if args.dry_run:
            return 0
        with StopSignals():
            left, stopped = train(plan, processes)
    result = gathered(plan)
    write(result, plan.out)
    print("\n" + text(result))
    if stopped:
        print(f"Stopped for futility after {FUTILE_AFTER} seeds; set futility_stop: false to go on all the same")
    print(f"Written: {plan.out}/factorial.json, factorial.md, factorial.svg, factorial.png")
    if left:
        print(f"error: not done: {', '.join(left)}", file=sys.stderr)
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main())
