"""The sampler: a queue of requests over slots whose whole state is tensors; one `step` is one forward for all."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from common.errors import UserError
from common.schema import Sampling
from common.trajectory import Request, Trajectory
from models.original import FullAttention
from sample.block_attention import SlotCache, denoise, prefill
from sample.draw import draw, rollout_temperature, uniforms
from sample.strategies import find_strategy, static_schedule


@dataclass
class Slots:
    """One row per sequence being sampled. Positions are absolute, the prompt's first token at 0."""

    tokens: Tensor  # (slots, capacity) prompt, response, masks
    masked: Tensor  # (slots, capacity) True where no token has been unmasked yet
    step_map: Tensor  # (slots, capacity) denoising step at which a position was unmasked
    logp: Tensor  # (slots, capacity) of the token at that step
    confidence: Tensor  # (slots, capacity)
    kept_mass: Tensor  # (slots, capacity) what top-k and top-p left at that step
    key: Tensor  # (slots,) from which the random numbers derive
    prompt_end: Tensor  # (slots,)
    response_end: Tensor  # (slots,) the length limit
    block_start: Tensor  # (slots,)
    block_step: Tensor  # (slots,) denoising steps in the current block
    step: Tensor  # (slots,) denoising steps in the response
    forwards: Tensor  # (slots,) denoising and commit forwards
    finished: Tensor  # (slots,)

    @classmethod
    def empty(cls, slots: int, capacity: int, device: torch.device) -> Slots:
        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        wide = {name: zeros(slots, capacity) for name in ("tokens", "step_map")}
        wide |= {name: zeros(slots, capacity, dtype=torch.float32) for name in ("logp", "confidence", "kept_mass")}
        flags = {"masked": zeros(slots, capacity, dtype=torch.bool), "finished": zeros(slots, dtype=torch.bool)}
        counts = ("key", "prompt_end", "response_end", "block_start", "block_step", "step", "forwards")
        return cls(**wide, **flags, **{name: zeros(slots) for name in counts})

    def first(self, rows: int) -> Slots:
        """Views of the first rows; writing to them writes here."""
        return Slots(**{field.name: getattr(self, field.name)[:rows] for field in fields(self)})

    def select(self, rows: Tensor) -> Slots:
        """Copies of the given rows."""
        return Slots(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def to(self, device: str) -> Slots:
        return Slots(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def move(self, source: int, target: int) -> None:
        """Copy one row over another."""
        for field in fields(self):
            store = getattr(self, field.name)
            store[target] = store[source]


class Engine:
    """Draws responses from a block-diffusion model.

    Sequences at different blocks and denoising steps share one forward. A sequence whose block is clean spends one
    forward on writing the clean keys (its commit) while its neighbours denoise.
    """

    def __init__(self, model: torch.nn.Module, mask_id: int, stop_ids: Iterable[int]):
        if isinstance(model, FullAttention):
            raise UserError(
                f"model.model_base: {type(model).__name__} has full attention, which cannot be sampled yet; "
                "take a model of family sdar or trado"
            )
        self.model = model
        self.mask_id = mask_id
        self.device = next(model.parameters()).device
        self.stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.long, device=self.device)
        self.slots: Slots | None = None
        self.cache: SlotCache | None = None

    @torch.inference_mode()
    def generate(
        self, requests: Iterable[Request], settings: Sampling, on_step: Callable[[], None] | None = None
    ) -> Iterator[Trajectory]:
        """Yield a trajectory for every request, in the order in which they finish; `on_step` is called every step."""
        self.start(requests, settings)
        while self.queue or self.requests:
            self.admit()
            self.step()
            if on_step is not None:
                on_step()
            yield from self.collect()

    def start(self, requests: Iterable[Request], settings: Sampling) -> None:
        """Queue requests and make room for the longest of them."""
        self.queue = deque(requests)
        self.requests: list[Request] = []  # of the active slots, row by row
        self.settings = settings
        self.strategy = find_strategy(settings.remasking_strategy)
        if not self.queue:
            return
        if settings.max_token < 1:
            raise UserError(f"rollout.max_token: {settings.max_token} leaves no room for a response; give at least 1")
        block = settings.block_size
        longest = max(len(request.prompt_ids) for request in self.queue) + settings.max_token
        capacity = -(-longest // block) * block
        rows = min(settings.max_active, len(self.queue))
        if self.slots is None or self.slots.tokens.shape[0] < rows or self.slots.tokens.shape[1] < capacity:
            dtype = next(self.model.parameters()).dtype
            self.cache = None  # the old one is freed before the new one is made
            self.slots = Slots.empty(rows, capacity, self.device)
            self.cache = SlotCache(self.model.config, rows, capacity, dtype, self.device)

    def admit(self) -> None:
        """Fill free slots from the queue and prefill their prompts."""
        slots, first = self.slots, len(self.requests)
        free = min(self.settings.max_active, slots.tokens.shape[0]) - first
        new = [self.queue.popleft() for _ in range(min(free, len(self.queue)))]
        if not new:
            return
        ids = torch.full((len(new), slots.tokens.shape[1]), self.mask_id)
        for row, request in enumerate(new):
            ids[row, : len(request.prompt_ids)] = torch.tensor(request.prompt_ids)
        prompt_end = torch.tensor([len(request.prompt_ids) for request in new])
        block = self.settings.block_size
        rows = slice(first, first + len(new))
        slots.tokens[rows] = ids.to(self.device)
        slots.masked[rows] = (torch.arange(ids.shape[1]) >= prompt_end[:, None]).to(self.device)
        slots.key[rows] = torch.tensor([request.stream_key() for request in new]).to(self.device)
        slots.prompt_end[rows] = prompt_end.to(self.device)
        slots.response_end[rows] = prompt_end.to(self.device) + self.settings.max_token
        slots.block_start[rows] = (prompt_end // block * block).to(self.device)
        for counter in (slots.block_step, slots.step, slots.forwards, slots.finished):
            counter[rows] = 0
        prefill(self.model, self.cache, rows, [request.prompt_ids for request in new], block)
        self.requests += new

    def step(self) -> None:
        """One forward of every active sequence's current block; masked positions may be unmasked by it."""
        settings, slots = self.settings, self.slots.first(len(self.requests))
        positions = slots.block_start[:, None] + torch.arange(settings.block_size, device=self.device)
        masked = slots.masked.gather(1, positions)  # (batch, block)
        logits = denoise(self.model, self.cache, slots.tokens.gather(1, positions), positions)

        candidates = draw(logits, uniforms(slots.key, positions, slots.step, "token"), self.mask_id, settings)
        k = static_schedule(settings.block_size, settings.denoising_steps_per_block, slots.block_step)
        uniform = uniforms(slots.key, positions, slots.step, "random")
        chosen = masked & self.strategy(
            candidates, candidates.probability, candidates.entropy, masked, k, uniform, settings
        )

        def write(store: Tensor, value: Tensor) -> None:
            store.scatter_(1, positions, torch.where(chosen, value, store.gather(1, positions)))

        write(slots.tokens, candidates.tokens)
        write(slots.step_map, slots.step[:, None].expand_as(positions))
        write(slots.logp, candidates.logp)
        write(slots.confidence, candidates.probability)
        write(slots.kept_mass, candidates.kept_mass)
        write(slots.masked, torch.zeros_like(chosen))
        self.advance(slots, positions, denoised=masked.any(1), clean=~(masked & ~chosen).any(1))

    def advance(self, slots: Slots, positions: Tensor, denoised: Tensor, clean: Tensor) -> None:
        """Count the step; end sequences at a stop token or the limit; move committed ones to their next block."""
        slots.step += denoised
        slots.block_step += denoised
        slots.forwards += 1
        ends_here = torch.isin(slots.tokens.gather(1, positions), self.stop_ids)
        ends_here &= (positions >= slots.prompt_end[:, None]) & (positions < slots.response_end[:, None])
        block_end = positions[:, -1] + 1
        # a clean last block is not committed: nobody would read its keys
        slots.finished |= clean & (ends_here.any(1) | (block_end >= slots.response_end))
        committed = ~denoised
        slots.block_start += committed * positions.shape[1]
        slots.block_step *= ~committed

    def collect(self) -> list[Trajectory]:
        """Take the finished sequences out, closing the gaps so that the active slots stay the first ones."""
        active = self.slots.first(len(self.requests))
        if int(active.block_step.max()) > self.settings.block_size:
            raise UserError(
                f"rollout.remasking_strategy: {self.settings.remasking_strategy!r} unmasked nothing in some step; "
                "it must choose at least one masked position of every row that has any"
            )
        finished = active.finished.nonzero()[:, 0]
        rows = finished.tolist()
        on_host = active.select(finished).to("cpu") if rows else None
        done = [self.trajectory(on_host, index, self.requests[row]) for index, row in enumerate(rows)]
        for row in reversed(rows):
            last = len(self.requests) - 1
            if row != last:
                self.slots.move(last, row)
                self.cache.move(last, row)
                self.requests[row] = self.requests[last]
            self.requests.pop()
        return done

    def trajectory(self, slots: Slots, row: int, request: Request) -> Trajectory:
        """The record of a finished sequence."""
        start = len(request.prompt_ids)
        end = int(slots.block_start[row]) + self.settings.block_size
        tokens = slots.tokens[row, start:end]
        stops = torch.isin(tokens[: self.settings.max_token], self.stop_ids.cpu()).nonzero()[:, 0].tolist()
        return Trajectory(
            task_id=request.task_id,
            sample=request.sample,
            prompt_ids=list(request.prompt_ids),
            response_ids=tokens.tolist(),
            step_map=slots.step_map[row, start:end].tolist(),
            logp=slots.logp[row, start:end].tolist(),
            confidence=slots.confidence[row, start:end].tolist(),
            kept_mass=float(slots.kept_mass[row, start:end].mean()),
            finish_reason="stop" if stops else "length",
            length=stops[0] + 1 if stops else min(self.settings.max_token, len(tokens)),
            steps=int(slots.step[row]),
            forwards=int(slots.forwards[row]),
            temperature=rollout_temperature(self.settings),
        )

    @torch.no_grad()
    def load_weights(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Copy weights into the model in place; a tensor that already is the model's own costs nothing."""
        own = dict(self.model.named_parameters())
        for name, tensor in named:
            if own[name].data_ptr() != tensor.data_ptr():
                own[name].copy_(tensor)
