"""Objectives: advantages from rewards, the loss on a term, and the weights that make an update's loss a plain sum.

A weight holds its token's whole denominator, counted over the whole update before micro-batches are cut. So neither
micro-batch size nor number of devices changes the loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.schema import RLTrainingConfig
from common.trajectory import ScoredTrajectory
from train.tokens import Tokens

ROUNDING = 1e-12  # of a reward, relative
LARGEST_REWARD = 1e15  # summed over ten thousand tokens and squared it is still a float32
CLAMP = 10.0  # of log-ratios, before they are exponentiated


# ---- advantages of a group


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


def kept_samples(
    groups: Sequence[Sequence[ScoredTrajectory]], bounds: Sequence[float] | None, drop_equal: bool = False
) -> list[ScoredTrajectory]:
    """Every response of the groups whose accuracy lies within `bounds`, with its advantage in the group.

    Responses that could not be scored are left out: nothing is known of them. `drop_equal` leaves out groups whose
    rewards are all equal too.
    """
    samples = []
    for whole in groups:
        group = [scored for scored in whole if scored.score.verdict != "infrastructure"]
        if not group or not keep_group([scored.score.correct for scored in group], bounds):
            continue
        advantages = group_advantages([scored.score.reward for scored in group])
        if drop_equal and not advantages.any():
            continue
        samples += [replace(scored, advantage=advantage) for scored, advantage in zip(group, advantages.tolist())]
    return samples


# ---- advantages along a trace, by a value model


def value_targets(
    tokens: Tokens, samples: Sequence[ScoredTrajectory], gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of every token, (predicted,) each, from the value model's `old_value`.

    The views are those of traces, and steps that were merged are one. An outcome's reward lies on the tokens of the
    last predicted step, process rewards on every token. UserError where a reward is too large for the loss, in float32.
    """
    trajectory, index, step = (
        column.numpy() for column in (tokens.trajectory, tokens.response_index, tokens.trace_step)
    )
    value = tokens.old_value.double().numpy()
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


# ---- losses


@dataclass(frozen=True)
class PolicyLoss:
    """The loss and its diagnostics, each summed over the given terms."""

    terms: int  # how many ratios: of tokens, or of sequences
    loss: Tensor  # weighted sum, with gradient
    kl: Tensor  # sum of the KL estimate
    clipped: Tensor  # how many are on the flat side of the clip


def policy_loss(
    logp: Tensor, tokens: Tokens, eps: float, beta: float, estimator: str = "k3", eps_high: float | None = None
) -> PolicyLoss:
    """−min(ρA, clip(ρ, 1−ε, 1+ε_high)A) + β·KL per token, ρ = exp(logp − old_logp) (TraceRL eq. of the policy; PPO).

    logp and every column (predicted,): of tokens, or of whole sequences. Where old_logp or reference_logp is None it is
    the logp itself, without gradient. ε_high is ε unless given (DAPO's clip-higher). The KL to the reference is that of
    `kl_estimate`.
    """
    old_logp, reference_logp = (
        logp.detach() if column is None else column for column in (tokens.old_logp, tokens.reference_logp)
    )
    ratio = (logp - old_logp).clamp(-CLAMP, CLAMP).exp()
    plain = ratio * tokens.advantage
    clipped = ratio.clamp(1 - eps, 1 + (eps if eps_high is None else eps_high)) * tokens.advantage
    kl = kl_estimate(logp, reference_logp, estimator)
    return PolicyLoss(
        terms=len(logp),
        loss=(tokens.weight * (-torch.minimum(plain, clipped) + beta * kl)).sum(),
        kl=kl.sum().detach(),
        clipped=(clipped < plain).sum(),
    )


def kl_estimate(logp: Tensor, reference_logp: Tensor, estimator: str = "k3") -> Tensor:
    """Schulman's estimators of KL(policy ‖ reference), d = logp − reference_logp: k1 d, k2 d²/2, k3 exp(−d) − 1 + d."""
    d = (logp - reference_logp).clamp(-CLAMP, CLAMP)
    return {"k1": lambda: d, "k2": lambda: d.square() / 2, "k3": lambda: torch.expm1(-d) + d}[estimator]()


def value_loss(value: Tensor, old_value: Tensor, returns: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """½·max((V − R)², (V_old + clip(V − V_old, ±ε) − R)²), weighted and summed, and how many tokens are clipped.

    All (predicted,).
    """
    plain = (value - returns).square()
    held = (old_value + (value - old_value).clamp(-eps, eps) - returns).square()
    return (weight * torch.maximum(plain, held)).sum() / 2, (held > plain).sum()


# ---- means over terms


def loss_weights(tokens: Tokens, loss_norm: str, max_gen_length: int, noisings: int = 1) -> np.ndarray:
    """The weight of every predicted token of an update, (predicted,).

    token: the mean over all predicted tokens. length: the sum over a response's predicted tokens / max_gen_length,
    mean over the responses and over the `noisings` of each (random masking). step: the mean within each trace step,
    summed over the steps (those that `shrink` merged are one), mean over responses.
    """
    trajectory = tokens.trajectory.numpy()
    responses = len(np.unique(trajectory))
    if loss_norm == "token":
        return np.full(len(tokens), 1.0 / len(tokens))
    if loss_norm == "length":
        return np.full(len(tokens), 1.0 / (max_gen_length * noisings * responses))
    assert loss_norm == "step", loss_norm
    pairs = np.stack([trajectory, tokens.trace_step.numpy()])
    _, index, size = np.unique(pairs, axis=1, return_inverse=True, return_counts=True)
    return 1.0 / (size[index.ravel()] * responses)


def noisings(training: RLTrainingConfig) -> int:
    """How many noised copies of a response its losses are averaged over; a coupled pair is one."""
    return training.mask_times_per_sample if training.method in ("random_masking", "coupled") else 1


def sequence_shares(tokens: Tokens, by_noising: bool) -> tuple[Tensor, Tensor]:
    """How a response's ELBO per token is made of its predicted tokens' logp: (response, share), (predicted,) each.

    `response` counts the update's responses from 0, and the shares of each sum to 1. Along a trace every token is
    predicted once: all weigh the same. A noising that masks l of L tokens estimates the ELBO by L/l times their sum
    (ESPO, LLaDA), per token their mean; several noisings of a response are averaged.
    """
    response = np.unique(tokens.trajectory.numpy(), return_inverse=True)[1]
    noising = tokens.trace_step.numpy() if by_noising else np.zeros_like(response)
    pairs = np.stack([response, noising])
    (owner, _), index, size = np.unique(pairs, axis=1, return_inverse=True, return_counts=True)
    share = 1 / (size[index.ravel()] * np.bincount(owner)[response])
    return torch.from_numpy(response), torch.tensor(share, dtype=torch.float32)
