"""From groups of scored rollouts to the samples of an RL step, their rows, and numbers for each predicted token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError, load_function
from common.schema import RLTrainingConfig
from common.trajectory import ScoredTrajectory, Trajectory
from models import LoadedModel
from train.advantages import group_advantages, keep_group, trace_advantages
from train.packing import Row, make_rows
from train.views import RL_METHODS, Views

LARGEST_REWARD = 1e15  # summed over ten thousand tokens and squared it is still a float32


@dataclass(frozen=True)
class Layout:
    """How the family's attention lays a response out."""

    mask_id: int
    block_size: int | None  # None: full attention
    logit_offset: int = 0  # the prediction for position i is at i + logit_offset


def layout_of(loaded: LoadedModel, block_size: int) -> Layout:
    """The layout of a family's responses."""
    family = loaded.family
    return Layout(loaded.mask_id, None if family.attention == "full" else block_size, family.logit_offset)


def kept_samples(
    groups: Sequence[Sequence[ScoredTrajectory]], bounds: Sequence[float] | None, drop_equal: bool = False
) -> list[ScoredTrajectory]:
    """Every response of the groups whose accuracy lies within `bounds`, with its advantage in the group.

    Responses that could not be scored are left out: nothing is known of them. `drop_equal` leaves out groups whose
    rewards are all equal too.
    """
    samples = []
    for whole in groups:
        group = [rollout for rollout in whole if rollout.score.verdict != "infrastructure"]
        if not group or not keep_group([rollout.score.correct for rollout in group], bounds):
            continue
        advantages = group_advantages([rollout.score.reward for rollout in group])
        if drop_equal and not advantages.any():
            continue
        samples += [replace(rollout, advantage=advantage) for rollout, advantage in zip(group, advantages.tolist())]
    return samples


def view_method(method: str) -> Callable[..., Views]:
    """The function that makes a method's views: a row of RL_METHODS, or the user's own `module:function`."""
    if method in RL_METHODS:
        return RL_METHODS[method]
    function = load_function("training.method", method)

    def checked(*arguments: object) -> Views:
        views = function(*arguments)
        if not isinstance(views, Views):
            raise UserError(
                f"training.method: '{method}' returned {type(views).__name__}; it must return train.views.Views"
            )
        return views

    return checked


def sample_rows(
    samples: Sequence[ScoredTrajectory], training: RLTrainingConfig, layout: Layout, seed: Sequence[int]
) -> list[Row]:
    """The packed rows of all samples, in their order, with the views of the configured method."""
    method = view_method(training.method)
    rows = []
    for number, sample in enumerate(samples):
        trajectory = sample.trajectory
        rng = np.random.default_rng([*seed, number])
        views = method(trajectory, layout.block_size, layout.mask_id, training, rng)
        rows += make_rows(number, trajectory.prompt_ids, trajectory.response_ids, views, layout.logit_offset)
    return rows


def noisings(training: RLTrainingConfig) -> int:
    """How many noised copies of a response its losses are averaged over."""
    return training.mask_times_per_sample if training.method in ("random_masking", "coupled") else 1


def predicted_count(rows: Sequence[Row]) -> int:
    """How many tokens the rows predict."""
    return sum(len(row.target) for row in rows)


def trajectory_of(rows: Sequence[Row]) -> np.ndarray:
    """The trajectory of every predicted token, (predicted,)."""
    return np.repeat([row.trajectory for row in rows], [len(row.target) for row in rows])


def gather(
    rows: Sequence[Row], samples: Sequence[ScoredTrajectory], values: Callable[[Trajectory], list[float]]
) -> Tensor:
    """Per-token values of the trajectories at the rows' predicted tokens, (predicted,) float32."""
    parts = [np.asarray(values(samples[row.trajectory].trajectory))[row.response_index] for row in rows]
    return torch.tensor(np.concatenate(parts), dtype=torch.float32)


def value_targets(
    rows: Sequence[Row], samples: Sequence[ScoredTrajectory], values: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of every predicted token, (predicted,) each, from the value model's `values`.

    The rows are those of traces, and steps that were merged are one. An outcome's reward lies on the tokens of the last
    predicted step, process rewards on every token. UserError where a reward is too large for the loss, in float32.
    """
    trajectory, step = trajectory_of(rows), np.concatenate([row.step for row in rows])
    index = np.concatenate([row.response_index for row in rows])
    value = values.double().numpy()
    advantages, returns = np.zeros_like(value), np.zeros_like(value)
    for number in np.unique(trajectory):
        own = np.flatnonzero(trajectory == number)
        reward = token_rewards(samples[number], index[own], step[own])
        if (largest := np.abs(reward).max()) > LARGEST_REWARD:
            raise UserError(
                f"task '{samples[number].trajectory.task_id}': a reward of size {largest:g}; a value model learns "
                "rewards as they are, so scale what reward.function (or the judge) returns to moderate numbers"
            )
        advantages[own], returns[own] = trace_advantages(reward, value[own], step[own], gamma, lam)
    return torch.tensor(advantages, dtype=torch.float32), torch.tensor(returns, dtype=torch.float32)


def token_rewards(sample: ScoredTrajectory, index: np.ndarray, step: np.ndarray) -> np.ndarray:
    """The raw reward of each predicted token of one response, (predicted,); `index` into the response.

    UserError where process rewards are not one for each token of the response.
    """
    trajectory = sample.trajectory
    if sample.score.token_rewards is None:
        return np.where(step == step.max(), sample.score.reward, 0.0)
    if len(sample.score.token_rewards) != trajectory.length:
        raise UserError(
            f"task '{trajectory.task_id}', response {trajectory.sample}: {len(sample.score.token_rewards)} rewards for "
            f"{trajectory.length} tokens; process rewards are one for each token, the stop token included"
        )
    rewards = np.zeros(len(trajectory.response_ids))  # tokens behind the end earn nothing
    rewards[: trajectory.length] = sample.score.token_rewards
    return rewards[index]
