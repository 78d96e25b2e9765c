"""What the thin fronts of run.py share: a YAML with other keys, printed and kept, and the run that it describes."""

import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]


def resolved(name: str, changes: dict) -> dict:
    """The keys of args/<name>.yaml with changes; None takes a key out."""
    values = yaml.safe_load((ROOT / "args" / f"{name}.yaml").read_text()) | changes
    return {key: value for key, value in values.items() if value is not None}


def keep(values: dict, path: Path, may_change: bool) -> None:
    """Print the resolved YAML and write it to a path. ValueError where another one lies there, unless it `may_change`."""
    text = yaml.safe_dump(values, sort_keys=False)
    if path.is_file() and path.read_text() != text and not may_change:
        raise ValueError(
            f"{path.with_suffix('')} holds a run with other settings; give --overwrite, --resume or another folder"
        )
    print(f"# {path}\n{text}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)


def write_whole(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it into place."""
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(text)
    temporary.rename(path)


def call(*command: str | Path) -> int:
    """Run a command of this repository in its root; its exit code."""
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT).returncode
