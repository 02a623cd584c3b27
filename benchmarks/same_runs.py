"""Whether two checkouts of this project do the same: python -m benchmarks.same_runs BEFORE AFTER [--families sdar …]

For every family a tiny model is finetuned, evaluated and trained by RL in both, with the same seed, and what the runs
wrote is compared: weights bit for bit, metrics, samples and results but for times. A run that BEFORE stopped half-way
is then resumed by AFTER, which must end with the same weights. For a rewrite that is to change nothing.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FAMILIES = ("sdar", "trado", "dream", "llada", "mmada")
TIMES = re.compile(r"seconds.*|.*tokens_per_second|versions")  # keys that may differ
STEPS, SAVED = 4, 2  # RL steps of a run, and the step of the checkpoint that is resumed
SHORT = {
    "sft_tiny": ["training.max_steps=24", "training.eval_every=12", "training.stop_at_accuracy=null"],
    "eval_tiny": ["rollout.num_task=24"],
    "rl_tiny": [
        f"experiment.total_step={STEPS}",
        f"experiment.save_every={SAVED}",
        "experiment.keep_last=9",
        "rollout.num_task_per_step=8",
        "training.keep_accuracy=null",
    ],
}


def main() -> None:
    """Compare the checkouts; exit code 1 where they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--families", nargs="+", default=FAMILIES)
    parser.add_argument("--value", action="store_true", help="RL with a value model too")
    arguments = parser.parse_args()
    checkouts = {"before": arguments.before.resolve(), "after": arguments.after.resolve()}
    different = 0
    with tempfile.TemporaryDirectory() as folder:
        for family in arguments.families:
            for name, checkout in checkouts.items():
                run_jobs(checkout, Path(folder, name), family, arguments.value)
            resume(checkouts["after"], Path(folder), family)
            lines = differences(Path(folder, "before"), Path(folder, "after"))
            files = len(written(Path(folder, "after")))
            different += len(lines)
            print(f"{family}: {files} files, {len(lines)} differ", *lines, sep="\n  ", flush=True)
            for name in checkouts:
                shutil.rmtree(Path(folder, name))
    sys.exit(bool(different))


def run_jobs(checkout: Path, runs: Path, family: str, value: bool) -> None:
    """Finetune, evaluate and train a tiny model of the family; what they write lies in `runs`."""
    model = runs / f"sft_tiny_{family}_1" / "ckpt" / "optimized"
    common = [f"experiment.runs_dir={runs}"]
    evaluated = ["evaluation.num_task=24"]
    script = [f"train/sft_{family}.py", "config=configs/sft_tiny.yaml"]
    run(checkout, [*script, *common, *SHORT["sft_tiny"], *evaluated])
    run(checkout, ["eval.py", "config=configs/eval_tiny.yaml", f"model_base={family}", *common, *SHORT["eval_tiny"]])
    rl = ["rl.py", "config=configs/rl_tiny.yaml", f"model.model_base={family}", *common, *SHORT["rl_tiny"], *evaluated]
    run(checkout, rl)
    if value:
        run(checkout, [*rl, "experiment.project=rl_value", f"model.value_base_model={model}"])


def resume(checkout: Path, folder: Path, family: str) -> None:
    """Let `checkout` go on from a checkpoint in the middle of the RL run that the other made."""
    source, target = folder / "before" / "rl_tiny", folder / "after" / "resumed"
    shutil.copytree(source, target)
    for path in (target / "ckpt").iterdir():
        if path.name != f"step-{SAVED:04d}":
            shutil.rmtree(path)
    shutil.copytree(source, folder / "before" / "resumed")
    arguments = [f"model.model_base={family}", f"experiment.runs_dir={folder / 'after'}", *SHORT["rl_tiny"]]
    arguments += ["experiment.project=resumed", "experiment.start_from_scratch=False", "evaluation.num_task=24"]
    run(checkout, ["rl.py", "config=configs/rl_tiny.yaml", *arguments])


def run(checkout: Path, command: list[str]) -> None:
    """Run a script of the checkout on one thread, in its own folder."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(f"{checkout}: {' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def written(runs: Path) -> dict[str, Path]:
    """What is compared of all runs: weights, JSON, and the configs."""
    files = [path for path in runs.rglob("*") if path.suffix in (".safetensors", ".json", ".jsonl", ".yaml")]
    return {str(path.relative_to(runs)): path for path in sorted(files)}


def differences(before: Path, after: Path) -> list[str]:
    """A line for every file that is not the same in both."""
    theirs, ours = written(before), written(after)
    lines = [f"{name}: only {'after' if name in ours else 'before'}" for name in sorted(theirs.keys() ^ ours.keys())]
    for name in sorted(theirs.keys() & ours.keys()):
        one, other = content(theirs[name], before), content(ours[name], after)
        if one != other:
            lines.append(f"{name}: {first_difference(one, other)}")
    return lines


def content(path: Path, runs: Path) -> Any:
    """What of a file must be the same: a hash of weights, lines of text without times and without the runs' folder."""
    if path.suffix == ".safetensors":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    text = path.read_text(encoding="utf-8").replace(str(runs), "RUNS").replace("RUNS/resumed", "RUNS/rl_tiny")
    if path.suffix == ".yaml":
        return [line for line in text.splitlines() if "project:" not in line and "start_from_scratch:" not in line]
    if path.suffix == ".json":
        return without_times(json.loads(text))
    return [without_times(json.loads(line)) for line in text.splitlines()]


def without_times(value: Any) -> Any:
    """A JSON value without the keys of TIMES."""
    if isinstance(value, dict):
        return {key: without_times(one) for key, one in value.items() if not TIMES.fullmatch(key)}
    return [without_times(one) for one in value] if isinstance(value, list) else value


def first_difference(one: Any, other: Any) -> str:
    """Where two values part, in a line."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in dict.fromkeys([*one, *other]):
            if one.get(key) != other.get(key):
                return f"{key}: {first_difference(one.get(key), other.get(key))}"
    if isinstance(one, list) and isinstance(other, list):
        for number, (left, right) in enumerate(zip(one, other)):
            if left != right:
                return f"[{number}] {first_difference(left, right)}"
        return f"{len(one)} against {len(other)} entries"
    return f"{str(one)[:80]} against {str(other)[:80]}"


if __name__ == "__main__":
    main()
