"""serve.py through OpenAI's own client, over a real socket."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

import serve
from common.errors import UserError
from common.schema import Sampling, ServeConfig
from common.trajectory import Request, Trajectory
from models import LoadedModel, load_model
from models.tiny import build_tiny
from sample.engine import Engine
from serving.api import Text
from serving.app import make_app
from tests.browser import chromium

QUESTION = [{"role": "user", "content": "4+2+8+1"}]


class Running:
    """A server in a thread of this process."""

    def __init__(self, loaded: LoadedModel, key: str = "", **changes: Any):
        self.loaded = loaded
        self.config = ServeConfig(**{"model": "runs/tiny", "max_token": 24, "max_prompt_len": 40, **changes})
        self.app = make_app(self.config, loaded, key)
        bound = serve.listen("127.0.0.1", 0)
        self.port = bound.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = uvicorn.Server(uvicorn.Config(self.app, log_level="error", timeout_graceful_shutdown=1))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [bound]})
        self.thread.start()
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key or "none", max_retries=0)

    def close(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join()

    def ask(self, **changes: Any) -> Any:
        return self.client.chat.completions.create(**{"model": "tiny", "messages": QUESTION, "seed": 7, **changes})

    def refused(self, **changes: Any) -> openai.APIStatusError:
        with pytest.raises(openai.APIStatusError) as caught:
            self.ask(**changes)
        return caught.value


@pytest.fixture(scope="module")
def running(tiny_sdar: Path) -> Iterator[Running]:
    one = Running(load_model(tiny_sdar, "sdar"), max_active=8)
    yield one
    one.close()


def alone(loaded: LoadedModel, text: str, seed: int, sample: int = 0, **settings: Any) -> Trajectory:
    turns = [{"role": "user", "content": text}]
    ids = loaded.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    engine = Engine(loaded.model, loaded.mask_id, loaded.stop_ids)
    (drawn,) = engine.generate([Request("prompt", ids, sample, seed)], Sampling(**{"max_token": 24, **settings}))
    return drawn


def text_of(loaded: LoadedModel, drawn: Trajectory, limit: int = 10**6) -> str:
    return loaded.tokenizer.decode(drawn.response_ids[: min(limit, drawn.length)], skip_special_tokens=True)


def test_32_concurrent_streams_equal_the_engine_alone(running: Running) -> None:
    """More than there are slots, of three settings and several lengths, half of them streamed."""

    def ask(number: int) -> str:
        changes = {"temperature": (1.0, 0.5, 0.0)[number % 3], "max_tokens": (13, 8)[number % 2]}
        asked = {"messages": [{"role": "user", "content": f"{number}+2"}], "seed": number, **changes}
        if number % 4 < 2:
            return running.ask(**asked).choices[0].message.content
        return "".join(chunk.choices[0].delta.content or "" for chunk in running.ask(stream=True, **asked))

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, range(32)))
    for number, answer in enumerate(answers):
        drawn = alone(running.loaded, f"{number}+2", number, temperature=(1.0, 0.5, 0.0)[number % 3])
        assert answer == text_of(running.loaded, drawn, (13, 8)[number % 2]), number


def test_a_whole_answer(running: Running) -> None:
    answer = running.ask(n=3, logprobs=True)
    assert [choice.index for choice in answer.choices] == [0, 1, 2] and answer.model == "tiny"
    lengths = []
    for choice in answer.choices:
        drawn = alone(running.loaded, "4+2+8+1", 7, sample=choice.index)
        lengths.append(drawn.length)
        assert choice.message.content == text_of(running.loaded, drawn)
        assert choice.finish_reason == drawn.finish_reason
        assert [one.logprob for one in choice.logprobs.content] == pytest.approx(drawn.logp[: drawn.length])
    assert answer.usage.completion_tokens == sum(lengths)
    assert answer.usage.prompt_tokens == len(drawn.prompt_ids)
    assert len({choice.message.content for choice in answer.choices}) == 3


def test_streaming_by_block(running: Running) -> None:
    chunks = list(running.ask(stream=True, logprobs=True, stream_options={"include_usage": True}))
    drawn = alone(running.loaded, "4+2+8+1", 7)
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == text_of(running.loaded, drawn)
    assert sum(bool(text) for text in texts) >= drawn.length // 4 - 1  # a block at a time
    logp = [one.logprob for c in chunks if c.choices and c.choices[0].logprobs for one in c.choices[0].logprobs.content]
    assert logp == pytest.approx(drawn.logp[: drawn.length])
    assert chunks[-1].usage.completion_tokens == drawn.length
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == drawn.finish_reason


def test_every_step_can_be_watched(running: Running) -> None:
    chunks = list(running.ask(stream=True, extra_body={"denoising": True}))
    blocks = [chunk.choices[0].denoising for chunk in chunks if hasattr(chunk.choices[0], "denoising")]
    drawn = alone(running.loaded, "4+2+8+1", 7)
    assert len(blocks) >= drawn.steps - 2 and all(len(block) <= 4 for block in blocks)
    assert any(None in block for block in blocks)


def test_stop_strings(running: Running) -> None:
    whole = running.ask().choices[0].message.content
    stop = whole[8:10]
    for stream in (False, True):
        answer = running.ask(stop=[stop, "never"], stream=stream)
        if stream:
            chunks = list(answer)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert text == whole[: whole.index(stop)] and reason == "stop"


def test_a_client_that_leaves_frees_its_slot(tiny_sdar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One slot, whose engine stands still: two clients leave, in the slot and waiting; the third is served."""
    one = Running(load_model(tiny_sdar, "sdar"), max_active=1, max_token=440)
    loop, gate, steps = one.app.state.server.loop, threading.Event(), []
    step = loop.engine.step

    def held() -> None:
        gate.wait(60)
        steps.append(None)
        step()

    monkeypatch.setattr(loop.engine, "step", held)
    try:
        stream = one.ask(stream=True, seed=3)
        next(iter(stream))
        until(lambda: loop.active)
        stream.close()
        with pytest.raises(openai.APITimeoutError):
            one.client.with_options(timeout=0.2).chat.completions.create(model="tiny", messages=QUESTION, seed=3)
        until(lambda: not loop.waiting and all(gone.cancelled for gone in loop.active.values()))
        gate.set()
        assert one.ask(max_tokens=4).usage.completion_tokens <= 4
        until(lambda: not any(httpx.get(f"{one.url}/health").json()[name] for name in ("active", "waiting")))
        assert len(steps) < 20  # of a whole response there are more than a hundred
    finally:
        gate.set()
        one.close()


