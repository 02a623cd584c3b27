"""What users get wrong, and the one line that each mistake gets."""

# ruff: noqa: E501 — one row for one mistake

import errno
import json
import re
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import serve
from common.config import load_config, settings_of
from common.errors import UserError, one_line_errors
from common.jobs import ServeConfig
from common.metrics import open_metrics
from common.runtime import prepare_run_folder
from common.schema import JudgeConfig, RewardConfig
from data.tasks import load_tasks
from models import load_model
from models.prompts import encode_prompt, stop_ids_of
from reward.score import make_scorer
from rollout.compare import compare
from rollout.evaluate import main as evaluate
from rollout.fingerprint import check_resumable
from train.rl_trainer import main as train_rl
from train.sft_trainer import finetune

EVAL, RL, SFT = "config=configs/eval_tiny.yaml", "config=configs/rl_tiny.yaml", "config=configs/sft_tiny.yaml"
REFUSING = "{{ raise_exception('only images, please') }}"


@dataclass
class Place:
    """Where a mistake is made: a folder of its own, and a sound model to spoil."""

    folder: Path
    model: Path

    def file(self, name: str, text: str) -> str:
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    def spoiled(self, name: str, change: Callable[[dict[str, Any]], Any] | None) -> Path:
        """A copy of the model with one of its JSON files changed, or left out."""
        copy = self.folder / "model"
        shutil.copytree(self.model, copy)
        if change is None:
            (copy / name).unlink()
        else:
            content = json.loads((copy / name).read_text())
            change(content)
            (copy / name).write_text(json.dumps(content))
        return copy


def evaluated(place: Place) -> None:
    """An evaluation resumed under another seed."""
    about = {"prompts": {}, "reward": {}, "seed": 1, "settings": {}}
    about |= {"model": {"files": {}, "dtype": "float32"}, "data": {"tasks": 1, "sha256": ""}}
    place.file("fingerprint.json", json.dumps(about))
    check_resumable(place.folder, about | {"seed": 2})


def taken_port(place: Place) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        serve.listen("127.0.0.1", taken.getsockname()[1])


def record(**fields: Any) -> str:
    return json.dumps({"question": "1+2", "ground_truth_answer": "3"} | fields) + "\n"


