"""Which program a response gives: its fenced blocks, and the one among them that is meant."""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from common.boxed import final_part

FENCE = re.compile(r"`{3,}|~{3,}")
PYTHON = re.compile(r"\{?[.\s]*(?:python|py)\s?\d*(?:\.\d+)*(?=[\s,:{}]|$)", re.IGNORECASE)
WORD = re.compile(r"[\w+#.-]+")
READS_INPUT = r"\binput\s*\(|\bstdin\b|\bfileinput\b|\bopen\s*\(\s*0|/dev/stdin|\bos\.read\s*\(\s*0"
CODE_LINE = r"^(?:import |from \S+ import |def |class |print\()"


@dataclass
class Block:
    """A fenced block: its lines, whether it says to be Python, and whether its end was found."""

    fence: str
    indent: int  # of the fence
    python: bool
    other: bool  # it says to be something else
    lines: list[str]
    closed: bool = False

    @property
    def text(self) -> str:
        lines = self.lines
        if self.indent:
            lines = [line[min(self.indent, len(line) - len(line.lstrip(" "))) :] for line in lines]
        first = next((line for line in lines if line.strip()), "")
        return textwrap.dedent("\n".join(lines)) if first[:1].isspace() else "\n".join(lines)


def extract_code(response: str, defines: Sequence[str] = (), reads_input: bool = False) -> str | None:
    """The program of a response; None where it has none.

    Of several blocks it is the last that defines all of the names in `defines`, else any of them; with `reads_input`
    the last that reads standard input; else the last. Blocks that say Python go before those that say nothing. Without
    blocks it is what stands before a closing fence that no other opened.
    """
    response = final_part(response)
    own, imported = ([_definition(name, imports) for name in defines] for imports in (False, True))
    blocks = [block for block in fenced_blocks(response) if not block.other]
    blocks = [block for block in blocks if block.closed or any(map(str.strip, block.lines))]
    if not blocks:
        before, fence, after = response.partition("```")
        if not fence or after.strip():
            return None
        found = all(re.search(pattern, before, re.MULTILINE) for pattern in imported or [CODE_LINE])
        return textwrap.dedent(before).rstrip() if found else None
    ranked = sorted(blocks, key=lambda block: block.python)  # stable: the last is the best
    texts = [block.text for block in reversed(ranked)]
    reads = [READS_INPUT] if reads_input else []
    for patterns, enough in ((own, all), (imported, all), (own, any), (imported, any), (reads, all)):
        for text in texts if patterns else []:
            if enough(re.search(pattern, text, re.MULTILINE) for pattern in patterns):
                return text
    return texts[0]


def with_prefix(prefix: str, response: str) -> str:
    """The response behind the beginning that it was given; a beginning without a fence is code."""
    if not prefix:
        return response
    begun = prefix if FENCE.search(prefix) else f"```python\n{prefix}"
    ends_in_fence = FENCE.search(begun.rpartition("\n")[2])
    return begun + "\n" * (ends_in_fence is not None and not response.startswith("\n")) + response


def fenced_blocks(response: str) -> list[Block]:
    """The blocks of a response, in order; the last may have no end."""
    blocks: list[Block] = []
    block: Block | None = None  # that began last
    for line in response.replace("\r\n", "\n").split("\n"):
        if block is None or block.closed or not _take(block, line):
            block = _opened(line)
            if block:
                blocks.append(block)
    return blocks


def _opened(line: str) -> Block | None:
    """The block that a line begins: at its start, or behind text where it says Python or nothing."""
    found = FENCE.search(line)
    if not found:
        return None
    before, fence, rest = line[: found.start()], found.group(), line[found.end() :]
    info = rest.strip()
    python = PYTHON.match(info)
    if python and fence in info:  # begun and ended within the line
        return Block(fence, 0, True, False, [info.partition(fence)[0][python.end() :].strip()], closed=True)
    if before.strip():
        if fence[0] == "~" or (info and not (python and python.end() == len(info))):
            return None
    elif fence[0] in info:  # ```x``` is code within a text
        return None
    indent = len(before) - len(before.lstrip(" ")) if not before.strip() else 0
    return Block(fence, indent, bool(python), bool(info) and not python, [])


def _take(block: Block, line: str) -> bool:
    """Add a line to an open block, or end the block by it; False where the line begins another block instead."""
    stripped = line.strip()
    mark = block.fence[0]
    run = len(stripped) - len(stripped.lstrip(mark))
    if run >= len(block.fence):
        info = stripped[run:].strip()
        block.closed = not (PYTHON.match(info) or WORD.fullmatch(info))  # else its end was forgotten
        return block.closed
    if (
        stripped.endswith(block.fence)
        and not stripped.endswith(mark + block.fence)
        and stripped.count(block.fence) == 1
    ):
        block.lines.append(line.rstrip()[: -len(block.fence)].rstrip())
        block.closed = True
    elif not block.python and (opened := _opened(line)) and opened.python:
        return False  # what opened this block was a stray fence
    else:
        block.lines.append(line)
    return True


def _definition(name: str, imports: bool) -> str:
    """A pattern of a line that defines a name: a function or class, an assignment, or (`imports`) an import."""
    name = re.escape(name)
    ways = (
        rf"(?:async[ \t]+def|def|class)[ \t]+{name}\b",
        rf"{name}[ \t]*(?::[^=\n]*)?=(?!=)",
        *([rf".*\bimport\b.*\b{name}\b"] if imports else []),
    )
    return rf"^[ \t]*(?:{'|'.join(ways)})"
