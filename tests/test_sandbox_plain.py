"""The portable fallback, without bubblewrap: one plain warning, fewer promises, the same verdicts."""

import os
from pathlib import Path

import pytest

from benchmarks.sandbox_attacks import ATTACKS, EXITS, FLOODS, FORGERIES, LIES, SOLUTIONS, TASKS
from reward import sandbox
from reward.code_reward import CodeLimits, run_tests
from reward.sandbox import Cell, Limits, run_cells, sandbox_kind, stop_sandbox

LIMITS = CodeLimits(memory=512 << 20, output=4 << 20)
SOME = [*list(EXITS)[:8], *list(LIES)[:6], *FORGERIES, *FLOODS, "parent killed", "everybody killed"]
SLOW = {"threads without end", "the tests' own code run by the program"}  # they wait for the limit of wall time
SOME = [name for name in SOME if name not in SLOW]
SOME += ["TCP to the host", "daemon left behind", "daemon that ignores signals", "ptrace of the parent"]


@pytest.fixture(scope="module", autouse=True)
def plain():
    stop_sandbox()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox.shutil, "which", lambda name: None)
        patch.setattr(sandbox, "_said", set())
        yield
        stop_sandbox()


def test_it_says_so_once(capfd):
    stop_sandbox()
    sandbox._said.clear()
    assert sandbox_kind() == "plain"
    stop_sandbox()
    assert sandbox_kind() == "plain"
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and "bubblewrap is not installed" in told
    assert "they can read what this user can" in told


def test_right_programs_pass():
    for method, program in SOLUTIONS.items():
        assert run_tests(program, TASKS[method], LIMITS) == "passed"


@pytest.mark.parametrize("name", SOME)
def test_attacks_do_not_pass_here_either(name):
    method, program, _ = ATTACKS[name]
    program = program.replace("HOST", "/nonexistent").replace("PORT", "9")
    assert run_tests(program, TASKS[method], LIMITS) in {*["failed", "crashed", "timeout", "memory", "output_limit"]}
    assert sandbox._server.process.poll() is None
    children = Path(f"/proc/{sandbox._server.process.pid}/task/{sandbox._server.process.pid}/children")
    for _ in range(1000):
        if not children.read_text().split():
            break
        os.sched_yield()


def test_programs_start_nothing_and_run_as_nobody():
    source = "import os\nprint(os.getuid())\ntry: os.fork()\nexcept PermissionError: print('no fork')"
    said = run_cells(Cell("program", {"source": source}, Limits()))[0].stdout.decode().split("\n")
    assert said[1] == "no fork" and (os.getuid() != 0 or said[0] == "65534")


def test_folders_are_removed(tmp_path):
    source = "import os\nopen('left', 'w').write('x')\nprint(os.getcwd())"
    folder = Path(run_cells(Cell("program", {"source": source}, Limits()))[0].stdout.decode().strip())
    assert folder.name.startswith("cell-") and not folder.exists()
