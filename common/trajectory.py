"""The records that travel from a prompt to a weight update: Task, Request, Trajectory, Score, ScoredTrajectory."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Self

import numpy as np


@dataclass
class Task:
    """One question with what its answer is checked against."""

    id: str
    question: str
    ground_truth_answer: str | None = None
    record: dict[str, Any] = field(default_factory=dict)  # the data set's own record, other fields included

    @property
    def prefix(self) -> str:
        """What begins the answer to a code task, a fence or a function's head, without its last newline."""
        return str(self.record.get("prefix") or "").removesuffix("\n")


@dataclass(frozen=True)
class Request:
    """One response to draw: the prompt's ids and the names from which its random numbers derive."""

    task_id: str
    prompt_ids: list[int]
    sample: int = 0
    seed: int = 0
    step: int = 0  # RL step; draws differ from step to step
    keep_routes: bool = False  # the trajectory is to say which experts its tokens were given to

    def stream_key(self) -> int:
        """A signed 64-bit key of (seed, step, task, sample): the same wherever and beside whatever it is drawn."""
        text = f"{self.seed}\x1f{self.step}\x1f{self.task_id}\x1f{self.sample}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


class Writing(NamedTuple):
    """One token that was written and overwritten later; a revocation writes the mask token, with logp 0."""

    step: int
    position: int  # into the response
    token: int
    logp: float


class Segment(NamedTuple):
    """A part of a response's denoising steps, to the next one's start, that the weights of one RL step drew."""

    rl_step: int
    start: int  # denoising step


@dataclass(frozen=True)
class Routes:
    """Which experts the sampler's forwards gave a response's tokens to, layer by layer, in the routers' order.

    uint8, int16 where there are more than 256 experts. Layers without experts have no place.
    """

    committed: np.ndarray  # (prompt + response, layers, chosen) in the forward that made a token's keys; last block: 0
    steps: np.ndarray  # (denoising steps, block, layers, chosen) of the block that was denoised


MAY_BE_ABSENT = ("overwritten", "segments", "routes")  # of a trajectory's line in a file


@dataclass
class Trajectory:
    """A drawn response with its trace; token ids end to end, the final block whole.

    step_map[i] is the denoising step, counted over the response, at which response token i was last written (-1:
    never). logp[i] is log_softmax(logits / T) of that token at that step, the mask token at minus infinity. What was
    written before stands in `overwritten`; where nothing was, the step map is the whole trace.
    """

    task_id: str
    sample: int
    prompt_ids: list[int]
    response_ids: list[int]
    step_map: list[int]
    logp: list[float]
    confidence: list[float]
    kept_mass: float  # mean probability that top-k and top-p left to draw from
    # "stop": a stop token; "length": the limit; "edits": no room for more that is overwritten; "refused": never drawn,
    # the cache is too small
    finish_reason: str
    length: int  # response tokens through the stop token, at most the limit
    steps: int  # denoising forwards
    forwards: int  # denoising and commit forwards, prefill apart
    temperature: float
    text: str = ""
    overwritten: list[Writing] = field(default_factory=list)  # in order of (step, position)
    segments: list[Segment] = field(default_factory=list)  # of a response that may outlive an RL step, in order
    routes: Routes | None = field(default=None, compare=False, repr=False)  # where the request asked for them

    @property
    def truncated(self) -> bool:
        """Whether it ended by no stop token: at the limit, or for want of room for what is overwritten."""
        return self.finish_reason in ("length", "edits")

    def drawn_by(self, rl_step: int) -> int:
        """The denoising step from which the weights of that RL step, the last that drew any of it, drew it.

        Behind the last step where they drew nothing.
        """
        if not self.segments:
            return 0
        last = self.segments[-1]
        return last.start if last.rl_step == rl_step else self.steps

    def line(self) -> dict[str, Any]:
        """The fields for a JSON file; `overwritten` and `segments` are left out where empty, `routes` always."""
        left_out = {name for name in MAY_BE_ABSENT if name == "routes" or not getattr(self, name)}
        return {name: value for name, value in vars(self).items() if name not in left_out}

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Self:
        """The trajectory in a line of a JSON file; lists that were left out are empty."""
        empty = {one.name: [] if "list" in str(one.type) else None for one in fields(cls)}
        trajectory = cls(**{name: line.get(name, default) for name, default in empty.items()})
        trajectory.overwritten = [Writing(*writing) for writing in trajectory.overwritten]
        trajectory.segments = [Segment(*segment) for segment in trajectory.segments]
        return trajectory


@dataclass(frozen=True)
class Score:
    """What a response earned. `reward` is raw and never normalised; `verdict` says why.

    Verdicts: passed, failed, no_answer, truncated; of programs also timeout, memory, output_limit and crashed; and
    infrastructure, where nothing is known of the response because a sandbox or a judge failed.
    """

    reward: float
    correct: bool
    verdict: str
    token_rewards: list[float] | None = None  # process rewards, one for each response token; reward is their mean
    # of each chunk that a judge voted on: the index behind its last token, and 1 or -1 where its votes agree, else 0
    chunk_votes: list[tuple[int, int]] | None = None


@dataclass
class ScoredTrajectory:
    """A response to a task with what it earned, and the advantage of its reward within the task's group."""

    task: Task
    trajectory: Trajectory
    score: Score
    advantage: float = 0.0
    seconds: float = 0.0  # of sampling, since the response that finished before


class Response(str):
    """A response's text, with the pieces of text that its tokens stand for where they are known."""

    tokens: list[str] | None = None

    @classmethod
    def of(cls, text: str, tokens: list[str]) -> Self:
        """The text with its tokens."""
        response = cls(text)
        response.tokens = tokens
        return response
