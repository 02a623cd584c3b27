"""RMS norms as torch's fused kernel: transformers' own launch eight, and keep a float32 copy for the backward pass."""

import torch
from torch import Tensor
from torch.nn.functional import rms_norm
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

NORMS = (LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, Qwen3MoeRMSNorm, Glm4MoeRMSNorm)


class FusedNorm(torch.nn.Module):
    """The norm of a module of `NORMS`, by the same parameter under the same name."""

    def __init__(self, norm: torch.nn.Module):
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (…, width) → x / √(mean x² + ε) · weight, (…, width); of the wider precision of both, as theirs.

        In half precision it is rounded once, at the end; transformers rounds before it multiplies by the weight too.
        """
        dtype = torch.promote_types(hidden.dtype, self.weight.dtype)
        with torch.autocast(hidden.device.type, enabled=False):  # it would make float32 of all
            return rms_norm(hidden.to(dtype), self.weight.shape, self.weight.to(dtype), self.epsilon)


def fuse_norms(network: torch.nn.Module) -> None:
    """Put fused norms in the place of the network's own, in place. For CUDA: on a CPU they win nothing."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, NORMS):
                setattr(module, name, FusedNorm(child))
