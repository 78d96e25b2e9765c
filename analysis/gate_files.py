"""What the gates read from files and from one tiny training step: pause vectors, data, configs, feedback modes.

A learned pause vector must have left its first value, the `<<` row of the base model. Weight decay alone shrinks it by
0.7 % in 7,000 updates, so the distance is measured a second time without the part parallel to `<<`.

    vector, source = base_row(run)
    checks = moved(vector, read_weights(run.folder / "checkpoint_50"), "m5")
"""

from __future__ import annotations

import json
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from analysis.gate_result import Check, info, missing
from analysis.runs import Run
from backbones import anchor_ids
from checkpoint import load_run, numbered_checkpoints, read_weights
from coconut import Coconut
from data.ood_checks import check_set
from data.ood_sets import PRESETS, SWAP_OFFICIAL, EvalSet, Preset
from data.prosqa_rows import read_rows
from utils import load_config

MODE_IDS = {"m4": 1, "m4b": 2, "m5": 3}
MOVED_L2 = 0.01
DATA_SIZES = {"prosqa_train.json": 17_886, "prosqa_valid.json": 300, "prosqa_test.json": 500}
CONFIGS = {
    "m1": "prosqa_m1_cot.yaml",
    "m2": "prosqa_m2_nocot.yaml",
    "m3": "prosqa_coconut_1gpu.yaml",
    "m4": "prosqa_m4_frozen.yaml",
    "m4b": "prosqa_m4b_shared.yaml",
    "m5": "prosqa_m5_pause.yaml",
    "m0": "prosqa_m0_nothought.yaml",
}
MODES = {"m3": "continuous", "m4": "frozen", "m4b": "learned_shared", "m5": "pause_curriculum"}


# ------------------------------------------------------------------------------------------------ pause vectors


def base_row(run: Run) -> tuple[Tensor | None, str]:
    """The `<<` row that the pause vector started from [d], and where it is from; (None, missing input) if not here."""
    if run.folder and (run.folder / "pause_init").is_file():
        return torch.load(run.folder / "pause_init", map_location="cpu", weights_only=True), "pause_init"
    model_id = str(run.config.get("model_id", "openai-community/gpt2"))
    row = None if run.config.get("from_scratch") else _row_of_model(model_id)
    if row is None:
        return None, f"pause_init in the run folder or a local {model_id}"
    return row, f"{model_id}, token <<"


@lru_cache(maxsize=4)
def _row_of_model(model_id: str) -> Tensor | None:
    """The `<<` row by token, never by number; several tokens count with the mean of their rows."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_id, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(model_id, local_files_only=True)
    except (OSError, ValueError):
        return None
    return model.get_input_embeddings().weight[anchor_ids(tokenizer)].mean(0).detach()


def distances(vector: Tensor, base: Tensor) -> tuple[float, float, float]:
    """(L2, L2 of what is left without the part parallel to `base`, cosine) of a vector [d] against the base row [d]."""
    v, b = vector.double(), base.double()
    residual = v - (v @ b) / (b @ b) * b
    return float((v - b).norm()), float(residual.norm()), float(v @ b / (v.norm() * b.norm()))


def moved(base: Tensor, state: dict[str, Tensor], model: str) -> list[Check]:
    """Gate 4b's rule for one checkpoint: the learned vector left `<<`, and not only by shrinking."""
    vector = state.get("pause_embedding")
    if vector is None or vector.shape != base.shape:
        found = "absent" if vector is None else f"shape {list(vector.shape)}"
        return [Check(f"{model} pause_embedding", found, f"shape {list(base.shape)}", ok=False)]
    l2, residual, cosine = distances(vector, base)
    return [
        Check(f"{model} L2 from <<", f"{l2:.5f}", f"> {MOVED_L2}", ok=l2 > MOVED_L2),
        Check(f"{model} L2 without the part along <<", f"{residual:.5f}", f"> {MOVED_L2}", ok=residual > MOVED_L2),
        info(f"{model} cosine with <<", f"{cosine:.5f}"),
        *mode_check(state, model),
    ]


def mode_check(state: dict[str, Tensor], model: str) -> list[Check]:
    """The mode that the file names must be the model's; foreign files without one decide nothing."""
    if "feedback_mode_id" not in state:
        return [info(f"{model} feedback_mode_id", "absent (foreign file)")]
    found = int(state["feedback_mode_id"])
    return [Check(f"{model} feedback_mode_id", str(found), f"= {MODE_IDS[model]}", ok=found == MODE_IDS[model])]


