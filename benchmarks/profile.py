"""Where a step's time goes: python -m benchmarks.profile [--shape tiny|1.7b|4b|8b] [--batch 64] …

Every part is timed with the device waited for before and after, and without CUDA graphs: parts add up, but on a GPU
to more than a step takes.
"""

import argparse
import functools
import time
from collections.abc import Callable

import torch

from benchmarks import use_threads
from benchmarks.plain_loop import synchronize
from benchmarks.rollout import requests_of
from benchmarks.shapes import SHAPES, make_network, rate_settings
from common.metrics import print_table
from common.runtime import console
from common.schema import Sampling
from sample import network, step
from sample.engine import Engine

# what is timed, by the name under which its caller finds it; an indented part lies within the one above it
PARTS = (
    ("admit: queue, prefill", Engine, "admit"),
    ("step", Engine, "run_step"),
    ("  forward", step.Step, "forward"),
    ("    layers", network.Network, "forward"),
    ("      attention", network, "sdpa"),
    ("  logits and draw", step.Step, "draw"),
    ("    logits", network.Network, "logits"),
    ("    random numbers", step, "uniforms"),
    ("  choose positions", step.Step, "choose"),
    ("  record", step.Step, "record"),
    ("  advance", step.Step, "advance"),
    ("collect: flags, trajectories", Engine, "collect"),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--tokens-per-forward", type=float)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    use_threads(options.threads)
    model, mask_id = make_network(options.shape, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    settings = Sampling(
        max_token=options.tokens, temperature=options.temperature, remasking_strategy="low_confidence_static"
    )
    if options.tokens_per_forward:
        settings = rate_settings(settings, options.tokens_per_forward)
    engine, requests = Engine(model, mask_id, ()), requests_of(options.batch, options.prompt)
    if engine.graphs is not None:
        engine.graphs.usable = False
    list(engine.generate(requests, settings))  # warm up
    seconds, steps = time_parts(lambda: list(engine.generate(requests, settings)))
    whole = sum(value for name, value in seconds.items() if not name.startswith(" "))
    rows = [
        {"part": name, "ms/step": f"{1e3 * value / steps:.3f}", "share": f"{100 * value / whole:.1f} %"}
        for name, value in seconds.items()
    ]
    print_table(rows, title=f"{options.shape}, {options.batch} active, {steps} steps")
    if model.device.type == "cuda":
        console.print("each part waits for the device; CUDA graphs are off")


def time_parts(work: Callable[[], object]) -> tuple[dict[str, float], int]:
    """Seconds inside each part while `work` runs, and how many steps it took."""
    seconds, calls, originals = {name: 0.0 for name, _, _ in PARTS}, {name: 0 for name, _, _ in PARTS}, []

    def timed(name: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def wrapped(*arguments: object, **named: object) -> object:
            synchronize()
            begin = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                synchronize()
                seconds[name] += time.perf_counter() - begin
                calls[name] += 1

        return wrapped

    for name, holder, attribute in PARTS:
        originals.append((holder, attribute, getattr(holder, attribute)))
        setattr(holder, attribute, timed(name, getattr(holder, attribute)))
    try:
        work()
    finally:
        for holder, attribute, function in originals:
            setattr(holder, attribute, function)
    return seconds, calls["step"]


if __name__ == "__main__":
    main()
