"""From a question to prompt ids, by the tokenizer's own chat template."""

from __future__ import annotations

from collections.abc import Sequence

from common.errors import UserError
from common.schema import PromptsConfig
from models.family import Family, LoadedModel


def instruction(family: Family, kind: str, own: PromptsConfig, thinking: bool = False) -> str:
    """The text around {question} for a kind of task: the config's own, else the family's, else the bare question.

    A family may word a kind in another way where the assistant's turn begins with a thought. UserError where the words
    leave no place for the question.
    """
    published = family.instructions
    words = getattr(own, kind) or (thinking and published.get(f"{kind}_think")) or published.get(kind, "{question}")
    if "{question}" not in words:
        raise UserError(f"dataset.prompts.{kind}: {words!r} has no place for the task; write {{question}} there")
    return words


def encode_prompt(loaded: LoadedModel, question: str, template: str, start_with_think: bool = False) -> list[int]:
    """Ids of a user's turn asking `question` within the instruction `template`, up to where the assistant begins."""
    turn = {"role": "user", "content": template.replace("{question}", question)}
    return encode_turns(loaded, [turn], start_with_think)


def encode_turns(loaded: LoadedModel, turns: Sequence[dict[str, str]], start_with_think: bool = False) -> list[int]:
    """Ids of a conversation, turns of `role` and `content`, up to where the assistant begins."""
    text = loaded.tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)
    if start_with_think:
        text += "<think>"
    return loaded.tokenizer.encode(text, add_special_tokens=False)


def stop_ids_of(loaded: LoadedModel, tokens: Sequence[str] | None) -> tuple[int, ...]:
    """The ids of the given tokens, or the model's own stop ids where none are given."""
    if tokens is None:
        return loaded.stop_ids
    vocabulary = loaded.tokenizer.get_vocab()
    for token in tokens:
        if token not in vocabulary:
            raise UserError(f"rollout.stop_token_list: {token!r} is no token of the model's tokenizer; leave it out")
    return tuple(vocabulary[token] for token in tokens)
