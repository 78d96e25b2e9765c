"""Noise on fed-back thoughts: seven operators on vectors, the scale of each slot, the draws, and the edit that applies them.

    noisy, info = apply_noise_to_hidden_states(h, 0.5, "gaussian_scaled", generator=draw_generator(0, 17, branch=0, slot=1))

    noise = Noise("gaussian_scaled", passes="first", seed=0)
    edit = NoiseEdit(noise, [NoisyRow(question_id=17, scale=0.5, n_slots=6), ...])       # by row id
    model.generate(ids, mask, edit=edit, row_ids=[0, ...])

The edit changes what is fed into a thought slot and nothing else: the column before the slot, from whose state the thought was
made, keeps its keys, values and logits. What a vector meets is fixed by (seed, question, branch, slot), see `draw_generator`:
batches, ranks, the order of questions and the scale don't change it, and torch's global generator is left alone.

Shape letters: N vectors, B rows of a pass, C columns of a pass, D width.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NOISE_TYPES = ("gaussian", "gaussian_scaled", "snr", "uniform", "orthogonal", "targeted", "dropout")
DIRECTIONS = ("same", "opposite", "random_orthogonal")
SCHEDULES = ("none", "constant", "linear", "cosine", "exponential", "adaptive")
EPSILON = 1e-8
MOST_NOISE = 1000.0  # times the norm of h: what snr makes of a ratio that is not above 0
MEAN_KEEPS = 0.9  # of the running mean of norms, at each step
_UNSEEDED = torch.Generator().manual_seed(0)  # for calls that name no generator


# ---------------------------------------------------------------- operators


def apply_noise_to_hidden_states(
    h: Tensor,
    noise_scale: float,
    noise_type: str = "gaussian",
    noise_direction: str | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, dict]:
    """Noise on each vector of the last dimension of `h` ([..., D]).

    Args:
        noise_scale: an absolute size (gaussian, uniform), a multiple of the vector's norm (gaussian_scaled, orthogonal,
            targeted), norm(h) / norm(noise) (snr; 0 or less: noise of 1000 norms), or the share of zeros (dropout).
        noise_direction: of targeted noise: same (default), opposite or random_orthogonal.
        generator: what to draw from; without one, a generator of this module that starts from seed 0.

    Returns:
        (h', a new tensor with the dtype and device of `h`, computed in at least float32; info: means of L2 norms over the
        vectors, see `describe`). Scale 0 gives back the bits of `h` for every type but snr.

    Raises:
        ValueError: unknown type or direction, or a scale that is NaN.
    """
    check_type(noise_type, noise_direction)
    if math.isnan(noise_scale):
        raise ValueError("noise_scale is NaN; give a number")
    drawn = None
    if is_random(noise_type, noise_direction):
        generator = _UNSEEDED if generator is None else generator
        drawn = draw(noise_type, h.shape, generator).to(h.device)
    scale = torch.full((1,), float(noise_scale), dtype=wide(h), device=h.device)
    noise = noise_of(h, scale, noise_type, noise_direction, drawn)
    noisy = _added(h, noise)
    if noise_scale == 0 and noise_type != "snr":
        noisy = h.clone()
    return noisy, describe(h, noise, float(noise_scale), noise_type, noise_direction)


def check_type(noise_type: str, noise_direction: str | None = None) -> None:
    """Raise ValueError for a type or direction that does not exist."""
    if noise_type not in NOISE_TYPES:
        raise ValueError(f"Unknown noise_type {noise_type!r}; known: {', '.join(NOISE_TYPES)}")
    if noise_direction not in (None, *DIRECTIONS):
        raise ValueError(f"Unknown noise_direction {noise_direction!r}; known: {', '.join(DIRECTIONS)}")


def is_random(noise_type: str, noise_direction: str | None = None) -> bool:
    """Whether noise of a type is drawn, or fixed by the vector that meets it."""
    return noise_type != "targeted" or noise_direction == "random_orthogonal"


def wide(h: Tensor) -> torch.dtype:
    """What noise on `h` is computed in: float32, or the dtype of `h` where that is wider."""
    return torch.promote_types(h.dtype, torch.float32)


def draw(noise_type: str, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """float32 draws on the generator's device: uniform on [0, 1) for uniform and dropout, else standard normal."""
    made = torch.rand if noise_type in ("uniform", "dropout") else torch.randn
    return made(tuple(shape), generator=generator, device=generator.device)


