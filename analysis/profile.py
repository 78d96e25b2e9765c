"""Where the time of a training step goes, for any config: real updates of a real run, measured on this machine.

    python -m analysis.profile args/prosqa_coconut_1gpu.yaml
    python -m analysis.profile args/prosqa_coconut_1gpu.yaml bf16=True name=m3-bf16 --stage 3 --steps 50

Runs run.py for a few updates of one curriculum stage in a temporary folder, with one process and without checkpoints, and
prints the milliseconds of each phase, the rates and the cost of an evaluation. Any key may follow as key=value; those that
make it a short run (save_path, resume, num_epochs, max_steps, ...) are set here. A load_model_path that does not exist is
left out: speed does not depend on the weights, but an untrained model generates longer. Milliseconds are medians, shares
are of the summed time. Writes profile.json and profile.png to <out>/<name>-stage<S>/.

  prefix          the backbone up to the first thought          suffix+head     the last pass, the head and the loss
  thoughts        the passes between these two                  (without thoughts, the whole forward)
"""

import argparse
import json
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):  # run as `python analysis/profile.py`
    sys.path[0] = str(ROOT)

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from accounting import PHASES  # noqa: E402
from analysis.command import command, parser_of  # noqa: E402
from analysis.figures import plt  # noqa: E402
from files import read_jsonl, whole_file, write_json  # noqa: E402
from utils import Config, load_config  # noqa: E402

RUN = ROOT / "run.py"
STEP_PHASES = tuple(name for name in PHASES if name not in ("evaluation", "saving"))
COLOURS = dict(zip(STEP_PHASES, ("#8c8c8c", "#4c72b0", "#c44e52", "#8172b3", "#55a868", "#ccb974")))

# ---------------------------------------------------------------- running


def last_stage(config: Config) -> int:
    """The stage with the most thoughts."""
    return 0 if config.cot or config.no_cot else config.max_latent_stage


def overrides_of(config: Config, stage: int, updates: int, folder: Path, peak: float | None) -> list[str]:
    """What turns a config into `updates` updates of one stage, a record of each, and one small evaluation.

    An epoch of few rows may end before the updates do, so the stage is given as many epochs as could be needed.
    """
    changes = {
        "save_path": folder, "name": "profile", "only_eval": False, "debug": False, "auto_resume": False,
        "save_training_state": False, "save_only_improve": False, "wandb": False, "early_stop_patience": "null",
        "epochs_per_stage": updates, "resume": stage * updates, "num_epochs": (stage + 1) * updates,
        "max_steps": updates, "log_every": 1, "eval_every": 1, "max_val_samples": min(config.max_val_samples or 32, 32),
    }  # fmt: skip
    if config.load_model_path is not None and not Path(config.load_model_path).exists():
        changes["load_model_path"] = "null"
    if peak is not None:
        changes["peak_tflops"] = peak
    return [f"{key}={value}" for key, value in changes.items()]


