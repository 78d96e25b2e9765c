"""A small data folder with a test file and evaluation sets of every kind, for the tests of the experiments that run on them."""

import random
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from ood_material import few_rows, spec_of

from data import two_chain
from data.ood import ask_other_person
from data.ood_sets import SWAP_OFFICIAL
from data.prosqa_rows import draw_rows, write_rows

N = 12  # rows of each set


def write_set(folder: Path, name: str, rows: list[dict], kind: str | None = None, **about) -> None:
    """A file and its sidecar, with as much as readers of evaluation sets need."""
    lengths = [len(row["steps"]) for row in rows]
    facts = {"kind": kind, "pairs": "pair_id" in rows[0], "two_chain": kind != "edge", "hops": [min(lengths), max(lengths)]}
    write_rows(folder / f"{name}.json", rows, about, **(facts if kind else {}))


def balanced(name: str) -> list[dict]:
    """Rows of a set, each asked about both persons, so that rules blind to the person get 50 % of any number of rows."""
    spec, generator = spec_of("quickstart", name), spec_of("quickstart", name).generator
    return draw_rows(lambda rng: two_chain.draw_pair(rng, generator), N // 2, 0, spec.kind, set())[0]


def write_sets(folder: Path) -> Path:
    """prosqa_test.json and, in ood/, `id_matched`, `ood_4hop`, `swap_pairs`, `swap_official_test` and `edge_pairs`."""
    spec = two_chain.TwoChain(hops=(2, 3), nodes=(6, 8), species=12)
    test = draw_rows(lambda rng: two_chain.draw_row(rng, spec), N, 0, "test", set())[0]
    (folder / "ood").mkdir(parents=True)
    write_set(folder, "prosqa_test", test)
    swapped = [ask_other_person(random.Random(i), row) | {"official_row": i} for i, row in enumerate(test)][1:]
    write_set(folder / "ood", "id_matched", balanced("id_matched"), "id")
    write_set(folder / "ood", "ood_4hop", balanced("ood_4hop"), "ood_depth")
    write_set(folder / "ood", f"{SWAP_OFFICIAL}_test", swapped, "swap", official="prosqa_test.json")
    write_set(folder / "ood", "swap_pairs", list(few_rows("quickstart", "swap_pairs")), "swap")
    write_set(folder / "ood", "edge_pairs", list(few_rows("quickstart", "edge_pairs")), "edge")
    return folder


@pytest.fixture(scope="session")
def sets_folder(tmp_path_factory) -> Path:
    return write_sets(tmp_path_factory.mktemp("sets") / "data")


def assert_alike(a, b) -> None:
    """The same structure and values; numbers that another batch computed may differ by rounding."""
    if isinstance(a, dict):
        assert isinstance(b, dict) and a.keys() == b.keys()
        for key in a:
            assert_alike(a[key], b[key])
    elif isinstance(a, list):
        assert isinstance(b, list) and len(a) == len(b)
        for x, y in zip(a, b):
            assert_alike(x, y)
    else:
        assert a == (pytest.approx(b, abs=1e-4) if isinstance(b, float) else b)


def lasting(found: dict) -> dict:
    """A result without what differs from run to run."""
    return {key: value for key, value in found.items() if key not in ("elapsed_seconds", "command")}


def as_script(name: str, *argv) -> subprocess.CompletedProcess:
    """`python analysis/NAME.py ...`, a process of its own."""
    command = [sys.executable, f"analysis/{name}.py", *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def as_module(name: str, *argv) -> int:
    """The exit code of `python -m analysis.NAME ...`, within this process."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", [name, *map(str, argv)])
        patch.delitem(sys.modules, f"analysis.{name}", raising=False)
        runpy.run_module(f"analysis.{name}", run_name="__main__")
    return end.value.code
