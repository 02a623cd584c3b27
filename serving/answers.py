"""What is drawn as OpenAI's answers: the text as it grows, log-probabilities, choices and token counts."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase


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
    given: int = 0  # characters
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


def chat_logprobs(tokenizer: PreTrainedTokenizerBase, tokens: list[Token]) -> dict[str, Any]:
    """Of each token its log-probability, as chat completions tell it."""
    pieces = tokenizer.batch_decode([[token.id] for token in tokens])
    return {
        "content": [
            {"token": piece, "logprob": token.logp, "bytes": list(piece.encode()), "top_logprobs": []}
            for piece, token in zip(pieces, tokens)
        ],
        "refusal": None,
    }


def text_logprobs(tokenizer: PreTrainedTokenizerBase, tokens: list[Token], behind: int) -> dict[str, Any]:
    """Of each token its log-probability, as completions tell it; drawn tokens stand `behind` so many characters."""
    return {
        "tokens": tokenizer.batch_decode([[token.id] for token in tokens]),
        "token_logprobs": [token.logp for token in tokens],
        "top_logprobs": None,
        "text_offset": [token.begin + (0 if token.logp is None else behind) for token in tokens],
    }


def chat_choice(index: int, text: str, finish: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    """A whole answer of a chat."""
    message = {"role": "assistant", "content": text, "refusal": None}
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}


def chat_delta(index: int, text: str, finish: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    """A piece of an answer of a chat."""
    delta = {"content": text} if text else {}
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def text_choice(index: int, text: str, finish: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    """A completion, or a piece of one."""
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def usage_of(prompt: int, completion: int) -> dict[str, int]:
    """Token counts."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
