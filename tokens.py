"""Rows of a data file -> tokens: read and checked, tokenised once through the `datasets` cache, held as flat arrays.

table = TokenTable(get_dataset("data/prosqa_train.json", tokenizer))
table.question[5], table.steps(5, skip=2), table.answer[5]
"""

import gc
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np

HOW_TO_MAKE = {
    "prosqa": "python data/prosqa.py --out {folder}",
    "quickstart": "bash scripts/quickstart.sh",
    "gsm": "bash scripts/get_gsm8k.sh --out {folder} (python data/gsm.py --raw FOLDER converts files that you have)",
    "arith_gsm": "python data/arithmetic.py --out {folder}",
    "prontoqa": "python data/prontoqa.py --generate --out {folder} (or --raw 5hop_0shot_random.json, the published generator's)",
    "ood": "python data/ood.py (--preset quickstart for the small ones)",
    "phase1": "python data/phase1.py --out {folder}",
    "cot": "python data/cot.py --output {folder}/cot.json --val_output {folder}/cot_val.json",
}

# ---------------------------------------------------------------- rows


def existing(path: str | Path) -> Path:
    """The path of a data file that is there. ValueError with the command that makes it where it is not."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"data file {path} is a folder; name a JSON file in it")
    if not path.is_file():
        hints = [how.format(folder=path.parent) for word, how in HOW_TO_MAKE.items() if word in str(path)]
        raise ValueError(f"data file {path} does not exist" + (f"; make it with: {hints[-1]}" if hints else ""))
    return path


@contextmanager
def no_garbage_collection():
    """For code that makes millions of small objects that all stay: looking for garbage among them takes as long again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def load_rows(path: str | Path, max_rows: int | None = None) -> list[dict]:
    """The rows of a data file, a JSON list of {"question": str, "answer": str, "steps": [str], ...}.

    Raises ValueError naming file, row and key: file missing (with the command that makes it), not JSON, empty, or a row
    with a missing key or a wrong type.
    """
    path = existing(path)
    try:
        rows = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"data file {path} is not JSON: {error}") from None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"data file {path} must hold a non-empty JSON list of rows")
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"data file {path}, row {i}: must be an object with question, answer and steps")
        for key, kind in {"question": str, "answer": str, "steps": list}.items():
            if key not in row:
                raise ValueError(f"data file {path}, row {i}: `{key}` is missing")
            if not isinstance(row[key], kind):
                raise ValueError(f"data file {path}, row {i}: `{key}` must be a {kind.__name__}, is {row[key]!r:.60}")
        if not all(isinstance(step, str) for step in row["steps"]):
            raise ValueError(f"data file {path}, row {i}: `steps` must be a list of strings")
        if type(row.get("level", 0)) is not int:
            raise ValueError(f"data file {path}, row {i}: `level` must be a whole number, is {row['level']!r:.60}")
    return rows[:max_rows]


def question_hash(row: dict) -> str:
    """Names a question across files and runs: 12 hex digits."""
    return hashlib.sha256(row["question"].encode()).hexdigest()[:12]


# ---------------------------------------------------------------- tokens


def get_dataset(path: str | Path, tokenizer, max_size: int | None = None):
    """Tokenise a file once, in pieces, through the `datasets` library's cache.

    Returns a `datasets.Dataset` with `question_tokenized` (with the tokenizer's own special tokens), `steps_tokenized`,
    `answer_tokenized` (ends with EOS), `merges` (whether encoding the whole text would merge tokens across pieces; looked at
    in the first thousand rows, which costs as much again), `level` (0 where a row has none) and `idx`.
    """
    from datasets import Dataset, Features, List, Value  # pandas and pyarrow: --help and errors need not wait for them
    from datasets.exceptions import DatasetGenerationError

    path = existing(path)
    identity = {
        "path": str(path),
        "content": hashlib.sha256(path.read_bytes()).hexdigest(),
        "vocabulary": hashlib.sha256(_tokenizer_text(tokenizer).encode()).hexdigest(),
        "max_size": max_size,
        "form": 2,
    }
    identity = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    tokens = List(Value("int64"))
    # Said, not guessed: the first rows of a file may have no steps.
    features = {name: tokens for name in ("question_tokenized", "answer_tokenized")}
    features |= {"steps_tokenized": List(tokens), "merges": Value("bool"), "level": Value("int64"), "idx": Value("int64")}
    try:
        return Dataset.from_generator(
            _tokenized_rows,
            features=Features(features),
            gen_kwargs={"path": str(path), "max_size": max_size, "tokenizer": tokenizer},
            fingerprint=identity,
        )
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None  # what `load_rows` found wrong


