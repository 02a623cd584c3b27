"""OpenAI's chat completions and completions: requests checked, so that nothing unfit reaches the engine."""

import dataclasses
import json
import math
import secrets
from dataclasses import dataclass
from reprlib import repr as show
from typing import Any

from common.config import fault_of
from common.jobs import ServeConfig
from common.keys import keys_of
from common.schema import Sampling
from models import LoadedModel
from models.prompts import ChatTemplateError, encode_turns
from models.tokenizer import Unreadable, check_readable

# Sampling keys that a request may set; the last three are no part of OpenAI's interface.
PER_REQUEST = ("temperature", "top_p", "top_k", "remasking_strategy", "dynamic_threshold")
LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-6, 100  # beyond, single precision has no distribution to draw from
# Accepted where they ask for nothing, refused otherwise. What is null counts as absent everywhere.
NEUTRAL: dict[str, tuple[Any, ...]] = {"frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},)}
CHAT_NEUTRAL = NEUTRAL | {
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
}
TEXT_NEUTRAL = NEUTRAL | {"suffix": ("",)}
# Hints to OpenAI's own service, which change nothing here.
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "moderation")
IGNORED += ("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention")
OWN = ("model", "max_tokens", "n", "seed", "stop", "stream", "stream_options", "logprobs", *PER_REQUEST)
CHAT_KNOWN = {"messages", "max_completion_tokens", "denoising", *OWN, *IGNORED}  # denoising: stream every step
CHAT_KNOWN |= {"parallel_tool_calls", "reasoning_effort", "verbosity", "prediction"}  # hints too
TEXT_KNOWN = {*OWN, *IGNORED, "prompt", "echo", "best_of"}
ROLES = ("system", "developer", "user", "assistant", "tool")
PASSED_ON = ("name", "tool_call_id", "reasoning_content")  # texts that a chat template may read
MOST_CHOICES = 1024  # of one request
TEXT_LENGTH = 16  # tokens of a completion that names no max_tokens, as OpenAI has it


