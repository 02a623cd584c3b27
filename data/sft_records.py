"""Samples to finetune on, as they stand in a data set: an answer, a conversation, a text, or a drawn response's ids."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from common.errors import UserError
from common.records import Record, is_empty
from common.trajectory import Writing
from data.tasks import as_text, located_records

ROLES = ("system", "user", "assistant", "tool")
# How `conversations` name who speaks; `messages` name the roles themselves.
SPEAKERS = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
# What a turn may have besides who speaks and what is said; chat templates read it.
TURN_FIELDS = ("reasoning_content", "tool_calls", "tool_call_id", "name")
# Fields that belong to what is said in other projects' samples and are not learned here.
UNREAD = ("history", "documents", "images", "videos", "audios", "chat_template_kwargs")


class BadSample(UserError):
    """Raised of a sample that cannot be learned from; `reason` is what it is counted under."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Rejected:
    """A record that is not learned from: the reason that it is counted under, and a line with its place in the set."""

    reason: str
    message: str
    bad: bool = True  # False: a good sample that the config leaves out, which is never refused


@dataclass(frozen=True)
class Answer:
    """A prompt with its response, both text. step_map: for each of the response's tokens the step it is unmasked at.

    overwritten: what that trace wrote there before, as positions and ids of tokens. system, tools and reasoning_content
    are for the chat template.
    """

    prompt: str
    response: str
    step_map: list[int] | None = None
    overwritten: list[Writing] = dataclasses.field(default_factory=list)
    system: str | None = None
    tools: list[Record] | None = None
    reasoning_content: str | None = None


@dataclass(frozen=True)
class Chat:
    """A conversation, {"role", "content"} and some of TURN_FIELDS each; system comes before the messages."""

    messages: list[Record]
    learned: tuple[int, ...]  # places of those turns of the assistant that are to be learned
    system: str | None = None
    tools: list[Record] | None = None


@dataclass(frozen=True)
class Text:
    """A text that answers nothing, learned from its beginning to its end."""

    text: str


@dataclass(frozen=True)
class Ids:
    """A response as it was drawn; `length` counts its tokens through the stop token, None where nobody says."""

    prompt_ids: list[int]
    response_ids: list[int]
    step_map: list[int] | None = None
    length: int | None = None
    overwritten: list[Writing] = dataclasses.field(default_factory=list)


Sample = Answer | Chat | Text | Ids


def load_samples(
    name_or_path: str,
    key: str = "dataset.optimization_data",
    prompt_key: str = "prompt",
    response_key: str = "response",
    correct_only: bool = False,
) -> list[tuple[str, Sample | Rejected]]:
    """Every sample of a set with words for its place ("line 3 of 'x.jsonl'"), or why a record is not learned from.

    Raises UserError where the set as a whole cannot be read.
    """
    samples: list[tuple[str, Sample | Rejected]] = []
    for place, record in located_records(name_or_path, key):
        try:
            if isinstance(record, UserError):
                sample = Rejected("broken line", str(record).removeprefix(f"{key}: "))
            elif correct_only and not isinstance(record.get("correct"), bool):
                asked = "has no `correct` that is true or false, which dataset.correct_only asks for"
                sample = Rejected("no verdict", f"{place} {asked}")
            elif correct_only and not record["correct"]:
                sample = Rejected("not correct", f"{place} is not correct", bad=False)
            else:
                sample = parse_sample(record, prompt_key, response_key)
        except BadSample as error:
            sample = Rejected(error.reason, f"{place} {error}")
        except RecursionError:
            sample = Rejected("broken line", f"{place} is nested too deeply to read")
        samples.append((place, sample))
    return samples


def parse_sample(record: Record, prompt_key: str, response_key: str) -> Sample:
    """A record, without empty fields, as the sample that its fields make it.

    Ids come before prompt and response, these before messages, and `text` is read where there is none of them.

    BadSample if it is none, or if it holds more than would be learned of it.
    """
    if "response_ids" in record:
        return _ids(record)
    unread = [*UNREAD, "input"] if prompt_key == "instruction" else UNREAD  # Alpaca's prompt is in two fields
    for field in unread:
        if record.get(field) and field not in (prompt_key, response_key):
            problem = f"has `{field}`, which is not learned; put it into the prompt or leave it out"
            raise BadSample("unread field", problem)
    system, tools = _optional(record, "system", ""), _tools(record.get("tools"))
    chat = next((field for field in ("messages", "conversations") if field in record), None)
    if chat and response_key not in record:
        if not isinstance(record[chat], list):
            raise BadSample("messages", f"has `{chat}` that are no list")
        return _chat(record[chat], system, tools)
    if "text" in record and not {prompt_key, response_key} & record.keys():
        return _plain_text(record)
    prompt, response = _text(record, prompt_key, "prompt"), _text(record, response_key, "response")
    steps, thought = _step_map(record), _optional(record, "reasoning_content", "")
    return Answer(prompt, response, steps, _overwritten(record, steps), system, tools, thought)


