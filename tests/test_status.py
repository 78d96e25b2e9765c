"""The table of runs: what it reads from whole, torn and huge files, what it calls each state, and how it fits a width."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import run
from analysis.status import COLUMNS, duration, find_runs, lines_from_end, main, read_run, table

NOW = 1_800_000_000.0


def write_run(folder: Path, epochs: int = 3, updates: int = 10, last: str = "end", config: dict | None = None) -> Path:
    """A run folder with the events of `epochs` epochs of `updates` updates, one a second, of ten planned epochs."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"model_key": "m3", "config": {"num_epochs": 10} | (config or {})}))
    clock, records = NOW, [{"event": "start", "epoch": 0, "step_in_epoch": 0, "world_size": 1, "time": NOW}]
    for epoch in range(epochs):
        for step in range(updates):
            clock += 1
            records.append({"event": "step", "epoch": epoch, "train/epoch": epoch + 1, "train/step": epoch * updates + step})
            records[-1] |= {"train/loss": 2.0 - epoch / 10, "time": clock}
            if step % 5 == 4:
                records.append({"event": "speed", "epoch": epoch, "updates": 5, "seconds": 5.0, "time": clock})
        records.append({"event": "train_epoch", "epoch": epoch, "updates": updates, "time": clock})
        clock += 10  # the evaluation
        records.append({"event": "eval", "epoch": epoch, "eval/acc": 0.1 * (epoch + 1), "eval/loss": 1.0, "time": clock})
    records.append({"event": last, "epoch": epochs - 1, "time": clock})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def cells(folder: Path, now: float = NOW + 60) -> dict[str, str]:
    (found,) = find_runs([folder])
    return dict(zip(COLUMNS, found.cells(now)))


# ---------------------------------------------------------------- what a run says


def test_the_columns_are_the_last_values(tmp_path):
    assert cells(write_run(tmp_path / "m3")) == {
        "run": "m3", "state": "done", "epoch": "3/10", "update": "30/100",
        "accuracy": "0.3000", "loss": "1.8000", "time left": "-", "last record": "0 s ago",
    }  # fmt: skip


def test_a_real_run(make, tmp_path, capsys):
    assert run.main([make("small")]) == 0
    capsys.readouterr()
    assert main([str(tmp_path / "runs"), "--width", "120"]) == 0
    head, line, last = capsys.readouterr().out.splitlines()
    records = [json.loads(line) for line in (tmp_path / "runs/small/metrics.jsonl").read_text().splitlines()]
    loss = [r for r in records if r["event"] == "step"][-1]["train/loss"]
    assert line.split()[:4] == ["small", "done", "3/3", "18/18"] and f" {loss:.4f} " in line
    assert head.split()[0] == "run" and "GB of disk free" in last


def test_time_left_counts_updates_and_the_evaluations_between_them(tmp_path):
    """Ten updates in ten seconds and ten seconds of evaluation: two seconds an update in the long run."""
    found = read_run("m3", write_run(tmp_path / "m3", epochs=8, last="saved"))
    assert found.seconds_left() == pytest.approx(20 * 2, rel=0.1)
    found.config["max_steps"] = 82
    assert found.seconds_left() == pytest.approx(2 * 2, rel=0.1)
    assert found.cells(NOW)[COLUMNS.index("time left")] == "-", "nobody waits for a run that does not run"
    found.state = "running"
    assert found.cells(NOW)[COLUMNS.index("time left")] == "4 s"


def test_time_left_is_of_the_process_that_runs_now(tmp_path):
    folder = write_run(tmp_path / "m3", epochs=2)
    with open(folder / "metrics.jsonl", "a") as file:
        for record in (
            {"event": "start", "epoch": 2, "step_in_epoch": 0, "time": NOW + 9000},
            {"event": "step", "epoch": 2, "train/step": 20, "train/loss": 1.0, "time": NOW + 9004},
            {"event": "speed", "updates": 1, "seconds": 4.0, "time": NOW + 9004},
        ):
            file.write(json.dumps(record) + "\n")
    assert read_run("m3", folder).seconds_left() == pytest.approx(79 * 4)


@pytest.mark.parametrize(
    "config, rows, updates",
    [
        ({"batch_size_training": 8, "gradient_accumulation_steps": 2}, 44, 3),
        ({"batch_size_training": "auto", "effective_batch_size": 10}, 44, 5),
        ({"batch_size_training": 8, "max_train_samples": 16}, 44, 2),
        ({"batch_size_training": 8}, None, None),
    ],
)
def test_in_the_first_epoch_its_updates_follow_from_rows_and_batch(tmp_path, config, rows, updates):
    folder = write_run(tmp_path / "m3", epochs=0, last="start", config=config)
    about = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(about | {"data": {"train_path": {"file": "x", "rows": rows}}}))
    assert read_run("m3", folder).updates_per_epoch == updates


def test_torn_and_damaged_lines_and_missing_files_leave_the_rest(tmp_path):
    folder = write_run(tmp_path / "m3", last="train_epoch")
    whole = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(whole + b'\x00\xff{"event"\n[1]\n{"event": "step"}\n{"event": "step", "train/st')
    (folder / "run.json").write_text('{"config"')
    assert cells(folder)["update"] == "30" and cells(folder)["accuracy"] == "0.3000"
    (folder / "metrics.jsonl").unlink()
    assert set(list(cells(folder).values())[2:]) == {"-"}
    (folder / "metrics.jsonl").write_bytes(b'{"event": "start", "ti')
    assert cells(folder)["state"] == "lost"


