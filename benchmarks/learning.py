"""What each recipe learns on the tiny models: from one start, at a learning rate of its own, over several seeds.

    python -m benchmarks.learning                                   # whatever is missing in RESULTS, then the table
    python -m benchmarks.learning --parts block --recipes tracerl   # of that what is missing
    python -m benchmarks.learning --table                           # the table alone

A part is a kind of task and an attention: `block` and `full` are additions, `countdown` and `countdown_full` are
Countdown under block and full attention. Every recipe of a part starts from the seed's one finetuned model and draws
its tasks in the same order. Its rate is the one of the part's with the highest accuracy on a seed that is not reported.
Accuracy is of held-out tasks, by dynamic sampling. `coin flip` is TraceRL where a coin gives the rewards. Each run that
ends is a line of RESULTS.
"""

import argparse
import json
import re
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from common.config import load_config
from common.runtime import Stopwatch
from rollout.statistics import mean_and_error
from train import rl_trainer, sft_trainer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "learning.jsonl"
DOCS = ROOT / "docs"
RATES = (3e-5, 1e-4, 3e-4)
WARM_UP = 4  # updates; without it Adam's first ones cost a short run more than it learns
TUNING_SEED = 4
START, COIN = "start", "coin flip"  # beside the recipes: no step at all; TraceRL with rewards by chance
RESPONSES = 8  # to a task
# A recipe leaves open how many noised copies there are.
COPIES = {"random_masking": 2, "coupled": 1}


@dataclass(frozen=True)
class Part:
    """A task and a network, and the recipes that go with its attention."""

    title: str
    family: str
    task: str  # of configs/rl_{task}.yaml and configs/sft_{task}.yaml
    recipes: tuple[str, ...]
    seeds: tuple[int, ...]
    rates: tuple[float, ...] = RATES


PARTS = {
    "block": Part(
        "additions, block attention (sdar)",
        "sdar",
        "tiny",
        ("tracerl", "dapo", "just_grpo", "random_masking", "coupled", "ebpo", COIN),
        (1, 2, 3),
    ),
    "full": Part(
        "additions, full attention (llada)",
        "llada",
        "tiny",
        ("tracerl", "gdpo", "coupled_grpo", "espo", "diffu_grpo", COIN),
        (1, 2, 3),
    ),
    "countdown": Part(
        "Countdown, block attention (sdar)", "sdar", "countdown_tiny", ("tracerl", "dapo", "just_grpo", COIN), (1, 2)
    ),
    "countdown_full": Part(
        "Countdown, full attention (llada)",
        "llada",
        "countdown_tiny",
        ("tracerl", "gdpo", "coupled_grpo", COIN),
        (1, 2),
        rates=(1e-4, 3e-4),
    ),
}


@dataclass(frozen=True)
class Budget:
    """What a run may spend, the same for every recipe."""

    steps: int
    tasks: int  # of a step
    evaluations: int  # after the first one
    eval_tasks: int  # held-out ones; 0: all


@dataclass(frozen=True)
class Job:
    """One run."""

    part: str
    recipe: str  # or START, or COIN
    seed: int
    rate: float
    budget: Budget


@dataclass(frozen=True)
class Curve:
    """What a run had spent by each evaluation and what it gave."""

    rollouts: list[int]
    seconds: list[float]  # of the processor, in sampling, scoring and learning
    accuracy: list[float]


Curves = dict[Job, Curve]


def main() -> None:
    options = parse()
    budget = Budget(options.steps, options.tasks, options.evaluations, options.eval_tasks)
    for part in () if options.table else options.parts:
        for stage in (starts, tuning_runs, reported_runs):  # each needs what the one before it found
            done = read_curves(options.results)
            jobs = [job for job in stage(part, done, budget) if job not in done and asked_for(job, options)]
            run_all(jobs, options)
    curves = read_curves(options.results)
    page = tables(curves, budget)
    print(page)
    write_page(page, DOCS / "learning.md")
    draw(curves, budget, DOCS / "pictures" / "learning.png")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    everything = dict.fromkeys(recipe for part in PARTS.values() for recipe in part.recipes)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--recipes", nargs="+", default=list(everything), choices=everything)
    parser.add_argument("--seeds", nargs="+", type=int, help="of the reported ones; default: all")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tasks", type=int, default=16, help=f"of a step, {RESPONSES} responses each")
    parser.add_argument("--evaluations", type=int, default=2, help="in a run, after the first")
    parser.add_argument("--eval-tasks", type=int, default=320, help="held-out tasks; 0: all")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once, one thread each")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of models and runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="run nothing: only table and figure")
    return parser.parse_args()


