"""The plain way to train, which the packed forward is measured against: one row for each denoising round.

Under block attention round r of a trajectory is a row [prompt, response, noised response], in whose noised copy every
block is shown as in its r-th view; a trajectory has as many rows as the most views of one of its blocks. Under full
attention a row is [prompt, noised response]. Rows are padded to the longest, masks are dense, and logits are taken
everywhere. This is the reference: it is written to be read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.trajectory import Trajectory
from train.views import Views


@dataclass(frozen=True)
class PlainRow:
    """One round of one trajectory."""

    ids: np.ndarray  # (tokens,)
    position: np.ndarray  # (tokens,)
    sees: np.ndarray  # (tokens, tokens) bool, query by key
    read_at: np.ndarray  # (predicted,) where in the row the prediction is read
    target: np.ndarray  # (predicted,)
    place: np.ndarray  # (predicted,) which of all predicted tokens it is: by trajectory, view, position

    def __len__(self) -> int:
        return len(self.ids)


def plain_rows(
    trajectories: Sequence[Trajectory],
    views: Sequence[Views],
    block_size: int | None,
    logit_offset: int = 0,
) -> list[PlainRow]:
    """All rounds of all trajectories, given the views of each."""
    rows, first = [], 0
    for trajectory, own in zip(trajectories, views):
        place = np.full(own.predict.shape, -1)
        place[own.predict] = first + np.arange(own.predict.sum())
        first += int(own.predict.sum())
        if block_size is None:
            rows += [_whole_row(trajectory, own, view, place[view], logit_offset) for view in range(len(own))]
        else:
            rounds = max(int((own.block == block).sum()) for block in own.block)
            rows += [_round(trajectory, own, number, place, block_size) for number in range(rounds)]
    return rows


def _whole_row(trajectory: Trajectory, views: Views, view: int, place: np.ndarray, logit_offset: int) -> PlainRow:
    ids = np.array([*trajectory.prompt_ids, *views.inputs[view]])
    predicted = np.flatnonzero(views.predict[view])
    return PlainRow(
        ids=ids,
        position=np.arange(len(ids)),
        sees=np.ones((len(ids), len(ids)), dtype=bool),
        read_at=len(trajectory.prompt_ids) + predicted + logit_offset,
        target=views.targets[view, predicted],
        place=place[predicted],
    )


def _round(trajectory: Trajectory, views: Views, number: int, place: np.ndarray, block_size: int) -> PlainRow:
    clean = np.array([*trajectory.prompt_ids, *trajectory.response_ids])
    start = len(trajectory.prompt_ids) // block_size * block_size  # of the first block with a token of the response
    noised, read_at, target, places = clean[start:].copy(), [], [], []
    for block in np.unique(views.block):
        own = np.flatnonzero(views.block == block)
        if number >= len(own):
            continue  # this block was done sooner: it stays clean, and nothing is predicted in it
        view, offset = own[number], int(block) * block_size - start
        noised[offset : offset + block_size] = views.inputs[view]
        for token in np.flatnonzero(views.predict[view]):
            read_at.append(len(clean) + offset + int(token))
            target.append(int(views.targets[view, token]))
            places.append(int(place[view, token]))
    position = np.concatenate([np.arange(len(clean)), np.arange(start, len(clean))])
    block, is_noised = position // block_size, np.arange(len(position)) >= len(clean)
    query, key = (slice(None), None), (None, slice(None))
    earlier = ~is_noised[key] & (block[key] < block[query])
    own_block = (is_noised[key] == is_noised[query]) & (block[key] == block[query])
    ids = np.concatenate([clean, noised])
    return PlainRow(ids, position, earlier | own_block, np.array(read_at), np.array(target), np.array(places))


def plain_batches(rows: Sequence[PlainRow], token_budget: int) -> Iterator[list[PlainRow]]:
    """As many rows as fit into the budget when each is padded to the longest of all."""
    width = max(len(row) for row in rows)
    count = max(1, token_budget // width)
    for start in range(0, len(rows), count):
        yield list(rows[start : start + count])


def plain_states(model: torch.nn.Module, rows: Sequence[PlainRow], width: int) -> Tensor:
    """Last hidden states of rows padded to `width`, (rows, width, hidden)."""
    device = next(model.parameters()).device
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    position = torch.zeros(len(rows), width, dtype=torch.long)
    sees = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1)  # padding sees itself
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.from_numpy(row.ids)
        position[number, : len(row)] = torch.from_numpy(row.position)
        sees[number, : len(row), : len(row)] = torch.from_numpy(row.sees)
    return model.model(
        input_ids=ids.to(device),
        position_ids=position.to(device),
        attention_mask=sees[:, None].to(device),
        use_cache=False,
    ).last_hidden_state


def plain_logp(
    model: torch.nn.Module, rows: Sequence[PlainRow], width: int, mask_id: int, temperature: float = 1.0
) -> Tensor:
    """logp of the predicted tokens of rows padded to `width`, row by row, (predicted,)."""
    logits = model.lm_head(plain_states(model, rows, width)).float() / temperature  # (rows, width, vocab)
    logits[..., mask_id] = -torch.inf
    logp = torch.log_softmax(logits, dim=-1)
    return torch.cat([logp[n, row.read_at, row.target] for n, row in enumerate(rows)])


def plain_values(value: torch.nn.Module, rows: Sequence[PlainRow], width: int) -> Tensor:
    """The value model's values of the same tokens, (predicted,)."""
    values = value.head(plain_states(value.network, rows, width))  # (rows, width)
    return torch.cat([values[n, row.read_at] for n, row in enumerate(rows)])
