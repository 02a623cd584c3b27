"""How the engine runs transformers' network: its layers, with attention over the engine's own cache.

`forward` is the one place where the engine meets the network, `attend_over` the one where it meets an attention kernel.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, apply_rotary_pos_emb

from sample.cache import KeyValueCache

NAME = "engine"  # under which transformers knows `attend`
PRE_NORM = (LlamaDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer)  # layers that `by_parts` knows
FOLD_FROM = 8  # rows on the CPU, see docs/performance.md


@dataclass
class Attention:
    """Who sees whom in one forward of `lines` of tokens (lines, length).

    Keys come from the cache's first `rows` slots, or from the forward itself where `rows` is 0. The first `rows`
    lines belong to one slot each; further lines belong to the slots of `extra`, and see less. Where every slot has
    both, `bias` speaks of the queries of both, one line after the other; else the further lines have one of their own.
    """

    bias: Tensor | None  # (rows, 1, queries or 1, keys) added to scores: 0 where seen, else minus infinity
    cache: KeyValueCache | None = None
    places: Tensor | None = None  # (lines × length,) in the cache, where the new keys and values are written
    rows: int | Tensor = 0  # a tensor names the slots
    seen: int = 0  # positions of these slots that `bias` speaks of
    extra: Tensor | None = None
    extra_bias: Tensor | None = None  # (slots of extra, 1, 1, keys)
    line_rows: Tensor | None = None  # (lines,) int32, for flash attention: slots
    line_ends: Tensor | None = None  # (lines,) int32: each line sees what lies before this position


def bias_of(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, else minus infinity; on the CPU and on CUDA cheaper than a boolean mask, which every layer
    would turn into this."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


@contextmanager
def engine_attention(model: torch.nn.Module) -> Iterator[None]:
    """Within, layers that `by_parts` does not know attend by `attend`; for others' calls that is transformers' sdpa."""
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before  # the trainer may share the network


class Rotary:
    """The network's rotary tables, computed once for all positions."""

    def __init__(self, model: torch.nn.Module, length: int):
        weight = next(model.parameters())
        tables = model.model.rotary_emb(weight, torch.arange(length, device=weight.device)[None])
        self.tables = tuple(table[0] for table in tables)  # cosine and sine, (length, head_dim)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cosine, sine = self.tables
        return cosine[positions], sine[positions]


def forward(model: torch.nn.Module, rotary: Rotary, ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
    """Hidden states before the final norm, (lines, length, width); ids and positions (lines, length)."""
    hidden, tables = model.model.embed_tokens(ids), rotary(positions)
    for layer in model.model.layers:
        if isinstance(layer, PRE_NORM):
            hidden = by_parts(layer, hidden, tables, attention)
        else:
            hidden = layer(
                hidden, attention_mask=None, position_ids=positions, position_embeddings=tables, attention=attention
            )
    return hidden


def by_parts(layer: torch.nn.Module, hidden: Tensor, tables: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
    """The layer's output, by its own parts: its `forward`'s numbers, on a CPU in three quarters of the time."""
    own, normed = layer.self_attn, layer.input_layernorm(hidden)
    heads = (*hidden.shape[:2], -1, own.head_dim)
    query, key, value = own.q_proj(normed).view(heads), own.k_proj(normed).view(heads), own.v_proj(normed).view(heads)
    if isinstance(layer, Qwen3DecoderLayer):
        query, key = own.q_norm(query), own.k_norm(key)
    query, key = apply_rotary_pos_emb(query, key, *tables, unsqueeze_dim=2)
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    hidden = hidden + own.o_proj(attend_over(own.layer_idx, query, key, value, own.scaling, attention))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def logits_of(model: torch.nn.Module, hidden: Tensor) -> Tensor:
    """The head's output for hidden states (…, width), (…, vocab)."""
    return model.lm_head(model.model.norm(hidden))


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    attention: Attention | None = None,
    **named: object,
) -> tuple[Tensor, None]:
    """transformers' attention interface: (lines, heads, length, head_dim) -> (lines, length, heads × head_dim)."""
    if attention is None:
        return sdpa_attention_forward(module, query, key, value, mask, **named)
    return attend_over(module.layer_idx, query, key, value, named["scaling"], attention), None


def attend_over(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, attention: Attention) -> Tensor:
    """Attention of one layer, (lines, heads, length, head_dim) -> (lines, length, heads × head_dim)."""
    if attention.cache is not None:
        attention.cache.write(layer, attention.places, key, value)
    if attention.line_ends is not None:
        return flash(layer, query, attention, scaling)
    if not isinstance(attention.rows, int):
        stores = attention.cache.slots[layer]
        key, value = (store[attention.rows, : attention.seen].transpose(1, 2) for store in stores)
    elif attention.rows:
        stores = attention.cache.slots[layer]
        key, value = (store[: attention.rows, : attention.seen].transpose(1, 2) for store in stores)
    if attention.extra is None:
        return sdpa(query, key, value, attention.bias, scaling)
    current, before = query[: attention.rows], query[attention.rows :]
    if attention.extra_bias is not None:
        out = sdpa(current, key, value, attention.bias, scaling)
        key, value = key[attention.extra], value[attention.extra]
        return torch.cat((out, sdpa(before, key, value, attention.extra_bias, scaling)))
    # a row's two lines are attended to together: its keys are read once and never copied
    length = query.shape[2]
    out = sdpa(torch.cat((current, before), 2), key, value, attention.bias, scaling)
    return torch.cat((out[:, :length], out[:, length:]))


def sdpa(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """torch's attention; query (rows, heads, length, head_dim), key and value (rows, kv_heads, keys, head_dim).

    Returns (rows, length, heads × head_dim). CUDA's fused kernels want as many key heads as query heads once there is
    a bias: there the queries of heads that share keys become further positions, so that no key is copied. On the CPU
    that is cheaper too, except for a few rows.
    """
    rows, heads, length, width = query.shape
    groups = heads // key.shape[1]
    if groups > 1 and (query.device.type == "cuda" or rows >= FOLD_FROM):
        folded = query.reshape(rows, heads // groups, groups * length, width)
        bias = bias if bias.shape[2] == 1 else bias.repeat(1, 1, groups, 1)
        out = scaled_dot_product_attention(folded, key, value, bias, scale=scaling).view(query.shape)
    else:
        out = scaled_dot_product_attention(query, key, value, bias, scale=scaling, enable_gqa=groups > 1)
    return out.transpose(1, 2).reshape(rows, length, -1)


def flash(layer: int, query: Tensor, attention: Attention, scaling: float) -> Tensor:
    """flash-attn's kernel for a cache: each line sees the first `line_ends` positions of its own slot.

    query (lines, heads, length, head_dim) -> (lines, length, heads × head_dim).
    """
    from flash_attn import flash_attn_with_kvcache

    keys, values = attention.cache.slots[layer]
    out = flash_attn_with_kvcache(
        query.transpose(1, 2),
        keys,
        values,
        cache_seqlens=attention.line_ends,
        cache_batch_idx=attention.line_rows,
        softmax_scale=scaling,
        causal=False,
    )
    return out.flatten(2)


def has_flash(model: torch.nn.Module) -> bool:
    """Whether flash-attn's kernel rather than torch's denoises blocks: on CUDA, in half precision, if installed."""
    weight = next(model.parameters())
    half = weight.dtype in (torch.float16, torch.bfloat16)
    return weight.device.type == "cuda" and half and importlib.util.find_spec("flash_attn") is not None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
