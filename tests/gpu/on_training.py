"""What training is put through on the emulated device: each function is a scenario, in a process of its own."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import emulation
import torch
from on_engine import FIGURES, FULL, STOP, built, requests_of

from common.config import load_config
from common.jobs import RLConfig
from common.schema import RLTrainingConfig, Sampling
from common.trajectory import Score, ScoredTrajectory, Task
from models import load_model
from models.value import load_value
from sample.engine import Engine
from train.attention import TILE
from train.learner import Learner, micro_batches, whole_weights
from train.loading import engine_model, frozen_reference, load_trained, policy_learner, value_learner
from train.network import Critic, Policy
from train.rl_step import learn, sample_rows
from train.views import layout_of

SEMI = Sampling(max_token=12, remasking_strategy="low_confidence_static")
PROMPTS = (3, 5, 8, 9)
OBJECTIVES: list[dict[str, Any]] = [
    {},
    {"shrink": 2, "loss_norm": "step", "eps_high": 0.3},
    {"method": "random_masking", "loss_norm": "length"},
    {"method": "coupled", "use_kl_estimator_k3": False},
    {"term": "sequence", "method": "coupled"},
    {"updates_per_step": 2, "old_logp": "recompute", "tis_cap": 2.0},
    {"kl_reference": "initial", "beta": 0.1, "old_logp": "detach"},
]
COMPARED = ("loss", "kl", "grad_norm", "entropy", "predicted_tokens", "value_loss")


def config_of(family: str, **keys: object) -> RLConfig:
    """The tiny job's config with the untrained model; keywords are keys with __ for the dot."""
    values = {"model.model_base": family, "model.pretrained_model": built(family)}
    values |= {key.replace("__", "."): value for key, value in keys.items()}
    return load_config("rl", ["config=configs/rl_tiny.yaml", *(f"{key}={value}" for key, value in values.items())])


def drawn(family: str, **settings: int) -> list[ScoredTrajectory]:
    """Responses of the untrained model, drawn on the CPU, every second one with an advantage."""
    loaded = load_model(built(family), family)
    settings = replace(SEMI if family == "sdar" else FULL, **settings)
    engine = Engine(loaded.model, loaded.mask_id, [STOP])
    trajectories = sorted(engine.generate(requests_of(PROMPTS), settings), key=lambda one: one.task_id)
    scores = [Score((-1.0) ** number, number % 2 == 0, "passed", None) for number in range(len(trajectories))]
    return [
        ScoredTrajectory(Task(one.task_id, ""), one, score, score.reward) for one, score in zip(trajectories, scores)
    ]


def on_cpu(network: torch.nn.Module, like: Learner) -> Learner:
    """A learner's counterpart on the CPU, to compare with."""
    settings = {name: like.optimizer.defaults[name] for name in ("lr", "betas", "eps", "weight_decay")}
    optimizer = torch.optim.AdamW(network.parameters(), **settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, like.scheduler.lr_lambdas[0])
    return Learner(network, optimizer, schedule, SimpleNamespace(device=torch.device("cpu")), like.max_grad_norm)


def step(learner: Learner, samples: list, family: str, training: RLTrainingConfig, exact: bool, **more: Any) -> FIGURES:
    loaded = load_model(built(family), family)
    layout = layout_of(loaded, SEMI.block_size)
    return learn(learner, samples, training, layout, 16, [0], exact, **more)


def objectives(family: str, dtype: str, **keys: object) -> FIGURES:
    """A step of every objective, as `learned`."""
    config, samples, counts = config_of(family, model__dtype=dtype, **keys), drawn(family), []
    for objective in OBJECTIVES:
        training = RLTrainingConfig(**objective)
        counts.append(learned(replace(config, training=training), samples, training.method))
    return {"waits": round(sum(waits for waits, _ in counts) / len(counts)), "kernels": counts[0][1]}


def recipes(family: str, names: list[str], dtype: str) -> FIGURES:
    """A step of every published objective of those names, as `learned`; in an epoch or two."""
    samples, waits = drawn(family), 0
    for name in names:
        config = config_of(family, recipe=name, model__dtype=dtype, training__updates_per_step=1)
        config.training.epochs_per_step = min(2, config.training.epochs_per_step)
        waits += learned(config, samples, name)[0]
    return {"waits": round(waits / len(names))}


