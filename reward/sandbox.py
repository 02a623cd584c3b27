"""Running programs that nobody has read. This side starts the fork server in its sandbox and talks to it.

`Sandbox.run` runs one cell, or two that are joined by a channel, and says how each ended. What keeps a cell in is in
`reward/inside`, what starts it in `reward/sandbox_kinds.py`; docs/sandbox.md lists the attacks it was held against.
`python -m reward.sandbox` says which kind of sandbox this machine gets, why, and what it holds.
"""

import atexit
import contextlib
import fcntl
import functools
import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import UserError, one_line_errors
from reward.sandbox_kinds import KINDS, PROBE, PROBED, start_commands

ERROR_BYTES = 4000  # kept of what a program writes to stderr
START_SECONDS = 60.0
PROCESSES = 64  # of one cell, at most
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONUTF8": "1",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": "/packages",
}


@dataclass(frozen=True)
class Limits:
    """What one cell may use. `seconds` is processor time of all its processes together."""

    seconds: float = 1.0
    wall: float | None = None  # seconds, those not counted in which a busy machine kept it from running
    memory: int = 1 << 30
    output: int = 16 << 20

    def order(self) -> dict[str, float]:
        """What the keeper of a cell is told; how much is written is watched here."""
        wall = self.wall if self.wall is not None else 2 * self.seconds + 1
        return {"seconds": self.seconds, "wall": wall, "memory": self.memory, "processes": PROCESSES}


@dataclass
class Cell:
    """One process to run: a mode of `inside/programs.py`, the fields of its order, what it reads."""

    mode: str
    order: dict[str, Any]
    limits: Limits
    stdin: bytes = b""


@dataclass
class Outcome:
    """How a cell ended: exited, timeout, memory, output_limit, stopped, lost or infrastructure."""

    reason: str = ""
    code: int = 0  # exit code, negative for a signal
    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)  # the end of it
    result: bytearray = field(default_factory=bytearray)  # what was written to the result descriptor
    cpu: float = 0.0
    wall: float = 0.0
    error: str = ""  # of the infrastructure


@dataclass
class Server:
    """The running fork server."""

    process: subprocess.Popen[bytes]
    requests: socket.socket
    pid: int  # of the process that started it: a fork of that must start its own
    kind: str  # of KINDS
    why: str = ""  # no stronger kind is used
    broken: tuple[str, ...] = ()  # what the probe could do, of PROBED


class Sandbox:
    """A fork server in its sandbox: started with the first run, replaced when it has died, ended by `close`."""

    def __init__(self, kinds: Sequence[str] = tuple(KINDS)) -> None:
        """`kinds` are tried in this order."""
        self.kinds = kinds
        self.server: Server | None = None
        self._has_run = False
        self._reported = {"namespaces"}  # kinds of which the user has been warned, or need not be
        self._lock = threading.Lock()
        # More cells at once would only wait for a processor.
        self._slots = threading.BoundedSemaphore(max(2, os.cpu_count() or 1))

    def run(self, *cells: Cell) -> list[Outcome]:
        """Run cells side by side, joined by a channel where there are two; how each ended.

        When the last of two has written its result and ended, the other is stopped. Where a sandbox that ran before
        cannot be started again, all end as infrastructure; UserError where it has never run.
        """
        with self._lock:
            try:
                server = self._running_server()
            except UserError as error:
                if not self._has_run:
                    raise
                return [Outcome("infrastructure", error=str(error)) for _ in cells]
        with self._slots:
            return _run_cells(server, cells)

    def kind(self) -> str:
        """The kind that programs run in here; starts the server."""
        with self._lock:
            return self._running_server().kind

    def report(self) -> tuple[str, str]:
        """The kind of sandbox that this machine gets, and in one line why, what it holds and what it does not."""
        with self._lock:
            self._reported.update(KINDS)
            server = self._running_server()
            return server.kind, _describe(server)

    def close(self) -> None:
        """End the fork server and all that runs under it; the next run starts another."""
        with self._lock:
            server, self.server = self.server, None
            if server is None:
                return
            server.requests.close()
            if server.pid == os.getpid():
                try:
                    server.process.wait(5)
                except subprocess.TimeoutExpired:
                    server.process.kill()
                    server.process.wait()

    def _running_server(self) -> Server:
        """The server, started where there is none; the lock is held."""
        server = self.server
        if server is not None and (server.pid != os.getpid() or server.process.poll() is not None):
            server.requests.close()
            self.server = None
        if self.server is None:
            self.server = self._start_server()
            if not self._has_run:
                atexit.register(self.close)
            self._has_run = True
            if self.server.kind not in self._reported:
                self._reported.add(self.server.kind)
                print(f"reward: {_describe(self.server)}", file=sys.stderr, flush=True)
        return self.server

    def _start_server(self) -> Server:
        if sys.platform != "linux":
            raise UserError(
                f"reward.kind=code: running programs needs Linux, this is {sys.platform}; use reward.function"
            )
        reasons: list[str] = []
        for kind in self.kinds:
            commands = start_commands(kind)
            if not commands:
                reasons.append("bubblewrap is not installed (apt-get install bubblewrap)")
            for command in commands:
                server = _try_server(command, kind)
                if isinstance(server, Server):
                    server.why = "" if kind == "namespaces" else "; ".join(dict.fromkeys(reasons))
                    return server
                reasons.append(server)
        raise UserError(f"reward.kind=code: no sandbox can start here: {'; '.join(reasons)}")