def noise_of(h: Tensor, scale: Tensor, noise_type: str, noise_direction: str | None, drawn: Tensor | None) -> Tensor:
    """The difference that noise makes to `h` ([..., D]), in `wide(h)`; `scale` broadcasts against it, `drawn` is from `draw`."""
    h = h.to(wide(h))
    drawn = None if drawn is None else drawn.to(h)
    norm = h.norm(dim=-1, keepdim=True)
    if noise_type == "gaussian":
        return scale * drawn
    if noise_type == "gaussian_scaled":
        return scale * norm * _unit(drawn)
    if noise_type == "snr":
        return norm * torch.where(scale > 0, 1 / scale, MOST_NOISE) * _unit(drawn)
    if noise_type == "uniform":
        return 2 * scale * (drawn - 0.5)
    if noise_type == "dropout":
        return torch.where(drawn >= scale, torch.zeros_like(h), -h)
    if noise_type == "targeted" and noise_direction != "random_orthogonal":
        return -scale * h if noise_direction == "opposite" else scale * h
    across = drawn - (drawn * h).sum(-1, keepdim=True) / (norm.square() + EPSILON) * h
    return scale * norm * _unit(across)


def _unit(x: Tensor) -> Tensor:
    return x / (x.norm(dim=-1, keepdim=True) + EPSILON)


def _added(h: Tensor, noise: Tensor) -> Tensor:
    return (h.to(noise.dtype) + noise).to(h.dtype)


def describe(h: Tensor, noise: Tensor, noise_scale: float, noise_type: str, noise_direction: str | None = None) -> dict:
    """What noise did, as means of L2 norms over the vectors: `original_norm`, `noise_norm` (also of dropout: that of what it
    took away), `perturbed_norm`, `norm_change_ratio`, and what the type adds. The "powers" of snr are norms, too."""
    h, noise = h.detach().to(noise.dtype), noise.detach()
    norm, size, after = (x.norm(dim=-1).mean().item() for x in (h, noise, h + noise))
    info = {"noise_type": noise_type, "noise_scale": noise_scale, "original_norm": norm, "noise_norm": size}
    info |= {"perturbed_norm": after, "norm_change_ratio": after / (norm + EPSILON)}
    if noise_type == "gaussian_scaled":
        info["scale_ratio"] = noise_scale
    if noise_type == "snr":
        ratio = h.norm(dim=-1) / (noise.norm(dim=-1) + EPSILON)
        info |= {"target_snr": noise_scale, "actual_snr": ratio.mean().item(), "signal_power": norm, "noise_power": size}
    if noise_type == "orthogonal" or noise_direction == "random_orthogonal":
        info["orthogonality"] = torch.cosine_similarity(noise, h, dim=-1).mean().item()
    if noise_type == "targeted":
        info["direction"] = noise_direction or "same"
    if noise_type == "dropout":
        info["dropout_prob"] = min(noise_scale, 1.0)
    return info


# ---------------------------------------------------------------- the scale of each step


def scheduled_scale(
    schedule: str,
    s: float,
    t: int,
    T: int,
    lambda_decay: float = 0.5,
    norm: float | None = None,
    mean_norm: float | None = None,
    noise_type: str = "gaussian",
) -> float:
    """The scale of later step t of T (t = 0 for the first step after the injection, which itself gets s).

    `adaptive` needs the norm of the step's vector and the running mean of norms up to it (`running_mean`). For snr the
    schedule acts on 1 / s; no noise is an infinite ratio. Raises ValueError for an unknown schedule or missing norms.
    """
    factor = _factor(schedule, t, T, lambda_decay, norm, mean_norm)
    if noise_type != "snr":
        return s * factor
    return s / factor if factor > 0 else math.inf


