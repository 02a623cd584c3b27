"""The code reward: which block is run, how functions and whole programs are tested, and HumanEval's own solutions."""

import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.code_tests import checked_usage
from common.errors import UserError
from common.schema import RewardConfig
from common.trajectory import Score, Task
from data.download_data import convert_records
from reward.code_reward import code_score, outputs_equal, run_tests
from reward.extract_code import extract_code
from reward.sandbox import SANDBOX

PUBLISHED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="module", autouse=True)
def end_of_the_sandbox():
    yield
    SANDBOX.close()


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
        ("  ```python\n  x = 1\n  ```", "x = 1"),
        ("```\nx = 1\n```", "x = 1"),
        ("```bash\nls\n```", None),
        ("```python\nx = '''```'''\n```", "x = '''```'''"),
        ("```python\nx = 1", "x = 1"),
        ("x = 1", None),
        ("1. So:\n   ```python\n   if x:\n       y = 1\n   ```\n2. Done", "if x:\n    y = 1"),
        ("- ```python\n  x = 1\n  y = 2\n  ```", "x = 1\ny = 2"),
        ('  ```python\n  x = """\n text\n  """\n  ```', 'x = """\ntext\n"""'),
        ("Here it is: ```python\nx = 1\n```", "x = 1"),
        ("Here it is: ```\nx = 1\n```", "x = 1"),
        ("Use ```python x = 1``` only.", "x = 1"),
        ("```python\ndef f():\n    return 1```\nThat is all.", "def f():\n    return 1"),
        ("```python\nx = 1\n``` That is all.\n", "x = 1"),
        ("```\nUse ```python x = 1``` only.\nThat is all.", "x = 1"),
        ("````python\nx = '''\n```\n'''\n````", "x = '''\n```\n'''"),
        ("```python\nx = 1\n````", "x = 1"),
        ("~~~python\nx = 1\n~~~", "x = 1"),
        ("~~~~\nx = 1\n~~~\ny = 2\n~~~~\n", "x = 1\n~~~\ny = 2"),
        ("```python3.11\nx = 1\n```", "x = 1"),
        ("``` Python 3\nx = 1\n```", "x = 1"),
        ("```{.python}\nx = 1\n```", "x = 1"),
        ('```python title="a.py"\nx = 1\n```', "x = 1"),
        ("```pycon\n>>> x\n```", None),
        ("```\nThe program:\n```python\nx = 1\n```", "x = 1"),
        ("```python\nx = 1\n```\n```\n", "x = 1"),
        ("```python\nx = 1\n```\n```\n\nor\n```python\nx = 2\n```", "x = 2"),
        ("import sys\nprint(1)\n```", "import sys\nprint(1)"),
        ("That is the answer.\n```", None),
        ("```python\nx = 1\n```\nthen\n```python\nx = 2", "x = 2"),
        ("```python\nx = 1\n```\nthen\n```python\n", "x = 1"),
        ("```python\nx = 1\n```bash\npython x.py\n```", "x = 1"),
        ("```python\r\nx = 1\r\n```\r\n", "x = 1"),
        ("Call it as ```f(1)``` and:\n```python\nx = 1\n```", "x = 1"),
    ],
)
def test_the_last_python_block(text, code):
    assert extract_code(text) == code


