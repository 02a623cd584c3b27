"""Reinforcement learning in one resident program: sample, score, update, hand the weights back, evaluate."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import torch

from common.checkpoint import save_step, step_folders, write_folder
from common.config import dump_config, settings_of
from common.errors import UserError
from common.metrics import MetricsLog, draw_curves, open_metrics, print_table, truncate_after
from common.runtime import Stopwatch, console, device_and_dtype, prepare_run_folder, seed_everything
from common.schema import RewardConfig, RLConfig
from common.trajectory import Task
from data.tasks import load_tasks, task_batch
from models import LoadedModel, load_model, save_model
from reward.score import make_scorer
from rollout.collect import Rollout, Scorer, collect, prompts_within
from rollout.evaluate import Evaluation, evaluate, tokens_per_forward, write_samples
from sample.engine import Engine
from train.optimize import Learner, make_learner
from train.policy import Policy
from train.rl_step import Sample, kept_samples, layout_of, learn
from train.sft_trainer import make_model_if_missing


@dataclasses.dataclass
class Run:
    """All that lives through the run."""

    config: RLConfig
    folder: Path
    loaded: LoadedModel  # the engine's network: the learner's own where precision allows
    engine: Engine
    learner: Learner
    reference: Learner | None
    tasks: list[Task]
    eval_tasks: list[Task]
    scorer: Scorer
    metrics: MetricsLog
    stages: Stopwatch  # seconds by stage of the whole run
    cursor: int = 0  # place in the endless sequence of shuffled tasks
    step: int = 0  # RL steps done


def main(config: RLConfig) -> None:
    """Run reinforcement learning as the config says; everything it makes lies in runs/<project>/."""
    stages = Stopwatch()
    run = set_up(config, stages)
    experiment = config.experiment
    before = first_evaluation(run)
    while run.step < experiment.total_step:
        figures = rl_step(run)
        run.step += 1
        run.metrics.log({"step": run.step} | figures)
        report_step(run.step, experiment.total_step, figures)
        last = run.step == experiment.total_step
        if experiment.eval_every and run.step % experiment.eval_every == 0 and not last:
            evaluate_now(run)
        if experiment.save_every and run.step % experiment.save_every == 0 and not last:
            with stages("checkpoint"):
                save(run)
    after = evaluate_now(run)
    with stages("checkpoint"):
        save(run)
        export(run)
    run.metrics.close()
    draw_curves(run.folder / "metrics.jsonl", run.folder / "curves.png")
    write_results(run, before, after)


def set_up(config: RLConfig, stages: Stopwatch) -> Run:
    """Check what the config names, load it, and resume from the newest checkpoint where one is asked for."""
    with stages("load"):
        seed_everything(config.training.seed)
        tasks = load_tasks(config.dataset.train_dataset, key="dataset.train_dataset")
        eval_name = config.evaluation.eval_dataset or config.dataset.eval_dataset
        eval_tasks = load_tasks(eval_name, key="evaluation.eval_dataset")
        eval_tasks = eval_tasks[: config.evaluation.num_task or None]
        if config.rollout.num_task_per_step > len(tasks):
            raise UserError(
                f"rollout.num_task_per_step: {config.rollout.num_task_per_step} is more than the {len(tasks)} tasks "
                f"of dataset.train_dataset {config.dataset.train_dataset}"
            )
        scorer = make_scorer(config.reward, config.dataset.data_type)
    with stages("sft"):
        made = make_model_if_missing(
            config.model.pretrained_model,
            config.model.made_by,
            config.model.model_base,
            config.training.seed,
            config.experiment.runs_dir,
        )
    if not made:
        stages.seconds.pop("sft")
    with stages("load"):
        loaded, learner, reference = load_networks(config)
        experiment = config.experiment
        # last, so that a mistake above leaves an older run where it is
        folder = prepare_run_folder(experiment.runs_dir, experiment.project, experiment.start_from_scratch)
        (folder / "rollouts").mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(dump_config(config))
        engine = Engine(loaded.model, loaded.mask_id, loaded.stop_ids)
        resume_step = None if experiment.start_from_scratch else newest_step(folder)
        metrics = open_metrics(
            folder, experiment.trackers, experiment.project, dataclasses.asdict(config), resume_step=resume_step
        )
        run = Run(config, folder, loaded, engine, learner, reference, tasks, eval_tasks, scorer, metrics, stages)
        resume(run)
    return run


def load_networks(config: RLConfig) -> tuple[LoadedModel, Learner, Learner | None]:
    """The engine's network, the learner, and the frozen first model where the KL refers to it.

    The learner's weights are float32; the engine's network is the same one, or a copy of lower precision.
    """
    device, dtype = device_and_dtype(config.model.dtype)
    trained = load_model(config.model.pretrained_model, config.model.model_base, torch.float32, device)
    learner = make_learner(
        Policy(trained.model, trained.mask_id),
        config.optimizer,
        config.lr_scheduler,
        config.experiment.total_step * config.training.updates_per_step,
        config.training.max_grad_norm,
        mixed_precision="bf16" if dtype == torch.bfloat16 else "no",
    )
    if config.training.gradient_checkpointing_enable:
        trained.model.gradient_checkpointing_enable()
    loaded, reference = trained, None
    if dtype != torch.float32:
        loaded = dataclasses.replace(trained, model=copy.deepcopy(trained.model).to(dtype))
    if config.training.kl_reference == "initial":
        reference = dataclasses.replace(learner, policy=copy.deepcopy(learner.policy).requires_grad_(False))
    return loaded, learner, reference


def rl_step(run: Run) -> dict[str, float]:
    """Sample, score, learn, and hand the new weights to the engine; returns the step's figures."""
    config, watch = run.config, Stopwatch()
    number = run.step + 1
    groups, samples = gather_samples(run, number, watch)
    file = run.folder / "rollouts" / f"step-{number:04d}.jsonl"
    file.unlink(missing_ok=True)  # a run that stopped after its last checkpoint wrote this step before
    write_samples(file, groups)
    figures: dict[str, float] = {"updates": 0, "lr": run.learner.scheduler.get_last_lr()[0]}
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
            )
    else:
        console.print(
            f"step {number}: no group's accuracy lies within training.keep_accuracy "
            f"{config.training.keep_accuracy}; no update"
        )
    with watch("sync"):
        run.engine.load_weights(run.learner.policy.model.named_parameters())
    for stage, seconds in watch.seconds.items():
        run.stages.seconds[stage] = run.stages.seconds.get(stage, 0.0) + seconds
    means = rollout_figures(groups, samples)
    return means | figures | step_times(run, groups, watch)


