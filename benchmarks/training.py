"""The packed training step against the plain one: tokens, seconds and memory, and growth with the response's length.

    python -m benchmarks.training                # both, on one thread; ratios within this run
    python -m benchmarks.training --part growth  # the packed step alone, responses of 128 to 4,096 tokens
    python -m benchmarks.training --part budgets # the tiny step of benchmarks.versus: seconds and memory by budget
    python -m benchmarks.training --part long    # the step for a response of 16,000 tokens, its row whole and in pieces
    python -m benchmarks.training --part gpu     # on a GPU: 1.7B, 4B and 8B shapes, see benchmarks/training_gpu.py

The network is tiny with a head of 32,000 words; prompts have 64 tokens, responses 256 ± 50 %, ids are random. Blocks
are unmasked as in rollouts of the tiny model (step_maps.json: the order within each block of 60 responses, drawn at
threshold 0.97 after finetuning with seed 1). Every variant runs in a process of its own; its memory is the highest
resident set less that of the loaded model, its seconds those of the processor. Plain is benchmarks/plain_training.py,
under the same budget of 8,192 tokens in a micro-batch and, as the published configs ask, with activation checkpointing
as well.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from benchmarks import use_threads
from benchmarks.made_trajectories import BLOCK, LAYOUT, MASK, VOCABULARY, make_trajectories
from benchmarks.plain_training import plain_batches, plain_logp, plain_rows
from common.metrics import print_table
from common.schema import RLTrainingConfig
from common.trajectory import Score, ScoredTrajectory, Task, Trajectory
from models.sdar import SDARConfig, SDARForCausalLM
from train import network as network_module
from train.learner import Learner, micro_batches
from train.network import Policy
from train.objectives import Tokens, policy_loss
from train.rl_step import learn, sample_rows
from train.views import trace_views

RESPONSE = 256
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
BUDGET = 8192  # tokens in a micro-batch
TINY, BUDGETS = (128, 192, 256, 320), (1700, 1024, 768, 640, 512)  # the first budget holds every row of these
LONG, LONG_BUDGETS = 16_000, (65_536, 16_384)  # the row fits the first


class KeepGradients(torch.optim.SGD):
    """Keeps the gradients of its one step and changes nothing."""

    def step(self, closure: object = None) -> None:
        self.kept = [one.grad.clone() for one in self.param_groups[0]["params"]]


def main() -> None:
    options = parse()
    if options.part == "gpu":
        from benchmarks.training_gpu import measure_shapes

        measure_shapes()
    elif options.variant:
        print(json.dumps(VARIANTS[options.variant](options)))
    else:
        if options.part in ("all", "cost"):
            compare(options)
        if options.part in ("all", "growth"):
            grow(options)
        if options.part == "budgets":
            compare_budgets(options)
        if options.part == "long":
            measure_long(options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("all", "cost", "growth", "budgets", "long", "gpu"), default="all")
    parser.add_argument("--rounds", type=int, default=3, help="budgets: how often each is measured, in turn")
    parser.add_argument("--trajectories", type=int, default=8)
    parser.add_argument("--keep-activations", action="store_true", help="no activation checkpointing, in both ways")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="growth: tokens of the response")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=int, default=BUDGET, help=argparse.SUPPRESS)
    parser.add_argument("--gradients", help=argparse.SUPPRESS)
    return parser.parse_args()


# ---- what is measured


def make_model() -> torch.nn.Module:
    """The tiny network under a head of 32,000 words."""
    torch.manual_seed(0)
    config = SDARConfig(
        vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=4, intermediate_size=384, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=True, max_position_embeddings=2 * LONG,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return SDARForCausalLM(config).eval()


def some_lengths(count: int) -> list[int]:
    """Lengths of 256 ± 50 %, evenly spread."""
    return np.linspace(RESPONSE // 2, RESPONSE * 3 // 2, count).astype(int).tolist()


def packed_step(
    model: torch.nn.Module, trajectories: list[Trajectory], budget: int = BUDGET
) -> tuple[KeepGradients, int]:
    """The product's own update; returns the optimizer with the gradients, and the tokens of its micro-batches."""
    network = Policy(model, MASK)
    optimizer = KeepGradients(network.parameters(), lr=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    learner = Learner(network, optimizer, schedule, Accelerator(cpu=True), 1e9)
    samples = [
        ScoredTrajectory(Task(one.task_id, ""), one, Score(1.0, True, "passed"), (-1.0) ** number)
        for number, one in enumerate(trajectories)
    ]
    training = RLTrainingConfig(old_logp="engine", tokens_per_micro_batch=budget)
    learn(learner, samples, training, LAYOUT, RESPONSE, [0], exact=False)
    rows = sample_rows(samples, training, LAYOUT, [0])
    return optimizer, sum(int((batch.trajectory >= 0).sum()) for batch in micro_batches(rows, budget))


def plain_step(model: torch.nn.Module, trajectories: list[Trajectory]) -> tuple[KeepGradients, int]:
    """The same update, one row for each denoising round."""
    optimizer = KeepGradients(model.parameters(), lr=0.0)
    views = [trace_views(one, LAYOUT) for one in trajectories]
    rows = plain_rows(trajectories, views, BLOCK)
    width = max(len(row) for row in rows)
    old = torch.tensor(
        np.concatenate([np.array(t.logp)[v.response_index[v.predict]] for t, v in zip(trajectories, views)])
    )
    advantage = torch.tensor([(-1.0) ** n for n, one in enumerate(views) for _ in range(int(one.predict.sum()))])
    tokens = Tokens(
        trajectory=torch.arange(len(views)).repeat_interleave(torch.tensor([int(one.predict.sum()) for one in views])),
        old_logp=old.float(),
        reference_logp=old.float(),
        advantage=advantage,
        weight=torch.full_like(advantage, 1 / len(advantage)),
    )
    model.train()
    for batch in plain_batches(rows, BUDGET):
        logp = plain_logp(model, batch, width, MASK)
        own = tokens[np.concatenate([row.place for row in batch]).astype(np.int64)]
        policy_loss(logp, own, eps=0.2, beta=0.01)[0].backward()
    optimizer.step()
    return optimizer, width * len(rows)


def tiny(trace: str, options: argparse.Namespace) -> dict[str, float]:
    """The update of `benchmarks.versus` on the network of 39 words, with activation checkpointing, in this process."""
    from benchmarks.ours import rl_step
    from benchmarks.versus_rows import OUT, rl_row

    use_threads(1)
    inputs = rl_row("tiny", "sdar", trace, list(TINY)).with_checkpoint(Path(OUT)) | {"budget": options.budget}
    rl_step(inputs | {"lengths": [8]})()  # first calls allocate and import
    return timed(rl_step(inputs))[1]


def measured(step: Callable, options: argparse.Namespace) -> dict[str, float]:
    """One variant in this process: tokens, seconds, and memory above the loaded model's."""
    use_threads(1)
    model = make_model()
    if not options.keep_activations:
        model.gradient_checkpointing_enable()
    lengths = [options.length] if options.length else some_lengths(options.trajectories)
    trajectories = make_trajectories(options.trajectories, lengths)
    step(model, make_trajectories(1, [8]))  # first calls allocate and import
    model.zero_grad()
    (optimizer, tokens), figures = timed(lambda: step(model, trajectories))
    if options.gradients:
        torch.save(optimizer.kept, options.gradients)
    return {"tokens": tokens} | figures


def timed(step: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What a step returns, its seconds, and its memory above what this process holds before it."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start = time.process_time()  # of this one thread: others on the machine do not count
    result = step()
    return result, {"seconds": time.process_time() - start, "memory": resident("VmHWM") - before}


def resident(field: str) -> float:
    """MiB of this process's memory: VmRSS now, VmHWM at most."""
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(field))
    return int(line.split()[1]) / 1024


def without_attention(options: argparse.Namespace) -> dict[str, float]:
    """The packed step with every token seeing itself alone: what does not grow with the square of the length."""

    def itself(module: object, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object, **__: object):
        own = value + 0 * key  # so that the projections have their share of the backward pass
        return (own.repeat_interleave(query.shape[1] // value.shape[1], dim=1) + 0 * query).transpose(1, 2), None

    network_module.attention_mask = lambda batch: torch.ones(1, 1, 1, 1, dtype=torch.bool)
    from train import attention

    attention.AttentionInterface.register(attention.NAME, itself)
    return measured(packed_step, options)


VARIANTS: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
    "packed": lambda options: measured(partial(packed_step, budget=options.budget), options),
    "plain": lambda options: measured(plain_step, options),
    "packed_without_attention": without_attention,
    "real": partial(tiny, "real"),
    "static": partial(tiny, "static"),
}


# ---- how it is told


def run(
    options: argparse.Namespace, variant: str, length: int = 0, gradients: Path | None = None, budget: int = BUDGET
) -> dict[str, float]:
    """A variant in a process of its own, on one thread."""
    command = [sys.executable, "-m", "benchmarks.training", "--variant", variant]
    command += ["--trajectories", "1" if length else str(options.trajectories)]
    command += ["--keep-activations"] if options.keep_activations else []
    command += ["--length", str(length)] if length else []
    command += ["--budget", str(budget)]
    command += ["--gradients", str(gradients)] if gradients else []
    # what is freed goes back at once: otherwise the C library's store of freed memory is measured
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{variant} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(options: argparse.Namespace) -> None:
    """Packed against plain, on the same trajectories, with the difference of their gradients."""
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / name for name in ("packed", "plain")}
        found = {name: run(options, name, gradients=file) for name, file in files.items()}
        kept = {name: torch.load(file) for name, file in files.items()}
    apart = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(kept["packed"], kept["plain"]))
    rows = [{"": name} | found[name] for name in ("plain", "packed")]
    rows.append({"": "plain / packed"} | {key: found["plain"][key] / found["packed"][key] for key in found["plain"]})
    print_table(rows, title=f"{options.trajectories} trajectories, one update (memory in MiB)")
    print(f"largest difference of a gradient, relative to its tensor's largest: {apart:.1e}\n")


