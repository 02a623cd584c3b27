"""From a question to prompt ids, by the tokenizer's own chat template."""

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from common.schema import PromptsConfig
from models.family import Family, LoadedModel

# Instructions around puzzles, for which no family has words of its own; what they ask for is what d1 asks for.
PUZZLES = {
    "countdown": (
        "Here are some numbers and, after the equals sign, a target: {question}\n"
        "Find an arithmetic expression that equals the target exactly. Use each of the numbers exactly once, and no "
        "others; you may add, subtract, multiply, divide and set parentheses. Reason step by step, then put the "
        "expression alone, without an equals sign, in \\boxed{}."
    ),
    "sudoku": (
        "This is a 4x4 Sudoku, its cells row by row from the top left, 0 where a cell is empty: {question}\n"
        "Fill the empty cells so that each row, each column and each of the four 2x2 boxes holds the digits 1 to 4 "
        "once. Reason step by step, then put the whole board, 16 digits without anything between them, in \\boxed{}."
    ),
}


class ChatTemplateError(UserError):
    """A conversation that the tokenizer's chat template does not take; `reason` is the template's own."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, reason: str):
        super().__init__(
            f"model.pretrained_model: the chat template of {tokenizer.name_or_path} does not take the conversation "
            f"({reason}); change the one or the other"
        )
        self.reason = reason


def instruction(family: Family, kind: str, own: PromptsConfig, thinking: bool = False) -> str:
    """The text around {question} for a kind of task: the config's own, else the family's, else a puzzle's, or none.

    A family may word a kind in another way where the assistant's turn begins with a thought. UserError where the words
    leave no place for the question.
    """
    published = family.instructions
    words = getattr(own, kind) or (thinking and published.get(f"{kind}_think")) or published.get(kind)
    words = words or PUZZLES.get(kind, "{question}")
    if "{question}" not in words:
        raise UserError(f"dataset.prompts.{kind}: {words!r} has no place for the task; write {{question}} there")
    return words


def encode_prompt(loaded: LoadedModel, question: str, template: str, start_with_think: bool = False) -> list[int]:
    """Ids of a user's turn asking `question` within the instruction `template`, up to where the assistant begins."""
    turn = {"role": "user", "content": template.replace("{question}", question)}
    return encode_turns(loaded, [turn], start_with_think)


def encode_turns(loaded: LoadedModel, turns: Sequence[dict[str, str]], start_with_think: bool = False) -> list[int]:
    """Ids of a conversation, turns of `role` and `content`, up to where the assistant begins."""
    text = turns_text(loaded.tokenizer, list(turns))
    if start_with_think:
        text += "<think>"
    return loaded.tokenizer.encode(text, add_special_tokens=False)


def turns_text(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[dict[str, Any]],
    whole: bool = False,
    tools: Sequence[dict[str, Any]] | None = None,
) -> str:
    """A conversation in the tokenizer's chat template: up to where the assistant answers, or (`whole`) as it stands.

    Turns have `role` and `content` and whatever else the template reads. UserError where there is no template,
    ChatTemplateError where it takes no such conversation.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"model.pretrained_model: the tokenizer of {tokenizer.name_or_path} has no chat template; "
            "copy chat_template.jinja there from a model that was made for conversations"
        )
    try:
        return tokenizer.apply_chat_template(list(turns), tools=tools, tokenize=False, add_generation_prompt=not whole)
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
        lines = str(error).strip().splitlines()
        raise ChatTemplateError(tokenizer, (lines[0] if lines else type(error).__name__)[:200]) from None


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id with which the chat template ends an assistant's turn; the end of sequence where there is no such.

    UserError where the tokenizer has neither.
    """
    if tokenizer.chat_template:
        answer = "7"
        turns = [{"role": "user", "content": answer}, {"role": "assistant", "content": answer}]
        _, found, after = turns_text(tokenizer, turns, whole=True).rpartition(answer)
        special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        for id in tokenizer.encode(after, add_special_tokens=False):
            if found and id in special:
                return id
    return end_of_sequence(tokenizer)


def end_of_sequence(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a text and fills what lies behind it; UserError where the tokenizer names none."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.pretrained_model: the tokenizer of {tokenizer.name_or_path} has no eos_token, with which responses "
            "end and are filled up; set eos_token in its tokenizer_config.json"
        )
    return tokenizer.eos_token_id


def stop_ids_of(loaded: LoadedModel, tokens: Sequence[str] | None) -> tuple[int, ...]:
    """The model's own stop ids and those of the given tokens, ascending; UserError for a token that it lacks."""
    vocabulary = loaded.tokenizer.get_vocab() if tokens else {}
    for token in tokens or ():
        if token not in vocabulary:
            raise UserError(f"rollout.stop_token_list: {token!r} is no token of the model's tokenizer; leave it out")
    return tuple(sorted({*loaded.stop_ids, *(vocabulary[token] for token in tokens or ())}))
