"""Three groups of positions, two chains, and gate 5 in front: what a hand-wired model does, the result says."""

import json

import pytest
from stub_model import SOLVED, Wiring, stub_subject, task_of, write_problems
from tracing_material import rows_it_gets_right, states_of_another_run

from analysis import causal_sanity, causal_tracing, tracing
from analysis.causal_tracing import EXPERIMENT
from analysis.experiment import load_subject

N = 12
COPY = Wiring(thoughts=(SOLVED, 0, None), reads=(1,))


def result(tmp_path, wiring, mode="continuous", **flags) -> dict:
    subject = stub_subject(tmp_path, wiring, mode, n_layers=1)
    data = write_problems(tmp_path, N, hops=(2,))
    task = task_of(EXPERIMENT, subject, data, tmp_path, max_positions=7, **flags)
    ready = EXPERIMENT.prepare(task)
    records = EXPERIMENT.measure(task, ready, "test", list(range(N)))
    return EXPERIMENT.summarize(task, ready, json.loads(json.dumps(records)))


# ---------------------------------------------------------------- groups and chains


def test_an_answer_that_comes_through_the_thoughts(tmp_path):
    """Thought 0 is worked out from the question, thought 1 copies it, the answer is read from thought 1."""
    found = result(tmp_path, COPY)
    groups = found["groups"]
    thoughts, question = groups["thoughts"], groups["question"]
    assert found["n"] == found["n_traced"] == N and not found["n_excluded"]
    assert thoughts["chain"] == "replay" and thoughts["peak_label"] == "slot 1" and thoughts["peak_layer"] == 0
    assert thoughts["peak_ce"] == pytest.approx(1) and thoughts["mean_ce"][0] == pytest.approx([0, 1, 0])
    assert thoughts["total_effect_recompute"] == thoughts["total_effect"]  # all slots are given
    first = thoughts["first_slot_effect"]
    assert first["replay"]["value"] == pytest.approx(0, abs=1e-6), "thought 1 keeps its copy"
    assert first["recompute"]["ci95"][0] > 10, "thought 1 copies the noise"
    assert question["chain"] == "recompute" and question["total_effect"]["ci95"][0] > 5
    assert question["total_effect_replay"]["value"] == pytest.approx(0, abs=1e-6), "none of it goes past the thoughts"
    assert question["parts"]["path"]["total_effect"]["ci95"][0] > 5 < question["parts"]["name"]["total_effect"]["ci95"][0]
    assert question["parts"]["other facts"]["total_effect"]["value"] == pytest.approx(0, abs=1e-6)
    assert set(groups["markers"]["parts"]) == {"markers", "answer prefix"}
    assert all(gate["n"] == N for gate in found["tracing_gates"].values())
    assert sum(found["share_by_group"].values()) == pytest.approx(1) and found["share_by_group"]["thoughts"] > 0.1


def test_an_answer_that_goes_past_the_thoughts(tmp_path):
    found = result(tmp_path, Wiring(thoughts=(None, None)), "pause_curriculum")["groups"]
    assert found["thoughts"]["effect"] is None and found["thoughts"]["reason"] == "no effect to trace"
    assert found["thoughts"]["chain"] == "replay and recompute are one function"
    first = found["thoughts"]["first_slot_effect"]
    assert first["recompute"] == first["replay"]
    question = found["question"]
    assert question["effect"] is not None and question["total_effect_replay"] == question["total_effect"]
    assert question["mean_ce_all"] == pytest.approx([1, 0])
    # both facts and the name are needed: none of them alone brings the answer back
    assert max(question["parts"][part]["mean_ce_all"][0] for part in question["parts"]) < 0.5


def test_bins_of_the_question_are_named_by_what_they_hold(tmp_path):
    question = result(tmp_path, COPY)["groups"]["question"]
    assert question["position_labels"] == [*(f"path {i}" for i in range(3)), *(f"other facts {i}" for i in range(3)), "name 0"]
    assert question["position_counts"] == [N] * 7 and question["mean_positions_corrupted"] == 13  # four facts of 3 words


def test_rows_are_capped_and_counted(tmp_path):
    found = result(tmp_path, COPY, trace_rows=10)
    assert found["n"] == found["groups"]["question"]["n_traced"] == 10 and found["n_excluded"] == {"not_reached": 2}


# ---------------------------------------------------------------- between models


def test_shares_are_of_effects_above_zero():
    def total(value, low):
        return {"value": value, "ci95": [low, value + 1], "n": 9}

    totals = {"thoughts": total(-0.5, -1.0), "question": total(3.0, 2.0), "markers": total(1.0, 0.1)}
    assert causal_tracing.shares(totals) == {"thoughts": 0, "question": 0.75, "markers": 0.25}
    assert causal_tracing.shares({"question": total(0.4, 0.1), "markers": None}) == {"question": None}