def compare_budgets(options: argparse.Namespace) -> None:
    """The step of `tiny` under each budget, in turn: medians, and speed against the budget that holds whole rows."""
    rows = []
    for trace in ("real", "static"):
        found: dict[int, list[dict[str, float]]] = {budget: [] for budget in BUDGETS}
        for number in range(options.rounds):
            for budget in BUDGETS[:: 1 if number % 2 else -1]:
                found[budget].append(run(options, trace, budget=budget))
        for budget, told in found.items():
            speed = [whole["seconds"] / cut["seconds"] for whole, cut in zip(found[BUDGETS[0]], told)]
            medians = {name: statistics.median(one[name] for one in told) for name in told[0]}
            spread = f"{min(speed):.2f} to {max(speed):.2f}"
            rows.append({"trace": trace, "budget": budget} | medians | {"speed": statistics.median(speed), "": spread})
    print_table(rows, title="TraceRL, four responses of 128 to 320 tokens, one update (memory in MiB)")


def measure_long(options: argparse.Namespace) -> None:
    """The packed step for one long response, under a budget that holds its row and under a quarter of it."""
    rows = [{"budget": budget} | run(options, "packed", LONG, budget=budget) for budget in LONG_BUDGETS]
    print_table(rows, title=f"the packed step for one response of {LONG} tokens (memory in MiB)")


def grow(options: argparse.Namespace) -> None:
    """Seconds of the packed step for one trajectory of growing length, with and without attention."""
    rows = []
    for length in options.lengths:
        packed, rest = run(options, "packed", length), run(options, "packed_without_attention", length)
        rows.append(
            {
                "response": length,
                "tokens": packed["tokens"],
                "seconds": packed["seconds"],
                "apart from attention": rest["seconds"],
                "memory": packed["memory"],
            }
        )
    print_table(rows, title="the packed step for one trajectory (memory in MiB)")
    seconds = {row["response"]: row["apart from attention"] for row in rows}
    if {1024, 4096} <= seconds.keys():
        print(f"t(4096) / t(1024) apart from attention: {seconds[4096] / seconds[1024]:.2f}")


if __name__ == "__main__":
    main()