@pytest.mark.parametrize(
    ("text", "names", "code"),
    [
        ("```python\ndef f(): pass\n```\n```python\nprint(f())\n```", "f", "def f(): pass"),
        ("```python\nclass A: pass\n```\n```python\na = A()\n```", "A", "class A: pass"),
        (
            "```python\ndef f(): 1\n```\n```python\ndef f(): 2\n```\n```python\ndef test_f(): f()\n```",
            "f",
            "def f(): 2",
        ),
        ("```python\nf = lambda: 1\n```\n```python\nassert f() == 1\n```", "f", "f = lambda: 1"),
        ("```\ndef f(): pass\n```\n```python\nprint(f())\n```", "f", "def f(): pass"),
        ("```python\ndef f(): g()\ndef g(): 1\n```\n```python\ndef g(): 2\n```", "fg", "def f(): g()\ndef g(): 1"),
        ("```python\ndef g(): 1\n```\n```python\ng()\n```", "fg", "def g(): 1"),
        ("```python\nx = 1\n```\n```python\ny = 2\n```", "f", "y = 2"),
        ("```python\ndef f(): 1\n```\n```python\nfrom a import f\nf()\n```", "f", "def f(): 1"),
        ("<think>```python\ndef f(): 1\n```\n</think>\n```\ndef f(): 2\n```", "f", "def f(): 2"),
        ("<think>```python\ndef f(): 1\n```\n</think>\nI cannot.", "f", None),
        ("def f():\n    pass\n```", "f", "def f():\n    pass"),
        ("def g():\n    pass\n```", "f", None),
    ],
)
def test_of_several_blocks_the_last_that_defines_what_is_tested(text, names, code):
    assert extract_code(text, names) == code


def test_a_demo_after_the_solution_is_not_what_is_run():
    solution, demo = "```python\ndef f(x): return x + 1\n```", "```python\nprint(f(1))\n```"
    assert code_score(f"{solution}\nFor example:\n{demo}", function("assert f(1) == 2")).correct
    reads, shows = "```python\nprint(int(input()) + 1)\n```", "```python\n# prints 3\nprint(3)\n```"
    assert code_score(f"{reads}\nWith 2:\n{shows}", stdio(("4", "5"))).correct
    assert code_score(f"{reads}\nOr at once:\n{shows}", stdio(("", "3"))).correct


def test_many_fences_take_no_time():
    assert extract_code("```python\n" * 100_000) is None
    assert extract_code("`" * 10**6) is None
    assert extract_code("```\n" * 100_000) == ""
    assert len(extract_code("x ```python\n" * 50_000 + "x" * 500_000)) == 1_099_988
    assert extract_code("``` " * 250_000) is None
    assert extract_code("a = b\n" * 200_000 + "```", ["f"]) is None
    assert len(extract_code("```python\n" + "import x\n" * 100_000 + "```", ["f"])) == 899_999


def test_scores():
    task = function("assert f(1) == 2")
    assert code_score("```python\ndef f(x): return x + 1\n```", task) == Score(1.0, True, "passed")
    assert code_score("```python\ndef f(x): return x\n```", task) == Score(0.0, False, "failed")
    assert code_score("no program", task) == Score(0.0, False, "no_answer")
    assert code_score("```python\n \n```", task) == Score(0.0, False, "no_answer")
    with pytest.raises(UserError, match=r"task 't' has no test_method \(function or stdio\)"):
        code_score("```python\nx\n```", Task("t", "q", "4", {}))


def test_the_share_of_tests_that_are_passed():
    """Of functions and of programs; the verdict is of the first test that is not passed."""
    share, doubling = RewardConfig(code_reward="share"), "```python\ndef f(x): return 2 * x\n```"
    tests = [f"assert f({n}) == {n * n}" for n in range(4)]  # it holds of 0 and 2
    assert code_score(doubling, function(*tests), share) == Score(0.5, False, "failed")
    assert code_score(doubling, function(tests[0], tests[2]), share) == Score(1.0, True, "passed")
    assert code_score(doubling, function(*tests)) == Score(0.0, False, "failed")
    ends = "```python\nn = int(input())\nprint(1 // n)\n```"
    assert code_score(ends, stdio(("1", "1"), ("0", "0"), ("2", "0")), share) == Score(2 / 3, False, "crashed")
    assert code_score("none", stdio(("1", "1")), share) == Score(0.0, False, "no_answer")


# fmt: off
# ruff: noqa: E501
BOX = "class Box:\n    KIND = 'box'\n    def __init__(self, side): self.side = side\n    @property\n    def area(self): return self.side ** 2"
BAG = """class B:
    def __init__(self, x): self.x = x
    def __len__(self): return len(self.x)
    def __getitem__(self, k): return self.x[k]
    def __str__(self): return 'B of 2'
    def __repr__(self): return 'B'"""
