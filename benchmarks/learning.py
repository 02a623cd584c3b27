"""What each objective learns from the same rollouts: the tiny job, every method, several seeds.

    python -m benchmarks.learning --jobs 2                  # all of it; goes on where it was stopped
    python -m benchmarks.learning --methods TraceRL --steps 3 --runs /tmp/try   # a trial

A seed's methods start from one finetuned checkpoint and draw the same tasks. Accuracy on the held-out tasks is read at
equal rollouts (as many responses as the steps ask for) and at equal seconds of sampling and learning (those of the
seed's fastest method). The table goes to docs/learning.md, the figure to docs/pictures/learning.png.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/rl_tiny.yaml"
RESPONSES = 8  # to a task
MODEL = "{runs}/sft_tiny_sdar_{seed}/ckpt/optimized"
# method: keys beside configs/rl_tiny.yaml; every one predicts each token once or nearly so
METHODS: dict[str, dict[str, object]] = {
    "TraceRL": {},
    "random masking": {"training.method": "random_masking", "training.mask_times_per_sample": 2},
    "coupled": {"training.method": "coupled"},
    "TraceRL + value": {
        "model.value_base_model": MODEL,
        "training.keep_accuracy": "null",
        "optimizer.params.value_learning_rate": 1e-3,
    },
    "sequence level": {"training.method": "coupled", "training.term": "sequence"},
    "DAPO-like": {
        "training.eps_high": 0.28,
        "training.beta": 0,
        "training.keep_accuracy": "null",
        "training.dynamic_sampling": "true",
        "rollout.max_resample": 3,
    },
    "coin flip": {"reward.function": "benchmarks.coin_flip:coin_flip"},
}


@dataclass
class Curve:
    """One run, by evaluation: what had been spent by then and what it gave."""

    rollouts: list[int]
    seconds: list[float]
    accuracy: dict[str, list[float]]  # by sampling setting


def main() -> None:
    options = parse()
    runs = Path(options.runs)
    jobs = [(method, seed) for seed in options.seeds for method in options.methods]
    if not options.table:
        for seed in options.seeds:  # before the jobs, which share it
            finetune(runs, seed)
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda job: train(runs, *job, options), jobs))
    curves = {job: read_curve(folder_of(runs, *job)) for job in jobs if finished(folder_of(runs, *job))}
    if not curves:
        sys.exit("no finished run")
    table = markdown(curves, options)
    print(table)
    target = Path(options.out)
    (target / "pictures").mkdir(parents=True, exist_ok=True)
    (target / "learning.md").write_text(table, encoding="utf-8")
    draw(curves, options.methods, target / "pictures" / "learning.png")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tasks", type=int, default=32, help=f"of a step, {RESPONSES} responses each")
    parser.add_argument("--eval-every", type=int, default=10)
    parser.add_argument("--eval-tasks", type=int, default=0, help="held-out tasks; 0: all")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--runs", default=str(ROOT / "runs"))
    parser.add_argument("--out", default=str(ROOT / "docs"), help="folder of learning.md and pictures/learning.png")
    parser.add_argument("--table", action="store_true", help="only table and figure, of the runs that are finished")
    return parser.parse_args()


def folder_of(runs: Path, method: str, seed: int) -> Path:
    return runs / f"learning_{method.replace(' ', '_').replace('+', 'and')}_{seed}"


def finished(folder: Path) -> bool:
    return (folder / "summary.json").is_file()


def finetune(runs: Path, seed: int) -> None:
    """The checkpoint from which a seed's runs start."""
    if Path(MODEL.format(runs=runs, seed=seed)).is_dir():
        return
    call(
        [sys.executable, "train/sft_sdar.py", "config=configs/sft_tiny.yaml"],
        runs / f"sft_{seed}.log",
        {
            "training.seed": seed,
            "experiment.runs_dir": runs,
            "experiment.project": f"sft_tiny_sdar_{seed}",
        },
    )


def train(runs: Path, method: str, seed: int, options: argparse.Namespace) -> None:
    """One run, unless it is finished; one that was stopped goes on from its last checkpoint."""
    folder = folder_of(runs, method, seed)
    if finished(folder):
        return
    keys = {
        "experiment.project": folder.name,
        "experiment.runs_dir": runs,
        "experiment.start_from_scratch": "false",
        "experiment.total_step": options.steps,
        "experiment.eval_every": options.eval_every,
        "experiment.save_every": options.eval_every,
        "experiment.trackers": "[]",
        "rollout.num_task_per_step": options.tasks,
        "rollout.num_response_per_task": RESPONSES,
        "evaluation.num_task": options.eval_tasks,
        "training.seed": seed,
    }
    own = {key: str(value).format(runs=runs, seed=seed) for key, value in METHODS[method].items()}
    call([sys.executable, "rl.py", f"config={CONFIG}"], runs / f"{folder.name}.log", keys | own)


