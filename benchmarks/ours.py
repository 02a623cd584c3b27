"""This project's side of `benchmarks.versus`: each function is given the inputs and returns what is timed.

Inputs: `checkpoint` and `family`; for samplers `prompts`, `tokens`, `block_size`, `steps` and what else of
`common.schema.Sampling` is named; for updates `lengths`, `trace`, `checkpointing` and `budget` (tokens in a
micro-batch); for rewards `texts` and `tasks`.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

import common  # noqa: F401 — before torch
from benchmarks.made_trajectories import PROMPT, make_trajectories
from benchmarks.training import KeepGradients
from common.schema import RewardConfig, RLTrainingConfig, Sampling, SFTTrainingConfig
from common.trajectory import Request, Score, ScoredTrajectory, Task, Trajectory
from models import LoadedModel, load_model
from reward.score import make_scorer
from sample.engine import Engine
from train.learner import Learner
from train.network import Policy
from train.rl_step import learn
from train.sft_trainer import rows_of, sft_update
from train.views import Example, layout_of

Inputs = dict[str, Any]


def loaded_model(inputs: Inputs) -> LoadedModel:
    """The checkpoint in float32."""
    return load_model(inputs["checkpoint"], inputs.get("family", "sdar"))


# ---- sampling


def sampler(inputs: Inputs) -> Callable[[], list[list[int]] | None]:
    """The engine's responses to all prompts side by side, without stop tokens; ids where the draw is greedy."""
    loaded, settings = loaded_model(inputs), sampling_of(inputs)
    engine = Engine(loaded.model, loaded.mask_id, ())
    requests = [Request(str(number), prompt) for number, prompt in enumerate(inputs["prompts"])]

    def run() -> list[list[int]] | None:
        drawn = {int(one.task_id): one.response_ids for one in engine.generate(requests, settings, stop_ids=())}
        return [drawn[number] for number in range(len(requests))] if settings.temperature == 0 else None

    return run


def sampling_of(inputs: Inputs) -> Sampling:
    """The sampling settings among the inputs; greedy unless they say otherwise."""
    names = {field.name for field in fields(Sampling)}
    named = {key: value for key, value in inputs.items() if key in names}
    settings = {"temperature": 0.0, "remasking_strategy": "low_confidence_static", "max_token": inputs["tokens"]}
    return Sampling(**settings | {"max_active": len(inputs["prompts"])} | named)


# ---- training


def learner_of(inputs: Inputs, loaded: LoadedModel) -> tuple[Learner, KeepGradients]:
    """A learner whose updates change nothing, and the optimizer that keeps their gradients."""
    if inputs.get("checkpointing", True):
        loaded.model.gradient_checkpointing_enable()
    network = Policy(loaded.model, loaded.mask_id)
    optimizer = KeepGradients(network.parameters(), lr=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    return Learner(network, optimizer, schedule, Accelerator(cpu=True), 1e9), optimizer


def gradient_sizes(optimizer: KeepGradients) -> list[float]:
    """The norm of each parameter's gradient."""
    return [float(one.double().norm()) for one in optimizer.kept]


def trajectories_of(inputs: Inputs, loaded: LoadedModel) -> list[Trajectory]:
    """Made trajectories of those lengths; `trace`: as real rollouts unmask, or a token a step (static)."""
    made = make_trajectories(len(inputs["lengths"]), inputs["lengths"])
    rng, words = np.random.default_rng(1), loaded.model.config.vocab_size
    for one in made:
        one.logp = (-np.log(words) + rng.normal(0, 0.3, len(one.logp))).tolist()
        one.prompt_ids = [token % loaded.mask_id for token in one.prompt_ids]
        one.response_ids = [token % loaded.mask_id for token in one.response_ids]
        if inputs["trace"] == "static":
            blocks = range(0, len(one.response_ids), 4)
            one.step_map = [start + int(step) for start in blocks for step in rng.permutation(4)]
    return made


def rl_step(inputs: Inputs) -> Callable[[], list[float]]:
    """TraceRL's update by the packed forward."""
    loaded = loaded_model(inputs)
    learner, optimizer = learner_of(inputs, loaded)
    samples = [
        ScoredTrajectory(Task(one.task_id, ""), one, Score(1.0, True, "passed"), (-1.0) ** number)
        for number, one in enumerate(trajectories_of(inputs, loaded))
    ]
    keys = {"shrink": inputs.get("shrink", 1), "tokens_per_micro_batch": inputs.get("budget")}
    training = RLTrainingConfig(old_logp="engine", **keys)
    layout = layout_of(loaded, 4)

    def run() -> list[float]:
        learn(learner, samples, training, layout, max(inputs["lengths"]), [0], exact=False)
        return gradient_sizes(optimizer)

    return run


def examples_of(inputs: Inputs, loaded: LoadedModel) -> list[Example]:
    """A quarter of each length is the prompt."""
    rng = np.random.default_rng(2)
    examples = []
    for length in inputs["lengths"]:
        ids, prompt = rng.integers(0, loaded.mask_id, length).tolist(), length // 16 * 4
        examples.append(Example(ids[:prompt], ids[prompt:], length - prompt))
    return examples


def sft_training(loaded: LoadedModel) -> SFTTrainingConfig:
    return SFTTrainingConfig(block_size=4, method="semi-ar" if loaded.family.attention == "block" else "random_masking")


def sft_step(inputs: Inputs) -> Callable[[], list[float]]:
    """An update of finetuning by the packed forward; views are drawn in it."""
    loaded = loaded_model(inputs)
    learner, optimizer = learner_of(inputs, loaded)
    conversations, training = [[example] for example in examples_of(inputs, loaded)], sft_training(loaded)

    def run() -> list[float]:
        rows = rows_of(training, loaded, conversations, np.random.default_rng(3))
        sft_update(learner, rows, None)
        return gradient_sizes(optimizer)

    return run


# ---- rewards


def rewards(inputs: Inputs) -> Callable[[], list[float]]:
    """Scores of the texts by one worker process, which lives on."""
    scorer = make_scorer(RewardConfig(workers=1), inputs["kind"])
    tasks = [Task(str(n), "", one.get("answer"), one) for n, one in enumerate(inputs["tasks"])]

    def run() -> list[float]:
        scored = [scorer.submit(text, task, False) for text, task in zip(inputs["texts"], tasks)]
        return [float(one.result().reward) for one in scored]

    return run


assert PROMPT % 4 == 0  # else the first block of a response would hold a part of its prompt
