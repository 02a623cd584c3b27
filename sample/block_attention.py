"""Block attention (SDAR, TraDo): the forward of each sequence's current block against an exact key-value cache.

A token sees its own block and all earlier ones, so every query of the current block sees the positions up to the
block's end. Every forward writes the block's keys and values at its own positions; those of the clean block come last
and stay. That last writing, the commit, either has a forward of its own or rides in the next block's first one, as a
second line of tokens of the same sequence.
"""

import torch
from torch import Tensor

from common.memory import PREFILL_TOKENS
from sample.cache import KeyValueCache
from sample.network import CachedKeys, CommitEvery, CommitSome, FlashKeys, Network, OwnKeys, bias_of, pool_keys
from sample.slots import Slots

# by device: lengths are rounded up to a multiple of the first, so that shapes are few; a forward of its own takes as
# long as that many tokens more in another's
PREFILL = {"cuda": (64, 512), "cpu": (1, 32)}


def block_causal_mask(positions: Tensor, valid: Tensor, block_size: int) -> Tensor:
    """Who sees whom among tokens at `positions` (batch, length): own and earlier blocks, valid keys only.

    Returns bool (batch, 1, length, length), True where the query (third axis) sees the key (fourth).
    """
    block = positions // block_size
    return ((block[:, None, :] <= block[:, :, None]) & valid[:, None, :])[:, None]


def prefill(
    network: Network,
    cache: KeyValueCache,
    slots: Slots,
    prefixes: dict[int, tuple[int, ...]],
    new: list[int],
    block_size: int,
) -> None:
    """Write the keys and values of the prefixes of the rows `new`; what several rows need is computed once.

    `prefixes` are every row's, whole blocks of tokens, which the slots hold too; rows that are not new have theirs.
    """
    row_of = {prefix: row for row, prefix in prefixes.items() if row not in new}
    missing, copies = [], []
    for row in filter(prefixes.get, new):  # some have no whole block
        source = row_of.setdefault(prefixes[row], row)
        if source == row:
            missing.append(row)
        else:
            copies.append((source, row))
    groups = prefill_groups({row: len(prefixes[row]) for row in missing}, network.device)
    numbers = [row for rows, _ in groups for row in rows] + [row for pair in zip(*copies) for row in pair]
    if not numbers:
        return
    parts = slots.index(numbers).split([*(len(rows) for rows, _ in groups), len(copies), len(copies)])
    for rows, (_, longest) in zip(parts, groups):
        longest = min(longest, cache.width)
        lengths, ids = slots.block_start[rows], slots.tokens[rows, :longest]
        positions = torch.arange(longest, device=network.device).expand_as(ids)
        bias = bias_of(block_causal_mask(positions, positions < lengths[:, None], block_size), network.dtype)
        # what lies behind the prefix no token of it sees, and the response's own keys overwrite it
        network.forward(ids, positions, OwnKeys(bias, cache, cache.places(rows, positions)))
    if copies:
        cache.copy(*parts[-2:], max(len(prefixes[row]) for _, row in copies))


def prefill_groups(lengths: dict[int, int], device: torch.device) -> list[tuple[list[int], int]]:
    """Rows that are prefilled together, and the length to which they are filled up; the longest first.

    One comes to longer ones until these filled up more than a forward of its own costs.
    """
    step, forward = PREFILL[device.type]
    groups: list[tuple[list[int], int]] = []
    padding = 0
    for row in sorted(lengths, key=lambda row: -lengths[row]):
        length = lengths[row] + -lengths[row] % step
        rows, longest = groups[-1] if groups else ([], 0)
        padding += longest - length
        if not rows or padding > forward or (len(rows) + 1) * longest > PREFILL_TOKENS:
            rows, padding = [], 0
            groups.append((rows, length))
        rows.append(row)
    return groups


def denoise(
    network: Network,
    cache: KeyValueCache,
    slots: Slots,
    positions: Tensor,
    tokens: Tensor,
    seen: int,
    committing: Tensor | None,
) -> Tensor:
    """Hidden states of each row's current block, (rows, block, width); positions and tokens (rows, block).

    Rows are the cache's first slots, `seen` is at or behind the end of every block. Rows in `committing` carry their
    previous block along, whose commit is due; of those that it is not due for, nothing is kept.
    """
    rows, block = positions.shape
    starts, lines, at = positions[:, 0], torch.arange(rows, device=tokens.device), positions
    ends = starts + block
    if committing is not None:
        previous = (positions[committing] - block).clamp_(min=0)
        tokens = torch.cat((tokens, slots.tokens[committing[:, None], previous]))
        at, lines = torch.cat((positions, previous)), torch.cat((lines, committing))
        ends = torch.cat((ends, starts[committing].clamp(min=1)))
        due = torch.cat((torch.ones_like(starts, dtype=torch.bool), (slots.cached < starts)[committing]))
        places = torch.where(due.repeat_interleave(block), cache.places(lines, at), cache.tokens)
    else:
        places = cache.places(lines, at)
    every = committing is not None and len(committing) == rows
    if network.kernel == "flash-attn":
        return network.forward(tokens, at, FlashKeys(cache, places, lines.int(), ends.int()))[:rows]
    if network.kernel == "torch" and (committing is None or every):
        attention = pool_keys(network, cache, places, ends.view(-1, rows), block, seen)
        return network.forward(tokens, at, attention)[:rows]
    bias = bias_of(torch.arange(seen, device=tokens.device) < ends[:, None], network.dtype)[:, None, None]
    if committing is None:
        attention = CachedKeys(bias, cache, places, slice(rows), seen)
    elif every:
        both = torch.cat((bias[:rows], bias[rows:]), 2).repeat_interleave(block, dim=2)
        attention = CommitEvery(both, cache, places, rows, seen)
    else:
        attention = CommitSome(bias[:rows], bias[rows:], cache, places, rows, seen, committing)
    return network.forward(tokens, at, attention)[:rows]
