"""The fork server: one small Python process, started once inside the sandbox, that forks a cell for every run.

A request is one message with descriptors. For each the server forks a *keeper*, which makes namespaces, forks the
*cell* into them, watches its time and memory, kills it with all it started, and reports on the request's control
socket. The cell has no descriptor of the keeper's, and cannot see it. Closing the control socket is the order to kill.

Runs inside the sandbox and imports nothing of the project: `python server.py namespaces SOCKET_DESCRIPTOR`, or, where
there are none, `landlock PATHS SOCKET_DESCRIPTOR` or `plain …`, PATHS being what `fallback.prepare` is told.
"""

import _sitebuiltins
import builtins
import contextlib
import gc
import json
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import fallback
import jail
import programs
from fallback import Fallback

# Imported before the first fork, so that no run pays for what most programs import.
PRELOADED = """bisect cmath collections copy datetime decimal fractions functools heapq io itertools math operator
queue random re statistics string struct traceback typing"""
DESCRIPTORS = 7  # control, order, stdin, stdout, stderr, channel, result
START = 5  # the cell's descriptor on which it says that it is shut in; its other five are numbered from 0
POLL = 0.02  # seconds between looks at a running cell
MAX_WAIT = 60.0  # seconds a cell may be kept from running by a busy machine
TICK = 1 / os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    requests = socket.socket(fileno=int(sys.argv[-1]))
    shut = None if sys.argv[1] == "namespaces" else fallback.prepare(sys.argv[1], sys.argv[2])
    for name in PRELOADED.split():
        __import__(name)
    for name in ("exit", "quit"):  # what `site` would add, which is not run
        setattr(builtins, name, _sitebuiltins.Quitter(name, "Ctrl-D"))
    try:
        raise LookupError
    except LookupError:
        traceback.format_exc()  # the first traceback imports more
    if not shut and os.getuid() == 0:
        fallback.become_nobody()
        jail.prctl(jail.PR_SET_DUMPABLE, 1)  # else the keepers could not write their uid_map
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are reaped by the kernel
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt from the keyboard is the trainer's business
    sys.path.pop(0)
    gc.collect()
    gc.freeze()
    requests.send(b"ready")
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, 64, DESCRIPTORS)
        if not message:
            os._exit(0)
        try:
            child = os.fork()
        except OSError as error:
            _report(socket.socket(fileno=descriptors[0]), reason="infrastructure", error=str(error))
            descriptors = descriptors[1:]
            child = -1
        if child == 0:
            requests.close()
            keep(descriptors, shut)
        for descriptor in descriptors:
            os.close(descriptor)


def keep(descriptors: list[int], shut: Fallback | None) -> None:
    """Run one cell and report on it; ends the process."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    control = socket.socket(fileno=descriptors[0])
    folder = None
    try:
        with open(descriptors[1], "rb") as file:
            order = json.load(file)
        proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)  # ours: of the pid namespace that sees the cell
        if shut:
            jail.prctl(jail.PR_SET_CHILD_SUBREAPER, 1)
            folder = fallback.make_folder(shut)
        else:
            jail.enter_namespaces()
            jail.mount_folders()
        started, start = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(started)
            enter_cell(order, descriptors, start, shut, folder)
        os.close(start)
        for descriptor in descriptors[2:]:
            os.close(descriptor)
        reply = os.read(started, 1000)
        if reply == b"started":
            control.send(reply)
            report = watch(pid, proc, control, order, folder)
        else:
            report = {"reason": "infrastructure", "error": reply.decode() or "the cell ended before it began"}
        if report["reason"] != "exited" or shut:
            kill_tree(pid, proc, orphans=bool(shut))
    except OSError as error:
        report = {"reason": "infrastructure", "error": str(error)}
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    _report(control, **report)
    os._exit(0)


def enter_cell(
    order: dict[str, Any], descriptors: list[int], start: int, shut: Fallback | None, folder: str | None
) -> None:
    """The cell's own process: give everything up, then run the order."""
    try:
        jail.prctl(jail.PR_SET_PDEATHSIG, jail.SIGKILL)
        os.setsid()
        stdin, stdout, stderr, channel, result = descriptors[2:]
        # First out of the way, so that no dup2 below overwrites one that is still needed.
        given = (stdin, stdout, stderr, channel, result, start)
        high = [os.dup2(descriptor, 200 + number) for number, descriptor in enumerate(given)]
        start = START
        for number, descriptor in enumerate(high):
            os.dup2(descriptor, number)
        os.closerange(START + 1, 1024)
        os.chdir(folder or "/tmp")
        os.environ.update(HOME=folder or "/tmp", TMPDIR=folder or "/tmp")
        tempfile.tempdir = None
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if shut:
            fallback.shut_in(shut, folder, order)
        else:
            jail.set_limits(order["memory"], order["processes"], order["seconds"])
            jail.drop_privileges()
            jail.filter_system_calls("namespaces")
        run = programs.MODES[order["mode"]]
        if order["mode"] != "tests":
            os.close(programs.RESULT)
        if order["mode"] == "program":
            os.close(programs.CHANNEL)
    except Exception as error:
        os.write(start, f"{type(error).__name__}: {error}"[:900].encode())
        os._exit(1)
    os.write(start, b"started")
    os.close(start)
    run(order)
    os._exit(1)


