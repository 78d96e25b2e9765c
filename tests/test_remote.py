"""Runs on another machine, for real: an sshd on loopback, the scripts as a user calls them, tiny trainings behind them."""

import hashlib
import io
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from run_material import BASE

ODD = 'my "odd" run\'s'
SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}


def copy_of_the_tree(folder: Path) -> Path:
    """What a clone would hold, without data and outputs."""
    leave = shutil.ignore_patterns(".*", "__pycache__", "runs", "results", "logs", "wandb", "benchmarks", "tests", "*.json")
    shutil.copytree(ROOT, folder, ignore=leave)
    shutil.copytree(ROOT / "backbones", folder / "backbones", dirs_exist_ok=True)
    shutil.copy(ROOT / ".gitignore", folder)
    return folder


def write_yaml(path: Path, **changes) -> None:
    paths = {"train_path": "data/prosqa_train.json", "val_path": "data/prosqa_valid.json", "save_path": "runs/tiny"}
    path.write_text(yaml.safe_dump(BASE | {"model_id": "backbones/prosqa_tiny"} | paths | changes))


def wait_for(condition, seconds: float = 60.0):
    """What `condition()` gives as soon as it is true."""
    deadline = time.time() + seconds
    while not (found := condition()):
        assert time.time() < deadline, f"not within {seconds} s"
        time.sleep(0.1)
    return found


def text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def children(pid: str) -> list[str]:
    """Lines of /proc that name a process as the parent of another."""
    shown = subprocess.run(f"grep -s '^PPid:.{pid}$' /proc/[0-9]*/status", shell=True, capture_output=True, text=True)
    return shown.stdout.splitlines()


# ---------------------------------------------------------------- the box


