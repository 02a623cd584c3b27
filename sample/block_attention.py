"""Block attention (SDAR, TraDo): the forward of each sequence's current block against an exact key-value cache.

A token sees its own block and all earlier ones, so every query of the current block sees the positions up to the
block's end. The block's keys and values are written at its own positions by every forward; those of the clean block
come last and stay. Nothing has to be copied to commit a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sample.cache import SlotCache


def block_causal_mask(positions: Tensor, valid: Tensor, block_size: int) -> Tensor:
    """Who sees whom among tokens at `positions` (batch, length): own and earlier blocks, valid keys only.

    Returns bool (batch, 1, length, length), True where the query (third axis) sees the key (fourth).
    """
    block = positions // block_size
    return ((block[:, None, :] <= block[:, :, None]) & valid[:, None, :])[:, None]


def prefill(model: torch.nn.Module, cache: SlotCache, rows: slice, prompts: list[list[int]], block_size: int) -> None:
    """Write the keys and values of each prompt's full blocks into its slot, one of `rows`."""
    full = [len(prompt) // block_size * block_size for prompt in prompts]
    longest = max(full)
    if longest == 0:
        return
    device = cache.keys[0].device
    ids = torch.tensor([prompt[:n] + [0] * (longest - n) for prompt, n in zip(prompts, full)], device=device)
    positions = torch.arange(longest, device=device).expand_as(ids)
    valid = positions < torch.tensor(full, device=device)[:, None]
    cache.place(rows, positions, seen=None)
    # padding lies behind the prompt: no real token sees it, and the response's own keys overwrite it
    model.model(
        input_ids=ids,
        position_ids=positions,
        attention_mask=block_causal_mask(positions, valid | (positions == 0), block_size),
        past_key_values=cache,
        use_cache=False,
    )


def denoise(model: torch.nn.Module, cache: SlotCache, tokens: Tensor, positions: Tensor) -> Tensor:
    """Logits of each row's current block, (batch, block, vocab); tokens and positions (batch, block).

    Rows are the cache's first slots. The block's keys and values are written on the way.
    """
    ends = positions[:, -1] + 1
    seen = int(ends.max())
    visible = torch.arange(seen, device=tokens.device) < ends[:, None]  # (batch, seen)
    cache.place(slice(0, len(tokens)), positions, seen)
    hidden = model.model(
        input_ids=tokens,
        position_ids=positions,
        attention_mask=visible[:, None, None, :].expand(-1, 1, tokens.shape[1], -1),
        past_key_values=cache,
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden)