def vector_moved(run: Run, number: int) -> tuple[list[Check], list[str]]:
    """Checks and notes on `checkpoint_<number>` of a learned pause model."""
    name, rule = f"{run.model} pause vector moved", f"> {MOVED_L2}"
    if run.folder is None or not (run.folder / f"checkpoint_{number}").is_file():
        place = run.folder or f"run folder of {run.label} (--runs)"
        return [missing(name, rule, f"checkpoint_{number} in {place}")], []
    base, source = base_row(run)
    if base is None:
        return [missing(name, rule, source)], []
    try:
        return moved(base, read_weights(run.folder / f"checkpoint_{number}"), run.model), [f"<< row from {source}"]
    except ValueError as error:
        return [missing(name, rule, f"a readable file: {error}")], []


def vector_frozen(run: Run) -> tuple[list[Check], list[str]]:
    """Gate 4c's rule: `pause_embedding` bit-identical to `<<` in every checkpoint of m4."""
    name, rule = f"{run.model} pause_embedding", "bits equal <<"
    numbers = numbered_checkpoints(run.folder) if run.folder else []
    base, source = base_row(run)
    if not numbers or base is None:
        return [missing(name, rule, f"checkpoints of {run.label} (--runs)" if not numbers else source)], []
    changed, unreadable, modes = [], [], []
    for number in numbers:
        try:
            state = read_weights(run.folder / f"checkpoint_{number}")
        except ValueError as error:
            unreadable.append(str(error))
            continue
        modes = mode_check(state, run.model)
        if "pause_embedding" not in state or not same_bits(state["pause_embedding"], base):
            changed.append(f"checkpoint_{number}")
    if unreadable and not changed:
        return [missing(name, rule, f"a readable file: {unreadable[0]}")], []
    value = f"{len(numbers) - len(unreadable) - len(changed)} equal"
    notes = [f"<< row from {source}"] + ([f"changed in {', '.join(changed[:5])}"] if changed else [])
    return [Check(name, value, rule, ok=not changed, n=len(numbers)), *modes], notes


def strict_forward(run: Run, number: int) -> tuple[str, str, bool | None, str]:
    """(value, rule, ok, detail): the file loads with exact keys into the model it names and computes."""
    rule = "strict, finite"
    try:
        model, _, ids, _ = load_run(run.folder / f"checkpoint_{number}")
    except ValueError as error:
        absent = "model_id: cannot load" in str(error) or "beside it" in str(error)
        return (f"needs {error}", rule, None, "") if absent else ("refused", rule, False, str(error))
    tokens = [1, 2, 3] if ids.latent is None else [1, 2, 3, ids.start, *[ids.latent] * 6, ids.end]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits
    finite = bool(logits.isfinite().all())
    return "loads, finite" if finite else "loads, not finite", rule, finite, ""


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bytes: unlike `==` this tells 0.0 from -0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# ------------------------------------------------------------------------------------------------ data and configs


def data_checks(folder: Path) -> list[Check]:
    """Sizes of the official files, and the invariants of the generated evaluation sets."""
    checks = []
    for name, size in DATA_SIZES.items():
        if not (folder / name).is_file():
            checks.append(missing(f"rows of {name}", f"= {size}", f"{folder.name}/{name}"))
            continue
        rows = len(json.loads((folder / name).read_text()))
        checks.append(Check(f"rows of {name}", str(rows), f"= {size}", ok=rows == size))
    return checks + set_checks(folder)


def set_checks(folder: Path) -> list[Check]:
    """The invariants of the evaluation sets in `folder` or its folder `ood`.

    What a set must be is looked up in the preset that the sidecars name (prosqa without sidecars), not in the sidecars.
    """
    places = [place for place in (folder / "ood", folder) if place.is_dir()]
    sidecars = [path for place in places for path in sorted(place.glob("*.stats.json"))]
    named = [name for path in sidecars if (name := json.loads(path.read_text()).get("preset"))]
    if named and named[0] not in PRESETS:
        return [missing("evaluation sets", "sound rows", f"the preset {named[0]!r} in data/ood_sets.py")]
    preset = PRESETS[named[0] if named else "prosqa"]
    paths = {name: folder / f"{name}.json" for name in preset.sets if name != SWAP_OFFICIAL}
    for place in reversed(places):  # files in `ood` come first
        found = [path for path in sorted(place.glob("*.json")) if not path.name.endswith(".stats.json")]
        paths |= {path.stem: path for path in found if preset.set_of(path.stem)}
    return [_set_check(path, preset.set_of(name), preset) for name, path in paths.items()]


def _set_check(path: Path, spec: EvalSet, preset: Preset) -> Check:
    name, rule = f"{path.stem} invariants", f"{spec.rows or 'all'} sound rows"
    if not path.is_file():
        return missing(name, rule, f"{path.parent.name}/{path.name} (data/ood.py)")
    sidecar = path.with_suffix(".stats.json")
    try:
        if sidecar.is_file() and json.loads(sidecar.read_text()).get("sha256") != sha256(path.read_bytes()).hexdigest():
            raise ValueError(f"{path.name} is not the file that {sidecar.name} describes")
        rows = read_rows(path)
        check_set(rows, spec, path.name, preset)
    except ValueError as error:
        return Check(name, "unsound", rule, ok=False, detail=str(error))
    return Check(name, f"{len(rows)} sound", rule, ok=True, n=len(rows))


