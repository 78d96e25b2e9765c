"""ProntoQA: conversion byte for byte, what generated problems are held to, the checks, and files."""

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from conftest import ROOT

from data import prontoqa, prontoqa_checks, prontoqa_ontology
from data.prontoqa_checks import baselines, check_row, read_row, shortcuts
from data.prontoqa_ontology import Claim, draw_example, read_claim, write_claim
from dataset import clean_answer, extract_answer
from tokens import load_rows

# In the form of the published generator: the rival rule stands at a concept of which nothing else is said.
EXAMPLE = {
    "question": "Lempuses are not hot. Each vumpus is a brimpus. Every brimpus is dull. Brimpuses are impuses. "
    "Every impus is a rompus. Each rompus is a worpus. Worpus are not dim. Gorpuses are not sour. Each worpus is hot. "
    "Each rompus is not shy. Max is a vumpus. Max is a gorpus.",
    "query": "True or false: Max is not hot.",
    "chain_of_thought": [
        "Max is a vumpus.",
        "Each vumpus is a brimpus.",
        "Max is a brimpus.",
        "Brimpuses are impuses.",
        "Max is an impus.",
        "Every impus is a rompus.",
        "Max is a rompus.",
        "Each rompus is a worpus.",
        "Max is a worpus.",
        "Each worpus is hot.",
        "Max is hot.",
    ],
    "answer": "False",
}
ROW = (  # written out by hand: what the stock converter writes of it
    '{"question": "Lempuses are not hot. Each vumpus is a brimpus. Every brimpus is dull. Brimpuses are impuses. '
    "Every impus is a rompus. Each rompus is a worpus. Worpus are not dim. Gorpuses are not sour. Each worpus is hot. "
    'Each rompus is not shy. Max is a vumpus. Max is a gorpus. True or false: Max is not hot.", "steps": '
    '["Max is a vumpus. Each vumpus is a brimpus.", "Max is a brimpus. Brimpuses are impuses.", '
    '"Max is an impus. Every impus is a rompus.", "Max is a rompus. Each rompus is a worpus.", '
    '"Max is a worpus. Each worpus is hot.", "Max is hot."], "answer": "False"}'
)


def concepts(i: int) -> str:
    """A concept in the plural that no other number has."""
    return f"B{'abcdefghij'[i // 10]}{'abcdefghij'[i % 10]}umpuses"


def raw_of(n: int, **changes) -> dict:
    """`n` examples, each about a concept of its own, with changes to the last one."""
    examples = [EXAMPLE | {"question": EXAMPLE["question"].replace("Lempuses", concepts(i))} for i in range(n)]
    examples[-1] = examples[-1] | changes
    return {f"example{i}": {"test_example": example} for i, example in enumerate(examples, start=1)}


