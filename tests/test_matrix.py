"""scripts/test_matrix.sh in a small repository of its own: real pytest processes, environments that are this very Python."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PINNED = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().split())
TESTS = """
import os
import pytest

def test_passes():
    pass

def test_fails_where_told_to():
    assert "BROKEN" not in os.environ

@pytest.mark.skip
def test_skipped():
    pass
"""


@pytest.fixture
def matrix(tmp_path):
    """matrix(*arguments): run the script in a repository of three tests; no package index can be reached."""
    for name in ("setup.sh", "test.sh", "test_matrix.sh"):
        (tmp_path / "scripts").mkdir(exist_ok=True)
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_three.py").write_text(TESTS)

    def run(*arguments: str) -> subprocess.CompletedProcess:
        env = os.environ | {"PYTHON3": str(interpreter(tmp_path / "python3", "exit 1")), "PIP_NO_INDEX": "1"}
        command = ["bash", str(tmp_path / "scripts/test_matrix.sh"), *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)

    return run


def interpreter(path: Path, at_venv: str = "", before: str = "") -> Path:
    """An executable that is this Python, except for `-m venv`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\n{before}\nif [ "$2" = venv ]; then {at_venv or ":"}; fi\nexec "{sys.executable}" "$@"\n')
    path.chmod(0o755)
    return path


def environment(root: Path, transformers: str, before: str = "", torch: str = PINNED["torch"], **changes: str) -> None:
    """An environment that stands complete, of the requirements that the script would write (or of others)."""
    folder = root / ".matrix" / f"{transformers}-{torch}"
    interpreter(folder / "bin/python", before=before)
    versions = PINNED | {"transformers": transformers, "torch": torch} | changes
    (folder / "installed").write_text("".join(f"{name}=={version}\n" for name, version in versions.items()))


def table(result: subprocess.CompletedProcess) -> list[list[str]]:
    """The cells of the table's lines, without its heading."""
    lines = result.stdout[result.stdout.rindex("transformers-torch") :].splitlines()
    assert lines[0].split() == ["transformers-torch", "passed", "failed", "skipped", "seconds", "log"]
    return [line.split() for line in lines[1:]]


def test_goes_on_after_a_failure_and_says_what_failed_where(matrix, tmp_path):
    environment(tmp_path, "5.17.0", before="export BROKEN=1")
    environment(tmp_path, "5.19.0")
    result = matrix("--transformers", "5.17.0,5.18.0,5.19.0", "-n", "0")
    assert result.returncode == 1
    torch = PINNED["torch"]
    broken, missing, good = table(result)
    assert broken[:4] == [f"5.17.0-{torch}", "1", "1", "1"] and broken[-1] == "FAILED"
    assert missing == [f"5.18.0-{torch}", "-", "-", "-", "-", f".matrix/logs/5.18.0-{torch}.log", "not_installed"]
    assert good[:4] == [f"5.19.0-{torch}", "2", "0", "1"] and good[-1] == "passed"
    assert "test_fails_where_told_to" in (tmp_path / broken[5]).read_text()
    assert "FAILED tests/test_three.py::test_fails_where_told_to" in result.stdout


def test_all_passing_is_exit_code_0_and_arguments_go_to_pytest(matrix, tmp_path):
    environment(tmp_path, "5.17.0", before="export BROKEN=1", torch="2.11.0")
    result = matrix("--torch", "2.11.0", "--transformers", "5.17.0", "-n", "0", "-k", "passes or skipped")
    assert result.returncode == 0, result.stdout
    assert [row[:4] for row in table(result)] == [["5.17.0-2.11.0", "1", "0", "1"]]


def test_without_an_index_the_newest_is_the_pinned_one_and_is_taken_once(matrix, tmp_path):
    environment(tmp_path, PINNED["transformers"])
    result = matrix("--transformers", f"newest,{PINNED['transformers']}", "-n", "0")
    assert [row[0] for row in table(result)] == [f"{PINNED['transformers']}-{PINNED['torch']}"]
    assert "note: pip cannot list the versions of transformers" in result.stderr


def test_an_environment_of_other_requirements_is_made_anew(matrix, tmp_path):
    environment(tmp_path, "5.17.0", numpy="1.26.0")
    result = matrix("--transformers", "5.17.0")
    assert result.returncode == 1 and table(result)[0][-1] == "not_installed"  # here no environment can be made
    assert not (tmp_path / ".matrix" / f"5.17.0-{PINNED['torch']}").exists()


def test_a_run_without_results_is_no_pass(matrix, tmp_path):
    environment(tmp_path, "5.17.0")
    result = matrix("--transformers", "5.17.0", "--no-such-option")
    assert result.returncode == 1 and table(result)[0][1:4] == ["-", "-", "-"] and table(result)[0][-1] == "FAILED"


@pytest.mark.parametrize("arguments", [("--torch",), ("--torch", "newest"), ("--transformers", "five"), ("--torch", ",")])
def test_mistakes_are_one_line_and_exit_code_2(matrix, arguments, tmp_path):
    result = matrix(*arguments)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not (tmp_path / ".matrix").exists()


def test_quick_names_files_that_exist(matrix):
    script = (ROOT / "scripts/test_matrix.sh").read_text()
    names = script.split("quick=(tests/test_{")[1].split("}")[0].split(",")
    assert len(names) >= 6 and all((ROOT / f"tests/test_{name}.py").is_file() for name in names)


def test_help_says_how_to_call_it(matrix):
    result = matrix("--help")
    assert result.returncode == 0 and "scripts/test_matrix.sh [--transformers" in result.stdout
