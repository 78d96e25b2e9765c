"""Two rows written out, the words tokenizer, and what tests of tokens and of curricula make of them."""

import json
from itertools import pairwise

from conftest import ROOT

from backbones import add_thought_tokens, load_tokenizer
from tokens import TokenTable, get_dataset

THREE = {
    "question": "Every terpus is a brimpus. Every brimpus is a lempus. Tom is a terpus. Is Tom a lempus or scrompus?",
    "steps": ["Tom is a terpus.", "Every terpus is a brimpus.", "Every brimpus is a lempus."],
    "answer": "Tom is a lempus.",
}
SIX = {
    "question": "Rex is a vumpus. Is Rex a chorpus or kerpus?",
    "steps": [f"Every {a} is a {b}." for a, b in pairwise("vumpus storpus gorpus jelpus hilpus yumpus kerpus".split())],
    "answer": "Rex is a kerpus.",
}


QUESTION = "Every terpus is a brimpus . Every brimpus is a lempus . Tom is a terpus . Is Tom a lempus or scrompus ? \n"
T1, T2, T3 = "Tom is a terpus . \n", "Every terpus is a brimpus . \n", "Every brimpus is a lempus . \n"
ANSWER = "### Tom is a lempus . <|endoftext|>"
GOOD = {"question": "q", "answer": "a", "steps": ["s"]}


def words_tokenizer():
    """(tokenizer with one token a word, ids of the three added tokens)"""
    tokenizer = load_tokenizer(str(ROOT / "backbones" / "prosqa_words"))
    return tokenizer, add_thought_tokens(tokenizer)


def write(folder, rows, name="rows.json"):
    (folder / name).write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return folder / name


def table_of(tmp_path, rows, tokenizer) -> TokenTable:
    return TokenTable(get_dataset(write(tmp_path, rows), tokenizer))


def spelled(words, text: str) -> list[int]:
    """Token ids of a text whose tokens stand between spaces; S, T and E are the start, thought and end tokens."""
    tokenizer, ids = words
    added = {"S": ids.start, "T": ids.latent, "E": ids.end}
    return [added[w] if w in added else tokenizer.get_vocab()[w] for w in text.split(" ") if w]
