"""What editing gives: the tiny model finetuned to edit, sampled by every strategy, before and after TraceRL on edits.

    python -m benchmarks.editing --jobs 2            # all of it; goes on where it was stopped
    python -m benchmarks.editing --table             # only table and picture, of what is there

A seed's chain is one process of one thread: the base of `configs/sft_tiny.yaml`; from it as many updates without
corruption (the control), with uniform corruption and with the model's own; and from those of --rl TraceRL whose
rollouts are drawn by `edit`. Every model answers the same held-out tasks at temperature 1 under every setting. What is
there already in --runs is not made again. The table goes between its two marks in docs/editing.md, the picture to
docs/pictures/. With --block-size 16 --updates 250 --runs runs/editing_16 the same for larger blocks, finetuned anew.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- begin: benchmarks/editing.py, blocks of {} -->", "<!-- end -->"
CORRUPTION = {"control": [], "uniform": ["training.corrupt_p=0.2"]}
CORRUPTION["model"] = ["training.corrupt_p=0.5", "training.corrupt_from=model"]
ROLLOUT = {"remasking_strategy": "edit", "dynamic_threshold": 0.7, "edit_threshold": 0.5}  # LLaDA2.1's careful mode
SETTINGS: dict[str, dict[str, object]] = {
    "dynamic 0.9": {"remasking_strategy": "low_confidence_dynamic", "dynamic_threshold": 0.9},
    "dynamic 0.7": {"remasking_strategy": "low_confidence_dynamic", "dynamic_threshold": 0.7},
    "dynamic 0.5": {"remasking_strategy": "low_confidence_dynamic", "dynamic_threshold": 0.5},
    "edit 0.9, 0.9": {"remasking_strategy": "edit", "dynamic_threshold": 0.9, "edit_threshold": 0.9},
    "edit 0.7, 0.5": ROLLOUT,
    "edit 0.5, 0.0": {"remasking_strategy": "edit", "dynamic_threshold": 0.5, "edit_threshold": 0.0},  # its fast mode
    "revoke 0.6, 0.9": {"remasking_strategy": "revoke", "dynamic_threshold": 0.6, "revoke_threshold": 0.9},
    "factor 1": {"remasking_strategy": "factor", "factor": 1.0},
    "hierarchical 0.9, 0.62": {"remasking_strategy": "hierarchical", "dynamic_threshold": 0.9, "low_threshold": 0.62},
}


def main() -> None:
    options = parse()
    if options.one is not None:
        run_seed(options.one, options)
        return
    if not options.table:
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda seed: start(seed), options.seeds))
    found = read_results(options)
    if not found:
        sys.exit("no results yet")
    table = markdown(found, options)
    print(table)
    target = Path(options.out)
    page = target / "editing.md"
    text = page.read_text(encoding="utf-8")
    begin = BEGIN.format(options.block_size)
    before, behind = text.split(begin)[0], text.split(begin)[1].split(END, 1)[1]
    page.write_text(f"{before}{begin}\n{table}\n{END}{behind}", encoding="utf-8")
    draw(found, target / "pictures" / f"editing_{options.block_size}.png")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--block-size", type=int, default=4, help="of finetuning and sampling; the base has 4")
    parser.add_argument("--updates", type=int, default=120, help="of finetuning from the base")
    parser.add_argument("--models", nargs="+", default=list(CORRUPTION), choices=CORRUPTION)
    parser.add_argument("--rl", nargs="*", default=["uniform"], choices=CORRUPTION, help="which of them learn further")
    parser.add_argument("--steps", type=int, default=20, help="of reinforcement learning")
    parser.add_argument("--tasks", type=int, default=32, help="of such a step, 8 responses each")
    parser.add_argument("--eval-tasks", type=int, default=300, help="held-out tasks")
    parser.add_argument("--jobs", type=int, default=2, help="seeds side by side, one thread each")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "editing")
    parser.add_argument("--out", default=str(ROOT / "docs"), help="folder of editing.md and pictures/")
    parser.add_argument("--table", action="store_true", help="only table and picture")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def start(seed: int) -> None:
    """A seed's chain in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.editing", *sys.argv[1:], "--one", str(seed)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"seed {seed} ended with code {done.returncode}")


# ---- the chain of one seed


def run_seed(seed: int, options: argparse.Namespace) -> None:
    """Make the seed's models, one after another, and measure each as soon as it is there."""
    base = options.runs / f"sft_tiny_sdar_{seed}" / "ckpt" / "optimized"
    if not base.is_dir():
        finetune(seed, options, base.parents[1].name, [])
    for name in options.models:
        project = f"{name}_{seed}"
        keys = [
            f"model.pretrained_model={base}",
            f"training.max_steps={options.updates}",
            f"training.block_size={options.block_size}",
            f"training.eval_every={options.updates}",
            "training.stop_at_accuracy=null",
            "evaluation.num_task=8",
            "optimizer.params.learning_rate=5e-4",
            "lr_scheduler.params.warmup_steps=10",
            *CORRUPTION[name],
        ]
        finetune(seed, options, project, keys)
        measure(project, seed, options)
    for name in options.rl:
        project = f"{name}_rl_{seed}"
        reinforce(seed, options, project, options.runs / f"{name}_{seed}" / "ckpt" / "optimized")
        measure(project, seed, options)


def finetune(seed: int, options: argparse.Namespace, project: str, keys: list[str]) -> None:
    """One finetuning by the tiny config, unless its model is there."""
    from common.config import load_config
    from train import sft_trainer

    if not (options.runs / project / "ckpt" / "optimized").is_dir():
        own = [*run_keys(seed, options, project), "experiment.save_every=40", *keys]
        sft_trainer.finetune(load_config("sft", ["config=configs/sft_tiny.yaml", *own]))


