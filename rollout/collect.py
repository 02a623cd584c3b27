"""Responses for a set of tasks: prompts encoded, drawn by the engine, scored as they finish."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.runtime import Stopwatch, console, progress, timed
from common.schema import Sampling
from common.trajectory import Request, Score, Task, Trajectory
from models import LoadedModel
from models.prompts import encode_prompt, stop_ids_of
from sample.engine import Engine

Scorer = Callable[[str, Task, bool], Score]  # (response text, task, truncated) -> Score


@dataclass
class Rollout:
    """A task, one response to it and what the response earned."""

    task: Task
    trajectory: Trajectory
    score: Score


def prompts_within(
    loaded: LoadedModel, tasks: Sequence[Task], template: str, settings: Sampling, max_prompt_len: int
) -> list[tuple[Task, list[int]]]:
    """Tasks with their prompt ids; those whose prompt is longer than `max_prompt_len` are left out, and said."""
    encoded = [(task, encode_prompt(loaded, task.question, template, settings.start_with_think)) for task in tasks]
    kept = [(task, ids) for task, ids in encoded if len(ids) <= max_prompt_len]
    if len(kept) < len(encoded):
        longest = max(len(ids) for _, ids in encoded)
        console.print(
            f"{len(encoded) - len(kept)} of {len(encoded)} tasks dropped: their prompts exceed max_prompt_len "
            f"{max_prompt_len} (longest {longest})"
        )
    return kept


def collect(
    engine: Engine,
    loaded: LoadedModel,
    prompts: Sequence[tuple[Task, list[int]]],
    settings: Sampling,
    scorer: Scorer,
    watch: Stopwatch,
    seed: int,
    step: int = 0,
    description: str = "rollout",
) -> list[list[Rollout]]:
    """Draw `num_response_per_task` responses to each task and score them; one group per task, in the given order.

    Time goes to the stages "rollout" and "reward" of `watch`.
    """
    samples = settings.num_response_per_task
    requests = [Request(task.id, ids, sample, seed, step) for task, ids in prompts for sample in range(samples)]
    place = {task.id: number for number, (task, _) in enumerate(prompts)}
    groups: list[list[Rollout | None]] = [[None] * samples for _ in prompts]
    with progress(description, len(requests)) as advance:
        stops = stop_ids_of(loaded, settings.stop_token_list)
        for trajectory in timed(engine.generate(requests, settings, stop_ids=stops), watch, "rollout"):
            with watch("reward"):
                number = place[trajectory.task_id]
                task = prompts[number][0]
                ids = trajectory.response_ids[: trajectory.length]
                trajectory.text = loaded.tokenizer.decode(ids, skip_special_tokens=True)
                score = scorer(trajectory.text, task, trajectory.finish_reason == "length")
                groups[number][trajectory.sample] = Rollout(task, trajectory, score)
            advance()
    return groups
