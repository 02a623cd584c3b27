"""A network divided over two processes draws what one process draws."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.config import load_config
from common.errors import UserError
from common.jobs import EvalConfig
from common.schema import Sampling
from common.trajectory import Request
from models import load_model
from models.tiny import build_tiny
from rollout import evaluate
from sample.engine import Engine
from sample.parallel import local, shard

ROOT = Path(__file__).resolve().parents[1]
MIXTURES = ("sdar_moe", "llada2")
WIDTH = 48  # of an expert of theirs
SETTINGS = Sampling(max_token=6, dynamic_threshold=0.1)
REQUESTS = [Request(str(n), [(n + 7 * i) % 33 for i in range(length)]) for n, length in enumerate((9, 4))]


def draw_twice(folder: Path, other: Path, size: int, name: str = "sdar") -> list[dict]:
    """Responses of a network of that family, and again with the weights of another."""
    loaded = load_model(folder, name)
    if size > 1:
        assert shard(loaded.model, size) == 0
    engine, got = Engine(loaded.model, loaded.mask_id, [14]), []
    for weights in (None, load_model(other, name).model.named_parameters()):
        if weights is not None:
            engine.load_weights(weights)
        drawn = sorted(engine.generate(REQUESTS, SETTINGS), key=lambda t: t.task_id)
        got += [{"ids": t.response_ids, "steps": t.step_map, "logp": t.logp} for t in drawn]
    if name in MIXTURES:
        experts = engine.model.model.layers[1].mlp.experts
        widths = (local(experts.gate_up_proj).shape[1], local(experts.down_proj).shape[2])
        assert widths == (2 * WIDTH // size, WIDTH // size)
    assert engine.cache.keys[0].shape[1] == 2 // size
    return got


def evaluation(folder: Path, size: int) -> EvalConfig:
    """Of the network, by that many ranks together; its files lie in the folder's `size`."""
    told = {"model": folder, "made_by": "null", "experiment.runs_dir": folder, "experiment.project": size}
    told |= {"rollout.tensor_parallel_size": size, "rollout.max_token": 8, "rollout.max_active": 2}
    told |= {"rollout.num_task": 4, "rollout.remasking_strategy": "low_confidence_static"}
    return load_config("eval", [f"config={ROOT}/configs/eval_tiny.yaml", *(f"{k}={v}" for k, v in told.items())])


def main(folder: Path, other: Path) -> None:
    torch.set_num_threads(1)
    evaluate.main(evaluation(folder, size=2))
    got = draw_twice(folder, other, size=2)
    for name in MIXTURES:
        got += draw_twice(folder / name, other / name, 2, name)
    model = load_model(folder, "sdar").model
    with pytest.raises(UserError, match=r"tensor_parallel_size: 3 does not divide the 2 devices"):
        shard(model, 3)
    model.config.num_key_value_heads = 1
    with pytest.raises(UserError, match=r"tensor_parallel_size: 2 does not divide the model's 1 key-value heads"):
        shard(model, 2)
    (folder / f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(got))
    torch.distributed.destroy_process_group()


def responses(folder: Path, size: int) -> list[tuple]:
    """What is written of an evaluation, by task."""
    lines = (folder / str(size) / "samples.jsonl").read_text().splitlines()
    return sorted((one["task_id"], one["response_ids"], one["step_map"]) for one in map(json.loads, lines))


def test_two_processes_draw_what_one_draws(tmp_path: Path) -> None:
    folder, other = tmp_path / "one", tmp_path / "other"
    build_tiny("sdar", folder, seed=3)
    build_tiny("sdar", other, seed=4)
    for name in MIXTURES:
        build_tiny(name, folder / name, seed=3)
        build_tiny(name, other / name, seed=4)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "tests.test_engine_parallel", str(folder), str(other)]
    pair = [
        subprocess.Popen(command, cwd=ROOT, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in (0, 1)
    ]
    try:
        assert [process.wait(timeout=300) for process in pair] == [0, 0]
    finally:
        for process in pair:
            process.kill()
    expected = draw_twice(folder, other, size=1)
    for name in MIXTURES:
        expected += draw_twice(folder / name, other / name, 1, name)
    assert all(expected[first : first + 2] != expected[first + 2 : first + 4] for first in range(0, 12, 4))
    for rank in (0, 1):
        for got, one in zip(json.loads((folder / f"rank{rank}.json").read_text()), expected, strict=True):
            assert (got["ids"], got["steps"]) == (one["ids"], one["steps"])
            assert torch.allclose(torch.tensor(got["logp"]), torch.tensor(one["logp"]), rtol=0, atol=1e-5)
    evaluate.main(evaluation(folder, size=1))
    assert responses(folder, 1) == responses(folder, 2) and len(responses(folder, 1)) == 4


def test_one_process_is_told_how_to_be_several(tmp_path: Path) -> None:
    build_tiny("sdar", tmp_path, seed=3)
    with pytest.raises(
        UserError, match=r"tensor_parallel_size: 2, but this is one process; .*experiment\.deepspeed_file"
    ):
        evaluate.main(evaluation(tmp_path, size=2))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
