"""Whether a rank still moves: one that has not for a while is reported with the stack of all its threads."""

import contextlib
import faulthandler
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

_last = [0.0]  # when this rank last moved


def beat() -> None:
    """Say that this rank moves: called at every denoising step, forward and score."""
    _last[0] = time.monotonic()


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
        last = _last[0]
        if time.monotonic() - last >= timeout and last != reported:
            reported = last
            with file.open("a") as stream:
                stream.write(f"{time.strftime('%F %T')} rank {rank}: nothing moved for {timeout:g} s\n")
                stream.flush()
                faulthandler.dump_traceback(stream)
            told = f"rank {rank} has not moved for experiment.hang_timeout={timeout:g} s; where it stands: {file}"
            print(told, file=sys.stderr, flush=True)