def exact_rollouts(run: Run) -> bool:
    """Whether the engine's log-probabilities must be the trainer's: float32, and no approximate cache."""
    approximate = run.loaded.family.attention == "full" and run.config.rollout.use_cache
    return run.loaded.model.dtype == torch.float32 and not approximate


def gather_samples(run: Run, number: int, watch: Stopwatch) -> tuple[list[list[Rollout]], list[Sample]]:
    """Groups of rollouts for the step's tasks; where the filter leaves none, more tasks, up to `max_resample`."""
    config = run.config
    groups: list[list[Rollout]] = []
    samples: list[Sample] = []
    for _ in range(config.rollout.max_resample + 1):
        indices, run.cursor = task_batch(
            len(run.tasks), config.rollout.num_task_per_step, run.cursor, config.training.seed
        )
        seen = {group[0].task.id for group in groups}
        tasks = [run.tasks[index] for index in dict.fromkeys(indices)]
        tasks = [task for task in tasks if task.id not in seen]
        prompts = prompts_within(run.loaded, tasks, config.dataset, config.rollout, config.training.max_prompt_len)
        groups += collect(
            run.engine,
            run.loaded,
            prompts,
            config.rollout,
            run.scorer,
            watch,
            config.training.seed,
            number,
            f"step {number}: rollout",
        )
        samples = kept_samples(groups, config.training.keep_accuracy)
        if samples:
            break
    return groups, samples


def rollout_figures(groups: list[list[Rollout]], samples: list[Sample]) -> dict[str, float]:
    """Means over the step's responses."""
    rollouts = [rollout for group in groups for rollout in group]
    if not rollouts:
        raise UserError("training.max_prompt_len: every prompt of the step is longer; raise it")
    count = len(rollouts)
    return {
        "reward": sum(rollout.score.reward for rollout in rollouts) / count,
        "accuracy": sum(rollout.score.correct for rollout in rollouts) / count,
        "response_length": sum(rollout.trajectory.length for rollout in rollouts) / count,
        "truncated": sum(rollout.trajectory.finish_reason == "length" for rollout in rollouts) / count,
        "tokens_per_forward": tokens_per_forward(rollouts),
        "kept_mass": sum(rollout.trajectory.kept_mass for rollout in rollouts) / count,
        "groups": len(groups),
        "groups_kept": len({sample.trajectory.task_id for sample in samples}),
    }


def step_times(run: Run, groups: list[list[Rollout]], watch: Stopwatch) -> dict[str, float]:
    """Tokens per second of the rollout, and the step's seconds by stage."""
    tokens = sum(rollout.trajectory.length for group in groups for rollout in group)
    total = watch.total()
    named = {stage: watch.seconds.get(stage, 0.0) for stage in ("rollout", "reward", "train", "sync")}
    return {
        "tokens_per_second": tokens / named["rollout"],
        **{f"seconds_{stage}": seconds for stage, seconds in named.items()},
        "seconds_other": total - sum(named.values()),
        "seconds": total,
    }


