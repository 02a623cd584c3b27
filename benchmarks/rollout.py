"""Tokens per second of the engine against the plain loop: python -m benchmarks.rollout [--shape tiny|1.7b|4b|8b] …

In each of `--repeats` rounds every batch of the engine stands between single sequences of the plain loop; a ratio is
the median over rounds of those taken within one. `--requests N` instead sends N requests of mixed lengths through room
for 8 and prints the resident memory on the way. `--alone` leaves the plain loop out, which is slow for large shapes.
On a GPU the limit stands beside, by the bandwidth and the rate of matrix products measured there.
"""

import argparse
import functools
import json
import resource
import statistics
import time
from pathlib import Path

import torch

from benchmarks import use_threads
from benchmarks.cost_model import BLOCK, LARGE_PRODUCT, Chip, limit_seconds
from benchmarks.plain_loop import Clock, plain_loop, synchronize
from benchmarks.shapes import SHAPES, copy_bandwidth, make_network, matmul_rate, rate_settings
from common.memory import size_of
from common.metrics import print_table
from common.runtime import console
from common.schema import Sampling
from common.trajectory import Request, Trajectory
from sample.engine import Engine

AT_LEAST = 4  # responses of the plain loop, and of the engine, in what is compared


def main() -> None:
    options = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    use_threads(options.threads)
    model, mask_id = make_network(options.shape, device)
    console.print(
        f"{options.shape}, {device.type}, {next(model.parameters()).dtype}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, prompts of {options.prompt} tokens, responses of {options.tokens}"
    )
    if options.requests:
        soak(model, mask_id, options.requests)
        return
    settings = Sampling(
        max_token=options.tokens,
        max_active=max(options.batch),
        remasking_strategy="low_confidence_static",
        temperature=options.temperature,
        merge_commit=options.merge_commit,
    )
    if options.tokens_per_forward:
        settings = rate_settings(settings, options.tokens_per_forward)
    compare(model, mask_id, settings, options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64, 256], help="sequences side by side")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each response")
    parser.add_argument(
        "--tokens-per-forward", type=float, help="unmask at this rate; none: static, 4 steps per block of 4"
    )
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument(
        "--merge-commit", type=lambda text: text == "True", help="True or False; none: the engine's choice"
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds, each with every batch and the plain loop")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--cpu-time", action="store_true", help="count processor time: for a machine busy with other work"
    )
    parser.add_argument("--alone", action="store_true", help="the engine without the plain loop")
    parser.add_argument("--out", type=Path, help="write the table's rows to this file too, as JSON")
    parser.add_argument("--requests", type=int, default=0, help="only send so many requests through room for 8")
    return parser.parse_args()


def requests_of(count: int, prompt: int) -> list[Request]:
    """Requests whose prompts leave 0, 1, 2 and 3 tokens of their block, in turn."""
    return [Request(str(n), [(n + 7 * i) % 31 for i in range(prompt + n % 4)]) for n in range(count)]