def asked_for(job: Job, options: argparse.Namespace) -> bool:
    """Whether the command line asks for a job."""
    seeds = [TUNING_SEED, *(options.seeds or PARTS[job.part].seeds)]
    return job.recipe in (START, *options.recipes) and job.seed in seeds


# --- the jobs of a part, in the order in which they are run


def starts(part: str, _curves: Curves, budget: Budget) -> list[Job]:
    """The finetuned models' own accuracy."""
    return [start_of(part, seed, budget) for seed in (TUNING_SEED, *PARTS[part].seeds)]


def start_of(part: str, seed: int, budget: Budget) -> Job:
    return Job(part, START, seed, 0.0, budget)


def tuning_runs(part: str, _curves: Curves, budget: Budget) -> list[Job]:
    """Every recipe at every rate on the seed that is not reported."""
    recipes = [recipe for recipe in PARTS[part].recipes if recipe != COIN]
    return [Job(part, recipe, TUNING_SEED, rate, budget) for recipe in recipes for rate in PARTS[part].rates]


def reported_runs(part: str, curves: Curves, budget: Budget) -> list[Job]:
    """Every recipe at its rate, seed by seed; without those whose rate is not known yet."""
    rates = {recipe: best_rate(curves, part, recipe, budget) for recipe in PARTS[part].recipes}
    pairs = [(seed, recipe) for seed in PARTS[part].seeds for recipe in PARTS[part].recipes]
    return [Job(part, recipe, seed, rates[recipe], budget) for seed, recipe in pairs if rates[recipe] is not None]


def best_rate(curves: Curves, part: str, recipe: str, budget: Budget) -> float | None:
    """The rate that was best on the tuning seed after equal rollouts, for a coin TraceRL's; None before all ran."""
    recipe = "tracerl" if recipe == COIN else recipe
    runs = [job for job in tuning_runs(part, curves, budget) if job.recipe == recipe]
    if not all(job in curves for job in runs):
        return None
    return max(runs, key=lambda job: at(curves[job].rollouts, curves[job].accuracy, rollouts_of(budget))).rate


def rollouts_of(budget: Budget) -> int:
    return budget.steps * budget.tasks * RESPONSES


# --- a run


def run_all(jobs: list[Job], options: argparse.Namespace) -> None:
    """Run jobs side by side and write down each that ends; a job that fails ends the program."""
    for part, seed in dict.fromkeys((job.part, job.seed) for job in jobs):
        finetune(PARTS[part], seed, options.runs)  # before the jobs, which share it
    with ProcessPoolExecutor(
        options.jobs, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        running = {pool.submit(learn, job, options.runs): job for job in jobs}
        for future in as_completed(running):
            job = running[future]
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(job) | asdict(future.result())) + "\n")


def model_of(part: Part, seed: int, runs: Path) -> Path:
    return runs / f"sft_{part.task}_{part.family}_{seed}" / "ckpt" / "optimized"


def finetune(part: Part, seed: int, runs: Path) -> None:
    """Make the model from which a seed's runs start, unless it is there."""
    if model_of(part, seed, runs).is_dir():
        return
    keys = {"model.model_base": part.family, "training.seed": seed, "experiment.runs_dir": runs}
    torch.set_num_threads(1)
    sft_trainer.finetune(load_config("sft", arguments(f"sft_{part.task}", keys)))


def arguments(config: str, keys: dict[str, object]) -> list[str]:
    """A command line."""
    keys = keys | {"experiment.trackers": "[]"}
    return [f"config={ROOT}/configs/{config}.yaml", *(f"{key}={value}" for key, value in keys.items())]