# (what the user did, how, the line as a pattern)
MISTAKES: list[tuple[str, Callable[[Place], Any], str]] = [
    ("no config", lambda p: load_config("rl", []), r"config= is missing; for rl.py choose one of: configs/"),
    ("a misspelt config", lambda p: load_config("rl", ["config=configs/rl_tinny.yaml"]), r"did you mean config=.*rl_tiny"),
    ("another script's config", lambda p: load_config("rl", [EVAL]), r"is a config for eval.py, not for rl.py"),
    ("--key value", lambda p: load_config("eval", [EVAL, "--seed", "1"]), r"--seed: arguments are key=value"),
    ("an unknown key", lambda p: load_config("eval", [EVAL, "rollout.max_tokens=5"]), r"did you mean rollout.max_token\?"),
    ("a key in a wrong section", lambda p: load_config("rl", [RL, "training.learning_rate=1"]), r"did you mean optimizer.params.learning_rate\?"),
    ("a word for a number", lambda p: load_config("eval", [EVAL, "seed=many"]), r"seed=many: expected a whole number"),
    ("a value out of range", lambda p: load_config("eval", [EVAL, "rollout.top_p=2"]), r"rollout.top_p=2.*between 0 and 1"),
    (
        "a strategy's short name",
        lambda p: load_config("eval", [EVAL, "rollout.remasking_strategy=dynamic"]),
        r"rollout.remasking_strategy=dynamic: .*did you mean low_confidence_dynamic\?",
    ),
    (
        "lists that do not match",
        lambda p: load_config("eval", [EVAL, "rollout.remasking_strategy=[sequential,sequential]", "rollout.top_k=[0,1,2]"]),
        r"lists of settings must have the same number of entries",
    ),
    (
        "a list where one value belongs",
        lambda p: load_config("rl", [RL, "rollout.temperature=[0.5,1]"]),
        r"rollout.temperature=\[0.5, 1.0\]: training samples under one setting",
    ),
    (
        "more steps than tokens in a block",
        lambda p: load_config("eval", [EVAL, "rollout.denoising_steps_per_block=8", "rollout.block_size=4"]),
        r"denoising_steps_per_block=8 is more than rollout.block_size=4",
    ),
    ("one response in RL", lambda p: load_config("rl", [RL, "rollout.num_response_per_task=1"]), r"takes at least 2"),
    ("no model", lambda p: load_config("eval", [EVAL, "model="]), r"model is empty: set it in configs/eval_tiny.yaml or as model="),
    ("an untrained model in RL", lambda p: load_config("rl", [RL, "model.pretrained_model=tiny"]), r"for SFT only"),
    (
        "an old value that is no more",
        lambda p: load_config("rl", [RL, "training.mixed_precision=fp16"]),
        r"training.mixed_precision=fp16: not supported; set model.dtype to one of",
    ),
    ("a tracker that is unknown", lambda p: open_metrics(p.folder, ["wandbb"]), r"experiment.trackers: 'wandbb' is unknown; did you mean 'wandb'\?"),
    (
        "broken YAML",
        lambda p: load_config("rl", [f"config={p.file('x.yaml', 'rollout: {max_token: 5')}"]),
        r"x.yaml.*broken YAML",
    ),
    (
        "a base layer that is not there",
        lambda p: load_config("rl", [f"config={p.file('x.yaml', 'base: [rl_blok]')}"]),
        r"base=rl_blok: no file .*there are: .*rl_block",
    ),
    ("data that are not there", lambda p: load_tasks("arithmetic_4_tset"), r"dataset.train_dataset: 'arithmetic_4_tset' was not found; did you mean"),
    ("a published set that was not fetched", lambda p: load_tasks("MATH_train"), r"'MATH_train' was not found; get it by: python data/download_data.py --dataset MATH_train"),
    ("a folder for data", lambda p: load_tasks(str(p.folder)), r"is a folder; give one of its files"),
    ("data without questions", lambda p: load_tasks(p.file("x.jsonl", '{"problem": "1+2"}\n')), r"record 1 of .*no `question` \(its fields: problem\)"),
    ("a broken line of data", lambda p: load_tasks(p.file("x.jsonl", record() + "{oh\n")), r"line 2 of .*is not valid JSON"),
    ("half a character in the data", lambda p: load_tasks(p.file("x.jsonl", record(question="\ud83d"))), r"line 1 of .* has in `question` half a character"),
    ("a number too long in the data", lambda p: load_tasks(p.file("x.jsonl", '{"id": 1%s}' % ("0" * 5000))), r"line 1 of .* has in `id` a number of 5001 digits; write it as text"),
    (
        "tasks without tests, learned as code",
        lambda p: train_rl(load_config("rl", [RL, f"dataset.train_dataset={p.file('x.jsonl', record())}", "rollout.num_task_per_step=1", "dataset.data_type=code"])),
        r"dataset.train_dataset: task '0' has no `test_method`, which dataset.data_type=code judges by",
    ),
    (
        "tasks without tests, evaluated as code",
        lambda p: evaluate(load_config("eval", [EVAL, "model=x", f"dataset.eval_dataset={p.file('x.jsonl', record())}", "dataset.data_type=code"])),
        r"dataset.eval_dataset: task '0' has no `test_method`",
    ),
    (
        "tasks without tests, watched as code",
        lambda p: finetune(load_config("sft", [SFT, f"dataset.eval_dataset={p.file('x.jsonl', record())}", "dataset.data_type=code"])),
        r"dataset.eval_dataset: task '0' has no `test_method`",
    ),
    ("an id twice", lambda p: load_tasks(p.file("x.jsonl", record(id=7) * 2)), r"records 1 and 2 of .* the same id '7'"),
    ("no such model", lambda p: load_model(p.folder / "absent", "sdar"), r"model.pretrained_model: no folder .*give a folder with config.json"),
    ("a folder that is no model", lambda p: load_model(p.folder, "sdar"), r"has no config.json; give the folder of a checkpoint"),
    (
        "a run's folder as a model",
        lambda p: load_model(shutil.copytree(p.model, p.folder / "ckpt" / "optimized").parents[1], "sdar"),
        r"has no config.json; give .*ckpt/optimized",
    ),
    (
        "a tokenizer without a chat template",
        lambda p: encode_prompt(load_model(p.spoiled("tokenizer_config.json", lambda c: c.pop("chat_template")), "sdar"), "1+2", "{question}"),
        r"model.pretrained_model: the tokenizer of .*/model has no chat template; copy chat_template.jinja there",
    ),
    (
        "a chat template that refuses everything",
        lambda p: encode_prompt(load_model(p.spoiled("tokenizer_config.json", lambda c: c.update(chat_template=REFUSING)), "sdar"), "1+2", "{question}"),
        r"the chat template of .*/model does not take the conversation \(only images, please\)",
    ),
    (
        "a prompt that a small vocabulary has no tokens for",
        lambda p: encode_prompt(load_model(p.model, "sdar"), "what is\t1+2", "{question}"),
        r"^prompt: the model has no token for 'w', 'h', 'a', 't', 'i', 's', '\\t'; it reads 0123456789.*% and \\boxed\{$",
    ),
    *(
        (
            f"tasks that a small vocabulary has no tokens for, {name}",
            lambda p, job=job, start=start, key=key, more=more: start(
                load_config(job, [f"config=configs/{job}_tiny.yaml", f"{key}={p.file('x.jsonl', record() + record(question='one+2'))}", *(one.format(model=p.model, folder=p.folder) for one in more)])
            ),
            rf"^{told}: task 1: the model has no token for 'o', 'n', 'e'; it reads 0123",
        )
        for name, job, start, key, told, more in (
            ("evaluated", "eval", evaluate, "dataset.eval_dataset", "dataset.eval_dataset", ["model={model}", "experiment.runs_dir={folder}"]),
            ("learned", "rl", train_rl, "dataset.train_dataset", "dataset.train_dataset", ["model.pretrained_model={model}", "rollout.num_task_per_step=1"]),
            ("watched", "rl", train_rl, "dataset.eval_dataset", "evaluation.eval_dataset", ["model.pretrained_model={model}"]),
        )
    ),
    ("the wrong family", lambda p: load_model(p.model, "llada"), r"model.model_base: 'llada', but .*model_type 'sdar'; set it to sdar or trado"),
    ("a family that is unknown", lambda p: load_model(p.model, "gpt"), r"'gpt'.*choose one of sdar, trado"),
    ("weights left behind", lambda p: load_model(p.spoiled("model.safetensors", None), "sdar"), r"holds no weights that can be read"),
    ("a tokenizer left behind", lambda p: load_model(p.spoiled("tokenizer.json", None), "sdar"), r"has no tokenizer; copy the base model's"),
    (
        "sizes that do not fit the weights",
        lambda p: load_model(p.spoiled("config.json", lambda c: c.update(intermediate_size=100)), "sdar"),
        r"has shape .*config.json asks for",
    ),
    (
        "a model without a mask token",
        lambda p: load_model(unmasked(p), "sdar"),
        r"the tokenizer has no mask token; set mask_token in tokenizer_config.json",
    ),
    (
        "a stop token that is none",
        lambda p: stop_ids_of(load_model(p.model, "sdar"), ["<|end|>"]),
        r"rollout.stop_token_list: '<\|end\|>' is no token of the model's tokenizer",
    ),
    ("a reward without its module", lambda p: make_scorer(RewardConfig(function="no_module:score")), r"reward.function: there is no module 'no_module'"),
    ("a reward without a colon", lambda p: make_scorer(RewardConfig(function="my_reward")), r"'my_reward' is not of the form module:function"),
    (
        "a judge without an address",
        lambda p: make_scorer(RewardConfig(judge=JudgeConfig(model="Qwen/Qwen3-8B"))),
        r"reward.judge.model=Qwen/Qwen3-8B without reward.judge.base_url",
    ),
    ("runs where none can be written", lambda p: prepare_run_folder(p.file("runs", ""), "x", True), r"experiment.runs_dir: .*cannot be written"),
    ("an evaluation resumed with other settings", evaluated, r"holds an evaluation that differs \(seed: 1 → 2\)"),
    ("a run that is not there, compared", lambda p: compare(str(p.folder), "runs/absent"), r"no .*samples.jsonl; give the folder of a run"),
    ("a port in use", taken_port, r"port=\d+: 127.0.0.1 cannot be listened on \(Address already in use\); give another port"),
    ("a server open to others", lambda p: serve.api_key(ServeConfig(host="0.0.0.0", api_key_env="UNSET")), r"can be reached by others: set a key in the variable UNSET"),
]  # fmt: skip


