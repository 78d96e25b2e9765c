"""A study's result folder with known numbers, for the tests of evidence and verdict.

write_study(tmp_path, {"ood_dag": {"m3": 78.0}, "psr": {"m3": 35.0}})     # all else as in DEFAULT

Every number is a mean over seeds; seed r lies SPREAD[r] points beside it (a hundredth of that for the causal ratio), so with
three seeds the standard error of a difference is 0.4 * sqrt(2/3) = 0.327 points, its 90 % interval ± 0.696 and its 95 %
interval ± 0.907 (t with 4 degrees of freedom 2.132 and 2.776).
"""

import json
from pathlib import Path

SPREAD = (-0.4, 0.0, 0.4)
KINDS = {
    "test": "id",
    "id_matched": "id",
    "swap_official_test": "swap",
    "swap_pairs": "swap",
    "ood_7hop": "ood_depth",
    "ood_8hop": "ood_depth",
    "ood_dag": "ood_structure",
    "ood_dense": "ood_structure",
    "edge_pairs": "edge",
}
MODELS = ("m3", "m4b", "m5", "m0")
DEFAULT = {  # curriculum + compute suffice: m3, m5 and m0 alike, m4b half a point off (the noise floor)
    **{name: {"m3": 70.0, "m4b": 70.5, "m5": 70.0, "m0": 70.0} for name in KINDS},
    "flips": {"m3": 0.0, "m4b": 0.0, "m5": 0.0},
    "swap_drop": {"m3": 0.0, "m4b": 0.0, "m5": 0.0},
    "noise_drop": {"m3": 1.0, "m4b": 1.5, "m5": 1.0},
    "advantage": {"m3": 10.0, "m4b": 10.5, "m5": 10.0},
    "psr": {"m3": 20.0, "m4b": 20.5, "m5": 20.0},
    "causal": {"m3": None, "m4b": None, "m5": None},  # None: no effect to trace
    "count": {"m3": 1.0, "m4b": 1.5, "m5": 1.0},
}


def level(points: float, n: int = 1000) -> dict:
    """An accuracy as the experiments write it; `points` to a tenth."""
    correct = min(max(round(points * n / 100), 0), n)
    return {"correct": correct, "n": n, "accuracy": correct / n, "ci95": [0.0, 1.0]}


def estimate(points: float) -> dict:
    """A difference as the experiments write it, with its interval over rows."""
    return {"value": points / 100, "ci95": [points / 100 - 0.01, points / 100 + 0.01], "n": 1000, "reason": None}


def values(mean: float | tuple, seeds: int) -> list[float]:
    """One number a seed: spread around a mean, or as given."""
    return list(mean[:seeds]) if isinstance(mean, tuple) else [mean + SPREAD[r] for r in range(seeds)]


def write_study(folder: Path, changes: dict | None = None, seeds: int | dict = 3, epoch: str = "final") -> Path:
    """Write FOLDER/EPOCH/...; `changes`: {quantity: {model: mean or one value a seed}}; `seeds`: of all models or by model."""
    world = {name: by_model | (changes or {}).get(name, {}) for name, by_model in DEFAULT.items()}
    assert not set(changes or {}) - set(world), changes
    for model in MODELS:
        n = seeds.get(model, 3) if isinstance(seeds, dict) else seeds
        for r in range(n):

            def of(name, model=model, r=r, n=n):
                return values(world[name][model], n)[r]

            label = model + (f"-s{r}" if r else "")
            sets = {s: {"two_choice": level(of(s)), "exact_match": level(of(s)), "kind": kind} for s, kind in KINDS.items()}
            for about in sets.values():
                about |= {"format_failure": level(0), "generated_tokens": 7.5, "shortcut_baselines": {"more ancestors": 50.0}}
            write(folder / epoch, "ood", label, r, sets=sets)
            if model == "m0":
                continue
            write(
                folder / epoch,
                "corruption",
                label,
                r,
                all_slots_drop={"replay": estimate(0), "recompute": {"difference": of("noise_drop") / 100, "n": 1000}},
                permutation_flip_rate=level(of("flips")),
                swap_transplant_drop=estimate(of("swap_drop")),
                swap_follow_rate=level(0),
            )
            write(folder / epoch, "probing", label, r, controlled_advantage=estimate(of("advantage")))
            kinds = {"own": {"1.0": level(99)}, "absolute": {"0.5": level(98), "1.0": level(of("psr"))}}
            write(folder / epoch, "psr", label, r, psr={"0": {"absolute": {"1.0": level(97)}}, "6": kinds})
            groups = {"effect": None, "reason": "no effect to trace", "total_effect": {"value": 0.1, "ci95": [0.0, 0.2]}}
            if world["causal"][model] is not None:
                peak = world["causal"][model] + SPREAD[r] / 100
                groups = {"peak_ce": peak, "total_effect": {"value": 2.0, "ci95": [1.9, 2.1]}}
            write(folder / epoch, "causal_tracing", label, r, groups={"thoughts": groups})
            loss = {
                "exact_match": {"mean": estimate(of("count")), "one_fewer": estimate(99)},
                "two_choice": {"mean": estimate(98)},
            }
            write(folder / epoch, "token_count", label, r, loss_with_fewer_than_hops=loss)
    return folder


def write(place: Path, experiment: str, label: str, repeat: int, **fields) -> None:
    """One result file."""
    model = label.split("-")[0]
    modes = {"m3": "continuous", "m4b": "learned_shared", "m5": "pause_curriculum", "m0": "none"}
    about = {"model": label, "model_key": model, "repeat": repeat, "feedback_mode": modes[model], "n": 1000}
    about |= {"n_thoughts": 6, "n_layers": 12, "checkpoint": {"file": f"{label}/checkpoint_50", "sha256": f"sha of {label}"}}
    about |= {"train_seed": repeat + (10 if model == "m4b" else 0)}
    (place / experiment).mkdir(parents=True, exist_ok=True)
    (place / experiment / f"{label}_{experiment}.json").write_text(json.dumps(about | fields))
