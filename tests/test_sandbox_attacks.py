"""Every attack, in every kind of sandbox: none passes, none gets out, nothing is left running, the scorer lives on."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.sandbox_attacks import ATTACKS, NOT_HELD, TASKS
from common.errors import UserError
from common.schema import RewardConfig
from reward.code_reward import run_tests
from reward.sandbox import Sandbox
from reward.sandbox_kinds import KINDS

LIMITS = RewardConfig(memory_mb=512, output_mb=4)


@pytest.fixture(scope="module", params=KINDS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """One kind of sandbox after another."""
    made = Sandbox([request.param])
    try:
        made.kind()
        yield made
    except UserError as error:
        pytest.skip(str(error))
    finally:
        made.close()


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """A folder with a file that must stay as it is, and a port to which nobody may connect."""
    folder = tmp_path_factory.mktemp("host")
    folder.chmod(0o777)
    (folder / "secret.txt").write_text("secret")
    (folder / "secret.txt").chmod(0o666)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield folder, listener


def processes_below(pid: int) -> list[int]:
    found, todo = [], [pid]
    while todo:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended while we looked
            for name in Path(f"/proc/{todo.pop()}/task").glob("*/children"):
                children = [int(number) for number in name.read_text().split()]
                found += children
                todo += children
    return found


def resting_processes(sandbox: Sandbox, most: int) -> int:
    """How many processes the server has once it is idle; keepers end a moment after they have reported."""
    deadline = time.monotonic() + 10
    while (count := len(processes_below(sandbox.server.process.pid))) > most and time.monotonic() < deadline:
        time.sleep(0.01)
    return count


def attack_program(name: str, folder: Path, port: int) -> tuple[str, str, tuple[str, ...]]:
    method, program, verdicts = ATTACKS[name]
    return method, program.replace("HOST", str(folder)).replace("PORT", str(port)), verdicts


@pytest.mark.parametrize("name", ATTACKS)
def test_no_attack_passes_or_escapes(sandbox, name, host):
    kind = sandbox.kind()
    folder, listener = host
    before = (folder / "secret.txt").stat()
    method, program, verdicts = attack_program(name, folder, listener.getsockname()[1])
    server = sandbox.server
    verdict = run_tests(program, TASKS[method], LIMITS, sandbox)
    assert name in NOT_HELD[kind] or (verdict in verdicts and verdict != "passed")
    assert [path.name for path in folder.iterdir()] == ["secret.txt"]
    assert (folder / "secret.txt").read_text() == "secret" and not os.listxattr(folder / "secret.txt")
    after = (folder / "secret.txt").stat()
    assert [after.st_mode, after.st_uid, after.st_gid, after.st_mtime] == [
        *(before.st_mode, before.st_uid, before.st_gid, before.st_mtime)
    ]
    with pytest.raises(BlockingIOError):
        listener.accept()
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("left")]
    assert sandbox.server is server and server.process.poll() is None
    most = 2 if kind == "namespaces" else 0  # bubblewrap's own process 1, and the server
    assert resting_processes(sandbox, most) <= most, "something is left running"
