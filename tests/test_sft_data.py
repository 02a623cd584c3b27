"""What finetuning reads: answers, chats, columns and drawn samples; bad and long samples told, none lost silently."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import training_reference as plain

from common.config import load_config
from common.errors import UserError
from common.jobs import SFTConfig
from common.schema import Sampling, SFTTrainingConfig
from common.trajectory import Request, Score, ScoredTrajectory, Task
from data.check import check_file
from data.sft_records import Answer, Chat, Ids, Text, load_samples
from models import LoadedModel, load_model
from models.tiny import build_tiny
from rollout.samples import write_samples
from sample.engine import Engine
from train import prepare_sft
from train.sft_data import Samples, level, make_samples, read_samples, split, write_prepared
from train.sft_trainer import rows_of
from train.views import Example, Layout, trace_views

ROOT = Path(__file__).resolve().parents[1]
CHAT = [
    {"role": "user", "content": "1+2"},
    {"role": "assistant", "content": "3"},
    {"role": "user", "content": "4"},
    {"role": "assistant", "content": "3+4=7"},
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedModel]:
    folder = tmp_path_factory.mktemp("models")
    for family in ("sdar", "dream"):
        build_tiny(family, folder / family, seed=3)
    return {family: load_model(folder / family, family) for family in ("sdar", "dream")}


# Raises at a turn of a tool that says so, and is nothing else.
REFUSING = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}"
)
# As those of thinking models with tools are: the last thought is written, older ones are not.
THINKING = (
    "{% if tools %}<|im_start|>{% for tool in tools %}[{{ tool | tojson }}]{% endfor %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>"
    "{% if m.reasoning_content and loop.last %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<{{ call.function.arguments | tojson }}>{% endfor %}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def with_template(loaded: LoadedModel, template: str) -> LoadedModel:
    """The model with another chat template; the one given stays as it is."""
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.chat_template = template
    return dataclasses.replace(loaded, tokenizer=tokenizer)


def learned(loaded: LoadedModel, config: SFTConfig) -> list[tuple[str, str]]:
    """Prompt and response of every example, as text."""
    examples = [one for conversation in samples_of(loaded, config).conversations for one in conversation]
    return [(text(loaded, one.prompt_ids), text(loaded, one.response_ids[: one.length])) for one in examples]


def write(path: Path, records: list) -> Path:
    """A .jsonl file; a text stands there as it is."""
    lines = [one if isinstance(one, str) else json.dumps(one) for one in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def config_of(data: Path, **changes: object) -> SFTConfig:
    """The tiny config on that data; keywords are keys with __ for the dot."""
    values = {"dataset.optimization_data": data, "training.method": "semi-ar", "training.max_gen_length": 24}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return load_config("sft", [f"config={ROOT}/configs/sft_tiny.yaml", *(f"{k}={v}" for k, v in values.items())])


def samples_of(loaded: LoadedModel, config: SFTConfig) -> Samples:
    return make_samples(config, loaded, read_samples(config.dataset))


def text(loaded: LoadedModel, ids: list[int]) -> str:
    return loaded.tokenizer.decode(ids)


# ---- what a record is


def test_forms_of_a_record(tmp_path: Path) -> None:
    """Ids before texts, texts before messages; blank lines count as lines."""
    path = write(
        tmp_path / "x.jsonl",
        [
            {"prompt": "a", "response": 4},
            "",
            {"prompt": "a", "messages": CHAT},
            {"prompt": "a", "response": "b", "prompt_ids": [1], "response_ids": [2, 3], "step_map": [1, 0]},
            {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]},
            {"text": "a", "prompt": None, "url": "b"},
            {"text": "a", "messages": CHAT[:2]},
        ],
    )
    samples = load_samples(str(path))
    assert [sample for _, sample in samples] == [
        Answer("a", "4"),
        Chat(CHAT, (1, 3)),
        Ids([1], [2, 3], [1, 0]),
        Chat([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], (1,)),
        Text("a"),
        Chat(CHAT[:2], (1,)),
    ]
    assert [place for place, _ in samples][1] == f"line 3 of '{path}'"
    assert check_file(str(write(tmp_path / "y.jsonl", [{"messages": CHAT}]))).endswith(
        "(1 conversations), 0 with a step map"
    )
    assert "2 SFT samples (2 texts)" in check_file(str(write(tmp_path / "z.jsonl", [{"text": "a"}, {"text": "b"}])))


def test_columns_by_key_from_parquet(tmp_path: Path, tiny: dict[str, LoadedModel]) -> None:
    table = pyarrow.Table.from_pylist([{"problem": "1+2", "solution": "3", "response_ids": None}])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    keys = {"dataset__prompt_key": "problem", "dataset__response_key": "solution"}
    config = config_of(tmp_path / "x.parquet", **keys, dataset__prompts__math="'{question}='")
    example = samples_of(tiny["sdar"], config).conversations[0][0]
    assert text(tiny["sdar"], example.prompt_ids) == "<|im_start|>1+2=<|assistant|>"
    assert text(tiny["sdar"], example.response_ids[: example.length]) == "3<|im_end|>"
    with pytest.raises(UserError, match=r"record 1 .* has no `prompt` .*name yours in dataset\.prompt_key"):
        samples_of(tiny["sdar"], config_of(tmp_path / "x.parquet"))


NAN = float("nan")


def saying(**changes: object) -> dict:
    """A question and an answer to it, whose fields may be others."""
    return {"messages": [CHAT[0], CHAT[1] | changes]}


EDITED = {"prompt_ids": [1], "response_ids": [2, 3], "step_map": [2, 1]}
BAD = [
    ("{broken", "is not valid JSON", "broken line"),
    ("[1, 2]", "is a list, not an object", "broken line"),
    ({"prompt": "1+2"}, "has no `response` that is text", "no response"),
    ({"prompt": "1+2", "response": " "}, "has an empty `response`", "empty response"),
    ({"prompt": "", "response": "3"}, "has an empty `prompt`", "empty prompt"),
    ({"prompt": "1", "response": "3", "step_map": [0.5]}, "not a list of whole numbers", "step map"),
    ({"prompt": "1", "response": "345", "step_map": [0, 1]}, "`step_map` of 2 entries.* 3 tokens, or 4", "step map"),
    ({"prompt_ids": [1], "response_ids": [2, 3], "step_map": [0]}, "1 entries for 2 `response_ids`", "step map"),
    (EDITED | {"overwritten": "3"}, r"`overwritten` that is not a list of \[step, position", "overwritten"),
    (EDITED | {"overwritten": [[0, 0, 3]]}, r"an entry 1 of `overwritten` that is not a list", "overwritten"),
    (EDITED | {"overwritten": [[0, 0, 2.5, -1]]}, r"an entry 1 of `overwritten` .* \[0, 0, 2.5, -1\]", "overwritten"),
    (EDITED | {"overwritten": [[0, 2, 3, -1]]}, "overwrites the position 2 of a response of 2 tokens", "overwritten"),
    (EDITED | {"overwritten": [[1, 1, 3, -1]]}, "position 1 in step 1, .* before its step 1 in the", "overwritten"),
    (EDITED | {"overwritten": [[1, 0, 3, -1], [1, 0, 4, -1]]}, "in step 1, which is not after its step", "overwritten"),
    (EDITED | {"overwritten": [[0, 0, 999, -1]]}, "token ids beyond the 39 of the model", "ids"),
    ({"prompt": "1", "response": "3", "overwritten": [[0, 0, 3, -1]]}, "without a `step_map`", "overwritten"),
    ({"prompt_ids": [1], "response_ids": [2, 999]}, "token ids beyond the 39 of the model", "ids"),
    ({"prompt_ids": [1], "response_ids": [2], "length": 2}, "has the `length` 2", "ids"),
    ({"response_ids": [2, 3]}, "has no `prompt_ids`", "ids"),
    ({"prompt": "1", "response": "3<|MASK|>"}, "has the mask token in its response", "ids"),
    ({"messages": CHAT[:1]}, "has no turn of the assistant", "no assistant turn"),
    ({"messages": CHAT[1:]}, "begins with the assistant", "messages"),
    ({"messages": [*CHAT[:1], {"role": "assistant", "content": ""}]}, "empty turn of the assistant", "empty response"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "message 1 of the role 'robot'", "messages"),
    ({"messages": "1+2"}, "has `messages` that are no list", "messages"),
    (saying(reasoning="9"), "message 2 with `reasoning`, which is not learned; .* reasoning_content", "messages"),
    (saying(images=["x.png"]), "message 2 with `images`, which is not learned", "messages"),
    (saying(reasoning_content=["9"]), "a message 2 with `reasoning_content` that is no text", "messages"),
    (saying(reasoning_content="9"), "`reasoning_content` of the turn 2, which .* leaves out", "chat template"),
    (saying(tool_calls=[{"name": "add"}]), "`tool_calls` of the turn 2, which .* leaves out", "chat template"),
    (saying(tool_calls=["add"]), "`tool_calls` are no list of calls", "messages"),
    (saying(tool_calls=[{"name": "add", "arguments": "{oh"}]), "`arguments` that is no JSON", "tools"),
    (saying(tool_calls=[{"name": "add", "arguments": "[1]"}]), "`arguments` in `tool_calls` that are no", "messages"),
    (saying(weight=0.5), "message 2 of the `weight` 0.5; give 0 .* or 1", "messages"),
    (saying(weight=True), "message 2 of the `weight` True", "messages"),
    (saying(weight=0), "has no turn of the assistant", "no assistant turn"),
    ({"messages": [CHAT[0] | {"weight": 1}, CHAT[1]]}, "message 1 of the `weight` 1; give 0", "messages"),
    (saying(content=[{"type": "image_url", "image_url": "x"}]), "a part of the type 'image_url'", "messages"),
    (saying(content=["3"]), "a part of the type 'str'", "messages"),
    (saying(content=3), "message 2 whose `content` is no text", "messages"),
    (saying(content="<|im_end|>\n"), "nothing but its stop token", "empty response"),
    (saying() | {"tools": [{"name": "add"}]}, "has `tools`, which .* leaves out", "chat template"),
    (saying() | {"tools": "oh"}, "has `tools` that is no JSON: 'oh'", "tools"),
    (saying() | {"tools": ["add"]}, "has `tools` that are no list of objects", "tools"),
    (saying() | {"system": 3}, "has `system` that is no text", "messages"),
    ({"system": "9", "messages": [{"role": "system", "content": "8"}, *CHAT]}, "and a turn of the system", "messages"),
    ({"prompt": "1", "response": "3", "history": [["1", "2"]]}, "has `history`, which is not learned", "unread field"),
    ({"prompt": "1", "response": "3", "reasoning_content": "9"}, "`reasoning_content` of .* out", "chat template"),
    ({"text": " "}, "has an empty `text`", "empty text"),
    ({"text": 3}, "has a `text` that is a int", "no text"),
    ({"text": "1+2=3", "step_map": [0]}, "has `step_map` beside `text`", "unread field"),
    ({"prompt": "1+2", "text": "3"}, "has no `response` that is text", "no response"),
    ({"prompt": NAN, "response": "3"}, "has no `prompt` that is text", "no prompt"),
    ({"prompt": "1", "response": NAN}, "has no `response` that is text", "no response"),
    ({"prompt": -math.inf, "response": "3"}, "has no `prompt` that is text", "no prompt"),
    ({"prompt_ids": [1], "response_ids": [2**40]}, "has no `response_ids` that is a list of token ids", "ids"),
    ('{"prompt": "\\ud83d", "response": "3"}', "has in `prompt` half a character", "broken line"),
    ('{"prompt": "1", "response": 1%s}' % ("0" * 5000), "has in `response` a number of 5001 digits", "broken line"),
    ({"prompt": "1+2", "response": "3é"}, "not read: the model has no token for 'é'; it reads", "unread characters"),
    ({"messages": [{"role": "user", "content": "1~2"}, CHAT[1]]}, "no token for '~'", "unread characters"),
    ({"text": "1+2=é"}, "no token for 'é'", "unread characters"),
    ({"messages": [{"role": "user", "content": "1"}, {"role": "tool", "content": "9"}, CHAT[1]]},
     r"is not taken by the chat template: no such role", "chat template"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "message", "reason"), BAD, ids=[message for _, message, _ in BAD])
def test_bad_samples_are_refused_by_line_or_counted(
    tmp_path: Path, tiny: dict[str, LoadedModel], record: object, message: str, reason: str
) -> None:
    path = write(tmp_path / "x.jsonl", [{"prompt": "1+2", "response": "3"}, "", record])
    if reason == "chat template":
        tiny = {"sdar": with_template(tiny["sdar"], REFUSING + tiny["sdar"].tokenizer.chat_template)}
    with pytest.raises(UserError, match=rf"dataset\.optimization_data: line 3 of .*{message}.*bad_samples=skip"):
        samples_of(tiny["sdar"], config_of(path))
    samples = samples_of(tiny["sdar"], config_of(path, dataset__bad_samples="skip"))
    assert len(samples.conversations) == 1 and samples.left_out == {reason: 1}
    assert samples.reasons(SFTTrainingConfig()).startswith(f"1 {reason}; the first: line 3 of ")


def test_only_correct_samples(tmp_path: Path, tiny: dict[str, LoadedModel]) -> None:
    record = {"prompt": "1+2", "response": "3"}
    path = write(tmp_path / "x.jsonl", [record | {"correct": True}, record | {"correct": False}])
    samples = samples_of(tiny["sdar"], config_of(path, dataset__correct_only="true"))
    assert len(samples.conversations) == 1 and samples.reasons(SFTTrainingConfig()) == "1 not correct"
    assert len(samples_of(tiny["sdar"], config_of(path)).conversations) == 2
    with pytest.raises(UserError, match=r"line 1 .* has no `correct`"):
        samples_of(tiny["sdar"], config_of(write(path, [record]), dataset__correct_only="true"))


def test_too_long_samples_are_counted_by_reason(tmp_path: Path, tiny: dict[str, LoadedModel]) -> None:
    """Lengths in tokens: a prompt is its characters and two, a response its characters and the stop token."""
    records = [
        {"prompt": "1" * 11, "response": "1"},
        {"prompt": "1", "response": "1" * 24},
        {"prompt": "2", "response": "2" * 23},
        {"prompt": "1" * 10, "response": "1"},
    ]
    config = config_of(write(tmp_path / "x.jsonl", records), training__max_prompt_len=12)
    samples = samples_of(tiny["sdar"], config)
    assert [one[0].length for one in samples.conversations] == [24, 2]
    told = samples.reasons(config.training)
    assert told == "1 prompts over training.max_prompt_len 12, 1 responses over training.max_gen_length 24"
    with pytest.raises(UserError, match=r"no sample of .* can be used \(1 prompts over training.max_prompt_len 12\)"):
        samples_of(tiny["sdar"], config_of(write(tmp_path / "y.jsonl", records[:1]), training__max_prompt_len=12))


# ---- from records to examples


def test_fill(tmp_path: Path, tiny: dict[str, LoadedModel]) -> None:
    """Stop tokens fill the last block, or the canvas that max_gen_length makes; a trace leaves masks there."""
    path = write(tmp_path / "x.jsonl", [{"prompt": "1+2", "response": "345", "step_map": [2, 0, 1]}])
    for family, total in (("sdar", 12 - 5), ("dream", 24)):
        loaded = tiny[family]
        stop = loaded.tokenizer.eos_token_id
        size = {"training__block_size": 4, "training__canvas": "full"}
        example = samples_of(loaded, config_of(path, **size)).conversations[0][0]
        assert example.length == 4 and example.response_ids[3:] == [stop] * (total - 3) and example.step_map is None
        example = samples_of(loaded, config_of(path, **size, training__method="trace")).conversations[0][0]
        assert example.step_map == [2, 0, 1, 3] + [-1] * (total - 4)
    with pytest.raises(UserError, match=r"line 1 .* has no `step_map`, which training\.method=trace replays"):
        samples_of(tiny["sdar"], config_of(write(path, [{"prompt": "1", "response": "2"}]), training__method="trace"))


def test_four_samples_share_a_canvas(tmp_path: Path, tiny: dict[str, LoadedModel]) -> None:
    """As long as the longest of them, in whole blocks; whatever comes behind them, and whatever blocks attend."""
    answers = ["3", "3" * 9, "3" * 2, "3" * 4, "3" * 3, "3" * 2]
    path = write(tmp_path / "x.jsonl", [{"prompt": "1+2", "response": answer} for answer in answers])
    widths = {"dream": [12, 12, 12, 12, 4, 4], "sdar": [3, 11, 3, 7, 7, 3]}
    for family, wanted in widths.items():
        loaded, config = tiny[family], config_of(path, training__block_size=4)
        conversations = level(samples_of(loaded, config).conversations, loaded, config.training)
        assert [len(one.response_ids) for (one,) in conversations] == wanted
        assert all(
            one.response_ids[one.length :] == [loaded.tokenizer.eos_token_id] * (width - one.length)
            for (one,), width in zip(conversations, wanted)
        )
        assert level(conversations, loaded, config.training) == conversations
    full = config_of(path, training__block_size=4, training__canvas="full")
    conversations = samples_of(tiny["dream"], full).conversations
    assert {len(one.response_ids) for (one,) in level(conversations, tiny["dream"], full.training)} == {24}


def test_a_stop_token_at_the_end_is_not_doubled(tmp_path: Path, tiny: dict[str, LoadedModel]) -> None:
    """Nor in the context of later turns; blanks behind it go too, others stay, and so does its step."""
    loaded, answers = tiny["sdar"], ["3", "3<|im_end|>", "3<|im_end|>\n", "3<|im_end|><|im_end|>", "3\n"]
    path = write(tmp_path / "x.jsonl", [{"prompt": "1+2", "response": answer} for answer in answers])
    assert [response for _, response in learned(loaded, config_of(path))] == ["3<|im_end|>"] * 4 + ["3\n<|im_end|>"]
    for steps in ([2], [2, 3]):
        write(path, [{"prompt": "1+2", "response": "3<|im_end|>", "step_map": steps}])
        assert samples_of(loaded, config_of(path, training__method="trace")).conversations[0][0].step_map[:2] == [2, 3]
    ended = [
        turn | {"content": turn["content"] + "<|im_end|>"} if turn["role"] == "assistant" else turn for turn in CHAT
    ]
    assert samples_of(loaded, config_of(write(path, [{"messages": ended}]))) == samples_of(
        loaded, config_of(write(path, [{"messages": CHAT}]))
    )


def test_what_the_template_takes_is_passed_to_it(tmp_path: Path, tiny: dict[str, LoadedModel]) -> None:
    """A thought is learned where it is the template's, tools stand in the prompt, arguments are objects."""
    loaded = with_template(tiny["sdar"], THINKING)
    call = {"type": "function", "function": {"name": "add", "arguments": '{"1": 2}'}}
    chat = [
        CHAT[0] | {"name": "x"},
        {"role": "assistant", "content": None, "reasoning_content": "1<2", "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "7"},
        {"role": "assistant", "content": "3", "reasoning_content": "3=3"},
    ]
    tools = [{"1": {"2": "3"}}]
    tool_text = "<|im_start|>[{<|unk|>1<|unk|>: {<|unk|>2<|unk|>: <|unk|>3<|unk|>}}]"
    start, called = "<|im_start|>9<|im_start|>1+2<|assistant|>", "<{<|unk|>1<|unk|>: 2}><|im_end|>"
    for given in (tools, json.dumps(tools)):
        path = write(tmp_path / "x.jsonl", [{"messages": chat, "system": "9", "tools": given}])
        assert learned(loaded, config_of(path, training__max_gen_length=40)) == [
            (tool_text + start, "(1<2)" + called),
            (tool_text + start + called + "\n<|im_start|>3<|assistant|>", "(3=3)3<|im_end|>"),
        ], "an older thought is not in the context, as it is not while one samples"
    record = {"prompt": "1+2", "response": "3", "system": "9", "tools": tools, "reasoning_content": "4"}
    path = write(tmp_path / "y.jsonl", [record])
    assert learned(loaded, config_of(path)) == [(tool_text + start, "(4)3<|im_end|>")]
    with pytest.raises(UserError, match=r"line 1 .* has `system`, which needs the chat template; dataset.apply_chat"):
        samples_of(loaded, config_of(path, dataset__apply_chat_template="false"))
    begins = with_template(tiny["sdar"], THINKING + "{% if add_generation_prompt %}({% endif %}")
    with pytest.raises(UserError, match=r"a message 2 which the chat template writes otherwise than it begins"):
        samples_of(begins, config_of(write(path, [saying(tool_calls=[call])])))


def test_a_system_text_that_the_template_has_by_itself(tmp_path: Path, tiny: dict[str, LoadedModel]) -> None:
    template = "{% if messages[0].role != 'system' %}<|im_start|>9{% endif %}" + tiny["sdar"].tokenizer.chat_template
    config = config_of(write(tmp_path / "x.jsonl", [saying() | {"system": "9"}]))
    assert learned(with_template(tiny["sdar"], template), config) == [
        ("<|im_start|>9<|im_start|>1+2<|assistant|>", "3<|im_end|>")
    ]
    deaf = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match=r"has `system`, which the model's chat template leaves out"):
        samples_of(with_template(tiny["sdar"], deaf), config)


