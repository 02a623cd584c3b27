"""Full attention (Dream, LLaDA, MMaDA): every token sees the prompt and the whole canvas, masks included.

The response is a canvas of masks behind the prompt, denoised block by block. Without a cache each step is a forward of
prompt and canvas: exact. With one, a block's first forward is that and keeps the keys and values of all that lies
before the block; the block's later forwards recompute only the window from the block's start to `further_horizon`
positions behind its end, and see nothing beyond. Where the prediction for position i is at i-1 (Dream) the window
starts one position earlier, so that every logit is there and no position is both kept and recomputed.
"""

import torch
from torch import Tensor

from sample.cache import KeyValueCache
from sample.network import CachedKeys, Network, OwnKeys, bias_of
from sample.slots import Slots


def denoise(network: Network, slots: Slots, positions: Tensor, longest: int) -> Tensor:
    """Hidden states that predict each row's current block, (batch, block, width), from a forward of all its tokens.

    positions (batch, block) absolute; `longest` is at or behind the end of every canvas.
    """
    hidden = _forward_all(network, slots.tokens, slots.canvas_end, longest)
    return _at(hidden, positions + network.logit_offset)


def denoise_cached(
    network: Network,
    cache: KeyValueCache,
    slots: Slots,
    positions: Tensor,
    longest: int,
    further_horizon: int | None,
) -> Tensor:
    """As `denoise`, with the prefix kept from each block's first forward. Rows are the cache's first slots."""
    index = positions + network.logit_offset  # of the hidden states that predict the block
    states = torch.empty(*index.shape, network.model.config.hidden_size, dtype=network.dtype, device=network.device)
    first, later = (rows.nonzero()[:, 0] for rows in (slots.block_step == 0, slots.block_step > 0))
    if len(first):
        hidden = _forward_all(network, slots.tokens[first], slots.canvas_end[first], longest, cache, first)
        states[first] = _at(hidden, index[first])
    if len(later):
        start, end = index[later, 0], slots.canvas_end[later]
        if further_horizon is not None:
            end = torch.minimum(positions[later, -1] + 1 + further_horizon, end)
        hidden = _forward_window(network, cache, slots.tokens[later], start, end, later)
        states[later] = _at(hidden, index[later] - start[:, None])
    return states


def _forward_all(
    network: Network,
    tokens: Tensor,
    canvas_end: Tensor,
    longest: int,
    cache: KeyValueCache | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Of prompts and canvases; with a cache the keys are kept in slots `rows`."""
    ids = tokens[:, :longest]
    position = torch.arange(longest, device=ids.device).expand_as(ids)
    places = None if cache is None else cache.places(rows, position)
    bias = bias_of(position < canvas_end[:, None], network.dtype)[:, None, None]
    return network.forward(ids, position, OwnKeys(bias, cache, places))


def _forward_window(
    network: Network, cache: KeyValueCache, tokens: Tensor, start: Tensor, end: Tensor, rows: Tensor
) -> Tensor:
    """Of the positions from `start` up to `end` (rows,) alone, over the kept keys of what lies before."""
    width, seen = int((end - start).max()), int(end.max())
    position = start[:, None] + torch.arange(width, device=tokens.device)
    # rows with a shorter window repeat their last position, whose keys come out the same
    position = torch.minimum(position, end[:, None] - 1)
    bias = bias_of(torch.arange(seen, device=tokens.device) < end[:, None], network.dtype)[:, None, None]
    attention = CachedKeys(bias, cache, cache.places(rows, position), rows, seen)
    return network.forward(tokens.gather(1, position), position, attention)


def _at(hidden: Tensor, index: Tensor) -> Tensor:
    """Hidden states (batch, length, width) at positions `index` (batch, block)."""
    return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
