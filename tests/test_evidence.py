"""Evidence: every quantity read off the files, a value a seed; what is not there is missing with its command, never 0."""

import json

import pytest
from verdict_material import KINDS, estimate, level, write, write_study

from analysis.evidence import collect
from analysis.measure import experiment
from analysis.psr import KINDS as KINDS_OF_NOISE
from analysis.quantities import MEASURED_IN, PSR_KIND, QUANTITIES


def read(evidence, name, model):
    return [round(v.value, 6) for v in evidence.quantity(name).of(model)]


def test_every_quantity_by_seed(tmp_path):
    changes = {"ood_dag": {"m3": 71.0}, "flips": {"m3": (3.0, 4.0, 5.0)}, "swap_drop": {"m3": (6.0, 7.0, 8.0)}}
    changes |= {"noise_drop": {"m5": (1.0, 2.0, 3.0)}, "causal": {"m3": 0.3}, "count": {"m3": (2.0, 3.0, 4.0)}}
    evidence = collect(write_study(tmp_path, changes))
    assert read(evidence, "two_choice/ood_dag", "m3") == [70.6, 71.0, 71.4]
    assert read(evidence, "exact_match/test", "m0") == [69.6, 70.0, 70.4]
    assert read(evidence, "permutation_flips", "m3") == [3, 4, 5]
    assert read(evidence, "swap_transplant_drop", "m3") == [6, 7, 8]
    assert read(evidence, "corruption_drop", "m5") == [1, 2, 3] and read(evidence, "corruption_drop_replay", "m5") == [0, 0, 0]
    assert read(evidence, "controlled_advantage", "m4b") == [10.1, 10.5, 10.9]
    assert read(evidence, "psr", "m3") == [19.6, 20.0, 20.4]
    assert read(evidence, "causal_peak", "m3") == [0.296, 0.3, 0.304]
    assert read(evidence, "count_loss", "m3") == [2, 3, 4]
    assert read(evidence, "generated_tokens/test", "m3") == [7.5] * 3
    value = evidence.quantity("psr").of("m4b")[2]
    assert (value.label, value.repeat, value.n, value.train_seed) == ("m4b-s2", 2, 1000, 12)
    assert {name: about["kind"] for name, about in evidence.sets.items()} == KINDS
    assert evidence.sets["test"]["shortcut_baselines"] == {"more ancestors": 50.0} and evidence.sets["test"]["n"] == 1000
    assert not any(quantity.missing for quantity in evidence.quantities.values())
    json.dumps(evidence.to_json(), allow_nan=False)


def test_no_effect_to_trace_is_zero_and_says_so(tmp_path):
    found = collect(write_study(tmp_path)).quantity("causal_peak").of("m3")[0]
    assert found.value == 0 and found.note == "no effect to trace"


def test_what_is_missing_has_a_command_and_no_value(tmp_path):
    write_study(tmp_path)
    (tmp_path / "final/psr/m5-s1_psr.json").unlink()
    (tmp_path / "final/psr/m5-s1_psr.failed.json").write_text('{"reason": "identity edit changed the output"}')
    path = tmp_path / "final/probing/m3_probing.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"controlled_advantage": None}))
    evidence = collect(tmp_path)
    assert [v.label for v in evidence.quantity("psr").of("m5")] == ["m5", "m5-s2"]
    (gap,) = evidence.quantity("psr").missing
    assert gap.label == "m5-s1" and gap.why == "a check failed: identity edit changed the output"
    assert gap.remedy == f"python -m analysis.psr --study {tmp_path} --models m5-s1"
    (gap,) = evidence.quantity("controlled_advantage").missing
    assert gap.label == "m3" and "controlled_advantage" in gap.why
    assert evidence.quantity("psr").missing_of("m5") and not evidence.quantity("psr").missing_of("m3")


def test_the_study_says_what_ought_to_exist(tmp_path):
    write_study(tmp_path, seeds={"m4b": 0}, epoch="best")
    runs = [{"label": label, "model": label[:2], "folder": ""} for label in ("m3", "m3-s3", "m1", "stage0-seed0")]
    (tmp_path / "study.json").write_text(json.dumps({"runs": runs}))
    evidence = collect(tmp_path, "best")
    gaps = {gap.label: gap for gap in evidence.quantity("two_choice/test").missing}
    assert set(gaps) == {"m3-s3", "m1", "m4b"}
    assert gaps["m3-s3"].remedy.endswith("--models m3-s3 --epoch best") and gaps["m4b"].why == "not in the study"
    assert "m1" not in {gap.label for gap in evidence.quantity("count_loss").missing}, "not defined for m1"
    assert evidence.repeats("m3") == [0, 1, 2] and evidence.repeats("m4b") == []


