"""The packed forward: all views of a trajectory share one clean copy of its tokens and one forward.

A row is [prompt, response, every view of every block], position ids absolute. A clean token sees clean tokens of its
own and earlier blocks; a token of a view sees the clean tokens of earlier blocks and its own view. Who sees whom
follows from four integers per token, trajectory (-1: padding), prompt, block and view (0: clean), by
`train.attention.sees`: the prompt is the number that clean tokens have which this trajectory shares with others.

A row that exceeds the budget of a micro-batch is forwarded in parts that each repeat the clean copy, as far as they
need it, and hold some of the views. Losses are sums over predicted tokens, whose weights are those of the whole row, so
their gradients add up to its own. Responses to one prompt stand behind one copy of its whole blocks, as many as the
budget holds: these see nothing of a response, so that they are the same in every row. The block in which a response
begins is its own, with the prompt's remainder.

Under full attention a noised token changes every other, so nothing is shared: each view is a row [prompt, response] of
its own, in the same integers clean tokens of one block.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from common.trajectory import Routes
from train.views import Views

ALIGNMENT = 16  # bytes; what compiled kernels ask of their inputs


@dataclass(frozen=True)
class Row:
    """One trajectory with its views (full attention: one of its views), and what is predicted in it."""

    trajectory: int  # index into the step's trajectories
    ids: np.ndarray  # (tokens,)
    position: np.ndarray  # (tokens,)
    block: np.ndarray  # (tokens,)
    view: np.ndarray  # (tokens,) 0 for the clean copy
    predict_at: np.ndarray  # (predicted,) index of a token of the row
    target: np.ndarray  # (predicted,)
    response_index: np.ndarray  # (predicted,)
    trace_step: np.ndarray  # (predicted,) of a trace, or the noising
    weight: np.ndarray | None = None  # (predicted,) in the loss of finetuning, or in its term; None: 1
    writing: np.ndarray | None = None  # (predicted,) as in Views; None: all are the last of their positions
    routes: np.ndarray | None = None  # (tokens, layers, chosen) the sampler's experts
    prompt: int = 0  # leading tokens that see nothing of the response, and are the same behind every one to this prompt

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Part:
    """Tokens of a row that are forwarded together: all of them, or the clean copy with some of its views.

    Of rows that share their prompt, the prompt is a part, and the rest of each.
    """

    row: int  # index into the update's rows
    tokens: np.ndarray  # (tokens,) index into the row's, ascending
    trajectory: int  # a number of its own among the update's parts
    prompt: int  # the number of the part whose tokens are its prompt, or its own
    counted: np.ndarray  # (tokens,) for how many rows it stands: 0 where an earlier part of the row has the token too


@dataclass(frozen=True)
class PackedBatch:
    """Rows of one micro-batch, padded to one length; `predicted` says which of the update's tokens they hold."""

    ids: Tensor  # (rows, tokens)
    position: Tensor  # (rows, tokens)
    trajectory: Tensor  # (rows, tokens) which part of the update's rows it belongs to, -1 for padding
    prompt: Tensor  # (rows, tokens) which part is its prompt, where it shares one; else as trajectory
    block: Tensor  # (rows, tokens)
    view: Tensor  # (rows, tokens)
    predict_at: Tensor  # (predicted,) index into the flattened rows
    target: Tensor  # (predicted,)
    predicted: np.ndarray  # (predicted,) index into the update's predicted tokens, in the order of its rows
    counted: Tensor  # (rows, tokens) in how many rows it stands, summed over the update's copies of it; of padding 0
    routes: Tensor | None = None  # (rows, tokens, layers, chosen) the sampler's experts, of padding 0

    def to(self, device: torch.device) -> "PackedBatch":
        return replace(
            self, **moved({name: one for name, one in vars(self).items() if isinstance(one, Tensor)}, device)
        )


