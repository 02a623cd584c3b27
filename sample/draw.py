"""The draw of a candidate token for every position, from random numbers that depend on names alone (no batch)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.schema import Sampling

Words = Tensor | np.ndarray
STREAMS = {"token": 1, "alg_temp": 2, "random": 3}
# strategies that read no entropy
BY_CONFIDENCE = (
    "low_confidence_static", "low_confidence_dynamic", "sequential", "factor", "hierarchical", "revoke", "edit",
)  # fmt: skip
SORTED = 1024  # words up to which top-p sorts: more are searched
GROUP = 128  # words whose weights are added up before one of them is looked for; most vocabularies are a multiple
SEARCH = ((20, 11), (9, 11), (0, 9))  # (shift, bits) of a float32 by which the search for a threshold narrows down


@dataclass(frozen=True)
class Candidates:
    """What was drawn; every field has the shape of what it was drawn for, (batch, block) for a strategy."""

    tokens: Tensor
    probability: Tensor  # of the token; `confidence_from` says under which softmax
    logp: Tensor  # log_softmax(logits / T) with the mask token at minus infinity, before top-k and top-p
    entropy: Tensor  # nats; `entropy_from` says of which softmax; 0 unless strategy or target ask
    margin: Tensor  # likeliest over second likeliest, under the softmax of `probability`; 0 unless target asks
    kept_mass: Tensor  # probability that top-k and top-p left
    present_probability: Tensor | None = None  # as `probability`, of the token that stands there, where asked for

    def spread(self, where: Tensor, shape: torch.Size) -> Candidates:
        """These, drawn for the flat positions `where` alone, in a tensor of that shape; 0 elsewhere."""
        floats = torch.stack((self.probability, self.logp, self.entropy, self.margin, self.kept_mass))
        floats = floats.new_zeros(5, shape.numel()).index_copy_(1, where, floats).view(5, *shape)
        tokens = self.tokens.new_zeros(shape.numel()).index_copy_(0, where, self.tokens).view(shape)
        return Candidates(tokens, *floats)

    @staticmethod
    def joined(parts: Sequence[Candidates], shape: torch.Size) -> Candidates:
        """Those of flat pieces, one behind the other, in that shape."""
        columns = zip(*(vars(part).values() for part in parts))
        return Candidates(*(None if None in column else torch.cat(column).view(shape) for column in columns))


def uniforms(key: Tensor, position: Tensor, step: Tensor, stream: str) -> Tensor:
    """One float32 in [0, 1) for each (sequence key, position, denoising step, stream), by a counter-based hash.

    key (batch,) int64, position (batch, block), step (batch,) -> (batch, block). The finaliser is splitmix64's.
    """
    if key.device.type == "cpu":  # a small operation costs numpy a fraction of what it costs torch
        words = (tensor.numpy().view(np.uint64) for tensor in (key, position, step))
        hashed = _hash(*words, STREAMS[stream], np.right_shift, np.uint64)
        return torch.from_numpy((hashed >> 40).astype(np.float32) * np.float32(2.0**-24))
    hashed = _hash(key, position, step, STREAMS[stream], _shift_right, _signed)
    return _shift_right(hashed, 40).to(torch.float32) * 2.0**-24


def _hash(key: Words, position: Words, step: Words, stream: int, shift: Callable, constant: Callable) -> Words:
    """The hash of `uniforms` in torch's signed or numpy's unsigned words, which differ in shift and constants."""

    def mix(value: Words) -> Words:
        value = (value ^ shift(value, 30)) * constant(0xBF58476D1CE4E5B9)
        value = (value ^ shift(value, 27)) * constant(0x94D049BB133111EB)
        return value ^ shift(value, 31)

    hashed = mix(key[:, None] + constant(0x9E3779B97F4A7C15) * (position + 1))
    hashed = mix(hashed + constant(0xD1B54A32D192ED03) * (step[:, None] + 1))
    return mix(hashed + stream)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant


def _shift_right(value: Tensor, bits: int) -> Tensor:
    return (value >> bits) & ((1 << (64 - bits)) - 1)  # logical, where torch's shift keeps the sign


def draw(
    logits: Tensor,
    uniform: Tensor | None,
    mask_id: int,
    settings: Sampling,
    barred: Tensor | None = None,
    present: Tensor | None = None,
) -> Candidates:
    """Draw a token per position by the inverse CDF in id order; temperature 0 or top_k 1 takes the argmax.

    logits (…, vocab), uniform (…), unused where the draw is greedy. The mask token is never drawn. Temperature
    comes before top-k and top-p. Confidence under `raw` is that of the untouched softmax over the whole
    vocabulary, and so is entropy; under `sampled` they are of what is drawn from. Entropy and margin are 0 where the
    settings name nothing that reads them.

    Ids that are `barred` (n,) are never drawn either: their logits are minus infinity for the draw, confidence, margin
    and entropy. Log-probabilities are the network's, in which they have their share; `kept_mass` says what is left.

    Where tokens may be overwritten, `present` (…) are those that stand there. Where that is no mask the candidate is
    not drawn: it is the likeliest token.

    The vocabulary is gone through as seldom as may be: weights exp((logits − highest) / T) are made once, in place, and
    their sums serve every softmax. The highest is that of all tokens but the mask's, so that weights do not vanish
    where the mask token is likeliest.
    """
    greedy, temperature, raw = is_greedy(settings), rollout_temperature(settings), settings.confidence_from == "raw"
    sides = (logits[..., :mask_id], logits[..., mask_id + 1 :])
    highest = torch.stack([side.amax(-1) for side in sides if side.shape[-1]]).amax(0).float()  # (…,)
    weight = logits - highest[..., None]  # float32, whatever the logits are
    mask_logit = weight[..., mask_id].clone()
    weight[..., mask_id] = float("-inf")
    if barred is not None:
        barred_logits = weight[..., barred]  # (…, n)
        weight.index_fill_(-1, barred, float("-inf"))
    tokens = weight.argmax(-1) if greedy else None
    if temperature != 1:
        raw_sum = weight.exp().sum(-1)
        weight.div_(temperature)
    allowed = weight.exp_().sum(-1)
    # what divides weights: in the raw softmax, which knows the mask token, as a logarithm; and in that of logp
    raw_total = torch.logaddexp((allowed if temperature == 1 else raw_sum).log(), mask_logit)
    whole = allowed if barred is None else allowed + (barred_logits / temperature).exp().sum(-1)
    kept, kept_sum = weight, allowed
    if settings.top_k > 0 or settings.top_p < 1:
        kept = filter_top(weight, settings.top_k, settings.top_p, settings.filter_order)
        kept_sum = kept.sum(-1)
    if tokens is None:
        tokens = inverse_cdf(kept, uniform)
        if present is not None:
            tokens = torch.where(present == mask_id, tokens, weight.argmax(-1))
    drawn = logits.gather(-1, tokens[..., None])[..., 0] - highest

    def raw_logp() -> Tensor:
        left = logits if barred is None else logits.index_fill(-1, barred, float("-inf"))
        return left - (highest + raw_total)[..., None]

    def probability_of(ids: Tensor) -> Tensor:
        if raw:
            return (logits.gather(-1, ids[..., None])[..., 0] - highest - raw_total).exp()
        return kept.gather(-1, ids[..., None])[..., 0] / kept_sum

    margin = entropy = torch.zeros_like(whole)
    if settings.target == "margin_confidence":
        best = raw_logp().topk(2, dim=-1).values.exp() if raw else kept.topk(2, dim=-1).values / kept_sum[..., None]
        margin = best[..., 0] - best[..., 1]
    if settings.remasking_strategy not in BY_CONFIDENCE or settings.target == "neg_entropy":
        probability = raw_logp().exp_() if settings.entropy_from == "raw" else kept / kept_sum[..., None]
        entropy = torch.special.entr(probability).sum(-1)
    return Candidates(
        tokens=tokens,
        probability=(drawn - raw_total).exp() if raw else kept.gather(-1, tokens[..., None])[..., 0] / kept_sum,
        logp=drawn / temperature - whole.log(),
        entropy=entropy,
        margin=margin,
        kept_mass=kept_sum / whole,
        present_probability=None if present is None else probability_of(present),
    )


def is_greedy(settings: Sampling) -> bool:
    """Whether the draw is the argmax."""
    return settings.temperature == 0 or settings.top_k == 1


def rollout_temperature(settings: Sampling) -> float:
    """The T of recorded log-probabilities: the temperature of the draw, 1 when greedy."""
    return 1.0 if is_greedy(settings) else float(settings.temperature)


def token_logp(logits: Tensor, mask_id: int, temperature: float) -> Tensor:
    """log_softmax(logits / T) with the mask token at minus infinity, float32: logp everywhere in this project.

    logits (…, vocab) -> (…, vocab).
    """
    scaled = logits.float() if temperature == 1 else logits.float() / temperature
    forbidden = torch.full((1,), mask_id, device=scaled.device)
    return torch.log_softmax(scaled.index_fill(-1, forbidden, float("-inf")), dim=-1)


def filter_top(weight: Tensor, top_k: int, top_p: float, order: str = "top_k_first") -> Tensor:
    """Zero all but the top_k heaviest tokens and all beyond the one that crosses top_p; sums are not restored.

    weight (…, vocab), none negative -> (…, vocab). top_k 0 and top_p 1 keep everything; ties go to the lower id. What
    top_p is a share of is what the first filter left.
    """
    if order == "top_p_first":
        return filter_top(filter_top(weight, 0, top_p), top_k, 1.0)
    ranked = None  # what is left, the heaviest first
    if 0 < top_k < weight.shape[-1]:
        ranked = weight.topk(top_k, dim=-1).values
    elif top_p < 1 and weight.shape[-1] <= SORTED:
        ranked = weight.sort(dim=-1, descending=True).values
    if top_p < 1:
        return keep_heaviest(weight, *(search_crossing(weight, top_p) if ranked is None else crossing(ranked, top_p)))
    if ranked is None:
        return weight
    least = ranked[..., -1:]
    return keep_heaviest(weight, least, top_k - (ranked > least).sum(-1, keepdim=True))


def keep_heaviest(weight: Tensor, least: Tensor, count: Tensor) -> Tensor:
    """Zero what is below `least`, and of those that equal it all but the first `count`; least and count (…, 1)."""
    tied = weight == least
    keep = (weight > least) | (tied & (tied.cumsum(-1, dtype=torch.int32) <= count))
    return weight * keep


def crossing(ranked: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The weight of the token that crosses top_p, and how many of that weight are kept, (…, 1) each.

    ranked (…, n): from the heaviest on. One is kept while those before it sum up to less than top_p of all.
    """
    before = ranked.cumsum(-1) - ranked
    kept = (before < top_p * ranked.sum(-1, keepdim=True)).sum(-1, keepdim=True).clamp(min=1)
    least = ranked.gather(-1, kept - 1)
    return least, kept - (ranked > least).sum(-1, keepdim=True)