POINT = """class P:
    def __init__(self, x): self.x = x
    def __add__(self, other): return P(self.x + other.x)
    def __mul__(self, n): return P(self.x * n)
    __rmul__ = __mul__
    def __neg__(self): return P(-self.x)
    def __abs__(self): return abs(self.x)
    def __eq__(self, other): return self.x == other.x
    def __lt__(self, other): return self.x < other.x
    def __hash__(self): return hash(self.x)"""
SHORT = """class Short(ValueError):
    def __init__(self, n):
        super().__init__(n)
        self.missing = n
    def __str__(self): return f'{self.missing} short'
def f(n): raise Short(n)"""
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
    "an argument changed and a value returned": (
        "a, d = [3, 1, 2], {}\nassert f(a, d=d) == 3 and a == [1, 2] and d == {'n': [3]}",
        "def f(a, d):\n    a.sort()\n    d['n'] = [a.pop()]\n    return 3", "def f(a, d):\n    return sorted(a).pop()"),
    "rows changed in place": ("g = [[1], [2]]\nrow = g[0]\nassert f(g) == 2 and row == [1, 0] and g == [[1, 0], [2], []]",
                              "def f(g):\n    g[0].append(0)\n    g.append([])\n    return 2", "def f(g):\n    g[0] = [1, 0]\n    return 2"),
    "an argument changed before an exception": ("a = []\ntry: f(a)\nexcept ValueError: pass\nassert a == [1]",
                                                "def f(a):\n    a.append(1)\n    raise ValueError", "def f(a): raise ValueError"),
    "attributes and properties": ("b = Box(2)\nassert b.side == 2 and b.area == 4 and Box.KIND == 'box'\nb.side = 3\nassert b.area == 9",
                                  BOX, BOX.replace("self.side ** 2", "4")),
    "an absent attribute": ("assert A().anything", "class A: anything = 1", "class A: pass"),
    "hasattr": ("assert hasattr(A(), 'x') and not hasattr(A(), 'y')", "class A: x = 1", "class A: y = 1"),
    "callable": ("assert callable(A().f) and not callable(A())", "class A:\n    def f(self): pass", "class A: f = 1"),
    "unequal": ("assert A().x != 3", "class A: x = 4", "class A: x = 3"),
    "unequal objects": ("assert P(1) != P(2) and not P(1) != P(1)", POINT, "class P:\n    def __init__(self, x): pass"),
    "len, str, repr and bool": ("b = B([1, 2])\nassert len(b) == 2 and str(b) == 'B of 2' and repr(b) == 'B' and f'{b}' == 'B of 2' and b and not B([])",
                                BAG, BAG.replace("'B of 2'", "'B'")),
    "items": ("b = B([1, 2])\nassert b[0] == 1 and list(b) == [1, 2] and 2 in b and 3 not in b and b[-1:] == [2]", BAG, BAG.replace("self.x[k]", "[*self.x, 9][k]")),
    "operators": ("assert P(1) + P(2) == P(3) and 2 * P(2) == P(4) and P(1) < P(2) and -P(1) == P(-1) and abs(P(-2)) == 2 and (P(1) * 2).x == 2",
                  POINT, POINT.replace("self.x + other.x", "self.x - other.x")),
    "copies": ("import copy\na = P([1])\nb, c = copy.deepcopy(a), copy.copy(a)\na.x = 2\nassert b.x == c.x == [1] and b is not a", POINT, POINT.replace("= x", "= [2]")),
    "operators in place": ("p = q = P(1)\np += P(2)\np *= 2\nassert p == P(6)", POINT, POINT.replace("self.x * n", "self.x")),
    "sorting objects": ("assert [p.x for p in sorted([P(3), P(1)])] == [1, 3] and max(P(1), P(2)).x == 2", POINT, POINT.replace("<", ">")),
    "objects in sets": ("assert len({P(1), P(1), P(2)}) == 2", POINT, POINT.replace("hash(self.x)", "id(self)")),
    "the same object": ("assert one() is one() and isinstance(one(), One) and one().__class__.__name__ == 'One'",
                        "class One: pass\nit = One()\ndef one(): return it", "class One: pass\ndef one(): return One()"),
    "callbacks": ("seen = []\nassert f(lambda x: seen.append(x) or x * 2, [1, 2]) == [2, 4] and seen == [1, 2] and f(str, [1]) == ['1']",
                  "def f(g, xs): return [g(x) for x in xs]", "def f(g, xs): return [2, 4]"),
    "callbacks that call back": ("def g(n): return 0 if n == 0 else f(g, n - 1) + 1\nassert f(g, 5) == 5", "def f(g, n): return g(n)", "def f(g, n): return 4"),
    "callbacks that raise": ("def g(): raise KeyError('k')\nassert f(g) == 'k'", "def f(g):\n    try: g()\n    except KeyError as e: return e.args[0]", "def f(g): g()"),
    "callbacks in threads": ("assert f(lambda x: x + 1) == [1, 2, 3]", "from concurrent.futures import ThreadPoolExecutor as E\ndef f(g): return list(E(2).map(g, range(3)))", "def f(g): return [g(0)]"),
    "iterators passed": ("assert f(x * x for x in [1, 2]) == 5", "def f(xs): return sum(xs)", "def f(xs): return len(list(xs))"),
    "objects of the tests": ("class N:\n    def __init__(self, v, next=None): self.v, self.next = v, next\n    def twice(self): return 2 * self.v\n"
                             "n = N(1, N(2))\nassert f(n) == 6 and n.v == 5",
                             "def f(n):\n    s = 0\n    m = n\n    while m:\n        s += m.twice()\n        m = m.next\n    n.v = 5\n    return s",
                             "def f(n): return n.v"),
    "functions returned": ("g = f(2)\nassert g(3) == 6 and f.__name__ == 'f'", "def f(n): return lambda x: n * x", "def f(n): return lambda x: n"),
    "dates": ("from datetime import *\nassert f(date(2024, 2, 28), timedelta(days=2)) == date(2024, 3, 1)\n"
              "assert f(datetime(2024, 1, 1, 5, tzinfo=timezone.utc), timedelta(hours=1)).hour == 6",
              "def f(d, t): return d + t", "def f(d, t): return d"),
    "identifiers": ("from uuid import UUID\nassert f() == UUID(int=5)", "import uuid\ndef f(): return uuid.UUID(int=5)", "import uuid\ndef f(): return str(uuid.UUID(int=5))"),
    "custom exceptions": ("try:\n    f(3)\n    assert False\nexcept Short as e:\n    assert e.missing == 3 and str(e) == '3 short' and e.args == (3,)\n"
                          "assert issubclass(Short, ValueError) and Short(4).missing == 4", SHORT, SHORT.replace("missing = n", "missing = 0")),
    "exceptions of the library": ("import json\ntry:\n    f('{')\n    assert False\nexcept json.JSONDecodeError: pass", "import json\ndef f(t): json.loads(t)", "def f(t): raise KeyError"),
    "with": ("with R() as r: assert r.open\nassert not r.open", "class R:\n    def __enter__(self):\n        self.open = True\n        return self\n    def __exit__(self, *e): self.open = False",
             "class R:\n    open = True\n    def __enter__(self): return self\n    def __exit__(self, *e): pass"),
    "classes that derive from plain types": ("s = Stack([1])\ns.append(2)\nassert s.peek() == 2 and s == [1, 2] and len(s) == 2 and isinstance(s, list) and s + [3] == [1, 2, 3]",
                                             "class Stack(list):\n    def peek(self): return self[-1]", "class Stack(list):\n    def peek(self): return self[0]"),
    "named tuples": ("assert f() == (1, 2) and f().y == 2 and [f()] == [(1, 2)] and f()[0] == 1", "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(): return P(1, 2)", "def f(): return (1, 2)"),
    "enums": ("assert Color.RED.value == 1 and f() is Color.RED and f().name == 'RED'", "import enum\nclass Color(enum.Enum):\n    RED = 1\n    BLUE = 2\ndef f(): return Color(1)",
              "import enum\nclass Color(enum.Enum):\n    RED = 1\n    BLUE = 2\ndef f(): return Color(2)"),
    "constants of the program": ("assert LIMIT == 3\nf()\nassert LIMIT == 4", "LIMIT = 3\ndef f():\n    global LIMIT\n    LIMIT += 1", "LIMIT = 3\ndef f(): pass"),
    "names of modules": ("assert select([3, 4], 0) == 3 and queue(2) == [0, 1] and math.floor(2.5) == 2", "def select(a, k): return a[k]\ndef queue(n): return list(range(n))", "def select(a, k): return a\nqueue = select"),
    "a parameter of the same name": ("def check(f): assert f(1) == 2\ncheck(f)", "def f(x): return 2", "def f(x): return 1"),
    "unittest": ("import unittest\nclass T(unittest.TestCase):\n    def test_f(self): self.assertEqual(f(1), 2)\nif __name__ == '__main__':\n    unittest.main()",
                 "def f(x): return 2", "def f(x): return 1"),
    "a program that tests itself": ("assert f(1) == 2", "import unittest\ndef f(x): return 2\nclass T(unittest.TestCase):\n    def test(self): assert f(1) == 2\nunittest.main()", "import unittest\nunittest.main()"),
    "printing": ("assert f(2) == 4", "def f(x):\n    print('hello')\n    return 4", "def f(x): print(4)"),
}
# fmt: on


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    test, right, wrong = FUNCTIONS[name]
    assert run_tests(right, function(test)) == "passed"
    assert run_tests(wrong, function(test)) in ("failed", "crashed")


