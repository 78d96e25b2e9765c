"""Where faults happen: tiny runs started as real processes, references that nobody disturbed, and what must be equal.

    scene = Scene(folder, size=QUICK, seed=0)
    reference = scene.reference(reset_optimizer=False)
    job = scene.start(scene.config("killed", reset_optimizer=False))      # or how="python", "torchrun", "agent"
    job.kill()
    code = scene.start(scene.config("killed", reset_optimizer=False)).wait()
    scene.run("killed")                                                   # its folder; chaos_checks says what must hold of it

`how`: `python` and `torchrun` start run.py as users do, `agent` through scripts/torchrun.py. `forked` is a real process as
well, from a server that has done the imports once: seconds less a start. Every run has the numbers of rows of the tests' data.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from run_material import write_config

from files import read_jsonl

ROOT = Path(__file__).resolve().parents[1]
TEST, QUICK, FULL = range(3)
LIMIT = 180  # seconds after which a process that should have ended is a loss
COMMANDS = {
    "python": [sys.executable, "run.py"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    "agent": [sys.executable, "scripts/torchrun.py"],
}


class Hung(Exception):
    """A process that should have ended has not."""


@dataclass
class Outcome:
    """What came of a fault: how often it happened, and what was lost each time that something was."""

    checked: str
    tries: int = 0
    losses: list[str] = field(default_factory=list)
    skipped: str = ""

    def expect(self, held: bool, otherwise: str, evidence: Path) -> bool:
        """Note a loss unless `held`."""
        if not held:
            self.losses.append(f"{otherwise}; evidence: {evidence}")
        return held


# ---------------------------------------------------------------- processes


class Job:
    """Processes started together, with one log. Ranks in their order where they were started one by one."""

    def __init__(self, processes: list, log: Path):
        self.processes, self.log, self.begins_at = processes, log, log.stat().st_size if log.is_file() else 0

    def codes(self) -> list[int | None]:
        """The exit codes so far; -9 after SIGKILL."""
        return [p.poll() if isinstance(p, subprocess.Popen) else p.exitcode for p in self.processes]

    @property
    def runs(self) -> bool:
        return None in self.codes()

    def wait(self, seconds: float = LIMIT) -> int:
        """The exit code; of several processes the first that is not 0. Raises Hung."""
        deadline = time.monotonic() + seconds
        while self.runs:
            if time.monotonic() > deadline:
                self.kill()
                raise Hung(f"a process did not end within {seconds:.0f} s; see {self.log}")
            time.sleep(0.005)
        return next((code for code in self.codes() if code), 0)

    def pids(self) -> list[int]:
        """All live processes, children included."""
        found = []
        for p in self.processes:
            if (p.poll() if isinstance(p, subprocess.Popen) else p.exitcode) is None:
                found += [p.pid, *descendants(p.pid)]
        return found

    def send(self, number: int) -> None:
        """A signal to the processes themselves (torchrun hands it on to its own)."""
        for p in self.processes:
            os.kill(p.pid, number)

    def kill(self, rank: int | None = None) -> None:
        """SIGKILL all processes, or that of one rank."""
        pids = self.pids()
        if rank is not None:
            pids = [self.processes[rank].pid] if len(self.processes) > 1 else [pid for pid in pids if rank_of(pid) == rank]
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if rank is None:
            for p in self.processes:
                p.wait() if isinstance(p, subprocess.Popen) else p.join()

    def output(self) -> str:
        """What it printed, stdout and stderr."""
        return self.log.read_bytes()[self.begins_at :].decode(errors="replace")


def descendants(pid: int) -> list[int]:
    """Children, and theirs."""
    try:
        text = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    except OSError:  # it has just ended
        return []
    children = [int(child) for child in text.split()]
    return children + [d for child in children for d in descendants(child)]


def rank_of(pid: int) -> int | None:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((int(v[5:]) for v in variables if v.startswith(b"RANK=")), None)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# ---------------------------------------------------------------- scenes


@dataclass
class Reference:
    """A run that nobody disturbed, and its seconds from its first record to its end."""

    path: Path
    seconds: float


class Scene:
    """A folder with data and references, and in it one for each fault."""

    def __init__(self, folder: Path, size: int, seed: int, parent: "Scene | None" = None):
        self.folder, self.size, self.seed, self.parent = folder.absolute(), size, seed, parent
        self.random, self.jobs = random.Random(seed), []
        self.folder.mkdir(parents=True, exist_ok=True)
        if parent is None:
            self.references, self.lock = {}, threading.Lock()
            self.data = self.folder / "data"
            if not (self.data / "prosqa_valid.json").is_file():
                make = [sys.executable, "data/two_chain.py", "--out", str(self.data), "--sizes", "44", "11", "2"]
                shape = ["--hops", "2", "3", "--nodes", "6", "8", "--species", "12"]
                subprocess.run([*make, *shape], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            self.environment = os.environ | {
                "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled",
                "HF_DATASETS_CACHE": str(self.folder / "tokens"), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
            }  # fmt: skip
            self.server = start_server(self.environment)
        else:
            self.data, self.environment, self.server = parent.data, parent.environment, parent.server

    def of(self, fault: str) -> "Scene":
        """The scene of one fault, with random numbers of its own."""
        shutil.rmtree(self.folder / fault, ignore_errors=True)
        scene = Scene(self.folder / fault, self.size, self.seed, self)
        scene.random = random.Random(f"{self.seed} {fault}")
        return scene

    def pick(self, test, quick, full):
        """What fits the size."""
        return (test, quick, full)[self.size]

    def config(self, name: str, **changes) -> str:
        """Write the YAML of a tiny run; returns its path."""
        return write_config(self.folder, self.data, name, **changes)

    def run(self, name: str) -> Path:
        """The run folder of `config(name)`."""
        return self.folder / "runs" / name

    def start(
        self, config: str, *overrides: str, how: str = "forked", ranks: int = 1, faults=None, env=None, options=(), entry="run"
    ) -> Job:
        """Start run.py. Forked only: `faults` for chaos_driver, `entry`, another module with a main. `options`: of torchrun."""
        log = self.folder / f"{Path(config).stem}.log"
        environment = self.environment | (env or {})
        processes = []
        with open(log, "ab") as file:
            file.write(
                f"--- {entry}, {how}, {ranks} processes, {faults or 'no fault'}: {config} {' '.join(overrides)}\n".encode()
            )
        job = Job(processes, log)
        if how == "forked":
            group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} if ranks > 1 else {}
            for rank in range(ranks):
                group |= {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
                arguments = (entry, [config, *overrides], environment | group, faults or {}, str(log))
                processes.append(self.server.Process(target=_work, args=arguments, daemon=True))
                processes[-1].start()
        else:
            command = list(COMMANDS[how])
            if how != "python":
                command += ["--standalone", f"--nproc_per_node={ranks}", *options, "run.py"]
            with open(log, "ab") as file:
                streams = {"stdout": file, "stderr": file, "start_new_session": True}
                processes.append(subprocess.Popen([*command, config, *overrides], cwd=ROOT, env=environment, **streams))
        self.jobs.append(job)
        return job

    def reference(self, ranks: int = 1, **changes) -> Reference:
        """The undisturbed run of some changes, made once."""
        if self.parent is not None:
            return self.parent.reference(ranks, **changes)
        key = json.dumps([ranks, changes], sort_keys=True)
        with self.lock:
            if key not in self.references:
                name = f"reference-{len(self.references) + 1}"
                shutil.rmtree(self.run(name), ignore_errors=True)
                job = self.start(self.config(name, **changes), ranks=ranks)
                code = job.wait()
                assert code == 0, f"an undisturbed run ended with {code}; see {job.log}"
                times = [record["time"] for record in read_jsonl(self.run(name) / "metrics.jsonl")]
                self.references[key] = Reference(self.run(name), times[-1] - times[0])
        return self.references[key]

    def close(self) -> None:
        """End what is still running."""
        for job in self.jobs:
            if job.runs:
                job.kill()


def start_server(environment: dict[str, str]):
    """The context of the fork server, which imports run.py, and torch with one thread, once."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["chaos_driver"])
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return server


def _work(*arguments) -> None:
    from chaos_driver import work

    work(*arguments)


def wait_for(job: Job, holds, seconds: float = LIMIT) -> bool:
    """Until `holds()`; whether the job was still running then. Raises Hung."""
    deadline = time.monotonic() + seconds
    while not holds():
        if not job.runs:
            return False
        if time.monotonic() > deadline:
            job.kill()
            raise Hung(f"nothing happened for {seconds:.0f} s; see {job.log}")
        time.sleep(0.002)
    return job.runs


def begun(job: Job, folder: Path):
    """A condition for `wait_for`: this start has written a record. Make it before the start has had the time to."""
    metrics = folder / "metrics.jsonl"
    before = metrics.stat().st_size if metrics.is_file() else 0
    return lambda: metrics.is_file() and metrics.stat().st_size > before


def events(folder: Path, event: str) -> list[dict]:
    """The records of one kind, in a run that may be writing."""
    return [r for r in read_jsonl(folder / "metrics.jsonl") if r["event"] == event]
