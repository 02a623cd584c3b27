"""From samples of a data set to examples: in the chat template, as ids, filled up; what is left out is counted."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from common.jobs import SFTConfig
from common.metrics import print_table
from common.records import Record
from common.runtime import console
from common.schema import SFTDatasetConfig, SFTTrainingConfig
from data.sft_records import Answer, BadSample, Chat, Ids, Rejected, Sample, Text, load_samples
from models import LoadedModel
from models.family import Family, find_family, local_folder
from models.prompts import ChatTemplateError, end_of_sequence, end_of_turn, instruction, turns_text
from models.tokenizer import Unreadable, check_readable, load_tokenizer
from train.views import Example

# Examples of one conversation, each of whose prompts goes on from the example before it. Under block attention they
# share one clean copy. A single question with its answer is a conversation of one.
Conversation = list[Example]

CANVAS_SAMPLES = 4  # that share a canvas: the rows a GPU of the original's, where LLaDA fills up to the longest

LONG_PROMPT = "prompts over training.max_prompt_len"
LONG_RESPONSE = "responses over training.max_gen_length"
Located = Sequence[tuple[str, Sample | Rejected]]  # samples with words for their places in the data set


@dataclass
class Samples:
    """What came of a data set."""

    conversations: list[Conversation] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)  # by reason
    first_bad: str = ""

    def encoded(
        self,
        place: str,
        sample: Sample | Rejected,
        encode: Callable[[Sample], list[Example]],
        dataset: SFTDatasetConfig,
    ) -> list[Example]:
        """What `encode` makes of the sample at that place of the data set; none, and counted, where it is not fit.

        UserError for a bad sample where dataset.bad_samples refuses such.
        """
        try:
            if not isinstance(sample, Rejected):
                return encode(sample)
            rejected = sample
        except ChatTemplateError as error:
            rejected = Rejected("chat template", f"{place} is not taken by the chat template: {error.reason}")
        except BadSample as error:
            rejected = Rejected(error.reason, f"{place} {error}")
        except Unreadable as error:
            rejected = Rejected("unread characters", f"{place} is not read: {error.reason}")
        if rejected.bad and dataset.bad_samples == "refuse":
            raise UserError(
                f"dataset.optimization_data: {rejected.message} (dataset.bad_samples=skip leaves such samples out)"
            )
        self.left_out[rejected.reason] += 1
        if rejected.bad:
            self.first_bad = self.first_bad or rejected.message
        return []

    def reasons(self, training: SFTTrainingConfig) -> str:
        """Why samples were left out, counted, in one line; empty where none was."""
        limits = {LONG_PROMPT: training.max_prompt_len, LONG_RESPONSE: training.max_gen_length}
        counts = [f"{count} {reason} {limits.get(reason, '')}".strip() for reason, count in self.left_out.items()]
        return ", ".join(counts) + (f"; the first: {self.first_bad}" if self.first_bad else "")


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

    def encode(sample: Sample) -> list[Example]:
        examples = encode_sample(sample, loaded.tokenizer, loaded.family, config, around, stop)
        return [example if too_long(example, training) else fill(example, loaded, config) for example in examples]

    samples = Samples()
    for place, sample in located:
        kept = []
        for example in samples.encoded(place, sample, encode, dataset):
            if reason := too_long(example, training):
                samples.left_out[reason] += 1
            else:
                kept.append(example)
        samples.conversations += conversations_of(kept, loaded.family)
    if not samples.conversations:
        problem = f"no sample of {dataset.optimization_data} can be used ({samples.reasons(training)})"
        raise UserError(f"dataset.optimization_data: {problem}")
    return samples


def too_long(example: Example, training: SFTTrainingConfig) -> str | None:
    """The reason that an example is too long under, if it is."""
    if len(example.prompt_ids) > training.max_prompt_len:
        return LONG_PROMPT
    return LONG_RESPONSE if example.length > training.max_gen_length else None


def instruction_of(config: SFTConfig, family: Family) -> str:
    """The text around a prompt, {question} in it; samples of code do not say how they are tested."""
    kind = "code_function" if config.dataset.data_type == "code" else config.dataset.data_type
    return instruction(family, kind, config.dataset.prompts, config.evaluation.start_with_think)


# --- from a sample to token ids


def encode_sample(
    sample: Sample, tokenizer: PreTrainedTokenizerBase, family: Family, config: SFTConfig, around: str, stop: int
) -> list[Example]:
    """One example for each of the assistant's turns, or each piece of a text, not filled up; `stop` ends a turn.

    BadSample if unfit, Unreadable if the tokenizer has no token for its characters, ChatTemplateError if the template
    says so. Ids stay as they are: text is never made of them and tokenised again.
    """
    dataset = config.dataset
    for text in texts_of(sample):
        check_readable(tokenizer, text, "dataset.optimization_data")
    if isinstance(sample, Text):
        return text_pieces(sample, tokenizer, family, config.training)
    if isinstance(sample, Ids):
        ends = [n for n, token in enumerate(sample.response_ids, 1) if token in (stop, tokenizer.eos_token_id)]
        length = sample.length or (ends[0] if ends else len(sample.response_ids))
        return [Example(sample.prompt_ids, sample.response_ids, length, sample.step_map, sample.overwritten)]
    step_map, overwritten = (None, []) if isinstance(sample, Chat) else (sample.step_map, sample.overwritten)
    if isinstance(sample, Chat):
        pairs = chat_turns(sample, tokenizer, stop)
    elif dataset.apply_chat_template:
        pairs = chat_turns(as_chat(sample, around), tokenizer, stop)
    else:
        pairs = [(sample.prompt, without_stop(sample.response, tokenizer, stop))]
        for name in ("system", "tools", "reasoning_content"):
            if getattr(sample, name):
                problem = f"has `{name}`, which needs the chat template; dataset.apply_chat_template is False"
                raise BadSample("chat template", problem)
    examples = []
    for prompt, response in pairs:
        if not response.strip():
            raise BadSample("empty response", "has a response that is nothing but its stop token")
        ids = [*tokenizer.encode(response, add_special_tokens=False), stop]
        steps = whole_step_map(step_map, len(ids))
        examples.append(Example(tokenizer.encode(prompt, add_special_tokens=False), ids, len(ids), steps, overwritten))
    return examples


def texts_of(sample: Sample) -> list[str]:
    """What a sample itself says, without the words that the config puts around it."""
    if isinstance(sample, Chat):
        return [turn["content"] for turn in sample.messages if turn.get("content")]
    if isinstance(sample, Answer):
        return [sample.prompt, sample.response]
    return [sample.text] if isinstance(sample, Text) else []


def text_pieces(
    sample: Text, tokenizer: PreTrainedTokenizerBase, family: Family, training: SFTTrainingConfig
) -> list[Example]:
    """A text, ended by the end of sequence, in pieces of as many whole blocks as training.max_gen_length holds.

    A piece is a response to no prompt. Where logits are shifted the prompt is the token before it, in the text's first
    piece the text's first token, which nothing predicts.
    """
    ids = [*tokenizer.encode(sample.text, add_special_tokens=False), end_of_sequence(tokenizer)]
    length = training.max_gen_length // training.block_size * training.block_size or training.max_gen_length
    given = -family.logit_offset  # tokens at the beginning that are not predicted
    pieces = [ids[start : start + given + length] for start in range(0, len(ids) - given, length)]
    return [Example(piece[:given], piece[given:], len(piece) - given) for piece in pieces]


def as_chat(sample: Answer, around: str) -> Chat:
    """An answer as a conversation of one question, within its instruction."""
    answer = {"role": "assistant", "content": sample.response}
    if sample.reasoning_content:
        answer["reasoning_content"] = sample.reasoning_content
    question = {"role": "user", "content": around.replace("{question}", sample.prompt)}
    return Chat([question, answer], (1,), sample.system, sample.tools)


def chat_turns(sample: Chat, tokenizer: PreTrainedTokenizerBase, stop: int) -> Iterator[tuple[str, str]]:
    """Prompt, and response without its stop token, of every turn of the assistant that is to be learned."""
    messages = [
        turn | {"content": without_stop(turn["content"], tokenizer, stop)} if turn["role"] == "assistant" else turn
        for turn in sample.messages
    ]
    system = [{"role": "system", "content": sample.system}] if sample.system else []
    if ignored := ignored_by_template(tokenizer, system, messages, sample.tools):
        problem = "which the model's chat template leaves out; leave it out or take another template"
        raise BadSample("chat template", f"has {ignored}, {problem}")
    for index in sample.learned:
        turn, before = messages[index], [*system, *messages[:index]]
        prompt = turns_text(tokenizer, before, tools=sample.tools)
        if turn.keys() == {"role", "content"}:
            yield prompt, turn["content"]
            continue
        whole = turns_text(tokenizer, [*before, turn], whole=True, tools=sample.tools)
        if not whole.startswith(prompt):
            problem = f"has a message {index + 1} which the chat template writes otherwise than it begins an answer"
            raise BadSample("chat template", problem)
        yield prompt, without_stop(whole.removeprefix(prompt), tokenizer, stop)


def without_stop(text: str, tokenizer: PreTrainedTokenizerBase, stop: int) -> str:
    """A response without the stop tokens, and the blanks behind them, that it already ends in."""
    ends = {tokenizer.convert_ids_to_tokens(stop), tokenizer.eos_token} - {None}
    while end := next((end for end in ends if text.rstrip().endswith(end)), None):
        text = text.rstrip().removesuffix(end)
    return text


def ignored_by_template(
    tokenizer: PreTrainedTokenizerBase, system: list[Record], messages: list[Record], tools: list[Record] | None
) -> str | None:
    """The first part of a sample that the chat template leaves out: what it writes is the same without."""

    def written(turns: list[Record], whole: bool = False) -> str:
        return turns_text(tokenizer, [*system, *turns], whole, tools)

    if tools and written(messages[:1]) == turns_text(tokenizer, [*system, messages[0]]):
        return "`tools`"
    # A template may have the same words for where there are none, so leaving them out need not change anything.
    if system and system[0]["content"].strip() not in written(messages[:1]):
        return "`system`"
    for index, turn in enumerate(messages):
        for name in ("reasoning_content", "tool_calls"):
            without = {key: value for key, value in turn.items() if key != name}
            before = messages[:index]
            if name in turn and written([*before, turn], True) == written([*before, without], True):
                return f"`{name}` of the turn {index + 1}"
    return None


def whole_step_map(step_map: list[int] | None, length: int) -> list[int] | None:
    """The step map of a text's response with a step for the stop token, the last where the data give none."""
    if step_map is None:
        return None
    if len(step_map) not in (length - 1, length):
        counted = f"{length - 1} tokens, or {length} with the stop token"
        raise BadSample("step map", f"has a `step_map` of {len(step_map)} entries; its response is {counted}")
    return step_map if len(step_map) == length else [*step_map, max(step_map, default=-1) + 1]


