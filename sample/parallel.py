"""One network over several devices for sampling: transformers' own tensor-parallel plan, in groups of equal size."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.integrations.tensor_parallel import apply_tensor_parallelism, replace_layer_number_by_wildcard

from common import ranks
from common.errors import UserError
from models.mixture import named_weights


def shard(model: torch.nn.Module, size: int, device: torch.device | None = None) -> int:
    """Divide a loaded network's weights over groups of `size` processes; returns the number of this process's group.

    All processes of the default process group call it, each with the whole network. The processes of a group then
    draw the same responses together: each must be given the same requests. Every device is in one of the groups.
    `device` is where an empty network will be. UserError where the devices or the heads do not divide.
    """
    world = ranks.world()
    key_heads = model.config.num_key_value_heads
    if world == 1 < size:
        raise UserError(
            f"rollout.tensor_parallel_size: {size}, but this is one process; name a file of accelerate_configs/ in "
            "experiment.deepspeed_file, which launches one for each device"
        )
    if world % size:
        raise UserError(f"rollout.tensor_parallel_size: {size} does not divide the {world} devices")
    if key_heads % size:
        raise UserError(f"rollout.tensor_parallel_size: {size} does not divide the model's {key_heads} key-value heads")
    if size == 1:
        return ranks.rank() if world > 1 else 0
    mesh = init_device_mesh((device or model.device).type, (world // size, size), mesh_dim_names=("group", "tensor"))
    head, embedding = model.lm_head, model.model.embed_tokens
    if head.weight is embedding.weight:  # the head is divided, the embedding is not
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    styles: dict[str, str] = {}
    for name, module in model.named_modules():
        style = model.tp_plan.get(replace_layer_number_by_wildcard(name))
        if style is not None:  # transformers wants the parameters before their module
            own = [f"{name}.{own}" for own, _ in module.named_parameters(recurse=False)]
            # experts' two tensors are divided in ways of their own: every rank has a slice of each expert's width
            styles |= {one: model.tp_plan.get(replace_layer_number_by_wildcard(one), style) for one in own}
            styles[name] = style
    apply_tensor_parallelism(model, mesh["tensor"], styles)
    return mesh["group"].get_local_rank()


def tensor_group_of(model: torch.nn.Module) -> int:
    """How many processes hold a network together: 1 where it is whole."""
    return next((one.device_mesh.size() for one in model.parameters() if isinstance(one, DTensor)), 1)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be divided."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def load_weights(model: torch.nn.Module, named: Iterable[tuple[str, Tensor]]) -> None:
    """Copy whole weights, by name, into a model that may be divided; one that is the model's own costs nothing."""
    own = named_weights(model)
    tied = model.config.tie_word_embeddings and "lm_head.weight" in own  # divided, and so a copy
    for name, tensor in named:
        copy_into(own[name], tensor)
        if tied and name == "model.embed_tokens.weight":
            copy_into(own["lm_head.weight"], tensor)


def copy_into(own: Tensor, tensor: Tensor) -> None:
    """Copy a whole tensor into one of ours in place, of which this process may hold a part; no communication."""
    if isinstance(own, DTensor) and not isinstance(tensor, DTensor):
        tensor = distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
    if local(own).data_ptr() != local(tensor).data_ptr():
        local(own).copy_(local(tensor))
