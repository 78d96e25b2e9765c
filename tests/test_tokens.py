"""Files to rows to tokens: what is refused, what is cached, and the flat table."""

import gc
from itertools import chain

import pytest
from conftest import ROOT
from row_material import ANSWER, GOOD, QUESTION, SIX, T1, T2, T3, THREE, spelled, table_of, words_tokenizer, write
from tokenizers.processors import TemplateProcessing

import tokens
from backbones import load_tokenizer
from tokens import TokenTable, get_dataset, load_rows, no_garbage_collection, question_hash


@pytest.fixture(scope="module")
def words():
    return words_tokenizer()


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{]", "is not JSON"),
        ("[]", "non-empty JSON list"),
        (GOOD, "non-empty JSON list"),
        ([GOOD, "text"], "row 1: must be an object"),
        ([GOOD, GOOD, {"question": "q", "steps": []}], "row 2: `answer` is missing"),
        ([GOOD | {"answer": 18}], "row 0: `answer` must be a str, is 18"),
        ([GOOD, GOOD | {"steps": "one"}], "row 1: `steps` must be a list, is 'one'"),
        ([GOOD, GOOD | {"steps": ["one", 2]}], "row 1: `steps` must be a list of strings"),
    ],
)
def test_bad_files_are_named_with_row_and_key(tmp_path, words, content, message):
    path = write(tmp_path, content, "mine.json")
    with pytest.raises(ValueError, match=message) as error:
        load_rows(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):  # tokenising says the same, not an error of the library
        get_dataset(path, words[0])


def test_a_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match="x.json is not JSON"):
        load_rows(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("data/prosqa_train.json", "python data/prosqa.py --out data"),
        ("data/quickstart/prosqa_train.json", "bash scripts/quickstart.sh"),
        ("data/gsm_test.json", "bash scripts/get_gsm8k.sh --out data"),
        ("data/prontoqa_valid.json", "python data/prontoqa.py"),
    ],
)
def test_a_missing_file_names_the_command_that_makes_it(monkeypatch, tmp_path, name, command):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"data file {name} does not exist; make it with: {command}"):
        load_rows(name)
    with pytest.raises(ValueError, match="does not exist$"):
        load_rows("data/mine.json")


def test_load_rows_keeps_order_and_other_keys(tmp_path):
    rows = [GOOD | {"question": str(i), "root": i} for i in range(5)]
    path = write(tmp_path, rows)
    assert load_rows(path) == rows and load_rows(path, 2) == rows[:2]


def test_question_hash_names_the_question_only():
    assert question_hash(THREE) == question_hash({"question": THREE["question"]}) != question_hash(SIX)
    assert len(question_hash(THREE)) == 12 and int(question_hash(THREE), 16) >= 0


# ---------------------------------------------------------------- tokens


@pytest.fixture
def calls(words, monkeypatch):
    """A list that grows with every batch of texts that is tokenised."""
    made, real = [], tokens._encode
    monkeypatch.setattr(tokens, "_encode", lambda *args, **kwargs: made.append(1) or real(*args, **kwargs))
    return made


def test_a_file_is_tokenised_once_and_again_when_it_changes(words, tmp_path, calls):
    path = write(tmp_path, [THREE, SIX, THREE])
    first = get_dataset(path, words[0])
    n_calls = len(calls)
    assert 0 < n_calls < 10  # batches of texts, not one call a text
    again = get_dataset(path, words[0])
    assert len(calls) == n_calls and again[:] == first[:]
    write(tmp_path, [SIX, THREE])
    changed = get_dataset(path, words[0])
    assert len(calls) == 2 * n_calls and len(changed) == 2
    assert changed[0]["question_tokenized"] == first[1]["question_tokenized"]
    assert len(get_dataset(path, words[0], 1)) == 1 and len(calls) == 3 * n_calls  # another max_size, another table
    write(tmp_path, [THREE, SIX, THREE])
    assert get_dataset(path, words[0])[:] == first[:] and len(calls) == 3 * n_calls


def test_tokenizers_special_tokens_go_to_the_question_only_and_make_another_table(words, tmp_path):
    tokenizer = load_tokenizer(str(ROOT / "backbones" / "prosqa_words"))
    path = write(tmp_path, [THREE, SIX])
    plain = get_dataset(path, tokenizer)[:]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<< $A", special_tokens=[("<<", 1)])
    marked = get_dataset(path, tokenizer)[:]
    assert marked["question_tokenized"] == [[1, *ids] for ids in plain["question_tokenized"]]
    for key in ("steps_tokenized", "answer_tokenized", "merges", "idx"):
        assert marked[key] == plain[key]


def test_rows_whose_tokens_would_merge_across_pieces_are_counted(shared_data, tmp_path):
    merging = GOOD | {"steps": ["\n\nb"]}  # three newlines before `b`: the whole text has a token of two
    table = table_of(tmp_path, [THREE, merging, SIX], load_tokenizer(str(shared_data / "gpt2_tokenizer")))
    assert table.merges == 1


def test_table_holds_more_rows_than_one_piece_of_work_and_rows_without_steps(words, tmp_path):
    rows = [THREE | {"steps": THREE["steps"][: i % 7 % 4]} for i in range(2100)]
    base = get_dataset(write(tmp_path, rows), words[0])
    table = TokenTable(base)
    assert len(table) == 2100 and base["idx"][:] == list(range(2100))
    for i in (0, 1, 999, 1000, 1003, 2099):
        assert table.n_steps(i) == i % 7 % 4
        assert table.question[i].tolist() == spelled(words, QUESTION)
        assert table.answer[i].tolist() == spelled(words, ANSWER)
        expected = [spelled(words, text) for text in (T1, T2, T3)[: i % 7 % 4]]
        for skip in range(len(expected) + 1):
            assert table.steps(i, skip).tolist() == list(chain.from_iterable(expected[skip:]))


def test_a_part_of_a_dataset_makes_a_table_of_its_own_rows(words, tmp_path):
    base = get_dataset(write(tmp_path, [THREE, SIX, THREE, THREE | {"steps": []}, SIX]), words[0])
    part, whole = TokenTable(base.select(range(1, 5))), TokenTable(base)
    assert len(part) == 4
    for i in range(4):
        assert part.n_steps(i) == whole.n_steps(i + 1) == [6, 3, 0, 6][i]
        for a, b in ((part.question, whole.question), (part.answer, whole.answer)):
            assert a[i].tolist() == b[i + 1].tolist()
        assert part.steps(i, 0).tolist() == whole.steps(i + 1, 0).tolist()


def test_garbage_collection_comes_back_whatever_happens():
    assert gc.isenabled()
    with pytest.raises(ValueError), no_garbage_collection():
        assert not gc.isenabled()
        raise ValueError
    assert gc.isenabled()
