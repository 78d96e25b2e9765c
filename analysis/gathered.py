"""Everything that a study left as JSON for one kind of checkpoint, in one dictionary. No torch.

    summary = gather(Path("results/quickstart"), "final")
    summary["corruption"]["m3-s1"]["forward_corruption"]       # the experiments, by label
    repeats(summary, "corruption", "m3")                       # results of one model, by repeat

Written to results_summary.json, this dictionary is all that figures and report know. Beside the experiments it holds: `name`,
`folder`, `epoch`, `study` (study.json), `gates` (the last record of each gate and subject), `verdict` and `comparisons` (from
the results, when this is called), `sanity` (gate 5's file), `self_checks`, `failed` (experiments that a check stopped),
`missing` (what is not there, each with its command) and `incomparable` (why published numbers are not drawn beside ours).
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import yaml

from analysis.comparisons import compare_sets
from analysis.evidence import collect, parse_label
from analysis.quantities import MEASURED_IN
from analysis.runlog import read_json
from analysis.runs import MODELS
from analysis.verdict import decide

SCHEMA_VERSION = 1
OFFICIAL = {"n_layers": 12, "n_thoughts": 6, "test_rows": 500, "shortcut": 90}  # the published models and data
EXPERIMENTS = {**MEASURED_IN, "causal_sanity": ("m1",), "curriculum": ("m0", "m1", "m2", "m3", "m4", "m4b", "m5")}


def gather(folder: Path, epoch: str = "final") -> dict:
    """The summary of one kind of checkpoint.

    Raises ValueError where there is nothing: the command that makes it is in the message.
    """
    place = folder / epoch
    if not place.is_dir():
        measure = f"python -m analysis.measure --study {folder} --epoch {epoch}"
        raise ValueError(f"{folder} has no {epoch} results; make them with: {measure}")
    plan = read_json(folder / "study.json") if (folder / "study.json").is_file() else {}
    summary = {"schema_version": SCHEMA_VERSION, "name": plan.get("name", folder.name), "folder": str(folder), "epoch": epoch}
    summary["study"] = plan
    found = {name: {} for name in EXPERIMENTS} | _results(place)
    for name, results in found.items():
        joint = place / name / "results.json"
        summary[name] = results | ({"verification": _verification(joint)} if joint.is_file() else {})
    summary["failed"] = _failed(place)
    checks = sorted((place / "self_checks").glob("*.json"), key=lambda path: order(path.stem))
    summary["self_checks"] = {path.stem: read_json(path).get("checks", {}) for path in checks}
    summary["gates"] = _gates(folder / "gates.json")
    sanity = sorted(place.glob("*/exp0_sanity_result.json"))
    summary["sanity"] = read_json(sanity[0]) if sanity else None
    evidence = collect(folder, epoch)
    held = read_json(place / "verdict.json") if (place / "verdict.json").is_file() else {}
    summary["verdict"] = decide(evidence, held.get("measure", "two_choice")).to_json()
    summary["comparisons"] = compare_sets(evidence)
    summary["missing"] = _missing(summary)
    summary["incomparable"] = _incomparable(summary)
    return summary


def order(label: str) -> tuple[int, int, str]:
    """Sorts labels: m1, m2, m3, ..., m0, each by repeat; others last."""
    key, repeat = parse_label(label)
    return (MODELS.index(key) if key else len(MODELS), repeat, label)


def labels(summary: dict, experiment: str) -> list[str]:
    """Labels that an experiment has results of, in the order of the study."""
    return sorted((label for label in summary.get(experiment, {}) if label != "verification"), key=order)


def repeats(summary: dict, experiment: str, model: str) -> list[dict]:
    """The results of one model, by repeat."""
    return [summary[experiment][label] for label in labels(summary, experiment) if parse_label(label)[0] == model]


def models(summary: dict, experiment: str) -> list[str]:
    """Model keys that an experiment has results of."""
    return list(dict.fromkeys(parse_label(label)[0] for label in labels(summary, experiment)))


def planned(summary: dict) -> list[str]:
    """Labels of the study's runs; without study.json those that any experiment knows."""
    runs = [run["label"] for run in summary["study"].get("runs", [])]
    found = runs or {label for name in EXPERIMENTS for label in labels(summary, name)}
    return sorted(found, key=order)


def reasons(records: list[dict]) -> list[str]:
    """Why gates are uncalibrated, the runs with the same reason together: `m1, m3-s1: trains ... from scratch`."""
    by_reason: dict[str, list[str]] = {}
    for reason in dict.fromkeys(reason for record in records for reason in record.get("uncalibrated", [])):
        label, _, rest = reason.partition(" ")
        by_reason.setdefault(rest if parse_label(label)[0] else reason, []).append(label)
    return [f"{', '.join(sorted(who, key=order))}: {why}" if parse_label(who[0])[0] else why for why, who in by_reason.items()]


def make(summary: dict, experiment: str, model: str = "") -> str:
    """The command that makes an experiment's results."""
    folder, epoch = Path(summary["folder"]), summary["epoch"]
    if experiment == "curriculum":
        return f"python -m analysis.curriculum --study {folder} --output_dir {folder / epoch}"
    asked = "" if epoch == "final" else f" --epoch {epoch}"
    return f"python -m analysis.{experiment} --study {folder} --models {model or ','.join(EXPERIMENTS[experiment])}{asked}"


