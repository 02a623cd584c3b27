"""Countdown and Sudoku: tasks that can be solved, splits that share none, and a verifier that is not fooled."""

import itertools
import json
import time
from fractions import Fraction
from pathlib import Path

import pytest

from common.board import extract_puzzle_answer
from common.errors import UserError
from common.schema import PromptsConfig, RewardConfig
from common.trajectory import Score, Task
from data import countdown
from data.countdown import countdown_tasks
from data.splits import SPLITS
from data.sudoku import solved_boards, sudoku_tasks
from data.tasks import load_tasks
from models import find_family
from models.prompts import instruction
from reward.__main__ import main as score_file
from reward.puzzles import parse_expression
from reward.score import check_tasks, make_scorer

RIGHT, ATTEMPT, WRONG = Score(1.0, True, "passed"), Score(0.1, False, "failed"), Score(0.0, False, "failed")
COUNTDOWN = Task("c", "3,7,5=22", "22", {"numbers": [3, 7, 5]})
PUZZLE, SOLUTION = "0401002010030310", "2431312412434312"
SUDOKU = Task("s", PUZZLE, SOLUTION, {"puzzle": PUZZLE})


def score_of(response: str, task: Task, kind: str) -> Score:
    return make_scorer(RewardConfig(), kind)(response, task, False)


# --- countdown


def reachable(numbers: tuple[Fraction, ...], target: int) -> bool:
    """Whether the numbers, all of them, come to the target: every way tried."""
    if len(numbers) == 1:
        return numbers[0] == target
    for one, other in itertools.permutations(range(len(numbers)), 2):
        a, b = numbers[one], numbers[other]
        rest = tuple(number for place, number in enumerate(numbers) if place not in (one, other))
        results = [a - b, *((a + b, a * b) if one < other else ()), *((a / b,) if b else ())]
        if any(reachable((*rest, result), target) for result in results):
            return True
    return False


@pytest.mark.parametrize(("count", "largest"), [(3, 9), (3, 99), (4, 20)])
def test_countdown_tasks_can_be_solved(count: int, largest: int) -> None:
    for record in countdown_tasks(count, "test", largest)[:60]:
        numbers, target = record["numbers"], int(record["ground_truth_answer"])
        assert len(numbers) == count and all(1 <= number <= largest for number in numbers) and 1 <= target <= 100
        assert record["question"] == record["prompt"] == f"{','.join(map(str, numbers))}={target}"
        assert reachable(tuple(map(Fraction, numbers)), target)


@pytest.mark.parametrize("count", [3, 4])
def test_countdown_responses_are_right_and_their_steps_too(count: int) -> None:
    tasks = load_tasks(f"countdown_{count}_test")
    assert len(tasks) > 1000
    for task in tasks:
        assert score_of(task.record["response"], task, "countdown") == RIGHT
        *steps, last = task.record["response"].split(";")
        assert len(steps) == count - 1 and task.record["expression"] == last
        for step in steps:
            side, result = step.split("=")
            assert parse_expression(side)[1] == int(result) > 0
        assert int(result) == int(task.ground_truth_answer)


def values_of(a: int, b: int) -> list[int]:
    return [a + b, abs(a - b), a * b]


def test_a_search_goes_on_until_the_target_comes_up() -> None:
    found = 0
    for task in load_tasks("countdown_3_9_test"):
        (x, y, z), target = task.record["numbers"], int(task.ground_truth_answer)
        written, results = "", []
        for a, b, c in ((x, y, z), (x, z, y), (y, z, x)):
            written += f"{a},{b},{c}:" * (target not in results)
            for value in filter(None, values_of(a, b)):
                if target not in results:
                    results = values_of(value, c)
                    written += f"{value}:{','.join(str(one if one <= 100 else 0) for one in results)};"
        working, answer = task.record["search"].split("\\boxed")
        assert working == written
        assert ("/" in answer) == (target not in results)
        assert score_of(task.record["search"], task, "countdown") == RIGHT
        found += target in results
    assert found > 150


def test_countdown_splits_share_no_task_in_any_order() -> None:
    splits = {
        split: {
            (tuple(sorted(record["numbers"])), record["ground_truth_answer"]) for record in countdown_tasks(3, split, 9)
        }
        for split in SPLITS
    }
    total = sum(map(len, splits.values()))
    assert total == len(set.union(*splits.values())) > 1500
    assert 0.07 < len(splits["test"]) / total < 0.13 and 0.03 < len(splits["dev"]) / total < 0.07
    for split in ("test", "dev"):
        assert len(countdown_tasks(3, split, 9)) == len(splits[split]), "each stands there once, in one order"


