"""Why a run stopped with a loss or gradient that is not finite: its last update once more, row by row and module by module.

    python -m analysis.replay runs/prosqa/prosqa-coconut/nonfinite_batch_rank0
    python -m analysis.replay runs/x/nonfinite_batch_rank0 --weights runs/x/checkpoint_3 --device cpu --json replay.json

Such a run leaves its micro-batches and their seeds (`nonfinite_batch_rank<r>`, one file a process) and the weights of that moment
(`nonfinite_weights`). This rebuilds the model from the run.json beside them and runs, in training mode and in the run's
precision, forward and backward of all micro-batches and of each row alone, padded as it was. It names the rows, the first
module whose output is not finite and the weights that are not. The last line says what follows from that.

Exit code: 0 all is finite here, 1 it happened again, 2 a mistake.
"""

import math
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

if __package__ in (None, ""):  # run as `python analysis/replay.py`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from analysis.command import command, parser_of  # noqa: E402
from analysis.compare import strict  # noqa: E402
from checkpoint import build_model, read_whole  # noqa: E402
from coconut import Coconut  # noqa: E402
from files import read_json, write_json  # noqa: E402
from utils import Config, check_config, set_seed  # noqa: E402

TEXT = 100  # characters of a row that are shown
NAMED = 10  # rows that are named in the conclusion


# ---------------------------------------------------------------- what the run left


@dataclass
class Stopped:
    """The update at which a run stopped: epoch and update from 0, this process's micro-batches, their seeds where saved."""

    path: Path
    epoch: int
    step: int
    batches: list[dict[str, Tensor]]
    seeds: list[int] | None

    @classmethod
    def read(cls, path: Path) -> "Stopped":
        """ValueError where the file is missing or of another kind."""
        if not path.is_file():
            raise ValueError(f"no file {path}; a run that stops for a loss that is not finite writes nonfinite_batch_rank0")
        saved = read_whole(path)
        if not isinstance(saved, dict) or not {"epoch", "step", "batches"} <= saved.keys():
            raise ValueError(f"{path} does not hold the micro-batches of a stopped run; name its nonfinite_batch_rank0")
        return cls(path, saved["epoch"], saved["step"], saved["batches"], saved.get("seeds"))

    @property
    def others(self) -> list[str]:
        """The files of the other processes."""
        return sorted(p.name for p in self.path.parent.glob("nonfinite_batch_rank*") if p.name != self.path.name)


def rebuild(folder: Path, weights: Path, device: str | None) -> tuple[Coconut, object, Config, torch.device]:
    """(model in training mode on its device, tokenizer, config, device) of a run with some weights."""
    if not (folder / "run.json").is_file():
        raise ValueError(f"{folder} has no run.json, which says what the model is; put the file back into its run folder")
    if not weights.is_file():
        raise ValueError(f"no weights at {weights}; name a checkpoint with --weights, {folder}/checkpoint_1 say")
    config = check_config(read_json(folder / "run.json")["config"], str(folder / "run.json"))
    set_seed(config.seed)
    if config.tf32:
        torch.set_float32_matmul_precision("high")
    place = device or config.device
    if place == "auto":
        place = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if place == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here; try --device cpu")
    model, tokenizer, _, _ = build_model(config, weights)
    model.to(place, torch.bfloat16 if config.bf16 == "pure" else None)
    return model.train(), tokenizer, config, torch.device(place)


# ---------------------------------------------------------------- looking inside


@dataclass
class Outputs:
    """What modules gave out: the first, in the order they finish, with a value that is not finite, and the largest finite one."""

    first: str | None = None
    largest: dict = field(default_factory=lambda: {"name": None, "value": 0.0})

    def see(self, name: str, output) -> None:
        """Note a tensor, or all in a tuple, list or dict."""
        if isinstance(output, dict | tuple | list):
            for part in output.values() if isinstance(output, dict) else output:
                self.see(name, part)
        elif isinstance(output, Tensor) and output.is_floating_point() and output.numel():
            count, largest = look_at(output)
            if count and self.first is None:
                self.first = name
            if largest > self.largest["value"]:
                self.largest = {"name": name, "value": largest}


