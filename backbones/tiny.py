"""The tiny GPT-2 backbones for ProsQA that live in this folder: a config and a tokenizer each, no weights (`from_scratch: True`).

- `backbones/prosqa_words`: one token a word and a stop, 2 layers x 128.
- `backbones/prosqa_clauses`: one token a clause, 3 layers x 64. A fact is two tokens, `Every gerpus` and ` is a terpus.`, so
  the object stands right behind its subject and following an edge is one induction step; the quickstart learns the task
  in a tenth of the tokens that words need. Text and scoring stay those of ProsQA: decoding gives the sentence back.

    python -m backbones.tiny        # writes both folders again
"""

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import GPT2Config, PreTrainedTokenizerFast

from data.prosqa_graph import NAMES, SPECIES

HERE = Path(__file__).parent
SPECIAL = ["<|endoftext|>", "<<", ">>"]


def word_tokenizer() -> Tokenizer:
    """Words, stops and newlines; decoding joins words with spaces."""
    words = [*SPECIAL, "\n", ".", "?", "###", "Every", "Is", "is", "a", "or", *NAMES, *SPECIES]
    tokenizer = _word_level(words, r"\w+|\n|[.?]|###|<<|>>", behavior="removed", invert=True)
    tidy = {" .": ".", " ?": "?", " \n": "\n", "\n ": "\n"}
    tokenizer.decoder = decoders.Sequence(
        [decoders.WordPiece(prefix="@@", cleanup=False), decoders.Fuse(), *(decoders.Replace(a, b) for a, b in tidy.items())]
    )
    return tokenizer


def clause_tokenizer() -> Tokenizer:
    """Subjects (`Tom`, `Every gerpus`), objects (` is a terpus.`) and options (` a lempus`, ` or scrompus?`)."""
    clauses = [form.format(s) for s in SPECIES for form in ("Every {}", " is a {}.", " a {}", " or {}?")]
    tokenizer = _word_level(
        [*SPECIAL, "\n", "Is ", "### ", *NAMES, *clauses], r"Every \w+| is a \w+\.| a \w+| or \w+\?|\n|Is |### |<<|>>|\w+", "isolated"
    )
    # The space between sentences is no token: dropped on the way in, put back on the way out.
    tokenizer.normalizer = normalizers.Replace(". ", ".")
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex(r"\.(?=\w)"), ". ")])
    return tokenizer


def _word_level(words: list[str], pattern: str, behavior: str, invert: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior, invert)
    return tokenizer


def write(folder: Path, tokenizer: Tokenizer, **shape) -> None:
    """Save a tokenizer and a GPT-2 config of its size, without dropout."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[0],
        unk_token=SPECIAL[0],
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    GPT2Config(vocab_size=len(wrapped), **shape, **no_dropout, **ends).save_pretrained(folder)


if __name__ == "__main__":
    write(HERE / "prosqa_words", word_tokenizer(), n_layer=2, n_embd=128, n_head=4, n_positions=1024)
    write(HERE / "prosqa_clauses", clause_tokenizer(), n_layer=3, n_embd=64, n_head=4, n_positions=256, initializer_range=0.08)
