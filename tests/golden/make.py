"""Record the numbers that guard against silent drift: NAME.json for each family, losses.json for a run of run.py.

    python tests/golden/make.py                         # all of them
    python tests/golden/make.py --only llama qwen3      # some; `losses` is the 20-step curve of run.py

Prints what moved since the last record. Only for a change that is meant to change numbers, or a library's that is understood
and accepted; say so in the commit.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent)]

import torch  # noqa: E402
from golden import families  # noqa: E402
from golden.drift import as_text, difference, made_with, read_record, report  # noqa: E402
from run_material import BASE  # noqa: E402

from files import write_whole  # noqa: E402


def pick_salt(name: str) -> tuple[int, float]:
    """The first weights whose greedy tokens are clear and not all alike; returns their number and the smallest margin."""
    for salt in range(200):
        base = families.build_family(name, salt)
        tokens = families.new_tokens(base)
        margin = families.smallest_margin(base, tokens)
        if margin > families.MARGIN and min(len(set(row)) for row in tokens) >= 4:
            return salt, margin
    raise AssertionError(f"{name}: no weights with clear greedy tokens")


def record_family(name: str) -> dict:
    if name in families.FOLDERS:
        return {"made_with": made_with()} | families.measure(name)
    salt, margin = pick_salt(name)
    numbers = families.measure(name, salt=salt)
    base = families.build_family(name, salt).double()
    moved = difference(
        "logits", {mode: families.slow_logits(base, mode) for mode in families.MODES["logits"]}, numbers["logits"], 1e-6
    )
    assert moved is None, f"{name}: not what whole passes without batch and cache give: {moved}"
    return {"made_with": made_with(), "salt": salt, "margin": margin} | numbers


def record_losses() -> dict:
    """The losses of the first 20 updates of a tiny run, data made by the real generator."""
    import run

    with TemporaryDirectory() as folder:
        sizes = ["--sizes", "44", "11", "2", "--hops", "2", "3", "--nodes", "6", "8", "--species", "12"]
        subprocess.run([sys.executable, "data/two_chain.py", "--out", folder, *sizes], cwd=ROOT, check=True)
        values = BASE | {"num_epochs": 4, "save_path": folder, "name": "golden"}
        values |= {f"{key}_path": f"{folder}/prosqa_{split}.json" for key, split in (("train", "train"), ("val", "valid"))}
        (Path(folder) / "golden.yaml").write_text(json.dumps(values))
        assert run.main([f"{folder}/golden.yaml"]) == 0
        events = map(json.loads, (Path(folder) / "golden/metrics.jsonl").read_text().splitlines())
        losses = [event["train/loss"] for event in events if event["event"] == "step"][:20]
    return {"made_with": made_with(), "losses": losses}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Record golden numbers.")
    names = [*families.FAMILIES, *families.FOLDERS, "losses"]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    torch.set_num_threads(1)
    for name in parser.parse_args(argv).only:
        if name in families.FAMILIES and families.left_out(name):
            print(f"left out: {families.left_out(name)}")
            continue
        record = record_losses() if name == "losses" else record_family(name)
        old = read_record(name)
        numbers = {key: value for key, value in record.items() if key not in ("made_with", "salt", "margin")}
        print("first record: " + name if old is None else report(name, old, numbers) or f"{name}: as recorded before")
        write_whole(HERE / f"{name}.json", as_text(record))


if __name__ == "__main__":
    main()
