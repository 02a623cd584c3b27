"""Ways to write one and the same answer, brought to one: unicode, spacing, units, currency, mixed numbers and so on.

`plain` applies the rules in their order. What the parser behind it would drop without a word, though it carries
meaning (bases, quantifiers, units that differ), is compared by `contradict`.
"""

import functools
import math
import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

GREEK = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "ζ": "zeta", "η": "eta", "θ": "theta",
    "ι": "iota", "κ": "kappa", "λ": "lambda", "μ": "mu", "ν": "nu", "ξ": "xi", "π": "pi", "ρ": "rho", "σ": "sigma",
    "ς": "sigma", "τ": "tau", "φ": "phi", "χ": "chi", "ψ": "psi", "ω": "omega", "Γ": "Gamma", "Δ": "Delta",
    "Θ": "Theta", "Λ": "Lambda", "Ξ": "Xi", "Π": "Pi", "Σ": "Sigma", "Φ": "Phi", "Ψ": "Psi", "Ω": "Omega",
}  # fmt: skip
SIGNS = {
    "×": "times", "·": "cdot", "⋅": "cdot", "∙": "cdot", "•": "cdot", "÷": "div", "∞": "infty", "≤": "le", "≥": "ge",
    "≠": "ne", "±": "pm", "∓": "mp", "∪": "cup", "∩": "cap", "∈": "in", "∉": "notin", "∅": "emptyset", "⊂": "subset",
    "⊆": "subseteq", "∀": "forall", "∃": "exists", "∄": "nexists", "¬": "neg", "∧": "wedge", "∨": "vee", "→": "to",
    "≈": "approx", "≡": "equiv", "∠": "angle", "△": "triangle", "⊥": "perp", "∥": "parallel", "√": "sqrt", "…": "ldots",
    "⋯": "ldots", "⟨": "langle", "⟩": "rangle", "ℝ": "mathbb{R}", "ℤ": "mathbb{Z}", "ℚ": "mathbb{Q}",
    "ℕ": "mathbb{N}", "ℂ": "mathbb{C}",
}  # fmt: skip
UNICODE = str.maketrans(
    {sign: f"\\{name} " for sign, name in (GREEK | SIGNS).items()}
    | {"°": "^\\circ ", "−": "-", "–": "-", "‒": "-", "—": "-", "⁄": "/", "′": "'", "’": "'", "∣": "|"}
)
SCRIPTS = {"^": "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "_": "₀₁₂₃₄₅₆₇₈₉₊₋ₙ"}
RUNS = {mark: re.compile(f"([{signs}]+)") for mark, signs in SCRIPTS.items()}
ON_THE_LINE = str.maketrans("".join(SCRIPTS.values()), 2 * "0123456789+-n")
ROOTS = re.compile(r"([√∛∜])\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+(?:\.\d+)?|\w))")
DEGREES_OF_ROOTS = {"√": "", "∛": "[3]", "∜": "[4]"}
VULGAR = str.maketrans(  # ½ and the like
    {
        chr(code): r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", chr(code)).split("⁄"))
        for code in (*range(0xBC, 0xBF), *range(0x2150, 0x215F))
    }
)

TEXT = r"\\text\s*\{([^{}]*)\}"
INTEGER = r"\s*(?:\{\s*(\d+)\s*\}|(\d))"
POWER = r"(?:\s*\^\s*\{?\d\}?)?"
# Names of one kind each, those of one thing joined by `=`. Two answers that name different ones of a kind differ.
KINDS = [
    "mm=millimeter=millimetre cm=centimeter=centimetre m=meter=metre km=kilometer=kilometre in=inch=inches "
    "ft=foot=feet yd=yard mi=mile",
    "mg=milligram g=gram kg=kilogram lb=pound oz=ounce ton=tonne",
    "ms=millisecond s=sec=second min=minute h=hr=hour day week month year",
    "ml=milliliter=millilitre l=liter=litre gal=gallon",
    "cent=¢ dollar=usd=$ euro=eur=€ gbp=£ yen=¥ rupee=₹",
    "am pm",
    "even odd",
    "north south east west",
    "true=yes false=no",
    "positive negative",
]
NAMES = {
    name: (kind, thing.split("=")[0])
    for kind, things in enumerate(KINDS)
    for thing in things.split()
    for word in thing.split("=")
    for name in (word, f"{word}s")
}
KNOWN = "|".join(sorted((name for name in NAMES if len(name) > 1 and name.isalpha()), key=len, reverse=True))
NOT_UNITS = "squared|cubed|factorial|hundred|dozen|half|percent|where|when|times|plus|minus|more|less|infinity"
# A word as text that changes the number before it.
NO_UNIT_TEXT = r"(?!\s?\\text\s*\{\s*(?:squared|cubed|factorial|hundred|dozen|or\s(?:more|less|greater|fewer))\b)"
# After a number: a known unit, or any longer word, as in `12 apples`.
UNIT = rf"(?:\s?(?:{KNOWN}|sq|square|cubic|mph|men|women)(?![a-zA-Z])\.?|\s(?!(?:{NOT_UNITS})\b)[a-zA-Z]{{4,}}\.?)"
UNIT_TEXT = rf"(?<=[^\s{{(,])(?<![A-J][.:)]){NO_UNIT_TEXT} ?{TEXT}{POWER}$"  # but not the text of an option
NAMED = re.compile(rf"{TEXT}|(?<=[\d}}])\s?([a-zA-Z]+(?:\s?/\s?[a-zA-Z]+)?)[\s\d^{{}}]*$|([¢$€£¥₹])")

DECIMAL = r"(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?"
DIGITS = re.compile(rf"([+-]?)\s?(?=\.?\d)({DECIMAL})(?:[eE]([+-]?\d{{1,3}}))?")
NUMBER = re.compile(
    rf"([+-]?)\s?(?:\\frac\s*(?:\{{([+-]?{DECIMAL})\}}|(\d))\s*(?:\{{({DECIMAL})\}}|(\d))|"
    rf"({DECIMAL})(?:\s?/\s?({DECIMAL}))?(?:\s?(?:\\times|\\cdot)\s?10\^(?:\{{\s?([+-]?\d{{1,3}})\s?\}}|(\d)))?|"
    r"10\^(?:\{\s?([+-]?\d{1,3})\s?\}|(\d)))(\s?\\%)?"
)

OPTION = re.compile(r"(?:\(([A-J])\)|([A-J])(?:\)|[.:](?=[\s\d])))[\s,.:]*(.*)", re.DOTALL)
NO_OPTION = re.compile(r"(?:or|and)\b|[A-J]$|[+*/=<>^_]|\\(?:cup|cap|times|cdot|setminus)|.*\([A-J]\)", re.DOTALL)
WORDS = re.compile(r"[a-zA-Z][a-zA-Z\s,;'.-]*")
BASE = re.compile(r"(?<=[\dA-F])_\{(\d+)\}")
MODULUS = re.compile(r"mod\}?\s*\{?\s*(\d+)")
PRIME = re.compile(r"(?<=[a-zA-Z)])(?:'+|\^\s?\{?(?:\s?\\prime(?![a-zA-Z]))+)(?![a-zA-Z])")
# For all, some, none and not: in both answers as many.
QUANTIFIERS = [
    re.compile(r"\\forall|\bfor\s(?:all|every|each|any)\b"),
    re.compile(r"\\exists|\bfor\ssome\b|\bthere\s(?:exists?|is|are)\b"),
    re.compile(r"\\nexists"),
    re.compile(r"\\(?:neg|lnot|not)(?![a-zA-Z])"),
]
SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}


