"""Step and evaluation speed as ratios measured side by side in one process; absolute times only on a GPU.

    bash scripts/bench.sh [--out benchmarks] [--quick]

P1  M3 step at the last stage / plain GPT2LMHeadModel step (full logits, library loss) on the same padded tokens
P2  M5 step / our own CoT step (thought tokens as ordinary text) on the same tokens
P3  peak memory of an M3 training step (GPU)
P4  samples/s of batched, cached generation / uncached generation of one sample at a time
P7  seconds from starting run.py to the beginning of the first update on 17,886 rows, tokens not yet cached, and cached
ref M3 step as n + 1 full passes without a cache (the slow oracle of the tests) / plain step

A step is forward and backward. Both sides of a ratio alternate; the figure is the median of the per-round ratios, with
the smallest and largest beside it. Rows are the official ProsQA validation rows at the last stage with six latents.
"""

import argparse
import datetime
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402

import backbones  # noqa: E402
from coconut import Coconut  # noqa: E402
from dataset import MyCollator, TokenTable, get_cot_latent_dataset, get_dataset, get_question_latent_dataset  # noqa: E402
from utils import Config, whole_file, write_json  # noqa: E402

SHAPES = {  # name: (layers, width, heads, vocabulary or None for the tokenizer's, tokenizer)
    "words 2x128": (2, 128, 4, None, "words"),
    "4x256 V8000": (4, 256, 8, 8000, "gpt2"),
    "GPT-2 124M": (12, 768, 12, None, "gpt2"),
}
TARGETS = {  # CPU; performance is judged against these
    ("P1", "words 2x128"): "<= 1.3", ("P1", "4x256 V8000"): "<= 0.9", ("P1", "GPT-2 124M"): "<= 0.9",
    "P2": "<= 1.02", "P4": ">= 20", "P7": "<= 20 s",
}  # fmt: skip
PEAK_TFLOPS = {"H100": (67, 494, 989), "H200": (67, 494, 989), "A100": (19.5, 156, 312)}  # dense fp32, TF32, bf16


class Bench:
    """One model shape with a batch of official rows at the last stage."""

    def __init__(self, name: str, data: Path, gpt2_tokenizer: Path, batch_size: int, device: torch.device):
        layers, width, heads, vocabulary, kind = SHAPES[name]
        self.device = device
        self.tokenizer = backbones.load_tokenizer(str(gpt2_tokenizer if kind == "gpt2" else ROOT / "backbones/prosqa_words"))
        ids = backbones.add_thought_tokens(self.tokenizer)
        size = vocabulary or len(self.tokenizer)
        self.fold = size if size < len(self.tokenizer) else None  # a smaller vocabulary keeps the lengths of the rows
        self.latent = ids.latent % size
        config = GPT2Config(
            vocab_size=size, n_layer=layers, n_embd=width, n_head=heads, n_positions=1024,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=size - 1,
        )  # fmt: skip
        torch.manual_seed(0)
        self.base = GPT2LMHeadModel(config).to(device)
        flags = {"coconut": True, "max_latent_stage": 6, "name": "bench", "save_path": "-", "val_path": "-"}
        table = TokenTable(get_dataset(data, self.tokenizer))
        get = {"train": get_cot_latent_dataset, "prompt": get_question_latent_dataset}
        self.rows = {k: f(6, table, Config(flags), ids.start, ids.latent, ids.end) for k, f in get.items()}
        self.latent_in_rows, self.batch_size = ids.latent, batch_size

    def wrapped(self, mode: str) -> Coconut:
        eos = self.base.config.eos_token_id
        return Coconut(self.base, self.latent, self.latent, self.latent, eos, mode).to(self.device)

    def batch(self, kind: str, start: int, size: int | None = None, left: bool = False) -> dict:
        size = size or self.batch_size
        rows = [self.rows[kind][i % 300] for i in range(start * size, (start + 1) * size)]
        batch = MyCollator(self.tokenizer, self.latent_in_rows, left=left)(rows)
        batch.pop("idx")
        if self.fold:
            # Only the thought slots may carry the latent id.
            slots = batch["input_ids"] == self.latent_in_rows
            folded = batch["input_ids"] % self.fold
            folded[folded == self.latent] -= 1
            batch["input_ids"] = torch.where(slots, self.latent, folded)
            if "labels" in batch:
                batch["labels"] = torch.where(batch["labels"] == -100, -100, batch["labels"] % self.fold)
        return {key: value.to(self.device) for key, value in batch.items()}


