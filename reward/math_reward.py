"""Is the boxed answer the reference answer? Numbers and equal strings at once, the rest by math-verify in a worker."""

import functools
import importlib.util
import itertools
import json
import re
import sys
from pathlib import Path

from common.boxed import extract_boxed, final_part
from common.trajectory import Score
from reward import notation
from reward.workers import Worker

MAX_ANSWER = 1000  # characters; a longer answer is right only where it is the reference's own text
MAX_DEPTH = 16  # of brackets; the parser's time doubles with each
CPU_SECONDS = 3.0  # of one comparison by math-verify
START_SECONDS = 300.0
WORKING = re.compile(
    r"(?:[\d\s.,;(){}\[\]=+*/-]|\\(?:times|cdot|div|[dt]?frac|left|right|[,;!{}]))+"
)  # digits and operators only
OPERATOR = re.compile(r"[\d)}]\s*(?:[+*;-]|\\times|\\cdot|\\div)")
WRAPPED = re.compile(r"\$\$?(.+?)\$\$?|\\\((.+)\\\)|\\\[(.+)\\\]|(?:\\(?:mathbf|boldsymbol|bm)\s*)?\{(.+)\}", re.DOTALL)
DOTS = "\\ldots"
MARKED = re.compile(r"^#### ?(-?\$?\d[\d,]*(?:\.\d+)?)\.?[ \t]*$", re.MULTILINE)
POINT = re.compile(r"\([^()]*,[^()]*\)")


