"""Block-attention sampling of one sequence, written from DESIGN.md §3: plain loops, everything recomputed every step.

No cache, no batch, no slots: every denoising step runs the whole canvas under a block-causal mask. The draw and the
strategies are scalar code in numpy's float32. Only the uniform random numbers come from the project, where the hash
is their definition; `uniform` below spells that hash out in Python's own integers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from common.schema import Sampling
from common.trajectory import Request
from sample.draw import uniforms

MASK64 = (1 << 64) - 1


@dataclass
class Trace:
    """What a trajectory must say."""

    response_ids: list[int] = field(default_factory=list)
    step_map: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    kept_mass: float = 0.0
    finish_reason: str = "length"
    length: int = 0
    steps: int = 0
    forwards: int = 0


@dataclass
class Candidate:
    """One position's draw."""

    token: int
    confidence: float
    logp: float
    entropy: float
    kept_mass: float


def sample_block_attention(
    model: torch.nn.Module, mask_id: int, stop_ids: list[int], request: Request, settings: Sampling
) -> Trace:
    """The response to one request."""
    block, prompt = settings.block_size, len(request.prompt_ids)
    limit = prompt + settings.max_token
    canvas, unmasked_at, drawn = list(request.prompt_ids), {}, {}
    trace = Trace()
    start = prompt // block * block
    while True:
        end = start + block
        canvas += [mask_id] * (end - len(canvas))
        masked = [position for position in range(start, end) if position >= prompt]
        block_step = 0
        while masked:
            logits = block_logits(model, canvas, block)
            candidates = {}
            for position in masked:
                u = uniform_of(request, position, trace.steps, "token")
                candidates[position] = draw_one(logits[position - start], u, mask_id, settings)
            k = static_k(block, settings.denoising_steps_per_block, block_step)
            for position in choose(candidates, k, settings):
                canvas[position] = candidates[position].token
                unmasked_at[position] = trace.steps
                drawn[position] = candidates[position]
                masked.remove(position)
            block_step += 1
            trace.steps += 1
            trace.forwards += 1
        stops = [position for position in range(prompt, min(end, limit)) if canvas[position] in stop_ids]
        if stops or end >= limit:
            break
        if settings.merge_commit is False:
            trace.forwards += 1  # the clean block's keys and values, for the blocks that follow; else in their first
        start = end
    response = range(prompt, end)
    trace.response_ids = [canvas[position] for position in response]
    trace.step_map = [unmasked_at[position] for position in response]
    trace.logp = [drawn[position].logp for position in response]
    trace.confidence = [drawn[position].confidence for position in response]
    trace.kept_mass = float(np.mean([drawn[position].kept_mass for position in response]))
    trace.finish_reason = "stop" if stops else "length"
    trace.length = stops[0] + 1 - prompt if stops else settings.max_token
    return trace


