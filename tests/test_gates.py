"""The gates on accuracies and results, both sides of every threshold, and the command that runs them."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from gate_material import (
    BASE,
    OTHER,
    ROOT,
    call,
    ending,
    eval_record,
    fragment,
    records,
    write_log,
    write_metrics,
    write_results,
    write_test_accuracy,
    write_vector,
)  # fmt: skip

from analysis import gate_result, gate_rules
from analysis.runs import RUN_NAMES

# ------------------------------------------------------------------------------------------------ gates 1 to 3b


@pytest.mark.parametrize(("correct", "code"), [(210, 0), (209, 1)])
def test_gate_1_reads_line_10(tmp_path, capsys, correct, code):
    path = write_log(tmp_path, "m1", [1] * 9 + [correct] + [1])
    got, out = call(capsys, "--gate", 1, "--log", path)
    assert got == code and f"({correct}/300)" in out and ">= 70" in out and "n=300" in out


def test_gate_1_waits_for_line_10(tmp_path, capsys):
    code, out = call(capsys, "--gate", 1, "--log", write_log(tmp_path, "m1", [250] * 9))
    assert code == 2 and "GATE 1 NOT YET" in out and "9 so far" in out


def test_third_failing_run_of_gate_1_stops_the_study(tmp_path, capsys):
    # the second call judges the first run once more
    for correct, stops in ((100, False), (100, False), (101, False), (102, True)):
        code, out = call(capsys, "--gate", 1, "--log", write_log(tmp_path, "m1", [correct] * 10))
        assert code == 1 and ("stop the study" in out) == stops


def gate_2(tmp_path, capsys, m1: list[int], m2: list[int], kept: int = 50) -> tuple[int, str]:
    for model, corrects in (("m1", m1), ("m2", m2)):
        write_log(tmp_path, model, corrects)
        (tmp_path / RUN_NAMES[model]).mkdir()
        for number in range(1, kept + 1):
            (tmp_path / RUN_NAMES[model] / f"checkpoint_{number}").touch()
    return call(capsys, "--gate", 2, "--log", tmp_path / "m1_cot.log")


@pytest.mark.parametrize(
    ("m1", "m2", "code", "note"),
    [
        (225, 225, 0, False),
        (240, 240, 0, False),
        (241, 241, 0, True),
        (224, 224, 0, True),
        (222, 222, 0, True),
        (221, 221, 1, False),
        (233, 218, 0, False),  # apart by exactly 5
        (233, 217, 1, False),
        (230, 245, 0, False),
        (230, 246, 1, False),
    ],
)
def test_gate_2_levels(tmp_path, capsys, m1, m2, code, note):
    got, out = gate_2(tmp_path, capsys, ending(m1), ending(m2))
    assert got == code and ("outside the expected" in out) == note


def test_gate_2_refuses_100_and_lost_checkpoints(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert gate_2(tmp_path / "a", capsys, [200] * 20 + [300] + [230] * 29, ending(230))[0] == 1
    code, out = gate_2(tmp_path / "b", capsys, ending(230), ending(230), kept=49)
    assert code == 1 and "50 kept" in out


def test_gate_2_needs_both_models(tmp_path, capsys):
    assert call(capsys, "--gate", 2, "--log", write_log(tmp_path, "m1", ending(230)))[0] == 2


@pytest.mark.parametrize(("correct", "code"), [(175, 0), (174, 1)])
def test_gate_3_reads_line_15(tmp_path, capsys, correct, code):
    """58.0 exactly does not pass, and neither neighbouring line is read."""
    path = write_log(tmp_path, "m3", [1] * 14 + [correct] + [1])
    got, out = call(capsys, "--gate", 3, "--log", path)
    assert got == code and f"GATE 3 {'PASS' if code == 0 else 'FAIL'}" in out


@pytest.mark.parametrize(("loss", "code"), [(0.75, 0), (0.7504, 1), (math.nan, 1), (math.inf, 1)])
def test_gate_3_divergence(tmp_path, capsys, loss, code):
    """1.5 times the lowest mean of the stage, from the recorded bars; epoch index 13 is in stage 2 with 10 to 12."""
    path = tmp_path / "m3_coconut.log"
    path.write_text("".join(fragment(e, 200, loss=loss if e == 13 else 0.5) for e in range(15)))
    assert call(capsys, "--gate", 3, "--log", path)[0] == code


def test_gate_3_fails_where_training_stopped_at_a_bad_loss(tmp_path, capsys):
    path = write_log(tmp_path, "m3", [200] * 7)
    stop = "FloatingPointError: loss nan or gradient norm nan is not finite at epoch 7, update 12; no step was taken\n"
    path.write_text(path.read_text() + stop)
    code, out = call(capsys, "--gate", 3, "--log", path)
    assert code == 1 and "epoch index 7" in out
    path.write_text(path.read_text() + "".join(fragment(epoch, 200) for epoch in range(7, 15)))
    assert call(capsys, "--gate", 3, "--log", path)[0] == 0, "the restarted run went on soundly"


def test_a_falling_first_stage_is_no_divergence(tmp_path, capsys):
    path = tmp_path / "m3_coconut.log"
    path.write_text("".join(fragment(e, 200, loss=4.0 / (1 + e % 5)) for e in range(15)))
    assert call(capsys, "--gate", 3, "--log", path)[0] == 0


def test_divergence_after_line_15_is_not_gate_3s(tmp_path, capsys):
    path = tmp_path / "m3_coconut.log"
    path.write_text("".join(fragment(e, 200, loss=9.0 if e == 16 else 0.5) for e in range(18)))
    assert call(capsys, "--gate", 3, "--log", path)[0] == 0


def test_gate_3_reads_losses_from_metrics(tmp_path, capsys):
    means = [{"event": "train_epoch", "epoch": e, "stage": e // 5, "train/loss_mean": 0.5} for e in range(15)]
    means[12]["train/loss_mean"] = None  # how a strict JSON writer spells NaN
    write_metrics(tmp_path / "run", [*means, *(eval_record(e, 200) for e in range(15))])
    code, out = call(capsys, "--gate", 3, "--run", tmp_path / "run")
    assert code == 1 and "diverging" in out


@pytest.mark.parametrize(("correct", "shift", "code"), [(136, 0.011, 0), (135, 0.011, 1), (136, 0.009, 1), (136, None, 2)])
def test_gate_3b(tmp_path, capsys, correct, shift, code):
    path = write_log(tmp_path, "m5", [1] * 14 + [correct])
    if shift is not None:
        write_vector(tmp_path / "run", 15, BASE + shift * OTHER)
    (tmp_path / "run").mkdir(exist_ok=True)
    assert call(capsys, "--gate", "3b", "--log", path, "--run", tmp_path / "run")[0] == code


# ------------------------------------------------------------------------------------------------ gate 4, 4-id, 5


def test_gate_4_passes_on_either_difference_and_never_blocks(tmp_path, capsys):
    def judged(m3: int, m5: int, all_six: int | None) -> tuple[int, str]:
        for model, correct in (("m3", m3), ("m4", 200), ("m4b", 200), ("m5", m5)):
            write_log(tmp_path, model, ending(correct))
        for model, last in (("m3", all_six), ("m5", 90)):
            if last is not None and all_six is not None:
                levels = [{"correct": last, "n": 100}]
                write_results(tmp_path, "corruption", model, {
                    "clean_accuracy": {"correct": 95, "n": 100}, "forward_corruption": levels,
                    "forward_corruption_recompute": [{"correct": 0, "n": 100}], "sensitivity": "low",
                })  # fmt: skip
        return call(capsys, "--gate", 4, "--logs", tmp_path)

    assert judged(285, 270, None)[0] == 0, "m3 - m5 = 5 passes without the experiment"
    code, out = judged(285, 271, None)
    assert code == 2 and "NOT YET" in out
    code, out = judged(285, 271, 80)
    assert code == 0 and "GATE 4 PASS" in out, "sensitivities 15 and 5 differ by exactly 10"
    code, out = judged(285, 271, 81)
    assert code == 0 and "GATE 4 FAIL" in out and "evidence for curriculum + compute" in out and "[blocking]" not in out


@pytest.mark.parametrize(("m5", "code"), [(484, 0), (485, 1)])
def test_gate_4_id_single_seed(tmp_path, capsys, m5, code):
    write_test_accuracy(tmp_path, "m3", 470)
    write_test_accuracy(tmp_path, "m5", m5)
    assert call(capsys, "--gate", "4-id", "--logs", tmp_path)[0] == code


def test_gate_4_id_three_seeds_use_means(tmp_path, capsys):
    for suffix, m5 in (("", 490), ("-s1", 470), ("-s2", 484)):
        write_log(tmp_path, "m3", [200], suffix)
        write_test_accuracy(tmp_path, f"m3{suffix}", 470)
        write_test_accuracy(tmp_path, f"m5{suffix}", m5)
    code, out = call(capsys, "--gate", "4-id", "--logs", tmp_path)
    assert code == 0 and "mean of 3 seeds" in out and "+4.00" in out and "n=1500" in out
    write_test_accuracy(tmp_path, "m5-s1", 481)  # the mean is exactly 3
    assert call(capsys, "--gate", "4-id", "--logs", tmp_path)[0] == 1


def test_gate_4_id_accepted_with_a_reason(tmp_path, capsys):
    write_test_accuracy(tmp_path, "m3", 400)
    write_test_accuracy(tmp_path, "m5", 450)
    code, out = call(capsys, "--gate", "4-id", "--logs", tmp_path, "--accept", "known data fault")
    assert code == 0 and "GATE 4-id FAIL" in out and "accepted: known data fault" in out
    assert records(tmp_path)[-1]["accepted"] == "known data fault"
    assert call(capsys, "--gate", "3", "--logs", tmp_path, "--accept", "no")[0] == 2


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({}, 0),
        ({"ce_above_03_fraction": 0.49}, 1),
        ({"clean_gt_corrupt_fraction": 0.8}, 1),
        ({"elapsed_seconds": 600}, 1),
        ({"n_traced": 49}, 2),
        ({"ce_above_03_fraction": None}, 2),
    ],
)
def test_gate_5(tmp_path, capsys, change, code):
    record = {"passed": True, "ce_above_03_fraction": 0.5, "clean_gt_corrupt_fraction": 0.82, "elapsed_seconds": 599}
    (tmp_path / "exp0_sanity_result.json").write_text(json.dumps(record | {"n_traced": 50} | change))
    got, out = call(capsys, "--gate", 5, "--logs", tmp_path)
    assert got == code and ("thresholds decide" in out) == (code != 0), "an edited `passed` decides nothing"


# ------------------------------------------------------------------------------------------------ all, exit codes


@pytest.fixture
def no_gate_0(monkeypatch):
    """`all` without the file gate, whose inputs are the checkout's own."""
    monkeypatch.delitem(gate_rules.GATES, "0")


