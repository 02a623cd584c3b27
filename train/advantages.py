"""From raw rewards to advantages, and which groups are worth training on."""

from collections.abc import Sequence

import numpy as np

from common.errors import UserError

ROUNDING = 1e-12  # of a reward, relative


def group_advantages(rewards: Sequence[float]) -> np.ndarray:
    """The z-score of each reward in its group, population deviation; 0 where all are equal (GRPO).

    Rewards that differ by rounding only, as means over different numbers of equal terms do, are equal. UserError where
    rewards or their deviation are not finite, or the deviation underflows to 0.
    """
    values = np.asarray(rewards, dtype=np.float64)
    low, high = values.min(), values.max()
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite([low, high]).all() and high - low <= ROUNDING * max(abs(low), abs(high)):
            return np.zeros_like(values)
        deviation = values.std()
    if not 0 < deviation < np.inf:
        raise UserError(
            f"rewards from {low:g} to {high:g} for one task cannot be compared: their deviation is {deviation:g}; "
            "scale what reward.function (or the judge) returns to moderate numbers"
        )
    return (values - values.mean()) / deviation


def keep_group(correct: Sequence[bool], bounds: Sequence[float] | None) -> bool:
    """Whether the group's accuracy lies within [low, high]; `None` keeps every group."""
    if bounds is None:
        return True
    low, high = bounds
    return low <= float(np.mean(correct)) <= high


def trace_advantages(
    rewards: np.ndarray, values: np.ndarray, steps: np.ndarray, gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """Generalised advantage estimation over the steps of a trace (TraceRL); returns (advantages, returns) per token.

    rewards, values, steps (tokens,): of the predicted tokens of one response, steps in the order of time. With r*_t
    and V*_t the means over the tokens of step t and nothing behind the last: δ_t = r*_t − V*_t + γV*_{t+1}, A*_t = δ_t
    + γλA*_{t+1}, R*_t = r*_t + γR*_{t+1}. A token j of step t has R_j = r_j + γR*_{t+1} and A_j = r_j − V_j +
    γV*_{t+1} + γλA*_{t+1}.
    """
    _, step = np.unique(steps, return_inverse=True)
    size = np.bincount(step)
    reward, value = np.bincount(step, rewards) / size, np.bincount(step, values) / size  # (T,) means
    # one place more: zero behind the last step
    next_value, next_return, next_advantage = (np.zeros(len(size) + 1) for _ in range(3))
    next_value[:-1] = value
    for t in reversed(range(len(size))):
        next_return[t] = reward[t] + gamma * next_return[t + 1]
        next_advantage[t] = reward[t] - value[t] + gamma * (next_value[t + 1] + lam * next_advantage[t + 1])
    after = step + 1
    advantages = rewards - values + gamma * (next_value[after] + lam * next_advantage[after])
    return advantages, rewards + gamma * next_return[after]


def explained_variance(values: np.ndarray, returns: np.ndarray) -> float:
    """1 − Var(R − V) / Var(R): 1 where values predict the returns, 0 where a constant would do as well.

    0 where all returns are equal.
    """
    spread = float(np.var(returns))
    return 1 - float(np.var(returns - values)) / spread if spread > 0 else 0.0
