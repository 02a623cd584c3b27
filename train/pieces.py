"""Rows in pieces: what a piece sees of those before it are their clean tokens' keys and values, kept layer by layer.

A row that no micro-batch holds is put in the order of its blocks, of each the views and then the clean tokens, and cut.
So a token of a piece sees all clean tokens of the pieces before, and no other token of them. Without gradients the
pieces are forwarded one after another, and each keeps its keys and values. With gradients the clean copy alone is
forwarded first, which keeps them. Then the pieces follow from the last to the first, each forward and backward: what
its backward pass finds for kept keys is added to what they have, and goes on where the keys are the piece's own. Keys
are where a piece depends on others, so the gradients are those of the row. Its clean tokens are forwarded twice,
however many pieces there are, and all else once.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Piece:
    """A batch's place in a row that is cut."""

    number: int  # of the row's pieces, ascending
    before: int  # clean tokens of the pieces before it
    clean: int  # of its own, the first: those that pieces after it see
    width: int  # keys that it is given: those before, up to a whole tile where kernels work by tiles


class Kept:
    """Keys and values of a row's clean tokens in every layer, and the gradients that pieces add to them.

    Both are (2 × layers, heads, `width`, head width), a layer's keys before its values: in one tensor each, for small
    ones that live so long would hold back the memory that lies between them. Forwards write theirs until `end_filling`.
    """

    def __init__(self, width: int):
        self.width = width
        self.values: Tensor | None = None
        self.slopes: Tensor | None = None  # in float32 at least; None: forwards write

    def end_filling(self) -> None:
        """From now on forwards have gradients."""
        if self.values is not None:
            dtype = torch.promote_types(self.values.dtype, torch.float32)
            self.slopes = torch.zeros_like(self.values, dtype=dtype)

    def spoil(self) -> None:
        """Make NaN of all gradients that pieces are yet to take on."""
        if self.slopes is not None:
            self.slopes.fill_(torch.nan)

    def joined(self, index: int, layers: int, own: Tensor, piece: Piece) -> Tensor:
        """What the piece sees of the kept keys, or values, of that index, and its own behind them.

        own (1, heads, tokens, head width).
        """
        if self.width == 0:
            return own
        if self.values is None:
            self.values = own.new_zeros(2 * layers, own.shape[1], self.width, own.shape[3])
        kept = self.values[index, None]
        if self.slopes is not None:
            return Joined.apply(own, kept, self.slopes[index, None], piece)
        kept[:, :, piece.before : piece.before + piece.clean] = own[:, :, : piece.clean].detach()
        return torch.cat([kept[:, :, : piece.width], own], 2)


class Joined(torch.autograd.Function):
    """`Kept.joined`, whose backward pass adds to the gradients of what is kept, and takes on those of its own."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, kept: Tensor, total: Tensor, piece: Piece) -> Tensor:
        ctx.total, ctx.piece = total, piece
        return torch.cat([kept[:, :, : piece.width], own], 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        total, piece = ctx.total, ctx.piece
        total[:, :, : piece.width] += slope[:, :, : piece.width]
        own = slope[:, :, piece.width :].clone()
        own[:, :, : piece.clean] += total[:, :, piece.before : piece.before + piece.clean]
        return own, None, None, None
