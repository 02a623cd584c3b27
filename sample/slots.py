"""The state of the sequences being sampled: one row of tensors per sequence, and what the host keeps beside it."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from common.trajectory import Request


@dataclass
class Slots:
    """One row per sequence being sampled. Positions are absolute, the prompt's first token at 0."""

    tokens: Tensor  # (slots, capacity) prompt, response, masks
    masked: Tensor  # (slots, capacity) True where no token has been unmasked yet
    step_map: Tensor  # (slots, capacity) denoising step at which a position was unmasked
    figures: Tensor  # (slots, capacity, 3) log-probability, confidence, kept mass of the token at that step
    key: Tensor  # (slots,) from which the random numbers derive
    prompt_end: Tensor  # (slots,)
    response_end: Tensor  # (slots,) the length limit
    canvas_end: Tensor  # (slots,) end of the block that holds the limit
    block_start: Tensor  # (slots,)
    cached: Tensor  # (slots,) the cache holds the clean keys of all positions before this one
    block_step: Tensor  # (slots,) denoising steps in the current block
    step: Tensor  # (slots,) denoising steps in the response
    forwards: Tensor  # (slots,) denoising and commit forwards
    finished: Tensor  # (slots,) also True of a row that nobody uses
    stuck: Tensor  # (slots,) the strategy unmasked nothing at some step

    @classmethod
    def empty(cls, slots: int, capacity: int, device: torch.device | str) -> Slots:
        """Unused rows."""
        shapes = {"tokens": (capacity,), "masked": (capacity,), "step_map": (capacity,), "figures": (capacity, 3)}
        dtypes = {"figures": torch.float32, "masked": torch.bool, "finished": torch.bool, "stuck": torch.bool}
        stores = {
            field.name: torch.zeros(
                (slots, *shapes.get(field.name, ())), dtype=dtypes.get(field.name, torch.long), device=device
            )
            for field in fields(cls)
        }
        stores["finished"].fill_(True)
        return cls(**stores)

    def __post_init__(self) -> None:
        self.views: dict[int, Slots] = {}

    def first(self, rows: int) -> Slots:
        """Views of the first rows; writing to them writes here."""
        if rows not in self.views:
            self.views[rows] = Slots(**{field.name: getattr(self, field.name)[:rows] for field in fields(self)})
        return self.views[rows]

    def select(self, rows: Tensor | list[int]) -> Slots:
        """Copies of the given rows, on the host."""
        return Slots(**{field.name: getattr(self, field.name)[rows].cpu() for field in fields(self)})

    def put(self, row: int, state: Slots) -> None:
        """Write a state of one row, of at most this capacity, to a row."""
        for field in fields(self):
            store, value = getattr(self, field.name)[row], getattr(state, field.name)[0]
            (store[: len(value)] if value.dim() else store).copy_(value)

    def move(self, source: int, target: int) -> None:
        """Copy one row over another."""
        for field in fields(self):
            store = getattr(self, field.name)
            store[target] = store[source]

    def status(self) -> Tensor:
        """What the host reads: finished, stuck and block_start, (3, slots)."""
        return torch.stack((self.finished.long(), self.stuck.long(), self.block_start))


@dataclass(eq=False)
class Ticket:
    """A request on its way: waiting in the queue or, at the same index as its row, among the active ones."""

    number: int  # place in the order of arrival: the youngest gives way when the cache runs out
    request: Request
    block_start: int  # where its first block begins
    response_end: int  # the length limit
    canvas_end: int  # end of the block that holds the limit
    reach: int  # the next forward writes nothing at or behind this position
    state: Slots | None = None  # one row on the host: of a sequence that had to give way

    def prefix(self) -> tuple[int, ...]:
        """The tokens whose keys the cache must hold before the next step."""
        if self.state is not None:
            return tuple(self.state.tokens[0, : int(self.state.block_start)].tolist())
        return tuple(self.request.prompt_ids[: self.block_start])


class Watch:
    """The host's look at the device's flags: at once on the CPU, every few steps and without waiting on CUDA."""

    every = 4  # steps between two looks, and the age of what is seen: a finished sequence idles at most twice as long

    def __init__(self, device: torch.device):
        self.asynchronous = device.type == "cuda"
        self.forget()

    def forget(self) -> None:
        """Rows were moved: a look under way means nothing any more."""
        self.age, self.copy, self.event = 0, None, None

    def look(self, slots: Slots) -> tuple[list[list[int]], int] | None:
        """The flags (finished, stuck, block_start; a list over rows each) and their age in steps; None: not yet.

        When there is something to see does not depend on the device's speed: processes that sample together agree.
        """
        if not self.asynchronous:
            return slots.status().tolist(), 0
        if self.copy is not None:
            self.age += 1
            if self.age < self.every:
                return None
            self.event.synchronize()  # also keeps the host at most this far ahead of the device
            seen = self.copy.tolist()
        else:
            seen = None
        self.copy, self.age = slots.status().to("cpu", non_blocking=True), 0
        self.event = torch.cuda.Event()
        self.event.record()
        return None if seen is None else (seen, self.every)
