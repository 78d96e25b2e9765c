"""The stand-in for GSM8K-Aug: answers against a second calculation, proportions, splits, the check, text and JSON."""

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from math import prod

import pytest
from conftest import ROOT

from data import arithmetic, gsm
from data.arithmetic import STEP_MIX, check_row, check_rows, make_rows, value_of
from dataset import clean_answer, extract_answer
from tokens import load_rows


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return make_rows(4000, 7, "train", set())


def run(*args) -> subprocess.CompletedProcess:
    command = [sys.executable, "data/arithmetic.py", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


# ---------------------------------------------------------------- answers


def things(question: str) -> int:
    """A collection, followed sentence by sentence."""
    have = 0
    for sentence in question.split(". "):
        numbers = [int(number) for number in re.findall(r"\d+", sentence)]
        if re.search(r" has \d+ \w+$", sentence) and not have:
            (have,) = numbers
        elif " finds " in sentence or " brings " in sentence:
            have += numbers[0]
        elif " gives away " in sentence or " get lost" in sentence:
            have -= numbers[0]
        elif " times as many" in sentence:
            have *= numbers[0]
        elif " equal piles " in sentence:
            have = have // numbers[0] if have % numbers[0] == 0 else -1
        elif " buys " in sentence:
            have += prod(numbers)
        elif sentence.startswith("Each of "):
            have -= prod(numbers)
        else:
            assert sentence.startswith("How many "), sentence
    return have


def money(question: str) -> int:
    """A purchase, and the account it is paid from."""
    cost = sum(int(n) * int(price) for n, price in re.findall(r"(\d+) \w+ at \$(\d+) each", question))
    account = re.search(r"has \$(\d+) in an account", question)
    return int(account[1]) - cost if account else cost


def kilometers(question: str) -> int:
    """A journey, for so many times or over so many days."""
    way = sum(int(hours) * int(speed) for hours, speed in re.findall(r"(\d+) hours at (\d+) km", question))
    times, days = re.search(r"all of this (\d+) times", question), re.search(r"in (\d+) days", question)
    assert not days or way % int(days[1]) == 0
    return way * int(times[1]) if times else way // int(days[1]) if days else way


def test_answers_are_those_of_the_words(rows):
    kinds = Counter()
    for row in rows:
        again = next(f for word, f in (("dollars", money), ("kilometers", kilometers), ("", things)) if word in row["question"])
        kinds[again.__name__] += 1
        assert clean_answer(row["answer"]) == str(again(row["question"])), row
    assert min(kinds.values()) > 1200 and len(kinds) == 3


def test_steps_are_as_in_gsm8k_and_lead_to_the_answer(rows):
    for row in rows:
        check_row(row)
        assert list(row) == ["question", "steps", "answer"]
        assert all(re.fullmatch(r"<<\d+([+*/-]\d+)+=-?\d+>>", step) for step in row["steps"])
        for step in row["steps"]:
            left, right = step[2:-2].split("=")
            assert eval(left) == int(right)  # noqa: S307 digits and signs only, by the line above
        assert all(c not in row["question"] for c in "#|\n"), "the text format needs these"


def test_numbers_of_steps_are_in_the_proportions_of_the_test_set(rows):
    found = Counter(len(row["steps"]) for row in rows)
    assert set(found) == set(STEP_MIX) == set(range(1, 9))
    for n, of in STEP_MIX.items():
        expected = 4000 * of / sum(STEP_MIX.values())
        assert abs(found[n] - expected) < 4.5 * expected**0.5, (n, found[n], expected)


def test_answers_are_spread_and_have_the_quirks_of_the_real_ones(rows):
    answers = Counter(row["answer"] for row in rows)
    assert answers.most_common(1)[0][1] < 0.02 * len(rows)
    assert 0.005 < sum("," in row["answer"] for row in rows) / len(rows) < 0.06
    assert 0.005 < sum(row["answer"].startswith("-") for row in rows) / len(rows) < 0.06
    assert all(re.fullmatch(r"-?\d{1,3}(,\d{3})+|-?\d+", answer) for answer in answers)
    operations = Counter(re.findall(r"(?<=\d)[+*/-]", " ".join(step for row in rows for step in row["steps"])))
    assert all(operations[operation] > 100 for operation in "+-*/")


@pytest.mark.parametrize("template", arithmetic.TEMPLATES, ids=lambda t: t.__name__)
@pytest.mark.parametrize("n_steps", STEP_MIX)
def test_every_template_makes_every_number_of_steps(template, n_steps):
    for seed in range(30):
        draft = template(random.Random(seed), n_steps)
        assert len(draft.steps) == n_steps
        check_row(arithmetic.to_row(draft))


def test_a_problem_is_its_numbers_not_its_words():
    drafts = [arithmetic.shopping(random.Random(seed), 1) for seed in range(5000)]
    by_key = {}
    for draft in drafts:
        by_key.setdefault(draft.key, set()).add(tuple(draft.steps))
    assert all(len(steps) == 1 for steps in by_key.values()), "the same key, the same calculation"
    assert len(by_key) < len({draft.question for draft in drafts})


# ---------------------------------------------------------------- check


@pytest.mark.parametrize(
    ("expression", "value"), [("16-3-4", 9), ("2+3*4", 14), ("7/2*4", 14), ("5-8", -3), ("1/3+1/6", Fraction(1, 2)), ("12", 12)]
)
def test_values_are_exact(expression, value):
    assert value_of(expression) == value


SOUND = {"question": "Ann has 3 pens and buys 2 packs of 4.", "steps": ["<<2*4=8>>", "<<3+8=11>>"], "answer": "11"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "12"}, "answer: '12', but the last step gives 11"),
        ({"steps": ["<<2*4=9>>", "<<3+8=11>>"]}, "step 0: 2*4 is 8, not 9"),
        ({"steps": ["<<3+8=11>>"]}, "step 0: 8 is neither in the question nor a step's value"),
        ({"steps": ["2*4=8"]}, "step 0, '2*4=8', is not like"),
        ({"steps": [""]}, "step 0, '', is not like"),
        ({"steps": []}, "there are none"),
    ],
)
def test_check_rejects(change, message):
    check_row(SOUND)
    with pytest.raises(ValueError) as error:
        check_rows([SOUND | {"question": "Other: 3, 2, 4"}, SOUND | change], "x.json")
    assert str(error.value).startswith("x.json: row 1: ") and message in str(error.value)