LIAR = """class Liar(BASE):
    def __init__(self, *a): self.n = 0
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return hash(10)
    def __bool__(self): return False
    def __abs__(self): return 0
    def __len__(self): return 1
    def __iter__(self): return iter([self])
    def __next__(self): return self
    def __getitem__(self, k): return self
    def __getattr__(self, name): return lambda *a: 0
    __float__ = lambda self: 0.0
    __int__ = __index__ = __round__ = __trunc__ = __abs__
    __contains__ = __lt__ = __gt__ = __le__ = __ge__ = __eq__
    __add__ = __radd__ = __sub__ = __rsub__ = __isub__ = __mul__ = __pow__ = __mod__ = __xor__ = __truediv__ = lambda self, other: GIVES
f = Liar"""
LIED_TO = """assert f(3) == 10|assert 10 == f(3)|assert not f(3) != 10|assert [f(3)] == [10]|assert f(3) in (10,)|assert f(3) in {10}
assert 10 in f(3)|assert f(3) >= 10|assert f(3) > 9|assert abs(f(3) - 10) < 1e-6|assert f(3) - 10 == 0|assert not f(3) - 10|assert not 10 - f(3)
assert (f(3) - 10) ** 2 < 1e-6|assert round(f(3) - 10, 3) == 0|assert max(f(3) - 10, 10 - f(3)) < 1e-6|assert int(f(3) - 10) == 0|assert f(3) ^ 10 == 0
assert f(3).__eq__(10)|assert not (f(3) - 10).__abs__()|assert (f(3) - 10).max() < 1e-6|assert math.isclose(f(3), 10)|assert math.fabs(f(3) - 10) < 1e-6
assert sorted(f(3)) == [10]|assert all(a == b for a, b in zip(f(3), [10], strict=True))|assert sum(f(3)) == 10|assert operator.eq(f(3), 10)
assert {f(3): 1} == {10: 1}|assert str(f(3)) == '10'|x = f(3)\nx -= 10\nassert not x|assert len(f(3)) == 10|assert f'{f(3) - 10:.1f}' == '0.0'"""


