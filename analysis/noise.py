"""How far an answer depends on the content of the fed-back thoughts: accuracy against noise on what is fed into their slots.

    python -m analysis.noise --checkpoint runs/prosqa/prosqa-coconut --noise-type gaussian_scaled --num-questions 500
    python analysis/noise.py args/noise_quick.yaml --checkpoint runs/gsm/gsm-coconut
    python -m analysis.noise --model Qwen/Qwen2.5-0.5B-Instruct --benchmark gsm8k --comprehensive

Writes final_results.json and accuracy_decay_curve.png to --output-dir (several types: to a folder of it each). The same command
goes on where it was stopped. A flat curve says that thoughts are robust or that they are unused: read it against the
baselines without thoughts. 25 questions carry 20 points of error: use all of a test set, and three seeds for a claim.
Exit codes: 0; 1 where more than 5 % of the answers at a scale failed; 2 for a mistake; 75 when stopped by a signal.
"""

import sys
from datetime import datetime
from pathlib import Path

if __package__ in (None, ""):  # run as `python analysis/noise.py`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from analysis.command import command  # noqa: E402
from analysis.noise_asker import Asker  # noqa: E402
from analysis.noise_fits import plot  # noqa: E402
from analysis.noise_results import not_a_run_folder, result_of, same_run  # noqa: E402
from analysis.noise_settings import Settings, asks_for_branches, read_settings  # noqa: E402
from analysis.noise_sweep import asker_of, baselines_of, experiment_info, noise_info, sweep  # noqa: E402
from files import read_json, write_json  # noqa: E402
from stopping import StopSignals  # noqa: E402

FINAL, CURVE = "final_results.json", "accuracy_decay_curve.png"


@command
def main(argv: list[str] | None = None) -> int:
    """Run from the command line; see the module for the exit codes."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if asks_for_branches(argv):
        from analysis import branching

        return branching.main(argv)
    with StopSignals() as stop:
        return experiment(read_settings(argv, __doc__), stop)


def experiment(settings: Settings, stop: StopSignals) -> int:
    """All sweeps of the settings; returns the exit code."""
    kinds, folder = settings.kinds(), settings.output_dir
    not_a_run_folder(folder)
    asker = asker_of(settings)
    info = experiment_info(asker, settings)
    folder.mkdir(parents=True, exist_ok=True)
    baselines = baselines_of(asker, settings, info, folder, stop)
    claimed = True
    for kind in kinds:
        place = folder if len(kinds) == 1 else folder / "_".join(filter(None, kind))
        place.mkdir(exist_ok=True)
        result = _one(asker, settings, kind, noise_info(info, settings, *kind), place, baselines, stop)
        print(report(result), flush=True)
        print(f"written: {place / FINAL}", flush=True)
        if not result["accuracy_claimed"]:
            print(f"error: more than 5 % of the answers failed; {place / FINAL} claims no accuracy", file=sys.stderr)
            claimed = False
    return 0 if claimed else 1


def _one(asker: Asker, settings: Settings, kind, info: dict, folder: Path, baselines: dict, stop: StopSignals) -> dict:
    """The result of one sweep; one that is finished is read."""
    path = folder / FINAL
    if path.is_file():
        result = read_json(path, "experiment_info", "accuracy_by_noise")
        same_run(path, result["experiment_info"], info)
        return result
    questions = sweep(asker, settings, kind, info, folder, baselines["clean"], stop)
    result = result_of(info, questions, baselines, settings.breakdown_absolute)
    with stop.deferred():
        if result["accuracy_claimed"]:
            plot(result, folder / CURVE)
        if settings.save_results:
            write_json(folder / f"results_{datetime.now():%Y%m%d_%H%M%S}.json", result)
        write_json(path, result)
    return result


def report(result: dict) -> str:
    """A result as lines of text."""
    info = result["experiment_info"]
    passes = info["noise_passes"] if isinstance(info["noise_passes"], str) else ",".join(map(str, info["noise_passes"]))
    lines = [
        f"{'-'.join(filter(None, (info['noise_type'], info['noise_direction'])))} on {info['checkpoint'] or info['model']}, "
        f"{info['benchmark']}, n = {info['num_questions']}; slots: {passes} of {info['latent_passes']}, {info['noise_chain']}, "
        f"schedule {info['schedule']}, layer {info['noise_layer']}"
    ]
    for name, level in result["baselines"].items():
        lines.append(f"{name:>12} {_line(level)}")
    for scale, level in result["accuracy_by_noise"].items():
        test = result["paired_with_clean"].get(scale)
        against = f"  p {test['p_value']:.2g} against clean" if test and result["accuracy_claimed"] else ""
        lines.append(f"{scale:>12} {_line(level)}{against}")
    lines += [f"{fit['formula']:>14}: {_fitted(fit)}" for fit in (result["fits"] or {}).values()]
    if result["breakdown"]:
        found = result["breakdown"]["scale"]
        lines.append(f"breakdown ({result['breakdown']['rule']}): {'none' if found is None else f'scale {found:g}'}")
    return "\n".join(lines)


def _fitted(fit: dict) -> str:
    if fit["parameters"] is None:
        return fit["reason"]
    values = (f"{name} {value:.3g} ± {fit['errors'][name]:.2g}" for name, value in fit["parameters"].items())
    return f"{', '.join(values)}; R² {fit['r2']:.3f}"


def _line(level: dict) -> str:
    counts = f"{level['correct']:>5}/{level['total']:<5} {level['errors']} failed"
    if level["accuracy"] is None:
        return f"    no accuracy      {counts}"
    low, high = (100 * end for end in level["ci95"])
    tokens = f"{level['gen_tokens']:6.1f} tokens" if level["gen_tokens"] is not None else ""
    norms = f"  norms {level['thought_norm']:.3g} + {level['noise_norm']:.3g}" if level["noise_norm"] is not None else ""
    return f"{level['accuracy_percent']:6.1f} % [{low:.1f}, {high:.1f}] {counts} {tokens} {level['label']}{norms}"


if __name__ == "__main__":
    sys.exit(main())
