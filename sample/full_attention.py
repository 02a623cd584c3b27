"""Full attention (Dream, LLaDA, MMaDA): every token sees the prompt and the whole canvas, masks included.

The response is a canvas of masks behind the prompt, denoised block by block. Without a cache each step is a forward of
prompt and canvas: exact. With one, a block's first forward is that and keeps the keys and values of all that lies
before the block; the block's later forwards recompute only the window from the block's start to `further_horizon`
positions behind its end, and see nothing beyond. Where the prediction for position i is at i-1 (Dream) the window
starts one position earlier, so that every logit is there and no position is both kept and recomputed.
"""

import torch
from torch import Tensor

from sample.attention import Attention, Rotary, bias_of, forward
from sample.cache import KeyValueCache
from sample.slots import Slots


def denoise(
    model: torch.nn.Module, rotary: Rotary, slots: Slots, positions: Tensor, logit_offset: int, longest: int
) -> Tensor:
    """Hidden states that predict each row's current block, (batch, block, width), from a forward of all its tokens.

    positions (batch, block) absolute; `longest` is at or behind the end of every canvas.
    """
    hidden = _forward_all(model, rotary, slots.tokens, slots.canvas_end, longest, None, None)
    return _at(hidden, positions + logit_offset)


def denoise_cached(
    model: torch.nn.Module,
    rotary: Rotary,
    cache: KeyValueCache,
    slots: Slots,
    positions: Tensor,
    logit_offset: int,
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
        if window:
            start = positions[rows, 0] + logit_offset  # (rows,)
            if further_horizon is not None:
                end = torch.minimum(positions[rows, -1] + 1 + further_horizon, end)
            hidden = _forward_window(model, rotary, cache, tokens, start, end, rows)
            index = positions[rows] + logit_offset - start[:, None]
        else:
            hidden = _forward_all(model, rotary, tokens, end, longest, cache, rows)
            index = positions[rows] + logit_offset
        part = _at(hidden, index)
        states = part.new_empty(*positions.shape, part.shape[-1]) if states is None else states
        states[rows] = part
    return states


def _forward_all(
    model: torch.nn.Module,
    rotary: Rotary,
    tokens: Tensor,
    canvas_end: Tensor,
    longest: int,
    cache: KeyValueCache | None,
    rows: Tensor | None,
) -> Tensor:
    ids = tokens[:, :longest]
    position = torch.arange(longest, device=ids.device).expand_as(ids)
    places = None if cache is None else cache.places(rows, position)
    bias = _bias(model, position < canvas_end[:, None])
    return forward(model, rotary, ids, position, Attention(bias, cache, places))


def _forward_window(
    model: torch.nn.Module,
    rotary: Rotary,
    cache: KeyValueCache,
    tokens: Tensor,
    start: Tensor,
    end: Tensor,
    rows: Tensor,
) -> Tensor:
    width, seen = int((end - start).max()), int(end.max())
    position = start[:, None] + torch.arange(width, device=tokens.device)
    # rows with a shorter window repeat their last position, whose keys come out the same
    position = torch.minimum(position, end[:, None] - 1)
    visible = torch.arange(seen, device=tokens.device) < end[:, None]
    attention = Attention(_bias(model, visible), cache, cache.places(rows, position), rows, seen)
    return forward(model, rotary, tokens.gather(1, position), position, attention)


def _bias(model: torch.nn.Module, visible: Tensor) -> Tensor:
    return bias_of(visible, next(model.parameters()).dtype)[:, None, None]


def _at(hidden: Tensor, index: Tensor) -> Tensor:
    return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
