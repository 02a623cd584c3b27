"""Reinforcement learning in one resident program: sample, score, update, hand the weights back, evaluate, report."""

import json
import shlex
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from common.checkpoint import unless_full, write_whole
from common.errors import UserError
from common.jobs import RLConfig
from common.metrics import draw_curves, print_table, truncate_after
from common.ranks import any_rank, from_main, is_main
from common.runtime import ROOT, Stopwatch, console, device_and_dtype, python_command, version_of
from common.stop import Stopped, exit_code_of, stop_requested
from data.tasks import load_tasks
from models import find_family
from models.defaults import take_defaults
from reward.score import check_tasks, make_scorer
from rollout.carry import Rule, carried_figures, read_groups
from rollout.collect import check_questions, encode_tasks, say_unread_words
from rollout.report import RunPage
from rollout.results import Evaluation, overwriting_figures, results_row, tokens_per_forward
from rollout.samples import write_samples
from sample.engine import Engine
from train.ahead import Ahead, Engines
from train.learner import whole_weights
from train.loading import engine_model, frozen_reference, load_trained, policy_learner, value_learner
from train.rl_groups import next_groups, why_none_is_kept
from train.rl_run import Drawn, Inputs, RLProgress, RLRun
from train.rl_step import learn
from train.run import (
    CARRIED,
    begin,
    evaluate_held_out,
    export,
    held_out_tasks,
    make_folder,
    open_records,
    resume,
    save,
    until_stopped,
)
from train.views import check_views, layout_of


def main(config: RLConfig, engines: Callable[[], Engines] | None = None) -> int:
    """Run reinforcement learning as the config says; everything it makes lies in runs/<project>/.

    `engines` starts those that draw, where they lie elsewhere (train/ahead.py). Returns the program's exit code: 130
    where Ctrl-C stopped it, else 0. All ranks must call it.
    """
    return exit_code_of(lambda: reinforce(config, engines=engines))


def reinforce(
    config: RLConfig,
    inputs: Inputs | None = None,
    stages: Stopwatch | None = None,
    engines: Callable[[], Engines] | None = None,
) -> None:
    """The run, from its set-up to its results. Raises Stopped, after a checkpoint, where a signal came.

    `inputs` and the seconds of `stages` are what the caller has done already, `engines` as in `main`. All ranks must
    call it.
    """
    run = set_up(config, inputs or read_inputs(config), stages or Stopwatch(), engines)
    with until_stopped(run):
        try:
            with run.stages("load"):
                resume(run)
                take_up_carried(run)
                name_block_size(run)
                if run.ahead is not None:
                    run.ahead.send(run.progress.step + 1, Stopwatch())
                elif run.checkpoint is not None:
                    run.engine.load_weights(whole_weights(run.learner.network.backbone))
            before = first_evaluation(run)
            train(run)
            after = evaluate_now(run)
        except Stopped:
            run.page.refresh(done=True)
            raise
    with run.stages("checkpoint"):
        save(run)
        model = export(run)
    run.metrics.close()
    if is_main():
        draw_curves(run.folder / "metrics.jsonl", run.folder / "curves.png")
        run.page.refresh(done=True)
        write_results(run.folder, config.training.seed, before, after, run.stages)
        print_next_commands(run.folder, model, compared=bool(after))


# --- before the first step


def read_inputs(config: RLConfig) -> Inputs:
    """Load what the config names beside models; UserError for a mistake in it."""
    dataset, evaluation = config.dataset, config.evaluation
    tasks = load_tasks(dataset.train_dataset, key="dataset.train_dataset")
    if config.rollout.num_task_per_step > len(tasks):
        raise UserError(
            f"rollout.num_task_per_step: {config.rollout.num_task_per_step} is more than the {len(tasks)} tasks "
            f"of dataset.train_dataset {dataset.train_dataset}"
        )
    scorer = make_scorer(config.reward, dataset.data_type)
    check_tasks(scorer, tasks, "dataset.train_dataset")
    check_views(config, find_family(config.model.model_base))
    key, held_out_set = "evaluation.eval_dataset", evaluation.eval_dataset or dataset.eval_dataset
    eval_tasks = load_tasks(held_out_set, key=key) if held_out_set is not None else []
    own_kind = None if config.reward.kind == "judge" else config.reward.kind
    judged_as = evaluation.data_type or own_kind or dataset.data_type
    held_out = held_out_tasks(config, eval_tasks, key, judged_as, evaluation.data_type or dataset.data_type)
    return Inputs(tasks, scorer, held_out)