@pytest.mark.parametrize(
    "m3, m5, reading",
    [
        (0.6, 0.4, "thoughts matter more in m3"),
        (0.5, 0.4, "equal"),
        (0.4, 0.45, "equal"),
        (0.4, 0.6, "m5 above m3: look for a bug"),
        (0.4, None, "m5: no effect to trace"),
    ],
)
def test_readings_of_the_peaks(m3, m5, reading):
    def one(key, peak):
        group = {"peak_ce": peak, "reason": None if peak else "no effect to trace"}
        return {"model_key": key, "repeat": 0, "groups": {"thoughts": group}, "m1_cot_ce_above_03_fraction": 0.7}

    results = {"m1": one("m1", 0.9), "m3": one("m3", m3), "m5": one("m5", m5)}
    found = causal_tracing.verify(results)
    assert found["peak_at_thoughts"] == {0: {"m3": m3, "m5": m5, "reading": reading}}
    assert found["m1_cot_ce_above_03_fraction"] == {0: 0.7}


# ---------------------------------------------------------------- the command


@pytest.fixture
def main(tiny_runs, tmp_path):
    """main(key, *flags) -> exit code, on rows that the checkpoint gets right."""
    load_subject.cache_clear()

    def call(key, *more):
        file = rows_it_gets_right(tiny_runs[key], tmp_path, 14)
        flags = ["--checkpoint", str(tiny_runs[key]), "--data", str(file), "--output_dir", str(tmp_path), "--device", "cpu"]
        return EXPERIMENT.main([*flags, "--max_positions", "4", *more])

    return call


def gate(tmp_path, passed: bool) -> None:
    (tmp_path / "causal_sanity").mkdir()
    criteria = {"ce_above_03_fraction": {"rule": ">= 0.5", "value": 0.4 + 0.2 * passed, "passed": passed}}
    (tmp_path / "causal_sanity" / causal_sanity.RESULT).write_text(json.dumps({"passed": passed, "criteria": criteria}))


def test_it_waits_for_gate_5(main, tmp_path, capsys):
    assert main("m5") == 2
    assert "gate 5 blocks causal tracing" in capsys.readouterr().err
    gate(tmp_path, False)
    assert main("m5") == 2
    assert "ce_above_03_fraction is 0.4, not >= 0.5" in capsys.readouterr().err
    assert not (tmp_path / "causal_tracing" / "m5_causal_tracing.json").exists()
    assert main("m5", "--accept", "only a test") == 0
    found = json.loads((tmp_path / "causal_tracing" / "m5_causal_tracing.json").read_text())
    assert found["gate_5"]["accepted"] == "only a test" and not found["gate_5"]["passed"]


def test_real_checkpoints_of_both_kinds(main, tmp_path):
    gate(tmp_path, True)
    for key, group in (("m3", "thoughts"), ("m1", "question")):
        assert main(key) == 0
        found = json.loads((tmp_path / "causal_tracing" / f"{key}_causal_tracing.json").read_text())
        assert found["gate_5"]["passed"] and found["gate_5"]["accepted"] is None
        assert set(found["groups"]) == {"thoughts", "question", "markers"} and found["n_traced"] > 0
        assert found["groups"][group]["total_effect"]["n"] == found["n_traced"]
        assert found["tracing_gates"][group]["away_nats"]["restore_all"] <= 1e-3
    assert found["groups"]["thoughts"]["position_labels"][0] == "step token 0"
    assert found["groups"]["thoughts"]["chain"] == "teacher-forced: one function"
    assert set(json.loads((tmp_path / "causal_tracing" / "results.json").read_text())) == {"m1", "m3", "verification"}


def test_a_broken_instrument_leaves_no_result(main, tmp_path, monkeypatch):
    gate(tmp_path, True)
    monkeypatch.setattr(tracing.Chunk, "restore", states_of_another_run)
    assert main("m3") == 1
    assert not (tmp_path / "causal_tracing" / "m3_causal_tracing.json").exists()
    assert (tmp_path / "causal_tracing" / "m3_causal_tracing.failed.json").exists()


@pytest.mark.parametrize("flag", ["--trace_rows", "--max_positions"])
def test_nothing_to_trace_is_a_mistake_of_the_command(main, tmp_path, capsys, flag):
    gate(tmp_path, True)
    assert main("m3", flag, "0") == 2
    assert f"{flag} 0" in capsys.readouterr().err
