"""Generated problems with steps: answers against a second calculation, ranges, splits by key, check, files."""

import json
import os
import random
import re
import subprocess
import sys
from datetime import datetime, timedelta
from decimal import Decimal
from itertools import islice

import pytest
from conftest import ROOT

from backbones.characters import COCONUTTokenizer
from data import cot, cot_basic, cot_multistep
from data.cot_problems import check_row, check_steps, evaluate, two_places
from tokens import load_rows

BASIC, MULTI = cot_basic.CATEGORIES, cot_multistep.CATEGORIES
BOTH = BASIC | MULTI


@pytest.fixture(scope="module")
def sets() -> dict[str, list[dict]]:
    return {
        f"{kind} {split}": cot.make_rows(kind, n, split, 42)
        for kind in cot.KINDS
        for split, n in (("train", 600), ("valid", 140))
    }


def of(sets, name: str) -> list[dict]:
    return [row for rows in sets.values() for row in rows if row["category"] == name]


# ---------------------------------------------------------------------------------------------------- answers


def numbers_in(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def grade(question: str) -> str:
    a, b, c, score = numbers_in(question)
    return "A" if score >= a else "B" if score >= b else "C" if score >= c else "D"


def time(question: str) -> str:
    hour, _, *minutes = numbers_in(question)
    done = datetime(2000, 1, 1, hour) + timedelta(minutes=sum(minutes))
    return f"{done.hour}:{done.minute:02}"


def price(question: str) -> str:
    cents = numbers_in(question)[0] * 100
    for way, percent in re.findall(r"(up|down) (\d+)%", question):
        cents = (cents * (100 + (int(percent) if way == "up" else -int(percent))) + 50) // 100
    return f"{cents // 100}.{cents % 100:02}"


def left_over(question: str) -> int:
    budget, *items = numbers_in(question)
    return budget - sum(quantity * cost for quantity, cost in zip(items[::2], items[1::2]))


def boxes(question: str) -> int:
    return sum(int(n) * (-1 if way == "go out" else 1) for n, way in re.findall(r"(\d+) (boxes in|come in|go out)", question))


def next_score(question: str) -> int:
    *scores, target = numbers_in(question)
    return target * (len(scores) + 1) - sum(scores)


def member(question: str) -> int:
    first, second, n = numbers_in(question)
    return range(first, 1000, second - first)[n - 1]


AGAIN = {  # a second calculation, from the question's words alone
    "addition": lambda q: sum(numbers_in(q)),
    "multiplication": lambda q: numbers_in(q)[0] * numbers_in(q)[1],
    "sequence": member,
    "comparison": lambda q: max(numbers_in(q)),
    "shopping": left_over,
    "time": time,
    "distance": lambda q: sum(hours * speed for hours, speed in zip(numbers_in(q)[1::2], numbers_in(q)[2::2])),
    "inventory": boxes,
    "conditional": grade,
    "average": next_score,
    "percentage": price,
}


@pytest.mark.parametrize("name", BOTH)
def test_answers_are_right(sets, name):
    rows = of(sets, name)
    assert len(rows) >= 100
    for row in rows:
        assert row["answer"] == str(AGAIN[name](row["question"])), row
        assert re.search(rf"(?<!\d){re.escape(row['answer'])}\.$", row["steps"][-1]), "the last step's value"


@pytest.mark.parametrize("name", BOTH)
def test_numbers_come_back_from_the_question(name):
    category = BOTH[name]
    for numbers in islice(cot.problems(category, "train", 7), 50):
        assert category.read(category.text(numbers)[0]) == numbers
        assert category.read("What else?") is None


STEPS = {
    **{"addition": {3}, "multiplication": {3}, "comparison": {3}, "sequence": {4}},
    **{"shopping": {7, 9}, "time": {3, 4, 5}, "distance": {7, 9}, "inventory": {4, 5, 6}},
    **{"conditional": {3, 4, 5}, "average": {5}, "percentage": {5, 6}},
}


@pytest.mark.parametrize(
    "name, question",
    [
        ("shopping", "Anna has 9 dollars. She buys nothing. How many dollars does she have left?"),
        ("distance", "A bus goes in 3 parts: 1 h at 20 km per hour. How many km does it go in all?"),
        ("time", "Ben starts his day at 9:00. Without a pause he has fun. What time is it when he is done?"),
        ("inventory", "There are 9 boxes in a store room. Then all go. How many boxes are there in the end?"),
        ("average", "Dora has the scores none. Which score does she need next for an average of 80?"),
    ],
)
def test_a_question_that_only_looks_like_one_is_named(name, question):
    row = {"question": question, "steps": ["a", "b", "c"], "answer": "9", "category": name, "idx": 0}
    with pytest.raises(ValueError, match=f"^here: '.* is no {name} question"):
        check_row(row, "here", cot.EVERY_CATEGORY)


@pytest.mark.parametrize("name", BOTH)
def test_numbers_of_steps(sets, name):
    assert {len(row["steps"]) for row in of(sets, name)} == STEPS[name]


def test_lengths_fit_640_positions_of_characters(sets):
    tokenizer = COCONUTTokenizer()
    for name, least_mean, most_mean in (("basic train", 3.2, 3.3), ("multistep train", 5.5, 5.9)):
        rows = sets[name]
        assert least_mean < sum(len(row["steps"]) for row in rows) / len(rows) < most_mean
        for row in rows:
            text = " ".join([row["question"], *row["steps"], "### " + row["answer"]])
            ids = tokenizer.encode(text)  # raises on what is not printable ASCII
            assert tokenizer.decode(ids) == text and len(ids) < 600


def test_rounding_is_half_up_and_exact_after_each_change():
    assert MULTI["percentage"].text((106, (-25, -25)))[2] == "59.63"  # 59.625: to even would be 59.62
    assert str(two_places(Decimal("2.675"))) == "2.68", "a binary fraction would give 2.67"
    assert evaluate("247 - 3 * 2.5 + 10") == Decimal("249.5")


# ---------------------------------------------------------------------------------------------------- ranges


def drawn(name: str, n: int = 3000) -> list[tuple]:
    rng = random.Random(3)
    return [MULTI[name].draw(rng) for _ in range(n)]


def test_sizes_of_the_key_spaces():
    sizes = {name: len({c.problem_key(p) for p in c.space()}) for name, c in BOTH.items() if c.space is not None}
    expected = {"addition": 5050, "multiplication": 210, "sequence": 250, "comparison": 161700, "conditional": 1785}
    assert sizes == expected
    assert all(sizes[name] == sum(1 for _ in BOTH[name].space()) for name in sizes), "one problem a key"


def test_shopping_ranges():
    fruit, seen = (1, 5), {}
    for items, budget in drawn("shopping"):
        assert len(items) in (3, 4) and len({good for good, *_ in items}) == len(items)
        assert 5 <= budget - sum(cost * quantity for _, cost, quantity in items) <= 15
        for good, cost, quantity in items:
            assert 1 <= quantity <= 3
            seen.setdefault(good, set()).add(cost)
    ranges = {good: (min(costs), max(costs)) for good, costs in seen.items()}
    expected = {"apples": fruit, "oranges": fruit, "bananas": fruit, "cartons of milk": (2, 8), "loaves of bread": (2, 6)}
    assert ranges == expected


def test_time_ranges():
    problems, seen = drawn("time"), {}
    assert {hour for hour, _ in problems} == set(range(6, 11)) and {len(done) for _, done in problems} == {3, 4, 5}
    for _, done in problems:
        assert len({activity for activity, _ in done}) == len(done)
        for activity, minutes in done:
            seen.setdefault(activity, set()).add(minutes)
    assert sorted((min(m), max(m)) for m in seen.values()) == [(15, 45), (20, 60), (30, 60), (30, 90), (60, 180)]


def test_distance_ranges():
    problems = drawn("distance")
    assert {len(legs) for legs in problems} == {3, 4}
    assert {leg for legs in problems for leg in legs} == {(v, h) for v in (20, 30, 40, 50, 60) for h in (1, 2, 3)}


def test_the_store_room_is_never_short_of_boxes():
    problems = drawn("inventory", 20000)
    assert {start for start, _ in problems} == set(range(50, 201)) and {len(moves) for _, moves in problems} == {3, 4, 5}
    assert {move for _, moves in problems for move in moves} == {*range(10, 51), *range(-30, -4)}
    for start, moves in problems:
        stock = start
        for move in moves:
            stock += move
            assert stock >= 0


def test_average_ranges():
    problems = drawn("average", 6000)
    assert {target for target, _ in problems} == set(range(80, 96))
    assert {score for _, scores in problems for score in scores} == set(range(70, 101))
    needed = [cot_multistep.needed_score(*numbers) for numbers in problems]
    assert {len(scores) for _, scores in problems} == {3, 4, 5} and 0 <= min(needed) < 20 and 130 < max(needed) <= 150


def test_percentage_ranges():
    problems = drawn("percentage")
    assert {len(changes) for _, changes in problems} == {3, 4} and {start for start, _ in problems} <= set(range(100, 501))
    percents = {10, 15, 20, 25, 30}
    assert {change for _, changes in problems for change in changes} == percents | {-p for p in percents}


# ---------------------------------------------------------------------------------------------------- splits


def keys(rows: list[dict]) -> list[str]:
    return [check_row(row, "here", cot.EVERY_CATEGORY) for row in rows]


@pytest.mark.parametrize("kind", cot.KINDS)
def test_no_problem_twice_nor_in_both_splits_whatever_the_seeds(sets, kind):
    train = keys(sets[f"{kind} train"])
    assert len(set(train)) == len(train)
    for seed in (42, 43):
        valid = keys(cot.make_rows(kind, 140, "valid", seed))
        assert len(set(valid)) == 140 and not set(valid) & set(train)


@pytest.mark.parametrize("name, held_out", [("addition", 1010), ("multiplication", 42), ("sequence", 50), ("conditional", 357)])
def test_a_fifth_of_the_keys_is_kept_for_validation(name, held_out):
    valid, train = (list(cot.problems(BOTH[name], split, 0)) for split in ("valid", "train"))
    assert (len(valid), len(train)) == (held_out, 4 * held_out)
    category = BOTH[name]
    assert {category.problem_key(p) for p in valid} | {category.problem_key(p) for p in train} == {
        category.problem_key(p) for p in category.space()
    }


@pytest.mark.parametrize("name", ["shopping", "time", "distance", "inventory", "average", "percentage"])
def test_about_a_fifth_of_the_keys_that_cannot_be_listed(name):
    rng = random.Random(0)
    found = {MULTI[name].problem_key(MULTI[name].draw(rng)) for _ in range(2000)}
    assert 0.15 < sum(cot.place(key) < cot.HELD_OUT for key in found) / len(found) < 0.25


@pytest.mark.parametrize(
    "name, numbers, mirror",
    [
        ("addition", (3, 90), (90, 3)),
        ("multiplication", (3, 9), (9, 3)),
        ("comparison", (3, 9, 5), (9, 5, 3)),
        ("shopping", ((("apples", 2, 1), ("oranges", 3, 2)), 20), ((("oranges", 3, 2), ("apples", 2, 1)), 20)),
        ("time", (6, (("a walk", 20), ("breakfast", 30))), (6, (("breakfast", 30), ("a walk", 20)))),
        ("distance", ((20, 1), (30, 2)), ((30, 2), (20, 1))),
        ("inventory", (50, (10, -5)), (50, (-5, 10))),
        ("average", (80, (70, 90, 75)), (80, (90, 70, 75))),
        ("percentage", (100, (10, -20)), (100, (-20, 10))),
    ],
)
def test_mirrors_share_a_key(name, numbers, mirror):
    category = BOTH[name]
    assert category.problem_key(numbers) == category.problem_key(mirror)
    assert category.text(numbers)[0] != category.text(mirror)[0]
    others = {category.problem_key(other) for other in islice(cot.problems(category, "train", 0), 20)}
    assert len(others - {category.problem_key(numbers)}) >= 19


def test_operands_stand_in_either_order():
    for name in ("addition", "multiplication", "comparison"):
        problems = list(islice(cot.problems(BASIC[name], "train", 0), 100))
        assert 20 < sum(numbers[0] > numbers[1] for numbers in problems) < 80


def test_equal_shares_in_mixed_order_and_the_fields(sets):
    for name, rows in sets.items():
        kind = name.split()[0]
        counts = [len([row for row in rows if row["category"] == category]) for category in cot.KINDS[kind]]
        assert max(counts) - min(counts) <= 1 and sum(counts) == len(rows)
        last = "difficulty" if kind == "basic" else "n_steps"
        for i, row in enumerate(rows):
            assert list(row) == ["question", "steps", "answer", "category", "idx", last] and row["idx"] == i
            assert row[last] == (1 if kind == "basic" else len(row["steps"]))
        assert len({row["category"] for row in rows[:30]}) == len(cot.KINDS[kind])


def test_the_same_seed_gives_the_same_rows_and_another_seed_others():
    for kind in cot.KINDS:
        one, again, other = (cot.make_rows(kind, 50, "train", seed) for seed in (1, 1, 2))
        assert one == again != other


def test_the_others_make_up_for_categories_that_run_out(capsys):
    rows = cot.make_rows("basic", 1000, "train", 42)
    counts = {name: len([row for row in rows if row["category"] == name]) for name in BASIC}
    assert counts == {"addition": 316, "multiplication": 168, "sequence": 200, "comparison": 316}
    assert len(set(keys(rows))) == 1000
    said = capsys.readouterr().out
    assert "no more problems of multiplication (168 of 250), sequence (200 of 250); instead 66 addition, 66 comparison" in said
    cot.make_rows("basic", 600, "train", 42)
    assert capsys.readouterr().out == ""


def test_more_problems_than_there_are(monkeypatch):
    few = {name: BASIC[name] for name in ("multiplication", "sequence")}
    monkeypatch.setitem(cot.KINDS, "basic", few)
    assert len(cot.make_rows("basic", 92, "valid", 0)) == 92
    with pytest.raises(ValueError, match="93 basic problems for the valid split: there are only 92; ask for fewer"):
        cot.make_rows("basic", 93, "valid", 0)


def test_drawing_ends_where_there_is_nothing_new(monkeypatch):
    monkeypatch.setattr(cot, "MAX_MISSES", 50)
    one = MULTI["distance"]
    always = type(one)("distance", one.text, one.read, draw=lambda rng: ((20, 1), (30, 1), (20, 2)))
    assert sum(len(list(cot.problems(always, split, 0))) for split in cot.SPLITS) == 1


# ---------------------------------------------------------------------------------------------------- check


def damaged(**changes) -> dict:
    row = {"idx": 0, **cot.make_rows("multistep", 7, "train", 0)[0]}
    return row | {key: change(row[key]) if callable(change) else change for key, change in changes.items()}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"answer": lambda a: a + "1"}, "the answer is .*, not "),
        ({"steps": lambda s: s[::-1]}, "step"),
        ({"steps": lambda s: s[1:]}, "step"),
        ({"steps": lambda s: [*s[:-1], "So " + s[-1]]}, r"step \d is not the one that this question has"),
        ({"steps": lambda s: s[:2]}, "three steps or more"),
        ({"steps": lambda s: [s[0].replace(" ", "\u00d7"), *s[1:]]}, "printable ASCII"),
        ({"steps": lambda s: [1, *s]}, "printable ASCII"),
        ({"question": lambda q: q + " "}, "is no .* question"),
        ({"category": "riddle"}, "category 'riddle' is unknown; known: addition, "),
        ({"category": "addition"}, "is no addition question"),
        ({"n_steps": 1}, "`n_steps` is 1, but there are"),
        ({"steps": "one"}, "`steps` is missing or no list"),
        ({"answer": None}, "`answer` is missing or no str"),
    ],
)
def test_check_names_what_is_wrong(changes, message):
    check_row(damaged(), "f.json: row 0", cot.EVERY_CATEGORY)
    with pytest.raises(ValueError, match="^f.json: row 0: .*" + message):
        check_row(damaged(**changes), "f.json: row 0", cot.EVERY_CATEGORY)