def set_up(config: RLConfig, inputs: Inputs, stages: Stopwatch, engines: Callable[[], Engines] | None = None) -> RLRun:
    """Load the networks; then, when no mistake can be found any more, open the run's folder and its records."""
    experiment = config.experiment
    updates_per_step = config.training.updates_per_step * config.training.epochs_per_step
    with stages("load"):
        begin(config)
        trained = load_trained(config.model, config.training, config.model.pretrained_model)
        learner = policy_learner(config, trained, experiment.total_step * updates_per_step)
        drawing = trained if engines else engine_model(config, trained, learner)
        reference = frozen_reference(config, trained, learner)
        take_defaults(config, drawing)
        check_questions(drawing, inputs.tasks, "dataset.train_dataset")
        check_questions(drawing, inputs.held_out.tasks, "evaluation.eval_dataset")
        # mistakes show here
        if config.rollout.carry or config.rollout.spare:
            Rule.of(config.rollout, 1)
        (first,) = encode_tasks(drawing, inputs.tasks[:1], config.dataset, config.rollout.start_with_think)
        say_unread_words(drawing, first)
        critic = None
        if config.model.value_base_model:
            value_steps = experiment.total_step // experiment.train_value_every
            critic = value_learner(config, value_steps * updates_per_step)
        folder = make_folder(config)
        metrics, checkpoint, state = open_records(config, folder)
        if is_main():
            (folder / "rollouts").mkdir(exist_ok=True)
            truncate_after(folder / "samples.jsonl", state.get("step", -1))
        ahead = None
        if engines is None:
            engine = Engine(drawing.model, drawing.mask_id, drawing.stop_ids)
        else:
            engine = engines() if is_main() else None
            ahead = Ahead(engine, partial(whole_weights, learner.network.backbone), experiment.total_step)
    return RLRun(
        config=config,
        folder=folder,
        metrics=metrics,
        checkpoint=checkpoint,
        progress=RLProgress(**state),
        held_out=inputs.held_out,
        loaded=drawing,
        learner=learner,
        critic=critic,
        tasks=inputs.tasks,
        scorer=inputs.scorer,
        engine=engine,
        reference=reference,
        page=RunPage(folder, drawing, experiment.total_step),
        stages=stages,
        ahead=ahead,
    )


def take_up_carried(run: RLRun) -> None:
    """Take up the groups of responses that the run's checkpoint goes on with."""
    file = run.checkpoint and run.checkpoint / CARRIED
    if file is not None and file.exists():
        run.carried = read_groups(file, run.config.rollout, run.tasks, run.progress.step + 1)


# --- the steps


def train(run: RLRun) -> None:
    """The RL steps that are left, with evaluations and checkpoints between them. Raises Stopped where it is to end."""
    experiment, progress = run.config.experiment, run.progress
    while progress.step < experiment.total_step:
        figures = rl_step(run)
        progress.step += 1
        name_block_size(run)
        run.metrics.log({"step": progress.step} | figures)
        console.print(
            f"step {progress.step}/{experiment.total_step}  reward {figures['reward']:.3f}  "
            f"length {figures['response_length']:.1f}  tokens/forward {figures['tokens_per_forward']:.2f}  "
            f"kl {figures.get('kl', 0):.1e}  logp_diff_max {figures.get('logp_diff_max', 0):.1e}  "
            f"{figures['seconds']:.1f} s"
        )
        run.page.refresh()
        last = progress.step == experiment.total_step
        if experiment.eval_every and progress.step % experiment.eval_every == 0 and not last:
            evaluate_now(run)
        if experiment.save_every and progress.step % experiment.save_every == 0 and not last:
            with run.stages("checkpoint"):
                save(run)
        if any_rank(stop_requested()):
            raise Stopped