def run(*args) -> subprocess.CompletedProcess:
    command = [sys.executable, "data/prontoqa.py", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def write(path: Path, raw) -> Path:
    path.write_text(json.dumps(raw, indent=1))
    return path


# ---------------------------------------------------------------- conversion


def test_bytes_are_those_of_the_stock_converter(tmp_path):
    raw = write(tmp_path / "5hop_0shot_random.json", raw_of(6))
    done = run("--raw", raw, "--out", tmp_path / "out", "--allow-any-size", "--sizes", 3, 1, 2)
    assert done.returncode == 0, done.stderr
    rows = [ROW.replace("Lempuses", concepts(i)) for i in range(6)]
    for split, (start, end) in {"train": (0, 3), "valid": (3, 4), "test": (4, 6)}.items():
        written = (tmp_path / f"out/prontoqa_{split}.json").read_text()
        assert written == "[" + ", ".join(rows[start:end]) + "]"
    assert len(load_rows(tmp_path / "out/prontoqa_train.json")[0]["steps"]) == 6


def test_all_10000_go_to_9000_200_and_the_rest_in_order(tmp_path):
    raw = {f"example{i}": {"test_example": EXAMPLE | {"query": f"True or false: {i}."}} for i in range(10_000, 0, -1)}
    write(tmp_path / "raw.json", raw)
    prontoqa.main(["--raw", str(tmp_path / "raw.json"), "--out", str(tmp_path)])
    for split, numbers in {"train": range(10_000, 1000, -1), "valid": range(1000, 800, -1), "test": range(800, 0, -1)}.items():
        rows = load_rows(tmp_path / f"prontoqa_{split}.json")
        assert [row["question"].rpartition(": ")[2] for row in rows] == [f"{n}." for n in numbers]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "raw.json: 6 examples, must be 10,000"),
        (["--allow-any-size"], "raw.json: 6 examples, but --sizes 9000 200 800 make 10000"),
        (["--allow-any-size", "--sizes", "6", "1", "-1"], "every split needs at least one row"),
        (
            ["--allow-any-size", "--sizes", "4", "1", "1", "--hops", "4"],
            "example1: `chain_of_thought` must be 9 sentences, has 11",
        ),
        (["--generate"], "not allowed with argument"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(args, message, tmp_path):
    done = run("--raw", write(tmp_path / "raw.json", raw_of(6)), "--out", tmp_path / "out", *args)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"answer": "true"}, "example6: `answer` must be 'True' or 'False', is 'true'"),
        ({"answer": True}, "example6: `answer` is missing or no str"),
        ({"query": None}, "example6: `query` is missing or no str"),
        ({"chain_of_thought": "Max is hot."}, "example6: `chain_of_thought` is missing or no list"),
        ({"chain_of_thought": ["x."] * 10}, "example6: `chain_of_thought` must be 11 sentences, has 10"),
        ({"chain_of_thought": ["x."] * 10 + [3]}, "example6: `chain_of_thought` must be 11 sentences"),
    ],
)
def test_bad_examples_are_named_by_their_key(broken, message, tmp_path):
    write(tmp_path / "raw.json", raw_of(6, **broken))
    with pytest.raises(ValueError) as error:
        prontoqa.main(
            ["--raw", str(tmp_path / "raw.json"), "--out", str(tmp_path / "o"), "--allow-any-size", "--sizes", *"411"]
        )
    assert str(error.value).startswith(f"{tmp_path / 'raw.json'}: {message}") and not (tmp_path / "o").exists()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"example1": 3}', '{"example1": {"in_context_example0": {}}}'])
def test_what_is_no_generators_file_is_refused(text, tmp_path):
    (tmp_path / "raw.json").write_text(text)
    done = run("--raw", tmp_path / "raw.json", "--out", tmp_path / "out")
    assert done.returncode == 2 and "raw.json: " in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- language

CLAIMS = [
    Claim(subject, word, of_all, is_a, holds)
    for of_all, subjects in ((True, ("impus", "vumpus")), (False, ("Max", "Eva")))
    for subject in subjects
    for is_a, words in ((True, ("numpus", "impus")), (False, ("hot", "medium-sized")))
    for word in words
    for holds in (True, False)
]


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_claims_come_back_from_their_sentences(claim):
    written = {write_claim(claim, random.Random(seed)) for seed in range(20)}
    assert len(written) == (3 if claim.of_all else 1)
    assert {read_claim(sentence) for sentence in written} == {claim}


@pytest.mark.parametrize(
    "sentence",
    ["max is hot.", "Each Max is hot.", "Max is a hot dog.", "Max is.", "Max is hot", "Max are hot. ", "vumpuses are hot."],
)
def test_what_is_no_sentence_is_refused(sentence):
    with pytest.raises(ValueError, match="is no sentence like"):
        read_claim(sentence)


# ---------------------------------------------------------------- generated problems


@pytest.fixture(scope="module")
def made() -> list[tuple[dict, prontoqa_checks.Problem]]:
    return prontoqa.generate(2000, 5, 3, "train", set())


def proved(example: dict) -> dict[str, int]:
    """{conclusion: rules it takes}, by applying every rule to everything, again and again; reads words, not claims."""
    word = r"(not )?(?:an? )?([a-z-]+)"
    rules = []
    for sentence in re.findall(r"[^.]+\.", example["question"]):
        sentence = sentence.strip()
        if match := re.fullmatch(rf"(?:Each|Every) (\w+) is {word}\.", sentence):
            rules.append((match[1], match[2] or "", match[3]))
        elif match := re.fullmatch(r"(\w+)es are (not )?([a-z-]+?)(es)?\.", sentence):
            rules.append((match[1].lower(), match[2] or "", match[3]))
    name = example["query"].split()[3]
    level = {match: 0 for match in re.findall(rf"{name} is an? (\w+)\.", example["question"])}
    for depth in range(1, 12):
        for subject, negation, claimed in rules:
            if level.get(subject) == depth - 1:
                level.setdefault(negation + claimed, depth)
    return level