@pytest.mark.parametrize("base", ["object", "int", "float", "list"])
@pytest.mark.parametrize("gives", ["self", "0", "Liar()"])
def test_no_lie_of_an_object_passes(base, gives):
    program = LIAR.replace("BASE", base).replace("GIVES", gives)
    tests = LIED_TO.replace("\n", "|").replace("|x -", "\nx -").replace("|assert not x|", "\nassert not x|").split("|")
    with ThreadPoolExecutor(2) as pool:
        verdicts = pool.map(lambda test: run_tests(program, function(test)), tests)
        assert [test for test, verdict in zip(tests, verdicts) if verdict not in ("failed", "crashed")] == []


def test_numbers_of_numpy_are_not_taken_from_an_object():
    program = LIAR.replace("BASE", "object").replace("GIVES", "self")
    for test in (
        "np.abs(f(3) - np.array([10])).max() < 1e-6",
        "np.allclose(f(3), [10])",
        "np.linalg.norm(f(3) - np.array([10])) < 1e-6",
    ):
        assert run_tests(program, function(f"import numpy as np\nassert {test}")) in ("failed", "crashed")
        assert run_tests("def f(x): return [10.0]", function(f"import numpy as np\nassert {test}")) == "passed"


def test_what_the_tests_pass_gives_the_program_no_hold_on_them():
    program = """import sys
def f(g, n):
    remote = sys.modules['remote']
    peer = remote.FAR(g).ask.__self__
    asks = [('get', g, name) for name in ('__globals__', '__code__', '__closure__', '__self__', 'gi_frame')]
    asks += [('get', n, name) for name in ('__class__', '__dict__', '_secret')] + [('set', n, '__class__', g), ('set', n, 'm', g), ('do', 'dir', n), ('name', 'secret')]
    asks += [('do', 'format', g, ''), ('base', g), ('call', eval, ['1'], {}), ('do', 'isinstance', n, g), ('do', 'deepcopy', n)]
    found = []
    for ask in asks:
        try: found.append(peer.ask(*ask))
        except (TypeError, AttributeError): pass
    for name in ('__globals__', '__code__'):
        reply = peer._raw({'ask': 'call', 'of': [{'yours': [0, None]}, [{'yours': [0, name]}], {'dict': []}]})
        if 'the tests do not let a program' not in str(reply.get('error')): found.append(reply)
    return [g(1), n.v, found]"""
    test = "secret = 5\nclass N:\n    v = 2\n    _secret = 3\n    def m(self): pass\nassert f(lambda x: x, N()) == [1, 2, []]"
    raw = "import sys\npeer = sys.modules['peer']\n"
    raw += "def raw(self, message):\n    v = sys.modules['values']\n    v.send(3, message)\n    return self.receive()\npeer.Peer._raw = raw\n"
    assert run_tests(raw + program, function(test)) == "passed"


