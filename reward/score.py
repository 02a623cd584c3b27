"""From the reward section of a config to a function that scores a response."""

import difflib
import math
import numbers
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import fields
from typing import Any, Self

from common.errors import UserError, load_function
from common.schema import RewardConfig, ScoringConfig
from common.trajectory import Response, Score, Task
from reward.code_reward import CodeLimits, code_score
from reward.general_reward import general_score
from reward.judge import judged_score
from reward.math_reward import math_score
from reward.workers import Workers


def score_math(text: str, task: Task, reward: RewardConfig) -> Score:
    """The boxed answer against the task's reference."""
    return math_score(text, task.ground_truth_answer or "")


def score_code(text: str, task: Task, reward: RewardConfig) -> Score:
    """The response's program against the task's tests."""
    limits = CodeLimits(reward.time_limit, reward.memory_mb << 20, reward.output_mb << 20, reward.float_tolerance)
    return code_score(text, task, limits)


def score_general(text: str, task: Task, reward: RewardConfig) -> Score:
    """The answer against the task's reference, as text."""
    return general_score(text, task.ground_truth_answer or "", reward.match, reward.fuzzy_threshold)


def score_judge(text: str, task: Task, reward: RewardConfig) -> Score:
    """The judge alone decides."""
    return judged_score(text, task, reward.judge)


KINDS: dict[str, Callable[[str, Task, RewardConfig], Score]] = {
    "math": score_math,
    "code": score_code,
    "general": score_general,
    "judge": score_judge,
}


class RewardScorer:
    """Scores responses as the reward section of a config says; made by `make_scorer`.

    Called, it scores here and now; `submit` has its processes do it, which `close` ends, or the end of a `with`.
    """

    def __init__(
        self, reward: RewardConfig, data_type: str | None, score: Callable[[str, Task, RewardConfig], Score]
    ) -> None:
        self.reward, self.data_type, self.score = reward, data_type, score
        self._workers: Workers | None = None

    @property
    def needs_tokens(self) -> bool:
        """Whether the text should come as a `Response`, with what each of its tokens stands for."""
        return bool(self.reward.function or self.reward.judge.base_url)

    def __call__(self, text: str, task: Task, truncated: bool) -> Score:
        if truncated and self.reward.truncated_is_wrong:
            return Score(0.0, False, "truncated")
        scored = self.score(text, task, self.reward)
        if self.score is score_judge or not self.reward.judge.base_url:
            return scored
        judged = judged_score(text, task, self.reward.judge)
        return Score(judged.reward, scored.correct, scored.verdict, judged.token_rewards)

    def submit(self, text: str, task: Task, truncated: bool) -> Future[Score]:
        """Have a response scored by one of `reward.workers` processes, which are kept; at once where that is 0."""
        if not self.reward.workers:
            scored: Future[Score] = Future()
            scored.set_result(self(text, task, truncated))
            return scored
        if self._workers is None:
            self._workers = Workers(self.reward, self.data_type, self.reward.workers)
        return self._workers.submit(text, task, truncated)

    def close(self) -> None:
        """Drop what is not scored yet and end the processes; a response that comes later starts new ones."""
        workers, self._workers = self._workers, None
        if workers:
            workers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def make_scorer(reward: RewardConfig, data_type: str | None = None) -> RewardScorer:
    """A scorer of (response text, task, truncated) as the config asks for it.

    `reward.function` is the user's own; otherwise `reward.kind`, or else the type of the data, chooses from KINDS. A
    judge beside another kind gives the rewards, and the kind decides what is correct.
    """
    if data_type is not None:
        _check_kind(data_type, "dataset.data_type")
    kind = reward.kind or data_type or "math"
    _check_kind(kind, "reward.kind")
    _check_judge(reward, kind)
    return RewardScorer(reward, data_type, _user_score(reward.function) if reward.function else KINDS[kind])


def check_tasks(scorer: RewardScorer, tasks: Sequence[Task], key: str) -> None:
    """UserError for the first task that has nothing to judge a response by: no response to it could be right."""
    needs_tests, needs_answer = scorer.score is score_code, scorer.score in (score_math, score_general)
    for task in tasks:
        lacks = None
        if needs_tests and not task.record.get("test_method"):
            lacks, instead = "test_method", "math or general, where answers are texts"
        elif needs_answer and task.ground_truth_answer is None:
            lacks, instead = "ground_truth_answer", "code, where programs are tested"
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


def _check_kind(kind: str, key: str) -> None:
    if kind not in KINDS:
        close = difflib.get_close_matches(str(kind), KINDS, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"use {', '.join(KINDS)}, or reward.function for your own"
        raise UserError(f"{key}: '{kind}' is unknown; {hint}")


def _check_judge(reward: RewardConfig, kind: str) -> None:
    if kind == "judge" and not reward.judge.base_url:
        raise UserError("reward.kind=judge needs reward.judge.base_url, as http://127.0.0.1:8000/v1, and its model")
    if reward.judge.base_url and not reward.judge.model:
        raise UserError(f"reward.judge.model is empty: name the model that {reward.judge.base_url} serves")
    if reward.judge.model and not reward.judge.base_url:
        raise UserError(
            f"reward.judge.model={reward.judge.model} without reward.judge.base_url: serve the model "
            f"(vllm serve {reward.judge.model}) and give its address, as http://127.0.0.1:8000/v1"
        )


def _user_score(spec: str) -> Callable[[str, Task, RewardConfig], Score]:
    function = load_function("reward.function", spec)

    def score(text: str, task: Task, reward: RewardConfig) -> Score:
        value = function(text, task)
        tokens = _per_token(value, spec, task, text)
        if tokens is None:
            number = _finite(value, spec, task)
        else:
            number = sum(tokens) / max(1, len(tokens))
        return Score(number, number > 0, "passed" if number > 0 else "failed", tokens)

    return score


def _per_token(value: Any, spec: str, task: Task, text: str) -> list[float] | None:
    """Process rewards as a list of floats; None where the value is no list, tuple or array."""
    if getattr(value, "ndim", None) == 1:
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        return None
    tokens = text.tokens if isinstance(text, Response) else None
    if len(value) != len(tokens) if tokens is not None else not value:
        expected = f"the response has {len(tokens)} tokens (response.tokens)" if tokens is not None else "expected some"
        raise UserError(
            f"reward.function: '{spec}' returned {len(value)} rewards for task '{task.id}'; {expected}: return a "
            "number, or one number for each token"
        )
    return [_finite(one, spec, task) for one in value]


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