def _factor(schedule: str, t: int, T: int, lambda_decay: float, norm: float | None, mean_norm: float | None) -> float:
    if schedule == "none":
        return 0.0
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1 - t / T
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * t / T))
    if schedule == "exponential":
        return math.exp(-lambda_decay * t)
    if schedule == "adaptive":
        if norm is None or mean_norm is None:
            raise ValueError("schedule adaptive needs the norm of the vector and the running mean of norms")
        return math.exp(-lambda_decay * t) * norm / (mean_norm + EPSILON)
    raise ValueError(f"Unknown schedule {schedule!r}; known: {', '.join(SCHEDULES)}")


def running_mean(before: float | None, norm: float) -> float:
    """The running mean of norms with one more of them; it starts at the first."""
    return norm if before is None else MEAN_KEEPS * before + (1 - MEAN_KEEPS) * norm


# ---------------------------------------------------------------- draws


def draw_generator(seed: int, question_id: int | str, branch: int = 0, slot: int = 1) -> torch.Generator:
    """The CPU generator of one vector's noise, from a 64-bit hash of (seed, question id, branch, slot; slots count from 1).

    Torch's generator keeps its lower half: of ten thousand vectors two share their draws once in a hundred seeds.
    """
    key = f"{seed}|{question_id}|{branch}|{slot}".encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()))


# ---------------------------------------------------------------- the edit


@dataclass(frozen=True)
class Noise:
    """Which noise thoughts meet. ValueError for what does not exist.

    `at_step`: the slot of the injection, from 1, which gets the full scale; slots behind it follow `schedule`, those before
    it get none. `passes`: "all", "first" (only the injection) or the slots, from 1, that noise is limited to.
    """

    noise_type: str = "gaussian_scaled"
    direction: str | None = None
    passes: str | tuple[int, ...] = "all"
    at_step: int = 1
    schedule: str = "constant"
    lambda_decay: float = 0.5
    seed: int = 0

    def __post_init__(self):
        check_type(self.noise_type, self.direction)
        _factor(self.schedule, 0, 1, self.lambda_decay, 1.0, 1.0)
        if self.at_step < 1:
            raise ValueError(f"injection step {self.at_step}: slots count from 1")
        if self.passes not in ("all", "first"):
            if isinstance(self.passes, str) or not self.passes or any(type(k) is not int or k < 1 for k in self.passes):
                raise ValueError(f"noise_passes {self.passes!r}: say all, first, or a list of slots, counted from 1")

    @property
    def first_slot(self) -> int:
        """The first slot, from 1, whose vector may be changed."""
        slots = [k for k in self.passes if k >= self.at_step] if isinstance(self.passes, tuple) else [self.at_step]
        return min(slots, default=self.at_step)

    def scale_at(self, slot: int, s: float, n_slots: int, norm: float | None = None, mean_norm: float | None = None) -> float:
        """The scale at a slot (from 1) of a row with `n_slots`, 0 where noise is off; s = 0 is off for every type."""
        listed = slot == self.at_step if self.passes == "first" else self.passes == "all" or slot in self.passes
        if s == 0 or not listed or slot < self.at_step:
            return 0.0
        if slot == self.at_step:
            return s
        t, T = slot - self.at_step - 1, n_slots - self.at_step
        scale = scheduled_scale(self.schedule, s, t, T, self.lambda_decay, norm, mean_norm, self.noise_type)
        return scale if math.isfinite(scale) else 0.0


@dataclass(frozen=True)
class NoisyRow:
    """What the noise of a row depends on: its question, the scale, its number of thoughts, and its branch."""

    question_id: int | str
    scale: float
    n_slots: int
    branch: int = 0


