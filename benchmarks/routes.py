"""Trainer against sampler in bfloat16: a dense network, and mixtures with and without the sampler's experts.

    python -m benchmarks.routes                          # tiny networks, random weights
    python -m benchmarks.routes --models sdar=PATH sdar_moe=PATH

Responses are drawn in bfloat16; the trainer, float32 weights under bfloat16 arithmetic, replays their traces before any
update. `flips` is the share of (token, layer) pairs that the trainer gives to other experts than the sampler did.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from common.metrics import print_table
from common.schema import OptimizerParams, RLTrainingConfig, Sampling, SchedulerConfig
from common.trajectory import Request, Score, ScoredTrajectory, Task, Trajectory
from models import load_model, load_network
from models.mixture import routers
from models.tiny import build_tiny
from sample.engine import Engine
from train.learner import batch_logp, make_learner, micro_batches, route_flips
from train.network import Policy
from train.objectives import tokens_of
from train.rl_step import mismatch_of, replay_rows
from train.routing import Routing
from train.views import layout_of

FAMILIES = ("sdar", "sdar_moe", "llada2")


def main() -> None:
    options = parse()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        given = dict(one.split("=", 1) for one in options.models)
        for name in () if given else FAMILIES:
            given[name] = f"{folder}/{name}"
            build_tiny(name, given[name], seed=1, width=options.width)
        print_table([row for name, path in given.items() for row in measure(name, Path(path), options)])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=[], help="family=folder; without it tiny ones of random weights")
    parser.add_argument("--width", type=int, default=128, help="of the tiny networks")
    parser.add_argument("--responses", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=40, help="of a response")
    return parser.parse_args()


def measure(name: str, path: Path, options: argparse.Namespace) -> list[dict[str, str]]:
    """A row of the table for a dense network, two for a mixture."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    drawn = draw(name, path, device, options)
    loaded = load_model(path, name, device=device)
    training = RLTrainingConfig()
    policy = Policy(loaded.model, loaded.mask_id)
    learner = make_learner(policy, OptimizerParams(), SchedulerConfig(), 1, training, "bf16")
    mixture = bool(routers(loaded.model))
    learner.routing = Routing(loaded.model) if mixture else None
    samples = [ScoredTrajectory(Task(one.task_id, ""), one, Score(0.0, False, "failed")) for one in drawn]
    layout = layout_of(loaded, loaded.block_size or 4)
    rows = []
    for replayed in (False, True) if mixture else (False,):
        packed = replay_rows(samples, training, layout, with_routes=replayed)
        batches = micro_batches(packed, training.tokens_per_micro_batch)
        tokens = tokens_of(packed, samples)
        logp = batch_logp(learner, batches, temperature=1.0)
        figures = mismatch_of(logp, tokens.engine_logp, exact=False)
        difference = (logp - tokens.engine_logp).abs().numpy()
        row = {"family": name, "experts": "the sampler's" if replayed else "the trainer's" if mixture else "none"}
        row |= {"tokens": f"{len(logp):,}", "logp_diff_max": f"{figures['logp_diff_max']:.3f}"}
        row |= {"99.9 %": f"{np.quantile(difference, 0.999):.3f}", "mismatch_kl": f"{figures['mismatch_kl']:.2e}"}
        rows.append(row | {"flips": ""})
    if mixture:
        rows[0]["flips"] = f"{100 * route_flips(learner, batches):.2f} %"
    return rows


def draw(name: str, path: Path, device: str, options: argparse.Namespace) -> list[Trajectory]:
    """Responses in bfloat16 to prompts of the smallest ids, in blocks of the checkpoint's size."""
    loaded = load_model(path, name)
    network = load_network(path, name, torch.bfloat16, device)
    settings = Sampling(max_token=options.tokens, dynamic_threshold=0.5, block_size=loaded.block_size or 4)
    requests = [
        Request(str(number), [(number + 7 * i) % 33 for i in range(4 + number % 9)], keep_routes=bool(routers(network)))
        for number in range(options.responses)
    ]
    return list(Engine(network, loaded.mask_id, loaded.stop_ids).generate(requests, settings))


if __name__ == "__main__":
    main()
