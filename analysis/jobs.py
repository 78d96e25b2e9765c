"""Commands that wait for each other, a few at a time: started, watched, logged, and not started again once done.

    jobs = [Job("stage0", command, log, done), Job("m3", command, log, done, needs=("stage0",))]
    failed = run_jobs(jobs, processes=2, report=lambda job: "epoch 3 of 10")

A job says itself whether it is done (from files), so starting everything again goes on where it stopped. Children end with
their parent, however that ends.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

PR_SET_PDEATHSIG = 1
TAIL_LINES = 15


@dataclass
class Job:
    """A command, where its output goes (appended), when it is done, what must be done before, and how long it takes."""

    name: str
    command: list[str]
    log: Path
    done: Callable[[], bool]
    needs: tuple[str, ...] = ()
    hours: float = 0.0
    alone: bool = False  # nothing else runs meanwhile


def run_jobs(
    jobs: Sequence[Job],
    processes: int,
    report: Callable[[Job], str] = lambda job: "",
    watch: Callable[[], str] = lambda: "",
    every: float = 30.0,
    watch_every: float = 300.0,
    environment: dict[str, str] | None = None,
) -> list[str]:
    """Run jobs in their order, at most `processes` at a time. Returns the names of those that failed or were not reached.

    `report(job)` says where a running job stands, printed every `every` seconds. `watch()` is called every `watch_every`
    seconds and after each job: what it returns, if anything, stops the queue, and what runs is ended.
    """
    waiting, running, failed = [job for job in jobs if not job.done()], {}, []
    finished = {job.name for job in jobs} - {job.name for job in waiting}
    started = said = watched = time.time()
    try:
        while waiting or running:
            for job in list(waiting):
                alone = job.alone or any(other.alone for other in running.values())
                free = len(running) < (1 if alone else processes)
                if free and set(job.needs) & {*failed}:
                    waiting.remove(job)
                    failed.append(job.name)
                    print(f"{job.name}: not started, {', '.join(sorted(set(job.needs) & {*failed}))} failed", flush=True)
                elif free and not set(job.needs) & ({j.name for j in waiting} | {j.name for j in running.values()}):
                    waiting.remove(job)
                    running[start(job, environment)] = job
                    print(f"{_clock(started)} {job.name}: started", flush=True)
            time.sleep(0.2)
            ended = [process for process in running if process.poll() is not None]
            for process in ended:
                job = running.pop(process)
                if process.returncode == 0 and job.done():
                    finished.add(job.name)
                    print(f"{_clock(started)} {job.name}: done", flush=True)
                else:
                    failed.append(job.name)
                    _complain(job, process.returncode)
            if time.time() - said > every and running:
                said = time.time()
                print(f"{_clock(started)} " + "   ".join(f"{j.name}: {report(j)}" for j in running.values()), flush=True)
            if (ended or time.time() - watched > watch_every) and (stopped := watch()):
                print(f"error: the queue stops: {stopped}", file=sys.stderr, flush=True)
                break
            if ended or time.time() - watched > watch_every:
                watched = time.time()
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    return [job.name for job in jobs if job.name not in finished]


def start(job: Job, environment: dict[str, str] | None = None) -> subprocess.Popen:
    """Start a job's command, its output appended to its log; it gets SIGTERM when this process dies."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "ab") as log:
        return subprocess.Popen(
            job.command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | (environment or {}),
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _complain(job: Job, code: int) -> None:
    print(f"error: {job.name} failed (exit {code}); the end of {job.log}:", file=sys.stderr)
    lines = job.log.read_text(errors="replace").replace("\r", "\n").splitlines()
    print("\n".join(lines[-TAIL_LINES:]), file=sys.stderr, flush=True)


def _clock(started: float) -> str:
    seconds = int(time.time() - started)
    return f"{seconds // 3600:d}:{seconds % 3600 // 60:02d}:{seconds % 60:02d}"
