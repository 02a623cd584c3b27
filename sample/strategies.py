"""What is written at a denoising step: pure functions over (batch, block), no loop over sequences.

A strategy is called with a `BlockState` and returns bool (batch, block), the masked positions whose candidates are
written; one that is marked `overwriting` returns `Writes`, and may replace tokens and mask positions again.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from common.errors import UserError, load_function
from common.schema import Sampling
from sample.draw import Candidates


@dataclass(frozen=True)
class BlockState:
    """The current blocks at one denoising step: all that a strategy decides by."""

    candidates: Candidates  # the draw's, for every masked position; where tokens may be overwritten, for every position
    confidence: Tensor  # (batch, block) score by which positions are ranked
    entropy: Tensor  # (batch, block) nats
    masked: Tensor  # (batch, block) True where a token may be unmasked
    k: Tensor  # (batch,) how many the static schedule unmasks now
    uniform: Tensor | None  # (batch, block) a random number per position; for a strategy of one's own, else None
    settings: Sampling  # the sampling section of the config
    tokens: Tensor  # (batch, block) the blocks' tokens, masks included
    response: Tensor  # (batch, block) False where a token is of the prompt, which nobody may overwrite
    clean_steps: Tensor  # (batch,) forwards of this block, so far, that began without masks


class Writes(NamedTuple):
    """What a strategy writes, and whether that was all."""

    candidates: Tensor  # bool (batch, block): the candidate is written here
    masks: Tensor | None = None  # bool (batch, block): the token here is masked again
    ends: Tensor | None = None  # bool (batch,): blocks without masks that are final now; None: all of these


Strategy = Callable[[BlockState], Tensor | Writes]
OLDER_ARGUMENTS = [field.name for field in fields(BlockState)][:7]  # of a function that takes no record


def overwriting(strategy: Strategy) -> Strategy:
    """Mark a strategy that returns `Writes`: what is needed to overwrite tokens is made for marked ones alone."""
    strategy.overwrites = True
    return strategy


def overwrites(strategy: Strategy) -> bool:
    """Whether a strategy is marked as `overwriting`."""
    return getattr(strategy, "overwrites", False)


def low_confidence_static(block: BlockState) -> Tensor:
    """The k most confident; ties go to the lower position."""
    return top_k_masked(block.confidence, block.masked, block.k)


def low_confidence_dynamic(block: BlockState) -> Tensor:
    """All whose probability reaches `dynamic_threshold`; where those are fewer than k, the k most confident."""
    return sure_or_best(block, block.k)


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


def factor(block: BlockState) -> Tensor:
    """In order of confidence: the first, then the r-th while its probability reaches 1 − `factor` / (r + 1).

    Fast-dLLM's "factor" (arXiv 2505.22618), in which n tokens are parallel as long as (n + 1)(1 − c_n) < `factor`.
    """
    order = block.confidence.masked_fill(~block.masked, float("-inf")).sort(dim=1, descending=True, stable=True).indices
    rank = torch.arange(1, order.shape[1] + 1, device=order.device)
    reached = block.candidates.probability.gather(1, order) >= 1 - block.settings.factor / (rank + 1)
    reached[:, 0] = True
    return torch.zeros_like(block.masked).scatter(1, order, reached.cumprod(1).bool()) & block.masked


def hierarchical(block: BlockState) -> Tensor:
    """All whose probability reaches `dynamic_threshold`, and of each run of adjacent masks the most confident one.

    The latter where its probability reaches `low_threshold`; at least one, the most confident (dInfer, arXiv
    2510.08666: far from each other, tokens depend less on one another).
    """
    settings, masked, probability = block.settings, block.masked, block.candidates.probability
    starts = masked & ~torch.nn.functional.pad(masked, (1, 0))[:, :-1]
    run = torch.where(masked, starts.cumsum(1), 0)
    # sorted by confidence, and then by run: the first of each run is its best
    order = block.confidence.masked_fill(~masked, float("-inf")).sort(dim=1, descending=True, stable=True).indices
    by_run = run.gather(1, order).sort(dim=1, stable=True)
    first = by_run.values != torch.nn.functional.pad(by_run.values, (1, 0))[:, :-1]
    best = torch.zeros_like(masked).scatter(1, order.gather(1, by_run.indices), first)
    chosen = masked & ((probability >= settings.dynamic_threshold) | (best & (probability >= settings.low_threshold)))
    one = top_k_masked(block.confidence, masked, torch.ones_like(block.k))
    return torch.where(chosen.any(1, keepdim=True), chosen, one)


@overwriting
def revoke(block: BlockState) -> Writes:
    """Unmask what reaches `dynamic_threshold`, at least one; mask again what fell under `revoke_threshold`.

    Of the tokens that earlier forwards wrote into this block, the least probable come first, and fewer are revoked than
    are unmasked now: a block takes at most as many forwards as it has positions. WINO (arXiv 2507.18578), which scores
    a token by the prediction of a second, masked copy of the block that does not see it; here it is the network's own
    prediction at the token's position. WINO also unmasks at most 70 % of a block's masks at once, and 20.
    """
    unmasked = sure_or_best(block, torch.ones_like(block.k))
    standing = block.response & ~block.masked
    doubtful = standing & (block.candidates.present_probability < block.settings.revoke_threshold)
    return Writes(unmasked, top_k_masked(-block.candidates.present_probability, doubtful, unmasked.sum(1) - 1))


@overwriting
def edit(block: BlockState) -> Writes:
    """Unmask what reaches `dynamic_threshold`, at least `min_unmask`, and replace tokens that are surely others.

    Replaced in the same forward, also while masks remain: every token of the block that is not of the prompt, whose
    likeliest token is another with a probability above `edit_threshold`. A block ends when a forward that began without
    masks edits nothing, or after `max_edit_steps` such forwards. LLaDA2.1's decoding (its technical report and
    modeling file), there with a probability above, not at or above, the threshold of unmasking.
    """
    settings, candidates = block.settings, block.candidates
    unmasked = sure_or_best(block, torch.full_like(block.k, settings.min_unmask))
    other = (candidates.tokens != block.tokens) & (candidates.probability > settings.edit_threshold)
    edited = block.response & ~block.masked & other
    began_clean, clean = ~block.masked.any(1), ~(block.masked & ~unmasked).any(1)
    settled = began_clean & ~edited.any(1)
    last = block.clean_steps + began_clean >= settings.max_edit_steps
    return Writes(unmasked | edited, ends=clean & (settled | last))


STRATEGIES: dict[str, Strategy] = {
    "low_confidence_static": low_confidence_static,
    "low_confidence_dynamic": low_confidence_dynamic,
    "sequential": sequential,
    "entropy_bounded": entropy_bounded,
    "factor": factor,
    "hierarchical": hierarchical,
    "revoke": revoke,
    "edit": edit,
}


def find_strategy(name: str) -> Strategy:
    """The strategy of that name, or the user's own by `module:function`; UserError when there is none.

    A function that can be called with seven arguments is of the older kind: it gets the record's first seven fields,
    and writes candidates into masks alone.
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


