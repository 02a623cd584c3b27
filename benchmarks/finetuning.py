"""Finetuning on samples of mixed length: packed rows against one sample per row padded to the data set's longest.

    python -m benchmarks.finetuning [--longest 480] [--mean 0.25] [--updates 3] [--batch-size 32] [--model PATH]

Every way runs the same views of the same samples, and their losses must agree. Tokens are those of prompts and
responses, through the stop token. Without a model the network is the project's tiny one.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.nn.functional import pad

from common.metrics import print_table
from common.runtime import device_and_dtype
from common.schema import OptimizerParams, SchedulerConfig, SFTTrainingConfig
from models import LoadedModel, load_model
from models.tiny import build_tiny
from train.learner import MOST_PADDING, Learner, make_learner, update
from train.network import Policy
from train.packing import PackedBatch, Row, pack
from train.sft_data import Conversation
from train.sft_trainer import rows_of
from train.views import Example

BUDGET = 16384  # tokens of a micro-batch
BLOCK = 4
PADDED = "padded to the longest"
WAYS: dict[str, Callable[[Sequence[Row], int], list[PackedBatch]]] = {
    PADDED: lambda rows, longest: padded(rows, longest),
    "side by side": lambda rows, longest: pack(rows, BUDGET),
    f"side by side, at most {MOST_PADDING:.0%} padding": lambda rows, longest: pack(
        rows, BUDGET, most_padding=MOST_PADDING
    ),
    "joined in rows of 1,024": lambda rows, longest: pack(rows, 1024, together=True),
    "joined in rows of 16,384": lambda rows, longest: pack(rows, BUDGET, together=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--longest", type=int, default=480, help="tokens of the longest sample")
    parser.add_argument("--mean", type=float, default=0.25, help="mean length over the longest")
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--model", help="a checkpoint's folder, of block attention")
    parser.add_argument("--family", default="sdar")
    args = parser.parse_args()
    device, dtype = device_and_dtype("auto")
    with tempfile.TemporaryDirectory() as folder:
        if not args.model:
            build_tiny(args.family, folder, seed=1)
        loaded = load_model(args.model or folder, args.family, torch.float32, device)
    precision = "bf16" if dtype == torch.bfloat16 else "no"
    training = SFTTrainingConfig(block_size=BLOCK)
    network = Policy(loaded.model, loaded.mask_id)
    learner = make_learner(network, OptimizerParams(learning_rate=0.0), SchedulerConfig(), 1, training, precision)
    lengths = mixed_lengths(args.batch_size * args.updates, args.longest, args.mean)
    rng = np.random.default_rng(0)
    samples = [sample_of(loaded, length, rng) for length in lengths]
    rows = rows_of(training, loaded, samples, rng)
    longest = max(len(row) for row in rows)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    padding: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(args.updates):
        chosen = rows[number * args.batch_size : (number + 1) * args.batch_size]
        losses = []
        for name, way in WAYS.items():
            begin = time.perf_counter()
            batches = way(chosen, longest)
            losses.append(one_update(learner, chosen, batches))
            seconds[name].append(time.perf_counter() - begin)
            padding[name].append(1 - sum(map(len, chosen)) / sum(batch.ids.numel() for batch in batches))
        assert max(losses) - min(losses) < (1e-4 if precision == "no" else 1e-2), losses
    tokens = [sum(lengths[n * args.batch_size : (n + 1) * args.batch_size]) for n in range(args.updates)]
    report(seconds, padding, tokens, f"{len(lengths)} samples, mean {np.mean(lengths):.0f} of {args.longest}, {device}")


def mixed_lengths(count: int, longest: int, mean: float) -> list[int]:
    """Many short lengths and few long ones, the longest among them, with that mean as a share of it."""
    shares = np.random.default_rng(1).beta(1.0, 1 / mean - 1.0, count)
    lengths = np.maximum(2 * BLOCK, np.round(shares * mean / shares.mean() * longest)).astype(int)
    return [longest, *np.minimum(lengths, longest).tolist()[1:]]


def sample_of(loaded: LoadedModel, length: int, rng: np.random.Generator) -> Conversation:
    """A sample of random tokens, a quarter of them the prompt's, whole blocks."""
    vocabulary = min(loaded.mask_id, loaded.model.config.vocab_size)
    ids = rng.integers(0, vocabulary, length + -length % BLOCK).tolist()
    prompt = length // 4
    return [Example(ids[:prompt], ids[prompt:], length - prompt)]


def padded(rows: Sequence[Row], longest: int) -> list[PackedBatch]:
    """One sample per row, every row as long as the longest of the data set."""
    batches = []
    side_by_side = max(1, BUDGET // longest)
    for start in range(0, len(rows), side_by_side):
        (batch,) = pack(rows[start : start + side_by_side], len(rows) * longest)
        width = batch.ids.shape[1]
        extra = (0, longest - width)
        wide = {name: pad(getattr(batch, name), extra) for name in ("ids", "position", "block", "view", "counted")}
        line, place = batch.predict_at // width, batch.predict_at % width
        trajectory = pad(batch.trajectory, extra, value=-1)
        batches.append(replace(batch, **wide, trajectory=trajectory, predict_at=line * longest + place))
    return batches


def one_update(learner: Learner, rows: Sequence[Row], batches: Sequence[PackedBatch]) -> float:
    """The mean cross-entropy of an update that is made in full, at a learning rate of 0."""
    count = sum(len(row.target) for row in rows)
    done = update(learner, batches, lambda batch: -learner.forward(batch)[0].sum() / count)
    if learner.accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    return done.loss


def report(seconds: dict[str, list[float]], padding: dict[str, list[float]], tokens: Sequence[int], title: str) -> None:
    """Tokens per second of each way, the median over updates, and how many times those of the padded one."""
    speed = {name: statistics.median(n / s for n, s in zip(tokens, seconds[name])) for name in seconds}
    rows = [
        {
            "rows": name,
            "padding": f"{np.mean(padding[name]):.0%}",
            "tokens/s": round(speed[name]),
            "times padded": round(speed[name] / speed[PADDED], 2),
        }
        for name in seconds
    ]
    print_table(rows, title=title)


if __name__ == "__main__":
    main()
