"""The sequences being sampled: a row of tensors each, what the host keeps beside it, and the record that is left."""

from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.schema import Sampling
from common.trajectory import Request, Trajectory, Writing
from sample.draw import rollout_temperature
from sample.routes import RouteLog

# writings that a response may overwrite, for each token of its canvas: one that would overwrite more ends before it
OVERWRITTEN_PER_TOKEN = 4
NO_LIMIT = 1 << 62


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
    limit: Tensor  # (slots,) denoising steps of the response at which the row pauses, where rows do
    finished: Tensor  # (slots,) also True of a row that pauses, or that nobody uses
    paused: Tensor  # (slots,)
    stuck: Tensor  # (slots,) the strategy did not end a block within its bound, or wrote into the prompt
    # of strategies that overwrite tokens
    final: Tensor  # (slots,) the current block will not change any more; its commit is due
    clean_steps: Tensor  # (slots,) denoising steps in the current block that began without masks
    full: Tensor  # (slots,) there is no room for what is overwritten; the response ends before it
    overwritten_count: Tensor  # (slots,)
    # (slots, room, 4) int32, in the order in which they were overwritten: step, position, token, bits of the logp
    overwritten: Tensor

    @classmethod
    def empty(cls, slots: int, capacity: int, device: torch.device | str, room: int = 0) -> Self:
        """Unused rows, with room for so many overwritten writings each."""
        shapes = {"tokens": (capacity,), "masked": (capacity,), "step_map": (capacity,), "figures": (capacity, 3)}
        shapes["overwritten"] = (room, 4)
        dtypes = {"figures": torch.float32, "overwritten": torch.int32}
        dtypes |= dict.fromkeys(("masked", "finished", "paused", "stuck", "final", "full"), torch.bool)
        stores = {
            field.name: torch.zeros(
                (slots, *shapes.get(field.name, ())), dtype=dtypes.get(field.name, torch.long), device=device
            )
            for field in fields(cls)
        }
        stores["finished"].fill_(True)
        return cls(**stores)

    def __post_init__(self) -> None:
        self.views: dict[int, Self] = {}

    def sizes(self) -> tuple[int, int, int]:
        """Rows, positions of each, and how many overwritten writings of each there is room for."""
        return len(self.tokens), self.tokens.shape[1], self.overwritten.shape[1]

    def stores(self) -> dict[str, Tensor]:
        """The fields by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def first(self, rows: int) -> Self:
        """Views of the first rows; writing to them writes here."""
        if rows not in self.views:
            self.views[rows] = Slots(**{name: store[:rows] for name, store in self.stores().items()})
        return self.views[rows]

    def packed(self) -> Tensor:
        """All fields side by side, int64 (slots, numbers): between host and device every copy waits, so one is made."""
        whole = (store.view(torch.int32) if store.is_floating_point() else store for store in self.stores().values())
        return torch.cat([store.reshape(len(store), -1).long() for store in whole], 1)

    @classmethod
    def unpacked(cls, numbers: Tensor, capacity: int, room: int) -> Self:
        """The rows that `packed` was made of."""
        like = cls.empty(1, capacity, "cpu", room)
        stores = like.stores()
        parts = numbers.split([store.numel() for store in stores.values()], 1)
        return cls(
            **{
                name: (part.int().view(store.dtype) if store.is_floating_point() else part.to(store.dtype)).reshape(
                    len(numbers), *store.shape[1:]
                )
                for (name, store), part in zip(stores.items(), parts)
            }
        )

    def index(self, rows: list[int]) -> Tensor:
        """Numbers of rows, where the slots are."""
        return torch.tensor(rows).to(self.tokens.device)

    def select(self, rows: Tensor) -> Self:
        """Copies of the rows of that `index`, on the host."""
        taken = Slots(**{name: store[rows] for name, store in self.stores().items()})
        return taken if rows.device.type == "cpu" else Slots.unpacked(taken.packed().cpu(), *self.sizes()[1:])

    def states(self, rows: Tensor, block_size: int) -> list[Self]:
        """What the sequences in the rows of that `index` go on from elsewhere, where no keys of theirs are kept.

        A row each, on the host, of the positions up to the end of its block: behind it are masks alone.
        """
        taken, states = self.select(rows), []
        for row, (start, count) in enumerate(zip(taken.block_start.tolist(), taken.overwritten_count.tolist())):
            drawn = dict.fromkeys(("tokens", "masked", "step_map", "figures"), start + block_size)
            one = {name: store[row : row + 1] for name, store in taken.stores().items()}
            one |= {name: one[name][:, :end] for name, end in (drawn | {"overwritten": count}).items()}
            state = Slots(**{name: store.clone() for name, store in one.items()})
            state.cached.copy_(state.block_start)
            states.append(state)
        return states

    def begin(self, rows: list[int], sequences: "list[Sequence]", mask_id: int) -> None:
        """Write sequences into rows: prompts and masks, or what those that gave way had drawn."""
        new = Slots.empty(len(sequences), self.tokens.shape[1], "cpu", self.overwritten.shape[1])
        new.tokens.fill_(mask_id)
        for row, sequence in enumerate(sequences):
            new.tokens[row, : len(sequence.request.prompt_ids)] = torch.tensor(sequence.request.prompt_ids)
        new.prompt_end = torch.tensor([len(sequence.request.prompt_ids) for sequence in sequences])
        new.masked = torch.arange(new.tokens.shape[1]) >= new.prompt_end[:, None]
        new.key = torch.tensor([sequence.request.stream_key() for sequence in sequences])
        new.response_end = torch.tensor([sequence.response_end for sequence in sequences])
        new.canvas_end = torch.tensor([sequence.canvas_end for sequence in sequences])
        new.block_start = torch.tensor([sequence.block_start for sequence in sequences])
        new.cached = new.block_start.clone()
        new.step_map.fill_(-1)
        new.finished.fill_(False)
        for row, sequence in enumerate(sequences):
            for field in fields(self) if sequence.state is not None else ():
                store, kept = getattr(new, field.name)[row], getattr(sequence.state, field.name)[0]
                (store[: len(kept)] if store.dim() else store).copy_(kept)
        new.finished &= ~new.paused
        new.paused.fill_(False)
        new.limit = torch.tensor([sequence.limit for sequence in sequences])
        self.put(rows, new)

    def put(self, rows: list[int], state: Self) -> None:
        """Write rows of this capacity, which are on the host, to `rows`."""
        index, new = torch.tensor(rows), state
        if self.tokens.device.type != "cpu":
            numbers = torch.cat((index[:, None], state.packed()), 1).to(self.tokens.device)
            index, new = numbers[:, 0], Slots.unpacked(numbers[:, 1:], *self.sizes()[1:])
        for field in fields(self):
            getattr(self, field.name).index_copy_(0, index, getattr(new, field.name))

    def free(self, rows: Tensor, start: int, end: int) -> None:
        """Take rows out of use. Steps may go on to compute them, so they are put where every room has positions."""
        for store in (self.prompt_end, self.block_start, self.cached):
            store.index_fill_(0, rows, start)
        for store in (self.response_end, self.canvas_end):
            store.index_fill_(0, rows, end)
        self.finished.index_fill_(0, rows, True)
        for store in (self.paused, self.stuck):
            store.index_fill_(0, rows, False)

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Copy rows over others, which are none of them; both (moved,)."""
        for field in fields(self):
            store = getattr(self, field.name)
            store.index_copy_(0, targets, store[sources])

    def pause(self, between_blocks: bool) -> None:
        """Rows at their limit are not denoised any further, until `go_on`; `between_blocks`: when a block is done."""
        due = ~self.finished & (self.step >= self.limit)
        if between_blocks:
            due &= self.block_step == 0
        self.paused |= due
        self.finished |= due

    def go_on(self, steps: int) -> None:
        """Raise every row's limit by so many denoising steps; rows that paused under it go on."""
        self.limit += steps
        going = self.paused & (self.step < self.limit)
        self.paused &= ~going
        self.finished &= ~going

    def begins(self) -> Tensor:
        """Which rows have not denoised their current block yet, bool (slots,)."""
        return (self.block_step == 0) & ~self.finished

    def status(self) -> Tensor:
        """What the host reads: finished, paused, stuck, block_start, and whether a block begins, (5, slots)."""
        flags = (self.finished.long(), self.paused.long(), self.stuck.long())
        return torch.stack((*flags, self.block_start, self.begins().long()))


