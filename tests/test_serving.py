"""serve.py through OpenAI's own client, over a real socket."""

import importlib
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
from common.jobs import ServeConfig
from common.page import allow_script
from common.schema import Sampling
from common.trajectory import Request, Trajectory
from models import LoadedModel, load_model
from models.tiny import build_tiny
from sample.engine import Engine
from serving.answers import Text
from serving.app import PAGE, full_name, make_app
from tests.browser import chromium

QUESTION = [{"role": "user", "content": "4+2+8+1"}]


class Running:
    """A server in a thread of this process."""

    def __init__(self, loaded: LoadedModel, key: str = "", **changes: Any):
        self.loaded = loaded
        self.config = ServeConfig(**{"model": "runs/tiny", "max_token": 24, "max_prompt_len": 40, **changes})
        self.app = make_app(self.config, loaded, key)
        bound = serve.listen("127.0.0.1", 0)
        bound.listen()  # who asks before the thread has come so far waits, and is not refused
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


def shown_logp(loaded: LoadedModel, drawn: Trajectory) -> list[float]:
    """The log-probabilities through the last token that the text shows: the stop token is none of it."""
    length = drawn.length
    while length and not loaded.tokenizer.decode(drawn.response_ids[length - 1 : length], skip_special_tokens=True):
        length -= 1
    return drawn.logp[:length]


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
        assert [one.logprob for one in choice.logprobs.content] == pytest.approx(shown_logp(running.loaded, drawn))
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
    assert logp == pytest.approx(shown_logp(running.loaded, drawn))
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

    def held() -> bool:
        gate.wait(60)
        steps.append(None)
        return step()

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
        ({"max_tokens": 0}, 400, "max_tokens: 0 must be a whole number, 1 or more"),
        ({"n": 0}, 400, "n: 0"),
        ({"n": 129}, 400, "1 to 128"),
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
        patch.setattr(engine, "step", lambda *_: 1 / 0)
        error = running.refused()
        assert error.status_code == 500 and "ZeroDivisionError" in error.body["message"]
    assert running.ask().choices[0].message.content


def test_what_the_cache_could_never_hold_is_the_clients_mistake(tiny_sdar: Path) -> None:
    """Only requests that fit are answered, before and after it."""
    running = Running(load_model(tiny_sdar, "sdar"), cache_tokens=44)
    try:
        assert running.ask(max_tokens=4, messages=[{"role": "user", "content": "1"}]).choices
        error = running.refused(messages=[{"role": "user", "content": "1+2+3+4+5+6+7+8+1+2+3+4"}], max_tokens=24)
        assert error.status_code == 400 and "25 tokens and a response to up to 24 (max_token)" in error.message
        assert "in whole blocks 52; this server has room for 44 (cache_tokens)" in error.message
        assert running.ask(max_tokens=4, messages=[{"role": "user", "content": "2"}]).choices
    finally:
        running.close()


class Poison:
    """A network's embedding that fails for a token twice in a row, which the untrained network does not draw here."""

    def __init__(self, loaded: LoadedModel, token: str):
        self.id, self.calls = loaded.tokenizer.convert_tokens_to_ids(token), 0
        self.hook = loaded.model.model.embed_tokens.register_forward_pre_hook(self)

    def __call__(self, module: Any, inputs: tuple[Any, ...]) -> None:
        if ((inputs[0][:, 1:] == self.id) & (inputs[0][:, :-1] == self.id)).any():
            self.calls += 1
            raise RuntimeError("poisoned")


