"""Views: noised copies of parts of a response, and the positions to predict in each.

Every method, of reinforcement learning and of supervised finetuning, is a function that makes `Views` of one
response; packing, loss and optimizer do not know which. Under block attention a view is one block at its absolute
positions, given the clean blocks before it; tokens of the prompt's remainder in it stay visible. Under full attention
(block_size None) a view is the whole response, given the prompt.
"""

from collections.abc import Callable, Sequence
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
    step: np.ndarray  # (views, width) the trace's step, the first of those merged; without a trace, the noising
    weight: np.ndarray | None = None  # (views, width) of each prediction in the loss of finetuning; None: 1
    causal: bool = False  # each token sees those before it, and nothing is masked

    def __len__(self) -> int:
        return len(self.block)


@dataclass(frozen=True)
class Example:
    """A prompt with the response to learn, filled up to whole blocks or to the canvas.

    `length` counts through the stop token; a step of -1 marks what a trace never unmasked.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    length: int
    step_map: list[int] | None = None


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
    trajectory: Trajectory | Example, block_size: int | None, mask_id: int, shrink: int = 1, post_num: int = 0
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
    step_of_view = np.broadcast_to(first_step[:, None], predict.shape)
    return _views(grid, group_row, masked, predict, step_of_view, mask_id)


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
    example: Example,
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
    grid = block_grid(example.prompt_ids, example.response_ids, block_size)
    predictable = grid.in_response & (grid.response_index < example.length + post_num)
    rows = np.repeat(np.nonzero(predictable.any(1))[0], times)
    noised, weight = _noise_blocks(grid.in_response[rows], predictable[rows], rng, lower_p, upper_p)
    steps = np.zeros_like(grid.ids)[rows]
    return _views(grid, rows, noised, noised & predictable[rows], steps, mask_id, weight)


def random_whole_views(
    example: Example,
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
    whole = block_grid(example.prompt_ids, example.response_ids, None)
    width = len(example.response_ids)
    size = block_size or width
    assert width % size == 0, f"a canvas of {width} tokens is no whole number of blocks of {size}"
    index = np.arange(width).reshape(-1, size)  # (blocks, size)
    predictable = index < example.length + post_num
    rows = np.repeat(np.nonzero(predictable.any(1))[0], times)
    noised, weight = _noise_blocks(np.ones_like(predictable)[rows], predictable[rows], rng, lower_p, upper_p)
    masked = np.arange(width) >= (rows[:, None] + 1) * size  # later blocks
    predict = np.zeros_like(masked)
    for view, block in enumerate(rows):
        masked[view, index[block]] = noised[view]
        predict[view, index[block]] = noised[view] & predictable[block]
    views = np.zeros(len(rows), dtype=np.int64)
    return _views(whole, views, masked, predict, np.zeros_like(masked, dtype=np.int64), mask_id, weight)


def next_token_views(example: Example, post_num: int = 0) -> Views:
    """Autoregressive SFT: the response as it is, every token of it predicted from those before it."""
    width = min(example.length + post_num, len(example.response_ids))
    ids = np.array(example.response_ids[:width], dtype=np.int64)[None]
    index, zeros = np.arange(width)[None], np.zeros_like(ids)
    return Views(True, np.zeros(1, dtype=np.int64), ids, ids, np.ones_like(ids, dtype=bool), index, zeros, causal=True)


def join_views(parts: Sequence[Views]) -> Views:
    """The views of several responses whose clean tokens are one sequence, in its order."""
    if len(parts) == 1:
        return parts[0]

    def joined(name: str) -> np.ndarray | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else np.concatenate(values)

    arrays = ("block", "inputs", "targets", "predict", "response_index", "step", "weight")
    return Views(whole=parts[0].whole, causal=parts[0].causal, **{name: joined(name) for name in arrays})


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


def _sft_random(views: Callable[..., Views], by_block: bool) -> Callable[..., Views]:
    def method(example: Example, mask_id: int, training: SFTTrainingConfig, rng: np.random.Generator) -> Views:
        size = training.block_size if by_block else None
        bounds = (training.lower_p, training.upper_p)
        return views(example, size, mask_id, rng, *bounds, training.post_num, training.mask_times_per_sample)

    return method


def _sft_trace(by_block: bool) -> Callable[..., Views]:
    def method(example: Example, mask_id: int, training: SFTTrainingConfig, rng: object) -> Views:
        size = training.block_size if by_block else None
        return trace_views(example, size, mask_id, training.shrink, training.post_num)

    return method


def _sft_next_token(example: Example, mask_id: int, training: SFTTrainingConfig, rng: object) -> Views:
    return next_token_views(example, training.post_num)


# (trajectory, block_size or None, mask_id, the config's training section, rng) → Views
RL_METHODS: dict[str, Callable[..., Views]] = {"TraceRL": _trace, "random_masking": _random, "coupled": _random}
# by attention: (example, mask_id, the config's training section, rng) → Views
SFT_METHODS: dict[str, dict[str, Callable[..., Views]]] = {
    "block": {"semi-ar": _sft_random(random_block_views, by_block=True), "trace": _sft_trace(by_block=True)},
    "full": {
        "semi-ar": _sft_random(random_whole_views, by_block=True),
        "random_masking": _sft_random(random_whole_views, by_block=False),
        "trace": _sft_trace(by_block=False),
        "ar": _sft_next_token,  # of networks that predict position i at i - 1
    },
}


def _on_grid(grid: BlockGrid, values: list[int], outside: int) -> np.ndarray:
    """Values of the response's tokens at their places in the grid, `outside` at the prompt's."""
    placed = np.full(grid.ids.shape, outside, dtype=np.int64)
    placed[grid.in_response] = values
    return placed


def _noise_blocks(
    maskable: np.ndarray, predictable: np.ndarray, rng: np.random.Generator, lower_p: float, upper_p: float
) -> tuple[np.ndarray, np.ndarray]:
    """Mask each block's tokens with its own t, again until a token to predict is masked.

    Returns who is masked, (blocks, width) bool, and the blocks' ELBO weights, (blocks, 1).
    """
    masked = np.zeros_like(maskable)
    shares = np.zeros((len(maskable), 1))
    empty = np.arange(len(maskable))
    while len(empty):
        shares[empty] = share = rng.uniform(lower_p, upper_p, size=(len(empty), 1))
        masked[empty] = (rng.uniform(size=(len(empty), maskable.shape[1])) < share) & maskable[empty]
        empty = empty[~(masked[empty] & predictable[empty]).any(1)]
    return masked, elbo_weight(shares, predictable.sum(1, keepdims=True), lower_p, upper_p)


def elbo_weight(share: np.ndarray, count: np.ndarray, lower_p: float, upper_p: float) -> np.ndarray:
    """1/t of the evidence lower bound, for views of `count` tokens whose draw is repeated until one is masked.

    In the bound a draw that masks none counts as zero; since it is drawn again here, the weight holds the probability
    1 - E[(1-t)^count] of a draw that does mask one. The mean of weight × masked is then 1 for every token.
    """
    if lower_p == upper_p:
        none_masked = (1 - lower_p) ** count
    else:
        powers = (1 - lower_p) ** (count + 1) - (1 - upper_p) ** (count + 1)
        none_masked = powers / ((count + 1) * (upper_p - lower_p))
    return (1 - none_masked) / share


def _group_steps(row: np.ndarray, shrink: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each group of `shrink` neighbouring steps starts in the sorted (block, step) pairs, and its block."""
    first_of_row = np.searchsorted(row, row, side="left")
    rank = np.arange(len(row)) - first_of_row
    start = np.nonzero(rank % shrink == 0)[0]
    return start, row[start]


def _views(
    grid: BlockGrid,
    row: np.ndarray,
    masked: np.ndarray,
    predict: np.ndarray,
    step: np.ndarray,
    mask_id: int,
    weight: np.ndarray | None = None,  # (views, 1)
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
        weight=None if weight is None else np.broadcast_to(weight[keep], targets.shape),
    )