def _repeating(match: re.Match[str]) -> str:
    whole, fixed = match[1] or "0", match[2]
    period = match[3] or match[4] or match[5]
    numerator = int(whole + fixed + period) - int(whole + fixed)
    return f"\\frac{{{numerator}}}{{{'9' * len(period)}{'0' * len(fixed)}}}"


def _mixed(match: re.Match[str]) -> str:
    whole, *parts = (int(part) for part in match.groups() if part)
    above, below = parts
    return f"\\frac{{{whole * below + above}}}{{{below}}}" if above < below else match[0]


# In this order. All are linear in the length of the text, which `answers_equal` bounds besides.
RULES: list[tuple[str, re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (name, re.compile(pattern), by)
    for name, pattern, by in [
        ("sizes of brackets", r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\.?|\\displaystyle(?![a-zA-Z])", ""),
        ("sizes of fractions", r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        ("letters", r"\\(?:math(?:bf|it|sf)|boldsymbol)\s*\{([^{}]*)\}|\\(?:mathrm|text)\s*\{\s*([ie])\s*\}", r"\1\2"),
        ("fonts", r"\\(?:text(?:bf|it|rm|sf|normal)|mathrm|mbox)\s*\{", r"\\text{"),
        ("no space", r"\\!\s*|\{\}", ""),
        ("all as text", r"^\\text\s*\{\s*([-+]?\.?\d[^{}]*|[A-J](?:\s?,\s?[A-J])+)\}$", r"\1"),
        ("named option", r"^(?:\\text\s*\{\s*)?(?:[Oo]ption|[Cc]hoice)\s*\(?([A-J])\)?\s*\}?$", r"\1"),
        ("empty set", r"\\varnothing(?![a-zA-Z])", r"\\emptyset"),
        ("infinity", r"\\text\s*\{\s*[iI]nfinity\s*\}|(?<![\\a-zA-Z])[iI]nfinity(?![a-zA-Z])", r"\\infty "),
        ("pi", r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "),
        ("powers of programs", r"\*\*\s?(\d+|[a-zA-Z](?![a-zA-Z]))", r"^{\1}"),
        ("thin comma", r"\{,\}", ","),
        ("spaces", r"(?:\{\\[,;: ]\}|(?<!\\)\\(?:[,;: ]|q?quad(?![a-zA-Z])|thinspace(?![a-zA-Z]))|[~\s])+", " "),
        ("currency", r"\\text\s*\{\s*[€£¥₹₩$]\s*\}|\\\$|\\(?:euro|pounds|yen)(?![a-zA-Z])|[$€£¥₹₩¢]", ""),
        ("dots", r"\\(?:[lc]?dots|dotsc|dotsb)(?![a-zA-Z])|\.{3,}", r"\\ldots "),
        ("digit groups", r"(?<![\d.,])(\d{1,3})((?: \d{3})+)(?![\d/])", lambda match: match[0].replace(" ", "")),
        (
            "ordinals",
            r"(?<=\d)\s?\^?(?:\{\s*\\text\s*\{(?:st|nd|rd|th)\}\s*\}|\\text\s*\{(?:st|nd|rd|th)\}|"
            r"(?<=\^)\{(?:st|nd|rd|th)\}|(?:st|nd|rd|th)(?![a-zA-Z}]))",
            "",
        ),
        ("percent", r"\s?(?:\\?%|\\text\s*\{\s*(?:percent|\\?%)\s*\}|\bpercent\b)", r"\\%"),
        (
            "repeating decimals",
            r"(?<![\d.])(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))|\((\d+)\))(?!\d)",
            _repeating,
        ),
        (
            "scales",
            r"(?<=\d)\s?(\\text\s*\{\s?)?\b(thousand|million|billion|trillion)\b\s?",
            lambda match: f"\\times 10^{{{SCALES[match[2]]}}} {match[1] or ''}",
        ),
        ("mixed numbers", rf"(?<![\w.^}})/])(\d+)\s*\\frac{INTEGER}{INTEGER}", _mixed),
        ("mixed numbers with /", r"(?<![\w.^}})/])(\d+) (\d+)\s?/\s?(\d+)(?![\d.])", _mixed),
        ("scientific", r"(?<![\w.])(\d+\.?\d*|\.\d+)[eE]\+?(-?)0*(\d{1,5})(?![\w.])", r"\1\\times 10^{\2\3}"),
        (
            "bases",
            r"(?<![\w.])(?:\(([\dA-F]+)\)|([\dA-F]+))\s?_\s?(?:(\d+)|\{\s?(\d+)\s?\}|\{\s?\\text\s*\{\s?(\d+)\s?\}\s?\})",
            r"\1\2_{\3\4\5}",
        ),
        ("temperatures", r"(?<=[\d}])\s?\^\s?\{?\s?\\circ\s?\}?\s?(?:\\text\s*\{\s?)?[CF]\}?$", ""),
        ("units as text", UNIT_TEXT, ""),
        ("units as text, twice", UNIT_TEXT, ""),
        ("units", rf"(?:(?<=[\d}}])|(?<=\\pi)){UNIT}(?:\sper)?(?:{UNIT}){{0,3}}{POWER}$|(?<=\d) [mgsh]{POWER}$", ""),
        ("units over units", rf"(?<=\d)\s?(?:[mg]|{KNOWN})\s?/\s?(?:[smhlL]|{KNOWN}){POWER}$", ""),
        ("question mark", r"=\s*\??\s*$", ""),
    ]
]  # fmt: skip
DEGREE = re.compile(r"\s?\^\s?\{?\s?\\circ\s?\}?|\\degrees?(?![a-zA-Z])|(?<=\d)\s?\\text\s*\{\s?degrees?\s?\}")
# Bare words; commands and what stands in their braces stay.
WORD = re.compile(
    r"\\text\s*\{[^{}]*\}|"
    r"\\[a-zA-Z]+\s*(?:\{[a-zA-Z\s]*\})?|(?<![a-zA-Z])(?!(?:sin|cos|tan|cot|sec|csc|log|exp|sqrt|infinity)(?![a-zA-Z]))"
    r"([a-zA-Z]{3,})"
)
LONG = re.compile(r"[a-zA-Z]{3}")
TEXT_COMMAND = re.compile(TEXT)
AROUND_SIGNS = re.compile(r" ?([^\w ]) ?")
ANGLES = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")  # there a degree sign is part of the value


def raise_scripts(text: str) -> str:
    """Raised and lowered digits as `^{…}` and `_{…}`."""
    if text.isascii():
        return text
    for mark, run in RUNS.items():
        text = run.sub(rf"{mark}{{\1}}", text)
    return text.translate(ON_THE_LINE)


@functools.lru_cache(maxsize=4096)
def plain(text: str) -> str:
    """The answer in plain LaTeX: no unicode signs, no sizes, spacing, currency or units, one form for each number."""
    if not text.isascii():
        text = raise_scripts(text.translate(VULGAR))
        text = ROOTS.sub(lambda m: f"\\sqrt{DEGREES_OF_ROOTS[m[1]]}{{{m[2] or m[3] or m[4]}}}", text)
        text = unicodedata.normalize("NFKC", text).translate(UNICODE)
    for _, pattern, by in RULES:
        text = pattern.sub(by, text).strip()
    if not ANGLES.search(text):
        text = DEGREE.sub("", text)
    return WORD.sub(lambda match: f"\\text{{{match[1]}}}" if match[1] else match[0], text)


class Number(NamedTuple):
    """A number as it was written."""

    value: Fraction
    is_decimal: bool  # no fraction: it may be rounded
    is_percent: bool


def digits(text: str) -> Number | None:
    """The number that an integer or a decimal stands for, as `1,234`, `-.5` and `3e8`; None for anything else."""
    match = DIGITS.fullmatch(text)
    if not match:
        return None
    return Number(_signed(match[1], match[2]) * Fraction(10) ** int(match[3] or 0), True, False)


def number(text: str) -> Number | None:
    """The number that a plain text stands for: decimal, fraction, scientific or percentage; None for anything else."""
    match = NUMBER.fullmatch(text)
    if not match or not any(character.isdigit() for character in text):
        return None
    sign, above, one_above, below, one_below, decimal, divisor, *exponents, percent = match.groups()
    above, below = above or one_above or decimal or "1", below or one_below or divisor or "1"
    if not any(character.isdigit() for character in above) or not (denominator := _signed("", below)):
        return None
    value = _signed(sign, above) / denominator * Fraction(10) ** int(next(filter(None, exponents), 0))
    return Number(value, below == "1", bool(percent))


def _signed(sign: str, decimal: str) -> Fraction:
    value = Fraction(decimal.replace(",", "").rstrip(".") or "0")
    return -value if sign == "-" else value


def numbers_equal(a: Number, b: Number) -> bool:
    """Whether two numbers are equal: a percentage with and without its sign, decimals as far as they are rounded."""
    if a.is_percent != b.is_percent:
        percentage, other = (a, b) if a.is_percent else (b, a)
        bare = percentage._replace(is_percent=False)
        return numbers_equal(bare, other) or numbers_equal(bare._replace(value=bare.value / 100), other)
    if a.value == b.value or not (a.is_decimal or b.is_decimal):
        return a.value == b.value
    difference, size = abs(a.value - b.value), max(abs(a.value), abs(b.value))
    if a.is_decimal and b.is_decimal:
        # 0.30000000000000004 in a data file means 0.3.
        return not a.value.denominator == b.value.denominator == 1 and difference <= size / 10**9
    # A decimal for a fraction: to six places, and to five digits of any value.
    power = math.floor(math.log10(size.numerator) - math.log10(size.denominator))
    places = max(6, 4 - power)
    return round(a.value, places) == round(b.value, places)


def option(text: str) -> tuple[str, str] | None:
    """The letter and the text of a multiple choice's option, as `(C)`, `E: 42`; None for anything else."""
    match = OPTION.fullmatch(without_text(text))
    if not match or NO_OPTION.match(match[3]):
        return None
    return match[1] or match[2], match[3].strip()


def without_text(text: str) -> str:
    r"""What stands in `\text{…}` without it."""
    return TEXT_COMMAND.sub(r"\1", text).strip()


def without_spaces(text: str) -> str:
    """The text without the spaces beside signs."""
    return AROUND_SIGNS.sub(r"\1", text)


def words(text: str) -> list[str] | None:
    """The items of a list of words, in order of the alphabet and without spaces; None for what may be a formula."""
    bare = without_text(text)
    if not WORDS.fullmatch(bare) or (bare == text and not LONG.search(bare)):
        return None
    items = re.split(r"[,;]|\band\b", bare.casefold())
    return sorted("".join(re.findall("[a-z]+", item)) for item in items)


def contradict(a: str, b: str) -> bool:
    """Whether two texts name different bases, moduli, units, quantifiers and the like, which the parser would drop."""
    for pattern in (BASE, MODULUS):
        in_a, in_b = pattern.findall(a), pattern.findall(b)
        if in_a and in_b and in_a != in_b:
            return True
    if any(len(pattern.findall(a)) != len(pattern.findall(b)) for pattern in (*QUANTIFIERS, PRIME)):
        return True
    names_a, names_b = _named(a), _named(b)
    return any(names_a[kind].isdisjoint(names_b[kind]) for kind in names_a.keys() & names_b.keys())


def _named(text: str) -> dict[int, set[str]]:
    """By its place in KINDS, what a text names of each kind."""
    named: dict[int, set[str]] = {}
    for match in NAMED.finditer(text):
        for word in re.findall(r"[a-z]+|[¢$€£¥₹]", (match[1] or match[2] or match[3] or "").casefold()):
            if word in NAMES:
                kind, thing = NAMES[word]
                named.setdefault(kind, set()).add(thing)
    return named
