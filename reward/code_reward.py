"""Does the program in a response pass its task's tests? The verdict is reached outside the program, never by it."""

import decimal
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.code_tests import Usage, check_input_output, checked_usage
from common.errors import UserError
from common.trajectory import Score, Task
from reward.extract_code import extract_code
from reward.sandbox import SANDBOX, Cell, Limits, Outcome, Sandbox

ATTEMPTS = 3  # to start a sandbox
NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,4})?", re.ASCII)
INTEGER = re.compile(r"[+-]?\d+", re.ASCII)
LIMITS = ("timeout", "memory", "output_limit", "infrastructure")  # ends of a cell that are verdicts
EXTRA_SECONDS = 2.0  # that the tests themselves may take beside the program
MAX_PROGRAM = 1 << 20


@dataclass(frozen=True)
class CodeLimits:
    """Limits of the programs under test; a record's `test_time_limit` goes before `seconds`.

    `float_tolerance` is how far a printed number may be from the wanted one, absolutely or relative to it.
    """

    seconds: float = 5.0
    memory: int = 1 << 30
    output: int = 16 << 20
    float_tolerance: float = 1e-6

    def of(self, record: dict[str, Any]) -> Limits:
        return Limits(float(record.get("test_time_limit") or self.seconds), None, self.memory, self.output)


def code_score(response: str, task: Task, limits: CodeLimits = CodeLimits()) -> Score:
    """Reward 1 where the response's program passes every test of the task, else 0; the verdict says why."""
    program = extract_code(response, *_looked_for(task))
    if not program or not program.strip():
        return Score(0.0, False, "no_answer")
    verdict = run_tests(program, task, limits) if len(program) <= MAX_PROGRAM else "failed"
    return Score(float(verdict == "passed"), verdict == "passed", verdict)


def run_tests(program: str, task: Task, limits: CodeLimits = CodeLimits(), sandbox: Sandbox = SANDBOX) -> str:
    """The verdict on a program: passed, failed, timeout, memory, output_limit, crashed or infrastructure."""
    method = METHODS.get(str(task.record.get("test_method")))
    if method is None:
        known = " or ".join(METHODS)
        raise UserError(f"reward.kind=code: task '{task.id}' has no test_method ({known}), see data/README.md")
    for attempt in range(ATTEMPTS):
        verdict, error = method(program, task, limits, sandbox)
        if verdict != "infrastructure":
            return verdict
        print(f"reward: a sandbox could not start, attempt {attempt + 1} of {ATTEMPTS}: {error}", file=sys.stderr)
        if attempt == ATTEMPTS - 2:
            sandbox.close()  # the last attempt is made with a fresh one
    return "infrastructure"


def outputs_equal(printed: str, wanted: str, float_tolerance: float) -> bool:
    """Whether every line has the wanted words; blank lines at the end count for nothing.

    Words that are numbers are equal within `float_tolerance`, absolutely or relative to the wanted one. A wanted
    integer is exact: as it is written, or with a fraction of zero (3 and 3.0).
    """
    lines, wanted_lines = (text.rstrip().split("\n") for text in (printed, wanted))
    if len(lines) != len(wanted_lines):
        return False
    for line, wanted_line in zip(lines, wanted_lines):
        words, wanted_words = line.split(), wanted_line.split()
        if words != wanted_words and (
            len(words) != len(wanted_words)
            or not all(_words_equal(*pair, float_tolerance) for pair in zip(words, wanted_words))
        ):
            return False
    return True


def _words_equal(word: str, wanted: str, tolerance: float) -> bool:
    if word == wanted:
        return True
    if not NUMBER.fullmatch(word) or not NUMBER.fullmatch(wanted):
        return False
    if INTEGER.fullmatch(wanted):
        return not INTEGER.fullmatch(word) and decimal.Decimal(word) == decimal.Decimal(wanted)
    number, wanted_number = float(word), float(wanted)
    return abs(number - wanted_number) <= tolerance * max(1.0, abs(wanted_number))


def _looked_for(task: Task) -> tuple[Sequence[str], bool]:
    """(names that a program for this task defines, whether it reads standard input)."""
    if task.record.get("test_method") == "function":
        return _usage(task).program, False
    return (), any(text.strip() for text in _texts(task.record.get("test_input") or ()))


def _usage(task: Task) -> Usage:
    record = task.record
    return checked_usage(
        record["test_list"], record.get("prefix") or "", record.get("entry_point") or "", f"task '{task.id}'"
    )


def _stdio(program: str, task: Task, limits: CodeLimits, sandbox: Sandbox) -> tuple[str, str]:
    """Run the program on every input; its output is compared here."""
    record = task.record
    check_input_output(record, f"task '{task.id}'")
    order = {"source": f"{record.get('prefix') or ''}\n{program}"}
    for given, wanted in zip(_texts(record["test_input"]), _texts(record["test_output"]), strict=True):
        (outcome,) = sandbox.run(Cell("program", order, limits.of(record), given.encode()))
        verdict = _failure(outcome)
        if not verdict and not outputs_equal(outcome.stdout.decode(errors="replace"), wanted, limits.float_tolerance):
            verdict = "failed"
        if verdict:
            return verdict, outcome.error
    return "passed", ""


def _function(program: str, task: Task, code_limits: CodeLimits, sandbox: Sandbox) -> tuple[str, str]:
    """Serve the program's functions from one cell to the tests in another; only the latter can report a pass."""
    record, usage, limits = task.record, _usage(task), code_limits.of(task.record)
    prefix = record.get("prefix") or ""
    tests = {"prefix": prefix, "tests": _texts(record["test_list"])}
    tests |= {"shadowing": usage.shadowing, "modules": usage.modules}
    wall = 2 * limits.seconds + 1 + EXTRA_SECONDS
    of_program = Limits(limits.seconds, wall, limits.memory, limits.output, limits.processes)
    of_tests = Limits(limits.seconds + EXTRA_SECONDS, wall + 2, limits.memory, limits.output, limits.processes)
    served, tested = sandbox.run(
        Cell("functions", {"prefix": prefix, "source": program}, of_program), Cell("tests", tests, of_tests)
    )
    error = served.error or tested.error
    if "infrastructure" in (served.reason, tested.reason):
        return "infrastructure", error
    if served.reason in LIMITS:
        return served.reason, error
    verdict = tested.result.decode(errors="replace")
    if tested.reason == "exited" and verdict in ("passed", "failed"):
        return verdict, error
    return tested.reason if tested.reason in LIMITS else "crashed", error


METHODS = {"function": _function, "stdio": _stdio}


def _failure(outcome: Outcome) -> str:
    """The verdict on a cell that ran a whole program, empty where it ended well."""
    if outcome.reason in LIMITS:
        return outcome.reason
    return "" if outcome.reason == "exited" and outcome.code == 0 else "crashed"


def _texts(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