def learned(config: RLConfig, samples: list[ScoredTrajectory], case: str) -> tuple[int, int]:
    """A step; in float32 it has the CPU's figures, in lower precision figures that are finite.

    Returns how often it waited for the device, and its kernels.
    """
    family, training, exact = config.model.model_base, config.training, config.model.dtype == "float32"
    trained = load_trained(config.model, training, config.model.pretrained_model)
    learner = policy_learner(config, trained, 10)
    reference = frozen_reference(config, trained, learner)
    with emulation.DEVICE.watching() as log:
        got = step(learner, samples, family, training, exact, reference=reference)
    assert got["updates"] == training.updates_per_step * training.epochs_per_step, f"{case}: {got}"
    assert all(math.isfinite(value) for value in got.values()), f"{case}: {got}"
    if exact:
        loaded, first = load_model(built(family), family), load_model(built(family), family)
        old = on_cpu(Policy(first.model, first.mask_id), learner) if reference is not None else None
        other = on_cpu(Policy(loaded.model, loaded.mask_id), learner)
        check_figures(got, step(other, samples, family, training, True, reference=old), case)
    return len(log.waits), log.kernels


def check_figures(got: FIGURES, expected: FIGURES, case: object) -> None:
    for name in COMPARED:
        if name in expected:
            apart = abs(got[name] - expected[name])
            assert apart < 1e-3 * max(1.0, abs(expected[name])), f"{case}: {name} {got[name]}, CPU {expected[name]}"


def pieces(dtype: str) -> FIGURES:
    """A step on rows that are in pieces of a tile each; in float32 with the figures that whole ones have on the CPU."""
    config = config_of("sdar", model__dtype=dtype, training__gradient_checkpointing_enable=dtype == "auto")
    samples = drawn("sdar", max_token=48)
    learner = policy_learner(config, load_trained(config.model, config.training, config.model.pretrained_model), 10)
    training = RLTrainingConfig(tokens_per_micro_batch=TILE, old_logp="recompute")
    rows = sample_rows(samples, training, layout_of(load_model(built("sdar"), "sdar"), SEMI.block_size), [0])
    assert any(batch.clean_copy for batch in micro_batches(rows, TILE))
    got = step(learner, samples, "sdar", training, False)
    assert got["updates"] == 1 and all(math.isfinite(value) for value in got.values()), got
    if dtype == "float32":
        loaded = load_model(built("sdar"), "sdar")
        other = on_cpu(Policy(loaded.model, loaded.mask_id), learner)
        whole = replace(training, tokens_per_micro_batch=10**6)
        check_figures(got, step(other, samples, "sdar", whole, False), "pieces")
    return {}


def value_model(dtype: str) -> FIGURES:
    """A step with a value model."""
    config, samples = config_of("sdar", model__dtype=dtype, model__value_base_model=built("sdar", 4)), drawn("sdar")
    trained = load_trained(config.model, config.training, config.model.pretrained_model)
    learner, critic = policy_learner(config, trained, 10), value_learner(config, 10)
    got = step(learner, samples, "sdar", RLTrainingConfig(), dtype == "float32", critic=critic)
    assert all(math.isfinite(value) for value in got.values()) and got["value_bad_steps"] == 0, got
    if dtype == "float32":
        loaded = load_model(built("sdar"), "sdar")
        other = on_cpu(Policy(loaded.model, loaded.mask_id), learner)
        judge = on_cpu(Critic(load_value(built("sdar", 4), "sdar")), critic)
        check_figures(got, step(other, samples, "sdar", RLTrainingConfig(), True, critic=judge), "value model")
    return {}


def adapters_and_the_engine(dtype: str) -> FIGURES:
    """Adapters are trained, and an engine of its own weights draws with what they make of them."""
    config, samples = config_of("sdar", model__dtype=dtype, model__lora__r=4), drawn("sdar")
    trained = load_trained(config.model, config.training, config.model.pretrained_model)
    learner = policy_learner(config, trained, 10)
    own = engine_model(config, trained, learner)
    assert own.model is not trained.model
    engine = Engine(own.model, own.mask_id, [STOP])
    before = list(engine.generate(requests_of(PROMPTS), SEMI))
    got = step(learner, samples, "sdar", RLTrainingConfig(), False)
    assert got["updates"] == 1, got
    engine.load_weights(whole_weights(learner.network.saved))
    assert len(list(engine.generate(requests_of(PROMPTS), SEMI))) == len(before)
    return {}
