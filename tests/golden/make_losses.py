"""Write losses.json, the 20-step loss curve that test_run.py holds the training loop to.

    python tests/golden/make_losses.py

Only for a change that is meant to change training; say so in the commit.
"""

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent)]

import torch  # noqa: E402
from run_material import BASE  # noqa: E402

import run  # noqa: E402

if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sizes = ["--sizes", "44", "11", "2", "--hops", "2", "3", "--nodes", "6", "8", "--species", "12"]
        subprocess.run([sys.executable, "data/two_chain.py", "--out", folder, *sizes], cwd=ROOT, check=True)
        values = BASE | {"num_epochs": 4, "save_path": folder, "name": "golden"}
        values |= {f"{key}_path": f"{folder}/prosqa_{split}.json" for key, split in (("train", "train"), ("val", "valid"))}
        (Path(folder) / "golden.yaml").write_text(json.dumps(values))
        assert run.main([f"{folder}/golden.yaml"]) == 0
        lines = (Path(folder) / "golden/metrics.jsonl").read_text().splitlines()
    losses = [record["train/loss"] for record in map(json.loads, lines) if record["event"] == "step"][:20]
    made_with = {"torch": torch.__version__, "machine": platform.machine()}
    (HERE / "losses.json").write_text(json.dumps({"made_with": made_with, "losses": losses}, indent=1) + "\n")
