"""Running programs that nobody has read. This side starts the fork server in its sandbox and talks to it.

`run_cells` runs one cell, or several that are joined by a channel, and tells how each ended. What keeps a cell in is
in `reward/inside`; docs/sandbox.md lists the attacks it was held against.
"""

from __future__ import annotations

import atexit
import fcntl
import functools
import json
import os
import selectors
import shutil
import site
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError

INSIDE = Path(__file__).with_name("inside")
PACKAGES = ("numpy", "numpy.libs", "sympy", "mpmath")  # what programs may import beside the standard library
ERROR_BYTES = 4000  # kept of what a program writes to stderr
START_SECONDS = 60.0
PYTHON_OPTIONS = ("-P", "-s", "-S", "-B", "-X", "utf8")
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

_lock = threading.Lock()
_slots = threading.BoundedSemaphore(max(2, os.cpu_count() or 1))  # more at once would only wait for a processor
_server: Server | None = None
_said: set[str] = set()


@dataclass(frozen=True)
class Limits:
    """What one cell may use. `seconds` is processor time of all its processes together."""

    seconds: float = 1.0
    wall: float | None = None  # seconds, those not counted in which a busy machine kept it from running
    memory: int = 1 << 30
    output: int = 16 << 20
    processes: int = 64

    def order(self) -> dict[str, float]:
        wall = self.wall if self.wall is not None else 2 * self.seconds + 1
        return {"seconds": self.seconds, "wall": wall, "memory": self.memory, "processes": self.processes}


@dataclass
class Cell:
    """One process to run: a mode of `inside/programs.py`, what it is told, what it reads."""

    mode: str
    told: dict[str, Any]
    limits: Limits
    stdin: bytes = b""


@dataclass
class Outcome:
    """How a cell ended: exited, timeout, memory, output_limit, stopped, lost or infrastructure."""

    reason: str = ""
    code: int = 0  # exit code, negative for a signal
    stdout: bytes = b""
    stderr: bytes = b""  # the end of it
    result: bytes = b""  # what was written to the result descriptor
    cpu: float = 0.0
    wall: float = 0.0
    error: str = ""  # of the infrastructure


@dataclass
class Server:
    """The running fork server."""

    process: subprocess.Popen[bytes]
    requests: socket.socket
    pid: int  # of the process that started it: a fork of that must start its own
    kind: str  # namespaces or plain


def run_cells(*cells: Cell) -> list[Outcome]:
    """Run cells side by side, joined pairwise by a channel where there are two; how each ended.

    When the last of two has written its result and ended, the other is stopped.
    """
    with _lock:
        server = _running_server()
    with _slots:
        return _run_cells(server, cells)


def sandbox_kind() -> str:
    """`namespaces` where bubblewrap works, `plain` where it does not; starts the server."""
    with _lock:
        return _running_server().kind


def stop_sandbox() -> None:
    """End the fork server and all that runs under it; the next run starts another."""
    global _server
    with _lock:
        server, _server = _server, None
        if server is None:
            return
        server.requests.close()
        if server.pid == os.getpid():
            try:
                server.process.wait(5)
            except subprocess.TimeoutExpired:
                server.process.kill()
                server.process.wait()


def _run_cells(server: Server, cells: tuple[Cell, ...]) -> list[Outcome]:
    channel = [end.detach() for end in socket.socketpair()] if len(cells) == 2 else [None] * len(cells)
    runs = [_start(server, cell, end) for cell, end in zip(cells, channel)]
    with selectors.DefaultSelector() as selector:
        for run in runs:
            for name, descriptor in run.pipes.items():
                selector.register(descriptor, selectors.EVENT_READ, (run, name))
            selector.register(run.control, selectors.EVENT_READ, (run, "control"))
        deadline = time.monotonic() + max(cell.limits.order()["wall"] for cell in cells) + 120
        while selector.get_map():
            events = selector.select(max(0.0, deadline - time.monotonic()))
            if not events:
                for run in runs:
                    run.outcome.reason = "infrastructure"
                    run.outcome.error = "the sandbox did not answer"
                break
            for event, _ in events:
                run, name = event.data
                if not _read(run, name):
                    selector.unregister(event.fileobj)
            # Where the program ended first, what it ended of is still to come.
            if len(runs) > 1 and runs[-1].ended and runs[-1].taken["result"] not in (b"", b"ended"):
                runs[0].stop()
    for run in runs:
        run.close()
    return [run.outcome for run in runs]


