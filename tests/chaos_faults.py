"""Faults of processes: killed, asked to stop, one of two gone, two where one should be, another number at each start.

    outcome = FAULTS["kill"].happen(Scene(folder, QUICK, seed=0))

A fault is a function of a scene that returns an Outcome: how often it happened and what was lost. Registered by `fault`.
"""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from chaos_checks import apart, unreadable
from chaos_scene import FULL, TEST, Hung, Job, Outcome, Scene, begun, events, wait_for

from checkpoint import read_weights, read_whole

KEPT = {"reset_optimizer": False, "save_every_steps": 2, "log_every": 1}  # Adam kept over epochs, snapshots within them
EQUAL = "it ends equal to an undisturbed run"


@dataclass(frozen=True)
class Fault:
    """A fault, its title, and how many processes its runs have."""

    title: str
    ranks: int
    function: Callable[[Scene], Outcome]

    def happen(self, scene: Scene) -> Outcome:
        """Let it happen in a folder of its own; a process that hangs or a folder in disorder is a loss."""
        own = scene.of(self.function.__name__)
        try:
            return self.function(own)
        except Hung as error:
            return Outcome("that it ends", tries=1, losses=[str(error)])
        finally:
            own.close()


FAULTS: dict[str, Fault] = {}


def fault(title: str, ranks: int = 1):
    """Register a function as the fault of its name."""

    def register(function):
        FAULTS[function.__name__.replace("_", "-")] = Fault(title, ranks, function)
        return function

    return register


def ends_equal(scene: Scene, out: Outcome, name: str, config: str, reference: Path, **start) -> bool:
    """Start a run once more with nothing in its way: it must end with 0, equal to its reference."""
    job = scene.start(config, **start)
    code = job.wait()
    if not out.expect(code == 0, f"the restart of {name} ended with {code} ({last_line(job)})", job.log):
        return False
    difference = apart(scene.run(name), reference)
    return out.expect(not difference, f"{name}: {difference}", scene.run(name))


def last_line(job: Job) -> str:
    return (job.output().strip().splitlines() or ["no output"])[-1][:200]


# ---------------------------------------------------------------- SIGKILL


def kill_until_it_ends(scene: Scene, out: Outcome, name: str, changes: dict, most: int, how: str, ranks: int) -> None:
    """SIGKILL one run at random moments, again and again (at most `most` times), until it ends; one in eight at start-up."""
    reference = scene.reference(ranks, **changes)
    config, folder = scene.config(name, **changes), scene.run(name)
    for _ in range(most):
        job = scene.start(config, how=how, ranks=ranks)
        if scene.random.random() < 1 / 8:
            moment, started = scene.random.uniform(0, 3), lambda: True
        else:
            moment, started = scene.random.uniform(0, reference.seconds), begun(job, folder)
        if not wait_for(job, started):
            break
        due = time.monotonic() + moment
        if not wait_for(job, lambda due=due: time.monotonic() > due):
            break
        job.kill()
        out.tries += 1
        problems = unreadable(folder)
        out.expect(not problems, f"after a kill of {name}: {problems}", folder)
    ends_equal(scene, out, name, config, reference.path, how=how, ranks=ranks)


LEARNS = {"coconut": False, "no_cot": True, "lr": 5e-3, "num_epochs": 6}  # validated on its training rows: some improve
KILLED = [
    KEPT | {"num_epochs": 5},
    {"reset_optimizer": True, "save_every_steps": 4, "async_save": False, "num_epochs": 5},
    {"save_only_improve": True, "reset_optimizer": "stage", "save_every_steps": 3, "log_every": 1},
    KEPT | {"feedback_mode": "pause_curriculum", "save_every_steps": 3, "num_epochs": 5, "keep": "last 2"},
    KEPT | {"async_save": False, "num_epochs": 5, "keep": "best"},
]


def killed_configs(scene: Scene) -> list[dict]:
    """The configs of KILLED; the one that keeps improvements learns something."""
    own_rows = {"val_path": str(scene.data / "prosqa_train.json")}
    return [changes | LEARNS | own_rows if "save_only_improve" in changes else changes for changes in KILLED]


