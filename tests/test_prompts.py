"""The text that a model is given: as published, word for word, and in the tokenizer's chat template."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common.config import load_config
from common.errors import UserError
from common.schema import EvalDatasetConfig, PromptsConfig
from common.trajectory import Task
from models import FAMILIES, LoadedModel
from models.prompts import task_text
from models.tokenizer import check_ids_readable, check_readable, unknown_token
from rollout import show_prompts
from rollout.collect import encode_tasks

WORDS = {
    "sdar": ("<|im_start|>", "<|im_end|>", "<|MASK|>"),
    "dream": ("<|im_start|>", "<|im_end|>", "<|mask|>"),
    "llada": ("<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|mdm_mask|>"),
}
WORDS |= {"trado": WORDS["sdar"], "mmada": WORDS["llada"]}
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}{{ '<assistant>\n' }}"
PUBLISHED = EvalDatasetConfig(prompt_style="published")
QUESTION = "What is {1+1}?\nSay it."

SDAR = {
    ("math", False): "<|im_start|>user\nWhat is {1+1}?\nSay it.\nPlease reason step by step, and put your final answer "
    "within \\boxed{}.<|im_end|>\n<|im_start|>assistant",
    ("math", True): "<|im_start|>user\nYou need to put your final answer in \\boxed{}. This is the problem:\n"
    "What is {1+1}?\nSay it.<|im_end|>\n<|im_start|>assistant<think>",
    ("code_function", False): "<|im_start|>user\nWhat is {1+1}?\nSay it.\nPlace your code within a single Python code "
    "block ```python ```. Do not include more than one code block. <|im_end|>\n<|im_start|>assistant",
    ("code_function", True): "<|im_start|>user\nWhat is {1+1}?\nSay it.\nPlace your code within a single Python code "
    "block ```python ```. Do not include more than one code block. <|im_end|>\n<|im_start|>assistant",
    ("code_stdio", False): "<|im_start|>user\nThis is the problem:\nWhat is {1+1}?\nSay it.\nYou should put your code "
    "in ```python ```. Use input() to read input and print() to produce output in your script. <|im_end|>\n"
    "<|im_start|>assistant",
    ("code_stdio", True): "<|im_start|>user\nThis is the problem:\nWhat is {1+1}?\nSay it.\nYou should put your code "
    "in ```python ```. Use input() to read input and print() to produce output in your script. <|im_end|>\n"
    "<|im_start|>assistant<think>",
    ("option", False): "<|im_start|>user\nThis is the problem:\nWhat is {1+1}?\nSay it.\nYou need to think step by "
    "step and put the final option (A, B, C, or D only—no other character) in \\boxed{}. <|im_end|>\n"
    "<|im_start|>assistant",
    ("option", True): "<|im_start|>user\nThis is the problem:\nWhat is {1+1}?\nSay it.\nYou need to think step by "
    "step and put the final option (A, B, C, or D only—no other character) in \\boxed{}. <|im_end|>\n"
    "<|im_start|>assistant<think>",
}
DREAM = {
    ("math", False): "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nYou need to put "
    "your final answer in \\boxed{}. This is the problem:\nWhat is {1+1}?\nSay it.<|im_end|>\n<|im_start|>assistant",
    ("code_function", False): "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "What is {1+1}?\nSay it.\nPlace your code within a single Python code block ```python ```. Do not include more "
    "than one code block. <|im_end|>\n<|im_start|>assistant",
    ("code_stdio", False): "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nThis is the "
    "problem:\nWhat is {1+1}?\nSay it.\nYou should put your code in ```python ```. Use input() to read input and "
    "print() to produce output in your script. <|im_end|>\n<|im_start|>assistant",
    ("option", False): "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nThis is the "
    "problem:\nWhat is {1+1}?\nSay it.\nYou need to think step by step and put the final option (A, B, C, or D only—no "
    "other character) in \\boxed{}. <|im_end|>\n<|im_start|>assistant",
}
LLADA = {
    ("math", False): "<|startoftext|><|start_header_id|>user<|end_header_id|>You need to put your final answer in "
    "\\boxed{}. This is the problem:\nWhat is {1+1}?\nSay it.<|eot_id|><|startoftext|><|start_header_id|>assistant"
    "<|end_header_id|>",
    ("code_function", False): "<|startoftext|><|start_header_id|>user<|end_header_id|>What is {1+1}?\nSay it.\nPlace "
    "your code within a single Python code block ```python ```. Do not include more than one code block. <|eot_id|>"
    "<|startoftext|><|start_header_id|>assistant<|end_header_id|>",
    ("code_stdio", False): "<|startoftext|><|start_header_id|>user<|end_header_id|>This is the problem:\n"
    "What is {1+1}?\nSay it.\n You should put your code in ```python ```. Use input() to read input and print() to "
    "produce output in your script. <|eot_id|><|startoftext|><|start_header_id|>assistant<|end_header_id|>",
    ("option", False): "<|startoftext|><|start_header_id|>user<|end_header_id|>This is the problem:\nWhat is {1+1}?\n"
    "Say it.\nYou need to think step by step and put the final option (A, B, C, or D only—no other character) in "
    "\\boxed{}. <|eot_id|><|startoftext|><|start_header_id|>assistant<|end_header_id|>",
}
TEXTS = {"sdar": SDAR, "trado": SDAR, "dream": DREAM, "llada": LLADA, "mmada": LLADA}
CASES = [(family, *case, text) for family, texts in TEXTS.items() for case, text in texts.items()]


def tokenizer_of(family: str, words: tuple[str, ...] | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes that has the family's special words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.add_special_tokens([AddedToken(word, normalized=False) for word in words or WORDS[family]])
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, chat_template=TEMPLATE)


def text_of(family: str, kind: str, dataset: EvalDatasetConfig = PUBLISHED, thinking: bool = False) -> str:
    return task_text(tokenizer_of(family), FAMILIES[family], Task("7", QUESTION), kind, dataset, thinking)


@pytest.mark.parametrize(
    ("family", "kind", "thinking", "text"), CASES, ids=[f"{one[0]}-{one[1]}-{one[2]}" for one in CASES]
)
def test_a_published_prompt_word_for_word(family: str, kind: str, thinking: bool, text: str) -> None:
    assert text_of(family, kind, PUBLISHED, thinking) == text
    tokenizer = tokenizer_of(family)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    words = [tokenizer.convert_tokens_to_ids(word) for word in WORDS[family]]
    assert ids[0] == words[0], "the special words are tokens of their own"


def test_the_template_style_is_the_tokenizers_own() -> None:
    dataset = EvalDatasetConfig()
    assert dataset.prompt_style == "template"
    question = f"{QUESTION}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
    assert text_of("sdar", "math", dataset) == f"<user>{question}\n<assistant>\n"
    assert text_of("sdar", "math", dataset, thinking=True).endswith("<assistant>\n<think>")
    assert text_of("sdar", "code_function", dataset, thinking=True).endswith("<assistant>\n")


def test_a_byte_level_tokenizer_reads_everything() -> None:
    """Also where a word of its own is called its unknown token, as of Qwen's."""
    tokenizer = tokenizer_of("sdar", ("<|endoftext|>",))
    tokenizer.unk_token = "<|endoftext|>"
    assert unknown_token(tokenizer) is None
    check_readable(tokenizer, text := "Ω, ключ\x00 <|endoftext|>", "prompt")
    check_ids_readable(tokenizer, tokenizer.encode(text), "prompt")


