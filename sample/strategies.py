"""Which candidates are unmasked at a denoising step: pure functions over (batch, block), no loop over sequences.

A strategy is called with a `BlockState` and returns bool (batch, block), the positions to unmask, a subset of its
`masked`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from common.errors import UserError, load_function
from common.schema import Sampling
from sample.draw import Candidates


@dataclass(frozen=True)
class BlockState:
    """The current blocks at one denoising step: all that a strategy decides by."""

    candidates: Candidates  # the draw's, for every masked position
    confidence: Tensor  # (batch, block) score by which positions are ranked
    entropy: Tensor  # (batch, block) nats
    masked: Tensor  # (batch, block) True where a token may be unmasked
    k: Tensor  # (batch,) how many the static schedule unmasks now
    uniform: Tensor | None  # (batch, block) a random number per position; for a strategy of one's own, else None
    settings: Sampling  # the sampling section of the config
    tokens: Tensor  # (batch, block) the blocks' tokens, masks included


Strategy = Callable[[BlockState], Tensor]
OLDER_ARGUMENTS = [field.name for field in fields(BlockState)][:7]  # of a function that takes no record


def low_confidence_static(block: BlockState) -> Tensor:
    """The k most confident; ties go to the lower position."""
    return top_k_masked(block.confidence, block.masked, block.k)


def low_confidence_dynamic(block: BlockState) -> Tensor:
    """All whose probability reaches `dynamic_threshold`; where those are fewer than k, the k most confident."""
    sure = block.masked & (block.candidates.probability >= block.settings.dynamic_threshold)
    enough = sure.sum(1) >= block.k
    return torch.where(enough[:, None], sure, top_k_masked(block.confidence, block.masked, block.k))


def sequential(block: BlockState) -> Tensor:
    """The leftmost k."""
    return block.masked & (block.masked.cumsum(1) <= block.k[:, None])


def entropy_bounded(block: BlockState) -> Tensor:
    """In order of entropy while the running sum, the token included, stays within `eb_threshold`; at least one."""
    order = block.entropy.masked_fill(~block.masked, float("inf")).sort(dim=1, stable=True).indices
    sorted_masked = block.masked.gather(1, order)
    running = block.entropy.gather(1, order).masked_fill(~sorted_masked, 0).cumsum(1)
    within = running <= block.settings.eb_threshold
    within[:, 0] = True
    return torch.zeros_like(block.masked).scatter(1, order, within & sorted_masked)


STRATEGIES: dict[str, Strategy] = {
    "low_confidence_static": low_confidence_static,
    "low_confidence_dynamic": low_confidence_dynamic,
    "sequential": sequential,
    "entropy_bounded": entropy_bounded,
}


def find_strategy(name: str) -> Strategy:
    """The strategy of that name, or the user's own by `module:function`; UserError when there is none.

    A function that can be called with seven arguments is of the older kind: it gets the record's first seven fields.
    """
    if name in STRATEGIES:
        return STRATEGIES[name]
    if ":" not in name:
        known = ", ".join(STRATEGIES)
        raise UserError(f"rollout.remasking_strategy: {name!r} is none of {known}, nor module:function")
    function = load_function("rollout.remasking_strategy", name)
    try:
        inspect.signature(function).bind(*OLDER_ARGUMENTS)
    except TypeError:
        return function
    except ValueError:  # of a function that tells no signature
        pass
    return lambda block: function(*(getattr(block, field) for field in OLDER_ARGUMENTS))


def even_split(total: int, parts: int | Tensor, number: Tensor) -> Tensor:
    """The size of part `number` (batch,) of an even split of `total` into `parts`, the remainder to the first parts."""
    return total // parts + (number < total % parts).long()


def rank_score(
    candidates: Candidates, uniform: Tensor, gumbel_uniform: Tensor, stop: Tensor, settings: Sampling
) -> Tensor:
    """The score by which full attention ranks positions, (batch, block), as `target` says.

    Candidates that end the response (`stop`) have theirs worsened by the factor `pad_target_penalty`, or come last of
    all masked positions where `confidence_eos_eot_inf` is set. `alg_temp` adds Gumbel noise: the k best are then a draw
    without replacement with probabilities softmax(score / alg_temp).
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
    if settings.confidence_eos_eot_inf:
        score = score.masked_fill(stop, torch.finfo(score.dtype).min)  # above the minus infinity of what is not masked
    return score


def top_k_masked(score: Tensor, masked: Tensor, k: Tensor) -> Tensor:
    """The k masked positions of the highest score in each row, all if fewer; ties go to the lower position.

    score and masked (batch, block), k (batch,) -> bool (batch, block).
    """
    order = score.masked_fill(~masked, float("-inf")).sort(dim=1, descending=True, stable=True).indices
    ranks = torch.arange(masked.shape[1], device=masked.device)
    chosen = (ranks < k[:, None]).expand_as(masked)
    return torch.zeros_like(masked).scatter(1, order, chosen) & masked
