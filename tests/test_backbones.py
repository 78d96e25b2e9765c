"""Backbones: lossless tiny tokenizers, thought tokens and their rows, local folders of three architectures."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import backbones
from backbones import THOUGHT_TOKENS, ThoughtIds, tiny
from data import prosqa, two_chain
from data.prosqa_graph import NAMES, SPECIES
from data.prosqa_rows import draw_rows

FOLDER = Path(backbones.__file__).parent
FOLDERS = ("prosqa_words", "prosqa_tiny")


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Rows of both generators; together they use every name and species."""
    spec = two_chain.TwoChain(hops=(2, 3), nodes=(6, 8), species=12)
    chains = draw_rows(lambda rng: two_chain.draw_row(rng, spec), 60, 1, "train", set())[0]
    drawn = draw_rows(prosqa.draw_row, 120, 0, "train", set())[0] + chains
    text = " ".join(row["question"] for row in drawn)
    assert all(word in text for word in (*NAMES, *SPECIES))
    return drawn


def word_tokenizer(*words: str) -> PreTrainedTokenizerFast:
    """One id a word, in the order given after <eos>; unknown words are <unk>."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(("<eos>", "<unk>", *words))}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def piece_tokenizer() -> PreTrainedTokenizerFast:
    """`<<` is the two tokens `<` and `<`-behind-another here."""
    vocabulary = {"<eos>": 0, "<unk>": 1, "a": 2, "<": 3, "##<": 4}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
BUILD = {
    "gpt2": lambda v: GPT2LMHeadModel(GPT2Config(vocab_size=v, n_embd=16, n_layer=2, n_head=2, n_positions=32)),
    "llama": lambda v: LlamaForCausalLM(
        LlamaConfig(vocab_size=v, num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=False, **SMALL)
    ),
    "qwen2": lambda v: Qwen2ForCausalLM(
        Qwen2Config(vocab_size=v, num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True, **SMALL)
    ),
}


def build(name: str, vocabulary: int):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return BUILD[name](vocabulary)


# ---------------------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("folder", FOLDERS)
def test_tiny_tokenizer_is_lossless_on_every_piece_of_every_row(folder, rows):
    tokenizer = backbones.load_tokenizer(str(FOLDER / folder))
    backbones.add_thought_tokens(tokenizer)
    for row in rows:
        pieces = [row["question"] + "\n", *(step + "\n" for step in row["steps"]), "### " + row["answer"]]
        encoded = [tokenizer.encode(piece, add_special_tokens=False) for piece in pieces]
        for piece, ids in zip(pieces, encoded):
            assert tokenizer.unk_token_id not in ids, piece
            assert tokenizer.decode(ids) == piece
        whole = tokenizer.encode("".join(pieces), add_special_tokens=False)
        assert whole == sum(encoded, []), "no tokens merge across pieces"
        assert tokenizer.decode(whole) == "".join(pieces)


@pytest.mark.parametrize("folder", FOLDERS)
def test_generated_answer_reads_back_behind_steps(folder, rows):
    """Scoring sees the continuation alone: steps and answer without the question."""
    tokenizer = backbones.load_tokenizer(str(FOLDER / folder))
    for row in rows[:40]:
        text = "".join(step + "\n" for step in row["steps"]) + "### " + row["answer"]
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), skip_special_tokens=True) == text


def test_a_fact_is_three_tokens_in_the_tiny_backbone():
    tokenizer = backbones.load_tokenizer(str(FOLDER / "prosqa_tiny"))
    pieces = tokenizer.tokenize(f"Every {SPECIES[0]} is a {SPECIES[1]}. {NAMES[0]} is a {SPECIES[0]}.")
    assert pieces == [SPECIES[0], SPECIES[1], ".", NAMES[0], SPECIES[0], "."]


@pytest.mark.parametrize(
    "folder, make",
    [("prosqa_words", lambda: tiny.word_tokenizer()), ("prosqa_tiny", lambda: tiny.word_tokenizer(False))],
)
def test_committed_files_are_what_the_module_writes(folder, make, tmp_path):
    def read(path: Path) -> dict:
        content = json.loads(path.read_text())
        content.pop("transformers_version", None)
        return content

    committed = read(FOLDER / folder / "config.json")
    shape = {
        key: committed[key]
        for key in ("n_layer", "n_embd", "n_head", "n_positions", "initializer_range", "activation_function")
    }
    tiny.write(tmp_path, make(), **shape)
    assert read(tmp_path / "config.json") == committed
    assert read(tmp_path / "tokenizer.json") == read(FOLDER / folder / "tokenizer.json")
    assert committed["vocab_size"] == len(backbones.load_tokenizer(str(FOLDER / folder)))
    assert {committed[key] for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop")} == {0.0}


def test_padding_is_eos():
    tokenizer = backbones.load_tokenizer(str(FOLDER / "prosqa_words"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0


# ---------------------------------------------------------------------------------------------------- thought tokens


def test_thought_tokens_come_last_in_the_stock_order():
    tokenizer = word_tokenizer("a", "<<")
    assert backbones.add_thought_tokens(tokenizer) == ThoughtIds(start=4, end=5, latent=6)
    assert tokenizer.convert_ids_to_tokens([4, 5, 6]) == list(THOUGHT_TOKENS) == [
        "<|start-latent|>", "<|end-latent|>", "<|latent|>",
    ]  # fmt: skip
    assert not set(THOUGHT_TOKENS) & set(tokenizer.all_special_tokens), "decoding must not skip them"
    assert tokenizer.encode("a <|start-latent|><|latent|><|latent|><|end-latent|>") == [2, 4, 6, 6, 5]


def test_gpt2_ids(shared_data):
    tokenizer = backbones.load_tokenizer(str(shared_data / "gpt2_tokenizer"))
    assert backbones.add_thought_tokens(tokenizer) == ThoughtIds(start=50257, end=50258, latent=50259)
    assert backbones.anchor_ids(tokenizer) == [16791]


def test_ids_are_found_by_name_in_another_order():
    tokenizer = word_tokenizer("a")
    tokenizer.add_tokens(["<|latent|>", "<|start-latent|>", "<|end-latent|>"])
    assert backbones.add_thought_tokens(tokenizer) == ThoughtIds(start=4, end=5, latent=3)
    assert len(tokenizer) == 6


# ---------------------------------------------------------------------------------------------------- new rows


@pytest.mark.parametrize("name", BUILD)
def test_new_rows_are_the_anchor_row_on_both_sides(name):
    tokenizer = word_tokenizer("a", "<<", "b")
    model, before = build(name, len(tokenizer)), build(name, len(tokenizer))
    ids = backbones.add_thought_tokens(tokenizer)
    backbones.grow_vocabulary(model, tokenizer, ids)
    sides = [(m.get_input_embeddings().weight, m.get_output_embeddings().weight) for m in (model, before)]
    for new, old in zip(*sides):
        assert new.shape == (8, 16)
        assert torch.equal(new[:5], old), "old rows stay"
        assert torch.equal(new[5:], old[3].expand(3, -1)), "`<<` is token 3"
    tied = sides[0][0].data_ptr() == sides[0][1].data_ptr()
    assert tied == (name != "llama")
    if not tied:
        assert not torch.equal(sides[0][0][5], sides[0][1][5]), "each side takes its own row"
    assert model(torch.tensor([[2, ids.latent]])).logits.shape[-1] == 8


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_anchor_of_several_pieces_is_their_mean(name, capsys):
    tokenizer = piece_tokenizer()
    model, before = build(name, len(tokenizer)), build(name, len(tokenizer))
    assert backbones.anchor_ids(tokenizer) == [3, 4]
    ids = backbones.add_thought_tokens(tokenizer)
    backbones.grow_vocabulary(model, tokenizer, ids)
    for get in ("get_input_embeddings", "get_output_embeddings"):
        new, old = getattr(model, get)().weight, getattr(before, get)().weight
        assert torch.allclose(new[list(ids)], old[[3, 4]].mean(0).expand(3, -1), atol=1e-7)
    assert "`<<` is 2 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_without_an_anchor_new_rows_are_the_mean_of_the_old(name, capsys):
    tokenizer = word_tokenizer("a", "b", "c")
    model, before = build(name, len(tokenizer)), build(name, len(tokenizer))
    ids = backbones.add_thought_tokens(tokenizer)
    backbones.grow_vocabulary(model, tokenizer, ids)
    for get in ("get_input_embeddings", "get_output_embeddings"):
        new, old = getattr(model, get)().weight, getattr(before, get)().weight
        assert torch.allclose(new[list(ids)], old.mean(0).expand(3, -1), atol=1e-7), "not of rows that were just drawn"
    assert "mean row of the vocabulary" in capsys.readouterr().out


def test_one_anchor_says_nothing(capsys):
    tokenizer = word_tokenizer("<<")
    model = build("gpt2", len(tokenizer))
    backbones.grow_vocabulary(model, tokenizer, backbones.add_thought_tokens(tokenizer))
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------------------------------------------- loading


def test_from_scratch_follows_its_seed_and_leaves_the_callers_generator_alone():
    folder = str(FOLDER / "prosqa_tiny")
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = backbones.load_backbone(folder, from_scratch=True, seed=1).state_dict()
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(99)
    again, other = (backbones.load_backbone(folder, from_scratch=True, seed=seed).state_dict() for seed in (1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["transformer.wte.weight"], other["transformer.wte.weight"])
    assert {value.dtype for value in first.values()} == {torch.float32}


def test_from_scratch_draws_float32_whatever_dtype_the_config_names(tmp_path):
    config = json.loads((FOLDER / "prosqa_tiny/config.json").read_text()) | {"torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weight = backbones.load_backbone(str(tmp_path), from_scratch=True).state_dict()["transformer.wte.weight"]
    assert weight.dtype == torch.float32 and not torch.equal(weight, weight.bfloat16().float())
    assert torch.equal(weight, backbones.load_backbone(str(FOLDER / "prosqa_tiny"), from_scratch=True).transformer.wte.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BUILD)
def test_local_folder_loads_with_equal_weights_in_float32(name, dtype, tmp_path):
    saved = build(name, 9).to(dtype)
    saved.save_pretrained(tmp_path)
    loaded = backbones.load_backbone(str(tmp_path))
    assert type(loaded) is type(saved)
    assert loaded.state_dict().keys() == saved.state_dict().keys()
    for key, value in saved.state_dict().items():
        assert loaded.state_dict()[key].dtype == torch.float32
        assert torch.equal(loaded.state_dict()[key], value.float()), key
    if dtype == torch.float32:
        ids = torch.tensor([[1, 2, 3]])
        assert torch.equal(loaded.eval()(ids).logits, saved.eval()(ids).logits)
    assert backbones.max_positions(loaded) == 32


def test_config_changes_reach_the_model():
    model = backbones.load_backbone(str(FOLDER / "prosqa_tiny"), True, 0, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("load", [backbones.load_tokenizer, backbones.load_backbone])
@pytest.mark.parametrize("exists", [False, True], ids=["absent", "empty folder"])
def test_what_cannot_be_loaded_is_named(load, exists, tmp_path):
    folder = tmp_path / "deep" / "folder"
    if exists:
        folder.mkdir(parents=True)
    with pytest.raises(ValueError) as refused:
        load(str(folder))
    message = str(refused.value)
    assert message.startswith("model_id: ") and str(folder) in message and "\n" not in message


def test_folder_without_weights_needs_from_scratch():
    with pytest.raises(ValueError, match="model_id: .*prosqa_words"):
        backbones.load_backbone(str(FOLDER / "prosqa_words"))


def test_tokenizer_loads_the_same_through_the_library():
    mine, theirs = (
        backbones.load_tokenizer(str(FOLDER / "prosqa_words")),
        AutoTokenizer.from_pretrained(FOLDER / "prosqa_words"),
    )
    assert mine.get_vocab() == theirs.get_vocab()


def test_libraries_that_are_too_old_are_named():
    current = {"torch": "2.11.0+cpu", "transformers": "5.17.0"}
    backbones.check_versions(current.get)
    for name, version, word in (("torch", "2.9.1", "2.11"), ("transformers", "4.57.0", "5.17")):
        with pytest.raises(ValueError, match=rf"{name} {version} is older than {word}.*pip install -r requirements.txt"):
            backbones.check_versions((current | {name: version}).get)
    script = (FOLDER.parent / "scripts/test_matrix.sh").read_text()
    assert f"oldest={backbones.MINIMUM['transformers']}." in script, "the matrix tries the oldest one"
