"""The sampler: a queue of requests over slots whose whole state is tensors; one `step` is one forward for all."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from common.errors import UserError
from common.ranks import Queue
from common.runtime import console
from common.schema import Sampling
from common.trajectory import Request, Trajectory
from models.family import family_of_network, longest_sequence
from sample import block_attention
from sample.attention import Rotary, engine_attention, has_flash
from sample.cache import KeyValueCache, affordable_tokens
from sample.graphs import Graphs
from sample.parallel import copy_into, tensor_group_of
from sample.records import refusal_of, trajectory_of
from sample.room import Room
from sample.slots import Slots, Ticket, Watch
from sample.step import Step

MERGE_UP_TO = 256  # tokens in a forward on CUDA: beyond, arithmetic rather than memory is the limit


class Engine:
    """Draws responses from a diffusion language model of any family.

    Sequences at different blocks and denoising steps share one forward. Under block attention the commit of a finished
    block rides in the first forward of the sequence's next block, or has a forward of its own (`merge_commit`).
    """

    cache_class, step_class = KeyValueCache, Step  # docs/engine.md puts others in their place

    def __init__(self, model: torch.nn.Module, mask_id: int, stop_ids: Iterable[int]):
        self.model = model
        self.mask_id = mask_id
        self.full_attention = family_of_network(model).attention == "full"
        self.positions = longest_sequence(model.config)
        self.device = next(model.parameters()).device
        self.own_stop_ids = sorted(stop_ids)
        self.tensor_group = tensor_group_of(model)  # ranks that draw together: they must be given the same requests
        self.told: set[str] = set()  # what is said once
        self.flash = not self.full_attention and has_flash(model)
        if self.device.type == "cuda" and not self.full_attention and not self.flash:
            self.tell("attention: torch's own; with flash-attn installed and bfloat16 weights its kernel would be used")
        # on CUDA steps are launched without a look at the device, and replayed: their shapes must be few
        self.graphs = Graphs() if self.device.type == "cuda" else None
        self.watch = Watch(self.device)
        self.slots: Slots | None = None
        self.cache: KeyValueCache | None = None
        self.denoise: Step | None = None
        self.asleep: tuple[int, int] | None = None  # tokens and width of the cache that sleep gave back

    @torch.inference_mode()
    def generate(
        self,
        requests: Iterable[Request],
        settings: Sampling,
        on_step: Callable[[], None] | None = None,
        stop_ids: Iterable[int] | None = None,
    ) -> Iterator[Trajectory]:
        """Yield a trajectory for every request, in the order in which they finish; of a shared queue, for this rank's.

        A request that the cache could never hold is refused: its trajectory is empty, with finish_reason "refused". So
        is one whose prompt fills the positions that the network knows; a response is cut where they end.
        `on_step` is called after every step; `stop_ids` take the place of the engine's own.
        """
        self.start(requests, settings, self.own_stop_ids if stop_ids is None else stop_ids)
        with engine_attention(self.model):
            while self.queue or self.waiting or self.active:
                yield from self.admit()
                if not self.active:  # other ranks took what was left, or it was refused
                    continue
                self.step()
                if on_step is not None:
                    on_step()
                yield from self.collect()

    # ---- requests come in and wait

    def start(self, requests: Iterable[Request], settings: Sampling, stop_ids: Iterable[int]) -> None:
        """Queue requests and make room for the longest of those that fit."""
        self.settings = settings
        self.stop_ids = tuple(sorted(stop_ids))
        self.queue = requests if isinstance(requests, Queue) else Queue(requests, shared=False)
        self.waiting: deque[Ticket] = deque()  # requests taken from the queue, and sequences that had to give way
        self.active: list[Ticket] = []  # row by row
        self.taken = 0  # requests, so far
        self.watch.forget()
        if not self.queue:
            return
        self.check_settings()
        cached = settings.use_cache or not self.full_attention
        rows = min(settings.max_active, self.queue.share())
        ends = [self.ticket(0, request).canvas_end for request in self.queue]
        wanted = rows * min(max(ends), self.positions)
        tokens = self.cache_tokens(wanted) if cached else wanted
        fitting = [end for end in ends if end <= min(tokens, self.positions)]
        if beyond := sum(end > self.positions for end in ends):
            console.print(
                f"{beyond} requests refused: their prompts leave no room in the model's {self.positions} positions"
            )
        if len(fitting) + beyond < len(ends):
            longest = max(end for end in ends if end <= self.positions)
            console.print(
                f"{len(ends) - beyond - len(fitting)} requests refused: with its response one comes to {longest} "
                f"tokens, and the cache holds {tokens} (rollout.cache_tokens)"
            )
        longest = max(fitting, default=1)
        self.room = Room(min(tokens, rows * longest), rows, longest)
        if fitting:
            self.reserve(cached)

    def check_settings(self) -> None:
        """Raise UserError for what cannot be sampled; say how a canvas is rounded."""
        settings, block = self.settings, self.settings.block_size
        if settings.max_token < 1:
            raise UserError(f"rollout.max_token: {settings.max_token} leaves no room for a response; give at least 1")
        if self.full_attention and any(not request.prompt_ids for request in self.queue):
            raise UserError("the prompt is empty: full attention needs at least one token before the response")
        if self.full_attention and settings.max_token % block:
            self.tell(
                f"max_token {settings.max_token} is no multiple of block_size {block}: responses are drawn on a "
                f"canvas of {-(-settings.max_token // block) * block} tokens and cut"
            )

    def ticket(self, number: int, request: Request) -> Ticket:
        """A request with where its first block begins and where the block that holds its length limit ends.

        Blocks are aligned to position 0 under block attention, to the response under full attention.
        """
        block, prompt = self.settings.block_size, len(request.prompt_ids)
        origin, limit = prompt if self.full_attention else 0, prompt + self.settings.max_token
        last = self.positions - (self.positions - origin) % block  # end of the last whole block that the network knows
        if prompt < last < limit:
            limit = last
            self.tell(
                f"max_token {self.settings.max_token}: the model has {self.positions} positions, prompt and response "
                "together; responses to long prompts are cut there"
            )
        start, end = prompt - (prompt - origin) % block, limit + (origin - limit) % block
        return Ticket(number, request, start, limit, end, reach=end if self.full_attention else start + block)

    def longest_prompt(self, settings: Sampling) -> int:
        """Tokens of the longest prompt to which the network's positions leave room for a response."""
        block = settings.block_size
        return self.positions - block if self.full_attention else self.positions - self.positions % block - 1

    def cache_tokens(self, wanted: int) -> int:
        """Positions for which keys may be kept: what is wanted, less where the config or the memory says so."""
        limit = self.settings.cache_tokens
        if limit is not None:
            return min(limit, wanted)
        if self.cache is not None and self.cache.tokens >= wanted:
            return wanted
        self.sleep()  # so that the old cache's memory counts as free
        return affordable_tokens(self.model, wanted)

    def reserve(self, cached: bool) -> None:
        """Make slots and cache, unless those of the last use are large enough."""
        room = self.room
        rows = min(room.rows, room.tokens // room.width(1))
        if self.slots is None or self.slots.tokens.shape[0] < rows or self.slots.tokens.shape[1] < room.longest:
            self.forget_graphs()
            self.slots = Slots.empty(rows, room.longest, self.device)
        if cached and (self.cache is None or self.cache.tokens < room.tokens):
            self.forget_graphs()
            self.cache = None  # the old one is freed before the new one is made
            self.cache = self.cache_class(self.model, room.tokens, room.width(1))
        if cached:
            self.cache.resize(room.width(1), rows=0)
        self.slots.finished.fill_(True)
        merge = self.settings.merge_commit
        if merge is None:
            merge = self.device.type == "cpu" or 2 * rows * self.settings.block_size <= MERGE_UP_TO
        rotary = Rotary(self.model, room.longest)
        self.denoise = self.step_class(
            self.model,
            self.mask_id,
            self.stop_ids,
            self.settings,
            self.slots,
            self.cache,
            merge,
            self.flash,
            rotary,
            fixed=self.graphs is not None,
        )

    def next_ticket(self, refused: list[Trajectory]) -> Ticket | None:
        """The oldest request that waits; where none does one is taken from the queue, which ranks may share."""
        while not self.waiting and self.queue:
            for request in self.queue.take(1):
                ticket = self.ticket(self.taken, request)
                self.taken += 1
                if ticket.canvas_end <= self.room.longest:
                    self.waiting.append(ticket)
                else:
                    refused.append(refusal_of(request, self.settings))
        return self.waiting[0] if self.waiting else None

    def admit(self) -> list[Trajectory]:
        """Fill free slots, the oldest request first, and prefill what the cache must hold; returns those refused."""
        first, new, refused = len(self.active), [], []
        reaches = [ticket.reach for ticket in self.active]
        while len(reaches) < self.room.rows and (ticket := self.next_ticket(refused)) is not None:
            if not self.room.fits([*reaches, ticket.reach]):
                break
            new.append(self.waiting.popleft())
            reaches.append(ticket.reach)
        if new:
            self.place(first, new, reaches)
        return refused

    def place(self, first: int, new: list[Ticket], reaches: list[int]) -> None:
        """Give new sequences, and those that come back, the rows from `first` on."""
        self.watch.forget()
        if self.cache is not None and (
            max(reaches) > self.cache.width or len(reaches) * self.cache.width > self.room.tokens
        ):
            self.cache.resize(self.room.width(max(reaches)), first)
        self.seat([ticket for ticket in new if ticket.state is None])
        for ticket in new:
            if ticket.state is not None:
                self.slots.put(len(self.active), ticket.state)
                self.active.append(ticket)
        if not self.full_attention:
            self.prefill(first)
        for ticket in new:
            ticket.state = None

    def seat(self, new: list[Ticket]) -> None:
        """Write new requests into the first free rows."""
        if not new:
            return
        slots, rows = self.slots, slice(len(self.active), len(self.active) + len(new))
        ids = torch.full((len(new), slots.tokens.shape[1]), self.mask_id)
        for row, ticket in enumerate(new):
            ids[row, : len(ticket.request.prompt_ids)] = torch.tensor(ticket.request.prompt_ids)
        prompt_end = torch.tensor([len(ticket.request.prompt_ids) for ticket in new])
        values = {
            "tokens": ids,
            "masked": torch.arange(ids.shape[1]) >= prompt_end[:, None],
            "key": torch.tensor([ticket.request.stream_key() for ticket in new]),
            "prompt_end": prompt_end,
            "response_end": torch.tensor([ticket.response_end for ticket in new]),
            "canvas_end": torch.tensor([ticket.canvas_end for ticket in new]),
            "block_start": torch.tensor([ticket.block_start for ticket in new]),
            "cached": torch.tensor([ticket.block_start for ticket in new]),
        }
        for name, value in values.items():
            getattr(slots, name)[rows] = value.to(self.device)
        slots.step_map[rows] = -1
        slots.figures[rows] = 0
        for counter in (slots.block_step, slots.step, slots.forwards, slots.finished, slots.stuck):
            counter[rows] = 0
        self.active += new

    def prefill(self, first: int) -> None:
        """Bring the keys that rows from `first` on need into the cache; one forward serves all that need the same."""
        held = {
            tuple(ticket.request.prompt_ids[: ticket.block_start]): row
            for row, ticket in enumerate(self.active[:first])
        }
        missing, copies = {}, []
        for row, ticket in enumerate(self.active[first:], first):
            prefix = ticket.prefix()
            if prefix in held:
                copies.append((held[prefix], row, len(prefix)))
            else:
                held[prefix] = row
                missing[prefix] = row
        rows, block = list(missing.values()), self.settings.block_size
        block_attention.prefill(self.model, self.denoise.rotary, self.cache, list(missing), rows, block)
        for source, target, length in copies:
            self.cache.copy(source, target, length)

    def make_room(self) -> None:
        """Widen the slots for sequences that outgrow them; where the cache cannot, the youngest wait in the queue.

        They keep what they have drawn, and their keys are computed anew when there is room.
        """
        if self.cache is None or max(ticket.reach for ticket in self.active) <= self.cache.width:
            return
        staying = sorted(self.active, key=lambda ticket: ticket.number)
        while not self.room.fits([ticket.reach for ticket in staying]):
            ticket = staying.pop()
            row = self.active.index(ticket)
            ticket.state = self.slots.select([row])
            ticket.state.cached.copy_(ticket.state.block_start)
            ticket.reach = int(ticket.state.block_start) + self.settings.block_size
            self.remove(row)
            self.waiting.appendleft(ticket)
        self.cache.resize(self.room.width(max(ticket.reach for ticket in staying)), len(staying))

    # ---- sequences are denoised and leave

    def step(self, rows: int | None = None) -> None:
        """One forward of every active sequence's current block; masked positions may be unmasked by it.

        With `rows`, of the first so many sequences alone, by which a server finds the one that a step fails for.
        """
        self.make_room()
        seen = max(ticket.reach for ticket in self.active)
        if self.graphs is None or rows is not None:  # a graph's rows are rounded up
            self.denoise(len(self.active) if rows is None else rows, seen)
        else:
            self.graphs.run(self.denoise, len(self.active), seen)

    def collect(self) -> list[Trajectory]:
        """Take the finished sequences out, closing the gaps so that the active slots stay the first ones."""
        block = self.settings.block_size
        look = self.watch.look(self.slots.first(len(self.active)))
        if look is None:
            for ticket in self.active:
                ticket.reach = min(ticket.reach + block, ticket.canvas_end)
            return []
        (finished, stuck, starts), age = look
        if any(stuck):
            raise UserError(
                f"rollout.remasking_strategy: {self.settings.remasking_strategy!r} unmasked nothing in some step; "
                "it must choose at least one masked position of every row that has any"
            )
        if not self.full_attention:
            for ticket, start in zip(self.active, starts):
                ticket.reach = min(start + (1 + age) * block, ticket.canvas_end)
        rows = [row for row, flag in enumerate(finished) if flag]
        if not rows:
            return []
        left = self.slots.select(rows)
        done = [
            trajectory_of(left, index, self.active[row].request, self.settings, self.stop_ids, self.full_attention)
            for index, row in enumerate(rows)
        ]
        for row in reversed(rows):
            self.remove(row)
        return done

    def remove(self, row: int) -> None:
        """Free an active row: the last one takes its place."""
        last = len(self.active) - 1
        if row != last:
            self.slots.move(last, row)
            if self.cache is not None:
                self.cache.copy(last, row, min(self.active[last].reach, self.cache.width))
            self.active[row] = self.active[last]
        self.slots.finished[last] = True
        self.active.pop()
        self.watch.forget()

    # ---- weights and memory

    @torch.no_grad()
    def load_weights(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Copy weights into the model in place; a tensor that already is the model's own costs nothing."""
        own = dict(self.model.named_parameters())
        tied = self.model.config.tie_word_embeddings and "lm_head.weight" in own  # divided, and so a copy
        for name, tensor in named:
            copy_into(own[name], tensor)
            if tied and name == "model.embed_tokens.weight":
                copy_into(own["lm_head.weight"], tensor)

    def sleep(self) -> None:
        """Give back the memory of slots, cache and graphs; `wake`, or the next `generate`, takes it again."""
        self.forget_graphs()
        if self.cache is not None:
            self.asleep = (self.cache.tokens, self.cache.width)
        self.slots, self.cache = None, None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Take the cache's memory again, as large as it was."""
        if self.cache is None and self.asleep is not None:
            self.cache = self.cache_class(self.model, *self.asleep)

    def forget_graphs(self) -> None:
        """Drop what speaks of memory that is about to go."""
        self.denoise = None
        if self.graphs is not None:
            self.graphs.forget()

    def tell(self, message: str) -> None:
        """Print a line once in the engine's life."""
        if message not in self.told:
            self.told.add(message)
            console.print(message)