@pytest.mark.parametrize(
    "step, message",
    [
        ("The apples cost 2 * 3 = 7.", "step 0: 2 \\* 3 is 6, not 7"),
        ("Sum: 1 + 2 + 30 = 34.", "is 33, not 34"),
        ("Up 15%: 10.10 * 1.15 = 11.61.", "is 11.6150, not 11.61"),
        ("It is 5.", "does not end with the answer, 15"),
        ("It is 115.", "does not end with the answer, 15"),
    ],
)
def test_equations_are_computed(step, message):
    with pytest.raises(ValueError, match=message):
        check_steps([step], "15", "here")
    check_steps(["2 * 3 = 6 km.", "Up: 10.10 * 1.15 = 11.62.", "20 - 5 = 15."], "15", "here")


def test_a_mirror_and_a_problem_of_the_other_file_are_found(capsys):
    rows = [{"idx": i, **row_of("addition", numbers)} for i, numbers in enumerate([(1, 2), (30, 4), (2, 1)])]
    with pytest.raises(ValueError, match="a: row 2 is the problem of a: row 0 again: 'What is 2 \\+ 1"):
        cot.check_rows({"a": rows})
    assert re.search(r"addition +3 +2 ", capsys.readouterr().out), "3 rows, 2 distinct"
    with pytest.raises(ValueError, match="b: row 0 is the problem of a: row 1 again"):
        cot.check_rows({"a": rows[:2], "b": [rows[1] | {"idx": 0}]})
    with pytest.raises(ValueError, match="a: row 0: `idx` is 1"):
        cot.check_rows({"a": rows[1:]})


