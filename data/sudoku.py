r"""Sudoku of 4 × 4 cells: every row, column and box of 2 × 2 holds each of 1 to 4 once.

A board is written row by row as sixteen digits, 0 where a cell is empty, as in the sets of d1
(github.com/dllm-reasoning/d1): the question is `0401002010030310`, the answer `\boxed{2431312412434312}`. There are 288
solved boards. A task is one of them with cells taken out, such that no other board fits what is left. Splits share no
task; all of them share the solved boards.
"""

import functools
import random

from common.errors import UserError
from data.splits import in_split

CELLS, DIGITS = 16, "1234"
MAX_EMPTY = 12  # a board with fewer than four given cells has several solutions
MAX_DRAWS, MAX_TASKS = 100_000, 20_000  # of which the splits are made


def sudoku_tasks(split: str, empty: int = 8, seed: int = 0) -> list[dict[str, str]]:
    """The tasks of one split with `empty` cells to fill, in the order of a hash; each has one solution.

    A record has question, puzzle, ground_truth_answer, prompt and response. UserError for sizes that cannot be made.
    """
    if not 1 <= empty <= MAX_EMPTY:
        raise UserError(f"a 4×4 sudoku with {empty} empty cells cannot be made: use 1 to {MAX_EMPTY}")
    puzzles = in_split(_puzzles(empty, seed), split, key=lambda item: item[0])
    return [_record(puzzle, board) for puzzle, board in puzzles]


@functools.cache
def solved_boards() -> tuple[str, ...]:
    """All 288, in ascending order."""
    boards = [""]
    for cell in range(CELLS):
        earlier = [other for other in range(cell) if _see_each_other(cell, other)]
        boards = [board + d for board in boards for d in DIGITS if all(board[other] != d for other in earlier)]
    return tuple(boards)


def _see_each_other(cell: int, other: int) -> bool:
    """Whether two cells are of one row, column or box."""
    row, column, its_row, its_column = *divmod(cell, 4), *divmod(other, 4)
    return row == its_row or column == its_column or (row // 2, column // 2) == (its_row // 2, its_column // 2)


@functools.cache
def _puzzles(empty: int, seed: int) -> tuple[tuple[str, str], ...]:
    """Puzzles, each with its one solution: MAX_TASKS of them, or as many as come up in MAX_DRAWS."""
    boards, rng = solved_boards(), random.Random(f"sudoku/{empty}/{seed}")
    # for each cell and digit the boards that have it there, as bits of a number
    having = [
        {digit: sum(1 << n for n, board in enumerate(boards) if board[cell] == digit) for digit in DIGITS}
        for cell in range(CELLS)
    ]
    found: dict[str, str] = {}
    for _ in range(MAX_DRAWS):
        board, given = rng.choice(boards), rng.sample(range(CELLS), CELLS - empty)
        fitting = -1
        for cell in given:
            fitting &= having[cell][board[cell]]
        if fitting.bit_count() == 1:
            puzzle = "".join(digit if cell in given else "0" for cell, digit in enumerate(board))
            found[puzzle] = board
            if len(found) == MAX_TASKS:
                break
    return tuple(found.items())


def _record(puzzle: str, board: str) -> dict[str, str]:
    return {
        "question": puzzle,
        "ground_truth_answer": board,
        "puzzle": puzzle,
        "prompt": puzzle,
        "response": f"\\boxed{{{board}}}",
    }
