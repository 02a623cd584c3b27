"""Block attention (SDAR, TraDo): the forward of each sequence's current block against an exact key-value cache.

A token sees its own block and all earlier ones, so every query of the current block sees the positions up to the
block's end. The block's keys and values are written at its own positions by every forward; those of the clean block
come last and stay. Nothing has to be copied to commit a block.
"""

from __future__ import annotations

import torch
from torch import Tensor


class SlotCache:
    """Keys and values of all slots, (slots, capacity, kv_heads, head_dim) per layer, written in place.

    transformers' attention calls `update` with the new keys and values and attends to what it returns.
    """

    def __init__(self, config: object, slots: int, capacity: int, dtype: torch.dtype, device: torch.device):
        heads = config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (slots, capacity, heads, width)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self._rows: Tensor | None = None
        self._positions: Tensor | None = None
        self._seen: int | None = None

    def place(self, rows: Tensor, positions: Tensor, seen: int | None) -> None:
        """Say where the next forward writes: rows (batch,), positions (batch, length).

        With `seen`, rows must be 0 … batch-1 and attention goes over their first `seen` positions; without, over
        the new keys alone (a prompt's first forward).
        """
        self._rows, self._positions, self._seen = rows[:, None], positions, seen

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write (batch, kv_heads, length, head_dim) and return the keys and values to attend to, in that layout."""
        self.keys[layer][self._rows, self._positions] = keys.transpose(1, 2)
        self.values[layer][self._rows, self._positions] = values.transpose(1, 2)
        if self._seen is None:
            return keys, values
        batch = keys.shape[0]
        return tuple(store[layer][:batch, : self._seen].transpose(1, 2) for store in (self.keys, self.values))

    def move(self, source: int, target: int) -> None:
        """Copy one slot's row over another's."""
        for store in (*self.keys, *self.values):
            store[target] = store[source]


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
    cache.place(torch.arange(rows.start, rows.stop, device=device), positions, seen=None)
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
    cache.place(torch.arange(len(tokens), device=tokens.device), positions, seen)
    hidden = model.model(
        input_ids=tokens,
        position_ids=positions,
        attention_mask=visible[:, None, None, :].expand(-1, 1, tokens.shape[1], -1),
        past_key_values=cache,
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden)