@dataclass(eq=False)
class Sequence:
    """A request on its way through the engine, from `add` until it is finished.

    It waits or has a row among the slots, whose number is its index among the engine's `seated`.
    """

    id: int  # in order of arrival: the youngest gives way when the cache runs out
    request: Request
    block_start: int  # where its first block begins
    response_end: int  # the length limit
    canvas_end: int  # end of the block that holds the limit
    reach: int  # the next forward writes nothing at or behind this position
    reported: int = 0  # response tokens that `Engine.progress` has returned
    state: Slots | None = None  # one row on the host: of a sequence that had to give way
    limit: int = NO_LIMIT  # denoising steps at which it pauses
    paused: bool = False  # as far as the host has seen
    routes: RouteLog | None = None  # of a mixture, where requests ask for them

    def prefix(self) -> tuple[int, ...]:
        """The tokens whose keys the cache must hold before the next step."""
        if self.state is not None:
            return tuple(self.state.tokens[0, : int(self.state.block_start)].tolist())
        return tuple(self.request.prompt_ids[: self.block_start])


class Watch:
    """The host's look at the device's flags: at once on the CPU, every few steps and without waiting on CUDA."""

    def __init__(self, device: torch.device):
        self.asynchronous = device.type == "cuda"
        # steps between two looks, and the age of what is seen: a finished sequence idles at most twice as long
        self.every = 4
        self.forget()

    def forget(self) -> None:
        """Rows were moved: a look under way means nothing any more."""
        self.age, self.copy, self.event = 0, None, None

    def look(self, slots: Slots) -> tuple[list[list[int]], int] | None:
        """The flags (those of `Slots.status`, a list over rows each) and their age in steps; None: not yet.

        When there is something to see does not depend on the device's speed: processes that sample together agree.
        """
        if not self.asynchronous:
            return slots.status().tolist(), 0
        seen = None
        if self.copy is not None:
            self.age += 1
            if self.age < self.every:
                return None
            self.event.synchronize()  # also keeps the host at most this far ahead of the device
            seen = self.copy.tolist(), self.every
        self.copy, self.age, self.event = slots.status().to("cpu", non_blocking=True), 0, torch.cuda.Event()
        self.event.record()
        return seen


