"""Checks after training and red flags."""

import math

import pytest
from gate_material import call, ending, eval_record, fragment, records, write_log, write_metrics, write_results

from analysis.runs import RUN_NAMES


def results(capsys, tmp_path, gate: str) -> dict[str, dict]:
    call(capsys, "--gate", gate, "--logs", tmp_path)
    return {record["gate"]: record for record in records(tmp_path)}


def test_post_checks_from_metrics(tmp_path, capsys):
    def write(ce: float, latents: int, loss: float) -> None:
        (tmp_path / "gates.json").unlink(missing_ok=True)
        train, evals = [], []
        for epoch in range(50):
            plan = {"stage": epoch // 5, "n_latents": min(epoch // 5, 6) if epoch != 40 else latents}
            train.append({"event": "train_epoch", "epoch": epoch, "train/loss_mean": loss, "seconds": 100.0} | plan)
            evals.append(eval_record(epoch, 200, **{"eval/two_choice_ce": ce if epoch >= 15 else 0.7}, **plan))
        write_metrics(tmp_path / RUN_NAMES["m3"], train + evals)

    def statuses() -> list[bool | None]:
        found = results(capsys, tmp_path, "post")
        rows = [next(c for c in found[f"post {k}"]["checks"] if c["name"].startswith("m3 ")) for k in (1, 5, 6)]
        return [row["ok"] for row in rows]

    write(0.6929, 6, 0.4)
    assert statuses() == [True, True, True]
    write(0.693, 6, 0.4)
    assert statuses() == [False, True, True]
    write(0.6, 8, 0.4)
    assert statuses() == [True, False, True]
    write(0.6, 6, math.nan)
    assert statuses() == [True, True, False]


@pytest.mark.parametrize(("m1", "m5", "four", "three"), [(222, 120, "PASS", True), (221, 119, "FAIL", False)])
def test_post_levels(tmp_path, capsys, m1, m5, four, three):
    write_log(tmp_path, "m1", ending(m1))
    write_log(tmp_path, "m5", ending(m5))
    found = results(capsys, tmp_path, "post")
    assert found["post 4"]["status"] == four
    assert {c["name"]: c["ok"] for c in found["post 3"]["checks"]}["validation m5 line 50"] is three
    assert found["post 2"]["status"] == "NOT YET" and found["post 12"]["status"] == "NOT YET"


@pytest.mark.parametrize(("again", "ok"), [(222, True), (223, False)])
def test_post_reevaluation(tmp_path, capsys, again, ok):
    write_log(tmp_path, "m1", ending(222))
    (tmp_path / "m1_cot-reeval.log").write_text(fragment(0, again))
    found = results(capsys, tmp_path, "post")
    assert {c["name"]: c["ok"] for c in found["post 12"]["checks"]}["m1 re-evaluated"] is ok


def test_flags_from_logs(tmp_path, capsys):
    def flag(name: str, corrects: list[int], **last) -> str:
        (tmp_path / "gates.json").unlink(missing_ok=True)
        path = tmp_path / "m3_coconut.log"
        path.write_text("".join(fragment(e, c, loss=last.get(e, 0.2)) for e, c in enumerate(corrects)))
        return next((c["ok"] for c in results(capsys, tmp_path, "flags")[f"flag {name}"]["checks"] if "m3" in c["name"]), None)

    assert flag("collapse", [100] * 20 + [166] * 5) is True
    assert flag("collapse", [200] * 24 + [165]) is False
    assert flag("leak", [299] * 3) is True
    assert flag("leak", [200, 300, 200]) is False


@pytest.mark.parametrize(("jump", "ok"), [(0.6, True), (0.61, False)])
def test_flag_spike_at_a_stage_change(tmp_path, capsys, jump, ok):
    text = "".join(fragment(e, 200, loss=jump if e == 5 else 0.2) for e in range(7))
    (tmp_path / "m3_coconut.log").write_text(text)
    checks = results(capsys, tmp_path, "flags")["flag spike"]["checks"]
    assert next(c["ok"] for c in checks if c["name"].startswith("m3")) is ok


@pytest.mark.parametrize(("m5", "above", "equal"), [(208, "CLEAR", True), (209, "RAISED", False), (191, "CLEAR", False)])
def test_flags_between_models(tmp_path, capsys, m5, above, equal):
    write_log(tmp_path, "m3", ending(200))
    write_log(tmp_path, "m5", ending(m5))
    found = results(capsys, tmp_path, "flags")
    assert found["flag m5-above-m3"]["status"] == above
    assert (found["flag pause-equals-m3"]["status"] == "RAISED") == equal
    assert not any(record["blocking"] for record in found.values())
    assert found["flag unused"]["status"] == "NOT YET"


@pytest.mark.parametrize(("seconds", "ok"), [(14400, True), (14401, False)])
def test_flag_slow(tmp_path, capsys, seconds, ok):
    record = {"event": "train_epoch", "epoch": 0, "train/loss_mean": 0.5, "seconds": seconds}
    write_metrics(tmp_path / RUN_NAMES["m3"], [record])
    checks = results(capsys, tmp_path, "flags")["flag slow"]["checks"]
    assert next(c["ok"] for c in checks if c["name"] == "m3 hours") is ok


def test_flags_from_experiments(tmp_path, capsys):
    write_results(tmp_path, "probing", "m3", {"linear_probe_accuracy": [[25.0, None], [25.0, 25.0]], "n_classes": 4})
    write_results(tmp_path, "probing", "m5", {"linear_probe_accuracy": [[25.0, None], [25.0, 26.0]], "n_classes": 4})
    for model, correct in (("m3", 531), ("m5", 532)):  # 1,000 rows: 50 lies within 3.1 points
        coin = {"n": 1000, "two_choice_accuracy": {"correct": correct - 1, "n": 1000}}
        easy = {"n": 1000, "correct": 1000 if model == "m5" else 999}
        write_results(tmp_path, "ood", model, {"ood_7hop": coin, "id_matched": easy})
    found = results(capsys, tmp_path, "flags")
    assert {c["name"]: c["ok"] for c in found["flag probes"]["checks"]} == {"m3 probe cells": False}
    assert {c["name"]: c["ok"] for c in found["flag ood-coin"]["checks"]} == {"m3 OOD sets away from 50": False}
    assert {c["name"]: c["value"] for c in found["flag leak"]["checks"]} == {"m5 accuracies at 100": "id_matched"}
