"""Views: noised copies of parts of a response, and the positions to predict in each.

Every method, of reinforcement learning and of supervised finetuning, is a function (example, layout, training, rng) →
`Views`; packing, loss and optimizer do not know which. Under block attention a view is one block at its absolute
positions, given the clean blocks before it; tokens of the prompt's remainder in it stay visible. Under full attention
(layout.block_size None) a view is the whole response, given the prompt.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial

import numpy as np

from common.errors import UserError, load_function
from common.jobs import RLConfig, attention_faults
from common.schema import RLTrainingConfig, SFTTrainingConfig, TrainingBase
from common.trajectory import Trajectory, Writing
from models.family import Family, LoadedModel
from models.mixture import MixtureNetwork


@dataclass(frozen=True)
class Layout:
    """How the family's attention lays a response out."""

    mask_id: int
    block_size: int | None  # None: full attention
    logit_offset: int = 0  # the prediction for position i is at i + logit_offset
    vocabulary: int = 0  # how many ids the network has; read where tokens are corrupted


def layout_of(loaded: LoadedModel, block_size: int) -> Layout:
    """The layout of a family's responses, in blocks of that size where its attention has blocks."""
    family = loaded.family
    size = None if family.attention == "full" else block_size
    return Layout(loaded.mask_id, size, family.logit_offset, loaded.model.config.vocab_size)


@dataclass(frozen=True)
class Example:
    """A prompt with the response to learn, filled up to whole blocks or to the canvas.

    `length` counts through the stop token; a step of -1 marks what a trace never unmasked, and what it wrote and
    overwrote stands in `overwritten`. A `Trajectory` has the same fields, and is an example too.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    length: int
    step_map: list[int] | None = None
    overwritten: list[Writing] = field(default_factory=list)


@dataclass(frozen=True)
class Views:
    """Views of one response; `width` is the block's size, or the response's under full attention."""

    whole: bool  # full attention: each view is the whole response
    block: np.ndarray  # (views,) index of the block, block 0 at position 0; 0 for whole responses
    inputs: np.ndarray  # (views, width) ids, masked where noised
    targets: np.ndarray  # (views, width) what is predicted, elsewhere the clean ids
    predict: np.ndarray  # (views, width) bool
    response_index: np.ndarray  # (views, width) index into the response, negative in the prompt
    step: np.ndarray  # (views, width) the trace's step, the first of those merged; without a trace, the noising
    weight: np.ndarray | None = None  # (views, width) of each prediction in finetuning's loss, or in its term; None: 1
    prompt: np.ndarray | None = None  # (views, prompt) ids, masked where noised; None: the prompt as it is
    causal: bool = False  # each token sees those before it, and nothing is masked
    # (views, width) which writing of its position is predicted: an index into the trace's overwritten ones, or -1 for
    # the last. None: the last everywhere
    writing: np.ndarray | None = None
    # (views, width) bool: masks in whose place the model is to draw tokens before it learns to edit them
    drafted: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.block)


ViewMethod = Callable[[Example | Trajectory, Layout, TrainingBase, np.random.Generator], Views]


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

    block_size None (full attention) keeps the response in one piece.
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


# ---- views of a trace


@dataclass(frozen=True)
class Writings:
    """A trace's writings on the grid, (layers, blocks, width): layer n holds each position's n-th writing."""

    step: np.ndarray  # -1 where a position has no such writing
    token: np.ndarray
    overwritten: np.ndarray  # index into the trace's overwritten writings; -1: the position's last one


def writings_of(grid: BlockGrid, example: Example | Trajectory) -> Writings:
    """Every writing of an example's trace, in the order in which each position was written."""
    last = _trace_on(grid, example.step_map)
    count = np.zeros(len(example.response_ids), dtype=int)  # of a position's overwritten writings
    layer = []
    for writing in example.overwritten:
        layer.append(count[writing.position])
        count[writing.position] += 1
    layers = (1 + int(count.max()), *last.shape)
    found = Writings(np.full(layers, -1), np.zeros(layers, dtype=np.int64), np.full(layers, -1))
    block, offset = np.nonzero(grid.in_response)
    top = (count[grid.response_index[block, offset]], block, offset)
    found.step[top], found.token[top] = last[block, offset], grid.ids[block, offset]
    if example.overwritten:
        step, position, token, _ = (np.array(column) for column in zip(*example.overwritten))
        below = (np.array(layer), block[position], offset[position])
        found.step[below], found.token[below] = step, token
        found.overwritten[below] = np.arange(len(step))
    return found