# ---- what the engine gives back


@dataclass(frozen=True)
class Unfinished:
    """A response that is not done: an engine with other weights and another cache goes on with it."""

    request: Request
    state: dict[str, Tensor]  # a row of Slots, (1, …) each, on the host
    routes: np.ndarray | None = None  # (denoising steps, block, layers, chosen) the experts of its block, step by step

    @property
    def steps(self) -> int:
        """Denoising steps made."""
        return int(self.state["step"])


@dataclass(frozen=True)
class Progress:
    """What a response gained since it was last asked for, and the block that is being denoised."""

    id: int
    tokens: list[int]  # that will not change any more
    logp: list[float]  # of each of them
    block: list[tuple[int, bool]]  # the response's part of the present block: token, and whether it is masked


@dataclass(frozen=True)
class Refusal:
    """Why a request was turned away: with its response, in whole blocks, it needs more positions than there is room."""

    needed: int
    room: int


@dataclass(frozen=True)
class Finished:
    """What became of a request."""

    id: int
    trajectory: Trajectory | None  # empty where it was refused, None where it failed
    refusal: Refusal | None = None
    error: Exception | None = None


def trajectory_of(
    slots: Slots, row: int, request: Request, settings: Sampling, stop_ids: tuple[int, ...], full_attention: bool
) -> Trajectory:
    """The record of a finished sequence.

    One that ended for want of room ("edits") has its last block as it then was, of which nothing counts in the length.
    """
    start = len(request.prompt_ids)
    block_end = int(slots.block_start[row]) + settings.block_size
    end = int(slots.canvas_end[row]) if full_attention else block_end
    tokens = slots.tokens[row, start:end].tolist()
    length = next((n for n, token in enumerate(tokens[: settings.max_token], 1) if token in stop_ids), 0)
    finish_reason = "stop" if length else "length"
    if bool(slots.full[row]):
        length, finish_reason = max(1, int(slots.block_start[row]) - start), "edits"
    logp, confidence, _ = slots.figures[row, start:end].T.tolist()
    return Trajectory(
        task_id=request.task_id,
        sample=request.sample,
        prompt_ids=list(request.prompt_ids),
        response_ids=tokens,
        step_map=slots.step_map[row, start:end].tolist(),
        logp=logp,
        confidence=confidence,
        kept_mass=float(slots.figures[row, start:block_end, 2].mean()),
        finish_reason=finish_reason,
        length=length or min(settings.max_token, len(tokens)),
        steps=int(slots.step[row]),
        forwards=int(slots.forwards[row]),
        temperature=rollout_temperature(settings),
        overwritten=overwritten_of(slots, row, start),
    )


def overwritten_of(slots: Slots, row: int, start: int) -> list[Writing]:
    """What was overwritten in a row whose response begins at position `start`, in order of (step, position)."""
    written = slots.overwritten[row, : int(slots.overwritten_count[row])]
    places, logp = written[:, :3].tolist(), written[:, 3].contiguous().view(torch.float32).tolist()
    return sorted(Writing(step, position - start, token, one) for (step, position, token), one in zip(places, logp))


def refusal_of(request: Request, settings: Sampling) -> Trajectory:
    """The empty record of a request that cache or network could never hold."""
    return Trajectory(
        task_id=request.task_id,
        sample=request.sample,
        prompt_ids=list(request.prompt_ids),
        response_ids=[],
        step_map=[],
        logp=[],
        confidence=[],
        kept_mass=1.0,
        finish_reason="refused",
        length=0,
        steps=0,
        forwards=0,
        temperature=rollout_temperature(settings),
    )


def check_drawn(trajectory: Trajectory) -> None:
    """UserError where the request was refused, for whoever waits for its response; the engine has said why."""
    if trajectory.finish_reason == "refused":
        raise UserError(
            f"a prompt of {len(trajectory.prompt_ids)} tokens leaves no room for a response in the model's positions, "
            "or in the cache (cache_tokens); shorten it"
        )
