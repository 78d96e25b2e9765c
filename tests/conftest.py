"""What all tests share: one thread, the repository root on the import path, the official data files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
os.environ["HF_HUB_OFFLINE"] = "1"  # a folder or nothing: no test may wait for a hub


def pytest_addoption(parser) -> None:
    parser.addoption("--all", action="store_true", help="also the tests marked slow, which others cover in part")


def pytest_collection_modifyitems(config, items) -> None:
    """Slow tests only where they are asked for; the slowest files first, so that no worker is left with one at the end."""
    if not config.getoption("--all"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if item not in slow]
        config.hook.pytest_deselected(items=slow)
    slow = ["bench", "chaos", "study", "parallel", "remote", "run", "factorial", "compiled", "phase1"]
    slow = [f"test_{name}" for name in slow]
    items.sort(key=lambda item: slow.index(item.path.stem) if item.path.stem in slow else len(slow))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of official data files and golden records; skips where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the folder of official data files, ../shared/data, is absent")
    return folder


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> Path:
    """44 training and 11 validation rows: the last micro-batch is short, and so is the last update."""
    folder = tmp_path_factory.mktemp("data")
    command = [sys.executable, "data/two_chain.py", "--out", str(folder), "--sizes", "44", "11", "2"]
    subprocess.run([*command, "--hops", "2", "3", "--nodes", "6", "8", "--species", "12"], cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory, small_data, own_cache) -> dict[str, Path]:
    """{"m3": run folder, ...}: small trained checkpoints of every model; see analysis_material.py."""
    from analysis_material import train_all

    return train_all(tmp_path_factory.mktemp("tiny_runs"), small_data)


@pytest.fixture
def make(tmp_path, small_data):
    """`write_config` of the small data."""
    from run_material import write_config

    return lambda name, **changes: write_config(tmp_path, small_data, name, **changes)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Tokenised files go to a folder of this test run."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    """A few two-chain rows, for the tests of evaluation."""
    from evaluate_material import draw

    return draw()


@pytest.fixture
def make_run(rows, tmp_path):
    """make_run(**changes of the config): a run on `rows`, or on other `val_rows`."""
    from evaluate_material import make_a_run

    return lambda val_rows=rows, **changes: make_a_run(tmp_path, val_rows, **changes)
