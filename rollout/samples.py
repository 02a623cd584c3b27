"""samples.jsonl: every response with its task, trace and verdict, one JSON object a line; written and read back."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.checkpoint import append_lines, write_whole
from common.ranks import main_only
from common.trajectory import Score, ScoredTrajectory, Task, Trajectory

Line = dict[str, Any]
OF_SCORE = [field.name for field in dataclasses.fields(Score)]
OF_TRAJECTORY = {field.name: field for field in dataclasses.fields(Trajectory)}


def sample_line(rollout: ScoredTrajectory, about: Mapping[str, Any] | None = None) -> Line:
    """One response as it is written, `about` first."""
    line = dict(about or {}) | {"question": rollout.task.question}
    line |= {"ground_truth_answer": rollout.task.ground_truth_answer}
    return line | vars(rollout.score) | rollout.trajectory.to_json()


@main_only
def append_sample(path: Path, line: Line) -> None:
    """Add a line."""
    append_lines(path, json.dumps(line, ensure_ascii=False) + "\n")


@main_only
def write_samples(
    path: Path, groups: Sequence[Sequence[ScoredTrajectory]], about: Mapping[str, Any] | None = None
) -> None:
    """Append every response of the groups."""
    rollouts = (rollout for group in groups for rollout in group)
    append_lines(path, "".join(json.dumps(sample_line(one, about), ensure_ascii=False) + "\n" for one in rollouts))


def read_lines(path: Path) -> Iterator[Line]:
    """The whole lines of a file, torn ones left out."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                yield line


@main_only
def drop_torn_lines(path: Path) -> None:
    """Rewrite the file without what a killed run left half written."""
    lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in read_lines(path)]
    write_whole(path, "".join(lines))


def known_rollouts(
    path: Path, tasks: Sequence[Task], setting: str, step: int
) -> dict[tuple[str, int], ScoredTrajectory]:
    """The responses of one setting that the file holds already, by (task id, sample)."""
    by_id = {task.id: task for task in tasks}
    found = {}
    for line in read_lines(path):
        if (line.get("setting"), line.get("step")) == (setting, step) and line["task_id"] in by_id:
            found[line["task_id"], line["sample"]] = rollout_of(line, by_id[line["task_id"]])
    return found


def rollout_of(line: Line, task: Task) -> ScoredTrajectory:
    """A response as it was before it was written; lists of its trace that were left out are empty."""
    trace = {name: line.get(name, [] if "list" in str(field.type) else None) for name, field in OF_TRAJECTORY.items()}
    score = Score(**{name: line[name] for name in OF_SCORE})
    return ScoredTrajectory(task, Trajectory(**trace), score)
