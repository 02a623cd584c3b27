"""Networks of the published sizes with random weights, an unmasking rate the same for all, and a GPU's own rates."""

import tempfile
import time
from dataclasses import replace

import torch
from torch import Tensor

from common.schema import Sampling
from models import load_model
from models.norms import fuse_norms
from models.sdar import SDARConfig, SDARForCausalLM
from models.tiny import build_tiny
from sample.draw import Candidates
from sample.strategies import top_k_masked

QWEN3 = {"vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, "max_position_embeddings": 40960}
SHAPES: dict[str, dict[str, int | bool]] = {
    "tiny": {},
    # a head of the published width over next to nothing: for the processor
    "mini": QWEN3
    | {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": True},
    "0.6b": QWEN3
    | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
    | {"tie_word_embeddings": True},
    "1.7b": QWEN3
    | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16}
    | {"tie_word_embeddings": True},
    "4b": QWEN3
    | {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
    | {"tie_word_embeddings": True},
    "8b": QWEN3
    | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}
    | {"tie_word_embeddings": False},
    "32b": QWEN3
    | {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64}
    | {"tie_word_embeddings": False},
}
MASK_ID = 151669


def make_network(shape: str, device: torch.device) -> tuple[torch.nn.Module, int]:
    """A network of that shape with random weights, bfloat16 on a GPU and else float32, and its mask token's id."""
    if shape == "tiny":
        with tempfile.TemporaryDirectory() as folder:
            build_tiny("sdar", folder, seed=3)
            loaded = load_model(folder, "sdar", torch.float32 if device.type == "cpu" else torch.bfloat16, device)
        return loaded.model, loaded.mask_id
    config = SDARConfig(**SHAPES[shape])
    with torch.device("meta"):
        model = SDARForCausalLM(config)
    model = model.to(torch.bfloat16 if device.type == "cuda" else torch.float32).to_empty(device=device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else torch.nn.init.ones_(parameter)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    model.tie_weights()
    if device.type == "cuda":
        fuse_norms(model)
    return model.eval(), MASK_ID


def rate_settings(settings: Sampling, rate: float) -> Sampling:
    """Settings under which `by_rate` unmasks so many tokens per forward on average."""
    whole, low, high = int(rate), 0.0, 1.0
    for _ in range(40):  # steps per block fall as the share of longer steps rises
        share = (low + high) / 2
        too_slow = expected_steps(settings.block_size, whole, share) > settings.block_size / rate
        low, high = (share, high) if too_slow else (low, share)
    strategy = "benchmarks.shapes:by_rate"
    return replace(settings, remasking_strategy=strategy, eb_threshold=float(whole), dynamic_threshold=share)


def expected_steps(masks: int, whole: int, share: float) -> float:
    """Steps until so many masks are gone where each takes `whole`, and with probability `share` one more."""
    if masks <= 0:
        return 0.0
    fewer, more = expected_steps(masks - whole, whole, share), expected_steps(masks - whole - 1, whole, share)
    return 1 + (1 - share) * fewer + share * more


def by_rate(
    candidates: Candidates,
    confidence: Tensor,
    entropy: Tensor,
    masked: Tensor,
    k: Tensor,
    uniform: Tensor,
    settings: Sampling,
) -> Tensor:
    """A strategy: `eb_threshold` positions, and by chance (`dynamic_threshold`) one more."""
    k = int(settings.eb_threshold) + (uniform[:, 0] < settings.dynamic_threshold).long()
    return top_k_masked(confidence, masked, k)


def copy_bandwidth() -> float:
    """Bytes per second of a large copy, read and written."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_of(lambda: target.copy_(source))


def matmul_rate() -> float:
    """Operations per second of a large bfloat16 product."""
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    return 2 * 8192**3 / seconds_of(lambda: a @ a)


def seconds_of(function) -> float:
    """Seconds of one call, over twenty."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(20):
        function()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / 20