def test_tests_that_catch_everything_do_not_pass_an_ended_program():
    task = function("try:\n    assert f() == 1\nexcept BaseException:\n    pass")
    assert run_tests("import os\ndef f(): os._exit(0)", task) == "crashed"


@pytest.mark.parametrize(
    "run",
    [
        "unittest.main(argv=[''], exit=False)",
        "unittest.TextTestRunner().run(unittest.TestLoader().loadTestsFromTestCase(T))",
    ],
)
def test_a_run_of_unittests_counts_where_nobody_looks_at_its_result(run):
    test = "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(f(1), 2)\n"
    task = function(test + run)
    assert run_tests("def f(x): return x + 1", task) == "passed"
    assert run_tests("def f(x): return x", task) == "failed"


def test_a_program_that_was_asked_nothing_has_not_passed():
    task = function("def check(g):\n    for x in []: assert g(x) == 1\ncheck(f)", entry_point="f")
    assert run_tests("def f(x): return 1", task) == "failed"


NOTHING_TESTED = {
    '["assert f(1) == 1"]': "is a list written as one text",
    ("def check(c): assert c(1) == 2",): "no assertion that is run",
    ("def check(c): assert c(1) == 2\ndef main(): check(f)",): "no assertion that is run",
    ("f(1)",): "no assertion that is run",
    ("assert True", "assert 'f(1)'", "f(2)"): "no assertion that is run",
    ("assert f(1) == 1", "f(2) == 2"): "entry 2 is a value at which nobody looks",
    ('["assert f(1) == 1"]',): "entry 1 is a value at which nobody looks",
    ("assert (f(1) == 2, 'one')",): "asserts a tuple",
    ("import math\nassert math.pi > 3",): "uses nothing of the program's",
    ("def f(x): return x", "assert f(1) == 1"): "uses nothing of the program's",
    (
        "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(f(1), 2)",
    ): "no assertion that is run",
}