def seconds(work, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(first, second, rounds: int, device: torch.device) -> dict:
    """Time two callables (each takes a round number) in turn. Returns the ratio first / second: median, min, max, n."""
    first(0), second(0)
    ratios = []
    for i in range(1, rounds + 1):
        order = (first, second) if i % 2 else (second, first)
        times = {work: seconds(partial(work, i), device) for work in order}
        ratios.append(times[first] / times[second])
    return {"ratio": statistics.median(ratios), "min": min(ratios), "max": max(ratios), "rounds": rounds}


def step(loss: torch.Tensor, model) -> None:
    loss.backward()
    model.zero_grad(set_to_none=True)


def slow_oracle_step(bench: Bench, batch: dict) -> None:
    """n + 1 full passes without a cache, all logits."""
    embeds = bench.base.get_input_embeddings()(batch["input_ids"])
    latent = batch["input_ids"] == bench.latent
    rest = {"attention_mask": batch["attention_mask"], "position_ids": batch["position_ids"], "use_cache": False}
    for column in latent.any(0).nonzero().flatten().tolist():
        states = bench.base.base_model(inputs_embeds=embeds, **rest).last_hidden_state
        here = latent & (torch.arange(latent.shape[1], device=latent.device) == column)
        embeds = torch.where(here[..., None], states[:, column - 1 : column], embeds)
    step(bench.base(inputs_embeds=embeds, labels=batch["labels"], **rest).loss, bench.base)


def uncached_one_by_one(bench: Bench, model: Coconut, row: dict, new_tokens: int) -> None:
    """Greedy generation that computes every column again for every token."""
    ids = row["input_ids"]
    with torch.no_grad():
        for _ in range(new_tokens):
            logits = model.head(model.rollout(ids).hidden_BTD[:, -1])
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)


def measure_shape(name: str, bench: Bench, rounds: int, generated: int, oracle_rounds: int) -> list[dict]:
    """P1, P2, P4 and the oracle for one shape."""
    device, batches = bench.device, itertools.count()
    made = {}

    def batch(i: int) -> dict:
        return made.setdefault(i, bench.batch("train", i))

    m3, m5, cot = (bench.wrapped(mode).train() for mode in ("continuous", "pause_curriculum", "none"))
    plain = lambda i: step(bench.base(**batch(i), use_cache=False).loss, bench.base)  # noqa: E731
    runs = {
        "P1": compare(lambda i: step(m3(**batch(i)).loss, m3), plain, rounds, device),
        "P2": compare(lambda i: step(m5(**batch(i)).loss, m5), lambda i: step(cot(**batch(i)).loss, cot), 2 * rounds, device),
        "ref": compare(lambda i: slow_oracle_step(bench, batch(i)), plain, oracle_rounds, device),
    }
    m3.eval()
    bench.base.config.eos_token_id = m3.eos_token_id = -1  # random weights: let every row run to the end
    many = 32 if bench.batch_size == 32 else 16
    prompts = bench.batch("prompt", next(batches), size=many, left=True)
    cached = seconds(lambda: m3.generate(**prompts, max_new_tokens=generated), device)
    cached = min(cached, seconds(lambda: m3.generate(**prompts, max_new_tokens=generated), device))
    single = bench.batch("prompt", 0, size=1)
    slow = seconds(lambda: uncached_one_by_one(bench, m3, single, generated), device)
    runs["P4"] = {"ratio": many * slow / cached, "batch": many, "new_tokens": generated, "rounds": 1}
    return [{"measure": key, "shape": name, "batch_size": bench.batch_size, **value} for key, value in runs.items()]


def measure_gpu(bench: Bench, rounds: int) -> list[dict]:
    """P3, tokens/s and MFU of M3 steps with AdamW in fp32, TF32 and bf16 autocast (GPT-2 124M)."""
    results = []
    device, config = bench.device, bench.base.config
    peaks = next((p for key, p in PEAK_TFLOPS.items() if key in torch.cuda.get_device_name()), (None,) * 3)
    model = bench.wrapped("continuous").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    for (precision, autocast, matmul), peak in zip(
        (("fp32", False, "highest"), ("TF32", False, "high"), ("bf16", True, "high")), peaks
    ):
        torch.set_float32_matmul_precision(matmul)
        torch.cuda.reset_peak_memory_stats()
        batches = [bench.batch("train", i) for i in range(rounds)]

        def train(i: int) -> None:
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):  # noqa: B023
                loss = model(**batches[i]).loss  # noqa: B023
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        train(0)
        elapsed = sum(seconds(lambda i=i: train(i), device) for i in range(rounds))
        lengths = [batch["attention_mask"].sum(1).double() for batch in batches]
        labelled = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        tokens, squares = (float(sum((x**p).sum() for x in lengths)) for p in (1, 2))
        d, n_layers = config.n_embd, config.n_layer
        flops = 6 * 12 * n_layers * d * d * tokens + 6 * n_layers * d * squares + 6 * d * config.vocab_size * labelled
        results.append(
            {
                "measure": "P3",
                "shape": f"GPT-2 124M, {precision}",
                "batch_size": bench.batch_size,
                "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
                "tokens_per_s": tokens / elapsed,
                "mfu": flops / elapsed / peak / 1e12 if peak else None,
                "rounds": rounds,
            }  # fmt: skip
        )
    torch.set_float32_matmul_precision("highest")
    return results


