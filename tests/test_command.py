"""How an analysis command ends: its exit codes, one line on stderr, and signals."""

import os
import signal
import threading

import pytest

from analysis.command import CheckFailed, command, parser_of, seed_list
from stopping import Stopped, StopSignals


@pytest.mark.parametrize(
    "error, code, line",
    [
        (ValueError("a.yaml: lr\n  is missing"), 2, "error: a.yaml: lr is missing\n"),
        (FileNotFoundError(2, "No such file", "x.json"), 2, "error: [Errno 2] No such file: 'x.json'\n"),
        (CheckFailed("the control differs"), 1, "error: the control differs\n"),
        (Stopped("stopped by SIGTERM"), 75, "stopped by SIGTERM; the same command goes on from there\n"),
    ],
    ids=["mistake", "file", "check", "signal"],
)
def test_what_is_raised_becomes_a_line_and_a_code(error, code, line, capsys):
    @command
    def main(argv=None):
        raise error

    assert main([]) == code
    assert capsys.readouterr().err == line


def test_a_bug_keeps_its_traceback():
    @command
    def main():
        return {}["nothing"]

    with pytest.raises(KeyError):
        main()


@pytest.mark.parametrize("returned, code", [(None, 0), (0, 0), (1, 1)])
def test_the_code_of_a_command_that_ends_is_its_own(returned, code):
    assert command(lambda: returned)() == code


def test_help_shows_the_docstring_as_it_stands(capsys):
    with pytest.raises(SystemExit):
        parser_of("First line.\n\n    python -m analysis.x   indented", "x").parse_args(["--help"])
    assert "    python -m analysis.x   indented" in capsys.readouterr().out


def test_a_signal_stops_at_once_or_is_noted_while_deferred():
    with StopSignals() as stop, pytest.raises(Stopped, match="SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)
    with StopSignals() as stop:
        with stop.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.asked and stop.name == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "what was installed before is back"


def test_signals_are_left_alone_outside_the_main_thread():
    seen = []

    def work():
        with StopSignals() as stop:
            seen.append((stop.asked, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, signal.SIG_DFL)]


def test_seeds_by_comma_or_one_line_that_says_so():
    assert seed_list("0,12") == [0, 12]
    with pytest.raises(ValueError, match=r"^--seeds zero: must be whole numbers by comma, as 0,1$"):
        seed_list("zero")
