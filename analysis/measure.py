"""All experiments on checkpoints, in one process: what `analysis.corruption` and the others do one at a time.

    python -m analysis.measure --checkpoint runs/quickstart/m3_coconut --output_dir results
    python -m analysis.measure --study results/study-quickstart --models m3,m3-s1 --experiments ood,corruption
    python -m analysis.measure --study results/study-quickstart --set probing.nonlinear=none

An experiment that is not defined for a model is left out; one whose checks fail is reported at the end (exit code 1), and
the others go on.
"""

import importlib
import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # run as `python analysis/measure.py`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from analysis.command import command, parser_of  # noqa: E402
from analysis.experiment import Experiment, load_subject, named_checkpoints  # noqa: E402

EXPERIMENTS = ("ood", "corruption", "confidence", "token_count", "causal_sanity", "causal_tracing", "psr", "probing")
SHARED_FLAGS = ("epoch", "data", "data_dir", "num_samples", "output_dir", "seed", "batch_size", "device", "force")


def experiment(name: str) -> Experiment:
    """The experiment of a module of this folder. Raises ValueError that lists the known ones."""
    if name not in EXPERIMENTS:
        raise ValueError(f"experiment {name!r} is unknown; known: {', '.join(EXPERIMENTS)}")
    return importlib.import_module(f"analysis.{name}").EXPERIMENT


def flags(options: dict) -> list[str]:
    """Command-line flags of {name: value}; True is a bare flag, False and None are left out."""
    given = []
    for name, value in options.items():
        if value is True:
            given += [f"--{name}"]
        elif value is not None and value is not False:
            given += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return given


def measure(paths: list[Path], names: list[str], shared: dict, own: dict[str, dict]) -> dict[str, int]:
    """Run experiments on checkpoints; {"experiment label": exit code}.

    `shared`: flags of all experiments; `own`: {experiment: its flags}.
    """
    codes = {}
    for path in paths:
        key = load_subject(path, shared.get("epoch") or "final", shared.get("batch_size"), shared.get("device") or "auto").key
        for name in names:
            if key not in experiment(name).models:
                continue
            started = time.time()
            argv = ["--checkpoint", str(path), *flags(shared), *flags(own.get(name, {}))]
            codes[f"{name} {path}"] = experiment(name).main(argv)
            print(f"{name} {path}: exit {codes[f'{name} {path}']}, {time.time() - started:.1f} s", flush=True)
    return codes


@command
def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__, "python -m analysis.measure")
    parser.add_argument("--checkpoint", nargs="+", type=Path, help="checkpoint files or run folders")
    parser.add_argument("--study", type=Path, help="a study's result folder instead")
    parser.add_argument("--models", help="with --study: keys or labels, by comma (default: all)")
    parser.add_argument("--experiments", default=",".join(EXPERIMENTS), help="by comma (default: all)")
    parser.add_argument("--set", action="append", default=[], metavar="EXPERIMENT.FLAG=VALUE", help="a flag of one experiment")
    for name in SHARED_FLAGS[:-1]:
        kind = int if name in ("num_samples", "seed", "batch_size") else str
        parser.add_argument(f"--{name}", type=kind, help="as each experiment's own --help says")
    parser.add_argument("--force", action="store_true", help="measure again what is finished")
    args = parser.parse_args(argv)
    own: dict[str, dict] = {}
    for item in args.set:
        place, equals, value = item.partition("=")
        name, dot, flag = place.partition(".")
        if not (equals and dot):
            raise ValueError(f"--set {item}: must have the form experiment.flag=value")
        own.setdefault(name, {})[flag] = {"True": True, "False": False}.get(value, value)
    names = args.experiments.split(",")
    models = tuple(sorted({key for name in names + list(own) for key in experiment(name).models}))
    shared = {name: getattr(args, name) for name in SHARED_FLAGS}
    if args.study and not args.output_dir:
        shared["output_dir"] = args.study / (args.epoch or "final")
    codes = measure(named_checkpoints(args, models), names, shared, own)
    failed = [name for name, code in codes.items() if code]
    print(f"{len(codes) - len(failed)} of {len(codes)} experiments done" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return max(codes.values(), default=0)


if __name__ == "__main__":
    sys.exit(main())
