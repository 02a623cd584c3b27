"""Every method of finetuning on the tiny models: what it learns, and what learning from a model's own traces changes.

    python -m benchmarks.sft_methods [--families sdar dream llada] [--updates 600] [--jobs 2] [--table FILE]

Each job is a process of one thread; one whose result lies in --out is not run again. `trace` and `own answers` start
from the family's base method: its right answers to training tasks are learned by their traces, or by the base method
again as the control. The table goes to the terminal, or between its two marks in --table.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.config import load_config
from common.metrics import read_rows

ROOT = Path(__file__).resolve().parents[1]
BASE = {"sdar": "semi-ar", "trado": "semi-ar"} | dict.fromkeys(("dream", "llada", "mmada"), "random_masking")
FIRST = {
    "block": [("semi-ar", []), ("semi-ar, elbo", ["training.loss_weight=elbo", "training.lower_p=0.05"])],
    "full": [("random_masking", []), ("semi-ar", ["training.block_size=10"])],
}
FROM_BASE = ("trace", "own answers")
SAMPLES = "samples"
BEGIN, END = "<!-- begin: benchmarks/sft_methods.py -->", "<!-- end -->"
BOTH = "[low_confidence_dynamic,low_confidence_static]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["sdar", "dream", "llada"], choices=list(BASE))
    parser.add_argument("--updates", type=int, default=600, help="of the methods that start from nothing")
    parser.add_argument("--trace-updates", type=int, default=150, help="of those that start from the base method")
    parser.add_argument("--trace-tasks", type=int, default=400, help="training tasks that are answered for them")
    parser.add_argument("--eval-tasks", type=int, default=200, help="held-out tasks")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--out", type=Path, default=Path("runs/sft_methods"))
    parser.add_argument("--table", type=Path, help="a Markdown file that has the two marks")
    parser.add_argument("--one", nargs=2, metavar=("FAMILY", "METHOD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        run_one(*args.one, args)
        return
    for jobs in stages(args.families):
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda job: start(*job), [job for job in jobs if not result_file(args.out, *job).exists()]))
    write_table([job for jobs in stages(args.families) for job in jobs if job[1] != SAMPLES], args)


def stages(families: list[str]) -> list[list[tuple[str, str]]]:
    """(family, method) of the jobs: those that start from nothing, samples of the first ones' models, the others."""
    first = [(family, name) for family in families for name, _ in first_methods(family)]
    return [
        first,
        [(family, SAMPLES) for family in families],
        [(family, method) for family in families for method in FROM_BASE],
    ]


def first_methods(family: str) -> list[tuple[str, list[str]]]:
    """The family's methods that need no traces, with what their configs set."""
    block = family in ("sdar", "trado")
    return FIRST["block" if block else "full"] + ([("ar", [])] if family == "dream" else [])


def start(family: str, method: str) -> None:
    """One job in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.sft_methods", *sys.argv[1:], "--one", family, method]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{family} {method} ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    print(f"{family} {method}: done", flush=True)


def run_one(family: str, method: str, args: argparse.Namespace) -> None:
    """Finetune, evaluate on held-out tasks and write the job's result."""
    from train.sft_trainer import finetune

    if method == SAMPLES:
        draw_samples(family, args)
        return
    options, updates = dict(first_methods(family)).get(method, []), args.updates
    if method in FROM_BASE:
        updates = args.trace_updates
        options = [
            f"model.pretrained_model={model_folder(args.out, family, BASE[family])}",
            f"dataset.optimization_data={args.out / f'{family}-samples' / 'samples.jsonl'}",
            "dataset.correct_only=true",
            "optimizer.params.learning_rate=3e-4",
        ]
    name = {"trace": "trace", "own answers": BASE[family]}.get(method, method.split(",")[0])
    config = load_config(
        "sft",
        [
            "config=configs/sft_tiny.yaml",
            f"model.model_base={family}",
            f"training.method={name}",
            f"training.seed={args.seed}",
            f"training.max_steps={updates}",
            f"training.eval_every={updates}",
            "training.stop_at_accuracy=null",
            "lr_scheduler.scheduler=linear",
            "lr_scheduler.params.min_lr_scale=0.1",
            f"dataset.eval_dataset={tasks_of(family, 'test')}",
            f"evaluation.num_task={args.eval_tasks}",
            f"evaluation.remasking_strategy={BOTH}",
            f"experiment.runs_dir={args.out}",
            f"experiment.project={folder_name(family, method)}",
            "experiment.trackers=[]",
            *options,
        ],
    )
    finetune(config)
    rows = read_rows(args.out / folder_name(family, method) / "metrics.jsonl")
    losses, share = [row["loss"] for row in rows], max(1, len(rows) // 20)
    result = {key: value for key, value in rows[-1].items() if key.startswith("eval/")}
    result |= {"first": statistics.mean(losses[:share]), "last": statistics.mean(losses[-share:]), "updates": len(rows)}
    result_file(args.out, family, method).write_text(json.dumps(result))


def draw_samples(family: str, args: argparse.Namespace) -> None:
    """Two responses of the base model to each of some training tasks, drawn by dynamic sampling."""
    from rollout.evaluate import main as evaluate

    config = load_config(
        "eval",
        [
            "config=configs/eval_tiny.yaml",
            f"model_base={family}",
            f"model={model_folder(args.out, family, BASE[family])}",
            "made_by=null",
            f"seed={args.seed}",
            f"dataset.eval_dataset={tasks_of(family, 'train')}",
            f"rollout.num_task={args.trace_tasks}",
            "rollout.num_response_per_task=2",
            "rollout.remasking_strategy=low_confidence_dynamic",
            f"experiment.runs_dir={args.out}",
            f"experiment.project={family}-samples",
        ],
    )
    results = evaluate(config)
    result = {name: one.accuracy for name, one in results.items()}
    result_file(args.out, family, SAMPLES).write_text(json.dumps(result))


def tasks_of(family: str, split: str) -> str:
    return f"arithmetic_{4 if family in ('sdar', 'trado') else 3}_{split}"


def folder_name(family: str, method: str) -> str:
    return f"{family}-{method.replace(', ', '-').replace(' ', '-')}"


def model_folder(out: Path, family: str, method: str) -> Path:
    return out / folder_name(family, method) / "ckpt" / "optimized"


def result_file(out: Path, family: str, method: str) -> Path:
    return out / f"{folder_name(family, method)}.json"


def write_table(jobs: list[tuple[str, str]], args: argparse.Namespace) -> None:
    """One line a job, in the order of families."""
    head = "| family | method | updates | loss, first → last | dynamic | static | tokens per forward (dynamic) |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for family, method in sorted(jobs, key=lambda job: args.families.index(job[0])):
        one = json.loads(result_file(args.out, family, method).read_text())
        accuracy = [f"{100 * one[f'eval/{setting}/accuracy']:.1f} %" for setting in ("dynamic", "static")]
        start = f", from {BASE[family]}" if method in FROM_BASE else ""
        loss = f"{one['first']:.2f} → {one['last']:.2f}"
        speed = f"{one['eval/dynamic/tokens_per_forward']:.2f}"
        lines.append(f"| {' | '.join([family, method + start, str(one['updates']), loss, *accuracy, speed])} |")
    table = "\n".join(lines)
    print(table)
    if args.table:
        text = args.table.read_text(encoding="utf-8")
        before, behind = text.split(BEGIN)[0], text.split(BEGIN)[1].split(END, 1)[1]
        args.table.write_text(f"{before}{BEGIN}\n{table}\n{END}{behind}", encoding="utf-8")


if __name__ == "__main__":
    main()