def report_step(step: int, total: int, figures: dict[str, float]) -> None:
    """One line on the console."""
    console.print(
        f"step {step}/{total}  reward {figures['reward']:.3f}  length {figures['response_length']:.1f}  "
        f"tokens/forward {figures['tokens_per_forward']:.2f}  kl {figures.get('kl', 0):.2e}  "
        f"mismatch {figures.get('logp_diff_max', 0):.1e}  {figures['seconds']:.1f} s"
    )


def evaluate_now(run: Run) -> dict[str, Evaluation]:
    """Accuracy on the held-out tasks under each evaluation setting, by the task's own answer; logged."""
    config = run.config
    data_type = config.evaluation.data_type or config.dataset.data_type
    with run.stages("evaluation"):
        results = evaluate(
            run.engine,
            run.loaded,
            run.eval_tasks,
            settings_of(config.evaluation),
            make_scorer(RewardConfig(), data_type),
            dataclasses.replace(config.dataset, data_type=data_type),
            config.training.max_prompt_len,
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
    if run.step == 0 or not path.exists():
        path.write_text(json.dumps({name: dataclasses.asdict(r) for name, r in evaluate_now(run).items()}))
    return json.loads(path.read_text())


def save(run: Run) -> None:
    """A checkpoint from which the run goes on as if it had not stopped."""

    def write(folder: Path) -> None:
        save_model(run.learner.policy.model, run.loaded.tokenizer, folder / "model")
        state = {"step": run.step, "cursor": run.cursor, "learner": run.learner.state_dict()}
        torch.save(state, folder / "trainer.pt")

    save_step(run.folder / "ckpt", run.step, write, run.config.experiment.keep_last)


def newest_step(folder: Path) -> int:
    """The step of the run's newest checkpoint, -1 if there is none."""
    checkpoints = step_folders(folder / "ckpt")
    return checkpoints[-1][0] if checkpoints else -1


def resume(run: Run) -> None:
    """Take up the newest checkpoint of the run's folder, if there is one."""
    checkpoints = step_folders(run.folder / "ckpt")
    truncate_after(run.folder / "samples.jsonl", newest_step(run.folder))
    if not checkpoints:
        return
    step, folder = checkpoints[-1]
    state = torch.load(folder / "trainer.pt", weights_only=True)
    saved = load_model(folder / "model", run.config.model.model_base, torch.float32, "cpu").model
    run.learner.policy.model.load_state_dict(saved.state_dict())
    run.engine.load_weights(run.learner.policy.model.named_parameters())
    run.learner.load_state_dict(state["learner"])
    run.step, run.cursor = state["step"], state["cursor"]
    console.print(f"resumed from {folder} after step {step}")


def export(run: Run) -> None:
    """The trained model in the family's own format."""
    target = run.folder / "ckpt" / run.config.model.optimized_name
    write_folder(target, lambda folder: save_model(run.learner.policy.model, run.loaded.tokenizer, folder))


def write_results(run: Run, before: dict[str, dict[str, float]], after: dict[str, Evaluation]) -> None:
    """results.json (every figure), summary.json (accuracy before and after, seconds by stage) and a table."""
    results = {"before": before, "after": {name: dataclasses.asdict(result) for name, result in after.items()}}
    (run.folder / "results.json").write_text(json.dumps(results, indent=2))
    keep = ("accuracy", "tokens_per_forward")
    short = {
        moment: {name: {key: round(row[key], 4) for key in keep} for name, row in rows.items()}
        for moment, rows in results.items()
    }
    seconds = {stage: round(value, 2) for stage, value in run.stages.seconds.items()}
    seconds["total"] = round(run.stages.total(), 2)
    summary = {"seed": run.config.training.seed} | short | {"seconds": seconds}
    (run.folder / "summary.json").write_text(json.dumps(summary, indent=2))
    rows = []
    for name, now in short["after"].items():
        then = short["before"][name]
        gain = 100 * (now["accuracy"] - then["accuracy"])
        rows.append(
            {
                "sampling": name,
                "tasks": after[name].tasks,
                "accuracy before": f"{100 * then['accuracy']:.1f} %",
                "after": f"{100 * now['accuracy']:.1f} %",
                "gain": f"{gain:+.1f}",
                "tokens/forward before": f"{then['tokens_per_forward']:.2f}",
                "tokens/forward after": f"{now['tokens_per_forward']:.2f}",
            }
        )
    print_table(rows, title=f"held-out tasks, {run.folder}")
    console.print("seconds: " + ", ".join(f"{stage} {value:.0f}" for stage, value in seconds.items()))
