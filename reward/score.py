"""From the reward section of a config to a function that scores a response."""

from __future__ import annotations

import difflib
import importlib
import math
import numbers
import os
import sys
from collections.abc import Callable
from typing import Any

from common.errors import UserError
from common.schema import RewardConfig
from common.trajectory import Score, Task
from reward.math_reward import math_score

Scorer = Callable[[str, Task, bool], Score]


def score_math(text: str, task: Task) -> Score:
    """The boxed answer against the task's reference."""
    return math_score(text, task.ground_truth_answer or "")


KINDS: dict[str, Callable[[str, Task], Score]] = {"math": score_math}


def make_scorer(reward: RewardConfig, data_type: str | None = None) -> Scorer:
    """A function of (response text, task, truncated) as the config asks for it.

    `reward.function` is the user's own; otherwise `reward.kind` chooses from KINDS.
    """
    if data_type is not None:
        _check_kind(data_type, "dataset.data_type")
    _check_kind(reward.kind, "reward.kind")
    score = _user_score(reward.function) if reward.function else KINDS[reward.kind]

    def scorer(text: str, task: Task, truncated: bool) -> Score:
        if truncated and reward.truncated_is_wrong:
            return Score(0.0, False, "truncated")
        return score(text, task)

    return scorer


def _check_kind(kind: str, key: str) -> None:
    if kind not in KINDS:
        close = difflib.get_close_matches(str(kind), KINDS, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"use {', '.join(KINDS)}, or reward.function for your own"
        raise UserError(f"{key}: '{kind}' is unknown; {hint}")


def _user_score(spec: str) -> Callable[[str, Task], Score]:
    function = _load_function(spec)

    def score(text: str, task: Task) -> Score:
        value = _finite(function(text, task), spec, task)
        return Score(value, value > 0, "passed" if value > 0 else "failed")

    return score


def _load_function(spec: str) -> Callable[[str, Task], Any]:
    module_name, colon, name = spec.partition(":")
    if not (colon and module_name and name):
        raise UserError(f"reward.function: '{spec}' is not of the form my_module:my_reward")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there; what it imports is not
        raise UserError(
            f"reward.function: there is no module '{error.name}' ('{spec}'); put {error.name}.py into {here} "
            "or install it"
        ) from None
    function = getattr(module, name, None)
    if not callable(function):
        close = difflib.get_close_matches(name, [word for word in vars(module) if callable(vars(module)[word])], n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise UserError(f"reward.function: {module_name} ({module.__file__}) has no function '{name}'{hint}")
    return function


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
