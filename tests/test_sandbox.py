"""The sandbox in bubblewrap: right programs pass, runs share nothing, limits and retries are as promised."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.sandbox_attacks import ATTACKS, SOLUTIONS, TASKS
from reward import sandbox
from reward.code_reward import CodeLimits, run_tests
from reward.sandbox import Cell, Limits, run_cells, sandbox_kind, stop_sandbox

LIMITS = CodeLimits(memory=512 << 20, output=4 << 20)


@pytest.fixture(scope="module", autouse=True)
def namespaces():
    """These tests are of the full sandbox; tests/test_sandbox_plain.py has those of the fallbacks."""
    if sandbox_kind() != "namespaces":
        pytest.skip("bubblewrap is not installed, or cannot start here")
    yield
    stop_sandbox()


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
    outcome = run_cells(Cell("program", {"source": "print(1)"}, Limits(), b"x" * (4 << 20)))[0]
    assert (outcome.reason, outcome.code, outcome.stdout) == ("exited", 0, b"1\n")


def test_runs_share_nothing():
    write = Cell("program", {"source": "open('left', 'w').write('x')\nimport random; print(random.random())"}, Limits())
    look = Cell("program", {"source": "import os; print(os.listdir('.'), os.listdir('/tmp'))"}, Limits())
    first, second = (run_cells(write)[0].stdout for _ in range(2))
    assert run_cells(look)[0].stdout == b"[] []\n"
    assert first and first != second, "runs draw the same random numbers"


def test_the_environment_is_clean(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    stop_sandbox()
    source = "import os; print(sorted(os.environ), os.environ['HOME'], os.getuid() > 0)"
    said = run_cells(Cell("program", {"source": source}, Limits()))[0].stdout.decode()
    assert "SECRET" not in said and "'/tmp" not in said.split("]")[0] and " /tmp True" in said


def test_32_programs_at_once_keep_to_one_second():
    programs = ["x = int(input())\nsum(range(10**6))\nprint(x * x + 1)", "print(0)"] * 16
    record = TASKS["stdio"].record | {"test_time_limit": 1}
    task = type(TASKS["stdio"])("io", "", None, record)
    with ThreadPoolExecutor(32) as pool:
        verdicts = list(pool.map(lambda program: run_tests(program, task, LIMITS), programs))
    assert verdicts == ["passed", "failed"] * 16


def test_time_is_the_programs_own(monkeypatch):
    outcome = run_cells(Cell("program", {"source": "x = 0\nwhile x < 2 * 10**6: x += 1"}, Limits(seconds=30)))[0]
    assert 0.01 < outcome.cpu < 5
    asleep = run_cells(Cell("program", {"source": "import time; time.sleep(0.2)"}, Limits()))[0]
    assert asleep.reason == "exited" and asleep.cpu < 0.1 < asleep.wall
    late = run_cells(Cell("program", {"source": "import time; time.sleep(30)"}, Limits(seconds=1, wall=0.1)))[0]
    assert late.reason == "timeout" and late.wall < 10


def test_what_cannot_start_is_no_wrong_answer(monkeypatch, capfd):
    starts = []

    def broken(server, cells):
        starts.append(server)
        return [sandbox.Outcome("infrastructure", error="no room") for _ in cells]

    monkeypatch.setattr(sandbox, "_run_cells", broken)
    monkeypatch.setattr(sandbox, "_probe", lambda server: "")
    assert run_tests(SOLUTIONS["stdio"], TASKS["stdio"]) == "infrastructure"
    assert len(starts) == 3 and starts[2] is not starts[0]
    assert capfd.readouterr().err.count("no room") == 3


def test_one_failed_start_is_retried(monkeypatch):
    run, calls = sandbox._run_cells, []

    def once_broken(server, cells):
        calls.append(cells)
        return run(server, cells) if len(calls) > 1 else [sandbox.Outcome("infrastructure") for _ in cells]

    monkeypatch.setattr(sandbox, "_run_cells", once_broken)
    assert run_tests(SOLUTIONS["function"], TASKS["function"]) == "passed" and len(calls) == 2


def test_a_dead_server_is_replaced():
    sandbox_kind()
    sandbox._server.process.kill()
    sandbox._server.process.wait()
    assert run_tests(SOLUTIONS["function"], TASKS["function"]) == "passed"
