"""From the reward section of a config to a function that scores a response."""

import difflib
import functools
import math
import numbers
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import fields, replace
from typing import Any, Self

from common.errors import UserError, load_function
from common.schema import RewardConfig, RLRewardConfig, ScoringConfig
from common.trajectory import Response, Score, Task, Trajectory
from reward.code_reward import code_score
from reward.general_reward import general_score
from reward.judge import judged_score
from reward.math_reward import math_score
from reward.option_reward import LETTER, option_score
from reward.puzzles import PUZZLE_FAULTS, countdown_score, sudoku_score
from reward.workers import Workers

KINDS: dict[str, Callable[[str, Task, RewardConfig], Score]] = {
    "math": lambda text, task, reward: math_score(text, task.ground_truth_answer or ""),
    "code": code_score,
    "general": general_score,
    "option": lambda text, task, reward: option_score(text, task),
    "countdown": lambda text, task, reward: countdown_score(text, task),
    "sudoku": lambda text, task, reward: sudoku_score(text, task),
    "judge": lambda text, task, reward: judged_score(text, task, reward.judge),
}


class RewardScorer:
    """Scores responses as the reward section of a config says; made by `make_scorer`.

    Called, it scores here and now; `submit` has its processes do it, which `close` ends, or the end of a `with`.
    """

    def __init__(self, reward: RewardConfig, data_type: str | None) -> None:
        self.reward, self.data_type = reward, data_type
        self.kind = "function" if reward.function else reward.kind or data_type or "math"
        if reward.function:
            self._score = functools.partial(_own_score, load_function("reward.function", reward.function))
        else:
            self._score = KINDS[self.kind]
        self._workers: Workers | None = None

    @property
    def needs_tokens(self) -> bool:
        """Whether the text should come as a `Response`, with what each of its tokens stands for."""
        return bool(self.reward.function or self.reward.judge.base_url)

    def __call__(self, text: str, task: Task, truncated: bool) -> Score:
        if truncated:
            return Score(0.0, False, "truncated")
        scored = self._score(text, task, self.reward)
        if self.kind == "judge" or not self.reward.judge.base_url:
            return scored
        judged = judged_score(text, task, self.reward.judge)
        return replace(judged, correct=scored.correct, verdict=scored.verdict)

    def is_truncated(self, trajectory: Trajectory, limit: int) -> bool:
        """Whether a response earns nothing because it was cut at the limit of tokens, or is near it; in RL alone."""
        reward = self.reward
        if not isinstance(reward, RLRewardConfig) or not reward.truncated_is_wrong:
            return False
        near = reward.truncated_margin is not None and trajectory.length >= limit - reward.truncated_margin
        return near or trajectory.truncated

    def submit(self, text: str, task: Task, truncated: bool) -> Future[Score]:
        """Have a response scored by one of `reward.workers` processes, which are kept; at once where that is 0."""
        if not self.reward.workers:
            scored: Future[Score] = Future()
            scored.set_result(self(text, task, truncated))
            return scored
        if self._workers is None:
            self._workers = Workers(self.reward, self.data_type)
        return self._workers.submit(text, task, truncated)

    def close(self) -> None:
        """Drop what is not scored yet and end the processes; a response that comes later starts new ones."""
        if self._workers:
            self._workers.close()
        self._workers = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def make_scorer(reward: RewardConfig, data_type: str | None = None) -> RewardScorer:
    """A scorer of (response text, task, truncated: it earns nothing for its length) as the config asks for it.

    `reward.function` is the user's own; otherwise `reward.kind`, or else the type of the data, chooses from KINDS. A
    judge beside another kind gives the rewards, and the kind decides what is correct.
    """
    for key, kind in (("dataset.data_type", data_type), ("reward.kind", reward.kind)):
        if kind is not None and kind not in KINDS:
            close = difflib.get_close_matches(str(kind), KINDS, n=1)
            known = f"use {', '.join(KINDS)}, or reward.function for your own"
            raise UserError(f"{key}: '{kind}' is unknown; " + (f"did you mean '{close[0]}'?" if close else known))
    judge = reward.judge
    if (reward.kind or data_type) == "judge" and not judge.base_url:
        raise UserError("reward.kind=judge needs reward.judge.base_url, as http://127.0.0.1:8000/v1, and its model")
    if judge.base_url and not judge.model:
        raise UserError(f"reward.judge.model is empty: name the model that {judge.base_url} serves")
    if judge.model and not judge.base_url:
        raise UserError(
            f"reward.judge.model={judge.model} without reward.judge.base_url: serve the model "
            f"(vllm serve {judge.model}) and give its address, as http://127.0.0.1:8000/v1"
        )
    return RewardScorer(reward, data_type)