class ApiError(Exception):
    """An error as OpenAI's interface tells it."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        message = message.encode("utf-8", "replace").decode()
        super().__init__(message)
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Ask:
    """A checked request."""

    chat: bool
    prompts: list[list[int]]
    settings: Sampling
    limit: int  # tokens of a response
    n: int  # responses to each prompt
    seed: int
    stop: tuple[str, ...]
    stream: bool
    usage: bool
    logprobs: bool
    denoising: bool
    echo: tuple[str, ...]  # the prompts, where answers are to begin with them


def read_request(body: Any, chat: bool, config: ServeConfig, loaded: LoadedModel, name: str) -> Ask:
    """The chat completion or completion that a body asks of the model `name`; ApiError says what is wrong with it."""
    given = _given(body, chat, name)
    if chat:
        key, longest = "messages", config.max_token
        own_prompts: list[Any] = [_chat_prompt(given.get(key), config, loaded)]
        logprobs = _flag(given, "logprobs")
    else:
        key, longest, own_prompts = "prompt", TEXT_LENGTH, _texts_or_ids(given.get("prompt"))
        alternatives = _number(given, "logprobs", 0)
        logprobs = alternatives is not None
        if logprobs and alternatives > 1:
            raise ApiError("logprobs: this server tells those of the drawn tokens alone; give 1", "logprobs")
    prompts = [_completion_prompt(one, loaded) if isinstance(one, str) else one for one in own_prompts]
    n = _number(given, "n", 1, 128) or 1
    if len(prompts) * n > MOST_CHOICES:
        raise ApiError(f"n: {n} for each of {len(prompts)} prompts; one request may ask for {MOST_CHOICES}", "n")
    if given.get("best_of", n) != n:
        raise ApiError("best_of is not supported by this server; leave it out", "best_of")
    limit = _number(given, "max_completion_tokens", 1) or _number(given, "max_tokens", 1) or longest
    limit = min(limit, config.max_token)
    for ids in prompts:
        limit = min(limit, check_prompt(ids, key, limit, config, loaded))
    seed = _number(given, "seed", -(2**63))
    options = given.get("stream_options", {})
    if not isinstance(options, dict):
        raise ApiError(f"stream_options: {show(options)} must be an object", "stream_options")
    echo = own_prompts if _flag(given, "echo") else []
    return Ask(
        chat=chat,
        prompts=prompts,
        settings=_settings(given, config, limit, loaded.family.attention == "full"),
        limit=limit,
        n=n,
        seed=secrets.randbits(62) if seed is None else seed,
        stop=_stop(given.get("stop")),
        stream=_flag(given, "stream"),
        usage=_flag(options, "include_usage"),
        logprobs=logprobs,
        denoising=_flag(given, "denoising"),
        echo=tuple(one if isinstance(one, str) else loaded.tokenizer.decode(one) for one in echo),
    )


def _given(body: Any, chat: bool, name: str) -> dict[str, Any]:
    """What a body says, without nulls and with known keys only."""
    known, neutral = (CHAT_KNOWN, CHAT_NEUTRAL) if chat else (TEXT_KNOWN, TEXT_NEUTRAL)
    if not isinstance(body, dict):
        raise ApiError("the body must be a JSON object")
    given = {key: value for key, value in body.items() if value is not None}
    for key, value in given.items():
        if key not in known and key not in neutral:
            raise ApiError(f"Unrecognized request argument supplied: {key}", key)
        if key in neutral and value not in neutral[key]:
            raise ApiError(f"{key}: {show(value)} is not supported by this server; leave it out", key)
    if given.get("model", name) != name:
        raise no_such_model(given["model"], name)
    return given


def no_such_model(asked: Any, name: str) -> ApiError:
    """The error for a model that is not served."""
    told = f"The model {show(asked)} does not exist; this server has '{name}'"
    return ApiError(told, "model", 404, "model_not_found")


def check_prompt(ids: list[int], key: str, limit: int, config: ServeConfig, loaded: LoadedModel) -> int:
    """How many positions the model has behind a prompt; ApiError where the prompt is none that it can be given."""
    network = loaded.model.config
    positions = getattr(network, "max_position_embeddings", None) or math.inf
    if not ids and loaded.family.attention == "full":
        raise ApiError(f"{key} is empty: the model needs at least one token before its answer", key)
    wrong = next((token for token in ids if not 0 <= token < network.vocab_size), None)
    if wrong is not None:
        raise ApiError(f"{key}: token {show(wrong)} is none of the model's, 0 to {network.vocab_size - 1}", key)
    if len(ids) > config.max_prompt_len or len(ids) >= positions:
        told = (
            f"{key}: the prompt comes to {len(ids)} tokens, with {limit} to draw {len(ids) + limit}; this server takes "
            f"{config.max_prompt_len} (max_prompt_len) and draws {config.max_token} (max_token)"
        )
        if positions < math.inf:
            told += f", and the model has {positions} positions for both"
        raise ApiError(told, key, code="context_length_exceeded")
    return positions - len(ids)


def _settings(given: dict[str, Any], config: ServeConfig, limit: int, full_attention: bool) -> Sampling:
    """The server's sampling settings with the request's own; under full attention the limit sizes the canvas."""
    own = Sampling(**{one.name: getattr(config, one.name) for one in dataclasses.fields(Sampling)})
    known, changes = keys_of(Sampling), {"max_token": limit} if full_attention else {}
    for key in [key for key in PER_REQUEST if key in given]:
        value, kind = given[key], type(getattr(own, key))
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise ApiError(f"{key}: {show(value)} is not a {'number' if kind is not str else 'text'}", key)
        fault = fault_of(value, known[key])
        if key == "temperature" and value != 0 and not LEAST_TEMPERATURE <= value <= MOST_TEMPERATURE:
            fault = f"must be 0, or between {LEAST_TEMPERATURE} and {MOST_TEMPERATURE}"
        if fault or ":" in str(value):  # a client does not name functions to import
            raise ApiError(f"{key}: {show(value)}: {fault or 'name one of the strategies'}", key)
        changes[key] = kind(value)
    return dataclasses.replace(own, **changes)


def _chat_prompt(messages: Any, config: ServeConfig, loaded: LoadedModel) -> list[int]:
    """The ids of a conversation in the model's chat template."""
    if not isinstance(messages, list) or not messages:
        raise ApiError("messages must be a list with at least one message", "messages")
    template = loaded.tokenizer.chat_template
    if not template:
        raise ApiError("the model has no chat template; ask /v1/completions", "messages")
    turns = [_turn(message, f"messages[{number}]") for number, message in enumerate(messages)]
    for turn in turns:
        if turn["role"] == "developer" and "developer" not in str(template):
            turn["role"] = "system"  # its name before; most templates leave out a role that they do not know
    try:
        return encode_turns(loaded, turns, config.start_with_think)
    except ChatTemplateError as error:
        raise ApiError(f"messages: the model's chat template cannot take these ({error.reason})", "messages") from None
    except Unreadable as error:
        raise ApiError(f"messages: {error.reason}", "messages") from None


