"""Gate 5's experiment: m1's own steps in front of the answer, fixed criteria, and no file where the instrument is broken."""

import json
import shutil

import pytest
from tracing_material import rows_it_gets_right, states_of_another_run

from analysis import causal_sanity, tracing
from analysis.experiment import load_subject
from analysis.findings import Findings
from analysis.gate_rules import Study, gate_5
from analysis.interventions import NOWHERE
from analysis.subject import Problems, Subject

FIELDS = """mean_ce ce_ci95 n_traced n_skipped n_wrong_answer max_positions position_counts peak_layer peak_position peak_ce
ce_above_03_fraction clean_gt_corrupt_fraction ce_in_range_fraction epsilon_sensitivity_pct mean_denominator noise_std
elapsed_seconds total_effect n n_excluded""".split()
N = 80


@pytest.fixture(scope="module")
def file(tiny_runs, tmp_path_factory):
    return rows_it_gets_right(tiny_runs["m1"], tmp_path_factory.mktemp("rows"), N)


@pytest.fixture
def main(file, tiny_runs, tmp_path):
    """main(*flags, run=...) -> exit code."""
    load_subject.cache_clear()

    def call(*more, run=tiny_runs["m1"]):
        flags = ["--checkpoint", str(run), "--data", str(file), "--output_dir", str(tmp_path), "--device", "cpu"]
        return causal_sanity.EXPERIMENT.main([*flags, *more])

    return call


def read(tmp_path, name="m1_causal_sanity.json"):
    return json.loads((tmp_path / "causal_sanity" / name).read_text())


# ---------------------------------------------------------------- the experiment


def test_result_and_gate_file(main, tmp_path):
    assert main() == 0
    found, judged = read(tmp_path), read(tmp_path, causal_sanity.RESULT)
    assert set(FIELDS) <= found.keys()
    assert found["n_traced"] > 0 and found["n_excluded"]["skipped_no_steps"] == found["n_skipped"] > 0
    assert found["n"] + sum(found["n_excluded"].values()) == N
    gates = found["tracing_gates"]["steps"]
    assert gates["n"] == found["n_traced"] and max(gates["away_nats"].values()) <= gates["allowed_nats"]
    assert judged["passed"] is False and judged["criteria"]["n_traced"]["value"] == found["n_traced"] < 50
    assert judged["elapsed_seconds"] > 0 and judged["total_effect"] == found["total_effect"]
    results = read(tmp_path, "results.json")
    assert results["m1"] == found and results["verification"] == {"passed": {"m1": False}}


def test_a_restart_continues_to_the_same_result(main, tmp_path):
    assert main() == 0
    before, path = read(tmp_path), tmp_path / "causal_sanity" / "m1_causal_sanity.jsonl"
    (tmp_path / "causal_sanity" / "m1_causal_sanity.json").unlink()
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: N // 2]))
    assert main() == 0
    moving = ("elapsed_seconds", "measured_seconds", "versions")
    assert {k: v for k, v in read(tmp_path).items() if k not in moving} == {k: v for k, v in before.items() if k not in moving}


def test_the_steps_are_corrupted_and_nothing_else(tiny_runs, file):
    """Tokens of the model's own text from the end of the question up to the first `#`, wherever a row's prompt ends."""
    subject = Subject.load(tiny_runs["m1"], device="cpu")
    problems = Problems.read(file, subject.tokenizer)
    traced = tracing.rows_to_trace(subject, problems, 6)
    prompts = traced.asked.prompts
    said = subject.answers(subject.prompts(problems, prompts.numbers))
    assert len(prompts) == 6 and len({len(steps) for steps in traced.steps}) > 1
    for row, tokens, steps, prefix, record in zip(prompts.rows, prompts.tokens, traced.steps, traced.prefix, said):
        assert record["correct"] and "#" in record["output"]
        assert subject.tokenizer.decode(tokens[steps]) == subject.tokenizer.decode(
            subject.tokenizer.encode(record["output"].split("#")[0], add_special_tokens=False)
        )
        assert subject.tokenizer.decode(tokens[: steps[0]]).strip() == row["question"]
        assert subject.tokenizer.decode(tokens[prefix]) == f"### {row['idx_to_symbol'][row['root']]}"
        assert [*steps, *prefix] == list(range(steps[0], len(tokens)))
    later = [n for n, what in traced.status.items() if n > prompts.numbers[-1]]
    assert all(traced.status[n] == "not_reached" for n in later) and later