@pytest.mark.usefixtures("no_gate_0")
def test_all_on_a_study_in_progress(tmp_path, capsys):
    assert call(capsys, "--gate", "all", "--logs", tmp_path)[0] == 2, "an empty folder decides nothing"
    write_log(tmp_path, "m1", [220] * 10)
    code, out = call(capsys, "--gate", "all", "--logs", tmp_path)
    assert code == 0 and "GATE 1 PASS" in out and "GATE 2 NOT YET" in out
    write_log(tmp_path, "m3", [100] * 15)
    code, out = call(capsys, "--gate", "all", "--logs", tmp_path)
    assert code == 1 and "GATE 3 FAIL  m3  [blocking]" in out


@pytest.mark.usefixtures("no_gate_0")
def test_gate_5_stops_tracing_only(tmp_path, capsys):
    write_log(tmp_path, "m1", [220] * 10)
    record = {"n_traced": 50, "ce_above_03_fraction": 0.1, "clean_gt_corrupt_fraction": 0.1, "elapsed_seconds": 10}
    (tmp_path / "exp0_sanity_result.json").write_text(json.dumps(record))
    code, out = call(capsys, "--gate", "all", "--logs", tmp_path)
    assert code == 0 and "GATE 5 FAIL" in out
    assert call(capsys, "--gate", "5", "--logs", tmp_path)[0] == 1


