"""Losses per predicted token, and the weights that turn their sum into the update's loss.

A weight holds its token's whole denominator, counted over the whole update before micro-batches are cut. So the loss
of an update is a plain sum, and neither micro-batch size nor number of devices changes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from train.packing import Row, TokenFields

CLAMP = 10.0  # of log-ratios, before they are exponentiated


@dataclass(frozen=True)
class PolicyLoss:
    """The loss and its diagnostics, each summed over the given tokens."""

    loss: Tensor  # weighted sum, with gradient
    policy: Tensor  # weighted sum of the clipped objective
    kl: Tensor  # sum over tokens of the KL estimate
    clipped: Tensor  # number of tokens on the flat side of the clip


def policy_loss(
    logp: Tensor,
    fields: TokenFields,
    eps: float,
    beta: float,
    estimator: str = "k3",
    eps_high: float | None = None,
) -> PolicyLoss:
    """−min(ρA, clip(ρ, 1−ε, 1+ε_high)A) + β·KL per token, ρ = exp(logp − old_logp) (TraceRL eq. of the policy; PPO).

    logp and every field (predicted,): of tokens, or of whole sequences. ε_high is ε unless given (DAPO's clip-higher).
    The KL to the reference is that of `kl_estimate`.
    """
    ratio = (logp - fields.old_logp).clamp(-CLAMP, CLAMP).exp()
    plain = ratio * fields.advantage
    clipped = ratio.clamp(1 - eps, 1 + (eps if eps_high is None else eps_high)) * fields.advantage
    policy = -torch.minimum(plain, clipped)
    kl = kl_estimate(logp, fields.logp_ref, estimator)
    return PolicyLoss(
        loss=(fields.weight * (policy + beta * kl)).sum(),
        policy=(fields.weight * policy).sum().detach(),
        kl=kl.sum().detach(),
        clipped=(clipped < plain).sum(),
    )


def kl_estimate(logp: Tensor, logp_ref: Tensor, estimator: str = "k3") -> Tensor:
    """Schulman's estimators of KL(policy ‖ reference), d = logp − logp_ref: k1 d, k2 d²/2, k3 exp(−d) − 1 + d."""
    d = (logp - logp_ref).clamp(-CLAMP, CLAMP)
    return {"k1": lambda: d, "k2": lambda: d.square() / 2, "k3": lambda: torch.expm1(-d) + d}[estimator]()


def value_loss(value: Tensor, old_value: Tensor, returns: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """½·max((V − R)², (V_old + clip(V − V_old, ±ε) − R)²), weighted and summed, and how many tokens are clipped.

    All (predicted,).
    """
    plain = (value - returns).square()
    held = (old_value + (value - old_value).clamp(-eps, eps) - returns).square()
    return (weight * torch.maximum(plain, held)).sum() / 2, (held > plain).sum()


def loss_weights(rows: Sequence[Row], loss_norm: str, max_gen_length: int, noisings: int = 1) -> np.ndarray:
    """The weight of every predicted token of an update, (predicted,) in the order of its rows.

    token: the mean over all predicted tokens. length: the sum over a response's predicted tokens / max_gen_length,
    mean over the responses and over the `noisings` of each (random masking). step: the mean within each trace step,
    summed over the steps (those that `shrink` merged are one), mean over responses.
    """
    trajectory = np.concatenate([np.full(len(row.target), row.trajectory) for row in rows])
    step = np.concatenate([row.step for row in rows])
    count, responses = len(step), len({row.trajectory for row in rows})
    if loss_norm == "token":
        return np.full(count, 1.0 / count)
    if loss_norm == "length":
        return np.full(count, 1.0 / (max_gen_length * noisings * responses))
    assert loss_norm == "step", loss_norm
    _, index, size = np.unique(np.stack([trajectory, step]), axis=1, return_inverse=True, return_counts=True)
    return 1.0 / (size[index.ravel()] * responses)


def sequence_shares(rows: Sequence[Row], by_noising: bool) -> tuple[Tensor, Tensor]:
    """How a response's ELBO per token is made of its predicted tokens' logp: (response, share), (predicted,) each.

    `response` counts the update's responses from 0, and the shares of each sum to 1. Along a trace every token is
    predicted once: all weigh the same. A noising that masks l of L tokens estimates the ELBO by L/l times their sum
    (ESPO, LLaDA), per token their mean; several noisings of a response are averaged.
    """
    trajectory = np.repeat([row.trajectory for row in rows], [len(row.target) for row in rows])
    response = np.unique(trajectory, return_inverse=True)[1]
    step = np.concatenate([row.step for row in rows]) if by_noising else np.zeros_like(response)
    (owner, _), index, size = np.unique(np.stack([response, step]), axis=1, return_inverse=True, return_counts=True)
    share = 1 / (size[index.ravel()] * np.bincount(owner)[response])
    return torch.from_numpy(response), torch.tensor(share, dtype=torch.float32)