def _completion_prompt(text: str, loaded: LoadedModel) -> list[int]:
    """The ids of a text to be continued."""
    try:
        check_readable(loaded.tokenizer, text, "prompt")
    except Unreadable as error:
        raise ApiError(str(error), "prompt") from None
    return loaded.tokenizer.encode(text)


def _turn(message: Any, where: str) -> dict[str, Any]:
    """A message as chat templates expect it; what OpenAI's own answers carry besides is left out."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise ApiError(f"{where} needs a role, one of {', '.join(ROLES)}", f"{where}.role")
    turn = {"role": message["role"], "content": message.get("content")}
    for key in PASSED_ON:
        if message.get(key) is not None:
            turn[key] = message[key]
            if not isinstance(turn[key], str):
                raise ApiError(f"{where}.{key}: {show(turn[key])} must be text", f"{where}.{key}")
    if message.get("function_call"):
        raise ApiError(f"{where}.function_call is not supported; give tool_calls", f"{where}.function_call")
    if message.get("tool_calls"):
        turn["tool_calls"] = _tool_calls(message["tool_calls"], f"{where}.tool_calls")
        if turn["content"] is None:
            turn["content"] = ""
    if isinstance(turn["content"], list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in turn["content"]]
        turn["content"] = "".join(parts) if all(isinstance(part, str) for part in parts) else None
    if not isinstance(turn["content"], str):
        raise ApiError(f"{where}.content must be text, or a list of parts that are text", f"{where}.content")
    return turn


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects: OpenAI has them as JSON, which templates would quote again."""
    read = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function") if isinstance(call, dict) and isinstance(calls, list) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ApiError(f"{where} must be a list of calls, each a function with a name and arguments", where)
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments) if arguments.strip() else {}
            except (ValueError, RecursionError) as error:
                told = f"{where}: the arguments of {function['name']} are not valid JSON: {error}"
                raise ApiError(told, where) from None
        read.append({**call, "type": "function", "function": {**function, "arguments": arguments}})
    return read


def _texts_or_ids(prompt: Any) -> list[Any]:
    """The prompts, all of them texts or all of them token ids: one such, or a list of them."""
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and all(map(_is_number, prompt))):
        prompt = [prompt]
    if isinstance(prompt, list) and prompt:
        texts = all(isinstance(one, str) for one in prompt)
        if texts or all(isinstance(one, list) and all(map(_is_number, one)) for one in prompt):
            return prompt
    raise ApiError("prompt must be a text, a list of token ids, or a list of either", "prompt")


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _stop(stop: Any) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or len(stops) > 4 or not all(isinstance(one, str) and one for one in stops):
        raise ApiError(f"stop: {show(stop)} must be a text, or a list of up to four, none of them empty", "stop")
    return tuple(stops)


def _number(given: dict[str, Any], key: str, low: int, high: int = 2**63 - 1) -> int | None:
    value = given.get(key)
    if value is None:
        return None
    if not _is_number(value) or not low <= value <= high:
        bounds = f"{low} or more" if high > 2**62 else f"{low} to {high}"
        raise ApiError(f"{key}: {show(value)} must be a whole number, {bounds}", key)
    return value


def _flag(given: dict[str, Any], key: str) -> bool:
    value = given.get(key)
    if value is not None and not isinstance(value, bool):
        raise ApiError(f"{key}: {show(value)} must be true or false", key)
    return bool(value)
