"""Small trained checkpoints of every model, for the tests of the experiments: real runs of run.py on real generated rows.

`tiny_runs` (a session fixture) is {"m0", "m1", "m3", "m4", "m4b", "m5": run folder}: two thoughts, three layers, three epochs
on 44 rows, so the models say little that is right, but say it deterministically. `small_data` is their data folder, with a
test file.
"""

from pathlib import Path

from run_material import write_config

import run

MODES = {
    "m1": {"coconut": False, "cot": True, "c_thought": 0},
    "m3": {"feedback_mode": "continuous"},
    "m4": {"feedback_mode": "frozen"},
    "m4b": {"feedback_mode": "learned_shared", "seed": 10},
    "m5": {"feedback_mode": "pause_curriculum"},
    "m0": {"coconut": False, "no_thoughts": True, "c_thought": 0},
}
NAMES = {"m1": "m1_cot", "m3": "m3_coconut", "m4": "m4_frozen", "m4b": "m4b_shared", "m5": "m5_pause", "m0": "m0_nothought"}


def train_all(folder: Path, data: Path) -> dict[str, Path]:
    """Train one checkpoint of every model; returns the run folders by key."""
    for key, changes in MODES.items():
        assert run.main([write_config(folder, data, NAMES[key], two_choice="auto", **changes)]) == 0
    return {key: folder / "runs" / name for key, name in NAMES.items()}