class Box:
    """A machine reached by ssh (this one), a tree to launch from, and the scripts."""

    def __init__(self, folder: Path):
        self.laptop, self.dir, self.keys = folder / "laptop", folder / "rented box", folder / "keys"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def start(self, cache: str) -> subprocess.Popen:
        """sshd as this user, with keys of its own; raises CalledProcessError where it does not come up."""
        self.keys.mkdir()
        for name in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.keys / name)], check=True)
        settings = " ".join(f"{key}={value}" for key, value in (ENVIRONMENT | {"HF_DATASETS_CACHE": cache}).items())
        (self.keys / "config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.keys}/host\nPidFile {self.keys}/sshd.pid\n"
            f"AuthorizedKeysFile {self.keys}/user.pub\nUsePAM no\nStrictModes no\nPasswordAuthentication no\nSetEnv {settings}\n"
        )
        with open(self.keys / "log", "w") as log:
            server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(self.keys / "config")], stderr=log)
        for _ in range(50):
            if subprocess.run([*self.ssh(), "true"], stderr=subprocess.DEVNULL).returncode == 0:
                return server
            time.sleep(0.1)
        server.terminate()
        raise OSError((self.keys / "log").read_text())

    def options(self) -> str:
        known = self.keys / "known_hosts"
        return f"-F /dev/null -o StrictHostKeyChecking=no -o UserKnownHostsFile={known} -o LogLevel=ERROR -o BatchMode=yes"

    def ssh(self) -> list[str]:
        return ["ssh", *shlex.split(self.options()), "-p", str(self.port), "-i", str(self.keys / "user"), "127.0.0.1"]

    def script(self, name: str, *arguments: str, code: int = 0, **environment: str) -> str:
        """What scripts/NAME.sh says, stdout and stderr; it must end with `code`."""
        before, dash, after = (list(arguments), [], [])
        if "--" in arguments:
            at = arguments.index("--")
            before, dash, after = list(arguments[:at]), ["--"], list(arguments[at + 1 :])
        reach = ["--port", str(self.port), "--identity", str(self.keys / "user"), "--dir", str(self.dir)]
        command = ["bash", f"scripts/{name}.sh", "127.0.0.1", *before, *reach, "--python", sys.executable, *dash, *after]
        ended = subprocess.run(
            command,
            cwd=self.laptop,
            env=os.environ | {"SSH_OPTIONS": self.options()} | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert ended.returncode == code, ended.stdout
        return ended.stdout

    def exit(self, name: str) -> str:
        return text(self.dir / "logs" / f"{name}.exit").strip()

    def events(self, name: str, kind: str) -> list[dict]:
        lines = text(self.dir / "runs/tiny" / name / "metrics.jsonl").splitlines()
        return [record for record in map(json.loads, lines) if record["event"] == kind]


@pytest.fixture(scope="module")
def box(tmp_path_factory, small_data, own_cache):
    if SSHD is None or shutil.which("ssh") is None:
        pytest.skip("no ssh and sshd on this machine (Debian: apt-get install openssh-server)")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd separates privileges
    box = Box(tmp_path_factory.mktemp("remote"))
    copy_of_the_tree(box.laptop)
    subprocess.run(["git", "init", "-q"], cwd=box.laptop, check=True)
    for path in small_data.glob("*.json"):
        shutil.copy(path, box.laptop / "data")
    write_yaml(box.laptop / "args" / f"{ODD}.yaml", num_epochs=2)
    write_yaml(box.laptop / "args" / "long.yaml", num_epochs=2000, name="long")
    server = box.start(str(tmp_path_factory.mktemp("remote_cache")))
    yield box
    for path in (box.dir / "logs").glob("*.pid"):  # what a failed test left behind
        try:
            os.killpg(int(path.read_text()), signal.SIGKILL)
        except (ProcessLookupError, ValueError):
            pass
    server.terminate()
    server.wait(30)


# ---------------------------------------------------------------- runs over ssh


def test_a_dry_run_says_what_would_be_sent_and_changes_nothing(box):
    shown = box.script("launch", f"args/{ODD}.yaml", "--dry-run")
    assert "sends data/prosqa_train.json" in shown and f"sends args/{ODD}.yaml" in shown and "sends run.py" in shown
    assert "GB free" in shown and "GPU" in shown and f"Python 3.{sys.version_info.minor}" in shown
    assert not box.dir.exists()


def test_mistakes_are_told_before_anything_is_sent(box):
    write_yaml(box.laptop / "args" / "nodata.yaml", train_path="data/absent.json")
    assert "error: data: data/absent.json is neither here nor on the box" in box.script("launch", "args/nodata.yaml", code=2)
    assert "there is no config args/none.yaml" in box.script("launch", "args/none.yaml", code=2)
    assert "--min-free" in box.script("launch", "args/long.yaml", "--min-free", "9999999", code=2)
    assert "there is no folder" in box.script("status", code=2)
    assert not box.dir.exists()


def test_runs_of_a_box(box, tmp_path):
    """Launched, watched, refused a second time, stopped, gone on with, fetched."""
    launched = box.script("launch", f"args/{ODD}.yaml", "args/long.yaml")
    assert f"queued: {ODD}" in launched and "sends data/prosqa_train.json" in launched
    assert (box.dir / "data/prosqa_valid.json").is_file() and not (box.dir / ".git").exists()
    sshd = (box.keys / "sshd.pid").read_text().strip()
    wait_for(lambda: not children(sshd))  # no ssh session is left
    logs = box.dir / "logs"
    first = int(wait_for(lambda: text(logs / f"{ODD}.pid")))
    os.kill(first, 0)
    assert "running" in box.script("status") and not box.exit(ODD)
    assert f"{ODD} is running already" in box.script("launch", f"args/{ODD}.yaml", code=2)

    wait_for(lambda: box.events("long", "eval"))
    assert box.exit(ODD) == "0 done" and "Accuracy on validation set" in text(logs / f"{ODD}.log")
    assert box.events(ODD, "end")[0]["time"] < box.events("long", "start")[0]["time"], "one after another"
    shown = box.script("status", COLUMNS="100").splitlines()
    assert all(len(line) <= 100 for line in shown) and "GB of disk free" in shown[-1]
    odd, long = (next(line for line in shown if line.startswith(name)) for name in (ODD, "long"))
    accuracy, loss = box.events(ODD, "eval")[-1]["eval/acc"], box.events(ODD, "step")[-1]["train/loss"]
    assert odd.removeprefix(ODD).split()[:5] == ["done", "2/2", "12/12", f"{accuracy:.4f}", f"{loss:.4f}"]
    assert " running " in long and "/2000 " in long

    said = box.script("stop")
    assert "long: stopped, everything saved" in said and box.exit("long") == "75 stopped" and box.events("long", "stopped")
    wait_for(lambda: not (logs / "queue.pid").exists())
    with pytest.raises(ProcessLookupError):
        os.kill(int(text(logs / "long.pid")), 0)
    reached = len(box.events("long", "train_epoch"))
    assert " stopped " in next(line for line in box.script("status").splitlines() if line.startswith("long"))

    relaunched = box.script("launch", "args/long.yaml", "--", f"num_epochs={reached + 2}")
    assert "0 of " in relaunched, "nothing is sent twice"
    wait_for(lambda: box.exit("long"))
    assert box.exit("long") == "0 done" and len(box.events("long", "start")) == 2
    assert box.events("long", "start")[1]["epoch"] >= 1 and "found previous run" in text(logs / "long.log")

    check_fetching(box, tmp_path / "here")


def check_fetching(box: Box, to: Path) -> None:
    def digest(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    place = Path("runs/tiny") / ODD
    whole = box.dir / place / "checkpoint_2"
    (to / place).mkdir(parents=True)
    (to / place / ".part-checkpoint_2").write_bytes(whole.read_bytes()[:10000])  # of a fetch that was cut
    assert "from byte 10000" in box.script("fetch", ODD, "--checkpoints", "2", "--to", str(to))
    assert digest(to / place / "checkpoint_2") == digest(whole)
    came = {path.name for path in (to / place).iterdir()} - {"best.json"}  # there is none without a right answer
    assert came == {"checkpoint_2", "state_2", "metrics.jsonl", "run.json", "eval_1.jsonl", "eval_2.jsonl"}
    assert digest(to / "logs" / f"{ODD}.log") == digest(box.dir / "logs" / f"{ODD}.log")
    assert not (to / "runs/tiny/long").exists()

    (box.dir / place / "best.json").write_text('{\n "file": "checkpoint_1",\n "epoch": 0,\n "accuracy": 0.5\n}\n')
    box.script("fetch", "--to", str(to))  # the best one of every run
    assert digest(to / place / "checkpoint_1") == digest(box.dir / place / "checkpoint_1")
    assert digest(to / "runs/tiny/long/metrics.jsonl") == digest(box.dir / "runs/tiny/long/metrics.jsonl")
    assert "0 files fetched" in box.script("fetch", "--to", str(to))
    assert "there is no run nothing" in box.script("fetch", "nothing", "--to", str(to), code=2)


# ---------------------------------------------------------------- archives


@pytest.mark.parametrize("member", ["../evil", "a/../../evil", "/absolute/evil", "link", "torn"])
def test_an_archive_that_reaches_out_is_refused_whole(tmp_path, member):
    archive, target = tmp_path / "archive", tmp_path / "target"
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("good", member):
            about = tarfile.TarInfo(name)
            if name == "link":
                about.type, about.linkname = tarfile.SYMTYPE, str(tmp_path)
            about.size = 4 if about.isreg() else 0
            tar.addfile(about, io.BytesIO(b"text"))
    if member == "torn":
        archive.write_bytes(archive.read_bytes()[:-20])
    code = 'set -euo pipefail; . scripts/remote.sh; unpack "$1" <"$2"'
    command = ["bash", "-c", code, "-", str(target), str(archive)]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.startswith("error: the archive holds ")
    assert list(target.iterdir()) == [] and sorted(p.name for p in tmp_path.iterdir()) == ["archive", "target"]


# ---------------------------------------------------------------- the queue, with a program that ends as it is told


STAND_IN = """
import os, sys, time
from pathlib import Path
plan = Path("plans", Path(sys.argv[1]).stem)
codes = plan.read_text().split()
if os.environ.get("RANK", "0") == "0":
    with open("begun", "a") as begun:
        print(plan.name, file=begun)
    plan.write_text(" ".join(codes[1:]))
    if codes[0] == "wait":
        time.sleep(100)
    if codes[0] == "killed":
        os.kill(os.getpid(), 9)
    sys.exit(int(codes[0]))
time.sleep(100)
"""


class Queue:
    """A tree whose run.py is a stand-in; plans: {config: codes with which it ends, one after another}."""

    def __init__(self, folder: Path, data: Path, plans: dict[str, str]):
        self.folder = copy_of_the_tree(folder)
        (folder / "run.py").write_text(STAND_IN)
        (folder / "plans").mkdir()
        for name, codes in plans.items():
            (folder / "plans" / name).write_text(codes)
            write_yaml(folder / f"{name}.yaml", **{key: str(data / "prosqa_valid.json") for key in ("train_path", "val_path")})

    def call(self, *arguments: str, code: int = 0) -> str:
        """What the queue's script says; it must end with `code`."""
        environment = os.environ | ENVIRONMENT | {"PYTHON": sys.executable, "QUEUE_PAUSE": "0", "QUEUE_RETRIES": "2"}
        command = ["bash", "scripts/run_queue.sh", *arguments]
        ended = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        assert ended.returncode == code, ended.stderr
        return ended.stdout + ended.stderr

    def exit(self, name: str) -> str:
        return text(self.folder / "logs" / f"{name}.exit").strip()

    def begun(self) -> list[str]:
        return text(self.folder / "begun").split()


def test_what_was_cut_is_started_again_and_what_failed_is_not(tmp_path, small_data):
    plans = {
        "cut": "75 0",
        "killed": "killed 0",
        "mistake": "2 0",
        "nan": "1 0",
        "full": "75 75 75 0",
        "wait": "wait 0",
        "no": "0",
    }
    queue = Queue(tmp_path / "queue", small_data, plans)
    queue.call("add", "1", *(f"{name}.yaml" for name in plans))
    wait_for(lambda: "wait" in queue.begun())
    assert {name: queue.exit(name) for name in ("cut", "killed", "mistake", "nan", "full")} == {
        "cut": "0 done",
        "killed": "0 done",
        "mistake": "2 failed",
        "nan": "1 failed",
        "full": "75 stopped",
    }
    assert queue.begun() == ["cut"] * 2 + ["killed"] * 2 + ["mistake", "nan"] + ["full"] * 3 + ["wait"]
    assert "no is waiting in the queue already" in queue.call("add", "1", "no.yaml", code=2)
    assert "no: taken out of the queue" in queue.call("stop", "no")
    assert "wait: stopped (code 137)" in queue.call("stop", "--now")
    wait_for(lambda: not (queue.folder / "logs/queue.pid").exists())
    assert queue.begun()[-1] == "wait", "neither started again nor followed by what was taken out"
    assert "nothing is running" in queue.call("stop")


def test_a_queue_that_was_killed_leaves_a_folder_that_can_be_launched_from(tmp_path, small_data):
    queue = Queue(tmp_path / "queue", small_data, {"wait": "wait", "next": "0"})
    queue.call("add", "1", "wait.yaml", "next.yaml")
    wait_for(queue.begun)
    os.killpg(int((queue.folder / "logs/queue.pid").read_text()), signal.SIGKILL)
    assert "wait is running already" in queue.call("add", "1", "wait.yaml", code=2), "its process outlives the queue"
    assert "wait: stopped" in queue.call("stop", "--now")
    assert "Note: next waited" in queue.call("add", "1", "next.yaml")
    wait_for(lambda: queue.exit("next"))
    assert queue.exit("next") == "0 done" and queue.begun() == ["wait", "next"]


def test_torchrun_hides_the_code_of_its_processes_but_the_queue_finds_it(tmp_path, small_data):
    queue = Queue(tmp_path / "queue", small_data, {"run": "75 2 0"})
    queue.call("add", "2", "run.yaml")
    wait_for(lambda: queue.exit("run"))
    assert queue.begun() == ["run"] * 2 and queue.exit("run") == "2 failed"


# ---------------------------------------------------------------- the scripts themselves


def test_shellcheck_is_silent():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (Debian: apt-get install shellcheck)")
    scripts = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("scripts/*.sh"))
    assert len(scripts) > 10
    checked = subprocess.run(["shellcheck", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("name", ["launch", "status", "fetch", "stop", "run_queue"])
def test_help_is_the_head_of_the_script(name):
    shown = subprocess.run(["bash", f"scripts/{name}.sh", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0 and f"bash scripts/{name}.sh " in shown.stdout and "set -euo" not in shown.stdout
    assert subprocess.run(["bash", f"scripts/{name}.sh"], cwd=ROOT, capture_output=True).returncode == 2
