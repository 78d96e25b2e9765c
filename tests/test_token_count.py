"""Counts of thoughts: all of them are the clean model, other counts are other prompts, and the control moves nothing."""

import json
import shutil

import numpy as np
import pytest
import torch
from sets_material import as_module, as_script, assert_alike, lasting, sets_folder  # noqa: F401 - a fixture

from analysis import experiment as harness
from analysis.subject import Problems, Subject
from analysis.token_count import BARE, EXPERIMENT, control, counts_of, fewer_than_hops, joined, plateau, set_result


@pytest.fixture
def token_count(tiny_runs, sets_folder, tmp_path, capsys, monkeypatch):  # noqa: F811
    """token_count(*flags, key=model): exit code, result (None where there is none), and what was printed."""
    harness.load_subject.cache_clear()
    monkeypatch.setattr(EXPERIMENT, "chunk", 5)

    def run(*flags, key="m3"):
        argv = ["--checkpoint", str(tiny_runs[key]), "--data_dir", str(sets_folder), "--output_dir", str(tmp_path), *flags]
        code = EXPERIMENT.main(argv)
        path = tmp_path / "token_count" / f"{key}_token_count.json"
        return code, json.loads(path.read_text()) if path.is_file() else None, capsys.readouterr().err

    return run


def asked(subject: Subject, folder, n: int | None = None) -> Problems:
    return Problems.read(folder / "prosqa_test.json", subject.tokenizer, n)


# ---------------------------------------------------------------- counts and prompts


@pytest.mark.parametrize(
    ("n", "counts"),
    [(1, [0, 1, 2]), (2, [0, 1, 2, 3, 4]), (3, [0, 1, 2, 3, 4, 5, 6]), (6, [0, 1, 2, 3, 4, 5, 6, 8, 10, 12])],
)
def test_counts(n, counts):
    assert counts_of(n) == counts


def test_no_thoughts_and_no_markers_are_two_things(tiny_runs, sets_folder):  # noqa: F811
    subject = Subject.load(tiny_runs["m3"])
    problems = asked(subject, sets_folder, 3)
    none, bare = subject.prompts(problems, n_thoughts=0), subject.prompts(problems, n_thoughts=0, markers=False)
    for some, no in zip(none.tokens, bare.tokens):
        assert some.tolist() == [*no.tolist(), subject.ids.start, subject.ids.end]
        assert subject.ids.latent not in some
    three = joined([none, subject.prompts(problems, n_thoughts=1), bare])
    assert len(three) == 9 and three.numbers == [0, 1, 2] * 3
    assert (three.slots >= 0).sum(1).tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("key", ["m3", "m5"])
def test_the_control_moves_nothing(tiny_runs, sets_folder, key):  # noqa: F811
    """Condition c: the first c thoughts as in the clean model, the marker's embedding behind, and no token elsewhere."""
    subject = Subject.load(tiny_runs[key])
    prompts = subject.prompts(asked(subject, sets_folder, 4))
    clean, n = subject.thoughts(prompts), subject.n_thoughts
    edit = control(subject, prompts)
    filled = subject.thoughts(prompts.times(n), edit).view(4, n, n, -1)
    marker = subject.model.embedding.weight[subject.ids.end]
    for c in range(n):
        assert torch.allclose(filled[:, c, :c], clean[:, :c], atol=1e-5)
        assert torch.equal(filled[:, c, c:], marker.expand(4, n - c, -1))
    assert (filled[:, 0] - clean).abs().amax((1, 2)).min() > 1e-3
    assert edit.n_hit == 4 * n * (n + 1) // 2


