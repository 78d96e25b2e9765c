"""The command that takes thoughts away: one JSON with equal targets, changes against their formulas, picture, exit codes."""

import json
import math

import numpy as np
import pytest
from scoring_material import train_runs, with_other_letters

from analysis import latent_ablation
from analysis.command import CheckFailed
from analysis.latent_ablation import compared, main
from analysis.scoring import CONDITIONS, Scores, score, summary
from analysis.subject import Problems, Subject


@pytest.fixture(scope="module")
def runs(tmp_path_factory, own_cache):
    return train_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def folder(runs, tmp_path_factory):
    """Where the command has written about three runs, at all stages."""
    folder = tmp_path_factory.mktemp("out")
    command = ["--checkpoint", *(str(runs[name]) for name in ("abc", "pause", "cot")), "--data", str(runs["data"])]
    assert main([*command, "--stage", "all", "--output", str(folder / "new/ablation.json")]) == 0
    return folder / "new"


@pytest.fixture(scope="module")
def result(folder) -> dict:
    return json.loads((folder / "ablation.json").read_text())


# ---------------------------------------------------------------- what is written


def test_all_conditions_are_about_the_same_tokens(result):
    assert [stage["stage"] for stage in result["stages"]] == [0, 1, 2]
    assert list(result["stages"][0]["conditions"]) == ["on"] and "nothing to take away" in result["stages"][0]["note"]
    hashes = set()
    for stage in result["stages"][1:]:
        conditions = stage["conditions"]
        assert tuple(conditions) == CONDITIONS
        for key in ("n_tokens", "n_samples", "sha256", "answer_n_tokens", "answer_sha256"):
            assert len({str(found[key]) for found in conditions.values()}) == 1, key
        assert conditions["on"]["n_samples"] == result["data"]["n"] == 10
        assert all(model["answer_sha256"] == conditions["on"]["answer_sha256"] for model in stage["other_models"])
        hashes.add(conditions["on"]["sha256"])
    assert len(hashes) == 2, "stages have other tokens"


def test_numbers_are_those_of_scoring(result, runs):
    subject = Subject.load(runs["abc"])
    problems = Problems.read(runs["data"], subject.tokenizer)
    for condition in ("on", "hidden"):
        found = summary(score(subject, problems, 2, condition))
        assert {key: result["stages"][2]["conditions"][condition][key] for key in found} == found


def test_loss_and_perplexity_change_under_their_own_names(result):
    for stage in result["stages"][1:]:
        on = stage["conditions"]["on"]
        for found in [stage["conditions"][name] for name in CONDITIONS[1:]] + stage["other_models"]:
            for scope, prefix in (("all", ""), ("answer", "answer_")):
                against = found["against_on"].get(scope)
                if against is None:
                    continue
                loss, perplexity = against["loss_change"], against["perplexity_change"]
                assert loss["value"] == pytest.approx(found[f"{prefix}loss"] / on[f"{prefix}loss"] - 1, abs=1e-9)
                wanted = found[f"{prefix}perplexity"] / on[f"{prefix}perplexity"] - 1
                assert perplexity["value"] == pytest.approx(wanted, abs=1e-9)
                assert all(x["ci95"][0] <= x["value"] <= x["ci95"][1] for x in (loss, perplexity))
            assert found["against_on"]["exact_match"]["n"] == 10


def test_other_models_are_compared_on_answers_alone(result):
    others = result["stages"][2]["other_models"]
    assert [model["name"] for model in others] == ["pause", "cot"]
    assert [model["feedback_mode"] for model in others] == ["pause_curriculum", "none"]
    assert all("all" not in model["against_on"] and "another model" in model["label"] for model in others)


def test_it_says_what_it_does_not_show(result, folder):
    assert "reliance only" in result["notes"]["off"] and "one pass as in many" in result["notes"]["inert"]
    assert (folder / "ablation.png").stat().st_size > 5000 and "no_slots" in (folder / "ablation.svg").read_text()
    assert sorted(path.name for path in folder.iterdir()) == ["ablation.json", "ablation.png", "ablation.svg"]