def test_check_of_a_file(tmp_path):
    for rows, message in (
        ([SOUND, SOUND], "row 1: question: it is that of row 0"),
        ([SOUND, {"question": "x"}], "row 1: no key 'steps'"),
        ([SOUND], None),
    ):
        (tmp_path / "x.json").write_text(json.dumps(rows))
        done = run("--check", tmp_path / "x.json")
        assert (done.returncode == 0) == (message is None)
        assert message is None and "1 sound rows" in done.stdout or message in done.stderr


# ---------------------------------------------------------------- files


def test_files_load_and_the_text_converts_to_the_same_bytes(tmp_path):
    done = run("--out", tmp_path, "--sizes", 300, 40, 60, "--text")
    assert done.returncode == 0, done.stderr
    assert "arith_gsm_train.json: 300 rows of the STAND-IN, not GSM8K" in done.stdout
    for split, size in zip(arithmetic.SPLITS, (300, 40, 60)):
        path, text = tmp_path / f"arith_gsm_{split}.json", tmp_path / f"arith_gsm_{split}.txt"
        rows = load_rows(path)
        assert len(rows) == size
        gsm.main(["--raw", str(text), "--out", str(tmp_path / "again.json"), "--expect-rows", str(size)])
        assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
        sidecar = json.loads(path.with_suffix(".stats.json").read_text())
        assert sidecar["rows"] == size and "not GSM8K" in sidecar["stand_in"]
        for row in rows:
            assert extract_answer("\n".join([*row["steps"], "### " + row["answer"]])) == clean_answer(row["answer"])


def test_no_problem_is_there_twice_in_a_split_or_in_two():
    def purchases(rows):
        """The calculation of every purchase of one kind of goods: few are possible, so that chance repeats them."""
        return [row["steps"][0] for row in rows if len(row["steps"]) == 1 and "dollars" in row["question"]]

    seen = set()
    test, train = purchases(make_rows(2000, 0, "test", seen)), purchases(make_rows(4000, 0, "train", seen))
    assert len(seen) == 6000 and min(len(test), len(train)) > 20
    assert len({*test, *train}) == len(test) + len(train)
    assert {*test} & {*purchases(make_rows(4000, 0, "train", set()))}, "they would be, if train did not know of test"


def test_same_seed_same_bytes_and_no_split_depends_on_the_training_size(tmp_path):
    for folder, seed, size in (("a", 1, 50), ("b", 1, 50), ("c", 2, 50), ("d", 1, 80)):
        arithmetic.main(["--out", str(tmp_path / folder), "--seed", str(seed), "--sizes", str(size), "10", "20"])
    files = {folder: {p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()} for folder in "abcd"}
    assert len(files["a"]) == 6 and files["a"] == files["b"]
    assert files["a"]["arith_gsm_train.json"] != files["c"]["arith_gsm_train.json"]
    assert all(files["a"][f"arith_gsm_{split}.json"] == files["d"][f"arith_gsm_{split}.json"] for split in ("valid", "test"))


def test_row_i_does_not_depend_on_how_many(rows):
    assert make_rows(20, 7, "train", set()) == rows[:20]


def test_existing_files_are_kept_unless_forced(tmp_path):
    (tmp_path / "arith_gsm_test.json").write_text("old")
    done = run("--out", tmp_path, "--sizes", 4, 4, 4)
    assert done.returncode == 2 and "arith_gsm_test.json exists; choose another --out or add --force" in done.stderr
    assert os.listdir(tmp_path) == ["arith_gsm_test.json"]
    assert run("--out", tmp_path, "--sizes", 4, 4, 4, "--force").returncode == 0
    assert len(load_rows(tmp_path / "arith_gsm_test.json")) == 4


def test_mistakes_give_one_line_and_exit_2(tmp_path):
    done = run("--out", tmp_path / "x", "--sizes", 4, 0, 4)
    assert done.returncode == 2 and "every split needs at least one row" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_where_problems_run_out_it_is_said(monkeypatch):
    monkeypatch.setattr(arithmetic.pr, "MAX_DRAWS", 3)
    monkeypatch.setattr(arithmetic, "TEMPLATES", (lambda rng, n_steps: arithmetic.Draft("q", ["1+1=2"], ("only one",)),))
    with pytest.raises(ValueError, match="train row 1: no new problem in 3 draws; ask for fewer rows"):
        make_rows(2, 0, "train", set())
