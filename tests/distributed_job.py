"""What several ranks do in a test: finetuning and RL steps, a step that is not finite on one rank only, checkpoints.

Launched as `accelerate launch … --module tests.distributed_job MODEL SMALL FOLDER`; the same functions run in one
process.
"""

import itertools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from common import ranks
from common.checkpoint import write_folder
from common.config import load_config
from common.config_files import recipes
from common.schema import NEEDS, OptimizerParams, RLTrainingConfig, Sampling, SchedulerConfig, SFTTrainingConfig
from common.trajectory import Request
from models import LoadedModel, find_family, load_model
from models.mixture import routers
from models.value import load_value
from sample.engine import Engine
from tests.scored import scored
from train.learner import Learner, make_accelerator, make_learner, micro_batches, update, whole_weights
from train.learner_state import load_learner, save_learner
from train.loading import frozen_reference, load_trained, policy_learner, sampling_copy
from train.network import Critic, Policy
from train.packing import make_rows
from train.recipes import keys_of_recipe
from train.rl_step import learn
from train.routing import Routing
from train.sft_trainer import sft_update
from train.views import Example, Layout, layout_of, random_block_views

BLOCK, LENGTH, RESPONSES = 4, 8, 5
MIXTURES = ("sdar_moe", "llada2")
TRAINING = RLTrainingConfig(tokens_per_micro_batch=40, updates_per_step=2, max_bad_steps=2)
NOISE = SFTTrainingConfig(post_num=1)


@dataclass
class Networks:
    """A policy, a value model and an engine, as the ranks hold them."""

    loaded: LoadedModel
    learner: Learner
    critic: Learner | None  # of the dense model
    engine: Engine


def set_up(folder: Path, family: str = "sdar") -> Networks:
    make_accelerator()
    loaded = load_model(folder, family)
    # epsilon above the gradients' rounding, which Adam would blow up to whole steps
    schedule, params = SchedulerConfig("linear"), OptimizerParams(learning_rate=1e-3, epsilon=1e-5)
    learner = make_learner(Policy(loaded.model, loaded.mask_id), params, schedule, 100, TRAINING)
    critic = None
    if routers(loaded.model):
        learner.routing = Routing(loaded.model, bias_rate=0.05 if family == "llada2" else 0.0)
    else:
        critic = make_learner(Critic(load_value(folder, family)), params, schedule, 100, TRAINING)
    network = sampling_copy(loaded.model, learner, torch.float32)
    return Networks(loaded, learner, critic, Engine(network, loaded.mask_id, loaded.stop_ids))


def rl_step(networks: Networks, number: int) -> dict[str, float]:
    """One RL step on five responses to prompts of different lengths, with a value model."""
    figures = learn_from(networks, number, [(-1.0) ** n for n in range(RESPONSES)], networks.critic)
    networks.engine.load_weights(whole_weights(networks.learner.network.backbone))
    return figures


def learn_from(networks: Networks, number: int, rewards: list[float], critic: Learner | None) -> dict[str, float]:
    """Draw a response for each reward, which is its advantage too, and learn from them."""
    settings = Sampling(max_token=LENGTH, remasking_strategy="low_confidence_static")
    training = replace(TRAINING, replay_routes=networks.learner.routing is not None)
    named = [(str(n), list(range(5 + 3 * n)), 0, 1, number) for n in range(RESPONSES)]
    requests = [Request(*one, keep_routes=training.replay_routes) for one in named]
    drawn = list(networks.engine.generate(ranks.Queue(requests, shared=True), settings, on_step=together_once()))
    together = [trajectory for part in ranks.gather(drawn) for trajectory in part]
    together.sort(key=lambda trajectory: int(trajectory.task_id))
    samples = [scored(one, reward, reward, None) for one, reward in zip(together, rewards)]
    layout = Layout(networks.loaded.mask_id, BLOCK)
    figures = learn(networks.learner, samples, training, layout, LENGTH, seed=[number], exact=True, critic=critic)
    return figures | {"own_responses": len(drawn)}


def together_once() -> Callable[[], None]:
    """For the engine to call after every step: at the first one it waits for the other ranks' first step.

    A rank holds an even share of the responses at most, so none finishes before the others have theirs.
    """
    steps = itertools.count()
    return lambda: ranks.wait_for_all() if next(steps) == 0 else None


def sft_step(networks: Networks, number: int) -> dict[str, float]:
    """One finetuning update on three samples."""
    rng, rows = np.random.default_rng(number), []
    for n in range(3):
        prompt, response = list(range(4 + n)), [7] * (BLOCK * (n + 1) - n)
        views = random_block_views(
            Example(prompt, response, len(response)), Layout(networks.loaded.mask_id, BLOCK), NOISE, rng
        )
        rows += make_rows(n, prompt, response, views)
    return sft_update(networks.learner, rows, 24)


def bad_step(networks: Networks, learner: Learner) -> dict[str, float]:
    """An update whose loss is not finite on the last rank only."""
    rng, before = np.random.default_rng(0), tensors(learner)
    views = random_block_views(Example([1, 2, 3, 4], [7] * 12, 12), Layout(networks.loaded.mask_id, BLOCK), NOISE, rng)
    rows = [row for n in range(3) for row in make_rows(n, [1, 2, 3, 4], [7] * 12, views)]
    factor = float("nan") if ranks.rank() == ranks.world() - 1 else 1.0

    def loss(batch: object) -> torch.Tensor:
        result = learner.forward(batch)
        return factor * (result[0] if isinstance(result, tuple) else result).sum()

    done = update(learner, micro_batches(rows, 40), loss)
    after = tensors(learner)
    unchanged = all(torch.equal(before[name], after[name]) for name in before)
    return {"taken": done.taken, "unchanged": unchanged, "bad_in_a_row": learner.bad_in_a_row}