def test_countdown_depends_on_its_seed_alone() -> None:
    once = countdown_tasks(4, "dev", 30)
    countdown._tasks.cache_clear()  # the public function has no cache of its own to empty
    assert once == countdown_tasks(4, "dev", 30) != countdown_tasks(4, "dev", 30, seed=1)


@pytest.mark.parametrize(
    ("response", "score"),
    [
        (r"\boxed{3*5+7}", RIGHT),
        ("<answer>\n7 + 5 * 3\n</answer>", RIGHT),
        (r"<reasoning>3*5=15</reasoning><answer>\boxed{(3*5)+7}</answer>", RIGHT),
        (r"\boxed{3 \times 5 + 7}", RIGHT),
        (r"\boxed{3*5+7 = 22}", RIGHT),
        (r"<think>\boxed{3+7+5}</think>\boxed{3*5+7}", RIGHT),
        (r"\boxed{3+5+7}", ATTEMPT),
        (r"\boxed{3/(7-7)+5}", WRONG),  # 7 twice
        (r"\boxed{3*5+7}<answer>1</answer>", WRONG),  # the tagged one is the answer
        (r"\boxed{3*5+7} or \boxed{22}", WRONG),
        (r"\boxed{22}", WRONG),  # not the given numbers
        (r"\boxed{22+3*(7-5)*0}", WRONG),  # a number not given
        (r"\boxed{15+7}", WRONG),
        (r"\boxed{5*3+7*1}", WRONG),
        (r"\boxed{7+15}", WRONG),
        (r"\boxed{5*3}", WRONG),  # one left over
        (r"\boxed{3*5+7 = 23}", WRONG),
        (r"\boxed{3+5+7 = 22}", ATTEMPT),
        (r"\boxed{3*5+7 = 22 = 22}", WRONG),
        (r"\boxed{3*5+7, which is the answer}", WRONG),
        (r"\boxed{3*5+7;}", WRONG),
        (r"\boxed{３*５+７}", WRONG),  # full width
        (r"\boxed{٣*٥+٧}", WRONG),  # Arabic
        (r"\boxed{3**5+7}", WRONG),
        (r"\boxed{3//5+7}", WRONG),
        (r"\boxed{3*5+7.0}", WRONG),
        (r"\boxed{3*5+07}", WRONG),
        (r"\boxed{3_0*5+7}", WRONG),
        (r"\boxed{0x3*5+7}", WRONG),
        (r"\boxed{(3)(5)+7}", WRONG),
        (r"\boxed{3*5+7)}", WRONG),
        (r"\boxed{(3*5+7}", WRONG),
        (r"\boxed{()3*5+7}", WRONG),
        (r"\boxed{3*5+7+}", WRONG),
        (r"\boxed{3*5+ +7}", WRONG),
        (r"\boxed{__import__('os').abort()}", WRONG),
        (r"\boxed{1e999}", WRONG),
        (r"\boxed{" + "(" * 100_000 + "3*5+7" + ")" * 100_000 + "}", WRONG),
        (r"\boxed{" + "9" * 100_000 + "}", WRONG),
        ("<answer>" * 50_000 + "3*5+7", Score(0.0, False, "no_answer")),
        ("3*5+7", Score(0.0, False, "no_answer")),
        (r"\boxed{}", Score(0.0, False, "no_answer")),
        ("", Score(0.0, False, "no_answer")),
    ],
)
def test_countdown_is_not_fooled(response: str, score: Score) -> None:
    begin = time.process_time()
    assert score_of(response, COUNTDOWN, "countdown") == score
    assert time.process_time() - begin < 1


def test_a_number_is_used_as_often_as_it_is_given() -> None:
    task = Task("c", "4,4,2=6", "6", {"numbers": [4, 4, 2]})
    assert score_of(r"\boxed{4+4-2}", task, "countdown") == RIGHT
    assert score_of(r"\boxed{4+2}", task, "countdown") == score_of(r"\boxed{4+2-4+4}", task, "countdown") == WRONG


def test_dividing_by_zero_has_no_value() -> None:
    task = Task("c", "6,3,3=6", "6", {"numbers": [6, 3, 3]})
    assert score_of(r"\boxed{6/(3-3)}", task, "countdown") == ATTEMPT
    zero = Task("c", "0,5,5=0", "0", {"numbers": [0, 5, 5]})
    assert score_of(r"\boxed{0/(5-5)}", zero, "countdown") == ATTEMPT
    assert score_of(r"\boxed{0*(5-5)}", zero, "countdown") == RIGHT


