"""What a rank holds while a mixture is loaded, given an optimizer and copied for the sampler, under ZeRO-3.

    python -m benchmarks.loading                          # two CPU processes, a scaled-down SDAR-30B-A3B
    python -m benchmarks.loading --accelerate 1_node_8_gpus_deepspeed_zero3 --model PATH --tensor-parallel 4

The very functions that rl.py calls. Printed for each stage and rank: what is held after it and the most that was held
within it, less what the process held before, as bytes for each of the network's parameters. On a CPU that is the
process's memory, pages of the checkpoint's file that it has mapped among them.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from common import ranks
from common.config import load_config
from common.metrics import print_table
from models import load_network
from models.tiny import build_tiny
from train.loading import engine_model, load_trained, policy_learner
from train.run import begin

ROOT = Path(__file__).resolve().parents[1]
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def main() -> None:
    options = parse()
    if options.rank_of:
        small, model = options.rank_of
        measure(small, options.tensor_parallel)  # what is imported and made once is not counted
        print_measured(*measure(model, options.tensor_parallel))
        return
    with tempfile.TemporaryDirectory() as folder:
        small = make_checkpoint(Path(folder) / "small", 64)
        model = options.model or make_checkpoint(Path(folder) / "large", options.width)
        file = ROOT / "accelerate_configs" / f"{options.accelerate}.yaml"
        launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(file)]
        own = ["--rank-of", small, model, "--tensor-parallel", str(options.tensor_parallel)]
        command = [sys.executable, *launch, "--module", "benchmarks.loading", *map(str, own)]
        # what is freed is given back, so that a CPU process's memory is what its tensors take
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"})
    sys.exit(done.returncode)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a checkpoint of family sdar_moe; none: one is made")
    parser.add_argument("--width", type=int, default=1536, help="of the one that is made")
    parser.add_argument("--accelerate", default="1_node_2_cpus_deepspeed_zero3", help="of accelerate_configs/")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="ranks that share a sampler")
    parser.add_argument("--rank-of", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_checkpoint(folder: Path, width: int) -> Path:
    """A random mixture in bfloat16, and its folder."""
    build_tiny("sdar_moe", folder / "float32", seed=1, width=width)
    network = load_network(folder / "float32", "sdar_moe", torch.bfloat16)
    for file in (folder / "float32").glob("tokenizer*"):
        (folder / "bfloat16").mkdir(exist_ok=True)
        (folder / "bfloat16" / file.name).write_bytes(file.read_bytes())
    network.save_pretrained(folder / "bfloat16")
    return folder / "bfloat16"


def measure(model: str, tensor_parallel: int) -> tuple[int, list[tuple[str, int, int]]]:
    """Of this rank: the network's parameters, and stage by stage the bytes held after it and at most within it."""
    keys = {"model.pretrained_model": model, "model.model_base": "sdar_moe", "model.dtype": "bfloat16"}
    keys |= {"rollout.tensor_parallel_size": tensor_parallel}
    config = load_config("rl", [f"config={ROOT}/configs/rl_tiny.yaml", *(f"{k}={v}" for k, v in keys.items())])
    begin(config)
    start, rows, made = held()[0], [], []
    for stage, make in (
        ("the trained network", lambda: load_trained(config.model, config.training, model)),
        ("its optimizer", lambda: policy_learner(config, made[0], 10)),
        ("the sampler's network", lambda: engine_model(config, *made)),
    ):
        forget_peak()
        made.append(make())
        now, peak = held()
        rows.append((stage, now - start, peak - start))
    return sum(getattr(one, "ds_numel", one.numel()) for one in made[0].model.parameters()), rows


def print_measured(parameters: int, rows: list[tuple[str, int, int]]) -> None:
    """The table of all ranks, by the first."""
    table = [
        {
            "after": stage,
            "rank": rank,
            "held, bytes a parameter": f"{now / parameters:.2f}",
            "most within": f"{peak / parameters:.2f}",
            "GB at most": f"{peak / 1e9:.2f}",
        }
        for rank, own in enumerate(ranks.gather(rows))
        for stage, now, peak in own
    ]
    if ranks.is_main():
        print_table(table, title=f"{parameters / 1e6:.0f} M parameters, {ranks.world()} ranks")


def held() -> tuple[int, int]:
    """Bytes that are held now, and the most since `forget_peak`: the GPU's, or this process's where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return tuple(1024 * int(lines[name].split()[0]) for name in ("VmRSS", "VmHWM"))


def forget_peak() -> None:
    """The most that is held is counted from now on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        CLEAR.write_text("5")


if __name__ == "__main__":
    main()