def trace_views(example: Example | Trajectory, layout: Layout, shrink: int = 1, post_num: int = 0) -> Views:
    """TraceRL: replay the trace; one view for each block and each `shrink` neighbouring steps that wrote tokens in it.

    A view shows the canvas as it was before its steps: each position's last earlier writing, a mask where there is none
    or where that was a revocation. Predicted is what its steps wrote, into masks and in place of other tokens; of a
    position that they wrote several times, the last token. A revocation chose a position and drew nothing: it is never
    predicted. Nor is what lies behind the response's end (plus `post_num`). Positions that were never unmasked (step
    -1) stay masks.
    """
    grid = block_grid(example.prompt_ids, example.response_ids, layout.block_size)
    writings = writings_of(grid, example)
    drawn = (writings.step >= 0) & (writings.token != layout.mask_id)
    layer, block, offset = np.nonzero(drawn)
    pairs = np.unique(np.stack([block, writings.step[layer, block, offset]], 1), axis=0)  # (steps, 2): block, step
    rank = np.arange(len(pairs)) - np.searchsorted(pairs[:, 0], pairs[:, 0], side="left")  # of a step in its block
    start = np.nonzero(rank % shrink == 0)[0]  # where each view's steps begin in `pairs`
    row = pairs[start, 0]
    first_step, last_step = pairs[start, 1], pairs[np.append(start[1:], len(pairs)) - 1, 1]

    inputs = np.where(grid.in_response, layout.mask_id, grid.ids)[row]  # (views, width)
    targets, predict = grid.ids[row], np.zeros(inputs.shape, dtype=bool)
    writing = np.full(inputs.shape, -1)
    step = writings.step[:, row]  # (layers, views, width)
    earlier = (step >= 0) & (step < first_step[:, None])
    own = drawn[:, row] & ~earlier & (step <= last_step[:, None])
    for n in range(len(drawn)):  # later writings of a position over its earlier ones
        inputs = np.where(earlier[n], writings.token[n, row], inputs)
        targets = np.where(own[n], writings.token[n, row], targets)
        writing = np.where(own[n], writings.overwritten[n, row], writing)
        predict |= own[n]
    predict &= grid.response_index[row] < example.length + post_num
    return _kept(
        Views(
            whole=grid.whole,
            block=grid.block[row],
            inputs=inputs,
            targets=targets,
            predict=predict,
            response_index=grid.response_index[row],
            step=np.broadcast_to(first_step[:, None], inputs.shape),
            writing=writing,
        )
    )


def replayed_trace(
    example: Example | Trajectory, layout: Layout, training: RLTrainingConfig | SFTTrainingConfig, rng: object
) -> Views:
    """`trace_views` as the config says."""
    return trace_views(example, layout, training.shrink, training.post_num)


# ---- random views of reinforcement learning

# A noised copy of a response: what of it is masked, (blocks, width) bool, and the coefficient of its predictions in a
# term of several copies, one for each block, (blocks, 1), or for all. None: predictions are terms of their own.
Noising = tuple[np.ndarray, np.ndarray | float | None]
Noise = Callable[[np.ndarray, RLTrainingConfig, np.random.Generator], list[Noising]]
# nodes and weights of Gauss and Legendre for the integral from 0 to 1
QUADRATURE = [(0.5 - 0.6**0.5 / 2, 5 / 18), (0.5, 8 / 18), (0.5 + 0.6**0.5 / 2, 5 / 18)]


