"""The draw of a candidate token for every position, from random numbers that depend on names alone (no batch)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from common.schema import Sampling

STREAMS = {"token": 1, "alg_temp": 2, "random": 3}


@dataclass(frozen=True)
class Candidates:
    """What was drawn; every field is (batch, block)."""

    tokens: Tensor
    probability: Tensor  # of the token; `confidence_from` says under which softmax
    logp: Tensor  # log_softmax(logits / T) with the mask token at minus infinity, before top-k and top-p
    entropy: Tensor  # of the raw softmax, nats
    kept_mass: Tensor  # probability that top-k and top-p left


def uniforms(key: Tensor, position: Tensor, step: Tensor, stream: str) -> Tensor:
    """One float32 in [0, 1) for each (sequence key, position, denoising step, stream), by a counter-based hash.

    key (batch,) int64, position (batch, block), step (batch,) -> (batch, block). The finaliser is splitmix64's.
    """
    hashed = _mix(key[:, None] + _signed(0x9E3779B97F4A7C15) * (position + 1))
    hashed = _mix(hashed + _signed(0xD1B54A32D192ED03) * (step[:, None] + 1))
    hashed = _mix(hashed + STREAMS[stream])
    return _shift_right(hashed, 40).to(torch.float32) * 2.0**-24


def draw(logits: Tensor, uniform: Tensor, mask_id: int, settings: Sampling) -> Candidates:
    """Draw a token per position by the inverse CDF in id order; temperature 0 or top_k 1 takes the argmax.

    logits (batch, block, vocab), uniform (batch, block). The mask token is never drawn. Filters come in the order
    temperature, top-k, top-p. Confidence under `raw` is that of the untouched softmax over the whole vocabulary.
    """
    raw_logp = torch.log_softmax(logits.float(), dim=-1)  # (batch, block, vocab)
    raw_probability = raw_logp.exp()
    entropy = -(raw_probability * raw_logp).sum(-1)

    logp = token_logp(logits, mask_id, rollout_temperature(settings))
    kept = filter_top(logp.exp(), settings.top_k, settings.top_p)
    if is_greedy(settings):
        tokens = logp.argmax(-1)
    else:
        tokens = inverse_cdf(kept, uniform)
    index = tokens[..., None]
    if settings.confidence_from == "raw":
        probability = raw_probability.gather(-1, index)
    else:
        probability = kept.gather(-1, index) / kept.sum(-1, keepdim=True)
    return Candidates(
        tokens=tokens,
        probability=probability[..., 0],
        logp=logp.gather(-1, index)[..., 0],
        entropy=entropy,
        kept_mass=kept.sum(-1),
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
    scaled = logits.float() / temperature
    forbidden = torch.zeros(scaled.shape[-1], dtype=torch.bool, device=scaled.device)
    forbidden[mask_id] = True
    return torch.log_softmax(scaled.masked_fill(forbidden, float("-inf")), dim=-1)


def filter_top(probability: Tensor, top_k: int, top_p: float) -> Tensor:
    """Zero all but the top_k likeliest tokens, then all beyond the one that crosses top_p; sums are not restored.

    probability (…, vocab) -> (…, vocab). top_k 0 and top_p 1 keep everything; ties go to the lower id.
    """
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


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant


def _shift_right(value: Tensor, bits: int) -> Tensor:
    return (value >> bits) & ((1 << (64 - bits)) - 1)  # logical, where torch's shift keeps the sign


def _mix(value: Tensor) -> Tensor:
    value = (value ^ _shift_right(value, 30)) * _signed(0xBF58476D1CE4E5B9)
    value = (value ^ _shift_right(value, 27)) * _signed(0x94D049BB133111EB)
    return value ^ _shift_right(value, 31)
