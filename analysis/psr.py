"""Perturbation success rate: how often noise on the reasoning states changes the answer (thoughts, pause slots, CoT tokens).

    python -m analysis.psr --checkpoint runs/quickstart/m3_coconut [--layers 0 2] [--sigmas 0.1 0.5 1 2]

Where: all thought slots at once (m1: the tokens of its own chain of thought, positions counted from the end), at a layer: 0
is what fills a slot, i the output of block i. Noise, drawn per (seed, row, position):

    own         sigma times the standard deviation of each entry at that position over rows
    absolute    sigma times one scale for all models: that of m3's states at the layer (of the same repeat)
    orthogonal  of own noise the part at right angles to the state, stretched to the same length

A slot input of a pause mode is one vector in every row, so own noise is nothing there and is reported as null; so it is at a
place where every chain of thought has the same token. Edits act in the rollout (`recompute`): what follows a disturbed state
follows from it. A low rate alone shows neither that states are redundant nor that they are robust.

Checked: noise of size 0 changes nothing at all; noise on the inputs of all question tokens changes most answers.
"""

import math
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as `python analysis/psr.py`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from analysis.command import CheckFailed  # noqa: E402
from analysis.experiment import Experiment, Task, share  # noqa: E402
from analysis.interventions import NOWHERE, Patch, Recorder, chain, gaussian  # noqa: E402
from analysis.subject import Prompts, positions  # noqa: E402

KINDS = ("own", "absolute", "orthogonal")
CONTROL_SIGMA = 4.0  # times the scale of the question tokens' embeddings
LONGEST_COT = 64  # tokens of a chain of thought that are disturbed, counted from its end
CONSTANT = 1e-5  # of the largest entry: what varies less than that over rows differs by rounding


def arguments(parser) -> None:
    parser.add_argument("--layers", type=int, nargs="+", help="0 = input, i = output of block i (default: 0 and the middle)")
    parser.add_argument("--sigmas", type=float, nargs="+", default=[0.1, 0.5, 1.0, 2.0], help="default: 0.1 0.5 1 2")


