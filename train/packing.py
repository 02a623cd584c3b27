"""The packed forward: all views of a trajectory share one clean copy of its tokens and one forward.

A row is [prompt, response, every view of every block], position ids absolute. A clean token sees clean tokens of its
own and earlier blocks; a token of a view sees the clean tokens of earlier blocks and its own view. Who sees whom
follows from four integers per token, trajectory (-1: padding), prompt, block and view (0: clean), by
`train.attention.sees`: the prompt is the number that clean tokens have which this trajectory shares with others.

A row that exceeds the budget of a micro-batch is cut into pieces, as train/pieces.py says. Losses are sums over
predicted tokens, whose weights are those of the whole row, so their gradients add up to its own. Of the other rows
responses to one prompt stand behind one copy of its whole blocks, as many as the budget holds: these see nothing of a
response, so that they are the same in every row. The block in which a response begins is its own, with the prompt's
remainder.

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
from train.pieces import Kept, Piece
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
    """Tokens of a row that are forwarded together: all of them, or a piece of a row that is cut.

    Of rows that share their prompt, the prompt is a part, and the rest of each.
    """

    row: int  # index into the update's rows
    tokens: np.ndarray  # (tokens,) index into the row's, ascending
    trajectory: int  # a number of its own among the update's parts
    prompt: int  # the number of the part whose tokens are its prompt, or its own
    rows: int = 1  # for how many its tokens stand


@dataclass(frozen=True)
class PackedBatch:
    """Rows of one micro-batch, padded to one length; `predicted` says which of the update's tokens they hold.

    It may be a piece of a row that is cut; then it is that alone.
    """

    ids: Tensor  # (rows, tokens)
    position: Tensor  # (rows, tokens)
    trajectory: Tensor  # (rows, tokens) which part of the update's rows it belongs to, -1 for padding
    prompt: Tensor  # (rows, tokens) which part is its prompt, where it shares one; else as trajectory
    block: Tensor  # (rows, tokens)
    view: Tensor  # (rows, tokens)
    predict_at: Tensor  # (predicted,) index into the flattened rows
    target: Tensor  # (predicted,)
    predicted: np.ndarray  # (predicted,) index into the update's predicted tokens, in the order of its rows
    counted: Tensor  # (rows, tokens) in how many of the update's rows it stands; of padding 0
    routes: Tensor | None = None  # (rows, tokens, layers, chosen) the sampler's experts, of padding 0
    piece: Piece | None = None
    kept: Kept | None = None  # what a piece sees of those before it, in a forward
    clean_copy: tuple["PackedBatch", ...] = ()  # of the last piece: the clean tokens of those before it, in their order

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
    """Rows in micro-batches of at most `token_budget` padded tokens, at last the pieces of those that exceed it.

    `together` puts rows one after another into long ones that the budget bounds, padded to a `multiple` of tokens: for
    attention whose cost follows what is visible. Otherwise rows of like length go side by side, and a further
    micro-batch begins where padding would exceed the share `most_padding` of one: a dense mask costs the square of a
    row's length. Responses to one prompt share it, by `share_prompts`. A smaller budget is taken where that makes about
    `at_least` micro-batches; rows are not cut for it. Pieces of a row follow one another, in their order.
    """
    token_budget = max(multiple, token_budget // multiple * multiple)
    cut_to = token_budget
    parts = cut_rows(rows, token_budget)
    whole = [part for part in parts if len(part.tokens) == len(rows[part.row])]
    pieces = [part for part in parts if len(part.tokens) < len(rows[part.row])]
    if at_least > 1:
        tokens = sum(map(length_of, share_prompts(rows, whole, math.inf))) + length_of(pieces)
        token_budget = min(token_budget, -(-tokens // at_least))
    units = share_prompts(rows, whole, token_budget)
    lengths = [length_of(unit) for unit in units]
    offsets = np.cumsum([0] + [len(row.target) for row in rows])
    lines: list[list[list[Part]]] = []  # of each micro-batch
    if together:
        lines = [[[part for index in line for part in units[index]]] for line in fill_lines(lengths, token_budget)]
    else:
        tokens = 0
        for index in sorted(range(len(units)), key=lambda index: lengths[index]):
            width = lengths[index]  # the longest so far, since they come sorted
            tokens += width
            padded = width * (len(lines[-1]) + 1) if lines else 0
            if lines and padded <= token_budget and padded - tokens <= most_padding * padded:
                lines[-1].append(units[index])
            else:
                lines.append([units[index]])
                tokens = width
    batches = [_batch(rows, own, offsets, multiple) for own in lines]
    for number in sorted({part.row for part in pieces}):
        own = [part for part in pieces if part.row == number]
        batches += _pieces(rows, own, cut_to, offsets, multiple)
    return batches


def cut_rows(rows: Sequence[Row], token_budget: int) -> list[Part]:
    """All rows, those that exceed the budget in pieces, by `cut`; each part is a trajectory of its own to the mask."""
    found = [(number, tokens) for number, row in enumerate(rows) for tokens in cut(row, token_budget)]
    return [Part(row, tokens, number, number) for number, (row, tokens) in enumerate(found)]


def cut(row: Row, token_budget: int) -> list[np.ndarray]:
    """Indices of the tokens of each piece of a row, (tokens,) ascending: of some blocks the clean tokens and the views.

    Blocks ascend, and the views of each come before its clean tokens: none of a piece sees what follows it. There are
    as few pieces as the budget allows, of one size but for a block; where it does not hold a block, a piece is one.
    """
    if len(row) <= token_budget or not row.view[-1]:
        return [np.arange(len(row))]
    size = block_size_of(row)
    first = np.arange(0, len(row), size)  # tokens of what is not cut: views and clean blocks
    order = first[np.argsort(2 * row.block[first] + (row.view[first] == 0), kind="stable")]
    pieces = np.array_split(order, -(-len(order) // max(1, token_budget // size)))
    return [np.sort((own[:, None] + np.arange(size)).ravel()) for own in pieces]


def block_size_of(row: Row) -> int:
    """Tokens of a block, of a row with views."""
    return (len(row) - int((row.view == 0).sum())) // int(row.view[-1])


def share_prompts(rows: Sequence[Row], parts: Sequence[Part], token_budget: float) -> list[list[Part]]:
    """Whole rows, those behind the same prompt together with one copy of it, as many as the budget holds.

    A prompt's experts, where rows have them, must be the same too.
    """
    alone: list[list[Part]] = []
    sharing: dict[bytes, list[Part]] = {}
    for part in parts:
        row = rows[part.row]
        if row.prompt:
            experts = b"" if row.routes is None else row.routes[: row.prompt].tobytes()
            sharing.setdefault(row.ids[: row.prompt].tobytes() + experts, []).append(part)
        else:
            alone.append([part])
    number, units = sum(map(len, rows)), []  # no part has that number: there are no more than tokens
    for members in sharing.values():
        prompt = rows[members[0].row].prompt
        lengths = [len(part.tokens) - prompt for part in members]
        for line in fill_lines(lengths, token_budget - prompt):
            own = [members[index] for index in line]
            if len(own) == 1:
                alone.append(own)
                continue
            rest = [replace(part, tokens=part.tokens[prompt:], prompt=number) for part in own]
            units.append([Part(own[0].row, np.arange(prompt), number, number, len(own)), *rest])
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
        counted=padded(lambda part: np.full(len(part.tokens), part.rows)),
        routes=None if rows[lines[0][0].row].routes is None else column("routes"),
    )


def _pieces(
    rows: Sequence[Row], parts: Sequence[Part], token_budget: int, offsets: np.ndarray, multiple: int
) -> list[PackedBatch]:
    """The pieces of a row, each a micro-batch, and with the last the clean tokens that those before it keep."""

    def batch(part: Part, number: int, before: int, clean: int) -> PackedBatch:
        width = -(-before // multiple) * multiple
        return replace(_batch(rows, [[part]], offsets, multiple), piece=Piece(number, before, clean, width))

    row = rows[parts[0].row]
    size = block_size_of(row)
    at_once = max(size, token_budget // size * size)
    clean = [int((row.view[part.tokens] == 0).sum()) for part in parts]
    before = np.cumsum([0, *clean]).tolist()
    seen = before[-2]  # nothing comes after the last piece's
    pieces = [batch(part, number, before[number], clean[number]) for number, part in enumerate(parts[:-1])]
    copies = [np.arange(seen)[start : start + at_once] for start in range(0, seen, at_once)]
    copy = [batch(replace(parts[0], tokens=tokens), 0, int(tokens[0]), len(tokens)) for tokens in copies]
    last = batch(parts[-1], len(parts) - 1, seen, 0)
    return [*pieces, replace(last, clean_copy=tuple(copy))]
