"""The gates of the curriculum study on the command line.

    python analysis/gates.py --gate 3 --log logs/m3_coconut.log          # one gate, one log
    python -m analysis.gates --gate all --logs logs --runs runs          # every gate of a study
    python -m analysis.gates --gate post --logs logs                     # checks after training
    python -m analysis.gates --gate flags --logs logs                    # red flags
    python -m analysis.gates --gate 4-id --logs logs --accept "seed 1 diverged, see notes"

Prints every measured value beside its threshold and appends the same to gates.json. Exit code: 0 pass (or nothing that
blocks), 1 a blocking failure, 2 not decidable yet, or a mistake in the command. Thresholds hold for the official data,
GPT-2 124M and effective batch 128; runs recorded as anything else are tagged `uncalibrated`, shown, and never block.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):  # run as `python analysis/gates.py`
    sys.path[0] = str(ROOT)

from analysis.command import command, parser_of  # noqa: E402
from analysis.findings import Findings  # noqa: E402
from analysis.gate_post import post_checks, red_flags, summary  # noqa: E402
from analysis.gate_result import CLEAR, FAIL, NOT_YET, RAISED, Result, append_records, read_records, render  # noqa: E402
from analysis.gate_rules import GATE_MODELS, GATES, Study  # noqa: E402
from analysis.runs import LOG_STEMS, MODELS, Run, find_folder, folder_key, load_study, parse_label  # noqa: E402


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__, "gates.py")
    parser.add_argument("--gate", required=True, choices=[*GATES, "all", "post", "flags"], help="which rule to apply")
    parser.add_argument("--log", action="append", type=Path, default=[], help="log of one run; repeat for a second")
    parser.add_argument("--run", type=Path, help="run folder of that run (default: as its log or name says)")
    parser.add_argument("--logs", type=Path, help="folder of m1_cot.log, m3_coconut.log, m3_coconut-s1.log, ...")
    parser.add_argument("--runs", type=Path, help="folder of the run folders (default: where the logs say)")
    parser.add_argument("--results", type=Path, help="folder of experiment results (default: below --logs and --runs)")
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="data folder of gate 0 (default: data)")
    parser.add_argument("--args", type=Path, default=ROOT / "args", help="config folder of gate 0 (default: args)")
    parser.add_argument("--models", default=",".join(MODELS), help="models of this study (default: all)")
    parser.add_argument("--out", type=Path, help="record file (default: gates.json beside the logs)")
    parser.add_argument("--accept", default="", metavar="REASON", help="continue after a failed gate 4-id")
    return parser.parse_args(argv)


def gather(args: argparse.Namespace) -> Study:
    """The study that the arguments describe.

    Raises:
        ValueError: an unknown model, a path that does not exist, or a log whose model cannot be told.
    """
    models = tuple(model.strip() for model in args.models.split(","))
    if unknown := [model for model in models if model not in MODELS]:
        raise ValueError(f"--models: {unknown[0]!r} is unknown; known: {', '.join(MODELS)}")
    if args.accept and args.gate not in ("4-id", "all", "post"):
        raise ValueError(f"--accept belongs to gate 4-id, not to gate {args.gate}")
    for path in [*args.log, *filter(None, (args.run, args.results))]:
        if not path.exists():
            raise ValueError(f"{path} does not exist")
    if args.gate != "0" and not (args.log or args.run or args.logs or args.runs):
        raise ValueError("give --logs FOLDER, or --log LOG and --run FOLDER of one run")
    runs = {}
    if args.logs or args.runs:
        runs = load_study(args.logs or args.runs, args.runs)
    places = [args.results] if args.results else [p for p in (args.logs, args.runs, args.run) if p]
    places += [] if args.results else [log.parent for log in args.log]
    study = Study(runs, Findings(places), models, args.data, args.args, args.accept)
    if args.log or args.run:
        _add_single(study, args)
    return study


def _add_single(study: Study, args: argparse.Namespace) -> None:
    """Add the runs of --log and --run; a gate over several models finds the others beside the log."""
    wanted = GATE_MODELS.get(args.gate, MODELS)
    added: dict[tuple[str, int], Run] = {}
    for log in args.log or [None]:
        key = parse_label(log.stem, LOG_STEMS) if log else None
        key = key or (folder_key(args.run) if args.run else None)
        if key is None and len(wanted) > 1 and args.gate != "4b":
            raise ValueError(f"{log or args.run}: cannot tell the model; known names: {', '.join(LOG_STEMS.values())}")
        run = Run(*(key or (wanted[0], 0)), log_path=log)
        run.folder = args.run or find_folder(run, args.runs)
        added[run.model, run.repeat] = run
    repeats = {repeat for _, repeat in added}
    if args.log and args.gate in ("2", "4", "4-id"):
        beside = load_study(args.log[0].parent, args.runs)
        study.runs |= {key: run for key, run in beside.items() if key[0] in wanted and key[1] in repeats}
    study.runs |= added
    if args.gate == "4b":  # one run was asked for: judge that one
        study.models = tuple(model for model in study.models if any(model == key[0] for key in added))


def judge(gate: str, study: Study) -> list[Result]:
    """Results of one gate, of all of them (with the flags that are up), of the later checks, or of the flags."""
    if gate == "post":
        return post_checks(study)
    if gate == "flags":
        return red_flags(study)
    if gate == "all":
        results = [result for rule in GATES.values() for result in rule(study)]
        return results + [flag for flag in red_flags(study) if flag.status == RAISED]
    return GATES[gate](study)


def exit_code(gate: str, results: list[Result], study: Study) -> int:
    """0 pass, 1 a blocking failure, 2 not decidable yet; `all` of an empty study is 2 whatever the files say."""
    if gate == "flags":
        return 0 if any(result.status in (RAISED, CLEAR) for result in results) else 2
    if gate == "all":
        decided = [r for r in results if r.gate != "0" and r.gate in GATES and r.checks and r.status != NOT_YET]
        if not study.runs and not decided:
            return 2
        if any(result.blocking and result.blocks == "study" for result in results):
            return 1
        return 0 if decided else 2
    if any(result.blocking for result in results):
        return 1
    return 2 if any(result.status == NOT_YET for result in results) else 0


@command
def main(argv: list[str] | None = None) -> int:
    """Judge, print, record; returns the exit code."""
    args = parse_args(argv)
    study = gather(args)
    run_parent = args.run.parent if args.run else None
    beside = [args.logs, *(log.parent for log in args.log), args.runs, run_parent, Path(".")]
    out = args.out or next(place for place in beside if place) / "gates.json"
    study = replace(study, history=read_records(out))
    results = judge(args.gate, study)
    append_records(out, results)
    print(render(results, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    blocking = sum(result.blocking for result in results)
    failed = any(result.status == FAIL for result in results)
    tail = f" ({blocking} blocking)" if failed else ""
    if args.gate == "all" and not study.runs:
        tail += "; no run of the study found"
    print(f"\n{summary(results)}{tail}; recorded in {out}")
    return exit_code(args.gate, results, study)


if __name__ == "__main__":
    sys.exit(main())