def config_checks(folder: Path, models: tuple[str, ...]) -> list[Check]:
    """Every config of the study loads, and is the model that its name says."""
    checks = []
    for model in models:
        name = f"{model} {CONFIGS[model]}"
        try:
            key = load_config(str(folder / CONFIGS[model])).model_key
        except ValueError as error:
            checks.append(Check(name, "does not load", f"loads as {model}", ok=False, detail=str(error)))
            continue
        checks.append(Check(name, f"loads as {key}", f"loads as {model}", ok=key == model))
    return checks


# ------------------------------------------------------------------------------------------------ one step a mode


def mode_checks() -> list[Check]:
    """Each feedback mode trains one step on a tiny random GPT-2 in float64, with the gradient its definition asks for.

    The gradient is compared with a central difference along a random direction in parameter space: a thought that is
    detached, or a vector that is not trained, changes one side only.
    """
    checks, counts, width = [], {}, 16
    for model, mode in MODES.items():
        wrapper, batch = _tiny(mode, width)
        counts[model] = sum(p.numel() for p in wrapper.parameters() if p.requires_grad)
        before = wrapper.state_dict().get("pause_embedding")
        before = None if before is None else before.clone()
        error = gradient_error(wrapper, batch)
        checks.append(Check(f"{mode}: gradient against difference", f"{error:.1e}", "< 1e-5", ok=error < 1e-5))
        optimizer = torch.optim.AdamW([p for p in wrapper.parameters() if p.requires_grad], lr=1e-2)
        optimizer.zero_grad()
        wrapper(**batch).loss.backward()
        optimizer.step()
        after = wrapper.state_dict().get("pause_embedding")
        if before is None or after is None:
            same = before is None and after is None
            checks.append(Check(f"{mode}: stored vector", "none" if same else "one", "none", ok=same and model == "m3"))
            continue
        change, wanted = bool((before != after).any()), model != "m4"
        value, rule = ("moved" if flag else "unchanged" for flag in (change, wanted))
        checks.append(Check(f"{mode}: vector after one step", value, rule, ok=change == wanted))
    extra = {model: count - counts["m3"] for model, count in counts.items()}
    ok = extra == {"m3": 0, "m4": 0, "m4b": width, "m5": width}
    value = ", ".join(f"{model} +{n}" for model, n in extra.items() if model != "m3")
    return [*checks, Check("trainable counts against m3, width 16", value, "m4 +0, m4b +16, m5 +16", ok=ok)]


def recycling_check(mode: str = "pause_curriculum") -> Check:
    """Whether every thought slot of a tiny model is fed the pause vector itself, hence no hidden state."""
    wrapper, batch = _tiny(mode, 16)
    slots = wrapper(**batch).inputs_embeds[batch["input_ids"] == wrapper.latent_token_id]
    vector = wrapper.state_dict().get("pause_embedding")
    same = vector is not None and len(slots) > 0 and torch.equal(slots, vector.expand_as(slots))
    return Check(f"{mode} recycles a hidden state", "no" if same else "yes", "no", ok=same, n=len(slots))


def _tiny(mode: str, width: int):
    """A wrapper over a random two-layer GPT-2 (float64, no dropout) and a batch with two thoughts a row."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=24, n_positions=32, n_embd=width, n_layer=2, n_head=2, initializer_range=0.3,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=20, eos_token_id=20,
    )  # fmt: skip
    wrapper = Coconut(GPT2LMHeadModel(config), 23, 21, 22, 20, feedback_mode=mode).double().train()
    ids = torch.tensor([[1, 2, 3, 21, 23, 23, 22, 4, 20], [5, 6, 7, 21, 23, 23, 22, 8, 20]])
    labels = torch.where(torch.arange(ids.shape[1]) > 6, ids, -100)
    return wrapper, {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "position_ids": torch.arange(ids.shape[1]).expand_as(ids),
    }


def gradient_error(wrapper: torch.nn.Module, batch: dict[str, Tensor], eps: float = 1e-5) -> float:
    """Relative difference of the backward gradient and a central difference along one random direction."""
    params = [p for p in wrapper.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params]
    wrapper.zero_grad()
    wrapper(**batch).loss.backward()
    backward = sum(float((p.grad * d).sum()) for p, d in zip(params, direction, strict=True) if p.grad is not None)
    ends = []
    with torch.no_grad():
        for sign in (1, -2):
            for p, d in zip(params, direction, strict=True):
                p.add_(d, alpha=sign * eps)
            ends.append(float(wrapper(**batch).loss))
        for p, d in zip(params, direction, strict=True):
            p.add_(d, alpha=eps)
    difference = (ends[0] - ends[1]) / (2 * eps)
    return abs(backward - difference) / max(abs(difference), 1e-12)
