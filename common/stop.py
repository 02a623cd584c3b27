"""How a run is stopped without loss, and how one that hangs is noticed.

SIGTERM and Ctrl-C are taken note of, and acted on where nothing is half done.

A second signal, unless it follows at once, ends the process. Ranks that rl.py launched have a launcher above them,
which would kill them soon after it got the signal itself; so it keeps the signal from them and makes a file, which they
look for.
"""

import contextlib
import faulthandler
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from common.ranks import world
from common.runtime import console, python_command

STOP_FILE = "DLLM_RL_STOP_FILE"  # environment variable: the file that says that the job is to stop
AT_ONCE = 2.0  # seconds within which signals are one: launchers pass on what a terminal or scheduler sent to all
_received: list[tuple[int, float]] = []  # signals, each with its moment
_last_moved = [0.0]  # when this rank last moved


class Stopped(Exception):
    """The run was asked to stop; what was not finished is to be done again when it is resumed."""


@contextlib.contextmanager
def signals_noted() -> Iterator[None]:
    """Within it SIGTERM and SIGINT make `stop_requested` true instead of ending the process."""
    before = {number: signal.signal(number, _note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received.clear()


def stop_requested() -> bool:
    """Whether a signal came, here or to the launcher."""
    file = os.environ.get(STOP_FILE)
    return bool(_received) or bool(file and Path(file).exists())


def exit_code() -> int:
    """What a stopped program ends with: 0, as a scheduler expects after SIGTERM, or 130 after Ctrl-C."""
    return 130 if any(number == signal.SIGINT for number, _ in _received) else 0


def exit_code_of(job: Callable[[], object]) -> int:
    """Run a job to its end or to a signal; returns the program's exit code: 130 where Ctrl-C stopped it, else 0."""
    with signals_noted():
        try:
            job()
        except Stopped:
            # a launcher's command is not known in its ranks, but rl.py launches with its own arguments
            known = world() == 1 or STOP_FILE in os.environ
            command = resume_command() if known else "the same command with experiment.start_from_scratch=False"
            console.print(f"to go on: {command}")
            return exit_code()
    return 0


def resume_command() -> str:
    """The command of this program, changed so that it goes on where it stopped."""
    key = "experiment.start_from_scratch"
    arguments = [argument for argument in sys.argv if not argument.startswith(f"{key}=")]
    return f"{python_command()} {shlex.join([*arguments, f'{key}=False'])}"


def _note(number: int, frame: FrameType | None) -> None:
    if _received and time.monotonic() - _received[0][1] > AT_ONCE:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    _received.append((number, time.monotonic()))


def beat() -> None:
    """Say that this rank moves: called at every denoising step, forward and score."""
    _last_moved[0] = time.monotonic()


@contextlib.contextmanager
def watched(timeout: float, file: Path, rank: int) -> Iterator[None]:
    """Within it a pause of `timeout` seconds is reported, once each; the stacks go to `file`. 0: no watch."""
    if timeout == 0:
        yield
        return
    done = threading.Event()
    beat()
    thread = threading.Thread(target=_watch, args=(timeout, file, rank, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _watch(timeout: float, file: Path, rank: int, done: threading.Event) -> None:
    reported = -1.0
    while not done.wait(timeout / 10):
        last = _last_moved[0]
        if time.monotonic() - last >= timeout and last != reported:
            reported = last
            with file.open("a") as stream:
                stream.write(f"{time.strftime('%F %T')} rank {rank}: nothing moved for {timeout:g} s\n")
                stream.flush()
                faulthandler.dump_traceback(stream)
            told = f"rank {rank} has not moved for experiment.hang_timeout={timeout:g} s; where it stands: {file}"
            print(told, file=sys.stderr, flush=True)
