"""From samples of a data set to examples: in the chat template, as ids, filled up, none lost without a word."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from common.records import Record
from common.schema import SFTConfig, SFTDatasetConfig
from data.sft_records import Answer, BadSample, Chat, Ids, Sample, Unwanted, load_samples
from models import LoadedModel
from models.family import Family
from models.prompts import ChatTemplateError, end_of_sequence, end_of_turn, instruction, turns_text
from train.views import Example

# Examples of one conversation, each of whose prompts goes on from the example before it. Under block attention they
# share one clean copy. A single question with its answer is a conversation of one.
Conversation = list[Example]

LONG_PROMPT = "prompts over training.max_prompt_len"
LONG_RESPONSE = "responses over training.max_gen_length"


@dataclass
class Samples:
    """What came of a data set."""

    conversations: list[Conversation] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)  # by reason
    first_bad: str = ""


Located = Sequence[tuple[str, Sample | BadSample]]  # samples with words for their places


def read_samples(dataset: SFTDatasetConfig) -> Located:
    """The samples of dataset.optimization_data, as data.sft_records.load_samples returns them."""
    return load_samples(
        dataset.optimization_data,
        prompt_key=dataset.prompt_key,
        response_key=dataset.response_key,
        correct_only=dataset.correct_only,
    )


def make_samples(config: SFTConfig, loaded: LoadedModel, located: Located) -> Samples:
    """Conversations of a data set's samples, too long ones counted; UserError for a bad one where that is asked for."""
    dataset, training = config.dataset, config.training
    around, stop = instruction_of(config, loaded.family), end_of_turn(loaded.tokenizer)
    samples = Samples()

    def make(sample: Sample) -> list[Example]:
        kept = []
        for example in encode_sample(sample, loaded.tokenizer, dataset, around, stop):
            if len(example.prompt_ids) > training.max_prompt_len:
                samples.left_out[LONG_PROMPT] += 1
            elif example.length > training.max_gen_length:
                samples.left_out[LONG_RESPONSE] += 1
            else:
                kept.append(fill(example, loaded, config))
        return kept

    for examples in usable(dataset, located, make, samples):
        samples.conversations += conversations_of(examples, loaded.family)
    if not samples.conversations:
        reasons = told_reasons(samples, training.max_prompt_len, training.max_gen_length)
        raise UserError(
            f"dataset.optimization_data: no sample of {dataset.optimization_data} can be used"
            + (f" ({reasons})" if reasons else "")
        )
    return samples


def usable(
    dataset: SFTDatasetConfig, located: Located, make: Callable[[Sample], list[Example]], samples: Samples
) -> Iterator[list[Example]]:
    """What `make` makes of each good sample; bad ones are refused or counted in `samples`, by dataset.bad_samples."""
    for place, sample in located:
        try:
            if isinstance(sample, BadSample):
                raise sample
            try:
                yield make(sample)
            except ChatTemplateError as error:
                raise BadSample("chat template", f"is not taken by the chat template: {error.reason}") from None
        except Unwanted as error:
            samples.left_out[error.reason] += 1
        except BadSample as error:
            told = str(error) if error is sample else f"{place} {error}"
            if dataset.bad_samples == "refuse":
                raise UserError(
                    f"dataset.optimization_data: {told} (dataset.bad_samples=skip leaves such samples out)"
                ) from None
            samples.left_out[error.reason] += 1
            samples.first_bad = samples.first_bad or told


def told_reasons(samples: Samples, max_prompt_len: int, max_gen_length: int) -> str:
    """Why samples were left out, counted, in one line; empty where none was."""
    limits = {LONG_PROMPT: max_prompt_len, LONG_RESPONSE: max_gen_length}
    told = [f"{count} {reason} {limits.get(reason, '')}".strip() for reason, count in samples.left_out.items()]
    return ", ".join(told) + (f"; the first: {samples.first_bad}" if samples.first_bad else "")


def instruction_of(config: SFTConfig, family: Family) -> str:
    """The text around a prompt, {question} in it; samples of code do not say how they are tested."""
    kind = "code_function" if config.dataset.data_type == "code" else config.dataset.data_type
    return instruction(family, kind, config.dataset.prompts, config.evaluation.start_with_think)


