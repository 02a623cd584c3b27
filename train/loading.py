"""A run's networks as they are loaded: what learns, the engine's copy, the frozen first model, the value model."""

import copy
import dataclasses
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from common.jobs import RLConfig, SFTConfig
from common.runtime import device_and_dtype
from common.schema import ModelConfig, TrainingBase
from models import LoadedModel, load_model, load_network
from models.family import empty_network, give_memory
from models.gates import fuse_gates
from models.lora import add_lora
from models.mixture import routers
from models.value import load_value
from sample.parallel import load_weights, shard
from train.learner import Learner, make_learner, under_deepspeed, whole_networks, whole_weights
from train.network import Critic, Policy
from train.routing import Routing, prepare_routers


def mixed_precision(dtype: str) -> str:
    """Accelerate's word for the arithmetic of float32 weights in `model.dtype`."""
    return "bf16" if device_and_dtype(dtype)[1] == torch.bfloat16 else "no"


def load_trained(model_config: ModelConfig, training: TrainingBase, path: str | Path) -> LoadedModel:
    """The model to train, with adapters where asked for; ZeRO-3 shards weights as they are loaded.

    They come in the dtype that they are kept in: float32, but bfloat16 where DeepSpeed keeps a float32 copy of its own
    beside them, or where adapters alone are trained.
    """
    device, dtype = device_and_dtype(model_config.dtype)
    kept = dtype if model_config.lora.r or under_deepspeed() else torch.float32
    loaded = load_model(path, model_config.model_base, kept, device)
    if model_config.lora.r:
        add_lora(loaded.model, model_config.lora)
    prepare_routers(loaded.model, training)
    if device.type == "cuda":
        fuse_gates(loaded.model)
    if training.gradient_checkpointing_enable:
        recompute_activations(loaded.model)
    return loaded


def recompute_activations(network: PreTrainedModel) -> None:
    """Activation checkpointing, by the name that this transformers has for it: 5.23 warns of the one that 5.17 has."""
    getattr(network, "activation_checkpointing_enable", network.gradient_checkpointing_enable)()


def policy_learner(config: RLConfig | SFTConfig, loaded: LoadedModel, updates: int) -> Learner:
    """The policy over a loaded model, with its optimizer and a schedule of `updates` updates."""
    policy, precision = Policy(loaded.model, loaded.mask_id), mixed_precision(config.model.dtype)
    learner = make_learner(policy, config.optimizer.params, config.lr_scheduler, updates, config.training, precision)
    if routers(loaded.model):
        learner.routing = Routing(loaded.model, config.training.expert_bias_rate)
    return learner


def value_learner(config: RLConfig, updates: int) -> Learner:
    """The value model of `model.value_base_model`, with an optimizer of its own."""
    device, _ = device_and_dtype(config.model.dtype)
    value = load_value(config.model.value_base_model, config.model.model_base, torch.float32, device)
    if device.type == "cuda":
        fuse_gates(value.network)
    if config.training.gradient_checkpointing_enable:
        recompute_activations(value.network)
    params, precision = config.optimizer.params, mixed_precision(config.model.dtype)
    if params.value_learning_rate is not None:
        params = dataclasses.replace(params, learning_rate=params.value_learning_rate)
    return make_learner(Critic(value), params, config.lr_scheduler, updates, config.training, precision)


def load_untrained(model_config: ModelConfig, accelerator: Accelerator) -> PreTrainedModel:
    """The network as it was before the run, whole on every rank, in the dtype that responses are drawn in."""
    device, dtype = device_and_dtype(model_config.dtype)
    with whole_networks(accelerator):
        return load_network(model_config.pretrained_model, model_config.model_base, dtype, device)


def engine_model(config: RLConfig, trained: LoadedModel, learner: Learner) -> LoadedModel:
    """The model that draws: the learner's own where its weights are whole, unadapted and of the right dtype.

    Else a copy, whole or divided over `rollout.tensor_parallel_size` ranks, which is given the learner's weights now
    and after every step.
    """
    _, dtype = device_and_dtype(config.model.dtype)
    tensor_group = config.rollout.tensor_parallel_size
    same_dtype = next(trained.model.parameters()).dtype == dtype
    if same_dtype and tensor_group == 1 and not learner.sharded and not config.model.lora.r:
        return trained
    return dataclasses.replace(trained, model=sampling_copy(trained.model, learner, dtype, tensor_group))


def sampling_copy(
    network: PreTrainedModel, learner: Learner, dtype: torch.dtype, tensor_group: int = 1
) -> PreTrainedModel:
    """A network with the learner's weights in that dtype, divided over a tensor group. All ranks must call it.

    No rank holds more than its part and one weight: they are divided before there is memory for them.
    """
    with whole_networks(learner.accelerator):
        copied = empty_network(network, dtype)
    shard(copied, tensor_group, network.device)
    give_memory(copied, network)
    load_weights(copied, whole_weights(network))
    return copied


def frozen_reference(config: RLConfig, trained: LoadedModel, learner: Learner) -> Learner | None:
    """The frozen first model where the KL refers to it (`training.kl_reference: initial`)."""
    if config.training.kl_reference != "initial":
        return None
    if learner.deepspeed:
        first = Policy(load_untrained(config.model, learner.accelerator), trained.mask_id)
    else:
        first = copy.deepcopy(learner.network)
    # it is another network, which gives tokens to the experts of its own choice
    return dataclasses.replace(learner, network=first.requires_grad_(False), deepspeed=None, routing=None)


def whole_model(loaded: LoadedModel, learner: Learner) -> LoadedModel:
    """The model as it is, or where ranks share its weights out, a whole copy for an engine. All ranks must call it."""
    if not learner.sharded:
        return loaded
    network = sampling_copy(loaded.model, learner, loaded.model.dtype)
    return dataclasses.replace(loaded, model=network)
