"""Tokens to curriculum rows: against recorded rows and batches of the stock code, and rows written by hand."""

import json

import pytest
from row_material import ANSWER, QUESTION, SIX, T1, T2, T3, THREE, spelled, table_of, words_tokenizer

from backbones import add_thought_tokens, load_tokenizer
from dataset import MyCollator, clean_answer, extract_answer, extract_steps, get_cot_latent_dataset, get_question_latent_dataset
from tokens import TokenTable, get_dataset
from utils import check_config

FLAGS = {
    "coconut": {"coconut": True},
    "cot": {"cot": True},
    "no_cot": {"no_cot": True},
    "no_thoughts": {"no_thoughts": True},
    "all_false": dict.fromkeys(("coconut", "cot", "no_thoughts", "no_cot"), False),
}


@pytest.fixture(scope="module")
def words():
    return words_tokenizer()


def config(flags="coconut", **values):
    base = {"name": "x", "save_path": "x", "train_path": "x", "val_path": "x", "max_latent_stage": 6}
    return check_config(base | FLAGS[flags] | values, "test")


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