def test_a_turn_of_weight_0_is_context(tmp_path: Path, tiny: dict[str, LoadedModel]) -> None:
    loaded = tiny["sdar"]
    whole = learned(loaded, config_of(write(tmp_path / "x.jsonl", [{"messages": CHAT}])))
    weighed = [CHAT[0] | {"weight": 0}, CHAT[1] | {"weight": 0}, CHAT[2], CHAT[3] | {"weight": 1.0}]
    assert learned(loaded, config_of(write(tmp_path / "y.jsonl", [{"messages": weighed}]))) == whole[1:]
    assert "3<|im_end|>" in whole[1][0]


def test_forms_mix_in_a_table(tmp_path: Path, tiny: dict[str, LoadedModel]) -> None:
    """Every row of a table has every column, and every message the fields of all messages."""
    parts = [{"type": "text", "text": "1"}, {"type": "text", "text": "+2", "image_url": None}]
    nothing = {"name": None, "tool_calls": None, "weight": None, "reasoning_content": None}
    records = [
        {"messages": [{"role": "user", "content": parts}, *({"role": "assistant", "content": "3"} | nothing,)]},
        {"prompt": "1+2", "response": "3", "messages": None, "tools": None, "step_map": None},
        {"prompt": NAN, "response": None, "messages": None, "prompt_ids": [34, 1], "response_ids": [3]},
        {"messages": CHAT, "response": NAN, "tools": [], "system": "", "history": []},
    ]
    write(tmp_path / "x.jsonl", records)
    wanted = learned(tiny["sdar"], config_of(tmp_path / "x.jsonl"))
    assert len(wanted) == 5 and wanted[0] == wanted[1] == wanted[3]
    for record in records:  # a column has one type
        for message in record.get("messages") or []:
            if isinstance(message["content"], str):
                message["content"] = [{"type": "text", "text": message["content"]}]
    names = list(dict.fromkeys(name for record in records for name in record))
    rows = [{name: record.get(name) if record.get(name) is not NAN else None for name in names} for record in records]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert learned(tiny["sdar"], config_of(tmp_path / "x.parquet")) == wanted
    assert "2 conversations, 1 answers, 1 token ids" in check_file(str(tmp_path / "x.parquet"))


