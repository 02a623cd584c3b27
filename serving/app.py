"""The web application: /v1/chat/completions, /v1/completions, /v1/models, /health, and a page to watch answers on."""

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.cors import CORSMiddleware

from common.schema import ServeConfig
from common.trajectory import Request as EngineRequest
from models import LoadedModel
from models.prompts import stop_ids_of
from serving.answers import (
    Text,
    Token,
    chat_choice,
    chat_delta,
    chat_logprobs,
    place,
    text_choice,
    text_logprobs,
    usage_of,
)
from serving.api import ApiError, Ask, no_such_model, read_chat, read_text
from serving.loop import EngineLoop, Event, Stream

PAGE = Path(__file__).with_name("chat.html")
LARGEST_BODY = 10 << 20  # bytes
MOST_WAITING = 4096  # streams; more are told to come back later


@dataclass
class Choice:
    """One of the responses to a request, as far as it has come."""

    index: int
    text: Text
    traced: bool  # whether its log-probabilities are asked for
    parts: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)  # of the text in `parts`
    drawn: int = 0  # tokens
    finish: str | None = None

    def take(self, event: Event) -> tuple[str, list[Token]]:
        """Add an event; returns the new text with its tokens."""
        if event.error:
            raise ApiError(event.error, status=event.status)
        self.drawn += len(event.ids)
        logp = event.logp if self.traced else ()
        text = self.text.add(event.ids, bool(event.finish), logp) if event.ids or event.finish else ""
        tokens = self.text.due()
        self.parts.append(text)
        self.tokens += tokens
        self.finish = "stop" if self.text.stopped else event.finish or None
        return text, tokens


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
        queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        streams = [
            Stream(
                EngineRequest("prompt", ask.prompts[index // ask.n], index, ask.seed),
                ask.settings,
                ask.limit,
                lambda event, index=index: queue.put_nowait((index, event)),
                watched=ask.stream and ask.denoising,
            )
            for index in range(len(ask.prompts) * ask.n)
        ]
        self.loop.submit(streams)
        try:
            yield queue, streams
        finally:
            self.loop.cancel(streams)

    async def run(self, ask: Ask) -> AsyncIterator[tuple[Choice, Event, str, list[Token]]]:
        """Every event with its choice, new text and the tokens of that, until all choices are finished."""
        async with self.drawing(ask) as (queue, streams):
            texts = [Text(self.loaded.tokenizer, ask.stop) for _ in streams]
            choices = [Choice(index, text, ask.logprobs) for index, text in enumerate(texts)]
            while any(choice.finish is None for choice in choices):
                index, event = await queue.get()
                choice = choices[index]
                if choice.finish is not None:
                    continue
                text, tokens = choice.take(event)
                if choice.finish is not None:
                    self.loop.cancel([streams[index]])
                yield choice, event, text, tokens

    async def whole(self, ask: Ask) -> dict[str, Any]:
        """The response to a request that does not stream."""
        finished: dict[int, Choice] = {}
        async for choice, _, _, _ in self.run(ask):
            finished[choice.index] = choice
        rows, make = [], chat_choice if ask.chat else text_choice
        for index, choice in sorted(finished.items()):
            prompt, prompt_tokens = self.echoed(ask, index)
            logprobs = self.logprobs(ask, prompt_tokens + choice.tokens, len(prompt))
            rows.append(make(index, prompt + "".join(choice.parts), choice.finish, logprobs))
        drawn = sum(choice.drawn for choice in finished.values())
        kind = "chat.completion" if ask.chat else "text_completion"
        return self.head(ask, kind) | {"choices": rows, "usage": usage_of(sum(map(len, ask.prompts)), drawn)}

    async def chunks(self, ask: Ask) -> AsyncIterator[str]:
        """Server-sent events: the text of a block when it is finished, and each step for who watches."""
        head, drawn = self.head(ask, "chat.completion.chunk" if ask.chat else "text_completion"), 0
        make = chat_delta if ask.chat else text_choice
        echoed = [self.echoed(ask, index) for index in range(len(ask.prompts) * ask.n)]
        for index, (prompt, tokens) in enumerate(echoed):
            if ask.chat:
                first = chat_delta(index, "", None, None) | {"delta": {"role": "assistant", "content": ""}}
                yield sse(head | {"choices": [first]})
            elif ask.echo:
                yield sse(head | {"choices": [make(index, prompt, None, self.logprobs(ask, tokens, 0))]})
        try:
            async for choice, event, text, tokens in self.run(ask):
                drawn += len(event.ids)
                logprobs = self.logprobs(ask, tokens, len(echoed[choice.index][0])) if tokens else None
                row = make(choice.index, text, choice.finish, logprobs)
                if event.block is not None and not choice.finish:
                    row["denoising"] = self.pieces(event.block)
                if text or choice.finish or "denoising" in row or logprobs:
                    yield sse(head | {"choices": [row]})
        except ApiError as error:  # the headers are sent: the error goes into the stream
            yield sse(error.body)
            return
        if ask.usage:
            yield sse(head | {"choices": [], "usage": usage_of(sum(map(len, ask.prompts)), drawn)})
        yield "data: [DONE]\n\n"

    def echoed(self, ask: Ask, index: int) -> tuple[str, list[Token]]:
        """The prompt of a choice and its tokens, where it is to be repeated."""
        if not ask.echo:
            return "", []
        ids, text = ask.prompts[index // ask.n], ask.echo[index // ask.n]
        return text, place(self.loaded.tokenizer, ids, [None] * len(ids), 0, len(text), special=True)

    def logprobs(self, ask: Ask, tokens: list[Token], behind: int) -> dict[str, Any] | None:
        """Log-probabilities where they are asked for; drawn tokens stand `behind` so many characters of the prompt."""
        if not ask.logprobs:
            return None
        if ask.chat:
            return chat_logprobs(self.loaded.tokenizer, tokens)
        return text_logprobs(self.loaded.tokenizer, tokens, behind)

    def pieces(self, block: list[tuple[int, bool]]) -> list[str | None]:
        """The text of each token of a block, null for a mask."""
        special = set(self.loaded.tokenizer.all_special_ids)
        decode = self.loaded.tokenizer.decode
        return [None if masked else "" if token in special else decode([token]) for token, masked in block]

    def head(self, ask: Ask, kind: str) -> dict[str, Any]:
        """What every answer begins with."""
        return {
            "id": f"{'chatcmpl' if ask.chat else 'cmpl'}-{ask.id}",
            "object": kind,
            "created": ask.created,
            "model": self.name,
        }

    def check_key(self, request: Request) -> None:
        """ApiError unless the request carries the key, where there is one."""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), self.key.encode())
        if self.key and not (right and scheme.lower() == "bearer"):
            raise ApiError("Incorrect API key provided", status=401, code="invalid_api_key")


def sse(value: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def read_body(request: Request) -> Any:
    """The request's JSON; ApiError where it is none, or too much."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError("the content type must be application/json", status=415)
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LARGEST_BODY:
            raise ApiError(f"the body is larger than {LARGEST_BODY >> 20} MB", status=413)
    try:
        value = json.loads(body, parse_constant=_no_number)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        told = ascii(error.object[error.start])
        raise ApiError(f"the body holds a lone surrogate, {told}, which is no character") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not valid JSON: {error}") from None
    return value


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON's")


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
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )

    @app.exception_handler(ApiError)
    async def told(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status)

    @app.exception_handler(StarletteHTTPException)
    async def not_found(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(ApiError(f"{request.method} {request.url.path}: {error.detail}").body, error.status_code)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(ApiError(f"{type(error).__name__}; the server's log says more", status=500).body, 500)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": server.name, **server.loop.counts()}

    model = {"id": server.name, "object": "model", "created": 0, "owned_by": "local"}

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        server.check_key(request)
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(request: Request, name: str) -> dict[str, Any]:
        server.check_key(request)
        if name != server.name:
            raise no_such_model(name, server.name)
        return model

    async def answer(request: Request, read: Callable[..., Ask]) -> Response:
        server.check_key(request)
        if server.loop.counts()["waiting"] > MOST_WAITING:
            raise ApiError("too many requests are waiting; come back later", status=429)
        # a long text takes seconds to tokenize, in which others are to be answered
        ask = await asyncio.to_thread(read, await read_body(request), config, loaded, server.name)
        if ask.stream:
            return StreamingResponse(server.chunks(ask), media_type="text/event-stream")
        whole = await unless_left(request, server.whole(ask))
        return JSONResponse(whole) if whole is not None else Response(status_code=499)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(request, read_chat)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, read_text)

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    return app
