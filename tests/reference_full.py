"""Full-attention sampling of one sequence, written from DESIGN.md §3: plain loops over tests/reference.py's draw.

Without a cache every step runs the whole canvas. With one, transformers' own DynamicCache holds the prefix of the
block's first forward, and the window is run against a copy of it.
"""

import math

import numpy as np
import torch
from transformers import DynamicCache

from common.schema import Sampling
from common.trajectory import Request
from models.family import family_of_network
from tests.reference import Canvas, Trace, choose, draw_one, fill, softmax, static_k, uniform_of, without, write


def sample_full_attention(
    model: torch.nn.Module, mask_id: int, stop_ids: list[int], request: Request, settings: Sampling
) -> Trace:
    """The response to one request."""
    offset = family_of_network(model).logit_offset
    barred = [model.config.eos_token_id] if settings.logits_eos_inf else []
    prompt, size = len(request.prompt_ids), settings.block_size
    blocks = math.ceil(settings.max_token / size)
    canvas = Canvas(request.prompt_ids + [mask_id] * (blocks * size), mask_id)
    steps_of_block = [max(1, len(part)) for part in np.array_split(np.arange(settings.steps), blocks)]
    trace = Trace()
    for block in range(blocks):
        start, end = prompt + block * size, prompt + (block + 1) * size
        masked, block_step, prefix = list(range(start, end)), 0, None
        while masked:
            tokens = canvas.tokens
            if settings.use_cache and block_step > 0:
                horizon = len(tokens) if settings.further_horizon is None else end + settings.further_horizon
                logits = window_logits(model, tokens, prefix, start + offset, min(horizon, len(tokens)))
            else:
                logits, prefix = whole_logits(model, tokens, start + offset)
            candidates, scores = {}, {}
            for position in range(start, end):
                row = logits[position + offset]
                u = uniform_of(request, position, trace.steps, "token")
                likeliest = position not in masked
                candidates[position] = draw_one(row, u, mask_id, settings, barred, likeliest)
                row = without(row, barred)
                candidates[position].present = float(softmax(row)[tokens[position]])
                if not likeliest:
                    one = candidates[position]
                    scores[position] = score(request, position, trace.steps, one, row, settings, stop_ids)
            k = static_k(size, steps_of_block[block], block_step)
            if settings.remasking_strategy == "revoke":
                write(canvas, masked, candidates, k, trace.steps, 0, settings)
            else:
                drawn = {i: candidates[i] for i in masked}
                ends = {i for i in masked if drawn[i].token in stop_ids} if settings.confidence_eos_eot_inf else set()
                for position in choose_by_score(drawn, scores, k, settings, ends):
                    canvas.write(position, trace.steps, candidates[position])
                    masked.remove(position)
            block_step += 1
            trace.steps += 1
            trace.forwards += 1
        stops = [i for i in range(prompt, min(end, prompt + settings.max_token)) if canvas.tokens[i] in stop_ids]
        if stops:
            break
    fill(trace, canvas, range(prompt, len(canvas.tokens)))
    trace.finish_reason = "stop" if stops else "length"
    trace.length = stops[0] + 1 - prompt if stops else settings.max_token
    return trace


def whole_logits(model: torch.nn.Module, canvas: list[int], keep: int) -> tuple[dict[int, np.ndarray], list]:
    """Logits by position of a forward over everything, and each layer's keys and values before position `keep`."""
    cache = DynamicCache()
    everything = torch.ones(1, 1, len(canvas), len(canvas), dtype=torch.bool)
    with torch.no_grad():
        logits = model(
            torch.tensor([canvas]),
            attention_mask=everything,
            position_ids=torch.arange(len(canvas))[None],
            past_key_values=cache,
            use_cache=True,
        ).logits[0]
    prefix = [(layer.keys[:, :, :keep], layer.values[:, :, :keep]) for layer in cache.layers]
    return dict(enumerate(logits.float().numpy())), prefix


def window_logits(
    model: torch.nn.Module, canvas: list[int], prefix: list, start: int, end: int
) -> dict[int, np.ndarray]:
    """Logits by position of a forward over [start, end) that sees the prefix and itself."""
    cache = DynamicCache()
    for number, (keys, values) in enumerate(prefix):
        cache.update(keys.clone(), values.clone(), number)
    with torch.no_grad():
        logits = model(
            torch.tensor([canvas[start:end]]),
            attention_mask=torch.ones(1, 1, end - start, end, dtype=torch.bool),
            position_ids=torch.arange(start, end)[None],
            past_key_values=cache,
            use_cache=True,
        ).logits[0]
    return {start + n: row for n, row in enumerate(logits.float().numpy())}


def score(
    request: Request, position: int, step: int, candidate, logits: np.ndarray, settings: Sampling, stop_ids: list[int]
) -> float:
    """The number by which `target` ranks a position."""
    likeliest = sorted(softmax(logits).tolist(), reverse=True)
    value = {
        "confidence": candidate.confidence,
        "margin_confidence": likeliest[0] - likeliest[1],
        "neg_entropy": -candidate.entropy,
        "random": uniform_of(request, position, step, "random"),
    }[settings.target]
    if candidate.token in stop_ids:
        value = value / settings.pad_target_penalty if value > 0 else value * settings.pad_target_penalty
    if settings.alg_temp > 0:
        u = uniform_of(request, position, step, "alg_temp")
        value = value / settings.alg_temp - math.log(-math.log(min(max(u, 1e-7), 1 - 1e-7)))
    return -math.inf if settings.confidence_eos_eot_inf and candidate.token in stop_ids else value


def choose_by_score(
    candidates: dict, scores: dict[int, float], k: int, settings: Sampling, ends: set[int]
) -> list[int]:
    """The positions unmasked: by score where confidence decides under block attention; `ends` are never sure."""
    best = sorted(scores, key=lambda i: (-scores[i], i))
    if settings.remasking_strategy == "low_confidence_static":
        return best[:k]
    if settings.remasking_strategy == "low_confidence_dynamic":
        sure = [i for i in candidates if i not in ends and candidates[i].confidence >= settings.dynamic_threshold]
        return sure or best[:1]
    return choose(candidates, k, settings)