class _Run:
    """A cell that is running, seen from outside."""

    def __init__(self, limits: Limits, control: socket.socket, pipes: dict[str, int]) -> None:
        self.limits, self.control, self.pipes = limits, control, pipes
        self.outcome = Outcome()
        self.taken = {"stdout": bytearray(), "result": bytearray()}
        self.written = 0
        self.started = self.ended = False

    def stop(self) -> None:
        if not self.ended:
            try:
                self.control.shutdown(socket.SHUT_WR)
            except OSError:
                self.ended = True

    def close(self) -> None:
        """Let go of the descriptors; the outcome is complete."""
        self.outcome.stdout, self.outcome.result = (bytes(taken) for taken in self.taken.values())
        self.control.close()
        for descriptor in self.pipes.values():
            os.close(descriptor)


def _start(server: Server, cell: Cell, channel: int | None) -> _Run:
    """Send one request to the server; its ends of all descriptors are closed here."""
    control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours: dict[str, int] = {}
    order = json.dumps({**cell.told, "mode": cell.mode, **cell.limits.order()}).encode()
    given = [theirs.detach(), _memory_file(order)]
    given.append(_memory_file(cell.stdin))
    for name in ("stdout", "stderr"):
        ours[name], end = os.pipe()
        given.append(end)
    given.append(channel if channel is not None else os.open(os.devnull, os.O_RDWR))
    ours["result"], end = os.pipe()
    given.append(end)
    run = _Run(cell.limits, control, ours)
    try:
        socket.send_fds(server.requests, [b"run"], given)
    except OSError as error:
        run.outcome.error = str(error)
    finally:
        for descriptor in given:
            os.close(descriptor)
    return run


