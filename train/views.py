"""Views: noised copies of parts of a response, and the positions to predict in each.

Every method, of reinforcement learning and of supervised finetuning, is a function that makes `Views` of one
response; packing, loss and optimizer do not know which. Under block attention a view is one block at its absolute
positions, given the clean blocks before it; tokens of the prompt's remainder in it stay visible. Under full attention
(block_size None) a view is the whole response, given the prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from common.schema import RLTrainingConfig, SFTTrainingConfig
from common.trajectory import Trajectory


@dataclass(frozen=True)
class Views:
    """Views of one response; `width` is the block's size, or the response's under full attention."""

    whole: bool  # full attention: each view is the whole response
    block: np.ndarray  # (views,) index of the block, block 0 at position 0; 0 for whole responses
    inputs: np.ndarray  # (views, width) ids, masked where noised
    targets: np.ndarray  # (views, width) clean ids
    predict: np.ndarray  # (views, width) bool
    response_index: np.ndarray  # (views, width) index into the response, negative in the prompt
    step: np.ndarray  # (views, width) step of the trace at which a token was unmasked; without a trace, the noising

    def __len__(self) -> int:
        return len(self.block)


@dataclass(frozen=True)
class BlockGrid:
    """The blocks of a response, aligned to absolute position 0, or the response as one; arrays are (blocks, width)."""

    whole: bool
    block: np.ndarray  # (blocks,)
    ids: np.ndarray
    response_index: np.ndarray

    @property
    def in_response(self) -> np.ndarray:
        return self.response_index >= 0


def block_grid(prompt_ids: list[int], response_ids: list[int], block_size: int | None) -> BlockGrid:
    """Cut prompt + response into blocks and keep those that hold response tokens; the last must be whole.

    block_size None keeps the response in one piece.
    """
    if block_size is None:
        ids = np.array(response_ids, dtype=np.int64)[None]
        return BlockGrid(True, np.zeros(1, dtype=np.int64), ids, np.arange(len(response_ids))[None])
    total = len(prompt_ids) + len(response_ids)
    assert total % block_size == 0, f"{total} tokens are no whole number of blocks of {block_size}"
    first = len(prompt_ids) // block_size
    ids = np.array(prompt_ids[first * block_size :] + response_ids, dtype=np.int64).reshape(-1, block_size)
    block = np.arange(first, first + len(ids))
    position = block[:, None] * block_size + np.arange(block_size)
    return BlockGrid(False, block, ids, position - len(prompt_ids))


def trace_views(
    trajectory: Trajectory, block_size: int | None, mask_id: int, shrink: int = 1, post_num: int = 0
) -> Views:
    """TraceRL: replay the trace; one view for each block and each `shrink` neighbouring distinct steps of it.

    What was unmasked before the view's steps is visible, the rest is masked; the tokens of the view's steps are
    predicted, those behind the response's end (plus `post_num`) are not. Positions that were never unmasked (step -1)
    stay masks.
    """
    grid = block_grid(trajectory.prompt_ids, trajectory.response_ids, block_size)
    trace = _on_grid(grid, trajectory.step_map, outside=-1)
    drawn = grid.in_response & (trace >= 0)
    row, step = np.nonzero(drawn)[0], trace[drawn]
    pairs = np.unique(np.stack([row, step], 1), axis=0)  # (distinct steps, 2), sorted by block, then step
    group_start, group_row = _group_steps(pairs[:, 0], shrink)
    first_step = pairs[group_start, 1]
    last_step = pairs[np.append(group_start[1:], len(pairs)) - 1, 1]
    group_trace, group_drawn = trace[group_row], drawn[group_row]  # (views, width)
    masked = (group_drawn & (group_trace >= first_step[:, None])) | (grid.in_response & ~drawn)[group_row]
    predict = masked & group_drawn & (group_trace <= last_step[:, None])
    predict &= grid.response_index[group_row] < trajectory.length + post_num
    return _views(grid, group_row, masked, predict, group_trace, mask_id)


def random_views(
    trajectory: Trajectory,
    block_size: int | None,
    mask_id: int,
    rng: np.random.Generator,
    lower_p: float,
    upper_p: float,
    times: int,
    post_num: int = 0,
    coupled: bool = False,
) -> Views:
    """`times` noisings of the whole response, each with t ~ U(lower_p, upper_p), every token masked with probability t.

    `coupled` adds each noising's complement: the pair predicts every predictable token exactly once.
    """
    grid = block_grid(trajectory.prompt_ids, trajectory.response_ids, block_size)
    drawn = grid.in_response & (_on_grid(grid, trajectory.step_map, outside=-1) >= 0)
    predictable = drawn & (grid.response_index < trajectory.length + post_num)
    noisings = []
    for _ in range(times):
        share = rng.uniform(lower_p, upper_p)
        masked = drawn & (rng.uniform(size=drawn.shape) < share)
        noisings += [masked, drawn & ~masked] if coupled else [masked]
    blocks = len(grid.block)
    masked = np.concatenate(noisings)  # (noisings × blocks, width)
    row = np.tile(np.arange(blocks), len(noisings))
    noising = np.repeat(np.arange(len(noisings)), blocks)[:, None] + np.zeros_like(grid.ids)[row]
    predict = masked & predictable[row]
    return _views(grid, row, masked | (grid.in_response & ~drawn)[row], predict, noising, mask_id)


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
    times: int = 1,
) -> Views:
    """Semi-autoregressive SFT: `times` views of every block, each response token masked with t ~ U(lower_p, upper_p).

    A block's draw is repeated until it masks a token to predict; blocks that have none are left out.
    """
    grid = block_grid(prompt_ids, response_ids, block_size)
    predictable = grid.in_response & (grid.response_index < length + post_num)
    rows = np.repeat(np.nonzero(predictable.any(1))[0], times)
    noised = _noise_blocks(grid.in_response[rows], predictable[rows], rng, lower_p, upper_p)
    return _views(grid, rows, noised, noised & predictable[rows], np.zeros_like(grid.ids)[rows], mask_id)


def random_whole_views(
    prompt_ids: list[int],
    response_ids: list[int],
    length: int,
    block_size: int | None,
    mask_id: int,
    rng: np.random.Generator,
    lower_p: float,
    upper_p: float,
    post_num: int = 0,
    times: int = 1,
) -> Views:
    """Full-attention SFT. block_size None: the response noised with one t ~ U(lower_p, upper_p) (random masking).

    Else one view per block: earlier blocks clean, later ones masked, the block noised with its own t (semi-ar).
    All of it `times` times.
    """
    whole = block_grid(prompt_ids, response_ids, None)
    width = len(response_ids)
    size = block_size or width
    assert width % size == 0, f"a canvas of {width} tokens is no whole number of blocks of {size}"
    index = np.arange(width).reshape(-1, size)  # (blocks, size)
    predictable = index < length + post_num
    rows = np.repeat(np.nonzero(predictable.any(1))[0], times)
    noised = _noise_blocks(np.ones_like(predictable)[rows], predictable[rows], rng, lower_p, upper_p)
    masked = np.arange(width) >= (rows[:, None] + 1) * size  # later blocks
    predict = np.zeros_like(masked)
    for view, block in enumerate(rows):
        masked[view, index[block]] = noised[view]
        predict[view, index[block]] = noised[view] & predictable[block]
    views = np.zeros(len(rows), dtype=np.int64)
    return _views(whole, views, masked, predict, np.zeros_like(masked, dtype=np.int64), mask_id)


def _trace(
    trajectory: Trajectory, block_size: int | None, mask_id: int, training: RLTrainingConfig, rng: object
) -> Views:
    return trace_views(trajectory, block_size, mask_id, training.shrink, training.post_num)


def _random(
    trajectory: Trajectory,
    block_size: int | None,
    mask_id: int,
    training: RLTrainingConfig,
    rng: np.random.Generator,
) -> Views:
    times, coupled = training.mask_times_per_sample, training.method == "coupled"
    bounds = (training.lower_p, training.upper_p)
    return random_views(trajectory, block_size, mask_id, rng, *bounds, times, training.post_num, coupled)


def _sft(views: Callable[..., Views], by_block: bool) -> Callable[..., Views]:
    def method(
        prompt_ids: list[int],
        response_ids: list[int],
        length: int,
        mask_id: int,
        training: SFTTrainingConfig,
        rng: np.random.Generator,
    ) -> Views:
        size = training.block_size if by_block else None
        bounds = (training.lower_p, training.upper_p)
        counts = (training.post_num, training.mask_times_per_sample)
        return views(prompt_ids, response_ids, length, size, mask_id, rng, *bounds, *counts)

    return method


# (trajectory, block_size or None, mask_id, the config's training section, rng) → Views
RL_METHODS: dict[str, Callable[..., Views]] = {"TraceRL": _trace, "random_masking": _random, "coupled": _random}
# by attention: (prompt_ids, response_ids, length, mask_id, the config's training section, rng) → Views
SFT_METHODS: dict[str, dict[str, Callable[..., Views]]] = {
    "block": {"semi-ar": _sft(random_block_views, by_block=True)},
    "full": {
        "semi-ar": _sft(random_whole_views, by_block=True),
        "random_masking": _sft(random_whole_views, by_block=False),
    },
}


def _on_grid(grid: BlockGrid, values: list[int], outside: int) -> np.ndarray:
    """Values of the response's tokens at their places in the grid, `outside` at the prompt's."""
    placed = np.full(grid.ids.shape, outside, dtype=np.int64)
    placed[grid.in_response] = values
    return placed


def _noise_blocks(
    maskable: np.ndarray, predictable: np.ndarray, rng: np.random.Generator, lower_p: float, upper_p: float
) -> np.ndarray:
    """Mask each block's tokens with its own t, again until a token to predict is masked; all (blocks, width) bool."""
    masked = np.zeros_like(maskable)
    empty = np.arange(len(maskable))
    while len(empty):
        share = rng.uniform(lower_p, upper_p, size=(len(empty), 1))
        masked[empty] = (rng.uniform(size=(len(empty), maskable.shape[1])) < share) & maskable[empty]
        empty = empty[~(masked[empty] & predictable[empty]).any(1)]
    return masked


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
        whole=grid.whole,
        block=grid.block[row],
        inputs=np.where(masked, mask_id, targets),
        targets=targets,
        predict=predict,
        response_index=grid.response_index[row],
        step=step,
    )
