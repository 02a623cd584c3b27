"""Who sees whom in a packed batch: a FlexAttention block mask on CUDA, boolean ones elsewhere, and the kernels.

All masks apply one rule, `sees`. A block mask holds, for each tile of queries, the tiles of keys that are seen in part
or in full; the rest costs nothing, so that many trajectories can share one long row. Elsewhere queries of long rows are
taken tile by tile too, each with the keys that it sees: of a trajectory's row mostly its clean copy, a fraction of the
row. A piece of a row that is cut has keys kept of those before it in front of its own (train/pieces.py). A network
under `flex_or_sdpa` is sampled from with dense masks and trained with the others, and the mask's kind chooses the
kernel. transformers hands a BlockMask through unchanged, as it does any four-dimensional mask (5.17 and 5.23 alike).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from train.packing import PackedBatch
from train.pieces import Kept, Piece

NAME = "flex_or_sdpa"  # as transformers' attn_implementation
TILE = 128  # of FlexAttention's kernels
QUERIES = 2048  # looked at together: no (tokens × tokens) mask exists
# what torch's scaled_dot_product_attention calls on a CPU, and its backward
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


# ---- masks


def attention_mask(batch: PackedBatch) -> Tensor | BlockMask:
    """The mask that suits the device of the batch and the length of its rows."""
    if batch.ids.is_cuda:
        mask = block_mask(batch)
    else:
        mask = visible(batch) if key_integers(batch).shape[2] <= 2 * TILE else TiledMask(batch)
    if batch.piece is None:
        return mask
    assert batch.kept is not None, "a piece of a row is forwarded with what is kept of those before it"
    return PieceMask(mask, batch.kept, batch.piece)


def sees(query: Sequence[Tensor] | Tensor, key: Sequence[Tensor] | Tensor) -> Tensor:
    """Whether queries see keys, bool; each (trajectory, prompt, block, view), of shapes that broadcast.

    Clean keys of earlier blocks are those of the same trajectory and of the prompt that it shares with others.
    """
    same = query[0] == key[0]
    earlier = (key[3] == 0) & (key[2] < query[2]) & (same | (query[1] == key[0]))
    own = same & (query[3] == key[3]) & (query[2] == key[2])
    return earlier | own


def mask_integers(batch: PackedBatch) -> Tensor:
    """What the mask is a function of, (4, rows, tokens): of every token its trajectory, prompt, block and view."""
    return torch.stack([batch.trajectory, batch.prompt, batch.block, batch.view])


def key_integers(batch: PackedBatch) -> Tensor:
    """`mask_integers` of the keys that are given, (4, rows, keys): of a piece those that are kept, then its own.

    Those kept are clean, of a block before all others; what fills up their tile is padding that is not looked at.
    """
    own = mask_integers(batch)
    if batch.piece is None:
        return own
    number, before = own[0, 0, 0], batch.piece.before
    kept = torch.full((4, 1, batch.piece.width), -2, device=own.device)
    kept[:2, :, :before], kept[2, :, :before], kept[3, :, :before] = number, -1, 0
    return torch.cat([kept, own], 2)


def visible(batch: PackedBatch) -> Tensor:
    """The dense attention mask of a batch: bool (rows, 1, tokens, keys), True where the query sees the key."""
    return sees(mask_integers(batch)[:, :, :, None], key_integers(batch)[:, :, None, :])[:, None]


@dataclass(frozen=True)
class Tile:
    """Some neighbouring queries, the keys that any of them sees, and which of these each sees."""

    queries: slice
    keys: list[slice]  # first those that all queries see
    bias: Tensor  # (rows, 1, queries, the keys that not all of them see): 0 where one is seen, -inf elsewhere

    def of_keys(self, values: Tensor, shared: int) -> Tensor:
        """The keys' part of values (rows, heads, length, width), each head as often as query heads share it."""
        return torch.cat([values[:, :, run] for run in self.keys], 2).repeat_interleave(shared, 1)

    def mask(self, values: Tensor) -> Tensor:
        """The bias for all keys of the tile, (rows, 1, queries, keys), of the dtype of the values."""
        count = sum(run.stop - run.start for run in self.keys)
        return torch.nn.functional.pad(self.bias.to(values.dtype), (count - self.bias.shape[3], 0))


