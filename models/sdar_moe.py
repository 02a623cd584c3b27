"""SDAR's mixture of experts: transformers' Qwen3-MoE under block attention."""

from collections.abc import Iterator
from typing import Any, ClassVar

from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from models.family import MATH_STEPS, SHARED, Family
from models.mixture import SLIDING, MixtureNetwork, check_keys
from models.original import OriginalConfig


class SDARMoeConfig(OriginalConfig, Qwen3MoeConfig):
    """Qwen3-MoE's sizes; `block_size` and `mask_token_id` ride along where the checkpoint names them."""

    model_type = "sdar_moe"
    attribute_map: ClassVar[dict[str, str]] = {}  # transformers' own renames num_experts, as the checkpoints do not

    def __post_init__(self, **kwargs: Any) -> None:
        check_keys({"use_sliding_window": self.use_sliding_window}, SLIDING)
        super().__post_init__(**kwargs)


class SDARMoeForCausalLM(MixtureNetwork, Qwen3MoeForCausalLM):
    """Qwen3-MoE with its head. Without a mask it is causal: callers pass the block-causal one."""

    config_class = SDARMoeConfig

    @classmethod
    def expert_layers(cls, config: Any) -> Iterator[int]:
        """The layers whose feed-forward part is a mixture."""
        every = config.decoder_sparse_step
        return (
            layer
            for layer in range(config.num_hidden_layers)
            if layer not in config.mlp_only_layers and (layer + 1) % every == 0
        )


SDAR_MOE = Family(
    name="sdar_moe",
    model_type="sdar_moe",
    attention="block",
    logit_offset=0,
    mask_token="<|MASK|>",
    config_class=SDARMoeConfig,
    model_class=SDARMoeForCausalLM,
    instructions={"math": MATH_STEPS, **SHARED},
)
