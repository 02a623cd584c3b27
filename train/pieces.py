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
    """Keys and values of a row's clean tokens in every layer, (1, heads, `width`, head width), and their gradients.

    While it is `filling`, forwards write theirs. The gradients are sums over pieces, in float32 at least.
    """

    def __init__(self, width: int):
        self.width = width
        self.filling = True
        self.values: dict[str, Tensor] = {}
        self.slopes: dict[str, Tensor] = {}

    def joined(self, name: str, own: Tensor, piece: Piece) -> Tensor:
        """The kept keys, or values, of that name that the piece sees, and its own behind them.

        own (1, heads, tokens, head width).
        """
        if name not in self.values:
            self.values[name] = own.new_zeros(1, own.shape[1], self.width, own.shape[3])
        if not self.filling:
            return Joined.apply(own, self, name, piece)
        kept = self.values[name]
        kept[:, :, piece.before : piece.before + piece.clean] = own[:, :, : piece.clean].detach()
        return torch.cat([kept[:, :, : piece.width], own], 2)

    def slope(self, name: str) -> Tensor:
        """The gradient of what is kept by that name, of its shape."""
        if name not in self.slopes:
            kept = self.values[name]
            self.slopes[name] = torch.zeros_like(kept, dtype=torch.promote_types(kept.dtype, torch.float32))
        return self.slopes[name]

    def spoil(self) -> None:
        """Make NaN of all gradients that pieces are yet to take on."""
        for slope in self.slopes.values():
            slope.fill_(torch.nan)


class Joined(torch.autograd.Function):
    """`Kept.joined`, whose backward pass adds to the gradients of what is kept, and takes on those of its own."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, kept: Kept, name: str, piece: Piece) -> Tensor:
        ctx.kept, ctx.name, ctx.piece = kept, name, piece
        return torch.cat([kept.values[name][:, :, : piece.width], own], 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        piece, total = ctx.piece, ctx.kept.slope(ctx.name)
        total[:, :, : piece.width] += slope[:, :, : piece.width]
        own = slope[:, :, piece.width :].clone()
        own[:, :, : piece.clean] += total[:, :, piece.before : piece.before + piece.clean]
        return own, None, None, None
