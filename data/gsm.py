"""GSM8K-Aug: the text files of Internalized CoT (github.com/da03/Internalize_CoT_Step_by_Step) as JSON rows.

    bash scripts/get_gsm8k.sh                                        # downloads the three files and does all of this
    python data/gsm.py --raw data/gsm_test.txt                       # writes data/gsm_test.json
    python data/gsm.py --raw downloads --out data                    # all of downloads/{train,valid,test}.txt
    python data/gsm.py --raw part.txt --out part.json --drop-empty-steps

A line is `question||<<16-3-4=9>> <<9*2=18>> #### 18`. The question ends at the first `||`, the steps stand between it and
the next `##` (or `||`), split at single spaces, and the answer follows the last `##`. The bytes written are those of
preprocessing/gsm_icot.py of facebookresearch/coconut, with its quirks: a line without steps gives `[""]`, one empty step, and
so does every doubled space; commas and signs of answers stay. Text files stay too, unless --delete-raw is given.
"""

import argparse
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

if __package__:
    from . import prosqa_rows as pr
else:  # run as `python data/gsm.py`
    import prosqa_rows as pr

Row = dict
SPLITS = ("train", "valid", "test")
SHOWN = 10  # malformed lines that an error names
POINTER = b"version https://git-lfs"

# ---------------------------------------------------------------- lines to rows


def convert(lines: Iterable[str], drop_empty_steps: bool = False) -> list[Row]:
    """One row {"question", "steps", "answer"} a line. `drop_empty_steps` leaves out steps without a character.

    ValueError that names the malformed lines by number (the first ten) and what they lack.
    """
    rows, malformed = [], []
    for number, line in enumerate(lines, start=1):
        question, bars, rest = line.partition("||")
        if not bars or "##" not in rest:
            malformed.append(f"{number} ({'is blank' if not line.strip() else 'no ## after ||' if bars else 'no ||'})")
            continue
        steps = rest.partition("||")[0].partition("##")[0].strip().split(" ")
        steps = [step for step in steps if step or not drop_empty_steps]
        rows.append({"question": question, "steps": steps, "answer": rest.split("##")[-1].strip()})
    if malformed:
        more = f" and {len(malformed) - SHOWN} more" if len(malformed) > SHOWN else ""
        many = "lines" if len(malformed) > 1 else "line"
        raise ValueError(
            f"malformed {many} {', '.join(malformed[:SHOWN])}{more}; a line is question||<<expr=val>> ... #### answer"
        )
    return rows


def read_lines(path: Path) -> list[str]:
    """The lines of a text file; CRLF ends one as LF does. ValueError where it is a Git LFS pointer, not UTF-8, or empty."""
    content = path.read_bytes()
    if content.startswith(POINTER):
        raise ValueError(
            f"{path} is a Git LFS pointer of {len(content)} bytes, not the data; download the file itself from "
            "media.githubusercontent.com, as scripts/get_gsm8k.sh does"
        )
    try:
        lines = io.StringIO(content.decode(), newline=None).readlines()
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}: line {number} is not UTF-8 ({error.reason}); download the file again") from None
    if not lines:
        raise ValueError(f"{path} is empty; download the file again")
    return lines


def convert_file(path: Path, drop_empty_steps: bool = False) -> list[Row]:
    """The rows of a text file; ValueError that names it and its malformed lines."""
    try:
        return convert(read_lines(path), drop_empty_steps)
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def summary(rows: Sequence[Row]) -> str:
    """How many rows, how many of them have so many steps, and what is odd about some."""
    counts = Counter(sum(map(bool, row["steps"])) for row in rows)
    odd = {
        "with an empty step": sum("" in row["steps"] for row in rows),
        "with a comma in the answer": sum("," in row["answer"] for row in rows),
        "without an answer": sum(not row["answer"] for row in rows),
    }
    mix = " ".join(f"{n}:{count}" for n, count in sorted(counts.items()))
    return "; ".join([f"{len(rows)} rows", f"steps {mix}", *(f"{count} {what}" for what, count in odd.items() if count)])


# ---------------------------------------------------------------- files


def write_whole(texts: dict[Path, str]) -> None:
    """Write files under temporary names, then rename all of them: where one cannot be written, none is changed."""
    for path in texts:
        if path.is_dir():
            raise ValueError(f"{path} is a folder; name a file")
    partial = {path: path.with_name(f".tmp-{path.name}-{os.getpid()}") for path in texts}
    try:
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial[path].write_text(text, encoding="utf-8")
        for path in texts:
            os.replace(partial[path], path)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


def plan(raw: Path, out: Path | None) -> dict[Path, Path]:
    """{text file: JSON file} of `--raw` and `--out`. ValueError where they do not fit, or a file is missing."""
    if raw.is_dir():
        out = out or Path("data")
        if out.suffix == ".json":
            raise ValueError(f"--out {out}: --raw {raw} is a folder of three files, so name a folder")
        found = {split: [raw / name for name in (f"gsm_{split}.txt", f"{split}.txt")] for split in SPLITS}
        missing = [" or ".join(path.name for path in paths) for paths in found.values() if not any(map(Path.is_file, paths))]
        if missing:
            raise ValueError(f"--raw {raw}: no {', no '.join(missing)} in this folder")
        return {next(filter(Path.is_file, paths)): out / f"gsm_{split}.json" for split, paths in found.items()}
    if not raw.is_file():
        raise ValueError(f"--raw {raw} does not exist; bash scripts/get_gsm8k.sh downloads the three files")
    split = raw.stem.removeprefix("gsm_")
    if out is None and split not in SPLITS:
        raise ValueError(f"--raw {raw}: its name is not [gsm_]{{train,valid,test}}.txt; name the file to write with --out")
    out = Path("data") if out is None else out
    if out.is_dir() or out.suffix != ".json":
        if split not in SPLITS:
            raise ValueError(f"--out {out} must be a JSON file for {raw.name}")
        out = out / f"gsm_{split}.json"
    return {raw: out}


def main(argv: list[str] | None = None) -> None:
    parser = pr.Parser(__doc__)
    parser.add_argument("--raw", type=Path, required=True, metavar="FILE", help="text file, or a folder that has all three")
    parser.add_argument("--out", type=Path, help="JSON file, or folder to write to (default: data/gsm_{train,valid,test}.json)")
    parser.add_argument("--drop-empty-steps", action="store_true", help='leave out empty steps: [""] becomes [] (stock: keep)')
    parser.add_argument("--delete-raw", action="store_true", help="remove the text files once all rows are written")
    parser.add_argument(
        "--expect-rows", type=int, nargs="+", metavar="N", help="write nothing unless the files have so many rows, in order"
    )
    run(parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Convert every file before one is written."""
    files = plan(args.raw, args.out)
    converted = {raw: convert_file(raw, args.drop_empty_steps) for raw in files}
    if args.expect_rows:
        if len(args.expect_rows) != len(files):
            raise ValueError(f"--expect-rows: {len(args.expect_rows)} numbers for {len(files)} files; give one for each")
        for (raw, rows), expected in zip(converted.items(), args.expect_rows):
            if len(rows) != expected:
                raise ValueError(f"{raw} has {len(rows)} rows, {expected} are expected; remove it and download it again")
    write_whole({out: json.dumps(converted[raw]) for raw, out in files.items()})
    for raw, out in files.items():
        print(f"{out}: {summary(converted[raw])}")
        if args.delete_raw:
            raw.unlink()


if __name__ == "__main__":
    pr.run_cli(main)