def measure_start(gpt2_tokenizer: Path) -> list[dict]:
    """P7: start the real run.py on generated data of the official size and wait for its first update, twice."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": ROOT}
        subprocess.run([sys.executable, "data/prosqa.py", "--out", folder], check=True, **quiet)
        backbones.load_tokenizer(str(gpt2_tokenizer)).save_pretrained(f"{folder}/gpt2")
        GPT2Config(n_layer=2, n_embd=64, n_head=2).save_pretrained(f"{folder}/gpt2")
        command = [
            sys.executable,
            "run.py",
            "args/prosqa_coconut_1gpu.yaml",
            "from_scratch=True",
            f"model_id={folder}/gpt2",
        ]
        command += [f"train_path={folder}/prosqa_train.json", f"val_path={folder}/prosqa_valid.json", "wandb=False"]
        for state in ("tokens not cached", "tokens cached"):
            save = Path(folder) / state.replace(" ", "-")
            environment = os.environ | {"HF_DATASETS_CACHE": f"{folder}/cache", "HF_HUB_OFFLINE": "1"}
            start = time.perf_counter()
            process = subprocess.Popen([*command, f"save_path={save}"], env=environment, **quiet)
            metrics = save / "prosqa-coconut/metrics.jsonl"
            reached = {}
            for event in ("start", "step"):  # the record before the first update, and the one after it
                while not (metrics.is_file() and f'"event": "{event}"' in metrics.read_text()):
                    if process.poll() is not None:
                        raise RuntimeError(f"run.py ended with {process.returncode} before its first update")
                    time.sleep(0.02)
                reached[event] = time.perf_counter() - start
            results.append({"measure": "P7", "shape": state, "seconds": reached["start"], "first_update": reached["step"]})
            process.kill()
            process.wait()
    return results


def as_table(results: list[dict]) -> list[str]:
    lines = ["| measure | shape | B | value | range | target |", "|---|---|---|---|---|---|"]
    for r in results:
        target = TARGETS.get((r["measure"], r["shape"]), TARGETS.get(r["measure"], ""))
        value = f"{r['ratio']:.3f}" if "ratio" in r else f"{r['seconds']:.1f} s" if "seconds" in r else ""
        if "first_update" in r:
            value += f" (first update of 128 rows done: {r['first_update']:.1f} s)"
        if "peak_gb" in r:
            mfu = "" if r["mfu"] is None else f", MFU {100 * r['mfu']:.1f} %"
            value = f"{r['peak_gb']:.2f} GB, {r['tokens_per_s']:,.0f} tokens/s{mfu}"
        spread = f"{r['min']:.3f} .. {r['max']:.3f}, {r['rounds']} rounds" if "min" in r else ""
        lines.append(f"| {r['measure']} | {r['shape']} | {r.get('batch_size', '')} | {value} | {spread} | {target} |")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="folder of the JSON and the table")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/prosqa_valid.json", help="official rows")
    parser.add_argument("--gpt2-tokenizer", type=Path, default=ROOT.parent / "shared/data/gpt2_tokenizer", help="folder or id")
    parser.add_argument("--quick", action="store_true", help="few rounds, tiny shapes only: does it run")
    parser.add_argument("--skip-start", action="store_true", help="leave P7 out")
    args = parser.parse_args(argv)
    if not args.data.is_file():
        print(f"error: {args.data} does not exist; give the official prosqa_valid.json with --data", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu, results = device.type == "cuda", []
    for name in SHAPES if not args.quick else [next(iter(SHAPES))]:
        large = name.startswith("GPT-2")
        rounds = 3 if args.quick else 20 if gpu else 4 if large else 15
        bench = Bench(name, args.data, args.gpt2_tokenizer, 32 if gpu or name.startswith("words") else 4, device)
        generated = 16 if args.quick else 64 if large and not gpu else 128
        results += measure_shape(name, bench, rounds, generated, 1 if large and not gpu else 3)
        if gpu and large:
            results += measure_gpu(bench, rounds)
        print("\n".join(as_table(results)[-4 if len(results) > 4 else 0 :]), flush=True)
    if not (args.quick or args.skip_start):
        results += measure_start(args.gpt2_tokenizer)
    about = {
        "command": "bash scripts/bench.sh " + " ".join(argv if argv is not None else sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads, {platform.machine()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    stem = "gpu" if gpu else "cpu"
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / f"{stem}.json", {"about": about, "results": results})
    with whole_file(args.out / f"{stem}.md") as file:
        file.write("\n".join([*(f"- {key}: {value}" for key, value in about.items()), "", *as_table(results), ""]))
    print("\n".join(as_table(results)))
    print(json.dumps(about))
    return 0


if __name__ == "__main__":
    sys.exit(main())