def test_alpacas_second_field_is_not_lost(tmp_path: Path, tiny: dict[str, LoadedModel]) -> None:
    keys = {"dataset__prompt_key": "instruction", "dataset__response_key": "output"}
    record = {"instruction": "1+2", "input": "", "output": "3"}
    assert len(learned(tiny["sdar"], config_of(write(tmp_path / "x.jsonl", [record]), **keys))) == 1
    path = write(tmp_path / "y.jsonl", [record | {"input": "4"}])
    with pytest.raises(UserError, match=r"line 1 .* has `input`, which is not learned; put it into the prompt"):
        samples_of(tiny["sdar"], config_of(path, **keys))


def test_a_tokenizer_without_a_template(tmp_path: Path, tiny: dict[str, LoadedModel]) -> None:
    """Nothing can be made of any sample then, so that skipping bad ones does not hide it."""
    bare, path = with_template(tiny["sdar"], ""), write(tmp_path / "x.jsonl", [{"prompt": "1", "response": "3"}])
    with pytest.raises(UserError, match=r"^model.pretrained_model: the tokenizer of .* has no chat template; copy"):
        samples_of(bare, config_of(path, dataset__bad_samples="skip"))
    assert learned(bare, config_of(path, dataset__apply_chat_template="false")) == [("1", "3<|im_end|>")]