def test_own_words_stand_in_the_published_turn() -> None:
    dataset = EvalDatasetConfig(prompt_style="published", prompts=PromptsConfig(general="Q {question}"))
    assert text_of("sdar", "general", dataset) == (f"<|im_start|>user\nQ {QUESTION}<|im_end|>\n<|im_start|>assistant")


@pytest.mark.parametrize(("prefix", "begun"), [("def f(x):\n", "def f(x):"), ("```python\nimport re\n\n", None)])
def test_a_prefix_begins_the_answer(prefix: str, begun: str | None) -> None:
    """A newline and the prefix follow the published text, of which one last newline is stripped."""
    task = Task("7", QUESTION, None, {"test_method": "function", "prefix": prefix})
    begun = begun or "```python\nimport re\n"
    for family, texts in TEXTS.items():
        tokenizer = tokenizer_of(family)
        loaded = LoadedModel(None, tokenizer, FAMILIES[family], 0, ())
        dataset = replace(PUBLISHED, data_type="code")
        ((_, ids),) = encode_tasks(loaded, [task], dataset, thinking=family in ("sdar", "trado"))
        assert tokenizer.decode(ids) == f"{texts['code_function', False]}\n{begun}"
        ((_, ids),) = encode_tasks(loaded, [task], EvalDatasetConfig(data_type="code"), thinking=True)
        assert tokenizer.decode(ids).endswith(f"\n<assistant>\n{begun}")


