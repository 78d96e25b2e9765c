"""A tokenizer of single characters, 100 ids: 5 special tokens and the 95 printable ASCII characters, for data/cot.py.

    tokenizer = COCONUTTokenizer()
    tokenizer.decode(tokenizer.encode("7 + 8 = 15.")) == "7 + 8 = 15."      # the exact inverse; other characters raise
    tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bot_token_id, tokenizer.thought_token_id, tokenizer.eot_token_id
    # 0, 1, 2, 3, 4

bot, thought and eot are the project's three thought tokens by name, so that `add_thought_tokens` adds none. The same
tokenizer lies in the folder `backbones/characters`, with the config of a small GPT-2, for `model_id: backbones/characters`
and `from_scratch: True`. There the line ends that dataset.py puts between the pieces of a row become spaces.

    python -m backbones.characters        # writes the folder again
"""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import GPT2Config, PreTrainedTokenizerFast

HERE = Path(__file__).parent
PAD, EOS = "<|pad|>", "<|endoftext|>"
BOT, THOUGHT, EOT = "<|start-latent|>", "<|latent|>", "<|end-latent|>"
SPECIAL = (PAD, EOS, BOT, THOUGHT, EOT)
PRINTABLE = "".join(map(chr, range(32, 127)))
NAMES = {"pad_token": PAD, "eos_token": EOS, "clean_up_tokenization_spaces": False}


def character_tokenizer() -> Tokenizer:
    """One token a character; an Exception on one that is not printable ASCII, but for line ends, which become spaces."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate((*SPECIAL, *PRINTABLE))}))
    tokenizer.normalizer = normalizers.Replace("\n", " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    # As the project adds them elsewhere: found in text, but no special tokens, so that decoding shows them.
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in (BOT, THOUGHT, EOT)])
    return tokenizer


class COCONUTTokenizer(PreTrainedTokenizerFast):
    """The character tokenizer as an object, strict: ValueError on any character that `decode` could not give back."""

    def __init__(self, **kwargs):
        super().__init__(**({"tokenizer_object": character_tokenizer()} | NAMES | kwargs))
        self.bot_token_id, self.thought_token_id, self.eot_token_id = self.convert_tokens_to_ids([BOT, THOUGHT, EOT])

    def _encode_plus(self, text, text_pair=None, **kwargs):
        refuse_unknown(text)
        refuse_unknown(text_pair)
        return super()._encode_plus(text, text_pair, **kwargs)

    def tokenize(self, text, pair=None, **kwargs) -> list[str]:
        """The characters and special tokens of a text."""
        refuse_unknown(text)
        return super().tokenize(text, pair, **kwargs)

    def save_pretrained(self, save_directory, **kwargs):
        """Write what `AutoTokenizer` reads: the folder's form of this tokenizer, with what was added to it."""
        return saved_form(self.backend_tokenizer).save_pretrained(save_directory, **kwargs)


def refuse_unknown(text) -> None:
    """ValueError that names the first character of a text, or of texts in lists, that is not printable ASCII."""
    if isinstance(text, str):
        unknown = next((character for character in text if character not in PRINTABLE), None)
        if unknown is not None:
            where = f"{unknown!r} at character {text.index(unknown)} of {text!r:.80}"
            raise ValueError(f"{where}: only the 95 printable ASCII characters can be encoded")
    elif text is not None:
        for part in text:
            refuse_unknown(part)


def saved_form(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A plain fast tokenizer, which needs no code of this project to be loaded."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **NAMES)


def write(folder: Path) -> None:
    """Save the tokenizer and the config of a GPT-2 of 4 layers x 128 and 640 positions, without dropout."""
    saved_form(character_tokenizer()).save_pretrained(folder)
    GPT2Config(
        vocab_size=len(SPECIAL) + len(PRINTABLE),
        n_layer=4,
        n_embd=128,
        n_head=4,
        n_positions=640,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=SPECIAL.index(EOS),
        eos_token_id=SPECIAL.index(EOS),
    ).save_pretrained(folder)


if __name__ == "__main__":
    write(HERE / "characters")
