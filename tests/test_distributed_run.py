"""rl.py with experiment.deepspeed_file: one command, two ranks; stopped by a signal, resumed by one process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.config import load_config
from common.config_files import accelerate_config
from common.errors import UserError
from launch.accelerate import check_devices, launch_ranks
from train import rl_trainer

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "rollout.num_task_per_step": 3,
    "rollout.num_response_per_task": 2,
    "rollout.max_token": 8,
    "optimizer.params.learning_rate": 3e-4,
    "optimizer.params.epsilon": 1e-5,
    "lr_scheduler.scheduler": "constant",
    "experiment.total_step": 3,
    "experiment.save_every": 1,
    "experiment.eval_every": 0,
    "experiment.trackers": "[]",
    "evaluation.num_task": 3,
    "evaluation.max_token": 8,
    "evaluation.remasking_strategy": "low_confidence_static",
    "training.keep_accuracy": "null",
    "reward.function": "benchmarks.coin_flip:coin_flip",
    "reward.truncated_is_wrong": False,
}


def arguments(model: Path, runs: Path, **changes: object) -> list[str]:
    """Of a run of three steps; keywords are keys with __ for the dot."""
    values = SMALL | {"model.pretrained_model": model, "experiment.runs_dir": runs}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return [f"config={ROOT}/configs/rl_tiny.yaml", *(f"{key}={value}" for key, value in values.items())]


def run_here(*where: Path, **changes: object) -> None:
    """The run in this process, its curves left out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl_trainer, "draw_curves", lambda *_: None)
        assert rl_trainer.main(load_config("rl", arguments(*where, **changes))) == 0


def rows_of(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if "second" not in key} for row in rows]


@pytest.mark.command
def test_two_ranks_stopped_and_resumed_by_one(tiny_sdar: Path, tmp_path: Path) -> None:
    """Ctrl-C reaches the launcher alone; the ranks save what is done, and one process goes on to the same end.

    The two sample with one network between them, into which ZeRO-3's weights are gathered.
    """
    whole = tmp_path / "whole"
    run_here(tiny_sdar, whole)
    two = {"experiment__deepspeed_file": "1_node_2_cpus_deepspeed_zero3", "rollout__tensor_parallel_size": 2}
    told = arguments(tiny_sdar, tmp_path / "parts", **two)
    command, pipe = [sys.executable, "rl.py", *told], subprocess.PIPE
    job = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    metrics, deadline = tmp_path / "parts" / "rl_tiny" / "metrics.jsonl", time.monotonic() + 240
    while not (metrics.exists() and '"reward"' in metrics.read_text()):
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()[1][-3000:]
        time.sleep(0.02)
    os.kill(job.pid, signal.SIGINT)
    out, err = job.communicate(timeout=120)
    assert job.returncode == 130, err[-3000:]
    assert out.count("stopped after step") == 1 and "experiment.start_from_scratch=False" in out
    assert len(rows_of(metrics.parent)) < len(rows_of(whole / "rl_tiny"))
    run_here(tiny_sdar, tmp_path / "parts", experiment__start_from_scratch=False)
    for one, other in zip(rows_of(whole / "rl_tiny"), rows_of(metrics.parent), strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert other[key] == pytest.approx(value, rel=1e-4, abs=1e-4), key
    ends = [load_file(tmp_path / name / "rl_tiny/ckpt/optimized/model.safetensors") for name in ("whole", "parts")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.allclose(ends[0][name], ends[1][name], atol=1e-4) for name in ends[0])


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("1_node_8_gpus_deepspeed_zero3", "is for 8 GPUs, but this machine has 1"),
        ("4_node_8_gpus_deepspeed_zero3", r"is for 4 nodes: start multinode_rl\.py"),
        ("1_node_8_gpu_zero3", "no such file in accelerate_configs/; did you mean 1_node_8_gpus_"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(file: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        check_devices(file, accelerate_config(file), gpus=1)


def test_a_single_launched_process_knows_that_it_was_launched(tiny_sdar: Path, tmp_path: Path) -> None:
    """Else it would launch another, without end: accelerate's launcher sets no rank for a single process."""
    probe, answer = tmp_path / "probe.py", tmp_path / "answer"
    probe.write_text(
        f"import sys\nfrom pathlib import Path\n\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from launch.accelerate import launched\n\nPath(sys.argv[1]).write_text(str(launched()))\n"
    )
    keys = [f"model={tiny_sdar}", "dataset.eval_dataset=arithmetic_4_test", "experiment.deepspeed_file=cpu"]
    config = load_config("eval", [f"config={ROOT}/configs/eval_tiny.yaml", *keys])
    assert launch_ranks(config, str(probe), [str(answer)]) == 0
    assert answer.read_text() == "True"