def test_worked_examples_stand_before_the_task_as_in_the_harness(tmp_path: Path) -> None:
    """In the words of lm-evaluation-harness' gsm8k: answers behind a blank, questions apart by an empty line."""
    answers = ["She has <<5-2=3>>3.\n#### 3", "7\n#### 7", "no"]
    examples = tmp_path / "examples.jsonl"
    examples.write_text("".join(json.dumps({"question": f"Q{n}?", "answer": a}) + "\n" for n, a in enumerate(answers)))
    dataset = EvalDatasetConfig(few_shot=2, few_shot_dataset=str(examples))
    loaded = LoadedModel(None, tokenizer_of("mmada"), FAMILIES["mmada"], 0, ())
    ((_, ids),) = encode_tasks(loaded, [Task("7", QUESTION)], dataset, thinking=False)
    assert loaded.tokenizer.decode(ids) == (
        "<user>Question: Q0?\nAnswer: She has <<5-2=3>>3.\n#### 3\n\nQuestion: Q1?\nAnswer: 7\n#### 7\n\n"
        "Question: What is {1+1}?\nSay it.\nAnswer:\n<assistant>\n"
    )
    own = replace(dataset, few_shot=1, prompts=PromptsConfig(math="{question} ="), prompt_style="published")
    ((_, ids),) = encode_tasks(loaded, [Task("7", "1+1")], own, thinking=False)
    assert ">Q0? = She has <<5-2=3>>3.\n#### 3\n\n1+1 =<|eot_id|>" in loaded.tokenizer.decode(ids)
    with pytest.raises(UserError, match=r"dataset\.few_shot=4, but dataset\.few_shot_dataset '.*' has only 3 records"):
        encode_tasks(loaded, [Task("7", QUESTION)], replace(dataset, few_shot=4), thinking=False)
    with pytest.raises(UserError, match=r"record 1 of 'arithmetic_4_train' has no `solution` "):
        unsolved = replace(dataset, few_shot=1, few_shot_dataset="arithmetic_4_train")
        encode_tasks(loaded, [Task("7", QUESTION)], unsolved, thinking=False)


def told(*arguments: object, **named: object) -> str:
    with pytest.raises(UserError) as caught:
        text_of(*arguments, **named)
    assert "\n" not in str(caught.value) and "template" in str(caught.value)
    return str(caught.value)


def test_what_was_not_published_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "dream was published for general; give dataset.prompts.general" in told("dream", "general")
    assert "no prompts of llada were published with start_with_think" in told("llada", "math", thinking=True)
    monkeypatch.setitem(WORDS, "sdar", ("<|im_start|>",))
    assert "has no token <|im_end|>, as sdar's prompts have" in told("sdar", "math")
    monkeypatch.setitem(FAMILIES, "sdar", FAMILIES["sdar"].__class__(**vars(FAMILIES["sdar"]) | {"published_turn": ""}))
    assert "dataset.prompt_style=published: no prompts were published for sdar" in told("sdar", "math")


