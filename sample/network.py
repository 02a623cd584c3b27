"""How the engine runs transformers' network: its layers, with attention over the engine's own cache.

`Network.forward` is where the engine meets the network. The layouts (`OwnKeys` and those after it) say who sees whom
in one forward, and call the attention kernel. Keys and values of tokens that a forward computes are written to the
cache first, flat, at `places`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeDecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

from models.family import family_of_network
from models.mixture import noting_experts, routers
from sample.attention_kernel import OPERATOR
from sample.cache import KeyValueCache, heads_and_width
from sample.kernels import PLAIN, Kernels, compiled
from sample.parallel import tensor_group_of

NAME = "engine"  # under which transformers knows `attend`
NORMED_HEADS = (Qwen3DecoderLayer, Qwen3MoeDecoderLayer, Glm4MoeDecoderLayer)
PRE_NORM = (LlamaDecoderLayer, Qwen2DecoderLayer, *NORMED_HEADS)  # layers that `by_parts` knows
FOLD_FROM = 8  # rows on the CPU, see docs/performance.md
# of FlashAttention over the pool: blocks of threads for each multiprocessor, and the keys below which a span is no help
WAVES, SHORTEST_SPAN = 2, 256
TILE = 64  # keys that the kernel takes at a time


# ---- who sees whom: a layout's lines are the rows of tokens (lines, length) of one forward


@dataclass(frozen=True)
class OwnKeys:
    """Tokens see tokens of the same forward; their keys and values are kept where there is a cache."""

    bias: Tensor  # (lines, 1, length or 1, length) added to scores: 0 where seen, else minus infinity
    cache: KeyValueCache | None = None
    places: Tensor | None = None  # (lines × length,) in the cache

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        if self.cache is not None:
            self.cache.write(layer, self.places, key, value)
        return sdpa(query, key, value, self.bias, scaling)


@dataclass(frozen=True)
class CachedKeys:
    """Line i sees the first `seen` positions of the i-th of the cache's slots `rows`, its own new keys among them."""

    bias: Tensor  # (lines, 1, 1, seen)
    cache: KeyValueCache
    places: Tensor
    rows: slice | Tensor  # the first slots, which costs no copy, or those that a tensor (lines,) names
    seen: int

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.cache.write(layer, self.places, key, value)
        return sdpa(query, *self.cache.read(layer, self.rows, self.seen), self.bias, scaling)


@dataclass(frozen=True)
class CommitEvery:
    """The current blocks of the first slots, then the previous block of each of them, whose keys are to be kept.

    A slot's two lines are attended to together: its keys are read once and never copied.
    """

    bias: Tensor  # (slots, 1, 2 × length, seen) of both lines' queries, the current block's first
    cache: KeyValueCache
    places: Tensor
    rows: int  # slots; there are twice as many lines
    seen: int

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.cache.write(layer, self.places, key, value)
        key, value = self.cache.read(layer, slice(self.rows), self.seen)
        length, current, previous = query.shape[2], query[: self.rows], query[self.rows :]
        out = sdpa(torch.cat((current, previous), 2), key, value, self.bias, scaling)
        return torch.cat((out[:, :length], out[:, length:]))


@dataclass(frozen=True)
class CommitSome:
    """The current blocks of the first slots, then the previous blocks of the slots `committing`, which see less."""

    bias: Tensor  # (slots, 1, 1, seen) of the current blocks
    previous_bias: Tensor  # (committing, 1, 1, seen)
    cache: KeyValueCache
    places: Tensor
    rows: int  # slots whose current blocks are there
    seen: int
    committing: Tensor  # (committing,)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.cache.write(layer, self.places, key, value)
        key, value = self.cache.read(layer, slice(self.rows), self.seen)
        current = sdpa(query[: self.rows], key, value, self.bias, scaling)
        key, value = key[self.committing], value[self.committing]
        return torch.cat((current, sdpa(query[self.rows :], key, value, self.previous_bias, scaling)))


