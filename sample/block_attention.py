"""Block attention (SDAR, TraDo): the forward of each sequence's current block against an exact key-value cache.

A token sees its own block and all earlier ones, so every query of the current block sees the positions up to the
block's end. Every forward writes the block's keys and values at its own positions; those of the clean block come last
and stay. That last writing, the commit, either has a forward of its own or rides in the next block's first one, as a
second line of tokens of the same sequence.
"""

import torch
from torch import Tensor

from sample.cache import KeyValueCache
from sample.network import CachedKeys, CommitEvery, CommitSome, FlashKeys, Network, OwnKeys, bias_of
from sample.slots import Slots

PREFILL_TOKENS = 16384  # in one forward, so that its mask and activations stay small


def block_causal_mask(positions: Tensor, valid: Tensor, block_size: int) -> Tensor:
    """Who sees whom among tokens at `positions` (batch, length): own and earlier blocks, valid keys only.

    Returns bool (batch, 1, length, length), True where the query (third axis) sees the key (fourth).
    """
    block = positions // block_size
    return ((block[:, None, :] <= block[:, :, None]) & valid[:, None, :])[:, None]


def prefill(
    network: Network, cache: KeyValueCache, prefixes: list[tuple[int, ...]], first: int, block_size: int
) -> None:
    """Bring the keys that rows from `first` on need into the cache; one forward serves all that need the same.

    `prefixes` are every row's, whole blocks of tokens; the slots before `first` hold theirs already.
    """
    held = {prefix: row for row, prefix in enumerate(prefixes[:first])}
    missing, copies = {}, []
    for row, prefix in enumerate(prefixes[first:], first):
        if prefix in held:
            copies.append((held[prefix], row, len(prefix)))
        else:
            held[prefix] = missing[prefix] = row
    write_prefixes(network, cache, list(missing), list(missing.values()), block_size)
    for source, target, length in copies:
        cache.copy(source, target, length)


def write_prefixes(
    network: Network, cache: KeyValueCache, prefixes: list[tuple[int, ...]], rows: list[int], block_size: int
) -> None:
    """Write the keys and values of each prefix into the slot of its row."""
    order = sorted((i for i in range(len(rows)) if prefixes[i]), key=lambda i: len(prefixes[i]))
    while order:
        longest = len(prefixes[order[-1]])
        count = max(1, min(len(order), PREFILL_TOKENS // longest))  # the longest come first
        chunk, order = order[-count:], order[:-count]
        ids = torch.tensor([[*prefixes[i], *[0] * (longest - len(prefixes[i]))] for i in chunk], device=network.device)
        positions = torch.arange(longest, device=network.device).expand_as(ids)
        valid = positions < torch.tensor([len(prefixes[i]) for i in chunk], device=network.device)[:, None]
        bias = bias_of(block_causal_mask(positions, valid | (positions == 0), block_size), network.dtype)
        # padding lies behind the prefix: no real token sees it, and the response's own keys overwrite it
        places = cache.places(torch.tensor([rows[i] for i in chunk], device=network.device), positions)
        network.forward(ids, positions, OwnKeys(bias, cache, places))


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
    if network.flash:
        return network.forward(tokens, at, FlashKeys(cache, places, lines.int(), ends.int()))[:rows]
    visible = torch.arange(seen, device=tokens.device) < ends[:, None]  # (lines, seen)
    if committing is not None and len(committing) == rows:
        both = torch.stack((visible[:rows], visible[rows:]), 1).repeat_interleave(block, dim=1)
        attention = CommitEvery(bias_of(both, network.dtype)[:, None], cache, places, rows, seen)
    else:
        bias = bias_of(visible, network.dtype)[:, None, None]
        if committing is None:
            attention = CachedKeys(bias, cache, places, slice(rows), seen)
        else:
            attention = CommitSome(bias[:rows], bias[rows:], cache, places, rows, seen, committing)
    return network.forward(tokens, at, attention)[:rows]
