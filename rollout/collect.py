"""Responses for a set of tasks: prompts encoded, drawn by the engine, scored as they finish."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from common.errors import UserError
from common.health import beat
from common.ranks import Queue, gather
from common.runtime import Stopwatch, console, progress, timed
from common.schema import DatasetConfig, Sampling, SFTDatasetConfig
from common.stop import Stopped, stop_requested
from common.trajectory import Request, Response, Score, Task, Trajectory
from models import LoadedModel
from models.prompts import encode_prompt, instruction, stop_ids_of
from reward.score import Scorer as RewardScorer
from rollout.scoring import submitter
from sample.engine import Engine

Scorer = Callable[[str, Task, bool], Score]  # (response text, task, truncated) -> Score


@dataclass
class Rollout:
    """A task, one response to it and what the response earned."""

    task: Task
    trajectory: Trajectory
    score: Score


def prompts_within(
    loaded: LoadedModel,
    tasks: Sequence[Task],
    dataset: DatasetConfig | SFTDatasetConfig,
    settings: Sampling,
    max_prompt_len: int,
) -> list[tuple[Task, list[int]]]:
    """Tasks with their prompt ids; those whose prompt is longer than `max_prompt_len` are left out, and said."""
    thinking = settings.start_with_think

    def encode(task: Task) -> list[int]:
        around = instruction(loaded.family, kind_of(task, dataset.data_type), dataset.prompts, thinking)
        return encode_prompt(loaded, task.question, around, thinking)

    encoded = [(task, encode(task)) for task in tasks]
    kept = [(task, ids) for task, ids in encoded if len(ids) <= max_prompt_len]
    if len(kept) < len(encoded):
        longest = max(len(ids) for _, ids in encoded)
        console.print(
            f"{len(encoded) - len(kept)} of {len(encoded)} tasks dropped: their prompts exceed max_prompt_len "
            f"{max_prompt_len} (longest {longest})"
        )
    return kept


def kind_of(task: Task, data_type: str) -> str:
    """Which instruction a task has: its data type's, code tasks by how their program is tested."""
    return f"code_{task.record.get('test_method', 'function')}" if data_type == "code" else data_type


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

    Ranks share the requests by what is left of them, and all have all the groups in the end. Raises Stopped, on every
    rank, where the run is to end. Tasks that the engine refuses, because its cache could never hold them, have no
    group; UserError if all are.
    Scoring runs beside the drawing of further responses. Time goes to the stages "rollout" and "reward" of `watch`:
    the latter is what scoring held up the rollout and what was waited for at the end.
    """
    samples = settings.num_response_per_task
    requests = [Request(task.id, ids, sample, seed, step) for task, ids in prompts for sample in range(samples)]
    queue = Queue(requests, shared=True)
    place = {task.id: number for number, (task, _) in enumerate(prompts)}
    groups: list[list[Rollout | None]] = [[None] * samples for _ in prompts]
    submit = submitter(scorer)
    waiting = []
    with progress(description, len(requests)) as advance, suppress(Stopped):
        stops = stop_ids_of(loaded, settings.stop_token_list)
        for trajectory in timed(engine.generate(queue, settings, stop_if_asked, stops), watch, "rollout"):
            advance()
            if trajectory.finish_reason == "refused":
                continue
            with watch("reward"):
                number = place[trajectory.task_id]
                task = prompts[number][0]
                ids = trajectory.response_ids[: trajectory.length]
                text = trajectory.text = loaded.tokenizer.decode(ids, skip_special_tokens=True)
                if isinstance(scorer, RewardScorer) and scorer.needs_tokens:
                    text = Response.of(text, loaded.tokenizer.batch_decode([[one] for one in ids]))
                score = submit(text, task, trajectory.finish_reason == "length")
                waiting.append((number, trajectory, score))
    scored = []
    with progress("scoring", len(waiting)) as advance, watch("reward"):
        for number, trajectory, score in [] if stop_requested() else waiting:
            scored.append((number, trajectory, score.result()))
            beat()
            advance()
    with watch("rollout"):  # where other ranks are still at it
        parts = gather((scored, stop_requested()))
        if any(stopped for _, stopped in parts):
            raise Stopped
        for number, trajectory, score in itertools.chain.from_iterable(part for part, _ in parts):
            groups[number][trajectory.sample] = Rollout(prompts[number][0], trajectory, score)
    groups = [group for group in groups if None not in group]  # a prompt is refused with all its samples
    if prompts and not groups:
        raise UserError("rollout.cache_tokens: every request was refused; allow more, or set it to null")
    unknown = sum(rollout.score.verdict == "infrastructure" for group in groups for rollout in group)
    if unknown:
        console.print(f"{unknown} of {len(requests)} responses could not be scored (infrastructure) and earn nothing")
    return groups


def stop_if_asked() -> None:
    """Called at every denoising step. Raises Stopped where the run is to end."""
    beat()
    if stop_requested():
        raise Stopped
