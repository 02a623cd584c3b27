"""Free-text answers against a reference: equal as text, or similar enough."""

import difflib
import re
import unicodedata

from common.boxed import extract_boxed, final_part
from common.trajectory import Score
from reward.notation import raise_scripts

MAX_COMPARED = 2000  # characters; the comparison's time grows with their square
MAX_EXACT = 20_000  # characters; longer texts are equal only where they are the same
# Every repeat is bounded, so that a search takes linear time.
FINAL = re.compile(
    r"\banswer\b[ \t*]{0,8}(?:is\b[ \t*]{0,8}:?|:)[ \t*]{0,8}(?:\n\s{0,16})?(\S[^\n]{0,4000})", re.IGNORECASE
)
LATEX_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|sf)?|mathrm|mathbf|mbox)\s{0,8}\{([^{}]*)\}")
FORMULA = re.compile(r"\\[()\[\],;!]|\$")
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d)")
# Marks of a sentence: at the end of a word, or before one. Other marks mean something and stay.
SENTENCE_MARKS = re.compile(r"[.;:!?]+(?=[\s)\]}\"'*_`]|$)|[,\"“”„«»`…]|\*\*+|(?<!\w)['_*](?=\w)|(?<=\w)['_*](?!\w)")
HYPHEN = re.compile(r"(?<=[^\W\d_]{2})-(?=[^\W\d_])|(?<=[^\W\d_])-(?=[^\W\d_]{2})")
ONE_SIGN = str.maketrans("−‘’", "-''")
AROUND_SIGN = re.compile(r"\s?([^\w\s])\s?")
ONE_ITEM = re.compile(r"\(([\w.+-]+)\)|([a-z])\)")


def general_score(response: str, reference: str, match: str = "exact", threshold: float = 0.8) -> Score:
    """`exact`: 1 where the answer equals the reference, case and sentence marks aside. `fuzzy`: their similarity, 0–1.

    Signs that mean something count: `x > 3` is not `x < 3`, `C#` is not `C`.
    """
    answer = extract_answer(response)
    if not answer:
        return Score(0.0, False, "no_answer")
    similarity = text_similarity(answer, reference) if match == "fuzzy" else float(_same(answer, reference))
    correct = similarity >= (threshold if match == "fuzzy" else 1.0)
    return Score(similarity, correct, "passed" if correct else "failed")


def extract_answer(response: str) -> str:
    r"""The last `\boxed{}`; else what follows the last `answer:` or `answer is`; else all that is no thought."""
    boxed = extract_boxed(response)
    if boxed is not None:
        return boxed
    response = final_part(response)
    found = FINAL.findall(response)
    return (found[-1] if found else response).strip()


def text_similarity(answer: str, reference: str) -> float:
    """1 for equal, 0 for nothing in common: the longest matching blocks of characters, case and marks aside."""
    answer, reference = (_plain(text[:MAX_EXACT])[:MAX_COMPARED] for text in (answer, reference))
    return 1.0 if answer == reference else difflib.SequenceMatcher(None, answer, reference, autojunk=False).ratio()


def _same(answer: str, reference: str) -> bool:
    if max(len(answer), len(reference)) > MAX_EXACT:
        return answer.strip() == reference.strip()
    return _plain(answer) == _plain(reference)


def _plain(text: str) -> str:
    """One form for texts that differ in case, spacing, thousands' commas, LaTeX's wrapping and marks of a sentence."""
    text = FORMULA.sub("", LATEX_TEXT.sub(r"\1", text)).replace("\\%", "%")
    text = unicodedata.normalize("NFKC", raise_scripts(text)).casefold().translate(ONE_SIGN)
    text = THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    plain = HYPHEN.sub(" ", SENTENCE_MARKS.sub(" ", text))
    plain = AROUND_SIGN.sub(r"\1", " ".join(plain.split()))
    item = ONE_ITEM.fullmatch(plain)
    return (item[1] or item[2] if item else plain) or " ".join(text.split())  # an answer of marks only