def fill(example: Example, loaded: LoadedModel, config: SFTConfig) -> Example:
    """The example as long as while it is sampled: whole blocks, or the canvas of full attention; BadSample if unfit.

    A trace keeps what was drawn behind the stop token, and positions that it never unmasked, or revoked in the end,
    stay masks. Otherwise stop tokens fill the rest; where the canvas is a batch's they do so when it is made.
    """
    training, family = config.training, loaded.family
    if family.logit_offset and not example.prompt_ids:
        raise BadSample("ids", f"has empty `prompt_ids`; {family.name} predicts a token at the one before it")
    response, steps, overwritten = example.response_ids[: example.length], None, []
    if training.method == "trace":
        if example.step_map is None:
            raise BadSample("no step map", "has no `step_map`, which training.method=trace replays")
        response, steps, overwritten = example.response_ids, example.step_map, example.overwritten
    revoked = {writing.position for writing in overwritten}
    written = [(n, token) for n, (token, step) in enumerate(zip(response, steps or [0] * len(response))) if step >= 0]
    drawn = [token for n, token in written if token != loaded.mask_id or n not in revoked]
    vocabulary = loaded.model.config.vocab_size
    if max([*example.prompt_ids, *response, *(writing.token for writing in example.overwritten)]) >= vocabulary:
        raise BadSample("ids", f"has token ids beyond the {vocabulary} of the model; were they made by another?")
    if loaded.mask_id in drawn or not drawn:
        raise BadSample("ids", "has the mask token in its response, or nothing but masks")
    full = family.attention == "full"
    filled_later = full and training.canvas == "batch" and training.method != "trace"  # by `level`
    if family.attention == "block":
        padding = -(len(example.prompt_ids) + len(response)) % training.block_size
    elif filled_later or len(response) > example.length:  # the latter is the canvas that it was drawn on
        padding = 0
    else:
        padding = -(-training.max_gen_length // training.block_size) * training.block_size - len(response)
    if padding > 0 or filled_later:  # a tokenizer without one is a mistake that shows here
        response = response + [end_of_sequence(loaded.tokenizer)] * max(0, padding)
    return Example(example.prompt_ids, response, example.length, steps and steps + [-1] * padding, overwritten)


def level(
    conversations: Sequence[Conversation], loaded: LoadedModel, training: SFTTrainingConfig
) -> list[Conversation]:
    """The conversations with responses filled up by the end of sequence to a canvas, where attention is full.

    The canvas is the longest response of each `CANVAS_SAMPLES` in a row, in whole blocks. So it depends on the order
    of the samples alone, not on how an update is cut into micro-batches or shared out among ranks.
    """
    if loaded.family.attention != "full" or training.method == "trace":
        return list(conversations)
    size, levelled = training.block_size, []
    for start in range(0, len(conversations), CANVAS_SAMPLES):
        group = conversations[start : start + CANVAS_SAMPLES]
        longest = max(len(example.response_ids) for conversation in group for example in conversation)
        canvas = -(-longest // size) * size
        levelled += [[widened(example, canvas, loaded) for example in conversation] for conversation in group]
    return levelled


def widened(example: Example, canvas: int, loaded: LoadedModel) -> Example:
    """The example with the end of sequence behind its response, up to so many tokens."""
    missing = canvas - len(example.response_ids)
    if missing == 0:
        return example
    return replace(example, response_ids=example.response_ids + [end_of_sequence(loaded.tokenizer)] * missing)


def conversations_of(examples: Sequence[Example], family: Family) -> list[Conversation]:
    """Examples of one sample, together as far as one's prompt goes on from the last and attention lets them share."""
    conversations: list[Conversation] = []
    seen: list[int] = []  # clean, by the views of the example before
    for example in examples:
        prompt = example.prompt_ids
        if family.attention == "block" and conversations and prompt[: len(seen)] == seen and len(prompt) > len(seen):
            conversations[-1].append(example)
        else:
            conversations.append([example])
        seen = prompt + example.response_ids[: example.length - 1]
    return conversations


def split(
    conversations: Sequence[Conversation], share: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Conversations to learn from and to validate on, the latter all those of a `share` of the prompts.

    Which prompts these are depends on a hash of the prompt and the seed, not on their order. A piece of a text, which
    has no prompt, counts as one of its own. UserError where nothing would be left to learn from.
    """
    if share == 0:
        return list(conversations), []
    firsts = [conversation[0] for conversation in conversations]
    keys = [",".join(map(str, one.prompt_ids or one.response_ids)) for one in firsts]
    hashes = [hashlib.sha256(f"{seed}:{key}".encode()).hexdigest() for key in keys]
    prompts = sorted(set(hashes))
    chosen = set(prompts[: int(np.ceil(share * len(prompts)))])
    if len(chosen) == len(prompts):
        raise UserError(
            f"dataset.validation_share={share:g} of {len(prompts)} prompts leaves none to learn from; lower it"
        )
    learned = [conversation for conversation, value in zip(conversations, hashes) if value not in chosen]
    held_out = [conversation for conversation, value in zip(conversations, hashes) if value in chosen]
    return learned, held_out


# --- samples written to a file (train.prepare_sft)


def write_prepared(config: SFTConfig, out: Path) -> None:
    """Write the samples of the config's data set to `out`, encoded.

    Printed are their lengths in tokens, how many are over the config's limits, and what was left out and why.
    """
    dataset = config.dataset
    tokenizer = load_tokenizer(local_folder(config.model.pretrained_model))
    family = find_family(config.model.model_base)
    around, stop = instruction_of(config, family), end_of_turn(tokenizer)
    samples, examples = Samples(), []

    def encode(sample: Sample) -> list[Example]:
        return encode_sample(sample, tokenizer, family, config, around, stop)

    for place, sample in read_samples(dataset):
        examples += samples.encoded(place, sample, encode, dataset)
    if not examples:
        raise UserError(f"dataset.optimization_data: {dataset.optimization_data} has no sample that can be learned")
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") as file:
        for example in examples:
            line = {key: value for key, value in vars(example).items() if value is not None}
            if not example.overwritten:
                del line["overwritten"]
            line["prompt"] = tokenizer.decode(example.prompt_ids)
            line["response"] = tokenizer.decode(example.response_ids[: example.length])
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    training = config.training
    table = [
        length_row("prompt", [len(example.prompt_ids) for example in examples], training.max_prompt_len),
        length_row("response", [example.length for example in examples], training.max_gen_length),
    ]
    print_table(table, title=f"{out}: {len(examples)} samples")
    console.print(
        f"limits: training.max_prompt_len {training.max_prompt_len}, training.max_gen_length "
        f"{training.max_gen_length}; longer samples are left out of finetuning"
    )
    if samples.left_out:
        console.print(f"left out: {samples.reasons(training)}")


def length_row(name: str, lengths: list[int], limit: int) -> dict[str, str | float]:
    """A row of a table on lengths in tokens: mean, percentiles, and how many are over the limit."""
    row = {"tokens of": name, "mean": float(np.mean(lengths))}
    row |= {label: int(np.percentile(lengths, share)) for label, share in (("half", 50), ("90 %", 90), ("99 %", 99))}
    return row | {"longest": max(lengths), "over the limit": sum(length > limit for length in lengths)}
