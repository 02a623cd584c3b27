"""The sandbox in bubblewrap: right programs pass, runs share nothing, limits and retries are as promised."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.sandbox_attacks import ATTACKS, SOLUTIONS, TASKS
from common.schema import RewardConfig
from reward.code_reward import run_tests
from reward.sandbox import SANDBOX, Cell, Limits, Outcome, Sandbox

LIMITS = RewardConfig(memory_mb=512, output_mb=4)


@pytest.fixture(scope="module", autouse=True)
def namespaces():
    """These tests are of the full sandbox; tests/test_sandbox_plain.py has those of the fallbacks."""
    if SANDBOX.kind() != "namespaces":
        pytest.skip("bubblewrap is not installed, or cannot start here")
    yield
    SANDBOX.close()


def test_there_are_enough_attacks_and_the_right_programs_pass():
    assert len(ATTACKS) >= 40
    assert not [name for name, (_, _, verdicts) in ATTACKS.items() if "passed" in verdicts]
    for method, program in SOLUTIONS.items():
        assert run_tests(program, TASKS[method], LIMITS) == "passed"


def test_a_program_that_prints_much_passes():
    task = TASKS["stdio"]
    program = "print('1682' + ' ' * 400_000 + '\\n' * 100_000)"
    assert run_tests(program, task, LIMITS) == "passed"


def test_much_input_that_nobody_reads_does_not_block():
    outcome = SANDBOX.run(Cell("program", {"source": "print(1)"}, Limits(), b"x" * (4 << 20)))[0]
    assert (outcome.reason, outcome.code, outcome.stdout) == ("exited", 0, b"1\n")


def test_runs_share_nothing():
    write = Cell("program", {"source": "open('left', 'w').write('x')\nimport random; print(random.random())"}, Limits())
    look = Cell("program", {"source": "import os; print(os.listdir('.'), os.listdir('/tmp'))"}, Limits())
    first, second = (SANDBOX.run(write)[0].stdout for _ in range(2))
    assert SANDBOX.run(look)[0].stdout == b"[] []\n"
    assert first and first != second, "runs draw the same random numbers"


def test_the_environment_is_clean(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    SANDBOX.close()
    source = "import os; print(sorted(os.environ), os.environ['HOME'], os.getuid() > 0)"
    said = SANDBOX.run(Cell("program", {"source": source}, Limits()))[0].stdout.decode()
    assert "SECRET" not in said and "'/tmp" not in said.split("]")[0] and " /tmp True" in said


def test_32_programs_at_once_keep_to_one_second():
    programs = ["x = int(input())\nsum(range(10**6))\nprint(x * x + 1)", "print(0)"] * 16
    record = TASKS["stdio"].record | {"test_time_limit": 1}
    task = type(TASKS["stdio"])("io", "", None, record)
    with ThreadPoolExecutor(32) as pool:
        verdicts = list(pool.map(lambda program: run_tests(program, task, LIMITS), programs))
    assert verdicts == ["passed", "failed"] * 16


def test_time_is_the_programs_own():
    outcome = SANDBOX.run(Cell("program", {"source": "x = 0\nwhile x < 2 * 10**6: x += 1"}, Limits(seconds=30)))[0]
    assert 0.01 < outcome.cpu < 5
    asleep = SANDBOX.run(Cell("program", {"source": "import time; time.sleep(0.2)"}, Limits()))[0]
    assert asleep.reason == "exited" and asleep.cpu < 0.1 < asleep.wall
    late = SANDBOX.run(Cell("program", {"source": "import time; time.sleep(30)"}, Limits(seconds=1, wall=0.1)))[0]
    assert late.reason == "timeout" and late.wall < 10


def test_what_children_use_counts_together():
    forks = "import os, time\nfor _ in range(3):\n    if os.fork() == 0: WORK\ntime.sleep(100)"
    big, busy = (
        {"source": forks.replace("WORK", work)}
        for work in ("x = b'x' * (200 << 20); time.sleep(100)", "sum(range(10**10))")
    )
    enough_for_one = Limits(seconds=10, memory=512 << 20)
    assert SANDBOX.run(Cell("program", big, enough_for_one))[0].reason == "memory"
    outcome = SANDBOX.run(Cell("program", busy, Limits(seconds=0.3, wall=30)))[0]
    assert outcome.reason == "timeout" and outcome.cpu > 0.3


class NoRoom(Sandbox):
    """A sandbox whose first `failures` runs cannot start."""

    def __init__(self, failures: int) -> None:
        super().__init__()
        self.failures, self.calls = failures, []

    def run(self, *cells: Cell) -> list[Outcome]:
        self.calls.append("run")
        if self.calls.count("run") > self.failures:
            return super().run(*cells)
        return [Outcome("infrastructure", error="no room") for _ in cells]

    def close(self) -> None:
        self.calls.append("close")
        super().close()


def test_what_cannot_start_is_no_wrong_answer(capfd):
    sandbox = NoRoom(failures=3)
    assert run_tests(SOLUTIONS["stdio"], TASKS["stdio"], sandbox=sandbox) == "infrastructure"
    assert sandbox.calls == ["run", "run", "close", "run"], "the last attempt is made with a fresh server"
    assert capfd.readouterr().err.count("no room") == 3


def test_one_failed_start_is_retried():
    sandbox = NoRoom(failures=1)
    assert run_tests(SOLUTIONS["function"], TASKS["function"], sandbox=sandbox) == "passed"
    assert sandbox.calls == ["run", "run"]
    sandbox.close()


def test_a_dead_server_is_replaced():
    SANDBOX.kind()
    SANDBOX.server.process.kill()
    SANDBOX.server.process.wait()
    assert run_tests(SOLUTIONS["function"], TASKS["function"]) == "passed"
