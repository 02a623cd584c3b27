"""One denoising step of all active sequences, as tensors on the device, and CUDA graphs of whole steps.

Nothing in a step waits for the host.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.memory import DRAW_ELEMENTS
from common.runtime import console
from common.schema import Sampling
from models.family import end_of_sequence_ids
from sample import block_attention, full_attention
from sample.cache import KeyValueCache
from sample.draw import Candidates, draw, is_greedy, uniforms
from sample.network import Network
from sample.routes import CLEAN, StepRoutes
from sample.slots import OVERWRITTEN_PER_TOKEN, Slots
from sample.strategies import (
    STRATEGIES,
    BlockState,
    Writes,
    as_writes,
    even_split,
    find_strategy,
    most_forwards,
    overwrites,
    rank_score,
)

MERGE_UP_TO = 256  # tokens in a forward on CUDA: beyond, arithmetic rather than memory is the limit
SEEN = 256  # for a graph the reach of the blocks is rounded up to a multiple of this


@dataclass(eq=False)
class Step:
    """Forward, draw, unmask, advance: called with how many slots are in use and how far their blocks reach."""

    network: Network
    slots: Slots
    cache: KeyValueCache | None
    settings: Sampling
    mask_id: int
    stop_ids: tuple[int, ...]
    rows: int  # the most slots that can be in use
    fixed: bool  # shapes depend on nothing that is on the device
    paced: bool = False  # rows pause at their limit of denoising steps

    def __post_init__(self) -> None:
        device, config, size = self.network.device, self.network.model.config, self.settings.block_size
        self.merge = self.settings.merge_commit  # a block's commit rides in the next block's first forward
        if self.merge is None:
            self.merge = device.type == "cpu" or 2 * self.rows * size <= MERGE_UP_TO
        self.strategy = find_strategy(self.settings.remasking_strategy)
        self.overwrites = overwrites(self.strategy)
        self.most_forwards = most_forwards(self.strategy, self.settings)
        self.stops = torch.tensor(self.stop_ids, dtype=torch.long, device=device)
        barred = end_of_sequence_ids(config) if self.settings.logits_eos_inf else ()
        self.barred = torch.tensor(barred, dtype=torch.long, device=device) if barred else None
        # a small head costs less at all positions than finding the masked ones
        self.sparse = not self.fixed and not self.overwrites and config.vocab_size > config.hidden_size
        self.block = torch.arange(size, device=device)
        canvas = self.settings.max_token + -self.settings.max_token % size
        horizon = self.settings.further_horizon
        longest = canvas if horizon is None else min(size + horizon, canvas)
        self.window = longest - self.network.logit_offset  # full attention: positions that a later forward redoes
        self.waits = self.fixed and self.network.full_attention and self.settings.use_cache
        # by which CUDA graphs of steps differ
        self.variant = (self.merge, self.stop_ids, repr(self.settings), bool(self.network.routers), self.paced)
        self.carried: Tensor | None = None  # rows whose previous block the last forward carried along
        self.routes: StepRoutes | None = None  # of the last call, where the network keeps them

    def __call__(self, rows: int, seen: int, first: int | None = None) -> None:
        """One forward of the first `rows` slots' current blocks, none of which reaches beyond position `seen`.

        With a prefix cache in fixed shapes at most `first` of the rows that begin a block do so; others wait.
        """
        slots = self.slots.first(rows)
        positions = slots.block_start[:, None] + self.block  # (rows, block)
        tokens = slots.tokens.gather(1, positions)
        present = slots.masked.gather(1, positions)  # also in rows that are finished or pause, which stay as they are
        masked = present & ~slots.finished[:, None]
        first = rows if first is None else first
        hidden = self.forward(slots, positions, tokens, seen, first)  # (rows, block, width)
        candidates = self.draw(hidden, slots, positions, tokens, masked)
        ready = masked  # what may be written
        if self.overwrites:
            ready = (positions >= slots.prompt_end[:, None]) & ~(slots.final | slots.finished)[:, None]
        if self.waits:
            due = slots.begins()
            waiting = due & (due.cumsum(0) > first)
            ready = ready & ~waiting[:, None]
            slots.forwards -= waiting.long()  # `advance` counts it for all
        writes = self.choose(slots, candidates, positions, tokens, masked)
        denoised = ready.any(1)
        if self.overwrites:
            self.overwrite(slots, positions, tokens, present, ready, denoised, candidates, writes)
        else:
            self.keep_routes(slots, denoised, torch.zeros_like(denoised))
            chosen = ready & writes.candidates
            tokens = torch.where(chosen, candidates.tokens, tokens)
            left = present & ~chosen
            self.record(slots, positions, tokens, left, chosen, candidates)
            self.advance(slots, positions, tokens, denoised, denoised, ~left.any(1))
        if self.paced:
            slots.pause(between_blocks=self.network.full_attention and self.settings.use_cache)

    def overwrite(
        self,
        slots: Slots,
        positions: Tensor,
        tokens: Tensor,
        masked: Tensor,
        ready: Tensor,
        denoised: Tensor,
        candidates: Candidates,
        writes: Writes,
    ) -> None:
        """Carry out what a strategy writes that may overwrite tokens, in rows that were `denoised`, and advance."""
        masks = torch.zeros_like(ready) if writes.masks is None else writes.masks & ~masked
        in_prompt = (positions < slots.prompt_end[:, None]) & (writes.candidates | masks)
        slots.stuck |= denoised & in_prompt.any(1)
        fits = self.keep_overwritten(slots, positions, tokens, ready & (writes.candidates | masks))
        ready = ready & fits[:, None]
        revoked = ready & masks
        chosen = ready & writes.candidates & ~masks
        tokens = torch.where(chosen, candidates.tokens, tokens).masked_fill(revoked, self.mask_id)
        left = (masked & ~chosen) | revoked
        figures = {name: getattr(candidates, name).masked_fill(revoked, 0) for name in ("logp", "probability")}
        self.record(slots, positions, tokens, left, chosen | revoked, replace(candidates, **figures))
        slots.clean_steps += denoised & ~masked.any(1)
        ends = ready.any(1) & ~left.any(1)  # where there was no room for what is overwritten nothing was ready
        if writes.ends is not None:
            ends &= writes.ends
        written, final = (chosen | revoked).any(1), slots.final | ends
        self.keep_routes(slots, denoised, denoised & final & ~written)
        self.advance(slots, positions, tokens, denoised, written, final)

    def keep_routes(self, slots: Slots, denoised: Tensor, commits: Tensor) -> None:
        """Note, where the network keeps it, to which experts the forward gave which tokens.

        Bool (rows,): rows that were `denoised`, and those of them in which it `commits` the block, as it wrote nothing.
        """
        if self.network.routers:
            steps = torch.where(denoised, slots.step, CLEAN - slots.finished.long())
            state = torch.stack((slots.block_start, slots.cached, steps, commits.long()), 1)
            self.routes = StepRoutes(self.network.experts, state, self.carried)

    def keep_overwritten(self, slots: Slots, positions: Tensor, tokens: Tensor, written: Tensor) -> Tensor:
        """Put what is about to be overwritten behind what was; returns the rows in which there is room for it.

        The others are full, and end.
        """
        steps = slots.step_map.gather(1, positions)
        leaving = written & (steps >= 0)
        place = slots.overwritten_count[:, None] + leaving.cumsum(1) - 1
        count = slots.overwritten_count + leaving.sum(1)
        fits = count <= OVERWRITTEN_PER_TOKEN * (slots.canvas_end - slots.prompt_end)
        slots.full |= ~fits
        leaving &= fits[:, None]
        slots.overwritten_count.copy_(torch.where(fits, count, slots.overwritten_count))
        # the columns at the end take what is not kept: each its own, so that no two writes meet
        spare = slots.overwritten.shape[1] - self.settings.block_size + self.block
        logp = slots.figures[..., 0].gather(1, positions).view(torch.int32)
        writing = torch.stack((steps.int(), positions.int(), tokens.int(), logp), -1)
        four = torch.where(leaving, place, spare)[..., None].expand(-1, -1, 4)
        slots.overwritten.scatter_(1, four, writing)
        return fits

    def faulty_row(self, rows: int, seen: int) -> int:
        """The row that a step fails for: the last of the fewest first rows with which it fails.

        Rows do not see each other, so that without it the others go on; memory that runs out has no better answer.
        """
        before = self.slots.select(self.slots.index(list(range(rows))))
        works, fails = 0, rows
        while fails - works > 1:
            middle = (works + fails) // 2
            try:
                self(middle, seen)
                works = middle
            except Exception:  # what it is was seen before; which rows it takes is what is asked
                fails = middle
            self.slots.put(list(range(rows)), before)
        return fails - 1

    def forward(self, slots: Slots, positions: Tensor, tokens: Tensor, seen: int, first: int) -> Tensor:
        """Hidden states that predict the current blocks, (rows, block, width)."""
        network, settings = self.network, self.settings
        if self.waits:
            return full_attention.denoise_cached_fixed(
                network, self.cache, slots, positions, seen, self.window, settings.further_horizon, first
            )
        if network.full_attention and settings.use_cache:
            return full_attention.denoise_cached(network, self.cache, slots, positions, seen, settings.further_horizon)
        if network.full_attention:
            return full_attention.denoise(network, slots, positions, seen)
        committing = None  # rows that carry their previous block along
        if self.merge and self.fixed:
            committing = torch.arange(len(slots.cached), device=network.device)
        elif self.merge:
            due = (slots.cached < slots.block_start).nonzero()[:, 0]
            committing = due if len(due) else None
        self.carried = committing
        return block_attention.denoise(network, self.cache, slots, positions, tokens, seen, committing)

    def draw(self, hidden: Tensor, slots: Slots, positions: Tensor, tokens: Tensor, masked: Tensor) -> Candidates:
        """A candidate for every masked position of the current blocks, (rows, block).

        Nothing is said of the others, unless tokens may be overwritten: there it is the likeliest token.
        """
        uniform = None if is_greedy(self.settings) else uniforms(slots.key, positions, slots.step, "token")
        if not self.sparse:
            return self.draw_in_chunks(hidden, uniform, tokens if self.overwrites else None)
        where = masked.flatten().nonzero()[:, 0]
        uniform = None if uniform is None else uniform.flatten()[where]
        return self.draw_in_chunks(hidden.flatten(0, 1)[where], uniform).spread(where, masked.shape)

    def draw_in_chunks(self, hidden: Tensor, uniform: Tensor | None, present: Tensor | None = None) -> Candidates:
        """Candidates (…) for hidden states (…, width) and uniforms (…), where tokens `present` (…) stand.

        So many at a time that their logits, and what the draw makes of them, stay small.
        """
        shape = hidden.shape[:-1]
        chunks = -(-shape.numel() * self.network.model.config.vocab_size // DRAW_ELEMENTS)
        if chunks <= 1:
            return draw(self.network.logits(hidden), uniform, self.mask_id, self.settings, self.barred, present)
        states = hidden.flatten(0, -2).tensor_split(chunks)
        beside = [[None] * chunks if one is None else one.flatten().tensor_split(chunks) for one in (uniform, present)]
        parts = [
            draw(self.network.logits(state), number, self.mask_id, self.settings, self.barred, token)
            for state, number, token in zip(states, *beside)
        ]
        return Candidates.joined(parts, shape)

    def choose(self, slots: Slots, candidates: Candidates, positions: Tensor, tokens: Tensor, masked: Tensor) -> Writes:
        """What the strategy writes in the current blocks."""
        settings, size = self.settings, self.settings.block_size
        own = settings.remasking_strategy not in STRATEGIES
        uniform = None
        if own or settings.target == "random":
            uniform = uniforms(slots.key, positions, slots.step, "random")
        score, steps = candidates.probability, settings.denoising_steps_per_block
        if self.network.full_attention:
            number = (slots.block_start - slots.prompt_end) // size
            blocks = (slots.canvas_end - slots.prompt_end) // size
            steps = even_split(settings.steps, blocks, number).clamp(min=1)
            gumbel = uniforms(slots.key, positions, slots.step, "alg_temp") if settings.alg_temp > 0 else None
            ends = self.stop(candidates.tokens)
            score = rank_score(candidates, uniform, gumbel, ends, settings)
            if settings.confidence_eos_eot_inf:  # no threshold is reached either
                candidates = replace(candidates, probability=candidates.probability.masked_fill(ends, float("-inf")))
        k = even_split(size, steps, slots.block_step)
        if self.network.full_attention and settings.remasking_strategy == "low_confidence_dynamic":
            k = torch.ones_like(k)  # where no candidate is sure, one position is unmasked
        response = positions >= slots.prompt_end[:, None]
        block = BlockState(
            candidates, score, candidates.entropy, masked, k, uniform, settings, tokens, response, slots.clean_steps
        )
        return as_writes(self.strategy(block), block, self.strategy)

    def stop(self, tokens: Tensor) -> Tensor:
        """Which tokens end a response."""
        return (tokens[..., None] == self.stops).any(-1)

    def record(
        self, slots: Slots, positions: Tensor, tokens: Tensor, masked: Tensor, chosen: Tensor, candidates: Candidates
    ) -> None:
        """Write the current blocks' tokens and masks, and of those chosen now when and how they were drawn."""
        slots.tokens.scatter_(1, positions, tokens)
        slots.masked.scatter_(1, positions, masked)
        steps = torch.where(chosen, slots.step[:, None], slots.step_map.gather(1, positions))
        slots.step_map.scatter_(1, positions, steps)
        three = positions[..., None].expand(-1, -1, 3)
        figures = torch.stack((candidates.logp, candidates.probability, candidates.kept_mass), -1)
        figures = torch.where(chosen[..., None], figures, slots.figures.gather(1, three))
        slots.figures.scatter_(1, three, figures)

    def advance(
        self, slots: Slots, positions: Tensor, tokens: Tensor, denoised: Tensor, written: Tensor, final: Tensor
    ) -> None:
        """Count the step; end sequences at a stop token or the limit; move the others with a final block onward.

        Bool (rows,): rows that were `denoised`, in which something was `written`, whose block is `final`.
        """
        slots.step += denoised
        slots.block_step += denoised
        slots.forwards += ~slots.finished
        slots.stuck |= slots.block_step > self.most_forwards
        ends_here = self.stop(tokens)
        ends_here &= (positions >= slots.prompt_end[:, None]) & (positions < slots.response_end[:, None])
        last = positions[:, -1] + 1 >= slots.canvas_end
        # a final last block is not committed: nobody would read its keys
        slots.finished |= final & (ends_here.any(1) | last)
        if self.overwrites:
            slots.finished |= slots.full
        onward = final & ~slots.finished
        if not self.network.full_attention and not self.merge:
            onward &= ~written  # this forward was the commit: its keys are those of the tokens that stay
        if self.merge:
            slots.cached.copy_(slots.block_start)
            if self.overwrites:  # or it was the commit here too
                slots.cached += (onward & ~written) * self.settings.block_size
        slots.block_start += onward * self.settings.block_size
        if not self.merge:
            slots.cached.copy_(slots.block_start)
        slots.block_step *= ~onward
        if self.overwrites:
            slots.clean_steps *= ~onward
            slots.final.copy_(final & ~onward)


