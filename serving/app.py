"""The web application: /v1/chat/completions, /v1/models, /health, and a page on which to watch answers appear."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from common.schema import ServeConfig
from common.trajectory import Request as EngineRequest
from models import LoadedModel
from models.prompts import stop_ids_of
from serving.api import ApiError, Ask, Text, logprobs_of, read_ask, usage_of
from serving.loop import EngineLoop, Event, Stream

PAGE = Path(__file__).with_name("chat.html")
LARGEST_BODY = 10 << 20  # bytes
MOST_WAITING = 4096  # streams; more are told to come back later


@dataclass
class Choice:
    """One of the n responses to a request, as far as it has come."""

    index: int
    text: Text
    parts: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    finish: str | None = None

    def take(self, event: Event) -> str:
        """Add an event; returns the new text."""
        if event.error:
            raise ApiError(event.error, status=event.status)
        self.ids += event.ids
        self.logp += event.logp
        text = self.text.add(event.ids, last=bool(event.finish)) if event.ids or event.finish else ""
        self.parts.append(text)
        self.finish = "stop" if self.text.stopped else event.finish or None
        return text


class Server:
    """What the handlers share."""

    def __init__(self, config: ServeConfig, loaded: LoadedModel, key: str):
        self.config, self.loaded, self.key = config, loaded, key
        self.name = config.served_name or Path(config.model).name
        stops = stop_ids_of(loaded, config.stop_token_list)
        self.loop = EngineLoop(loaded, config, stops, config.max_prompt_len, self.deliver)
        self.events: asyncio.AbstractEventLoop | None = None

    def deliver(self, events: list[tuple[Stream, Event]]) -> None:
        """Bring a step's events from the engine's thread to the event loop, in one go."""
        if events:
            self.events.call_soon_threadsafe(lambda: [stream.emit(event) for stream, event in events])

    @asynccontextmanager
    async def drawing(self, ask: Ask) -> AsyncIterator[tuple[asyncio.Queue, list[Stream]]]:
        """Have the responses drawn; yields the queue of (index, event) and the streams. Leaving frees the slots."""
        if self.loop.counts()["waiting"] > MOST_WAITING:
            raise ApiError("too many requests are waiting; come back later", status=429)
        queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        streams = [
            Stream(
                EngineRequest("prompt", ask.prompt_ids, index, ask.seed),
                ask.settings,
                ask.limit,
                lambda event, index=index: queue.put_nowait((index, event)),
                watched=ask.stream and ask.denoising,
            )
            for index in range(ask.n)
        ]
        self.loop.submit(streams)
        try:
            yield queue, streams
        finally:
            self.loop.cancel(streams)

    async def run(self, ask: Ask) -> AsyncIterator[tuple[Choice, Event, str]]:
        """Every event with its choice and new text, until all choices are finished."""
        choices = [Choice(index, Text(self.loaded.tokenizer, ask.stop)) for index in range(ask.n)]
        async with self.drawing(ask) as (queue, streams):
            while any(choice.finish is None for choice in choices):
                index, event = await queue.get()
                choice = choices[index]
                if choice.finish is not None:
                    continue
                text = choice.take(event)
                if choice.finish is not None:
                    self.loop.cancel([streams[index]])
                yield choice, event, text

    async def whole(self, ask: Ask) -> dict[str, Any]:
        """The response to a request that does not stream."""
        finished: dict[int, Choice] = {}
        async for choice, _, _ in self.run(ask):
            finished[choice.index] = choice
        rows = [
            {
                "index": index,
                "message": {"role": "assistant", "content": "".join(choice.parts), "refusal": None},
                "logprobs": logprobs_of(self.loaded.tokenizer, choice.ids, choice.logp) if ask.logprobs else None,
                "finish_reason": choice.finish,
            }
            for index, choice in sorted(finished.items())
        ]
        tokens = sum(len(choice.ids) for choice in finished.values())
        return self.head(ask, "chat.completion") | {"choices": rows, "usage": usage_of(len(ask.prompt_ids), tokens)}

    async def chunks(self, ask: Ask) -> AsyncIterator[str]:
        """Server-sent events: the text of a block when it is finished, and each step for who watches."""
        head, tokens = self.head(ask, "chat.completion.chunk"), 0
        for index in range(ask.n):
            yield sse(head | {"choices": [_delta(index, {"role": "assistant", "content": ""})]})
        try:
            async for choice, event, text in self.run(ask):
                tokens += len(event.ids)
                row = _delta(choice.index, {"content": text} if text else {}, choice.finish)
                if ask.logprobs and event.ids:
                    row["logprobs"] = logprobs_of(self.loaded.tokenizer, event.ids, event.logp)
                if event.block is not None and not choice.finish:
                    row["denoising"] = self.pieces(event.block)
                if text or choice.finish or "denoising" in row or "logprobs" in row:
                    yield sse(head | {"choices": [row]})
        except ApiError as error:  # the headers are sent: the error goes into the stream
            yield sse(error.body)
            return
        if ask.usage:
            yield sse(head | {"choices": [], "usage": usage_of(len(ask.prompt_ids), tokens)})
        yield "data: [DONE]\n\n"

    def pieces(self, block: list[tuple[int, bool]]) -> list[str | None]:
        """The text of each token of a block, null for a mask."""
        special = set(self.loaded.tokenizer.all_special_ids)
        decode = self.loaded.tokenizer.decode
        return [None if masked else "" if token in special else decode([token]) for token, masked in block]

    def head(self, ask: Ask, kind: str) -> dict[str, Any]:
        """What every answer begins with."""
        return {"id": ask.id, "object": kind, "created": ask.created, "model": self.name}

    def check_key(self, request: Request) -> None:
        """ApiError unless the request carries the key, where there is one."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.key and not hmac.compare_digest(given.encode(), self.key.encode()):
            raise ApiError("Incorrect API key provided", status=401, code="invalid_api_key")


def _delta(index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}


def sse(value: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def read_body(request: Request) -> Any:
    """The request's JSON; ApiError where it is none, or too much."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise ApiError("the content type must be application/json", status=415)
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LARGEST_BODY:
            raise ApiError(f"the body is larger than {LARGEST_BODY >> 20} MB", status=413)
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not valid JSON: {error}") from None


async def unless_left(request: Request, work: Any) -> Any:
    """The result of `work`, cancelled when the client leaves."""
    task = asyncio.ensure_future(work)

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.ensure_future(left())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        for one in (task, watch):
            one.cancel()


def make_app(config: ServeConfig, loaded: LoadedModel, key: str = "") -> FastAPI:
    """The application; its engine's thread lives as long as it does."""
    server = Server(config, loaded, key)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server.events = asyncio.get_running_loop()
        server.loop.thread.start()
        yield
        server.loop.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.server = server

    @app.exception_handler(ApiError)
    async def told(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status)

    @app.exception_handler(StarletteHTTPException)
    async def not_found(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(ApiError(f"{request.method} {request.url.path}: {error.detail}").body, error.status_code)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": server.name, **server.loop.counts()}

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        server.check_key(request)
        return {"object": "list", "data": [{"id": server.name, "object": "model", "created": 0, "owned_by": "local"}]}

    @app.post("/v1/chat/completions")
    async def completions(request: Request) -> Response:
        server.check_key(request)
        ask = read_ask(await read_body(request), config, loaded, server.name)
        if ask.stream:
            return StreamingResponse(server.chunks(ask), media_type="text/event-stream")
        whole = await unless_left(request, server.whole(ask))
        return JSONResponse(whole) if whole is not None else Response(status_code=499)

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    return app
