"""Score a file of responses by itself: python -m reward data=TASKS responses=FILE out=FILE [key=value …]

data=TASKS       tasks in the project's format: a name, a path (json, jsonl, parquet) or a hub id
responses=FILE   JSON lines {"task": index, "response": text}, index counting the tasks from 0
out=FILE         the same lines with `correct`, `reward` and `verdict` added
workers=N        processes that score side by side (default: one for each processor)
key=value        any key of the reward section, as kind=code, function=my_module:my_reward, judge.base_url=URL

Where kind is not given a task's record tells it: with a `test_method` code, with a `puzzle` sudoku, with `numbers` and
a number to reach countdown, else math.
"""

# An entry script, though it lies beside what it runs: the only file here that knows of `data`.

import collections
import contextlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from common.config import parse_or_help
from common.errors import UserError, one_line_errors
from common.jobs import RewardJobConfig
from common.records import read_lines
from common.trajectory import Score, Task
from data.tasks import load_tasks
from reward.score import check_tasks, kind_of, make_scorer


@one_line_errors
def main() -> None:
    config = parse_or_help("reward", sys.argv[1:] or ["--help"], __doc__)
    tasks = load_tasks(config.data, key="data")
    lines = read_responses(Path(config.responses), len(tasks))
    out = Path(config.out)
    if not out.parent.is_dir():
        raise UserError(f"out: the folder {out.parent} does not exist; make it or name another")
    scores = score_all(tasks, lines, config)
    with out.open("w", encoding="utf-8") as file:
        for line, score in zip(lines, scores):
            line |= {"correct": score.correct, "reward": score.reward, "verdict": score.verdict}
            if score.token_rewards is not None:
                line["token_rewards"] = score.token_rewards
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    counts = collections.Counter(score.verdict for score in scores)
    correct = sum(score.correct for score in scores)
    shown = ", ".join(f"{verdict} {count}" for verdict, count in counts.most_common())
    print(f"{out}: {len(scores)} responses, {correct} correct ({shown})")


def read_responses(path: Path, num_tasks: int) -> list[dict[str, Any]]:
    """The lines of a file of responses, each naming a task that exists."""
    lines = []
    for number, line in read_lines(path, "responses"):
        if isinstance(line, UserError):
            raise line
        where = f"responses: line {number} of '{path}'"
        if not isinstance(line, dict) or type(line.get("task")) is not int or type(line.get("response")) is not str:
            raise UserError(f'{where} is not {{"task": index, "response": text}}')
        if not 0 <= line["task"] < num_tasks:
            raise UserError(f"{where}: task {line['task']} does not exist; data has the tasks 0 to {num_tasks - 1}")
        lines.append(line)
    if not lines:
        raise UserError(f"responses: {path} has no lines")
    return lines


def score_all(tasks: list[Task], lines: list[dict[str, Any]], reward: RewardJobConfig) -> list[Score]:
    """Scores in the order of the lines."""
    asked = [tasks[line["task"]] for line in lines]
    kinds = [reward.kind or kind_of(task) for task in asked]
    processes = max(1, os.cpu_count() or 1 if reward.workers is None else reward.workers)
    scorers = {kind: make_scorer(replace(reward, workers=processes), kind) for kind in set(kinds)}
    for kind, scorer in scorers.items():  # a mistake in the config or the tasks is told before any work
        check_tasks(scorer, [task for task, its_kind in zip(asked, kinds) if its_kind == kind], "data")
    with contextlib.ExitStack() as stack:
        for scorer in scorers.values():
            stack.enter_context(scorer)
        waiting = [scorers[kind].submit(line["response"], task, False) for line, task, kind in zip(lines, asked, kinds)]
        shown = track(waiting, "scoring", console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
        return [score.result() for score in shown]


if __name__ == "__main__":
    main()