def test_a_broken_instrument_leaves_no_result(main, tmp_path, monkeypatch, capsys):
    assert main() == 0
    monkeypatch.setattr(tracing.Chunk, "restore", states_of_another_run)
    assert main("--force") == 1
    assert "check failed" in capsys.readouterr().err
    folder = tmp_path / "causal_sanity"
    assert not (folder / "m1_causal_sanity.json").exists() and not (folder / causal_sanity.RESULT).exists()
    assert "steps: all positions" in read(tmp_path, "m1_causal_sanity.failed.json")["reason"]


def test_the_first_repeat_decides(main, tiny_runs, tmp_path):
    """Whatever the order in which repeats are measured."""
    again = tmp_path / "runs" / "m1_cot-s1"
    shutil.copytree(tiny_runs["m1"], again)
    assert main(run=again) == 0 and read(tmp_path, causal_sanity.RESULT)["model"] == "m1-s1"
    assert main() == 0 and read(tmp_path, causal_sanity.RESULT)["model"] == "m1"
    assert main(run=again) == 0 and read(tmp_path, causal_sanity.RESULT)["model"] == "m1"


def test_long_steps_are_thinned_to_twenty(tiny_runs, file, monkeypatch):
    subject = Subject.load(tiny_runs["m1"], device="cpu")
    problems = Problems.read(file, subject.tokenizer)
    monkeypatch.setattr(Subject, "own_steps", lambda self, prompts: [list(range(5, 46))] * len(prompts))
    traced = tracing.rows_to_trace(subject, problems, 3)
    critical = [[steps[i] for i in tracing.thin(len(steps), causal_sanity.MAX_POSITIONS)] for steps in traced.steps]
    group = tracing.Group.of("steps", traced.asked, {"step token": critical}, causal_sanity.MAX_POSITIONS)
    assert group.place_RK.shape == (3, 20) and (group.place_RK != NOWHERE).all()
    assert [places[0] for places in group.place_RK.tolist()] == [steps[0] for steps in traced.steps]
    assert [places[-1] for places in group.place_RK.tolist()] == [steps[-1] for steps in traced.steps]
    record = tracing.trace(subject, group, [0], 0)[0]
    assert record["n_positions"] == 20 and None not in record["restored"]


# ---------------------------------------------------------------- the criteria


def judged(**changes) -> dict:
    """The verdict on a result that passes everything, but for `changes`."""
    copied = (
        "feedback_mode",
        "checkpoint",
        "command",
        "versions",
        "data",
        "n_excluded",
        "n_skipped",
        "n_wrong_answer",
        "reason",
    )
    result = dict.fromkeys(copied) | {"model": "m1", "repeat": 0, "seed": 0, "measured_seconds": 1.0}
    result |= {"n_traced": 50, "ce_above_03_fraction": 0.5, "clean_gt_corrupt_fraction": 0.82, "elapsed_seconds": 599.0}
    return causal_sanity.verdict(result | {"total_effect": {"value": 1.0, "ci95": [0.51, 2.0], "n": 50}} | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ce_above_03_fraction": 0.499},
        {"clean_gt_corrupt_fraction": 0.8},
        {"elapsed_seconds": 600.0},
        {"n_traced": 49},
    ],
)
def test_the_verdict_is_that_of_gate_5(tmp_path, changes):
    found = judged(**changes)
    assert found["passed"] is (not changes)
    assert [key for key, c in found["criteria"].items() if not c["passed"]] == list(changes)
    (tmp_path / "causal_sanity").mkdir()
    (tmp_path / "causal_sanity" / causal_sanity.RESULT).write_text(json.dumps(found))
    (gate,) = gate_5(Study({}, Findings([tmp_path])))
    assert (gate.status == "PASS") is found["passed"]
    assert not any("passed" in note for note in gate.notes)


def test_what_could_not_be_measured_has_not_passed():
    """No effect to trace: no ratio, no pass."""
    weak = judged(
        total_effect={"value": 0.7, "ci95": [0.49, 0.9], "n": 50}, ce_above_03_fraction=None, reason="no effect to trace"
    )
    assert not weak["passed"] and weak["total_effect_low"] == 0.49 and weak["ce_above_03_fraction"] is None
    assert not weak["criteria"]["ce_above_03_fraction"]["passed"] and not weak["criteria"]["total_effect_low"]["passed"]
    none = judged(total_effect={"value": None, "ci95": None, "n": 0}, n_traced=0)
    assert not none["passed"] and none["total_effect_low"] is None


def test_a_resumed_run_has_taken_as_long_as_all_its_parts():
    assert judged(elapsed_seconds=20.0, measured_seconds=650.0)["criteria"]["elapsed_seconds"] == {
        "rule": "< 600", "value": 650.0, "passed": False,
    }  # fmt: skip