def unmasked(place: Place) -> Path:
    """A model whose tokenizer and config know no mask token."""
    folder = place.spoiled("tokenizer_config.json", lambda c: c.pop("mask_token"))
    for name in ("config.json", "tokenizer.json"):
        text = (folder / name).read_text().replace("<|MASK|>", "<|other|>")
        (folder / name).write_text(text.replace('"mask_token_id"', '"something_else"'))
    return folder


@pytest.mark.parametrize("make, line", [row[1:] for row in MISTAKES], ids=[row[0] for row in MISTAKES])
def test_a_mistake_gets_its_line(make: Callable[[Place], Any], line: str, tiny_sdar: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        settings_of(made) if hasattr(made := make(Place(tmp_path, tiny_sdar)), "rollout") else None
    told = str(caught.value)
    assert "\n" not in told and len(told) < 600
    assert re.search(line, told), told


def test_there_are_thirty_different_ones() -> None:
    assert len({row[0] for row in MISTAKES}) == len(MISTAKES) >= 30


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/x/model.safetensors"), "runs/x/model.safetensors"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n20 GiB"), "python -m common.doctor"),
    ],
)
def test_a_full_disk_and_a_full_device(error: Exception, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    @one_line_errors
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as left:
        main()
    printed = capsys.readouterr().err
    assert left.value.code == 2 and words in printed and printed.count("\n") == 1


def test_other_errors_are_not_hidden() -> None:
    @one_line_errors
    def main(error: Exception) -> None:
        raise error

    for error in (OSError(errno.EACCES, "denied"), RuntimeError("a defect")):
        with pytest.raises(type(error)):
            main(error)