def test_a_set_asked_of_one_model_is_missed_in_the_others(tmp_path):
    write_study(tmp_path)
    path = tmp_path / "final/ood/m3_ood.json"
    record = json.loads(path.read_text())
    pair = {"kind": "swap", "exact_match": level(50), "two_choice": level(50), "both_right": level(30), "flipped": level(60)}
    record["sets"]["more_pairs"] = pair
    path.write_text(json.dumps(record))
    evidence = collect(tmp_path)
    assert read(evidence, "both_right/more_pairs", "m3") == [30] and len(evidence.quantity("flipped/more_pairs").missing) == 11
    assert "both_right/test" not in evidence.quantities


def test_checkpoints_are_not_mixed(tmp_path):
    write_study(tmp_path / "a")
    path = tmp_path / "a/final/psr/m5_psr.json"
    path.write_text(path.read_text().replace("sha of m5", "another"))
    with pytest.raises(ValueError, match="m5 is another checkpoint in psr than in"):
        collect(tmp_path / "a")
    write_study(tmp_path / "b", seeds=1)
    record = json.loads((tmp_path / "b/final/ood/m5_ood.json").read_text())
    (tmp_path / "b/final/ood/m5-s1_ood.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="m5 and m5-s1 are one checkpoint"):
        collect(tmp_path / "b")
    with pytest.raises(ValueError, match="is not there; measure with: python -m analysis.measure"):
        collect(tmp_path / "b", "best")


def test_log_probabilities(tmp_path):
    write(tmp_path / "final", "confidence", "m3", 0, sets={"test": {"mean_lp": -1.5, "n": 7}, "ood_dag": {"mean_lp": -2.5}})
    evidence = collect(tmp_path)
    assert read(evidence, "mean_lp/test", "m3") == [-1.5] and read(evidence, "mean_lp/ood_dag", "m3") == [-2.5]


def test_fields_that_are_not_there_say_why():
    read = {name: spec.read for name, spec in QUANTITIES.items()}
    rates = {"6": {"own": {"1.0": level(9)}, "absolute": None}, "4": {"absolute": {"1.0": level(8)}}}
    assert "layer 6, kind absolute" in read["psr"]({"n_layers": 12, "psr": rates}), "another layer or kind is another quantity"
    why = {"6": {"absolute": "no finished result of m3"}}
    assert read["psr"]({"n_layers": 12, "psr": rates, "psr_why": why}) == "no finished result of m3"
    assert read["psr"]({"n_layers": 3, "psr": {"1": {"absolute": {"1": level(5)}}}}).value == 5
    assert "groups.thoughts" in read["causal_peak"]({"groups": {"question": {"peak_ce": 0.9}}})
    assert read["causal_peak"]({"groups": {"thoughts": {"n_traced": 3, "reason": "3 rows"}}}) == "3 rows", "no result is not 0"
    assert read["controlled_advantage"]({"controlled_advantage": {"value": None, "reason": "12 rows"}}) == "12 rows"
    assert read["swap_transplant_drop"]({"swap_transplant_drop": None, "swap_reason": "no pairs"}) == "no pairs"
    assert "all_slots_drop.recompute" in read["corruption_drop"]({"all_slots_drop": {"replay": estimate(1)}})
    assert "no rows" in read["permutation_flips"]({"permutation_flip_rate": {"correct": 0, "n": 0, "accuracy": None}})


def test_intervals_over_rows_are_points_too():
    found = QUANTITIES["controlled_advantage"].read({"controlled_advantage": estimate(7)})
    assert found.value == pytest.approx(7) and found.ci95 == pytest.approx([6, 8]) and found.n == 1000
    nats = QUANTITIES["total_effect"].read({"groups": {"thoughts": {"total_effect": {"value": 2.5, "ci95": [2, 3], "n": 9}}}})
    assert (nats.value, nats.ci95, nats.n) == (2.5, [2, 3], 9)


def test_what_is_read_is_what_the_experiments_measure():
    for name, models in MEASURED_IN.items():
        assert set(experiment(name).models) == set(models), name
    assert PSR_KIND in KINDS_OF_NOISE
