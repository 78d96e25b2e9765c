"""Files to tokens to curriculum rows: against recorded rows and batches of the stock code, and rows written by hand."""

import gc
import json
from itertools import chain, pairwise

import pytest
from conftest import ROOT
from tokenizers.processors import TemplateProcessing

import tokens
from backbones import add_thought_tokens, load_tokenizer
from dataset import MyCollator, clean_answer, extract_answer, extract_steps, get_cot_latent_dataset, get_question_latent_dataset
from tokens import TokenTable, get_dataset, load_rows, no_garbage_collection, question_hash
from utils import check_config

FLAGS = {
    "coconut": {"coconut": True},
    "cot": {"cot": True},
    "no_cot": {"no_cot": True},
    "no_thoughts": {"no_thoughts": True},
    "all_false": dict.fromkeys(("coconut", "cot", "no_thoughts", "no_cot"), False),
}
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


def config(flags="coconut", **values):
    base = {"name": "x", "save_path": "x", "train_path": "x", "val_path": "x", "max_latent_stage": 6}
    return check_config(base | FLAGS[flags] | values, "test")


@pytest.fixture(scope="module")
def words():
    """(tokenizer with one token a word, ids of the three added tokens)"""
    tokenizer = load_tokenizer(str(ROOT / "backbones" / "prosqa_words"))
    return tokenizer, add_thought_tokens(tokenizer)


def write(folder, rows, name="rows.json"):
    (folder / name).write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return folder / name


def table_of(tmp_path, rows, tokenizer) -> TokenTable:
    return TokenTable(get_dataset(write(tmp_path, rows), tokenizer))


@pytest.fixture(scope="module")
def two(words, tmp_path_factory):
    return table_of(tmp_path_factory.mktemp("two"), [THREE, SIX], words[0])


def stage_rows(get, stage, table, ids, settings, **options):
    return get(stage, table, settings, ids.start, ids.latent, ids.end, not settings.markers, **options)


def both(*args, **options):
    return (stage_rows(get, *args, **options) for get in (get_cot_latent_dataset, get_question_latent_dataset))


# ---------------------------------------------------------------- rows, against recorded ones


def test_token_rows_equal_those_of_stock(shared_data, tmp_path):
    folder = shared_data / "golden_stock"
    records = json.loads((folder / "token_rows.json").read_text())
    tokenizer = load_tokenizer(str(shared_data / "gpt2_tokenizer"))
    ids = add_thought_tokens(tokenizer)
    assert ids._asdict() | {"eos": tokenizer.eos_token_id} == records["special"]
    table = TokenTable(get_dataset(folder / "rows.json", tokenizer))
    assert [table.question[i].tolist() for i in range(4)] == records["question_ids"] and table.merges == 0
    keys = [key for key in records if "|" in key]
    assert len(keys) == 65
    for key in keys:
        flags, *rest = key.split("|")
        values = dict(part.split("=") for part in rest)
        settings = config(flags, pad_latent_to_max=values["pad"] == "True", c_thought=int(values["c"]))
        train, prompts = both(int(values["stage"]), table, ids, settings)
        for i, question in enumerate(records["question_ids"]):
            row, expected = train[i], {name: column[i] for name, column in records[key].items()}
            masked = expected["masked_labels"]
            assert row["input_ids"].tolist() == question + expected["train_after_question"], key
            assert (row["labels"][:masked] == -100).all(), key
            assert row["labels"][masked:].tolist() == row["input_ids"][masked:].tolist(), key
            assert prompts[i]["input_ids"].tolist() == question + expected["prompt_after_question"], key
            assert "labels" not in prompts[i] and prompts[i]["idx"] == row["idx"] == i


@pytest.fixture(scope="module")
def stock_cases(shared_data):
    folder = shared_data / "golden_stock"
    tokenizer = load_tokenizer(str(folder / "tiny_gpt2"))
    ids = add_thought_tokens(tokenizer)
    table = TokenTable(get_dataset(folder / "rows.json", tokenizer))
    return json.loads((folder / "coconut_cases.json").read_text()), table, tokenizer, ids


def test_batches_equal_those_of_stock(stock_cases):
    records, table, tokenizer, ids = stock_cases
    settings, collate = config(pad_latent_to_max=False), MyCollator(tokenizer, ids.latent)
    for case in records["cases"]:
        rows = [stage_rows(get_cot_latent_dataset, s, table, ids, settings)[i] for i, s in enumerate(case["stages"])]
        batch = collate(rows)
        assert batch.pop("idx").tolist() == [0, 1, 2, 3]
        assert batch.keys() == {"input_ids", "attention_mask", "position_ids", "labels"}
        for key, value in batch.items():
            assert value.tolist() == case[key], (case["name"], key)


def test_prompts_equal_those_of_stock(stock_cases):
    records, table, _, ids = stock_cases
    for number, case in enumerate(records["generate"]):
        prompts = stage_rows(get_question_latent_dataset, case["stage"], table, ids, config(pad_latent_to_max=False))
        assert prompts[number % 4]["input_ids"].tolist() == case["prompt"]


# ---------------------------------------------------------------- rows, written out by hand