@pytest.mark.parametrize("key", ["m3", "m4b", "m5"])
def test_all_thoughts_are_the_clean_answers(tiny_runs, sets_folder, tmp_path, key):  # noqa: F811
    subject = Subject.load(tiny_runs[key])
    args = EXPERIMENT.parser().parse_args(["--checkpoint", "x", "--data_dir", str(sets_folder)])
    task = harness.Task(EXPERIMENT, args, subject, tmp_path)
    ready = EXPERIMENT.prepare(task)
    assert ready == {"counts": [0, 1, 2, 3, 4], "skipped": {}}
    records = EXPERIMENT.measure(task, ready, "test", list(range(12)))
    problems = asked(subject, sets_folder)
    expected = {
        "2": subject.answers(subject.prompts(problems)),
        "0": subject.answers(subject.prompts(problems, n_thoughts=0)),
        "4": subject.answers(subject.prompts(problems, n_thoughts=4)),
        BARE: subject.answers(subject.prompts(problems, n_thoughts=0, markers=False)),
    }
    for name, answers in expected.items():
        mine = [record["counts"][name] for record in records]
        for field in ("correct", "two_choice_correct", "generated_tokens"):
            assert [x[field] for x in mine] == [x[field] for x in answers], (name, field)
        assert np.allclose([x["margin"] for x in mine], [x["margin"] for x in answers], atol=1e-4)
    margins = [[x["margin"] for x in answers] for answers in expected.values()]
    assert min(np.abs(np.subtract(a, b)).max() for i, a in enumerate(margins) for b in margins[:i]) > 1e-3
    edited = subject.answers(subject.prompts(problems).times(2), control(subject, subject.prompts(problems)))
    assert np.allclose([r["control"]["1"]["margin"] for r in records], [r["margin"] for r in edited[1::2]], atol=1e-4)


def test_counts_that_do_not_fit_are_skipped(tiny_runs, sets_folder, tmp_path):  # noqa: F811
    """With just enough positions for all thoughts those beyond are left out, with the reason; with fewer nothing goes."""
    subject = Subject.load(tiny_runs["m3"])
    args = EXPERIMENT.parser().parse_args(["--checkpoint", "x", "--data_dir", str(sets_folder)])
    task = harness.Task(EXPERIMENT, args, subject, tmp_path)
    sets = [task.sets["test"], task.sets["id_matched"]]
    longest = max(len(p.table.question[i]) + len(p.table.answer[i]) for p in sets for i in range(len(p)))
    config, was = subject.model.base_causallm.config, subject.model.base_causallm.config.max_position_embeddings
    try:
        config.max_position_embeddings = longest + 2 + 3
        ready = EXPERIMENT.prepare(task)
        assert ready["counts"] == [0, 1, 2, 3] and list(ready["skipped"]) == [4]
        assert ready["skipped"][4] == f"{longest + 6} tokens exceed the model's {longest + 5} positions"
        records = EXPERIMENT.measure(task, ready, "test", [0, 1])
        assert list(records[0]["counts"]) == ["0", "1", "2", "3", BARE] and records[0]["counts"]["3"]["margin"] is not None
        config.max_position_embeddings = longest + 2 + 1
        with pytest.raises(ValueError, match="with all 2 thoughts"):
            EXPERIMENT.prepare(task)
    finally:
        config.max_position_embeddings = was


# ---------------------------------------------------------------- numbers


def level(accuracy: float | None) -> dict:
    return {"accuracy": accuracy}


def test_the_plateau_begins_within_two_points_of_the_best():
    cells = {"0": 0.50, "1": 0.93, "2": 0.94, "3": 0.96, "4": 0.95, BARE: 0.99}
    assert plateau({c: level(x) for c, x in cells.items()}) == 2
    assert plateau({c: level(x) for c, x in (cells | {"4": 0.99}).items()}) == 4
    assert plateau({"0": level(None), BARE: level(1.0)}) is None


def record(correct: dict[int, bool]) -> dict:
    scores = {str(c): {"correct": x, "two_choice_correct": True, "margin": 1.0} for c, x in correct.items()}
    return {"counts": scores, "control": scores}


def test_loss_with_fewer_thoughts_than_hops():
    """Counts below a row's own steps against all thoughts: two rows of two steps, one of three, one of none that count."""
    records = [
        record({0: False, 1: False, 2: True, 3: True}),  # two steps: fewer are 0 and 1
        record({0: True, 1: False, 2: False, 3: True}),
        record({0: False, 1: False, 2: True, 3: True}),  # three steps: 0, 1, 2
    ]
    found = fewer_than_hops(records, np.array([2, 2, 3]), 3, "correct")
    assert found["mean"]["value"] == pytest.approx((1 + 0.5 + 2 / 3) / 3)
    assert found["one_fewer"]["value"] == pytest.approx((1 + 1 + 0) / 3)
    assert found["mean"]["n"] == 3 and found["mean"]["ci95"][0] <= found["mean"]["value"] <= found["mean"]["ci95"][1]
    assert fewer_than_hops(records, np.array([2, 2, 3]), 3, "two_choice_correct")["mean"]["value"] == 0
    deep = fewer_than_hops(records, np.array([9, 9, 9]), 3, "correct")
    assert deep["one_fewer"]["value"] == pytest.approx(1 / 3), "more steps than thoughts: all thoughts are left out of `fewer`"


