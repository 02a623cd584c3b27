"""Block attention (SDAR, TraDo): the forward of each sequence's current block against an exact key-value cache.

A token sees its own block and all earlier ones, so every query of the current block sees the positions up to the
block's end. Every forward writes the block's keys and values at its own positions; those of the clean block come last
and stay. That last writing, the commit, either has a forward of its own or rides in the next block's first one, as a
second line of tokens of the same sequence.
"""

import torch
from torch import Tensor

from sample.attention import Attention, Rotary, bias_of, forward
from sample.cache import KeyValueCache
from sample.slots import Slots

PREFILL_TOKENS = 16384  # in one forward, so that its mask and activations stay small


def block_causal_mask(positions: Tensor, valid: Tensor, block_size: int) -> Tensor:
    """Who sees whom among tokens at `positions` (batch, length): own and earlier blocks, valid keys only.

    Returns bool (batch, 1, length, length), True where the query (third axis) sees the key (fourth).
    """
    block = positions // block_size
    return ((block[:, None, :] <= block[:, :, None]) & valid[:, None, :])[:, None]


def prefill(
    model: torch.nn.Module,
    rotary: Rotary,
    cache: KeyValueCache,
    prefixes: list[tuple[int, ...]],
    rows: list[int],
    block_size: int,
) -> None:
    """Write the keys and values of each prefix, whole blocks of tokens, into the slot of its row."""
    order = sorted((i for i in range(len(rows)) if prefixes[i]), key=lambda i: len(prefixes[i]))
    while order:
        count = max(1, min(len(order), PREFILL_TOKENS // len(prefixes[order[-1]])))  # the longest come first
        chunk, order = order[-count:], order[:-count]
        _prefill(model, rotary, cache, [prefixes[i] for i in chunk], [rows[i] for i in chunk], block_size)


def _prefill(
    model: torch.nn.Module,
    rotary: Rotary,
    cache: KeyValueCache,
    prefixes: list[tuple[int, ...]],
    rows: list[int],
    block_size: int,
) -> None:
    longest = max(map(len, prefixes))
    weight = next(model.parameters())
    ids = torch.tensor([[*prefix, *[0] * (longest - len(prefix))] for prefix in prefixes], device=weight.device)
    positions = torch.arange(longest, device=weight.device).expand_as(ids)
    valid = positions < torch.tensor([len(prefix) for prefix in prefixes], device=weight.device)[:, None]
    visible = block_causal_mask(positions, valid | (positions == 0), block_size)
    # padding lies behind the prefix: no real token sees it, and the response's own keys overwrite it
    places = cache.places(torch.tensor(rows, device=weight.device), positions)
    forward(model, rotary, ids, positions, Attention(bias_of(visible, weight.dtype), cache, places))


def denoise(
    model: torch.nn.Module,
    rotary: Rotary,
    cache: KeyValueCache,
    slots: Slots,
    positions: Tensor,
    tokens: Tensor,
    seen: int,
    extra: Tensor | None,
    flash: bool,
) -> Tensor:
    """Hidden states of each row's current block, (rows, block, width); positions and tokens (rows, block).

    Rows are the cache's first slots, `seen` is at or behind the end of every block. Rows in `extra` carry their
    previous block along, whose commit is due; of those that it is not due for, nothing is kept.
    """
    rows, block = positions.shape
    starts = positions[:, 0]
    reach = torch.arange(seen, device=tokens.device)
    visible = reach < (starts + block)[:, None]  # (rows, seen)
    line_rows, ends = torch.arange(rows, device=tokens.device), starts + block
    ids, at, keep, before_visible = tokens, positions, None, None
    if extra is not None:
        before = (positions[extra] - block).clamp_(min=0)
        ids = torch.cat((tokens, slots.tokens[extra[:, None], before]))
        at = torch.cat((positions, before))
        ends_before = starts[extra].clamp(min=1)
        before_visible = reach < ends_before[:, None]  # (rows of extra, seen)
        line_rows, ends = torch.cat((line_rows, extra)), torch.cat((ends, ends_before))
        due = torch.cat((torch.ones_like(line_rows[:rows], dtype=torch.bool), (slots.cached < starts)[extra]))
        keep = due.repeat_interleave(block)
    places = cache.places(line_rows, at)
    if keep is not None:
        places = torch.where(keep, places, cache.tokens)
    attention = Attention(None, cache, places, rows, seen, extra)
    if flash:
        attention.line_rows, attention.line_ends = line_rows.int(), ends.int()
    else:
        attention.bias, attention.extra_bias = biases(visible, before_visible, block, next(model.parameters()).dtype)
    return forward(model, rotary, ids, at, attention)[:rows]


def biases(visible: Tensor, before: Tensor | None, block: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """What the current blocks' queries see, and what those of further lines see, as `Attention` wants them."""
    if before is None:
        return bias_of(visible, dtype)[:, None, None], None
    if len(before) < len(visible):
        return bias_of(visible, dtype)[:, None, None], bias_of(before, dtype)[:, None, None]
    both = torch.stack((visible, before), 1).repeat_interleave(block, dim=1)  # (rows, 2 × block, seen)
    return bias_of(both, dtype)[:, None], None