@fault("SIGKILL at a random moment, one process")
def kill(scene: Scene) -> Outcome:
    out = Outcome(f"{EQUAL}; no unreadable file after any kill")
    wanted, configs, i = scene.pick(1, 4, 22), killed_configs(scene), 0
    while out.tries < wanted and i < 4 * len(configs):
        most = min(wanted - out.tries, scene.pick(1, 3, 5))
        how = "forked" if scene.size == TEST else "python"
        kill_until_it_ends(scene, out, f"killed-{i}", configs[i % len(configs)], most, how, ranks=1)
        i += 1
    return out


@fault("SIGKILL of all of 2 processes (DDP, FSDP2)", ranks=2)
def kill_ranks(scene: Scene) -> Outcome:
    out = Outcome(f"{EQUAL}; no unreadable file or shard after any kill")
    wanted, i = scene.pick(1, 3, 20), 0
    configs = [KEPT, KEPT | {"parallel": "fsdp2"}, {"async_save": False, "save_every_steps": 3}]
    configs = configs[1:2] if scene.size == TEST else configs
    while out.tries < wanted and i < 4 * len(configs):
        most = min(wanted - out.tries, scene.pick(1, 1, 4))
        how = "forked" if scene.size == TEST else "torchrun"
        kill_until_it_ends(scene, out, f"killed-{i}", configs[i % len(configs)], most, how, ranks=2)
        i += 1
    return out


@fault("SIGKILL right before and after every rename and removal")
def rename(scene: Scene) -> Outcome:
    out = Outcome(f"no unreadable file under a final name, no leftover, {EQUAL}")
    short = {"num_epochs": 2, "max_latent_stage": 1}
    short |= KEPT | {"save_every_steps": 3}
    cases = [("whole", short | {"feedback_mode": "pause_curriculum"}), ("shards", short | {"parallel": "fsdp2"})]
    cases += [("kept", short | {"keep": "last 1", "async_save": False})]
    stride = scene.pick(9, 12, 1)
    places = [(*case, when) for case in cases for when in ("before", "after")]
    for kind, changes, when in places if scene.size != TEST else places[:4:3]:
        # The smaller sizes take every so-many-th, beginning at random.
        n = scene.random.randint(1, stride)
        while die_at(scene, out, f"{kind}-{when}-{n}", changes, n, when):
            n += stride
            if scene.size == TEST:
                break
    return out


def die_at(scene: Scene, out: Outcome, name: str, changes: dict, n: int, when: str) -> bool:
    """Kill a run at its n-th rename and let it go on; False where it has fewer."""
    config, folder = scene.config(name, **changes), scene.run(name)
    job = scene.start(config, faults={"die_at_rename": [n, when, str(folder)]})
    code = job.wait()
    if code == 0:
        return False
    out.tries += 1
    out.expect(code == -signal.SIGKILL, f"{name} ended with {code} ({last_line(job)})", job.log)
    problems = unreadable(folder)
    out.expect(not problems, f"{name}: {problems}", folder)
    ends_equal(scene, out, name, config, scene.reference(**changes).path)
    return True


# ---------------------------------------------------------------- one of two processes


@fault("SIGKILL of one of 2 processes", ranks=2)
def lost_rank(scene: Scene) -> Outcome:
    out = Outcome(f"the job ends within 60 s with exit code 75 (with --max-restarts it goes on by itself); {EQUAL}")
    reference = scene.reference(2, **KEPT)
    cases = [(1, ()), (0, ()), (1, ("--max-restarts=3",)), (0, ("--max-restarts=3",))][: scene.pick(1, 3, 4)][
        :: scene.pick(1, 2, 1)
    ]
    for i, (rank, options) in enumerate(cases):
        name = f"lost-{i}"
        config, folder = scene.config(name, **KEPT), scene.run(name)
        job = scene.start(config, how="agent", ranks=2, options=options)
        wait_for(job, begun(job, folder))
        due = time.monotonic() + scene.random.uniform(0, 0.7 * reference.seconds)
        if not wait_for(job, lambda due=due: time.monotonic() > due):
            continue
        job.kill(rank)
        died, out.tries = time.monotonic(), out.tries + 1
        code, wanted = job.wait(), 0 if options else 75
        took = time.monotonic() - died
        out.expect(code == wanted, f"{name}: exit code {code} instead of {wanted} ({last_line(job)})", job.log)
        out.expect(bool(options) or took < 60, f"{name}: the job took {took:.0f} s to end", job.log)
        if options:
            difference = apart(folder, reference.path)
            out.expect(not difference, f"{name}: {difference}", folder)
        else:
            how = "forked" if scene.size == TEST else "agent"
            ends_equal(scene, out, name, config, reference.path, how=how, ranks=2)
    return out