KIND_ORDER = ("test", "id", "swap", "ood_depth", "ood_structure", "edge")


def set_order(name: str, kind: str | None) -> tuple[int, str]:
    """Sorts sets: the test set, its likes, swapped ones, more hops, other structure, single edges."""
    kind = "test" if name == "test" else kind
    return (KIND_ORDER.index(kind) if kind in KIND_ORDER else len(KIND_ORDER), name)


def sets_of(summary: dict) -> dict[str, dict]:
    """{evaluation set: what the first model's result says of it}, in the order of the report."""
    found: dict[str, dict] = {}
    for model in models(summary, "ood"):
        for result in repeats(summary, "ood", model):
            for name, one in result.get("sets", {}).items():
                found.setdefault(name, one)
    return dict(sorted(found.items(), key=lambda item: set_order(item[0], item[1].get("kind"))))


def strongest_shortcut(baselines: dict[str, float]) -> tuple[str, float] | None:
    """The rule that is right most often without reading who is asked, and how often, in percent."""
    blind = {rule: x for rule, x in baselines.items() if not rule.startswith("search")}
    return max(blind.items(), key=lambda item: item[1]) if blind else None


@cache
def anchors() -> dict:
    """The published numbers of anchors.yaml."""
    return yaml.safe_load(Path(__file__).with_name("anchors.yaml").read_text())


# ---------------------------------------------------------------- files


def _results(place: Path) -> dict[str, dict[str, dict]]:
    """{experiment: {label: result}} of all LABEL_EXPERIMENT.json files, whatever their folders are called."""
    found: dict[str, dict[str, dict]] = {}
    for path in sorted(place.glob("*/*.json")):
        label, _, name = path.stem.partition("_")
        if parse_label(label)[0] is not None and name in EXPERIMENTS:
            found.setdefault(name, {})[label] = read_json(path)
    return {name: dict(sorted(results.items(), key=lambda item: order(item[0]))) for name, results in found.items()}


def _verification(path: Path) -> dict:
    found = read_json(path).get("verification")
    return found if isinstance(found, dict) else {}


def _failed(place: Path) -> list[dict]:
    failed = []
    for path in sorted(place.glob("*/*.failed.json")):
        label, _, name = path.name.removesuffix(".failed.json").partition("_")
        failed.append({"experiment": name, "label": label, "reason": str(read_json(path).get("reason", "no reason recorded"))})
    return failed


def _gates(path: Path) -> list[dict]:
    """The last record of each gate and subject, in the order in which gates were first judged."""
    records = read_json(path).get("records", []) if path.is_file() else []
    last = {(str(record.get("gate")), str(record.get("subject"))): record for record in records}
    return list(last.values())


def _missing(summary: dict) -> list[dict]:
    """Results that the study plans and that are not there: [{"experiment", "label", "command"}]."""
    wanted = summary["study"].get("experiments") or list(MEASURED_IN)
    gaps = []
    for name in dict.fromkeys([*wanted, "curriculum"]):
        for label in planned(summary):
            key, _ = parse_label(label)
            if key in EXPERIMENTS.get(name, ()) and label not in summary.get(name, {}):
                gaps.append({"experiment": name, "label": label, "command": make(summary, name, label)})
    return gaps


def _incomparable(summary: dict) -> list[str]:
    """What keeps this study from standing beside the published one: ProsQA's official files, GPT-2, six thoughts."""
    results = [summary[name][label] for name in EXPERIMENTS for label in labels(summary, name)]
    found = reasons(summary["gates"])
    layers = {r["n_layers"] for r in results if r.get("n_layers")} - {OFFICIAL["n_layers"]}
    thoughts = {r["n_thoughts"] for r in results if r.get("n_thoughts")} - {OFFICIAL["n_thoughts"]}
    found += [f"models of {n} layers, not {OFFICIAL['n_layers']}" for n in sorted(layers)]
    found += [f"{n} thoughts, not {OFFICIAL['n_thoughts']}" for n in sorted(thoughts)]
    test = sets_of(summary).get("test", {})
    shortcut = strongest_shortcut(test.get("shortcut_baselines") or {})
    if not shortcut:
        found.append("the test set was not evaluated")
    elif shortcut[1] < OFFICIAL["shortcut"]:
        here = f"the best rule blind to the person is right in {shortcut[1]:.1f} %, there in more than {OFFICIAL['shortcut']} %"
        found.append(f"other test rows than the official ones: {here}")
    elif test.get("n") != OFFICIAL["test_rows"]:
        found.append(f"{test.get('n')} test rows, not {OFFICIAL['test_rows']}")
    return found


def read_summary(path: Path) -> dict:
    """A results_summary.json; ValueError where it is something else."""
    summary = read_json(path)
    if summary.get("schema_version") != SCHEMA_VERSION or "epoch" not in summary:
        raise ValueError(f"{path} is no results_summary.json of this version; make it with: python -m analysis.report")
    return summary


def as_json(summary: dict) -> str:
    """The text of results_summary.json, the same for the same results."""
    return json.dumps(summary, indent=1, allow_nan=False) + "\n"