def _memory_file(content: bytes) -> int:
    """A read-only file of its own: unlike a pipe it needs nobody to feed it, and cannot be told apart from a file."""
    descriptor = os.memfd_create("input", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def _read(run: _Run, name: str) -> bool:
    """Take what one descriptor has; False at its end."""
    outcome = run.outcome
    if name == "control":
        data = _receive(run.control)
        if data == b"started":
            run.started = True
            return True
        run.ended = True
        if data:
            report = json.loads(data)
            limit = outcome.reason  # an output limit that stopped it stays the reason
            vars(outcome).update(report)
            outcome.reason = limit or report["reason"]
        else:
            # Once the program runs, the loss of its keeper may be its own doing: then it is no accident to be retried.
            outcome.reason = outcome.reason or ("lost" if run.started else "infrastructure")
            outcome.error = outcome.error or "the keeper of the cell ended without a report"
        return False
    data = os.read(run.pipes[name], 1 << 16)
    if name == "stderr":
        outcome.stderr = (outcome.stderr + data)[-ERROR_BYTES:]
    elif outcome.reason != "output_limit":
        run.taken[name] += data
    run.written += len(data)
    if run.written > run.limits.output and not run.ended and not outcome.reason:
        outcome.reason = "output_limit"
        run.stop()
    return bool(data)


def _receive(control: socket.socket) -> bytes:
    try:
        return control.recv(1 << 16)
    except OSError:
        return b""


def _running_server() -> Server:
    """The server, started where there is none; the lock is held."""
    global _server
    if _server is not None and (_server.pid != os.getpid() or _server.process.poll() is not None):
        _server.requests.close()
        _server = None
    if _server is None:
        _server = _start_server()
        atexit.register(stop_sandbox)
    return _server


def _start_server() -> Server:
    if sys.platform != "linux":
        raise UserError(f"reward.kind=code: running programs needs Linux, this is {sys.platform}; use reward.function")
    why = "bubblewrap is not installed (apt-get install bubblewrap)"
    if shutil.which("bwrap"):
        server, why = _try_server(_bubblewrap(), "namespaces")
        if server:
            return server
        why = f"bubblewrap is installed but cannot start here ({why})"
    if "plain" not in _said:
        _said.add("plain")
        print(
            f"reward: {why}: programs run without a file system, a process space and a network of their own. Limits of "
            "time, memory and output hold, new processes, signals and sockets are refused, but they can read what "
            "this user can and write where it can. Run trusted models only, or in a container",
            file=sys.stderr,
            flush=True,
        )
    command = [sys.executable, *PYTHON_OPTIONS, str(INSIDE / "server.py")]
    server, why = _try_server(command, "plain")
    if server is None:
        raise RuntimeError(f"the sandbox's server could not start: {why}")
    return server


def _bubblewrap() -> list[str]:
    """The command around the server: Python and its libraries to read, an empty /tmp, no network, nothing else."""
    command = ["bwrap", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    if os.getuid() == 0:  # the server gives up root by itself; bwrap alone cannot and still read a Python in /root
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user"]
    command += ["--new-session", "--ro-bind", "/usr", "/usr"]
    for folder in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        if os.path.islink(folder):
            command += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            command += ["--ro-bind", folder, folder]
    command += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    python = os.path.realpath(sys.executable)
    prefix = os.path.realpath(sys.base_prefix)
    if not prefix.startswith("/usr"):
        for parent in reversed(Path(prefix).parents[:-1]):  # else only root could pass through them
            command += ["--perms", "0755", "--dir", str(parent)]
        command += ["--ro-bind", prefix, prefix]
    command += ["--dev", "/dev", "--remount-ro", "/dev", "--proc", "/proc", "--tmpfs", "/tmp"]
    command += ["--ro-bind", str(INSIDE), "/inside", "--perms", "0755", "--dir", "/packages"]
    for name, folder in _packages().items():
        command += ["--ro-bind", str(folder), f"/packages/{name}"]
    return [*command, "--remount-ro", "/", "--chdir", "/tmp", python, *PYTHON_OPTIONS, "/inside/server.py"]


@functools.cache
def _packages() -> dict[str, Path]:
    folders = [Path(folder) for folder in site.getsitepackages()]
    return {name: folder / name for name in PACKAGES for folder in folders if (folder / name).is_dir()}


def _first_cell(server: Server) -> str:
    """What keeps a trivial program from running; empty where nothing does."""
    told = {"source": "print(6 * 7)"}
    outcome = _run_cells(server, (Cell("program", told, Limits(seconds=10)),))[0]
    if outcome.reason == "exited" and outcome.stdout == b"42\n":
        return ""
    return outcome.error or outcome.stderr.decode(errors="replace") or f"a first program ended with {outcome.reason}"


def _try_server(command: list[str], kind: str) -> tuple[Server | None, str]:
    """Start a server and let one cell run in it; None and the reason where that fails."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen(
        [*command, str(theirs.fileno()), kind],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=[theirs.fileno()],
        env=ENVIRONMENT,
        start_new_session=True,
    )
    theirs.close()
    ours.settimeout(START_SECONDS)
    try:
        said = ours.recv(64)
    except OSError as error:
        said = str(error).encode()
    ours.settimeout(None)
    if said == b"ready":
        server = Server(process, ours, os.getpid(), kind)
        error = _first_cell(server)
        if not error:
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return server, ""
    else:
        error = process.stderr.read().decode(errors="replace").strip() if not said else said.decode()
    ours.close()
    process.kill()
    process.wait()
    return None, error.splitlines()[-1] if error else f"exit code {process.returncode}"