# the prompt's whole blocks are met when it is seated, its remainder in the first step
@pytest.mark.parametrize("poisoned", ["4+2+8+1^^", "^^+2+8+1+3+4+5+6+7"], ids=["in a step", "seating"])
def test_a_fault_concerns_the_request_that_makes_it(
    tiny_sdar: Path, poisoned: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Among seven that are drawn with it, streamed and whole, the bad one alone fails; so does each of two."""
    one = Running(load_model(tiny_sdar, "sdar"), max_active=8)
    texts = [f"{number}+2+8+11" for number in range(8)]
    texts[3], texts[6] = poisoned, poisoned
    engine, gate = one.app.state.server.loop.engine, threading.Event()
    step = engine.step
    engine.step = lambda: (gate.wait(60), step())[1]  # all of them wait, and come in together
    poison = Poison(one.loaded, "^")

    def ask(number: int) -> str:
        asked = {"messages": [{"role": "user", "content": texts[number]}], "seed": number, "extra_body": {"top_k": 0}}
        if number % 2:
            return "".join(chunk.choices[0].delta.content or "" for chunk in one.ask(stream=True, **asked))
        return one.ask(**asked).choices[0].message.content

    try:
        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(ask, number) for number in range(8)]
            until(lambda: sum(one.app.state.server.loop.counts().values()) == 8)
            gate.set()
        for number, answer in enumerate(answers):
            if texts[number] == poisoned:
                with pytest.raises(openai.APIError, match="poisoned"):
                    answer.result()
            else:
                poison.hook.remove()
                drawn = alone(one.loaded, texts[number], number)
                assert answer.result() == text_of(one.loaded, drawn), number
        assert poison.calls >= 2 and caplog.text.count("1 of the responses being drawn ended") == 2
        assert one.ask().choices and one.app.state.server.loop.counts() == {"active": 0, "waiting": 0}
    finally:
        gate.set()
        one.close()


def test_settings_that_cannot_be_set_up_end_those_who_ask_for_them(
    tiny_sdar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Running(load_model(tiny_sdar, "sdar"))
    engine = one.app.state.server.loop.engine
    set_up = engine.set_up

    def full(settings: Sampling, *rest: Any) -> None:
        if settings.top_k == 3:
            raise MemoryError("full")
        set_up(settings, *rest)

    monkeypatch.setattr(engine, "set_up", full)
    try:
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(one.ask, extra_body={"top_k": number % 2 * 3}) for number in range(4)]
        for number, answer in enumerate(asked):
            if number % 2:
                with pytest.raises(openai.InternalServerError, match="MemoryError: full"):
                    answer.result()
            else:
                assert answer.result().choices
    finally:
        one.close()


def test_a_strategy_that_gets_stuck_ends_its_sequence_only(
    tiny_sdar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A strategy of the server's own that unmasks nothing beside a prompt's last two tokens, where those are alike."""
    (tmp_path / "stuck_beside.py").write_text(
        "from sample.strategies import low_confidence_dynamic\n\n"
        "def twins(block):\n"
        "    alike = (block.tokens[:, 1:] == block.tokens[:, :-1]) & ~block.masked[:, 1:]\n"
        "    return low_confidence_dynamic(block) & ~(alike & (block.tokens[:, 1:] == TOKEN)).any(1, keepdim=True)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    loaded = load_model(tiny_sdar, "sdar")
    importlib.import_module("stuck_beside").TOKEN = loaded.tokenizer.convert_tokens_to_ids("^")
    one = Running(loaded, remasking_strategy="stuck_beside:twins")
    engine, gate, texts = one.app.state.server.loop.engine, threading.Event(), ["4+2+8+1", "4+2+8+1^^", "4+2+8+11"]
    step = engine.step
    engine.step = lambda: (gate.wait(60), step())[1]
    try:
        with ThreadPoolExecutor(3) as pool:
            turns = [[{"role": "user", "content": text}] for text in texts]
            asked = [pool.submit(one.ask, seed=seed, messages=turns[seed]) for seed in range(3)]
            until(lambda: sum(one.app.state.server.loop.counts().values()) == 3)
            gate.set()
        with pytest.raises(openai.InternalServerError, match="unmasked nothing"):
            asked[1].result()
        for seed in (0, 2):
            drawn = alone(one.loaded, texts[seed], seed)
            assert asked[seed].result().choices[0].message.content == text_of(one.loaded, drawn)
    finally:
        gate.set()
        one.close()


BEYOND = "<|beyond|>"  # of the tokenizer, not of the network


@pytest.fixture(scope="module")
def picky(tiny_sdar: Path) -> Iterator[Running]:
    """A model whose template refuses the role `tool`, and whose tokenizer has a token more than the network."""
    loaded = load_model(tiny_sdar, "sdar")
    loaded.tokenizer.add_tokens([BEYOND])
    loaded.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
        "{{ '1' if m.role == 'system' else '2' }}{{ m.content + '' }}"
        "{% for call in m.tool_calls %}{{ call.function.arguments.number + 1 }}{% endfor %}{% endfor %}"
    )
    one = Running(loaded)
    yield one
    one.close()


CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"number": 4}'}}


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([{"role": "tool", "tool_call_id": "a", "content": "5"}], "chat template cannot take these (no tools here)"),
        ([{"role": "user", "content": f"1{BEYOND}"}], "token 39 is none of the model's, 0 to 38"),
        ([{"role": "assistant", "content": None}], "messages[0].content must be text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "parts that are text"),
        ([{"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]}], "messages[0].tool_calls must be"),
        ([{"role": "user", "content": "1", "name": 3}], "messages[0].name: 3 must be text"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "arguments of f are not valid JSON",
        ),
        (  # a surrogate that comes out of JSON within JSON
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"number": "\\ud800"}'}}]}],
            "chat template cannot take these",
        ),
    ],
)
def test_messages_that_a_template_cannot_take_are_the_clients_mistake(
    picky: Running, messages: list[dict[str, Any]], told: str
) -> None:
    error = picky.refused(messages=messages)
    assert error.status_code == 400 and told in error.body["message"]


def test_messages_that_openai_takes(picky: Running) -> None:
    """A call without a text, its arguments an object for the template; `developer`, which was called `system`."""
    for messages, prompt in (
        ([{"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None}], "25"),
        ([{"role": "developer", "content": [{"type": "text", "text": "7"}]}], "17"),
    ):
        asked = picky.ask(messages=messages)
        drawn = picky.client.completions.create(model="tiny", prompt=prompt, seed=7, max_tokens=24)
        assert asked.choices[0].message.content == drawn.choices[0].text


def test_a_model_without_a_chat_template_completes_texts(tiny_sdar: Path) -> None:
    loaded = load_model(tiny_sdar, "sdar")
    loaded.tokenizer.chat_template = None
    one = Running(loaded)
    try:
        assert "ask /v1/completions" in one.refused().body["message"]
        assert one.client.completions.create(model="tiny", prompt="1").choices
    finally:
        one.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"max_tokens": 10**9},
        {"max_completion_tokens": 25},
        {"reasoning_effort": "low", "user": "me", "store": True, "metadata": {"a": "b"}, "parallel_tool_calls": False},
        {"extra_body": {"colour": None, "tools": None, "model": None, "n": None, "stop": None, "logit_bias": None}},
        {"service_tier": "auto", "verbosity": "low", "prompt_cache_key": "x", "safety_identifier": "y"},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_what_does_not_concern_this_server_changes_nothing(running: Running, changes: dict[str, Any]) -> None:
    assert running.ask(**changes).choices[0].message.content == running.ask().choices[0].message.content


MESSAGES = b'"messages": [{"role": "user", "content": "1"}]'


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        ("chat/completions", rb'{"messages": [{"role": "user", "content": "\ud800"}]}', "lone surrogate"),
        ("chat/completions", rb'{"model": "\udfff", ' + MESSAGES + b"}", "lone surrogate"),
        ("completions", rb'{"prompt": "1", "stop": "\ud8001"}', "lone surrogate"),
        ("chat/completions", b'{"temperature": NaN, ' + MESSAGES + b"}", "NaN"),
        ("chat/completions", b'{"temperature": 1e999, ' + MESSAGES + b"}", "temperature: inf"),
        ("chat/completions", b'{"temperature": 1e-40, ' + MESSAGES + b"}", "between 1e-06 and 100"),
        ("chat/completions", b'{"temperature": 1' + b"0" * 400 + b", " + MESSAGES + b"}", "temperature"),
        ("chat/completions", b'{"stream_options": 5, ' + MESSAGES + b"}", "stream_options: 5"),
        ("chat/completions", b'{"seed": 9223372036854775808, ' + MESSAGES + b"}", "seed"),
        ("chat/completions", b'{"tools": [{"type": "function"}], ' + MESSAGES + b"}", "tools"),
        ("completions", b'{"prompt": [1, 39]}', "token 39 is none of the model's, 0 to 38"),
        ("completions", b'{"prompt": [[1], [-1]]}', "token -1"),
        ("completions", b'{"prompt": [1' + b"0" * 100 + b"]}", "none of the model's"),
        ("completions", b'{"prompt": [true]}', "prompt must be"),
        ("completions", b'{"prompt": [1.0]}', "prompt must be"),
        ("completions", b'{"prompt": ["1", [1]]}', "prompt must be"),
        ("completions", b'{"prompt": []}', "prompt must be"),
        ("completions", b"{}", "prompt must be"),
        ("completions", b'{"prompt": "one"}', "prompt: the model has no token for 'o', 'n', 'e'; it reads 0123"),
        ("chat/completions", MESSAGES.replace(b'"1"', b'"one"').join((b"{", b"}")), "messages: the model has no token"),
        ("completions", b'{"prompt": "1", "n": 3, "best_of": 5}', "best_of"),
        ("completions", b'{"prompt": "1", "suffix": "2"}', "suffix"),
        ("completions", b'{"prompt": "1", "logprobs": 5}', "logprobs"),
        ("completions", b'{"prompt": "1", "echo": 1}', "echo"),
        ("completions", b'{"prompt": "1", "messages": []}', "messages"),
        ("completions", b'{"n": 128, "prompt": [' + b'"1", ' * 8 + b'"1"]}', "may ask for 1024"),
        ("completions", b'{"prompt": "' + b"1" * 41 + b'"}', "41 tokens, with 16 to draw 57; this server takes 40"),
        ("completions", b'{"prompt": "' + b"1" * 41 + b'"}', "draws 24 (max_token), and the model has 512 positions"),
    ],
)
def test_what_is_unfit_never_reaches_the_engine(running: Running, path: str, body: bytes, told: str) -> None:
    answer = httpx.post(f"{running.url}/v1/{path}", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and told in answer.json()["error"]["message"], answer.text


def test_an_answer_ends_with_the_models_positions(tiny_sdar: Path, tmp_path: Path) -> None:
    build_tiny("llada", tmp_path, seed=3)
    for folder, family in ((tiny_sdar, "sdar"), (tmp_path, "llada")):
        one = Running(load_model(folder, family), max_prompt_len=600, steps=12, max_active=2)
        try:
            answer = one.client.completions.create(model="tiny", prompt=[1] * 508, max_tokens=24, seed=1)
            assert 0 < answer.usage.completion_tokens <= 4
            with pytest.raises(openai.BadRequestError, match="the model has 512 positions for both"):
                one.client.completions.create(model="tiny", prompt=[1] * 512)
        finally:
            one.close()


def test_full_attention_needs_a_prompt(tmp_path: Path) -> None:
    build_tiny("llada", tmp_path, seed=3)
    one = Running(load_model(tmp_path, "llada"))
    try:
        with pytest.raises(openai.BadRequestError, match="prompt is empty"):
            one.client.completions.create(model="tiny", prompt="")
    finally:
        one.close()


@pytest.mark.parametrize("stream", [False, True])
def test_completions(running: Running, stream: bool) -> None:
    """Of texts, token ids and lists of them, each n times, as the engine alone draws them."""
    encode = running.loaded.tokenizer.encode
    texts, n = ["1+2", "4*(8"], 2
    engine = Engine(running.loaded.model, running.loaded.mask_id, running.loaded.stop_ids)
    requests = [Request("prompt", encode(texts[index // n]), index, 7) for index in range(2 * n)]
    drawn = sorted(engine.generate(requests, Sampling(max_token=24)), key=lambda one: one.sample)
    for prompt, count in ((texts, 4), ([encode(text) for text in texts], 4), (texts[0], 2), (encode(texts[0]), 2)):
        asked = {"model": "tiny", "prompt": prompt, "n": n, "seed": 7, "max_tokens": 24, "echo": True, "logprobs": 1}
        answer = running.client.completions.create(**asked, stream=stream)
        choices = [choice for one in (answer if stream else [answer]) for choice in one.choices]
        for index in range(count):
            mine = [choice for choice in choices if choice.index == index]
            assert "".join(choice.text for choice in mine) == texts[index // n] + text_of(running.loaded, drawn[index])
            assert mine[-1].finish_reason == drawn[index].finish_reason
            told = [choice.logprobs for choice in mine if choice.logprobs]
            logp = [value for one in told for value in one.token_logprobs]
            prompt_length = len(texts[index // n])
            assert logp[:prompt_length] == [None] * prompt_length
            assert logp[prompt_length:] == pytest.approx(shown_logp(running.loaded, drawn[index]))
            places = [value for one in told for value in one.text_offset]
            assert places == sorted(places) and places[:prompt_length] == list(range(prompt_length))
            assert places[prompt_length : prompt_length + 1] in ([], [prompt_length])
        if not stream:
            assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
            assert answer.usage.completion_tokens == sum(one.length for one in drawn[:count])


def test_a_completion_is_16_tokens_and_stops_where_it_is_told(running: Running) -> None:
    whole = running.client.completions.create(model="tiny", prompt=[5, 6], seed=3)
    assert whole.usage.completion_tokens == 16 and whole.choices[0].finish_reason == "length"
    stop = whole.choices[0].text[5:7]
    cut = running.client.completions.create(model="tiny", prompt=[5, 6], seed=3, stop=stop)
    assert cut.choices[0].text == whole.choices[0].text.partition(stop)[0] and cut.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("start", [1, 4, 7])
def test_logprobs_end_where_the_text_ends(running: Running, stream: bool, start: int) -> None:
    whole = running.ask(logprobs=True)
    stop = whole.choices[0].message.content[start : start + 3]
    answer = running.ask(logprobs=True, stop=stop, stream=stream)
    if stream:
        choices = [chunk.choices[0] for chunk in answer]
        text = "".join(choice.delta.content or "" for choice in choices)
        told = [one for choice in choices if choice.logprobs for one in choice.logprobs.content]
    else:
        text, told = answer.choices[0].message.content, answer.choices[0].logprobs.content
    special = running.loaded.tokenizer.all_special_tokens
    assert "".join(one.token for one in told if one.token not in special) == text
    assert text == whole.choices[0].message.content.partition(stop)[0]
    assert told == whole.choices[0].logprobs.content[: len(told)] and (not told or told[-1].token not in special)


def test_media_types_and_schemes_know_no_case(tiny_sdar: Path) -> None:
    one = Running(load_model(tiny_sdar, "sdar"), key="secret")
    try:
        for kind, scheme, status in (
            ("Application/JSON; Charset=UTF-8", "bearer", 200),
            ("application/json", "BEARER", 200),
            ("application/json5", "Bearer", 415),
            ("application/json", "Basic", 401),
        ):
            headers = {"content-type": kind, "authorization": f"{scheme} secret"}
            answer = httpx.post(f"{one.url}/v1/completions", content=b'{"prompt": "1"}', headers=headers)
            assert answer.status_code == status, (kind, scheme)
    finally:
        one.close()


def test_models(running: Running) -> None:
    assert running.client.models.retrieve("tiny").id == "tiny" == running.client.models.list().data[0].id
    with pytest.raises(openai.NotFoundError, match=r"'JetLM/other' does not exist; this server has 'tiny'"):
        running.client.models.retrieve("JetLM/other")


def test_pages_of_other_origins_ask_where_the_config_lets_them(running: Running, tiny_sdar: Path) -> None:
    page = "http://localhost:3000"
    wish = {"origin": page, "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    path = "/v1/chat/completions"
    shut = httpx.options(running.url + path, headers=wish)
    assert shut.status_code == 405 and "access-control-allow-origin" not in shut.headers
    one = Running(load_model(tiny_sdar, "sdar"), key="secret", cors_origins=[page])
    try:
        opened = httpx.options(one.url + path, headers=wish)
        assert opened.status_code == 200 and opened.headers["access-control-allow-origin"] == page
        assert httpx.options(one.url + path, headers=wish | {"origin": "http://evil"}).status_code == 400
        refused = httpx.post(one.url + path, json={}, headers={"origin": page})  # a page may read why
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == page
    finally:
        one.close()


@pytest.mark.parametrize("origin", ["localhost:3000", "http://localhost:3000/", "http://*.example.com", ""])
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    serve.check_origins(ServeConfig(cors_origins=["*", "https://example.com", "http://127.0.0.1:5173"]))
    with pytest.raises(UserError, match="cors_origins"):
        serve.check_origins(ServeConfig(cors_origins=[origin]))


def test_a_fault_of_the_servers_own_is_told_in_the_apis_words(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running.app.state.server, "head", lambda *_: 1 / 0)
    error = running.refused()
    assert error.status_code == 500 and error.body["type"] == "server_error" and "ZeroDivision" in error.body["message"]


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


def test_text_gives_tokens_with_their_text() -> None:
    text = Text(Characters(), ("END",))
    seen = []
    for byte in "aé EN".encode():
        text.add([byte], last=False, logp=[-float(byte)])
        seen.append([(bytes([one.id]), one.begin, one.end) for one in text.due()])
    assert seen == [[(b"a", 0, 1)], [], [(b"\xc3", 1, 1), (b"\xa9", 1, 2)], [(b" ", 2, 3)], [], []]
    assert text.add(list(b"X END"), last=False, logp=[0.0] * 5) == "ENX "
    assert bytes(one.id for one in text.due()) == b"ENX " and text.stopped


def test_a_taken_port_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr("sys.argv", ["serve.py", "model=x", f"port={port}"])
        with pytest.raises(SystemExit) as left:
            serve.main()
    assert left.value.code == 2 and f"port={port}" in capsys.readouterr().err


def test_the_page_shows_the_answer(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.api.secrets.randbits", lambda bits: 7)  # another seed may draw an empty answer
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
        assert (
            answer == text_of(running.loaded, alone(running.loaded, "4+2+8+1", 7))
            and page.text_content(".user") == "4+2+8+1"
            and page.inner_text("h1") == "tiny"
        )
        assert page.locator(".m").count() == 0
        page.click("text=Replay")
        page.locator(".m").first.wait_for()
        assert len(page.text_content(".answer")) < len(answer)
        page.click("text=Stop")
        assert page.text_content(".answer") == answer and page.locator(".block span").count() == 0
        assert page.is_hidden("#start") and page.is_hidden("#key")
        page.click("text=New chat")
        assert page.locator(".turn").count() == 0
        assert page.locator("#examples button").all_inner_texts() == ["4+2+8+1"]  # it can write no letters
        page.fill("#limit", "4")
        page.click("#examples button")
        page.click("text=Replay")
        page.locator("text=Stop").wait_for()
        page.locator("text=Replay").wait_for()  # it ends by itself
        assert page.text_content(".user") == "4+2+8+1"
        assert page.text_content(".answer") == text_of(running.loaded, alone(running.loaded, "4+2+8+1", 7), 4)
        assert [fault for fault in faults if not fault.startswith("data:")] == []


@pytest.mark.parametrize(
    "model, name",
    [
        ("runs/demo/ckpt/optimized", "demo/optimized"),
        ("/a/runs/demo/ckpt/step-0030/", "demo/step-0030"),
        ("JetLM/SDAR-1.7B-Chat", "SDAR-1.7B-Chat"),
        ("/hub/models--JetLM--SDAR-8B-Chat/snapshots/0123abcd", "JetLM/SDAR-8B-Chat"),
        ("/model", "model"),
    ],
)
def test_the_page_names_the_model(model: str, name: str) -> None:
    assert full_name(model) == name


def test_the_chat_page_reaches_nothing() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert allow_script(page) == page, "run: python -m common.page serving/chat.html"
    assert "default-src 'none'" in page and "https:" not in page and "innerHTML" not in page
