"""A learner in a checkpoint: weights and moments by parameter name, whole, so that any number of ranks reads them.

What a checkpoint holds is the network under `learner.network`, by its own names: the policy's backbone, or the value
network.
"""

import io
import json
import random
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from common import ranks
from common.checkpoint import Writer, write_folder
from common.errors import UserError
from common.schema import ModelConfig
from models import save_model
from models.lora import is_adapter, plain_name, save_adapter
from models.mixture import expert_biases
from models.value import ValueNetwork, save_value
from train.learner import Learner, whole, whole_weights

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, float32 as the weights
SHARD_BYTES = 4 << 30  # of host memory that writing takes


def write_network(learner: Learner, tokenizer: PreTrainedTokenizerBase, writer: Writer, folder: str = "") -> None:
    """The learner's network as a model in its family's own format. All ranks must call it."""
    network, tensors = learner.network.saved, None
    if any(hasattr(parameter, "ds_id") or is_adapter(name) for name, parameter in network.named_parameters()):
        # ranks share its weights out, or adapters are to be merged: whole copies on rank 0
        tensors = {name: tensor.to("cpu", copy=True) for name, tensor in whole_weights(network) if ranks.is_main()}
    save = save_value if isinstance(network, ValueNetwork) else save_model
    writer.do(save, network, tokenizer, Path(writer.folder, folder), tensors)


def save_learner(learner: Learner, writer: Writer, folder: str) -> None:
    """Write optimizer, schedule and, where the network's are of lower precision, float32 weights. All ranks call it."""
    shard: dict[str, Tensor] = {}
    number = 0
    steps = [int(state["step"]) for state in learner.optimizer.state.values() if "step" in state]  # none at first
    for name, parameter in learner.network.saved.named_parameters():
        own = whole_state(learner, parameter, bool(steps))
        if is_adapter(name) and "weight" not in own:  # in the model's own files adapters are merged
            with whole(parameter):
                own["weight"] = parameter.detach().clone()
        for key, tensor in own.items():
            if ranks.is_main():
                shard[f"{name}:{key}"] = tensor.detach().to("cpu", copy=True).contiguous()
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
            number += 1
            writer.do(save_file, shard, writer.path(folder, f"{number:05d}.safetensors"))
            shard = {}
    writer.do(save_file, shard, writer.path(folder, f"{number + 1:05d}.safetensors"))
    counts = {
        "scheduler": {key: value for key, value in learner.scheduler.state_dict().items() if key != "lr_lambdas"},
        "bad_in_a_row": learner.bad_in_a_row,
        "optimizer_steps": max(steps, default=0),
    }
    writer.do(writer.path(folder, "learner.json").write_text, json.dumps(counts))


def load_learner(learner: Learner, folder: Path, weights: dict[str, Tensor]) -> None:
    """Take up what `save_learner` wrote. `weights`: the network's by name, for those that it did not.

    UserError where the network has adapters and these are not the ones that were saved.
    """
    counts = json.loads((folder / "learner.json").read_text())
    files = [safe_open(file, "pt") for file in sorted(folder.glob("*.safetensors"))]
    file_of = {key: file for file in files for key in file.keys()}  # noqa: SIM118 — safe_open has no iterator
    check_adapters(learner, folder, {key: file.get_slice(key).get_shape() for key, file in file_of.items()})
    if counts["optimizer_steps"]:
        make_states(learner, counts["optimizer_steps"])
    for name, parameter in learner.network.saved.named_parameters():
        keys = {key: f"{name}:{key}" for key in ("weight", *MOMENTS) if f"{name}:{key}" in file_of}
        saved = {key: file_of[full].get_tensor(full) for key, full in keys.items()}
        set_state(learner, parameter, saved.pop("weight", weights.get(name)), saved)
    for name, bias in expert_biases(learner.network.saved):
        bias.copy_(weights[plain_name(name)])
    learner.scheduler.load_state_dict(counts["scheduler"] | {"lr_lambdas": [None]})
    for group, rate in zip(learner.optimizer.param_groups, learner.scheduler.get_last_lr()):
        group["lr"] = rate
    learner.bad_in_a_row = counts["bad_in_a_row"]


def check_adapters(learner: Learner, folder: Path, saved: dict[str, list[int]]) -> None:
    """UserError where the network has an adapter that was not saved in that shape; `saved`: shapes by name and key."""
    for name, parameter in learner.network.saved.named_parameters():
        shape = list(getattr(parameter, "ds_shape", parameter.shape))  # of the whole, where ZeRO holds a part
        if is_adapter(name) and saved.get(f"{name}:weight") != shape:
            raise UserError(
                f"model.lora: {folder.parent} holds no such adapters: the run was started without, or with another r "
                "or other targets; set them as they were, or give another experiment.project, or "
                "experiment.start_from_scratch=True"
            )