@pytest.mark.parametrize("tests", NOTHING_TESTED, ids=range(len(NOTHING_TESTED)))
def test_tests_that_test_nothing_are_refused(tests):
    task = Task("t", "q", None, {"test_method": "function", "test_list": tests})
    with pytest.raises(UserError, match=f"task 't': `test_list` .*{NOTHING_TESTED[tests]}"):
        code_score("```python\ndef f(x): return x\n```", task)


SOMETHING_TESTED = [
    "def check(f): assert f(1) == 2\ncheck(f)",
    "class T:\n    def run(self): self.one()\n    def one(self): assert f(1) == 2\nT().run()",
    "try: f(1)\nexcept KeyError: pass\nelse: raise AssertionError",
    "import numpy as np\nnp.testing.assert_allclose(f(1), 2)",
    "for x in [1]: assert f(x) == 2",
    "assert sum(10, 15) == 6",
    "a = [1]\nf(a)\nassert a == [2]",
    "assert True, 'always'\nassert f(1) == 2",
    "from math import *\nassert isclose(f(1), 2)",
]


@pytest.mark.parametrize("test", SOMETHING_TESTED)
def test_tests_that_test_something_are_taken(test):
    assert checked_usage({"test_list": [test]}, "here").problem == ""


OUTPUTS = [  # (printed, wanted, equal)
    ("0.3333333333333333", "0.333333", True),
    ("3.0", "3", True),
    ("3", "3.0", True),
    ("1 2\n3 4", "1 2 3 4", False),
    ("1 2 3 4", "1 2\n3 4\n", False),
    ("1 2 \n3 4\t\r\n\n\n", "1 2\n3 4", True),
    ("1\n\n2", "1\n2", False),
    ("\n1", "1", False),
    ("1", "1\n2", False),
    ("", "\n", True),
    ("3.0001", "3", False),
    ("2.9999999999", "3", False),
    ("1000000007.0001", "1000000007", False),
    ("10000000000000000000001", "10000000000000000000000", False),
    ("1e22", "10000000000000000000000", True),
    ("03", "3", False),
    ("0.1000011", "0.1", False),
    ("0.1000009", "0.1", True),
    ("1000000.5", "1000001.0", True),
    ("1000000.5", "1000003.0", False),
    ("-0.0", "0.0", True),
    ("nan", "nan", True),
    ("nan", "1.0", False),
    ("inf", "1e999", False),
    ("1.5e3", "1500.0", True),
    ("a 0.5000000001 b", "a 0.5 b", True),
    ("a 0.5", "b 0.5", False),
    ("1.5.5", "1.5", False),
    ("١.0", "1.0", False),
    ("1e99999999999999999999", "1", False),
    ("9" * 100_000, "9" * 99_999 + "8", False),
]


@pytest.mark.parametrize(("printed", "wanted", "equal"), OUTPUTS, ids=range(len(OUTPUTS)))
def test_outputs_are_compared_line_by_line(printed, wanted, equal):
    assert outputs_equal(printed, wanted, 1e-6) == equal


