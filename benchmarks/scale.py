"""What a GPU holds and what a step sends, computed, not measured: python -m benchmarks.scale

The formulas are those of docs/scale.md; the shapes are Qwen3's, which the SDAR and TraDo models share.
"""

from dataclasses import dataclass

from common.metrics import print_table

GB = 1e9
GPUS = (1, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Shape:
    """A network's sizes."""

    parameters: float
    layers: int
    hidden: int
    kv_width: int  # key-value heads × head size
    vocabulary: int = 151936

    @property
    def cache_per_token(self) -> int:
        """Bytes of keys and values of one token, bfloat16."""
        return 2 * 2 * self.layers * self.kv_width


SHAPES = {
    "1.7B": Shape(1.72e9, 28, 2048, 1024),
    "4B": Shape(4.02e9, 36, 2560, 1024),
    "8B": Shape(8.19e9, 36, 4096, 1024),
    "32B": Shape(32.8e9, 64, 5120, 1024),
}


def states(shape: Shape, stage: int, gpus: int) -> float:
    """Bytes of weights, gradients and optimizer on one GPU, and of the sampler's weights.

    bfloat16 weights and gradients (2 P each), float32 weights and two moments (12 P), a float32 copy of the gradients
    at the step (4 P). ZeRO-2 shares out all but the weights, which the sampler uses too; ZeRO-3 shares out all, and the
    sampler has its own (2 P).
    """
    size = shape.parameters
    return 2 * size + (18 if stage == 2 else 20) * size / gpus


def activations(shape: Shape, tokens: int) -> float:
    """Bytes of a micro-batch with checkpointing: every layer's input, one layer's insides, three chunks of logits."""
    inside = 34 * shape.hidden * tokens  # bfloat16: attention and a gated MLP of three hidden sizes
    return 2 * shape.hidden * tokens * shape.layers + inside + 3 * (1 << 28)


def cache(shape: Shape, active: int, length: int) -> float:
    """Bytes of keys and values of that many sequences."""
    return float(shape.cache_per_token * active * length)


def memory_rows() -> list[dict]:
    """GB a GPU by model, stage and number of GPUs: states alone."""
    rows = []
    for name, shape in SHAPES.items():
        for stage in (2, 3):
            row = {"model": name, "ZeRO": stage}
            rows.append(row | {f"{gpus} GPUs": f"{states(shape, stage, gpus) / GB:.0f}" for gpus in GPUS})
    return rows


def working_rows(tokens: int = 16384, active: int = 32, length: int = 2784) -> list[dict]:
    """GB a GPU beside the states: a micro-batch, and the sampler's cache."""
    return [
        {
            "model": name,
            f"micro-batch of {tokens} tokens": f"{activations(shape, tokens) / GB:.1f}",
            f"cache of {active} × {length} tokens": f"{cache(shape, active, length) / GB:.1f}",
        }
        for name, shape in SHAPES.items()
    ]


def step_rows(name: str = "8B", gpus: int = 128, responses: int = 2048, updates: int = 16) -> list[dict]:
    """GB that one GPU sends in one RL step, by what for; prompt 300, response 2,000 tokens, 2.2 steps a block."""
    shape, packed = SHAPES[name], 300 + 2000 * (1 + 2.2)
    micro_batches = -(-responses * packed / updates / gpus // 16384) * updates
    size = 2 * shape.parameters
    rows = []
    for stage in (2, 3):
        gather, reduce = (0, micro_batches) if stage == 2 else (2 * micro_batches, micro_batches)
        rows.append(
            {
                "ZeRO": stage,
                "micro-batches": int(micro_batches),
                "weights gathered in training": f"{gather * size / GB:.0f}",
                "gradients reduced": f"{reduce * size / GB:.0f}",
                "weights after updates": f"{(updates if stage == 2 else 0) * size / GB:.0f}",
                "weights to the sampler": f"{(0 if stage == 2 else size) / GB:.0f}",
                "trajectories": f"{responses * 2000 * 40 / GB:.2f}",
            }
        )
    return rows


if __name__ == "__main__":
    print_table(memory_rows(), title="GB a GPU: weights, gradients, optimizer and the sampler's weights")
    print()
    print_table(working_rows(), title="GB a GPU beside them")
    print()
    print_table(step_rows(), title="8B, 128 GPUs, 2048 responses, 16 updates: GB that a GPU receives in a step")