@pytest.mark.parametrize(
    ("text", "value"),
    [("8-4-2", 2), ("8/4/2", 1), ("8-(4-2)", 6), ("2+3*4", 14), ("(2+3)*4", 20), ("1/3*3", 1), ("2*(3-5)+4", 0)],
)
def test_the_value_of_an_expression(text: str, value: int) -> None:
    numbers, found = parse_expression(text)
    assert found == value and sorted(numbers) == sorted(int(one) for one in text if one.isdigit())


# --- sudoku


def fits(board: str) -> bool:
    """Whether each row, column and box of a full board holds 1 to 4, by looking at each."""
    rows = [board[start : start + 4] for start in range(0, 16, 4)]
    columns = ["".join(row[column] for row in rows) for column in range(4)]
    boxes = [board[at : at + 2] + board[at + 4 : at + 6] for at in (0, 2, 8, 10)]
    return all(sorted(unit) == list("1234") for unit in rows + columns + boxes)


def solutions(puzzle: str) -> list[str]:
    """All boards that fit a puzzle, found by filling the first empty cell in every way."""
    if "0" not in puzzle:
        return [puzzle] if fits(puzzle) else []
    cell = puzzle.index("0")
    row, column = divmod(cell, 4)
    seen = {
        digit
        for other, digit in enumerate(puzzle)
        if other // 4 == row or other % 4 == column or (other // 8, other % 4 // 2) == (row // 2, column // 2)
    }
    filled = (puzzle[:cell] + digit + puzzle[cell + 1 :] for digit in "1234" if digit not in seen)
    return [board for one in filled for board in solutions(one)]


def test_the_solved_boards() -> None:
    boards = solved_boards()
    assert len(set(boards)) == 288 and all(map(fits, boards)) and SOLUTION in boards


@pytest.mark.parametrize("empty", [1, 8, 12])
def test_a_sudoku_has_one_solution(empty: int) -> None:
    tasks = load_tasks(f"sudoku_4_{empty}_test")
    assert len(tasks) > 300
    for task in tasks[:100]:
        assert task.question.count("0") == empty and solutions(task.question) == [task.ground_truth_answer]
        assert score_of(task.record["response"], task, "sudoku") == RIGHT


def test_sudoku_splits_share_no_task() -> None:
    splits = {split: [record["question"] for record in sudoku_tasks(split)] for split in SPLITS}
    assert len(set(itertools.chain(*splits.values()))) == sum(map(len, splits.values())) == 20_000
    assert 1800 < len(splits["test"]) < 2200 and 800 < len(splits["dev"]) < 1200
    assert sudoku_tasks("test") != sudoku_tasks("test", seed=1)


def changed(board: str, cell: int, digit: str) -> str:
    return board[:cell] + digit + board[cell + 1 :]


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (SOLUTION, RIGHT),
        ("2431\n3124\n1243\n4312", RIGHT),
        (changed(SOLUTION, 0, "1"), Score(8 / 9, False, "failed")),
        (changed(changed(SOLUTION, 0, "1"), 15, "1"), Score(7 / 9, False, "failed")),
        (changed(SOLUTION, 1, "2"), WRONG),  # all empty cells are right, a given one is changed
        (PUZZLE, WRONG),
        (SOLUTION[:15], WRONG),
        (SOLUTION + "1", WRONG),
        (changed(SOLUTION, 0, "5"), WRONG),
        (SOLUTION.replace("2", "２"), WRONG),
        (SOLUTION.replace("2", "²"), WRONG),
        (f"{SOLUTION} is it", WRONG),
        ("".join(f"{digit}, " for digit in SOLUTION), WRONG),
        (SOLUTION * 10_000, WRONG),
    ],
)
def test_sudoku_is_not_fooled(answer: str, score: Score) -> None:
    assert score_of(f"\\boxed{{{answer}}}", SUDOKU, "sudoku") == score
    assert score_of(f"so\n<answer>\n{answer}\n</answer>", SUDOKU, "sudoku") == score


def test_sudoku_without_an_answer() -> None:
    assert score_of(SOLUTION, SUDOKU, "sudoku") == Score(0.0, False, "no_answer")
    assert make_scorer(RewardConfig(), "sudoku")(f"\\boxed{{{SOLUTION}}}", SUDOKU, True).verdict == "truncated"