class Graphs:
    """A graph for each shape of a step: rows in use, rounded up, how far their blocks reach, and who may begin one.

    A step reads and writes only memory that stays where it is (weights, slots, cache), so that a graph stays valid
    until that memory is given back, or `most` others were used since.
    """

    most = 64

    def __init__(self) -> None:
        self.usable = True  # until a step cannot be recorded
        self.forget()

    def forget(self) -> None:
        """Drop all graphs: the memory they speak of goes away."""
        self.met: dict[tuple, None] = {}  # shapes that have been run once
        # shape → its graph, the step, kept because the graph reads its tensors, and the routes that it writes
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, Step, StepRoutes | None]] = {}
        self.pool: tuple[int, int] | None = None

    def run(self, step: Step, rows: int, seen: int, first: int) -> int:
        """The step, by its graph; the first one of a shape is run plainly, and the second recorded.

        Returns how many rows could begin a block under a prefix cache: `first`, rounded up.
        """
        limit = step.cache.width if step.cache is not None else step.slots.tokens.shape[1]
        slots = len(step.slots.finished) if step.cache is None else min(len(step.slots.finished), step.cache.count)
        rows = min(bucket(rows), slots)
        first = min(bucket(first), rows) if step.waits else 0
        seen = min(-(-seen // SEEN) * SEEN, limit)
        shape = (rows, seen, first, limit, *step.variant)
        if shape in self.met and shape not in self.graphs and self.usable:
            self.record(shape, step, rows, seen, first)
        if shape in self.graphs and self.usable:
            self.graphs[shape] = self.graphs.pop(shape)  # they stand in the order of their last use
            graph, _, step.routes = self.graphs[shape]
            graph.replay()
            return first
        step(rows, seen, first)
        self.met[shape] = None
        keep_last(self.met, 4 * self.most)
        return first

    def record(self, shape: tuple, step: Step, rows: int, seen: int, first: int) -> None:
        """Keep the graph of a step, which is not carried out. Where it cannot be recorded, nothing is any more."""
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # a capture that fails leaves its stream the current one; what other threads do meanwhile is no part of it
        here, capture = torch.cuda.current_stream(), {"pool": self.pool, "capture_error_mode": "thread_local"}
        try:
            with torch.cuda.stream(here), torch.cuda.graph(graph, **capture):
                step(rows, seen, first)
        except RuntimeError as error:
            torch.cuda.synchronize()  # raises where it is the device that failed
            self.usable = False
            console.print(f"steps are launched one kernel at a time: no CUDA graph ({str(error).splitlines()[0]})")
            return
        self.graphs[shape] = graph, step, step.routes
        keep_last(self.graphs, self.most)


def bucket(rows: int) -> int:
    """A number of rows, rounded up to a power of two, above 32 to a multiple of 16: those added compute in vain."""
    return rows + -rows % 16 if rows > 32 else (rows and 1 << (rows - 1).bit_length())


def keep_last(table: dict, most: int) -> None:
    """Drop the first entries of a table that has more than `most`."""
    while len(table) > most:
        del table[next(iter(table))]
