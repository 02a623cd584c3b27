"""Kill a run at random moments, resume it each time, and hold its end to that of a run left alone, bit for bit.

    python -m tests.kill_and_resume [--kills 20] [--steps 24] [--seed 0] [--carry]

Every second kill falls into the writing of a checkpoint. Each life of the run is a process of its own, forked from
this one, which has imported all there is to import, and ended by SIGKILL. With `--carry` responses outlive their steps.
"""

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import torch

from common.config import load_config
from models.tiny import build_tiny
from train import rl_trainer

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "rl_tiny.yaml"
VALUES = {
    "rollout.num_task_per_step": 2,
    "rollout.num_response_per_task": 2,
    "rollout.max_token": 8,
    "experiment.save_every": 1,
    "experiment.eval_every": 10,
    "experiment.trackers": "[]",
    "evaluation.num_task": 2,
    "evaluation.max_token": 8,
    "training.keep_accuracy": "null",
    "reward.function": "benchmarks.coin_flip:coin_flip",
    "reward.truncated_is_wrong": False,
    "reward.workers": 0,
}
CARRY = {"rollout.carry": True, "rollout.in_flight": 3, "rollout.max_token": 24, "rollout.max_stale_steps": 3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--carry", action="store_true", help="responses outlive the steps that began them")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rng, begin = random.Random(chosen.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_tiny("sdar", folder / "model", seed=3)
        values = CARRY if chosen.carry else {}
        life(folder, "alone", chosen.steps, values).join()
        lives, in_writing = 0, 0
        for number, step in enumerate(sorted(rng.choices(range(1, chosen.steps), k=chosen.kills))):
            lives += 1
            in_writing += live_and_die(folder, chosen.steps, values, step, number % 2 == 1, rng)
        last = life(folder, "killed", chosen.steps, values)
        last.join()
        assert last.exitcode == 0, "the last life did not reach the end"
        compare(folder / "alone" / "rl_tiny", folder / "killed" / "rl_tiny", chosen.steps)
    seconds = time.monotonic() - begin
    print(
        f"{lives} lives ended by SIGKILL, {in_writing} of them while a checkpoint was written: weights, metrics and "
        f"rollouts of all {chosen.steps} steps equal those of a run left alone, bit for bit ({seconds:.0f} s)"
    )


def life(folder: Path, name: str, steps: int, values: dict[str, object]) -> multiprocessing.Process:
    """The run in a process of its own, started; `values` of further keys."""
    values = VALUES | values | {"model.pretrained_model": folder / "model", "experiment.runs_dir": folder / name}
    values |= {"experiment.total_step": steps, "experiment.start_from_scratch": False}
    arguments = [f"config={CONFIG}", *(f"{key}={value}" for key, value in values.items())]
    process = multiprocessing.get_context("fork").Process(target=run, args=(arguments,))
    process.start()
    return process


def run(arguments: list[str]) -> None:
    """What a life does."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 — until the process ends
    rl_trainer.console.quiet = True
    rl_trainer.draw_curves = lambda *_: None  # a picture of the same numbers
    rl_trainer.main(load_config("rl", arguments))


def live_and_die(
    folder: Path, steps: int, values: dict[str, object], step: int, while_writing: bool, rng: random.Random
) -> bool:
    """Run until about `step` and kill; whether a checkpoint was being written then."""
    run_folder = folder / "killed" / "rl_tiny"
    writing = run_folder / "ckpt" / f"step-{step:04d}.writing"
    process = life(folder, "killed", steps, values)
    limit = time.monotonic() + 300

    def reached() -> bool:
        return writing.exists() if while_writing else (run_folder / "rollouts" / f"step-{step:04d}.jsonl").exists()

    while process.is_alive() and not reached() and not past(run_folder, step):
        assert time.monotonic() < limit, f"step {step} was not reached"
        time.sleep(0.0005)
    time.sleep(rng.uniform(0, 0.01 if while_writing else 0.3))
    assert process.exitcode in (None, 0), f"a life failed by itself ({process.exitcode})"
    process.kill()
    process.join()
    return any((run_folder / "ckpt").glob("*.writing"))


def past(run_folder: Path, step: int) -> bool:
    """Whether a checkpoint of a step after `step` is there: the moment was missed, another is as good."""
    return any(int(path.name[5:9]) > step for path in (run_folder / "ckpt").glob("step-????"))


def compare(alone: Path, killed: Path, steps: int) -> None:
    """Assert that two finished runs are the same, but for times."""
    assert untimed(alone) == untimed(killed), "metrics differ"
    for name in ("ckpt/optimized/model.safetensors", f"ckpt/step-{steps:04d}/learner/00001.safetensors"):
        assert (alone / name).read_bytes() == (killed / name).read_bytes(), f"{name} differs"
    for number in range(1, steps + 1):
        name = f"rollouts/step-{number:04d}.jsonl"
        assert (alone / name).read_bytes() == (killed / name).read_bytes(), f"{name} differs"
    assert (alone / "samples.jsonl").read_bytes() == (killed / "samples.jsonl").read_bytes(), "samples.jsonl differs"


def untimed(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if "second" not in key} for row in rows]


if __name__ == "__main__":
    main()