# ---------------------------------------------------------------- the end of a file


@pytest.mark.parametrize("content", [b"", b"a", b"a\n", b"a\nbb\n\nccc\n", b"long line\n" * 7 + b"torn", b"\n\n"])
@pytest.mark.parametrize("block", [1, 3, 100])
def test_lines_from_the_end_are_the_lines_reversed(tmp_path, content, block):
    (tmp_path / "file").write_bytes(content)
    assert list(lines_from_end(tmp_path / "file", block=block)) == content.split(b"\n")[:-1][::-1]


def test_only_the_end_of_a_huge_file_is_read(tmp_path):
    """Sparse gigabytes in front of a few records: reading them all would take memory and minutes."""
    folder = write_run(tmp_path / "m3")
    records = (folder / "metrics.jsonl").read_bytes()
    with open(folder / "metrics.jsonl", "wb") as file:
        file.seek(20 << 30)
        file.write(b"\n" + records)
    read = sum(map(len, lines_from_end(folder / "metrics.jsonl")))
    assert len(records) - 200 < read < 9 << 20
    assert cells(folder)["update"] == "30/100"


# ---------------------------------------------------------------- states


def test_states_of_runs_without_a_queue(tmp_path):
    runs = {last: write_run(tmp_path / last, last=last) for last in ("end", "stopped", "saved")}
    assert {last: cells(folder)["state"] for last, folder in runs.items()} == {
        "end": "done",
        "stopped": "stopped",
        "saved": "lost",
    }
    with open(runs["saved"] / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert cells(runs["saved"])["state"] == "running"
    assert cells(runs["saved"])["state"] == "lost"


def test_states_of_a_queue(tmp_path):
    """One of each; process numbers that are somebody else's, or nobody's, are no run of ours."""
    logs = tmp_path / "logs"
    logs.mkdir()
    names = ("finished", "wrong", "asked", "vanished", "now", 'odd "name" of one\'s', "waits")
    for number, name in enumerate(names):
        (logs / f"{name}.job").write_text("".join(f"{field}\0" for field in ("python", "1", f"runs/{name}", "x.yaml")))
        os.utime(logs / f"{name}.job", (number, number))
    for name, said in {"finished": "0 done", "wrong": "2 failed", "asked": "143 stopped"}.items():
        (logs / f"{name}.exit").write_text(said + "\n")
    (logs / "wrong.log").write_text("many lines\nerror: lr: missing\n")
    write_run(tmp_path / "runs" / "vanished", last="saved")
    (logs / "vanished.pid").write_text(f"{os.getpid()}\n")  # pytest, which is no run
    (logs / "queue.list").write_text('odd "name" of one\'s\0waits\0')
    (logs / "queue.current").write_text("now\0")

    def states() -> list[str]:
        return [found.state for found in find_runs([logs, tmp_path / "runs"])]

    code = "import time; print('up', flush=True); time.sleep(60)"
    stand_in = subprocess.Popen([sys.executable, "-c", code, "run_queue"], stdout=subprocess.PIPE)
    try:
        assert stand_in.stdout.readline() == b"up\n"
        (logs / "queue.pid").write_text(f"{stand_in.pid}\n")
        found = find_runs([logs, tmp_path / "runs"])
        assert [f.name for f in found] == list(names)
        assert states() == ["done", "failed", "stopped", "lost", "running", "queued", "queued"]
        assert found[1].error == "wrong: exit code 2: error: lr: missing"
    finally:
        stand_in.kill()
        stand_in.wait()
    assert states()[4:] == ["lost", "lost", "lost"], "nobody is left who would start them"


# ---------------------------------------------------------------- the table


def test_no_line_is_wider_than_the_terminal(tmp_path, capsys):
    write_run(tmp_path / ("a rather long name of a run " * 4).strip())
    write_run(tmp_path / "m3")
    for width in (200, 90, 70, 20):
        assert main([str(tmp_path), "--width", str(width)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 4 and max(map(len, lines)) <= width
        if width >= 90:
            assert all("done" in line and "0.3000" in line for line in lines[1:3]), "the name gives way, not the numbers"


def test_control_characters_do_not_reach_the_terminal():
    assert "\x1b" not in "".join(table([("run\x1b[2J", "done")], 80))


@pytest.mark.parametrize(
    "seconds, said", [(5, "5 s"), (200, "3 min 20 s"), (18130, "5 h 02 min"), (3 * 86400 + 3700, "3 d 01 h")]
)
def test_durations(seconds, said):
    assert duration(seconds) == said


def test_it_starts_without_the_heavy_packages(tmp_path):
    code = "import sys, analysis.status; print([m for m in ('torch', 'numpy', 'yaml', 'pydantic') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"
    write_run(tmp_path / "m3")
    for command in (["-m", "analysis.status"], ["analysis/status.py"]):
        done = subprocess.run([sys.executable, *command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "30/100" in done.stdout


def test_a_missing_folder_is_the_users_mistake(tmp_path, capsys):
    assert main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert main([str(tmp_path)]) == 0 and "no runs yet" in capsys.readouterr().out


def test_age_is_that_of_the_last_record(tmp_path):
    folder = write_run(tmp_path / "m3", epochs=1)
    assert cells(folder, now=NOW + 20 + 3600)["last record"] == "1 h 00 min ago"