class MathVerify:
    """math-verify in a worker process, which ends itself where a comparison takes too long or too much memory."""

    def __init__(self, cpu_seconds: float = CPU_SECONDS) -> None:
        # -P keeps this folder off the module path: no file of ours may stand in for a library there.
        command = [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py")), str(cpu_seconds)]
        self.worker = Worker(command, start_seconds=START_SECONDS)
        self.equal = functools.lru_cache(maxsize=65536)(self._equal)
        self._said: set[str] = set()

    def _equal(self, predicted: str, reference: str) -> bool:
        """math-verify's word, or False where it takes too long. A worker that cannot start is no wrong answer."""
        if importlib.util.find_spec("math_verify") is None:
            self._say_once(
                "missing",
                "reward: math-verify is not installed, so that only plain numbers and equal strings count as correct: "
                "pip install math-verify",
            )
            return False
        try:
            self.worker.start()
        except EOFError:
            raise RuntimeError(
                f"the process that compares answers could not start (exit code {self.worker.exit_code}); see above"
            ) from None
        try:
            return json.loads(self.worker.ask(json.dumps([predicted, reference]).encode()))
        except EOFError:
            message = f"reward: comparing {predicted[:80]!r} took too long and counts as failed (said once)"
            self._say_once("overrun", message)
            return False

    def _say_once(self, what: str, message: str) -> None:
        if what not in self._said:
            self._said.add(what)
            print(message, file=sys.stderr, flush=True)


MATH_VERIFY = MathVerify()  # this process's; its worker is started when needed and ends with this process


def math_score(response: str, answer: str) -> Score:
    """Reward 1 where the response's answer equals the reference; verdict passed, failed or no_answer."""
    predicted = extract_answer(response)
    if not predicted:
        return Score(0.0, False, "no_answer")
    correct = answers_equal(predicted, answer)
    return Score(float(correct), correct, "passed" if correct else "failed")


def extract_answer(response: str) -> str | None:
    """What the last box holds; without any box the number of the first line `#### 18`, as GSM8K marks its answers."""
    boxed = extract_boxed(response)
    marked = MARKED.search(final_part(response)) if boxed is None else None
    return marked[1] if marked else boxed


def answers_equal(predicted: str, reference: str) -> bool:
    """Whether two answers (numbers, LaTeX, text, sets, intervals, matrices, percentages, with units) are equal."""
    if max(len(predicted), len(reference)) > MAX_ANSWER:
        return predicted.strip() == reference.strip()
    predicted, reference = _trim(predicted), _trim(reference)
    if predicted == reference:
        return True
    depths = itertools.accumulate((sign in "([{") - (sign in ")]}") for sign in predicted)
    if not predicted or max(depths) > MAX_DEPTH:
        return False
    number, reference_number = notation.digits(predicted), notation.digits(reference)
    if number and reference_number:
        return notation.numbers_equal(number, reference_number)
    if notation.contradict(predicted, reference):
        return False
    return _plain_equal(notation.plain(predicted), notation.plain(reference))


def _plain_equal(predicted: str, reference: str) -> bool:
    """`answers_equal` of answers in plain notation."""
    if notation.contradict(predicted, reference):
        return False
    if notation.option(predicted) or notation.option(reference):
        return _options_equal(predicted, reference)
    if DOTS in predicted or DOTS in reference:
        return _parts_equal(predicted, reference, DOTS)
    if predicted.count(":") > 1 and reference.count(":") > 1:  # math-verify takes 1:2:3 for a product of fractions
        return _parts_equal(predicted, reference, ":")
    names, reference_names = notation.words(predicted), notation.words(reference)
    if names and reference_names:
        return names == reference_names
    if notation.without_spaces(predicted) == notation.without_spaces(reference):
        return True
    number, reference_number = notation.number(predicted), notation.number(reference)
    if reference_number is not None:
        if POINT.fullmatch(predicted):  # (1,100) is not 1100
            return False
        if number is None and WORKING.fullmatch(predicted):
            number = notation.number(predicted.rpartition("=")[2].strip(" (){}"))
            if number is None and OPERATOR.search(predicted):
                # `4+2+8+1` for 15: math-verify would work it out, and RL soon learns to box the question itself.
                return False
        if number is not None:
            return notation.numbers_equal(number, reference_number)
    return MATH_VERIFY.equal(_both_signs(predicted), _both_signs(reference))


def _both_signs(text: str) -> str:
    r"""Both values of a text with a `\pm` within braces, which math-verify would not part."""
    before, sign, after = text.partition("\\pm")
    if not sign or "\\pm" in after or "," in text or before.count("{") <= before.count("}"):
        return text
    return f"{before}+{after}, {before}-{after}"


def _options_equal(predicted: str, reference: str) -> bool:
    """Options of a multiple choice: by their letters, by their texts, and by both where both are given."""
    letter, text = _letter_and_text(predicted)
    right_letter, right_text = _letter_and_text(reference)
    compared = [letter == right_letter] if letter and right_letter else []
    if text and right_text:
        compared.append(answers_equal(text, right_text))
    return bool(compared) and all(compared)


def _letter_and_text(answer: str) -> tuple[str, str]:
    """The letter and the text of an option; one of the two is empty where only the other is given."""
    bare = notation.without_text(answer)
    return notation.option(answer) or ((bare, "") if re.fullmatch("[A-J]", bare) else ("", answer))


def _parts_equal(predicted: str, reference: str, separator: str) -> bool:
    """What stands before, between and after the dots of a list or sum, or the colons of a ratio."""
    sides = [[part.strip(" ,;+") for part in text.split(separator)] for text in (predicted, reference)]
    if len(sides[0]) != len(sides[1]):
        return False
    return all(a == b or (a and b and answers_equal(a, b)) for a, b in zip(*sides))


def _trim(text: str) -> str:
    """The answer without what goes around all of it: formula signs, braces, bold type, a full stop."""
    text = text.strip().removesuffix(".").rstrip()
    while text[:1] in ("$", "\\", "{") and (match := WRAPPED.fullmatch(text)):
        inner = match[match.lastindex or 0].strip()
        if not inner or not _closes_last(inner):
            break
        text = inner.removesuffix(".").rstrip()
    return text


def _closes_last(inner: str) -> bool:
    """Whether no brace or formula sign of `inner` closes what stands around it."""
    depth = 0
    for brace in re.findall(r"\\.|[{}$]", inner):
        depth += (brace == "{") - (brace == "}")
        if depth < 0 or brace in ("$", "\\)", "\\]"):
            return False
    return depth == 0
