"""The engine as a server uses it: one thread that steps while there is anything to denoise, and takes requests between.

All requests that share a forward share their sampling settings. Those with others wait until the slots are empty; once
one has waited `PATIENCE` seconds, nobody is let in before it.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from common.jobs import ServeConfig
from common.schema import Sampling
from common.trajectory import Request
from models import LoadedModel
from models.prompts import stop_ids_of
from sample.engine import Engine
from sample.slots import Progress

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
    queue: asyncio.Queue  # where the server's event loop waits for (stream, event)
    watched: bool = False  # whether the client wants every step
    arrived: float = field(default_factory=time.monotonic)
    sent: int = 0
    cancelled: bool = False


class EngineLoop:
    """Takes streams from any thread; `deliver` hands a step's events to the server's event loop."""

    def __init__(self, config: ServeConfig, loaded: LoadedModel, deliver: Callable[[list[tuple[Stream, Event]]], None]):
        self.engine = Engine(loaded.model, loaded.mask_id, loaded.stop_ids, isolate_faults=True)
        self.config = config  # its max_active and max_token bound what is reserved
        self.stop_ids = stop_ids_of(loaded, config.stop_token_list)
        self.deliver = deliver
        self.waiting: deque[Stream] = deque()
        self.active: dict[int, Stream] = {}  # in the engine, by its ids
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
        """Streams in the engine and waiting."""
        return {"active": len(self.active), "waiting": len(self.waiting)}

    # ---- the thread

    def run(self) -> None:
        """Step until closed. What fails for one stream ends that one; what fails for all ends those in the engine."""
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
        fitting = fitting[: self.config.max_active - len(self.active)]
        self.waiting = deque(stream for stream in self.waiting if stream not in fitting)
        self.active |= zip(self.engine.add(stream.request for stream in fitting), fitting)

    def open(self, settings: Sampling) -> None:
        """Set the engine up for these settings, with room for as many of the longest requests as it may hold."""
        room = min(self.config.max_prompt_len, self.engine.longest_prompt(settings))
        if settings.cache_tokens is not None:  # what is left beside a response and its last block's tail
            room = min(room, settings.cache_tokens - settings.max_token - settings.block_size + 1)
        longest = Request("", [0] * max(1, room))
        self.engine.set_up(settings, [longest] * self.config.max_active, self.stop_ids)
        self.settings = settings

    def step(self) -> None:
        """One step of the engine, and what it brought each stream."""
        if self.settings is None:  # it could not be set up
            return
        if self.engine.step():
            self.news += [event for progress in self.engine.progress() if (event := self.gain(progress))]
        for id in [id for id, stream in self.active.items() if stream.cancelled]:
            self.engine.cancel(id)
            del self.active[id]
        faults: dict[Exception, list[Stream]] = {}
        for finished in self.engine.finished():
            stream, trajectory = self.active.pop(finished.id), finished.trajectory
            if finished.error is not None:
                faults.setdefault(finished.error, []).append(stream)
            elif finished.refusal is not None:
                prompt, most, refusal = len(stream.request.prompt_ids), self.settings.max_token, finished.refusal
                told = (
                    f"the prompt comes to {prompt} tokens and a response to up to {most} (max_token), in whole blocks "
                    f"{refusal.needed}; this server has room for {self.settings.cache_tokens or refusal.room} "
                    "(cache_tokens): send a shorter prompt"
                )
                self.news.append((stream, Event(error=told, status=400)))
            else:
                end = min(trajectory.length, stream.limit)
                finish = "length" if trajectory.truncated or trajectory.length > stream.limit else "stop"
                ids, logp = trajectory.response_ids[stream.sent : end], trajectory.logp[stream.sent : end]
                self.news.append((stream, Event(ids, logp, finish=finish)))
        for error, streams in faults.items():
            self.fail(streams, error)

    def gain(self, progress: Progress) -> tuple[Stream, Event] | None:
        """What a step brought a stream: the tokens of finished blocks, and the present block for who watches."""
        stream = self.active[progress.id]
        if stream.cancelled or not (progress.tokens or stream.watched):
            return None
        left = stream.limit - stream.sent
        stream.sent += len(progress.tokens[:left])
        full = stream.sent >= stream.limit  # the client may have asked for less than the engine would draw
        if full:
            stream.cancelled = True
        block = progress.block if stream.watched else None
        return stream, Event(progress.tokens[:left], progress.logp[:left], block, "length" if full else "")
