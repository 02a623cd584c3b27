"""Full attention (Dream, LLaDA, MMaDA): every token sees the prompt and the whole canvas, masks included.

The response is a canvas of masks behind the prompt, denoised block by block. Without a cache each step is a forward of
prompt and canvas: exact. With one, a block's first forward is that and keeps the keys and values of all that lies
before the block; the block's later forwards recompute only the window from the block's start to `further_horizon`
positions behind its end, and see nothing beyond. Where the prediction for position i is at i-1 (Dream) the window
starts one position earlier, so that every logit is there and no position is both kept and recomputed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sample.cache import SlotCache


def denoise(
    model: torch.nn.Module,
    tokens: Tensor,
    canvas_end: Tensor,
    positions: Tensor,
    logit_offset: int,
) -> Tensor:
    """Logits of each row's current block from a forward of all its tokens, (batch, block, vocab).

    tokens (batch, capacity), canvas_end (batch,), positions (batch, block) absolute.
    """
    hidden = _forward_all(model, tokens, canvas_end, cache=None, rows=None)
    return _block_logits(model, hidden, positions + logit_offset)


def denoise_cached(
    model: torch.nn.Module,
    cache: SlotCache,
    tokens: Tensor,
    canvas_end: Tensor,
    positions: Tensor,
    logit_offset: int,
    first: Tensor,
    further_horizon: int | None,
) -> Tensor:
    """As `denoise`, with the prefix kept from each block's first forward; `first` (batch,) marks the rows in theirs.

    Rows are the cache's first slots.
    """
    logits = None
    for chosen, window in ((first, False), (~first, True)):
        rows = chosen.nonzero()[:, 0]
        if len(rows) == 0:
            continue
        if window:
            start = positions[rows, 0] + logit_offset  # (rows,)
            hidden = _forward_window(
                model, cache, tokens[rows], canvas_end[rows], start, positions[rows, -1] + 1, rows, further_horizon
            )
            index = positions[rows] + logit_offset - start[:, None]
        else:
            hidden = _forward_all(model, tokens[rows], canvas_end[rows], cache, rows)
            index = positions[rows] + logit_offset
        part = _block_logits(model, hidden, index)
        logits = part.new_empty(*positions.shape, part.shape[-1]) if logits is None else logits
        logits[rows] = part
    return logits


def _forward_all(
    model: torch.nn.Module, tokens: Tensor, canvas_end: Tensor, cache: SlotCache | None, rows: Tensor | None
) -> Tensor:
    longest = int(canvas_end.max())
    ids = tokens[:, :longest]
    position = torch.arange(longest, device=ids.device).expand_as(ids)
    if cache is not None:
        cache.place(rows, position, seen=None)
    return _hidden(model, ids, position, position < canvas_end[:, None], cache)


def _forward_window(
    model: torch.nn.Module,
    cache: SlotCache,
    tokens: Tensor,
    canvas_end: Tensor,
    start: Tensor,
    block_end: Tensor,
    rows: Tensor,
    further_horizon: int | None,
) -> Tensor:
    end = canvas_end if further_horizon is None else torch.minimum(block_end + further_horizon, canvas_end)
    width, seen = int((end - start).max()), int(end.max())
    position = start[:, None] + torch.arange(width, device=tokens.device)
    inside = position < end[:, None]
    # rows with a shorter window repeat their last position, whose keys come out the same
    position = torch.where(inside, position, end[:, None] - 1)
    cache.place(rows, position, seen)
    visible = torch.arange(seen, device=tokens.device) < end[:, None]
    return _hidden(model, tokens.gather(1, position), position, visible, cache)


def _hidden(model: torch.nn.Module, ids: Tensor, position: Tensor, visible: Tensor, cache: SlotCache | None) -> Tensor:
    return model.model(
        input_ids=ids,
        position_ids=position,
        attention_mask=visible[:, None, None, :].expand(-1, 1, ids.shape[1], -1),
        past_key_values=cache,
        use_cache=False,
    ).last_hidden_state


def _block_logits(model: torch.nn.Module, hidden: Tensor, index: Tensor) -> Tensor:
    return model.lm_head(hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1])))
