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
            enter_cell(order, [*descriptors[2:], start], shut, folder)
        os.fchdir(proc)  # what `measure` and `_tree` read is below it
        for descriptor in (start, *descriptors[2:]):
            os.close(descriptor)
        reply = os.read(started, 1000)
        if reply == b"started":
            control.send(reply)
            report = watch(pid, control, order, folder)
        else:
            report = {"reason": "infrastructure", "error": reply.decode() or "the cell ended before it began"}
        if report["reason"] != "exited" or shut:
            kill_tree(pid, orphans=bool(shut))
    except OSError as error:
        report = {"reason": "infrastructure", "error": str(error)}
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    _report(control, **report)
    os._exit(0)


def enter_cell(order: dict[str, Any], given: list[int], shut: Fallback | None, folder: str | None) -> None:
    """The cell's own process: give up everything but the descriptors that it is `given`, then run the order."""
    start = given[-1]
    try:
        jail.prctl(jail.PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setsid()
        # First out of the way, so that no dup2 below overwrites one that is still needed.
        for number, descriptor in enumerate(given):
            os.dup2(descriptor, 200 + number)
        start = START
        for number in range(len(given)):
            os.dup2(200 + number, number)
        os.closerange(START + 1, 1024)
        home = folder or "/tmp"
        os.chdir(home)
        os.environ.update(HOME=home, TMPDIR=home)
        tempfile.tempdir = None
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if shut:
            fallback.shut_in(shut, home, order)
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


def watch(pid: int, control: socket.socket, order: dict[str, Any], folder: str | None) -> dict[str, Any]:
    """Wait for the cell's end, or for the first limit it passes; the report. A folder on the disk is watched too."""
    begin = time.monotonic()
    ended = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(control, select.POLLIN | select.POLLHUP)
    cpu, reason = 0.0, ""
    while not reason:
        events = dict(poll.poll(POLL * 1000))
        if ended in events:
            reason = "exited"
        elif control.fileno() in events:
            reason = "stopped"
        else:
            cpu, waited, memory = measure(pid)
            own = time.monotonic() - begin - min(waited, MAX_WAIT)
            if cpu > order["seconds"] or own > order["wall"]:
                reason = "timeout"
            elif memory > order["memory"] * 1.1:
                reason = "memory"
            elif folder and fallback.is_overfull(folder):
                reason = "output_limit"
    report = {"reason": reason, "wall": time.monotonic() - begin, "cpu": cpu}
    if reason == "exited":
        _, status, used = os.wait4(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        report |= {"code": code, "cpu": used.ru_utime + used.ru_stime}
        if report["cpu"] > order["seconds"] or code == -signal.SIGXCPU:
            report["reason"] = "timeout"
        elif code == programs.EXIT_MEMORY:
            report["reason"] = "memory"
    return report


def measure(pid: int) -> tuple[float, float, int]:
    """What a process, its descendants and those they have waited for use together.

    Returns seconds of processor time, seconds ready to run while others ran, and bytes of memory.
    """
    cpu, waited, memory = 0.0, 0.0, 0
    for number in _tree(pid):
        try:
            fields = _read(f"{number}/stat").rpartition(b")")[2].split()
            cpu += sum(map(int, fields[11:15])) * TICK
            resident, shared = map(int, _read(f"{number}/statm").split()[1:3])
            memory += (resident - shared) * PAGE
            for thread in os.listdir(f"{number}/task"):
                waited += int(_read(f"{number}/task/{thread}/schedstat").split()[1]) / 1e9
        except (OSError, IndexError, ValueError):
            continue  # it ended while we looked
    return cpu, waited, memory


def _tree(pid: int) -> list[int]:
    """A process and its descendants; those whose parents ended are children of the first."""
    found, todo = [], [pid]
    while todo and len(found) < 1000:
        number = todo.pop()
        found.append(number)
        try:
            for thread in os.listdir(f"{number}/task"):
                todo += map(int, _read(f"{number}/task/{thread}/children").split())
        except OSError:
            continue
    return found


def kill_tree(pid: int, orphans: bool) -> None:
    """Kill the cell and wait for it. With namespaces its death is that of all in them, and the wait is for all."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
    while orphans and (left := _tree(os.getpid())[1:]):  # orphans are ours: we are the subreaper
        for number in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(number, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, 0)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _report(control: socket.socket, **report: Any) -> None:
    with contextlib.suppress(OSError):  # nobody waits any more
        control.send(json.dumps(report).encode())


if __name__ == "__main__":
    main()
