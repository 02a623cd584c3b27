"""From raw rewards to advantages, and which groups are worth training on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def group_advantages(rewards: Sequence[float]) -> np.ndarray:
    """The z-score of each reward in its group, population deviation; 0 where all are equal (GRPO)."""
    values = np.asarray(rewards, dtype=np.float64)
    if (values == values[0]).all():  # asked of the values: rounding can leave equal ones a deviation of 1e-17
        return np.zeros_like(values)
    return (values - values.mean()) / values.std()


def keep_group(correct: Sequence[bool], bounds: Sequence[float] | None) -> bool:
    """Whether the group's accuracy lies within [low, high]; `None` keeps every group."""
    if bounds is None:
        return True
    low, high = bounds
    return low <= float(np.mean(correct)) <= high