def bernoulli(
    predictable: np.ndarray, training: RLTrainingConfig, rng: np.random.Generator, coupled: bool = False
) -> list[Noising]:
    """Copies with a t ~ U(lower_p, upper_p) each, every token masked with probability t; `coupled`: with complements.

    A pair predicts every predictable token exactly once.
    """
    noisings: list[Noising] = []
    for _ in range(training.mask_times_per_sample):
        share = rng.uniform(training.lower_p, training.upper_p)
        masked = predictable & (rng.uniform(size=predictable.shape) < share)
        noisings.append((masked, None))
        if coupled:
            noisings.append((predictable & ~masked, None))
    return noisings


def coupled_whole(predictable: np.ndarray, training: RLTrainingConfig, rng: np.random.Generator) -> list[Noising]:
    """A coupled pair, and the whole response masked (coupled-GRPO of DiffuCoder).

    The estimate at a position is ½ (logp where all is masked + logp in the copy that masks it / its probability of
    being masked there, t or 1 − t); of several pairs the mean.
    """
    times = training.mask_times_per_sample
    noisings: list[Noising] = [(predictable, 1 / 2)]
    for _ in range(times):
        share = rng.uniform(training.lower_p, training.upper_p)
        masked = predictable & (rng.uniform(size=predictable.shape) < share)
        noisings += [(masked, 1 / (2 * share * times)), (predictable & ~masked, 1 / (2 * (1 - share) * times))]
    return noisings


def whole(predictable: np.ndarray, training: RLTrainingConfig, rng: np.random.Generator) -> list[Noising]:
    """The whole response masked (diffu-GRPO of d1); copies differ in the prompt's noise (`prompt_mask`)."""
    return [(predictable, None)] * training.mask_times_per_sample


def counts(predictable: np.ndarray, training: RLTrainingConfig, rng: np.random.Generator) -> list[Noising]:
    """Pairs of a copy that masks l of the L tokens, l uniform on 0…L, and its complement (ESPO).

    A copy estimates the ELBO by L/l times the sum of its logp, per token by their mean; the estimates are averaged. One
    that masks nothing estimates nothing, and its complement stands for both.
    """
    noisings: list[Noising] = []
    for _ in range(training.mask_times_per_sample):
        count = int(rng.integers(0, predictable.sum() + 1))
        masked = _some(predictable, count, rng)
        pair = [one for one in (masked, predictable & ~masked) if one.any()]
        noisings += [(one, 1 / (one.sum() * len(pair) * training.mask_times_per_sample)) for one in pair]
    return noisings


def quadrature(predictable: np.ndarray, training: RLTrainingConfig, rng: np.random.Generator) -> list[Noising]:
    """A copy at each of three levels t that masks ⌊tL⌋ of the L tokens, at least one (GDPO).

    The ELBO per token is the quadrature of 1/t · Σ logp over t, divided by L.
    """
    total, times = int(predictable.sum()), training.mask_times_per_sample
    return [
        (_some(predictable, max(1, int(t * total)), rng), weight / (t * total * times))
        for _ in range(times)
        for t, weight in QUADRATURE
    ]


def stratified(predictable: np.ndarray, training: RLTrainingConfig, rng: np.random.Generator) -> list[Noising]:
    """Copies in which every block of n tokens has ⌊tn⌋ + 1 masks, t in another of as many strata each time (EBPO).

    A block's logp is weighed by n / masks, so that each copy estimates the whole response's ELBO; copies are averaged.
    """
    size, times = predictable.sum(1), training.mask_times_per_sample
    stratum = rng.permuted(np.tile(np.arange(times), (len(size), 1)), axis=1)
    level = (stratum + rng.uniform(size=stratum.shape)) / times  # (blocks, times)
    noisings: list[Noising] = []
    for share in level.T:
        masks = np.minimum((share * size).astype(int) + 1, size)
        masked = np.stack([_some(block, mask, rng) for block, mask in zip(predictable, masks)])
        noisings.append((masked, (size / np.maximum(masks, 1) / times)[:, None]))
    return noisings