def reinforce(seed: int, options: argparse.Namespace, project: str, start_from: Path) -> None:
    """TraceRL whose rollouts edit, unless its model is there."""
    from common.config import load_config
    from train import rl_trainer

    if (options.runs / project / "ckpt" / "optimized").is_dir():
        return
    keys = [
        "config=configs/rl_tiny.yaml",
        *run_keys(seed, options, project),
        f"model.pretrained_model={start_from}",
        "model.made_by=null",
        f"experiment.total_step={options.steps}",
        "experiment.eval_every=0",
        "experiment.save_every=5",
        f"rollout.num_task_per_step={options.tasks}",
        f"rollout.block_size={options.block_size}",
        "evaluation.num_task=8",
        *(f"rollout.{key}={value}" for key, value in ROLLOUT.items()),
    ]
    rl_trainer.reinforce(load_config("rl", keys))


def run_keys(seed: int, options: argparse.Namespace, project: str) -> list[str]:
    """What both trainers' configs set beside the model: where the run lies, and to go on where it was stopped."""
    return [
        f"training.seed={seed}",
        f"experiment.runs_dir={options.runs}",
        f"experiment.project={project}",
        "experiment.trackers=[]",
        "experiment.start_from_scratch=False",
    ]


def measure(project: str, seed: int, options: argparse.Namespace) -> None:
    """Accuracy, tokens per forward and edits of a model under every setting, into one file for each."""
    from common.config import load_config
    from common.schema import TaskSampling
    from data.tasks import load_tasks
    from models import load_model
    from reward.score import make_scorer
    from rollout.collect import encode_tasks
    from rollout.evaluate import evaluate_setting
    from sample.engine import Engine

    missing = [name for name in SETTINGS if not result_file(options.runs, project, name).is_file()]
    if not missing:
        return
    folder = options.runs / project / "ckpt" / "optimized"
    config = load_config("eval", ["config=configs/eval_tiny.yaml", f"model={folder}", "made_by=null"])
    loaded = load_model(folder, "sdar")
    tasks = load_tasks("arithmetic_4_test", key="dataset.eval_dataset")[: options.eval_tasks]
    prompts, scorer = encode_tasks(loaded, tasks, config.dataset, False), make_scorer(config.reward, "math")
    engine = Engine(loaded.model, loaded.mask_id, loaded.stop_ids)
    for name in missing:
        size = options.block_size  # as many steps: dynamic unmasks at least one token a forward, as edit does
        sizes = {"max_token": 40, "block_size": size, "denoising_steps_per_block": size}
        setting = TaskSampling(temperature=1.0, **sizes, **SETTINGS[name])
        found, drawn = evaluate_setting(engine, loaded, prompts, name, setting, scorer, 4096, seed)
        tokens = sum(len(one.trajectory.response_ids) for one in drawn)
        again = sum(len(one.trajectory.overwritten) for one in drawn)  # a revoked token counts twice
        result = {"accuracy": found.accuracy, "tpf": found.tokens_per_forward, "overwritten": again / tokens}
        result_file(options.runs, project, name).write_text(json.dumps(result))


def result_file(runs: Path, project: str, setting: str) -> Path:
    return runs / f"{project}-{setting.replace(', ', '_').replace(' ', '_')}.json"


# ---- table and picture


def read_results(options: argparse.Namespace) -> dict[str, dict[str, list[dict[str, float]]]]:
    """By model and setting the results of the seeds that have them."""
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for name in [*options.models, *(f"{name}_rl" for name in options.rl)]:
        for setting in SETTINGS:
            files = [result_file(options.runs, f"{name}_{seed}", setting) for seed in options.seeds]
            if own := [json.loads(file.read_text()) for file in files if file.is_file()]:
                found.setdefault(name, {})[setting] = own
    return found


def markdown(found: dict[str, dict[str, list[dict[str, float]]]], options: argparse.Namespace) -> str:
    """A row for each setting, a column for each model: accuracy with each seed's, tokens per forward, overwritten."""
    titles = {"control": "control", "uniform": "uniform corruption", "model": "the model's own draws"}
    titles |= {f"{name}_rl": f"{title}, then TraceRL" for name, title in titles.items()}
    lines = ["| setting | " + " | ".join(titles[name] for name in found) + " |", "|---" * (1 + len(found)) + "|"]
    for setting in SETTINGS:
        cells = []
        for own in found.values():
            seeds = own.get(setting, [])
            each = ", ".join(f"{100 * one['accuracy']:.1f}" for one in seeds)
            mean = {key: np.mean([one[key] for one in seeds]) for key in (seeds[0] if seeds else {})}
            again = f"; {100 * mean['overwritten']:.1f} %" if seeds and mean["overwritten"] else ""
            cells.append(f"{100 * mean['accuracy']:.1f} ({each}); {mean['tpf']:.2f}{again}" if seeds else "not run")
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(found: dict[str, dict[str, list[dict[str, float]]]], path: Path) -> None:
    """Accuracy against tokens per forward, a panel for each model, the mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(4.5 * len(found), 4), sharey=True, sharex=True, squeeze=False)
    for axis, (name, own) in zip(axes[0], found.items()):
        kinds = list(dict.fromkeys(setting.split()[0] for setting in SETTINGS))
        for color, kind in enumerate(kinds):
            points = [seeds for setting, seeds in own.items() if setting.split()[0] == kind]
            x, y = ([np.mean([one[key] for one in seeds]) for seeds in points] for key in ("tpf", "accuracy"))
            axis.plot(x, [100 * value for value in y], marker="o", color=f"C{color}", label=kind)
        axis.set_title(name.replace("_rl", ", then TraceRL"))
        axis.set_xlabel("tokens per forward")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("accuracy (%)")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
