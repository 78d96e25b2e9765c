"""The experiment on evaluation sets: what an answer is, pairs, sets that are refused, and the files it leaves."""

import json
import shutil
from fractions import Fraction

import numpy as np
import pytest
from ood_material import few_rows
from sets_material import as_module, as_script, assert_alike, lasting, sets_folder, write_set  # noqa: F401 - a fixture

from analysis import experiment as harness
from analysis.command import CheckFailed
from analysis.findings import Findings, Level, exact_match, set_level
from analysis.ood import EXPERIMENT, difference_of_means, kind_of, option_named, pairs_result, units, verify, writes_steps
from analysis.subject import Problems, Subject
from data.edge_pairs import UNBALANCED
from data.prosqa_graph import Graph
from data.prosqa_rows import RULES, check_row

SETS = ("test", "edge_pairs", "id_matched", "ood_4hop", "swap_official_test", "swap_pairs")
ROW = {"question": "", "answer": "Tom is a gorpus.", "steps": [], "root": 0, "target": 2, "neg_target": 3}
ROW |= {"idx_to_symbol": ["Tom", "Bob", "gorpus", "gwompus", "impus"]}


@pytest.fixture
def ood(tiny_runs, sets_folder, tmp_path, capsys, monkeypatch):  # noqa: F811
    """ood(*flags, key=model, data=folder): exit code, result (None where there is none), and what was printed."""
    harness.load_subject.cache_clear()
    monkeypatch.setattr(EXPERIMENT, "chunk", 5)

    def run(*flags, key="m3", data=sets_folder):
        argv = ["--checkpoint", str(tiny_runs[key]), "--data_dir", str(data), "--output_dir", str(tmp_path), *flags]
        code = EXPERIMENT.main(argv)
        path = tmp_path / "ood" / f"{key}_ood.json"
        return code, json.loads(path.read_text()) if path.is_file() else None, capsys.readouterr().err

    return run


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("output", "kind", "named"),
    [
        ("### Tom is a gorpus.", "target", "target"),
        ("Tom is a impus.\n### Tom is a gorpus.", "target", "target"),
        ("### Tom is a gwompus.", "wrong_option", "wrong_option"),
        ("### Tom is a impus.", "third_entity", "third_entity"),
        ("### Bob is a gorpus.", "third_entity", "target"),  # of somebody else
        ("### Tom is a gorpus", "third_entity", "target"),  # cut off: no exact match
        ("### Tom is a gorpus. ### Tom is a gwompus.", "wrong_option", "wrong_option"),
        ("### Tom is a gorpus or gwompus.", "third_entity", "third_entity"),
        ("### ", "third_entity", "third_entity"),
        ("Tom is a gorpus.", "no_hash", "no_hash"),
        ("", "no_hash", "no_hash"),
    ],
)
def test_kinds_of_answers(output, kind, named):
    assert (kind_of(ROW, output), option_named(ROW, output)) == (kind, named)


def test_steps_stand_before_the_answer():
    assert writes_steps("Tom is a impus.\n### Tom is a gorpus.") and writes_steps("Every impus is a gorpus.\n")
    assert not writes_steps("### Tom is a gorpus.") and not writes_steps("Tom impus. ### x")


# ---------------------------------------------------------------- pairs


def answered(row: dict, right: bool) -> tuple[dict, dict]:
    return row, {"two_choice_correct": right, "correct": right, "margin": 1.0 if right else -1.0}


def test_both_right_and_flipped():
    """Options trade places within a pair, so the choice changed where both members are right, or both wrong."""
    other = ROW | {"target": 3, "neg_target": 2}
    cases = [(True, True), (True, True), (True, False), (False, True), (False, False)]
    found = pairs_result([(answered(ROW, a), answered(other, b)) for a, b in cases])
    assert found["n_pairs"] == 5
    assert (found["both_right"]["correct"], found["flipped"]["correct"], found["both_right"]["n"]) == (2, 3, 5)
    loud = answered(ROW, True)[1] | {"correct": False}
    assert pairs_result([((ROW, loud), answered(other, True))])["both_right_exact_match"]["correct"] == 0


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_blind_to_the_edit_is_never_right_in_both(rule):
    """Of edge pairs: rules that ignore the person get both members right in none, bar the one that no edge can balance."""

    def by_rule(row: dict) -> tuple[dict, dict]:
        graph, names = Graph(len(row["idx_to_symbol"]), row["edges"]), row["idx_to_symbol"]
        options = sorted((row["target"], row["neg_target"]), key=lambda v: names[v])
        return answered(row, max(options, key=lambda v: RULES[rule](graph, v)) == row["target"])

    rows = few_rows("quickstart", "edge_pairs")
    found = pairs_result([(by_rule(a), by_rule(b)) for a, b in zip(rows[::2], rows[1::2])])
    assert found["both_right"]["accuracy"] == (1.0 if rule == UNBALANCED else 0.0)