def _plain_text(record: Record) -> Text:
    text = record["text"]
    for field in ("system", "tools", "reasoning_content", "step_map"):
        if record.get(field):
            raise BadSample("unread field", f"has `{field}` beside `text`, which is learned alone; leave it out")
    if not isinstance(text, str):
        raise BadSample("no text", f"has a `text` that is a {type(text).__name__}; write it as text")
    if not text.strip():
        raise BadSample("empty text", "has an empty `text`")
    return Text(text)


def _ids(record: Record) -> Ids:
    prompt, response = record.get("prompt_ids"), record["response_ids"]
    for field, ids in (("prompt_ids", prompt), ("response_ids", response)):
        # a piece of a text has no prompt
        if not _whole_numbers(ids) or min(ids, default=0) < 0 or (field == "response_ids" and not ids):
            raise BadSample("ids", f"has no `{field}` that is a list of token ids")
    steps, length = _step_map(record), record.get("length")
    if steps is not None and len(steps) != len(response):
        raise BadSample("step map", f"has a `step_map` of {len(steps)} entries for {len(response)} `response_ids`")
    if length is not None and (type(length) is not int or not 1 <= length <= len(response)):
        wanted = f"a whole number from 1 to {len(response)} was expected"
        raise BadSample("ids", f"has the `length` {length!r:.40}; {wanted}")
    return Ids(prompt, response, steps, length, _overwritten(record, steps))


def _chat(messages: list[Any], system: str | None, tools: list[Record] | None) -> Chat:
    turns, learned = [], []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise _bad_message(number, "that is no object")
        message = _filled(message)
        turns.append(_turn(message, number))
        if _is_learned(message, turns[-1]["role"], number):
            learned.append(number - 1)
    roles = [turn["role"] for turn in turns]
    if not learned:
        raise BadSample("no assistant turn", "has no turn of the assistant, so nothing to learn")
    if "user" not in roles[: roles.index("assistant")]:
        raise BadSample("messages", "begins with the assistant; a turn of the user must come first")
    if system and roles[0] == "system":
        raise BadSample("messages", "has a `system` field and a turn of the system; leave one out")
    return Chat(turns, tuple(learned), system, tools)


def _bad_message(number: int, fault: str) -> BadSample:
    return BadSample("messages", f"has a message {number} {fault}")


def _turn(message: Record, number: int) -> Record:
    """A message as the chat template takes it."""
    known = ("role", "from", "content", "value", "weight", *TURN_FIELDS)
    unknown = next((field for field in message if field not in known), None)
    if unknown is not None:
        raise _bad_message(number, f"with `{unknown}`, which is not learned; leave it out or use {', '.join(known)}")
    speaker = message.get("role", message.get("from"))
    role = speaker if "role" in message else SPEAKERS.get(str(speaker))
    if role not in ROLES:
        raise _bad_message(number, f"of the role {speaker!r:.40}; use {', '.join(ROLES)}")
    turn = {"role": role, "content": _content(message.get("content", message.get("value")), number)}
    for field in ("reasoning_content", "tool_call_id", "name"):
        if text := _optional(message, field, f"a message {number} with "):
            turn[field] = text
    if calls := message.get("tool_calls"):
        turn["tool_calls"] = _tool_calls(calls, number)
    if turn["content"] is None and "tool_calls" not in turn:
        raise _bad_message(number, "whose `content` is no text")
    if role == "assistant" and not (turn["content"] or "").strip() and "tool_calls" not in turn:
        raise BadSample("empty response", f"has an empty turn of the assistant, message {number}")
    return turn | {"content": turn["content"] or ""}


