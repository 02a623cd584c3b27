"""Which program a response gives: its fenced blocks, and the one among them that is meant."""

import re
import textwrap
from collections.abc import Iterator, Sequence
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
    the last that reads standard input; else the last. Blocks that say Python go before those that say nothing.
    """
    response = final_part(response)
    blocks = [block for block in fenced_blocks(response) if not block.other]
    blocks = [block for block in blocks if block.closed or any(map(str.strip, block.lines))]
    if not blocks:
        return _before_a_lone_fence(response, defines)
    ranked = sorted(blocks, key=lambda block: block.python)  # stable: the last is the best
    texts = [block.text for block in ranked]
    own, imported = ([_definition(name, ways) for name in defines] for ways in (False, True))
    for patterns, enough in (
        (own, all),
        (imported, all),
        (own, any),
        (imported, any),
        ([READS_INPUT] * reads_input, all),
    ):
        for text in reversed(texts):
            if patterns and enough(re.search(pattern, text, re.MULTILINE) for pattern in patterns):
                return text
    return texts[-1]


def fenced_blocks(response: str) -> Iterator[Block]:
    """The blocks of a response, in order; the last may have no end."""
    block: Block | None = None
    for line in response.replace("\r\n", "\n").split("\n"):
        if block is None:
            block, done = _opened(line), None
            if block and block.closed:
                done, block = block, None
        else:
            done, block = _continued(block, line)
        if done:
            yield done
    if block:
        yield block


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


def _continued(block: Block, line: str) -> tuple[Block | None, Block | None]:
    """(a block that this line ends, the block that is open after it)."""
    stripped = line.strip()
    mark = block.fence[0]
    run = len(stripped) - len(stripped.lstrip(mark))
    if run >= len(block.fence):
        info = stripped[run:].strip()
        if info and (PYTHON.match(info) or WORD.fullmatch(info)):
            return block, _opened(line)  # the end of this one was forgotten
        block.closed = True
        return block, None
    if (
        stripped.endswith(block.fence)
        and not stripped.endswith(mark + block.fence)
        and stripped.count(block.fence) == 1
    ):
        block.lines.append(line.rstrip()[: -len(block.fence)].rstrip())
        block.closed = True
        return block, None
    if not block.python and (opened := _opened(line)) and opened.python:
        return block, opened  # a stray fence before it
    block.lines.append(line)
    return None, block


def _definition(name: str, imports: bool = True) -> str:
    """A pattern of a line that defines a name: a function or class, an assignment, or (`imports`) an import."""
    name = re.escape(name)
    ways = (
        rf"(?:async[ \t]+def|def|class)[ \t]+{name}\b",
        rf"{name}[ \t]*(?::[^=\n]*)?=(?!=)",
        *([rf".*\bimport\b.*\b{name}\b"] if imports else []),
    )
    return rf"^[ \t]*(?:{'|'.join(ways)})"


def _before_a_lone_fence(response: str, defines: Sequence[str]) -> str | None:
    """The program before a closing fence that no other opened."""
    before, fence, after = response.partition("```")
    if not fence or after.strip():
        return None
    patterns = [_definition(name) for name in defines] or [CODE_LINE]
    found = all(re.search(pattern, before, re.MULTILINE) for pattern in patterns)
    return textwrap.dedent(before).rstrip() if found else None