def test_pairs_are_resampled_whole():
    """Rows that come twice tell no more than once: as pairs they get the interval of half as many rows."""
    once = [{"x": bool(i % 3)} for i in range(60)]
    twice = [record for record in once for _ in range(2)]
    single, paired = [{} for _ in once], [{"pair_id": i // 2} for i in range(120)]
    assert units("x", paired, twice).tolist() == units("x", single, once).tolist()
    mixed = units("x", [{"pair_id": 0}, {"pair_id": 0}, {"pair_id": 1}], [{"x": True}, {"x": False}, {"x": None}])
    assert mixed.tolist() == [0.5]
    narrow, wide = difference_of_means(np.tile(units("x", single, once), 2), np.zeros(9)), None
    wide = difference_of_means(units("x", paired, twice), np.zeros(9))
    assert narrow["value"] == wide["value"] == pytest.approx(2 / 3)
    width = [found["ci95"][1] - found["ci95"][0] for found in (narrow, wide)]
    assert width[1] / width[0] == pytest.approx(2**0.5, rel=0.15)
    assert wide["ci95"][0] == pytest.approx(2 / 3 - 1.96 * (2 / 9 / 60) ** 0.5, abs=0.02)


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("key", ["m0", "m1", "m3", "m4", "m4b", "m5"])
def test_every_model_on_every_set(ood, tiny_runs, sets_folder, tmp_path, key):  # noqa: F811
    """The numbers are those of answering the same prompts directly, and the whole text is kept."""
    code, found, _ = ood(key=key)
    assert code == 0 and tuple(found["sets"]) == SETS and found["thought_token_count_correct"] is True
    outputs = json.loads((tmp_path / "ood" / f"{key}_detailed_outputs.json").read_text())["sets"]
    subject = Subject.load(tiny_runs[key])
    for name, one in found["sets"].items():
        path = sets_folder / "prosqa_test.json" if name == "test" else sets_folder / "ood" / f"{name}.json"
        problems = Problems.read(path, subject.tokenizer)
        records = subject.answers(subject.prompts(problems))
        assert [row["full_text"] for row in outputs[name]] == [r["output"] for r in records]
        assert [row["question"] for row in outputs[name]] == [row["question"] for row in problems.rows]
        assert {row["n_latents"] for row in records} == {subject.n_thoughts}
        assert one["n"] == len(records) == sum(one["kinds"].values()) == sum(x["n"] for x in one["by_hops"].values())
        assert one["exact_match"]["correct"] == one["kinds"]["target"] == sum(r["correct"] for r in records)
        assert one["two_choice"]["correct"] == sum(r["two_choice_correct"] for r in records)
        assert one["margin"] == pytest.approx(np.mean([r["margin"] for r in records]), abs=1e-4)
        assert one["format_failure"]["correct"] == one["kinds"]["no_hash"] == sum("#" not in r["output"] for r in records)
        assert one["generated_tokens"] == np.mean([r["generated_tokens"] for r in records])
        assert list(one["by_hops"]) == sorted(one["by_hops"])
        assert "more persons above" in one["shortcut_baselines"]
    assert [name for name in SETS if "both_right" in found["sets"][name]] == ["edge_pairs", "swap_official_test", "swap_pairs"]
    assert found["sets"]["swap_official_test"]["n_pairs"] == 11, "with the test rows that they ask again"
    assert found["sets"]["edge_pairs"]["shortcut_baselines"][UNBALANCED] == 100
    assert "difference_to_id_matched" not in found["sets"]["id_matched"]
    gap = found["sets"]["ood_4hop"]["difference_to_id_matched"]
    levels = [found["sets"][name]["two_choice"]["accuracy"] for name in ("ood_4hop", "id_matched")]
    assert gap["value"] == pytest.approx(levels[0] - levels[1]) and gap["ci95"][0] <= gap["value"] <= gap["ci95"][1]


def test_gates_find_the_numbers(ood, tmp_path):
    """Findings reads the sets, and nothing else of the file that has an n."""
    _, found, _ = ood()
    findings = Findings([tmp_path])
    assert set(findings.sets("m3")) == set(SETS)
    correct = found["sets"]["test"]["exact_match"]["correct"]
    assert findings.accuracy("m3") == Level(Fraction(100 * correct, 12), 12)
    assert exact_match(findings.sets("m3")["ood_4hop"]).n == 12
    two_choice = set_level(findings.sets("m3")["ood_4hop"], "two_choice_accuracy", "two_choice")
    assert two_choice.percent == Fraction(100 * found["sets"]["ood_4hop"]["two_choice"]["correct"], 12)


def test_a_killed_run_goes_on(ood, tmp_path):
    """Half of the records and a torn line: what is there is not measured again, and the result is the same."""
    _, whole, _ = ood()
    lines = (tmp_path / "ood" / "m3_ood.jsonl").read_text().split("\n")
    records = [json.loads(line) for line in lines[1:40]]
    assert {record["part"] for record in records} >= {"test", "id_matched"}
    assert [record["idx"] for record in records if record["part"] == "id_matched"] == list(range(12))
    shutil.rmtree(tmp_path / "ood")
    (tmp_path / "ood").mkdir()
    records[3]["generated_tokens"] += 1200
    held = [lines[0], *map(json.dumps, records), lines[40][:50]]
    (tmp_path / "ood" / "m3_ood.jsonl").write_text("\n".join(held))
    _, again, _ = ood()
    assert again["sets"]["test"].pop("generated_tokens") == whole["sets"]["test"].pop("generated_tokens") + 100
    assert_alike(lasting(again), lasting(whole))


def test_numbers_of_thoughts(ood, tmp_path):
    code, found, _ = ood("--token_counts", "0,2,3", "--sets", "test,ood_4hop")
    assert code == 0 and list(found["sets"]) == ["test", "ood_4hop"]
    for one in found["sets"].values():
        counts = one["by_token_count"]
        assert [(c, x["extrapolated"]) for c, x in counts.items()] == [("0", False), ("2", False), ("3", True)]
        assert counts["2"]["exact_match"] == one["exact_match"] and counts["2"]["margin"] == one["margin"]
        assert len({x["margin"] for x in counts.values()}) == 3
    lines = (tmp_path / "ood" / "m3_ood.jsonl").read_text().splitlines()[1:]
    latents = {record["part"]: record["n_latents"] for record in map(json.loads, lines)}
    assert latents == {"test": 2, "ood_4hop": 2, "test@0": 0, "ood_4hop@0": 0, "test@3": 3, "ood_4hop@3": 3}
    code, found, _ = ood("--token_counts", "250", "--sets", "test")
    assert code == 0 and "exceed the model's 256 positions" in found["token_counts_skipped"]["250"]
    assert ood("--token_counts", "0,2", key="m1")[1]["sets"]["test"].get("by_token_count") is None


def test_a_wrong_number_of_thoughts_is_no_result(ood, tiny_runs, sets_folder, tmp_path):  # noqa: F811
    args = EXPERIMENT.parser().parse_args(["--checkpoint", "x", "--data_dir", str(sets_folder), "--sets", "test"])
    task = harness.Task(EXPERIMENT, args, Subject.load(tiny_runs["m3"]), tmp_path)
    records = [{"part": "test", "idx": i, **r} for i, r in enumerate(EXPERIMENT.measure(task, {}, "test", list(range(12))))]
    assert EXPERIMENT.summarize(task, {}, records)["sets"]["test"]["n"] == 12
    records[4]["n_latents"] = 1
    with pytest.raises(CheckFailed, match="1 thoughts in row 4 of test"):
        EXPERIMENT.summarize(task, {}, records)


# ---------------------------------------------------------------- sets that are refused


def broken_row(rows: list[dict]) -> list[dict]:
    return [*rows[:3], rows[3] | {"answer": rows[2]["answer"]}, *rows[4:]]


def one_sided(rows: list[dict]) -> list[dict]:
    """Only rows whose option named first is right."""
    named = [row["question"].split(" or ")[0].split()[-1] for row in rows]
    return [row for row, name in zip(rows, named) if row["idx_to_symbol"][row["target"]] == name]


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("id_matched", broken_row, "row 3: answer"),
        ("prosqa_test", broken_row, "row 3: answer"),
        ("id_matched", one_sided, "'first option': 100.0"),
        ("edge_pairs", lambda rows: rows[2:] + rows[:2], "members 0 and 1 of pair 0"),
        ("edge_pairs", lambda rows: rows[:-1], "are no pairs"),
        ("swap_pairs", lambda rows: [rows[0], rows[3] | {"pair_id": 0}, *rows[2:]], "swap_pairs.json: "),
        ("ood_4hop", None, "changed since"),
    ],
)
def test_a_broken_set_stops_everything(ood, sets_folder, tmp_path, name, change, reason):  # noqa: F811
    """Exit 1, the reason, no result; and no model ran before."""
    data = shutil.copytree(sets_folder, tmp_path / "broken")
    path = data / f"{name}.json" if name == "prosqa_test" else data / "ood" / f"{name}.json"
    rows, side = json.loads(path.read_text()), json.loads(path.with_suffix(".stats.json").read_text())
    if change is None:
        path.write_text(json.dumps(rows[:-2]))
    else:
        kept = {key: side[key] for key in ("pairs", "two_chain", "hops") if key in side}
        write_set(path.parent, name, rows, side.get("kind"))  # statistics of the sound rows
        path.write_text(json.dumps(change(rows)))
        new = json.loads(path.with_suffix(".stats.json").read_text()) | kept
        del new["sha256"]
        path.with_suffix(".stats.json").write_text(json.dumps(new))
    code, found, err = ood(data=data)
    assert code == 1 and found is None and reason in err and name in err
    folder = tmp_path / "ood"
    assert reason in json.loads((folder / "m3_ood.failed.json").read_text())["reason"]
    assert {p.name for p in folder.iterdir()} == {"m3_ood.failed.json", "results.json"}
    assert not (tmp_path / "self_checks").exists(), "nothing was asked of the model"


