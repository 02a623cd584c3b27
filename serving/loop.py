"""The engine as a server uses it: one thread that steps while there is anything to denoise, and takes requests between.

All requests that share a forward share their sampling settings. Those with others wait until the slots are empty; once
one has waited `PATIENCE` seconds, nobody is let in before it.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from common.ranks import Queue
from common.schema import Sampling
from common.trajectory import Request
from models import LoadedModel
from sample.attention import engine_attention
from sample.engine import Engine
from sample.slots import Ticket

log = logging.getLogger(__name__)

PATIENCE = 2.0  # seconds


@dataclass(frozen=True)
class Event:
    """What became of a stream in one step."""

    ids: list[int] = field(default_factory=list)  # tokens that will not change any more
    logp: list[float] = field(default_factory=list)
    block: list[tuple[int, bool]] | None = None  # the block being denoised, (token, masked), where it is asked for
    finish: str = ""  # "stop" or "length" with the last tokens
    error: str = ""
    status: int = 500  # of the error, as HTTP counts them


@dataclass(eq=False)
class Stream:
    """One response being drawn for a client."""

    request: Request
    settings: Sampling
    limit: int  # tokens
    emit: Callable[[Event], None]  # called in the event loop of the server
    watched: bool = False  # whether the client wants every step
    arrived: float = field(default_factory=time.monotonic)
    sent: int = 0
    cancelled: bool = False


class EngineLoop:
    """Takes streams from any thread; `deliver` hands a step's events to the server's event loop."""

    def __init__(
        self,
        loaded: LoadedModel,
        settings: Sampling,
        stop_ids: Iterable[int],
        max_prompt_len: int,
        deliver: Callable[[list[tuple[Stream, Event]]], None],
    ):
        self.engine = Engine(loaded.model, loaded.mask_id, loaded.stop_ids)
        self.room = settings  # its max_active and max_token bound what is reserved
        self.stop_ids = set(stop_ids)
        self.full_attention = loaded.family.attention == "full"
        self.max_prompt_len = max_prompt_len
        self.deliver = deliver
        self.waiting: deque[Stream] = deque()
        self.active: dict[int, Stream] = {}  # by the identity of their engine request
        self.settings: Sampling | None = None  # of the streams in the engine; None: it must be set up anew
        self.news: list[tuple[Stream, Event]] = []  # not delivered yet
        self.changed = threading.Condition()
        self.closing = False
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)

    # ---- called by the server

    def submit(self, streams: Iterable[Stream]) -> None:
        """Queue streams."""
        with self.changed:
            self.waiting.extend(streams)
            self.changed.notify()

    def cancel(self, streams: Iterable[Stream]) -> None:
        """Drop streams, wherever they are; their slots are free after the step that is running."""
        with self.changed:
            for stream in streams:
                stream.cancelled = True
            self.waiting = deque(stream for stream in self.waiting if not stream.cancelled)
            self.changed.notify()

    def close(self) -> None:
        """End the thread."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join()

    def counts(self) -> dict[str, int]:
        """Streams in slots and waiting."""
        return {"active": len(self.active), "waiting": len(self.waiting)}

    # ---- the thread

    @torch.inference_mode()
    def run(self) -> None:
        """Step until closed. What fails for one stream ends that one; what fails for all ends those in the engine."""
        with engine_attention(self.engine.model):
            self.serve()

    def serve(self) -> None:
        """What `run` does within torch's and the engine's contexts."""
        while True:
            with self.changed:
                while not (self.closing or self.waiting or self.active):
                    self.changed.wait()
                if self.closing:
                    return
                self.take_in()
            try:
                self.step()
            except Exception as error:  # whatever it was, those who come next are served
                lost, self.active, self.settings = list(self.active.values()), {}, None
                self.fail(lost, error)
            news, self.news = self.news, []
            self.deliver(news)

    def fail(self, streams: list[Stream], error: Exception) -> None:
        """Tell streams that are out of the engine, and the log, what ended them."""
        told = f"sampling failed: {type(error).__name__}: {error}"
        log.error("%d of the responses being drawn ended: %s", len(streams), told, exc_info=error)
        self.news += [(stream, Event(error=told)) for stream in streams]

    def take_in(self) -> None:
        """Hand waiting streams of the present settings to the engine; switch settings when it is empty."""
        if not self.waiting:
            return
        if not self.active and self.waiting[0].settings != self.settings:
            settings, self.settings = self.waiting[0].settings, None
            try:
                self.open(settings)
            except Exception as error:  # it concerns those who ask for these settings
                lost = [stream for stream in self.waiting if stream.settings == settings]
                self.waiting = deque(stream for stream in self.waiting if stream.settings != settings)
                self.fail(lost, error)
                return
        other = next((stream for stream in self.waiting if stream.settings != self.settings), None)
        if other is not None and time.monotonic() - other.arrived > PATIENCE:
            return
        fitting = [stream for stream in self.waiting if stream.settings == self.settings]
        fitting = fitting[: self.room.max_active - len(self.active)]
        for stream in fitting:
            self.waiting.remove(stream)
            self.active[id(stream.request)] = stream
        self.engine.queue = Queue([*self.queued(), *(stream.request for stream in fitting)], shared=False)

    def queued(self) -> list[Request]:
        """What the engine has not taken yet."""
        return list(self.engine.queue.items[self.engine.queue.next :])

    def open(self, settings: Sampling) -> None:
        """Set the engine up for these settings, with room for as many of the longest requests as it may hold."""
        room = min(self.max_prompt_len, self.engine.longest_prompt(settings))
        if settings.cache_tokens is not None:  # what is left beside a response and its last block's tail
            room = min(room, settings.cache_tokens - settings.max_token - settings.block_size + 1)
        longest = Request("", [0] * max(1, room))
        self.engine.start([longest] * self.room.max_active, settings, self.stop_ids)
        self.engine.queue = Queue([], shared=False)
        self.settings = settings

    def step(self) -> None:
        """One step of the engine, and what it brought each stream."""
        engine = self.engine
        if self.settings is None:  # it could not be set up
            return
        self.admit()
        if not engine.active:
            return
        try:
            engine.step()
        except Exception as error:
            self.drop([self.culprit()], error)
            return
        seated = [ticket.request for ticket in engine.active]
        self.news += self.progress(seated)
        for row, request in enumerate(seated):
            if self.active[id(request)].cancelled:
                engine.slots.finished[row] = True  # the engine then frees the slot as after any response
        try:
            done = engine.collect()
        except Exception as error:
            stuck = engine.slots.first(len(seated)).stuck.nonzero()[:, 0].tolist()
            if not stuck:
                raise
            self.drop(stuck, error)
            return
        still = {id(ticket.request) for ticket in engine.active}
        for request, trajectory in zip([one for one in seated if id(one) not in still], done):
            stream = self.active.pop(id(request))
            if not stream.cancelled:
                end = min(trajectory.length, stream.limit)
                finish = trajectory.finish_reason if trajectory.length <= stream.limit else "length"
                ids, logp = trajectory.response_ids[stream.sent : end], trajectory.logp[stream.sent : end]
                self.news.append((stream, Event(ids, logp, finish=finish)))

    def admit(self) -> None:
        """Have the engine seat those who wait. What it refuses, or fails to seat, is told so and the rest goes on."""
        engine, seated = self.engine, len(self.engine.active)
        offered: list[Ticket | Request] = [*engine.waiting, *self.queued()]
        fault, refused = None, []
        try:
            refused = engine.admit()
        except Exception as error:
            fault = error
            while len(engine.active) > seated:
                engine.remove(len(engine.active) - 1)
        if fault is None and not refused:
            return
        held = [ticket.request for ticket in (*engine.active, *engine.waiting)]
        held = {id(request) for request in (*held, *self.queued())}
        gone = [one for one in offered if id(getattr(one, "request", one)) not in held]
        if fault is not None and len(gone) != 1:
            self.admit_singly(gone, fault)
            return
        streams = [self.active.pop(id(getattr(one, "request", one))) for one in gone]
        if fault is not None:
            self.fail(streams, fault)
            return
        self.news += [(stream, Event(error=self.too_long(stream), status=400)) for stream in streams]

    def admit_singly(self, those: list[Ticket | Request], fault: Exception) -> None:
        """Seat one after the other those that could not be seated together, so that one fault concerns one."""
        if not those:
            raise fault
        engine, kept = self.engine, deque()
        waiting, queued = engine.waiting, engine.queue
        for one in those:
            engine.waiting = deque([one] if isinstance(one, Ticket) else [])
            engine.queue = Queue([] if isinstance(one, Ticket) else [one], shared=False)
            self.admit()
            kept += engine.waiting  # there was no room
        engine.waiting, engine.queue = kept + waiting, queued

    def culprit(self) -> int:
        """The row that a step fails for: the last of the fewest first rows with which it fails.

        Rows do not see each other, so that without it the others go on; memory that runs out has no better answer.
        """
        slots = self.engine.slots
        rows = len(self.engine.active)
        before = [slots.select([row]) for row in range(rows)]
        works, fails = 0, rows
        while fails - works > 1:
            middle = (works + fails) // 2
            try:
                self.engine.step(middle)
                works = middle
            except Exception:  # what it is was seen before; which rows it takes is what is asked
                fails = middle
            for row, state in enumerate(before):
                slots.put(row, state)
        return fails - 1

    def drop(self, rows: list[int], error: Exception) -> None:
        """Take sequences that cannot go on out of the engine."""
        streams = [self.active.pop(id(self.engine.active[row].request)) for row in rows]
        for row in sorted(rows, reverse=True):
            self.engine.remove(row)
        self.fail(streams, error)

    def too_long(self, stream: Stream) -> str:
        """Why the engine turned a request away: its cache could never hold it."""
        prompt, settings = len(stream.request.prompt_ids), stream.settings
        whole = self.engine.ticket(0, stream.request).canvas_end
        return (
            f"the prompt comes to {prompt} tokens and a response to up to {settings.max_token} (max_token), in whole "
            f"blocks {whole}; this server has room for {settings.cache_tokens or self.engine.room.longest} "
            "(cache_tokens): send a shorter prompt"
        )

    def progress(self, seated: list[Request]) -> list[tuple[Stream, Event]]:
        """What each stream gained: the tokens of blocks that were finished, and the present block for who watches."""
        slots, events = self.engine.slots.first(len(seated)), []
        starts = slots.block_start.tolist()
        for row, (request, start) in enumerate(zip(seated, starts)):
            stream, prompt = self.active[id(request)], len(request.prompt_ids)
            clean = start - prompt
            if stream.cancelled or (clean <= stream.sent and not stream.watched):
                continue
            end, new = min(clean, stream.limit), slice(prompt + stream.sent, prompt + min(clean, stream.limit))
            ids, logp = slots.tokens[row, new].tolist(), slots.figures[row, new, 0].tolist()
            stop = next((index for index, token in enumerate(ids) if token in self.stop_ids), None)
            if stop is not None:  # the engine has seen it too, and gives the rest with the finished response
                continue
            block = None
            if stream.watched:
                place = slice(max(start, prompt), start + self.settings.block_size)
                block = list(zip(slots.tokens[row, place].tolist(), slots.masked[row, place].tolist()))
            full = clean >= stream.limit  # the client asked for less than the engine would draw
            events.append((stream, Event(ids, logp, block, "length" if full else "")))
            stream.sent = max(stream.sent, end)
            stream.cancelled |= full
        return events
