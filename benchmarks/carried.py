"""What it does to a run that its responses outlive their steps: python -m benchmarks.carried {waiting,accuracy}

    python -m benchmarks.carried waiting                  # two ranks, some responses twenty times longer than the rest
    python -m benchmarks.carried accuracy --seeds 1 2 3   # whatever is missing in RESULTS, then the table

`waiting` runs RL steps of an untrained tiny network in two processes, with and without `rollout.carry`. How long a
response is follows from its random numbers' key. Printed is the share of the slots' time in which they drew nothing, by
the clock and by forwards (of the rank that makes the most in an RL step), and how many tokens were trained on for each
second of the rollout and each such forward.

`accuracy` runs the tiny job from each seed's one finetuned model. Each run that ends is a line of RESULTS; `seconds`
are of the processor, in all steps, `wall` by the clock.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from benchmarks.learning import PARTS, Curve, arguments, finetune, measure, model_of
from common.config import load_config
from common.metrics import print_table
from common.ranks import gather, is_main
from common.runtime import Stopwatch
from models.tiny import build_tiny
from rollout.statistics import mean_and_error
from sample.engine import Engine
from sample.step import Step
from train import rl_trainer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("carried.jsonl")
SHORT, LONG, ONE_IN = 16, 320, 24  # tokens of responses; of so many one is long
TASKS, RESPONSES, STEPS, FIRST = 4, 4, 16, 4  # of a step; RL steps, and those before what is counted
COIN = {"reward.function": "benchmarks.coin_flip:coin_flip", "reward.truncated_is_wrong": False}
VARIANTS: dict[str, dict[str, object]] = {
    "waits": {},
    "carry": {"rollout.carry": True, "training.tis_cap": 2.0},
    "carry, a quarter at once": {"rollout.carry": True, "training.tis_cap": 2.0, "rollout.in_flight": 32},
    "spare": {"rollout.spare": 4},
}


# ---- waiting


class GivenLengths(Step):
    """Ends a response where its key says, not at stop tokens."""

    def stop(self, tokens: Tensor) -> Tensor:
        """True of the last token of each response, (rows, block)."""
        slots = self.slots.first(len(tokens))
        wanted = torch.where(slots.key % ONE_IN == 0, LONG, SHORT)
        return slots.block_start[:, None] + self.block - slots.prompt_end[:, None] >= wanted[:, None] - 1


class TimedEngine(Engine):
    """Counts its forwards, and the seconds and forwards of its responses."""

    step_class = GivenLengths
    forwards = drawn = 0
    drawing = 0.0

    def step(self) -> bool:
        """As Engine's."""
        began = time.perf_counter()
        stepped = super().step()
        responses = len(self.rows())
        TimedEngine.forwards += 1
        TimedEngine.drawn += responses
        TimedEngine.drawing += responses * (time.perf_counter() - began)
        return stepped


def waiting() -> None:
    """Run both ways, and print what came of it."""
    rows = []
    for name, keys in {"waits": {}, "carry": {"rollout.carry": True, "rollout.max_stale_steps": 16}}.items():
        with tempfile.TemporaryDirectory() as folder:
            build_tiny("sdar", Path(folder, "model"), seed=3)
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            context = multiprocessing.get_context("fork")
            ranks = [context.Process(target=draw_on, args=(rank, port, Path(folder), keys)) for rank in (0, 1)]
            for process in ranks:
                process.start()
            for process in ranks:
                process.join()
            rows.append({"": name} | json.loads(Path(folder, "result.json").read_text()))
    print_table(rows, title=f"two ranks, one in {ONE_IN} responses of {LONG} tokens, the others of {SHORT}")