def layers_of(task: Task) -> list[int]:
    """The layers asked for, by default the input and the middle block. ValueError for one that is not there."""
    last = task.subject.n_layers
    layers = task.args.layers if task.args.layers is not None else [0, max(last // 2, 1)]
    if wrong := [layer for layer in layers if not 0 <= layer <= last]:
        raise ValueError(f"--layers {wrong[0]}: the model has layers 0 to {last}")
    return list(dict.fromkeys(layers))


# ---------------------------------------------------------------- what is disturbed, and how much


def prepare(task: Task) -> dict:
    """All prompts with the positions that noise goes to, their clean states, and the scales of noise: per layer the std of
    every entry at every position [K, D], and one number. `why`: the kinds of noise that a layer cannot have."""
    subject, layers, sigmas = task.subject, layers_of(task), task.args.sigmas
    if min(sigmas) < 0 or not math.isfinite(max(sigmas)):
        raise ValueError(f"--sigmas {min(sigmas)} .. {max(sigmas)}: sizes of noise are finite and not negative")
    prompts, where, longer = disturbed(task)
    recorder = Recorder(layers, where, subject.width)
    for _ in subject.rollouts(prompts, recorder):
        pass
    ready = {"layers": layers, "prompts": prompts, "where": where, "n_longer": longer, "states": recorder.states}
    ready |= {"own": {}, "scale": {}, "absolute": {}, "why": {layer: {} for layer in layers}}
    scales_of_m3 = (task.result_of("m3") or {}).get("scale", {})
    for layer, found in recorder.states.items():
        ready["own"][layer], ready["scale"][layer] = spread(found, where != NOWHERE)
        ready["absolute"][layer] = ready["scale"][layer] if subject.key == "m3" else scales_of_m3.get(str(layer))
        ready["why"][layer] = impossible(found, ready["own"][layer], ready["absolute"][layer])
    return ready


def impossible(states_PKD: Tensor, own_KD: Tensor, absolute: float | None) -> dict[str, str]:
    """{kind: why a layer cannot have this noise}."""
    if not states_PKD.numel():
        return dict.fromkeys(KINDS, "no row has a state to disturb")
    why = {}
    if own_KD.max() <= CONSTANT * states_PKD.abs().max():
        why = dict.fromkeys(("own", "orthogonal"), "the states are one vector in every row")
    if not absolute:
        why["absolute"] = "no scale: measure m3 of this repeat at this layer, then this again with --force"
    return why


def disturbed(task: Task) -> tuple[Prompts, Tensor, int]:
    """Prompts of all rows (m1: followed by its own steps), the positions that noise goes to, int64 [P, K], and how many chains
    of thought are longer than what is disturbed."""
    subject = task.subject
    prompts = subject.prompts(task.problems)
    if subject.key != "m1":
        return prompts, prompts.slots, 0
    steps = subject.own_steps(prompts)
    spans = [range(len(tokens), len(tokens) + len(own)) for tokens, own in zip(prompts.tokens, steps)]
    where = positions([span[::-1][:LONGEST_COT] for span in spans])  # k = 0 is the last token
    return prompts.followed_by(steps), where, sum(len(own) > LONGEST_COT for own in steps)


def spread(x_PKD: Tensor, there_PK: Tensor) -> tuple[Tensor, float]:
    """Std of each entry at each position over the rows that have it, [K, D]; and the std of entries over all positions."""
    x_PKD, n_K1 = x_PKD.double(), there_PK.sum(0).clamp(min=1)[:, None]
    deviation_PKD = torch.where(there_PK[..., None], x_PKD - x_PKD.sum(0) / n_K1, 0.0)
    pooled = float(x_PKD[there_PK].std(0).square().mean().sqrt()) if there_PK.sum() > 1 else 0.0
    return (deviation_PKD.square().sum(0) / n_K1).sqrt().float(), pooled


def conditions(task: Task, ready: dict, layer: int) -> list[tuple[str, float]]:
    """(kind, sigma) of every disturbance at a layer."""
    return [(kind, sigma) for kind in KINDS if kind not in ready["why"][layer] for sigma in task.args.sigmas]


def noise(ready: dict, layer: int, kind: str, sigma: float, x_PKD: Tensor, z_PKD: Tensor) -> Tensor:
    """The disturbance [P, K, D] of states x, from standard normal z."""
    if kind == "absolute":
        return sigma * ready["absolute"][layer] * z_PKD
    added = sigma * ready["own"][layer] * z_PKD
    if kind == "orthogonal":
        along = (added * x_PKD).sum(-1, keepdim=True) / x_PKD.square().sum(-1, keepdim=True).clamp(min=1e-12)
        across = added - along * x_PKD
        return across * (added.norm(dim=-1, keepdim=True) / across.norm(dim=-1, keepdim=True).clamp(min=1e-12))
    return added


# ---------------------------------------------------------------- the rows


def measure(task: Task, ready: dict, part: str, numbers: list[int]) -> list[dict]:
    """For each row what every disturbance did: whether the answer changed, and by how much the margin."""
    subject, prompts, where = task.subject, ready["prompts"].take(numbers), ready["where"][numbers]
    there, z_PKD = where != NOWHERE, gaussian(task.seed, numbers, where.shape[1], subject.width)
    # Clean and undisturbed rows meet in batches of the same shapes, so that they agree to the last bit.
    clean = subject.answers(prompts)
    zeros = [shift(layer, where, torch.zeros_like(z_PKD)) for layer in ready["layers"]]
    same = subject.answers(prompts, chain(*zeros))
    lost = control(task, numbers)
    made = [
        {
            "hops": len(row["steps"]),
            "positions": int(n),
            "correct": a["correct"],
            "two_choice_correct": a["two_choice_correct"],
            "changed_by_nothing": answer(a) != answer(b) or a["margin"] != b["margin"],
            "changed_by_control": answer(a) != answer(c),
            "noise": {},
        }
        for row, n, a, b, c in zip(prompts.rows, there.sum(1), clean, same, lost)
    ]
    for layer in ready["layers"]:
        asked, x_PKD = conditions(task, ready, layer), ready["states"][layer][numbers]
        if not asked:
            continue
        values_PCKD = torch.stack([noise(ready, layer, *condition, x_PKD, z_PKD) for condition in asked], 1)
        relative_PCK = values_PCKD.norm(dim=-1) / x_PKD.norm(dim=-1)[:, None].clamp(min=1e-12)
        relative_PC = (relative_PCK * there[:, None]).sum(-1) / there.sum(1).clamp(min=1)[:, None]
        n, many = len(asked), prompts.times(len(asked))
        edit = shift(layer, where.repeat_interleave(n, 0), values_PCKD.flatten(0, 1))
        found = subject.answers(many, edit)
        if edit.n_hit < n * int(there.sum()):
            raise CheckFailed(f"noise at layer {layer} met {edit.n_hit} states of {n * int(there.sum())}")
        for p, (record, before) in enumerate(zip(made, clean)):
            for c, (kind, sigma) in enumerate(asked):
                after = found[p * n + c]
                record["noise"][name_of(layer, kind, sigma)] = {
                    "changed": answer(after) != answer(before),
                    "margin_change": None if before["margin"] is None else after["margin"] - before["margin"],
                    "relative_norm": float(relative_PC[p, c]),
                    "scale": ready["absolute"][layer] if kind == "absolute" else None,
                }
    return made


def shift(layer: int, where_PK: Tensor, values_PKD: Tensor) -> Patch:
    """The edit that adds values to the states of a layer."""
    return Patch(layer, where_PK, values_PKD, add=True)


def control(task: Task, numbers: list[int]) -> list[dict]:
    """Answers with noise on the inputs of all question tokens; m1 writes its own steps behind them."""
    subject = task.subject
    ids = [task.problems.table.question[i] for i in numbers]
    where, table_VD = positions([range(len(x)) for x in ids]), subject.model.embedding.weight
    scale = float(table_VD[torch.from_numpy(np.concatenate(ids)).to(table_VD.device)].float().std())
    z_PKD = gaussian(task.seed, numbers, where.shape[1], subject.width, trial=1)
    return subject.answers(subject.prompts(task.problems, numbers), shift(0, where, CONTROL_SIGMA * scale * z_PKD))


def answer(record: dict) -> str:
    """What counts as the answer: the text behind `#`, or all of it where there is none."""
    return record["output"] if record["prediction"] is None else record["prediction"]


def name_of(layer: int, kind: str, sigma: float) -> str:
    return f"{layer}/{kind}/{sigma}"


# ---------------------------------------------------------------- the result


def summarize(task: Task, ready: dict, records: list[dict]) -> dict:
    """`psr[layer][kind][sigma]`: the share of rows whose answer changed, with n and interval; null where `psr_why` says why."""
    rows = [r for r in records if r["positions"]]
    rates, norms, margins = ({str(layer): dict.fromkeys(KINDS) for layer in ready["layers"]} for _ in range(3))
    for layer in ready["layers"]:
        for kind, sigma in conditions(task, ready, layer):
            found = [r["noise"].get(name_of(layer, kind, sigma)) for r in rows]
            if kind == "absolute" and any(x is None or x["scale"] != ready["absolute"][layer] for x in found):
                ready["why"][layer][kind] = "m3's scale changed while rows were measured: measure again with --force"
                break
            for table, value in [
                (rates, share(x["changed"] for x in found)),
                (norms, mean(x["relative_norm"] for x in found)),
                (margins, mean(x["margin_change"] for x in found)),
            ]:
                table[str(layer)][kind] = (table[str(layer)][kind] or {}) | {str(sigma): value}
    return {
        "psr": rates,
        "psr_why": {str(layer): why for layer, why in ready["why"].items()},
        "mean_relative_norm": norms,
        "margin_change": margins,
        "controls": controls(records),
        "chain": "recompute",
        "clean_accuracy": share(r["correct"] for r in records),
        "scale": {str(layer): scale for layer, scale in ready["scale"].items()},
        "absolute_scale": {str(layer): scale for layer, scale in ready["absolute"].items()},
        "aligned": "from the end" if task.subject.key == "m1" else "by slot",
        "mean_positions": mean(r["positions"] for r in rows),
        "n_longer": ready["n_longer"],
        "n": len(rows),
        "n_excluded": {"wrote no step": len(records) - len(rows)} if len(rows) < len(records) else {},
    }


def controls(records: list[dict]) -> dict:
    """What noise of size 0 and noise on the question did. Raises CheckFailed where either is not what it must be."""
    nothing, question = (share(r[f"changed_by_{name}"] for r in records) for name in ("nothing", "control"))
    if nothing["correct"]:
        raise CheckFailed(f"noise of size 0 changed answers or margins: {nothing}")
    two_choice = share(r["two_choice_correct"] for r in records)
    reads = two_choice["accuracy"] > 0.5 + 3 * 0.5 / math.sqrt(len(records))
    if reads and question["accuracy"] <= 0.5:
        raise CheckFailed(f"noise on the whole question changed few answers: {question}")
    note = {} if reads else {"note": "clean two-choice accuracy is a coin's, so this control says nothing"}
    return {"nothing": nothing, "question": question | {"sigma": CONTROL_SIGMA} | note}


def mean(values) -> float | None:
    """Of those that are there."""
    values = [x for x in values if x is not None]
    return float(np.mean(values)) if values else None


EXPERIMENT = Experiment(
    "psr",
    ("m1", "m3", "m4", "m4b", "m5"),
    prepare,
    measure,
    summarize,
    __doc__,
    arguments=arguments,
    chunk=100,
    also="zhang_replication",
)
main = EXPERIMENT.main

if __name__ == "__main__":
    sys.exit(main())
