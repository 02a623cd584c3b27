"""Countdown and Sudoku: answers read by a parser of their own, checked by the rules, and worth parts of a point.

The rewards are those of d1 (github.com/dllm-reasoning/d1, diffu-grpo/reward_func.py): countdown 1, or 0.1 for an
attempt; sudoku the share of the empty cells that are right. Where d1 is content with less, this is not: an attempt at
countdown must be an expression of the given numbers, and a board must have sixteen cells and leave the given ones.
"""

import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction

from common.board import board_fault, extract_puzzle_answer, read_board
from common.trajectory import Score, Task

ATTEMPT = 0.1  # for the given numbers well used, but for another target
MAX_LENGTH = 200  # characters of an expression; six numbers of four digits in needless parentheses take fewer
TOKEN = re.compile(r"\s*(?:(0|[1-9][0-9]{0,8})(?![0-9])|([-+*/()]))", re.ASCII)
SIGNS = ((r"\times", "*"), (r"\cdot", "*"), (r"\div", "/"), ("×", "*"), ("·", "*"), ("÷", "/"), ("−", "-"))
BINDING = {"+": 1, "-": 1, "*": 2, "/": 2}


# --- countdown


def countdown_score(response: str, task: Task) -> Score:
    """1 where the expression uses each of the record's `numbers` once and equals the target, 0.1 where it misses that.

    The target is the task's ground_truth_answer. `= 22` may stand behind the expression where 22 is the target.
    """
    answer, target = extract_puzzle_answer(response), task.ground_truth_answer or ""
    if not answer:
        return Score(0.0, False, "no_answer")
    expression, equals, result = answer.partition("=")
    read = parse_expression(expression)
    if read is None or (equals and result.strip() != target):
        return Score(0.0, False, "failed")
    numbers, value = read
    if Counter(numbers) != Counter(task.record["numbers"]):
        return Score(0.0, False, "failed")
    correct = value is not None and value == Fraction(target)
    return Score(1.0 if correct else ATTEMPT, correct, "passed" if correct else "failed")


def countdown_fault(task: Task) -> str | None:
    """What a record lacks to be judged by `countdown_score`; None where it is fit."""
    numbers = task.record.get("numbers")
    whole = isinstance(numbers, list) and all(type(number) is int and 0 <= number < 10**9 for number in numbers)
    if not whole or not numbers:
        return "give `numbers`, a list of whole numbers from 0"
    if not re.fullmatch(r"-?[0-9]{1,18}", task.ground_truth_answer or ""):
        return "give `ground_truth_answer`, the whole number to reach"
    return None


def parse_expression(text: str) -> tuple[list[int], Fraction | None] | None:
    """The numbers of an expression of + - * / and parentheses and its exact value, None where that divides by zero.

    None for any other text, and for one of more than MAX_LENGTH characters. Operators of equal rank are taken from the
    left; there is no sign before a number.
    """
    for written, plain in SIGNS:
        text = text.replace(written, plain)
    text = text.strip()
    if len(text) > MAX_LENGTH:
        return None
    numbers: list[int] = []
    values: list[Fraction | None] = []
    waiting: list[str] = []  # operators and open parentheses whose right-hand side is not complete
    place, value_expected = 0, True
    while place < len(text):
        match = TOKEN.match(text, place)
        if match is None:
            return None
        number, sign = match.groups()
        place = match.end()
        if (number is not None or sign == "(") != value_expected:
            return None
        if number is not None:
            numbers.append(int(number))
            values.append(Fraction(numbers[-1]))
            value_expected = False
        elif sign == "(":
            waiting.append(sign)
        else:
            while waiting and waiting[-1] != "(" and BINDING[waiting[-1]] >= BINDING.get(sign, 0):
                _apply(waiting.pop(), values)
            if sign != ")":
                waiting.append(sign)
                value_expected = True
            elif not waiting:
                return None
            else:
                waiting.pop()
    if value_expected or "(" in waiting:
        return None
    while waiting:
        _apply(waiting.pop(), values)
    return numbers, values[0]


def _apply(sign: str, values: list[Fraction | None]) -> None:
    """Put the result of an operator in place of the last two values; None where there is none."""
    right, left = values.pop(), values.pop()
    if left is None or right is None or (sign == "/" and right == 0):
        values.append(None)
    elif sign == "/":
        values.append(left / right)
    else:
        values.append(left + right if sign == "+" else left - right if sign == "-" else left * right)


# --- sudoku


def sudoku_score(response: str, task: Task) -> Score:
    """The share of the empty cells of the record's `puzzle` that are filled as in ground_truth_answer; correct: all.

    0 where the answer is no board of sixteen digits from 1 to 4, or has another digit in a given cell.
    """
    answer = extract_puzzle_answer(response)
    if not answer:
        return Score(0.0, False, "no_answer")
    board, puzzle, solution = read_board(answer), task.record["puzzle"], task.ground_truth_answer or ""
    if board is None or any(digit not in ("0", own) for digit, own in zip(puzzle, board)):
        return Score(0.0, False, "failed")
    empty = [cell for cell, digit in enumerate(puzzle) if digit == "0"]
    right = sum(board[cell] == solution[cell] for cell in empty)
    correct = right == len(empty)
    return Score(right / len(empty), correct, "passed" if correct else "failed")


def sudoku_fault(task: Task) -> str | None:
    """What a record lacks to be judged by `sudoku_score`; None where it is fit."""
    return board_fault(task.record.get("puzzle"), task.ground_truth_answer)


PUZZLE_FAULTS: dict[str, Callable[[Task], str | None]] = {"countdown": countdown_fault, "sudoku": sudoku_fault}