def test_other_files_may_have_shortcuts(ood, sets_folder, tmp_path):  # noqa: F811
    """A rule that solves the test file, or the rows made of it, is shown beside the accuracies."""
    data = shutil.copytree(sets_folder, tmp_path / "data")
    rows = json.loads((data / "prosqa_test.json").read_text())
    write_set(data, "prosqa_test", one_sided(rows))
    shutil.rmtree(data / "ood")
    code, found, _ = ood(data=data)
    assert code == 0 and found["sets"]["test"]["shortcut_baselines"]["first option"] == 100
    joint = json.loads((tmp_path / "ood" / "results.json").read_text())["verification"]
    assert joint["shortcuts_outside_45_to_55"]["test"]["first option"] == 100
    for row in one_sided(rows):
        check_row(row)


# ---------------------------------------------------------------- all models, and the command


def test_verification(ood):
    found = {key: ood(key=key)[1] for key in ("m1", "m3")}
    seen = verify(found)
    assert seen["m1_generates_cot"] is (found["m1"]["rows_with_steps"]["accuracy"] > 0.5)
    assert seen["same_files"] and seen["thought_token_count_correct"]
    assert seen["parser_accuracy"]["m3"] == found["m3"]["parser_accuracy"]["accuracy"]
    assert verify({"m3": found["m3"]})["m1_generates_cot"] is None
    for accuracy, passed in ((1.0, True), (0.95, False)):
        found["m1"]["rows_with_steps"]["accuracy"] = 0.9
        found["m3"]["parser_accuracy"]["accuracy"] = accuracy
        found["m1"]["parser_accuracy"]["accuracy"] = None
        assert verify(found)["passed"] is verify(found)["parser_accuracy_above_95"] is passed
    found["m3"]["parser_accuracy"]["accuracy"] = 1.0
    found["m1"]["sets"]["test"]["data"]["sha256"] = "of another file"
    assert verify(found)["same_files"] is False and verify(found)["passed"] is False


def test_unknown_sets_and_counts_are_mistakes(ood):
    code, found, err = ood("--sets", "test,ood_9hop")
    assert code == 2 and found is None and "ood_9hop" in err and "edge_pairs" in err
    assert ood("--token_counts", "two")[0] == 2 and "numbers of thoughts" in ood("--token_counts", "two")[2]
    assert ood("--token_counts", "-1")[0] == 2


def test_both_commands(tiny_runs, sets_folder, tmp_path, capsys):  # noqa: F811
    common = ["--data_dir", sets_folder, "--output_dir", tmp_path, "--sets", "swap_pairs"]
    done = as_script("ood", "--checkpoint", tiny_runs["m5"], *common)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "ood" / "m5_ood.json").read_text())["sets"]["swap_pairs"]["n_pairs"] == 6
    assert as_module("ood", "--checkpoint", tmp_path / "nowhere", *common) == 2
    assert capsys.readouterr().err.startswith("error: ")
