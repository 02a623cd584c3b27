"""LLaDA and MMaDA: transformers' Llama under full attention, with the checkpoints' own config keys and tensor names."""

from dataclasses import replace
from typing import Any, ClassVar

from transformers import LlamaConfig, LlamaForCausalLM

from common.errors import UserError
from models.family import MATH_FINAL, SHARED, Family
from models.original import FullAttention, OriginalConfig

# The published configs can describe networks that are not Llama's; the first value is written into a new config.
LLAMA_SHAPE: dict[str, tuple[Any, ...]] = {
    "activation_type": ("silu",),
    "alibi": (False, None),
    "attention_layer_norm": (False, None),
    "bias_for_layer_norm": (False, None),
    "block_group_size": (1, None),
    "block_type": ("llama",),
    "clip_qkv": (None,),
    "include_bias": (False,),
    "include_qkv_bias": (False, None),
    "input_emb_norm": (False, None),
    "layer_norm_type": ("rms",),
    "multi_query_attention": (None, False),
    "rope": (True,),
    "scale_logits": (False, None),
}


class LLaDAConfig(OriginalConfig, LlamaConfig):
    """Llama's sizes under LLaDA's keys. `vocab_size` is the width of embedding and head (`embedding_size` on disk)."""

    model_type = "llada"
    attribute_map: ClassVar[dict[str, str]] = {
        "d_model": "hidden_size",
        "embedding_size": "vocab_size",
        "init_std": "initializer_range",
        "max_sequence_length": "max_position_embeddings",
        "mlp_hidden_size": "intermediate_size",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "n_layers": "num_hidden_layers",
        "weight_tying": "tie_word_embeddings",
    }
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for key, allowed in LLAMA_SHAPE.items():
            if key in kwargs and kwargs[key] not in allowed:
                raise UserError(f"config.json: {key}: {kwargs[key]!r} is not supported; it must be {allowed[0]!r}")
        if kwargs.get("mlp_hidden_size") is None and {"mlp_ratio", "d_model"} <= kwargs.keys():
            kwargs["mlp_hidden_size"] = int(kwargs["mlp_ratio"] * kwargs["d_model"])
        super().__post_init__(**kwargs)

    def _published(self, ours: dict[str, Any], original: dict[str, Any]) -> dict[str, Any]:
        theirs = super()._published(ours, original)
        if original:
            return theirs
        fixed = {key: allowed[0] for key, allowed in LLAMA_SHAPE.items()}
        return fixed | theirs | {"vocab_size": self.vocab_size}


class MMaDAConfig(LLaDAConfig):
    """LLaDA's config under MMaDA's model type; the keys of its image tokens ride along."""

    model_type = "mmada"


class LLaDAModelLM(FullAttention, LlamaForCausalLM):
    """Llama with its head, under the names that the checkpoints give class and tensors."""

    config_class = LLaDAConfig
    tensor_names: ClassVar[tuple[tuple[str, str], ...]] = (
        ("model.transformer.blocks.", "model.layers."),
        ("model.transformer.wte.", "model.embed_tokens."),
        ("model.transformer.ln_f.", "model.norm."),
        ("model.transformer.ff_out.", "lm_head."),
        (".attn_norm.", ".input_layernorm."),
        (".ff_norm.", ".post_attention_layernorm."),
        (".q_proj.", ".self_attn.q_proj."),
        (".k_proj.", ".self_attn.k_proj."),
        (".v_proj.", ".self_attn.v_proj."),
        (".attn_out.", ".self_attn.o_proj."),
        (".ff_proj.", ".mlp.gate_proj."),
        (".up_proj.", ".mlp.up_proj."),
        (".ff_out.", ".mlp.down_proj."),
    )


class MMadaModelLM(LLaDAModelLM):
    """LLaDA's network under MMaDA's names."""

    config_class = MMaDAConfig


LLADA = Family(
    name="llada",
    model_type="llada",
    attention="full",
    logit_offset=0,
    mask_token="<|mdm_mask|>",
    config_class=LLaDAConfig,
    model_class=LLaDAModelLM,
    # its stdio wording has a blank before the last sentences
    instructions={"math": MATH_FINAL, **SHARED, "code_stdio": SHARED["code_stdio"].replace("\nYou", "\n You")},
    published_turn="<|startoftext|><|start_header_id|>user<|end_header_id|>{turn}<|eot_id|>"
    "<|startoftext|><|start_header_id|>assistant<|end_header_id|>",
    # as published for GSM8K
    sampling={"max_token": 256, "block_size": 8, "temperature": 0.0, "remasking_strategy": "low_confidence_static"},
)
MMADA = replace(
    LLADA,
    name="mmada",
    model_type="mmada",
    config_class=MMaDAConfig,
    model_class=MMadaModelLM,
    sampling=LLADA.sampling | {"block_size": 64},  # as published for GSM8K
)
