"""Samples to finetune on, as they stand in a data set: an answer, a conversation, or the ids of a drawn response."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from common.errors import UserError
from data.tasks import Record, located_records

ROLES = ("system", "user", "assistant", "tool")
# How `conversations` name who speaks; `messages` name the roles themselves.
SPEAKERS = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class BadSample(UserError):
    """A sample that cannot be learned from; `reason` is what it is counted under."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class Unwanted(BadSample):
    """A good sample that the config leaves out: counted, never refused."""


@dataclass(frozen=True)
class Answer:
    """A prompt with its response, both text. step_map: for each of the response's tokens the step it is unmasked at."""

    prompt: str
    response: str
    step_map: list[int] | None = None


@dataclass(frozen=True)
class Chat:
    """A conversation, {"role", "content"} each; what the assistant says is to be learned."""

    messages: list[dict[str, str]]


@dataclass(frozen=True)
class Ids:
    """A response as it was drawn; `length` counts its tokens through the stop token, None where nobody says."""

    prompt_ids: list[int]
    response_ids: list[int]
    step_map: list[int] | None = None
    length: int | None = None


Sample = Answer | Chat | Ids


def load_samples(
    name_or_path: str,
    key: str = "dataset.optimization_data",
    prompt_key: str = "prompt",
    response_key: str = "response",
    correct_only: bool = False,
) -> list[tuple[str, Sample | BadSample]]:
    """Every sample of a set with words for its place ("line 3 of 'x.jsonl'"); a bad one is the error about it.

    Raises UserError where the set as a whole cannot be read.
    """
    samples: list[tuple[str, Sample | BadSample]] = []
    for place, record in located_records(name_or_path, key):
        if isinstance(record, UserError):
            samples.append((place, BadSample("broken line", str(record).removeprefix(f"{key}: "))))
            continue
        try:
            if correct_only and not _is_correct(record):
                samples.append((place, Unwanted("not correct", f"{place} is not correct")))
                continue
            samples.append((place, parse_sample(record, prompt_key, response_key)))
        except BadSample as error:
            samples.append((place, BadSample(error.reason, f"{place} {error}")))
    return samples


def parse_sample(record: Record, prompt_key: str = "prompt", response_key: str = "response") -> Sample:
    """A record as the sample that its fields make it: ids before texts, texts before messages; BadSample if none."""
    if record.get("response_ids") is not None:
        return _ids(record)
    chat = next((field for field in ("messages", "conversations") if isinstance(record.get(field), list)), None)
    if chat and response_key not in record:
        return _chat(record[chat])
    prompt, response = _text(record, prompt_key, "prompt"), _text(record, response_key, "response")
    return Answer(prompt, response, _step_map(record))


def _ids(record: Record) -> Ids:
    prompt, response = record.get("prompt_ids"), record["response_ids"]
    for field, ids in (("prompt_ids", prompt), ("response_ids", response)):
        if not _whole_numbers(ids) or not ids or min(ids) < 0:
            raise BadSample("ids", f"has no `{field}` that is a list of token ids")
    steps, length = _step_map(record), record.get("length")
    if steps is not None and len(steps) != len(response):
        raise BadSample("step map", f"has a `step_map` of {len(steps)} entries for {len(response)} `response_ids`")
    if length is not None and (type(length) is not int or not 1 <= length <= len(response)):
        raise BadSample(
            "ids", f"has the `length` {length!r:.40}; a whole number from 1 to {len(response)} was expected"
        )
    return Ids(prompt, response, steps, length)


def _chat(messages: list[Any]) -> Chat:
    turns = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise BadSample("messages", f"has a message {number} that is no object")
        role = message.get("role") or SPEAKERS.get(str(message.get("from")))
        content = message.get("content", message.get("value"))
        if role not in ROLES:
            said = message.get("role") or message.get("from")
            raise BadSample("messages", f"has a message {number} of the role {said!r:.40}; use {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise BadSample("messages", f"has a message {number} whose `content` is no text")
        if role == "assistant" and not content.strip():
            raise BadSample("empty response", f"has an empty turn of the assistant, message {number}")
        turns.append({"role": role, "content": content})
    said_by = [turn["role"] for turn in turns]
    if "assistant" not in said_by:
        raise BadSample("no assistant turn", "has no turn of the assistant, so nothing to learn")
    if "user" not in said_by[: said_by.index("assistant")]:
        raise BadSample("messages", "begins with the assistant; a turn of the user must come first")
    return Chat(turns)


def _text(record: Record, field: str, what: str) -> str:
    """A column as text; numbers are taken as written."""
    value = record.get(field)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, str):
        raise BadSample(f"empty {what}", f"has an empty `{field}`")
    fields = ", ".join(record) or "none"
    raise BadSample(
        f"no {what}",
        f"has no `{field}` that is text (its fields: {fields:.200}); rename it, or name yours in dataset.{what}_key",
    )


def _step_map(record: Record) -> list[int] | None:
    steps = record.get("step_map")
    if steps is not None and not _whole_numbers(steps):
        raise BadSample("step map", "has a `step_map` that is not a list of whole numbers; correct it or leave it out")
    return steps


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)


def _is_correct(record: Record) -> bool:
    if not isinstance(record.get("correct"), bool):
        raise BadSample("no verdict", "has no `correct` that is true or false, which dataset.correct_only asks for")
    return record["correct"]
