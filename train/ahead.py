"""Rollout apart from training: engines elsewhere draw a step's responses while the step before is trained.

w_s are the weights after step s; every response is drawn by one version of them, the last but one at the oldest:

    engines   draw 1, w_0 | draw 2, w_0 | draw 3, w_1 | draw 4, w_2 | …
    trainer               | train 1     | train 2     | train 3     | …

At each bar the trainer waits for the responses, sends its weights, and hands out the next step's requests. Rank 0
speaks with the engines, in a thread of its own; the other ranks learn from it what came of it.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from common.ranks import alone, from_main, is_main
from common.runtime import Stopwatch
from common.schema import Sampling
from common.stop import Stopped, beat
from common.trajectory import Request, Trajectory

T = TypeVar("T")
LOOK_EVERY = 1.0  # seconds after which ranks that wait for responses say that they are there


class Engines(Protocol):
    """Engines elsewhere, as rank 0 uses them; a response's segment says which step's weights drew it."""

    tensor_group: int
    idle_since: float | None  # when the last response came; None: more are being drawn

    def generate(
        self,
        requests: Iterable[Request],
        settings: Sampling,
        on_step: Callable[[], None] | None = None,
        stop_ids: Iterable[int] | None = None,
    ) -> Iterator[Trajectory]:
        """Yield a trajectory for every request."""

    def send(self, names: Sequence[str], weights: Iterator[tuple[str, Tensor]], step: int) -> int | None:
        """Give all engines the weights with which RL step `step` begins; the bytes sent, None where one was lost.

        All of `weights` is gone through, whose names come in that order. UserError where there is no engine.
        """

    def keep_weights(self, step: int) -> None:
        """Let the weights that the engines have be those with which RL step `step` begins too."""

    def newcomers(self) -> bool:
        """Whether an engine is ready that has no weights yet."""

    def wants_weights(self) -> bool:
        """Whether responses wait for them: no engine has any, and one is ready."""


class Ahead(Generic[T]):
    """What a run's ranks know of engines elsewhere, and of what these draw. All ranks must make the same calls."""

    def __init__(self, engines: Engines | None, weights: Callable[[], Iterator[tuple[str, Tensor]]], last: int):
        """`engines` are rank 0's; `weights` goes through the trainer's, by all ranks; `last` is the last step drawn."""
        self.engines, self.weights, self.last = engines, weights, last
        self.names = [name for name, _ in weights()]  # in their order, which engines are told once
        self.thread = None if engines is None else ThreadPoolExecutor(1)
        self.job: Future | None = None  # of the thread
        self.begun = False  # whether a job's result is to be waited for
        self.drawn: T | None = None  # the next step's, where an evaluation had to wait for it
        self.changed = True  # whether the trainer's weights are others than the engines'
        self.bytes_sent = 0  # since the step began

    def take(self, step: int, draw: Callable[[int, T | None], T], watch: Stopwatch) -> T:
        """What `draw(step, what the step before drew)` returned on rank 0; from now on the next step's is drawn.

        Time goes to the stages "wait" and "sync". Raises Stopped, on all ranks, where the run is to end.
        """
        self.bytes_sent = 0
        if self.drawn is None and not self.begun:  # the first step since the program began
            self.begin(partial(draw, step, None))
        self.settle(step, watch)
        drawn, self.drawn = self.drawn, None
        if step < self.last:
            self.begin(partial(draw, step + 1, drawn))
        return drawn

    def by_present_weights(self, step: int, job: Callable[[], Any]) -> Any:
        """What the job returns, as an evaluation before step `step` does: the engines draw nothing beside it."""
        watch = Stopwatch()
        self.settle(step, watch)
        self.begin(job)
        return self.wait(step, watch)

    def settle(self, step: int, watch: Stopwatch) -> None:
        """Wait for what is being drawn; then give the engines the weights with which step `step` begins."""
        if self.begun:
            self.drawn = self.wait(step, watch)
        self.send(step, watch)

    def begin(self, job: Callable[[], Any]) -> None:
        """Let rank 0's thread do it, which is a rank alone."""
        self.begun = True
        if self.thread is not None:
            self.job = self.thread.submit(done_alone, job)

    def wait(self, step: int, watch: Stopwatch) -> Any:
        """The job's result, on all ranks. Meanwhile engines that are all new are given the weights of step `step`."""
        while True:
            with watch("wait"):
                state = from_main(self.look())
            beat()
            if state == "stopped":
                raise Stopped
            if state == "done":
                break
            if state == "weights":
                self.send(step, watch)
        self.begun = False
        with watch("wait"):
            return from_main(None if self.job is None else self.job.result())

    def look(self) -> str | None:
        """How the job stands, on rank 0; what it raised is raised here."""
        if self.job is None:
            return None
        done, _ = wait_for([self.job], timeout=LOOK_EVERY)
        if not done:
            return "weights" if self.engines.wants_weights() else "under way"
        error = self.job.exception()
        if error is not None and not isinstance(error, Stopped):
            raise error
        return "done" if error is None else "stopped"

    def send(self, step: int, watch: Stopwatch) -> None:
        """Give the engines the trainer's weights, with which step `step` begins, unless all have them."""
        if not from_main(self.changed or (self.engines is not None and self.engines.newcomers())):
            if self.engines is not None:
                self.engines.keep_weights(step)
            return
        sent = None
        with watch("sync"):
            while sent is None:
                weights = self.weights()
                if is_main():
                    sent = self.engines.send(self.names, weights, step)
                else:
                    for _ in weights:  # which all ranks gather
                        beat()
                sent = from_main(sent)
        self.changed = False
        self.bytes_sent += sent

    def figures(self, began: float) -> dict[str, float]:
        """Of a step whose training began then and is done: bytes sent, and the share of that time when engines drew."""
        if self.engines is None:
            return {}
        now, until = time.perf_counter(), self.engines.idle_since
        beside = (now if until is None else min(until, now)) - began
        return {"bytes_sync": self.bytes_sent, "overlap": max(0.0, beside) / (now - began)}


def done_alone(job: Callable[[], T]) -> T:
    """The job's result, where this thread's rank is the only one."""
    with alone():
        return job()
