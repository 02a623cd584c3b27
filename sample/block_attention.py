"""Block attention (SDAR, TraDo): the forward of each sequence's current block against an exact key-value cache.

A token sees its own block and all earlier ones, so every query of the current block sees the positions up to the
block's end. Every forward writes the block's keys and values at its own positions; those of the clean block come last
and stay. That last writing, the commit, either has a forward of its own or rides in the next block's first one, as a
second line of tokens of the same sequence.
"""

import torch
from torch import Tensor

from sample.cache import KeyValueCache
from sample.network import CachedKeys, CommitEvery, CommitSome, FlashKeys, Network, OwnKeys, bias_of, pool_keys
from sample.slots import Slots

PREFILL_TOKENS = 16384  # in one forward, so that its mask and activations stay small
PREFILL_STEP = 64  # on CUDA lengths are rounded up to a multiple of this, so that shapes are few


def block_causal_mask(positions: Tensor, valid: Tensor, block_size: int) -> Tensor:
    """Who sees whom among tokens at `positions` (batch, length): own and earlier blocks, valid keys only.

    Returns bool (batch, 1, length, length), True where the query (third axis) sees the key (fourth).
    """
    block = positions // block_size
    return ((block[:, None, :] <= block[:, :, None]) & valid[:, None, :])[:, None]


def prefill(
    network: Network, cache: KeyValueCache, prefixes: list[tuple[int, ...]], first: int, block_size: int
) -> dict[tuple[int, ...], Tensor]:
    """Write the keys and values of the prefixes of rows from `first` on; what several rows need is computed once.

    `prefixes` are every row's, whole blocks of tokens; the slots before `first` hold theirs already. Returns which
    experts those that were computed were given to, (length, layers, chosen), where the network keeps that.
    """
    experts: dict[tuple[int, ...], Tensor] = {}
    row_of = {prefix: row for row, prefix in enumerate(prefixes[:first])}
    missing, copies = [], []
    for row, prefix in enumerate(prefixes[first:], first):
        if prefix in row_of:
            copies.append((row_of[prefix], row, len(prefix)))
        else:
            row_of[prefix] = row
            missing.append(prefix)
    missing = sorted(filter(None, missing), key=len)
    while missing:
        step = PREFILL_STEP if network.device.type == "cuda" else 1
        longest = min(len(missing[-1]) + -len(missing[-1]) % step, cache.width)
        count = max(1, min(len(missing), PREFILL_TOKENS // longest))  # the longest come first
        chunk, missing = missing[-count:], missing[:-count]
        known = [[row_of[prefix], len(prefix), *prefix, *[0] * (longest - len(prefix))] for prefix in chunk]
        known = torch.tensor(known, device=network.device)  # one copy to the device
        rows, lengths, ids = known[:, 0], known[:, 1], known[:, 2:]
        positions = torch.arange(longest, device=network.device).expand_as(ids)
        bias = bias_of(block_causal_mask(positions, positions < lengths[:, None], block_size), network.dtype)
        # padding lies behind the prefix: no real token sees it, and the response's own keys overwrite it
        network.forward(ids, positions, OwnKeys(bias, cache, cache.places(rows, positions)))
        if network.experts is not None:
            experts |= {prefix: given[: len(prefix)] for prefix, given in zip(chunk, network.experts)}
    for source, target, length in copies:
        cache.copy(source, target, length)
    return experts


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