# --- both


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>1</answer> no, <answer>2</answer>, said I", "2"),
        ("<answer>1<answer>2</answer>", "2"),
        (r"<answer>x \boxed{3}</answer> \boxed{4}", "3"),
        ("<answer>1</answer></think><answer>2</answer>", "2"),
        ("<answer>1", None),
        ("</answer>1<answer>", None),
    ],
)
def test_where_the_answer_stands(text: str, answer: str | None) -> None:
    assert extract_puzzle_answer(text) == answer


@pytest.mark.parametrize(
    ("kind", "task", "fault"),
    [
        ("countdown", Task("1", "q", "22", {}), "is no countdown: give `numbers`"),
        ("countdown", Task("1", "q", "22", {"numbers": [1, "2"]}), "is no countdown: give `numbers`"),
        ("countdown", Task("1", "q", "22", {"numbers": [True, 2]}), "is no countdown: give `numbers`"),
        ("countdown", Task("1", "q", "22", {"numbers": []}), "is no countdown: give `numbers`"),
        ("countdown", Task("1", "q", "x", {"numbers": [1]}), "is no countdown: give `ground_truth_answer`"),
        ("sudoku", Task("1", "q", SOLUTION, {}), "is no sudoku: give `puzzle`"),
        ("sudoku", Task("1", "q", SOLUTION, {"puzzle": SOLUTION}), "is no sudoku: give `puzzle`"),
        ("sudoku", Task("1", "q", None, {"puzzle": PUZZLE}), "is no sudoku: give `ground_truth_answer`"),
        ("sudoku", Task("1", "q", SOLUTION[::-1], {"puzzle": PUZZLE}), "is no sudoku: give `ground_truth_answer`"),
    ],
)
def test_records_that_cannot_be_judged_are_told(kind: str, task: Task, fault: str) -> None:
    with pytest.raises(UserError, match=f"dataset.train_dataset: task '1' {fault}"):
        check_tasks(make_scorer(RewardConfig(), kind), [task], "dataset.train_dataset")
    check_tasks(make_scorer(RewardConfig(), "countdown"), [COUNTDOWN], "x")
    check_tasks(make_scorer(RewardConfig(), "sudoku"), [SUDOKU], "x")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("countdown_1_train", "'countdown_1_train': countdown with 1 numbers"),
        ("countdown_3_2_train", "use 2 to 6 numbers, the largest from 3"),
        ("sudoku_4_0_train", "'sudoku_4_0_train': a 4×4 sudoku with 0 empty cells"),
        ("sudoku_4_13_train", "use 1 to 12"),
        ("sudoku_9_train", "did you mean 'sudoku_4_train'"),
        ("countdown_3_tset", "did you mean 'countdown_3_test'"),
    ],
)
def test_names_of_sets_that_cannot_be_made(name: str, message: str) -> None:
    with pytest.raises(UserError, match=f"dataset.train_dataset: .*{message}"):
        load_tasks(name)


@pytest.mark.parametrize("kind", ["countdown", "sudoku"])
def test_the_instruction_asks_for_a_box(kind: str) -> None:
    words = instruction(find_family("llada"), kind, PromptsConfig())
    assert "{question}" in words and "\\boxed{}" in words
    assert instruction(find_family("llada"), kind, PromptsConfig(**{kind: "{question}="})) == "{question}="


def test_a_records_kind_is_told_by_what_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m reward` without a kind: puzzles are no maths."""
    record = {"question": "q", "ground_truth_answer": "22"}
    records = [
        record | {"numbers": [3, 7, 5]},
        record | {"ground_truth_answer": SOLUTION, "puzzle": PUZZLE},
        record,
        record | {"numbers": "in words"},
    ]
    answers = ["<answer>3*5+7</answer>", f"<answer>{SOLUTION}</answer>", "\\boxed{22}", "\\boxed{44/2}"]
    (tmp_path / "tasks.json").write_text(json.dumps(records))
    lines = [json.dumps({"task": task, "response": text}) for task, text in enumerate(answers)]
    (tmp_path / "responses.jsonl").write_text("\n".join(lines))
    files = [f"data={tmp_path}/tasks.json", f"responses={tmp_path}/responses.jsonl", f"out={tmp_path}/out.jsonl"]
    monkeypatch.setattr("sys.argv", ["reward", *files, "workers=0"])
    score_file()
    scored = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [one["verdict"] for one in scored] == ["passed"] * 4
