"""LLaDA2.0 and LLaDA2.1: transformers' GLM-4-MoE under block attention, with the checkpoints' own keys and names.

A router of theirs scores experts by a sigmoid and adds a bias to the score for the choice alone; of the groups of
experts the best are kept, by the sum of their two best, and within them the best experts (DeepSeek-V3, §2.1.2).
"""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM
from transformers.core_model_loading import Concatenate, ConversionOps, WeightConverter

from common.errors import UserError
from models.family import MATH_STEPS, SHARED, Family
from models.mixture import SLIDING, MixtureNetwork, check_keys, expert_biases
from models.original import OriginalConfig

# What the published configs say beside the sizes; the first value is written into a new config.
LLADA2_SHAPE: dict[str, tuple[Any, ...]] = {
    "embedding_dropout": (0.0,),
    "moe_router_enable_expert_bias": (True,),
    "norm_head": (False,),
    "norm_softmax": (False,),
    "output_dropout": (0.0,),
    "router_dtype": ("fp32",),
    "score_function": ("sigmoid",),
    "use_bias": (False,),
    "use_qkv_bias": (False,),
    "use_rmsnorm": (True,),
    "using_split_qkv_in_self_attention": (False,),
} | SLIDING
ROUTING = ("rout", "expert", "moe", "group", "topk", "top_k")  # parts of the names of keys that say who is routed where
KNOWN_ROUTING = {
    "moe_intermediate_size",
    "moe_router_enable_expert_bias",
    "n_group",
    "num_experts",
    "num_experts_per_tok",
    "num_shared_experts",
    "output_router_logits",
    "routed_scaling_factor",
    "router_dtype",
    "topk_group",
    # of transformers, or read by autoregressive training alone
    "moe_shared_expert_intermediate_size",
    "n_routed_experts",
    "n_shared_experts",
    "num_local_experts",
    "router_aux_loss_coef",
    "top_k",
}


class LLaDA2MoeConfig(OriginalConfig, Glm4MoeConfig):
    """GLM-4-MoE's sizes under LLaDA2's keys."""

    model_type = "llada2_moe"
    attribute_map: ClassVar[dict[str, str]] = Glm4MoeConfig.attribute_map | {
        "num_experts": "n_routed_experts",
        "num_shared_experts": "n_shared_experts",
    }
    num_mtp_layers: int = 0
    use_qk_norm: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        check_keys(kwargs | {"use_qk_norm": self.use_qk_norm}, LLADA2_SHAPE | {"use_qk_norm": (True,)})
        for key in ("delete_token_id", "split_token_id"):
            if kwargs.get(key) is not None:
                raise UserError(f"config.json: {key}: LLaDA2.2, which deletes and inserts tokens, is not supported yet")
        for key in kwargs:
            if key not in KNOWN_ROUTING and any(part in key for part in ROUTING):
                raise UserError(
                    f"config.json: {key}: {kwargs[key]!r} is a way of routing to experts that llada2 does not know; "
                    "LLaDA2.0 and LLaDA2.1 are supported"
                )
        super().__post_init__(**kwargs)
        group, left = divmod(self.num_experts, self.n_group)
        if left or group < 2 or self.topk_group > self.n_group or self.num_experts_per_tok > self.topk_group * group:
            raise UserError(
                f"config.json: n_group: {self.n_group}: {self.num_experts_per_tok} of {self.num_experts} experts "
                f"cannot be chosen within {self.topk_group} of {self.n_group} groups of two or more"
            )

    def _published(self, ours: dict[str, Any], original: dict[str, Any]) -> dict[str, Any]:
        rope = dict(ours.get("rope_parameters") or {})
        if rope and "rope_parameters" not in original:
            ours = ours | {"partial_rotary_factor": rope.pop("partial_rotary_factor", 1.0), "rope_parameters": rope}
        theirs = super()._published(ours, original)
        return theirs if original else {key: allowed[0] for key, allowed in LLADA2_SHAPE.items()} | theirs


