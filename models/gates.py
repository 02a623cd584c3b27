"""The gate of a feed-forward, silu(gate(x)) · up(x), as one kernel.

transformers' own launch two, and in training keep what lies between them for the backward pass.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import silu
from transformers.activations import SiLUActivation
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeMLP

# feed-forwards of the form down(act(gate(x)) · up(x)); experts are transformers' grouped products
GATED = (LlamaMLP, Qwen2MLP, Qwen3MLP, Qwen3MoeMLP, Glm4MoeMLP)


def gate(gates: Tensor, values: Tensor) -> Tensor:
    """SwiGLU's product, silu(gates) · values."""
    return silu(gates) * values


def is_gated(mlp: torch.nn.Module) -> bool:
    """Whether a feed-forward is `feed_forward` of its own parts."""
    return isinstance(mlp, GATED) and isinstance(mlp.act_fn, SiLUActivation)


def feed_forward(mlp: torch.nn.Module, product: Callable[[Tensor, Tensor], Tensor], hidden: Tensor) -> Tensor:
    """A gated feed-forward of hidden (…, width) with `product` for `gate`."""
    return mlp.down_proj(product(mlp.gate_proj(hidden), mlp.up_proj(hidden)))


def fuse_gates(network: torch.nn.Module) -> None:
    """Let a network's feed-forwards take the compiled gate, in place. For CUDA: on a CPU it wins nothing."""
    product = torch.compile(gate, dynamic=True)
    for module in network.modules():
        if is_gated(module):
            module.forward = partial(feed_forward, module, product)
