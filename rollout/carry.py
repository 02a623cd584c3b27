"""Groups of responses that may outlive the RL step in which they were begun, and what says when a step is complete.

The rule knows of responses alone, so that any number of ranks comes to the same groups and the same tokens. Responses
begin in one order, each when one of `Rule.seats` seats is free, whichever rank has it. All that have a seat make
`Rule.stride` denoising steps; then all ranks learn who is done, and seats that are free are taken by the next. The step
ends at the first such look at which it has its groups: the oldest that are complete, where those that are left may
wait. Nobody makes a denoising step more than the rule gives them, so a response that goes on in the next step does so
from the same place wherever it is drawn.
"""

import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError, show
from common.ranks import add_up, gather, is_first_of_tensor_group, rank, world
from common.runtime import Stopwatch, console
from common.schema import RolloutConfig, TaskSampling
from common.stop import Stopped, beat, stop_requested
from common.trajectory import Request, Routes, Score, ScoredTrajectory, Segment, Task, Trajectory, Writing
from models import LoadedModel
from models.prompts import stop_ids_of
from reward.score import RewardScorer
from rollout.collect import say_unscored, with_scores, with_texts
from rollout.fingerprint import SPEED_ONLY
from sample.engine import Engine
from sample.slots import Unfinished

LONGEST_STRIDE = 16  # denoising steps; a seat that is free stays empty for half of them
LOOKS = 256  # that the longest response takes at least, where it makes a denoising step for each token
DONE, REFUSED = 1, 2  # what became of a response


@dataclass(frozen=True, eq=False)
class Group:
    """A task's responses, of which some may be done and some begun."""

    task: Task
    prompt_ids: list[int]
    step: int  # RL step that began it, from which its draws' random numbers derive
    cursor: int = 0  # place behind it in the endless sequence of tasks
    done: dict[int, ScoredTrajectory] = field(default_factory=dict)  # by sample
    begun: dict[int, Unfinished] = field(default_factory=dict)
    segments: dict[int, list[Segment]] = field(default_factory=dict)  # of those that are begun


