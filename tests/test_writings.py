"""A trace whose tokens were overwritten: the record in memory and on disk."""

import json
from dataclasses import fields
from pathlib import Path

from common.trajectory import Score, ScoredTrajectory, Task, Trajectory, Writing
from rollout.samples import take_up, write_samples

EDITED = Trajectory(
    "a", 0, [1], [5, 6], [2, 1], [-0.5, -1.0], [0.6, 0.4], 1.0, "length", 2, 3, 4, 1.0, "text",
    [Writing(0, 0, 9, 0.0), Writing(1, 0, 7, -0.25)],
)  # fmt: skip
PLAIN = Trajectory("b", 1, [1], [5], [0], [-0.5], [0.6], 1.0, "length", 1, 1, 2, 1.0, "text")


def test_overwritten_writings_are_written_and_read_back(tmp_path: Path) -> None:
    tasks = [Task("a", "q"), Task("b", "q")]
    group = [ScoredTrajectory(task, one, Score(0.0, False, "failed")) for task, one in zip(tasks, (EDITED, PLAIN))]
    path = tmp_path / "samples.jsonl"
    write_samples(path, [group], {"step": 0, "setting": "edit"})
    edited, plain = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert edited["overwritten"] == [[0, 0, 9, 0.0], [1, 0, 7, -0.25]]
    # where nothing was overwritten the line is as it always was
    assert list(plain)[-len(fields(Trajectory)) + 1 :] == [one.name for one in fields(Trajectory)][:-1]
    back = take_up(path, tasks, step=0)["edit"]
    assert (back["a", 0].trajectory, back["b", 1].trajectory) == (EDITED, PLAIN)
    assert isinstance(back["a", 0].trajectory.overwritten[1], Writing)
