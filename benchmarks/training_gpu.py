"""The packed step on a GPU: networks of 1.7B, 4B and 8B shapes with random weights, 8 trajectories of 2,000 tokens.

    python -m benchmarks.training --part gpu

Weights are bfloat16 and frozen but for LoRA adapters (rank 16, the attention's and the feed-forward's projections),
with activation checkpointing. Useful tokens are those of prompts, responses and views, padding apart. Model FLOP
utilisation counts the useful work of forward and backward alone: 2 FLOPs a parameter and token in the forward, as many
for the gradient of the activations, the language head at predicted positions only, attention over the pairs that are
seen, and no recomputation. Each shape runs in a process of its own. Not measured yet.
"""

import subprocess
import sys
import time
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from peft import LoraConfig, inject_adapter_in_model

from benchmarks.made_trajectories import LAYOUT, MASK, PROMPT, make_trajectories
from common.metrics import print_table
from common.schema import RLTrainingConfig
from common.trajectory import Score, ScoredTrajectory, Task
from models.norms import fuse_norms
from models.sdar import SDARConfig, SDARForCausalLM
from train.learner import Learner, micro_batches
from train.network import Policy
from train.packing import Row
from train.rl_step import learn, sample_rows

# Qwen3's: hidden size, layers, heads, feed-forward; 8 key-value heads of 128
SHAPES = {
    "1.7B": (2048, 28, 16, 6144),
    "4B": (2560, 36, 32, 9728),
    "8B": (4096, 36, 32, 12288),
}
VOCABULARY, HEAD, KV_HEADS = 151_936, 128, 8
TRAJECTORIES, RESPONSE, ROUNDS = 8, 2000, 3
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}  # dense bfloat16 FLOP/s


def measure_shapes() -> None:
    """Every shape in a process of its own, and a table of all."""
    if not torch.cuda.is_available():
        sys.exit("--part gpu needs a CUDA device")
    for name in SHAPES:
        subprocess.run([sys.executable, "-m", "benchmarks.training_gpu", name], check=False)


def measure(name: str) -> None:
    """One shape: a warm-up step, which compiles, and the mean of a few more."""
    model = make_model(name)
    network = Policy(model, MASK)
    trained = [one for one in network.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    learner = Learner(network, optimizer, schedule, Accelerator(mixed_precision="bf16"), 1.0)
    samples = [
        ScoredTrajectory(Task(one.task_id, ""), one, Score(1.0, True, "passed"), (-1.0) ** n)
        for n, one in enumerate(make_trajectories(TRAJECTORIES, [RESPONSE]))
    ]
    training = RLTrainingConfig(old_logp="engine", gradient_checkpointing_enable=True)
    rows = sample_rows(samples, training, LAYOUT, [0])
    seconds = []
    for number in range(ROUNDS + 1):
        if number == 1:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        learn(learner, samples, training, LAYOUT, RESPONSE, [0], exact=False)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    mean = sum(seconds[1:]) / ROUNDS
    tokens = sum(len(row) for row in rows)
    padded = sum(batch.ids.numel() for batch in micro_batches(rows, training.tokens_per_micro_batch))
    device = torch.cuda.get_device_name()
    peak = next((speed for part, speed in PEAK.items() if part in device), None)
    row = {
        "shape": name,
        "device": device,
        "useful tokens": tokens,
        "padding %": 100 * (1 - tokens / padded),
        "seconds": mean,
        "tokens/s": tokens / mean,
        "MFU %": 100 * useful_flops(name, rows) / mean / peak if peak else None,
        "GiB": torch.cuda.max_memory_allocated() / 2**30,
        "first step": seconds[0],
    }
    print_table([row])


def make_model(name: str) -> torch.nn.Module:
    """The shape with random weights and LoRA adapters, on the GPU."""
    hidden, layers, heads, feed_forward = SHAPES[name]
    config = SDARConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=KV_HEADS, head_dim=HEAD, intermediate_size=feed_forward, tie_word_embeddings=False,
        max_position_embeddings=PROMPT + 2 * RESPONSE,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = SDARForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    fuse_norms(model)
    model.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=16, lora_alpha=32, target_modules=PROJECTIONS), model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def useful_flops(name: str, rows: Sequence[Row]) -> float:
    """FLOPs of one step's forward and backward, as the module's first lines count them."""
    hidden, layers, heads, feed_forward = SHAPES[name]
    layer = hidden * HEAD * (2 * heads + 2 * KV_HEADS) + 3 * hidden * feed_forward
    tokens = sum(len(row) for row in rows)
    predicted = sum(len(row.target) for row in rows)
    pairs = sum(seen_pairs(row) for row in rows)
    linear = 4 * (layers * layer * tokens + hidden * VOCABULARY * predicted)
    # scores and their product with the values, 2 FLOPs each; the backward has four such products
    attention = layers * heads * HEAD * pairs * (4 + 8)
    return linear + attention


def seen_pairs(row: Row) -> int:
    """How many (query, key) pairs of a row are visible: the clean tokens of earlier blocks, and the own block's."""
    size = LAYOUT.block_size
    return int((row.block * size + size).sum())


if __name__ == "__main__":
    measure(sys.argv[1])