@dataclass(frozen=True)
class Rule:
    """When an RL step is complete."""

    step: int  # the RL step, counted from 1
    wanted: int  # groups that a step trains
    samples: int  # responses of a group
    seats: int  # responses that are drawn at once, over all ranks
    stride: int  # denoising steps between two looks at who is done
    carries: bool  # whether groups go on in the next step; else those that are left are dropped
    spare: int  # groups begun beyond those wanted, where none goes on
    ahead: int  # steps for which groups are begun, beside this one
    last: int  # RL step by which all that is begun must be trained, as blocks change behind it
    stale: int  # steps for which a group may wait

    @classmethod
    def of(cls, rollout: RolloutConfig, step: int) -> Self:
        """The rule of an RL step. UserError where a rank cannot draw its part of the responses at once."""
        wanted, samples = rollout.num_task_per_step, rollout.num_response_per_task
        seats = rollout.in_flight or (wanted + rollout.spare) * samples
        teams = world() // rollout.tensor_parallel_size
        if -(-seats // teams) > rollout.max_active:
            what = f"rollout.in_flight={seats}" + ("" if rollout.in_flight else " (the responses of a step)")
            raise UserError(
                f"{what} over {teams} sampling networks is more than rollout.max_active={rollout.max_active} of each: "
                "raise max_active, or set a smaller in_flight"
            )
        last = rollout.settled_until(step)
        last = step + rollout.max_stale_steps if last is None else last
        return cls(
            step,
            wanted,
            samples,
            seats,
            stride=min(LONGEST_STRIDE, max(1, rollout.max_token // LOOKS)),
            carries=rollout.carry,
            spare=rollout.spare,
            ahead=min(rollout.max_stale_steps, last - step) if rollout.carry else 0,
            last=last,
            stale=rollout.max_stale_steps,
        )

    def most_groups(self, count: int) -> int:
        """How many groups may be begun or complete while `count` are to be taken: all can be trained in time."""
        return count + self.spare + self.wanted * self.ahead

    def may_wait(self, left: Mapping[int, int], now: int = 0) -> bool:
        """Whether groups may be left to later steps, none of which trains more than are wanted, and none too late.

        `left` counts them by the step that began them. `now`: 1 where this step trains as many too.
        """
        if not self.carries:
            return True
        waits: Counter[int] = Counter()
        for step, count in left.items():
            waits[min(step + self.stale, self.last) - self.step] += count
        return all(
            sum(count for other, count in waits.items() if other <= wait) <= self.wanted * max(0, wait + now)
            for wait in waits
        )


@dataclass(frozen=True)
class Taken:
    """What a step got, and what is left to later ones."""

    groups: list[list[ScoredTrajectory]]
    left: list[Group]  # none where the rule carries none
    cursor: int  # place behind the last task that was begun
    steps: int  # denoising steps of all responses
    room: int  # denoising steps for which there were seats


def take_groups(
    engine: Engine,
    loaded: LoadedModel,
    groups: Sequence[Group],
    count: int,
    rule: Rule,
    settings: RolloutConfig,
    scorer: RewardScorer,
    watch: Stopwatch,
    seed: int,
    description: str = "rollout",
    keep_routes: Callable[[int], bool] = lambda sample: False,
) -> Taken:
    """Draw the groups' responses, in their order, until `count` groups are complete as the rule says.

    All ranks must call it with the same groups, and all have what is taken and what is left. Raises Stopped, on every
    rank, where the run is to end; UserError where the engine refuses all requests. Time goes to the stages "rollout"
    and "reward" of `watch`, and scoring runs beside, as in `collect`.
    """
    seating = Seating(engine, groups, count, rule, seed, keep_routes)
    engine.set_up(
        settings, seating.requests, stop_ids_of(loaded, settings.stop_token_list), pace=-(-rule.seats // seating.teams)
    )
    tasks = {group.task.id: group.task for group in groups}
    responses = with_texts(seating.trajectories(), engine, loaded, tasks, watch)
    own = with_scores(responses, count * rule.samples, description, loaded, settings, scorer, watch)
    unfinished = engine.suspend()
    if not is_first_of_tensor_group(engine.tensor_group):
        unfinished = []
    with watch("rollout"):  # where other ranks are still at it
        parts = gather((own, unfinished, stop_requested()))
    if any(stopped for *_, stopped in parts):
        raise Stopped
    groups, steps = seating.after(
        [response for responses, *_ in parts for response in responses], [one for _, ones, _ in parts for one in ones]
    )
    complete = seating.complete()[:count]
    if groups and not complete:
        raise UserError("every request was refused: raise rollout.cache_tokens, or lower max_prompt_len (see above)")
    taken = [[groups[number].done[sample] for sample in range(rule.samples)] for number in complete]
    say_unscored(taken)
    left = [groups[number] for number in seating.open(complete)] if rule.carries else []
    cursor = max((group.cursor for group in groups[: seating.started]), default=0)
    return Taken(taken, left, cursor, steps, rule.seats * rule.stride * seating.looks)


class Seating:
    """Which responses of some groups have seats under a rule, in step with the other ranks: all know who is done."""

    def __init__(
        self,
        engine: Engine,
        groups: Sequence[Group],
        count: int,
        rule: Rule,
        seed: int,
        keep_routes: Callable[[int], bool],
    ):
        self.engine, self.groups, self.count, self.rule = engine, groups, count, rule
        self.teams = world() // engine.tensor_group
        self.places = [
            (number, sample)
            for number, group in enumerate(groups)
            for sample in range(rule.samples)
            if sample not in group.done
        ]
        places = ((groups[number], sample) for number, sample in self.places)
        self.requests = [
            Request(one.task.id, one.prompt_ids, sample, seed, one.step, keep_routes(sample)) for one, sample in places
        ]
        self.missing = Counter(number for number, _ in self.places)  # responses of each group
        self.begun = 0  # places
        # groups, which come in the order in which they are begun
        self.started = sum(bool(group.done or group.begun) for group in groups)
        self.active: dict[int, int] = {}  # places → who draws them
        self.own: dict[int, int] = {}  # the engine's ids → places
        self.refused: set[int] = set()  # groups
        self.looks = 0

    def trajectories(self) -> Iterator[Trajectory]:
        """This rank's, as they are done, and those that are refused. Raises Stopped, on all ranks, where asked to."""
        while not self.is_over():
            self.fill_seats()
            news = torch.zeros(len(self.places) + 1, dtype=torch.long)
            self.engine.allow(self.rule.stride)
            while not self.engine.paused:
                self.engine.step()
                beat()
                for finished in self.engine.finished():
                    news[self.own.pop(finished.id)] = DONE if finished.refusal is None else REFUSED
                    yield finished.trajectory
            self.look(news)

    def fill_seats(self) -> None:
        """Begin responses while there are seats; each goes to who draws the fewest."""
        load = Counter(self.active.values())
        while len(self.active) < self.rule.seats and self.begun < len(self.places):
            place = self.begun
            number, sample = self.places[place]
            self.begun += 1
            self.started = max(self.started, number + 1)
            if number in self.refused:
                continue
            team = min(range(self.teams), key=lambda one: (load[one], one))
            load[team] += 1
            self.active[place] = team
            if team == rank() // self.engine.tensor_group:
                unfinished = self.groups[number].begun.get(sample)
                request = self.requests[place]
                id = self.engine.add(request)[0] if unfinished is None else self.engine.go_on(unfinished)
                self.own[id] = place

    def look(self, news: Tensor) -> None:
        """Tell the other ranks what became of this one's responses, and learn of theirs; (places + 1,).

        The last entry says that the run is to end.
        """
        if not is_first_of_tensor_group(self.engine.tensor_group):
            news.zero_()
        news[-1] = stop_requested()
        add_up(news)
        if news[-1]:
            raise Stopped
        self.looks += 1
        for place in news[:-1].nonzero()[:, 0].tolist():
            number, _ = self.places[place]
            del self.active[place]
            self.missing[number] -= 1
            if news[place] == REFUSED:
                self.refused.add(number)

    def complete(self) -> list[int]:
        """The groups that are, the oldest first."""
        return [n for n in range(len(self.groups)) if self.missing[n] == 0 and n not in self.refused]

    def is_over(self) -> bool:
        """Whether the groups that are to be taken are complete, and the others may wait; or nothing is left to draw."""
        if self.begun == len(self.places) and not self.active:
            return True
        complete = self.complete()[: self.count]
        if len(complete) < self.count:
            return False
        return self.rule.may_wait(Counter(self.groups[number].step for number in self.open(complete)))

    def open(self, taken: Sequence[int]) -> list[int]:
        """The groups that were begun, without those that are taken or refused."""
        return sorted(set(range(self.started)) - self.refused - set(taken))

    def after(self, done: Sequence[ScoredTrajectory], unfinished: Sequence[Unfinished]) -> tuple[list[Group], int]:
        """The groups with what was drawn of them, and the denoising steps that were made."""
        numbers = {group.task.id: number for number, group in enumerate(self.groups)}
        now, steps = [replace(group, done=dict(group.done), begun={}, segments={}) for group in self.groups], 0

        def segments_of(number: int, sample: int) -> list[Segment]:
            before, begun = self.groups[number].segments.get(sample, []), self.groups[number].begun.get(sample)
            return [*before, Segment(self.rule.step, 0 if begun is None else begun.steps)]

        for response in done:
            trajectory = response.trajectory
            number, sample = numbers[trajectory.task_id], trajectory.sample
            now[number].done[sample] = replace(response, task=self.groups[number].task)
            segments = segments_of(number, sample)
            steps += trajectory.steps - segments[-1].start
            if self.rule.carries:
                trajectory.segments = segments
        for one in unfinished:
            number, sample = numbers[one.request.task_id], one.request.sample
            now[number].begun[sample] = one
            now[number].segments[sample] = segments_of(number, sample)
            steps += one.steps - now[number].segments[sample][-1].start
        return now, steps


# ---- figures


def carried_figures(responses: Sequence[ScoredTrajectory], step: int) -> dict[str, float]:
    """How old the weights are that drew what RL step `step` trains on, over response tokens through the stop token.

    staleness and staleness_max: in RL steps; carried_tokens: the share that older weights drew. Empty where no response
    may outlive a step.
    """
    if not any(response.trajectory.segments for response in responses):
        return {}
    ages = np.concatenate([token_ages(response.trajectory, step) for response in responses])
    return {
        "staleness": float(ages.mean()),
        "staleness_max": int(ages.max()),
        "carried_tokens": float((ages > 0).mean()),
    }


def token_ages(trajectory: Trajectory, step: int) -> np.ndarray:
    """By how many RL steps the weights that drew each token are older than those of `step`, (length,)."""
    starts = [segment.start for segment in trajectory.segments]
    drawn_by = np.array([segment.rl_step for segment in trajectory.segments])
    steps = np.array(trajectory.step_map[: trajectory.length])
    return step - drawn_by[np.searchsorted(starts, np.maximum(steps, 0), side="right") - 1]


# ---- in a checkpoint

RECORDS = (Group, Request, Routes, Score, ScoredTrajectory, Segment, Task, Trajectory, Unfinished, Writing)
ARRAYS = (np.ndarray, np.dtype, np.dtypes.UInt8DType, np.dtypes.Int16DType, np._core.multiarray._reconstruct)


def write_groups(file: Path, groups: Sequence[Group], rollout: RolloutConfig) -> None:
    """Write the groups, and the settings that they are drawn under."""
    buffer = io.BytesIO()  # torch's own file has errors of its own for a full disk
    torch.save((drawn_under(rollout), list(groups)), buffer)
    file.write_bytes(buffer.getvalue())


def read_groups(file: Path, rollout: RolloutConfig, tasks: Iterable[Task], step: int) -> list[Group]:
    """The groups that were written, with which that RL step begins.

    None, and why is said, where they cannot go on under the present settings.
    """
    with torch.serialization.safe_globals([*RECORDS, *ARRAYS]):
        settings, groups = torch.load(file, weights_only=True)
    now = drawn_under(rollout)
    known = {task.id for task in tasks}
    faults = [f"rollout.{name} was {show(value)}" for name, value in settings.items() if now[name] != value]
    if any(group.task.id not in known for group in groups):
        faults.append("dataset.train_dataset has not all of their tasks")
    if not rollout.carry:
        faults.append("rollout.carry is off")
    elif not Rule.of(rollout, step).may_wait(Counter(group.step for group in groups), now=1):
        faults.append("rollout.max_stale_steps or num_task_per_step leaves no step to train on them")
    if groups and faults:
        console.print(f"{len(groups)} groups of responses that no step has trained on are dropped: {', '.join(faults)}")
        return []
    return groups


def drawn_under(rollout: RolloutConfig) -> dict[str, Any]:
    """The settings on which responses depend, whatever the order in which they are drawn."""
    names = {one.name for one in fields(TaskSampling)} - {*SPEED_ONLY, "compile_kernels"}
    return {name: getattr(rollout, name) for name in sorted(names)}
