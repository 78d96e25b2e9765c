"""The character tokenizer: 100 ids, exact both ways, nothing unknown let through, and a run trained with its folder."""

import json

import pytest
import torch
from conftest import ROOT

from backbones import THOUGHT_TOKENS, add_thought_tokens, load_backbone, load_tokenizer
from backbones.characters import PRINTABLE, SPECIAL, COCONUTTokenizer, write
from run import main
from tokens import TokenTable, get_dataset

FOLDER = str(ROOT / "backbones/characters")


@pytest.fixture(scope="module")
def tokenizer():
    return COCONUTTokenizer()


def test_100_ids_in_the_order_of_the_format(tokenizer):
    assert len(tokenizer) == tokenizer.vocab_size == 100
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bot_token_id)
    assert (*ids, tokenizer.thought_token_id, tokenizer.eot_token_id) == (0, 1, 2, 3, 4)
    assert tokenizer.encode(" !~") == [5, 6, 99] and tokenizer.unk_token is None
    assert tokenizer.convert_ids_to_tokens(list(range(100))) == [*SPECIAL, *PRINTABLE]


@pytest.mark.parametrize(
    "text", [PRINTABLE, "", " ", "  two  spaces , and stops .  ", "don't n't 's", "<<3 * 4 = 12>> <| |> <|", "<|pad|>x"]
)
def test_decode_is_the_exact_inverse(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    folder = load_tokenizer(FOLDER)
    assert folder.encode(text) == tokenizer.encode(text) and folder.decode(folder.encode(text)) == text


def test_one_id_a_character_and_one_a_special_token(tokenizer):
    assert len(tokenizer.encode("a  b")) == 4
    assert tokenizer.encode("a<|start-latent|><|latent|><|latent|><|end-latent|>b")[1:-1] == [2, 3, 3, 4]
    assert tokenizer.decode([2, 3, 4, 1, 0], skip_special_tokens=True) == "".join(SPECIAL[2:]), "as the project's own tokens"
    assert tokenizer(["ab", "c"], padding=True)["input_ids"] == [tokenizer.encode("ab"), [*tokenizer.encode("c"), 0]]


@pytest.mark.parametrize("bad", ["3 × 4", "tab\t", "line\n", "é", "\x7f"])
def test_an_unknown_character_raises(tokenizer, bad):
    unknown = next(c for c in bad if c not in PRINTABLE)
    message = f"^{unknown!r} at character {bad.index(unknown)} of ".replace("\\", r"\\")
    for call in (tokenizer.encode, tokenizer, tokenizer.tokenize, lambda text: tokenizer(["fine", text])):
        with pytest.raises(ValueError, match=message):
            call(bad)


def test_the_folder_refuses_unknown_characters_and_takes_line_ends_for_spaces():
    folder = load_tokenizer(FOLDER)
    assert folder.encode("a\nb") == folder.encode("a b")
    with pytest.raises(Exception, match="UNK"):
        folder.encode("3 × 4")


def test_thought_tokens_are_there_already():
    for tokenizer in (COCONUTTokenizer(), load_tokenizer(FOLDER)):
        ids = add_thought_tokens(tokenizer)
        assert len(tokenizer) == 100 and (ids.start, ids.end, ids.latent) == (2, 4, 3)
        assert tokenizer.convert_ids_to_tokens(list(ids)) == list(THOUGHT_TOKENS)


def test_the_committed_folder_is_what_is_written(tmp_path):
    write(tmp_path)
    names = ["tokenizer.json", "tokenizer_config.json", "config.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)
    for name in names:
        committed, made = (json.loads((folder / name).read_text()) for folder in (ROOT / "backbones/characters", tmp_path))
        for one in (committed, made):
            one.pop("transformers_version", None)
        assert committed == made, name
    COCONUTTokenizer().save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    assert load_tokenizer(str(tmp_path / "again")).encode("x = 1") == COCONUTTokenizer().encode("x = 1")


def test_the_backbone_of_the_folder_gives_logits_of_100():
    model = load_backbone(FOLDER, from_scratch=True)
    assert model(input_ids=torch.tensor([COCONUTTokenizer().encode("2 + 2")])).logits.shape == (1, 5, 100)


@pytest.fixture
def cot_rows():
    return [
        {"question": f"What is {a} + {b}?", "steps": [f"Take {a}.", f"{a} + {b} = {a + b}"], "answer": str(a + b)}
        for a in range(1, 6)
        for b in range(1, 5)
    ]


def test_rows_become_characters_and_eos(cot_rows, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(cot_rows))
    for tokenizer in (COCONUTTokenizer(), load_tokenizer(FOLDER)):
        table = TokenTable(get_dataset(tmp_path / "rows.json", tokenizer))
        assert tokenizer.decode(table.question[0].tolist()) == "What is 1 + 1? " and table.merges == 0
        assert tokenizer.decode(table.steps(0, 1).tolist()) == "1 + 1 = 2 "
        assert table.answer[0].tolist() == [*tokenizer.encode("### 2"), 1]


def test_a_run_trains_on_the_folder(make, cot_rows, tmp_path, capsys):
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(cot_rows))
    path = make("characters", model_id=FOLDER, train_path=str(data), val_path=str(data), num_epochs=1, max_new_tokens=4)
    assert main([str(path)]) == 0
    weights = torch.load(next(tmp_path.rglob("checkpoint_1")), weights_only=True)
    tables = [value.shape for name, value in weights.items() if name.endswith("wte.weight")]
    assert tables == [(100, 128)], "the vocabulary did not grow"