def train(yaml_file: str, overrides: list[str], folder: Path, updates: int) -> str:
    """Run run.py to its end with a progress bar; returns what it printed. ValueError with its error line where it fails."""
    metrics, log = folder / "profile" / "metrics.jsonl", folder / "log"
    with open(log, "w") as out:
        process = subprocess.Popen([sys.executable, str(RUN), yaml_file, *overrides], stdout=out, stderr=subprocess.STDOUT)
    try:
        with tqdm(total=updates, desc="starting", unit="update", disable=None, leave=False) as bar:
            while process.poll() is None:
                done = sum(r["updates"] for r in read_jsonl(metrics) if r["event"] == "speed")
                if done > bar.n:
                    bar.set_description("training" if done < updates else "evaluating", refresh=False)
                    bar.update(done - bar.n)
                try:
                    process.wait(0.3)
                except subprocess.TimeoutExpired:
                    pass
    finally:
        if process.poll() is None:  # interrupted
            process.kill()
            process.wait()
    text = log.read_text(errors="replace")
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        raise ValueError(f"run.py was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else ""))
    if process.returncode:
        lines = [line for line in text.splitlines() if line.strip()] or [f"nothing was printed, code {process.returncode}"]
        told = [line for line in lines if line.startswith("error")] or lines
        raise ValueError(f"run.py failed: {told[-1].removeprefix('error: ').strip()}")
    return text


# ---------------------------------------------------------------- reading


def summarise(records: list[dict], stage: int, warmup: int) -> dict:
    """The numbers of a profile from the records of metrics.jsonl, without the first `warmup` updates.

    Returns {"stage", "n_latents", "warmup", "steps", "updates": [{phase: ms}, ...], "phases": {name: {"median_ms", "min_ms",
    "max_ms", "share"}}, "update": the same of their sums, "rates": over all measured updates, without evaluations between
    them, "evaluation": {"seconds", "rows"} or None}. ValueError where no update is left.
    """
    speed = [r for r in records if r["event"] == "speed" and r["stage"] == stage]
    measured, seen = [], 0
    for record in speed:
        if seen >= warmup:
            measured.append(record)
        seen += record["updates"]
    if not measured:
        raise ValueError(f"{seen} updates of stage {stage} were recorded and {warmup} are warm-up; nothing is left to measure")
    per_update = [{k: 1000 * v / r["updates"] for k, v in r["phases"].items() if k in STEP_PHASES} for r in measured]
    names = [name for name in STEP_PHASES if any(name in update for update in per_update)]
    updates = [{name: update.get(name, 0.0) for name in names} for update in per_update]
    totals = [sum(update.values()) for update in updates]
    evaluations = [r for r in records if r["event"] == "eval"]
    epochs = [r for r in records if r["event"] == "train_epoch" and r["stage"] == stage]
    return {
        "stage": stage,
        "n_latents": epochs[-1]["n_latents"] if epochs else None,
        "warmup": seen - sum(r["updates"] for r in measured),
        "steps": sum(r["updates"] for r in measured),
        "phases": {name: _spread([update[name] for update in updates], sum(totals)) for name in names},
        "update": _spread(totals, sum(totals)),
        "rates": _rates(measured),
        "evaluation": {"seconds": evaluations[-1]["seconds"], "rows": evaluations[-1]["total"]} if evaluations else None,
        "updates": updates,
    }


def _spread(milliseconds: list[float], whole: float) -> dict[str, float]:
    return {
        "median_ms": statistics.median(milliseconds),
        "min_ms": min(milliseconds),
        "max_ms": max(milliseconds),
        "share": sum(milliseconds) / whole if whole else 0.0,
    }


def _rates(measured: list[dict]) -> dict[str, float]:
    """The records' rates as one, over the time of the step's own phases; shares weigh by what they are shares of."""
    seconds = sum(r["phases"].get(name, 0.0) for r in measured for name in STEP_PHASES)

    def amount(key: str) -> float:
        return sum(r[key] * r["seconds"] for r in measured)

    def per(part: float, whole: float) -> float:
        return part / whole if whole else 0.0

    tokens = [r["tokens_per_s"] * r["seconds"] for r in measured]
    positions = [n / (1 - r["padded_share"]) for n, r in zip(tokens, measured)]
    rates = {
        "tokens_per_s": per(sum(tokens), seconds),
        "samples_per_s": per(amount("samples_per_s"), seconds),
        "padded_share": per(sum(positions) - sum(tokens), sum(positions)),
        "supervised_share": per(sum(n * r["supervised_share"] for n, r in zip(tokens, measured)), sum(tokens)),
        "tflop_per_update": sum(r["flops"] for r in measured) / sum(r["updates"] for r in measured) / 1e12,
        "tflops_per_s": per(amount("tflops_per_s"), seconds),
    }
    return rates | {"mfu": per(amount("mfu"), seconds)} if all("mfu" in r for r in measured) else rates


def peak_memory_gb(printed: str) -> float | None:
    """The peak memory in run.py's closing line."""
    found = re.findall(r"^Peak memory ([\d.]+) GB", printed, re.MULTILINE)
    return float(found[-1]) if found else None


def device_name(config: Config) -> str:
    """The device that run.py takes under this config, in words."""
    if config.device in ("auto", "cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if config.device == "mps" or (config.device == "auto" and torch.backends.mps.is_available()):
        return f"Apple GPU, {platform.machine()}"
    return f"CPU, threads: {torch.get_num_threads()}, {platform.machine()}"


# ---------------------------------------------------------------- telling


def title(profile: dict) -> str:
    thoughts = "" if profile["n_latents"] is None else f", {profile['n_latents']} thoughts"
    return (
        f"{profile['name']}, stage {profile['stage']}{thoughts}: {profile['steps']} updates "
        f"after {profile['warmup']} of warm-up on {profile['device']}"
    )


def report(profile: dict) -> str:
    """The profile as text."""
    lines = [f"{'phase':<14}{'ms/update':>11}{'min .. max':>24}{'share':>9}"]
    for name, spread in [*profile["phases"].items(), ("update", profile["update"])]:
        extremes = f"{spread['min_ms']:.1f} .. {spread['max_ms']:.1f}"
        lines.append(f"{name:<14}{spread['median_ms']:>11.1f}{extremes:>24}{100 * spread['share']:>7.1f} %")
    rates, evaluation, memory = profile["rates"], profile["evaluation"], profile["peak_memory_gb"]
    rows = [
        ("tokens/s", f"{rates['tokens_per_s']:,.0f}"),
        ("samples/s", f"{rates['samples_per_s']:,.1f}"),
        ("padded share", f"{100 * rates['padded_share']:.1f} %"),
        ("supervised", f"{100 * rates['supervised_share']:.1f} % of real tokens"),
        ("TFLOP/update", f"{rates['tflop_per_update']:.3g}"),
        ("TFLOP/s", f"{rates['tflops_per_s']:.3g}"),
        ("MFU", f"{100 * rates['mfu']:.1f} %" if "mfu" in rates else "the device's peak is not known; give --peak"),
        ("peak memory", "not told" if memory is None else f"{memory:.2f} GB"),
        ("evaluation", f"{evaluation['seconds']:.2f} s for {evaluation['rows']} rows" if evaluation else "none"),
    ]
    return "\n".join([title(profile), "", *lines, "", *(f"{key:<14}{value}" for key, value in rows)])


def draw(profile: dict, path: Path) -> None:
    """One stacked bar of the median phases, labelled, above one thin bar an update, so that outliers are seen."""
    updates, phases = profile["updates"], profile["phases"]
    widest = max(profile["update"]["max_ms"], sum(p["median_ms"] for p in phases.values()))
    height = min(0.9 + 0.16 * len(updates), 7)
    figure, (whole, single) = plt.subplots(
        2, 1, figsize=(9, 2.3 + height), sharex=True, height_ratios=[1.5, height], layout="constrained"
    )
    left, centres = 0.0, []
    for name, spread in phases.items():
        whole.barh(0, spread["median_ms"], 0.8, left, color=COLOURS[name], edgecolor="white", lw=0.5)
        centres.append(left + spread["median_ms"] / 2)
        left += spread["median_ms"]
    for (name, spread), centre, x in zip(phases.items(), centres, spaced(centres, 0.15 * widest, widest)):
        text = f"{name}\n{spread['median_ms']:.1f} ms, {100 * spread['share']:.0f} %"
        whole.plot([centre, x], [0.42, 0.75], color=COLOURS[name], lw=1)
        whole.text(x, 0.8, text, ha="center", va="bottom", fontsize=8)
    whole.set(ylim=(-0.45, 1.5), yticks=[0], yticklabels=["median"])
    lefts = [0.0] * len(updates)
    for name in phases:
        widths = [update[name] for update in updates]
        single.barh(range(1, len(updates) + 1), widths, 0.8, lefts, color=COLOURS[name])
        lefts = [a + b for a, b in zip(lefts, widths)]
    single.set(ylim=(len(updates) + 0.6, 0.4), xlim=(0, 1.02 * widest or 1), ylabel="update", xlabel="ms per update")
    single.yaxis.get_major_locator().set_params(integer=True)
    for axes in (whole, single):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    whole.spines["bottom"].set_visible(False)
    whole.tick_params(axis="x", length=0)
    figure.suptitle(title(profile), fontsize=9)
    with whole_file(path, "wb") as file:
        figure.savefig(file, dpi=150, format="png")
    plt.close(figure)


def spaced(centres: list[float], gap: float, width: float) -> list[float]:
    """Places for labels near ascending centres: at least `gap` apart, and off the two ends of `width` by half of it."""
    gap = min(gap, width / max(len(centres), 1))
    places: list[float] = []
    for centre in centres:
        places.append(max(centre, places[-1] + gap if places else gap / 2))
    limit = width - gap / 2
    for i in reversed(range(len(places))):
        places[i] = min(places[i], limit)
        limit = places[i] - gap
    return places


# ---------------------------------------------------------------- the command


def profile_run(args: argparse.Namespace) -> tuple[dict, Path]:
    """Train, read, write; returns the profile and the folder it is in."""
    config = load_config(args.config, args.overrides)
    stage = last_stage(config) if args.stage is None else args.stage
    if args.steps < 1 or args.warmup < 0 or stage < 0:
        raise ValueError("--steps must be at least 1, --warmup and --stage at least 0")
    if config.stage(stage * config.epochs_per_stage) != stage:
        raise ValueError(f"--stage: {args.stage}, but a model with cot or no_cot has no stages; leave it out")
    updates = args.warmup + args.steps
    print(f"Profiling {args.config}: {updates} updates of stage {stage}", flush=True)
    with tempfile.TemporaryDirectory(prefix="profile-") as temporary:
        folder = Path(temporary)
        changes = overrides_of(config, stage, updates, folder, args.peak)
        printed = train(args.config, [*args.overrides, *changes], folder, updates)
        records = read_jsonl(folder / "profile" / "metrics.jsonl")
        versions = json.loads((folder / "profile" / "run.json").read_text())["versions"]
    profile = {
        "schema_version": 1,
        "name": config.name,
        "config": config.model_dump(),
        "device": device_name(config),
        "versions": versions,
        "peak_memory_gb": peak_memory_gb(printed),
        **summarise(records, stage, args.warmup),
    }
    out = args.out / f"{config.name}-stage{stage}"
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "profile.json", profile)
    draw(profile, out / "profile.png")
    return profile, out


@command
def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__, "profile.py")
    parser.add_argument("config", help="YAML file (see args/)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the file")
    parser.add_argument("--steps", type=int, default=20, help="updates to measure (default: 20)")
    parser.add_argument("--warmup", type=int, default=3, help="updates before them that do not count (default: 3)")
    parser.add_argument("--stage", type=int, help="curriculum stage (default: the last, with the most thoughts)")
    parser.add_argument("--peak", type=float, metavar="TFLOPS", help="peak of the device, where the table does not know it")
    parser.add_argument("--out", type=Path, default=Path("results/profile"), help="default: results/profile")
    args = parser.parse_intermixed_args(argv)
    profile, out = profile_run(args)
    print(f"\n{report(profile)}\n\nWritten: {out}/profile.json, profile.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
