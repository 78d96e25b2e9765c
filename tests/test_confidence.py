"""Teacher-forced confidence: scores of whole species against slow loops, and paired comparisons that go by rank sums."""

import json
import shutil

import numpy as np
import pytest
from evaluate_material import character_tokenizer, slow_logits
from scipy.stats import wilcoxon
from sets_material import as_module, as_script, assert_alike, lasting, sets_folder  # noqa: F401 - a fixture
from tiny import build

from analysis import experiment as harness
from analysis.confidence import COMPARISONS, EXPERIMENT, compare, compare_rows, finished_rows, set_result
from analysis.subject import Problems, Prompts, Subject
from coconut import Coconut

SETS = ("test", "edge_pairs", "id_matched", "ood_4hop", "swap_official_test", "swap_pairs")


@pytest.fixture
def confidence(tiny_runs, sets_folder, tmp_path, capsys, monkeypatch):  # noqa: F811
    """confidence(*flags, key=model): exit code, result (None where there is none), and what was printed."""
    harness.load_subject.cache_clear()
    monkeypatch.setattr(EXPERIMENT, "chunk", 5)

    def run(*flags, key="m3"):
        argv = ["--checkpoint", str(tiny_runs[key]), "--data_dir", str(sets_folder), "--output_dir", str(tmp_path), *flags]
        code = EXPERIMENT.main(argv)
        path = tmp_path / "confidence" / f"{key}_confidence.json"
        return code, json.loads(path.read_text()) if path.is_file() else None, capsys.readouterr().err

    return run


# ---------------------------------------------------------------- scores


def slow_scores(model, prompt: list[int], row: dict, tokenizer) -> dict[str, float]:
    """One unpadded row, an uncached pass a thought, and the log-probabilities of all pieces behind `Name is a`, one by one."""
    names, found = row["idx_to_symbol"], {}
    for key in ("target", "neg_target"):
        pieces = tokenizer.encode(f"### {names[row['root']]} is a {names[row[key]]}.", add_special_tokens=False)
        tail = tokenizer.encode(f"### {names[row['root']]} is a ", add_special_tokens=False)
        n_name = next((i for i, (a, b) in enumerate(zip(pieces, tail)) if a != b), len(tail))
        logp = slow_logits(model, [*prompt, *pieces], len(prompt)).log_softmax(-1)
        each = [logp[len(prompt) + i - 1, piece].item() for i, piece in enumerate(pieces)]
        found[key], found["name"] = sum(each[n_name:]), sum(each[1:n_name])
    return found


@pytest.mark.parametrize("key", ["m0", "m3", "m4", "m4b", "m5"])
def test_scores_are_those_of_a_slow_computation(tiny_runs, sets_folder, key):  # noqa: F811
    subject = Subject.load(tiny_runs[key])
    subject.model.double()
    problems = Problems.read(sets_folder / "prosqa_test.json", subject.tokenizer, 5)
    prompts = subject.prompts(problems)
    for tokens, row, scores in zip(prompts.tokens, problems.rows, subject.scores(prompts)):
        slow = slow_scores(subject.model, tokens.tolist(), row, subject.tokenizer)
        assert scores["target_logp"] == pytest.approx(slow["target"], abs=1e-9)
        assert scores["wrong_logp"] == pytest.approx(slow["neg_target"], abs=1e-9)
        assert scores["name_logp"] == pytest.approx(slow["name"], abs=1e-9)
        assert scores["margin"] == pytest.approx(slow["target"] - slow["neg_target"], abs=1e-9)


def test_options_that_begin_alike_are_scored_whole():
    """One token a character: gorpus and gwompus share their `g`, which belongs to both species and not to the name."""
    tokenizer = character_tokenizer()
    base = build("gpt2", vocab=len(tokenizer), positions=160)
    subject = Subject("m0", "m0", 0, None, None, Coconut(base, None, None, None, 0, "none").eval(), tokenizer, None, None)
    row = {"question": "Tom is a impus. Is Tom a gorpus or gwompus?", "answer": "Tom is a gorpus.", "steps": [], "root": 0}
    row |= {"idx_to_symbol": ["Tom", "Bob", "gorpus", "gwompus", "impus"], "target": 2, "neg_target": 3}
    swapped = row | {"target": 3, "neg_target": 2}
    tokens = np.array(tokenizer.encode(row["question"] + "\n", add_special_tokens=False))
    both = subject.scores(Prompts([tokens, tokens], [row, swapped], [0, 1], None))
    for one, asked in zip(both, (row, swapped)):
        slow = slow_scores(subject.model, tokens.tolist(), asked, tokenizer)
        assert one["target_logp"] == pytest.approx(slow["target"], abs=1e-9)
        assert one["wrong_logp"] == pytest.approx(slow["neg_target"], abs=1e-9)
        assert one["name_logp"] == pytest.approx(slow["name"], abs=1e-9)
    assert both[0]["margin"] == pytest.approx(-both[1]["margin"], abs=1e-9)


