"""OpenAI's chat completions: requests checked and turned into streams, texts and errors in its format."""

from __future__ import annotations

import dataclasses
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from common.config import fault_of
from common.keys import keys_of
from common.schema import Sampling, ServeConfig
from models import LoadedModel
from models.prompts import encode_turns

# Sampling keys that a request may set; the last three are no part of OpenAI's interface.
PER_REQUEST = ("temperature", "top_p", "top_k", "remasking_strategy", "dynamic_threshold")
# Accepted where they ask for nothing, refused otherwise.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "logit_bias": (None, {}),
    "top_logprobs": (None, 0),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "store": (None, False),
}
IGNORED = ("user", "metadata", "parallel_tool_calls", "service_tier", "stream_options", "safety_identifier")
OWN = ("model", "messages", "max_tokens", "max_completion_tokens", "n", "seed", "stop", "stream", "logprobs")
OWN += ("denoising",)  # with stream: every step of the block being denoised
KNOWN = {*PER_REQUEST, *NEUTRAL, *IGNORED, *OWN}
ROLES = ("system", "developer", "user", "assistant", "tool")


class ApiError(Exception):
    """An error as OpenAI's interface tells it."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
        self.status = status
        self.body = {"error": {"message": message, "type": kind if status < 500 else "server_error"}}
        self.body["error"] |= {"param": param, "code": code}


@dataclass(frozen=True)
class Ask:
    """A checked request."""

    prompt_ids: list[int]
    settings: Sampling
    limit: int
    n: int
    seed: int
    stop: tuple[str, ...]
    stream: bool
    usage: bool
    logprobs: bool
    denoising: bool
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))


def read_ask(body: Any, config: ServeConfig, loaded: LoadedModel, name: str) -> Ask:
    """The request that a body asks for; ApiError names what is wrong with it."""
    if not isinstance(body, dict):
        raise ApiError("the body must be a JSON object")
    for key in body:
        if key not in KNOWN:
            raise ApiError(f"Unrecognized request argument supplied: {key}", key)
        if key in NEUTRAL and body[key] not in NEUTRAL[key]:
            raise ApiError(f"{key} is not supported by this server; leave it out", key)
    if body.get("model", name) != name:
        raise ApiError(f"The model '{body['model']}' does not exist; this server has '{name}'", "model", 404)
    limit = _number(body, "max_completion_tokens", 1) or _number(body, "max_tokens", 1) or config.max_token
    if limit > config.max_token:
        raise ApiError(f"max_tokens is {limit}; this server draws at most {config.max_token}", "max_tokens")
    prompt_ids = _prompt(body.get("messages"), config, loaded)
    seed = _number(body, "seed", 0)
    options = body.get("stream_options") or {}
    return Ask(
        prompt_ids=prompt_ids,
        settings=_settings(body, config, limit, loaded.family.attention == "full"),
        limit=limit,
        n=_number(body, "n", 1, 128) or 1,
        seed=secrets.randbits(62) if seed is None else seed,
        stop=_stop(body.get("stop")),
        stream=_flag(body, "stream"),
        usage=isinstance(options, dict) and bool(options.get("include_usage")),
        logprobs=_flag(body, "logprobs"),
        denoising=_flag(body, "denoising"),
    )


def _settings(body: dict[str, Any], config: ServeConfig, limit: int, full_attention: bool) -> Sampling:
    """The server's sampling settings with the request's own; under full attention the limit sizes the canvas."""
    settings = Sampling(**{one.name: getattr(config, one.name) for one in dataclasses.fields(Sampling)})
    known, changes = keys_of(Sampling), {}
    for key in PER_REQUEST:
        value = body.get(key)
        if value is None:
            continue
        kind = type(getattr(settings, key))
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise ApiError(f"{key}: {value!r} is not a {'number' if kind is not str else 'text'}", key)
        fault = fault_of(value, known[key][1].metadata)
        if fault or ":" in str(value):  # a client does not name functions to import
            raise ApiError(f"{key}: {value!r}: {fault or 'name one of the strategies'}", key)
        changes[key] = kind(value)
    if full_attention:
        changes["max_token"] = limit
    return dataclasses.replace(settings, **changes)


def _prompt(messages: Any, config: ServeConfig, loaded: LoadedModel) -> list[int]:
    if not isinstance(messages, list) or not messages:
        raise ApiError("messages must be a list with at least one message", "messages")
    turns = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ApiError(f"{where} needs a role, one of {', '.join(ROLES)}", f"{where}.role")
        content = message.get("content")
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, dict) else None for part in content]
            content = None if None in parts or not all(isinstance(part, str) for part in parts) else "".join(parts)
        if not isinstance(content, str):
            raise ApiError(f"{where}.content must be text", f"{where}.content")
        turns.append({"role": message["role"], "content": content})
    ids = encode_turns(loaded, turns, config.start_with_think)
    if len(ids) > config.max_prompt_len:
        raise ApiError(
            f"the messages come to {len(ids)} tokens; this server takes {config.max_prompt_len} (max_prompt_len)",
            "messages",
            code="context_length_exceeded",
        )
    return ids


def _stop(stop: Any) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or len(stops) > 4 or not all(isinstance(one, str) and one for one in stops):
        raise ApiError("stop must be a text, or a list of up to four", "stop")
    return tuple(stops)


def _number(body: dict[str, Any], key: str, low: int, high: int = 2**63 - 1) -> int | None:
    value = body.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ApiError(f"{key}: {value!r} must be a whole number, {low} or more", key)
    return value


def _flag(body: dict[str, Any], key: str) -> bool:
    value = body.get(key) or False
    if not isinstance(value, bool):
        raise ApiError(f"{key}: {value!r} must be true or false", key)
    return value


@dataclass
class Text:
    """A response's text as it grows: whole characters only, cut before the first stop string."""

    tokenizer: PreTrainedTokenizerBase
    stop: tuple[str, ...]
    held: list[int] = field(default_factory=list)  # tokens that end inside a character
    kept: str = ""  # text that may begin a stop string
    stopped: bool = False

    def add(self, ids: list[int], last: bool) -> str:
        """The text that these tokens bring; with `last` nothing is held back."""
        self.held += ids
        text = self.tokenizer.decode(self.held, skip_special_tokens=True)
        if text.endswith("\ufffd") and not last and len(self.held) < 8:
            return ""
        self.held = []
        text = self.kept + text
        found = min((text.find(stop) for stop in self.stop if stop in text), default=-1)
        if found >= 0:
            self.stopped, self.kept = True, ""
            return text[:found]
        keep = 0 if last else max((_overlap(text, stop) for stop in self.stop), default=0)
        self.kept = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


def logprobs_of(tokenizer: PreTrainedTokenizerBase, ids: list[int], logp: list[float]) -> dict[str, Any]:
    """Of each token, its log-probability at the step at which it was unmasked."""
    pieces = tokenizer.batch_decode([[token] for token in ids])
    return {
        "content": [
            {"token": piece, "logprob": value, "bytes": list(piece.encode()), "top_logprobs": []}
            for piece, value in zip(pieces, logp)
        ],
        "refusal": None,
    }


def usage_of(prompt: int, completion: int) -> dict[str, int]:
    """Token counts."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
