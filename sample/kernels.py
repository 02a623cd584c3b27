"""The small operations between a layer's matrix products: as torch launches them, or compiled into a kernel or two.

On CUDA each kernel costs microseconds to launch, and reads and writes its tensors once more.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.models.glm4_moe.modeling_glm4_moe import apply_rotary_pos_emb as rotate_part
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from common.runtime import console
from models.gates import feed_forward, gate, is_gated

TOKENS = 64  # of the call that compiles; it serves any number above 1


@dataclass(frozen=True)
class Kernels:
    """Rotary embedding of queries and keys, and the product of a feed-forward's gate; the same numbers, any form.

    rotate: query (lines, length, heads, width), key (lines, length, key heads, width) and the tables of cosines and
    sines at their positions, (lines, length, rotated) → query and key, of which what lies behind the first `rotated`
    of the width stays. gate: two tensors (lines, length, inner) → one.
    """

    rotate: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    gate: Callable[[Tensor, Tensor], Tensor]

    def feed_forward(self, mlp: torch.nn.Module, hidden: Tensor) -> Tensor:
        """A layer's feed-forward of hidden (lines, length, width), by its parts where their form is known."""
        return feed_forward(mlp, self.gate, hidden) if is_gated(mlp) else mlp(hidden)


def rotate(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    """As `Kernels.rotate`, for any shape before the heads: (x₁, x₂) → (x₁, x₂) · cos + (−x₂, x₁) · sin.

    The halves change places by a flip, or by their numbers: inductor makes one kernel of either, and several of a
    concatenation.
    """
    rotated, width = cosine.shape[-1], query.shape[-1]
    number, half = torch.arange(width, device=cosine.device), rotated // 2
    if rotated < width:
        cosine, sine = pad(cosine, (0, width - rotated), value=1.0), pad(sine, (0, width - rotated))
        other = torch.where(number < rotated, (number + half) % rotated, number)
        swapped = (x[..., other] for x in (query, key))
    else:
        swapped = (x.unflatten(-1, (2, half)).flip(-2).flatten(-2) for x in (query, key))
    signed, cosine = torch.where(number < half, -sine, sine)[..., None, :], cosine[..., None, :]
    turned = [x * cosine + other * signed for x, other in zip((query, key), swapped)]
    return turned[0], turned[1]


@cache
def compiled(
    heads: int, key_heads: int, width: int, rotated: int, device: torch.device, dtype: torch.dtype
) -> Kernels | None:
    """The kernels compiled for a network of those sizes, at once and for any number of tokens; said once.

    None, said too, where torch cannot compile, as without a C compiler or Triton.
    """
    turn, product = torch.compile(rotate), torch.compile(gate)
    # a gate knows no sizes: feed-forwards of one network may differ in width; inductor cuts its work by the first's
    per_token = {turn: ((heads, width), (key_heads, width), (rotated,), (rotated,)), product: ((), ())}
    tokens = {turn: TOKENS, product: TOKENS * heads * width}
    start = time.perf_counter()
    try:
        for function, shapes in per_token.items():
            tensors = [torch.zeros(tokens[function], *shape, device=device, dtype=dtype) for shape in shapes]
            for tensor in tensors:
                torch._dynamo.mark_dynamic(tensor, 0)
            function(*tensors)
    except RuntimeError as error:  # dynamo's and inductor's errors are
        reason = " ".join(str(error).strip().splitlines()[:2])  # who failed, and why
        console.print(f"rotary embedding and gate are launched one kernel at a time: not compiled ({reason})")
        return None
    seconds = time.perf_counter() - start
    console.print(f"rotary embedding and gate compiled in {seconds:.0f} s (compile_kernels=False: not compiled)")

    def turn_joined(*tensors: Tensor) -> tuple[Tensor, ...]:
        """With lines and length as one dimension, so that it is compiled for one number alone."""
        shape, turned = tensors[0].shape[:2], turn(*(tensor.flatten(0, 1) for tensor in tensors))
        return tuple(one.unflatten(0, shape) for one in turned)

    def gate_joined(gates: Tensor, values: Tensor) -> Tensor:
        return product(gates.flatten(), values.flatten()).view(gates.shape)

    return Kernels(turn_joined, gate_joined)


def rotate_singly(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    """As `rotate`, by transformers' own functions: launched singly a flip wins nothing."""
    turn = apply_rotary_pos_emb if cosine.shape[-1] == query.shape[-1] else rotate_part
    return turn(query, key, cosine, sine, unsqueeze_dim=2)


PLAIN = Kernels(rotate_singly, gate)
