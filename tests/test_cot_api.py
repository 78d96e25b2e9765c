"""Problems whose steps an API writes: what is kept of its replies, and what is generated in the place of the others."""

import json
import sys
from itertools import islice
from types import ModuleType, SimpleNamespace

import pytest

from data import cot, cot_api
from data.cot_problems import check_row
from tokens import load_rows


def keys(rows: list[dict]) -> list[str]:
    return [check_row(row, "here", cot.EVERY_CATEGORY) for row in rows]


def fake_anthropic(reply) -> ModuleType:
    """A stand-in for the package, whose `create` answers with reply(question)."""
    module = ModuleType("anthropic")
    module.AnthropicError = type("AnthropicError", (Exception,), {})
    asked = []

    def create(model, max_tokens, messages):
        question = messages[0]["content"].split("\n\n")[-1]
        asked.append((model, question))
        return SimpleNamespace(content=[SimpleNamespace(text=reply(question, module))])

    module.Anthropic = lambda: SimpleNamespace(messages=SimpleNamespace(create=create))
    module.asked = asked
    return module


def solved(question: str, module=None) -> str:
    for category in cot_api.CATEGORIES.values():
        if numbers := category.read(question):
            answer = category.text(numbers)[2]
            return "```json\n" + json.dumps({"steps": ["First.", "Then.", f"It is {answer}."], "answer": answer}) + "\n```"
    raise AssertionError(question)


@pytest.fixture
def api(monkeypatch):
    def install(reply=solved, key="k"):
        monkeypatch.setitem(sys.modules, "anthropic", fake_anthropic(reply) if reply else None)
        monkeypatch.setenv("ANTHROPIC_API_KEY", key)
        return sys.modules["anthropic"]

    return install


@pytest.mark.parametrize("reply, key, reason", [(None, "k", "pip install anthropic"), (solved, "", "ANTHROPIC_API_KEY")])
@pytest.mark.parametrize("kind", cot.KINDS)
def test_without_package_or_key_rows_are_generated(api, tmp_path, capsys, reply, key, reason, kind):
    api(reply, key)
    cot.main(["--n_samples", "30", "--output", str(tmp_path / "x.json"), "--use_api", "--kind", kind])
    assert reason in capsys.readouterr().out
    assert load_rows(tmp_path / "x.json") == cot.make_rows(kind, 30, "train", 42)


def test_steps_from_the_api(api, tmp_path, capsys):
    package = api()
    out = ["--n_samples", "40", "--val_samples", "8", "--output", str(tmp_path / "x.json")]
    cot.main([*out, "--use_api", "--api_model", "some-model"])
    assert "note:" not in capsys.readouterr().out and {model for model, _ in package.asked} == {"some-model"}
    train, valid = (load_rows(tmp_path / name) for name in ("x.json", "x_val.json"))
    assert sorted(question for _, question in package.asked) == sorted(row["question"] for row in train + valid)
    assert {name: len([r for r in train if r["category"] == name]) for name in cot_api.TEMPLATES} == dict.fromkeys(
        cot_api.TEMPLATES, 10
    )
    assert {row["difficulty"] for row in train} == {1, 2, 3} and not set(keys(train)) & set(keys(valid))
    assert all(row["steps"][-1] == f"It is {row['answer']}." for row in train)


def test_replies_with_another_answer_or_form_are_left_out(api, tmp_path):
    turns = iter(range(10**6))

    def sometimes(question, module):
        good = solved(question)
        value = json.loads(good[7:-3])
        bad = [
            json.dumps(value | {"answer": value["answer"] + "0"}),
            json.dumps(value | {"steps": ["Tr\u00e8s vite.", "a", "b"]}),
            json.dumps(value | {"steps": ["Short."]}),
            json.dumps(value | {"steps": "no list"}),
            json.dumps({"answer": value["answer"]}),
            "I would rather not.",
            "[1]",
        ]
        turn = next(turns) % (len(bad) + 1)
        return good if turn == len(bad) else bad[turn]

    api(sometimes)
    cot.main(["--n_samples", "8", "--output", str(tmp_path / "x.json"), "--use_api"])
    rows = load_rows(tmp_path / "x.json")
    assert {row["category"] for row in rows} == set(cot_api.TEMPLATES) and next(turns) == 64


@pytest.mark.parametrize("kind", cot.KINDS)
def test_what_a_failing_api_does_not_give_is_generated(api, tmp_path, capsys, kind):
    turns = iter(range(10**6))

    def until_five(question, module):
        if next(turns) >= 5:
            raise module.AnthropicError("over\nloaded")
        return solved(question)

    api(until_five)
    cot.main(["--n_samples", "25", "--output", str(tmp_path / "x.json"), "--use_api", "--kind", kind])
    rows = load_rows(tmp_path / "x.json")
    assert len([row for row in rows if row["category"] in cot_api.CATEGORIES]) == 5 and len(rows) == 25
    assert next(turns) == 6, "nothing more is asked"
    assert "note: train: 5 rows from the API (over loaded); 20 are generated" in capsys.readouterr().out
    cot.main(["--check", str(tmp_path / "x.json")])


def test_an_api_that_is_always_wrong_is_given_up(api, tmp_path, capsys):
    package = api(lambda question, module: "42")
    cot.main(["--n_samples", "4", "--output", str(tmp_path / "x.json"), "--use_api"])
    assert "0 rows from the API (20 replies in a row could not be used)" in capsys.readouterr().out
    assert len(package.asked) == 20 and len(load_rows(tmp_path / "x.json")) == 4


def test_templates_are_told_apart_and_their_answers_come_back():
    assert [len(templates) for templates in cot_api.TEMPLATES.values()] == [5, 5, 5, 5]
    for name, category in cot_api.CATEGORIES.items():
        for numbers in islice(cot.problems(category, "train", 1), 60):
            question = category.text(numbers)[0]
            assert [other for other, c in cot_api.CATEGORIES.items() if c.read(question)] == [name]
            assert category.read(question) == numbers and question.isascii()
    answers = {"What is 2 + 3 * 4?": "14", "Solve for x: x / 2 = 3 + 4.": "14", "Solve for x: x + 9 = 3 + 4.": "-2"}
    for question, answer in answers.items():
        category = cot_api.CATEGORIES["arithmetic" if "What" in question else "algebra"]
        assert category.text(category.read(question))[2] == answer