class NoiseEdit:
    """The edit that adds noise to what is fed into thought slots; `rows[row_id]` says what a row of a pass gets.

    `norms[row_id][slot]` holds (norm of the vector, norm of its noise) of every slot that met noise.
    """

    layers = (0,)

    def __init__(self, noise: Noise, rows: Sequence[NoisyRow] | Mapping[int, NoisyRow]):
        self.noise, self.rows = noise, rows
        self.norms: dict[int, dict[int, tuple[float, float]]] = {}
        self._means: dict[tuple[int, int], float] = {}  # running mean of norms, by row id and slot

    def __call__(self, layer: int, pass_, x_BCD: Tensor) -> Tensor | None:
        if layer != 0 or not pass_.slots:
            return None
        columns = list(x_BCD.unbind(1))
        for slot in pass_.slots:
            column = slot.column - pass_.start
            columns[column] = self.noisy(slot.k, columns[column], pass_.row_ids, slot.rows)
        return torch.stack(columns, 1)

    def noisy(self, k: int, h_BD: Tensor, row_ids: Sequence[int], has_B: Tensor | None = None) -> Tensor:
        """The vectors for slot k (from 0) of these rows, with their noise; `has_B` (bool): which rows have the slot."""
        scale_B = self._scales(k + 1, h_BD, row_ids, has_B)
        hit = [b for b, scale in enumerate(scale_B) if scale != 0]
        if not hit:
            return h_BD
        index = torch.tensor(hit, device=h_BD.device)
        h_ND = h_BD[index]
        scale_N1 = torch.tensor([[scale_B[b]] for b in hit], dtype=wide(h_ND), device=h_ND.device)
        drawn_ND = self._drawn(k + 1, [self.rows[row_ids[b]] for b in hit], h_ND)
        noise_ND = noise_of(h_ND, scale_N1, self.noise.noise_type, self.noise.direction, drawn_ND)
        sizes = torch.stack([h_ND.to(noise_ND).norm(dim=-1), noise_ND.norm(dim=-1)], 1).tolist()
        for b, (norm, size) in zip(hit, sizes):
            self.norms.setdefault(row_ids[b], {})[k + 1] = (norm, size)
        return h_BD.index_copy(0, index, _added(h_ND, noise_ND))

    def _scales(self, slot: int, h_BD: Tensor, row_ids: Sequence[int], has_B: Tensor | None) -> list[float]:
        """The scale of each row at a slot, 0 where it gets no noise."""
        adaptive = self.noise.schedule == "adaptive" and slot > self.noise.at_step
        norm_B = h_BD.to(wide(h_BD)).norm(dim=-1).tolist() if adaptive else [None] * len(row_ids)
        has = [True] * len(row_ids) if has_B is None else has_B.tolist()
        scales = []
        for row_id, norm, present in zip(row_ids, norm_B, has):
            mean = None
            if adaptive and present:
                mean = running_mean(self._means.get((row_id, slot - 1)), norm)
                self._means[row_id, slot] = mean
            row = self.rows[row_id]
            scales.append(self.noise.scale_at(slot, row.scale, row.n_slots, norm, mean) if present else 0.0)
        return scales

    def _drawn(self, slot: int, rows: Sequence[NoisyRow], h_ND: Tensor) -> Tensor | None:
        """The draws of these rows; rows that differ in scale alone share one."""
        if not is_random(self.noise.noise_type, self.noise.direction):
            return None
        keys = list(dict.fromkeys((row.question_id, row.branch) for row in rows))
        shape = h_ND.shape[1:]
        drawn = [draw(self.noise.noise_type, shape, draw_generator(self.noise.seed, *key, slot)) for key in keys]
        where = {key: i for i, key in enumerate(keys)}
        picked = [where[row.question_id, row.branch] for row in rows]
        return torch.stack(drawn)[torch.tensor(picked)].to(h_ND.device)
