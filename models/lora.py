"""Low-rank adapters by peft: trained in place of the network's own weights, merged for sampling, saved both ways."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from common.errors import UserError
from common.schema import LoraSettings
from models.mixture import routers

ADAPTER = "default"
EXPERTS = "experts"  # among targets: the joined weights of a mixture's experts
EXPERT_PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def add_lora(network: torch.nn.Module, lora: LoraSettings) -> None:
    """Put adapters beside the network's linear layers `targets`, in place; all other weights are frozen.

    An adapter adds nothing at first, and is float32 beside weights of any precision. UserError where a target is no
    layer of the network, or where it names layers of experts by the names that only dense ones have.
    """
    names = {name.rsplit(".", 1)[-1] for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)}
    if routers(network):
        names.add(EXPERTS)
        dense = [target for target in lora.targets if target in ("gate_proj", "up_proj", "down_proj")]
        if dense and EXPERTS not in lora.targets:
            raise UserError(
                f"model.lora.targets: {', '.join(dense)} would adapt no expert of the mixture; write {EXPERTS} in "
                "their place, or leave them out: [q_proj,k_proj,v_proj,o_proj] adapts attention alone"
            )
    for target in lora.targets:
        if target not in names:
            known = ", ".join(sorted(names))
            raise UserError(f"model.lora.targets: {target!r} is no layer of the model; there are {known}")
    import peft  # by those alone who use it: it takes a second

    peft.inject_adapter_in_model(peft.LoraConfig(**peft_settings(lora)), network, adapter_name=ADAPTER)
    for layer in network.modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            add_in_place(layer)
    for name, parameter in network.named_parameters():
        if is_adapter(name):  # in the weights' precision an update would be lost to rounding
            parameter.data = parameter.data.float()


def add_in_place(layer: torch.nn.Module) -> None:
    """Let an adapted linear layer of peft's add its adapter's product into its own result.

    W x + (B A x) α / r as peft writes it makes two more tensors as wide as the result, and a float32 copy of x.
    """
    # by calls of the two small layers, before which DeepSpeed gathers their weights
    down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    down.forward = partial(narrowed, down)
    up.forward = partial(added, up, layer.scaling[ADAPTER])
    layer.cast_input_dtype_enabled = False
    layer.lora_variant[ADAPTER] = SimpleNamespace(forward=by_its_parts)


def by_its_parts(layer: torch.nn.Module, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
    """An adapted layer's output, as peft asks a variant of LoRA for it: x (…, in), the layer's own result (…, out)."""
    return layer.lora_B[active_adapter](layer.lora_A[active_adapter](x), result)


def narrowed(down: torch.nn.Linear, x: Tensor) -> Tensor:
    """A x, in the precision of x."""
    return linear(x, down.weight.to(x.dtype))


def added(up: torch.nn.Linear, scaling: float, narrow: Tensor, result: Tensor) -> Tensor:
    """result + scaling · B narrow, in the place of result."""
    return AddProduct.apply(result, narrow.to(result.dtype), up.weight.to(result.dtype), scaling)


class AddProduct(torch.autograd.Function):
    """result + scaling · narrow weightᵀ in the place of result (…, out); narrow (…, r), weight (out, r)."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, narrow: Tensor, weight: Tensor, scaling: float) -> Tensor:
        result.flatten(0, -2).addmm_(narrow.flatten(0, -2), weight.t(), alpha=scaling)
        ctx.save_for_backward(narrow, weight)
        ctx.scaling = scaling
        ctx.mark_dirty(result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        narrow, weight = ctx.saved_tensors
        of_weight = gradient.flatten(0, -2).t() @ narrow.flatten(0, -2)
        return gradient, gradient @ weight * ctx.scaling, of_weight * ctx.scaling, None


def peft_settings(lora: LoraSettings) -> dict[str, Any]:
    """The adapters in peft's words."""
    return {
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "target_modules": [target for target in lora.targets if target != EXPERTS],
        "target_parameters": EXPERT_PARAMETERS if EXPERTS in lora.targets else None,
    }


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter."""
    return ".lora_" in name


def adapted_layer(network: torch.nn.Module, name: str) -> torch.nn.Module | None:
    """The adapter's layer for the weight of that name; None for other parameters.

    Experts have several adapted weights, and as many layers one around another.
    """
    prefix, found, weight = name.rpartition(".base_layer.")
    while found:
        layer = network.get_submodule(prefix)
        if getattr(layer, "parameter_name", "weight") == weight:
            return layer
        prefix, found, _ = prefix.rpartition(".base_layer")
    return None


def plain_name(name: str) -> str:
    """The name that a parameter has without adapters."""
    return name.replace(".base_layer", "")


def merged(layer: torch.nn.Module) -> Tensor:
    """The layer's weight with what its adapter adds, rounded once: W + alpha / r · B A (LoRA, eq. 3)."""
    weight = getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"))
    return (weight.float() + layer.get_delta_weight(ADAPTER).float()).to(weight.dtype).detach()


def save_adapter(lora: LoraSettings, base: str, weights: dict[str, Tensor], folder: Path) -> None:
    """Write the adapter as peft does, for PeftModel.from_pretrained(network, folder). weights: by parameter name."""
    import peft

    folder.mkdir(parents=True, exist_ok=True)
    peft.LoraConfig(**peft_settings(lora), base_model_name_or_path=base).save_pretrained(folder)
    named = {f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": tensor for name, tensor in weights.items()}
    save_file(named, folder / "adapter_model.safetensors")
