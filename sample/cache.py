"""The key-value cache: one pool of tokens per layer, cut into slots of equal width; and how many sequences fit it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from common.runtime import console
from sample.parallel import local

SMALLEST = 64  # positions in a slot
SHARE = 0.9  # of the memory that is left, for an allocator leaves gaps
GIB = 2**30
COPIED = 16384  # positions at once between slots: in between they need memory of their own


class KeyValueCache:
    """Keys and values of `tokens` positions per layer, seen as (slots, width, kv_heads, head_dim).

    `resize` cuts the same memory into fewer wide slots or more narrow ones; the first rows are kept.
    """

    def __init__(self, model: torch.nn.Module, tokens: int, width: int):
        shape = (tokens + 1, *heads_and_width(model))  # the last place is for keys that nobody reads
        weight = next(model.parameters())
        layers = range(model.config.num_hidden_layers)
        self.keys = [torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in layers]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.tokens = tokens
        self.cut(width)

    def places(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Indices into the pool of positions (lines, length) of slots `rows` (lines,), flat."""
        return (rows[:, None] * self.width + positions).reshape(-1)

    def write(self, layer: int, places: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write (lines, kv_heads, length, head_dim) at `places`."""
        self.keys[layer].index_copy_(0, places, keys.transpose(1, 2).flatten(0, 1))
        self.values[layer].index_copy_(0, places, values.transpose(1, 2).flatten(0, 1))

    def read(self, layer: int, rows: slice | Tensor, seen: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `seen` positions of slots, (rows, kv_heads, seen, head_dim) each."""
        keys, values = self.slots[layer]
        return keys[rows, :seen].transpose(1, 2), values[rows, :seen].transpose(1, 2)

    def cut(self, width: int) -> None:
        """See the pool as slots of that width: `slots` holds each layer's keys and values."""
        self.width, self.count = width, self.tokens // width
        shape, end = (self.count, width, *self.keys[0].shape[1:]), self.count * width
        pairs = zip(self.keys, self.values)
        self.slots = [(keys[:end].view(shape), values[:end].view(shape)) for keys, values in pairs]

    def copy(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Copy the first `length` positions of slots over others', which are none of them; both (copied,)."""
        at_once = max(1, COPIED // length)
        pairs = list(zip(sources.split(at_once), targets.split(at_once)))
        for store in (store for layer in self.slots for store in layer):
            for source, target in pairs:
                store[:, :length].index_copy_(0, target, store[source, :length])

    def resize(self, width: int, rows: int) -> None:
        """Cut the pool into slots of another width, moving the first `rows` slots with it."""
        kept = min(width, self.width)
        order = range(rows) if width < self.width else reversed(range(rows))  # no row is overwritten before it moved
        moves = [(row * self.width, row * width) for row in order if row]
        for store in (*self.keys, *self.values):
            for source, target in moves:
                store[target : target + kept] = store[source : source + kept].clone()
        self.cut(width)


def heads_and_width(model: torch.nn.Module) -> tuple[int, int]:
    """Key-value heads on this device, fewer than the network's where it is divided, and the width of one."""
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return local(model.model.layers[0].self_attn.k_proj.weight).shape[0] // width, width


def rounded(keys: int, device: torch.device) -> int:
    """A number of keys, rounded up on CUDA: its attention copies every bias over a number that 16 does not divide."""
    return keys + -keys % 16 if device.type == "cuda" else keys


def bytes_per_token(model: torch.nn.Module) -> int:
    """What one position's keys and values take in all layers."""
    heads, width = heads_and_width(model)
    return 2 * model.config.num_hidden_layers * heads * width * next(model.parameters()).element_size()


def affordable_tokens(model: torch.nn.Module, wanted: int, parts: Mapping[str, float]) -> int:
    """As many of the wanted tokens as fit the device's free memory, less what `parts` of the sampler take of it.

    All of them on the CPU. Where they do not fit, a line says what memory there is.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        return wanted
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    room = max(0.0, SHARE * (free - sum(parts.values())))
    tokens = torch.tensor(min(wanted, int(room) // bytes_per_token(model)), device=device)
    weight = model.model.layers[0].self_attn.k_proj.weight
    if isinstance(weight, DTensor):  # processes that sample together must admit the same requests
        torch.distributed.all_reduce(tokens, torch.distributed.ReduceOp.MIN, weight.device_mesh.get_group())
    if (fitting := int(tokens)) < wanted:
        taken = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
        console.print(
            f"the cache holds {fitting} of {wanted} tokens: of {free / GIB:.1f} GiB free these are set aside: {taken}"
        )
    return fitting


@dataclass(frozen=True)
class Room:
    """A cache of `tokens` positions for at most `rows` sequences, the longest of which may come to `longest`."""

    tokens: int
    rows: int
    longest: int

    def width(self, reach: int) -> int:
        """The width of slots for sequences that reach so far: a power of two, so that it seldom changes.

        Where the longest sequences fit all at once it never does.
        """
        if self.rows * self.longest <= self.tokens:
            return self.longest
        return min(self.longest, max(SMALLEST, 1 << (reach - 1).bit_length()))

    def slots(self) -> int:
        """How many slots there are at most: as many as sequences, unless the narrowest ones are fewer."""
        return min(self.rows, self.tokens // self.width(1))

    def fits(self, reaches: list[int]) -> bool:
        """Whether sequences that reach so far fit side by side."""
        return len(reaches) <= self.rows and len(reaches) * self.width(max(reaches)) <= self.tokens
