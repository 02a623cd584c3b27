"""Is the boxed letter that of the right option of a multiple choice?"""

import re

from common.boxed import extract_boxed
from common.trajectory import Score, Task
from reward import notation

WRAPPING = re.compile(r"\\(?:text|math)(?:bf|rm|sf|it)?(?![a-z])|\\boldsymbol|[{}$*]")
LETTER = re.compile("[A-J]")
FURTHER = re.compile(r"\b[A-J][.):]|\([A-J]\)")  # another option behind the first


def option_score(response: str, task: Task) -> Score:
    """Reward 1 where the last box holds the letter of the task's answer, alone or before the option's text; else 0."""
    if not extract_boxed(response):
        return Score(0.0, False, "no_answer")
    correct = extract_option(response) == task.ground_truth_answer
    return Score(float(correct), correct, "passed" if correct else "failed")


def extract_option(response: str) -> str | None:
    """The letter that the last box holds, A to J; None where it holds no such, or several."""
    boxed = WRAPPING.sub("", extract_boxed(response) or "").strip().removesuffix(".")
    found = notation.option(boxed)
    letter, text = found or (boxed.upper(), "")
    return letter if LETTER.fullmatch(letter) and not FURTHER.search(text) else None
