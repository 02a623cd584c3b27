"""Which kernel attends where blocks are denoised over the cache, and why."""

import importlib.util

import torch

# `varlen_attn` of torch.nn.attention.varlen calls this operator too (torch 2.13), by way of one in Python that fills
# one tensor more
OPERATOR = torch.ops.aten._flash_attention_forward
FOUND = {argument.name for argument in OPERATOR.default._schema.arguments}
WIDEST = 256  # of a head; widths are multiples of 8 (flash-attention, csrc/flash_attn/flash_api.cpp)


def attention_kernel(
    device: torch.device, dtype: torch.dtype, head_width: int, full_attention: bool = False
) -> tuple[str, str]:
    """A kernel's name and why it is the one: the first line of a table that holds.

    "flash-attn" is that package's kernel for caches, "torch" torch's own FlashAttention over the pool, and "bias"
    torch's attention with a bias for every slot and key. Under full attention it is that of a prefix cache's windows:
    prompt and canvas as a whole always take the bias.
    """
    if device.type != "cuda":
        return "bias", "the others are CUDA's"
    half = dtype in (torch.float16, torch.bfloat16)
    major, minor = torch.cuda.get_device_capability(device)
    table = (
        ("bias", not half, f"weights are {dtype}, the others take bfloat16 and float16"),
        ("bias", major < 8, f"the others want compute capability 8.0, the device has {major}.{minor}"),
        ("bias", head_width % 8 or head_width > WIDEST, f"the others take no heads of width {head_width}"),
        ("flash-attn", not full_attention and importlib.util.find_spec("flash_attn"), "it is installed"),
        ("bias", not torch.backends.cuda.is_flash_attention_available(), "this torch is built without FlashAttention"),
        ("bias", "seqused_k" not in FOUND, f"FlashAttention of torch {torch.__version__} takes no seqused_k"),
        ("torch", full_attention, "FlashAttention without a mask; flash-attn is for blocks"),
        ("torch", True, "FlashAttention without a mask; flash-attn is not installed"),
    )
    return next((name, why) for name, holds, why in table if holds)