# ---------------------------------------------------------------- signals


@fault("SIGTERM, SIGUSR1, SIGINT: start-up, training, evaluation")
def stop(scene: Scene) -> Outcome:
    out = Outcome(f"exit code 75, a snapshot exactly where the event `stopped` says, {EQUAL}")
    cases = [("forked", 1, signal.SIGTERM, "evaluation"), ("forked", 1, signal.SIGUSR1, "training")]
    if scene.size != TEST:
        cases += [("forked", 1, signal.SIGINT, "training"), ("python", 1, signal.SIGTERM, "training")]
        cases += [("python", 1, signal.SIGTERM, "start-up"), ("agent", 2, signal.SIGTERM, "training")]
    if scene.size == FULL:
        cases += [("torchrun", 2, signal.SIGTERM, "training"), ("python", 1, signal.SIGTERM, "evaluation")]
    for i, case in enumerate(cases * scene.pick(1, 1, 2)):
        for attempt in range(5):
            if stop_one(scene, out, f"stopped-{i}-{attempt}", *case):
                break
    return out


def stop_one(scene: Scene, out: Outcome, name: str, how: str, ranks: int, number: int, when: str) -> bool:
    """Send a signal during a phase and go on from there; False where the run was not caught in that phase."""
    long_evaluation = {"val_path": str(scene.data / "prosqa_train.json"), "max_new_tokens": 120} if when == "evaluation" else {}
    changes = KEPT | {"num_epochs": 4} | long_evaluation
    config, folder, reference = scene.config(name, **changes), scene.run(name), scene.reference(ranks, **changes)
    job = scene.start(config, how=how, ranks=ranks)
    if when == "start-up":
        caught = wait_for(job, lambda: "Config: " in job.output())
    elif when == "evaluation":
        caught = wait_for(job, lambda: bool(events(folder, "train_epoch")))
        due = time.monotonic() + 0.05
    else:
        caught = wait_for(job, begun(job, folder))
        due = time.monotonic() + scene.random.uniform(0, 0.6 * reference.seconds)
    if when != "start-up":
        caught = caught and wait_for(job, lambda: time.monotonic() > due)
    if not caught:
        return False
    job.send(number)
    code = job.wait()
    if code == 0:
        return False  # it was over before it noticed
    stopped, evaluated = events(folder, "stopped"), {record["epoch"] for record in events(folder, "eval")}
    if when == "evaluation" and not (
        stopped and stopped[-1]["step_in_epoch"] == 0 and stopped[-1]["epoch"] - 1 not in evaluated
    ):
        return False
    out.tries += 1
    wanted = 1 if how == "torchrun" else 75
    out.expect(code == wanted, f"{name}: exit code {code} instead of {wanted} ({last_line(job)})", job.log)
    if when != "start-up" and out.expect(bool(stopped), f"{name}: no event `stopped`", folder):
        place = (stopped[-1]["epoch"], stopped[-1]["step_in_epoch"])
        state = read_whole(folder / "last_state")["position"] if (folder / "last_state").is_file() else {}
        found = (state.get("epoch"), state.get("step"))
        nothing_yet = place == (0, 0) and not state
        out.expect(found == place or nothing_yet, f"{name}: stopped at {place}, the snapshot is of {found}", folder)
    ends_equal(scene, out, name, config, reference.path, how=how if scene.size == FULL else "forked", ranks=ranks)
    return True


