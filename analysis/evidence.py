"""What a study's experiments found, over its seeds: each quantity a model, each value with its label and n. No torch.

    evidence = collect(Path("results/study"), "final")
    evidence.quantity("two_choice/ood_dag").of("m3")       # [Value("m3", 0, 71.4, ...), Value("m3-s1", 1, 69.8, ...)]
    evidence.quantity("causal_peak").missing               # [Missing("m5-s2", why, the command that makes it)]

Reads `FOLDER/EPOCH/EXPERIMENT/LABEL_EXPERIMENT.json` and, if it is there, `FOLDER/study.json` for what ought to exist. Shares
become points (97.0 for a fraction of .97), so that a threshold of 5 reads as the plan says it. What is not there is missing,
with a reason and a command; it is never 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from analysis.quantities import MEASURED_IN, OF_PAIRS, QUANTITIES, Reading, Spec, at, log_probability, of_sets
from analysis.runlog import read_json
from analysis.runs import MODELS

NEEDED = ("m3", "m5", "m4b")  # no verdict without them


# ---------------------------------------------------------------- one value, one quantity


@dataclass(frozen=True)
class Value:
    """A quantity of one checkpoint. `n`: rows behind it; `ci95`: over rows, if the file has it; `train_seed`: of the run."""

    label: str
    repeat: int
    value: float
    n: int | None
    ci95: list[float] | None = None
    note: str = ""
    train_seed: int | None = None


class Missing(NamedTuple):
    """A value that is not there: of which run, why, and what to do."""

    label: str
    why: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.label}: {self.why}; {self.remedy}"


@dataclass
class Quantity:
    """One quantity of all models: {model key: values by repeat}, and what is missing."""

    name: str
    unit: str
    meaning: str
    values: dict[str, list[Value]] = field(default_factory=dict)
    missing: list[Missing] = field(default_factory=list)

    def of(self, model: str) -> list[Value]:
        """The values of a model key, by repeat; [] where there are none."""
        return self.values.get(model, [])

    def missing_of(self, *models: str) -> list[Missing]:
        """What is missing of these model keys."""
        return [gap for gap in self.missing if gap.label.split("-")[0] in models]


@dataclass
class Evidence:
    """Everything collected. `sets`: {evaluation set: {"kind", "n", "shortcut_baselines"}}; `results`: the files themselves."""

    folder: Path
    epoch: str
    sets: dict[str, dict]
    quantities: dict[str, Quantity]
    results: dict[str, dict[str, dict]]
    labels: list[str]

    def quantity(self, name: str) -> Quantity:
        """The quantity; one that no file has is empty, with all needed models missing."""
        if name in self.quantities:
            return self.quantities[name]
        remedy = f"python -m analysis.ood --study {self.folder} --epoch {self.epoch}"
        gaps = [Missing(key, f"no file has {name}", remedy) for key in NEEDED]
        return Quantity(name, "points", "", missing=gaps)

    def sets_of(self, kind: str) -> list[str]:
        """Names of the evaluation sets of a kind: id, swap, ood_depth, ood_structure or edge."""
        return [name for name, about in self.sets.items() if about["kind"] == kind]

    def repeats(self, model: str) -> list[int]:
        """The repeats of a model of which any result exists."""
        found = {label for by_label in self.results.values() for label in by_label}
        return sorted(repeat for key, repeat in map(parse_label, found) if key == model)

    def to_json(self) -> dict:
        """{"sets", "quantities": {name: {"unit", "meaning", "values": {model: [...]}, "missing": [...]}}}."""
        quantities = {}
        for name, quantity in self.quantities.items():
            values = {key: [asdict(value) for value in found] for key, found in quantity.values.items()}
            missing = [gap._asdict() for gap in quantity.missing]
            quantities[name] = {"unit": quantity.unit, "meaning": quantity.meaning, "values": values, "missing": missing}
        return {"sets": self.sets, "quantities": quantities}


# ---------------------------------------------------------------- collecting


def collect(folder: Path, epoch: str = "final") -> Evidence:
    """All quantities of a study for one kind of checkpoint.

    Raises:
        ValueError: no such folder; a file that is not JSON; results of one label from two checkpoints, or of two repeats from
            one (neither may be averaged).
    """
    place = folder / epoch
    if not place.is_dir():
        raise ValueError(f"{place} is not there; measure with: python -m analysis.measure --study {folder} --epoch {epoch}")
    results, failed = read_results(place)
    check_checkpoints(results, place)
    plan = read_json(folder / "study.json") if (folder / "study.json").is_file() else {}
    known = {run["label"] for run in plan.get("runs", [])} | {label for by_label in results.values() for label in by_label}
    known = {label for label in known if parse_label(label)[0]}
    untrained = set(NEEDED) - {parse_label(label)[0] for label in known}
    labels = sorted(known | untrained, key=lambda label: (MODELS.index(parse_label(label)[0]), parse_label(label)[1]))
    evidence = Evidence(folder, epoch, asked_sets(results["ood"]), {}, results, labels)
    pairs = {s for s in evidence.sets for r in results["ood"].values() for m in OF_PAIRS if at(r, f"sets.{s}.{m}")}
    scored = dict.fromkeys(s for r in results["confidence"].values() for s in r.get("sets", {}))
    specs = of_sets(evidence.sets, pairs) | QUANTITIES | {f"mean_lp/{s}": log_probability(s) for s in scored}
    for name, spec in specs.items():
        quantity = evidence.quantities[name] = Quantity(name, spec.unit, spec.meaning)
        for label in labels:
            key, repeat = parse_label(label)
            if key not in MEASURED_IN[spec.experiment]:
                continue
            record = results[spec.experiment].get(label)
            found = spec.read(record) if record else failed.get((spec.experiment, label), "not measured")
            if isinstance(found, Reading):
                value = Value(label, repeat, *found, record.get("train_seed"))
                quantity.values.setdefault(key, []).append(value)
            elif label in untrained:
                quantity.missing.append(Missing(label, "not in the study", f"train {label} and measure it"))
            else:
                quantity.missing.append(Missing(label, found, command(folder, epoch, spec, label)))
    return evidence


def read_results(place: Path) -> tuple[dict[str, dict[str, dict]], dict[tuple[str, str], str]]:
    """({experiment: {label: record}}, {(experiment, label): why its check failed}) of one kind of checkpoint."""
    results: dict[str, dict[str, dict]] = {experiment: {} for experiment in MEASURED_IN}
    failed = {}
    for experiment, by_label in results.items():
        for path in sorted((place / experiment).glob(f"*_{experiment}.json")):
            label = path.name.removesuffix(f"_{experiment}.json")
            if parse_label(label)[0]:
                by_label[label] = read_json(path)
        for path in sorted((place / experiment).glob(f"*_{experiment}.failed.json")):
            label = path.name.removesuffix(f"_{experiment}.failed.json")
            failed[experiment, label] = f"a check failed: {read_json(path).get('reason', 'no reason recorded')}"
    return results, failed


def asked_sets(results: dict[str, dict]) -> dict[str, dict]:
    """Every set that any model was asked; all models are expected to have been."""
    found: dict[str, dict] = {}
    for record in results.values():
        for name, about in record.get("sets", {}).items():
            n = (about.get("exact_match") or {}).get("n")
            baselines = about.get("shortcut_baselines") or {}
            found.setdefault(name, {"kind": about.get("kind"), "n": n, "shortcut_baselines": baselines})
    return found


def check_checkpoints(results: dict[str, dict[str, dict]], place: Path) -> None:
    """ValueError where one label was measured on two checkpoints, or two repeats are one checkpoint."""
    by_label: dict[str, tuple[str, str]] = {}
    owners: dict[tuple[str | None, str], str] = {}
    for label, experiment, sha in _checkpoints(results):
        held, before = by_label.setdefault(label, (sha, experiment))
        if held != sha:
            what = f"{label} is another checkpoint in {experiment} than in {before}"
            raise ValueError(f"{place}: {what}; measure it again with --force")
        first = owners.setdefault((parse_label(label)[0], sha), label)
        if first != label:
            raise ValueError(f"{place}: {first} and {label} are one checkpoint, not two repeats; remove the results of one")


def _checkpoints(results: dict[str, dict[str, dict]]) -> Iterator[tuple[str, str, str]]:
    for experiment, by_label in results.items():
        for label, record in sorted(by_label.items()):
            if sha := (record.get("checkpoint") or {}).get("sha256"):
                yield label, experiment, sha


def parse_label(label: str) -> tuple[str | None, int]:
    """("m4b", 2) of `m4b-s2`; (None, 0) for anything that is no model of the study."""
    match = re.fullmatch(r"(m\d[a-z]?)(?:-s(\d+))?", label)
    return (match[1], int(match[2] or 0)) if match and match[1] in MODELS else (None, 0)


def command(folder: Path, epoch: str, spec: Spec, label: str) -> str:
    """The command that makes a missing result."""
    asked = "" if epoch == "final" else f" --epoch {epoch}"
    return f"python -m analysis.{spec.experiment} --study {folder} --models {label}{asked}"
