"""Processes that answer one question at a time: `Worker` is one, whatever it runs; `Workers` are several that score.

Both ends talk in messages of bytes over a socket. The process first says that it is ready, then gives one answer to
each question, and ends when the socket is closed, which happens at the latest when its parent ends. Not
multiprocessing's own processes: those would run the user's script again where it has no `__main__` guard.
"""

import contextlib
import multiprocessing
import os
import pickle
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection

from common.errors import UserError
from common.schema import RewardConfig
from common.trajectory import Score, Task

READY = b"ready"
END_SECONDS = 10.0  # for a process to finish what it is at and to end what it started
# One thread each: on hosts of many cores a numerical library's buffers alone would pass a memory limit.
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


class Worker:
    """A process that is started when it is first needed, and again when it has ended. Threads may share one."""

    def __init__(self, command: Sequence[str], first: bytes = b"", start_seconds: float | None = None) -> None:
        """`command` is given the descriptor of its socket as last argument, and `first` as first message, if any."""
        self.command, self.first, self.start_seconds = command, first, start_seconds
        self.process: subprocess.Popen[bytes] | None = None
        self.connection: Connection | None = None
        self.exit_code = 0  # of the process that ended last
        self._lock = threading.RLock()

    def ask(self, question: bytes) -> bytes:
        """The answer. EOFError where the process ended instead; the next question starts another."""
        with self._lock:
            self.start()
            try:
                self.connection.send_bytes(question)
                return self.connection.recv_bytes()
            except (EOFError, OSError):
                self.close()
                raise EOFError from None
            except BaseException:  # an interrupt: the answer must not be taken for that to the next question
                self.close(0)
                raise

    def start(self) -> None:
        """Start the process unless it runs. EOFError where it ends, or takes too long, before it is ready."""
        with self._lock:
            if self.process is not None and self.process.poll() is None:
                return
            self.close()
            self.connection, theirs = multiprocessing.Pipe()
            with theirs:
                self.process = subprocess.Popen(
                    [*self.command, str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # what a reward function prints is no part of this program's output
                    pass_fds=[theirs.fileno()],
                    env=os.environ | ONE_THREAD,
                    start_new_session=True,  # an interrupt from the keyboard is the parent's business
                )
            try:
                if self.first:
                    self.connection.send_bytes(self.first)
                if not self.connection.poll(self.start_seconds) or self.connection.recv_bytes() != READY:
                    raise EOFError
            except BaseException as error:
                self.close()
                if isinstance(error, OSError):  # it ended before it took the first message
                    raise EOFError from None
                raise

    def close(self, seconds: float = END_SECONDS) -> None:
        """End the process: by closing its socket, so that it ends its own processes, and by force after `seconds`."""
        with self._lock:
            if self.process is None:
                return
            self.connection.close()
            try:
                self.exit_code = self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.exit_code = self.process.wait()
            self.process = None


class Workers:
    """`reward.workers` processes that score, each fed by a thread; one that dies is replaced once for each response."""

    def __init__(self, reward: RewardConfig, data_type: str | None) -> None:
        program = f"import sys; sys.path[:] = {sys.path!r}; from reward.workers import serve; serve()"
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for _ in range(reward.workers):
            self._idle.put(Worker([sys.executable, "-P", "-c", program], pickle.dumps((reward, data_type))))
        self._threads = ThreadPoolExecutor(reward.workers)

    def submit(self, text: str, task: Task, truncated: bool) -> Future[Score]:
        """Have a response scored; the future raises what the scoring raised."""
        return self._threads.submit(self._score, text, task, truncated)

    def close(self) -> None:
        """Drop what is not scored yet and end the processes."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().close()

    def _score(self, text: str, task: Task, truncated: bool) -> Score:
        question = pickle.dumps((text, task, truncated))
        worker = self._idle.get()
        try:
            try:
                answer = worker.ask(question)
            except EOFError:
                answer = worker.ask(question)
        except EOFError:
            raise RuntimeError(
                f"a scoring process ended twice (exit code {worker.exit_code}) on a response to task '{task.id}'; "
                "see above"
            ) from None
        finally:
            self._idle.put(worker)
        scored = pickle.loads(answer)
        if isinstance(scored, Exception):
            raise scored
        return scored


def serve() -> None:
    """What a scoring process runs: it is sent (reward config, data type), then (text, task, truncated) each time.

    It answers with a Score, or with the exception that the parent is to raise. All messages are pickles.
    """
    from reward.score import make_scorer  # which imports this module

    descriptor = int(sys.argv[-1])
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    scorer = make_scorer(*connection.recv())
    with contextlib.suppress(EOFError, ConnectionError):  # the parent wants no more
        connection.send_bytes(READY)
        while True:
            text, task, truncated = connection.recv()
            try:
                scored = scorer(text, task, truncated)
            except UserError as error:
                scored = UserError(str(error))  # without what it may hold besides, which no pickle takes
            except Exception:  # a reward function of the user's may raise anything
                scored = RuntimeError(f"scoring a response to task '{task.id}' failed:\n{traceback.format_exc()}")
            connection.send(scored)