def row_of(name: str, numbers) -> dict:
    question, steps, answer = BOTH[name].text(numbers)
    return {"question": question, "steps": steps, "answer": answer, "category": name}


def test_the_table():
    rows = [{"idx": i, **row_of("conditional", (score, 90, 80, 70))} for i, score in enumerate((95, 92, 85, 50))]
    header, line = cot.table(rows, keys(rows)).splitlines()
    assert line.split()[:3] == ["conditional", "4", "4"] and "3-5 (3.75)" in line and line.endswith("50.0")
    lengths = [len("\n".join([row["question"], *row["steps"], row["answer"]])) for row in rows]
    assert f"{min(lengths)}-{max(lengths)}" in line and header.split()[-1] == "%"


# ---------------------------------------------------------------------------------------------------- command line


def command(*args, cwd=ROOT, **env) -> subprocess.CompletedProcess:
    line = [sys.executable, str(ROOT / "data/cot.py"), *map(str, args)]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, check=False, env=os.environ | env)


def test_defaults(tmp_path):
    (tmp_path / "anthropic.py").write_text("raise SystemExit(9)")  # imported under --use_api only
    made = command(cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert made.returncode == 0, made.stderr
    path = tmp_path / "data/cot_training_data.json"
    rows = load_rows(path)
    assert len(rows) == 500 and {row["difficulty"] for row in rows} == {1} and path.read_bytes().isascii()
    assert [path.name for path in path.parent.iterdir()] == [path.name]
    assert rows == cot.make_rows("basic", 500, "train", 42)
    assert command("--use_api", cwd=tmp_path, PYTHONPATH=str(tmp_path)).returncode == 9


def test_files_of_both_splits_and_their_check(tmp_path):
    sizes = ["--kind", "multistep", "--n_samples", 85, "--val_samples", 15, "--seed", 5]
    for folder in ("a", "b"):
        made = command(*sizes, "--output", tmp_path / folder / "cot.json")
        assert made.returncode == 0, made.stderr
    files = [tmp_path / "a/cot.json", tmp_path / "a/cot_val.json"]
    assert [len(load_rows(path)) for path in files] == [85, 15]
    for path in files:
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    checked = command("--check", *files)
    assert checked.returncode == 0 and checked.stdout == made.stdout.replace("/b/", "/a/")
    named = command(*sizes, "--output", tmp_path / "c.json", "--val_output", tmp_path / "d.json")
    assert named.returncode == 0 and (tmp_path / "d.json").read_bytes() == files[1].read_bytes()
    rows = json.loads(files[1].read_text())
    rows[3]["answer"] = "0"
    files[1].write_text(json.dumps(rows))
    wrong = command("--check", *files)
    assert wrong.returncode == 2 and re.fullmatch(r"error: .*cot_val.json: row 3: the answer is .*, not 0\n", wrong.stderr)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--n_samples", "0"], "--n_samples 0: at least 1"),
        (["--val_samples", "-1"], "--val_samples -1: at least 1"),
        (["--val_output", "x.json"], "--val_samples 0: at least 1 for a validation file"),
        (["--output", "x.json", "--val_samples", "2", "--val_output", "x.json"], "--val_output x.json: that is the training"),
        (["--output", "."], ". is a folder; name a file"),
        (["--n_samples", "140000"], "140000 basic problems for the train split: there are only 133768"),
        (["--kind", "hard"], "argument --kind: invalid choice"),
        (["--check", "absent.json"], "absent.json"),
        (["--check", "torn.json"], "torn.json: no JSON"),
    ],
)
def test_mistakes_give_one_line_and_exit_2(args, message, tmp_path):
    (tmp_path / "torn.json").write_text('[{"question":')
    made = command(*args, cwd=tmp_path)
    assert made.returncode == 2 and made.stdout.count("Traceback") == 0
    assert made.stderr.startswith("error: ") and message in made.stderr and made.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["torn.json"]