def search_crossing(weight: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """As `crossing`, of weights (…, vocab) in any order, none of which is sorted.

    A float32 that is not negative orders as its bits do: sums over what shares its leading bits narrow the threshold
    down, in three passes. The sums are float64, where the order of addition does not show.
    """
    flat = weight.reshape(-1, weight.shape[-1])
    bits, mass = flat.view(torch.int32), flat.double()
    target = top_p * mass.sum(-1, keepdim=True)
    above = torch.zeros_like(target)  # the mass of what is heavier than all that have the prefix
    prefix = torch.zeros_like(target, dtype=torch.int32)
    for shift, width in SEARCH:
        bucket = (bits >> shift) & ((1 << width) - 1)
        inside = (bits >> (shift + width)) == prefix
        sums = mass.new_zeros(len(flat), 1 << width).scatter_add_(1, bucket.long(), mass * inside)
        from_top = sums.flip(-1).cumsum(-1)
        crossed = ((above + from_top >= target) & (from_top > 0)).int().argmax(-1, keepdim=True)
        above = above + from_top.gather(-1, crossed) - sums.flip(-1).gather(-1, crossed)
        prefix = (prefix << width) | ((1 << width) - 1 - crossed).int()
    least = prefix.view(torch.float32)
    count = torch.ceil((target - above) / least.double()).clamp(min=1)
    return least.view(*weight.shape[:-1], 1), count.view(*weight.shape[:-1], 1)


def inverse_cdf(weight: Tensor, uniform: Tensor) -> Tensor:
    """The first id at which the running sum of weights exceeds uniform × total; weight (…, vocab), uniform (…).

    A large vocabulary is summed up in groups of neighbours: the group is found first, then the id in it.
    """
    vocabulary = weight.shape[-1]
    if vocabulary <= GROUP:
        running = weight.cumsum(-1)
        return first_beyond(weight, running, uniform[..., None] * running[..., -1:])
    if vocabulary % GROUP:
        weight = torch.nn.functional.pad(weight, (0, -vocabulary % GROUP))
    weight = weight.unflatten(-1, (-1, GROUP))
    sums = weight.sum(-1)
    running = sums.cumsum(-1)
    target = uniform[..., None] * running[..., -1:]
    group = first_beyond(sums, running, target)[..., None]
    before = torch.where(group > 0, running.gather(-1, (group - 1).clamp(min=0)), 0)
    members = weight.take_along_dim(group[..., None], -2)[..., 0, :]
    return group[..., 0] * GROUP + first_beyond(members, before + members.cumsum(-1), target)


def first_beyond(weight: Tensor, running: Tensor, target: Tensor) -> Tensor:
    """The first place with a weight at which the running sum exceeds the target, else the last that has one.

    weight and running (…, n), target (…, 1) -> (…,).
    """
    kept = weight > 0  # asked for itself: a parallel sum may rise by rounding where the weight is 0
    places = torch.arange(weight.shape[-1], dtype=torch.int32, device=weight.device)
    chosen = torch.where(kept & (running > target), places, weight.shape[-1]).amin(-1)
    last_kept = torch.where(kept, places, 0).amax(-1)
    return torch.minimum(chosen, last_kept).long()
