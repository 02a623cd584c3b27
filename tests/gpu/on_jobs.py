"""Whole jobs on the emulated device, as a user starts them: each function is a scenario, in a process of its own."""

import json
import math
import runpy
import sys
import tempfile
from pathlib import Path

import emulation
from on_engine import FIGURES, built

ROOT = Path(emulation.ROOT)
RL = {
    "experiment.total_step": 1,
    "experiment.save_every": 1,
    "rollout.num_task_per_step": 2,
    "rollout.num_response_per_task": 4,
    "rollout.max_token": 12,
    "training.keep_accuracy": "null",
    "evaluation.num_task": 1,
    "evaluation.max_token": 8,
    "evaluation.remasking_strategy": "low_confidence_dynamic",
    "reward.function": "benchmarks.coin_flip:coin_flip",
    "reward.truncated_is_wrong": False,
}
RECORDS = [{"prompt": text, "response": f"{text}=7;\\boxed{{7}}"} for text in ("3+4", "5+2", "6+1")]


def ran(script: str, config: str, values: dict[str, object]) -> tuple[Path, emulation.Log]:
    """A script run to its end in this process, with `dtype: auto`; the run's folder, and what the device did."""
    runs = Path(tempfile.mkdtemp())
    values = {"experiment.runs_dir": runs, "experiment.project": "here"} | values
    sys.argv = [script, f"config={ROOT}/configs/{config}.yaml", *(f"{key}={value}" for key, value in values.items())]
    with emulation.DEVICE.watching() as log:
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            assert not end.code, f"{script} ends with {end.code}"
    assert log.kernels, "nothing was done on the device"
    return runs / "here", log


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def rl(family: str, resumed: bool = False, **keys: object) -> FIGURES:
    """A step of reinforcement learning, evaluated and saved; where `resumed`, taken up again for a second."""
    values = RL | {"model.model_base": family, "model.pretrained_model": built(family), "model.dtype": "auto"}
    values |= {"experiment.trackers": "[]"} | {key.replace("__", "."): value for key, value in keys.items()}
    folder, log = ran("rl.py", "rl_tiny", values)
    steps = [row for row in metrics_of(folder) if "reward" in row]
    assert len(steps) == 1 and all(math.isfinite(row["loss"]) for row in steps if "loss" in row)
    assert (folder / "ckpt" / "optimized" / "model.safetensors").exists()
    assert emulation.DEVICE.replayed, "no CUDA graph"
    if resumed:
        again = {"experiment.start_from_scratch": False, "experiment.total_step": 2}
        ran("rl.py", "rl_tiny", values | again | {"experiment.runs_dir": folder.parent})
        assert len([row for row in metrics_of(folder) if "reward" in row]) == 2
    return {"waits": len(log.waits), "kernels": log.kernels}


def rl_with_value() -> FIGURES:
    """The same with a value model."""
    return rl("sdar", model__value_base_model=built("sdar", 4))


def evaluation(family: str) -> FIGURES:
    """An evaluation of every setting of the tiny config."""
    values = {"model": built(family), "model_base": family, "dtype": "auto", "rollout.num_task": 2}
    folder, log = ran("eval.py", "eval_tiny", values | {"rollout.max_token": 12})
    assert list(folder.rglob("results.json")), sorted(folder.rglob("*"))
    return {"waits": len(log.waits), "kernels": log.kernels}


def finetuning(family: str, **keys: object) -> FIGURES:
    """Two updates of finetuning, measured on tasks, with a checkpoint."""
    folder = Path(tempfile.mkdtemp())
    tasks = [{"question": one["prompt"], "ground_truth_answer": "7"} for one in RECORDS]
    for name, content in (("records", RECORDS), ("tasks", tasks)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    values = {
        "model.model_base": family,
        "model.pretrained_model": built(family),
        "model.dtype": "auto",
        "dataset.optimization_data": folder / "records.json",
        "dataset.eval_dataset": folder / "tasks.json",
        "experiment.trackers": "[]",
        "training.max_steps": 2,
        "training.batch_size": 3,
        "training.eval_every": 2,
        "training.stop_at_accuracy": "null",
        "evaluation.max_token": 8,
    } | {key.replace("__", "."): value for key, value in keys.items()}
    run, log = ran(f"train/sft_{family}.py", "sft_tiny", values)
    losses = [row["loss"] for row in metrics_of(run) if "loss" in row]
    assert len(losses) == 2 and all(map(math.isfinite, losses)), losses
    assert (run / "ckpt" / "optimized" / "model.safetensors").exists()
    return {"waits": len(log.waits), "kernels": log.kernels}