def compare(model: torch.nn.Module, mask_id: int, settings: Sampling, options: argparse.Namespace) -> None:
    """Print the table: the plain loop, and the engine at each batch."""
    engine = Engine(model, mask_id, ())
    requests = {batch: requests_of(batch, options.prompt) for batch in options.batch}
    times: list[tuple[int, float, float]] = []  # batch, seconds a response of the plain loop and of the engine
    drawn: dict[int, list[Trajectory]] = {}
    clock = Clock()

    def plainly(batch: int) -> float:
        """Seconds of the batch's first response by the plain loop, which the engine's must equal."""
        begin = now(options)
        one = plain_loop(model, mask_id, (), requests[batch][0], settings, clock)
        seconds = now(options) - begin
        if model.dtype == torch.float32 and batch in drawn:
            first = next(trajectory for trajectory in drawn[batch] if trajectory.task_id == "0")
            assert (first.response_ids, first.step_map) == one[:2], "the engine is not the plain loop"
        return seconds

    pairs = 0 if options.alone else AT_LEAST // 2  # of plain responses, before and after
    for round_number in range(options.repeats + 1):
        for batch in options.batch:
            often = 1 if options.alone else -(-AT_LEAST // batch)
            plain = [plainly(batch) for _ in range(pairs)]
            begin = now(options)
            for _ in range(often):
                drawn[batch] = list(engine.generate(requests[batch], settings))
            seconds = (now(options) - begin) / (often * batch)
            plain += [plainly(batch) for _ in range(pairs)]
            times.append((batch, statistics.mean(plain) if plain else 0.0, seconds))
        if round_number == 0:  # it warmed up
            times, clock = [], Clock()
    rows = [] if options.alone else [plain_row(times, clock, options)]
    for batch in options.batch:
        own = [(plain, seconds) for other, plain, seconds in times if other == batch]
        rows.append(row_of(model, drawn[batch], own, options))
    print_table(rows, title=f"rollout, {settings.remasking_strategy}")
    if options.out:
        options.out.write_text(json.dumps(rows), encoding="utf-8")


def plain_row(times: list[tuple[int, float, float]], clock: Clock, options: argparse.Namespace) -> dict[str, object]:
    """The plain loop's figures, over all rounds."""
    calls = clock.calls / (AT_LEAST * len(times) * options.tokens)
    return {
        "sampler": "plain loop",
        "batch": 1,
        "tokens/s": options.tokens / statistics.median(plain for _, plain, _ in times),
        "ratio": 1.0,
        "forwards/token": calls,
        "in the model": f"{100 * clock.seconds / clock.total:.0f} %",
    }


def row_of(
    model: torch.nn.Module,
    drawn: list[Trajectory],
    times: list[tuple[float, float]],
    options: argparse.Namespace,
) -> dict[str, object]:
    """One batch's figures; `times` are those of a response by the plain loop and by the engine, round by round."""
    median = statistics.median(seconds for _, seconds in times) * len(drawn)
    tokens = sum(trajectory.length for trajectory in drawn)
    forwards = sum(trajectory.forwards for trajectory in drawn)
    unmasked = sum(len(trajectory.response_ids) for trajectory in drawn)  # with the last block's tokens past the limit
    steps = forwards / len(drawn)
    row = {"sampler": "engine", "batch": len(drawn), "tokens/s": tokens / median}
    if not options.alone:
        row["ratio"] = statistics.median(plain / seconds for plain, seconds in times)
    row |= {
        "forwards/token": forwards / unmasked,
        "tokens/forward": unmasked / sum(trajectory.steps for trajectory in drawn),
        "ms/forward": 1e3 * median / steps,
        "peak MiB": peak_memory() / 2**20,
    }
    if model.device.type == "cuda":
        per_token = forwards / unmasked
        blocks = 1 + (1 / (BLOCK * per_token) if per_token <= 1 else 0)  # a merged commit widens forwards
        context = options.prompt + options.tokens / 2
        size = size_of(model.config.to_dict())
        limit = limit_seconds(size, this_chip(), len(drawn), context, BLOCK * blocks)
        row |= {"limit tokens/s": tokens / (steps * limit), "% of limit": 100 * steps * limit / median}
    return row


@functools.cache
def this_chip() -> Chip:
    """The GPU at hand by what a large copy and a large product reach there."""
    return Chip(copy_bandwidth(), matmul_rate() / LARGE_PRODUCT)


def soak(model: torch.nn.Module, mask_id: int, count: int) -> None:
    """Requests of mixed lengths through room for 8; one in a thousand can never fit."""
    longest, settings = 96, Sampling(max_token=8, max_active=64, remasking_strategy="low_confidence_static")
    settings.cache_tokens = 8 * (longest + 8)
    lengths = [1 + 37 * n % longest if n % 1000 != 500 else settings.cache_tokens for n in range(count)]
    requests = (Request(str(n), [n % 31] * length) for n, length in enumerate(lengths))
    begin, seen, refused, marks = time.perf_counter(), set(), 0, {}
    for trajectory in Engine(model, mask_id, ()).generate(requests, settings):
        seen.add(trajectory.task_id)
        refused += trajectory.finish_reason == "refused"
        if len(seen) in (count // 10, count):
            marks[len(seen)] = resident_memory()
            seconds = time.perf_counter() - begin
            console.print(f"{len(seen)} back after {seconds:.0f} s, resident {marks[len(seen)] / 2**20:.1f} MiB")
    first, last = marks.values()
    console.print(f"{len(seen)} of {count} returned, {refused} refused; resident memory {last / first:.3f}×")


def now(options: argparse.Namespace) -> float:
    synchronize()
    return time.process_time() if options.cpu_time else time.perf_counter()


def peak_memory() -> int:
    """Bytes: the device's highest, or the process's highest on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_memory() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main()