def equal_step(networks: Networks) -> dict[str, float | bool]:
    """An RL step on responses of equal rewards: what is counted, and whether the policy is as it was."""
    before = tensors(networks.learner)
    figures = learn_from(networks, 2, [0.0] * RESPONSES, None)
    after = tensors(networks.learner)
    unchanged = all(torch.equal(before[name], after[name]) for name in before)
    return {"updates": figures["updates"], "skipped": figures["updates_skipped"], "unchanged": unchanged}


def tensors(learner: Learner) -> dict[str, torch.Tensor]:
    """Whole copies of the network's weights."""
    return {name: tensor.clone() for name, tensor in whole_weights(learner.network.saved)}


def run(model: Path, folder: Path) -> dict:
    """All of it; what is compared between one process and several. Checkpoints go to `folder`."""
    networks = set_up(model)
    steps = [rl_step(networks, 1), sft_step(networks, 2)]
    networks.engine.load_weights(whole_weights(networks.learner.network.backbone))
    both = (networks.learner, networks.critic)
    equal = equal_step(networks)
    bad = [bad_step(networks, learner) for learner in both]
    for learner, name in zip(both, ("learner", "critic")):
        write_folder(folder / name, lambda writer, learner=learner: save_learner(learner, writer, ""))
    saved = [tensors(learner) for learner in both]
    steps += [rl_step(networks, 3)]
    end = [tensors(learner) for learner in both]
    engine = {name: tensor.clone() for name, tensor in networks.engine.model.named_parameters()}
    return {
        "steps": steps,
        "equal": equal,
        "bad": bad,
        "saved": saved,
        "end": end,
        "engine": engine,
        "sharded": networks.learner.sharded,
        "world": ranks.world(),
        "resumed": resumed(model, folder, saved),
    }


def run_mixture(model: Path, family: str) -> dict:
    """A finetuning and an RL step of a mixture of experts, whose routes are replayed."""
    networks = set_up(model, family)
    steps = [sft_step(networks, 1)]
    networks.engine.load_weights(whole_weights(networks.learner.network.backbone))
    steps.append(rl_step(networks, 2))
    return {"steps": steps, "end": tensors(networks.learner)}


def resumed(model: Path, folder: Path, weights: list[dict[str, torch.Tensor]]) -> dict:
    """The step after a checkpoint, by fresh networks that read it."""
    networks = set_up(model)
    load_learner(networks.learner, folder / "learner", weights[0])
    load_learner(networks.critic, folder / "critic", weights[1])
    networks.engine.load_weights(whole_weights(networks.learner.network.backbone))
    return {"step": rl_step(networks, 3), "end": [tensors(networks.learner), tensors(networks.critic)]}


def recipes_of(family: str, model: Path) -> dict:
    """A step of each published objective on one policy, one after the other: the figures of each, the weights at last.

    The responses are those that the first policy drew.
    """
    names = [name for name in recipes() if NEEDS.get(method_of(name), "block") == find_family(family).attention]
    keys = ["optimizer.params.learning_rate=1e-3", "optimizer.params.epsilon=1e-5", "training.updates_per_step=1"]
    keys += [f"model.model_base={family}", f"model.pretrained_model={model}"]
    configs = {name: load_config("rl", ["config=configs/rl_tiny.yaml", *keys, f"recipe={name}"]) for name in names}
    config = configs[names[-1]]
    make_accelerator()
    loaded = load_trained(config.model, config.training, model)
    learner = policy_learner(config, loaded, 100)
    config.training.kl_reference = "initial"
    reference = frozen_reference(config, loaded, learner)
    network = sampling_copy(loaded.model, learner, torch.float32)
    settings = Sampling(max_token=LENGTH, steps=LENGTH, remasking_strategy="low_confidence_static")
    requests = [Request(str(n), list(range(5 + 3 * n)), seed=1) for n in range(RESPONSES)]
    drawn = sorted(Engine(network, loaded.mask_id, []).generate(requests, settings), key=lambda one: one.task_id)
    samples = [scored(one, (-1.0) ** n, (-1.0) ** n, None) for n, one in enumerate(drawn)]
    steps = {}
    for number, (name, one) in enumerate(configs.items()):
        training = replace(
            one.training, epochs_per_step=min(2, one.training.epochs_per_step), tokens_per_micro_batch=200
        )
        first = reference if training.kl_reference == "initial" else None
        layout = layout_of(loaded, BLOCK)
        steps[name] = learn(learner, samples, training, layout, LENGTH, [number], exact=False, reference=first)
    return {"steps": steps, "end": tensors(learner)}


def method_of(recipe: str) -> str:
    return keys_of_recipe(recipe)["training.method"]


def all_recipes(models: Path) -> dict:
    """`recipes_of` by attention, on the models of that folder."""
    return {"block": recipes_of("sdar", models / "sdar"), "full": recipes_of("dream", models / "dream")}


def stage(number: int, model: Path, folder: Path, models: Path | None = None) -> None:
    """`run` under a ZeRO stage, and `all_recipes` where `models` are given; rank 0 writes what came of it."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # the process group stays
    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(number)
    folder = folder / f"zero{number}"
    result = run(model, folder)
    if models is not None:
        result["recipes"] = all_recipes(models)
    if number == 3:
        result["mixtures"] = {name: run_mixture(model.parent / name, name) for name in MIXTURES}
    if ranks.is_main():
        torch.save(result, folder / "result.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    sdar, small, target = map(Path, sys.argv[1:])
    stage(3, sdar, target, small)
    stage(2, sdar, target)
