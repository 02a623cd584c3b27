"""Does the program in a response pass its task's tests? The verdict is reached outside the program, never by it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import UserError
from common.trajectory import Score, Task
from reward.sandbox import Cell, Limits, Outcome, run_cells, stop_sandbox

ATTEMPTS = 3  # to start a sandbox
PYTHON = ("python", "python3", "py")
LIMITS = ("timeout", "memory", "output_limit", "infrastructure")  # ends of a cell that are verdicts
EXTRA_SECONDS = 2.0  # that the tests themselves may take beside the program
MAX_PROGRAM = 1 << 20

_count_lock = threading.Lock()
infrastructure_failures = 0  # runs that could not start, retries not counted


@dataclass(frozen=True)
class CodeLimits:
    """Limits of the programs under test; a record's `test_time_limit` goes before `seconds`."""

    seconds: float = 5.0
    memory: int = 1 << 30
    output: int = 16 << 20

    def of(self, record: dict[str, Any]) -> Limits:
        return Limits(float(record.get("test_time_limit") or self.seconds), None, self.memory, self.output)


def extract_code(response: str) -> str | None:
    """The last closed Python block; where no block says a language, the last of those."""
    found: dict[bool, str] = {}
    language, lines = None, []
    for line in response.split("\n"):  # by hand: a regular expression takes quadratic time on a megabyte of fences
        if not line.lstrip().startswith("```"):
            lines.append(line)
        elif language is None:
            word = line.strip().strip("`").split()
            language, lines = (word[0].lower() if word else ""), []
        elif line.strip() == "```":
            if language in PYTHON or not language:
                found[language in PYTHON] = "\n".join(lines)
            language = None
        else:
            lines.append(line)
    return found.get(True, found.get(False))


def code_score(response: str, task: Task, limits: CodeLimits = CodeLimits()) -> Score:
    """Reward 1 where the response's program passes every test of the task, else 0; the verdict says why."""
    program = extract_code(response)
    if not program or not program.strip():
        return Score(0.0, False, "no_answer")
    verdict = run_tests(program, task, limits) if len(program) <= MAX_PROGRAM else "failed"
    return Score(float(verdict == "passed"), verdict == "passed", verdict)


def run_tests(program: str, task: Task, limits: CodeLimits = CodeLimits()) -> str:
    """The verdict on a program: passed, failed, timeout, memory, output_limit, crashed or infrastructure."""
    global infrastructure_failures
    method = METHODS.get(str(task.record.get("test_method")))
    if method is None:
        known = " or ".join(METHODS)
        raise UserError(f"reward.kind=code: task '{task.id}' has no test_method ({known}), see data/README.md")
    for attempt in range(ATTEMPTS):
        verdict, error = method(program, task.record, limits.of(task.record))
        if verdict != "infrastructure":
            return verdict
        print(f"reward: a sandbox could not start, attempt {attempt + 1} of {ATTEMPTS}: {error}", file=sys.stderr)
        if attempt == ATTEMPTS - 2:
            stop_sandbox()  # the last attempt is made with a fresh one
    with _count_lock:
        infrastructure_failures += 1
    return "infrastructure"


def _stdio(program: str, record: dict[str, Any], limits: Limits) -> tuple[str, str]:
    """Run the program on every input; its output is compared here."""
    told = {"source": f"{record.get('prefix') or ''}\n{program}"}
    for given, wanted in zip(_texts(record["test_input"]), _texts(record["test_output"]), strict=True):
        (outcome,) = run_cells(Cell("program", told, limits, given.encode()))
        verdict = _failure(outcome)
        if not verdict and outcome.stdout.decode(errors="replace").split() != wanted.split():
            verdict = "failed"
        if verdict:
            return verdict, outcome.error
    return "passed", ""


def _function(program: str, record: dict[str, Any], limits: Limits) -> tuple[str, str]:
    """Serve the program's functions from one cell to the tests in another; only the latter can report a pass."""
    prefix = record.get("prefix") or ""
    tests = {"prefix": prefix, "tests": _texts(record["test_list"]), "entry_point": record.get("entry_point")}
    wall = 2 * limits.seconds + 1 + EXTRA_SECONDS
    of_program = Limits(limits.seconds, wall, limits.memory, limits.output, limits.processes)
    of_tests = Limits(limits.seconds + EXTRA_SECONDS, wall + 2, limits.memory, limits.output, limits.processes)
    served, tested = run_cells(
        Cell("functions", {"prefix": prefix, "source": program}, of_program), Cell("tests", tests, of_tests)
    )
    error = served.error or tested.error
    if "infrastructure" in (served.reason, tested.reason):
        return "infrastructure", error
    if served.reason in LIMITS:
        return served.reason, error
    said = tested.result.decode(errors="replace")
    if tested.reason == "exited" and said in ("passed", "failed"):
        return said, error
    return tested.reason if tested.reason in LIMITS else "crashed", error


METHODS = {"function": _function, "stdio": _stdio}


def _failure(outcome: Outcome) -> str:
    """The verdict on a cell that ran a whole program, empty where it ended well."""
    if outcome.reason in LIMITS:
        return outcome.reason
    return "" if outcome.reason == "exited" and outcome.code == 0 else "crashed"


def _texts(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
