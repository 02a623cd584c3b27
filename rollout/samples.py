"""samples.jsonl: every response with its task, trace and verdict, one JSON object a line; written and read back."""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.checkpoint import append_lines, write_whole
from common.ranks import from_main, is_main
from common.trajectory import Score, ScoredTrajectory, Task, Trajectory

Line = dict[str, Any]


def write_samples(
    path: Path, groups: Iterable[Sequence[ScoredTrajectory]], extra: Mapping[str, Any] | None = None
) -> None:
    """Append every response of the groups, from one rank; each line begins with the keys of `extra`."""
    if not is_main():
        return
    lines = []
    for response in (response for group in groups for response in group):
        task = {"question": response.task.question, "ground_truth_answer": response.task.ground_truth_answer}
        task |= {"prefix": response.task.prefix} if response.task.prefix else {}
        puzzle = response.task.record.get("puzzle")
        task |= {"puzzle": puzzle} if puzzle not in (None, response.task.question) else {}
        score = {key: value for key, value in vars(response.score).items() if (key, value) != ("chunk_votes", None)}
        line = dict(extra or {}) | task | score | response.trajectory.line()
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    append_lines(path, "".join(lines))


def read_lines(path: Path) -> Iterator[Line]:
    """The whole lines of a file; what a killed run left half written is skipped."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                yield line


def take_up(path: Path, tasks: Sequence[Task], step: int) -> dict[str, dict[tuple[str, int], ScoredTrajectory]]:
    """What a stopped evaluation wrote of these tasks after `step` steps of training: by setting, by (task id, sample).

    The first rank reads the file and rewrites it without torn lines. All ranks must call it.
    """
    found: dict[str, dict[tuple[str, int], ScoredTrajectory]] = defaultdict(dict)
    if is_main() and path.is_file():
        lines = list(read_lines(path))
        write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        by_id = {task.id: task for task in tasks}
        for line in lines:
            if line.get("step") == step and line["task_id"] in by_id:
                score = Score(**{field.name: line.get(field.name) for field in dataclasses.fields(Score)})
                response = ScoredTrajectory(by_id[line["task_id"]], Trajectory.of(line), score)
                found[line.get("setting")][line["task_id"], line["sample"]] = response
    return from_main(dict(found))