def most_forwards(strategy: Strategy, settings: Sampling) -> int:
    """The most denoising forwards of one block: one that takes more is stuck.

    Whatever unmasks at least one position more than it masks again needs at most as many as a block has positions; who
    edits has so many more, for a block without masks, as `max_edit_steps` allows.
    """
    edits = overwrites(strategy) and strategy is not revoke
    return settings.block_size + settings.max_edit_steps * edits


def as_writes(answer: Tensor | Writes, block: BlockState, strategy: Strategy) -> Writes:
    """What a strategy returned, as `Writes`; UserError where that is nothing which the engine could write."""
    name = f"rollout.remasking_strategy: {block.settings.remasking_strategy!r}"
    writes = answer if isinstance(answer, Writes) else Writes(answer)
    if not overwrites(strategy) and (writes.masks is not None or writes.ends is not None):
        raise UserError(f"{name} returns more than what is unmasked: mark it with sample.strategies.overwriting")
    for part, wanted in zip(writes, (block.masked, block.masked, block.k)):
        kind = (tuple(part.shape), part.dtype) if isinstance(part, Tensor) else type(part).__name__
        if part is not None and kind != (tuple(wanted.shape), torch.bool):
            found = kind if isinstance(kind, str) else "a tensor {} of {}".format(*kind)
            raise UserError(f"{name} returned {found}; what it writes is a bool tensor {tuple(wanted.shape)}")
    if writes.candidates is None:
        raise UserError(f"{name} returned nothing; it returns a bool tensor {tuple(block.masked.shape)}")
    return writes


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


def sure_or_best(block: BlockState, k: Tensor) -> Tensor:
    """The masked positions whose probability reaches `dynamic_threshold`; where those are fewer than k, the k best."""
    sure = block.masked & (block.candidates.probability >= block.settings.dynamic_threshold)
    enough = sure.sum(1) >= k
    return torch.where(enough[:, None], sure, top_k_masked(block.confidence, block.masked, k))


def top_k_masked(score: Tensor, masked: Tensor, k: Tensor) -> Tensor:
    """The k masked positions of the highest score in each row, all if fewer; ties go to the lower position.

    score and masked (batch, block), k (batch,) -> bool (batch, block).
    """
    order = score.masked_fill(~masked, float("-inf")).sort(dim=1, descending=True, stable=True).indices
    ranks = torch.arange(masked.shape[1], device=masked.device)
    chosen = (ranks < k[:, None]).expand_as(masked)
    return torch.zeros_like(masked).scatter(1, order, chosen) & masked
