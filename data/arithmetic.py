"""Chained addition: tasks with a known answer whose difficulty is set by two numbers.

`4+2+8+1` is answered `4+2=6;6+8=14;14+1=15;\\boxed{15}`. More operands make a longer chain, larger operands
harder sums. Which split a tuple of operands falls into depends on nothing but a hash of the tuple.
"""

import argparse
import itertools
import json
import random
from pathlib import Path

from common.errors import UserError, one_line_errors
from data.splits import SPLITS, in_split

MAX_TUPLES = 50_000  # larger spaces are sampled


def arithmetic_tasks(operands: int, split: str, largest: int = 9, seed: int = 0) -> list[dict[str, str]]:
    """The tasks of one split, ordered by hash: question and ground_truth_answer, prompt and response."""
    if operands < 2 or largest < 1 or largest**operands >= 2**63:
        raise UserError(
            f"arithmetic with {operands} operands up to {largest} cannot be made: "
            "use 2 operands or more, the largest at least 1, and fewer than 2^63 tuples"
        )
    tuples = in_split(_tuples(operands, largest, seed), split, key=lambda numbers: ",".join(map(str, numbers)))
    return [_record(numbers) for numbers in tuples]


def _tuples(operands: int, largest: int, seed: int) -> list[tuple[int, ...]]:
    """Every tuple of operands 1…largest, or a sample without replacement where there are too many."""
    total = largest**operands
    if total <= MAX_TUPLES:
        return list(itertools.product(range(1, largest + 1), repeat=operands))
    numbers = random.Random(f"arithmetic/{seed}").sample(range(total), MAX_TUPLES)
    return [tuple(n // largest**place % largest + 1 for place in range(operands)) for n in numbers]


def _record(numbers: tuple[int, ...]) -> dict[str, str]:
    question = "+".join(map(str, numbers))
    total, working = numbers[0], []
    for number in numbers[1:]:
        working.append(f"{total}+{number}={total + number};")
        total += number
    response = "".join(working) + f"\\boxed{{{total}}}"
    return {"question": question, "ground_truth_answer": str(total), "prompt": question, "response": response}


@one_line_errors
def main() -> None:
    """Write {train,dev,test}.jsonl into a folder."""
    parser = argparse.ArgumentParser(description="make chained-addition tasks")
    parser.add_argument("--operands", type=int, default=4)
    parser.add_argument("--largest", type=int, default=9, help="largest operand")
    parser.add_argument("--seed", type=int, default=0, help="of the sample where there are too many tuples")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    args = parser.parse_args()
    splits = {split: arithmetic_tasks(args.operands, split, args.largest, args.seed) for split in SPLITS}
    args.out.mkdir(parents=True, exist_ok=True)
    for split, records in splits.items():
        path = args.out / f"{split}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        print(f"{path}: {len(records)} tasks")


if __name__ == "__main__":
    main()