@pytest.mark.parametrize(
    "line",
    [
        "Effective batch size: 64 = 32 x 2 x 1",
        "Config: {'model_id': 'backbones/prosqa_tiny'}",
        "Config: {'debug': True}",
        "Config: {'batch_size_training': 32}\nRunning FSDP on rank = 0, world size = 2",
    ],
)
def test_uncalibrated_is_shown_and_never_blocks(tmp_path, capsys, line):
    path = tmp_path / "m3_coconut.log"
    path.write_text(line + "\n" + "".join(fragment(e, 10) for e in range(15)))
    code, out = call(capsys, "--gate", 3, "--log", path)
    assert code == 0 and "GATE 3 FAIL" in out and "uncalibrated" in out and "[blocking]" not in out


def test_other_data_sizes_are_uncalibrated(tmp_path, capsys):
    small = write_log(tmp_path, "m3", [10] * 15, total=64)
    assert call(capsys, "--gate", 3, "--log", small)[0] == 0
    write_metrics(tmp_path / "run", [
        {"event": "train_epoch", "epoch": 0, "train/loss_mean": 0.5, "updates": 20},
        *(eval_record(e, 10) for e in range(15)),
    ])  # fmt: skip
    code, out = call(capsys, "--gate", 3, "--run", tmp_path / "run")
    assert code == 0 and "20 updates" in out


