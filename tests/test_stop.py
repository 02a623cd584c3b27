"""Signals: noted, acted on once, and not taken for a second one where a launcher passes the same one on."""

import os
import signal
import sys
from pathlib import Path

import pytest

from common import stop


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_is_noted(number: int, code: int) -> None:
    with stop.signals_noted():
        assert not stop.stop_requested()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)  # passed on by a launcher at once
        assert stop.stop_requested() and stop.exit_code() == code
    with stop.signals_noted():
        assert not stop.stop_requested()


def test_the_command_that_resumes_names_this_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python` where a shell would find this one by it, else the path from the current folder; from elsewhere whole."""
    monkeypatch.setattr(sys, "argv", ["rl.py", "a=b c", "experiment.start_from_scratch=True"])
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    for own in (tmp_path / ".venv" / "bin", tmp_path / "other"):
        own.mkdir(parents=True)
        (own / "python").symlink_to(os.path.realpath("/bin/sh"))
    rest = "rl.py 'a=b c' experiment.start_from_scratch=False"
    for path, folder, typed in (
        (f"{tmp_path}/.venv/bin:/bin", tmp_path, "python"),
        (f"{tmp_path}/other", tmp_path, ".venv/bin/python"),
        ("/nowhere", tmp_path.parent / "nowhere", f"{tmp_path}/.venv/bin/python"),
    ):
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        monkeypatch.setenv("PATH", path)
        assert stop.resume_command() == f"{typed} {rest}"


def test_a_later_signal_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "AT_ONCE", 0.0)
    child = os.fork()
    if child == 0:
        with stop.signals_noted():
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
        os._exit(3)  # it was not ended
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
