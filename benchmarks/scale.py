"""What a GPU holds and what a step sends, computed, not measured: python -m benchmarks.scale

The formulas are those of docs/scale.md; the shapes are Qwen3's, which the SDAR and TraDo models share.
"""

from benchmarks.cost_model import HEAD_POSITIONS
from benchmarks.shapes import SHAPES
from common.memory import (
    Size,
    activation_bytes,
    adapter_parameters,
    cache_bytes,
    head_bytes,
    kept_bytes,
    size_of,
    state_bytes,
)
from common.metrics import print_table
from common.schema import LoraSettings

GB = 1e9
GPUS = (1, 4, 8, 16, 32, 64, 128)
LONGEST = 65_536  # clean tokens: prompt and response
SIZES = {name.upper(): size_of(SHAPES[name]) for name in ("1.7b", "4b", "8b", "32b")}


def states(size: Size, stage: int, gpus: int) -> float:
    """Bytes of weights, gradients and optimizer on one GPU, and of the sampler's weights, which ZeRO-2 shares."""
    return state_bytes(size.parameters, zero=stage, devices=gpus, word=2) + (stage == 3) * 2 * size.parameters


def activations(size: Size, tokens: int) -> float:
    """Bytes of a micro-batch with checkpointing, and of a chunk of its logits."""
    return activation_bytes(size, tokens, True, "bfloat16") + head_bytes(size, HEAD_POSITIONS)


def memory_rows() -> list[dict]:
    """GB a GPU by model, stage and number of GPUs: states alone."""
    rows = []
    for name, size in SIZES.items():
        for stage in (2, 3):
            row = {"model": name, "ZeRO": stage}
            rows.append(row | {f"{gpus} GPUs": f"{states(size, stage, gpus) / GB:.0f}" for gpus in GPUS})
    return rows


def working_rows(tokens: int = 16384, active: int = 32, length: int = 2784) -> list[dict]:
    """GB a GPU beside the states: a micro-batch, and the sampler's cache."""
    return [
        {
            "model": name,
            f"micro-batch of {tokens} tokens": f"{activations(size, tokens) / GB:.1f}",
            f"cache of {active} × {length} tokens": f"{cache_bytes(size, active * length) / GB:.1f}",
        }
        for name, size in SIZES.items()
    ]


def longest_rows(name: str = "8B", memory: float = 80 * GB, rank: int = 64) -> list[dict]:
    """GB of one GPU in training adapters on one long response in pieces, and how many clean tokens fit beside the rest.

    The sampler has merged weights of its own. A layer's keys and values, with their gradients, are there once more.
    """
    size = SIZES[name]
    adapters = adapter_parameters(size, rank, LoraSettings().targets)
    rows = []
    for tokens in (4096, 8192, 16384):
        fixed = {
            "weights": 2 * size.parameters,
            "adapters, Adam": state_bytes(adapters),
            "sampler's weights": 2 * size.parameters,
            f"piece, rank {rank}": activation_bytes(size, tokens, True, "frozen"),
            "logits": head_bytes(size, HEAD_POSITIONS),
        }
        each = kept_bytes(size, 1) + 4 * 2 * size.kv_width
        row = {"tokens of a piece": tokens} | {part: f"{count / GB:.1f}" for part, count in fixed.items()}
        row |= {f"kept, {LONGEST} clean tokens": f"{LONGEST * each / GB:.1f}"}
        row |= {"in all": f"{(sum(fixed.values()) + LONGEST * each) / GB:.1f}"}
        rows.append(row | {"longest": f"{int((memory - sum(fixed.values())) / each)}"})
    return rows


def step_rows(name: str = "8B", gpus: int = 128, responses: int = 2048, updates: int = 16) -> list[dict]:
    """GB that one GPU sends in one RL step, by what for; prompt 300, response 2,000 tokens, 2.2 steps a block."""
    packed = 300 + 2000 * (1 + 2.2)
    micro_batches = -(-responses * packed / updates / gpus // 16384) * updates
    size = 2 * SIZES[name].parameters
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


def sending_rows(gpus: int = 512, drawing: int = 256, gigabytes_per_second: float = 25) -> list[dict]:
    """What new weights cost once a step, by model and by where they are drawn with: bfloat16, computed."""
    rows = []
    for name, parameters in (("8B", SIZES["8B"].parameters), ("30B-A3B", 30.5e9)):
        size = 2 * parameters
        for form, receivers in ((f"{gpus} GPUs draw and train", gpus), (f"{drawing} of them draw", drawing)):
            rows.append(
                {
                    "model": name,
                    "form": form,
                    "GB a GPU receives": f"{size / GB:.0f}",
                    "TB over all": f"{receivers * size / 1e12:.1f}",
                    f"seconds at {gigabytes_per_second:g} GB/s": f"{size / GB / gigabytes_per_second:.1f}",
                }
            )
    return rows


if __name__ == "__main__":
    print_table(memory_rows(), title="GB a GPU: weights, gradients, optimizer and the sampler's weights")
    print()
    print_table(working_rows(), title="GB a GPU beside them")
    print()
    print_table(longest_rows(), title="8B with adapters, one GPU of 80 GB: GB in training on one response in pieces")
    print()
    print_table(step_rows(), title="8B, 128 GPUs, 2048 responses, 16 updates: GB that a GPU receives in a step")
    print()
    print_table(sending_rows(), title="weights to the samplers, once a step")
