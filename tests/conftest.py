"""What all tests share: one thread, the repository root on the import path, the official data files."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
os.environ["HF_HUB_OFFLINE"] = "1"  # a folder or nothing: no test may wait for a hub


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of official data files and golden records; skips where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the folder of official data files, ../shared/data, is absent")
    return folder