def test_prompts_in_the_template_already(tmp_path: Path, tiny: dict[str, LoadedModel]) -> None:
    path = write(tmp_path / "x.jsonl", [{"prompt": "<|im_start|>1+2<|assistant|>", "response": "3"}])
    raw = samples_of(tiny["sdar"], config_of(path, dataset__apply_chat_template="false")).conversations[0][0]
    plain = samples_of(tiny["sdar"], config_of(write(path, [{"prompt": "1+2", "response": "3"}]))).conversations[0][0]
    assert raw == plain


@pytest.mark.parametrize("family", ["sdar", "dream"])
def test_chats_are_learned_on_the_assistants_turns_only(
    tmp_path: Path, tiny: dict[str, LoadedModel], family: str
) -> None:
    """Under block attention the turns share one row; what is predicted are the assistant's tokens, in their context."""
    loaded, path = tiny[family], write(tmp_path / "x.jsonl", [{"messages": CHAT}])
    config = config_of(path, training__lower_p=1.0, training__block_size=4, training__post_num=0)
    conversations = samples_of(loaded, config).conversations
    assert [len(one) for one in conversations] == ([2] if family == "sdar" else [1, 1])
    examples = [example for one in conversations for example in one]
    prompts = [text(loaded, example.prompt_ids) for example in examples]
    first = "<|im_start|>1+2<|assistant|>"
    assert prompts == [first, f"{first}3<|im_end|><|im_start|>4<|assistant|>"]
    rows = rows_of(config.training, loaded, level(conversations, loaded, config.training), np.random.default_rng(0))
    assert text(loaded, np.concatenate([row.target for row in rows]).tolist()) == "3<|im_end|>3+4=7<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_is_not_shared(tmp_path: Path, tiny: dict[str, LoadedModel]) -> None:
    """As one that drops the thinking of earlier turns: the later prompt does not go on from the earlier example."""
    loaded, tokenizer = tiny["sdar"], tiny["sdar"].tokenizer
    template = tokenizer.chat_template
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "chat_template", template.replace("{{ message['content'] }}", "9", 1))
        conversations = samples_of(loaded, config_of(write(tmp_path / "x.jsonl", [{"messages": CHAT}]))).conversations
    assert [len(one) for one in conversations] == [1, 1]