def whole_state(learner: Learner, parameter: torch.nn.Parameter, stepped: bool) -> dict[str, Tensor]:
    """The parameter's moments, and its float32 weight where it has another, whole. All ranks must call it."""
    if not parameter.requires_grad:
        return {}
    if learner.deepspeed is None:
        state = learner.optimizer.state.get(parameter, {})
        return {key: state[key] for key in MOMENTS if key in state}
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS if stepped}
    if parameter.dtype != torch.float32:
        found["weight"] = safe_get_full_fp32_param(parameter)
    return found


def make_states(learner: Learner, steps: int) -> None:
    """Room for the moments, which the optimizer would make at its first step."""
    optimizer = learner.optimizer
    if learner.deepspeed is None:
        flat = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    elif learner.sharded:
        flat = learner.deepspeed.optimizer.fp32_partitioned_groups_flat
    else:
        flat = learner.deepspeed.optimizer.single_partition_of_fp32_groups
    for parameter in flat:
        moments = {key: torch.zeros_like(parameter, memory_format=torch.preserve_format) for key in MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(float(steps))} | moments
    if learner.deepspeed is not None and not learner.sharded:
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        for low, high in zip(learner.deepspeed.optimizer.bit16_groups, flat):
            lazy_init_hp_params_optimizer_state(low, high, optimizer.state)


@torch.no_grad()
def set_state(
    learner: Learner, parameter: torch.nn.Parameter, weight: Tensor | None, moments: dict[str, Tensor]
) -> None:
    """Give the parameter whole tensors' values, its moments and DeepSpeed's float32 copy too. All ranks must call it.

    `weight` None: frozen, beside an adapter, it stays as it was loaded.
    """
    if weight is not None:
        with whole(parameter, changed=True):
            parameter.data.copy_(weight)
    if learner.deepspeed is None:
        for key, moment in moments.items():
            learner.optimizer.state[parameter][key].copy_(moment)
        return
    from deepspeed import utils

    if weight is not None and parameter.requires_grad:
        if learner.sharded:
            utils.safe_set_local_fp32_param(parameter, own_part(parameter, weight.float()))
        else:
            utils.safe_set_full_fp32_param(parameter, weight.float())
    for key, moment in moments.items():
        if learner.sharded:
            utils.safe_set_local_optimizer_state(parameter, own_part(parameter, moment), key)
        else:
            utils.safe_set_full_optimizer_state(parameter, moment, key)


def own_part(parameter: torch.nn.Parameter, value: Tensor) -> Tensor:
    """This rank's part of a whole tensor, as ZeRO-3 cuts the parameter: equal parts, the last one filled up."""
    size = parameter.ds_tensor.numel()
    padded = torch.nn.functional.pad(value.flatten(), (0, size * ranks.world() - value.numel()))
    return padded[ranks.rank() * size :][:size]


def save_random_state(writer: Writer, name: str) -> None:
    """Write the generators of every rank. All ranks must call it."""
    kind, keys, *rest = np.random.get_state()
    mine = {"torch": torch.get_rng_state(), "numpy": (kind, keys.tolist(), *rest), "python": random.getstate()}
    if torch.cuda.is_available():
        mine["cuda"] = torch.cuda.get_rng_state()
    buffer = io.BytesIO()
    torch.save(ranks.gather(mine), buffer)
    writer.do(writer.path(name).write_bytes, buffer.getvalue())


def load_random_state(file: Path) -> None:
    """Take up this rank's generators; a rank that the run did not have before keeps its own."""
    states = torch.load(file, weights_only=True)
    if ranks.rank() < len(states):
        mine = states[ranks.rank()]
        torch.set_rng_state(mine["torch"])
        np.random.set_state(mine["numpy"])
        version, numbers, gauss = mine["python"]
        random.setstate((version, tuple(numbers), gauss))
        if "cuda" in mine and torch.cuda.is_available():
            torch.cuda.set_rng_state(mine["cuda"])


def write_adapter(learner: Learner, model_config: ModelConfig, folder: Path) -> None:
    """The adapters in peft's format, where there are any, beside the merged model. All ranks must call it."""
    if not model_config.lora.r:
        return
    weights = {}
    for name, parameter in learner.network.saved.named_parameters():
        if is_adapter(name):
            with whole(parameter):
                weights[name] = parameter.detach().to("cpu", copy=True)
    lora, base = model_config.lora, model_config.pretrained_model
    target = folder / f"{model_config.optimized_name}_adapter"
    write_folder(target, lambda writer: writer.do(save_adapter, lora, base, weights, writer.folder))
