"""The sampler: requests wait for slots, whose whole state is tensors; one `step` is one forward for all of them.

A request is a `Sequence` from `add` until it is finished (sample/slots.py). Whoever uses an engine calls what stands
before "behind the door", and nothing else of it.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from common.errors import UserError
from common.memory import NETWORK_SIZES, Drawing, sampling_bytes, size_of
from common.ranks import Queue
from common.runtime import console, say_once
from common.schema import Sampling
from common.trajectory import Request, Trajectory
from models.family import end_of_sequence_ids, family_of_network, longest_sequence
from sample import block_attention
from sample.attention_kernel import attention_kernel
from sample.cache import KeyValueCache, Room, affordable_tokens, heads_and_width, rounded
from sample.network import Network, engine_attention, sampling_kernels
from sample.parallel import load_weights, tensor_group_of
from sample.routes import RouteKeeper, RouteLog
from sample.slots import (
    NO_LIMIT,
    OVERWRITTEN_PER_TOKEN,
    Finished,
    Progress,
    Refusal,
    Sequence,
    Slots,
    Unfinished,
    Watch,
    refusal_of,
    trajectory_of,
)
from sample.step import Graphs, Step, bucket
from sample.strategies import find_strategy, overwrites

NOTHING_FITS = Room(tokens=0, rows=1, longest=0)


class Engine:
    """Draws responses from a diffusion language model of any family.

    Sequences at different blocks and denoising steps share one forward. Under block attention the commit of a finished
    block rides in the first forward of the sequence's next block, or has a forward of its own (`merge_commit`).

    An exception of a step is raised; with `isolate_faults`, as a server wants it, it ends the request that makes it.
    """

    cache_class, step_class = KeyValueCache, Step  # docs/engine.md puts others in their place

    def __init__(self, model: torch.nn.Module, mask_id: int, stop_ids: Iterable[int], isolate_faults: bool = False):
        self.model = model
        self.mask_id = mask_id
        self.isolate_faults = isolate_faults
        self.full_attention = family_of_network(model).attention == "full"
        self.positions = longest_sequence(model.config)
        self.device = next(model.parameters()).device
        self.own_stop_ids = tuple(sorted(stop_ids))
        self.tensor_group = tensor_group_of(model)  # ranks that draw together: they must be given the same requests
        self.said: set[str] = set()  # what is said once
        dtype, (_, width) = next(model.parameters()).dtype, heads_and_width(model)
        self.kernel, why = attention_kernel(self.device, dtype, width, self.full_attention)
        if self.device.type == "cuda":
            where = " in a prefix cache's windows, bias for prompt and canvas" if self.full_attention else ""
            say_once(f"attention: {self.kernel}{where} ({why})")
        # on CUDA steps are launched without a look at the device, and replayed: their shapes must be few
        self.graphs = Graphs() if self.device.type == "cuda" else None
        self.watch = Watch(self.device)
        self.settings, self.stop_ids = Sampling(), self.own_stop_ids
        self.paced = False
        self.room = NOTHING_FITS  # until set_up
        self.slots: Slots | None = None
        self.cache: KeyValueCache | None = None
        self.denoise: Step | None = None
        self.asleep: tuple[int, int] | None = None  # tokens and width of the cache that sleep gave back
        self.forget_requests()

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
        queue = requests if isinstance(requests, Queue) else Queue(requests, shared=False)
        self.set_up(settings, queue, stop_ids)
        self.take_from(queue)
        while self.busy:
            if self.step() and on_step is not None:
                on_step()
            for finished in self.finished():
                yield finished.trajectory

    @torch.inference_mode()
    def set_up(
        self,
        settings: Sampling,
        expected: Iterable[Request],
        stop_ids: Iterable[int] | None = None,
        pace: int | None = None,
    ) -> None:
        """Forget the requests there are, and make room for the longest that fits of those that are expected.

        With a `pace`, the most requests that there will be at once, they make the denoising steps that `allow` gives
        them, and pause.
        """
        self.forget_requests()
        self.settings, self.paced = settings, pace is not None
        self.stop_ids = self.own_stop_ids if stop_ids is None else tuple(sorted(stop_ids))
        expected = expected if isinstance(expected, Queue) else Queue(expected, shared=False)
        if not expected:
            self.room = NOTHING_FITS
            return
        self.routes = RouteKeeper() if any(request.keep_routes for request in expected) else None
        self.check_settings(expected)
        cached = settings.use_cache or not self.full_attention
        rows = min(settings.max_active, expected.share() if pace is None else pace)
        ends = [self.sequence(0, request).canvas_end for request in expected]
        longest = rounded(min(max(ends), self.positions), self.device)
        tokens = self.cache_tokens(rows, longest) if cached else rows * longest
        known = [end for end in ends if end <= self.positions]
        fitting = [end for end in known if end <= tokens]
        if len(known) < len(ends):
            console.print(
                f"{len(ends) - len(known)} requests refused: their prompts leave no room in the model's "
                f"{self.positions} positions"
            )
        if len(fitting) < len(known):
            console.print(
                f"{len(known) - len(fitting)} requests refused: with its response one comes to {max(known)} tokens, "
                f"and the cache holds {tokens} (rollout.cache_tokens)"
            )
        longest = min(rounded(max(fitting, default=1), self.device), max(tokens, 1))
        self.room = Room(min(tokens, rows * longest), rows, longest)
        if fitting:
            self.reserve(cached)

    def longest_prompt(self, settings: Sampling) -> int:
        """Tokens of the longest prompt to which the network's positions leave room for a response."""
        block = settings.block_size
        return self.positions - block if self.full_attention else self.positions - self.positions % block - 1

    def add(self, requests: Request | Iterable[Request]) -> list[int]:
        """Put requests behind those that wait; returns the ids under which the engine speaks of them."""
        requests = [requests] if isinstance(requests, Request) else requests
        new = [self.sequence(id, request) for id, request in enumerate(requests, self.added)]
        self.waiting += new
        self.added += len(new)
        return [sequence.id for sequence in new]

    def go_on(self, unfinished: Unfinished) -> int:
        """Add a request with what it has drawn, under the same settings; returns its id."""
        (id,) = self.add(unfinished.request)
        sequence = self.waiting[-1]
        sequence.state, sequence.limit = Slots(**unfinished.state), unfinished.steps
        if not self.full_attention:
            sequence.reach = int(sequence.state.block_start) + self.settings.block_size
        if unfinished.routes is not None:
            sequence.routes = RouteLog(sequence.canvas_end, unfinished.routes)
        return id

    @torch.inference_mode()
    def allow(self, steps: int) -> None:
        """Let every request make so many denoising steps more; whoever has made them pauses.

        A prefix cache under full attention holds keys of a block's first step, so that there whole blocks are made: a
        response pauses at the first block that begins at or behind its limit.
        """
        if self.slots is not None:
            self.slots.go_on(steps)
        self.unlaunched = steps
        here = list(self.rows().values())
        for sequence in (*here, *self.waiting, *self.resting):
            sequence.limit += steps
            sequence.paused = sequence in self.resting and int(sequence.state.step) >= sequence.limit
        going = [sequence for sequence in self.resting if not sequence.paused]
        self.resting = [sequence for sequence in self.resting if sequence.paused]
        self.waiting = deque(sorted((*self.waiting, *going), key=lambda sequence: sequence.id))
        self.watch.forget()

    @property
    def paused(self) -> bool:
        """Whether no request may make a further step."""
        return not self.waiting and all(sequence.paused for sequence in self.rows().values())

    @torch.inference_mode()
    def suspend(self) -> list[Unfinished]:
        """Take out every request that has begun, with what it has drawn; what `finished` has not given back is lost."""
        if self.routes is not None:
            self.routes.flush()
        waiting = [*self.waiting, *self.resting]
        begun = sorted((*self.give_way(list(self.rows())), *waiting), key=lambda sequence: sequence.id)
        self.forget_requests()
        return [
            Unfinished(one.request, one.state.stores(), one.routes and one.routes.denoised(int(one.state.step)))
            for one in begun
            if one.state is not None
        ]

    def take_from(self, queue: Queue) -> None:
        """Add the requests of a queue, which ranks may share: each is taken when there is room for it."""
        self.queue = queue

    @torch.inference_mode()
    def cancel(self, id: int) -> None:
        """Drop a request, wherever it is; its slot is free at once."""
        self.waiting = deque(sequence for sequence in self.waiting if sequence.id != id)
        self.resting = [sequence for sequence in self.resting if sequence.id != id]
        self.done = [finished for finished in self.done if finished.id != id]
        rows = [row for row, sequence in self.rows().items() if sequence.id == id]
        if rows:
            self.remove(rows)

    @property
    def busy(self) -> bool:
        """Whether a request waits or is being drawn."""
        return bool(self.queue or self.waiting or self.resting or self.seated)

    @torch.inference_mode()
    def step(self) -> bool:
        """Let in whom there is room for, then one forward of every sequence's current block.

        False where no forward was made: nobody is there, or it failed for a sequence, which it ended.
        """
        with engine_attention(self.model), sampling_kernels(self.device):
            self.admit()
            if not self.seated:
                return False
            try:
                self.make_room()
                self.run_step()
            except Exception as error:
                if not self.isolate_faults:
                    raise
                self.close_gaps(len(self.rows()))
                self.fail(self.denoise.faulty_row(len(self.seated), self.reach()), error)
                return False
        return True

    @torch.inference_mode()
    def progress(self) -> list[Progress]:
        """How far the step brought each response that is being drawn, those that it finished included."""
        if not self.seated:
            return []
        slots = self.slots.first(len(self.seated))
        block = slots.block_start[:, None] + torch.arange(self.settings.block_size, device=self.device)
        tokens, masked = slots.tokens.gather(1, block), slots.masked.gather(1, block)
        seen, gains = torch.stack((block, tokens, masked), 1).tolist(), []
        for row, sequence in self.rows().items():
            positions, present, hidden = seen[row]
            prompt, start = len(sequence.request.prompt_ids), positions[0]
            final, logp = [], []
            if start - prompt > sequence.reported:
                new = slice(prompt + sequence.reported, start)
                final, logp = slots.tokens[row, new].tolist(), slots.figures[row, new, 0].tolist()
                sequence.reported = start - prompt
            current = list(zip(present, map(bool, hidden)))[max(0, prompt - start) :]  # without the prompt's remainder
            gains.append(Progress(sequence.id, final, logp, current))
        return gains

    @torch.inference_mode()
    def finished(self) -> list[Finished]:
        """Take out what is done, in the order in which it was."""
        self.collect()
        done, self.done = self.done, []
        return done

    def load_weights(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Copy weights into the model in place; a tensor that already is the model's own costs nothing."""
        load_weights(self.model, named)

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

    # ---- behind the door: requests wait and come in

    def forget_requests(self) -> None:
        """Begin anew with no request."""
        self.queue: Queue = Queue((), shared=False)  # requests to be taken when there is room
        self.waiting: deque[Sequence] = deque()  # among them those that had to give way
        self.resting: list[Sequence] = []  # paused, and without a row
        self.seated: list[Sequence | None] = []  # row by row; None where one has left, and no other has come yet
        self.done: list[Finished] = []  # not given back yet
        self.added = 0  # requests, so far
        self.routes: RouteKeeper | None = None  # where requests ask which experts their tokens were given to
        self.watch.forget()
        self.unlaunched = 0  # steps, of those that were allowed
        self.beginning = self.begun = 0  # rows that wait for their block's first forward; those that the last step let

    def check_settings(self, requests: Iterable[Request]) -> None:
        """Raise UserError for what cannot be sampled; say how a canvas is rounded."""
        settings, block = self.settings, self.settings.block_size
        if settings.max_token < 1:
            raise UserError(f"rollout.max_token: {settings.max_token} leaves no room for a response; give at least 1")
        if self.full_attention and any(not request.prompt_ids for request in requests):
            raise UserError("the prompt is empty: full attention needs at least one token before the response")
        if settings.logits_eos_inf and not end_of_sequence_ids(self.model.config):
            raise UserError("rollout.logits_eos_inf: the model's config.json names no eos_token_id; set it to false")
        if settings.remasking_strategy == "edit":
            if self.full_attention:
                raise UserError(
                    "rollout.remasking_strategy: 'edit' is of block attention, where finished blocks are final, and "
                    "this model's attention is full; take 'revoke', or low_confidence_dynamic"
                )
            if not getattr(self.model.config, "trained_to_edit", False):
                self.say_once(
                    "edit: the model's config.json does not say trained_to_edit; one that was not trained for it, as "
                    "LLaDA2.1 was, may replace what is right"
                )
        if self.full_attention and settings.max_token % block:
            self.say_once(
                f"max_token {settings.max_token} is no multiple of block_size {block}: responses are drawn on a "
                f"canvas of {-(-settings.max_token // block) * block} tokens and cut"
            )

    def sequence(self, id: int, request: Request) -> Sequence:
        """A request with where its first block begins and where the block that holds its length limit ends.

        Blocks are aligned to position 0 under block attention, to the response under full attention.
        """
        block, prompt = self.settings.block_size, len(request.prompt_ids)
        origin, limit = prompt if self.full_attention else 0, prompt + self.settings.max_token
        last = self.positions - (self.positions - origin) % block  # end of the last whole block that the network knows
        if prompt < last < limit:
            limit = last
            self.say_once(
                f"max_token {self.settings.max_token}: the model has {self.positions} positions, prompt and response "
                "together; responses to long prompts are cut there"
            )
        start, end = prompt - (prompt - origin) % block, limit + (origin - limit) % block
        reach, allowed = end if self.full_attention else start + block, 0 if self.paced else NO_LIMIT
        return Sequence(id, request, start, limit, end, reach, limit=allowed)

    def cache_tokens(self, rows: int, longest: int) -> int:
        """Positions for which keys may be kept: all of the rows', less where the config or the memory says so."""
        settings, wanted = self.settings, rows * longest
        if settings.cache_tokens is not None:
            return min(settings.cache_tokens, wanted)
        if self.cache is not None and self.cache.tokens >= wanted:
            return wanted
        self.sleep()  # so that the old cache's memory counts as free
        drawing = Drawing(rows, settings.block_size, longest, self.full_attention, settings.top_k, settings.top_p)
        size = size_of({name: getattr(self.model.config, name, None) for name in NETWORK_SIZES})
        word = next(self.model.parameters()).element_size()
        return affordable_tokens(self.model, wanted, sampling_bytes(size, drawing, word))

    def reserve(self, cached: bool) -> None:
        """Make slots and cache, unless those of the last use are large enough."""
        room, rows = self.room, self.room.slots()
        overwritten = 0
        if overwrites(find_strategy(self.settings.remasking_strategy)):
            overwritten = OVERWRITTEN_PER_TOKEN * room.longest + self.settings.block_size
        needed = rows, room.longest, overwritten
        if self.slots is None or any(have < need for have, need in zip(self.slots.sizes(), needed)):
            self.forget_graphs()
            self.slots = Slots.empty(rows, room.longest, self.device, overwritten)
        if not cached:
            self.cache = None  # one of an earlier use may be too small for these sequences
        elif self.cache is None or self.cache.tokens < room.tokens:
            self.forget_graphs()
            self.cache = None  # the old one is freed before the new one is made
            self.cache = self.cache_class(self.model, room.tokens, room.width(1))
        else:
            self.cache.resize(room.width(1), rows=0)
        self.free(torch.arange(len(self.slots.finished), device=self.device))
        settings, fixed = self.settings, self.graphs is not None
        positions, compiled, routes = self.slots.tokens.shape[1], settings.compile_kernels and fixed, self.routes
        network = Network(self.model, positions, self.kernel, compiled, keep_routes=routes is not None)
        if network.rounds_logits:
            self.say_once(f"logits: rounded to {network.dtype}, as {network.rounds_logits}")
        self.denoise = self.step_class(
            network, self.slots, self.cache, settings, self.mask_id, self.stop_ids, rows, fixed, self.paced
        )
        self.watch.every = 1 if self.denoise.waits else 4  # a row that begins a block waits until it is seen

    def admit(self) -> None:
        """Fill free slots, the oldest request first, and prefill what the cache must hold.

        Requests that no room could ever hold are refused. Where all that are being drawn pause, they give way to those
        who wait.
        """
        if self.paced and self.waiting and self.seated and all(sequence.paused for sequence in self.rows().values()):
            self.say_once(
                "the cache, or rollout.max_active, holds fewer responses than a rank draws at once: they take turns, "
                "and their keys are computed anew each time; lower rollout.in_flight"
            )
            self.resting += self.give_way(list(self.rows()))
        new, reaches = [], [sequence.reach for sequence in self.rows().values()]
        while len(reaches) < self.room.rows and (self.waiting or self.queue):
            if not self.waiting:
                self.add(self.queue.take(1))  # of a shared queue, nothing where other ranks took what was left
                continue
            oldest = self.waiting[0]
            if oldest.canvas_end > self.room.longest:
                refusal = Refusal(oldest.canvas_end, self.room.longest)
                self.done.append(Finished(oldest.id, refusal_of(oldest.request, self.settings), refusal))
            elif self.room.fits([*reaches, oldest.reach]):
                new.append(oldest)
                reaches.append(oldest.reach)
            else:
                break
            self.waiting.popleft()
        if new:
            self.let_in(new)
        # on CUDA a step is computed for the next round number of rows, whether they are in use or not
        self.close_gaps(len(self.rows()) if self.graphs is None else bucket(len(self.rows())))

    def let_in(self, new: list[Sequence]) -> None:
        """Seat sequences; where that fails one after the other, so that a fault concerns one."""
        try:
            self.seat(new)
        except Exception as error:
            if not self.isolate_faults:
                raise
            rows = [row for row, sequence in self.rows().items() if sequence in new]
            if rows:
                self.remove(rows)
            if len(new) == 1:
                self.done.append(Finished(new[0].id, None, error=error))
                return
            for sequence in new:
                self.let_in([sequence])

    def seat(self, new: list[Sequence]) -> None:
        """Give new sequences, and those that come back, rows: those first that others left."""
        self.watch.forget()
        if self.cache is not None:
            longest = max(sequence.reach for sequence in (*self.rows().values(), *new))
            rows = max(len(self.seated), len(self.rows()) + len(new))
            if longest > self.cache.width or rows * self.cache.width > self.room.tokens:
                self.close_gaps(len(self.rows()))
                self.cache.resize(self.room.width(longest), len(self.seated))
        empty = [row for row, sequence in enumerate(self.seated) if sequence is None]
        rows = [*empty, *range(len(self.seated), len(self.seated) + len(new))][: len(new)]
        self.slots.begin(rows, new, self.mask_id)
        self.seated += [None] * (max(rows) + 1 - len(self.seated))
        for row, sequence in zip(rows, new):
            self.seated[row] = sequence
        self.beginning += len(new)
        if not self.full_attention:
            prefixes = {row: sequence.prefix() for row, sequence in self.rows().items()}
            network, block = self.denoise.network, self.settings.block_size
            experts = block_attention.prefill(network, self.cache, self.slots, prefixes, rows, block)
            if self.routes is not None:
                self.log_prefixes(prefixes, rows, experts)
        for sequence in new:
            sequence.state = None

    def log_prefixes(
        self, prefixes: dict[int, tuple[int, ...]], new: list[int], experts: dict[tuple[int, ...], Tensor]
    ) -> None:
        """Begin the logs of the rows `new`; what was not computed of their prefixes is another row's."""
        self.routes.flush()  # of a sequence that comes back, what follows is later
        known = {prefix: given.cpu().numpy() for prefix, given in experts.items()}
        for row, sequence in self.rows().items():
            if row not in new and prefixes[row]:
                known.setdefault(prefixes[row], sequence.routes.committed[: len(prefixes[row])])
        for row in new:
            sequence = self.seated[row]
            sequence.routes = sequence.routes or RouteLog(sequence.canvas_end)
            if prefixes[row]:
                sequence.routes.commit(0, known[prefixes[row]])

    def make_room(self) -> None:
        """Widen the slots for sequences that outgrow them; where the cache cannot, the youngest wait in the queue.

        They keep what they have drawn, and their keys are computed anew when there is room.
        """
        if self.cache is None or self.reach() <= self.cache.width:
            return
        rows = self.rows()
        staying = sorted(rows, key=lambda row: rows[row].id)
        while not self.room.fits([rows[row].reach for row in staying]):
            (sequence,) = self.give_way([staying.pop()])
            if sequence.paused:
                self.resting.append(sequence)
            else:
                self.waiting.appendleft(sequence)
        self.close_gaps(len(staying))
        self.cache.resize(self.room.width(self.reach()), len(staying))

    def give_way(self, rows: list[int]) -> list[Sequence]:
        """Take sequences out of their rows, with what they have drawn."""
        if not rows:
            return []
        index, size = self.slots.index(rows), self.settings.block_size
        leaving = [self.seated[row] for row in rows]
        for sequence, state in zip(leaving, self.slots.states(index, size)):
            sequence.state = state
            if not self.full_attention:
                sequence.reach = int(state.block_start) + size
        self.remove(rows, index)
        return leaving

    # ---- behind the door: sequences are denoised and leave

    def run_step(self) -> None:
        """One forward, by its CUDA graph where there are graphs."""
        rows, seen = len(self.seated), self.reach()
        self.unlaunched -= 1
        if self.graphs is None:
            self.denoise(rows, seen)
        else:
            self.begun, self.beginning = self.graphs.run(self.denoise, rows, seen, min(self.beginning, rows)), 0
        if self.routes is not None:
            self.routes.note([sequence and sequence.routes for sequence in self.seated], self.denoise.routes)

    def rows(self) -> dict[int, Sequence]:
        """The sequences that are being drawn, by their rows."""
        return {row: sequence for row, sequence in enumerate(self.seated) if sequence is not None}

    def reach(self) -> int:
        """The next forward writes nothing at or behind this position."""
        return max(sequence.reach for sequence in self.rows().values())

    def fail(self, row: int, error: Exception) -> None:
        """End a sequence that cannot go on."""
        self.done.append(Finished(self.seated[row].id, None, error=error))
        self.remove([row])

    def collect(self) -> None:
        """Take finished sequences out; their rows stay empty until others come."""
        if not self.seated:
            return
        block, rows = self.settings.block_size, self.rows()
        slots = self.slots.first(len(self.seated))
        if self.paced and self.unlaunched <= 0:  # most pause by now: worth waiting for the device
            self.watch.forget()
            look = slots.status().tolist(), 0
        else:
            look = self.watch.look(slots)
        if look is None:
            for sequence in rows.values():
                sequence.reach = min(sequence.reach + block, sequence.canvas_end)
            return
        (finished, paused, stuck, starts, begins), age = look
        for row, sequence in rows.items():
            sequence.paused = bool(paused[row])
        self.beginning = max(0, sum(begins) - self.begun)
        name, most = self.settings.remasking_strategy, self.denoise.most_forwards
        fault = UserError(
            f"rollout.remasking_strategy: {name!r} wrote into the prompt, or did not end a block in {most} forwards; "
            "each must unmask more than it masks again, and one without masks must end"
            if self.denoise.overwrites
            else f"rollout.remasking_strategy: {name!r} unmasked nothing in some step; "
            "it must choose at least one masked position of every row that has any"
        )
        if any(stuck) and not self.isolate_faults:
            raise fault
        if not self.full_attention:
            for row, sequence in rows.items():
                sequence.reach = min(starts[row] + (1 + age) * block, sequence.canvas_end)
        ended = [row for row in rows if finished[row] and not paused[row] and not stuck[row]]
        if ended:
            index = self.slots.index(ended)
            left = self.slots.select(index)
            if self.routes is not None:
                self.routes.flush()
            for number, sequence in enumerate(rows[row] for row in ended):
                trajectory = trajectory_of(
                    left, number, sequence.request, self.settings, self.stop_ids, self.full_attention
                )
                if sequence.request.keep_routes:
                    length = len(trajectory.prompt_ids) + len(trajectory.response_ids)
                    trajectory.routes = sequence.routes.record(length, trajectory.steps)
                self.done.append(Finished(sequence.id, trajectory))
            self.remove(ended, index)
        for row in rows:
            if stuck[row]:
                self.fail(row, fault)

    def remove(self, rows: list[int], index: Tensor | None = None) -> None:
        """Take sequences out of their rows, which stay empty; `index`: their numbers, where they are on the device."""
        self.free(self.slots.index(rows) if index is None else index)
        for row in rows:
            self.seated[row] = None
        self.trim()
        self.watch.forget()

    def close_gaps(self, rows: int) -> None:
        """Move sequences that stand behind the first `rows` rows, which have room for all, into empty ones there."""
        sources = [row for row in self.rows() if row >= rows]
        if not sources:
            return
        targets = [row for row, sequence in enumerate(self.seated) if sequence is None][: len(sources)]
        index = self.slots.index(sources + targets)
        self.slots.move(*index.chunk(2))
        if self.cache is not None:
            longest = max(self.seated[row].reach for row in sources)
            self.cache.copy(*index.chunk(2), min(longest, self.cache.width))
        for source, target in zip(sources, targets):
            self.seated[target], self.seated[source] = self.seated[source], None
        self.free(index[: len(sources)])
        self.trim()
        self.watch.forget()

    def trim(self) -> None:
        """No row behind the last sequence counts."""
        while self.seated and self.seated[-1] is None:
            self.seated.pop()

    def free(self, rows: Tensor) -> None:
        """Take rows out of use: they stand at the first block that a sequence could have."""
        start = int(self.full_attention)  # where logits are shifted, a prediction is read one position earlier
        self.slots.free(rows, start, start + self.settings.block_size)

    def forget_graphs(self) -> None:
        """Drop what speaks of memory that is about to go."""
        self.denoise = None
        if self.graphs is not None:
            self.graphs.forget()

    def say_once(self, message: str) -> None:
        """Print a line once in the engine's life."""
        if message not in self.said:
            self.said.add(message)
            console.print(message)
