"""Whom the noise experiments ask, and what: a trained checkpoint with its thoughts, or an untrained model with virtual ones.

    asker = trained("runs/prosqa/prosqa-coconut", benchmark="prosqa", num_questions=500)
    asker = untrained("Qwen/Qwen2.5-0.5B-Instruct", benchmark="gsm8k", virtual_latents=8, num_questions=50)
    tokens = asker.tokens("thoughts")          # or "no_latents", "plain"; a list of int64 arrays
    asker.read("so it is 1,234.")              # the one extractor of answers for this asker

A checkpoint's answers are read as in training (the text behind the last `#`). Answers of untrained models are read by benchmark:
the last number, True or False, option, or letter.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import backbones
from analysis.experiment import TEST_FILES
from analysis.subject import Problems, Subject
from coconut import Coconut
from dataset import clean_answer, extract_answer
from tokens import existing, load_rows, question_hash

FORMS = ("thoughts", "no_latents", "plain")
FILES = {"gsm8k": "data/gsm_test.json", "prontoqa": "data/prontoqa_test.json", "prosqa": "data/prosqa_test.json"}
HUB = {"gsm-symbolic": ("apple/GSM-Symbolic", "main"), "mmlu": ("cais/mmlu", "all")}  # untrained models only
CHAT_TOKENS = 512
MOST_ROWS = {"cpu": 400}  # at a time, questions x scales; elsewhere:
MOST_ROWS_ELSEWHERE = 2048
CPU_CACHE = 2e9  # bytes for keys and values of all rows; elsewhere a third of what is free
NUMBER = re.compile(r"(?:(?<![\w)])-\$?)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
INSTRUCTION = {
    "gsm8k": "End with the answer as a number.",
    "gsm-symbolic": "End with the answer as a number.",
    "prontoqa": "End with True or False.",
    "prosqa": "End with the answer as one sentence.",
    "mmlu": "End with the letter of the answer.",
}


# ---------------------------------------------------------------- questions


@dataclass(frozen=True)
class Question:
    """`id` names a question by its text, so that noise on it does not depend on files or order; `answer` is the gold."""

    id: str
    text: str
    answer: str
    row: dict


def questions_of(rows: Sequence[dict]) -> list[Question]:
    """Rows of a data file as questions; a text that stands there again gets a number behind its id."""
    seen: Counter[str] = Counter()
    questions = []
    for row in rows:
        name = question_hash(row)
        seen[name] += 1
        name += f"-{seen[name]}" if seen[name] > 1 else ""
        questions.append(Question(name, row["question"], clean_answer(row["answer"]), row))
    return questions


def chosen(n_rows: int, num_questions: int | None, question_seed: int | None = None) -> list[int]:
    """The first rows of a file, or with a seed a random sample of them in the file's order."""
    n = n_rows if num_questions is None else min(num_questions, n_rows)
    if question_seed is None:
        return list(range(n))
    return sorted(np.random.default_rng(question_seed).choice(n_rows, n, replace=False).tolist())


def hub_rows(benchmark: str, max_rows: int | None = None) -> list[dict]:
    """Rows of a benchmark that the `datasets` library has cached. ValueError with the command that caches it."""
    from datasets import DownloadConfig, load_dataset  # pandas and pyarrow: others need not wait for them

    path, name = HUB[benchmark]
    try:
        table = load_dataset(path, name, split="test", download_config=DownloadConfig(local_files_only=True))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        command = f"python -c \"import datasets; datasets.load_dataset('{path}', '{name}')\""
        raise ValueError(
            f"benchmark {benchmark}: {path} is not in the datasets cache ({reason}); run once: {command}"
        ) from None
    rows = table.select(range(min(len(table), max_rows or len(table))))
    return [_mmlu_row(row) if benchmark == "mmlu" else _symbolic_row(row) for row in rows]


def _symbolic_row(row: dict) -> dict:
    return {"question": row["question"], "answer": row["answer"].rsplit("####", 1)[-1].strip(), "steps": []}


def _mmlu_row(row: dict) -> dict:
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"]))
    return {"question": f"{row['question']}\n{options}", "answer": "ABCD"[row["answer"]], "steps": []}


# ---------------------------------------------------------------- answers of untrained models


def last_number(text: str) -> str | None:
    """The last number of a text: negative, with decimals or commas (which are taken out); None where there is none."""
    found = NUMBER.findall(text)
    return found[-1].replace(",", "").replace("$", "") if found else None


