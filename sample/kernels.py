"""The small operations between a layer's matrix products: as torch launches them, or compiled into a kernel or two.

On CUDA each kernel costs microseconds to launch, and reads and writes its tensors once more.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn.functional import silu
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, apply_rotary_pos_emb

from common.runtime import console

GATED = (LlamaMLP, Qwen2MLP, Qwen3MLP)  # feed-forwards of the form down(act(gate(x)) · up(x))
TOKENS = 64  # of the call that compiles; it serves any number above 1


@dataclass(frozen=True)
class Kernels:
    """Rotary embedding of queries and keys, and the product of a feed-forward's gate; the same numbers, any form.

    rotate: query (lines, length, heads, width), key (lines, length, key heads, width) and the tables of cosines and
    sines at their positions, (lines, length, width) → query and key. gate: two tensors (lines, length, inner) → one.
    """

    rotate: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    gate: Callable[[Tensor, Tensor], Tensor]

    def feed_forward(self, mlp: torch.nn.Module, hidden: Tensor) -> Tensor:
        """A layer's feed-forward of hidden (lines, length, width), by its parts where their form is known."""
        if isinstance(mlp, GATED) and isinstance(mlp.act_fn, SiLUActivation):
            return mlp.down_proj(self.gate(mlp.gate_proj(hidden), mlp.up_proj(hidden)))
        return mlp(hidden)


def rotate(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    """As `Kernels.rotate`, for any shape before the heads: (x₁, x₂) → (x₁, x₂) · cos + (−x₂, x₁) · sin.

    The halves change places by a flip: inductor makes one kernel of that, and several of a concatenation.
    """
    half = cosine.shape[-1] // 2
    first = torch.arange(2 * half, device=cosine.device) < half
    signed, cosine = torch.where(first, -sine, sine)[..., None, :], cosine[..., None, :]
    swapped = (x.unflatten(-1, (2, half)).flip(-2).flatten(-2) for x in (query, key))
    turned = [x * cosine + other * signed for x, other in zip((query, key), swapped)]
    return turned[0], turned[1]


def gate(gates: Tensor, values: Tensor) -> Tensor:
    """SwiGLU's product, silu(gates) · values."""
    return silu(gates) * values


@cache
def compiled(
    heads: int, key_heads: int, width: int, inner: int, device: torch.device, dtype: torch.dtype
) -> Kernels | None:
    """The kernels compiled for a network of those sizes, at once and for any number of tokens; said once.

    None, said too, where torch cannot compile, as without a C compiler or Triton.
    """
    turn, product = torch.compile(rotate), torch.compile(gate)
    per_token = {turn: ((heads, width), (key_heads, width), (width,), (width,)), product: ((inner,), (inner,))}
    start = time.perf_counter()
    try:
        for function, shapes in per_token.items():
            tensors = [torch.zeros(TOKENS, *shape, device=device, dtype=dtype) for shape in shapes]
            for tensor in tensors:
                torch._dynamo.mark_dynamic(tensor, 0)
            function(*tensors)
    except RuntimeError as error:  # dynamo's and inductor's errors are
        reason = " ".join(str(error).strip().splitlines()[:2])  # who failed, and why
        console.print(f"rotary embedding and gate are launched one kernel at a time: not compiled ({reason})")
        return None
    seconds = time.perf_counter() - start
    console.print(f"rotary embedding and gate compiled in {seconds:.0f} s (compile_kernels=False: not compiled)")

    def joined(function: Callable, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The function with lines and length as one dimension, so that it is compiled for one number alone."""
        shape, result = tensors[0].shape[:2], function(*(tensor.flatten(0, 1) for tensor in tensors))
        if isinstance(result, Tensor):
            return result.unflatten(0, shape)
        return tuple(one.unflatten(0, shape) for one in result)

    return Kernels(lambda *tensors: joined(turn, *tensors), lambda *tensors: joined(product, *tensors))


PLAIN = Kernels(partial(apply_rotary_pos_emb, unsqueeze_dim=2), gate)  # launched singly a flip wins nothing
