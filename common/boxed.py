r"""Where the answer stands in a text: in its last `\boxed{…}`, after the thought where a model thinks first."""

import re

END_OF_THOUGHT = "</think>"
MAX_BETWEEN = 60  # characters between two boxes of one list
MAX_BARE = 200  # characters of a box without braces

TOKEN = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*\{?|\\.|[{}]", re.DOTALL)
# A box without braces holds what follows to the end of its formula, or else a number or a command with its arguments.
TO_FORMULA_END = re.compile(r"([^\n$]*?)\s*(?:\$|\\\)|\\\])")
ONE_ITEM = re.compile(r"[+-]?(?:\d[\d,.]*\d|\.?\d)|\\(?!end|begin|boxed|fbox|right)[a-zA-Z]+(?:\s*\{[^{}]*\}|\s*\d)*")
PROSE = re.compile(r"(?:^|\s)[a-zA-Z]{2,}(?:[\s.,;:]|$)|^[^\w\\({\[+.|-]|^$")
# Between two boxes of one list stand a separator, spacing and perhaps the name of the unknown again.
SPACING = re.compile(r"[\s$*~&{}]|\\(?:text|mbox)|\\[()\[\],;:!\\ ]|\\q?quad")
SEPARATOR = re.compile(r"(?:[,;]|[,;]?(?:and|or))(?:([a-zA-Z])(?:_\w)?=)?")
LABEL = re.compile(r"([a-zA-Z])(?:_\{?\w\}?)?\s*=[\s$]*$")


def final_part(text: str) -> str:
    """What stands after the thought; all of it where there is no thought, or nothing after it."""
    after = text.rpartition(END_OF_THOUGHT)[2]
    return after if after.strip() else text


def extract_boxed(text: str) -> str | None:
    r"""What stands in the last box of the text's final part that is not empty; None where there is no box.

    A box is `\boxed{…}` or `\fbox{…}`, nested braces included, or `\boxed 5`. Boxes that only a comma, `and` or `or`
    parts are one list, and come as `1, 2`. Takes linear time.
    """
    text = final_part(text)
    boxes = _boxes(text)
    while boxes:
        command, start, end = boxes.pop()
        content = text[start:end].strip()
        if content or not boxes:
            return ", ".join(_list_up_to(text, boxes, command, content))
    return None


def _boxes(text: str) -> list[tuple[int, int, int]]:
    """Where the complete boxes lie, by their beginning: command, first character of the content, and its end."""
    found = []
    open_braces: list[tuple[int, int] | None] = []  # of boxes: where the command and the content begin
    first = min((place for place in (text.find("\\boxed"), text.find("\\fbox")) if place >= 0), default=len(text))
    for match in TOKEN.finditer(text, first):
        token = match.group()
        is_box = token.startswith(("\\boxed", "\\fbox"))
        if token == "}":
            if open_braces and (opened := open_braces.pop()):
                found.append((*opened, match.start()))
        elif token == "{" or (is_box and token.endswith("{")):
            open_braces.append((match.start(), match.end()) if is_box else None)
        elif is_box and (end := _bare_end(text, match.end())):
            found.append((match.start(), match.end(), end))
    return sorted(found)


def _bare_end(text: str, start: int) -> int | None:
    """Where the content of a box without braces ends; None where nothing there looks like an answer."""
    formula = TO_FORMULA_END.match(text, start, start + MAX_BARE)
    if formula and not PROSE.search(formula[1]):
        return start + len(formula[1].rstrip(" .,;"))
    item = ONE_ITEM.match(text, start, start + MAX_BARE)
    return item.end() if item else None


def _list_up_to(text: str, boxes: list[tuple[int, int, int]], command: int, content: str) -> list[str]:
    """`content`, of the box at `command`, after the contents of the boxes that are of one list with it."""
    contents = [content]  # the last one first
    label = ""  # of the unknown, where a later box has one
    for earlier, start, end in reversed(boxes):
        if end > command:  # a box around this one
            continue
        closing = end + (text[end : end + 1] == "}")
        between = text[closing:command] if command - closing <= MAX_BETWEEN else "…"
        separator = SEPARATOR.fullmatch(SPACING.sub("", between))
        if separator is None or (label and separator[1] and separator[1] != label):
            break
        label = separator[1] or label
        own = LABEL.search(text, max(0, earlier - MAX_BETWEEN), earlier)
        if label and own and own[1] != label:  # x and y are two answers, not one list
            break
        item = text[start:end].strip()
        if item and item != contents[-1]:
            contents.append(item)
        command = earlier
    return contents[::-1]