def draw_on(rank: int, port: int, folder: Path, keys: dict[str, object]) -> None:
    """What one of the ranks does; the first writes result.json."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in place.items()}
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    rl_trainer.Engine = TimedEngine
    rl_trainer.console.quiet = True
    values = (
        keys
        | COIN
        | {
            "model.pretrained_model": folder / "model",
            "experiment.runs_dir": folder,
            "experiment.total_step": STEPS,
            "experiment.eval_every": 0,
            "dataset.eval_dataset": "null",
            "rollout.num_task_per_step": TASKS,
            "rollout.num_response_per_task": RESPONSES,
            "rollout.max_token": LONG,
            "reward.workers": 0,
            "training.keep_accuracy": "null",
        }
    )
    config = load_config("rl", arguments("rl_tiny", values))
    run = rl_trainer.set_up(config, rl_trainer.read_inputs(config), Stopwatch())
    figures, forwards = [], []
    for step in range(1, STEPS + 1):
        if step == FIRST + 1:
            TimedEngine.drawn, TimedEngine.drawing = 0, 0.0
        TimedEngine.forwards = 0
        figures.append(rl_trainer.rl_step(run))
        forwards.append(max(gather(TimedEngine.forwards)))
        run.progress.step = step
    counted, slots = figures[FIRST:], TASKS * RESPONSES
    rollout = sum(gather(sum(one["seconds_rollout"] for one in counted))) / 2
    made, drawing, drawn = sum(forwards[FIRST:]), sum(gather(TimedEngine.drawing)), sum(gather(TimedEngine.drawn))
    tokens = sum(one["predicted_tokens"] for one in counted)
    result = {
        "waiting, by forwards": f"{100 * (1 - drawn / (made * slots)):.0f} %",
        "by the clock": f"{100 * (1 - drawing / (rollout * slots)):.0f} %",
        "tokens a forward": f"{tokens / made:.1f}",
        "a second": f"{tokens / rollout:.0f}",
        "staleness": f"{sum(one.get('staleness', 0) for one in counted) / len(counted):.2f}",
        "oldest": max(one.get("staleness_max", 0) for one in counted),
    }
    if is_main():
        (folder / "result.json").write_text(json.dumps(result))


# ---- accuracy


def accuracy(options: argparse.Namespace) -> None:
    """Run what is missing, seed by seed, then print the table."""
    torch.set_num_threads(1)
    part, done = PARTS["block"], read_results()
    for seed in options.seeds:
        for name, keys in VARIANTS.items():
            if any((row["seed"], row["variant"], row["steps"]) == (seed, name, options.steps) for row in done):
                continue
            finetune(part, seed, options.runs)
            row = {"variant": name, "seed": seed, "steps": options.steps} | learn(keys, seed, options)
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    rows = []
    known = [row for row in read_results() if row["steps"] == options.steps]
    for name in VARIANTS:
        own = [row for row in known if row["variant"] == name]
        if own:
            shares = {key: mean_and_error([row[key] for row in own]) for key in ("before", "after")}
            shown = {key: f"{100 * mean:.1f} ± {100 * error:.1f} %" for key, (mean, error) in shares.items()}
            means = {key: sum(row[key] for row in own) / len(own) for key in ("staleness", "seconds", "wall")}
            rows.append({"": name, "seeds": len(own)} | shown | means)
    print_table(rows, title=f"accuracy of held-out tasks (dynamic), {options.steps} steps")


def read_results() -> list[dict]:
    """The runs that have ended."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def learn(keys: dict[str, object], seed: int, options: argparse.Namespace) -> dict[str, float]:
    """One run; what it writes is deleted."""
    values = keys | {
        "model.pretrained_model": model_of(PARTS["block"], seed, options.runs),
        "training.seed": seed,
        "experiment.project": f"carried_{seed}",
        "experiment.runs_dir": options.runs,
        "experiment.total_step": options.steps,
        "optimizer.params.learning_rate": 3e-4,
        "lr_scheduler.params.warmup_steps": 4,
        "rollout.num_task_per_step": 16,
        "rollout.num_response_per_task": 8,
        "evaluation.remasking_strategy": "low_confidence_dynamic",
    }
    config = load_config("rl", arguments("rl_tiny", values))
    run = rl_trainer.set_up(config, rl_trainer.read_inputs(config), Stopwatch())
    curve, stale = Curve([], [], []), []
    measure(run, curve, 0, 0.0)
    wall, processor = time.perf_counter(), time.process_time()
    for step in range(1, options.steps + 1):
        stale.append(rl_trainer.rl_step(run).get("staleness", 0.0))
        run.progress.step = step
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    measure(run, curve, 0, 0.0)
    run.metrics.close()
    shutil.rmtree(run.folder)
    before, after = curve.accuracy
    spent = {"wall": round(wall, 1), "seconds": round(processor, 1)}
    return {"before": before, "after": after, "staleness": sum(stale) / len(stale)} | spent


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.carried", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("waiting", "accuracy"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of models and runs")
    options = parser.parse_args()
    if options.what == "waiting":
        waiting()
    else:
        accuracy(options)


if __name__ == "__main__":
    main()
