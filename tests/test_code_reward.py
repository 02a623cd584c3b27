"""The code reward: which block is run, how functions and whole programs are tested, and HumanEval's own solutions."""

import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.errors import UserError
from common.trajectory import Score, Task
from data.download_data import convert_records
from reward.code_reward import CodeLimits, code_score, extract_code, run_tests
from reward.sandbox import stop_sandbox

PUBLISHED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="module", autouse=True)
def end_of_the_sandbox():
    yield
    stop_sandbox()


def function(*tests: str, **fields) -> Task:
    return Task("t", "q", None, {"test_method": "function", "test_list": list(tests), "test_time_limit": 2, **fields})


def stdio(*pairs: tuple[str, str], **fields) -> Task:
    inputs, outputs = (list(column) for column in zip(*pairs))
    record = {"test_method": "stdio", "test_input": inputs, "test_output": outputs, "test_time_limit": 2, **fields}
    return Task("t", "q", None, record)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\nx = 1\n```", "x = 1"),
        ("```python\nx = 1\n```\nand\n```python\nx = 2\n```", "x = 2"),
        ("```python\nx = 1\n```\n```\noutput\n```", "x = 1"),
        ("```py\nx = 1\n```", "x = 1"),
        ("  ```python\n  x = 1\n  ```", "  x = 1"),
        ("```\nx = 1\n```", "x = 1"),
        ("```bash\nls\n```", None),
        ("```python\nx = '''```'''\n```", "x = '''```'''"),
        ("```python\nx = 1", None),
        ("x = 1", None),
    ],
)
def test_the_last_python_block(text, code):
    assert extract_code(text) == code


def test_many_fences_take_no_time():
    assert extract_code("```python\n" * 100_000) is None
    assert extract_code("`" * 10**6) is None
    assert extract_code("```\n" * 100_000) == ""


def test_scores():
    task = function("assert f(1) == 2")
    assert code_score("```python\ndef f(x): return x + 1\n```", task) == Score(1.0, True, "passed")
    assert code_score("```python\ndef f(x): return x\n```", task) == Score(0.0, False, "failed")
    assert code_score("no program", task) == Score(0.0, False, "no_answer")
    assert code_score("```python\n \n```", task) == Score(0.0, False, "no_answer")
    with pytest.raises(UserError, match=r"task 't' has no test_method \(function or stdio\)"):
        code_score("```python\nx\n```", Task("t", "q", "4", {}))


# fmt: off
# ruff: noqa: E501
FUNCTIONS = {  # what the tests may use: (test, right program, wrong program)
    "several values": ("assert f([1, 2], k='a') == ({'a': [1, 2]}, {3}, b'x', 1.5, None)",
                       "def f(x, k): return ({k: x}, {3}, b'x', 1.5, None)", "def f(x, k): return ({k: x}, {3}, b'y', 1.5, None)"),
    "a tuple is no list": ("assert f() == (1, 2)", "def f(): return (1, 2)", "def f(): return [1, 2]"),
    "True is 1": ("assert f() == True", "def f(): return 1", "def f(): return 0"),
    "large integers": ("assert f() == 10**500", "def f(): return 10**500", "def f(): return 10**500 + 1"),
    "floats": ("import math\nassert math.isclose(f(), 0.1) and f() == 0.1", "def f(): return 0.1", "def f(): return 0.1 + 1e-9"),
    "exceptions": ("try:\n    f()\n    assert False\nexcept KeyError: pass", "def f(): return {}[1]", "def f(): return [][1]"),
    "in place": ("a = [2, 1]\nf(a)\nassert a == [1, 2]", "def f(a): a.sort()", "def f(a): sorted(a)"),
    "classes": ("s = Stack()\ns.push(3)\nassert s.pop() == 3",
                "class Stack:\n    def push(self, x): self.x = x\n    def pop(self): return self.x", "class Stack:\n    def push(self, x): pass\n    pop = push"),
    "objects as arguments": ("assert f(Pair(1, 2)) == 3",
                             "class Pair:\n    def __init__(self, *a): self.a = a\ndef f(p): return sum(p.a)",
                             "class Pair:\n    def __init__(self, *a): self.a = a\ndef f(p): return p.a"),
    "generators": ("assert list(f(3)) == [0, 1, 2]", "def f(n): yield from range(n)", "def f(n): yield n"),
    "ranges, views and counters": ("import collections\nassert f() == (range(3), ['a'], {'a': 2}, collections.deque([1]))",
                                   "import collections\ndef f(): return range(3), {'a': 1}.keys(), "
                                   "collections.Counter('aa'), collections.deque([1])", "def f(): return [0, 1, 2]"),
    "fractions": ("from fractions import Fraction\nassert f() == Fraction(1, 3)",
                  "from fractions import Fraction as F\ndef f(): return F(1, 3)", "def f(): return 1 / 3"),
    "names of builtins": ("assert sum(10, 15) == 6", "def sum(a, b): return 6", "def sum(a, b): return 7"),
    "a state that stays": ("assert [f(), f()] == [1, 2]", "n = 0\ndef f():\n    global n\n    n += 1\n    return n", "def f(): return 1"),
    "lambdas": ("assert f(2) == 4", "f = lambda x: x * x", "f = lambda x: x"),
    "printing": ("assert f(2) == 4", "def f(x):\n    print('hello')\n    return 4", "def f(x): print(4)"),
}
# fmt: on


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    test, right, wrong = FUNCTIONS[name]
    assert run_tests(right, function(test)) == "passed"
    assert run_tests(wrong, function(test)) in ("failed", "crashed")


def test_every_test_counts():
    tests = ["assert f(1) == 1", "assert f(2) == 2", "assert f(3) == 4"]
    assert run_tests("def f(x): return x", function(*tests)) == "failed"
    assert run_tests("def f(x): return x if x < 3 else 4", function(*tests)) == "passed"


def test_the_prefix_is_the_tests_own():
    """What the prefix defines is trusted: a program cannot replace a helper that its tests use."""
    prefix = "import math\ndef distance(x): return abs(x - 7)\n"
    task = function("assert distance(f()) < 1e-9 and math.fabs(f() - 7) < 1e-9", prefix=prefix)
    assert run_tests("def f(): return 7.0", task) == "passed"
    lie = "def distance(x): return 0\nclass math:\n    fabs = staticmethod(lambda x: 0)\ndef f(): return 1"
    assert run_tests(lie, task) == "failed"
    assert run_tests("def f(): return distance(0) + math.floor(0.5)", task) == "passed"
    stub = function("assert f() == 1", prefix="def f(): pass", entry_point="f")
    assert run_tests("def f(): return 1", stub) == "passed"


def test_verdicts_of_functions():
    task = function("assert f() == 1", test_time_limit=0.3)
    programs = {
        "def f(): return 2": "failed",
        "def f(): return 1 / 0": "crashed",
        "def g(): pass": "crashed",
        "def f(:": "crashed",
        "import sys\nsys.exit(0)": "crashed",
        "def f():\n    while True: pass": "timeout",
        "def f(): return [0] * 10**10": "memory",
        "def f(): print('x' * 10**7)": "output_limit",
    }
    found = {program: run_tests(program, task, CodeLimits(output=1 << 20)) for program in programs}
    assert found == programs


def test_whole_programs():
    task = stdio(("3 4\n", "7\n"), ("5 6", "11"))
    assert run_tests("print(sum(map(int, input().split())))", task) == "passed"
    assert run_tests("import sys\nprint('  ', sum(map(int, sys.stdin.read().split())), '\\n\\n')", task) == "passed"
    assert run_tests("if __name__ == '__main__':\n    print(sum(map(int, open(0).read().split())))", task) == "passed"
    assert run_tests("print(7)", task) == "failed"
    assert run_tests("print(sum(map(int, input().split())))\nexit(0)", task) == "passed"
    assert run_tests("print(sum(map(int, input().split())))\nexit(1)", task) == "crashed"
    assert run_tests("print(sum(map(int, input().split())))\ninput(); input()", task) == "crashed"
    assert run_tests("print(''.join(map(str, [sum(map(int, input().split())), 0])))", task) == "failed"


def test_a_threads_output_is_waited_for():
    program = "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.05), print(1))).start()"
    assert run_tests(program, stdio(("", "1"))) == "passed"


def humaneval() -> list[dict]:
    path = PUBLISHED / "HumanEval.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"the publisher's file {path.name} is not in shared/data beside the repository")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_humaneval():
    rows = humaneval()
    tasks = [Task(row["task_id"], record["question"], None, record) for row, record in zip(rows, convert_records(rows))]
    assert len(tasks) == 164

    def verdicts(bodies: list[str]) -> list[str]:
        responses = [f"```python\n{row['prompt']}{body}\n```" for row, body in zip(rows, bodies)]
        with ThreadPoolExecutor(2) as pool:
            return [score.verdict for score in pool.map(code_score, responses, tasks)]

    right = verdicts([row["canonical_solution"] for row in rows])
    assert [task.id for task, verdict in zip(tasks, right) if verdict != "passed"] == []
    wrong = verdicts(["    return None\n"] * len(rows))
    assert [task.id for task, verdict in zip(tasks, wrong) if verdict not in ("failed", "crashed")] == []