def test_models_outside_the_study(tmp_path, capsys):
    write_log(tmp_path, "m1", [220] * 10)
    code, out = call(capsys, "--gate", "4c", "--logs", tmp_path, "--models", "m1,m3,m5")
    assert code == 0 and "GATE 4c NOT APPLICABLE" in out


@pytest.mark.parametrize(
    "argv",
    [["--gate", "3"], ["--gate", "3", "--log", "absent.log"], ["--gate", "3", "--logs", "absent"],
     ["--gate", "3", "--logs", ".", "--models", "m9"]],
)  # fmt: skip
def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    code, out = call(capsys, *argv)
    assert code == 2 and out.startswith("error: ") and out.count("\n") == 1


def test_records_accumulate_and_damage_is_refused(tmp_path, capsys):
    path = write_log(tmp_path, "m3", [200] * 15)
    for expected in (1, 2):
        call(capsys, "--gate", 3, "--log", path)
        assert len(records(tmp_path)) == expected
    first = records(tmp_path)[0]
    assert first["status"] == "PASS" and first["checks"][0]["n"] == 300 and first["checks"][0]["rule"] == "> 58"
    assert not list(tmp_path.glob("*tmp*"))
    (tmp_path / "gates.json").write_text("[")
    code, out = call(capsys, "--gate", 3, "--log", path)
    assert code == 2 and "gates.json" in out and (tmp_path / "gates.json").read_text() == "["


def test_table_is_narrow_and_plain(tmp_path, capsys):
    write_log(tmp_path, "m3", [200] * 15, suffix="-s1")
    for gate in ("all", "post", "flags"):
        _, out = call(capsys, "--gate", gate, "--logs", tmp_path)
        assert max(map(len, out.replace(str(tmp_path), "").splitlines())) <= gate_result.WIDTH
        assert "\033" not in out
    passed = gate_result.Result("3", "m3", [gate_result.Check("a", "1", "> 0", True)])
    coloured = gate_result.render([passed], colour=True)
    assert "\033[32mPASS" in coloured


def test_shell_script_passes_arguments_and_exit_code(tmp_path):
    logs = tmp_path / "with a space"
    logs.mkdir()
    write_log(logs, "m3", [100] * 15)
    (tmp_path / "python3").symlink_to(sys.executable)
    env = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    script = str(ROOT / "scripts" / "check_gates.sh")
    done = subprocess.run([script, str(logs), "--gate", "3"], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 1 and "GATE 3 FAIL" in done.stdout, done.stderr
    shown = subprocess.run([script, "--help"], capture_output=True, text=True, env=env)
    assert shown.returncode == 0 and "usage:" in shown.stdout
    assert subprocess.run([script], capture_output=True, env=env).returncode == 2