@pytest.mark.parametrize(
    ("job", "config", "style"),
    [
        ("eval", "trado_longcot_multinode_eval", "published"),
        ("eval", "dream_multinode_eval", "published"),
        ("rl", "multinode_rl_mmada", "published"),
        ("rl", "rl_sdar_process_reward_rlhf_with_value", "published"),
        ("rl", "rl_tiny", "template"),
        ("eval", "eval_tiny", "template"),
        ("sft", "sft_tiny", "template"),
    ],
)
def test_shipped_configs_of_published_models_say_published(job: str, config: str, style: str) -> None:
    assert load_config(job, [f"config=configs/{config}.yaml"]).dataset.prompt_style == style


# ---- python -m rollout.show_prompts

TINY = {
    "eval": ["config=configs/eval_tiny.yaml", "dataset.eval_dataset={tasks}", "model={model}"],
    "rl": ["config=configs/rl_tiny.yaml", "dataset.train_dataset={tasks}", "model.pretrained_model={model}"],
    "sft": ["config=configs/sft_tiny.yaml", "dataset.eval_dataset={tasks}", "model.pretrained_model={model}"],
}


@pytest.mark.parametrize("job", TINY)
def test_show_prompts(job: str, tiny_sdar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks, code = tmp_path / "tasks.jsonl", {"test_method": "function", "test_list": ["assert f(1) == 1"]}
    lines = [{"question": f"{n}+1", "id": f"t{n}", "prefix": "1:\n"} | code for n in range(3)]
    tasks.write_text("".join(json.dumps(line) + "\n" for line in lines))
    keys = [key.format(tasks=tasks, model=tiny_sdar) for key in TINY[job]] + ["dataset.data_type=code"]
    show_prompts.main([*keys, "dataset.prompts.code_function=<{question}>"])
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert shown == [
        {"task_id": f"t{n}", "prompt": f"<|im_start|><{n}+1><|assistant|>\n1:", "tokens": 10} for n in range(2)
    ]
    show_prompts.main([*keys, "dataset.prompt_style=published", "n=1"])
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["prompt"] == SDAR["code_function", False].replace(QUESTION, "0+1") + "\n1:"


def test_mistakes_of_show_prompts(tiny_sdar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = tmp_path / "code.json"
    code.write_text(json.dumps([{"question": "q", "test_method": "function", "test_list": ["assert f(1) == 1"]}]))
    for arguments, message in (
        (["model=x"], "config= is missing: name a config of eval.py, rl.py or finetuning"),
        (["config=configs/eval_tiny.yaml", "n=0"], "n=0: expected how many tasks to show"),
        (["config=configs/eval_tiny.yaml", f"model={tmp_path}"], f"{tmp_path} has no tokenizer"),
        (["config=configs/eval_tiny.yaml", f"model={tmp_path}"], "error: model: "),
        (["config=configs/eval_tiny.yaml", "n=1", "n=2"], "n=1 n=2: n is given 2 times"),
        (["config=configs/eval_tiny.yaml", "config=configs/rl_tiny.yaml"], "config is given 2 times; give it once"),
        (["config=configs/eval_tiny.yaml", f"dataset.eval_dataset={code}"], "has no `ground_truth_answer`, which dat"),
        (["config=configs/eval_tiny.yaml", "seeds=1"], "unknown key seeds=1"),
        (["config=configs/sft_trado.yaml", f"model.pretrained_model={tiny_sdar}"], "dataset.eval_dataset is empty"),
    ):
        with pytest.raises(SystemExit) as ended:
            show_prompts.main(arguments)
        told = capsys.readouterr()
        assert ended.value.code == 2 and message in told.err and told.err.count("\n") == 1 and not told.out