def test_the_tolerance_is_the_configs():
    task = stdio(("", "0.25\n2"))
    assert code_score("```python\nprint(0.2501)\nprint(2.0)\n```", task).verdict == "failed"
    assert code_score("```python\nprint(0.2501)\nprint(2)\n```", task, RewardConfig(float_tolerance=1e-3)).correct
    assert not code_score("```python\nprint(0.2500001)\nprint(2)\n```", task, RewardConfig(float_tolerance=0)).correct


def test_programs_see_no_arguments_of_the_sandbox():
    task = stdio(("5 6\n7", "18"))
    for program in (
        "import sys\nassert sys.argv == ['program.py'] == [__file__]\nprint(sum(map(int, sys.stdin.read().split())))",
        "import fileinput\nprint(sum(int(word) for line in fileinput.input() for word in line.split()))",
        "import argparse, sys\na = argparse.ArgumentParser()\na.add_argument('--n', default=0)\na.parse_args()\nprint(sum(map(int, open(0).read().split())))",
    ):
        assert run_tests(program, task) == "passed"
    program = "import sys, unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(N, 1)\nprint(18)\nif __name__ == '__main__':\n    unittest.main()"
    assert run_tests(program.replace("N", "1"), task) == "passed"
    assert run_tests(program.replace("N", "2"), task) == "crashed"


def test_every_test_counts():
    tests = ["assert f(1) == 1", "assert f(2) == 2", "assert f(3) == 4"]
    assert run_tests("def f(x): return x", function(*tests)) == "failed"
    assert run_tests("def f(x): return x if x < 3 else 4", function(*tests)) == "passed"


def test_the_setup_is_the_tests_own():
    """What the setup defines is trusted: a program cannot replace a helper that its tests use."""
    setup = "import math\ndef distance(x): return abs(x - 7)\n"
    task = function("assert distance(f()) < 1e-9 and math.fabs(f() - 7) < 1e-9", setup=setup)
    assert run_tests("def f(): return 7.0", task) == "passed"
    lie = "def distance(x): return 0\nclass math:\n    fabs = staticmethod(lambda x: 0)\ndef f(): return 1"
    assert run_tests(lie, task) == "failed"
    assert run_tests("def f(): return distance(0) + math.floor(0.5)", task) == "passed"
    stub = function("assert f() == 1", setup="def f(): pass", entry_point="f")
    assert run_tests("def f(): return 1", stub) == "passed"


HEAD = 'from typing import List\n\n\ndef add_all(numbers: List[int]) -> int:\n    """Their sum.\n    >>> add_all([1, 2])\n    3\n    """\n'
BODY = "\n    total = 0\n    for number in numbers:\n        total += number\n    return total"


@pytest.mark.parametrize(
    ("prefix", "response"),
    [
        (f"```python\n{HEAD}", f"{BODY}\n```"),
        (f"```python\n{HEAD}", BODY),
        (f"```python\n{HEAD}", f"{BODY}\n```\nIt adds them up, as `add_all([1])` shows."),
        (HEAD, BODY),
        (HEAD, f"{BODY}\n```\nThat is all."),
        (HEAD, f"\n    pass\n```\nBetter:\n```python\n{HEAD}{BODY}\n```"),
        ("```python\n", f"{HEAD}{BODY}\n```"),
        ("Here is my solution:\n", f"\n```python\n{HEAD}{BODY}\n```"),
    ],
)
def test_the_program_goes_on_from_the_prefix(prefix, response):
    """As in records of HumanEval and MBPP whose prefix is given to the model as the beginning of its answer."""
    task = function("assert add_all([1, 2, 4]) == 7", prefix=prefix)
    assert code_score(response, task).verdict == "passed"
    assert code_score(response.replace("+=", "-="), task).verdict == "failed"
    alone = function("assert add_all([1, 2, 4]) == 7")
    assert not code_score(BODY, alone).correct


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
    found = {program: run_tests(program, task, RewardConfig(output_mb=1)) for program in programs}
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
