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
    hidden = _forward_all(network, slots.tokens, slots.canvas_end, longest, None, None)
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
    states = None
    first = slots.block_step == 0
    for chosen, window in ((first, False), (~first, True)):
        rows = chosen.nonzero()[:, 0]
        if len(rows) == 0:
            continue
        tokens, end = slots.tokens[rows], slots.canvas_end[rows]
        index = positions[rows] + network.logit_offset  # of the hidden states that predict the block
        if window:
            start = index[:, 0]
            if further_horizon is not None:
                end = torch.minimum(positions[rows, -1] + 1 + further_horizon, end)
            hidden = _forward_window(network, cache, tokens, start, end, rows)
            index = index - start[:, None]
        else:
            hidden = _forward_all(network, tokens, end, longest, cache, rows)
        part = _at(hidden, index)
        states = part.new_empty(*positions.shape, part.shape[-1]) if states is None else states
        states[rows] = part
    return states


def _forward_all(
    network: Network,
    tokens: Tensor,
    canvas_end: Tensor,
    longest: int,
    cache: KeyValueCache | None,
    rows: Tensor | None,
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
    visible = torch.arange(seen, device=tokens.device) < end[:, None]
    bias = bias_of(visible, network.dtype)[:, None, None]
    attention = CachedKeys(bias, cache, cache.places(rows, position), rows, seen)
    return network.forward(tokens.gather(1, position), position, attention)


def _at(hidden: Tensor, index: Tensor) -> Tensor:
    """Hidden states (batch, length, width) at positions `index` (batch, block)."""
    return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