def call(command: list[str], log: Path, keys: dict[str, object]) -> None:
    """Run a command with keys on one thread, its output in a log; stop where it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output:
        print(f"{log.stem} …", flush=True)
        arguments = [f"{key}={value}" for key, value in keys.items()]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        code = subprocess.run(
            [*command, *arguments], cwd=ROOT, stdout=output, stderr=output, env=environment
        ).returncode
    if code:
        sys.exit(f"{log.stem} failed with exit code {code}; see {log}")


def read_curve(folder: Path) -> Curve:
    """A run's evaluations from metrics.jsonl, beside the rollouts and seconds of the steps before each."""
    rollouts, seconds = 0, 0.0
    curve = Curve([], [], {})
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "reward" in row:
            rollouts += row["groups"] * RESPONSES
            seconds += row["seconds"]
        found = {key.split("/")[1]: value for key, value in row.items() if key.endswith("/accuracy")}
        if found:
            curve.rollouts.append(rollouts)
            curve.seconds.append(seconds)
            for setting, value in found.items():
                curve.accuracy.setdefault(setting, []).append(value)
    return curve


def at(axis: list[float], values: list[float], where: float) -> float:
    """A curve's value at a place on its axis, straight between its points, its last value behind them."""
    return float(np.interp(where, axis, values))


def markdown(curves: dict[tuple[str, int], Curve], options: argparse.Namespace) -> str:
    """The table: per method the mean over seeds, and each seed's own, before and after."""
    settings = list(next(iter(curves.values())).accuracy)
    rollouts = options.steps * options.tasks * RESPONSES
    fastest = {seed: min(curve.seconds[-1] for (_, s), curve in curves.items() if s == seed) for _, seed in curves}
    head = ["method", "seeds"]
    for setting in settings:
        head += [f"{setting}: before → after {rollouts:,} rollouts", f"{setting}: after equal seconds"]
    lines = [[*head, "seconds"], ["---"] * (len(head) + 1)]
    for method in options.methods:
        own = {seed: curve for (name, seed), curve in curves.items() if name == method}
        if not own:
            continue
        cells = [method, str(len(own))]
        for setting in settings:
            before = [curve.accuracy[setting][0] for curve in own.values()]
            after = [at(curve.rollouts, curve.accuracy[setting], rollouts) for curve in own.values()]
            timed = [at(curve.seconds, curve.accuracy[setting], fastest[seed]) for seed, curve in own.items()]
            cells += [f"{shown(before)} → {shown(after)}", shown(timed)]
        cells.append(f"{np.mean([curve.seconds[-1] for curve in own.values()]):.0f}")
        lines.append(cells)
    rows = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"""# What each objective learns on the tiny model

`python -m benchmarks.learning --steps {options.steps} --tasks {options.tasks}`: accuracy in per cent on the held-out
tasks, the mean over seeds and in brackets each seed's. Equal seconds are those of the seed's fastest method, of
sampling and learning alone. Between two evaluations values are read off a straight line.

{rows}

![accuracy by rollouts and by seconds](pictures/learning.png)
"""


def shown(values: list[float]) -> str:
    """Mean and each value, in per cent."""
    each = ", ".join(f"{100 * value:.1f}" for value in values)
    return f"{100 * np.mean(values):.1f} ({each})"


def draw(curves: dict[tuple[str, int], Curve], methods: list[str], path: Path) -> None:
    """Accuracy by rollouts and by seconds, a panel for each setting; thin lines are seeds, thick ones their mean."""
    settings = list(next(iter(curves.values())).accuracy)
    figure, axes = plt.subplots(len(settings), 2, figsize=(12, 4 * len(settings)), sharey="row", squeeze=False)
    for row, setting in enumerate(settings):
        for column, name in enumerate(("rollouts", "seconds")):
            axis = axes[row][column]
            for number, method in enumerate(methods):
                own = [curve for (one, _), curve in curves.items() if one == method]
                if not own:
                    continue
                lines = [(getattr(curve, name), [100 * value for value in curve.accuracy[setting]]) for curve in own]
                for x, y in lines:
                    axis.plot(x, y, color=f"C{number}", linewidth=0.6, alpha=0.4)
                grid = np.linspace(0, min(x[-1] for x, _ in lines), 50)
                mean = np.mean([np.interp(grid, x, y) for x, y in lines], axis=0)
                axis.plot(grid, mean, color=f"C{number}", linewidth=2, label=method)
            axis.set_xlabel("responses drawn" if name == "rollouts" else "seconds of sampling and learning")
            axis.set_ylabel(f"accuracy, {setting} (%)")
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