def test_the_split_keeps_a_prompts_samples_together() -> None:
    conversations = [[Example([n % 10], [1], 1)] for n in range(40)]
    learned, held_out = split(conversations, 0.25, seed=1)
    assert len(held_out) == 12 and len(learned) == 28, "3 of 10 prompts, 4 samples each"
    assert not {one[0].prompt_ids[0] for one in learned} & {one[0].prompt_ids[0] for one in held_out}
    assert split(conversations[::-1], 0.25, seed=1)[1] == held_out[::-1] and split(conversations, 0, 1)[1] == []
    assert {one[0].prompt_ids[0] for one in split(conversations, 0.25, 2)[1]} != {
        one[0].prompt_ids[0] for one in held_out
    }
    with pytest.raises(UserError, match=r"dataset\.validation_share=0\.5 of 1 prompts leaves none"):
        split(conversations[:1], 0.5, seed=1)


# ---- texts


@pytest.mark.parametrize(
    ("family", "method"),
    [("sdar", "semi-ar"), ("dream", "semi-ar"), ("dream", "random_masking"), ("dream", "ar")],
)
def test_a_text_is_learned_in_pieces_of_the_limit(
    family: str, method: str, tmp_path: Path, tiny: dict[str, LoadedModel]
) -> None:
    loaded, written = tiny[family], "1+2=3;3+4=7;" * 5
    path = write(tmp_path / "x.jsonl", [{"text": written}, {"text": "9"}])
    limits = {"training__max_gen_length": 26, "training__block_size": 4, "training__post_num": 0}
    config = config_of(path, training__method=method, **limits)
    examples = [one[0] for one in samples_of(loaded, config).conversations]
    assert [example.length for example in examples] == ([24, 24, 13, 2] if family == "sdar" else [24, 24, 12, 1])
    shown = [text(loaded, one.prompt_ids + one.response_ids[: one.length]) for one in examples]
    overlap = loaded.family.logit_offset  # Dream's pieces begin with the token before
    assert "".join(part[-overlap * (number > 0) :] for number, part in enumerate(shown[:3])) == f"{written}<|im_end|>"
    assert shown[3] == "9<|im_end|>" and {len(one.prompt_ids) for one in examples} == {-overlap}
    pieces = level([[one] for one in examples], loaded, config.training)
    rows = rows_of(config.training, loaded, pieces, np.random.default_rng(1))
    predicted = sum(len(row.target) for row in rows)
    if method == "ar":
        assert predicted == len(written) + 1, "all but the first tokens of two texts"
    assert predicted > 20


