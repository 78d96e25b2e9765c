"""Health checks of memories: whether they are read, by tokens that read different things, and whether that counts.

    memory(patient)      LAHR's key-value memories: share of value rows read on the data; Cognate's long-term memory: what
                         the gate leaves to it, and how large its reads are

A memory is dead where hardly a row of its table is read, where all tokens read the same rows, or where what it adds to the
stream, or what the gate takes of it, is nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.health_patient import Patient, Result, not_applicable
from backbones.memory_layers import Memory, counting_reads, utilisation
from backbones.refiner import Gate
from backbones.window import rms

ROWS = 32
LEAST_READ = 0.01
LEAST_ADDED = 1e-6  # root mean square, of what goes in
LEAST_SHARE = 0.001  # of the gate


@torch.no_grad()
def memory(patient: Patient) -> list[Result]:
    """A result for each memory of the model; see the module's docstring."""
    tables = [(name, module) for name, module in patient.model.named_modules() if isinstance(module, Memory)]
    gates = [module for module in patient.model.modules() if isinstance(module, Gate)]
    if tables:
        return _tables(patient, dict(tables))
    if gates:
        return [_pool(patient, gates[0])]
    return [not_applicable("memory", "no memory")]


# ---------------------------------------------------------------- tables of values (LAHR)


def _tables(patient: Patient, memories: dict[str, Memory]) -> list[Result]:
    added = {module: [] for module in memories.values()}

    def note(module, args, out) -> None:
        added[module].append((args[0].flatten(0, -2).double(), out.flatten(0, -2).double()))

    with counting_reads(patient.model) as counts, _watching(memories.values(), note):
        _ask(patient)
    results = []
    for module in memories.values():
        counts_M, (before, after) = counts[module.layer], (torch.cat(parts) for parts in zip(*added[module]))
        share, ratio, n_tokens = utilisation(counts_M), _ratio(after, before), len(before)
        same = n_tokens > 1 and bool((counts_M % n_tokens == 0).all())
        ok = LEAST_READ <= share <= 1 and not same and ratio > LEAST_ADDED
        detail = f"{int((counts_M > 0).sum())} of {module.n_slots} rows by {n_tokens} tokens; adds {ratio:.2g} of what goes in"
        detail += "; all tokens read the same rows" if same else ""
        figures = {"added": ratio, "reads": int(counts_M.sum()), "most_read": int(counts_M.max())}
        results.append(Result(f"memory.layer_{module.layer}", share, f">= {LEAST_READ} read", ok, detail, figures))
    return results


def _ratio(a: Tensor, b: Tensor) -> float:
    """The root mean square of one tensor over that of another."""
    return (a.square().mean() / b.square().mean().clamp(min=1e-30)).sqrt().item()


def _ask(patient: Patient) -> None:
    """Rows one by one: what padding reads would count."""
    for row in patient.rows[:ROWS]:
        patient.paths["wrapper"](patient.batch([row]))


# ---------------------------------------------------------------- the long-term memory (Cognate)


def _pool(patient: Patient, gate: Gate) -> Result:
    seen = []

    def note(module, args, out) -> None:
        y, read = (x.flatten(0, -2) for x in args)
        mixed = torch.cat([rms(y, module.eps), rms(read, module.eps)], -1)
        g = module.outer(F.relu(module.inner(mixed))).sigmoid()
        seen.append((y.double(), read.double(), 1 - g.double()))

    with _watching([gate], note):
        _ask(patient)
    y_ND, read_ND, left_ND = (torch.cat(parts) for parts in zip(*seen))
    share, size = left_ND.mean().item(), _ratio(read_ND, y_ND)
    spread = _ratio(read_ND - read_ND.mean(0), y_ND - y_ND.mean(0))
    ok = LEAST_SHARE < share <= 1 and size > LEAST_ADDED and spread > LEAST_ADDED
    half_lives = getattr(patient.bare.base_model.memory, "half_lives", None)
    detail = f"share that the gate leaves to it; reads {size:.2g} of the trunk's size, differing by {spread:.2g} of its spread"
    detail += "" if half_lives is None else f"; half-lives {half_lives[0]:.0f} to {half_lives[1]:.0f} tokens"
    figures = {"read": size, "spread": spread, "half_lives": half_lives}
    return Result("memory", share, f"> {LEAST_SHARE}", ok, detail, figures)


@contextmanager
def _watching(modules, note) -> Iterator[None]:
    handles = [module.register_forward_hook(note) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
