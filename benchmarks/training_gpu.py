"""The packed step on a GPU: a shape's network with random weights, 8 trajectories of 2,000 tokens.

    python -m benchmarks.training_gpu 8b
    python -m benchmarks.training --part gpu     # 1.7B, 4B and 8B, each in a process of its own

Weights are bfloat16 and frozen but for LoRA adapters (rank 16, the attention's and the feed-forward's projections),
with and without activation checkpointing. Useful tokens are those of prompts, responses and views, padding apart. Model
FLOP utilisation counts the useful work of forward and backward alone: 2 FLOPs a parameter and token in the forward, as
many for the gradient of the activations, the language head at predicted positions only, attention over the pairs that
are seen, and no recomputation.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cost_model import CHIPS, attention_flops, chip_of
from benchmarks.made_trajectories import LAYOUT, MASK, make_trajectories
from benchmarks.plain_loop import synchronize
from benchmarks.shapes import SHAPES, make_network
from common.memory import Size, size_of
from common.metrics import print_table
from common.schema import LoraSettings, OptimizerParams, RLTrainingConfig, SchedulerConfig
from common.trajectory import Score, ScoredTrajectory, Task
from models.gates import fuse_gates
from models.lora import add_lora
from train.learner import Learner, make_learner, micro_batches
from train.network import Policy
from train.packing import Row
from train.rl_step import learn, sample_rows

MEASURED = ("1.7b", "4b", "8b")
# activation checkpointing, and packed tokens in a forward: the default's, and where memory is there for activations
WAYS = ((True, None), (False, 8192))
WARM_UP, ROUNDS = 2, 2  # steps; a length that was not met before is compiled for


def measure_shapes() -> None:
    """Every shape in a process of its own."""
    if not torch.cuda.is_available():
        sys.exit("--part gpu needs a CUDA device")
    for name in MEASURED:
        subprocess.run([sys.executable, "-m", "benchmarks.training_gpu", name], check=False)


def main() -> None:
    """One shape: for each way warm-up steps, which compile, and the mean of a few more."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=[name for name in SHAPES if name != "tiny"])
    parser.add_argument("--trajectories", type=int, default=8)
    parser.add_argument("--response", type=int, default=2000, help="tokens of each response")
    parser.add_argument("--out", type=Path, help="write the table's rows to this file too, as JSON")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_model(options.shape, device)
    learner = make_learner(Policy(model, MASK), OptimizerParams(), SchedulerConfig(), 1, RLTrainingConfig(), "bf16")
    samples = [
        ScoredTrajectory(Task(one.task_id, ""), one, Score(1.0, True, "passed"), (-1.0) ** n)
        for n, one in enumerate(make_trajectories(options.trajectories, [options.response]))
    ]
    rows = []
    for checkpointing, tokens in WAYS:
        if checkpointing:
            model.gradient_checkpointing_enable()
        else:
            model.gradient_checkpointing_disable()
        training = RLTrainingConfig(old_logp="engine", tokens_per_micro_batch=tokens)
        try:
            rows.append({"shape": options.shape, "checkpointing": checkpointing} | measure(learner, samples, training))
        except torch.OutOfMemoryError:
            print(f"{options.shape} without activation checkpointing, {tokens} tokens: does not fit")
    print_table(rows)
    if options.out:
        options.out.write_text(json.dumps(rows), encoding="utf-8")


def measure(learner: Learner, samples: Sequence[ScoredTrajectory], training: RLTrainingConfig) -> dict[str, Any]:
    """Figures of a step over the samples."""
    device, most = learner.accelerator.device, max(one.trajectory.length for one in samples)
    packed = sample_rows(samples, training, LAYOUT, [0])
    seconds = []
    for number in range(WARM_UP + ROUNDS):
        if number == WARM_UP and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        synchronize()
        start = time.perf_counter()
        learn(learner, samples, training, LAYOUT, most, [0], exact=False)
        synchronize()
        seconds.append(time.perf_counter() - start)
    mean = sum(seconds[WARM_UP:]) / ROUNDS
    tokens = sum(len(row) for row in packed)
    padded = sum(batch.ids.numel() for batch in micro_batches(packed, training.tokens_per_micro_batch))
    row = {
        "useful tokens": tokens,
        "padding %": 100 * (1 - tokens / padded),
        "seconds": mean,
        "tokens/s": tokens / mean,
        "first step": seconds[0],
    }
    if device.type == "cuda":
        chip = chip_of(torch.cuda.get_device_name())
        flops = useful_flops(size_of(learner.network.backbone.config.to_dict()), packed)
        row["MFU %"] = 100 * flops / mean / CHIPS[chip].peak if chip else None
        row["GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def make_model(shape: str, device: torch.device) -> torch.nn.Module:
    """The shape with random bfloat16 weights and float32 LoRA adapters."""
    model, _ = make_network(shape, device)
    model = model.to(torch.bfloat16).train().requires_grad_(False)
    if device.type == "cuda":
        fuse_gates(model)
    add_lora(model, LoraSettings(r=16))
    return model


def useful_flops(size: Size, rows: Sequence[Row]) -> float:
    """FLOPs of one step's forward and backward, as the module's first lines count them."""
    tokens = sum(len(row) for row in rows)
    predicted = sum(len(row.target) for row in rows)
    linear = 4 * (size.layers * size.layer_weights * tokens + size.head_weights * predicted)
    # scores and their product with the values in the forward, four such products in the backward
    return linear + 3 * attention_flops(size, sum(seen_pairs(row) for row in rows))


def seen_pairs(row: Row) -> int:
    """How many (query, key) pairs of a row are visible: the clean tokens of earlier blocks, and the own block's."""
    size = LAYOUT.block_size
    return int((row.block * size + size).sum())


if __name__ == "__main__":
    main()
