"""The web application: /v1/chat/completions, /v1/completions, /v1/models, /health, and a page to watch answers on."""

import asyncio
import hmac
import json
import os
import secrets
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from common.jobs import ServeConfig
from common.page import fill_page
from common.trajectory import Request as EngineRequest
from models import LoadedModel
from serving.answers import Choice, Token, usage_of
from serving.api import ApiError, Ask, no_such_model, read_request
from serving.loop import EngineLoop, Event, Stream

PAGE = Path(__file__).with_name("chat.html")
LARGEST_BODY = 10 << 20  # bytes
MOST_WAITING = 4096  # streams; more are told to come back later
EXAMPLES = ("4+2+8+1", "What is 17 times 23?", "Why is the sky blue? Answer in two sentences.")


class Server:
    """What the handlers share."""

    def __init__(self, config: ServeConfig, loaded: LoadedModel, key: str):
        self.key, self.tokenizer = key, loaded.tokenizer
        self.name = config.served_name or Path(config.model).name
        self.loop = EngineLoop(config, loaded, self.deliver)
        self.events: asyncio.AbstractEventLoop | None = None

    def deliver(self, events: list[tuple[Stream, Event]]) -> None:
        """Bring a step's events from the engine's thread to the event loop, in one go."""
        if events:
            self.events.call_soon_threadsafe(lambda: [item[0].queue.put_nowait(item) for item in events])

    def choices(self, ask: Ask) -> list[Choice]:
        """A choice for each response that is asked for: of each prompt, n one after another."""
        return [Choice(ask, index, self.tokenizer) for index in range(len(ask.prompts) * ask.n)]

    async def run(self, ask: Ask, choices: list[Choice]) -> AsyncIterator[tuple[Choice, Event, str, list[Token]]]:
        """Every event with its choice, new text and the tokens of that, until all choices are finished.

        Leaving it frees the slots.
        """
        queue: asyncio.Queue[tuple[Stream, Event]] = asyncio.Queue()
        streams: dict[Stream, Choice] = {}
        for choice in choices:
            request = EngineRequest("prompt", ask.prompts[choice.index // ask.n], choice.index, ask.seed)
            streams[Stream(request, ask.settings, ask.limit, queue, watched=ask.stream and ask.denoising)] = choice
        self.loop.submit(streams)
        try:
            while any(choice.finish is None for choice in choices):
                stream, event = await queue.get()
                choice = streams[stream]
                if choice.finish is not None:
                    continue
                text, tokens = choice.take(event)
                if choice.finish is not None:
                    self.loop.cancel([stream])
                yield choice, event, text, tokens
        finally:
            self.loop.cancel(streams)

    async def whole(self, ask: Ask) -> dict[str, Any]:
        """The response to a request that does not stream."""
        head, choices = self.head(ask), self.choices(ask)
        async for _ in self.run(ask, choices):
            pass
        rows = [choice.row("".join(choice.parts), choice.tokens, piece=False) for choice in choices]
        return head | {"choices": rows, "usage": usage_of(choices)}

    async def chunks(self, ask: Ask) -> AsyncIterator[str]:
        """Server-sent events: the text of a block when it is finished, and each step for who watches."""
        head, choices = self.head(ask), self.choices(ask)
        for choice in choices:
            if ask.chat:
                row = choice.row("", None, piece=True) | {"delta": {"role": "assistant", "content": ""}}
                yield sse(head | {"choices": [row]})
            elif ask.echo:
                yield sse(head | {"choices": [choice.row(choice.parts[0], choice.tokens, piece=True)]})
        try:
            async for choice, event, text, tokens in self.run(ask, choices):
                row = choice.row(text, tokens or None, piece=True)
                if event.block is not None and not choice.finish:
                    row["denoising"] = self.pieces(event.block)
                if text or choice.finish or "denoising" in row or row["logprobs"]:
                    yield sse(head | {"choices": [row]})
        except ApiError as error:  # the headers are sent: the error goes into the stream
            yield sse(error.body)
            return
        if ask.usage:
            yield sse(head | {"choices": [], "usage": usage_of(choices)})
        yield "data: [DONE]\n\n"

    def pieces(self, block: list[tuple[int, bool]]) -> list[str | None]:
        """The text of each token of a block, null for a mask."""
        special, decode = set(self.tokenizer.all_special_ids), self.tokenizer.decode
        return [None if masked else "" if token in special else decode([token]) for token, masked in block]

    def head(self, ask: Ask) -> dict[str, Any]:
        """What every answer begins with."""
        prefix, kind = ("chatcmpl", "chat.completion") if ask.chat else ("cmpl", "text_completion")
        if ask.chat and ask.stream:
            kind += ".chunk"
        id = f"{prefix}-{secrets.token_hex(12)}"
        return {"id": id, "object": kind, "created": int(time.time()), "model": self.name}

    async def check_key(self, request: Request) -> None:
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


async def unless_left(request: Request, work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any] | None:
    """The result of `work`; None where the client leaves first, which cancels it."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        watch.cancel()


def page_data(config: ServeConfig, loaded: LoadedModel) -> dict[str, Any]:
    """What the page shows of the model: its name, family and size, and examples that its tokenizer can write."""
    tokenizer, size = loaded.tokenizer, loaded.model.num_parameters()
    unit, name = (1e9, "B") if size >= 1e9 else (1e6, "M")
    examples = [text for text in EXAMPLES if tokenizer.unk_token_id not in tokenizer(text)["input_ids"]]
    about = f"{loaded.family.name}, {size / unit:.1f} {name} parameters"
    return {"model": config.served_name or full_name(config.model), "about": about, "examples": examples}


def full_name(model: str) -> str:
    """A checkpoint's name as people know it: the run's with it, or a snapshot's repository, or its folder's."""
    *_, grand, parent, name = ("", "", *Path(os.path.abspath(model)).parts)
    if parent == "ckpt":
        return f"{grand}/{name}"
    if parent == "snapshots" and grand.startswith("models--"):
        return grand.removeprefix("models--").replace("--", "/", 1)
    return name


def make_app(config: ServeConfig, loaded: LoadedModel, key: str = "") -> FastAPI:
    """The application; its engine's thread lives as long as it does."""
    server = Server(config, loaded, key)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server.events = asyncio.get_running_loop()
        server.loop.thread.start()
        yield
        server.loop.close()

    async def told(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, HTTPException):  # no such path or method
            error = ApiError(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code)
        elif not isinstance(error, ApiError):
            error = ApiError(f"{type(error).__name__}; the server's log says more", status=500)
        return JSONResponse(error.body, error.status)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    for kind in (ApiError, HTTPException, Exception):
        app.add_exception_handler(kind, told)
    app.state.server = server
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )

    page = fill_page(PAGE.read_text(encoding="utf-8"), page_data(config, loaded) | {"key": bool(key)})

    @app.get("/")
    async def chat() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": server.name, **server.loop.counts()}

    with_key = [Depends(server.check_key)]
    model = {"id": server.name, "object": "model", "created": 0, "owned_by": "local"}

    @app.get("/v1/models", dependencies=with_key)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}", dependencies=with_key)
    async def one_model(name: str) -> dict[str, Any]:
        if name != server.name:
            raise no_such_model(name, server.name)
        return model

    @app.post("/v1/chat/completions", dependencies=with_key)
    @app.post("/v1/completions", dependencies=with_key)
    async def answer(request: Request) -> Response:
        if server.loop.counts()["waiting"] > MOST_WAITING:
            raise ApiError("too many requests are waiting; come back later", status=429)
        chat, body = request.url.path.endswith("/chat/completions"), await read_body(request)
        # a long text takes seconds to tokenize, in which others are to be answered
        ask = await asyncio.to_thread(read_request, body, chat, config, loaded, server.name)
        if ask.stream:
            return StreamingResponse(server.chunks(ask), media_type="text/event-stream")
        whole = await unless_left(request, server.whole(ask))
        return JSONResponse(whole) if whole is not None else Response(status_code=499)

    return app