def _some(maskable: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` of the maskable tokens, bool of the same shape."""
    chosen = np.zeros_like(maskable)
    chosen.flat[rng.choice(np.flatnonzero(maskable), count, replace=False)] = True
    return chosen


def noised_views(
    example: Example | Trajectory, layout: Layout, training: RLTrainingConfig, rng: np.random.Generator, noise: Noise
) -> Views:
    """Noised copies of the whole response, in each of which what is masked is predicted.

    What lies behind the response's end (plus `post_num`) is masked in all of them: left clean it would give the length
    away. The prompt's tokens are masked with probability `prompt_mask` (full attention).
    """
    grid = block_grid(example.prompt_ids, example.response_ids, layout.block_size)
    # what was revoked and never written again is a mask still
    drawn = (_trace_on(grid, example.step_map) >= 0) & (grid.ids != layout.mask_id)
    predictable = drawn & (grid.response_index < example.length + training.post_num)
    noisings = noise(predictable, training, rng) if predictable.any() else [(predictable, None)]
    predict = np.concatenate([masked for masked, _ in noisings])  # (noisings × blocks, width)
    known = all(coefficient is not None for _, coefficient in noisings)
    weight = np.concatenate([np.broadcast_to(one, (len(drawn), 1)) for _, one in noisings]) if known else None
    noising, row = np.divmod(np.arange(len(predict)), len(grid.block))
    masked = predict | (grid.in_response & ~predictable)[row]
    views = _views(grid, row, masked, predict, layout.mask_id, step=noising[:, None], weight=weight)
    if training.prompt_mask == 0:
        return views
    noised = rng.uniform(size=(len(views), len(example.prompt_ids))) < training.prompt_mask
    return replace(views, prompt=np.where(noised, layout.mask_id, example.prompt_ids))


def random_views(
    example: Example | Trajectory,
    layout: Layout,
    training: RLTrainingConfig,
    rng: np.random.Generator,
    coupled: bool = False,
) -> Views:
    """`noised_views` of `bernoulli`."""
    return noised_views(example, layout, training, rng, partial(bernoulli, coupled=coupled))


# ---- views of finetuning


def random_block_views(
    example: Example, layout: Layout, training: SFTTrainingConfig, rng: np.random.Generator
) -> Views:
    """Semi-autoregressive: `mask_times_per_sample` views of every block, each with its own t ~ U(lower_p, upper_p).

    Every response token is masked with probability t. A block's draw is repeated until it masks a token to predict;
    blocks that have none are left out.

    With `corrupt_p` a view mixes mask-to-token and token-to-token prediction (LLaDA2.1, arXiv 2602.08676): each visible
    token that could be predicted is replaced with that probability, by a token drawn uniformly from the vocabulary, or
    where the model is to draw them (`corrupt_from: model`, arXiv 2606.17175) by a mask which `drafted` names. All
    visible ones are predicted, the right ones too: an editor has to know what to leave as it is. Weights are 1 of masks
    and `corrupt_weight` of visible tokens. A view without masks is kept, since that is what an editor sees last.
    """
    grid = block_grid(example.prompt_ids, example.response_ids, layout.block_size)
    predictable = grid.in_response & (grid.response_index < example.length + training.post_num)
    row, masked, predict, weight = _noise_blocks(grid.in_response, predictable, training, rng)
    if training.corrupt_p == 0:
        return _views(grid, row, masked, predict, layout.mask_id, weight=weight)
    visible = predictable[row] & ~masked
    corrupted = visible & (rng.uniform(size=visible.shape) < training.corrupt_p)
    views = _views(grid, row, masked, predict | visible, layout.mask_id)
    views = replace(views, weight=np.where(masked, 1.0, training.corrupt_weight))
    if training.corrupt_from == "model":
        return replace(views, inputs=np.where(corrupted, layout.mask_id, views.inputs), drafted=corrupted)
    others = rng.integers(0, layout.vocabulary - 1, visible.shape)
    others += others >= layout.mask_id  # any but the mask token
    return replace(views, inputs=np.where(corrupted, others, views.inputs))


def random_response_views(
    example: Example,
    layout: Layout,
    training: SFTTrainingConfig,
    rng: np.random.Generator,
    by_block: bool = False,
) -> Views:
    """Full attention: the response noised with one t ~ U(lower_p, upper_p) (random masking).

    `by_block` (semi-ar): one view per block of training.block_size: earlier blocks clean, later ones masked, the block
    noised with its own t. All of it `mask_times_per_sample` times.
    """
    grid = block_grid(example.prompt_ids, example.response_ids, None)
    width = len(example.response_ids)
    size = training.block_size if by_block else width
    assert width % size == 0, f"a canvas of {width} tokens is no whole number of blocks of {size}"
    index = np.arange(width)
    predictable = (index < example.length + training.post_num).reshape(-1, size)  # (blocks, size)
    block, noised, predicted, weight = _noise_blocks(np.ones_like(predictable), predictable, training, rng)
    own = index // size == block[:, None]  # (views, width)
    masked = index // size > block[:, None]  # later blocks
    predict = np.zeros_like(own)
    masked[own], predict[own] = noised.ravel(), predicted.ravel()
    return _views(grid, np.zeros_like(block), masked, predict, layout.mask_id, weight=weight)


def next_token_views(example: Example, layout: Layout, training: SFTTrainingConfig, rng: object) -> Views:
    """Autoregressive: the response as it is, every token of it predicted from those before it."""
    width = min(example.length + training.post_num, len(example.response_ids))
    grid = block_grid(example.prompt_ids, example.response_ids[:width], None)
    everywhere = np.ones_like(grid.ids, dtype=bool)
    views = _views(grid, np.zeros(1, dtype=np.int64), ~everywhere, everywhere, layout.mask_id)
    return replace(views, causal=True)


def join_views(parts: Sequence[Views]) -> Views:
    """The views of several responses whose clean tokens are one sequence, in its order."""
    arrays = [one.name for one in fields(Views) if isinstance(getattr(parts[0], one.name), np.ndarray)]
    return replace(parts[0], **{name: np.concatenate([getattr(part, name) for part in parts]) for name in arrays})


def some_views(views: Views, chosen: np.ndarray) -> Views:
    """The views of those indices."""
    return replace(views, **{name: one[chosen] for name, one in vars(views).items() if isinstance(one, np.ndarray)})


# ---- the methods by name

RL_METHODS: dict[str, ViewMethod] = {
    "TraceRL": replayed_trace,
    "random_masking": random_views,
    "coupled": partial(random_views, coupled=True),
    "coupled_whole": partial(noised_views, noise=coupled_whole),
    "whole": partial(noised_views, noise=whole),
    "counts": partial(noised_views, noise=counts),
    "quadrature": partial(noised_views, noise=quadrature),
    "stratified": partial(noised_views, noise=stratified),
}
SFT_METHODS: dict[str, dict[str, ViewMethod]] = {  # by the family's attention
    "block": {"semi-ar": random_block_views, "trace": replayed_trace},
    "full": {
        "semi-ar": partial(random_response_views, by_block=True),
        "random_masking": random_response_views,
        "trace": replayed_trace,
        "ar": next_token_views,  # of networks that predict position i at i - 1
    },
}


def check_views(config: RLConfig, family: Family) -> None:
    """UserError where the configured views or blocks are of another attention than the family's, or no such method is.

    The line names the families that have it.
    """
    view_method(config.training.method)
    if config.training.replay_routes and not (
        issubclass(family.model_class, MixtureNetwork) and family.attention == "block"
    ):
        raise UserError(
            f"training.replay_routes: model.model_base={family.name} is no mixture of experts that is sampled block by "
            "block; leave it out"
        )
    for fault in attention_faults(config, family.name, family.attention):
        raise UserError(fault)


def view_method(method: str) -> ViewMethod:
    """The function that makes the views of `training.method`: of RL_METHODS, or the user's own `module:function`.

    A user's function may also take the older arguments (trajectory, block_size, mask_id, training, rng). UserError
    where there is no such function; its views are checked when it is called.
    """
    if method in RL_METHODS:
        return RL_METHODS[method]
    function = load_function("training.method", method)
    try:
        inspect.signature(function).bind("example", "layout", "training", "rng")
        older = False
    except TypeError:
        older = True

    def checked(example: Trajectory, layout: Layout, training: TrainingBase, rng: np.random.Generator) -> Views:
        arguments = (layout.block_size, layout.mask_id) if older else (layout,)
        views = function(example, *arguments, training, rng)
        if not isinstance(views, Views):
            raise UserError(
                f"training.method: '{method}' returned {type(views).__name__}; it must return train.views.Views"
            )
        return views

    return checked


def _trace_on(grid: BlockGrid, step_map: list[int]) -> np.ndarray:
    """The step of every token of the grid, (blocks, width); -1 where it was never unmasked, and in the prompt."""
    trace = np.full(grid.ids.shape, -1, dtype=np.int64)
    trace[grid.in_response] = step_map
    return trace


def _noise_blocks(
    maskable: np.ndarray, predictable: np.ndarray, training: SFTTrainingConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mask the tokens of each block that has some to predict, with a t of its own; again until one of them is masked.

    Where visible tokens are predicted too (`corrupt_p`) the first draw stands.
    maskable and predictable (blocks, width) bool. Every such block comes `mask_times_per_sample` times. Returns its
    index (views,), what is masked and what of that is predicted, (views, width) bool, and the ELBO's weight (views, 1).
    """
    lower_p, upper_p = training.lower_p, training.upper_p
    block = np.repeat(np.flatnonzero(predictable.any(1)), training.mask_times_per_sample)
    maskable, predictable = maskable[block], predictable[block]
    masked = np.zeros_like(maskable)
    shares = np.zeros((len(block), 1))
    empty = np.arange(len(block))
    while len(empty):
        shares[empty] = share = rng.uniform(lower_p, upper_p, size=(len(empty), 1))
        masked[empty] = (rng.uniform(size=(len(empty), maskable.shape[1])) < share) & maskable[empty]
        predicted = predictable if training.corrupt_p else masked & predictable
        empty = empty[~predicted[empty].any(1)]
    weight = elbo_weight(shares, predictable.sum(1, keepdims=True), lower_p, upper_p)
    return block, masked, masked & predictable, weight


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


def _views(
    grid: BlockGrid,
    row: np.ndarray,  # (views,) of the grid
    masked: np.ndarray,  # (views, width), as predict
    predict: np.ndarray,
    mask_id: int,
    step: np.ndarray | int = 0,  # (views, 1), or of all
    weight: np.ndarray | None = None,  # (views, 1)
) -> Views:
    """Views of the grid's rows; those that predict nothing are left out."""
    targets = grid.ids[row]
    return _kept(
        Views(
            whole=grid.whole,
            block=grid.block[row],
            inputs=np.where(masked, mask_id, targets),
            targets=targets,
            predict=predict,
            response_index=grid.response_index[row],
            step=np.broadcast_to(step, predict.shape),
            weight=None if weight is None else np.broadcast_to(weight, predict.shape),
        )
    )


def _kept(views: Views) -> Views:
    """The views that predict something."""
    keep = views.predict.any(1)
    arrays = {name: one[keep] for name, one in vars(views).items() if isinstance(one, np.ndarray)}
    return replace(views, **arrays)
