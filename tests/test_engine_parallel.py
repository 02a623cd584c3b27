"""A network divided over two processes draws what one process draws."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from common.schema import Sampling
from common.trajectory import Request
from models import load_model
from models.tiny import build_tiny
from sample.engine import Engine
from sample.parallel import shard

SETTINGS = Sampling(max_token=6, dynamic_threshold=0.1)
REQUESTS = [Request(str(n), [(n + 7 * i) % 33 for i in range(length)]) for n, length in enumerate((9, 4))]


def draw_twice(folder: Path, other: Path, size: int) -> list[dict]:
    """Responses of a network, and again with the weights of another."""
    loaded = load_model(folder, "sdar")
    if size > 1:
        assert shard(loaded.model, size) == 0
    engine, got = Engine(loaded.model, loaded.mask_id, [14]), []
    for weights in (None, load_model(other, "sdar").model.named_parameters()):
        if weights is not None:
            engine.load_weights(weights)
        drawn = sorted(engine.generate(REQUESTS, SETTINGS), key=lambda t: t.task_id)
        got += [{"ids": t.response_ids, "steps": t.step_map, "logp": t.logp} for t in drawn]
    assert engine.cache.keys[0].shape[1] == 2 // size
    return got


def main(folder: Path, other: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    got = draw_twice(folder, other, size=2)
    (folder / f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(got))
    torch.distributed.destroy_process_group()


def test_two_processes_draw_what_one_draws(tmp_path: Path) -> None:
    folder, other = tmp_path / "one", tmp_path / "other"
    build_tiny("sdar", folder, seed=3)
    build_tiny("sdar", other, seed=4)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "tests.test_engine_parallel", str(folder), str(other)]
    pair = [
        subprocess.Popen(command, cwd=root, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in (0, 1)
    ]
    try:
        assert [process.wait(timeout=300) for process in pair] == [0, 0]
    finally:
        for process in pair:
            process.kill()
    expected = draw_twice(folder, other, size=1)
    assert expected[:2] != expected[2:]
    for rank in (0, 1):
        for got, one in zip(json.loads((folder / f"rank{rank}.json").read_text()), expected, strict=True):
            assert (got["ids"], got["steps"]) == (one["ids"], one["steps"])
            assert torch.allclose(torch.tensor(got["logp"]), torch.tensor(one["logp"]), rtol=0, atol=1e-5)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
