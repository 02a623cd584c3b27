"""Responses for a set of tasks: prompts encoded, drawn by the engine, scored as they finish."""

import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress

from common.errors import UserError
from common.ranks import Queue, any_of_tensor_group, gather, is_first_of_tensor_group
from common.runtime import Stopwatch, console, progress, timed
from common.schema import EvalDatasetConfig, TaskSampling
from common.stop import Stopped, beat, stop_requested
from common.trajectory import Request, Response, Score, ScoredTrajectory, Task
from models import LoadedModel
from models.prompts import encode_prompt, instruction, stop_ids_of
from reward.score import Scorer as RewardScorer
from rollout.scoring import submitter
from sample.engine import Engine

Scorer = Callable[[str, Task, bool], Score]  # (response text, task, truncated) -> Score
UNSCORED = Score(0.0, False, "infrastructure")


def prompts_within(
    loaded: LoadedModel,
    tasks: Sequence[Task],
    dataset: EvalDatasetConfig,
    settings: TaskSampling,
    max_prompt_len: int,
) -> list[tuple[Task, list[int]]]:
    """Tasks with their prompt ids; those whose prompt is longer than `max_prompt_len` are not among them, and said."""
    encoded = [(task, encode_task(loaded, task, dataset, settings.start_with_think)) for task in tasks]
    kept = [(task, ids) for task, ids in encoded if len(ids) <= max_prompt_len]
    if len(kept) < len(encoded):
        longest = max(len(ids) for _, ids in encoded)
        console.print(
            f"{len(encoded) - len(kept)} of {len(encoded)} tasks not drawn: their prompts exceed "
            f"max_prompt_len {max_prompt_len} (longest {longest})"
        )
    return kept


def encode_task(loaded: LoadedModel, task: Task, dataset: EvalDatasetConfig, thinking: bool) -> list[int]:
    """A task's prompt ids, within the instruction of its kind."""
    around = instruction(loaded.family, kind_of(task, dataset.data_type), dataset.prompts, thinking)
    return encode_prompt(loaded, task.question, around, thinking)


def kind_of(task: Task, data_type: str) -> str:
    """Which instruction a task has: its data type's, code tasks by how their program is tested."""
    return f"code_{task.record.get('test_method') or 'function'}" if data_type == "code" else data_type


def collect(
    engine: Engine,
    loaded: LoadedModel,
    prompts: Sequence[tuple[Task, list[int]]],
    settings: TaskSampling,
    scorer: Scorer,
    watch: Stopwatch,
    seed: int,
    step: int = 0,
    description: str = "rollout",
    known: Mapping[tuple[str, int], ScoredTrajectory] | None = None,
    keep: Callable[[ScoredTrajectory], None] | None = None,
) -> list[list[ScoredTrajectory]]:
    """Draw `num_response_per_task` responses to each task and score them; one group per task, in the given order.

    Ranks share the requests by what is left of them, and all have all the groups in the end. Raises Stopped, on every
    rank, where the run is to end. Tasks that the engine refuses, because its cache could never hold them, have no
    group; UserError if all are.
    Scoring runs beside the drawing of further responses. Time goes to the stages "rollout" and "reward" of `watch`:
    the latter is what scoring held up the rollout and what was waited for at the end. Responses `known` already, by
    (task id, sample), are not drawn again; `keep` is called with every other one, this rank's own once they are scored.
    """
    samples, known = settings.num_response_per_task, known or {}
    groups = [[known.get((task.id, sample)) for sample in range(samples)] for task, _ in prompts]
    requests = missing_requests(prompts, groups, seed, step)
    tensor_group = engine.tensor_group
    queue = Queue(requests, shared=True, tensor_group=tensor_group)
    place = {task.id: number for number, (task, _) in enumerate(prompts)}
    submit = submitter(scorer)
    waiting: deque[tuple[ScoredTrajectory, Future[Score]]] = deque()
    before = watch.seconds.get("rollout", 0.0)
    scored: list[ScoredTrajectory] = []

    def settle() -> None:
        rollout, score = waiting.popleft()
        rollout.score = score.result()
        scored.append(rollout)
        if keep is not None:
            keep(rollout)

    with progress(description, len(requests)) as advance, suppress(Stopped):
        stops = stop_ids_of(loaded, settings.stop_token_list)
        drawn = engine.generate(queue, settings, on_step=lambda: stop_if_asked(tensor_group), stop_ids=stops)
        for trajectory in timed(drawn, watch, "rollout"):
            advance()
            if trajectory.finish_reason == "refused" or not is_first_of_tensor_group(tensor_group):
                continue
            with watch("reward"):
                task = prompts[place[trajectory.task_id]][0]
                ids = trajectory.response_ids[: trajectory.length]
                text = trajectory.text = loaded.tokenizer.decode(ids, skip_special_tokens=True)
                if isinstance(scorer, RewardScorer) and scorer.needs_tokens:
                    text = Response.of(text, loaded.tokenizer.batch_decode([[one] for one in ids]))
                score = submit(text, task, trajectory.finish_reason == "length")
                now = watch.seconds["rollout"]
                waiting.append((ScoredTrajectory(task, trajectory, UNSCORED, seconds=now - before), score))
                before = now
                while waiting and waiting[0][-1].done():
                    settle()
    with progress("scoring", len(waiting)) as advance, watch("reward"):
        while waiting and not stop_requested():
            settle()
            beat()
            advance()
    with watch("rollout"):  # where other ranks are still at it
        parts = gather((scored, stop_requested()))
        if any(stopped for _, stopped in parts):
            raise Stopped
    own = {(rollout.task.id, rollout.trajectory.sample) for rollout in scored}
    for rollout in itertools.chain.from_iterable(part for part, _ in parts):
        groups[place[rollout.task.id]][rollout.trajectory.sample] = rollout
        if keep is not None and (rollout.task.id, rollout.trajectory.sample) not in own:
            keep(rollout)
    groups = [group for group in groups if None not in group]  # a prompt is refused with all its samples
    if prompts and not groups:
        raise UserError("every request was refused: raise rollout.cache_tokens, or lower max_prompt_len (said above)")
    tell_unscored(groups)
    return groups


def missing_requests(
    prompts: Sequence[tuple[Task, list[int]]], groups: Sequence[Sequence[ScoredTrajectory | None]], seed: int, step: int
) -> list[Request]:
    """A request for every response that is not there yet."""
    return [
        Request(task.id, ids, sample, seed, step)
        for (task, ids), group in zip(prompts, groups)
        for sample, known in enumerate(group)
        if known is None
    ]


def tell_unscored(groups: Sequence[Sequence[ScoredTrajectory]]) -> None:
    """Say how many responses a failed sandbox or judge left without a score."""
    unknown = sum(rollout.score.verdict == "infrastructure" for group in groups for rollout in group)
    if unknown:
        total = sum(map(len, groups))
        console.print(f"{unknown} of {total} responses could not be scored (infrastructure) and earn nothing")


def stop_if_asked(tensor_group: int) -> None:
    """Called at every denoising step by all ranks of a tensor group. Raises Stopped on all where the run is to end."""
    beat()
    if any_of_tensor_group(stop_requested(), tensor_group):
        raise Stopped
