"""Free-text answers against a reference: equal as text, or similar enough."""

import difflib
import re
import unicodedata

from common.boxed import extract_boxed, final_part
from common.schema import ScoringConfig
from common.trajectory import Score, Task
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


def general_score(response: str, task: Task, reward: ScoringConfig) -> Score:
    """With match `exact` 1 where the answer equals the reference, case and sentence marks aside; else 0.

    With match `fuzzy` their similarity, from 0 to 1: the longest matching blocks of characters. Signs that mean
    something count: `x > 3` is not `x < 3`, `C#` is not `C`.
    """
    answer, reference = extract_answer(response), task.ground_truth_answer or ""
    if not answer:
        return Score(0.0, False, "no_answer")
    if reward.match == "fuzzy":
        one, other = (_plain(text[:MAX_EXACT])[:MAX_COMPARED] for text in (answer, reference))
        similarity = 1.0 if one == other else difflib.SequenceMatcher(None, one, other, autojunk=False).ratio()
        correct = similarity >= reward.fuzzy_threshold
    else:
        is_long = max(len(answer), len(reference)) > MAX_EXACT
        correct = answer.strip() == reference.strip() if is_long else _plain(answer) == _plain(reference)
        similarity = float(correct)
    return Score(similarity, correct, "passed" if correct else "failed")


def extract_answer(response: str) -> str:
    r"""The last `\boxed{}`; else what follows the last `answer:` or `answer is`; else all that is no thought."""
    boxed = extract_boxed(response)
    if boxed is not None:
        return boxed
    response = final_part(response)
    return [response, *FINAL.findall(response)][-1].strip()


def _plain(text: str) -> str:
    """One form for texts that differ in case, spacing, thousands' commas, LaTeX's wrapping and marks of a sentence."""
    text = FORMULA.sub("", LATEX_TEXT.sub(r"\1", text)).replace("\\%", "%")
    text = unicodedata.normalize("NFKC", raise_scripts(text)).casefold().translate(ONE_SIGN)
    text = THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    plain = HYPHEN.sub(" ", SENTENCE_MARKS.sub(" ", text))
    plain = AROUND_SIGN.sub(r"\1", " ".join(plain.split()))
    item = ONE_ITEM.fullmatch(plain)
    return (item[1] or item[2] if item else plain) or " ".join(text.split())  # an answer of marks only
