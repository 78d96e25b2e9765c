"""Reading logs and metrics: carriage returns, resumed runs, torn lines, disagreement."""

import pytest
from gate_material import call, eval_record, fragment, log_text, write_log, write_metrics

from analysis.runlog import Accuracy, disagreement, read_log, read_metrics
from analysis.runs import RUN_NAMES, load_study


def test_line_numbers_survive_carriage_returns(tmp_path):
    log = read_log(write_log(tmp_path, "m3", list(range(100, 120))))
    assert [a.correct for a in log.accuracies] == list(range(100, 120))
    assert log.losses[14] == {0: 0.5, 1: 0.5, 2: 0.5}
    assert log.non_finite == [], "words in questions and outputs are text, not numbers"


def test_torn_last_line_of_a_log_is_no_line(tmp_path):
    path = tmp_path / "m3_coconut.log"
    path.write_text(log_text([180] * 14) + "Accuracy on validation set: 29")
    assert len(read_log(path).accuracies) == 14


def test_accuracy_is_exact():
    assert Accuracy(233, 300).percent - Accuracy(218, 300).percent == 5


def test_resumed_run_counts_the_last_of_repeated_epochs(tmp_path):
    log = tmp_path / "m3_coconut.log"
    log.write_text(log_text([200] * 13 + [150, 150]) + "Loading from previous run epoch_13!\n"
                   + fragment(13, 201) + fragment(14, 202))  # fmt: skip
    folder = tmp_path / RUN_NAMES["m3"]
    pairs = [(e, 200) for e in range(13)] + [(13, 150), (14, 150), (13, 201), (14, 202)]
    write_metrics(folder, [eval_record(e, c) for e, c in pairs])
    run = load_study(tmp_path)["m3", 0]
    assert run.problem == ""
    assert run.evals[14].correct == 202 and len(run.evals) == 15


def test_stock_log_without_metrics_uses_line_order(tmp_path, capsys):
    path = write_log(tmp_path, "m3", [100] * 14 + [200])
    assert call(capsys, "--gate", 3, "--log", path)[0] == 0


def test_torn_metrics_line_is_ignored_and_explains_an_extra_log_line(tmp_path):
    path = write_metrics(tmp_path, [eval_record(e, 200) for e in range(3)], tail='{"event": "eval", "epo')
    metrics = read_metrics(path)
    assert metrics.torn and len(metrics.evals) == 3
    log = read_log(write_log(tmp_path, "m3", [200] * 4))
    assert disagreement(log, metrics) == ""
    metrics.torn = False
    assert "4 validations in the log, 3 in the file" in disagreement(log, metrics)


@pytest.mark.parametrize("written", [[200] * 14 + [199], [200] * 16])
def test_disagreement_is_not_decidable_and_said(tmp_path, capsys, written):
    log = write_log(tmp_path, "m3", [200] * 15)
    write_metrics(tmp_path / "run", [eval_record(e, c) for e, c in enumerate(written)])
    code, out = call(capsys, "--gate", 3, "--log", log, "--run", tmp_path / "run")
    assert code == 2 and "GATE 3 NOT YET" in out and "disagree" in out


def test_folder_without_log_is_found(tmp_path, capsys):
    write_metrics(tmp_path / "anything-s2", [eval_record(e, 200) for e in range(15)])
    (tmp_path / "anything-s2" / "run.json").write_text('{"model_key": "m3", "config": {}}')
    assert list(load_study(tmp_path)) == [("m3", 2)]
    code, out = call(capsys, "--gate", 3, "--logs", tmp_path)
    assert code == 0 and "m3 repeat 2" in out


def test_run_folder_comes_from_the_printed_config(tmp_path):
    folder = tmp_path / "elsewhere" / "my-run"
    folder.mkdir(parents=True)
    config = {"save_path": str(tmp_path / "elsewhere"), "name": "my-run"}
    (tmp_path / "m5_pause.log").write_text(f"Config: {config}\n" + fragment(0, 100))
    assert load_study(tmp_path)["m5", 0].folder == folder