def test_what_is_said_of_a_set():
    logp = np.log([0.9, 0.5, 0.1])
    rows = [
        {"target_logp": x, "wrong_logp": -3.0, "margin": x + 3, "name_logp": name, "two_choice_correct": x > -1}
        for x, name in zip(logp, (-0.01, -0.02, -4.0))
    ]
    found = set_result(rows)
    assert found["median_lp"] == pytest.approx(np.log(0.5)) and found["mean_lp"] == pytest.approx(logp.mean())
    assert found["prob_median"] == pytest.approx(0.5) and found["prob_mean"] == pytest.approx(0.5)
    assert found["two_choice"]["correct"] == 2 and found["wrong_prob"]["mean"] == pytest.approx(np.exp(-3))
    assert found["margin"]["median"] == pytest.approx(np.log(0.5) + 3)
    assert found["name_near_0"] and found["name_lp"] == {"median": -0.02, "mean": pytest.approx(-4.03 / 3), "least": -4.0}
    assert not set_result([row | {"name_logp": -0.2} for row in rows])["name_near_0"], "another prefix than in training"


# ---------------------------------------------------------------- comparisons


def rows_of(values: list[float], part: str = "test", first: int = 0, **more) -> list[dict]:
    return [
        {"part": part, "idx": i, "question_hash": f"q{i}", "target_logp": x, "margin": 2 * x, **more}
        for i, x in enumerate(values, first)
    ]


def test_the_direction_is_that_of_the_rank_sums():
    """Most rows speak for m5 by little, some for m3 by much: the median says m5, the ranks say m3."""
    m3 = rows_of([-0.1 - i / 1000 for i in range(11)] + [5.0 + i for i in range(9)])
    m5 = rows_of([0.0] * 20)
    found = compare_rows("m3", m3, "m5", m5)["test"]["target_logp"]
    assert found["median_diff"] < 0 < found["mean_diff"] and found["t_plus"] > found["t_minus"]
    assert (found["direction"], found["higher"]) == (1, "m3")
    assert found["rank_biserial"] == (found["t_plus"] - found["t_minus"]) / (found["t_plus"] + found["t_minus"])
    assert found["t_plus"] + found["t_minus"] == 20 * 21 / 2 and found["wilcoxon_stat"] == found["t_minus"] == 66
    assert found["p_value"] == wilcoxon([r["target_logp"] for r in m3]).pvalue
    turned = compare_rows("m5", m5, "m3", m3)["test"]["target_logp"]
    assert (turned["direction"], turned["higher"]) == (-1, "m3") and turned["p_value"] == found["p_value"]
    equal = compare_rows("m3", m3, "m5", m3)["test"]["margin"]
    assert (equal["direction"], equal["higher"], equal["p_value"], equal["n_zeros"]) == (0, None, None, 20)


def test_medians_means_and_probabilities_of_both():
    found = compare_rows("m3", rows_of([-1.0, -2.0, -6.0]), "m5", rows_of([-1.5, -1.0, -1.0]))["test"]
    logp, margin = found["target_logp"], found["margin"]
    assert (logp["m3_median_lp"], logp["m3_mean_lp"], logp["m5_median_lp"]) == (-2.0, -3.0, -1.0)
    assert logp["m3_prob_median"] == pytest.approx(np.exp(-2))
    assert margin["m3_median_margin"] == -4.0 and "m3_prob_median" not in margin
    assert logp["median_diff"] == -1.0 and logp["mean_diff"] == pytest.approx(-3 + 3.5 / 3)


def test_families_are_the_sets_of_a_comparison():
    rng = np.random.default_rng(0)
    a, b = ([row for i in range(4) for row in rows_of(list(rng.normal(size=30)), f"set {i}")] for _ in range(2))
    found = compare_rows("m3", a, "m5", b)
    assert list(found) == [f"set {i}" for i in range(4)]
    for tests in found.values():
        for test in tests.values():
            assert test["family_size"] == 4 and test["p_bonferroni"] == pytest.approx(min(1.0, 4 * test["p_value"]))


def test_only_the_same_rows_are_compared():
    """A row that one model has not, or has not scored, or of another question, is counted and left out."""
    m3, m5 = rows_of([1.0, 2.0, 3.0, 4.0, 5.0]), rows_of([0.5, 0.5, 0.5, 0.5])
    m5[1]["question_hash"], m5[2]["margin"] = "another", None
    found = compare_rows("m3", m3, "m5", m5)["test"]["target_logp"]
    assert (found["n"], found["n_rows"], found["unit"]) == (2, 2, "row")
    assert found["n_excluded"] == 4, "rows 1 (of both models), 2 and 4"
    assert found["mean_diff"] == pytest.approx((0.5 + 3.5) / 2)


