"""The key-value cache of all slots."""

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
        self._rows: Tensor | slice = slice(0)
        self._place: tuple[Tensor, Tensor] | None = None
        self._seen: int | None = None

    def place(self, rows: Tensor | slice, positions: Tensor, seen: int | None) -> None:
        """Say where the next forward writes: one slot of `rows` for each line of positions (batch, length).

        With `seen`, attention goes over the first `seen` positions of these slots (a slice is read without a copy);
        without, over the new keys alone.
        """
        numbers = rows
        if isinstance(rows, slice):
            numbers = torch.arange(rows.start, rows.stop, device=positions.device)
        self._rows, self._place, self._seen = rows, (numbers[:, None], positions), seen

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write (batch, kv_heads, length, head_dim) and return the keys and values to attend to, in that layout."""
        self.keys[layer][self._place] = keys.transpose(1, 2)
        self.values[layer][self._place] = values.transpose(1, 2)
        if self._seen is None:
            return keys, values
        return tuple(store[layer][self._rows, : self._seen].transpose(1, 2) for store in (self.keys, self.values))

    def move(self, source: int, target: int) -> None:
        """Copy one slot's row over another's."""
        for store in (*self.keys, *self.values):
            store[target] = store[source]
