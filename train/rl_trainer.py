"""Reinforcement learning in one resident program: sample, score, update, hand the weights back, evaluate."""

import dataclasses
import json
from contextlib import ExitStack

import torch

from common.checkpoint import newest_step, unless_full, write_whole
from common.config import settings_of
from common.metrics import draw_curves
from common.ranks import any_rank, from_main, is_main, rank
from common.runtime import Stopwatch, console
from common.schema import RLConfig
from common.stop import Stopped, exit_code, resume_command, signals_noted, stop_requested, watched
from common.trajectory import ScoredTrajectory
from data.tasks import task_batch
from rollout.collect import collect, prompts_within
from rollout.evaluate import Evaluation, evaluate
from rollout.samples import write_samples
from train.devices import whole_weights
from train.rl_checkpoint import export, resume, save
from train.rl_report import report_step, rollout_figures, step_times, write_results
from train.rl_setup import Inputs, Run, read_inputs, set_up
from train.rl_step import learn
from train.samples import kept_samples, layout_of


def main(config: RLConfig, inputs: Inputs | None = None, stages: Stopwatch | None = None) -> int:
    """Run reinforcement learning as the config says; everything it makes lies in runs/<project>/.

    `inputs` and the seconds of `stages` are what the caller has done already. Returns the program's exit code: 130
    where Ctrl-C stopped it, else 0. All ranks must call it.
    """
    stages = stages or Stopwatch()
    with signals_noted(), ExitStack() as stack:
        run = set_up(config, inputs or read_inputs(config), stages)
        stack.enter_context(watched(config.experiment.hang_timeout, run.folder / f"hang-rank-{rank()}.txt", rank()))
        with stages("load"):
            resume(run)
        try:
            before = first_evaluation(run)
            train(run)
            after = evaluate_now(run)
        except Stopped:
            stop(run)
            return exit_code()
    with stages("checkpoint"):
        save(run)
        export(run)
    run.metrics.close()
    if is_main():
        draw_curves(run.folder / "metrics.jsonl", run.folder / "curves.png")
        run.page.refresh(done=True)
        write_results(run, before, after)
    return 0


def train(run: Run) -> None:
    """The RL steps that are left, with evaluations and checkpoints between them. Stopped where the run is to end."""
    experiment = run.config.experiment
    while run.step < experiment.total_step:
        figures = rl_step(run)
        run.step += 1
        run.metrics.log({"step": run.step} | figures)
        report_step(run.step, experiment.total_step, figures)
        run.page.refresh()
        last = run.step == experiment.total_step
        if experiment.eval_every and run.step % experiment.eval_every == 0 and not last:
            evaluate_now(run)
        if experiment.save_every and run.step % experiment.save_every == 0 and not last:
            with run.stages("checkpoint"):
                save(run)
        if any_rank(stop_requested()):
            raise Stopped


def stop(run: Run) -> None:
    """Save what is done and say how to go on."""
    if run.step > 0 and newest_step(run.folder) < run.step:
        save(run)
    run.metrics.close()
    run.page.refresh(done=True)
    console.print(f"stopped after step {run.step}; to go on: {resume_command()}")


def rl_step(run: Run) -> dict[str, float]:
    """Sample, score, learn, and hand the new weights to the engine; returns the step's figures."""
    config, watch = run.config, Stopwatch()
    number = run.step + 1
    cursor = run.cursor
    try:
        groups, samples = gather_samples(run, number, watch)
    except Stopped:
        run.cursor = cursor  # the step is done again when the run is resumed
        raise
    file = run.folder / "rollouts" / f"step-{number:04d}.jsonl"
    if is_main():
        file.unlink(missing_ok=True)  # a run that stopped after its last checkpoint wrote this step before
    write_samples(file, groups)
    run.page.note(number, groups)
    figures: dict[str, float] = {"updates": 0, "lr": run.learner.scheduler.get_last_lr()[0]}
    if config.rollout.free_cache:
        run.engine.sleep()
    if samples:
        with watch("train"):
            figures |= learn(
                run.learner,
                samples,
                config.training,
                layout_of(run.loaded, config.rollout.block_size),
                config.rollout.max_token,
                seed=[config.training.seed, number],
                exact=exact_rollouts(run),
                reference=run.reference,
                critic=run.critic,
                train_value=number % config.experiment.train_value_every == 0,
            )
    else:
        equal = " with rewards that differ" if config.training.dynamic_sampling else ""
        console.print(
            f"step {number}: no group{equal} has an accuracy within training.keep_accuracy "
            f"{config.training.keep_accuracy}; no update"
        )
    with watch("sync"):
        run.engine.load_weights(whole_weights(run.learner.network.model))
    for stage, seconds in watch.seconds.items():
        run.stages.seconds[stage] = run.stages.seconds.get(stage, 0.0) + seconds
    means = rollout_figures(groups, samples)
    return means | figures | step_times(run, groups, watch)


