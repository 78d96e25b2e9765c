"""Files written whole (under a temporary name, then renamed, so that none is ever half there), and JSON read back checked."""

import errno
import json
import os
import shutil
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path


class NoRoom(ValueError):
    """A disk that is full or fails: nobody's mistake, and the same command goes on once there is room."""


@contextmanager
def whole_file(path: str | os.PathLike, mode: str = "w"):
    """Write a file under a temporary name in its folder and rename it into place, so that it is never half there.

    Raises ValueError with the free space where the disk refuses (`NoRoom` where it is full or fails).
    """
    path = Path(path)
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        kind = NoRoom if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO) else ValueError
        raise kind(
            f"cannot write {path} ({' '.join(str(error).split())[:120]}); {free / 1e9:.2f} GB free in its folder: "
            "make room and start the same command again; what was written before is intact"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def remove(path: str | os.PathLike) -> None:
    """Remove a file or a folder, if it is there; a folder under another name, so that half of it is never taken for it."""
    path = Path(path)
    if path.is_dir():
        doomed = path.with_name(f".tmp-removed-{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a file's content, whole."""
    with whole_file(path, "w" if isinstance(content, str) else "wb") as file:
        file.write(content)


def write_json(path: str | os.PathLike, value, allow_nan: bool = True) -> None:
    """Write indented JSON, whole. ValueError for a number that is not finite, unless `allow_nan`."""
    with whole_file(path) as file:
        json.dump(value, file, indent=1, allow_nan=allow_nan)
        file.write("\n")


def write_jsonl(path: str | os.PathLike, records: Iterable[dict]) -> None:
    """Write records as lines of JSON, whole."""
    with whole_file(path) as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def read_json(path: str | os.PathLike, *keys: str):
    """The value of a JSON file; with `keys` an object that has them. ValueError that names the file where it is damaged."""
    try:
        return _holding(json.loads(Path(path).read_text()), keys)
    except ValueError as error:  # also what is no UTF-8
        raise ValueError(f"{path} is damaged ({error}); restore it from a copy or delete it") from None


def read_jsonl(path: str | os.PathLike, *keys: str) -> list[dict]:
    """The records of a JSON-lines file; a last line torn by a killed process is left out. No file: no records.

    ValueError that names file and line where one is damaged, or is no object that has `keys`.
    """
    path = Path(path)
    lines = path.read_text(errors="replace").split("\n") if path.is_file() else []
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            records += [_holding(json.loads(line), keys)] if line else []
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, is damaged ({error}); delete that line") from None
    return records


def _holding(value, keys: tuple[str, ...]):
    if keys and not (isinstance(value, dict) and {*keys} <= value.keys()):
        raise ValueError(f"not an object with {', '.join(keys)}")
    return value