def test_a_table_is_printed(runs, tmp_path, capsys):
    command = ["--checkpoint", str(runs["abc"]), "--data", str(runs["data"]), "--output", str(tmp_path / "x.json")]
    assert main([*command, "--no_exact_match", "--num_samples", "4"]) == 0
    said = capsys.readouterr().out
    rows = [line for line in said.splitlines() if line.startswith(("| on ", "| inert ", "| swapped "))]
    assert len(rows) == 6 and "Stage 2" in said and "Answers alone" in said
    result = json.loads((tmp_path / "x.json").read_text())
    (stage,) = result["stages"]
    assert stage["stage"] == 2 and result["data"]["n"] == 4, "the last stage where none is named"
    assert all(found["exact_match"] is None for found in stage["conditions"].values())
    assert stage["conditions"]["inert"]["against_on"]["exact_match"] is None


# ---------------------------------------------------------------- comparing


def scores(losses, right, tokens=(2, 2, 4), sha: str = "a") -> Scores:
    records = [
        {"n_tokens": n, "loss": x, "answer_tokens": n, "answer_loss": x, "correct": ok}
        for n, x, ok in zip(tokens, losses, right)
    ]
    return Scores("x", 1, "on", records, sha, sha)


def test_changes_of_known_numbers():
    on, off = scores([2.0, 2.0, 4.0], [True, True, False]), scores([3.0, 3.0, 6.0], [False, False, False])
    found = compared(on, off)
    assert found["all"]["loss_change"]["value"] == pytest.approx(0.5)
    np.testing.assert_allclose(found["all"]["loss_change"]["ci95"], [0.5, 0.5], atol=1e-12)  # each problem's ratio is 1.5
    assert found["all"]["perplexity_change"]["value"] == pytest.approx(math.exp(0.5) - 1)
    assert (found["exact_match"]["b"], found["exact_match"]["c"], found["exact_match"]["p_value"]) == (2, 0, 0.5)


def test_pairs_stay_together():
    """Problems differ a thousandfold, their changes do not: an interval that did not resample pairs would be wide."""
    generator = np.random.default_rng(0)
    losses = 10 ** generator.uniform(-1, 2, 40)
    right, tokens = [True] * 40, [3] * 40
    changes = generator.uniform(1.09, 1.11, 40)
    low, high = compared(scores(losses, right, tokens), scores(losses * changes, right, tokens))["all"]["loss_change"]["ci95"]
    assert 0.09 < low < high < 0.11


def test_other_targets_are_not_compared():
    with pytest.raises(CheckFailed):
        compared(scores([1.0] * 3, [True] * 3), scores([1.0] * 3, [True] * 3, sha="b"))


# ---------------------------------------------------------------- exit codes


def test_other_targets_end_it(runs, tmp_path, capsys):
    """A checkpoint whose tokenizer numbers letters otherwise: as many tokens, another hash."""
    other = with_other_letters(runs["pause"], tmp_path)
    output = tmp_path / "x.json"
    command = ["--checkpoint", str(runs["abc"]), str(other), "--data", str(runs["data"]), "--output", str(output)]
    assert main([*command, "--no_exact_match"]) == 1
    error = capsys.readouterr().err
    assert "error: not the same answer targets: abc/checkpoint_3" in error and "other/checkpoint_3" in error
    assert not output.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--checkpoint": "nothing"}, "no checkpoint at"),
        ({"--checkpoint": "cot"}, "no thoughts to take away"),
        ({"--data": "nothing.json"}, "does not exist"),
        ({"--stage": "3"}, "0 to 2"),
        ({"--stage": "last"}, "must be all, or a stage"),
        ({"--num_samples": "0"}, "must be at least 1"),
        ({"--output": "x.png"}, "must end in .json"),
        ({"--num_samples": "3"}, "is the only one with"),
    ],
)
def test_mistakes_are_one_line(runs, tmp_path, capsys, changes, words):
    values = {"--checkpoint": runs["abc"], "--data": runs["data"], "--stage": "2", "--output": tmp_path / "x.json"}
    for key, value in changes.items():
        values[key] = runs.get(value, tmp_path / value if key in ("--data", "--output", "--checkpoint") else value)
    assert latent_ablation.main([str(word) for pair in values.items() for word in pair]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in errors if line.startswith("error: ")]) == 1 and words in errors[-1]
    assert not (tmp_path / "x.json").exists()
