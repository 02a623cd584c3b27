"""SDAR and TraDo: transformers' Qwen3 under block attention."""

from dataclasses import replace

from transformers import Qwen3Config, Qwen3ForCausalLM

from models.family import MATH_FINAL, MATH_STEPS, SHARED, Family
from models.original import DiffusionNetwork, OriginalConfig


class SDARConfig(OriginalConfig, Qwen3Config):
    """Qwen3's sizes; `block_size` and `mask_token_id` ride along where the checkpoint names them."""

    model_type = "sdar"


class SDARForCausalLM(DiffusionNetwork, Qwen3ForCausalLM):
    """Qwen3 with its head. Without a mask it is causal: callers pass the block-causal one."""

    config_class = SDARConfig


SDAR = Family(
    name="sdar",
    model_type="sdar",
    attention="block",
    logit_offset=0,
    mask_token="<|MASK|>",
    config_class=SDARConfig,
    model_class=SDARForCausalLM,
    instructions={"math": MATH_STEPS, "math_think": MATH_FINAL, **SHARED},
    published_turn="<|im_start|>user\n{turn}<|im_end|>\n<|im_start|>assistant",
)
TRADO = replace(SDAR, name="trado")