def last_word(text: str, words: Sequence[str]) -> str | None:
    """Which of some words stands last in a text, whatever its case."""
    found = re.findall(rf"\b({'|'.join(map(re.escape, words))})\b", text, flags=re.IGNORECASE)
    return next((word for word in words if found and word.lower() == found[-1].lower()), None)


def read_untrained(benchmark: str, text: str, row: dict) -> str | None:
    """The answer in what an untrained model said, in the form of the benchmark's gold answers."""
    if benchmark == "prontoqa":
        return last_word(text, ("True", "False"))
    if benchmark == "mmlu":
        found = re.findall(r"\b([A-D])\b", text)
        return found[-1] if found else None
    if benchmark == "prosqa":
        names = row["idx_to_symbol"]
        name = last_word(text, [names[row[key]] for key in ("target", "neg_target")])
        return None if name is None else f"{names[row['root']]} is a {name}."
    return last_number(text)


def same_answer(prediction: str | None, gold: str, numbers: bool = False) -> bool:
    """Whether an answer is right: equal text, for `numbers` equal values."""
    if prediction is None or not numbers:
        return prediction == gold
    try:
        return float(prediction) == float(gold)
    except ValueError:
        return prediction == gold


# ---------------------------------------------------------------- virtual latents


def with_virtual_latents(row: dict[str, Sequence[int]], ids: backbones.ThoughtIds, n: int) -> dict[str, list[int]]:
    """A row with n latents between its adjacent start and end markers: mask 1, label -100, later positions + n.

    `row`: input_ids and any of attention_mask, labels, position_ids. A row with latents of its own, or without adjacent
    markers, stays as it is.
    """
    row = {key: list(values) for key, values in row.items()}
    tokens = row["input_ids"]
    at = next((i + 1 for i, pair in enumerate(zip(tokens, tokens[1:])) if pair == (ids.start, ids.end)), None)
    if at is None or ids.latent in tokens:
        return row
    fill = {"input_ids": [ids.latent] * n, "attention_mask": [1] * n, "labels": [-100] * n}
    if "position_ids" in row:
        first = row["position_ids"][at - 1] + 1
        fill["position_ids"] = list(range(first, first + n))
        row["position_ids"][at:] = [position + n for position in row["position_ids"][at:]]
    return {key: values[:at] + fill[key] + values[at:] for key, values in row.items()}


# ---------------------------------------------------------------- askers


def rows_at_a_time(model: Coconut, n_columns: int) -> int:
    """How many rows of so many columns to answer together, by what their keys and values take."""
    config, weight = model.base_causallm.config, model.embedding.weight
    a_row = 2 * config.num_hidden_layers * weight.shape[1] * weight.element_size() * n_columns
    on_cpu = weight.device.type != "cuda"
    room = CPU_CACHE if on_cpu else torch.cuda.mem_get_info(weight.device)[0] / 3
    return max(1, min(int(room / a_row), MOST_ROWS.get(weight.device.type, MOST_ROWS_ELSEWHERE)))


@dataclass
class Asker:
    """A model, the questions it gets, and how its answers are read. `prompts(form)` gives the tokens of all questions.

    `batch_size`: rows at a time (default: by memory).
    """

    model: Coconut
    tokenizer: object
    questions: list[Question]
    prompts: Callable[[str], list[np.ndarray]]
    read_row: Callable[[str, dict], str | None]
    benchmark: str
    numbers: bool
    n_latents: int
    max_new_tokens: int
    name: str
    checkpoint: str | None = None
    batch_size: int | None = None

    def __post_init__(self):
        if self.batch_size is None:
            longest = max(map(len, self.tokens()))
            self.batch_size = rows_at_a_time(self.model, longest + self.max_new_tokens)

    def tokens(self, form: str = "thoughts") -> list[np.ndarray]:
        """Token rows of all questions: with thoughts, with markers around none, or without both."""
        assert form in FORMS, form
        return self.prompts(form)

    def read(self, text: str, question: Question) -> str | None:
        """The answer in a generated text."""
        return self.read_row(text, question.row)

    def right(self, prediction: str | None, question: Question) -> bool:
        return same_answer(prediction, question.answer, self.numbers)


