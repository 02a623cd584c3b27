"""Free-text answers against a reference: equal as text, or similar enough."""

from __future__ import annotations

import difflib
import re
import unicodedata

from common.trajectory import Score
from reward.math_reward import extract_boxed

MAX_COMPARED = 2000  # characters; the comparison's time grows with their square
FINAL = re.compile(r"(?:final answer|answer)\s*(?:is)?\s*:\s*(.+)", re.IGNORECASE)
MARKS = re.compile(r"[^\w\s%+-]|(?<!\d)-(?!\d)")


def general_score(response: str, reference: str, match: str = "exact", threshold: float = 0.8) -> Score:
    """`exact`: 1 where the answer equals the reference, case and marks aside. `fuzzy`: their similarity, 0–1."""
    answer = extract_answer(response)
    if not answer:
        return Score(0.0, False, "no_answer")
    similarity = text_similarity(answer, reference) if match == "fuzzy" else float(_plain(answer) == _plain(reference))
    correct = similarity >= (threshold if match == "fuzzy" else 1.0)
    return Score(similarity, correct, "passed" if correct else "failed")


def extract_answer(response: str) -> str:
    r"""The last `\boxed{}`; else what follows the last `answer:`; else the whole response."""
    boxed = extract_boxed(response)
    if boxed is not None:
        return boxed
    found = FINAL.findall(response)
    return (found[-1] if found else response).strip()


def text_similarity(answer: str, reference: str) -> float:
    """1 for equal, 0 for nothing in common: the longest matching blocks of characters, case and marks aside."""
    answer, reference = _plain(answer)[:MAX_COMPARED], _plain(reference)[:MAX_COMPARED]
    return 1.0 if answer == reference else difflib.SequenceMatcher(None, answer, reference, autojunk=False).ratio()


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFKC", text[: 10 * MAX_COMPARED]).casefold()
    plain = " ".join(MARKS.sub(" ", text).split())
    return plain or " ".join(text.split())  # an answer of marks only
