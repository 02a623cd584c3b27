"""Scoring in processes of their own: responses go in as they finish, scores come back in order."""

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from common.errors import UserError
from common.schema import RewardConfig
from common.trajectory import Score, Task


class Workers:
    """`count` processes that score; each is fed by a thread, and one that dies is replaced once for each response."""

    def __init__(self, reward: RewardConfig, data_type: str | None, count: int) -> None:
        self._made_from = (reward, data_type)
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        for _ in range(count):
            self._idle.put(None)  # started when first needed
        self._threads = ThreadPoolExecutor(count)

    def submit(self, text: str, task: Task, truncated: bool) -> Future[Score]:
        """Have a response scored; the future raises what the scoring raised."""
        return self._threads.submit(self._score, text, task, truncated)

    def close(self) -> None:
        """Drop what is not scored yet and end the processes."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        while not self._idle.empty():
            if process := self._idle.get():
                _end(process)

    def _score(self, text: str, task: Task, truncated: bool) -> Score:
        process = self._idle.get()
        try:
            for _ in range(2):
                process = process or _start(*self._made_from)
                answer = _ask(process, (text, task, truncated))
                if answer:
                    break
                code = _end(process)
                process = None
            else:
                raise RuntimeError(
                    f"a scoring process ended twice (exit code {code}) on a response to task '{task.id}'; see above"
                )
        finally:
            self._idle.put(process)
        kind, value = answer
        if kind == "user_error":
            raise UserError(value)
        if kind == "error":
            raise RuntimeError(f"scoring a response to task '{task.id}' failed:\n{value}")
        return value


def _start(reward: RewardConfig, data_type: str | None) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("worker.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
    )
    _send(process, pickle.dumps((sys.path, reward, data_type)))
    return process


def _ask(process: subprocess.Popen[bytes], request: tuple) -> tuple | None:
    """The answer; None where the process ended instead."""
    try:
        _send(process, request)
        return pickle.load(process.stdout)
    except (BrokenPipeError, EOFError, pickle.UnpicklingError):
        return None


def _send(process: subprocess.Popen[bytes], message: object) -> None:
    pickle.dump(message, process.stdin)
    process.stdin.flush()


def _end(process: subprocess.Popen[bytes]) -> int:
    """End a worker by closing its input, so that it takes its own helpers with it."""
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    process.stdout.close()
    try:
        return process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
