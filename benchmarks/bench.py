"""The CPU benchmark: steps, generation, padding, the start, several processes, backbones; ratios taken side by side in one run.

    bash scripts/bench.sh                      # benchmarks/cpu.json and cpu.md, about 35 minutes on 2 quiet cores
    bash scripts/bench.sh --quick --out DIR    # few rounds of the smallest shape: does it run
    bash scripts/bench.sh --only P7            # one of --help's measures alone; may be repeated

Every ratio is the median of at least seven per-round ratios after a warm-up, with the 95 % interval of the median beside it;
a target within that interval is a tie. Rows are the official ProsQA validation rows at the last stage, with six latents. What
the measures mean is said in ratios.py, start_and_batches.py, processes.py and mechanisms.py. Of a GPU: bench_gpu.py.
"""

import argparse
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from . import processes, table
from .material import ROOT, Material, Source, environment, generate_data
from .mechanisms import measure_mechanisms
from .ratios import Sizes, measure_generation, measure_steps
from .start_and_batches import measure_batches, measure_padding, measure_start
from .timing import about

CPU = torch.device("cpu")
# A step of GPT-2 124M takes many seconds here: few rows, short rows for the oracle, and uncached tokens by sample.
SIZES = {
    "words 2x128": Sizes(32, 32, 32, rounds=15, evaluated_tokens=32, at_most=30),
    "4x256 V8000": Sizes(4, 4, 4, rounds=15, at_most=20),
    "GPT-2 124M": Sizes(4, 2, 1, rounds=7, new_tokens=64, every=4, at_most=60),
}
QUICK = {
    "words 2x128": Sizes(4, 4, 2, rounds=2, slow_rounds=2, prompts=4, new_tokens=8, every=2, evaluated_tokens=4),
}
MEASURES = ("P1", "P4", "P6", "P7", "scaling", "saving", "mechanisms")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = ROOT.parent / "shared/data"
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="folder of cpu.json and cpu.md")
    parser.add_argument("--data", type=Path, default=shared / "prosqa_valid.json", help="the official validation rows")
    parser.add_argument("--gpt2-tokenizer", type=Path, default=shared / "gpt2_tokenizer", help="folder of GPT-2's tokenizer")
    parser.add_argument("--only", action="append", choices=MEASURES, help="this measure; may be repeated")
    parser.add_argument("--shape", action="append", choices=[*SIZES], help="this shape; may be repeated")
    parser.add_argument("--quick", action="store_true", help="few rounds of the smallest shape: does it run")
    args = parser.parse_args(argv)
    for path, flag in ((args.data, "--data"), (args.gpt2_tokenizer, "--gpt2-tokenizer")):
        if not path.exists():
            print(f"error: {path} does not exist; say with {flag} where it is", file=sys.stderr)
            return 2
    command = "bash scripts/bench.sh " + " ".join(sys.argv[1:] if argv is None else argv)
    sizes = {name: s for name, s in (QUICK if args.quick else SIZES).items() if not args.shape or name in args.shape}
    source = Source(args.data, "official validation rows", args.gpt2_tokenizer, "gpt2", 32 if args.quick else None)
    where, results, begun = "tiny" if args.quick else "cpu", [], time.monotonic()
    for found in measure(source, sizes, args.only or MEASURES, args.quick):
        results += found
        print(f"after {time.monotonic() - begun:.0f} s", *table.as_table(found, where), sep="\n", flush=True)
    described = about(command, CPU, rows=source.rows_name, seconds=f"{time.monotonic() - begun:.0f}")
    table.write(args.out, "cpu", described, results, where)
    print(table.as_markdown(described, results, where))
    return 0


def measure(source: Source, sizes: dict[str, Sizes], measures, quick: bool):
    """Results, part by part."""
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary)
        os.environ |= environment(folder / "cache")
        for shape, size in sizes.items():
            if {"P1", "P4"} & {*measures}:
                material = Material(shape, source, CPU)
                if "P1" in measures:
                    yield measure_steps(material, size, shape)
                if "P4" in measures:
                    yield measure_generation(material, size, shape)
        for shape, load in (processes.QUICK if quick else processes.LOADS).items():
            if {"scaling", "saving"} & {*measures} and (quick or shape in sizes):
                runner = processes.Runner(folder, shape, source, load)
                if "scaling" in measures:
                    yield processes.measure_scaling(runner)
                if "saving" in measures:
                    yield processes.measure_saving(runner)
        if "P6" in measures:
            yield measure_padding(Material("GPT-2 2x64", source, CPU), source.rows_name, 32)
        if "mechanisms" in measures:
            yield measure_mechanisms(quick)
        if {"P6", "P7"} & {*measures}:
            generate_data(folder / "data", (300, 30, 30) if quick else (17886, 300, 500))
            training = replace(source, rows=folder / "data/prosqa_train.json", max_rows=None)
            if "P7" in measures:
                (folder / "start").mkdir()
                small = ("effective_batch_size=8", "batch_size_training=8") if quick else ()
                yield measure_start(folder / "start", training.rows, source.tokenizer, overrides=small)
            if "P6" in measures:
                yield measure_batches(training, 32)


if __name__ == "__main__":
    sys.exit(main())
