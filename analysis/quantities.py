"""Which field of which result file is which quantity of the study, and how it is read. No torch.

    QUANTITIES["psr"].read(record)         # Reading(value=4.2, n=500, ci95=[...], note=""), or a string that says why not
    of_sets(["test", "swap_pairs"], {"swap_pairs"})["both_right/swap_pairs"].meaning

`evidence.py` applies these to all files of a study; whoever adds a quantity adds a line here. Shares become points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from analysis.runs import MODELS

LATENT = ("m3", "m4", "m4b", "m5")
MEASURED_IN = {  # the models for which an experiment is defined
    "ood": MODELS,
    "confidence": ("m0", *LATENT),
    "corruption": LATENT,
    "probing": LATENT,
    "causal_tracing": ("m1", *LATENT),
    "psr": ("m1", *LATENT),
    "token_count": ("m3", "m4b", "m5"),
}
PSR_KIND, PSR_SIGMA = "absolute", 1.0  # one scale of noise for all models; their own scales differ fifty-fold


class Reading(NamedTuple):
    """A quantity of one checkpoint. `n`: rows behind it; `ci95`: over rows, where the file has one."""

    value: float
    n: int | None
    ci95: list[float] | None = None
    note: str = ""


Read = Callable[[dict], Reading | str]


class Spec(NamedTuple):
    """Of a quantity: experiment, unit, what it is, and `read(record)` -> a Reading, or why there is none."""

    experiment: str
    unit: str
    meaning: str
    read: Read


# ---------------------------------------------------------------- reading a field


def at(record: dict, path: str) -> object:
    """What stands at `a.b.c` of nested objects, None if nothing."""
    found: object = record
    for key in path.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return found


def level_at(path: str) -> Read:
    """Reads {"correct", "n", "accuracy", "ci95"}, in points."""

    def read(record: dict) -> Reading | str:
        found = at(record, path)
        if not isinstance(found, dict) or "n" not in found:
            return f"its file has no {path}"
        if not found["n"]:
            return f"{path} has no rows"
        return Reading(100 * found["correct"] / found["n"], found["n"], _scaled(found.get("ci95"), 100))

    return read


def estimate_at(path: str, scale: float = 100, reason: str = "reason") -> Read:
    """Reads {"value" or "difference", "n", "ci95"} times `scale`; `reason`: the file's field that says why there is none."""

    def read(record: dict) -> Reading | str:
        found = at(record, path)
        found = found if isinstance(found, dict) else {}
        value = found.get("value", found.get("difference"))
        if value is None:
            return found.get("reason") or record.get(reason) or f"its file has no {path}"
        return Reading(scale * value, found.get("n", record.get("n")), _scaled(found.get("ci95"), scale))

    return read


def _scaled(interval: list[float] | None, scale: float) -> list[float] | None:
    return [scale * bound for bound in interval] if interval else None


def causal_peak(record: dict) -> Reading | str:
    """Largest restored share of the total effect at a thought state; 0 where there is no effect to restore."""
    found = at(record, "groups.thoughts")
    if not isinstance(found, dict):
        return "its file has no groups.thoughts"
    n = found.get("n_traced", record.get("n"))
    if "effect" in found and found["effect"] is None:
        return Reading(0.0, n, note=found.get("reason") or "no effect to trace")
    if found.get("peak_ce") is None:
        return found.get("reason") or "its file has no groups.thoughts.peak_ce"
    return Reading(float(found["peak_ce"]), n, found.get("peak_ce_ci95"))


def psr(record: dict) -> Reading | str:
    """Rows whose answer changes under noise of the common scale, sigma 1, on the output of the middle block."""
    middle = str(max(int(record.get("n_layers") or 0) // 2, 1))
    rates = at(record, f"psr.{middle}.{PSR_KIND}") or {}
    for sigma in rates:
        if float(sigma) == PSR_SIGMA:
            return level_at("rate")({"rate": rates[sigma]})
    why = at(record, f"psr_why.{middle}.{PSR_KIND}")
    return why or f"its file has no psr at layer {middle}, kind {PSR_KIND}, sigma {PSR_SIGMA:g}"


# ---------------------------------------------------------------- the quantities

QUANTITIES = {
    "permutation_flips": Spec(
        "corruption",
        "points",
        "rows whose answer changes under any of the orders tried of its thoughts",
        level_at("permutation_flip_rate"),
    ),
    "swap_transplant_drop": Spec(
        "corruption",
        "points",
        "accuracy lost with the thoughts of the other person's question",
        estimate_at("swap_transplant_drop", reason="swap_reason"),
    ),
    "swap_follow": Spec(
        "corruption",
        "points",
        "rows that take over the answer of the other person's question with its thoughts",
        level_at("swap_follow_rate"),
    ),
    "corruption_drop": Spec(
        "corruption", "points", "accuracy lost with noise in all thoughts, recompute", estimate_at("all_slots_drop.recompute")
    ),
    "corruption_drop_replay": Spec(
        "corruption", "points", "accuracy lost with noise in all thoughts, replay", estimate_at("all_slots_drop.replay")
    ),
    "controlled_advantage": Spec(
        "probing",
        "points",
        "best probe accuracy at thoughts minus the best of its controls",
        estimate_at("controlled_advantage"),
    ),
    "causal_peak": Spec(
        "causal_tracing", "ratio", "largest share of the total effect restored at one thought state", causal_peak
    ),
    "total_effect": Spec(
        "causal_tracing", "nats", "margin lost with noise in all thoughts", estimate_at("groups.thoughts.total_effect", 1)
    ),
    "psr": Spec("psr", "points", f"rows whose answer changes: middle block, {PSR_KIND} scale, sigma {PSR_SIGMA:g}", psr),
    "count_loss": Spec(
        "token_count",
        "points",
        "accuracy lost with fewer thoughts than hops, mean over all such numbers",
        estimate_at("loss_with_fewer_than_hops.exact_match.mean"),
    ),
}
OF_EACH_SET = {
    "two_choice": "the right option is the more probable of the two",
    "exact_match": "the greedy answer is right",
    "format_failure": "no answer of the form asked for",
}
OF_PAIRS = {"both_right": "both rows of a pair are right", "flipped": "the answer changes within a pair"}


def of_sets(names: Iterable[str], pairs: Iterable[str] = ()) -> dict[str, Spec]:
    """The quantities of evaluation sets, named MEASURE/SET; `pairs`: sets whose rows come in pairs."""
    found = {}
    for name in names:
        for measure, meaning in (OF_EACH_SET | (OF_PAIRS if name in pairs else {})).items():
            found[f"{measure}/{name}"] = Spec("ood", "points", f"{name}: {meaning}", level_at(f"sets.{name}.{measure}"))
        found[f"generated_tokens/{name}"] = Spec("ood", "tokens", f"{name}: tokens said", _tokens(name))
    return found


def _tokens(name: str) -> Read:
    def read(record: dict) -> Reading | str:
        tokens = at(record, f"sets.{name}.generated_tokens")
        if tokens is None:
            return f"its file has no sets.{name}.generated_tokens"
        return Reading(float(tokens), at(record, f"sets.{name}.exact_match.n"))

    return read


def log_probability(name: str) -> Spec:
    """Mean log-probability of the right species on one set, from the teacher-forced experiment."""

    def read(record: dict) -> Reading | str:
        mean = at(record, f"sets.{name}.mean_lp")
        return f"its file has no sets.{name}.mean_lp" if mean is None else Reading(float(mean), at(record, f"sets.{name}.n"))

    return Spec("confidence", "nats", f"{name}: mean log-probability of the right species", read)
