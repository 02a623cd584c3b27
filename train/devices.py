"""One network over many devices: accelerate's launch, DeepSpeed's sharding, and weights made whole again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor

from common import ranks
from models.lora import adapted_layer, is_adapter, merged, plain_name

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def make_accelerator(mixed_precision: str = "no") -> Accelerator:
    """Join the other ranks, if there are any, as the launcher's environment says."""
    on_gpu = torch.cuda.is_available()
    use_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if use_deepspeed and not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled at the first launch
    handlers = []
    if use_deepspeed or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        handlers = [InitProcessGroupKwargs(backend=None if on_gpu else "gloo", timeout=ranks.TIMEOUT)]
    accelerator = Accelerator(mixed_precision=mixed_precision, kwargs_handlers=handlers)
    assert (accelerator.state.deepspeed_plugin is not None) == use_deepspeed
    assert accelerator.num_processes == ranks.world() == int(os.environ.get("WORLD_SIZE", "1"))
    return accelerator


def with_deepspeed(
    accelerator: Accelerator, network: torch.nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float
) -> DeepSpeedEngine:
    """The network and its optimizer in DeepSpeed's hands. It clips, and skips a step whose gradient is not finite."""
    from deepspeed.utils import set_z3_leaf_modules

    from train.policy import Head

    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    settings["train_micro_batch_size_per_gpu"] = settings["gradient_accumulation_steps"] = 1  # the learner's to set
    settings["train_batch_size"] = ranks.world()
    settings["gradient_clipping"] = max_grad_norm
    if accelerator.mixed_precision == "bf16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if any(isinstance(module, Head) for module in network.modules()):
        set_z3_leaf_modules(network, [Head])
    engine, _ = accelerator.prepare(network, optimizer)
    return engine


@contextlib.contextmanager
def whole_networks(accelerator: Accelerator) -> Iterator[None]:
    """Within it networks are loaded whole on every rank, as an engine needs them, also where ZeRO-3 shards others."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # accelerate's zero3_init_context_manager has no effect on transformers any more
    try:
        yield
    finally:
        set_hf_deepspeed_config(plugin.dschf)


def whole_weights(network: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight by name, adapters merged; under ZeRO-3 made whole one after another. All ranks must go through all.

    A tensor that was made whole is gone when the next is asked for: one weight more is all the memory it takes.
    """
    for name, parameter in network.named_parameters():
        layer = adapted_layer(network, name)
        if layer is not None:
            with whole(*layer.parameters()):
                yield plain_name(name), merged(layer)
        elif not is_adapter(name):
            with whole(parameter):
                yield plain_name(name), parameter.data


def whole(*parameters: torch.nn.Parameter, changed: bool = False) -> contextlib.AbstractContextManager:
    """Within it the parameters are whole on every rank; `changed`: what rank 0 writes to them there is kept."""
    if not hasattr(parameters[0], "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if changed else None)
