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
from sample.network import CachedKeys, Network, OwnKeys, bias_of, pool_keys
from sample.slots import Slots


def denoise(network: Network, slots: Slots, positions: Tensor, longest: int) -> Tensor:
    """Hidden states that predict each row's current block, (batch, block, width), from a forward of all its tokens.

    positions (batch, block) absolute; `longest` is at or behind the end of every canvas.
    """
    return _forward_all(network, slots.tokens, slots.canvas_end, longest, positions + network.logit_offset)


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
        tokens, ends = slots.tokens[first], slots.canvas_end[first]
        states[first] = _forward_all(network, tokens, ends, longest, index[first], cache, first)
    if len(later):
        start, end = index[later, 0], _window_end(slots, positions, further_horizon)[later]
        width, seen = int((end - start).max()), int(end.max())
        at = index[later] - start[:, None]
        states[later] = _forward_window(network, cache, slots.tokens[later], start, end, later, width, seen, at)
    return states


def denoise_cached_fixed(
    network: Network,
    cache: KeyValueCache,
    slots: Slots,
    positions: Tensor,
    longest: int,
    window: int,
    further_horizon: int | None,
    first: int,
) -> Tensor:
    """As `denoise_cached`, in shapes that depend on nothing that is on the device; no window is wider than `window`.

    Of the rows that begin a block the first `first` have that forward, so that their states alone are right; those of
    the others, which must wait, mean nothing, and what is kept of them is overwritten when it is their turn.
    """
    index = positions + network.logit_offset
    start, end = index[:, 0], _window_end(slots, positions, further_horizon)
    states = _forward_window(network, cache, slots.tokens, start, end, None, window, longest, index - start[:, None])
    if first == 0:
        return states
    due = slots.begins()
    rows = due.long().argsort(descending=True, stable=True)[:first]
    due = due[rows]  # a row that is within a block keeps what it has
    tokens, ends = slots.tokens[rows], slots.canvas_end[rows]
    begun = _forward_all(network, tokens, ends, longest, index[rows], cache, rows, due)
    states[rows] = torch.where(due[:, None, None], begun, states[rows])
    return states


def _window_end(slots: Slots, positions: Tensor, further_horizon: int | None) -> Tensor:
    """Where the windows of rows end, (rows,)."""
    if further_horizon is None:
        return slots.canvas_end
    return torch.minimum(positions[:, -1] + 1 + further_horizon, slots.canvas_end)


def _forward_all(
    network: Network,
    tokens: Tensor,
    canvas_end: Tensor,
    longest: int,
    at: Tensor,
    cache: KeyValueCache | None = None,
    rows: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """Hidden states `at` (rows, block) positions from a forward of prompts and canvases.

    With a cache the keys are kept in slots `rows`, or in those of them that are `kept`.
    """
    ids = tokens[:, :longest]
    position = torch.arange(longest, device=ids.device).expand_as(ids)
    places = None if cache is None else cache.places(rows, position)
    if kept is not None:
        places = torch.where(kept.repeat_interleave(longest, output_size=len(places)), places, cache.tokens)
    bias = bias_of(position < canvas_end[:, None], network.dtype)[:, None, None]
    return network.forward(ids, position, OwnKeys(bias, cache, places), at)


def _forward_window(
    network: Network,
    cache: KeyValueCache,
    tokens: Tensor,
    start: Tensor,
    end: Tensor,
    rows: Tensor | None,
    width: int,
    seen: int,
    at: Tensor,
) -> Tensor:
    """Hidden states `at` (rows, block) places of the window, over the kept keys of what lies before it.

    The window holds the positions from `start` up to `end` (rows,). Rows are the first slots where no others are named.
    No window is wider than `width`, none ends behind `seen`.
    """
    position = start[:, None] + torch.arange(width, device=tokens.device)
    # rows with a shorter window repeat their last position, whose keys come out the same
    position = torch.minimum(position, end[:, None] - 1)
    slots = torch.arange(len(start), device=tokens.device) if rows is None else rows
    places = cache.places(slots, position)
    if network.kernel == "torch" and rows is None:
        attention = pool_keys(network, cache, places, end[None], width, seen)  # for queries of the whole window
        return _at(network.forward(tokens.gather(1, position), position, attention), at)
    bias = bias_of(torch.arange(seen, device=tokens.device) < end[:, None], network.dtype)[:, None, None]
    attention = CachedKeys(bias, cache, places, slice(len(start)) if rows is None else rows, seen)
    return network.forward(tokens.gather(1, position), position, attention, at)


def _at(hidden: Tensor, index: Tensor) -> Tensor:
    """Hidden states (batch, length, width) at positions `index` (batch, block)."""
    return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
