"""What the server costs: python -m benchmarks.serving [width] [streams]

The same requests drawn by the engine alone and, in a process of its own, through serve.py by `streams` clients at once
that read block by block; tokens per second and their ratio, medians of seven rounds in turn, on one thread each.
`width` is that of a random network: at 128, the tiny model's, a step takes so little that the server's own work shows;
it is 384 otherwise.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.request import urlopen

import httpx

from benchmarks import use_threads
from common.metrics import print_table
from common.schema import Sampling
from common.trajectory import Request
from models import LoadedModel, load_model
from models.tiny import build_tiny
from sample.engine import Engine

TOKENS, REQUESTS, ROUNDS, PORT = 40, 96, 7, 18473
SETTINGS = {"max_token": TOKENS, "temperature": 1.0, "remasking_strategy": "low_confidence_dynamic"}


def engine_alone(engine: Engine, loaded: LoadedModel, streams: int) -> tuple[float, int]:
    """Tokens per second, and tokens."""
    turns = [[{"role": "user", "content": f"{number}+2"}] for number in range(REQUESTS)]
    prompts = [loaded.tokenizer.apply_chat_template(t, add_generation_prompt=True, return_dict=False) for t in turns]
    requests = [Request("prompt", ids, 0, number) for number, ids in enumerate(prompts)]
    begin = time.perf_counter()
    drawn = list(engine.generate(requests, Sampling(**SETTINGS, max_active=streams)))
    tokens = sum(one.length for one in drawn)
    return tokens / (time.perf_counter() - begin), tokens


async def through_the_server(streams: int) -> tuple[float, int]:
    """Tokens per second as the clients see it, and tokens."""
    gate, tokens = asyncio.Semaphore(streams), 0

    async def ask(client: httpx.AsyncClient, number: int) -> int:
        body = {"messages": [{"role": "user", "content": f"{number}+2"}], "seed": number, "stream": True}
        body["stream_options"] = {"include_usage": True}
        async with gate, client.stream("POST", f"http://127.0.0.1:{PORT}/v1/chat/completions", json=body) as answer:
            last = ""
            async for line in answer.aiter_lines():
                last = line if "completion_tokens" in line else last
        return json.loads(last.removeprefix("data: "))["usage"]["completion_tokens"]

    async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=streams)) as client:
        begin = time.perf_counter()
        tokens = sum(await asyncio.gather(*(ask(client, number) for number in range(REQUESTS))))
        return tokens / (time.perf_counter() - begin), tokens


def main(width: int, streams: int) -> None:
    """Measure and print."""
    use_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        build_tiny("sdar", folder, seed=0, width=width)
        loaded = load_model(folder, "sdar")
        command = [sys.executable, "serve.py", f"model={folder}", f"port={PORT}", f"max_active={streams}"]
        command += [f"{key}={value}" for key, value in SETTINGS.items()] + ["max_prompt_len=64"]
        root, environment = Path(__file__).resolve().parents[1], os.environ | {"OMP_NUM_THREADS": "1"}
        server = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.DEVNULL)
        try:
            wait_for_server(server)
            engine = Engine(loaded.model, loaded.mask_id, loaded.stop_ids)
            alone, served = [], []
            for _ in range(ROUNDS):
                alone.append(engine_alone(engine, loaded, streams))
                served.append(asyncio.run(through_the_server(streams)))
        finally:
            server.terminate()
            server.wait()
    assert alone[0][1] == served[0][1], "the server drew other responses than the engine"
    ratios = [own[0] / engines[0] for engines, own in zip(alone, served)]
    row = {"width": width, "streams": streams, "requests": REQUESTS, "tokens": alone[0][1]}
    for name, rates in (("engine", alone), ("server", served)):
        row[f"{name} (tokens/s)"] = statistics.median(rate for rate, _ in rates)
    row |= {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    print_table([row], title="the server against the engine alone")


def wait_for_server(server: subprocess.Popen, seconds: float = 120.0) -> None:
    """Return once it answers."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            urlopen(f"http://127.0.0.1:{PORT}/health", timeout=1).close()
            return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the server did not start")


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:]]
    main(*(numbers or [384]), *([32] if len(numbers) < 2 else []))