def test_members_of_a_pair_are_one_unit():
    m3 = [row | {"pair_id": i // 2} for i, row in enumerate(rows_of([1.0, 3.0, 0.0, -2.0, 7.0, 7.0]))]
    m5 = [row | {"pair_id": i // 2} for i, row in enumerate(rows_of([0.0] * 6))]
    found = compare_rows("m3", m3, "m5", m5)["test"]["target_logp"]
    assert (found["n"], found["n_rows"], found["unit"]) == (3, 6, "pair")
    assert (found["t_plus"], found["t_minus"], found["median_diff"]) == (5.0, 1.0, 2.0)


def write_finished(folder, label: str, rows: list[dict], identity: str = "a", of_rows: str = "a") -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{label}_confidence.json").write_text(json.dumps({"identity": identity}))
    lines = [{"identity": of_rows}, *rows]
    (folder / f"{label}_confidence.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_repeats_meet_their_own(tmp_path):
    folder = tmp_path / "confidence"
    for label, shift in {"m3": 0, "m3-s1": 1, "m5": 2, "m4b-s1": 3, "m5-s2": 4, "m1": 5}.items():
        write_finished(folder, label, rows_of([shift + i / 7 for i in range(6)]))
    write_finished(folder, "m4b", rows_of([0.0] * 6), of_rows="of an older measurement")
    found = compare(folder)
    assert sorted(found) == ["m3-m4b-s1", "m3-m5"]
    assert found["m3-m5"]["test"]["target_logp"]["mean_diff"] == pytest.approx(-2)
    assert found["m3-m4b-s1"]["test"]["margin"]["mean_diff"] == pytest.approx(-4)
    assert ("m5", "m4b") in COMPARISONS and "m4b" not in finished_rows(folder)


# ---------------------------------------------------------------- whole runs


def test_all_models_and_their_comparisons(confidence, tiny_runs, sets_folder, tmp_path):  # noqa: F811
    for key in ("m0", "m3", "m4", "m4b", "m5"):
        code, found, _ = confidence(key=key)
        assert code == 0 and tuple(found["sets"]) == SETS
        subject = Subject.load(tiny_runs[key])
        problems = Problems.read(sets_folder / "ood" / "ood_4hop.json", subject.tokenizer)
        scores = subject.scores(subject.prompts(problems))
        one = found["sets"]["ood_4hop"]
        assert one["mean_lp"] == pytest.approx(np.mean([s["target_logp"] for s in scores]), abs=1e-5)
        assert one["margin"]["mean"] == pytest.approx(np.mean([s["margin"] for s in scores]), abs=1e-5)
    joint = json.loads((tmp_path / "confidence" / "results.json").read_text())["verification"]
    assert sorted(joint["comparisons"]) == sorted(f"{a}-{b}" for a, b in COMPARISONS)
    assert joint["comparisons"] == json.loads(json.dumps(compare(tmp_path / "confidence"))), "from the files alone"
    pairs = joint["comparisons"]["m3-m5"]["swap_pairs"]["margin"]
    assert (pairs["unit"], pairs["n"], pairs["n_rows"], pairs["family_size"]) == ("pair", 6, 12, len(SETS))
    assert joint["names_near_0"]["m5"]["test"] is found["sets"]["test"]["name_near_0"]


def test_a_killed_run_goes_on(confidence, tmp_path):
    _, whole, _ = confidence()
    path = tmp_path / "confidence" / "m3_confidence.jsonl"
    lines = path.read_text().split("\n")
    shutil.rmtree(tmp_path / "confidence")
    path.parent.mkdir()
    records = [json.loads(line) for line in lines[1:31]]
    assert [r["idx"] for r in records if r["part"] == "edge_pairs"] == list(range(12))
    records[0]["name_logp"] = -99.0
    path.write_text("\n".join([lines[0], *map(json.dumps, records), lines[31][:40]]))
    _, again, _ = confidence()
    assert again["sets"]["test"].pop("name_lp")["least"] == -99.0 > whole["sets"]["test"].pop("name_lp")["least"] - 99
    assert_alike(lasting(again), lasting(whole))


def test_mistakes_and_both_commands(confidence, tiny_runs, sets_folder, tmp_path):  # noqa: F811
    code, found, err = confidence(key="m1")
    assert code == 2 and found is None and "is m1; analysis.confidence measures m0, m3, m4, m4b, m5" in err
    common = ["--data_dir", sets_folder, "--output_dir", tmp_path / "out", "--sets", "id_matched"]
    done = as_script("confidence", "--checkpoint", tiny_runs["m4"], *common)
    assert done.returncode == 0, done.stderr
    assert list(json.loads((tmp_path / "out" / "confidence" / "m4_confidence.json").read_text())["sets"]) == ["id_matched"]
    assert as_module("confidence", "--checkpoint", tmp_path / "nowhere", *common) == 2
