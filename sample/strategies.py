"""Which candidates are unmasked at a denoising step: pure functions over (batch, block), no loop over sequences.

A strategy is called with
    candidates   the draw's `Candidates`
    confidence   (batch, block) score by which positions are ranked
    entropy      (batch, block) nats
    masked       (batch, block) True where a token may be unmasked
    k            (batch,) how many the static schedule unmasks now
    uniform      (batch, block) a random number per position
    settings     the `Sampling` section of the config
and returns bool (batch, block), the positions to unmask, a subset of `masked`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from common.errors import UserError
from common.runtime import import_function
from common.schema import Sampling
from sample.draw import Candidates

Strategy = Callable[[Candidates, Tensor, Tensor, Tensor, Tensor, Tensor, Sampling], Tensor]


def low_confidence_static(
    candidates: Candidates,
    confidence: Tensor,
    entropy: Tensor,
    masked: Tensor,
    k: Tensor,
    uniform: Tensor,
    settings: Sampling,
) -> Tensor:
    """The k most confident; ties go to the lower position."""
    return top_k_masked(confidence, masked, k)


def low_confidence_dynamic(
    candidates: Candidates,
    confidence: Tensor,
    entropy: Tensor,
    masked: Tensor,
    k: Tensor,
    uniform: Tensor,
    settings: Sampling,
) -> Tensor:
    """All whose probability reaches `dynamic_threshold`; where those are fewer than k, the k most confident."""
    sure = masked & (candidates.probability >= settings.dynamic_threshold)
    enough = sure.sum(1) >= k
    return torch.where(enough[:, None], sure, top_k_masked(confidence, masked, k))


def sequential(
    candidates: Candidates,
    confidence: Tensor,
    entropy: Tensor,
    masked: Tensor,
    k: Tensor,
    uniform: Tensor,
    settings: Sampling,
) -> Tensor:
    """The leftmost k."""
    return masked & (masked.cumsum(1) <= k[:, None])


def entropy_bounded(
    candidates: Candidates,
    confidence: Tensor,
    entropy: Tensor,
    masked: Tensor,
    k: Tensor,
    uniform: Tensor,
    settings: Sampling,
) -> Tensor:
    """In order of entropy while the running sum, the token included, stays within `eb_threshold`; at least one."""
    order = entropy.masked_fill(~masked, float("inf")).sort(dim=1, stable=True).indices
    sorted_masked = masked.gather(1, order)
    running = entropy.gather(1, order).masked_fill(~sorted_masked, 0).cumsum(1)
    within = running <= settings.eb_threshold
    within[:, 0] = True
    return torch.zeros_like(masked).scatter(1, order, within & sorted_masked)


STRATEGIES: dict[str, Strategy] = {
    "low_confidence_static": low_confidence_static,
    "low_confidence_dynamic": low_confidence_dynamic,
    "sequential": sequential,
    "entropy_bounded": entropy_bounded,
}


def find_strategy(name: str) -> Strategy:
    """The strategy of that name, or the user's own by `module:function`; UserError when there is none."""
    if name in STRATEGIES:
        return STRATEGIES[name]
    if ":" not in name:
        known = ", ".join(STRATEGIES)
        raise UserError(f"rollout.remasking_strategy: {name!r} is none of {known}, nor module:function")
    return import_function("rollout.remasking_strategy", name)


def static_schedule(block_size: int, steps: int, step: Tensor) -> Tensor:
    """How many tokens of a block its step-th denoising step unmasks: an even split, the remainder to the first steps.

    step (batch,) -> (batch,).
    """
    return block_size // steps + (step < block_size % steps).long()


def top_k_masked(score: Tensor, masked: Tensor, k: Tensor) -> Tensor:
    """The k masked positions of the highest score in each row, all if fewer; ties go to the lower position.

    score and masked (batch, block), k (batch,) -> bool (batch, block).
    """
    order = score.masked_fill(~masked, float("-inf")).sort(dim=1, descending=True, stable=True).indices
    ranks = torch.arange(masked.shape[1], device=masked.device)
    chosen = (ranks < k[:, None]).expand_as(masked)
    return torch.zeros_like(masked).scatter(1, order, chosen) & masked
