"""Views: noised copies of parts of a response, and the positions to predict in each.

Every method, of reinforcement learning and of supervised finetuning, is a function that makes `Views` of one
response; packing, loss and optimizer do not know which. Under block attention a view is one block at its absolute
positions, given the clean blocks before it (DESIGN: tokens of the prompt's remainder stay visible).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from common.trajectory import Trajectory


@dataclass(frozen=True)
class Views:
    """Views of one response under block attention."""

    block: np.ndarray  # (views,) index of the block, block 0 at position 0
    inputs: np.ndarray  # (views, block) ids, masked where noised
    targets: np.ndarray  # (views, block) clean ids
    predict: np.ndarray  # (views, block) bool
    response_index: np.ndarray  # (views, block) index into the response, negative in the prompt
    step: np.ndarray  # (views, block) step of the trace at which a token was unmasked; 0 where there is no trace

    def __len__(self) -> int:
        return len(self.block)


@dataclass(frozen=True)
class BlockGrid:
    """The blocks of a response, aligned to absolute position 0; every array is (blocks, block_size)."""

    block: np.ndarray  # (blocks,)
    ids: np.ndarray
    response_index: np.ndarray

    @property
    def in_response(self) -> np.ndarray:
        return self.response_index >= 0


def block_grid(prompt_ids: list[int], response_ids: list[int], block_size: int) -> BlockGrid:
    """Cut prompt + response into blocks and keep those that hold response tokens; the last must be whole."""
    total = len(prompt_ids) + len(response_ids)
    assert total % block_size == 0, f"{total} tokens are no whole number of blocks of {block_size}"
    first = len(prompt_ids) // block_size
    ids = np.array(prompt_ids[first * block_size :] + response_ids, dtype=np.int64).reshape(-1, block_size)
    block = np.arange(first, first + len(ids))
    position = block[:, None] * block_size + np.arange(block_size)
    return BlockGrid(block, ids, position - len(prompt_ids))


def trace_views(trajectory: Trajectory, block_size: int, mask_id: int, shrink: int = 1, post_num: int = 0) -> Views:
    """TraceRL: replay the trace; one view for each block and each `shrink` neighbouring distinct steps of it.

    What was unmasked before the view's steps is visible, the rest is masked; the tokens of the view's steps are
    predicted, those behind the response's end (plus `post_num`) are not.
    """
    grid = block_grid(trajectory.prompt_ids, trajectory.response_ids, block_size)
    trace = np.concatenate([np.full(np.count_nonzero(~grid.in_response), -1), trajectory.step_map])
    trace = trace.reshape(grid.ids.shape)
    row, step = np.nonzero(grid.in_response)[0], trace[grid.in_response]
    pairs = np.unique(np.stack([row, step], 1), axis=0)  # (distinct steps, 2), sorted by block, then step
    group_start, group_row = _group_steps(pairs[:, 0], shrink)
    first_step = pairs[group_start, 1]
    last_step = pairs[np.append(group_start[1:], len(pairs)) - 1, 1]
    group_trace = trace[group_row]  # (views, block)
    masked = group_trace >= first_step[:, None]
    predict = masked & (group_trace <= last_step[:, None])
    predict &= grid.response_index[group_row] < trajectory.length + post_num
    return _views(grid, group_row, masked, predict, group_trace, mask_id)


def random_block_views(
    prompt_ids: list[int],
    response_ids: list[int],
    length: int,
    block_size: int,
    mask_id: int,
    rng: np.random.Generator,
    lower_p: float,
    upper_p: float,
    post_num: int = 0,
) -> Views:
    """Semi-autoregressive SFT: one view of every block, each response token masked with t ~ U(lower_p, upper_p).

    A block's draw is repeated until it masks a token to predict; blocks that have none are left out.
    """
    grid = block_grid(prompt_ids, response_ids, block_size)
    predictable = grid.in_response & (grid.response_index < length + post_num)
    rows = np.nonzero(predictable.any(1))[0]
    masked = np.zeros_like(predictable)
    empty = rows
    while len(empty):
        share = rng.uniform(lower_p, upper_p, size=(len(empty), 1))
        masked[empty] = (rng.uniform(size=(len(empty), block_size)) < share) & grid.in_response[empty]
        empty = empty[~(masked[empty] & predictable[empty]).any(1)]
    noised = masked[rows]
    return _views(grid, rows, noised, noised & predictable[rows], np.zeros_like(grid.ids)[rows], mask_id)


RL_METHODS: dict[str, Callable[..., Views]] = {"TraceRL": trace_views}
SFT_METHODS: dict[str, Callable[..., Views]] = {"semi-ar": random_block_views}


def _group_steps(row: np.ndarray, shrink: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each group of `shrink` neighbouring steps starts in the sorted (block, step) pairs, and its block."""
    first_of_row = np.searchsorted(row, row, side="left")
    rank = np.arange(len(row)) - first_of_row
    start = np.nonzero(rank % shrink == 0)[0]
    return start, row[start]


def _views(
    grid: BlockGrid, row: np.ndarray, masked: np.ndarray, predict: np.ndarray, step: np.ndarray, mask_id: int
) -> Views:
    keep = predict.any(1)
    row, masked, predict, step = row[keep], masked[keep], predict[keep], step[keep]
    targets = grid.ids[row]
    return Views(
        block=grid.block[row],
        inputs=np.where(masked, mask_id, targets),
        targets=targets,
        predict=predict,
        response_index=grid.response_index[row],
        step=step,
    )