def _content(content: Any, number: int) -> str | None:
    """What is said, also as a list of parts that are text; None where there is nothing."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _bad_message(number, "whose `content` is no text")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise _bad_message(number, f"with a part of the type {kind!r:.40} in its `content`; only text is learned")
    return "".join(part["text"] for part in content)


def _is_learned(message: Record, role: str, number: int) -> bool:
    """Whether a turn is the assistant's and has no `weight` of 0."""
    own = role == "assistant"
    weight = message.get("weight", int(own))
    if isinstance(weight, bool) or weight not in ((0, 1) if own else (0,)):
        allowed = "0 (not learned) or 1" if own else "0, as only the assistant's turns are learned"
        raise _bad_message(number, f"of the `weight` {weight!r:.40}; give {allowed}")
    return bool(weight)


def _tool_calls(calls: Any, number: int) -> list[Record]:
    """The calls of a turn; arguments that are JSON text, as OpenAI has them, are read: templates write objects."""
    made = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _bad_message(number, "whose `tool_calls` are no list of calls, each with the name of a function")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _json(arguments, f"a message {number} with `arguments`") if arguments.strip() else {}
        if not isinstance(arguments, dict):
            raise _bad_message(number, "with `arguments` in `tool_calls` that are no object")
        called = function | {"arguments": arguments}
        made.append(call | {"function": called} if "function" in call else called)
    return made


def _tools(tools: Any) -> list[Record] | None:
    """The functions that a conversation may call, as a list or as JSON text of one."""
    if isinstance(tools, str) and tools.strip():
        tools = _json(tools, "`tools`")
    if not tools or isinstance(tools, str):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadSample("tools", "has `tools` that are no list of objects")
    return _filled(tools)


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise BadSample("tools", f"has {what} that is no JSON: {text!r:.40}") from None


def _filled(value: Any) -> Any:
    """A value without the empty fields of its objects: a table gives every object the fields of all."""
    if isinstance(value, dict):
        return {field: _filled(inner) for field, inner in value.items() if not is_empty(inner)}
    return [_filled(inner) for inner in value] if isinstance(value, list) else value


def _optional(record: Record, field: str, where: str) -> str | None:
    """A field that is text, or is not there, or is empty, which is the same."""
    value = record.get(field)
    if value is not None and not isinstance(value, str):
        raise BadSample("messages", f"has {where}`{field}` that is no text")
    return value if value and value.strip() else None


def _text(record: Record, field: str, what: str) -> str:
    """A column as text; numbers are taken as written."""
    value = as_text(record.get(field))
    if not isinstance(value, str):
        fields = ", ".join(record) or "none"
        way_out = f"rename it, or name yours in dataset.{what}_key"
        raise BadSample(f"no {what}", f"has no `{field}` that is text (its fields: {fields:.200}); {way_out}")
    if not value.strip():
        raise BadSample(f"empty {what}", f"has an empty `{field}`")
    return value


def _step_map(record: Record) -> list[int] | None:
    steps = record.get("step_map")
    if steps is not None and not _whole_numbers(steps):
        raise BadSample("step map", "has a `step_map` that is not a list of whole numbers; correct it or leave it out")
    return steps


def _overwritten(record: Record, step_map: list[int] | None) -> list[Writing]:
    """What a trace wrote before the last writing of a position, in order of steps; none where a record has none."""
    writings = record.get("overwritten") or []
    form = "a list of [step, position, token, logp] each"
    if not isinstance(writings, list):
        raise BadSample("overwritten", f"has an `overwritten` that is not {form}")
    found = []
    for number, writing in enumerate(writings, start=1):
        whole = (
            isinstance(writing, list) and len(writing) == 4 and _whole_numbers(writing[:3]) and min(writing[:3]) >= 0
        )
        if not whole or type(writing[3]) not in (int, float):
            raise BadSample(
                "overwritten", f"has an entry {number} of `overwritten` that is not {form}: {writing!r:.60}"
            )
        found.append(Writing(*writing))
    if found and step_map is None:
        raise BadSample(
            "overwritten", "has `overwritten` without a `step_map`, which says when the response was written"
        )
    found.sort(key=lambda one: (one.step, one.position))
    step_of: dict[int, int] = {}  # of a position's writing so far
    for one in found:
        if one.position >= len(step_map):
            problem = f"overwrites the position {one.position} of a response of {len(step_map)} tokens"
            raise BadSample("overwritten", problem)
        last = step_map[one.position]
        if not step_of.get(one.position, -1) < one.step < last:
            problem = f"overwrites the position {one.position} in step {one.step}, which is not after its step before"
            raise BadSample("overwritten", f"{problem} and before its step {last} in the `step_map`")
        step_of[one.position] = one.step
    return found


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and abs(value) < 2**31 for value in values)
