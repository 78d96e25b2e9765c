"""The habits that keep the house: imports one way, one call of the backbone, nothing unpickled, nothing tied to a machine."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODEL = {"attention", "taps", "passes", "generation", "coconut", "recompute", "compiled", "backbones", "optimizers", "lora"}
DATA = {"tokens", "dataset", "batches"}
BASIS = {"files", "config_rules", "utils", "world", "stopping"}
AROUND = {"accounting", "reporting", "microbatch", "parallel", "averaging", "monitoring"}
CORE = MODEL | DATA | BASIS | AROUND
RUNS = {"checkpoint", "sharding", "run_folder", "phase1", "saving", "evaluate"}
MAY_IMPORT = {
    **{name: set() for name in CORE},
    "generation": {"attention"},
    "coconut": {"attention", "generation", "passes", "taps"},
    "backbones": {"backbones", "data"},  # the tiny backbones' tokenizers know the vocabulary of the data
    "dataset": {"tokens"},
    "batches": {"dataset", "tokens", "utils"},
    "utils": {"config_rules", "optimizers"},
    "reporting": {"accounting", "files"},
    "monitoring": {"dataset"},
    "parallel": {"sharding"},
    "checkpoint": CORE,
    "two_choice": CORE,
    "evaluate": CORE | {"two_choice"},
    "sharding": CORE | {"checkpoint"},
    "run_folder": CORE | {"checkpoint", "sharding"},
    "phase1": CORE | {"checkpoint", "run_folder"},
    "saving": CORE | {"checkpoint", "sharding", "run_folder"},
    "updates": CORE | RUNS,
    "training": CORE | RUNS | {"updates"},
    "run": CORE | RUNS | {"training"},
    "data": {"data"},
    "analysis": CORE | RUNS | {"two_choice", "data", "analysis"},
    "scripts": set(),
    "benchmarks": CORE | RUNS | {"training", "data", "run", "analysis"},
}
SOURCES = [p for p in sorted(ROOT.rglob("*.py")) if not {".venv", ".matrix", "tests"} & set(p.relative_to(ROOT).parts)]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names & MAY_IMPORT.keys()


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert imported(path) <= MAY_IMPORT[room]


def test_no_module_imports_itself_in_a_circle():
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in SOURCES}
    graph = {name: modules(path) & names.keys() - {name} for name, path in names.items()}
    order = list(TopologicalSorter(graph).static_order())  # CycleError names the circle
    assert order.index("coconut") < order.index("run"), "the imports were seen at all"


def modules(path: Path) -> set[str]:
    """The modules that a file imports, at its top or later, with every name of a from-import as a possible module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_the_backbone_is_called_in_one_place():
    calls = [
        (path.name, node.lineno)
        for path in SOURCES
        if path.parent.name != "benchmarks"  # which times the plain model beside ours
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("base_model", "base_causallm", "base")
    ]
    assert [name for name, _ in calls] == ["coconut.py"], calls


def test_nothing_is_unpickled_and_yaml_is_safe():
    for path in SOURCES:
        text = path.read_text()
        for call in re.findall(r"torch\.load\([^\n]*", text):
            assert "weights_only=True" in call, (path, call)
        assert not re.search(r"\b(import pickle|pickle\.load|yaml\.unsafe_load|yaml\.full_load)\b", text), path


def test_no_path_of_a_machine():
    pattern = re.compile(r"(?<![\w.])/(work|root|home|tmp|mnt|Users)/\w")
    texts = [
        *SOURCES,
        *ROOT.glob("args/*.yaml"),
        *ROOT.glob("scripts/*.sh"),
        *ROOT.glob("*.md"),
        *ROOT.glob("benchmarks/*"),
    ]
    for path in texts:
        if path.is_file():
            assert not pattern.search(path.read_text()), path


def test_the_map_of_analysis_names_every_file_and_no_other():
    named = re.findall(r"`(\w+\.py)`", (ROOT / "analysis/README.md").read_text())
    there = {path.name for path in (ROOT / "analysis").glob("*.py")} - {"__init__.py"}
    assert set(named) == there and len(named) == len(there), "each once"