def test_the_matrix_is_by_steps_and_count():
    records = [record({0: i > 1, 1: True}) for i in range(4)]
    found = set_result(records, np.array([2, 3, 3, 3]), 1)
    assert list(found["matrix"]) == ["2", "3", "all"] and list(found["matrix"]["2"]) == ["0", "1"]
    assert [found["matrix"][h]["0"]["exact_match"]["correct"] for h in ("2", "3", "all")] == [0, 2, 2]
    assert [cells["0"]["n"] for cells in found["matrix"].values()] == [1, 3, 4]
    assert found["plateau_at"] == {"2": 1, "3": 1, "all": 1} and found["plateau_at_two_choice"]["all"] == 0
    assert found["loss_with_fewer_than_hops"]["exact_match"]["mean"]["value"] == 0.5


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("key", ["m3", "m4b", "m5"])
def test_the_result_of_a_model(token_count, key):
    code, found, _ = token_count(key=key)
    assert code == 0 and list(found["sets"]) == ["test", "id_matched"]
    assert found["counts"] == [0, 1, 2, 3, 4] and found["extrapolated"] == [3, 4] and found["skipped"] == {}
    assert found["control_marker"] == "<|end-latent|>" and found["matrix"] == found["sets"]["test"]["matrix"]
    for one in found["sets"].values():
        assert list(one["matrix"]["all"]) == ["0", "1", "2", "3", "4", BARE] and list(one["control"]["all"]) == ["0", "1"]
        for cells in (one["matrix"], one["control"]):
            assert all(cell["n"] == 12 and cell["two_choice"]["n"] == 12 for cell in cells["all"].values())
            assert sum(cells[h]["0"]["exact_match"]["n"] for h in cells if h != "all") == 12
        assert set(one["plateau_at"]) == set(one["matrix"]) and set(one["plateau_at"].values()) <= {0, 1, 2, 3, 4}


def test_a_killed_run_goes_on(token_count, tmp_path):
    _, whole, _ = token_count()
    path = tmp_path / "token_count" / "m3_token_count.jsonl"
    lines = path.read_text().split("\n")
    shutil.rmtree(path.parent)
    path.parent.mkdir()
    records = [json.loads(line) for line in lines[1:16]]
    assert [r["idx"] for r in records if r["part"] == "test"] == list(range(12))
    records[0]["control"]["0"]["margin"] += 1200
    path.write_text("\n".join([lines[0], *map(json.dumps, records), lines[16][:90]]))
    _, again, _ = token_count()
    pairs = [found.pop("control")["all"]["0"]["margin"] for found in (again, whole)]
    assert pairs[0] == pytest.approx(pairs[1] + 100), "a row that is there is not measured again"
    for found in (again, whole):
        del found["sets"]["test"]["control"]
    assert_alike(lasting(again), lasting(whole))


def test_mistakes_and_both_commands(token_count, tiny_runs, sets_folder, tmp_path):  # noqa: F811
    code, found, err = token_count(key="m4")
    assert code == 2 and found is None and "is m4; analysis.token_count measures m3, m4b, m5" in err
    common = ["--data_dir", sets_folder, "--output_dir", tmp_path / "out", "--num_samples", 3]
    done = as_script("token_count", "--checkpoint", tiny_runs["m5"], *common)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "token_count" / "m5_token_count.json").read_text())
    assert found["matrix"]["all"]["0"]["n"] == 3
    assert as_module("token_count", "--checkpoint", tmp_path / "nowhere", *common) == 2


def test_a_broken_set_is_refused(token_count, sets_folder, tmp_path):  # noqa: F811
    data = shutil.copytree(sets_folder, tmp_path / "broken")
    rows = json.loads((data / "ood" / "id_matched.json").read_text())
    (data / "ood" / "id_matched.json").write_text(json.dumps(rows[1:]))
    code, found, err = token_count("--data_dir", str(data))
    assert code == 1 and found is None and "changed since" in err