def encode_sample(
    sample: Sample, tokenizer: PreTrainedTokenizerBase, dataset: SFTDatasetConfig, around: str, stop: int
) -> list[Example]:
    """One example for each of the assistant's turns, not filled up, texts ended by `stop`.

    BadSample if unfit, ChatTemplateError if the template says so. Ids stay as they are: text is never made of them and
    tokenised again.
    """
    if isinstance(sample, Ids):
        ends = [n for n, token in enumerate(sample.response_ids, 1) if token in (stop, tokenizer.eos_token_id)]
        length = sample.length or (ends[0] if ends else len(sample.response_ids))
        return [Example(sample.prompt_ids, sample.response_ids, length, sample.step_map)]
    examples = []
    for prompt, response in _texts(sample, tokenizer, dataset, around, stop):
        if not response.strip():
            raise BadSample("empty response", "has a response that is nothing but its stop token")
        ids = [*tokenizer.encode(response, add_special_tokens=False), stop]
        steps = whole_step_map(sample.step_map, len(ids)) if isinstance(sample, Answer) else None
        examples.append(Example(tokenizer.encode(prompt, add_special_tokens=False), ids, len(ids), steps))
    return examples


def _texts(
    sample: Answer | Chat, tokenizer: PreTrainedTokenizerBase, dataset: SFTDatasetConfig, around: str, stop: int
) -> Iterator[tuple[str, str]]:
    """Prompt, and response without its stop token, of every turn to be learned."""
    if isinstance(sample, Answer) and not dataset.apply_chat_template:
        for field in ("system", "tools", "reasoning_content"):
            if getattr(sample, field):
                told = f"has `{field}`, which needs the chat template; dataset.apply_chat_template is False"
                raise BadSample("chat template", told)
        yield sample.prompt, without_stop(sample.response, tokenizer, stop)
        return
    if isinstance(sample, Answer):
        answer = {"role": "assistant", "content": sample.response}
        if sample.reasoning_content:
            answer["reasoning_content"] = sample.reasoning_content
        messages = [{"role": "user", "content": around.replace("{question}", sample.prompt)}, answer]
    else:
        messages = sample.messages
    said = {place for place, turn in enumerate(messages) if turn["role"] == "assistant"}
    messages = [
        turn | {"content": without_stop(turn["content"], tokenizer, stop)} if place in said else turn
        for place, turn in enumerate(messages)
    ]
    system = [{"role": "system", "content": sample.system}] if sample.system else []
    check_taken(tokenizer, system, messages, sample.tools)
    for place in sorted(said - set(sample.context_only if isinstance(sample, Chat) else ())):
        before, turn = [*system, *messages[:place]], messages[place]
        prompt = turns_text(tokenizer, before, tools=sample.tools)
        if turn.keys() == {"role", "content"}:
            yield prompt, turn["content"]
            continue
        whole = turns_text(tokenizer, [*before, turn], whole=True, tools=sample.tools)
        if not whole.startswith(prompt):
            told = f"has a message {place + 1} which the chat template writes otherwise than it begins an answer"
            raise BadSample("chat template", told)
        yield prompt, without_stop(whole.removeprefix(prompt), tokenizer, stop)


def without_stop(text: str, tokenizer: PreTrainedTokenizerBase, stop: int) -> str:
    """A response without the stop tokens, and the blanks behind them, that it already ends in."""
    ends = {tokenizer.convert_ids_to_tokens(stop), tokenizer.eos_token} - {None}
    while end := next((end for end in ends if text.rstrip().endswith(end)), None):
        text = text.rstrip().removesuffix(end)
    return text


def check_taken(
    tokenizer: PreTrainedTokenizerBase, system: list[Record], messages: list[Record], tools: list[Record] | None
) -> None:
    """BadSample where the chat template leaves out what a sample holds: it says the same without."""

    def written(turns: list[Record], whole: bool = False) -> str:
        return turns_text(tokenizer, [*system, *turns], whole, tools)

    left_out = []
    if tools and written(messages[:1]) == turns_text(tokenizer, [*system, messages[0]]):
        left_out.append("`tools`")
    # A template may have the same words for where there are none, so leaving them out need not change anything.
    if system and system[0]["content"].strip() not in written(messages[:1]):
        left_out.append("`system`")
    for place, turn in enumerate(messages):
        for name in ("reasoning_content", "tool_calls"):
            without = {key: value for key, value in turn.items() if key != name}
            before = messages[:place]
            if name in turn and written([*before, turn], True) == written([*before, without], True):
                left_out.append(f"`{name}` of the turn {place + 1}")
    if left_out:
        told = f"has {left_out[0]}, which the model's chat template leaves out; leave it out or take another template"
        raise BadSample("chat template", told)


