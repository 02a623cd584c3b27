"""One attention function for both kinds of mask: FlexAttention for a BlockMask, torch's SDPA for all else.

A network under it is sampled from with dense masks and trained with block masks, without being told which comes.
transformers hands a BlockMask through unchanged, as it does any four-dimensional mask (5.17 and 5.23 alike).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "flex_or_sdpa"


def flex_or_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' FlexAttention or SDPA, by the mask's kind; output (batch, length, heads, width)."""
    forward = flex_attention_forward if isinstance(attention_mask, BlockMask) else sdpa_attention_forward
    return forward(module, query, key, value, attention_mask, **kwargs)


def take_block_masks(model: PreTrainedModel) -> None:
    """Let the network take block masks beside the dense ones it takes already."""
    if model.config._attn_implementation != NAME:
        model.set_attn_implementation(NAME)


AttentionInterface.register(NAME, flex_or_sdpa)
AttentionMaskInterface.register(NAME, sdpa_mask)