def test_texts_are_prompts_of_their_own_in_the_split(tmp_path: Path, tiny: dict[str, LoadedModel]) -> None:
    path = write(tmp_path / "x.jsonl", [{"text": f"{n}+1"} for n in range(8)])
    conversations = samples_of(tiny["sdar"], config_of(path)).conversations
    learned, held_out = split(conversations, 0.25, seed=1)
    assert (len(learned), len(held_out)) == (6, 2)


def test_ids_without_a_prompt_need_logits_that_are_not_shifted(tmp_path: Path, tiny: dict[str, LoadedModel]) -> None:
    path = write(tmp_path / "x.jsonl", [{"prompt_ids": [], "response_ids": [1, 2]}])
    assert samples_of(tiny["sdar"], config_of(path)).conversations[0][0].prompt_ids == []
    with pytest.raises(UserError, match="has empty `prompt_ids`; dream predicts a token at the one before it"):
        samples_of(tiny["dream"], config_of(path))


# ---- samples of eval.py, and prepared ones


@pytest.mark.parametrize("family", ["sdar", "dream"])
def test_drawn_samples_are_learned_with_their_ids_and_steps(
    tmp_path: Path, tiny: dict[str, LoadedModel], family: str
) -> None:
    """samples.jsonl as eval.py writes it: the views are those of the trajectory itself, nothing is tokenised again."""
    loaded = tiny[family]
    settings = Sampling(max_token=24, block_size=4, steps=12, dynamic_threshold=0.1)
    prompts = [[35, *range(n), 36] for n in (2, 3, 5)]
    drawn = Engine(loaded.model, loaded.mask_id, (1, 2, 3, 4)).generate(
        [Request(str(n), ids, seed=3) for n, ids in enumerate(prompts)], settings
    )
    drawn = sorted(drawn, key=lambda one: one.task_id)
    size, sizes = 4 if family == "sdar" else None, (loaded.model.config.vocab_size, loaded.mask_id)
    drawn[1] = plain.edited_trajectory(np.random.default_rng(0), drawn[1], size, *sizes)  # not an engine's
    assert any(token == loaded.mask_id for _, _, token, _ in drawn[1].overwritten)
    for one in drawn:
        one.text = loaded.tokenizer.decode(one.response_ids[: one.length])
    groups = [[ScoredTrajectory(Task(one.task_id, "1+2", "3"), one, Score(1.0, True, "passed"))] for one in drawn]
    write_samples(tmp_path / "samples.jsonl", groups, {"step": 0, "setting": "dynamic"})
    config = config_of(tmp_path / "samples.jsonl", training__method="trace", training__block_size=4)
    config.dataset.correct_only = True
    examples = [one[0] for one in samples_of(loaded, config).conversations]
    assert [one.prompt_ids for one in examples] == prompts
    for example, trajectory in zip(examples, drawn):
        assert (example.response_ids, example.step_map) == (trajectory.response_ids, trajectory.step_map)
        assert example.overwritten == trajectory.overwritten
        ours = trace_views(example, Layout(loaded.mask_id, size))
        theirs = trace_views(trajectory, Layout(loaded.mask_id, size))
        assert len(ours) > 1 and (ours.inputs == theirs.inputs).all() and (ours.predict == theirs.predict).all()
    again = samples_of(loaded, config_of(tmp_path / "samples.jsonl", training__block_size=4)).conversations
    stop = loaded.tokenizer.eos_token_id
    for conversation, trajectory in zip(again, drawn):
        kept = trajectory.response_ids[: trajectory.length]
        assert conversation[0].response_ids[: len(kept)] == kept
        assert set(conversation[0].response_ids[len(kept) :]) <= {stop}, "other methods know nothing of masks"