class TiledMask(BlockMask):
    """The tiles of a batch's rows: for each a mask of the keys alone that some of its queries see and others do not.

    A BlockMask for transformers only, which hands it through; nothing else of one is in it.
    """

    def __init__(self, batch: PackedBatch, tile: int = TILE):
        self.rows, length = batch.ids.shape
        integers, of_keys = mask_integers(batch).int(), key_integers(batch).int()
        self.seq_lengths = (length, of_keys.shape[2])
        self.tiles: list[Tile] = []
        for start in range(0, length, tile):
            own = slice(start, start + tile)
            seen = sees(integers[:, :, own, None], of_keys[:, :, None, :])  # (rows, queries, keys)
            by_all = seen.all(1).all(0)
            by_some = seen.any(1).any(0) & ~by_all
            hidden = ~seen[:, None, :, by_some]
            bias = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
            self.tiles.append(Tile(own, runs(by_all) + runs(by_some), bias))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows, 1, *self.seq_lengths


class PieceMask(BlockMask):
    """The mask of a piece of a row, and what its layers take the keys and values of the pieces before it from.

    A BlockMask for transformers only.
    """

    def __init__(self, mask: Tensor | BlockMask, kept: Kept, piece: Piece):
        self.mask, self.kept, self.piece = mask, kept, piece
        self.seq_lengths = tuple(mask.shape[-2:])

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.mask.shape)


def runs(chosen: Tensor) -> list[slice]:
    """The slices that hold what is True of chosen (tokens,)."""
    edges = torch.nn.functional.pad(chosen.int(), (1, 1)).diff().nonzero().flatten().tolist()
    return [slice(start, end) for start, end in zip(edges[::2], edges[1::2])]


def block_mask(batch: PackedBatch, tile: int = TILE) -> BlockMask:
    """The batch's mask by tiles of `tile` × `tile` tokens; rows of any length."""
    some, full = visible_tiles(batch, tile)
    counts_and_indices = []
    for seen in (some & ~full, full):  # in part, in full; (rows, 1, tiles of queries, tiles of keys)
        counts_and_indices.append(seen.sum(-1, dtype=torch.int32))
        in_front = seen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)  # tiles of this kind come first
        counts_and_indices.append(in_front.to(torch.int32))
    lengths = batch.ids.shape[1], key_integers(batch).shape[2]
    return BlockMask.from_kv_blocks(
        *counts_and_indices, BLOCK_SIZE=tile, mask_mod=mask_function(batch), seq_lengths=lengths
    )


