"""The tiny GPT-2 backbones for ProsQA that live in this folder: a config and a tokenizer each, no weights (`from_scratch: True`).

- `backbones/prosqa_words`: every word and stop is a token, 2 layers x 128.
- `backbones/prosqa_tiny`: the words that carry the facts are tokens, `Every`, `is a` and `a` are implied, 3 layers x 128. A
  fact is three tokens (`gerpus terpus .`) with the object right behind its subject, so following an edge is one
  induction step, and the quickstart learns the task in a third of the samples that all words need. Text and scoring
  stay those of ProsQA: decoding puts the implied words back.

    python -m backbones.tiny        # writes both folders again
"""

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import GPT2Config, PreTrainedTokenizerFast

from data.prosqa_graph import NAMES, SPECIES

HERE = Path(__file__).parent
SPECIAL = ["<|endoftext|>", "<<", ">>"]
# One word a token, joined by spaces, but for stops and line ends.
SPACING = [(" .", "."), (" ?", "?"), (" \n", "\n"), ("\n ", "\n")]
# What `prosqa_tiny` leaves out on the way in, and how it is put back, in this order.
IMPLIED = [("Every ", ""), (" is a ", " "), (Regex(r" a (?=[a-z]+ or )"), " ")]
RESTORED = [
    (Regex(r"(?<=\w) (?=\w+\.)"), " is a "),
    (Regex(r" (?=[a-z]+ or )"), " a "),
    (Regex(r"\b(?=[a-z]+ is a )"), "Every "),
]


def word_tokenizer(function_words: bool = True) -> Tokenizer:
    """One token a word, stop or line end; without `function_words` those of `IMPLIED` are left out and restored."""
    words = [
        *SPECIAL,
        "\n",
        ".",
        "?",
        "###",
        "Is",
        "or",
        *(("Every", "is", "a") if function_words else ()),
        *NAMES,
        *SPECIES,
    ]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[.?\n]|###|<<|>>"), "removed", invert=True)
    replaced = [*SPACING, *([] if function_words else RESTORED)]
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="@@", cleanup=False),
            decoders.Fuse(),
            *(decoders.Replace(a, b) for a, b in replaced),
        ]
    )
    if not function_words:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(a, b) for a, b in IMPLIED])
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
    tiny = {
        "n_layer": 3,
        "n_embd": 128,
        "n_head": 4,
        "n_positions": 256,
        "initializer_range": 0.05,
        "activation_function": "gelu_pytorch_tanh",
    }
    write(HERE / "prosqa_tiny", word_tokenizer(function_words=False), **tiny)
