"""The rollout: prompts are encoded, the engine draws responses, and each is scored while others are drawn."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress

from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from common.ranks import Queue, any_of_tensor_group, gather, is_first_of_tensor_group, rank
from common.runtime import Stopwatch, console, progress, timed
from common.schema import EvalDatasetConfig, TaskSampling
from common.stop import Stopped, beat, stop_requested
from common.trajectory import Request, Response, Score, ScoredTrajectory, Task, Trajectory
from data.tasks import worked_examples
from models import Family, LoadedModel
from models.prompts import stop_ids_of, task_text
from models.tokenizer import check_readable, unknown_token
from reward.score import RewardScorer
from sample.engine import Engine

Prompt = tuple[Task, list[int]]  # a task and the ids of its prompt
UNSCORED = Score(0.0, False, "infrastructure")


def encode_tasks(
    loaded: LoadedModel, tasks: Sequence[Task], dataset: EvalDatasetConfig, thinking: bool
) -> list[Prompt]:
    """Every task with its prompt ids, worded as its kind asks for; `thinking` begins the answer by <think>."""
    texts = prompt_texts(loaded.tokenizer, loaded.family, tasks, dataset, thinking)
    return [(task, loaded.tokenizer.encode(text, add_special_tokens=False)) for task, text in zip(tasks, texts)]


def check_questions(loaded: LoadedModel, tasks: Sequence[Task], key: str) -> None:
    """UserError where a question of the data set `key` has characters that the tokenizer has no token for."""
    if unknown_token(loaded.tokenizer) is not None:
        for task in tasks:
            check_readable(loaded.tokenizer, task.question, f"{key}: task {task.id}")


def say_unread_words(loaded: LoadedModel, prompt: Prompt) -> None:
    """Say where the words around a question, which the tokenizer reads, have characters that it has no token for."""
    if unknown_token(loaded.tokenizer) in prompt[1]:
        console.print(
            "the words around the questions have characters that the model has no token for; bare questions are "
            "dataset.prompt_style=template dataset.prompts.math={question}"
        )


def prompt_texts(
    tokenizer: PreTrainedTokenizerBase,
    family: Family,
    tasks: Sequence[Task],
    dataset: EvalDatasetConfig,
    thinking: bool,
) -> list[str]:
    """The whole prompt of every task, as `encode_tasks` encodes it, worked examples included."""
    examples = worked_examples(dataset.few_shot_dataset, dataset.few_shot)
    return [
        task_text(tokenizer, family, task, kind_of(task, dataset.data_type), dataset, thinking, examples)
        for task in tasks
    ]


def kind_of(task: Task, data_type: str) -> str:
    """Which instruction a task has: its data type's, code tasks by how their program is tested."""
    return f"code_{task.record.get('test_method') or 'function'}" if data_type == "code" else data_type


def prompts_within(prompts: Sequence[Prompt], max_prompt_len: int) -> list[Prompt]:
    """The prompts of at most `max_prompt_len` tokens; how many were longer is printed."""
    kept = [(task, ids) for task, ids in prompts if len(ids) <= max_prompt_len]
    if len(kept) < len(prompts):
        longest = max(len(ids) for _, ids in prompts)
        console.print(
            f"{len(prompts) - len(kept)} of {len(prompts)} tasks not drawn: their prompts exceed "
            f"max_prompt_len {max_prompt_len} (longest {longest})"
        )
    return kept