def test_each_answer_follows_in_five_rules_and_its_opposite_never(made):
    for example, _ in made:
        asked = re.fullmatch(r"True or false: \w+ is ((?:not )?[a-z-]+)\.", example["query"])[1]
        positive = asked.removeprefix("not ")
        level = proved(example)
        assert (positive in level) != (f"not {positive}" in level), example
        assert level[positive if positive in level else f"not {positive}"] == 5
        assert example["answer"] == str(asked in level), example


def test_chains_are_of_the_question_and_of_the_official_form(made):
    for example, _ in made[:500]:
        chain, context = example["chain_of_thought"], re.findall(r"[^.]+\.", " " + example["question"])
        assert len(chain) == 11 and all(" " + sentence in context for sentence in [chain[0], *chain[1::2]])
        name = chain[0].split()[0]
        assert all(sentence.startswith(f"{name} is ") for sentence in chain[::2])
        assert context[-1].startswith(f" {name} is a") and context[-2].startswith(f" {name} is a")
        assert example["query"].removeprefix("True or false: ").replace(" not", "") == chain[-1].replace(" not", "")


def test_answers_signs_and_queries_are_independent_and_balanced(made):
    cells = Counter((e["answer"], " not " in e["query"], " not " in e["chain_of_thought"][-1]) for e, _ in made)
    assert cells == {
        ("True", False, False): 500,
        ("True", True, True): 500,
        ("False", False, True): 500,
        ("False", True, False): 500,
    }
    for start in range(0, 2000, 4):
        assert Counter(example["answer"] for example, _ in made[start : start + 4]) == {"True": 2, "False": 2}
    orders = Counter(tuple(example["answer"] for example, _ in made[start : start + 4]) for start in range(0, 2000, 4))
    assert len(orders) == 6 and max(orders.values()) < 500 / 6 * 1.5, "the place in the file tells nothing"


def test_the_property_has_a_rule_of_either_sign_and_no_blind_rule_helps(made):
    problems = [problem for _, problem in made]
    assert all({rule.holds for rule in problem.about_property} == {True, False} for problem in problems)
    found = baselines(problems)
    assert {name for name in found if name in prontoqa_checks.BLIND} == set(prontoqa_checks.BLIND)
    assert all(44.5 < found[name] < 55.5 for name in prontoqa_checks.BLIND), found
    assert found["search 4 rules deep"] == 50 and found["search 5 rules deep"] == 100
    assert shortcuts(problems) == []


def test_no_word_and_no_place_tells_the_answer(made):
    """Percent True where a word occurs, and where the counting rule stands; chance within five standard errors."""
    answers, places = defaultdict(list), []
    for example, problem in made:
        true = example["answer"] == "True"
        for word in {*re.findall(r"[\w-]+", example["question"])}:
            answers[word].append(true)
        counting = next(rule for rule in problem.about_property if rule.of(problem.query.subject) in problem.derived)
        places.append(problem.rules.index(counting) / (len(problem.rules) - 1))
    for word, seen in answers.items():
        assert abs(sum(seen) / len(seen) - 0.5) <= 2.5 / len(seen) ** 0.5, word
    assert abs(sum(places) / len(places) - 0.5) < 0.03, "the order of the rules is random"


def test_nothing_contradicts_itself_or_stands_twice(made):
    for _, problem in made:
        assert len({*problem.rules}) == len(problem.rules) and len({*problem.text}) == len(problem.text)
        traits = [rule.word for rule in problem.rules if not rule.is_a and rule.word != problem.query.word]
        families = [next(i for i, family in enumerate(prontoqa_ontology.PROPERTIES) if word in family) for word in traits]
        assert len({*families}) == len(families)
    assert len({problem.key for _, problem in made}) == len(made)


@pytest.mark.parametrize("hops", [2, 3, 15])
def test_other_numbers_of_hops(hops):
    for example, problem in prontoqa.generate(40, hops, 0, "valid", set()):
        assert len(example["chain_of_thought"]) == 2 * hops + 1
        assert problem.derived[read_claim(example["chain_of_thought"][-1])] == hops


def test_row_i_does_not_depend_on_how_many(made):
    assert [example for example, _ in prontoqa.generate(10, 5, 3, "train", set())] == [example for example, _ in made[:10]]


def test_a_problem_drawn_before_is_drawn_again(made):
    again = prontoqa.generate(10, 5, 3, "train", {problem.key for _, problem in made[:10]})
    assert not {problem.key for _, problem in again} & {problem.key for _, problem in made[:10]}