def moved(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Tensors of the host on a device, in one copy that the host does not wait for; there they are one's parts.

    Each begins at a multiple of `ALIGNMENT` bytes. On the host they are given back as they are.
    """
    if device.type == "cpu":
        return tensors
    sizes = [-(-one.nbytes // ALIGNMENT) * ALIGNMENT for one in tensors.values()]
    packed = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for part, one in zip(packed.split(sizes), tensors.values()):
        part[: one.nbytes].view(one.dtype).view(one.shape).copy_(one)
    parts = zip(packed.to(device, non_blocking=True).split(sizes), tensors.items())
    return {name: part[: one.nbytes].view(one.dtype).view(one.shape) for part, (name, one) in parts}


def make_rows(
    trajectory: int,
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    views: Views,
    logit_offset: int = 0,
    routes: Routes | None = None,
) -> list[Row]:
    """The rows of one trajectory: a single one under block attention, one per view under full attention.

    The single one has the clean tokens before its last view's block, then the views one after another. Where the
    prediction for position i is at i-1 (logit_offset -1), it is read there. Where the response's `routes` are given
    its views must be those of its trace: a view's tokens have the experts of the first step that it replays.
    """
    if len(views) == 0:  # a random noising may mask nothing that is predicted
        return []
    if views.whole:
        rows = []
        for number, inputs in enumerate(views.inputs):
            prompt = prompt_ids if views.prompt is None else views.prompt[number]
            ids = np.concatenate([np.asarray(prompt, dtype=np.int64), inputs])
            position, zeros = np.arange(len(ids)), np.zeros_like(ids)
            block = position if views.causal else zeros  # blocks of one token make causal attention
            predictions = _predictions(views, slice(number, number + 1), len(prompt_ids) + logit_offset)
            rows.append(Row(trajectory, ids, position, block, zeros, **predictions))
        return rows
    assert logit_offset == 0, "block attention with shifted logits is no family's"
    block_size = views.inputs.shape[1]
    # the clean copy of the last block would be seen by nobody
    clean = int(views.block.max()) * block_size
    tokens = np.array([*prompt_ids, *response_ids], dtype=np.int64)[:clean]
    position = np.concatenate([np.arange(clean), (views.block[:, None] * block_size + np.arange(block_size)).ravel()])
    view = np.repeat(np.arange(len(views) + 1), [clean, *[block_size] * len(views)])
    ids = np.concatenate([tokens, views.inputs.ravel()])
    experts = None
    if routes is not None:
        experts = np.concatenate([routes.committed[:clean], *routes.steps[views.step[:, 0]]])
    predictions = _predictions(views, slice(None), clean)
    prompt = min(len(prompt_ids) // block_size * block_size, clean)
    return [Row(trajectory, ids, position, position // block_size, view, **predictions, routes=experts, prompt=prompt)]


def _predictions(views: Views, chosen: slice, start: int) -> dict[str, np.ndarray]:
    """What a row of the chosen views predicts, by the names of Row; its token `start` is where their first is read."""
    flat = np.flatnonzero(views.predict[chosen])
    columns = {"target": views.targets, "response_index": views.response_index, "trace_step": views.step}
    columns |= {name: getattr(views, name) for name in ("weight", "writing") if getattr(views, name) is not None}
    return {"predict_at": start + flat} | {name: values[chosen].ravel()[flat] for name, values in columns.items()}


def pack(
    rows: Sequence[Row],
    token_budget: int,
    at_least: int = 1,
    together: bool = False,
    most_padding: float = 1.0,
    multiple: int = 1,
) -> list[PackedBatch]:
    """Cut rows into micro-batches of at most `token_budget` padded tokens, and where one exceeds it the row by `cut`.

    `together` puts rows one after another into long ones that the budget bounds, padded to a `multiple` of tokens: for
    attention whose cost follows what is visible. Otherwise rows of like length go side by side, and a further
    micro-batch begins where padding would exceed the share `most_padding` of one: a dense mask costs the square of a
    row's length. Responses to one prompt share it, by `share_prompts`. A smaller budget is taken where that makes about
    `at_least` micro-batches; rows are not cut for it.
    """
    token_budget = max(multiple, token_budget // multiple * multiple)
    parts = cut_rows(rows, token_budget)
    if at_least > 1:
        tokens = sum(map(length_of, share_prompts(rows, parts, math.inf)))
        token_budget = min(token_budget, -(-tokens // at_least))
    units = share_prompts(rows, parts, token_budget)
    lengths = [length_of(unit) for unit in units]
    offsets = np.cumsum([0] + [len(row.target) for row in rows])
    if together:
        lines = [[part for index in line for part in units[index]] for line in fill_lines(lengths, token_budget)]
        return [_batch(rows, [line], offsets, multiple) for line in lines]
    batches: list[list[int]] = []
    tokens = 0
    for index in sorted(range(len(units)), key=lambda index: lengths[index]):
        width = lengths[index]  # the longest so far, since they come sorted
        tokens += width
        padded = width * (len(batches[-1]) + 1) if batches else 0
        if batches and padded <= token_budget and padded - tokens <= most_padding * padded:
            batches[-1].append(index)
        else:
            batches.append([index])
            tokens = width
    return [_batch(rows, [units[index] for index in chosen], offsets) for chosen in batches]


def cut_rows(rows: Sequence[Row], token_budget: int) -> list[Part]:
    """All rows in parts that the budget holds, by `cut`; each is a trajectory of its own to the mask."""
    parts = []
    for number, row in enumerate(rows):
        counted = np.ones(len(row), dtype=np.int64)
        for tokens in cut(row, token_budget):
            parts.append(Part(number, tokens, len(parts), len(parts), counted[tokens]))
            counted[row.view == 0] = 0  # in the parts that follow it is repeated
    return parts


def cut(row: Row, token_budget: int) -> list[np.ndarray]:
    """Indices of the tokens of each part of a row, (tokens,) ascending: some of its views, and the clean tokens before.

    The first part has the views of the last blocks, and so all clean tokens. What it holds the others need not have, so
    that their clean tokens are fewer: no other parts would be fewer tokens. Where the budget does not hold the clean
    tokens and a view, a part has as many tokens of views as clean ones.
    """
    if len(row) <= token_budget or not row.view[-1]:
        return [np.arange(len(row))]
    clean, views = int((row.view == 0).sum()), int(row.view[-1])
    size = (len(row) - clean) // views
    block = row.block[clean::size]  # (views,)
    order = np.argsort(block, kind="stable")
    parts = []
    while len(order):
        before = int(block[order[-1]]) * size
        room = (token_budget - before) // size if before + size <= token_budget else max(1, before // size)
        chosen, order = np.sort(order[-room:]), order[:-room]
        of_views = clean + chosen[:, None] * size + np.arange(size)
        parts.append(np.concatenate([np.arange(before), of_views.ravel()]))
    return parts


def share_prompts(rows: Sequence[Row], parts: Sequence[Part], token_budget: float) -> list[list[Part]]:
    """All parts, those behind the same prompt together with one copy of it, as many as the budget holds.

    A prompt's experts, where rows have them, must be the same too. Parts that hold but a piece of it stay alone.
    """
    alone: list[list[Part]] = []
    sharing: dict[bytes, list[Part]] = {}
    for part in parts:
        row = rows[part.row]
        if row.prompt and len(part.tokens) >= row.prompt and part.tokens[row.prompt - 1] == row.prompt - 1:
            experts = b"" if row.routes is None else row.routes[: row.prompt].tobytes()
            sharing.setdefault(row.ids[: row.prompt].tobytes() + experts, []).append(part)
        else:
            alone.append([part])
    number, units = len(parts), []
    for members in sharing.values():
        prompt = rows[members[0].row].prompt
        lengths = [len(part.tokens) - prompt for part in members]
        for line in fill_lines(lengths, token_budget - prompt):
            own = [members[index] for index in line]
            if len(own) == 1:
                alone.append(own)
                continue
            counted = sum(part.counted[:prompt] for part in own)
            rest = [
                replace(part, tokens=part.tokens[prompt:], prompt=number, counted=part.counted[prompt:]) for part in own
            ]
            units.append([Part(own[0].row, np.arange(prompt), number, number, counted), *rest])
            number += 1
    return alone + units


def length_of(parts: Sequence[Part]) -> int:
    """The tokens of all parts."""
    return sum(len(part.tokens) for part in parts)


def fill_lines(lengths: Sequence[int], token_budget: float) -> list[list[int]]:
    """Indices of rows that share a line of at most `token_budget` tokens, the longest first into where it fits."""
    lines: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = next((line for line, room in enumerate(free) if lengths[index] <= room), None)
        if place is None:
            place = len(lines)
            lines.append([])
            free.append(token_budget)
        lines[place].append(index)
        free[place] -= lengths[index]
    return lines


def _batch(rows: Sequence[Row], lines: Sequence[Sequence[Part]], offsets: np.ndarray, multiple: int = 1) -> PackedBatch:
    """The micro-batch whose lines hold those parts, one after another, padded to a multiple of tokens.

    `offsets`: the index of each row's first predicted token in the update.
    """
    longest = max(map(length_of, lines))
    width = -(-longest // multiple) * multiple
    predict_at, target, predicted = [], [], []
    for number, line in enumerate(lines):
        start = number * width
        for part in line:
            row = rows[part.row]
            own = np.flatnonzero(np.isin(row.predict_at, part.tokens))
            predict_at.append(start + np.searchsorted(part.tokens, row.predict_at[own]))
            target.append(row.target[own])
            predicted.append(offsets[part.row] + own)
            start += len(part.tokens)

    def padded(values: Callable[[Part], np.ndarray], fill: int = 0) -> Tensor:
        joined = [torch.from_numpy(np.concatenate([values(part) for part in line])) for line in lines]
        whole = pad_sequence(joined, batch_first=True, padding_value=fill)  # (lines, tokens, …)
        return pad(whole, (0, 0) * (whole.dim() - 2) + (0, width - longest), value=fill)

    def column(name: str) -> Tensor:
        return padded(lambda part: getattr(rows[part.row], name)[part.tokens])

    return PackedBatch(
        ids=column("ids"),
        position=column("position"),
        trajectory=padded(lambda part: np.full(len(part.tokens), part.trajectory), fill=-1),
        prompt=padded(lambda part: np.full(len(part.tokens), part.prompt), fill=-1),
        block=column("block"),
        view=column("view"),
        predict_at=torch.from_numpy(np.concatenate(predict_at)),
        target=torch.from_numpy(np.concatenate(target)),
        predicted=np.concatenate(predicted),
        counted=padded(lambda part: part.counted),
        routes=None if rows[lines[0][0].row].routes is None else column("routes"),
    )
