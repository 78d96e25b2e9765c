"""Faults of what is around a run: a clock that jumps, logging that is gone, a loss that is not a number, hours of training."""

import os
import re
import time
from pathlib import Path
from statistics import median

from chaos_checks import apart
from chaos_faults import EQUAL, KEPT, ends_equal, fault, last_line
from chaos_scene import LIMIT, Hung, Job, Outcome, Scene, begun, events, wait_for

from checkpoint import read_weights, read_whole

# ---------------------------------------------------------------- clock, wandb


@fault("the clock jumps by a day")
def clock(scene: Scene) -> Outcome:
    out = Outcome(f"with a jump back, and one forth, {EQUAL}")
    for i, seconds in enumerate((-86400.0, 86400.0)[: scene.pick(1, 2, 2)]):
        name = f"clock-{i}"
        job = scene.start(scene.config(name, **KEPT), faults={"jump_clock": [8, seconds]})
        code, out.tries = job.wait(), out.tries + 1
        out.expect(code == 0, f"{name}: exit code {code} ({last_line(job)})", job.log)
        times = [record["time"] for record in events(scene.run(name), "step")]
        jumped = max(abs(b - a) for a, b in zip(times, times[1:]))
        out.expect(jumped > 80000, f"{name}: the clock did not jump", scene.run(name))
        difference = apart(scene.run(name), scene.reference(**KEPT).path)
        out.expect(not difference, f"{name}: {difference}", scene.run(name))
    return out


@fault("wandb missing, its server unreachable")
def wandb(scene: Scene) -> Outcome:
    out = Outcome(f"a warning, and {EQUAL}")
    blocked = scene.folder / "blocked"
    (blocked / "wandb").mkdir(parents=True)
    (blocked / "wandb" / "__init__.py").write_text('raise ImportError("there is no wandb here")\n')
    missing = {"PYTHONPATH": f"{blocked}{os.pathsep}{scene.environment['PYTHONPATH']}", "WANDB_MODE": "online"}
    nobody = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}
    cases = {"missing": missing, "unreachable": nobody}
    for name, environment in list(cases.items())[: scene.pick(1, 1, 2)]:
        job = scene.start(scene.config(name, **KEPT | {"wandb": True}), how="python", env=environment)
        code, out.tries = job.wait(), out.tries + 1
        warned = re.search(r"^Warning: wandb .*", job.output(), re.MULTILINE)
        out.expect(code == 0 and bool(warned), f"{name}: exit code {code}, {last_line(job)}", job.log)
        difference = apart(scene.run(name), scene.reference(**KEPT).path)
        out.expect(not difference, f"{name}: {difference}", scene.run(name))
    return out


# ---------------------------------------------------------------- a loss that is not a number


@fault("loss that is not a number at one update")
def nan(scene: Scene) -> Outcome:
    out = Outcome(f"exit code 1, no step taken, batch and weights saved, replay finds all finite; started again {EQUAL}")
    cases = [
        (4, {"optimizer": "adamw", "log_every": 5}),
        (9, {"optimizer": "sgd"}),
        (9, {"gradient_clip": 1.0, "log_every": 4}),
    ]
    for i, (n, changes) in enumerate(cases[: scene.pick(1, 2, 3)]):
        changes, name = KEPT | {"save_every_steps": 3} | changes, f"nan-{i}"
        config, folder = scene.config(name, **changes), scene.run(name)
        job = scene.start(config, faults={"poison": [n]})
        code, out.tries = job.wait(), out.tries + 1
        saved = (folder / "nonfinite_weights").is_file() and (folder / "nonfinite_batch_rank0").is_file()
        said = "no step was taken" in job.output() and "Traceback" not in job.output()
        if not out.expect(code == 1 and saved and said, f"{name}: exit code {code}, {last_line(job)}", job.log):
            continue
        # The undisturbed run up to that update, saved there.
        before = scene.config(f"{name}-before", **changes | {"max_steps": n - 1})
        assert scene.start(before).wait() == 0
        wanted = read_whole(scene.run(f"{name}-before") / "last_state")["model"]
        found = read_weights(folder / "nonfinite_weights")
        same = found.keys() == wanted.keys() and all(found[key].equal(wanted[key]) for key in wanted)
        out.expect(same, f"{name}: the weights are not those before update {n}", folder)
        job = scene.start(str(folder / "nonfinite_batch_rank0"), entry="analysis.replay")
        finite = job.wait() == 0 and "all is finite here" in job.output()
        out.expect(finite, f"{name}: replay ended with {job.wait()}: {last_line(job)}", job.log)
        ends_equal(scene, out, name, config, scene.reference(**changes).path)
    return out


# ---------------------------------------------------------------- a long run


@fault("thousands of steps, a snapshot every hundred")
def soak(scene: Scene) -> Outcome:
    steps = scene.pick(100, 300, 2000)
    out = Outcome(f"{steps} steps: memory at the end within 5 % and 20 MB of that after a quarter, the same open files")
    rows = scene.data / "prosqa_train.json"
    changes = {
        "batch_size_training": 4,
        "num_epochs": steps // 11,
        "eval_every": 10**6,
        "max_latent_stage": 1,
        "keep": "last 2",
    }
    changes |= {"reset_optimizer": False, "save_every_steps": scene.pick(20, 100, 100), "max_val_samples": 2, "log_every": 5}
    config, folder = scene.config("soak", **changes, epochs_per_stage=1, train_path=str(rows)), scene.run("soak")
    job = scene.start(config)
    samples = watch(job, folder, seconds=LIMIT + steps)
    code, out.tries = job.wait(), 1
    out.expect(code == 0, f"exit code {code} ({last_line(job)})", job.log)
    done = samples[-1][0] if samples else 0
    out.expect(done > 0.75 * steps, f"the last look was at step {done} of {steps}", folder)
    early = [s for s in samples if 0.25 * steps <= s[0] < 0.4 * steps]
    late = [s for s in samples if s[0] >= 0.7 * steps]
    if out.expect(bool(early and late), f"{len(samples)} looks are too few", folder):
        memory = [median(s[1] for s in part) for part in (early, late)]
        files = [min(s[2] for s in part) for part in (early, late)]  # there are more while something is being written
        grown = memory[1] - memory[0]
        out.checked += f" ({memory[0] / 1e6:.0f} -> {memory[1] / 1e6:.0f} MB, {files[0]} -> {files[1]} files)"
        out.expect(grown < 0.05 * memory[0] and grown < 20e6, f"memory grew from {memory[0]:.0f} to {memory[1]:.0f} B", folder)
        out.expect(files[0] == files[1], f"open files: {files[0]}, later {files[1]}", folder)
    return out


def watch(job: Job, folder: Path, seconds: float) -> list[tuple[int, int, int]]:
    """(step, resident bytes, open files) a few times a second until the run ends."""
    pid, samples, deadline = job.processes[0].pid, [], time.monotonic() + seconds
    wait_for(job, begun(job, folder))
    metrics = folder / "metrics.jsonl"
    while job.runs:
        if time.monotonic() > deadline:
            job.kill()
            raise Hung(f"the long run did not end within {seconds:.0f} s; see {job.log}")
        try:
            resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
            tail = metrics.read_bytes()[-4000:]
        except OSError:
            break
        steps = re.findall(rb'"train/step": (\d+)', tail)
        if steps and files > 2:  # an ending process has closed them
            samples.append((int(steps[-1]), resident, files))
        time.sleep(0.05)
    return samples