def block_logits(model: torch.nn.Module, canvas: list[int], block: int) -> np.ndarray:
    """Logits of the canvas's last block, (block, vocab): a token sees its own block and earlier ones."""
    position = torch.arange(len(canvas))
    seen = (position[None, :] // block) <= (position[:, None] // block)
    with torch.no_grad():
        logits = model(
            torch.tensor([canvas]), attention_mask=seen[None, None], position_ids=position[None], use_cache=False
        ).logits
    return logits[0, -block:].float().numpy()


def draw_one(logits: np.ndarray, u: float, mask_id: int, settings: Sampling, barred: Sequence[int] = ()) -> Candidate:
    """Draw one token from its logits (vocab,): the mask token's is minus infinity, temperature, top-k, top-p.

    What is barred is not drawn, and confidence and entropy are without it; logp and kept mass are with it.
    """
    greedy = settings.temperature == 0 or settings.top_k == 1
    raw = softmax(without(logits, barred))
    allowed = logits.copy()
    allowed[mask_id] = -np.inf
    probability = softmax(allowed / np.float32(1.0 if greedy else settings.temperature))
    allowed = probability.copy()
    allowed[list(barred)] = 0
    if settings.filter_order == "top_k_first":
        kept = keep(allowed, settings.top_k, settings.top_p)
    else:
        kept = keep(allowed, 0, settings.top_p) & keep(allowed, settings.top_k, 1.0)
    token = int(allowed.argmax()) if greedy else inverse_cdf(allowed, kept, u)
    total = sum(allowed[i] for i in sorted(kept))
    sampled = allowed[token] / total
    of = raw.tolist() if settings.entropy_from == "raw" else [allowed[i] / total for i in sorted(kept)]
    return Candidate(
        token=token,
        confidence=float(raw[token] if settings.confidence_from == "raw" else sampled),
        logp=float(np.log(probability[token])),
        entropy=float(-sum(p * math.log(p) for p in of if p > 0)),
        kept_mass=float(total),
    )


def without(logits: np.ndarray, barred: Sequence[int]) -> np.ndarray:
    """Logits in which those of `barred` ids are minus infinity."""
    logits = logits.copy()
    logits[list(barred)] = -np.inf
    return logits


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities in float32."""
    weight = np.exp(logits - logits.max(), dtype=np.float32)
    return weight / weight.sum(dtype=np.float32)


def keep(probability: np.ndarray, top_k: int, top_p: float) -> set[int]:
    """Ids left by top-k, then top-p; the token that crosses p is kept, of equals the lower id comes first."""
    ranked = sorted(range(len(probability)), key=lambda i: (-probability[i], i))
    if top_k > 0:
        ranked = ranked[:top_k]
    if top_p >= 1:
        return set(ranked)
    total = sum(probability[i] for i in ranked)
    kept, mass = set(), np.float32(0)
    for i in ranked:
        kept.add(i)
        mass += probability[i] / total
        if mass >= top_p:
            break
    return kept


def inverse_cdf(probability: np.ndarray, kept: set[int], u: float) -> int:
    """The first kept id, in id order, at which the running sum exceeds u × total; the last kept one as clamp."""
    order = [i for i in sorted(kept) if probability[i] > 0]
    total = np.float32(0)
    for i in order:
        total += probability[i]
    running = np.float32(0)
    for i in order:
        running += probability[i]
        if running > np.float32(u) * total:
            return i
    return order[-1]


def static_k(block: int, steps: int, step: int) -> int:
    """Tokens unmasked by a block's step-th step: an even split, the remainder to the first steps.

    Strategies that do not go by k may take more steps; the last one's is theirs.
    """
    split = [len(part) for part in np.array_split(np.arange(block), steps)]
    return split[min(step, steps - 1)]


def choose(candidates: dict[int, Candidate], k: int, settings: Sampling) -> list[int]:
    """The positions that the strategy unmasks; `candidates` holds the masked ones."""
    by_confidence = sorted(candidates, key=lambda i: (-candidates[i].confidence, i))
    match settings.remasking_strategy:
        case "low_confidence_static":
            return by_confidence[:k]
        case "low_confidence_dynamic":
            sure = [i for i in candidates if candidates[i].confidence >= settings.dynamic_threshold]
            return by_confidence[:k] if len(sure) < k else sure
        case "sequential":
            return sorted(candidates)[:k]
        case "entropy_bounded":
            return within_bound({i: candidates[i].entropy for i in candidates}, settings.eb_threshold)
    raise AssertionError(settings.remasking_strategy)


def within_bound(entropy: dict[int, float], bound: float) -> list[int]:
    """Positions in order of entropy while the running sum, the position included, stays within bound; at least one."""
    order = sorted(entropy, key=lambda i: (entropy[i], i))
    chosen, total = order[:1], entropy[order[0]]
    for i in order[1:]:
        total += entropy[i]
        if total > bound:
            break
        chosen.append(i)
    return chosen


def uniform_of(request: Request, position: int, step: int, stream: str) -> float:
    """The project's random number for one position and step of a request."""
    key = torch.tensor([request.stream_key()])
    return float(uniforms(key, torch.tensor([[position]]), torch.tensor([step]), stream))


def uniform(key: int, position: int, step: int, stream: int) -> float:
    """That number in Python's integers: three rounds of splitmix64's finaliser, the upper 24 bits."""
    state = mix(key + 0x9E3779B97F4A7C15 * (position + 1))
    state = mix(state + 0xD1B54A32D192ED03 * (step + 1))
    return (mix(state + stream) >> 40) / 2**24


def mix(value: int) -> int:
    """splitmix64's finaliser."""
    value &= MASK64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK64
    return value ^ (value >> 31)
