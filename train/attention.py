"""The mask of a packed batch: a FlexAttention block mask on CUDA, a dense boolean one elsewhere.

Both apply one rule, `train.packing.sees`. A block mask holds, for each tile of queries, the tiles of keys that are seen
in part or in full; the rest costs nothing, so that many trajectories can share one long row.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from train.packing import PackedBatch, sees, visible

TILE = 128  # of FlexAttention's kernels
QUERIES = 2048  # looked at together: no (tokens × tokens) mask exists


def attention_mask(batch: PackedBatch) -> Tensor | BlockMask:
    """The mask that suits the device of the batch."""
    return block_mask(batch) if batch.ids.is_cuda else visible(batch)


def block_mask(batch: PackedBatch, tile: int = TILE) -> BlockMask:
    """The batch's mask by tiles of `tile` × `tile` tokens; rows of any length."""
    some, full = visible_tiles(batch, tile)
    kinds = (some & ~full, full)
    ordered = [tensor for kind in kinds for tensor in (_count(kind), _first(kind))]
    length = batch.ids.shape[1]
    return BlockMask.from_kv_blocks(
        *ordered, BLOCK_SIZE=tile, mask_mod=mask_function(batch), seq_lengths=(length, length)
    )


def mask_function(batch: PackedBatch) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether the query at an index sees the key at another, as FlexAttention asks: (row, head, query, key) → bool."""
    trajectory, block, view = batch.trajectory, batch.block, batch.view

    def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(
            (trajectory[row, query], block[row, query], view[row, query]),
            (trajectory[row, key], block[row, key], view[row, key]),
        )

    return rule


def visible_tiles(batch: PackedBatch, tile: int) -> tuple[Tensor, Tensor]:
    """Where any, and where every token of a tile of keys is seen by a tile of queries; bool (rows, 1, tiles, tiles).

    What lies behind a row's end sees nothing and is not seen.
    """
    length = batch.ids.shape[1]
    missing = -length % tile
    integers = (batch.trajectory, batch.block, batch.view)
    padded = [torch.nn.functional.pad(one, (0, missing), value=-1) for one in integers]
    inside = torch.arange(length + missing, device=batch.ids.device) < length
    keys = [one[:, None, :] for one in padded]
    some, full = [], []
    for start in range(0, length + missing, QUERIES // tile * tile):
        own = slice(start, start + QUERIES // tile * tile)
        seen = sees([one[:, own, None] for one in padded], keys) & inside & inside[own, None]
        tiles = seen.unflatten(2, (-1, tile)).unflatten(1, (-1, tile))  # (rows, tiles, tile, tiles, tile)
        some.append(tiles.any(4).any(2))
        full.append(tiles.all(4).all(2))
    return torch.cat(some, 1)[:, None], torch.cat(full, 1)[:, None]


def _count(kind: Tensor) -> Tensor:
    return kind.sum(-1, dtype=torch.int32)


def _first(kind: Tensor) -> Tensor:
    """Indices of the tiles of keys, those that are of this kind first."""
    return kind.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