def kind_of(task: Task) -> str:
    """The kind of a task by what its record holds: code, a puzzle that can be judged, or else math."""
    if task.record.get("test_method"):
        return "code"
    return next((kind for kind, fault_of in PUZZLE_FAULTS.items() if fault_of(task) is None), "math")


def check_tasks(scorer: RewardScorer, tasks: Sequence[Task], key: str) -> None:
    """UserError for the first task that has nothing to judge a response by: no response to it could be right."""
    for task in tasks:
        lacks = None
        if scorer.kind == "code" and not task.record.get("test_method"):
            lacks, instead = "test_method", "math or general, where answers are texts"
        elif scorer.kind in ("math", "general", "option") and task.ground_truth_answer is None:
            lacks, instead = "ground_truth_answer", "code, where programs are tested"
        elif scorer.kind == "option" and not LETTER.fullmatch(task.ground_truth_answer):
            raise UserError(
                f"{key}: task '{task.id}' has the answer '{task.ground_truth_answer:.40}', but an option is judged by "
                "its letter, A to J; give that, or judge by math or general"
            )
        elif scorer.kind in PUZZLE_FAULTS and (fault := PUZZLE_FAULTS[scorer.kind](task)):
            raise UserError(f"{key}: task '{task.id}' is no {scorer.kind}: {fault} (data/README.md)")
        if lacks:
            setting = "reward.kind" if scorer.reward.kind else "dataset.data_type"
            raise UserError(
                f"{key}: task '{task.id}' has no `{lacks}`, which {setting}={scorer.reward.kind or scorer.data_type} "
                f"judges by; add it (data/README.md) or set {setting} to {instead}"
            )


def evaluation_scorer(reward: ScoringConfig, data_type: str) -> RewardScorer:
    """A scorer by the task's own answer: with the config's limits and matching, without its function or judge."""
    own = {field.name: getattr(reward, field.name) for field in fields(ScoringConfig)}
    return make_scorer(RewardConfig(**own), data_type)


def _own_score(function: Callable[[str, Task], Any], text: str, task: Task, reward: RewardConfig) -> Score:
    """The score by the user's function: the number it returns, or the mean of one number for each token."""
    value = function(text, task)
    if getattr(value, "ndim", None) == 1:
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        pieces = text.tokens if isinstance(text, Response) else None
        known = pieces is not None
        if len(value) != len(pieces) if known else not value:
            expected = f"the response has {len(pieces)} tokens (response.tokens)" if known else "expected some"
            raise UserError(
                f"reward.function: '{reward.function}' returned {len(value)} rewards for task '{task.id}'; {expected}: "
                "return a number, or one number for each token"
            )
        tokens = [_finite(one, reward.function, task) for one in value]
        number = sum(tokens) / max(1, len(tokens))
    else:
        tokens, number = None, _finite(value, reward.function, task)
    return Score(number, number > 0, "passed" if number > 0 else "failed", tokens)


def _finite(value: Any, spec: str, task: Task) -> float:
    """A number as a float; NumPy's and torch's scalars count as numbers, arrays do not."""
    plain = value.item() if getattr(value, "ndim", None) == 0 else value
    if not isinstance(plain, numbers.Real) or not math.isfinite(plain):
        shown = f"{value!r:.60}".replace("\n", " ")
        raise UserError(
            f"reward.function: '{spec}' returned {shown} ({type(value).__name__}) for task '{task.id}'; "
            "it must return a finite number"
        )
    return float(plain)
