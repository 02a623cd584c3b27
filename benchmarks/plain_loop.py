"""Block-attention sampling as a plain loop: one sequence, transformers' own cache, one call of the model per forward.

What the engine is measured against; tests/test_engine_cache.py holds the two to the same responses. The draw and the
choice of positions are the project's own functions, so that the loop spends its time in the model.
"""

import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import DynamicCache

from common.schema import Sampling
from common.trajectory import Request
from sample.block_attention import block_causal_mask
from sample.draw import draw, is_greedy, uniforms
from sample.strategies import BlockState, even_split, find_strategy


class Clock:
    """Seconds and calls spent inside the model, and seconds in all."""

    def __init__(self) -> None:
        self.seconds, self.calls, self.total = 0.0, 0, 0.0

    def __call__(self, function: Callable, *arguments: object, **named: object) -> object:
        synchronize()
        begin = time.perf_counter()
        result = function(*arguments, **named)
        synchronize()
        self.seconds += time.perf_counter() - begin
        self.calls += 1
        return result


def synchronize() -> None:
    """Wait for the device, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@torch.inference_mode()
def plain_loop(
    model: torch.nn.Module, mask_id: int, stop_ids: Iterable[int], request: Request, settings: Sampling, clock: Clock
) -> tuple[list[int], list[int], list[float]]:
    """Response ids, step map and log-probabilities of one response; `clock` counts the forwards, prefill apart."""
    begin = time.perf_counter()
    device, block, prompt = model.device, settings.block_size, len(request.prompt_ids)
    stops, strategy = set(stop_ids), find_strategy(settings.remasking_strategy)
    key = torch.tensor([request.stream_key()], device=device)
    cache, start = DynamicCache(), prompt // block * block
    if start:
        positions = torch.arange(start, device=device)[None]
        mask = block_causal_mask(positions, positions >= 0, block)
        ids = torch.tensor([request.prompt_ids[:start]], device=device)
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
    ids, step_map, logp, step = list(request.prompt_ids), {}, {}, 0

    def forward(tokens: Tensor) -> Tensor:
        return model(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True).logits

    while True:
        ids += [mask_id] * (start + block - len(ids))
        tokens = torch.tensor([ids[start:]], device=device)
        positions = torch.arange(start, start + block, device=device)[None]
        masked = positions >= prompt
        mask = torch.ones(1, 1, block, start + block, dtype=torch.bool, device=device)
        block_step = 0
        while masked.any():
            logits = clock(forward, tokens)
            cache.crop(-block)
            now = torch.tensor([step], device=device)
            uniform = None if is_greedy(settings) else uniforms(key, positions, now, "token")
            drawn = draw(logits, uniform, mask_id, settings)
            k = even_split(block, settings.denoising_steps_per_block, torch.tensor([block_step], device=device))
            chance = uniforms(key, positions, now, "random") if ":" in settings.remasking_strategy else None
            ranked = drawn, drawn.probability, drawn.entropy, masked, k, chance
            chosen = masked & strategy(BlockState(*ranked, settings, tokens, positions >= prompt, torch.zeros_like(k)))
            tokens = torch.where(chosen, drawn.tokens, tokens)
            masked = masked & ~chosen
            for index in chosen[0].nonzero()[:, 0].tolist():
                step_map[start + index], logp[start + index] = step, float(drawn.logp[0, index])
            step, block_step = step + 1, block_step + 1
        ids[start:] = tokens[0].tolist()
        limit = prompt + settings.max_token
        if stops.intersection(ids[max(start, prompt) : limit]) or start + block >= limit:
            break
        clock(forward, tokens)  # the commit
        start += block
    response = range(prompt, len(ids))
    clock.total += time.perf_counter() - begin
    return ids[prompt:], [step_map[i] for i in response], [logp[i] for i in response]
