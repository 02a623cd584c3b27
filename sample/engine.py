"""The sampler: a queue of requests over slots whose whole state is tensors; one `step` is one forward for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from common.errors import UserError
from common.ranks import Queue
from common.runtime import console
from common.schema import Sampling
from common.trajectory import Request, Trajectory
from models.family import family_of_network
from sample import block_attention, full_attention
from sample.cache import SlotCache
from sample.draw import Candidates, draw, rollout_temperature, uniforms
from sample.strategies import even_split, find_strategy, rank_score


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
    canvas_end: Tensor  # (slots,) end of the block that holds the limit
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
        counts = ("key", "prompt_end", "response_end", "canvas_end", "block_start", "block_step", "step", "forwards")
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
    """Draws responses from a diffusion language model of any family.

    Sequences at different blocks and denoising steps share one forward. Under block attention a sequence whose block
    is clean spends one forward on writing the clean keys (its commit) while its neighbours denoise.
    """

    def __init__(self, model: torch.nn.Module, mask_id: int, stop_ids: Iterable[int]):
        self.model = model
        self.mask_id = mask_id
        family = family_of_network(model)
        self.full_attention, self.logit_offset = family.attention == "full", family.logit_offset
        self.device = next(model.parameters()).device
        self.own_stop_ids = sorted(stop_ids)
        self.told: set[int] = set()  # block sizes whose rounding has been said
        self.slots: Slots | None = None
        self.cache: SlotCache | None = None

    @torch.inference_mode()
    def generate(
        self,
        requests: Iterable[Request],
        settings: Sampling,
        on_step: Callable[[], None] | None = None,
        stop_ids: Iterable[int] | None = None,
    ) -> Iterator[Trajectory]:
        """Yield a trajectory for every request, in the order in which they finish; of a shared queue, for this rank's.

        `on_step` is called after every step; `stop_ids` take the place of the engine's own.
        """
        self.start(requests, settings, self.own_stop_ids if stop_ids is None else stop_ids)
        while self.queue or self.requests:
            self.admit()
            if not self.requests:  # other ranks took what was left
                return
            self.step()
            if on_step is not None:
                on_step()
            yield from self.collect()

    def start(self, requests: Iterable[Request], settings: Sampling, stop_ids: Iterable[int]) -> None:
        """Queue requests and make room for the longest of them."""
        self.queue = requests if isinstance(requests, Queue) else Queue(requests, shared=False)
        self.requests: list[Request] = []  # of the active slots, row by row
        self.settings = settings
        self.stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.long, device=self.device)
        self.strategy = find_strategy(settings.remasking_strategy)
        if not self.queue:
            return
        if settings.max_token < 1:
            raise UserError(f"rollout.max_token: {settings.max_token} leaves no room for a response; give at least 1")
        if self.full_attention and any(not request.prompt_ids for request in self.queue):
            raise UserError("the prompt is empty: full attention needs at least one token before the response")
        block = settings.block_size
        if self.full_attention and settings.max_token % block and block not in self.told:
            self.told.add(block)
            console.print(
                f"max_token {settings.max_token} is no multiple of block_size {block}: responses are drawn on a "
                f"canvas of {-(-settings.max_token // block) * block} tokens and cut"
            )
        longest = max(len(request.prompt_ids) for request in self.queue)
        capacity = int(self.canvas(torch.tensor(longest))[1])
        self.most_active = rows = min(settings.max_active, self.queue.share())
        cached = settings.use_cache or not self.full_attention
        small = self.slots is None or self.slots.tokens.shape[0] < rows or self.slots.tokens.shape[1] < capacity
        if small or (cached and self.cache is None):
            self.cache = None  # the old one is freed before the new one is made
            self.slots = Slots.empty(rows, capacity, self.device)
            if cached:
                dtype = next(self.model.parameters()).dtype
                self.cache = SlotCache(self.model.config, rows, capacity, dtype, self.device)

    def admit(self) -> None:
        """Fill free slots from the queue and prefill their prompts."""
        slots, first = self.slots, len(self.requests)
        free = self.most_active - first
        new = self.queue.take(free) if free and self.queue else []
        if not new:
            return
        ids = torch.full((len(new), slots.tokens.shape[1]), self.mask_id)
        for row, request in enumerate(new):
            ids[row, : len(request.prompt_ids)] = torch.tensor(request.prompt_ids)
        prompt_end = torch.tensor([len(request.prompt_ids) for request in new])
        start, end = self.canvas(prompt_end)
        rows = slice(first, first + len(new))
        slots.tokens[rows] = ids.to(self.device)
        slots.masked[rows] = (torch.arange(ids.shape[1]) >= prompt_end[:, None]).to(self.device)
        slots.step_map[rows] = -1
        slots.key[rows] = torch.tensor([request.stream_key() for request in new]).to(self.device)
        slots.prompt_end[rows] = prompt_end.to(self.device)
        slots.response_end[rows] = prompt_end.to(self.device) + self.settings.max_token
        slots.block_start[rows] = start.to(self.device)
        slots.canvas_end[rows] = end.to(self.device)
        for counter in (slots.block_step, slots.step, slots.forwards, slots.finished):
            counter[rows] = 0
        if not self.full_attention:
            prompts = [request.prompt_ids for request in new]
            block_attention.prefill(self.model, self.cache, rows, prompts, self.settings.block_size)
        self.requests += new

    def canvas(self, prompt_end: Tensor) -> tuple[Tensor, Tensor]:
        """Where the first block begins and where the block that holds the length limit ends.

        Blocks are aligned to position 0 under block attention, to the response under full attention.
        """
        block, limit = self.settings.block_size, prompt_end + self.settings.max_token
        origin = prompt_end if self.full_attention else torch.zeros_like(prompt_end)
        start = prompt_end - (prompt_end - origin) % block
        return start, limit + (origin - limit) % block

    def step(self) -> None:
        """One forward of every active sequence's current block; masked positions may be unmasked by it."""
        settings, slots = self.settings, self.slots.first(len(self.requests))
        positions = slots.block_start[:, None] + torch.arange(settings.block_size, device=self.device)
        masked = slots.masked.gather(1, positions)  # (batch, block)
        logits = self.forward(slots, positions)  # (batch, block, vocab)
        candidates = draw(logits, uniforms(slots.key, positions, slots.step, "token"), self.mask_id, settings)
        chosen = masked & self.choose(slots, candidates, positions, masked)

        def write(store: Tensor, value: Tensor) -> None:
            store.scatter_(1, positions, torch.where(chosen, value, store.gather(1, positions)))

        write(slots.tokens, candidates.tokens)
        write(slots.step_map, slots.step[:, None].expand_as(positions))
        write(slots.logp, candidates.logp)
        write(slots.confidence, candidates.probability)
        write(slots.kept_mass, candidates.kept_mass)
        write(slots.masked, torch.zeros_like(chosen))
        self.advance(slots, positions, denoised=masked.any(1), clean=~(masked & ~chosen).any(1))

    def forward(self, slots: Slots, positions: Tensor) -> Tensor:
        """Logits of every active sequence's current block, (batch, block, vocab)."""
        if not self.full_attention:
            tokens = slots.tokens.gather(1, positions)
            return block_attention.denoise(self.model, self.cache, tokens, positions)
        canvas = (slots.tokens, slots.canvas_end, positions, self.logit_offset)
        if not self.settings.use_cache:
            return full_attention.denoise(self.model, *canvas)
        first, horizon = slots.block_step == 0, self.settings.further_horizon
        return full_attention.denoise_cached(self.model, self.cache, *canvas, first, horizon)

    def choose(self, slots: Slots, candidates: Candidates, positions: Tensor, masked: Tensor) -> Tensor:
        """What the strategy unmasks, bool (batch, block)."""
        settings, size = self.settings, self.settings.block_size
        uniform = uniforms(slots.key, positions, slots.step, "random")
        score, steps = candidates.probability, settings.denoising_steps_per_block
        if self.full_attention:
            number = (slots.block_start - slots.prompt_end) // size
            blocks = (slots.canvas_end - slots.prompt_end) // size
            steps = even_split(settings.steps, blocks, number).clamp(min=1)
            gumbel = uniforms(slots.key, positions, slots.step, "alg_temp")
            score = rank_score(candidates, uniform, gumbel, torch.isin(candidates.tokens, self.stop_ids), settings)
        k = even_split(size, steps, slots.block_step)
        if self.full_attention and settings.remasking_strategy == "low_confidence_dynamic":
            k = torch.ones_like(k)  # where no candidate is sure, one position is unmasked
        return self.strategy(candidates, score, candidates.entropy, masked, k, uniform, settings)

    def advance(self, slots: Slots, positions: Tensor, denoised: Tensor, clean: Tensor) -> None:
        """Count the step; end sequences at a stop token or the limit; move committed ones to their next block."""
        slots.step += denoised
        slots.block_step += denoised
        slots.forwards += 1
        ends_here = torch.isin(slots.tokens.gather(1, positions), self.stop_ids)
        ends_here &= (positions >= slots.prompt_end[:, None]) & (positions < slots.response_end[:, None])
        block_end = positions[:, -1] + 1
        # a clean last block is not committed: nobody would read its keys
        slots.finished |= clean & (ends_here.any(1) | (block_end >= slots.canvas_end))
        committed = clean if self.full_attention else ~denoised
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
                if self.cache is not None:
                    self.cache.move(last, row)
                self.requests[row] = self.requests[last]
            self.requests.pop()
        return done

    def trajectory(self, slots: Slots, row: int, request: Request) -> Trajectory:
        """The record of a finished sequence."""
        start = len(request.prompt_ids)
        block_end = int(slots.block_start[row]) + self.settings.block_size
        end = int(slots.canvas_end[row]) if self.full_attention else block_end
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
            kept_mass=float(slots.kept_mass[row, start:block_end].mean()),
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