# ---------------------------------------------------------------- two starts, other numbers of processes


@fault("two starts on one folder")
def two_starts(scene: Scene) -> Outcome:
    out = Outcome(f"one is refused with exit code 2 and one line, of the other: {EQUAL}")
    how = "forked" if scene.size == TEST else "python"
    for i, at_once in enumerate([False, True][: scene.pick(1, 2, 2)] * scene.pick(1, 1, 3)):
        name, changes = f"twice-{i}", KEPT | {"num_epochs": 5}
        config, folder = scene.config(name, **changes), scene.run(name)
        first = scene.start(config, how=how)
        if not at_once:
            wait_for(first, begun(first, folder))
        second = scene.start(config, how="forked" if not at_once else how)
        codes = sorted([first.wait(), second.wait()])
        if codes == [0, 0] and at_once:
            continue  # the second came when the first was done
        out.tries += 1
        lines = [line for line in first.output().splitlines() if line.startswith("error: another process is training in")]
        out.expect(codes == [0, 2] and len(lines) == 1, f"{name}: exit codes {codes}, {lines}", first.log)
        difference = apart(folder, scene.reference(**changes).path)
        out.expect(not difference, f"{name}: {difference}", folder)
    return out


@fault("another number of processes at each start", ranks=2)
def world_size(scene: Scene) -> Outcome:
    out = Outcome("the rows of every update are those of one process; SGD weights within 1e-6 of its")
    same = {"optimizer": "sgd", "lr": 0.1, "batch_size_training": 4, "gradient_accumulation_steps": 4, "reset_optimizer": False}
    same |= {"num_epochs": 3, "log_every": 1, "uniform_prob": 0.5, "pad_latent_to_max": False, "save_every_steps": 2}
    reference = scene.reference(**same)
    orders = [
        [(4, "ddp"), (1, "ddp"), (2, "ddp")],
        [(2, "ddp"), (1, "fsdp2"), (2, "ddp")],
        [(2, "fsdp2"), (1, "fsdp2"), (4, "fsdp2")],
        [(1, "fsdp2"), (2, "fsdp2"), (1, "ddp")],
    ]
    orders = [[(2, "fsdp2"), (1, "ddp")]] if scene.size == TEST else orders[: scene.pick(0, 2, 4)]
    for i, order in enumerate(orders):
        # The first start sets the rows of an update; all keep them. The cuts are within the first and the second epoch.
        ranks = order[0][0]
        name, changes = f"sizes-{i}", same | {"gradient_accumulation_steps": 4 // ranks}
        config, folder = scene.config(name, **changes), scene.run(name)
        for (ranks, parallel), cut in zip(order, ["max_steps=2", "max_steps=5", None][-len(order) :]):
            job = scene.start(config, f"parallel={parallel}", *([cut] if cut else []), ranks=ranks)
            code = job.wait()
            ended = f"{name} with {ranks} processes, {parallel}: exit code {code} ({last_line(job)})"
            if not out.expect(code == 0, ended, job.log):
                break
        else:
            out.tries += 1
            same_updates_and_weights(out, name, folder, reference.path)
    return out


def same_updates_and_weights(out: Outcome, name: str, folder: Path, reference: Path) -> None:
    """Each update once, on the reference's rows, and the final weights but for rounding."""
    rows = [{r["train/step"]: r["rows"] for r in events(path, "step")} for path in (folder, reference)]
    out.expect(rows[0] == rows[1], f"{name}: rows of the updates {rows[0]} instead of {rows[1]}", folder)
    out.expect(len(events(folder, "step")) == len(rows[1]), f"{name}: some updates were done twice", folder)
    found, wanted = (read_weights(path / "checkpoint_3") for path in (folder, reference))
    gap = max(float((found[key].double() - wanted[key].double()).abs().max()) for key in wanted)
    out.expect(gap < 1e-6, f"{name}: weights differ by {gap:.2g}", folder)
