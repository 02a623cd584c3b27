"""The groups of responses that an RL step draws, those of them that are learned from, and why there may be none."""

from functools import partial

from common.errors import UserError
from common.jobs import RLConfig
from common.runtime import Stopwatch
from common.trajectory import ScoredTrajectory, Task
from data.tasks import task_batch
from rollout.carry import Group, Rule, take_groups
from rollout.collect import Prompt, collect, encode_tasks, prompts_within
from train.objectives import kept_samples
from train.rl_run import Drawn, RLRun


def next_groups(run: RLRun, number: int, watch: Stopwatch) -> Drawn:
    """The step's groups, drawn now or beside the step before; the run's cursor moves on.

    Time goes to the stages "rollout" and "reward" of `watch`, or to "wait" and "sync".
    """
    if run.ahead is None:
        drawn = draw_groups(run, number, watch)
    else:
        drawn = run.ahead.take(number, partial(draw_beside, run), watch)
    # not before: a step that was stopped is done again when the run is resumed
    run.progress.cursor, run.carried = drawn.cursor, drawn.carried
    return drawn


def draw_beside(run: RLRun, number: int, before: Drawn | None) -> Drawn:
    """The groups of a step that comes behind what was drawn `before`, with the time that it took."""
    watch = Stopwatch()
    drawn = draw_groups(run, number, watch, before)
    drawn.seconds = watch.seconds
    return drawn


def draw_groups(run: RLRun, number: int, watch: Stopwatch, before: Drawn | None = None) -> Drawn:
    """Responses in groups for the step, and those that are learned from; `before`: what was drawn for the step before.

    Where the filter leaves no group, more tasks are drawn, up to `max_resample` times; with dynamic sampling until as
    many groups are kept as there were to be. UserError where every prompt is too long.
    """
    config, training = run.config, run.config.training
    wanted = config.rollout.num_task_per_step
    draw = draw_first if config.rollout.carry or config.rollout.spare else draw_all
    missing, drawn = wanted, Drawn(run.progress.cursor if before is None else before.cursor, run.carried)
    for _ in range(config.rollout.max_resample + 1):
        draw(run, number, missing, drawn, watch)
        drop_equal = training.drop_equal or training.dynamic_sampling
        drawn.samples = kept_samples(drawn.groups, training.keep_accuracy, drop_equal, training.advantage)
        kept = len({sample.trajectory.task_id for sample in drawn.samples})
        missing = wanted - kept if training.dynamic_sampling else wanted * (kept == 0)
        if missing == 0:
            break
    if not drawn.groups:
        raise UserError("training.max_prompt_len: every prompt of the step is longer; raise it")
    return drawn


def draw_all(run: RLRun, number: int, count: int, drawn: Drawn, watch: Stopwatch) -> None:
    """Draw the groups of the next `count` tasks, of which those that the step has drawn already are left out."""
    config = run.config
    indices, drawn.cursor = task_batch(len(run.tasks), count, drawn.cursor, config.training.seed)
    seen = {group[0].task.id for group in drawn.groups}
    tasks = [run.tasks[index] for index in dict.fromkeys(indices) if run.tasks[index].id not in seen]
    drawn.groups += collect(
        run.engine,
        run.loaded,
        prompts_of(run, tasks),
        config.rollout.at_step(number),
        run.scorer,
        watch,
        config.training.seed,
        number,
        f"step {number}: rollout",
        keep_routes=partial(keeps_routes, run),
    )


def draw_first(run: RLRun, number: int, count: int, drawn: Drawn, watch: Stopwatch) -> None:
    """Draw until `count` groups are complete, of those carried and of the next tasks, in this order."""
    config, rule = run.config, Rule.of(run.config.rollout, number)
    groups, seen = list(drawn.carried), {group[0].task.id for group in drawn.groups}
    seen |= {group.task.id for group in groups}
    cursor, end = drawn.cursor, drawn.cursor + len(run.tasks)
    while len(groups) < rule.most_groups(count) and cursor < end:
        batch = min(rule.most_groups(count) - len(groups), end - cursor)
        indices, _ = task_batch(len(run.tasks), batch, cursor, config.training.seed)
        places: dict[str, int] = {}
        for place, index in enumerate(indices, cursor + 1):
            places.setdefault(run.tasks[index].id, place)
        by_id = {run.tasks[index].id: run.tasks[index] for index in indices}
        new = prompts_of(run, [task for id, task in by_id.items() if id not in seen])
        groups += [Group(task, ids, number, places[task.id]) for task, ids in new]
        seen |= by_id.keys()
        cursor += batch
    taken = take_groups(
        run.engine,
        run.loaded,
        groups,
        count,
        rule,
        config.rollout.at_step(number),
        run.scorer,
        watch,
        config.training.seed,
        f"step {number}: rollout",
        keep_routes=partial(keeps_routes, run),
    )
    drawn.groups += taken.groups
    drawn.carried, drawn.cursor = taken.left, max(drawn.cursor, taken.cursor)
    drawn.steps += taken.steps
    drawn.room += taken.room


def prompts_of(run: RLRun, tasks: list[Task]) -> list[Prompt]:
    """The tasks with their prompts, without those that are too long."""
    config = run.config
    prompts = encode_tasks(run.loaded, tasks, config.dataset, config.rollout.start_with_think)
    return prompts_within(prompts, config.training.max_prompt_len)


def keeps_routes(run: RLRun, sample: int) -> bool:
    """Whether the n-th response to a task is to say which experts its tokens were given to."""
    return run.learner.routing is not None and (run.config.training.replay_routes or sample == 0)


def why_none_is_kept(config: RLConfig, groups: list[list[ScoredTrajectory]]) -> str:
    """In words, why no group of a step is learned from: its accuracies, and what they usually come from."""
    unequal = config.training.drop_equal or config.training.dynamic_sampling
    equal = " with rewards that differ" if unequal else ""
    shares = [sum(one.score.correct for one in group) / len(group) for group in groups]
    reason = (
        f"no group{equal} has an accuracy within training.keep_accuracy {config.training.keep_accuracy} "
        f"(they are {min(shares):.0%} to {max(shares):.0%}, {sum(shares) / len(shares):.0%} in the mean)"
    )
    if max(shares) == 0:
        cut = sum(one.trajectory.finish_reason == "length" for group in groups for one in group)
        count = sum(map(len, groups))
        return (
            f"{reason}: nothing is right. {cut} of {count} responses reached rollout.max_token; else look at "
            "dataset.data_type, at the prompts (python -m rollout.show_prompts) and at the run's rollouts/"
        )
    if min(shares) == 1:
        return f"{reason}: all is right; take harder tasks"
    return reason