def mask_function(batch: PackedBatch) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether the query at an index sees the key at another, as FlexAttention asks: (row, head, query, key) → bool."""
    columns = batch.trajectory, batch.prompt, batch.block, batch.view
    of_keys = columns if batch.piece is None else tuple(key_integers(batch))

    def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees([one[row, query] for one in columns], [one[row, key] for one in of_keys])

    return rule


def visible_tiles(batch: PackedBatch, tile: int) -> tuple[Tensor, Tensor]:
    """Where any, and where every token of a tile of keys is seen by a tile of queries; bool (rows, 1, tiles, tiles).

    What lies behind a row's end sees nothing and is not seen.
    """
    at_once = QUERIES // tile * tile

    def whole(integers: Tensor) -> tuple[Tensor, Tensor]:
        missing = -integers.shape[2] % tile
        inside = torch.arange(integers.shape[2] + missing, device=integers.device) < integers.shape[2]
        return torch.nn.functional.pad(integers, (0, missing), value=-1), inside  # (4, rows, in whole tiles)

    (integers, inside), (of_keys, among_keys) = whole(mask_integers(batch)), whole(key_integers(batch))
    some, full = [], []
    for start in range(0, integers.shape[2], at_once):
        own = slice(start, start + at_once)
        seen = sees(integers[:, :, own, None], of_keys[:, :, None, :]) & among_keys & inside[own, None]
        tiles = seen.unflatten(2, (-1, tile)).unflatten(1, (-1, tile))  # (rows, tiles, tile, tiles, tile)
        some.append(tiles.any(4).any(2))
        full.append(tiles.all(4).all(2))
    return torch.cat(some, 1)[:, None], torch.cat(full, 1)[:, None]


# ---- kernels


def flex_or_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' FlexAttention or SDPA, by the mask's kind; output (batch, length, heads, width)."""
    if isinstance(attention_mask, PieceMask):
        one, layers, first = attention_mask, module.config.num_hidden_layers, 2 * module.layer_idx
        query, key = query.to(value.dtype), key.to(value.dtype)
        key = one.kept.joined(first, layers, key, one.piece)
        value = one.kept.joined(first + 1, layers, value, one.piece)
        attention_mask = one.mask
    if not isinstance(attention_mask, BlockMask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    # under autocast norms and rotary tables make float32 of queries and keys; these kernels take one dtype
    query, key = query.to(value.dtype), key.to(value.dtype)
    if isinstance(attention_mask, TiledMask):
        return TiledAttention.apply(query, key, value, attention_mask, kwargs.get("scaling")), None
    return flex_attention_forward(module, query, key, value, attention_mask, **kwargs)


class TiledAttention(torch.autograd.Function):
    """Attention tile by tile; query (rows, heads, length, width), key and value with as many heads or a part of them.

    Returns (rows, length, heads, width). Between the passes nothing is kept of a tile but the logarithms of its sums,
    where autograd would keep its keys, its values and its mask in floating point: these grow with the square of a row.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: TiledMask, scale: float | None) -> Tensor:
        shared = query.shape[1] // key.shape[1]
        out = query.new_empty(query.transpose(1, 2).shape)
        sums = []
        for tile in mask.tiles:
            own, keys, values = query[:, :, tile.queries], tile.of_keys(key, shared), tile.of_keys(value, shared)
            part, total = FLASH(own, keys, values, 0.0, False, attn_mask=tile.mask(query), scale=scale)
            out[:, tile.queries] = part.transpose(1, 2)
            sums.append(total)
        ctx.save_for_backward(query, key, value, out, *sums)
        ctx.mask, ctx.scale = mask, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *sums = ctx.saved_tensors
        shared = query.shape[1] // key.shape[1]
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for tile, total in zip(ctx.mask.tiles, sums):
            own, keys, values = query[:, :, tile.queries], tile.of_keys(key, shared), tile.of_keys(value, shared)
            slope_of, part = (one[:, tile.queries].transpose(1, 2) for one in (slope, out))
            of_query[:, :, tile.queries], *found = FLASH_BACKWARD(
                slope_of, own, keys, values, part, total, 0.0, False, attn_mask=tile.mask(query), scale=ctx.scale
            )
            for whole, one in zip((of_key, of_value), found):
                one = one.unflatten(1, (-1, shared)).sum(2)
                for run, piece in zip(tile.keys, one.split([run.stop - run.start for run in tile.keys], 2)):
                    whole[:, :, run] += piece
        return of_query, of_key, of_value, None, None


def take_block_masks(model: PreTrainedModel) -> None:
    """Let the network take block masks beside the dense ones it takes already."""
    if model.config._attn_implementation != NAME:
        model.set_attn_implementation(NAME)


AttentionInterface.register(NAME, flex_or_sdpa)
AttentionMaskInterface.register(NAME, sdpa_mask)