def trained(
    path: str | Path,
    benchmark: str | None = None,
    data: str | Path | None = None,
    num_questions: int | None = 50,
    question_seed: int | None = None,
    epoch: str = "final",
    device: str = "auto",
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
    dtype: str | None = None,
) -> Asker:
    """A checkpoint file or run folder. Questions: `data`, the benchmark's file, or the test file beside its validation file.

    Raises ValueError where something is missing, or the checkpoint has no thoughts.
    """
    subject = Subject.load(path, epoch, batch_size, device)
    if benchmark in HUB:
        raise ValueError(f"benchmark {benchmark} is for untrained models (--model); checkpoints: {', '.join(FILES)}")
    if not subject.n_thoughts:
        raise ValueError(f"{path} has no thoughts that noise could meet; name a checkpoint with latents")
    beside = [p for name in TEST_FILES if (p := Path(subject.config.val_path).parent / name).is_file()]
    file = data or (FILES[_known(benchmark)] if benchmark else beside[0] if beside else subject.config.val_path)
    problems = Problems.read(existing(file), subject.tokenizer)
    numbers = chosen(len(problems), num_questions, question_seed)
    default = 64 if "gsm" in str(file) else 128
    if dtype is not None:
        subject.model.to(getattr(torch, dtype))

    def prompts(form: str) -> list[np.ndarray]:
        latents, markers = (subject.n_thoughts, True) if form == "thoughts" else (0, form == "no_latents")
        return subject.prompts(problems, numbers, latents, markers).tokens

    return Asker(
        subject.model,
        subject.tokenizer,
        [questions_of(problems.rows)[i] for i in numbers],
        prompts,
        lambda text, row: extract_answer(text),
        benchmark or Path(file).stem,
        False,
        subject.n_thoughts,
        max_new_tokens or subject.config.max_new_tokens or default,
        subject.config.model_id,
        str(subject.path),
        batch_size,
    )


def untrained(
    name: str,
    benchmark: str | None = None,
    data: str | Path | None = None,
    num_questions: int | None = 50,
    question_seed: int | None = None,
    virtual_latents: int = 8,
    device: str = "auto",
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
    dtype: str | None = None,
) -> Asker:
    """A chat or base model (hub id or folder) as it is, with thought tokens added where it has none.

    A chat template is used where the tokenizer has one. Raises ValueError where model or benchmark can't be had.
    """
    benchmark = benchmark or "gsm8k"
    if virtual_latents < 1:
        raise ValueError(f"virtual_latents {virtual_latents}: at least one slot")
    rows = hub_rows(benchmark) if benchmark in HUB and data is None else load_rows(data or FILES[_known(benchmark)])
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    tokenizer = backbones.load_tokenizer(name)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model {name}: its tokenizer has no EOS token, which ends an answer")
    known = set(backbones.THOUGHT_TOKENS) <= tokenizer.get_vocab().keys()
    ids, base = backbones.add_thought_tokens(tokenizer), backbones.load_backbone(name)
    if not known or base.get_input_embeddings().weight.shape[0] < len(tokenizer):
        backbones.grow_vocabulary(base, tokenizer, ids)
    model = Coconut(base, ids.latent, ids.start, ids.end, tokenizer.eos_token_id)
    model = model.to(device, getattr(torch, dtype) if dtype else None).eval().requires_grad_(False)
    questions = [questions_of(rows)[i] for i in chosen(len(rows), num_questions, question_seed)]

    def prompts(form: str) -> list[np.ndarray]:
        markers = "" if form == "plain" else "".join(backbones.THOUGHT_TOKENS[:2])
        n = virtual_latents if form == "thoughts" else 0
        texts = [f"{question.text}\n{INSTRUCTION.get(benchmark, '')}\n{markers}" for question in questions]
        rows = ({"input_ids": _encoded(tokenizer, text)} for text in texts)
        return [np.array(with_virtual_latents(row, ids, n)["input_ids"], dtype=np.int64) for row in rows]

    return Asker(
        model,
        tokenizer,
        questions,
        prompts,
        lambda text, row: read_untrained(benchmark, text, row),
        benchmark,
        benchmark in ("gsm8k", "gsm-symbolic"),
        virtual_latents,
        max_new_tokens or CHAT_TOKENS,
        name,
        batch_size=batch_size,
    )


def _encoded(tokenizer, text: str) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        return tokenizer.encode(text)
    chat = [{"role": "user", "content": text}]
    return tokenizer.encode(
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True), add_special_tokens=False
    )


def _known(benchmark: str) -> str:
    if benchmark not in FILES:
        raise ValueError(f"Unknown benchmark {benchmark!r}; known: {', '.join([*FILES, *HUB])}")
    return benchmark