def test_the_same_problem_in_other_words_has_the_same_key():
    row = json.loads(ROW)
    other = json.loads(ROW)
    context, query = other["question"].split(" True or false: ")
    sentences = [sentence + "." for sentence in context[:-1].split(". ")]
    other["question"] = (
        " ".join(["Every lempus is not hot.", *sentences[:0:-1]]) + " True or false: " + query.replace("not ", "")
    )
    assert read_row(row).key == read_row(other).key
    other["question"] = other["question"].replace("shy", "sly")
    assert read_row(row).key != read_row(other).key


# ---------------------------------------------------------------- checks


def test_published_rows_are_sound_and_their_shortcut_is_found():
    problem = check_row(json.loads(ROW), hops=5)
    assert {name: percent for name, percent in baselines([problem]).items() if percent != 50} == {
        "answer is always True": 0,
        "query without `not` is True": 100,
        "first rule of the property": 0,
        "last rule of the property": 100,
        "concept with more rules": 100,
        "more concepts above": 100,
        "commoner sign of all rules": 100,
        "search 5 rules deep": 100,
    }
    assert "more concepts above: right in 100.0 % of 60 rows" in shortcuts([problem] * 60)
    check_row(json.loads(ROW), hops=5, rival=True)  # `Lempuses are not hot.`


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"False"}', '"True"}', "answer: it is False, not True"),
        ('"False"}', '"No"}', "answer: 'No' is neither"),
        ("Each worpus is hot. Each", "Each rompus is hot. Each", "the answer takes 4 rules, not 5"),
        ("Each worpus is hot. Each", "Each zumpus is hot. Each", "nothing follows about Max being hot"),
        ("Every brimpus is dull.", "Every brimpus is dull. Every brimpus is dull.", "is dull.' stands there twice"),
        ("Every brimpus is dull.", "Every brimpus is not hot.", "it follows that Max is (not )?hot, and that it is not"),
        ("Every brimpus is dull.", "Every brimpus eats.", "'Every brimpus eats.' is no sentence"),
        ("Every brimpus is dull.", "Every brimpus  is dull.", "is no sentence"),
        (" True or false: ", " Is it so that ", "no 'True or false:' in it"),
        ('"Max is a vumpus. Each', '"Max is a gorpus. Each', "brimpus.' does not apply where 'Max is a gorpus.'"),
        ('"Max is a vumpus. Each', '"Max is a rompus. Each', "they must begin with a fact about Max"),
        ('brimpus. Brimpuses are impuses."', 'brimpus. Every brimpus is an impus."', "is no rule of the question"),
        ('"Max is an impus. Every', '"Max is not an impus. Every', "'Brimpuses are impuses.' is not followed by what it gives"),
        (', "Max is hot."]', "]", "'Each worpus is hot.' is not followed by what it gives"),
        (' Each worpus is hot.", "Max is hot."]', '"]', "they end with 'Max is a worpus.', which does not answer"),
    ],
)  # fmt: skip
def test_check_rejects(old, new, message):
    assert ROW.count(old) == 1
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        check_row(json.loads(ROW.replace(old, new)), hops=5)


def test_a_rival_is_asked_for():
    with pytest.raises(ValueError, match="the only rules about being hot give the answer away"):
        check_row(json.loads(ROW.replace("Lempuses are not hot. ", "")), rival=True)


def test_a_circle_of_rules_ends():
    row = json.loads(ROW.replace("Every brimpus is dull.", "Every worpus is a brimpus."))
    assert check_row(row, hops=5).above("worpus") == 4


# ---------------------------------------------------------------- files


def test_same_seed_same_bytes_raw_file_and_sidecars(tmp_path):
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        raw = ["--raw-out", tmp_path / folder / "raw.json"]
        done = run("--generate", "--out", tmp_path / folder, "--sizes", 120, 20, 40, "--seed", seed, *raw)
        assert done.returncode == 0, done.stderr
    names = sorted(os.listdir(tmp_path / "a"))
    assert len(names) == 7 and all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    assert (tmp_path / "a/prontoqa_test.json").read_bytes() != (tmp_path / "c/prontoqa_test.json").read_bytes()
    assert "search 4 rules deep" in done.stdout and "prontoqa_valid.json: 20 rows" in done.stdout

    sidecar = json.loads((tmp_path / "a/prontoqa_valid.stats.json").read_text())
    assert sidecar["rows"] == 20 and sidecar["parameters"] == {"generator": "prontoqa", "hops": 5, "seed": 1, "split": "valid"}

    sizes = ["--allow-any-size", "--sizes", 120, 20, 40]
    assert run("--raw", tmp_path / "a/raw.json", "--out", tmp_path / "d", *sizes).returncode == 0
    for split in prontoqa.SPLITS:
        name = f"prontoqa_{split}.json"
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "d" / name).read_bytes()

    rows = [row for split in prontoqa.SPLITS for row in load_rows(tmp_path / f"a/prontoqa_{split}.json")]
    assert len({read_row(row).key for row in rows}) == 180, "no problem twice, in a split or in two"
    for row in rows:
        assert list(row) == ["question", "steps", "answer"] and len(row["steps"]) == 6
        assert extract_answer("\n".join([*row["steps"], "### " + row["answer"]])) == clean_answer(row["answer"])


