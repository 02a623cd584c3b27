"""Two ways to do the same thing, timed against each other on the same inputs: ours and any other.

    python -m benchmarks.versus our=benchmarks.ours:block_sampler their=my_adapter:sampler checkpoint=PATH prompts=8
    python -m benchmarks.versus rows=all|'full tiny' [out=FOLDER] [rounds=5]   # the table of benchmarks/versus_rows.py

A side is a function that is given the inputs once, loads what it needs and returns what is timed: a function without
arguments, whose result is JSON. Each has a process of its own with one thread (`our_python=`, `their_python=`: another
environment's interpreter). Rounds take both in turn, in changing order, the first to warm up; processor seconds count,
those of the processes that a side starts among them. Results that are lists of ids must be equal, which is said; of
floating-point numbers the largest difference is said. `prompts` is a JSON file of lists of ids, or how many to make.
Other keys, as `tokens=64`, go to both sides as they are. benchmarks/peers.md shows sides of other projects.
"""

import json
import math
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from common.errors import UserError, one_line_errors
from common.metrics import print_table

SIDE = Path(__file__).with_name("versus_side.py")
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
MADE_IDS = 30  # prompts that are made have ids below this
MEDIANS = ("seconds", "wall", "faults")
OWN_KEYS = ("our", "their", "our_python", "their_python", "rounds")


class Side:
    """A process with the modules of some functions, in which one after another of them is prepared; `with` ends it."""

    def __init__(self, *functions: str, python: str = sys.executable, environment: dict[str, str] | None = None):
        self.functions = functions
        self.process = subprocess.Popen(
            [python, str(SIDE), *functions],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ONE_THREAD | (environment or {}),
        )

    def prepare(self, function: str, inputs: dict[str, Any]) -> None:
        self._ask([function, inputs])

    def run(self) -> dict[str, Any]:
        """One call of what was prepared: seconds, wall, faults, memory, result."""
        return self._ask("run")

    def done(self) -> None:
        """End what was prepared: another function may be."""
        self._ask("done")

    def _ask(self, line: Any) -> Any:
        """Its answer to a line; UserError where it ended instead. What it said of that stands above."""
        assert self.process.stdin and self.process.stdout
        with suppress(BrokenPipeError):  # it ended: there will be no answer
            print(json.dumps(line), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            code = self.process.wait()
            raise UserError(f"{' or '.join(self.functions)}: the process ended with code {code}; see above")
        return json.loads(answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        assert self.process.stdin
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def versus(ours: Side, theirs: Side, our: str, their: str, inputs: dict[str, Any], rounds: int) -> dict[str, Any]:
    """A row of figures: medians of processor seconds, their ratio (theirs over ours) with its range over rounds, page
    faults and peak memory above the prepared sides', and whether the results agree."""
    ours.prepare(our, inputs)
    theirs.prepare(their, inputs)
    own, other = [], []
    for number in range(rounds + 1):
        for side, told in [(ours, own), (theirs, other)][:: 1 if number % 2 else -1]:
            told.append(side.run())
    ours.done()
    theirs.done()
    ratios = [b["seconds"] / max(a["seconds"], 1e-9) for a, b in zip(own[1:], other[1:])]  # the first warmed up
    row = {"ratio": statistics.median(ratios), "range": [min(ratios), max(ratios)], "rounds": rounds}
    for name, told in (("our", own), ("their", other)):
        row |= {f"{name} {key}": statistics.median(one[key] for one in told[1:]) for key in MEDIANS}
        row[f"{name} memory"] = max(one["memory"] for one in told)
    return row | {"results": agreement(own[0]["result"], other[0]["result"])}


def agreement(ours: Any, theirs: Any) -> str:
    """Whether two results are the same, in words: lists of ids by responses, numbers by their largest difference."""
    if ours is None or theirs is None:
        return "not compared"
    if not isinstance(ours, list) or not isinstance(theirs, list):
        return "equal" if ours == theirs else "differ"
    if len(ours) != len(theirs):
        return f"differ: {len(ours)} and {len(theirs)}"
    numbers = [*ours, *theirs]
    if any(isinstance(one, float) for one in numbers) and not any(isinstance(one, list) for one in numbers):
        largest = max(map(abs, numbers), default=0.0) or 1.0
        apart = max((abs(a - b) for a, b in zip(ours, theirs)), default=0.0) / largest
        return "equal" if apart == 0 else f"apart by {apart:.0e}" if math.isfinite(apart) else "not finite"
    same = sum(a == b for a, b in zip(ours, theirs))
    return f"{same} of {len(ours)} equal"


def shown(name: str, row: dict[str, Any]) -> dict[str, str]:
    """A row as the table has it."""
    low, high = row["range"]
    return {
        "": name,
        "theirs / ours": f"{row['ratio']:.2f}",
        "range": f"{low:.2f} to {high:.2f}",
        "seconds, ours / theirs": f"{row['our seconds']:.2f} / {row['their seconds']:.2f}",
        "MiB": f"{row['our memory']:.0f} / {row['their memory']:.0f}",
        "1,000 page faults": f"{row['our faults'] / 1e3:.0f} / {row['their faults'] / 1e3:.0f}",
        "results": row["results"],
    }


def inputs_of(words: dict[str, str]) -> dict[str, Any]:
    """What both sides are given: the command line's keys but `versus`'s own, values that are JSON read as such."""
    inputs = {key: value_of(text) for key, text in words.items() if key not in OWN_KEYS}
    prompts = inputs.get("prompts", 4)
    if isinstance(prompts, int):
        rng = random.Random(0)
        inputs["prompts"] = [[rng.randrange(MADE_IDS) for _ in range(16 + 7 * n % 33)] for n in range(prompts)]
    elif isinstance(prompts, str):
        try:
            inputs["prompts"] = json.loads(Path(prompts).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"prompts={prompts}: a number, or a JSON file of lists of ids ({error})") from error
    return inputs


def value_of(text: str) -> Any:
    """The JSON that a word is, or else the word."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def whole_number(words: dict[str, str], key: str, default: int) -> int:
    """A key's number; UserError where it is none above 0."""
    value = words.get(key, str(default))
    if not value.isdigit() or int(value) == 0:
        raise UserError(f"{key}={value}: a whole number above 0, as {key}={default}")
    return int(value)


@one_line_errors
def main(arguments: Sequence[str]) -> None:
    words = dict(word.partition("=")[::2] for word in arguments)
    rounds = whole_number(words, "rounds", 5)
    if "rows" in words:
        from benchmarks.versus_rows import table

        table(words, rounds)
        return
    for key in ("our", "their"):
        if ":" not in words.get(key, ""):
            raise UserError(f"{key}: give MODULE:FUNCTION, as our=benchmarks.ours:block_sampler; or rows=all")
    our, their = words["our"], words["their"]
    with (
        Side(our, python=words.get("our_python", sys.executable)) as ours,
        Side(their, python=words.get("their_python", sys.executable)) as theirs,
    ):
        row = versus(ours, theirs, our, their, inputs_of(words), rounds)
    print_table([shown(their, row)], title=f"{our}, {rounds} rounds, one thread, processor seconds")


if __name__ == "__main__":
    main(sys.argv[1:])
