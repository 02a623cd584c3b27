r"""Countdown: reach a number with given ones, each used exactly once, by + - * / and parentheses.

The question `3,7,5=22` names numbers and target; `3*5=15;15+7=22;\boxed{3*5+7}` answers it. All numbers must be used,
as in the prompts of d1 (github.com/dllm-reasoning/d1) and of TinyZero, from which this task came to language models; in
the game on television some may be left over. A task is made by playing it backwards: numbers are drawn and combined at
random through positive integers, and what comes out is the target, so that each has a solution.

A task of three numbers has a second answer, `search`, that tries ways instead of knowing one. For each pair and the
number left over it has the pair's sum, difference and product, and behind each what the number left over makes of that
by + - *, until the target comes up: `3,7,5:10:15,5,50;4:9,1,20;21:26,16,0;3,5,7:8:15,1,56;2:9,5,14;15:22,8,0;` and
`\boxed{5*3+7}`, where 0 stands for what is above all targets too. Divisions are not tried; a way with one is boxed
behind all others where there is no other.
"""

import functools
import itertools
import random

from common.errors import UserError
from data.splits import in_split

LARGEST_TARGET = 100
MAX_DRAWS, MAX_TASKS = 60_000, 20_000  # of which the splits are made
Task = tuple[tuple[int, ...], int, str]  # numbers in the order of the question, target, response
Term = tuple[int, str, int]  # value, expression, and how tightly its last operation binds
SUM, PRODUCT, NUMBER = 1, 2, 3
BINDING = {"+": SUM, "-": SUM, "*": PRODUCT, "/": PRODUCT}


def countdown_tasks(count: int, split: str, largest: int = 99, seed: int = 0) -> list[dict[str, object]]:
    """The tasks of one split, in the order of a hash: question, ground_truth_answer, numbers, prompt and answers.

    A question has `count` numbers from 1 to `largest` and a target from 1 to 100. Its answers are `response`, of that
    the box alone, `expression`, and where it has three numbers `search`. Tasks that differ in the order of the numbers
    alone are in the same split, and but for `train` one of them stands for all. UserError for sizes that cannot be
    made.
    """
    if not 2 <= count <= 6 or not 3 <= largest <= 1000:
        raise UserError(
            f"countdown with {count} numbers up to {largest} cannot be made: "
            "use 2 to 6 numbers, the largest from 3 to 1000"
        )
    tasks = in_split(_tasks(count, largest, seed), split, key=_whatever_order)
    if split != "train":
        tasks = list({_whatever_order(task): task for task in tasks}.values())
    return [_record(*task) for task in tasks]


def _whatever_order(task: Task) -> str:
    return f"{sorted(task[0])}={task[1]}"


@functools.cache
def _tasks(count: int, largest: int, seed: int) -> tuple[Task, ...]:
    """Different tasks: at most MAX_TASKS, or as many as come up in MAX_DRAWS."""
    rng = random.Random(f"countdown/{count}/{largest}/{seed}")
    found: dict[tuple[tuple[int, ...], int], str] = {}
    for _ in range(MAX_DRAWS):
        numbers = tuple(rng.randint(1, largest) for _ in range(count))
        target, response = _play(numbers, rng)
        if target <= LARGEST_TARGET:
            found.setdefault((numbers, target), response)
        if len(found) == MAX_TASKS:
            break
    return tuple((numbers, target, response) for (numbers, target), response in found.items())


def _play(numbers: tuple[int, ...], rng: random.Random) -> tuple[int, str]:
    """Combine two terms at a time until one is left: its value, and the steps with the expression in a box."""
    terms: list[Term] = [(number, str(number), NUMBER) for number in numbers]
    steps = []
    while len(terms) > 1:
        one, other = (terms.pop(rng.randrange(len(terms))) for _ in range(2))
        if one[0] < other[0]:  # differences and quotients of positive integers: the larger one first
            one, other = other, one
        allowed = ["+", "*", *("-" if one[0] > other[0] else ""), *("/" if one[0] % other[0] == 0 else "")]
        sign = rng.choice(allowed)
        term = _combine(one, sign, other)
        steps.append(f"{one[0]}{sign}{other[0]}={term[0]};")
        terms.append(term)
    return terms[0][0], "".join(steps) + f"\\boxed{{{terms[0][1]}}}"


def _search(numbers: tuple[int, ...], target: int) -> tuple[str, str | None]:
    """The ways of three numbers, tried in order up to the first that makes the target, and that one's expression."""
    text = ""
    for one, other in itertools.combinations(range(3), 2):
        (rest,) = {0, 1, 2} - {one, other}
        left = (numbers[rest], str(numbers[rest]), NUMBER)
        text += f"{numbers[one]},{numbers[other]},{left[0]}:"
        for pair in _results(*((numbers[place], str(numbers[place]), NUMBER) for place in (one, other))):
            if pair[0] == 0:
                continue
            results = _results(pair, left)
            values = (value if value <= LARGEST_TARGET else 0 for value, _, _ in results)
            text += f"{pair[0]}:{','.join(map(str, values))};"
            for value, expression, _ in results:
                if value == target:
                    return text, expression
    return text, None


def _results(one: Term, other: Term) -> list[Term]:
    """Sum, difference and product of two terms."""
    if one[0] < other[0]:
        one, other = other, one
    return [_combine(one, sign, other) for sign in "+-*"]


def _combine(one: Term, sign: str, other: Term) -> Term:
    """The term `one sign other`, with no more parentheses than it needs."""
    value = {
        "+": one[0] + other[0],
        "-": one[0] - other[0],
        "*": one[0] * other[0],
        "/": one[0] // other[0],
    }[sign]
    binding = BINDING[sign]
    left = f"({one[1]})" if one[2] < binding else one[1]
    needs = other[2] < binding or (other[2] == binding and sign in "-/")
    return value, left + sign + (f"({other[1]})" if needs else other[1]), binding


def _record(numbers: tuple[int, ...], target: int, response: str) -> dict[str, object]:
    question = f"{','.join(map(str, numbers))}={target}"
    record = {
        "question": question,
        "ground_truth_answer": str(target),
        "numbers": list(numbers),
        "prompt": question,
        "response": response,
        "expression": response.split(";")[-1],
    }
    if len(numbers) == 3:
        working, expression = _search(numbers, target)
        record["search"] = working + (f"\\boxed{{{expression}}}" if expression else record["expression"])
    return record