def rl_step(run: RLRun) -> dict[str, float]:
    """Sample, score, learn, and hand the new weights to the engine; returns the step's figures.

    Engines elsewhere get them when they have drawn the next step's responses.
    """
    config, watch = run.config, Stopwatch()
    number = run.progress.step + 1
    drawn = next_groups(run, number, watch)
    groups, samples = drawn.groups, drawn.samples
    file = run.folder / "rollouts" / f"step-{number:04d}.jsonl"
    if is_main():
        file.unlink(missing_ok=True)  # a run that stopped after its last checkpoint wrote this step before
    write_samples(file, groups)
    rollout = config.rollout.at_step(number)
    run.page.note(number, groups, rollout.block_size)
    figures: dict[str, float] = {"updates": 0, "lr": run.learner.scheduler.get_last_lr()[0]}
    if config.rollout.free_cache and run.ahead is None:
        run.engine.sleep()
    began = time.perf_counter()
    if samples:
        approximate = run.loaded.family.attention == "full" and config.rollout.use_cache
        with watch("train"):
            figures |= learn(
                run.learner,
                samples,
                config.training,
                layout_of(run.loaded, rollout.block_size),
                config.rollout.max_token,
                seed=[config.training.seed, number],
                exact=device_and_dtype(config.model.dtype)[1] == torch.float32 and not approximate,
                reference=run.reference,
                critic=run.critic,
                train_value=number % config.experiment.train_value_every == 0,
                step=number,
            )
    else:
        console.print(f"step {number}: no update; {why_none_is_kept(config, groups)}")
    if run.ahead is not None:
        run.ahead.changed |= figures["updates"] > 0
        figures |= run.ahead.figures(began)
    elif figures["updates"]:
        with watch("sync"):
            run.engine.load_weights(whole_weights(run.learner.network.backbone))
    for stage, seconds in watch.seconds.items():
        run.stages.seconds[stage] = run.stages.seconds.get(stage, 0.0) + seconds
    figures |= carried_figures([response for group in groups for response in group], number)
    if drawn.room:
        figures["seats_idle"] = 1 - drawn.steps / drawn.room
    return step_figures(drawn, figures, watch)


def step_figures(drawn: Drawn, learned: dict[str, float], watch: Stopwatch) -> dict[str, float]:
    """A step's figures: means over its responses, those of learning from its samples, and its seconds by stage."""
    responses = [response for group in drawn.groups for response in group]
    count = len(responses)
    tokens = sum(response.trajectory.length for response in responses)
    total = watch.total()
    seconds = dict.fromkeys(("rollout", "reward", "train", "sync"), 0.0) | watch.seconds | drawn.seconds
    return {
        "reward": sum(response.score.reward for response in responses) / count,
        "accuracy": sum(response.score.correct for response in responses) / count,
        "response_length": tokens / count,
        "truncated": sum(response.trajectory.truncated for response in responses) / count,
        **overwriting_figures(responses),
        "tokens_per_forward": tokens_per_forward(responses),
        "kept_mass": sum(response.trajectory.kept_mass for response in responses) / count,
        "groups": len(drawn.groups),
        "groups_kept": len({sample.trajectory.task_id for sample in drawn.samples}),
        **learned,
        "tokens_per_second": tokens / seconds["rollout"],
        **{f"seconds_{stage}": value for stage, value in seconds.items()},
        "seconds_other": total - sum(watch.seconds.values()),
        "seconds": total,
    }


def name_block_size(run: RLRun) -> None:
    """Give the networks' config.json, as it will be saved, the size of the blocks that the last step drew."""
    size = run.config.rollout.at_step(max(run.progress.step, 1)).block_size
    if run.loaded.family.attention != "block":
        return
    networks = [run.learner.network.backbone]
    if run.critic is not None:
        networks.append(run.critic.network.value_network.network)
    for own in (network.config for network in networks):
        if hasattr(own, "block_size") or size != run.loaded.block_size:  # a family's own size need not stand there
            own.block_size = size


