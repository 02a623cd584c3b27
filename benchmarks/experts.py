"""Experts by grouped matrix products beside a loop over them: python -m benchmarks.experts [--experts 64] [--batch 64]

A mixture's layer as the sampler meets it: `batch` sequences with a block each, every expert in use. What is printed is
how many times as long the loop takes, the median of rounds in which the two alternate.
"""

import argparse
import statistics
import time

import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from models.sdar_moe import SDARMoeConfig

IMPLEMENTATIONS = ("eager", "grouped_mm")


def layer(experts: int, hidden: int, width: int, active: int) -> torch.nn.Module:
    """A random mixture of `active` of `experts` experts, each `width` wide."""
    config = SDARMoeConfig(
        hidden_size=hidden,
        moe_intermediate_size=width,
        num_experts=experts,
        num_experts_per_tok=active,
        norm_topk_prob=True,
    )
    mixture = Qwen3MoeSparseMoeBlock(config)
    mixture.config = config
    for parameter in mixture.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return mixture


@torch.inference_mode()
def seconds(mixture: torch.nn.Module, tokens: torch.Tensor, implementation: str) -> float:
    """Of one forward of tokens (batch, block, hidden)."""
    mixture.config._experts_implementation_internal = implementation
    start = time.perf_counter()
    mixture(tokens)
    return time.perf_counter() - start


def main() -> None:
    """Measure at blocks of 1, 4 and 32 tokens a sequence."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    defaults = {"experts": 64, "batch": 64, "hidden": 256, "width": 64, "active": 4, "rounds": 15, "threads": 1}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(chosen.threads)
    mixture = layer(chosen.experts, chosen.hidden, chosen.width, chosen.active)
    for block in (1, 4, 32):
        tokens = torch.randn(chosen.batch, block, chosen.hidden)
        rounds = [[seconds(mixture, tokens, name) for name in IMPLEMENTATIONS] for _ in range(chosen.rounds + 1)][1:]
        loop, grouped = (1000 * statistics.median(times) for times in zip(*rounds))
        ratio = statistics.median(one / other for one, other in rounds)
        print(f"block {block:2}: loop {loop:.2f} ms, grouped {grouped:.2f} ms: {ratio:.2f} times as long")


if __name__ == "__main__":
    main()
