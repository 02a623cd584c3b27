"""A run's networks as they are loaded: what learns, the engine's copy, the frozen first model, the value model."""

import copy
import dataclasses
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from common.runtime import device_and_dtype
from common.schema import ModelConfig, RLConfig, SFTConfig, TrainingBase
from models import LoadedModel, load_model, load_network
from models.lora import add_lora
from models.mixture import named_weights, routers
from models.norms import fuse_norms
from models.value import load_value
from sample.parallel import shard
from train.learner import Learner, make_learner, whole_networks, whole_weights
from train.network import Critic, Policy
from train.routing import Routing, prepare_routers


def mixed_precision(dtype: str) -> str:
    """Accelerate's word for the arithmetic of float32 weights in `model.dtype`."""
    return "bf16" if device_and_dtype(dtype)[1] == torch.bfloat16 else "no"


def load_trained(model_config: ModelConfig, training: TrainingBase, path: str | Path) -> LoadedModel:
    """The model to train: float32 weights, which ZeRO-3 shards as they are loaded, and adapters where asked for.

    Beside adapters nothing else is trained: those weights are kept in the dtype that responses are drawn in.
    """
    device, dtype = device_and_dtype(model_config.dtype)
    loaded = load_model(path, model_config.model_base, dtype if model_config.lora.r else torch.float32, device)
    if model_config.lora.r:
        add_lora(loaded.model, model_config.lora)
    prepare_routers(loaded.model, training)
    if training.gradient_checkpointing_enable:
        loaded.model.gradient_checkpointing_enable()
    return loaded


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
    if config.training.gradient_checkpointing_enable:
        value.network.gradient_checkpointing_enable()
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

    Else a copy, which is whole or divided over `rollout.tensor_parallel_size` ranks, and is given the learner's weights
    after every step.
    """
    _, dtype = device_and_dtype(config.model.dtype)
    tensor_group = config.rollout.tensor_parallel_size
    same_dtype = next(trained.model.parameters()).dtype == dtype
    if same_dtype and tensor_group == 1 and not learner.sharded and not config.model.lora.r:
        return trained
    network = load_untrained(config.model, learner.accelerator)
    shard(network, tensor_group)
    return dataclasses.replace(trained, model=network)


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
    with whole_networks(learner.accelerator):
        network = type(loaded.model)(loaded.model.config)
    network = network.to(loaded.model.device, loaded.model.dtype).eval()
    if loaded.model.device.type == "cuda":
        fuse_norms(network)
    own = named_weights(network)
    with torch.no_grad():
        for name, tensor in whole_weights(loaded.model):
            own[name].copy_(tensor)
    return dataclasses.replace(loaded, model=network)
