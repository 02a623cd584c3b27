"""The packed forward: all views of a trajectory share one clean copy of its tokens and one forward.

A row is [prompt, response, every view of every block], position ids absolute. A clean token sees clean tokens of its
own and earlier blocks; a token of a view sees the clean tokens of earlier blocks and its own view. Who sees whom
follows from four integers per token: trajectory, block, view (0: clean), valid (trajectory >= 0).

Under full attention a noised token changes every other, so nothing is shared: each view is a row [prompt, response] of
its own, in the same four integers one view of one block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from train.views import Views


@dataclass(frozen=True)
class Row:
    """One trajectory with its views (full attention: one of its views), and what is predicted in it."""

    trajectory: int  # index into the update's trajectories
    ids: np.ndarray  # (tokens,)
    position: np.ndarray  # (tokens,)
    block: np.ndarray  # (tokens,)
    view: np.ndarray  # (tokens,) 0 for the clean copy
    predict_at: np.ndarray  # (predicted,) index of a token of the row
    target: np.ndarray  # (predicted,)
    response_index: np.ndarray  # (predicted,)
    step: np.ndarray  # (predicted,)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class TokenFields:
    """One number per predicted token, for the loss; names as in the design."""

    old_logp: Tensor
    logp_ref: Tensor
    advantage: Tensor
    weight: Tensor  # of the token in the whole update's loss: the denominator is in it

    def to(self, device: torch.device) -> TokenFields:
        return TokenFields(*(getattr(self, field.name).to(device) for field in fields(self)))

    def select(self, index: Tensor) -> TokenFields:
        """The fields of some of the tokens."""
        return TokenFields(*(getattr(self, field.name)[index] for field in fields(self)))


@dataclass(frozen=True)
class PackedBatch:
    """Rows of one micro-batch, padded to the longest; `predicted` says which of the update's tokens they hold."""

    ids: Tensor  # (rows, tokens)
    position: Tensor  # (rows, tokens)
    trajectory: Tensor  # (rows, tokens) -1 for padding
    block: Tensor  # (rows, tokens)
    view: Tensor  # (rows, tokens)
    predict_at: Tensor  # (predicted,) index into the flattened rows
    target: Tensor  # (predicted,)
    predicted: np.ndarray  # (predicted,) index into the update's predicted tokens, in the order of its rows

    def to(self, device: torch.device) -> PackedBatch:
        moved = {field.name: getattr(self, field.name) for field in fields(self)}
        return PackedBatch(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in moved.items()})


def make_rows(
    trajectory: int, prompt_ids: Sequence[int], response_ids: Sequence[int], views: Views, logit_offset: int = 0
) -> list[Row]:
    """The rows of one trajectory: a single one under block attention, one per view under full attention.

    Where the prediction for position i is at i-1 (logit_offset -1), it is read there.
    """
    if len(views) == 0:  # a random noising may mask nothing that is predicted
        return []
    if not views.whole:
        assert logit_offset == 0, "block attention with shifted logits is no family's"
        return [make_row(trajectory, prompt_ids, response_ids, views)]
    start = len(prompt_ids)
    rows = []
    for view in range(len(views)):
        predicted = np.flatnonzero(views.predict[view])
        ids = np.concatenate([np.asarray(prompt_ids, dtype=np.int64), views.inputs[view]])
        zeros = np.zeros_like(ids)
        rows.append(
            Row(
                trajectory=trajectory,
                ids=ids,
                position=np.arange(len(ids)),
                block=zeros,
                view=zeros,
                predict_at=start + predicted + logit_offset,
                target=views.targets[view, predicted],
                response_index=predicted,
                step=views.step[view, predicted],
            )
        )
    return rows


def make_row(trajectory: int, prompt_ids: Sequence[int], response_ids: Sequence[int], views: Views) -> Row:
    """Lay out one trajectory: the clean tokens before its last view's block, then the views one after another."""
    block_size = views.inputs.shape[1]
    # the clean copy of the last block would be seen by nobody
    clean = int(views.block.max()) * block_size
    tokens = np.array([*prompt_ids, *response_ids], dtype=np.int64)[:clean]
    clean_position = np.arange(clean)
    view_position = views.block[:, None] * block_size + np.arange(block_size)
    view_number = np.repeat(np.arange(1, len(views) + 1), block_size)
    flat = np.flatnonzero(views.predict)
    return Row(
        trajectory=trajectory,
        ids=np.concatenate([tokens, views.inputs.ravel()]),
        position=np.concatenate([clean_position, view_position.ravel()]),
        block=np.concatenate([clean_position // block_size, np.repeat(views.block, block_size)]),
        view=np.concatenate([np.zeros(clean, dtype=np.int64), view_number]),
        predict_at=clean + flat,
        target=views.targets.ravel()[flat],
        response_index=views.response_index.ravel()[flat],
        step=views.step.ravel()[flat],
    )


def pack(rows: Sequence[Row], token_budget: int, at_least: int = 1) -> list[PackedBatch]:
    """Cut rows into micro-batches of at most `token_budget` padded tokens, rows of like length together.

    A row longer than the budget is a micro-batch of its own. Padding within a batch is masked out. A smaller budget
    is taken where that makes about `at_least` micro-batches.
    """
    if at_least > 1:
        token_budget = min(token_budget, -(-sum(len(row) for row in rows) // at_least))
    offsets = np.cumsum([0] + [len(row.target) for row in rows])
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    batches: list[list[int]] = []
    for index in order:
        width = len(rows[index])  # the longest so far, since rows come sorted
        if batches and width * (len(batches[-1]) + 1) <= token_budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return [_batch([rows[i] for i in chosen], offsets[chosen]) for chosen in batches]


def sees(query: Sequence[Tensor], key: Sequence[Tensor]) -> Tensor:
    """Whether queries see keys, bool; each (trajectory, block, view), of shapes that broadcast with one another."""
    same = query[0] == key[0]
    earlier = (key[2] == 0) & (key[1] < query[1])
    own = (query[2] == key[2]) & (query[1] == key[1])
    return same & (earlier | own)


def visible(batch: PackedBatch) -> Tensor:
    """The dense attention mask of a batch: bool (rows, 1, tokens, tokens), True where the query sees the key."""
    integers = (batch.trajectory, batch.block, batch.view)
    return sees([one[:, :, None] for one in integers], [one[:, None, :] for one in integers])[:, None]


def _batch(rows: Sequence[Row], offsets: np.ndarray) -> PackedBatch:
    width = max(len(row) for row in rows)

    def padded(name: str, fill: int = 0) -> Tensor:
        grid = np.full((len(rows), width), fill, dtype=np.int64)
        for line, row in zip(grid, rows):
            line[: len(row)] = getattr(row, name)
        return torch.from_numpy(grid)

    trajectory = np.full((len(rows), width), -1, dtype=np.int64)
    for line, row in zip(trajectory, rows):
        line[: len(row)] = row.trajectory
    return PackedBatch(
        ids=padded("ids"),
        position=padded("position"),
        trajectory=torch.from_numpy(trajectory),
        block=padded("block"),
        view=padded("view"),
        predict_at=torch.from_numpy(np.concatenate([row.predict_at + n * width for n, row in enumerate(rows)])),
        target=torch.from_numpy(np.concatenate([row.target for row in rows])),
        predicted=np.concatenate([np.arange(len(row.target)) + start for row, start in zip(rows, offsets)]),
    )