SANDBOX = Sandbox()  # this process's


def _run_cells(server: Server, cells: tuple[Cell, ...]) -> list[Outcome]:
    channel = [end.detach() for end in socket.socketpair()] if len(cells) == 2 else [os.open(os.devnull, os.O_RDWR)]
    runs = [_Run(server, cell, end) for cell, end in zip(cells, channel, strict=True)]
    with selectors.DefaultSelector() as selector:
        for run in runs:
            selector.register(run.control, selectors.EVENT_READ, run.read_control)
            for name, descriptor in run.pipes.items():
                selector.register(descriptor, selectors.EVENT_READ, functools.partial(run.read_pipe, name))
        deadline = time.monotonic() + max(cell.limits.order()["wall"] for cell in cells) + 120
        while selector.get_map():
            events = selector.select(max(0.0, deadline - time.monotonic()))
            if not events:
                for run in runs:
                    run.outcome.reason = "infrastructure"
                    run.outcome.error = "the sandbox did not answer"
                break
            for event, _ in events:
                if not event.data():
                    selector.unregister(event.fileobj)
            # Where the program ended first, what it ended of is still to come.
            if len(runs) > 1 and runs[-1].ended and runs[-1].outcome.result not in (b"", b"ended"):
                runs[0].stop()
    for run in runs:
        run.control.close()
        for descriptor in run.pipes.values():
            os.close(descriptor)
    return [run.outcome for run in runs]


