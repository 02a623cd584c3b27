"""The draw of a candidate token for every position, from random numbers that depend on names alone (no batch)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.schema import Sampling

Words = Tensor | np.ndarray
STREAMS = {"token": 1, "alg_temp": 2, "random": 3}
BY_CONFIDENCE = ("low_confidence_static", "low_confidence_dynamic", "sequential")  # strategies that read no entropy


@dataclass(frozen=True)
class Candidates:
    """What was drawn; every field has the shape of what it was drawn for, (batch, block) for a strategy."""

    tokens: Tensor
    probability: Tensor  # of the token; `confidence_from` says under which softmax
    logp: Tensor  # log_softmax(logits / T) with the mask token at minus infinity, before top-k and top-p
    entropy: Tensor  # nats; `entropy_from` says of which softmax; 0 unless strategy or target ask
    margin: Tensor  # likeliest over second likeliest, under the softmax of `probability`; 0 unless target asks
    kept_mass: Tensor  # probability that top-k and top-p left

    def spread(self, where: Tensor, shape: torch.Size) -> Candidates:
        """These, drawn for the flat positions `where` alone, in a tensor of that shape; 0 elsewhere."""
        floats = torch.stack((self.probability, self.logp, self.entropy, self.margin, self.kept_mass))
        floats = floats.new_zeros(5, shape.numel()).index_copy_(1, where, floats).view(5, *shape)
        tokens = self.tokens.new_zeros(shape.numel()).index_copy_(0, where, self.tokens).view(shape)
        return Candidates(tokens, *floats)


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
    logits: Tensor, uniform: Tensor | None, mask_id: int, settings: Sampling, barred: Tensor | None = None
) -> Candidates:
    """Draw a token per position by the inverse CDF in id order; temperature 0 or top_k 1 takes the argmax.

    logits (…, vocab), uniform (…), unused where the draw is greedy. The mask token is never drawn. Temperature
    comes before top-k and top-p. Confidence under `raw` is that of the untouched softmax over the whole
    vocabulary, and so is entropy; under `sampled` they are of what is drawn from. Entropy and margin are 0 where the
    settings name nothing that reads them.

    Ids that are `barred` (n,) are never drawn either: their logits are minus infinity for the draw, confidence, margin
    and entropy. Log-probabilities are the network's, in which they have their share; `kept_mass` says what is left.
    """
    logits = logits.float()
    allowed = logp = token_logp(logits, mask_id, rollout_temperature(settings))
    if barred is not None:
        logits, allowed = (values.index_fill(-1, barred, float("-inf")) for values in (logits, logp))
    total = logits.logsumexp(-1)  # of the raw softmax
    raw = settings.confidence_from == "raw"
    filtered = settings.top_k > 0 or settings.top_p < 1 or barred is not None
    reads_entropy = settings.remasking_strategy not in BY_CONFIDENCE or settings.target == "neg_entropy"
    raw_entropy = settings.entropy_from == "raw" or not reads_entropy
    if is_greedy(settings) and raw and raw_entropy and not filtered:
        kept, tokens, kept_mass = None, logp.argmax(-1), torch.ones_like(total)
    else:
        kept = filter_top(allowed.exp(), settings.top_k, settings.top_p, settings.filter_order)
        tokens = allowed.argmax(-1) if is_greedy(settings) else inverse_cdf(kept, uniform)
        kept_mass = kept.sum(-1)

    def at_token(values: Tensor) -> Tensor:
        return values.gather(-1, tokens[..., None])[..., 0]

    margin = entropy = torch.zeros_like(total)
    if settings.target == "margin_confidence":
        best = ((logits - total[..., None]).exp() if raw else kept / kept_mass[..., None]).topk(2, dim=-1).values
        margin = best[..., 0] - best[..., 1]
    if not raw_entropy:
        entropy = torch.special.entr(kept / kept_mass[..., None]).sum(-1)
    elif reads_entropy:
        raw_logp = logits - total[..., None]
        if barred is not None:
            raw_logp = raw_logp.index_fill(-1, barred, torch.finfo(torch.float32).min)  # p log p is 0, not NaN
        entropy = -(raw_logp.exp() * raw_logp).sum(-1)
    return Candidates(
        tokens=tokens,
        probability=(at_token(logits) - total).exp() if raw else at_token(kept) / kept_mass,
        logp=at_token(logp),
        entropy=entropy,
        margin=margin,
        kept_mass=kept_mass,
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


def filter_top(probability: Tensor, top_k: int, top_p: float, order: str = "top_k_first") -> Tensor:
    """Zero all but the top_k likeliest tokens and all beyond the one that crosses top_p; sums are not restored.

    probability (…, vocab) -> (…, vocab). top_k 0 and top_p 1 keep everything; ties go to the lower id. The mass that
    top_p is a share of is what the first filter left.
    """
    if order == "top_p_first":
        return filter_top(filter_top(probability, 0, top_p), top_k, 1.0)
    if 0 < top_k < probability.shape[-1]:
        order = probability.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
        probability = torch.zeros_like(probability).scatter(-1, order, probability.gather(-1, order))
    if top_p < 1:
        ranked, order = probability.sort(dim=-1, descending=True, stable=True)
        share = ranked / ranked.sum(-1, keepdim=True)
        before = share.cumsum(-1) - share  # mass ahead of each token: the one that crosses top_p is kept
        keep = before < top_p
        keep[..., 0] = True  # the likeliest crosses even a top_p of 0
        probability = torch.zeros_like(probability).scatter(-1, order, ranked * keep)
    return probability


def inverse_cdf(weight: Tensor, uniform: Tensor) -> Tensor:
    """The first id at which the running sum of weights exceeds uniform × total; weight (…, vocab), uniform (…)."""
    running = weight.cumsum(-1)
    target = uniform[..., None] * running[..., -1:]
    kept = weight > 0  # asked for itself: a parallel sum may rise by rounding where the weight is 0
    ids = torch.arange(weight.shape[-1], dtype=torch.int32, device=weight.device)
    chosen = torch.where(kept & (running > target), ids, weight.shape[-1]).amin(-1)
    last_kept = torch.where(kept, ids, 0).amax(-1)
    return torch.minimum(chosen, last_kept).long()
