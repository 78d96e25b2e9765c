"""The queue of a study: order, failures, what is done, and that nothing outlives it. Real processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from analysis.jobs import Job, run_jobs


def job(folder: Path, name: str, needs=(), code: str = "", **options) -> Job:
    """A job that appends its name to order.txt and makes a file."""
    script = f"open('order.txt', 'a').write('{name} ')\n{code}\nopen('{name}', 'w')"
    command = [sys.executable, "-c", f"import os, time; os.chdir({str(folder)!r})\n{script}"]
    return Job(name, command, folder / f"{name}.log", lambda: (folder / name).is_file(), needs, **options)


def order(folder: Path) -> list[str]:
    return (folder / "order.txt").read_text().split() if (folder / "order.txt").is_file() else []


def test_each_waits_for_what_it_needs_and_runs_once(tmp_path, capsys):
    jobs = [job(tmp_path, "c", ("a", "b")), job(tmp_path, "a"), job(tmp_path, "b", ("a",))]
    assert run_jobs(jobs, 2) == [] and order(tmp_path) == ["a", "b", "c"]
    assert run_jobs(jobs, 2) == [] and order(tmp_path) == ["a", "b", "c"], "what is done is not started again"
    (tmp_path / "b").unlink()
    assert run_jobs(jobs, 2) == [] and order(tmp_path) == ["a", "b", "c", "b"]


def test_a_failure_stops_what_needs_it_and_nothing_else(tmp_path, capsys):
    jobs = [
        job(tmp_path, "bad", code="print('the reason'); raise SystemExit(3)"),
        job(tmp_path, "after", ("bad",)),
        job(tmp_path, "other"),
    ]
    assert run_jobs(jobs, 1) == ["bad", "after"]
    assert order(tmp_path) == ["bad", "other"]
    assert "bad failed (exit 3)" in (error := capsys.readouterr().err) and "the reason" in error


def test_a_command_that_ends_well_without_its_result_has_failed(tmp_path, capsys):
    lazy = Job("lazy", [sys.executable, "-c", "pass"], tmp_path / "lazy.log", lambda: False)
    assert run_jobs([lazy], 1) == ["lazy"]


def test_no_more_than_asked_at_a_time(tmp_path):
    code = (
        "open(f'in{os.getpid()}', 'w'); time.sleep(.4); n = sum(f.startswith('in') for f in os.listdir('.'))\n"
        "open('most', 'a').write(f'{n} '); os.remove(f'in{os.getpid()}')"
    )
    assert run_jobs([job(tmp_path, f"j{i}", code=code) for i in range(5)], 2) == []
    assert max(map(int, (tmp_path / "most").read_text().split())) == 2


def test_what_watches_can_stop_the_queue(tmp_path, capsys):
    jobs = [
        job(tmp_path, "a"),
        job(tmp_path, "slow", code="time.sleep(60)"),
        job(tmp_path, "never", ("a",), code="time.sleep(60)"),
    ]
    started = time.time()
    left = run_jobs(jobs, 2, watch=lambda: "gate 3 blocks" if (tmp_path / "a").is_file() else "")
    assert left == ["slow", "never"] and time.time() - started < 30
    assert "gate 3 blocks" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_children_end_with_their_parent(tmp_path):
    child_code = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(100)"
    script = (
        "import sys; from pathlib import Path; from analysis.jobs import Job, run_jobs; folder = Path(sys.argv[1])\n"
        f"run_jobs([Job('x', [sys.executable, '-c', {child_code!r}, folder / 'pid'], folder / 'log', lambda: False)], 1)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT)
    pid = tmp_path / "pid"
    for _ in range(200):
        if pid.is_file() and pid.read_text():
            break
        time.sleep(0.1)
    child = int(pid.read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child outlived its parent")