def until(happened: Callable[[], object], seconds: float = 30) -> None:
    """Wait for something that another thread does."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_bad_requests_get_the_apis_errors(running: Running) -> None:
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"messages": []}, 400, "at least one message"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "role"),
        ({"messages": [{"role": "user", "content": "1" * 60}]}, 400, "this server takes 40"),
        ({"model": "gpt-9"}, 404, "does not exist"),
        ({"max_tokens": 999}, 400, "at most 24"),
        ({"n": 0}, 400, "n: 0"),
        ({"temperature": -1}, 400, "temperature"),
        ({"top_p": 2}, 400, "top_p"),
        ({"stop": ["a", "b", "c", "d", "e"]}, 400, "up to four"),
        ({"frequency_penalty": 1.0}, 400, "not supported"),
        ({"extra_body": {"colour": "red"}}, 400, "colour"),
        ({"extra_body": {"remasking_strategy": "os:system"}}, 400, "remasking_strategy"),
        ({"extra_body": {"remasking_strategy": "static"}}, 400, "low_confidence_static"),
    ]
    for changes, status, words in cases:
        error = running.refused(**changes)
        assert error.status_code == status and words in error.body["message"], changes
        assert error.body["type"] == "invalid_request_error"
    for body, kind, status in (
        (b"{", "application/json", 400),
        (b"{}", "text/plain", 415),
        (b"[]", "application/json", 400),
    ):
        answer = httpx.post(f"{running.url}/v1/chat/completions", content=body, headers={"content-type": kind})
        assert answer.status_code == status and answer.json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(f"{running.url}/v1/nothing").json()["error"]["message"]


def test_a_step_that_fails_ends_its_streams_only(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = running.app.state.server.loop.engine
    with monkeypatch.context() as patch:
        patch.setattr(engine, "step", lambda: 1 / 0)
        error = running.refused()
        assert error.status_code == 500 and "ZeroDivisionError" in error.body["message"]
    assert running.ask().choices[0].message.content


def test_what_the_cache_could_never_hold_is_the_clients_mistake(tiny_sdar: Path) -> None:
    """Only requests that fit are answered, before and after it."""
    running = Running(load_model(tiny_sdar, "sdar"), cache_tokens=44)
    try:
        assert running.ask(max_tokens=4, messages=[{"role": "user", "content": "1"}]).choices
        error = running.refused(messages=[{"role": "user", "content": "1+2+3+4+5+6+7+8+1+2+3+4"}], max_tokens=24)
        assert error.status_code == 400 and "cache_tokens" in error.message
        assert running.ask(max_tokens=4, messages=[{"role": "user", "content": "2"}]).choices
    finally:
        running.close()


def test_keys(tiny_sdar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Running(load_model(tiny_sdar, "sdar"), key="secret")
    try:
        assert one.ask(max_tokens=4).choices
        one.client.api_key = "wrong"
        error = one.refused()
        assert error.status_code == 401 and error.body["code"] == "invalid_api_key"
        assert httpx.get(f"{one.url}/v1/models").status_code == 401
        assert httpx.get(f"{one.url}/health").json()["status"] == "ok"
    finally:
        one.close()
    monkeypatch.delenv("DLLM_API_KEY", raising=False)
    with pytest.raises(UserError, match="DLLM_API_KEY"):
        serve.api_key(ServeConfig(host="0.0.0.0"))
    assert serve.api_key(ServeConfig()) == ""


def test_full_attention(tmp_path: Path) -> None:
    build_tiny("llada", tmp_path, seed=3)
    loaded = load_model(tmp_path, "llada")
    settings = {"block_size": 8, "steps": 12, "use_cache": False}
    one = Running(loaded, **settings)
    try:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda n: one.ask(seed=n, max_tokens=(24, 16)[n % 2]), range(4)))
        for seed, answer in enumerate(answers):
            drawn = alone(loaded, "4+2+8+1", seed, **settings | {"max_token": (24, 16)[seed % 2]})
            assert answer.choices[0].message.content == text_of(loaded, drawn)
    finally:
        one.close()


class Characters:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(ids).decode("utf-8", "replace")


def test_text_holds_back_what_is_not_whole() -> None:
    text = Text(Characters(), ("END",))
    given = "aé EN".encode()
    parts = [text.add([byte], last=False) for byte in given]
    assert parts == ["a", "", "é", " ", "", ""]
    assert text.add(list(b"X E"), last=False) == "ENX "
    assert text.add(list(b"NDgone"), last=False) == "" and text.stopped
    assert Text(Characters(), ("END",)).add(list(b"EN"), last=True) == "EN"


def test_a_taken_port_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr("sys.argv", ["serve.py", "model=x", f"port={port}"])
        with pytest.raises(SystemExit) as left:
            serve.main()
    assert left.value.code == 2 and f"port={port}" in capsys.readouterr().err


def test_the_page_shows_the_answer(running: Running) -> None:
    with chromium() as browser:
        page = browser.new_page()
        faults: list[str] = []
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda one: faults.append(one.url) if running.url not in one.url else None)
        page.goto(f"{running.url}/")
        page.fill("#text", "4+2+8+1")
        page.keyboard.press("Enter")
        page.locator(".assistant small:has-text('tokens/s')").wait_for()
        answer = page.text_content(".assistant span >> nth=0")
        assert answer and page.text_content(".user") == "4+2+8+1" and page.inner_text("h1") == "tiny"
        assert page.locator(".m").count() == 0
        assert [fault for fault in faults if not fault.startswith("data:")] == []
