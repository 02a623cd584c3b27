"""What is drawn as OpenAI's answers: the text as it grows, log-probabilities, choices and token counts."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from serving.api import ApiError, Ask
from serving.loop import Event


@dataclass(frozen=True)
class Token:
    """A drawn token with its place in the text."""

    id: int
    logp: float | None  # at the step at which it was unmasked; None of a prompt's token
    begin: int  # characters
    end: int


@dataclass
class Text:
    """A response's text as it grows: whole characters only, cut before the first stop string."""

    tokenizer: PreTrainedTokenizerBase
    stop: tuple[str, ...]
    held: list[int] = field(default_factory=list)  # tokens that end inside a character
    held_logp: list[float] = field(default_factory=list)
    kept: str = ""  # text that may begin a stop string
    stopped: bool = False
    given: int = 0  # characters, those of a repeated prompt before it too
    tokens: deque[Token] = field(default_factory=deque)  # those of the text that was not given

    def add(self, ids: list[int], last: bool, logp: Sequence[float] = ()) -> str:
        """The text that these tokens bring; with `last` nothing is held back. `logp`, where `due` is to be asked."""
        self.held += ids
        self.held_logp += logp
        text = self.tokenizer.decode(self.held, skip_special_tokens=True)
        if text.endswith("\ufffd") and not last and len(self.held) < 8:
            return ""
        if self.held_logp:
            begin = self.given + len(self.kept)
            self.tokens += place(self.tokenizer, self.held, self.held_logp, begin, len(text))
        self.held, self.held_logp = [], []
        text = self.kept + text
        found = min((text.find(stop) for stop in self.stop if stop in text), default=-1)
        if found >= 0:
            self.stopped, keep, text = True, 0, text[:found]
        else:
            keep = 0 if last else max((_overlap(text, stop) for stop in self.stop), default=0)
        self.kept = text[len(text) - keep :]
        self.given += len(text) - keep
        return text[: len(text) - keep]

    def due(self) -> list[Token]:
        """The tokens of the text given since the last call; what adds nothing to the text's end never is."""
        count = max((n for n, one in enumerate(self.tokens, 1) if one.begin < min(one.end, self.given)), default=0)
        return [self.tokens.popleft() for _ in range(count)]


def place(
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    logp: Sequence[float | None],
    begin: int,
    length: int,
    special: bool = False,
) -> list[Token]:
    """Tokens with their places in the text of `length` that they decode to; one within a character ends before it.

    With `special`, the text shows special tokens too.
    """
    placed, group, end = [], [], begin
    for number, (token, value) in enumerate(zip(ids, logp), 1):
        group.append(token)
        start, piece = end, tokenizer.decode(group, skip_special_tokens=not special)
        if not piece.endswith("\ufffd") or len(group) == 8:
            end, group = min(end + len(piece), begin + length), []
        if number == len(ids):
            end = begin + length
        placed.append(Token(token, value, start, end))
    return placed


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


class Choice:
    """One of the responses to a request, as far as it has come; it begins with the prompt where that is repeated."""

    def __init__(self, ask: Ask, index: int, tokenizer: PreTrainedTokenizerBase):
        prompt = ask.echo[index // ask.n] if ask.echo else ""
        ids = ask.prompts[index // ask.n] if ask.echo else []
        self.ask, self.index = ask, index
        self.text = Text(tokenizer, ask.stop, given=len(prompt))
        self.parts = [prompt]
        self.tokens = place(tokenizer, ids, [None] * len(ids), 0, len(prompt), special=True)  # of the text in `parts`
        self.drawn = 0  # tokens
        self.finish: str | None = None

    def take(self, event: Event) -> tuple[str, list[Token]]:
        """Add an event; returns the new text with its tokens. ApiError where the event is that it failed."""
        if event.error:
            raise ApiError(event.error, status=event.status)
        self.drawn += len(event.ids)
        logp = event.logp if self.ask.logprobs else ()
        text = self.text.add(event.ids, bool(event.finish), logp) if event.ids or event.finish else ""
        tokens = self.text.due()
        self.parts.append(text)
        self.tokens += tokens
        self.finish = "stop" if self.text.stopped else event.finish or None
        return text, tokens

    def row(self, text: str, tokens: list[Token] | None, piece: bool) -> dict[str, Any]:
        """The choice as OpenAI has it: with the whole text and its tokens, or with a `piece` as it streams."""
        content: dict[str, Any] = {"text": text}
        if self.ask.chat and piece:
            content = {"delta": {"content": text} if text else {}}
        elif self.ask.chat:
            content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        logprobs = self.logprobs(tokens) if self.ask.logprobs and tokens is not None else None
        return {"index": self.index, **content, "logprobs": logprobs, "finish_reason": self.finish}

    def logprobs(self, tokens: list[Token]) -> dict[str, Any]:
        """The log-probability of each token, as chat completions have it, or as completions do."""
        pieces = self.text.tokenizer.batch_decode([[token.id] for token in tokens])
        if not self.ask.chat:
            logp, places = [token.logp for token in tokens], [token.begin for token in tokens]
            return {"tokens": pieces, "token_logprobs": logp, "top_logprobs": None, "text_offset": places}
        rows = [
            {"token": piece, "logprob": token.logp, "bytes": list(piece.encode()), "top_logprobs": []}
            for piece, token in zip(pieces, tokens)
        ]
        return {"content": rows, "refusal": None}


def usage_of(choices: Sequence[Choice]) -> dict[str, int]:
    """Token counts of a request, by all its choices."""
    prompt, completion = sum(map(len, choices[0].ask.prompts)), sum(choice.drawn for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
