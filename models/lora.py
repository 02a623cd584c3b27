"""Low-rank adapters by peft: trained in place of the network's own weights, merged for sampling, saved both ways."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from common.errors import UserError
from common.schema import LoraSettings

ADAPTER = "default"


def add_lora(network: torch.nn.Module, lora: LoraSettings) -> None:
    """Put adapters beside the network's linear layers `targets`, in place; all other weights are frozen.

    An adapter adds nothing at first, and is float32 beside weights of any precision. UserError where a target is no
    layer of the network.
    """
    names = {name.rsplit(".", 1)[-1] for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)}
    for target in lora.targets:
        if target not in names:
            known = ", ".join(sorted(names))
            raise UserError(f"model.lora.targets: {target!r} is no layer of the model; there are {known}")
    import peft  # by those alone who use it: it takes a second

    config = peft.LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=list(lora.targets))
    peft.inject_adapter_in_model(config, network, adapter_name=ADAPTER)
    for name, parameter in network.named_parameters():
        if is_adapter(name):  # in the weights' precision an update would be lost to rounding
            parameter.data = parameter.data.float()


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter."""
    return ".lora_" in name


def adapted_layer(network: torch.nn.Module, name: str) -> torch.nn.Module | None:
    """The adapted layer whose own weight has that name; None for other parameters."""
    prefix, found, rest = name.rpartition(".base_layer.")
    return network.get_submodule(prefix) if found and rest == "weight" else None


def plain_name(name: str) -> str:
    """The name that a parameter has without adapters."""
    return name.replace(".base_layer.", ".")


def merged(layer: torch.nn.Module) -> Tensor:
    """The layer's weight with what its adapter adds, rounded once: W + alpha / r · B A (LoRA, eq. 3)."""
    weight = layer.base_layer.weight
    return (weight.float() + layer.get_delta_weight(ADAPTER).float()).to(weight.dtype).detach()


def save_adapter(lora: LoraSettings, base: str, weights: dict[str, Tensor], folder: Path) -> None:
    """Write the adapter as peft does, for PeftModel.from_pretrained(network, folder). weights: by parameter name."""
    import peft

    config = peft.LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, target_modules=list(lora.targets), base_model_name_or_path=base
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    named = {f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": tensor for name, tensor in weights.items()}
    save_file(named, folder / "adapter_model.safetensors")