def exact_rollouts(run: Run) -> bool:
    """Whether the engine's log-probabilities must be the trainer's: float32, and no approximate cache."""
    approximate = run.loaded.family.attention == "full" and run.config.rollout.use_cache
    return run.loaded.model.dtype == torch.float32 and not approximate


def gather_samples(
    run: Run, number: int, watch: Stopwatch
) -> tuple[list[list[ScoredTrajectory]], list[ScoredTrajectory]]:
    """Groups of rollouts for the step's tasks; where the filter leaves none, more tasks, up to `max_resample` times.

    With dynamic sampling more tasks are drawn until as many groups are kept as there were to be.
    """
    config, training = run.config, run.config.training
    wanted = config.rollout.num_task_per_step
    groups: list[list[ScoredTrajectory]] = []
    samples: list[ScoredTrajectory] = []
    missing = wanted
    for _ in range(config.rollout.max_resample + 1):
        indices, run.cursor = task_batch(len(run.tasks), missing, run.cursor, training.seed)
        seen = {group[0].task.id for group in groups}
        tasks = [run.tasks[index] for index in dict.fromkeys(indices)]
        tasks = [task for task in tasks if task.id not in seen]
        prompts = prompts_within(run.loaded, tasks, config.dataset, config.rollout, training.max_prompt_len)
        groups += collect(
            run.engine,
            run.loaded,
            prompts,
            config.rollout,
            run.scorer,
            watch,
            training.seed,
            number,
            f"step {number}: rollout",
        )
        samples = kept_samples(groups, training.keep_accuracy, training.dynamic_sampling)
        kept = len({sample.trajectory.task_id for sample in samples})
        missing = wanted - kept if training.dynamic_sampling else wanted * (kept == 0)
        if missing == 0:
            break
    return groups, samples


def evaluate_now(run: Run) -> dict[str, Evaluation]:
    """Accuracy on the held-out tasks under each evaluation setting, by the task's own answer; logged."""
    config = run.config
    prompts_of = config.evaluation.data_type or config.dataset.data_type
    with run.stages("evaluation"):
        results = evaluate(
            run.engine,
            run.loaded,
            run.eval_tasks,
            settings_of(config.evaluation),
            run.eval_scorer,
            dataclasses.replace(config.dataset, data_type=prompts_of),
            config.evaluation.max_prompt_len,
            config.training.seed,
            samples_file=run.folder / "samples.jsonl",
            step=run.step,
        )
    figures = {f"eval/{name}/accuracy": result.accuracy for name, result in results.items()}
    figures |= {f"eval/{name}/tokens_per_forward": result.tokens_per_forward for name, result in results.items()}
    run.metrics.log({"step": run.step} | figures)
    return results


def first_evaluation(run: Run) -> dict[str, dict[str, float]]:
    """The evaluation before the first step, kept in before.json so that a resumed run still has it."""
    path = run.folder / "before.json"
    if run.step > 0 and from_main(path.exists()):
        return json.loads(path.read_text())
    before = {name: dataclasses.asdict(result) for name, result in evaluate_now(run).items()}
    if is_main():
        with unless_full(path):
            write_whole(path, json.dumps(before))
    return before