def _tokenizer_text(tokenizer) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))


def _tokenized_rows(path: str, max_size: int | None, tokenizer) -> Iterator[dict]:
    rows = load_rows(path, max_size)
    for start in range(0, len(rows), 1000):
        batch = rows[start : start + 1000]
        questions = _encode(tokenizer, [row["question"] + "\n" for row in batch], add_special_tokens=True)
        answers = _encode(tokenizer, ["### " + row["answer"] for row in batch])
        steps = iter(_encode(tokenizer, [step + "\n" for row in batch for step in row["steps"]]))
        texts = ["\n".join([row["question"], *row["steps"], "### " + row["answer"]]) for row in batch if start == 0]
        wholes = _encode(tokenizer, texts, add_special_tokens=True) if texts else [None] * len(batch)
        for i, (row, question, answer, whole) in enumerate(zip(batch, questions, answers, wholes)):
            row_steps = [next(steps) for _ in row["steps"]]
            yield {
                "question_tokenized": question,
                "steps_tokenized": row_steps,
                "answer_tokenized": [*answer, tokenizer.eos_token_id],
                "merges": whole is not None and [*question, *chain.from_iterable(row_steps), *answer] != whole,
                "level": row.get("level", 0),
                "idx": start + i,
            }


def _encode(tokenizer, texts: list[str], add_special_tokens: bool = False) -> list[list[int]]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"] if texts else []
    # The library's own batch call without offsets and masks: a third of the time to the first step.
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]


class TokenTable:
    """The columns of `get_dataset` as flat arrays: row i's pieces are slices, so a million rows cost no Python objects."""

    def __init__(self, dataset):
        columns = dataset.with_format("arrow")[:]
        self.question, self.answer = (_Ragged(columns[f"{name}_tokenized"]) for name in ("question", "answer"))
        steps = columns["steps_tokenized"].combine_chunks()
        self.step_start = _starts(steps)
        self.step = _Ragged(steps.flatten())
        self.merges, self.level = int(np.sum(columns["merges"].to_numpy())), columns["level"].to_numpy()

    def __len__(self) -> int:
        return len(self.question)

    def n_steps(self, i):
        """How many steps row i has; of an array of row numbers an array."""
        return self.step_start[i + 1] - self.step_start[i]

    def steps_span(self, i, skip) -> tuple:
        """Where the steps of row i from number `skip` on begin and end in `step.values`; also of arrays."""
        return self.step.start[self.step_start[i] + skip], self.step.start[self.step_start[i + 1]]

    def steps(self, i: int, skip: int) -> np.ndarray:
        """The tokens of row i's steps from number `skip` on, one after the other."""
        return self.step.values[slice(*self.steps_span(i, skip))]


class _Ragged:
    """Lists of tokens end to end; those of list i are values[start[i] : start[i + 1]]."""

    def __init__(self, column):
        column = column.combine_chunks() if hasattr(column, "combine_chunks") else column
        self.start, self.values = _starts(column), column.flatten().to_numpy()

    def __len__(self) -> int:
        return len(self.start) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.values[self.start[i] : self.start[i + 1]]

    def length(self, i):
        """How many tokens list i has; of an array of numbers an array."""
        return self.start[i + 1] - self.start[i]


def _starts(lists) -> np.ndarray:
    offsets = lists.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0]  # a slice of an Arrow array keeps the offsets of the whole