def learn(job: Job, runs: Path) -> Curve:
    """Run a job in this process; what it writes beside the returned curve is deleted."""
    part, budget = PARTS[job.part], job.budget
    steps = 0 if job.recipe == START else budget.steps
    recipe = "tracerl" if job.recipe in (START, COIN) else job.recipe
    keys: dict[str, object] = {
        "recipe": recipe,
        "model.model_base": part.family,
        "model.pretrained_model": model_of(part, job.seed, runs),
        "training.seed": job.seed,
        "optimizer.params.learning_rate": job.rate or RATES[0],
        "lr_scheduler.params.warmup_steps": WARM_UP,
        "experiment.project": f"learning_{job.part}_{job.recipe}_{job.seed}_{job.rate:g}".replace(" ", "_"),
        "experiment.runs_dir": runs,
        "experiment.total_step": budget.steps,
        "rollout.num_task_per_step": budget.tasks,
        "rollout.num_response_per_task": RESPONSES,
        "evaluation.num_task": budget.eval_tasks,
        "evaluation.remasking_strategy": "low_confidence_dynamic",
    }
    if recipe in COPIES:
        keys["training.mask_times_per_sample"] = COPIES[recipe]
    if recipe == "dapo":
        keys["rollout.max_resample"] = 3
    if job.recipe == COIN:
        keys["reward.function"] = "benchmarks.coin_flip:coin_flip"
    config = load_config("rl", arguments(f"rl_{part.task}", keys))
    run = rl_trainer.set_up(config, rl_trainer.read_inputs(config), Stopwatch())
    curve = Curve([], [], [])
    rollouts, seconds = 0, 0.0
    if not steps:
        measure(run, curve, rollouts, seconds)
    for step in range(1, steps + 1):
        started = time.process_time()
        figures = rl_trainer.rl_step(run)
        seconds += time.process_time() - started
        rollouts += int(figures["groups"]) * RESPONSES
        run.progress.step = step
        if step % max(1, steps // budget.evaluations) == 0 or step == steps:
            measure(run, curve, rollouts, seconds)
    run.metrics.close()
    shutil.rmtree(run.folder)
    return curve


def measure(run: rl_trainer.RLRun, curve: Curve, rollouts: int, seconds: float) -> None:
    """Add the accuracy of now to the curve."""
    (result,) = rl_trainer.evaluate_now(run).values()
    curve.rollouts.append(rollouts)
    curve.seconds.append(seconds)
    curve.accuracy.append(result.accuracy)


# --- results and tables


def read_curves(path: Path) -> Curves:
    """The finished runs; a curve other than a start's own begins at its start, where that is known."""
    curves: Curves = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        row = json.loads(line)
        budget = Budget(**row.pop("budget"))
        curve = Curve(**{name: row.pop(name) for name in ("rollouts", "seconds", "accuracy")})
        curves[Job(**row, budget=budget)] = curve
    for job, curve in curves.items():
        start = curves.get(start_of(job.part, job.seed, job.budget))
        if start and job.recipe != START:
            curves[job] = Curve([0, *curve.rollouts], [0.0, *curve.seconds], start.accuracy + curve.accuracy)
    return curves


def at(axis: Sequence[float], values: Sequence[float], where: float) -> float:
    """A curve's value at a place on its axis, straight between its points, its last value behind them."""
    return float(np.interp(where, axis, values))


def own_curves(curves: Curves, part: str, recipe: str, budget: Budget) -> dict[int, Curve]:
    """A recipe's reported runs, by seed."""
    rate = best_rate(curves, part, recipe, budget)
    jobs = [Job(part, recipe, seed, rate or 0.0, budget) for seed in PARTS[part].seeds]
    return {job.seed: curves[job] for job in jobs if job in curves}


def tables(curves: Curves, budget: Budget) -> str:
    """Markdown: for each part a table of its recipes, and one of what each rate gave."""
    return "\n".join(table_of(curves, part, budget) for part in PARTS)


def table_of(curves: Curves, part: str, budget: Budget) -> str:
    """A part's two tables, or a line where nothing of it was run; what is missing is "not run"."""
    wanted, rollouts = PARTS[part], rollouts_of(budget)
    title = f"### {wanted.title[0].upper()}{wanted.title[1:]}"
    if not any(job.part == part and job.recipe != START and job.budget == budget for job in curves):
        return f"{title}\n\n{', '.join(wanted.recipes)}: not run.\n"
    found = {recipe: own_curves(curves, part, recipe, budget) for recipe in wanted.recipes}
    fastest = {
        seed: min((own[seed].seconds[-1] for own in found.values() if seed in own), default=0.0)
        for seed in wanted.seeds
    }
    head = ["recipe", "rate", "seeds", "before", f"after {rollouts:,} rollouts", "after equal seconds", "seconds"]
    lines = [head, ["---"] * len(head)]
    for recipe, own in found.items():
        rate = best_rate(curves, part, recipe, budget)
        if not own:
            lines.append([recipe, "–" if rate is None else f"{rate:g}", "0", *["not run"] * 4])
            continue
        after = [at(curve.rollouts, curve.accuracy, rollouts) for curve in own.values()]
        timed = [at(curve.seconds, curve.accuracy, fastest[seed]) for seed, curve in own.items()]
        seconds = np.mean([curve.seconds[-1] for curve in own.values()])
        before = [curve.accuracy[0] for curve in own.values()]
        count = f"{len(own)} of {len(wanted.seeds)}"
        lines.append([recipe, f"{rate:g}", count, shown(before), shown(after), shown(timed), f"{seconds:.0f}"])
    tuning = [["recipe", *(f"{rate:g}" for rate in wanted.rates)], ["---"] * (1 + len(wanted.rates))]
    for recipe in wanted.recipes:
        jobs = [job for job in tuning_runs(part, curves, budget) if job.recipe == recipe]
        cells = [
            f"{100 * at(curves[job].rollouts, curves[job].accuracy, rollouts):.1f}" if job in curves else "not run"
            for job in jobs
        ]
        tuning += [[recipe, *cells]] if jobs else []
    start = curves.get(start_of(part, TUNING_SEED, budget))
    begun = f"{100 * start.accuracy[0]:.1f} %" if start else "a model that is not measured"
    return f"""{title}

{markdown(lines)}

Seed {TUNING_SEED}, by which the rate was chosen, from {begun}:

{markdown(tuning)}
"""


def markdown(lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shown(values: list[float]) -> str:
    """Mean in per cent, and where there are several its standard error and each one."""
    mean, error = mean_and_error([100 * value for value in values])
    if len(values) == 1:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {error:.1f} ({', '.join(f'{100 * value:.1f}' for value in values)})"


def write_page(page: str, path: Path) -> None:
    """Put the tables between the page's two marks."""
    text = path.read_text(encoding="utf-8")
    marked = re.compile(r"<!-- recipes -->.*<!-- end -->", re.DOTALL)
    text, count = marked.subn(lambda _: f"<!-- recipes -->\n{page}<!-- end -->", text)
    assert count == 1, f"{path} lacks the marks of the tables"
    path.write_text(text, encoding="utf-8")


def draw(curves: Curves, budget: Budget, path: Path) -> None:
    """Accuracy by rollouts and by seconds, a row for each part; the mean over the seeds."""
    figure, axes = plt.subplots(len(PARTS), 2, figsize=(12, 4 * len(PARTS)), sharey="row", squeeze=False)
    for row, (part, wanted) in enumerate(PARTS.items()):
        for column, (name, words) in enumerate((("rollouts", "responses drawn"), ("seconds", "processor seconds"))):
            axis = axes[row][column]
            for recipe in wanted.recipes:
                own = list(own_curves(curves, part, recipe, budget).values())
                if not own:
                    continue
                grid = np.linspace(0, min(getattr(curve, name)[-1] for curve in own), 50)
                mean = np.mean([np.interp(grid, getattr(curve, name), curve.accuracy) for curve in own], axis=0)
                axis.plot(grid, 100 * mean, label=recipe, linewidth=2, linestyle="--" if recipe == COIN else "-")
                axis.legend(fontsize=8)
            axis.set_title(wanted.title)
            axis.set_xlabel(words)
            axis.set_ylabel("accuracy (%)")
            axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
