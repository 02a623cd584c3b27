"""Losses per predicted token, and the weights that turn their sum into the update's loss.

A weight holds its token's whole denominator, counted over the whole update before micro-batches are cut. So the loss
of an update is a plain sum, and neither micro-batch size nor number of devices changes it.
"""

from __future__ import annotations

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


def policy_loss(logp: Tensor, fields: TokenFields, eps: float, beta: float, use_k3: bool) -> PolicyLoss:
    """−min(ρA, clip(ρ, 1−ε, 1+ε)A) + β·KL per token, ρ = exp(logp − old_logp) (TraceRL eq. of the policy; PPO).

    logp and every field (predicted,). KL to the reference: k3, exp(−d) − 1 + d with d = logp − logp_ref, or k1, d.
    """
    ratio = (logp - fields.old_logp).clamp(-CLAMP, CLAMP).exp()
    plain = ratio * fields.advantage
    clipped = ratio.clamp(1 - eps, 1 + eps) * fields.advantage
    policy = -torch.minimum(plain, clipped)
    kl = kl_estimate(logp, fields.logp_ref, use_k3)
    return PolicyLoss(
        loss=(fields.weight * (policy + beta * kl)).sum(),
        policy=(fields.weight * policy).sum().detach(),
        kl=kl.sum().detach(),
        clipped=(clipped < plain).sum(),
    )


def kl_estimate(logp: Tensor, logp_ref: Tensor, use_k3: bool = True) -> Tensor:
    """Schulman's estimators of KL(policy ‖ reference) per token: k3, or k1 (the plain difference)."""
    difference = (logp - logp_ref).clamp(-CLAMP, CLAMP)
    return torch.exp(-difference) - 1 + difference if use_k3 else difference


def loss_weights(rows: Sequence[Row], loss_norm: str, max_gen_length: int, noisings: int = 1) -> np.ndarray:
    """The weight of every predicted token of an update, (predicted,) in the order of its rows.

    token: the mean over all predicted tokens. length: the sum over a response's predicted tokens / max_gen_length,
    mean over the responses and over the `noisings` of each (random masking). step: the mean within each trace step,
    summed over the steps, mean over responses.
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
