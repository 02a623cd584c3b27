"""Some RL steps of the whole job at a published shape with random weights, and the share of each stage.

    python -m benchmarks.rl_steps --shape 1.7b --steps 20 [--out FILE] [key=value …]

The network has the tiny model's tokenizer, filled up with words that mean nothing, the tasks are arithmetic, the reward
is a coin flip: nothing is learned, but every part of rl.py runs. Without --shape the largest shape that the GPU's
memory holds is taken.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.cost_model import GIB, memory_of
from benchmarks.shapes import SHAPES, make_network
from common.memory import size_of
from common.metrics import print_table
from models.tiny import build_tiny

ROOT = Path(__file__).resolve().parents[1]
CANDIDATES = ("1.7b", "0.6b", "mini")  # the first that fits
RESERVE = 10 * GIB  # for the sampler's cache and draw
STAGES = ("rollout", "reward", "train", "sync", "other")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rl_steps", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=[name for name in SHAPES if name != "tiny"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, help="write the table's row to this file too, as JSON")
    parser.add_argument("keys", nargs="*", metavar="key=value", help="of configs/rl_tiny.yaml")
    options = parser.parse_args()
    shape = options.shape or fitting_shape()
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(shape, Path(folder) / "model")
        keys = {
            "model.pretrained_model": f"{folder}/model",
            "model.dtype": "auto",
            "training.gradient_checkpointing_enable": "True",
            "training.keep_accuracy": "null",
            "reward.function": "benchmarks.coin_flip:coin_flip",
            "reward.truncated_is_wrong": "False",
            "rollout.remasking_strategy": "low_confidence_static",
            "rollout.max_token": 128,
            "rollout.num_task_per_step": 16,
            "experiment.runs_dir": folder,
            "experiment.project": "steps",
            "experiment.total_step": options.steps,
            "experiment.eval_every": 0,
            "experiment.save_every": 0,
            "evaluation.num_task": 8,
            "evaluation.remasking_strategy": "low_confidence_static",
            "experiment.trackers": "[]",
        }
        command = [sys.executable, "rl.py", "config=configs/rl_tiny.yaml", *(f"{k}={v}" for k, v in keys.items())]
        if code := subprocess.run([*command, *options.keys], cwd=ROOT).returncode:
            sys.exit(code)
        row = {"shape": shape} | figures(Path(folder) / "steps" / "metrics.jsonl")
    print_table([row])
    if options.out:
        options.out.write_text(json.dumps([row]), encoding="utf-8")


def fitting_shape() -> str:
    """The largest candidate whose training and sampling the GPU holds; the smallest on the processor."""
    if not torch.cuda.is_available():
        return CANDIDATES[-1]
    room = torch.cuda.mem_get_info()[0] - RESERVE
    needs = {shape: sum(memory_of(size_of(SHAPES[shape]), "full", 16384, 0).values()) for shape in CANDIDATES}
    return next(shape for shape in CANDIDATES if needs[shape] < room or shape == CANDIDATES[-1])


def make_checkpoint(shape: str, folder: Path) -> None:
    """A folder with the shape's network, weights random, and a tokenizer that has a word for every id."""
    build_tiny("sdar", folder, seed=0)
    tiny = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model, _ = make_network(shape, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for key in ("mask_token_id", "eos_token_id", "pad_token_id", "block_size"):
        setattr(model.config, key, tiny[key])
    model.save_pretrained(folder, max_shard_size="100GB")  # one file, which takes the tiny one's place
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    words = tokenizer["model"]["vocab"]
    words |= {f"<{id}>": id for id in range(len(words), model.config.vocab_size)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")


def figures(metrics: Path) -> dict[str, float]:
    """Means over the steps but the first, which compiles: seconds of a step, the share of each stage, tokens."""
    steps = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps = [step for step in steps if "seconds_rollout" in step]
    later = steps[1:] or steps
    total = sum(step["seconds"] for step in later)
    shares = {f"{stage} %": 100 * sum(step[f"seconds_{stage}"] for step in later) / total for stage in STAGES}
    return {
        "steps": len(steps),
        "seconds a step": total / len(later),
        "first step": steps[0]["seconds"],
        "rollout tokens/s": sum(step["tokens_per_second"] for step in later) / len(later),
        **shares,
        "largest mismatch": max(step["logp_diff_max"] for step in steps),
    }


if __name__ == "__main__":
    main()
