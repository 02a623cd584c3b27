"""One denoising step of all active sequences, as tensors on the device: nothing in it waits for the host."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.schema import Sampling
from sample import block_attention, full_attention
from sample.cache import KeyValueCache
from sample.draw import Candidates, draw, is_greedy, uniforms
from sample.network import Network
from sample.slots import Slots
from sample.strategies import STRATEGIES, BlockState, even_split, find_strategy, rank_score

if TYPE_CHECKING:
    from sample.engine import Engine

MERGE_UP_TO = 256  # tokens in a forward on CUDA: beyond, arithmetic rather than memory is the limit


class Step:
    """Forward, draw, unmask, advance: called with how many slots are in use and how far their blocks reach.

    It is made at every set-up of the engine, whose slots and cache it reads and writes.
    """

    def __init__(self, engine: "Engine"):
        settings: Sampling = engine.settings
        self.settings = settings
        self.slots: Slots = engine.slots
        self.cache: KeyValueCache | None = engine.cache
        self.network = Network(engine.model, engine.room.longest, engine.flash)
        self.device, self.mask_id = engine.device, engine.mask_id
        self.fixed = engine.graphs is not None  # shapes depend on nothing that is on the device
        self.merge = settings.merge_commit  # a block's commit rides in the next block's first forward
        if self.merge is None:
            self.merge = self.device.type == "cpu" or 2 * engine.room.slots() * settings.block_size <= MERGE_UP_TO
        self.strategy = find_strategy(settings.remasking_strategy)
        self.stops = torch.tensor(engine.stop_ids, dtype=torch.long, device=self.device)
        # a small head costs less at all positions than finding the masked ones
        vocabulary, width = engine.model.config.vocab_size, engine.model.config.hidden_size
        self.sparse = not self.fixed and vocabulary > width
        self.block = torch.arange(settings.block_size, device=self.device)
        self.variant = (self.merge, engine.stop_ids, repr(settings))  # by which CUDA graphs of steps differ

    def __call__(self, rows: int, seen: int) -> None:
        """One forward of the first `rows` slots' current blocks, none of which reaches beyond position `seen`."""
        slots = self.slots.first(rows)
        positions = slots.block_start[:, None] + self.block  # (rows, block)
        tokens = slots.tokens.gather(1, positions)
        masked = slots.masked.gather(1, positions) & ~slots.finished[:, None]
        hidden = self.forward(slots, positions, tokens, seen)  # (rows, block, width)
        candidates = self.draw(hidden, slots, positions, masked)
        chosen = masked & self.choose(slots, candidates, positions, masked)
        tokens = torch.where(chosen, candidates.tokens, tokens)
        self.record(slots, positions, tokens, masked & ~chosen, chosen, candidates)
        self.advance(slots, positions, tokens, masked.any(1), ~(masked & ~chosen).any(1))

    def faulty_row(self, rows: int, seen: int) -> int:
        """The row that a step fails for: the last of the fewest first rows with which it fails.

        Rows do not see each other, so that without it the others go on; memory that runs out has no better answer.
        """
        before = [self.slots.select([row]) for row in range(rows)]
        works, fails = 0, rows
        while fails - works > 1:
            middle = (works + fails) // 2
            try:
                self(middle, seen)
                works = middle
            except Exception:  # what it is was seen before; which rows it takes is what is asked
                fails = middle
            for row, state in enumerate(before):
                self.slots.put(row, state)
        return fails - 1

    def forward(self, slots: Slots, positions: Tensor, tokens: Tensor, seen: int) -> Tensor:
        """Hidden states that predict the current blocks, (rows, block, width)."""
        if not self.network.full_attention:
            committing = self.due(slots) if self.merge else None
            return block_attention.denoise(self.network, self.cache, slots, positions, tokens, seen, committing)
        if not self.settings.use_cache:
            return full_attention.denoise(self.network, slots, positions, seen)
        horizon = self.settings.further_horizon
        return full_attention.denoise_cached(self.network, self.cache, slots, positions, seen, horizon)

    def due(self, slots: Slots) -> Tensor | None:
        """Rows that carry their previous block along: those whose commit is due, or all where shapes are fixed."""
        if self.fixed:
            return torch.arange(len(slots.cached), device=self.device)
        rows = (slots.cached < slots.block_start).nonzero()[:, 0]
        return rows if len(rows) else None

    def draw(self, hidden: Tensor, slots: Slots, positions: Tensor, masked: Tensor) -> Candidates:
        """A candidate for every masked position of the current blocks, (rows, block); nothing is said of the others."""
        uniform = None if is_greedy(self.settings) else uniforms(slots.key, positions, slots.step, "token")
        if not self.sparse:
            return draw(self.network.logits(hidden), uniform, self.mask_id, self.settings)
        where = masked.flatten().nonzero()[:, 0]
        logits = self.network.logits(hidden.flatten(0, 1)[where])  # (masked positions, vocab)
        uniform = None if uniform is None else uniform.flatten()[where]
        return draw(logits, uniform, self.mask_id, self.settings).spread(where, masked.shape)

    def choose(self, slots: Slots, candidates: Candidates, positions: Tensor, masked: Tensor) -> Tensor:
        """What the strategy unmasks, bool (rows, block)."""
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
            score = rank_score(candidates, uniform, gumbel, self.stop(candidates.tokens), settings)
        k = even_split(size, steps, slots.block_step)
        if self.network.full_attention and settings.remasking_strategy == "low_confidence_dynamic":
            k = torch.ones_like(k)  # where no candidate is sure, one position is unmasked
        tokens = slots.tokens.gather(1, positions)
        return self.strategy(BlockState(candidates, score, candidates.entropy, masked, k, uniform, settings, tokens))

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

    def advance(self, slots: Slots, positions: Tensor, tokens: Tensor, denoised: Tensor, clean: Tensor) -> None:
        """Count the step; end sequences at a stop token or the limit; move the others with a clean block onward."""
        slots.step += denoised
        slots.block_step += denoised
        slots.forwards += ~slots.finished
        slots.stuck |= slots.block_step > self.settings.block_size
        ends_here = self.stop(tokens)
        ends_here &= (positions >= slots.prompt_end[:, None]) & (positions < slots.response_end[:, None])
        last = positions[:, -1] + 1 >= slots.canvas_end
        # a clean last block is not committed: nobody would read its keys
        slots.finished |= clean & (ends_here.any(1) | last)
        onward = clean & ~slots.finished
        if not self.network.full_attention and not self.merge:
            onward &= ~denoised  # this forward was the commit
        if self.merge:
            slots.cached.copy_(slots.block_start)
        slots.block_start += onward * self.settings.block_size
        if not self.merge:
            slots.cached.copy_(slots.block_start)
        slots.block_step *= ~onward