@dataclass(frozen=True)
class FlashKeys:
    """flash-attn's kernel for a cache: each line sees what lies before `ends` in its own slot."""

    cache: KeyValueCache
    places: Tensor
    rows: Tensor  # (lines,) int32 slots
    ends: Tensor  # (lines,) int32 positions

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        from flash_attn import flash_attn_with_kvcache

        self.cache.write(layer, self.places, key, value)
        keys, values = self.cache.slots[layer]
        out = flash_attn_with_kvcache(
            query.transpose(1, 2),
            keys,
            values,
            cache_seqlens=self.ends,
            cache_batch_idx=self.rows,
            softmax_scale=scaling,
            causal=False,
        )
        return out.flatten(2)


@dataclass(frozen=True)
class PoolKeys:
    """torch's FlashAttention over the whole pool, no bias: each line sees what lies before its end in its own slot.

    Queries of heads that share keys become further positions, so that keys are read once. Where lines are too few to
    keep the device busy, the keys of each are cut into spans, attended to side by side: by itself the kernel walks
    through a line's keys one tile after another.
    """

    cache: KeyValueCache
    places: Tensor
    starts: Tensor  # (lines × spans + 1,) int32, where spans begin in the pool, in any order, and a last one
    used: Tensor  # (lines × spans,) int32, how many keys of a span are seen, at least one
    queries: Tensor  # (lines × spans + 1,) int32, where the queries of each span begin
    empty: Tensor  # (lines, spans, 1), whether a span lies behind its line's end
    span: int  # the most keys of one

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.cache.write(layer, self.places, key, value)
        keys, values = self.cache.keys[layer], self.cache.values[layer]  # (tokens, kv_heads, head_dim)
        lines, _, length, width = query.shape
        key_heads, spans = keys.shape[1], self.empty.shape[1]
        # (lines, groups × length, kv_heads, head_dim)
        folded = query.unflatten(1, (key_heads, -1)).permute(0, 2, 3, 1, 4).flatten(1, 2)
        out, logsumexp, *_ = OPERATOR(
            folded[:, None].expand(-1, spans, -1, -1, -1).reshape(-1, key_heads, width), keys, values,
            self.queries, self.starts, folded.shape[1], self.span,
            0.0, False, False, scale=scaling, seqused_k=self.used,
        )  # fmt: skip
        if spans > 1:
            # softmax(s) v = Σ over spans of exp(logsumexp of its s − that of all) · its softmax(s) v
            mass = logsumexp.view(key_heads, lines, spans, -1).masked_fill(self.empty, float("-inf"))
            share = mass.softmax(2).permute(1, 2, 3, 0)[..., None]  # (lines, spans, groups × length, kv_heads, 1)
            out = (out.view(lines, spans, -1, key_heads, width) * share).sum(1).to(query.dtype)
        return out.view(lines, -1, length, key_heads, width).permute(0, 2, 3, 1, 4).reshape(lines, length, -1)


# `attend` of each: query, key and value (lines, heads, length, head_dim) -> (lines, length, heads × head_dim)
Attention = OwnKeys | CachedKeys | CommitEvery | CommitSome | FlashKeys | PoolKeys