QUESTION = "Every terpus is a brimpus . Every brimpus is a lempus . Tom is a terpus . Is Tom a lempus or scrompus ? \n"
T1, T2, T3 = "Tom is a terpus . \n", "Every terpus is a brimpus . \n", "Every brimpus is a lempus . \n"
ANSWER = "### Tom is a lempus . <|endoftext|>"
SIX_QUESTION = "Rex is a vumpus . Is Rex a chorpus or kerpus ? \n"
S1, S2, S3 = "Every vumpus is a storpus . \n", "Every storpus is a gorpus . \n", "Every gorpus is a jelpus . \n"
S4, S5, S6 = "Every jelpus is a hilpus . \n", "Every hilpus is a yumpus . \n", "Every yumpus is a kerpus . \n"
SIX_ANSWER = "### Rex is a kerpus . <|endoftext|>"
CURRICULUM = [  # stage: latents, the text left of the 3-step row, of the 6-step row
    (0, [T1, T2, T3], [S1, S2, S3, S4, S5, S6]),
    (1, [T2, T3], [S2, S3, S4, S5, S6]),
    (2, [T3], [S3, S4, S5, S6]),
    (3, [], [S4, S5, S6]),
    (4, [], [S5, S6]),
    (5, [], [S6]),
    (6, [], []),
    (6, [], []),
    (6, [], []),
    (6, [], []),
]


def spelled(words, text: str) -> list[int]:
    """Token ids of a text whose tokens stand between spaces; S, T and E are the start, thought and end tokens."""
    tokenizer, ids = words
    added = {"S": ids.start, "T": ids.latent, "E": ids.end}
    return [added[w] if w in added else tokenizer.get_vocab()[w] for w in text.split(" ") if w]


def check(words, rows, i, question, middle, text):
    """Training row i is question, middle (markers and thoughts), text; the first two are masked."""
    prompt, answer = spelled(words, f"{question} {middle}"), spelled(words, text)
    assert rows[i]["input_ids"].tolist() == prompt + answer
    assert rows[i]["labels"].tolist() == [-100] * len(prompt) + answer


@pytest.mark.parametrize("flags", ["coconut", "all_false"])
@pytest.mark.parametrize("stage", range(10))
def test_curriculum_written_out(words, two, stage, flags):
    train, prompts = both(stage, two, words[1], config(flags))
    n, three, six = CURRICULUM[stage]
    middle = f"S {'T ' * n}E"
    check(words, train, 0, QUESTION, middle, " ".join([*three, ANSWER]))
    check(words, train, 1, SIX_QUESTION, middle, " ".join([*six, SIX_ANSWER]))
    assert prompts[0]["input_ids"].tolist() == spelled(words, f"{QUESTION} {middle}")
    assert prompts[1]["input_ids"].tolist() == spelled(words, f"{SIX_QUESTION} {middle}")


def test_rows_without_thoughts_written_out(words, two):
    for flags, stage, text in [("cot", 0, [T1, T2, T3]), ("no_cot", 0, []), ("no_cot", 4, [])]:
        train, prompts = both(stage, two, words[1], config(flags))
        check(words, train, 0, QUESTION, "", " ".join([*text, ANSWER]))
        assert prompts[0]["input_ids"].tolist() == spelled(words, QUESTION)
    for stage, (_, three, six) in enumerate(CURRICULUM):  # the curriculum without thoughts in their place
        train, prompts = both(stage, two, words[1], config("no_thoughts", c_thought=2))
        check(words, train, 0, QUESTION, "", " ".join([*three, ANSWER]))
        check(words, train, 1, SIX_QUESTION, "", " ".join([*six, SIX_ANSWER]))
        assert prompts[0]["input_ids"].tolist() == spelled(words, QUESTION)


@pytest.mark.parametrize("c", [0, 1, 2])
@pytest.mark.parametrize(
    ("pad", "stage", "cap", "training", "prompt"),
    [  # thoughts / c of the 3-step and the 6-step row
        (True, 2, 4, (2, 2), (2, 2)),
        (True, 4, 4, (4, 4), (4, 4)),
        (True, 5, 4, (4, 4), (4, 4)),
        (False, 2, 4, (2, 2), (2, 2)),
        (False, 4, 4, (4, 4), (3, 4)),  # training and evaluation disagree here, as in stock
        (False, 5, 4, (3, 4), (3, 4)),
        (False, 9, 8, (3, 6), (3, 6)),
        (True, 9, 8, (8, 8), (8, 8)),
        (True, 3, 0, (0, 0), (0, 0)),
    ],
)
def test_thoughts_a_row(words, two, c, pad, stage, cap, training, prompt):
    ids = words[1]
    train, prompts = both(stage, two, ids, config(c_thought=c, pad_latent_to_max=pad, max_latent_stage=cap))
    for rows, expected in ((train, training), (prompts, prompt)):
        assert tuple((rows[i]["input_ids"] == ids.latent).sum() for i in (0, 1)) == tuple(n * c for n in expected)
    kept = 0 if stage > cap else max(6 - stage, 0)
    assert (train[1]["input_ids"] == words[0].get_vocab()["Every"]).sum() == kept


# ---------------------------------------------------------------- files


GOOD = {"question": "q", "answer": "a", "steps": ["s"]}


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


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("text", "answer", "steps"),
    [
        ("Tom is a terpus.\n### Tom is a lempus.", "Tom is a lempus.", "Tom is a terpus."),
        ("<<600*30/100=180>>\n<<600-180=420>>\n### 1,420", "1420", "<<600*30/100=180>>\n<<600-180=420>>"),
        ("no mark", None, "no mark"),
        ("", None, ""),
        ("### ", "", ""),
        ("a # b ## c ### d # 7 ", "7", "a"),
        ("  step \n#x\n### 12\nmore", "12\nmore", "step"),
    ],
)
def test_answers_and_steps_of_a_continuation(text, answer, steps):
    assert extract_answer(text) == answer and extract_steps(text) == steps


def test_gold_answers_are_cleaned_alike():
    assert clean_answer(" 1,234,567 ") == "1234567" and clean_answer("18.0") == "18.0"


def test_garbage_collection_comes_back_whatever_happens():
    assert gc.isenabled()
    with pytest.raises(ValueError), no_garbage_collection():
        assert not gc.isenabled()
        raise ValueError
    assert gc.isenabled()