def look_at(x: Tensor) -> tuple[int, float]:
    """(values that are not finite, the largest finite absolute value) of a tensor."""
    x = x.detach()
    return x.numel() - int(x.isfinite().sum()), float(x.abs().nan_to_num(0.0, 0.0, 0.0).max())


@contextmanager
def watched(model: nn.Module):
    """Outputs of every module of the model while this lasts; the model's own output is called `loss`."""
    seen = Outputs()

    def hook(name: str):
        return lambda module, args, output: seen.see(name or "loss", output if name else output.loss)

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def parameters(model: nn.Module) -> dict:
    """{"not_finite": [{"name", "values", "of"}], "largest": {"name", "value"}} of all parameters and buffers."""
    bad, largest = [], {"name": None, "value": 0.0}
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if not x.is_floating_point() or not x.numel():
            continue
        count, value = look_at(x)
        bad += [{"name": name, "values": count, "of": x.numel()}] if count else []
        largest = {"name": name, "value": value} if value > largest["value"] else largest
    return {"not_finite": bad, "largest": largest}


# ---------------------------------------------------------------- doing it again


@dataclass
class Replay:
    """The model of a stopped run, and how it computes."""

    model: Coconut
    config: Config
    device: torch.device

    def run(self, batches: list[dict], seeds: list[int]) -> dict:
        """Forward and backward of micro-batches as one update: {"loss": mean over labelled tokens, "gradient_norm", ...}."""
        tokens = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
        by_tokens = self.config.accumulation_norm == "tokens"
        shares = [n / max(sum(tokens), 1) if by_tokens else 1 / len(batches) for n in tokens]
        self.model.zero_grad(set_to_none=True)
        with watched(self.model) as seen:
            losses = [self._backward(*each) for each in zip(batches, seeds, shares)]
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        loss = sum(loss * n for loss, n in zip(losses, tokens) if n) / max(sum(tokens), 1)
        norm = float(nn.utils.get_total_norm(grads))
        finite = math.isfinite(loss) and math.isfinite(norm)
        return {
            "loss": loss,
            "gradient_norm": norm,
            "finite": finite,
            "first_module": seen.first if not finite else None,
            "largest_output": seen.largest,
        }

    def _backward(self, batch: dict, seed: int, share: float) -> float:
        batch = {key: value for key, value in batch.items() if key != "idx"}
        plan = self.model.plan(**batch).to(self.device)
        torch.manual_seed(seed)
        autocast = torch.autocast(self.device.type, torch.bfloat16) if self.config.bf16 is True else nullcontext()
        with autocast:
            loss = self.model(**{key: value.to(self.device) for key, value in batch.items()}, plan=plan).loss
        (loss * share).backward()
        return float(loss.detach())


def replay(path: Path, weights: Path | None = None, device: str | None = None) -> dict:
    """Everything about a stopped run's last update, with "finite" and "conclusion". ValueError for what can't be read."""
    stopped = Stopped.read(path)
    folder = path.parent
    weights = weights or folder / "nonfinite_weights"
    model, tokenizer, config, place = rebuild(folder, weights, device)
    again = Replay(model, config, place)
    seeds = stopped.seeds or [config.seed] * len(stopped.batches)
    whole, rows = again.run(stopped.batches, seeds), []
    for number, (batch, seed) in enumerate(zip(stopped.batches, seeds)):
        for i, idx in enumerate(batch["idx"].tolist()):
            row = {key: value[i : i + 1] for key, value in batch.items()}
            text = tokenizer.decode(row["input_ids"][row["attention_mask"] == 1])
            rows.append(
                {"idx": idx, "micro_batch": number} | again.run([row], [seed]) | {"text": " ".join(text.split())[:TEXT]}
            )
    result = {
        "schema_version": 1,
        "file": str(path),
        "weights": str(weights),
        "epoch": stopped.epoch,
        "step": stopped.step,
        "train_path": config.train_path,
        "device": str(place),
        "bf16": config.bf16,
        "seeds_saved": stopped.seeds is not None,
        "parameters": parameters(model),
        "batch": whole,
        "rows": rows,
        "finite": whole["finite"] and all(row["finite"] for row in rows),
    }
    return result | {"conclusion": conclusion(result, stopped.others)}


# ---------------------------------------------------------------- words


