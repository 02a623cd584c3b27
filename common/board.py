"""A Sudoku's board in a response: what the reward judges, and what pages show."""

import re
from collections.abc import Sequence
from typing import Any

from common.boxed import extract_boxed, final_part

TAGGED = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)


def extract_puzzle_answer(response: str) -> str | None:
    r"""What stands in the last `<answer>…</answer>`, in the last box of it where there is one; else in the last box.

    What a model thinks before it answers does not count. None where there is no answer.
    """
    tagged = TAGGED.findall(final_part(response))
    if not tagged:
        return extract_boxed(response)
    boxed = extract_boxed(tagged[-1])
    return tagged[-1].strip() if boxed is None else boxed


def read_board(answer: str) -> str | None:
    """The sixteen digits of a board, whatever white space stands between them; None where it is no board."""
    board = "".join(answer.split())
    return board if re.fullmatch("[1-4]{16}", board) else None


def board_fault(puzzle: Any, solution: str | None) -> str | None:
    """What a Sudoku's record lacks; None where `puzzle` and `ground_truth_answer` are fit."""
    if not isinstance(puzzle, str) or not re.fullmatch("[0-4]{16}", puzzle) or "0" not in puzzle:
        return "give `puzzle`, sixteen digits from 0 to 4 in a text, 0 where a cell is empty"
    solution = solution or ""
    if read_board(solution) != solution or any(given not in ("0", own) for given, own in zip(puzzle, solution)):
        return "give `ground_truth_answer`, sixteen digits from 1 to 4 that leave the given cells of `puzzle`"
    return None


def board_of(puzzle: Any, solution: str | None, pieces: Sequence[str]) -> dict[str, Any] | None:
    """A response to a Sudoku as the trace page shows it: puzzle, solution, and where the digit of each cell stands.

    `pieces` are the texts of its tokens; a cell is (token, character in the token's text). None where the task is no
    Sudoku, or the response holds no board.
    """
    answer = None if board_fault(puzzle, solution) else extract_puzzle_answer("".join(pieces))
    if answer is None or read_board(answer) is None:
        return None
    places = [(token, offset) for token, piece in enumerate(pieces) for offset in range(len(piece))]
    start = "".join(pieces).rindex(answer)
    cells = [places[start + n] for n, character in enumerate(answer) if not character.isspace()]
    return {"puzzle": puzzle, "solution": solution, "cells": cells}
