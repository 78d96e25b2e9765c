"""The GPU benchmark, in pieces: what is done is not done again, and a call ends before it exceeds its time.

    bash scripts/bench_gpu.sh                            as many pieces as fit into 540 s; call it again until all are done
    bash scripts/bench_gpu.sh --list                     the pieces, and which are done
    bash scripts/bench_gpu.sh --only steps-bf16          one piece (may be given several times)
    bash scripts/bench_gpu.sh --full --seconds 3000      also the whole 50-epoch runs of M3 and M5, with random first weights
    bash scripts/bench_gpu.sh --tiny --out results/tiny  everything once on a tiny model, on a CPU: does it run

A piece writes <out>/<piece>.json when it is done, and gpu.json and gpu.md gather what there is. A piece that the time does not
suffice for is not begun; a whole run is ended by its time and goes on in the next call (checkpoints stay in --work). On a
machine without network give PYTHON=python3, and --data and --gpt2-tokenizer where the folder beside the repository is
absent; without them rows are generated and words are tokens, which the report says.
Exit code: 0 all done, 3 pieces are left, 1 a piece failed, 2 a mistake in the command.
"""

import argparse
import json
import signal
import sys
import time
from pathlib import Path

import torch

from files import write_json

from . import table
from .gpu_pieces import Piece, Session, pieces, tidy
from .material import ROOT
from .timing import Budget, TimeIsUp, about

DONE, FAILED, MISTAKE, LEFT = 0, 1, 2, 3
TINY_SECONDS = 20  # of any tiny piece
GRACE = 10  # seconds in which a run of run.py may be ended before the piece is


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench_gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shared = ROOT.parent / "shared/data"
    parser.add_argument("--seconds", type=float, default=540, help="time for this call (default: 540)")
    parser.add_argument("--out", type=Path, default=ROOT / "results/gpu", help="folder of the JSON (default: results/gpu)")
    parser.add_argument(
        "--work", type=Path, help="folder of data, caches and checkpoints, 30 GB a whole run (default: <out>/work)"
    )
    parser.add_argument("--data", type=Path, default=shared / "prosqa_valid.json", help="the official validation rows")
    parser.add_argument("--gpt2-tokenizer", type=Path, default=shared / "gpt2_tokenizer", help="folder of GPT-2's tokenizer")
    parser.add_argument("--only", action="append", metavar="PIECE", help="this piece; may be repeated")
    parser.add_argument("--full", action="store_true", help="also train M3 and M5 for all their epochs")
    parser.add_argument("--list", action="store_true", help="list the pieces and end")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU, to see that all of it runs")
    args = parser.parse_args(argv)
    command = "bash scripts/bench_gpu.sh " + " ".join(sys.argv[1:] if argv is None else argv)
    try:
        wanted = chosen(pieces(args.full), args.only)
        if args.list:
            print_list(wanted, args.out)
            return DONE
        if not (args.tiny or torch.cuda.is_available()):
            raise ValueError("no CUDA device is there; --tiny runs everything on the CPU")
        return measure_all(args, wanted, command)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE


def chosen(known: list[Piece], only: list[str] | None) -> list[Piece]:
    """The pieces named, or all. ValueError for a name that is none."""
    names = [piece.name for piece in known]
    for name in only or ():
        if name not in names:
            raise ValueError(f"--only: {name} is no piece; there are {', '.join(names)} (whole runs need --full)")
    return [piece for piece in known if not only or piece.name in only]


def print_list(wanted: list[Piece], out: Path) -> None:
    for piece in wanted:
        state = "done" if done(out, piece) else f"{piece.seconds:.0f} s"
        print(f"{piece.name:<22}{state:>8}  {piece.what}")


# ---------------------------------------------------------------- measuring


def measure_all(args: argparse.Namespace, wanted: list[Piece], command: str) -> int:
    """Measure what is not done yet while the time lasts."""
    where = "tiny" if args.tiny else "gpu"
    for piece in wanted:
        read_piece(args.out, piece.name, where)  # raises before anything is computed
    args.out.mkdir(parents=True, exist_ok=True)
    budget = Budget(args.seconds)
    device = torch.device("cpu" if args.tiny else "cuda")
    session = Session(args.data, args.gpt2_tokenizer, args.work or args.out / "work", args.tiny, device, budget)
    failed = False
    for piece in wanted:
        needed = TINY_SECONDS if args.tiny else piece.seconds
        if done(args.out, piece):
            print(f"{piece.name}: done before", flush=True)
        elif budget.left < needed:
            print(f"{piece.name}: may take {needed:.0f} s, and {max(budget.left, 0):.0f} s are left", flush=True)
            break
        else:
            begun = time.monotonic()
            try:
                results = measured(piece, session)
            except (
                RuntimeError,
                ValueError,
                OSError,
                ImportError,
            ) as error:  # out of memory, say; the others are still measured
                failed, reason = True, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                print(f"error: {piece.name}: {reason}", file=sys.stderr, flush=True)
                continue
            if results is None:
                print(f"{piece.name}: the time is up" + ", it goes on in the next call" * piece.by_parts, flush=True)
                break
            took, described = time.monotonic() - begun, about(command, device, **session.about)
            head = {"schema_version": 1, "where": where, "piece": piece.name, "seconds": took, "about": described}
            write_json(args.out / f"{piece.name}.json", head | {"results": results})
            print(f"{piece.name}: {took:.0f} s", *table.as_table(results, where), sep="\n", flush=True)
    gather(args.out, where)
    left = [piece.name for piece in wanted if not done(args.out, piece)]
    if left:
        print(f"Left: {', '.join(left)}. Go on with the same command (with more --seconds for a piece that never fits).")
    return FAILED if failed else LEFT if left else DONE


def measured(piece: Piece, session: Session) -> list[dict] | None:
    """The results of a piece; None where the time ended it. Nothing of it remains in memory."""
    try:
        with session.budget.enforced(grace=GRACE):
            return piece.measure(session)
    except TimeIsUp:
        return None
    finally:
        tidy(session)


def done(out: Path, piece: Piece) -> bool:
    return (out / f"{piece.name}.json").is_file()


def read_piece(out: Path, name: str, where: str) -> dict | None:
    """What a piece wrote; None where it is not done. ValueError where it is of a run of another kind."""
    path = out / f"{name}.json"
    if not path.is_file():
        return None
    written = json.loads(path.read_text())
    if written["where"] != where:
        raise ValueError(f"{path} is of a {written['where']} run; give another --out")
    return written


def gather(out: Path, where: str) -> None:
    """gpu.json and gpu.md of all pieces that are done."""
    done = [written for piece in pieces(whole=True) if (written := read_piece(out, piece.name, where))]
    if done:
        results = [one for written in done for one in written["results"]]
        table.write(out, "gpu", done[-1]["about"], results, where)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that run.py is ended, too
    sys.exit(main())
