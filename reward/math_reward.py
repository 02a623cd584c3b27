"""Is the boxed answer the reference answer? Numbers and equal strings at once, the rest by math-verify in a worker."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from decimal import Decimal
from pathlib import Path

from common.trajectory import Score

MAX_ANSWER = 1000  # characters; a longer answer is not compared
MAX_DEPTH = 16  # of brackets; the parser's time doubles with each
CPU_SECONDS = 3.0  # of one comparison in the worker
NUMBER = re.compile(r"[+-]?(\d{1,3}(,\d{3})+|\d+)?(\.\d+)?")
WORKING = re.compile(
    r"(?:[\d\s.,;(){}=+*/-]|\\(?:times|cdot|[dt]?frac|left|right|[,;!]))+"
)  # digits and operators only
OPERATOR = re.compile(r"[\d)}]\s*(?:[+*;-]|\\times|\\cdot)")
BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)

_said: set[str] = set()
_lock = threading.Lock()  # one comparison at a time: there is one worker
_worker: subprocess.Popen[str] | None = None


def extract_boxed(text: str) -> str | None:
    r"""What stands in the last complete `\boxed{…}`, nested braces included; None where there is none."""
    start = text.find("\\boxed")
    if start < 0:
        return None
    stack: list[int] = []  # for each open brace, where its box's content starts; -1 for other braces
    last = (-1, -1)
    for match in BRACES.finditer(text, start):
        token = match.group()
        if token == "}":
            opened = stack.pop() if stack else -1
            if opened > last[0]:
                last = (opened, match.start())
        elif token.endswith("{") and token[:2] != "\\{":
            stack.append(match.end() if token != "{" else -1)
    return text[last[0] : last[1]].strip() if last[0] >= 0 else None


def math_score(response: str, answer: str, truncated: bool = False) -> Score:
    """Reward 1 where the last boxed answer equals the reference; verdict passed, failed, no_answer or truncated."""
    if truncated:
        return Score(0.0, False, "truncated")
    predicted = extract_boxed(response)
    if not predicted:
        return Score(0.0, False, "no_answer")
    correct = answers_equal(predicted, answer)
    return Score(float(correct), correct, "passed" if correct else "failed")


def answers_equal(predicted: str, reference: str) -> bool:
    """Whether two answers (numbers, LaTeX, text, sets, intervals, matrices, percentages, with units) are equal."""
    predicted, reference = _trim(predicted), _trim(reference)
    if predicted == reference:
        return True
    if not predicted or len(predicted) > MAX_ANSWER or _depth(predicted) > MAX_DEPTH:
        return False
    number, reference_number = _number(predicted), _number(reference)
    if reference_number is not None:
        if number is None and WORKING.fullmatch(predicted):
            number = _number(predicted.rpartition("=")[2].strip(" (){}"))
            if number is None and OPERATOR.search(predicted):
                # `4+2+8+1` for 15: math-verify would work it out, and RL soon learns to box the question itself.
                return False
        if number is not None:
            return _numbers_equal(number, reference_number)
    return _verified(predicted, reference)


def _trim(text: str) -> str:
    text = text.strip()
    if len(text) > 2 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    return text[:-1].rstrip() if text.endswith(".") else text


def _number(text: str) -> Decimal | None:
    r"""A plain integer or decimal, `1,234` and `1{,}234` included."""
    text = text.replace("{,}", ",").replace(",\\!", ",").replace("−", "-")
    if not NUMBER.fullmatch(text) or not any(character.isdigit() for character in text):
        return None
    return Decimal(text.replace(",", ""))


def _depth(text: str) -> int:
    """How deeply brackets nest, closed or not."""
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _numbers_equal(a: Decimal, b: Decimal) -> bool:
    if a == b:
        return True
    both_whole = a == a.to_integral_value() and b == b.to_integral_value()
    # 0.30000000000000004 in a data file means 0.3.
    return not both_whole and abs(a - b) <= Decimal("1e-9") * max(abs(a), abs(b))


@functools.lru_cache(maxsize=65536)
def _verified(predicted: str, reference: str) -> bool:
    """math-verify's word, or False where it takes too long."""
    if not _can_verify():
        return False
    with _lock:
        worker = _running_worker()
        assert worker.stdin is not None and worker.stdout is not None
        line = ""
        try:
            worker.stdin.write(json.dumps([predicted, reference]) + "\n")
            worker.stdin.flush()
            line = worker.stdout.readline()
        except BrokenPipeError:
            pass
        finally:
            if not line:  # it ended, or we were interrupted: its answer must not be read as that to the next question
                stop_worker()
    if line:
        return json.loads(line)
    _say_once("overrun", f"reward: comparing {predicted[:80]!r} took too long and counts as failed (said once)")
    return False


def _can_verify() -> bool:
    if importlib.util.find_spec("math_verify") is not None:
        return True
    _say_once(
        "missing",
        "reward: math-verify is not installed, so that only plain numbers and equal strings count as correct: "
        "pip install math-verify",
    )
    return False


def _running_worker() -> subprocess.Popen[str]:
    """The worker, started where there is none. A worker that cannot start is an error, never a wrong answer."""
    global _worker
    if _worker is None or _worker.poll() is not None:
        stop_worker()
        # -P keeps this folder off the module path: no file of ours may stand in for a library there.
        command = [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py")), str(CPU_SECONDS)]
        # One thread: on hosts of many cores a numerical library's buffers alone would pass the memory limit.
        _worker = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # an interrupt from the keyboard is the parent's business
        )
        atexit.register(stop_worker)
        assert _worker.stdout is not None
        if _worker.stdout.readline() != "ready\n":
            code = _worker.wait()
            _worker = None
            raise RuntimeError(f"the process that compares answers could not start (exit code {code}); see above")
    return _worker


def stop_worker() -> None:
    """End the worker; the next comparison that needs one starts another."""
    global _worker
    worker, _worker = _worker, None
    if worker is None:
        return
    worker.kill()
    worker.wait()
    for pipe in (worker.stdin, worker.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # a request that was never read
                pipe.close()


def _say_once(what: str, message: str) -> None:
    if what not in _said:
        _said.add(what)
        print(message, file=sys.stderr, flush=True)
