"""Does the program in a response pass its task's tests? The verdict is reached outside the program, never by it."""

import decimal
import re
import sys
from collections.abc import Sequence
from dataclasses import replace

from common.code_tests import check_input_output, checked_usage
from common.errors import UserError
from common.records import Record
from common.schema import RewardConfig, ScoringConfig
from common.trajectory import Score, Task
from reward.extract_code import extract_code, with_prefix
from reward.sandbox import SANDBOX, Cell, Limits, Sandbox

ATTEMPTS = 3  # to start a sandbox
NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,4})?", re.ASCII)
INTEGER = re.compile(r"[+-]?\d+", re.ASCII)
LIMITS = ("timeout", "memory", "output_limit", "infrastructure")  # ends of a cell that are verdicts
EXTRA_SECONDS = 2.0  # that the tests themselves may take beside the program
MAX_PROGRAM = 1 << 20
DEFAULTS = RewardConfig()


def code_score(response: str, task: Task, reward: RewardConfig = DEFAULTS) -> Score:
    """Reward 1 where the response's program passes every test of the task, else 0; the verdict says why.

    The program is read from the task's prefix, with which the model was given the beginning of its answer, and the
    response. `reward.code_reward: share` rewards by the share of the tests that are passed; the verdict is then of the
    first that is not.
    """
    record, defines, reads_input = task.record, (), False
    if record.get("test_method") == "function":
        defines = checked_usage(record, f"task '{task.id}'").program
    else:
        reads_input = any(text.strip() for text in _texts(record.get("test_input") or ()))
    program = extract_code(with_prefix(task.prefix, response), defines, reads_input)
    if not program or not program.strip():
        return Score(0.0, False, "no_answer")
    if len(program) > MAX_PROGRAM:
        return Score(0.0, False, "failed")
    tasks = [task] if reward.code_reward == "all" else by_test(task)
    verdicts = [run_tests(program, one, reward) for one in tasks]
    if "infrastructure" in verdicts:
        return Score(0.0, False, "infrastructure")
    verdict = next((one for one in verdicts if one != "passed"), "passed")
    return Score(verdicts.count("passed") / len(verdicts), verdict == "passed", verdict)


def by_test(task: Task) -> list[Task]:
    """The task once for each of its tests, with that test alone; as it is where it has none."""
    record, keys = task.record, ("test_list", "test_input", "test_output")
    columns = {key: _texts(record[key]) for key in keys if record.get(key)}
    tests = [dict(zip(columns, ([text] for text in texts))) for texts in zip(*columns.values())]
    return [replace(task, record=record | test) for test in tests] or [task]


def run_tests(program: str, task: Task, reward: ScoringConfig = DEFAULTS, sandbox: Sandbox = SANDBOX) -> str:
    """The verdict on a program: passed, failed, timeout, memory, output_limit, crashed or infrastructure."""
    method = METHODS.get(str(task.record.get("test_method")))
    if method is None:
        known = " or ".join(METHODS)
        raise UserError(f"reward.kind=code: task '{task.id}' has no test_method ({known}), see data/README.md")
    for attempt in range(ATTEMPTS):
        verdict, error = method(program, task, reward, sandbox)
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
    for words, wanted_words in zip(map(str.split, lines), map(str.split, wanted_lines)):
        if words != wanted_words:
            pairs = zip(words, wanted_words)
            if len(words) != len(wanted_words) or not all(_words_equal(*pair, float_tolerance) for pair in pairs):
                return False
    return True


def _words_equal(word: str, wanted: str, tolerance: float) -> bool:
    if word == wanted:
        return True
    if not NUMBER.fullmatch(word) or not NUMBER.fullmatch(wanted):
        return False
    if INTEGER.fullmatch(wanted):
        return not INTEGER.fullmatch(word) and decimal.Decimal(word) == decimal.Decimal(wanted)
    return abs(float(word) - float(wanted)) <= tolerance * max(1.0, abs(float(wanted)))


def _stdio(program: str, task: Task, reward: ScoringConfig, sandbox: Sandbox) -> tuple[str, str]:
    """Run the program on every input; its output is compared here."""
    record = task.record
    check_input_output(record, f"task '{task.id}'")
    order = {"source": f"{record.get('setup') or ''}\n{program}"}
    for given, wanted in zip(_texts(record["test_input"]), _texts(record["test_output"]), strict=True):
        (outcome,) = sandbox.run(Cell("program", order, _limits(record, reward), given.encode()))
        if outcome.reason in LIMITS:
            return outcome.reason, outcome.error
        if outcome.reason != "exited" or outcome.code != 0:
            return "crashed", outcome.error
        if not outputs_equal(outcome.stdout.decode(errors="replace"), wanted, reward.float_tolerance):
            return "failed", ""
    return "passed", ""


def _function(program: str, task: Task, reward: ScoringConfig, sandbox: Sandbox) -> tuple[str, str]:
    """Serve the program's functions from one cell to the tests in another; only the latter can report a pass."""
    record, limits = task.record, _limits(task.record, reward)
    usage = checked_usage(record, f"task '{task.id}'")
    setup = record.get("setup") or ""
    tests = {"setup": setup, "tests": _texts(record["test_list"])}
    tests |= {"shadowing": usage.shadowing, "modules": usage.modules}
    wall = 2 * limits.seconds + 1 + EXTRA_SECONDS
    served, tested = sandbox.run(
        Cell("functions", {"setup": setup, "source": program}, replace(limits, wall=wall)),
        Cell("tests", tests, replace(limits, seconds=limits.seconds + EXTRA_SECONDS, wall=wall + 2)),
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


def _limits(record: Record, reward: ScoringConfig) -> Limits:
    """Limits of a program under test; the record's own limit of time goes before the config's."""
    seconds = float(record.get("test_time_limit") or reward.time_limit)
    return Limits(seconds, memory=reward.memory_mb << 20, output=reward.output_mb << 20)


def _texts(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