def whole_step_map(step_map: list[int] | None, length: int) -> list[int] | None:
    """The step map of a text's response with a step for the stop token, the last where the data give none."""
    if step_map is None:
        return None
    if len(step_map) not in (length - 1, length):
        raise BadSample(
            "step map",
            f"has a `step_map` of {len(step_map)} entries; its response is {length - 1} tokens, or {length} with the "
            "stop token",
        )
    return step_map if len(step_map) == length else [*step_map, max(step_map, default=-1) + 1]


def fill(example: Example, loaded: LoadedModel, config: SFTConfig) -> Example:
    """The example as long as while it is sampled: whole blocks, or the canvas of full attention; BadSample if unfit.

    A trace keeps what was drawn behind the stop token, and places that it never unmasked stay masks. Otherwise stop
    tokens fill the rest.
    """
    training, family = config.training, loaded.family
    replayed = training.method == "trace"
    response, steps = example.response_ids[: example.length], None
    if replayed:
        if example.step_map is None:
            raise BadSample("no step map", "has no `step_map`, which training.method=trace replays")
        response, steps = example.response_ids, example.step_map
    drawn = [token for token, step in zip(response, steps or [0] * len(response)) if step >= 0]
    vocabulary = loaded.model.config.vocab_size
    if max([*example.prompt_ids, *response]) >= vocabulary:
        raise BadSample("ids", f"has token ids beyond the {vocabulary} of the model; were they made by another?")
    if loaded.mask_id in drawn or not drawn:
        raise BadSample("ids", "has the mask token in its response, or nothing but masks")
    if family.attention == "block":
        padding = -(len(example.prompt_ids) + len(response)) % training.block_size
    elif len(response) > example.length:  # the canvas that it was drawn on
        padding = 0
    else:
        padding = -(-training.max_gen_length // training.block_size) * training.block_size - len(response)
    if padding > 0:
        response = response + [end_of_sequence(loaded.tokenizer)] * padding
    return Example(example.prompt_ids, response, example.length, steps and steps + [-1] * padding)


def conversations_of(examples: Sequence[Example], family: Family) -> list[Conversation]:
    """Examples of one sample, together as far as one's prompt goes on from the last and attention lets them share."""
    conversations: list[Conversation] = []
    for example in examples:
        if family.attention == "block" and conversations and goes_on(conversations[-1][-1], example):
            conversations[-1].append(example)
        else:
            conversations.append([example])
    return conversations


def goes_on(before: Example, after: Example) -> bool:
    """Whether a prompt begins with all that the views of an earlier example see clean."""
    whole = before.prompt_ids + before.response_ids[: before.length - 1]
    return after.prompt_ids[: len(whole)] == whole and len(after.prompt_ids) > len(whole)


def split(
    conversations: Sequence[Conversation], share: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Conversations to learn from and to validate on, the latter all those of a `share` of the prompts.

    Which prompts these are depends on a hash of the prompt and the seed, not on their order. UserError where nothing
    would be left to learn from.
    """
    if share == 0:
        return list(conversations), []
    hashes = [_hash(conversation[0].prompt_ids, seed) for conversation in conversations]
    prompts = sorted(set(hashes))
    chosen = set(prompts[: int(np.ceil(share * len(prompts)))])
    if len(chosen) == len(prompts):
        raise UserError(
            f"dataset.validation_share={share:g} of {len(prompts)} prompts leaves none to learn from; lower it"
        )
    pairs = list(zip(conversations, hashes))
    return [one for one, value in pairs if value not in chosen], [one for one, value in pairs if value in chosen]


def _hash(prompt_ids: Sequence[int], seed: int) -> str:
    return hashlib.sha256(f"{seed}:{','.join(map(str, prompt_ids))}".encode()).hexdigest()