def test_valid_and_test_rows_do_not_depend_on_the_training_split(tmp_path):
    for folder, size in (("a", 8), ("b", 30)):
        prontoqa.main(["--generate", "--out", str(tmp_path / folder), "--sizes", str(size), "8", "12"])
    for split in ("valid", "test"):
        name = f"prontoqa_{split}.json"
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_existing_files_are_kept_unless_forced(tmp_path):
    small = ["--out", tmp_path, "--sizes", 4, 4, 4]
    (tmp_path / "prontoqa_test.json").write_text("published")
    done = run("--generate", *small)
    assert done.returncode == 2 and "prontoqa_test.json exists; choose another --out or add --force" in done.stderr
    assert (tmp_path / "prontoqa_test.json").read_text() == "published" and len(os.listdir(tmp_path)) == 1
    assert run("--generate", *small, "--force").returncode == 0
    assert (tmp_path / "prontoqa_test.stats.json").exists()
    raw = write(tmp_path / "raw.json", raw_of(12))
    assert run("--raw", raw, "--allow-any-size", *small).returncode == 2
    assert run("--raw", raw, "--allow-any-size", *small, "--force").returncode == 0
    assert not list(tmp_path.glob("*.stats.json")), "those were of other rows"


def test_check_reads_both_kinds_of_file_and_names_a_bad_row(tmp_path, capsys):
    raw = write(tmp_path / "raw.json", raw_of(60))
    prontoqa.main(["--raw", str(raw), "--out", str(tmp_path), "--allow-any-size", "--sizes", "50", "5", "5"])
    for path in (raw, tmp_path / "prontoqa_train.json"):
        prontoqa.main(["--check", str(path)])
        shown = capsys.readouterr().out
        assert "sound rows, none twice" in shown and "note: a shallow rule tells the answer: more concepts above" in shown
    rows = load_rows(tmp_path / "prontoqa_train.json")
    for broken, message in (
        (rows[:3] + [rows[1]], "row 3 is the problem of row 1 again"),
        (rows[:3] + [rows[3] | {"answer": "True"}], "row 3: answer: it is False"),
        ([{"question": "x", "answer": "True"}], "row 0: no key 'steps'|row 0: question"),
        ([{"answer": "True", "steps": []}], "row 0: no key 'question'"),
    ):
        with pytest.raises(ValueError, match=f"bad.json: ({message})"):
            prontoqa.check_file(write(tmp_path / "bad.json", broken), 5)
    with pytest.raises(ValueError, match="raw.json: example2: answer: it is False"):
        prontoqa.check_file(write(raw, raw_of(2, answer="True")), 5)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--generate", "--hops", "1"], "hops: 1; from 2 to 15"),
        (["--generate", "--hops", "16"], "hops: 16; from 2 to 15"),
        (["--generate", "--sizes", "4", "0", "4"], "every split needs at least one row"),
        (["--check", "nowhere.json"], "nowhere.json"),
        ([], "one of the arguments --raw --generate --check is required"),
    ],
)
def test_mistakes_give_one_line_and_exit_2(args, message, tmp_path):
    done = run(*args, "--out", tmp_path / "out")
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out").exists()


def test_examples_that_can_be_guessed_are_not_written(tmp_path, monkeypatch):
    def telling(rng, hops, holds, answer):  # the answer's rule is always the first one
        example = draw_example(rng, hops, holds, answer)
        first = example["chain_of_thought"][-2]
        return example | {"question": f"{first} {example['question'].replace(first + ' ', '')}"}

    monkeypatch.setattr(prontoqa, "draw_example", telling)
    with pytest.raises(
        ValueError, match=r"test rows can be guessed \(first rule of the property: right in 100.0 % of 60 rows; last"
    ):
        prontoqa.main(["--generate", "--out", str(tmp_path), "--sizes", "60", "60", "60"])
    assert not os.listdir(tmp_path)
