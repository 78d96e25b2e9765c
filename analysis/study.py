"""A whole study in one command: data, every model and seed, every experiment on every checkpoint, the verdict, the report.

    bash scripts/study.sh args/study_quickstart.yaml [--quick] [--models m1,m3] [--seeds 0,1] [--dry-run]

What is done is skipped, what was cut is resumed: start the same command again. Below the study's result folder:
study.json (what it consists of), logs/, gates.json, final/ and best/ (one folder an experiment, for each kind of checkpoint),
report.html and report.md. Exit code: 0 done; 1 a gate stopped it or a job failed; 2 a mistake in the command or a
config; 75 stopped by a signal.
"""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

if __package__ in (None, ""):  # run as `python analysis/study.py`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from analysis import curriculum, gates, report, verdict  # noqa: E402
from analysis.command import command, parser_of, seed_list  # noqa: E402
from analysis.jobs import Job, run_jobs  # noqa: E402
from analysis.measure import experiment  # noqa: E402
from analysis.study_plan import Plan, load_study_config  # noqa: E402
from files import write_whole  # noqa: E402
from stopping import StopSignals  # noqa: E402


def show(plan: Plan, jobs: list[Job]) -> None:
    """Print what is done, what is left, and about how long it takes."""
    width = max(len(job.name) for job in jobs)
    standing = {f"train {t.label}": t for t in [*plan.starts.values(), *plan.runs]}
    left = 0.0
    for job in jobs:
        if job.done():
            state = "done"
        else:
            left += job.hours
            training = standing.get(job.name)
            begun = training is not None and (training.folder / "metrics.jsonl").is_file()
            state = f"to resume ({training.standing()})" if begun else "to do"
        print(f"{job.name:{width}}  {job.hours:6.2f} h  {state}")
    n = plan.study.processes
    print(f"{len(jobs)} jobs, about {left:.1f} h of work left: {left / n:.1f} h with {n} at a time; results in {plan.results}")


def blocked(plan: Plan) -> str:
    """Judge all gates on what is there; why the study must stop, or nothing. Writes gates.json and logs/gates.txt."""
    logs, results = plan.results / "logs", plan.results / plan.study.checkpoints[0]
    if not any(logs.glob("m*.log")):
        return ""
    argv = ["--gate", "all", "--logs", str(logs), "--runs", plan.study.runs, "--out", str(plan.results / "gates.json")]
    argv += ["--models", ",".join(dict.fromkeys(run.model for run in plan.runs))]
    argv += ["--results", str(results)] if results.is_dir() else []
    argv += ["--accept", plan.study.accept] if plan.study.accept else []
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = gates.main(argv)
    write_whole(logs / "gates.txt", said.getvalue())
    return f"a gate blocks, see {logs / 'gates.txt'}" if code == 1 else ""


def finish(plan: Plan) -> int:
    """What follows from the measurements: curves, verdict, report. Returns 0 where all of it was written."""
    codes = []
    for epoch in plan.study.checkpoints:
        out = plan.results / epoch
        out.mkdir(exist_ok=True)
        for name in plan.study.experiments:
            if (out / name).is_dir():  # several wrote it side by side
                experiment(name).collect(out)
        codes.append(curriculum.main(["--study", str(plan.results), "--output_dir", str(out)]))
        codes.append(verdict.main([str(plan.results), "--epoch", epoch]))
    return max([*codes, report.main([str(plan.results)])])


@command
def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__, "scripts/study.sh")
    parser.add_argument("config", type=Path, help="the study's YAML, args/study_*.yaml")
    parser.add_argument("--quick", action="store_true", help="the YAML's quick models with one seed; own result folder")
    parser.add_argument("--models", help="only these models, by comma")
    parser.add_argument("--seeds", help="only these repeats (0 is the first seed), by comma")
    parser.add_argument("--dry-run", action="store_true", help="print the plan with estimated hours and stop")
    args = parser.parse_args(argv)
    models, repeats = args.models and args.models.split(","), args.seeds and seed_list(args.seeds)
    plan = Plan(load_study_config(args.config), args.quick, models, repeats)
    jobs = plan.jobs()
    show(plan, jobs)
    if args.dry_run:
        return 0
    plan.write()
    standing = {f"train {t.label}": t.standing for t in [*plan.starts.values(), *plan.runs]}
    threads = {"OMP_NUM_THREADS": str(plan.study.threads)} if plan.study.threads else {}
    stop: list[str] = []

    def watch() -> str:
        stop[:] = filter(None, [blocked(plan)])
        return stop[0] if stop else ""

    with StopSignals():
        left = run_jobs(
            jobs, plan.study.processes, lambda job: standing.get(job.name, lambda: "running")(), watch, environment=threads
        )
    watch()
    code = finish(plan)
    if left:
        print(f"error: not done: {', '.join(left)}", file=sys.stderr)
    return int(bool(left or stop or code))


if __name__ == "__main__":
    sys.exit(main())
