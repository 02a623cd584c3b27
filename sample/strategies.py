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

from collections.abc import Callable

import torch
from torch import Tensor

from common.errors import UserError, load_function
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
    return load_function("rollout.remasking_strategy", name)


def even_split(total: int, parts: int | Tensor, number: Tensor) -> Tensor:
    """The size of part `number` (batch,) of an even split of `total` into `parts`, the remainder to the first parts."""
    return total // parts + (number < total % parts).long()


def rank_score(
    candidates: Candidates, uniform: Tensor, gumbel_uniform: Tensor, stop: Tensor, settings: Sampling
) -> Tensor:
    """The score by which full attention ranks positions, (batch, block), as `target` says.

    Candidates that end the response (`stop`) have theirs worsened by the factor `pad_target_penalty`. `alg_temp` adds
    Gumbel noise: the k best are then a draw without replacement with probabilities softmax(score / alg_temp).
    """
    targets = {
        "confidence": candidates.probability,
        "margin_confidence": candidates.margin,
        "neg_entropy": -candidates.entropy,
        "random": uniform,
    }
    score = targets[settings.target]
    penalty = settings.pad_target_penalty
    score = torch.where(stop, torch.where(score > 0, score / penalty, score * penalty), score)
    if settings.alg_temp > 0:
        gumbel = -torch.log(-torch.log(gumbel_uniform.clamp(1e-7, 1 - 1e-7)))
        score = score / settings.alg_temp + gumbel
    return score


def top_k_masked(score: Tensor, masked: Tensor, k: Tensor) -> Tensor:
    """The k masked positions of the highest score in each row, all if fewer; ties go to the lower position.

    score and masked (batch, block), k (batch,) -> bool (batch, block).
    """
    order = score.masked_fill(~masked, float("-inf")).sort(dim=1, descending=True, stable=True).indices
    ranks = torch.arange(masked.shape[1], device=masked.device)
    chosen = (ranks < k[:, None]).expand_as(masked)
    return torch.zeros_like(masked).scatter(1, order, chosen) & masked
