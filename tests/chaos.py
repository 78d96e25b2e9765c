"""Every fault a training run may meet, on purpose: it must end with the weights of a run that met none, to the bit.

    bash scripts/chaos.sh                       # all, about 25 minutes on two cores (estimated from its parts)
    bash scripts/chaos.sh --quick               # fewer of each, about five minutes
    bash scripts/chaos.sh --only kill,rename --seed 7
    bash scripts/chaos.sh --list

Real processes, real signals, real files: tiny runs on the CPU (gloo), two processes at a time. Prints a table and writes it to
<out>/chaos.json and <out>/chaos.md. What was lost is said below it, with the folder where it lies; without a loss the folders
are removed.

Exit code: 0 nothing lost, 1 something lost, 2 a mistake.
"""

import argparse
import shutil
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import chaos_damage  # noqa: E402, F401  (registers its faults)
import chaos_faults  # noqa: E402
import chaos_world  # noqa: E402, F401
from chaos_scene import FULL, QUICK, Outcome, Scene  # noqa: E402

from checkpoint import versions  # noqa: E402
from files import whole_file, write_json  # noqa: E402

FAULTS = chaos_faults.FAULTS
EQUAL = "Equal: all weights, optimizer states, and records of every update and evaluation, to the bit."
HEAD = ("fault", "tries", "losses", "seconds", "what was checked")


def happen(name: str, scene: Scene) -> dict:
    """Let one fault happen; its record. What we did not foresee is a loss as well."""
    started = time.monotonic()
    try:
        outcome = FAULTS[name].happen(scene)
    except Exception:
        outcome = Outcome("", losses=[traceback.format_exc()])
    seconds = round(time.monotonic() - started)
    result = f"skipped: {outcome.skipped}" if outcome.skipped else f"{outcome.tries} tries, {len(outcome.losses)} losses"
    print(f"{FAULTS[name].title}: {result} ({seconds} s)", flush=True)
    return {"fault": name, "title": FAULTS[name].title, "seconds": seconds} | vars(outcome)


def table(records: list[dict]) -> list[str]:
    """The lines of a markdown table."""
    rows = [HEAD, ["---"] * len(HEAD)]
    for r in records:
        tries = f"skipped: {r['skipped']}" if r["skipped"] else r["tries"]
        rows.append([r["title"], tries, len(r["losses"]), r["seconds"], r["checked"]])
    return ["| " + " | ".join(map(str, row)) + " |" for row in rows]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="chaos.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer of each")
    parser.add_argument("--only", metavar="FAULT,...", help="these faults (see --list)")
    parser.add_argument("--list", action="store_true", help="list the faults")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments, offsets and bits (default 0)")
    parser.add_argument("--out", type=Path, default=Path("results/chaos"), help="folder of the table (default results/chaos)")
    args = parser.parse_args(argv)
    if args.list:
        print("\n".join(f"{name:12} {fault.title}" for name, fault in FAULTS.items()))
        return 0
    names = args.only.split(",") if args.only else list(FAULTS)
    unknown = [name for name in names if name not in FAULTS]
    if unknown:
        print(f"error: --only: no fault is called {', '.join(unknown)}; they are {', '.join(FAULTS)}", file=sys.stderr)
        return 2

    started, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="chaos-"))
    scene = Scene(folder, QUICK if args.quick else FULL, args.seed)
    alone = [name for name in names if FAULTS[name].ranks == 1]
    with ThreadPoolExecutor(2) as pool:
        done = dict(zip(alone, pool.map(lambda name: happen(name, scene), alone)))
    done |= {name: happen(name, scene) for name in names if FAULTS[name].ranks > 1}
    scene.close()

    records, size = [done[name] for name in names], "quick" if args.quick else "full"
    lost = [f"{record['title']}: {loss}" for record in records for loss in record["losses"]]
    seconds = round(time.monotonic() - started)
    facts = {"size": size, "seed": args.seed, "seconds": seconds, "versions": versions(), "date": time.strftime("%Y-%m-%d")}
    lines = table(records)
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "chaos.json", {"schema_version": 1, **facts, "faults": records})
    with whole_file(args.out / "chaos.md") as file:
        head = ", ".join(f"{key} {value}" for key, value in (facts | facts["versions"]).items() if key != "versions")
        file.write("\n".join([head, "", *lines, "", EQUAL, *([""] + [f"- {loss}" for loss in lost] if lost else [])]) + "\n")
    print("\n".join(["", *lines, "", EQUAL, *lost, f"{len(lost)} losses in {seconds} s; {args.out / 'chaos.md'}"]), flush=True)
    if not lost:
        shutil.rmtree(folder)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
