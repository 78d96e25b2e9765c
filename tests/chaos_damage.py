"""Faults of files: a full disk, files cut short, bits that flip, files made to run code when they are read."""

import re
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from chaos_checks import apart, read_records, unreadable
from chaos_faults import EQUAL, KEPT, fault, last_line
from chaos_scene import TEST, Job, Outcome, Scene, events, wait_for

from checkpoint import numbered_checkpoints, read_weights

# ---------------------------------------------------------------- a full disk

DISK = 40_000_000  # bytes; a run of KEPT needs 25 MB, of which 10 MB before its first epoch is over


@contextmanager
def small_disk(folder: Path):
    """A file system of DISK bytes at a folder; None where it can't be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "chaos", str(folder)]
    mounted = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, free: int = 0) -> Path:
    """A file that leaves so many bytes free."""
    ballast = disk / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        try:
            while (room := shutil.disk_usage(disk).free - free) > 0:
                file.write(bytes(min(room, 1_000_000)))
        except OSError:  # the last piece did not fit
            pass
    return ballast


@fault("full disk")
def full_disk(scene: Scene) -> Outcome:
    out = Outcome(f"exit code 75, one line that says what and how much is free, what was saved intact, then {EQUAL}")
    with small_disk(scene.folder / "disk") as disk:
        if disk is None:
            out.checked += " (no file system could be mounted: files that cannot grow instead)"
            for i, room in enumerate([3_000_000, 1_000_000][: scene.pick(1, 2, 2)]):
                disk_refuses(
                    scene, out, f"limited-{i}", scene.folder / "disk", {"faults": {"limit_files": [room]}}, lambda: None
                )
            return out
        for i in range(scene.pick(1, 3, 8)):
            ballast = fill(disk, free=scene.random.randint(20_000, 22_000_000))
            disk_refuses(scene, out, f"full-{i}", disk, {}, ballast.unlink)
        for i, again in enumerate([False, True][: scene.pick(1, 2, 2)] * scene.pick(1, 1, 3)):
            metrics_cannot_grow(scene, out, f"grows-{i}", disk, again)
    return out


def disk_refuses(scene: Scene, out: Outcome, name: str, disk: Path, start: dict, make_room: Callable) -> None:
    """A run whose saves fail somewhere; then the same command with room."""
    changes, folder = KEPT | {"save_every_steps": 4}, disk / name
    config, reference = scene.config(name, **changes, save_path=str(disk)), scene.reference(**changes)
    job = scene.start(config, **start)
    code = job.wait()
    make_room()
    if code != 0:  # with enough room nothing happens
        out.tries += 1
        refused_well(out, name, job, code, folder, reference.path)
    if go_on(scene, out, name, config, folder, reference.path):
        shutil.rmtree(folder)


def refused_well(out: Outcome, name: str, job: Job, code: int, folder: Path, reference: Path) -> None:
    """How a run that met a full disk must end."""
    text = job.output()
    lines = [line for line in text.splitlines() if line.startswith(("interrupted", "error"))]
    well = len(lines) == 1 and re.search(r"cannot write \S+ .*\d GB free.*the same command", lines[0])
    out.expect(code == 75 and bool(well), f"{name}: exit code {code}, {lines or last_line(job)}", job.log)
    out.expect("Traceback" not in text, f"{name}: a traceback", job.log)
    problems = unreadable(folder) + [path.name for path in folder.glob(".tmp-*")]
    out.expect(not problems, f"{name}: {problems}", folder)
    for n in numbered_checkpoints(folder):
        found, wanted = (read_weights(path / f"checkpoint_{n}") for path in (folder, reference))
        same = found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
        out.expect(same, f"{name}: checkpoint_{n} is not the reference's", folder)


def go_on(scene: Scene, out: Outcome, name: str, config: str, folder: Path, reference: Path) -> bool:
    """`ends_equal` for a run folder elsewhere."""
    job = scene.start(config)
    code = job.wait()
    if not out.expect(code == 0, f"with room again {name} ended with {code} ({last_line(job)})", job.log):
        return False
    difference = apart(folder, reference)
    return out.expect(not difference, f"{name}: {difference}", folder)


def metrics_cannot_grow(scene: Scene, out: Outcome, name: str, disk: Path, room_again: bool) -> None:
    """The disk is full from some update on, for good or for a while; no snapshots that would notice within epochs."""
    changes, folder = KEPT | {"save_every_steps": 0}, disk / name
    config, reference = scene.config(name, **changes, save_path=str(disk)), scene.reference(**changes)
    job = scene.start(config)
    wait_for(job, lambda: len(events(folder, "step")) > 2)
    ballast, refused = fill(disk), job.runs
    size = (folder / "metrics.jsonl").stat().st_size
    if room_again:
        time.sleep(0.05)
        ballast.unlink()
    code = job.wait()
    if not room_again:
        out.expect((folder / "metrics.jsonl").stat().st_size < size + 4096, f"{name}: the disk was not full", folder)
        ballast.unlink()
    if refused:
        out.tries += 1
        if code != 0 or not room_again:
            refused_well(out, name, job, code, folder, reference.path)
        read_records(folder / "metrics.jsonl")
    if go_on(scene, out, name, config, folder, reference.path):
        shutil.rmtree(folder)


# ---------------------------------------------------------------- files cut short, flipped bits

RESET = {"reset_optimizer": True, "save_every_steps": 2, "log_every": 1}  # any checkpoint_N suffices to go on


@fault("files cut short, flipped bits")
def damage(scene: Scene) -> Outcome:
    out = Outcome(f"damage is found, named and passed over, or changes no value; {EQUAL}; never a traceback")
    base = scene.reference(**RESET).path
    cut = scene.config("cut", **RESET)
    assert scene.start(cut, "max_steps=15").wait() == 0  # in the third epoch, with a last_state beside checkpoint_2
    in_epoch = scene.run("cut")
    for i in range(scene.pick(1, 2, 6)):
        keep = scene.random.choice([0, 1, 1000, scene.random.randrange(2_000_000)])
        passed_over(scene, out, f"short-{i}", base, "checkpoint_3", lambda data, keep=keep: data[:keep])
    for i in range(scene.pick(2, 8, 24)):
        name, folder = (("checkpoint_3", base), ("last_state", in_epoch))[i % 2]
        passed_over(scene, out, f"flip-{i}", folder, name, lambda data, i=i: flipped(scene, data, i // 2 % 3))
    damaged_json(scene, out, base, in_epoch)
    return out


def flipped(scene: Scene, data: bytes, place: int) -> bytes:
    """One bit flipped: anywhere (mostly in tensors), in the last 8 kB (the file's directory), in the first 2 kB."""
    first, end = [(0, len(data)), (max(len(data) - 8192, 0), len(data)), (0, 2048)][place]
    offset = scene.random.randrange(first, end)
    return data[:offset] + bytes([data[offset] ^ 1 << scene.random.randrange(8)]) + data[offset + 1 :]


def damaged_copy(scene: Scene, name: str, base: Path, file: str, change: Callable[[bytes], bytes]) -> str:
    """A copy of a run folder in which one file was changed; returns the config that goes on there."""
    shutil.copytree(base, scene.run(name))
    path = scene.run(name) / file
    path.write_bytes(change(path.read_bytes()))
    return scene.config(name, **RESET)


def passed_over(scene: Scene, out: Outcome, name: str, base: Path, file: str, change: Callable[[bytes], bytes]) -> None:
    """A run whose newest state is damaged: a warning names the file, or no value has changed; it ends equal either way."""
    config = damaged_copy(scene, name, base, file, change)
    job = scene.start(config)
    code = job.wait()
    out.tries += 1
    text = job.output()
    said = any(line.startswith("Warning: ") and file in line for line in text.splitlines())
    resumed = re.search(r"Loading from previous run epoch_(\d)", text)
    used = resumed and (int(resumed[1]) == 3 if file == "checkpoint_3" else "Loading from" in text and not said)
    fine = code == 0 and "Traceback" not in text and (said or used)
    if not out.expect(bool(fine), f"{name}: damaged {file}: exit code {code}, {last_line(job)}", job.log):
        return
    difference = apart(scene.run(name), scene.reference(**RESET).path)
    if out.expect(not difference, f"{name}: damaged {file}: {difference}", scene.run(name)):
        shutil.rmtree(scene.run(name))


def damaged_json(scene: Scene, out: Outcome, base: Path, in_epoch: Path) -> None:
    """Small files: torn, not JSON, JSON of another kind, one bit flipped."""

    def torn_line(data: bytes) -> bytes:
        lines = data.split(b"\n")
        lines[len(lines) // 2] = lines[len(lines) // 2][:30]
        return b"\n".join(lines)

    changes = {
        "torn": torn_line,
        "empty": lambda data: b"",
        "other": lambda data: b"[1, 2]\n",
        "zeros": lambda data: bytes(len(data)),
        "flip": lambda data: flipped(scene, data, 0),
    }
    files = ["metrics.jsonl", "run.json", "state_3", "best.json"]
    cases = [(file, kind) for file in files for kind in changes]
    cases += [(file, "flip") for file in files] * scene.pick(0, 0, 5)
    for i, (file, kind) in enumerate(scene.random.sample(cases, scene.pick(3, 10, len(cases)))):
        folder = in_epoch if scene.random.random() < 0.5 and file != "state_3" else base
        if not (folder / file).is_file():
            (folder / file).write_text('{"file": "checkpoint_1", "epoch": 0, "accuracy": 0.0}\n')
        name = f"json-{i}-{kind}"
        config = damaged_copy(scene, name, folder, file, changes[kind])
        told_of(scene, out, f"{name} ({file})", config, scene.run(name), file)


def told_of(scene: Scene, out: Outcome, name: str, config: str, folder: Path, file: str) -> None:
    """A run with a damaged small file: one line and exit code 2, or it ends with the reference's weights."""
    job = scene.start(config)
    code, out.tries = job.wait(), out.tries + 1
    text, reference = job.output(), scene.reference(**RESET).path
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    fine = "Traceback" not in text and (code == 0 or (code == 2 and len(lines) == 1 and str(folder) in lines[0]))
    if out.expect(fine, f"{name}: exit code {code}, {lines or last_line(job)}", job.log) and code == 0:
        (folder / file).unlink(missing_ok=True)  # what is damaged and not needed may stay
        difference = apart(folder, reference, records=False)
        out.expect(not difference, f"{name}: {difference}", folder)


# ---------------------------------------------------------------- files that would run code


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@fault("files made to run code when read")
def malicious(scene: Scene) -> Outcome:
    out = Outcome(f"refused or passed over without running anything; where a run goes on, {EQUAL}")
    base, sprung = scene.reference(**RESET).path, scene.folder / "sprung"
    trap = scene.folder / "trap"
    forms = {"zip": True, "legacy": False}
    for form, zipped in forms.items() if scene.size != TEST else [("zip", True)]:
        torch.save({"weight": torch.zeros(3), "trap": Trap(sprung)}, trap, _use_new_zipfile_serialization=zipped)
        job = scene.start(scene.config(f"load-{form}", load_model_path=str(trap)))
        refused(out, f"load_model_path ({form})", job, job.wait(), "trap is")
        for file in ("checkpoint_4", "last_state"):
            name = f"{file}-{form}"
            shutil.copytree(base, scene.run(name))
            shutil.copy(trap, scene.run(name) / file)
            out.tries += 1
            job = scene.start(scene.config(name, **RESET))
            code = job.wait()
            warned = any(line.startswith("Warning: ") and file in line for line in job.output().splitlines())
            out.expect(code == 0 and warned, f"{name}: exit code {code}, {last_line(job)}", job.log)
            (scene.run(name) / file).unlink(missing_ok=True)
            difference = apart(scene.run(name), base)
            out.expect(not difference, f"{name}: {difference}", scene.run(name))
        trapped_replay(scene, out, trap, form)
        trapped_pause(scene, out, trap, form)
    trapped_shards(scene, out, sprung)
    trapped_best(scene, out, base)
    trapped_yaml(scene, out, sprung)
    out.expect(not sprung.exists(), "code in a file was run", scene.folder)
    return out


def refused(out: Outcome, name: str, job: Job, code: int, words: str) -> None:
    """Exit code 2 and one line with some words."""
    out.tries += 1
    lines = [line for line in job.output().splitlines() if line.startswith("error: ")]
    fine = code == 2 and len(lines) == 1 and words in lines[0] and "Traceback" not in job.output()
    out.expect(fine, f"{name}: exit code {code}, {lines or last_line(job)}", job.log)


def trapped_replay(scene: Scene, out: Outcome, trap: Path, form: str) -> None:
    """The batch and the weights that analysis.replay reads."""
    folder = scene.run(f"replay-{form}")
    shutil.copytree(scene.reference(**RESET).path, folder)
    shutil.copy(trap, folder / "nonfinite_batch_rank0")
    files = ["nonfinite_batch_rank0"]
    if scene.size != TEST:
        files.append("nonfinite_weights")
    for file in files:
        if file == "nonfinite_weights":
            torch.save({"epoch": 0, "step": 0, "batches": [], "seeds": []}, folder / "nonfinite_batch_rank0")
            shutil.copy(trap, folder / file)
        job = scene.start(str(folder / "nonfinite_batch_rank0"), entry="analysis.replay")
        refused(out, f"replay of a trapped {file}", job, job.wait(), file)


def trapped_pause(scene: Scene, out: Outcome, trap: Path, form: str) -> None:
    """pause_init, which is read when an epoch is over."""
    name, changes = f"pause-{form}", RESET | {"feedback_mode": "pause_curriculum"}
    config = scene.config(name, **changes)
    scene.run(name).mkdir(parents=True)
    shutil.copy(trap, scene.run(name) / "pause_init")
    job = scene.start(config)
    code = job.wait()
    out.tries += 1
    out.expect(code in (0, 2) and "Traceback" not in job.output(), f"{name}: exit code {code}, {last_line(job)}", job.log)
    if code == 0:
        difference = apart(scene.run(name), scene.reference(**changes).path, records=False)
        out.expect("pause_init" in difference or not difference, f"{name}: {difference}", scene.run(name))


def trapped_shards(scene: Scene, out: Outcome, sprung: Path) -> None:
    """torch's usual sharded checkpoints have a pickle named .metadata; ours must not care for one."""
    name = "shards"
    job = scene.start(scene.config(name, parallel="fsdp2", consolidate=False, num_epochs=1, save_training_state=False))
    assert job.wait() == 0, job.log
    torch.save(Trap(sprung), scene.run(name) / "sharded_1" / ".metadata", _use_new_zipfile_serialization=False)
    job = scene.start(str(scene.run(name)), entry="sharding")
    code, out.tries = job.wait(), out.tries + 1
    written = (scene.run(name) / "checkpoint_1").is_file()
    fine = written if code == 0 else code == 2 and "Traceback" not in job.output()
    out.expect(fine, f"sharding.py: exit code {code}, {last_line(job)}", scene.run(name))
    if written:
        found, wanted = read_weights(scene.run(name) / "checkpoint_1"), read_weights(scene.reference().path / "checkpoint_1")
        gap = max(float((found[key] - wanted[key]).abs().max()) for key in wanted)
        out.expect(gap < 1e-6, f"sharding.py: weights differ by {gap:.2g}", scene.run(name))


def trapped_best(scene: Scene, out: Outcome, base: Path) -> None:
    """best.json must not lead out of its folder."""
    folder = scene.folder / "outside" / "run"
    shutil.copytree(base, folder)
    shutil.copy(base / "checkpoint_1", scene.folder / "x")
    (folder / "best.json").write_text('{"file": "../../x", "epoch": 0, "accuracy": 1.0}\n')
    job = scene.start(scene.config("outside", load_model_path=str(folder), only_eval=True))
    code = job.wait()
    out.tries += 1
    led_out, taken = str(scene.folder / "x") in job.output(), f"taking {folder / 'checkpoint_3'}" in job.output()
    out.expect(
        code in (0, 2) and not led_out and (taken or code == 2), f"best.json: exit code {code}, {last_line(job)}", job.log
    )


def trapped_yaml(scene: Scene, out: Outcome, sprung: Path) -> None:
    """A config with a tag that calls a function."""
    config = Path(scene.config("yaml"))
    values = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(values) + f"project: !!python/object/apply:os.mkdir [{sprung}]\n")
    job = scene.start(str(config))
    refused(out, "YAML with a tag", job, job.wait(), "not YAML")