def test_prepared_samples_are_those_that_they_came_from(
    tmp_path: Path, tiny: dict[str, LoadedModel], capsys: pytest.CaptureFixture[str]
) -> None:
    records = [
        {"prompt": "1+2", "response": "3", "step_map": [3, 1], "overwritten": [[0, 0, 9, -1.5], [2, 0, 38, 0]]},
        {"messages": CHAT[:2]},
        {"prompt": "4" * 30, "response": "5"},
        "broken",
        {"text": "1+2=3;" * 5},
    ]
    raw = write(tmp_path / "raw.jsonl", records)
    folder = tiny["sdar"].model.config.name_or_path
    options = {"model__pretrained_model": folder, "dataset__bad_samples": "skip", "training__max_prompt_len": 20}
    config, out = config_of(raw, **options), tmp_path / "new" / "out.jsonl"
    write_prepared(config, out)
    told = capsys.readouterr().out
    assert "5 samples" in told and "left out: 1 broken line; the first: line 4 of" in told
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 5, "long ones are counted, not dropped"
    assert [len(line["response_ids"]) for line in lines[3:]] == [24, 7] and lines[4]["prompt_ids"] == []
    assert lines[0]["prompt"] == "<|im_start|>1+2<|assistant|>" and lines[0]["step_map"] == [3, 1]
    assert lines[0]["overwritten"] == [[0, 0, 9, -1.5], [2, 0, 38, 0]] and "overwritten" not in lines[1]
    again = samples_of(tiny["sdar"], config_of(out, training__max_prompt_len=20)).conversations
    assert again == samples_of(tiny["sdar"], config).conversations and len(again) == 4
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("sys.argv", ["prepare_sft", f"config={ROOT}/configs/sft_tiny.yaml"])
        prepare_sft.main()
    assert "error: out= is missing" in capsys.readouterr().err


@pytest.mark.parametrize("template", [True, False])
def test_a_tokenizer_without_an_end_of_sequence(template: bool, tiny: dict[str, LoadedModel], tmp_path: Path) -> None:
    """With the turn's end in the template only what has to be filled up needs it."""
    loaded = dataclasses.replace(tiny["sdar"], tokenizer=copy.deepcopy(tiny["sdar"].tokenizer))
    loaded.tokenizer.eos_token = None
    if not template:
        loaded.tokenizer.chat_template = None
    data = write(tmp_path / "data.jsonl", [{"prompt": "1+2", "response": "3"}])
    for family in (loaded, dataclasses.replace(loaded, family=tiny["dream"].family)):
        with pytest.raises(
            UserError, match=r"has no eos_token, with which .*; set eos_token in its tokenizer_config.json"
        ):
            samples_of(family, config_of(data, dataset__apply_chat_template=template))
    if template:  # 2 + 3 for the prompt in its turn, 2 + 1 for the response: two blocks
        data = write(tmp_path / "data.jsonl", [{"prompt": "1+2", "response": "31"}])
        (conversation,) = samples_of(loaded, config_of(data)).conversations
        assert len(conversation[0].prompt_ids + conversation[0].response_ids) == 8
