"""From a question to a prompt: by the tokenizer's own chat template, or in the very text of a published evaluation."""

import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from common.schema import EvalDatasetConfig, PromptsConfig
from common.trajectory import Task
from models.family import Family, LoadedModel
from models.tokenizer import check_readable

# Around each question where worked examples stand before the task, as lm-evaluation-harness words GSM8K (its
# lm_eval/tasks/gsm8k/gsm8k.yaml): an example's answer follows behind a blank, the next question after an empty line.
WORKED = "Question: {question}\nAnswer:"
WorkedExample = tuple[str, str]  # a question and its answer
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
        raise UserError(f"dataset.prompts.{kind}: {words!r} lacks the task; write {{question}} where it belongs")
    return words


def words_around(family: Family, kind: str, dataset: EvalDatasetConfig, thinking: bool) -> str:
    """As `instruction`, but WORKED where worked examples are asked for and the config has no words of its own."""
    if dataset.few_shot and not getattr(dataset.prompts, kind):
        return WORKED
    return instruction(family, kind, dataset.prompts, thinking)


def task_text(
    tokenizer: PreTrainedTokenizerBase,
    family: Family,
    task: Task,
    kind: str,
    dataset: EvalDatasetConfig,
    thinking: bool,
    examples: Sequence[WorkedExample] = (),
) -> str:
    """The whole prompt of a task of that kind, in the style of `dataset.prompt_style`, up to where the answer begins.

    Worked `examples` stand before it in the same turn. `thinking` begins the answer by <think>, but for a function,
    whose code stands at once; the task's prefix, on a line of its own, begins it too. UserError where the style has no
    text for such a task, or holds tokens that the tokenizer lacks.
    """
    thinking = thinking and kind != "code_function"
    words = words_around(family, kind, dataset, thinking)
    worked = [f"{words.replace('{question}', question)} {answer}" for question, answer in examples]
    turn = "\n\n".join([*worked, words.replace("{question}", task.question)])
    if dataset.prompt_style == "published":
        text = published_turn(tokenizer, family, kind, dataset.prompts, thinking).replace("{turn}", turn)
    else:
        text = turns_text(tokenizer, [{"role": "user", "content": turn}])
    text += "<think>" if thinking else ""
    return text + "\n" * (not text.endswith("\n")) + task.prefix if task.prefix else text


def published_turn(
    tokenizer: PreTrainedTokenizerBase, family: Family, kind: str, own: PromptsConfig, thinking: bool
) -> str:
    """The text around the user's {turn} in the family's published evaluation; UserError where there was none such."""
    name, tokens = family.name, re.findall(r"<\|\w+\|>", family.published_turn)
    unknown = [token for token in tokens if tokenizer.backend_tokenizer.token_to_id(token) is None]
    problem = ""
    if not family.published_turn:
        problem = f"no prompts were published for {name}; set it to template"
    elif not (kind in family.instructions or getattr(own, kind)):
        problem = f"no prompt of {name} was published for {kind}; give dataset.prompts.{kind}, or set it to template"
    elif thinking and "math_think" not in family.instructions:
        problem = f"no prompts of {name} were published with start_with_think; set that to false, or this to template"
    elif unknown:
        problem = f"{tokenizer.name_or_path} has no token {unknown[0]}, as {name}'s prompts have; set it to template"
    if problem:
        raise UserError(f"dataset.prompt_style=published: {problem}")
    return family.published_turn


def encode_prompt(loaded: LoadedModel, question: str, template: str, start_with_think: bool = False) -> list[int]:
    """Ids of a user's turn asking `question` within the instruction `template`, up to where the assistant begins."""
    turn = {"role": "user", "content": template.replace("{question}", question)}
    return encode_turns(loaded, [turn], start_with_think)


def encode_turns(loaded: LoadedModel, turns: Sequence[dict[str, str]], start_with_think: bool = False) -> list[int]:
    """Ids of a conversation, turns of `role` and `content`, up to where the assistant begins.

    UserError where it does not fit the chat template, or holds characters that the tokenizer has no token for.
    """
    text = turns_text(loaded.tokenizer, list(turns))
    if start_with_think:
        text += "<think>"
    check_readable(loaded.tokenizer, text, "prompt")
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
