"""What families with mixtures of experts share: a checkpoint's tensors for each expert, transformers' joined ones."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from common.errors import UserError
from models.files import KEY, stored_shapes
from models.original import DiffusionNetwork

EXPERTS = ".mlp.experts."
SLIDING = {"use_sliding_window": (False, None)}  # attention masks come from callers, and have no window


class MixtureNetwork(DiffusionNetwork):
    """Mix-in, named before a transformers causal language model whose feed-forward layers are experts.

    transformers holds the experts of a layer in two tensors, `gate_up_proj` (experts, 2 × width, hidden), the gates
    first, and `down_proj` (experts, hidden, width). Publishers store three matrices for each expert. A network has a
    classmethod `expert_layers(config)`, which yields the layers whose feed-forward part is a mixture. How its routers
    score and weigh experts is said by `expert_scores` and `expert_weights`; here it is a softmax.
    """

    tensor_joins: ClassVar[tuple[WeightConverter, ...]] = (
        WeightConverter(
            ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            "mlp.experts.gate_up_proj",
            [MergeModulelist(0), Concatenate(1)],
        ),
        WeightConverter("mlp.experts.*.down_proj.weight", "mlp.experts.down_proj", [MergeModulelist(0)]),
    )
    # transformers looks for a decorator in the source of the class's own module, and would else run a Python loop
    _can_set_experts_implementation_cached_value = True

    @staticmethod
    def expert_scores(router: torch.nn.Module, logits: Tensor) -> Tensor:
        """A router's scores of all experts before any bias, float32 (tokens, experts), from its logits."""
        return logits.softmax(-1, dtype=torch.float32)

    @classmethod
    def expert_weights(cls, router: torch.nn.Module, logits: Tensor, experts: Tensor) -> Tensor:
        """The weights that a router of those logits (tokens, experts) gives to experts (tokens, chosen), with gradient.

        They are its own numbers where the experts are its own choice.
        """
        weights = cls.expert_scores(router, logits).gather(1, experts)
        if router.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(logits.dtype)

    @classmethod
    def original_name(cls, name: str) -> str:
        """Return the publisher's name of a tensor, with a star for the expert where all of a layer are in it."""
        name = name.replace(f"{EXPERTS}gate_up_proj", f"{EXPERTS}*.gate_proj.weight")
        return super().original_name(name.replace(f"{EXPERTS}down_proj", f"{EXPERTS}*.down_proj.weight"))

    @classmethod
    def split_tensors(cls, config: Any) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of a checkpoint that is joined with others, or divided, as it is read."""
        hidden, width = config.hidden_size, config.moe_intermediate_size
        shapes = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
        return {
            f"model.layers.{layer}{EXPERTS}{expert}.{matrix}.weight": shape
            for layer in cls.expert_layers(config)
            for expert in range(config.num_experts)
            for matrix, shape in shapes.items()
        }


def check_split_tensors(folder: Path, name: str, model_class: type[MixtureNetwork]) -> None:
    """UserError for the first tensor of a mixture's checkpoint that could not be joined, or has no place.

    It is looked at before the weights are read, for transformers names the joined tensor, if any.
    """
    stored = stored_shapes(folder)
    if not stored:  # torch's own format
        return
    wanted = model_class.split_tensors(model_class.config_class.from_pretrained(folder))
    missing = [tensor for tensor in wanted if tensor not in stored]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{KEY}: {folder} lacks tensor {missing[0]}{more}; is the checkpoint whole?")
    for tensor, shape in wanted.items():
        if stored[tensor] != shape:
            raise UserError(
                f"{KEY}: {folder}: tensor {tensor} has shape {stored[tensor]}, config.json asks for {shape}"
            )
    for tensor in stored:
        if EXPERTS in tensor and tensor not in wanted:
            raise UserError(f"{KEY}: {folder} has tensor {tensor}, which {name} has no parameter for")


def check_keys(kwargs: dict[str, Any], allowed: dict[str, tuple[Any, ...]]) -> None:
    """UserError for the first key of a config.json whose value describes another network than transformers'."""
    for key, values in allowed.items():
        if key in kwargs and kwargs[key] not in values:
            raise UserError(f"config.json: {key}: {kwargs[key]!r} is not supported; it must be {values[0]!r}")


def routers(network: torch.nn.Module) -> list[torch.nn.Module]:
    """What gives tokens to experts, layer by layer; none in a network without experts."""
    modules = (module for name, module in network.named_modules() if name.endswith(".mlp.gate"))
    return [module for module in modules if hasattr(module, "top_k")]


@contextmanager
def noting_experts(found: Sequence[torch.nn.Module]) -> Iterator[list[Tensor]]:
    """Within it, every forward of these routers appends the experts that it chose, (tokens, chosen), to the list."""
    chosen: list[Tensor] = []
    with after_routing(found, lambda layer, router, output: chosen.append(output[2])):
        yield chosen


@contextmanager
def after_routing(
    found: Sequence[torch.nn.Module], hook: Callable[[int, torch.nn.Module, tuple[Tensor, ...]], Any]
) -> Iterator[None]:
    """Within it `hook` is called after each forward of these routers: with its number, itself and what it returned.

    What the hook returns, unless None, stands in place of that.
    """
    handles = [
        router.register_forward_hook(lambda one, _, output, layer=layer: hook(layer, one, output))
        for layer, router in enumerate(found)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def named_weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds of a network, by name: its parameters, and the biases of experts."""
    return dict(network.named_parameters()) | dict(expert_biases(network))


def expert_biases(network: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of what is added to experts' scores when they are chosen, layer by layer, (experts,) float32."""
    for name, buffer in network.named_buffers():
        if name.endswith(".e_score_correction_bias"):
            yield name, buffer