class _Run:
    """A cell that is running, seen from outside."""

    def __init__(self, server: Server, cell: Cell, channel: int) -> None:
        """Send the request for a cell to the server; its ends of all descriptors are closed here."""
        self.limits, self.outcome = cell.limits, Outcome()
        self.written = 0  # bytes, to all pipes
        self.started = self.ended = False
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pipes: dict[str, int] = {}
        order = json.dumps({**cell.order, "mode": cell.mode, **cell.limits.order()}).encode()
        given = [theirs.detach(), _memory_file(order), _memory_file(cell.stdin)]
        for name in ("stdout", "stderr", "result"):
            self.pipes[name], end = os.pipe()
            given.append(end)
        given.insert(-1, channel)
        try:
            socket.send_fds(server.requests, [b"run"], given)
        except OSError as error:
            self.outcome.error = str(error)
        finally:
            for descriptor in given:
                os.close(descriptor)

    def read_control(self) -> bool:
        """Take what the keeper says of the cell; False at the end."""
        try:
            data = self.control.recv(1 << 16)
        except OSError:
            data = b""
        if data == b"started":
            self.started = True
            return True
        self.ended = True
        outcome = self.outcome
        limit = outcome.reason  # an output limit that stopped it stays the reason
        if data:
            vars(outcome).update(json.loads(data))
        else:
            # Once the program runs, the loss of its keeper may be its own doing: then it is no accident to be retried.
            outcome.reason = "lost" if self.started else "infrastructure"
            outcome.error = outcome.error or "the keeper of the cell ended without a report"
        outcome.reason = limit or outcome.reason
        return False

    def read_pipe(self, name: str) -> bool:
        """Take what the cell has written; False at the end."""
        data, outcome = os.read(self.pipes[name], 1 << 16), self.outcome
        if name == "stderr" or outcome.reason != "output_limit":
            taken = getattr(outcome, name)
            taken += data
        del outcome.stderr[:-ERROR_BYTES]
        self.written += len(data)
        if self.written > self.limits.output and not self.ended and not outcome.reason:
            outcome.reason = "output_limit"
            self.stop()
        return bool(data)

    def stop(self) -> None:
        """Have the cell ended; its keeper still reports."""
        with contextlib.suppress(OSError):  # it has ended
            self.control.shutdown(socket.SHUT_WR)


def _memory_file(content: bytes) -> int:
    """A read-only file of its own: unlike a pipe it needs nobody to feed it, and cannot be told apart from a file."""
    descriptor = os.memfd_create("input", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def _describe(server: Server) -> str:
    """One line: how programs are shut in, why no better, which promises hold and which do not."""
    held = [promise for promise in PROBED if promise not in server.broken]
    line = f"programs run in {KINDS[server.kind]}"
    line += f"; {server.why}" if server.why else ""
    line += f". Shut off: {', '.join(held) or 'nothing'}. Limited: memory, time, output"  # by the keeper, in every kind
    if server.kind == "plain":
        line += ". They can write no file, not even one of their own"
    if server.broken:
        line += f". Not shut off: {', '.join(server.broken)}: run trusted models only, or in a container of its own"
    return line


def _try_server(command: list[str], kind: str) -> Server | str:
    """Start a server and let one cell run in it; the reason where that fails."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [*command, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
            env=ENVIRONMENT,
            start_new_session=True,
        )
    ours.settimeout(START_SECONDS)
    try:
        reply = ours.recv(64).decode()
    except OSError as error:
        reply = str(error)
    ours.settimeout(None)
    server = Server(process, ours, os.getpid(), kind)
    if reply == "ready":
        error = _probe(server)
        if not error:
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return server
    else:
        error = reply or process.stderr.read().decode(errors="replace").strip()
    ours.close()
    process.kill()
    process.wait()
    why = error.splitlines()[-1] if error else f"exit code {process.returncode}"
    return f"{command[0]} cannot start here ({why})" if kind == "namespaces" else f"{kind}: {why}"


def _probe(server: Server) -> str:
    """Let a first program try what none may, and note in the server what it could do; why it did not run, or empty."""
    with tempfile.TemporaryDirectory(prefix="probe-") as folder:
        os.chmod(folder, 0o755)
        file = Path(folder, "file")
        file.touch()
        file.chmod(0o666)  # so that it is the sandbox that keeps it, not the file's mode
        source = PROBE.format(file=str(file), process=server.process.pid)
        (outcome,) = _run_cells(server, (Cell("program", {"source": source}, Limits(seconds=10)),))
    *broken, last = outcome.stdout.decode(errors="replace").splitlines() or [""]
    if outcome.reason == "exited" and last == "42":
        server.broken = tuple(broken)
        return ""
    return outcome.error or outcome.stderr.decode(errors="replace") or f"a first program ended with {outcome.reason}"


@one_line_errors
def main() -> None:
    """Print which kind of sandbox this machine gets, why, and what it holds."""
    print(": ".join(SANDBOX.report()))


if __name__ == "__main__":
    main()