@dataclass
class Usage:
    """What a cell's processes have used together."""

    cpu: float = 0.0
    waited: float = 0.0  # seconds ready to run while others ran
    memory: int = 0


def watch(pid: int, proc: int, control: socket.socket, order: dict[str, Any], folder: str | None) -> dict[str, Any]:
    """Wait for the cell's end, or for the first limit it passes; the report. A folder on the disk is watched too."""
    begin = time.monotonic()
    ended = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(control, select.POLLIN | select.POLLHUP)
    usage, reason = Usage(), ""
    while not reason:
        events = dict(poll.poll(POLL * 1000))
        if ended in events:
            reason = "exited"
        elif control.fileno() in events:
            reason = "stopped"
        else:
            usage = measure(pid, proc)
            wall = time.monotonic() - begin
            own = wall - min(usage.waited, MAX_WAIT)
            if usage.cpu > order["seconds"] or own > order["wall"]:
                reason = "timeout"
            elif usage.memory > order["memory"] * 1.1:
                reason = "memory"
            elif folder and fallback.is_overfull(folder):
                reason = "output_limit"
    wall = time.monotonic() - begin
    report = {"reason": reason, "wall": wall, "cpu": usage.cpu}
    if reason == "exited":
        _, status, used = os.wait4(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        report |= {"code": code, "cpu": used.ru_utime + used.ru_stime}
        if report["cpu"] > order["seconds"] or code == -signal.SIGXCPU:
            report["reason"] = "timeout"
        elif code == programs.EXIT_MEMORY:
            report["reason"] = "memory"
    return report


def measure(pid: int, proc: int) -> Usage:
    """The sums over the cell's processes, those that it has waited for included."""
    usage = Usage()
    for number in _tree(pid, proc):
        try:
            fields = _read(f"{number}/stat", proc).rpartition(b")")[2].split()
            usage.cpu += sum(map(int, fields[11:15])) * TICK
            resident, shared = map(int, _read(f"{number}/statm", proc).split()[1:3])
            usage.memory += (resident - shared) * PAGE
            for thread in _list(f"{number}/task", proc):
                usage.waited += int(_read(f"{number}/task/{thread}/schedstat", proc).split()[1]) / 1e9
        except (OSError, IndexError, ValueError):
            continue  # it ended while we looked
    return usage


def _tree(pid: int, proc: int) -> list[int]:
    """A process and its descendants; those whose parents ended are children of the first."""
    found, todo = [], [pid]
    while todo and len(found) < 1000:
        number = todo.pop()
        found.append(number)
        try:
            for thread in _list(f"{number}/task", proc):
                todo += map(int, _read(f"{number}/task/{thread}/children", proc).split())
        except OSError:
            continue
    return found


def kill_tree(pid: int, proc: int, orphans: bool) -> None:
    """Kill the cell and wait for it. With namespaces its death is that of all in them, and the wait is for all."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
    while orphans and (left := _tree(os.getpid(), proc)[1:]):  # orphans are ours: we are the subreaper
        for number in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(number, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, 0)


def _read(path: str, folder: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY, dir_fd=folder)
    try:
        return os.read(descriptor, 65536)
    finally:
        os.close(descriptor)


def _list(path: str, folder: int) -> list[str]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY, dir_fd=folder)
    try:
        return os.listdir(descriptor)
    finally:
        os.close(descriptor)


def _report(control: socket.socket, **report: Any) -> None:
    with contextlib.suppress(OSError):  # nobody waits any more
        control.send(json.dumps(report).encode())


if __name__ == "__main__":
    main()
