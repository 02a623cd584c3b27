"""The process in which math-verify compares answers: with tolerances of the values' size, and without working them out.

A script that `math_reward` runs as a `Worker`, with the CPU seconds that one comparison may take and the descriptor of
its socket. Each message in is a JSON pair [answer, reference], each message out `true` or `false`. It imports nothing
of the project, and ends itself when a comparison overruns: math-verify's own time limit is an alarm with a Python
handler, which neither stops a long operation inside C nor works outside a main thread; the default action of these
timers kills the process always.
"""

import contextlib
import json
import math
import os
import resource
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

WALL_SECONDS = 30.0  # of one comparison; far beyond the CPU limit, so that a busy machine changes no verdict
MEMORY_BYTES = 4 * 2**30
MAX_DIGITS = 20_000  # numbers below 10^-MAX_DIGITS are equal only where they are written the same
NO_VALUES = (sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit, sympy.Derivative)
CLOSED = (sympy.factorial, sympy.binomial)
# math-verify would take the last letter of `2x + 5m` for a unit; `notation` strips units before.
CONFIGS = [
    LatexExtractionConfig(
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
        )
    ),
    ExprExtractionConfig(),
]


def compare(answer: str, reference: str) -> bool:
    """Whether two answers in plain LaTeX are equal."""
    found, right = (parse(f"\\boxed{{{text}}}", CONFIGS, parsing_timeout=None) for text in (answer, reference))
    if not found or not right:
        return False
    if not all(isinstance(side[0], (sympy.Basic, sympy.MatrixBase)) for side in (found, right)):
        return bool(verify(right, found, timeout_seconds=None))
    unknowns = [isinstance(side, sympy.Expr) and bool(side.free_symbols) for side in (found[0], right[0])]
    if unknowns[0] and isinstance(right[0], sympy.Expr) and not unknowns[1]:  # `4+2+8+1+0x`
        return False
    if not all(unknowns) and unfinished(found[0]) and not unfinished(right[0]):
        return False
    more = small_digits(found[0], right[0])
    if more > MAX_DIGITS:
        return bool(found[0] == right[0])
    tolerance = {"float_rounding": 6 + more, "numeric_precision": 15 + more}
    return bool(verify(right, found, **tolerance, allow_set_relation_comp=True, timeout_seconds=None))


def unfinished(tree: Any) -> bool:
    """Whether a parsed answer leaves numbers to be added or multiplied, or a sum, an integral or a function's value.

    Fractions, powers, roots, factorials and powers of ten as in `3 · 10^8` are values as they stand.
    """
    return any(map(_unfinished_itself, sympy.preorder_traversal(tree)))


def _unfinished_itself(part: Any) -> bool:
    if isinstance(part, NO_VALUES):
        return True
    if not getattr(part, "is_number", False):
        return False
    if isinstance(part, sympy.Add):
        return sum(map(_rational, part.args)) > 1
    if isinstance(part, sympy.Mul):
        return sum(_rational(factor) and _is_factor(factor) for factor in part.args) > 1
    return isinstance(part, sympy.Function) and not isinstance(part, CLOSED) and bool(part.doit().is_Rational)


def _rational(tree: Any) -> bool:
    if isinstance(tree, sympy.Pow):
        return _rational(tree.base) and tree.exp.is_Integer
    if isinstance(tree, (sympy.Add, sympy.Mul, *CLOSED, sympy.UnevaluatedExpr)):
        return all(map(_rational, tree.args))
    return isinstance(tree, sympy.Number)


def _is_factor(factor: Any) -> bool:
    """Whether a factor could be multiplied out: no sign, denominator, percent sign or power of ten."""
    if isinstance(factor, sympy.Pow):
        return not (factor.exp.is_negative or factor.base == 10)
    return not isinstance(factor, sympy.UnevaluatedExpr) and factor not in (1, -1)


def small_digits(*trees: Any) -> int:
    """Decimal places by which the smallest number in the expressions is below 0.01.

    math-verify's tolerances are places after the point: with so many more of them they are relative to the value.
    """
    powers = []
    for tree in trees:
        parts = sympy.preorder_traversal(tree)
        for part in parts:
            if getattr(part, "is_number", False):
                parts.skip()  # of a number the whole counts, not what it is made of
                size = abs(part.evalf(5))
                if size.is_Float and size:  # mantissa · 2^exponent, which may be too small for Python's own
                    powers.append(size._mpf_[2] + size._mpf_[3])
    return max(0, math.ceil(-min(powers, default=0) * math.log10(2)) - 2)


def serve(cpu_seconds: float, descriptor: int) -> None:
    """Answer questions until the socket is closed."""
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    with contextlib.suppress(OSError, ValueError):  # some systems have no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    nowhere = os.open(os.devnull, os.O_WRONLY)  # for what the libraries print and warn of
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    with contextlib.suppress(EOFError, ConnectionError):  # the parent wants no more
        connection.send_bytes(b"ready")
        while True:
            pair = connection.recv_bytes()
            limit(cpu_seconds, WALL_SECONDS)
            try:
                equal = compare(*json.loads(pair))
            except Exception:  # whatever the parser stumbles over (recursion, memory) is no proof of equality
                equal = False
            limit(0, 0)
            connection.send_bytes(json.dumps(equal).encode())


def limit(cpu: float, wall: float) -> None:
    """Arm both timers; zeros disarm them."""
    signal.setitimer(signal.ITIMER_PROF, cpu)
    signal.setitimer(signal.ITIMER_REAL, wall)


if __name__ == "__main__":
    serve(float(sys.argv[1]), int(sys.argv[2]))