def pool_keys(
    network: "Network", cache: KeyValueCache, places: Tensor, ends: Tensor, length: int, seen: int
) -> PoolKeys:
    """The layout of the cache's first slots, whose lines of `length` queries each see what lies before `ends`
    (1 or 2, slots), none of them behind `seen`: all current blocks, and behind them the previous ones."""
    device, slots = ends.device, ends.shape[1]
    span = span_of(seen, ends.numel(), cache.keys[0].shape[1], device)
    spans = -(-seen // span)
    number = torch.arange(ends.numel() * spans + 1, dtype=torch.int32, device=device)
    first = torch.arange(spans, dtype=torch.int32, device=device) * span  # of a span's positions
    slot = torch.arange(slots, dtype=torch.int32, device=device).repeat(len(ends))
    starts = ((slot * cache.width)[:, None] + first).flatten()
    left = ends.int().flatten()[:, None] - first  # (lines, spans) keys from a span's first one on
    return PoolKeys(
        cache, places, torch.cat((starts, starts[-1:])), left.clamp(1, span).flatten(),
        number * (network.groups * length), (left <= 0)[..., None], span,
    )  # fmt: skip


def span_of(seen: int, lines: int, key_heads: int, device: torch.device) -> int:
    """How many of a line's keys are attended to by themselves, so that the device is busy and none has too few."""
    spans = max(1, min(WAVES * multiprocessors(device) // (lines * key_heads), seen // SHORTEST_SPAN))
    return -(-seen // spans // TILE) * TILE


@cache
def multiprocessors(device: torch.device) -> int:
    """How many blocks of threads a GPU runs side by side at least."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def bias_of(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, else minus infinity; on the CPU and on CUDA cheaper than a boolean mask, which every layer
    would turn into this."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


# ---- the network


class Network:
    """transformers' network with its rotary tables computed once, for positions below `positions`.

    `compile_kernels`: the small operations of the layers that `by_parts` knows are compiled, at the first forward.
    `keep_routes`: of a mixture, `experts` says after a forward which experts its tokens were given to.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        positions: int,
        kernel: str = "bias",
        compile_kernels: bool = False,
        keep_routes: bool = False,
    ):
        weight, family = next(model.parameters()), family_of_network(model)
        self.model, self.kernel = model, kernel  # which attends where blocks are denoised: sample/attention_kernel.py
        heads = model.config.num_attention_heads
        self.groups = heads // (getattr(model.config, "num_key_value_heads", None) or heads)  # queries that share keys
        self.dtype, self.device = weight.dtype, weight.device
        self.full_attention, self.logit_offset = family.attention == "full", family.logit_offset
        tables = model.model.rotary_emb(weight, torch.arange(positions, device=weight.device)[None])
        self.cosine, self.sine = (table[0] for table in tables)  # (positions, the width of a head that is rotated)
        self.compile_kernels = compile_kernels and tensor_group_of(model) == 1  # a divided network has other sizes
        self.float32_head, self.rounds_logits = head_product(model)
        self.routers = routers(model) if keep_routes else []
        self.experts: Tensor | None = None  # (lines, length, layers, chosen) of the last forward

    @cached_property
    def kernels(self) -> Kernels:
        """The layers' small operations. Compiled not before they are used: what torch is set to then is compiled in."""
        if not self.compile_kernels:
            return PLAIN
        own, (key_heads, width) = self.model.config, heads_and_width(self.model)
        return (
            compiled(own.num_attention_heads, key_heads, width, self.cosine.shape[-1], self.device, self.dtype) or PLAIN
        )

    def forward(self, ids: Tensor, positions: Tensor, attention: Attention, at: Tensor | None = None) -> Tensor:
        """Hidden states before the final norm, (lines, length, width); ids and positions (lines, length).

        Those `at` (lines, wanted) alone, indices into the length, where they are named: the last layer is not computed
        for the others. The attention's bias must then be the same for all queries of a line.
        """
        hidden, tables = self.model.model.embed_tokens(ids), (self.cosine[positions], self.sine[positions])
        last = None if at is None else self.model.model.layers[-1]
        with noting_experts(self.routers) as chosen:
            for layer in self.model.model.layers:
                wanted = at if layer is last else None
                if isinstance(layer, PRE_NORM):
                    hidden = by_parts(layer, hidden, tables, attention, self.kernels, wanted)
                else:
                    named = {"position_ids": positions, "position_embeddings": tables, "attention": attention}
                    hidden = layer(hidden, attention_mask=None, **named)
                    hidden = hidden if wanted is None else hidden.take_along_dim(wanted[..., None], 1)
        if chosen:
            dtype = torch.uint8 if self.routers[0].num_experts <= 256 else torch.int16
            self.experts = torch.stack(chosen, 1).to(dtype).unflatten(0, ids.shape)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """The head's output for hidden states (…, width), (…, vocab); in float32 where CUDA's product can end in it."""
        normed = self.model.model.norm(hidden)
        if not self.float32_head:
            return self.model.lm_head(normed)
        product = torch.mm(normed.flatten(0, -2), self.model.lm_head.weight.T, out_dtype=torch.float32)
        return product.unflatten(0, normed.shape[:-1])


def head_product(model: torch.nn.Module) -> tuple[bool, str]:
    """Whether the head's product ends in float32 though its weights are not, and else why it is rounded to theirs.

    The second is empty where nothing is lost, and off CUDA, whose product alone knows it.
    """
    head = model.lm_head
    if head.weight.device.type != "cuda" or head.weight.dtype == torch.float32:
        return False, ""
    table = (
        (tensor_group_of(model) > 1, "the head is divided over devices"),
        (type(head) is not torch.nn.Linear or head.bias is not None, "the head is no plain matrix"),
        ("dtype" not in torch.ops.aten.mm.overloads(), f"torch {torch.__version__} gives a product no other precision"),
    )
    why = next((why for holds, why in table if holds), "")
    return not why, why


def by_parts(
    layer: torch.nn.Module,
    hidden: Tensor,
    tables: tuple[Tensor, Tensor],
    attention: Attention,
    kernels: Kernels,
    at: Tensor | None = None,
) -> Tensor:
    """The layer's output, by its own parts: its `forward`'s numbers, on a CPU in three quarters of the time.

    `at` (lines, wanted): the output at these of each line's places alone.
    """
    own, normed = layer.self_attn, layer.input_layernorm(hidden)
    heads = (*hidden.shape[:2], -1, own.head_dim)
    query, key, value = own.q_proj(normed).view(heads), own.k_proj(normed).view(heads), own.v_proj(normed).view(heads)
    if isinstance(layer, NORMED_HEADS):
        query, key = own.q_norm(query), own.k_norm(key)
    query, key = kernels.rotate(query, key, *tables)
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if at is not None:
        query, hidden = query.take_along_dim(at[:, None, :, None], 2), hidden.take_along_dim(at[..., None], 1)
    hidden = hidden + own.o_proj(attention.attend(own.layer_idx, query, key, value, own.scaling))
    return hidden + kernels.feed_forward(layer.mlp, layer.post_attention_layernorm(hidden))


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
    return attention.attend(module.layer_idx, query, key, value, named["scaling"]), None


@contextmanager
def engine_attention(model: torch.nn.Module) -> Iterator[None]:
    """Within, layers that `by_parts` does not know attend by `attend`; for others' calls that is transformers' sdpa."""
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before  # the trainer may share the network


@contextmanager
def sampling_kernels(device: torch.device) -> Iterator[None]:
    """Within, CUDA's kernels are those that suit sampling; on other devices nothing changes.

    Deterministic algorithms would sort the indices of every write to the cache, though a place that is written twice is
    given the same keys, or is read by nobody. cuDNN's attention makes a plan for every new shape, which takes it long.
    """
    deterministic, cudnn = torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.cudnn_sdp_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if device.type == "cuda":
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cuda.enable_cudnn_sdp(cudnn)


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
        out = scaled_dot_product_attention(folded, key, value, bias, scale=scaling)
        # by its dimensions: CUDA's kernels lay them out in another order than the CPU's
        return out.unflatten(2, (groups, length)).permute(0, 3, 1, 2, 4).reshape(rows, length, -1)
    out = scaled_dot_product_attention(query, key, value, bias, scale=scaling, enable_gqa=groups > 1)
    return out.transpose(1, 2).reshape(rows, length, -1)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
