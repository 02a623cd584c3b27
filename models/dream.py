"""Dream and DiffuCoder: transformers' Qwen2 under full attention; the prediction for position i is at logits[i-1]."""

from transformers import Qwen2Config, Qwen2ForCausalLM

from models.family import MATH_FINAL, SHARED, Family
from models.original import FullAttention, OriginalConfig


class DreamConfig(OriginalConfig, Qwen2Config):
    """Qwen2's sizes; `mask_token_id` rides along."""

    model_type = "Dream"


class DreamModel(FullAttention, Qwen2ForCausalLM):
    """Qwen2 with its head, under the name that the checkpoints give it."""

    config_class = DreamConfig


DREAM = Family(
    name="dream",
    model_type="Dream",
    attention="full",
    logit_offset=-1,
    mask_token="<|mask|>",
    config_class=DreamConfig,
    model_class=DreamModel,
    instructions={"math": MATH_FINAL, **SHARED},
    published_turn="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{turn}<|im_end|>\n<|im_start|>assistant",
    # as published for GSM8K: one block, by entropy
    sampling={
        "max_token": 256,
        "block_size": 256,
        "temperature": 0.1,
        "top_p": 0.9,
        "target": "neg_entropy",
        "remasking_strategy": "low_confidence_static",
    },
)