def conclusion(result: dict, others: list[str]) -> str:
    """One line: what follows."""
    rows, weights = result["rows"], result["parameters"]
    bad, broken = [row for row in rows if not row["finite"]], weights["not_finite"]
    names = ", ".join(f"{p['name']} ({p['values']} of {p['of']} values)" for p in broken[:3])
    names += f" and {len(broken) - 3} more" if len(broken) > 3 else ""
    if not rows:
        return "this process had no rows in that update" + look_into(others)
    if result["finite"] and broken:
        return f"all is finite here although weights are not: {names}; no row of this batch meets them" + look_into(others)
    if result["finite"]:
        cause = "the cause was not in weights or batch (a hardware fault, an edit, another library version?)"
        return f"all is finite here: {cause}" + look_into(others)
    every = len(bad) == len(rows)
    which = "every row" if every else f"row{'s' * (len(bad) > 1)} {', '.join(str(row['idx']) for row in bad[:NAMED])}"
    which += f" and {len(bad) - NAMED} more" if len(bad) > NAMED and not every else ""
    which += f" of {result['train_path']}" if not every else f" of the batch ({len(rows)})"
    if broken:
        return f"the weights themselves are not finite: {names}; {which} met them"
    if not bad:
        return f"the rows together give {outcome(result['batch'])}, each alone is finite: a sum too large, or dropout"
    verb, first = "gives" if every or len(bad) == 1 else "give", bad[0]["first_module"]
    text = f"{which} {verb} {outcome(bad[0])} with finite weights, first in {first or 'the backward pass'}"
    if every and len(rows) > 1:
        largest = weights["largest"]
        text += f"; the largest weight is {largest['value']:.3g} ({largest['name']}): if training ran away, lower lr or set "
        text += "gradient_clip"
    return text


def look_into(others: list[str]) -> str:
    return f"; other processes had other rows: replay {', '.join(others)}, too" if others else ""


def outcome(part: dict) -> str:
    """What a batch or row gave that is not finite."""
    if math.isfinite(part["loss"]):
        return f"a loss of {part['loss']:.4g} and a gradient norm of {part['gradient_norm']}"
    return f"a loss of {part['loss']}"


def report(result: dict) -> None:
    """Print everything, the conclusion last."""
    batch, weights = result["batch"], result["parameters"]
    precision = {True: "bf16 autocast", "pure": "bf16 weights", False: "float32"}[result["bf16"]]
    print(f"epoch {result['epoch']}, update {result['step']} on {result['device']}, {precision}, weights {result['weights']}")
    if not result["seeds_saved"]:
        print("Note: the file has no seeds, so dropout, if there is any, drops something else")
    print(f"whole batch: loss {batch['loss']:.6g}, gradient norm {batch['gradient_norm']:.6g}, {len(result['rows'])} rows")
    if not batch["finite"]:
        print(f"first module with an output that is not finite: {batch['first_module'] or 'none, so it is the backward pass'}")
    for name, largest in (("output", batch["largest_output"]), ("weight", weights["largest"])):
        print(f"largest finite {name}: {largest['value']:.6g} ({largest['name']})")
    for p in weights["not_finite"]:
        print(f"not finite: {p['name']}, {p['values']} of {p['of']} values")
    print(
        f"\n{'idx':>8}  {'loss':>10}  {'grad norm':>10}  {'':10}  text of the row (idx: its number in {result['train_path']})"
    )
    for row in result["rows"]:
        numbers = f"{row['idx']:>8}  {row['loss']:>10.5g}  {row['gradient_norm']:>10.5g}"
        print(f"{numbers}  {'' if row['finite'] else 'NOT FINITE':10}  {row['text']}")
    print(f"\n{result['conclusion']}")


@command
def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("batch", type=Path, help="nonfinite_batch_rank<r> in a run folder")
    parser.add_argument("--weights", type=Path, help="other weights, a checkpoint_N say (default: nonfinite_weights beside it)")
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), help="where to compute (default: as the config says)")
    parser.add_argument("--json", type=Path, help="write everything found to this file")
    args = parser.parse_args(argv)
    result = replay(args.batch, args.weights, args.device)
    report(result)
    if args.json:
        write_json(args.json, strict(result))
    return 0 if result["finite"] else 1


if __name__ == "__main__":
    sys.exit(main())