class SplitHeads(ConversionOps):
    """A matrix of all queries, then all keys, then all values, into the three; the sizes are the config's."""

    @torch.no_grad
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        """The three by their patterns, from the one tensor of `input_dict`."""
        (found,) = input_dict.values()
        config = kwargs["config"]
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        parts = (found[0] if isinstance(found, list) else found).split([count * config.head_dim for count in heads])
        return dict(zip(target_patterns, (part.contiguous() for part in parts)))

    @property
    def reverse_op(self) -> ConversionOps:
        """What writes the three as one again."""
        return Concatenate(0)


class LLaDA2MoeModelLM(MixtureNetwork, Glm4MoeForCausalLM):
    """GLM-4-MoE with its head, under the names that the checkpoints give class and tensors.

    The experts' biases stay float32 whatever the network's precision.
    """

    config_class = LLaDA2MoeConfig
    tensor_names: ClassVar[tuple[tuple[str, str], ...]] = (
        ("model.word_embeddings.", "model.embed_tokens."),
        (".attention.dense.", ".self_attn.o_proj."),
        (".attention.query_layernorm.", ".self_attn.q_norm."),
        (".attention.key_layernorm.", ".self_attn.k_norm."),
        (".mlp.gate.expert_bias", ".mlp.gate.e_score_correction_bias"),
    )
    tensor_joins: ClassVar[tuple[WeightConverter, ...]] = (
        *MixtureNetwork.tensor_joins,
        WeightConverter(
            "attention.query_key_value.weight",
            [f"self_attn.{name}_proj.weight" for name in "qkv"],
            [SplitHeads()],
        ),
    )

    @staticmethod
    def expert_scores(router: torch.nn.Module, logits: Tensor) -> Tensor:
        """Sigmoids, (tokens, experts) float32."""
        return logits.float().sigmoid()

    @classmethod
    def expert_weights(cls, router: torch.nn.Module, logits: Tensor, experts: Tensor) -> Tensor:
        """The chosen experts' scores without their biases, over their sum where the config says so, scaled."""
        weights = cls.expert_scores(router, logits).gather(1, experts)
        if router.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * router.routed_scaling_factor

    @classmethod
    def original_name(cls, name: str) -> str:
        """Return the publisher's name of a tensor."""
        for part in "qkv":
            name = name.replace(f".self_attn.{part}_proj.", ".attention.query_key_value.")
        return super().original_name(name)

    @classmethod
    def expert_layers(cls, config: Any) -> Iterator[int]:
        """The layers whose feed-forward part is a mixture."""
        return iter(range(config.first_k_dense_replace, config.num_hidden_layers))

    @classmethod
    def split_tensors(cls, config: Any) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of a checkpoint that is joined with others, or divided, as it is read."""
        rows = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
        joined = {
            f"model.layers.{layer}.attention.query_key_value.weight": (rows, config.hidden_size)
            for layer in range(config.num_hidden_layers)
        }
        return joined | super().split_tensors(config)

    def save_pretrained(self, *args: Any, state_dict: dict[str, Tensor] | None = None, **kwargs: Any) -> None:
        """Write the checkpoint; the biases in the other weights' dtype where that loses nothing, else in float32.

        So LLaDA2.0's, which are bfloat16, and LLaDA2.1's, which are float32, are written as they were read.
        """
        state = dict(self.state_dict() if state_dict is None else state_dict)
        names = [name for name, _ in expert_biases(self)]
        dtype = state["model.norm.weight"].dtype
        if all(torch.equal(state[name], state[name].to(dtype).float()) for name in names):
            state |= {name: state[name].to(dtype) for name in names}
        super().save_pretrained(*args, state_dict=state, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LLaDA2MoeModelLM":
        """torch's way of moving and casting a module: the biases are moved only."""
        before = dict(expert_biases(self))
        super()._apply(fn, recurse)
        for name, bias in expert_biases(self):
            if bias.dtype != torch.float32:
                bias.data = before[name].to(bias.device)
        return self


LLADA2 = Family(
    name="llada2",
    model_type="llada2_moe",
    attention="block",
    logit_offset=0,
    mask_token="<|mask|>",
    config_class=LLaDA2MoeConfig,
    model_class=LLaDA2MoeModelLM,
    instructions={"math": MATH_STEPS, **SHARED},
    block_size=32,
    # as published for LLaDA2.0
    sampling={"temperature": 0.0, "remasking_strategy": "low_confidence_dynamic", "dynamic_threshold": 0.95},
)
