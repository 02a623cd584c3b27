"""The trace page of an evaluation: some responses that were right and some that were not, under every setting."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from common.schema import Sampling
from common.trajectory import ScoredTrajectory, Task
from models import LoadedModel
from rollout.samples import known_rollouts
from sample.traces import Trace, trace_of, write_trace_page

SHOWN = 4  # right ones of each setting, and as many others


def write_evaluation_traces(
    path: Path,
    samples_file: Path,
    loaded: LoadedModel,
    tasks: Sequence[Task],
    settings: Mapping[str, Sampling],
    title: str,
    subtitle: str,
    step: int = 0,
) -> int:
    """Write the page from what samples.jsonl holds; returns how many responses it shows, 0 (no page) without traces."""
    traces: list[Trace] = []
    for name, setting in settings.items():
        rollouts = known_rollouts(samples_file, tasks, name, step).values()
        traces += [trace_of_rollout(loaded, one, setting.block_size, name) for one in notable(rollouts)]
    if traces:
        write_trace_page(path, traces, title, subtitle)
    return len(traces)


def notable(rollouts: Iterable[ScoredTrajectory], each: int = SHOWN) -> list[ScoredTrajectory]:
    """The first right ones and the first others, those right first; without a trace none."""
    traced = [one for one in rollouts if one.trajectory.step_map]
    right = [one for one in traced if one.score.correct]
    wrong = [one for one in traced if not one.score.correct]
    return right[:each] + wrong[:each]


def trace_of_rollout(loaded: LoadedModel, rollout: ScoredTrajectory, block_size: int, setting: str = "") -> Trace:
    """What the page shows of a scored response."""
    task, trajectory = rollout.task, rollout.trajectory
    name = f"{setting} {task.id} · {trajectory.sample + 1}".strip()
    reference = task.ground_truth_answer or ""
    return trace_of(loaded, trajectory, block_size, name, setting, rollout.score.verdict, reference)