def collect(
    engine: Engine,
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    settings: TaskSampling,
    scorer: RewardScorer,
    watch: Stopwatch,
    seed: int,
    step: int = 0,
    description: str = "rollout",
    known: Mapping[tuple[str, int], ScoredTrajectory] | None = None,
    keep: Callable[[ScoredTrajectory], None] = lambda response: None,
    keep_routes: Callable[[int], bool] = lambda sample: False,
) -> list[list[ScoredTrajectory]]:
    """Draw `num_response_per_task` responses to each task and score them; one group per task, in the given order.

    Ranks share the requests, each taking more as it gets free, and all have all the groups in the end. Raises Stopped,
    on every rank, where the run is to end. Tasks that the engine refuses, because its cache could never hold them, have
    no group; UserError if all are.
    Scoring runs beside the drawing of further responses. Time goes to the stages "rollout" and "reward" of `watch`:
    the latter is what scoring held up the rollout and what was waited for at the end. Responses `known` already, by
    (task id, sample), are not drawn again; `keep` is called with every other one, this rank's own as soon as they are
    scored. The n-th response to a task says which experts its tokens were given to where `keep_routes(n)`.
    """
    known = known or {}
    samples = range(settings.num_response_per_task)
    requests = [
        Request(task.id, ids, sample, seed, step, keep_routes(sample))
        for task, ids in prompts
        for sample in samples
        if (task.id, sample) not in known
    ]
    tasks = {task.id: task for task, _ in prompts}

    def stop_if_asked() -> None:
        """Called at every denoising step by all ranks of a tensor group."""
        beat()
        if any_of_tensor_group(stop_requested(), engine.tensor_group):
            raise Stopped

    queue = Queue(requests, shared=True, tensor_group=engine.tensor_group)
    stop_ids = stop_ids_of(loaded, settings.stop_token_list)
    trajectories = engine.generate(queue, settings, on_step=stop_if_asked, stop_ids=stop_ids)
    responses = with_texts(trajectories, engine, loaded, tasks, watch)
    own = with_scores(responses, len(requests), description, loaded, settings, scorer, watch, keep)
    with watch("rollout"):  # where other ranks are still at it
        parts = gather((own, stop_requested()))
    if any(stopped for _, stopped in parts):
        raise Stopped
    found = dict(known)
    for number, (responses, _) in enumerate(parts):
        for response in responses:
            found[response.task.id, response.trajectory.sample] = response
            if number != rank():
                keep(response)
    groups = [[found.get((task.id, sample)) for sample in samples] for task, _ in prompts]
    groups = [group for group in groups if None not in group]  # a prompt is refused with all its samples
    if prompts and not groups:
        raise UserError("every request was refused: raise rollout.cache_tokens, or lower max_prompt_len (see above)")
    say_unscored(groups)
    return groups


def say_unscored(groups: Sequence[Sequence[ScoredTrajectory]]) -> None:
    """Say how many responses could not be scored, if any."""
    unscored = sum(response.score.verdict == "infrastructure" for group in groups for response in group)
    if unscored:
        total = sum(map(len, groups))
        console.print(f"{unscored} of {total} responses could not be scored (infrastructure) and earn nothing")


def with_texts(
    trajectories: Iterator[Trajectory],
    engine: Engine,
    loaded: LoadedModel,
    tasks: Mapping[str, Task],
    watch: Stopwatch,
) -> Iterator[ScoredTrajectory]:
    """The responses that this rank draws, with their texts, not scored yet; without those that are refused.

    Of ranks that draw together one gives them.
    """
    before = watch.seconds.get("rollout", 0.0)
    for trajectory in timed(trajectories, watch, "rollout"):
        if trajectory.finish_reason == "refused" or not is_first_of_tensor_group(engine.tensor_group):
            continue
        now = watch.seconds["rollout"]
        with watch("reward"):
            ids = trajectory.response_ids[: trajectory.length]
            trajectory.text = loaded.tokenizer.decode(ids, skip_special_tokens=True)
        yield ScoredTrajectory(tasks[trajectory.task_id], trajectory, UNSCORED, seconds=now - before)
        before = now


def with_scores(
    responses: Iterator[ScoredTrajectory],
    expected: int,
    description: str,
    loaded: LoadedModel,
    settings: TaskSampling,
    scorer: RewardScorer,
    watch: Stopwatch,
    keep: Callable[[ScoredTrajectory], None] = lambda response: None,
) -> list[ScoredTrajectory]:
    """Draw all the responses, about as many as `expected`, and score them beside.

    Where the run is to end, those that have a score so far.
    """
    scoring: deque[tuple[ScoredTrajectory, Future[Score]]] = deque()  # in the order in which they were drawn
    scored: list[ScoredTrajectory] = []

    def take_score() -> None:
        """Wait for the score of the response that was drawn first."""
        response, score = scoring.popleft()
        response.score = score.result()
        keep(response)
        scored.append(response)

    with progress(description, expected) as advance, suppress(Stopped):
        for response in responses:
            advance()
            with watch("reward"):
                trajectory = response.trajectory
                text = trajectory.text
                if scorer.needs_tokens:
                    ids = trajectory.response_ids[: trajectory.length]
                    text = Response.of(text, loaded.tokenizer.batch_decode([[token] for token in ids]))
                truncated = scorer.is_truncated(trajectory, settings.max_token)
                scoring.append((response, scorer.submit(text, response.task, truncated)))
                while scoring and scoring[0][1].done():
                    take_score()
    with progress("scoring", len(scoring)) as advance, watch("reward"):
        while scoring and not stop_requested():
            take_score()
            beat()
            advance()
    return scored