# --- evaluations and results


def evaluate_now(run: RLRun) -> dict[str, Evaluation]:
    """Accuracy on the held-out tasks under each evaluation setting; logged, every response in samples.jsonl.

    Empty where there are no such tasks.
    """
    if not run.held_out.tasks:
        return {}
    evaluate = partial(evaluate_held_out, run, run.engine, run.loaded, run.folder / "samples.jsonl")
    with run.stages("evaluation"):
        ahead = run.ahead
        results, figures = evaluate() if ahead is None else ahead.by_present_weights(run.progress.step + 1, evaluate)
    run.metrics.log({"step": run.progress.step} | figures)
    found = [f"{name} {percent(one.accuracy, one.standard_error)}" for name, one in results.items()]
    console.print(f"held-out accuracy after step {run.progress.step}: {', '.join(found)}")
    return results


def first_evaluation(run: RLRun) -> dict[str, dict[str, float]]:
    """The evaluation before the first step, kept in before.json so that a resumed run still has it."""
    path = run.folder / "before.json"
    if run.progress.step > 0 and from_main(path.exists()):
        return json.loads(path.read_text())
    before = {name: results_row(result) for name, result in evaluate_now(run).items()}
    if is_main():
        with unless_full(path):
            write_whole(path, json.dumps(before))
    return before


def write_results(
    folder: Path, seed: int, before: dict[str, dict[str, float]], after: dict[str, Evaluation], stages: Stopwatch
) -> None:
    """results.json (every figure), summary.json (accuracy before and after, seconds by stage) and a table."""
    results = {"before": before, "after": {name: results_row(result) for name, result in after.items()}}
    (folder / "results.json").write_text(json.dumps(results, indent=2))
    keep = ("accuracy", "tokens_per_forward")
    short = {
        moment: {name: {key: round(row[key], 4) for key in keep} for name, row in rows.items()}
        for moment, rows in results.items()
    }
    seconds = {stage: round(value, 2) for stage, value in stages.seconds.items()}
    seconds["total"] = round(stages.total(), 2)
    (folder / "summary.json").write_text(json.dumps({"seed": seed} | short | {"seconds": seconds}, indent=2))
    rows = []
    for name, now in results["after"].items():
        then = before[name]
        rows.append(
            {
                "sampling": name,
                "tasks": now["tasks"],
                "before": percent(then["accuracy"], then["standard_error"]),
                "after": percent(now["accuracy"], now["standard_error"]),
                "gain": f"{100 * (now['accuracy'] - then['accuracy']):+.1f}",
                "tokens/forward": f"{then['tokens_per_forward']:.2f} → {now['tokens_per_forward']:.2f}",
            }
        )
    if rows:
        print_table(rows, title="accuracy on held-out tasks ± one standard error, before and after RL")
    console.print("seconds: " + ", ".join(f"{stage} {value:.0f}" for stage, value in seconds.items()))


def percent(share: float, error: float) -> str:
    """A share and its standard error in per cent."""
    return f"{100 * share:.1f} ± {100 * error:.1f} %"


def print_next_commands(folder: Path, model: Path, compared: bool) -> None:
    """Say what to open of a finished run, and the commands that go on from it; `compared`: it was evaluated."""
    python, here = python_command(), Path.cwd() == ROOT
    script = f"{python} {'' if here else shlex.quote(f'{ROOT}/')}{{}}.py model={shlex.quote(str(model))}"
    console.print(f"curves: {folder}/report.html; responses as they were denoised: {folder}/trace.html")
    console.print(f"a chat with the model: {script.format('generate')}")
    console.print(f"a server and a chat page: {script.format('serve')}")
    if compared and (here or version_of("dllm-rl")):  # else the module is not found from here
        run = shlex.quote(str(folder))
        console.print(f"before and after, with significance: {python} -m rollout.compare {run}@0 {run}")
