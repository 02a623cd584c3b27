"""Supervised finetuning: samples → views → packed rows → cross-entropy, with the machinery of RL."""

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import torch

from common import ranks
from common.checkpoint import Writer, newest_step, save_step, step_folders, write_folder
from common.config import dump_config, settings_of
from common.errors import UserError
from common.metrics import MetricsLog, draw_curves, open_metrics
from common.runtime import Stopwatch, console, device_and_dtype, prepare_run_folder, progress, seed_everything
from common.schema import SFTConfig, SFTTrainingConfig
from common.stop import Stopped, exit_code, resume_command, signals_noted, stop_requested, watched
from common.trajectory import Task
from data.tasks import load_tasks
from models import LoadedModel, load_model, load_network, save_model
from models.defaults import take_defaults
from models.lora import add_lora
from models.tiny import build_tiny
from reward.score import check_tasks, evaluation_scorer
from rollout.evaluate import evaluate
from sample.engine import Engine
from train.devices import make_accelerator, whole_networks, whole_weights
from train.learner_state import load_learner, save_learner, whole_state_dict, write_adapter
from train.optimize import Learner, make_learner
from train.policy import Policy
from train.sft_data import Conversation, Samples, make_samples, read_samples, split, told_reasons
from train.sft_step import elbo_weights, loss_denominator, rows_of, sft_update, validation_loss
from train.views import SFT_METHODS

TINY = "tiny"  # as model.pretrained_model: a new small network of the family, made in the run's folder
KEPT = ("step", "measured", "interval", "best", "good_enough")  # of a run, in its checkpoints
REPORT_SECONDS = 60.0  # between lines on a console that shows no progress bar


@dataclasses.dataclass
class Run:
    """All that lives through the run; what follows `rng` is kept in its checkpoints."""

    config: SFTConfig
    folder: Path
    loaded: LoadedModel
    learner: Learner
    train: list[Conversation]
    held_out: list[Conversation]
    tasks: list[Task]
    steps: int
    metrics: MetricsLog
    rng: np.random.Generator  # of the data order and the noise
    order: np.ndarray  # samples to come, by index; refilled epoch by epoch
    interval: int  # updates between measurements
    step: int = 0  # updates done
    measured: int = 0  # of them, when it was last measured
    best: float | None = None  # the best measurement so far, higher is better
    good_enough: bool = False  # training.stop_at_accuracy is reached


def main(config: SFTConfig) -> int:
    """Finetune as the config says, until the end or a signal.

    Returns the program's exit code: 130 where Ctrl-C stopped it, else 0. All ranks must call it.
    """
    with signals_noted():
        try:
            finetune(config)
        except Stopped:
            launched = "the same command with experiment.start_from_scratch=False"  # its launcher is not known here
            console.print(f"to go on: {launched if ranks.world() > 1 else resume_command()}")
            return exit_code()
    return 0


def finetune(config: SFTConfig) -> Path:
    """Returns the folder of the finetuned model. Raises Stopped, after a checkpoint, where a signal came."""
    seed_everything(config.training.seed)
    bf16 = device_and_dtype(config.model.dtype)[1] == torch.bfloat16
    make_accelerator("bf16" if bf16 else "no")  # before any network: ZeRO-3 shards it as it is loaded
    run, samples = set_up(config)
    with watched(config.experiment.hang_timeout, run.folder / f"hang-rank-{ranks.rank()}.txt", ranks.rank()):
        try:
            figures = train(run)
        except Stopped:
            stop(run)
            raise
    run.metrics.close()
    target = run.folder / "ckpt" / config.model.optimized_name
    write_folder(target, lambda writer: write_model(run.loaded, writer))
    write_adapter(run.loaded.model, config.model, target.parent)
    results = {
        "samples": {"learned": len(run.train), "validation": len(run.held_out), "left_out": dict(samples.left_out)},
        "updates": run.step,
        "last": figures,
    }
    if ranks.is_main():
        draw_curves(run.folder / "metrics.jsonl", run.folder / "curves.png")
        (run.folder / "results.json").write_text(json.dumps(results, indent=2))
    console.print(f"finetuned model: {target}")
    return target


def set_up(config: SFTConfig) -> tuple[Run, Samples]:
    """Read the data, load the network, and take up the newest checkpoint where that is asked for."""
    dataset, training, experiment = config.dataset, config.training, config.experiment
    located = read_samples(dataset)
    tasks = load_tasks(dataset.eval_dataset, "dataset.eval_dataset") if dataset.eval_dataset else []
    tasks = tasks[: config.evaluation.num_task or None]
    check_tasks(evaluation_scorer(config.reward, dataset.data_type), tasks, "dataset.eval_dataset")
    if training.stop_at_accuracy is not None and not tasks:
        raise UserError("dataset.eval_dataset: empty, but training.stop_at_accuracy needs tasks to measure it on")

    def make_folder() -> Path:
        return prepare_run_folder(experiment.runs_dir, experiment.project, experiment.start_from_scratch)

    # where it need not hold a new network: last, so that a mistake in the data leaves an older run where it is
    folder = make_folder() if config.model.pretrained_model == TINY else None
    loaded = load(config, folder)
    take_defaults(config, loaded)
    check_method(training.method, loaded)
    samples = make_samples(config, loaded, located)
    if reasons := told_reasons(samples, training.max_prompt_len, training.max_gen_length):
        console.print(f"samples left out: {reasons}")
    learned, held_out = split(samples.conversations, dataset.validation_share, training.seed)
    folder = folder or make_folder()
    if ranks.is_main():
        (folder / "config.yaml").write_text(dump_config(config))
    steps = training.max_steps or training.num_train_epochs * -(-len(learned) // training.batch_size)
    learner = make_learner(
        Policy(loaded.model, loaded.mask_id),
        config.optimizer.params,
        config.lr_scheduler,
        steps,
        training,
        mixed_precision="bf16" if device_and_dtype(config.model.dtype)[1] == torch.bfloat16 else "no",
    )
    checkpoints = [] if experiment.start_from_scratch else step_folders(folder / "ckpt")
    resume_step = None if experiment.start_from_scratch else checkpoints[-1][0] if checkpoints else -1
    metrics = open_metrics(
        folder, experiment.trackers, experiment.project, dataclasses.asdict(config), resume_step=resume_step
    )
    rng, order = np.random.default_rng(training.seed), np.empty(0, dtype=np.int64)
    interval = next_interval(training, 0.0)
    run = Run(config, folder, loaded, learner, learned, held_out, tasks, steps, metrics, rng, order, interval)
    if checkpoints:
        resume(run, checkpoints[-1][1])
    return run, samples


def load(config: SFTConfig, folder: Path | None) -> LoadedModel:
    """The model to finetune; a new tiny one, made in `folder`, where the config asks for it. Weights are float32."""
    path = config.model.pretrained_model
    if folder is not None:
        path = folder / "untrained"
        if ranks.is_main():
            build_tiny(config.model.model_base, path, config.training.seed)
        ranks.wait_for_all()
    device, _ = device_and_dtype(config.model.dtype)
    loaded = load_model(path, config.model.model_base, torch.float32, device)
    if config.model.lora.r:
        add_lora(loaded.model, config.model.lora)
    if config.training.gradient_checkpointing_enable:
        loaded.model.gradient_checkpointing_enable()
    return loaded


def check_method(method: str, loaded: LoadedModel) -> None:
    """UserError where the family's attention or logits do not go with the method."""
    family = loaded.family
    methods = [name for name in SFT_METHODS[family.attention] if name != "ar" or family.logit_offset == -1]
    if method not in methods:
        shifted = " and logits that are not shifted" if method == "ar" and family.attention == "full" else ""
        raise UserError(
            f"training.method={method}: {family.name} has {family.attention} attention{shifted}, "
            f"for which there is {' or '.join(methods)}"
        )


def train(run: Run) -> dict[str, float]:
    """Updates over shuffled epochs, until `steps`, or until sampling accuracy reaches `stop_at_accuracy`.

    Returns the figures of the last one. Raises Stopped where the run is to end.
    """
    save_every, reported = run.config.experiment.save_every, time.perf_counter()
    figures = measure_if_due(run)  # it may have been stopped within that
    if figures:
        run.metrics.log({"step": run.step} | figures)
    with progress("finetuning", run.steps, run.step) as advance:
        while run.step < run.steps and not run.good_enough:
            watch = Stopwatch()
            figures = train_step(run)
            figures["seconds_train"] = watch.total()
            figures["tokens_per_second"] = figures.pop("tokens") / figures["seconds_train"]
            run.step += 1
            try:
                measured = measure_if_due(run)
                figures |= measured
            finally:
                run.metrics.log({"step": run.step, "seconds": watch.total()} | figures)
            advance(f"loss {figures.get('loss', float('nan')):.3f}  {figures['tokens_per_second']:,.0f} tokens/s")
            if measured or (not console.is_terminal and time.perf_counter() - reported > REPORT_SECONDS):
                reported = time.perf_counter()
                console.print(report_line(run, figures))
            if save_every and run.step % save_every == 0 and run.step < run.steps:
                save(run)
            if ranks.any_rank(stop_requested()) and run.step < run.steps and not run.good_enough:
                raise Stopped
    return figures


def stop(run: Run) -> None:
    """Save what is done."""
    if newest_step(run.folder) < run.step:
        save(run)
    run.metrics.close()
    console.print(f"stopped after update {run.step}")


def train_step(run: Run) -> dict[str, float]:
    """One update on the next `batch_size` samples; its figures, and `tokens`: those of prompts and responses."""
    training = run.config.training
    while len(run.order) < training.batch_size:
        run.order = np.concatenate([run.order, run.rng.permutation(len(run.train))])
    chosen, run.order = run.order[: training.batch_size], run.order[training.batch_size :]
    conversations = [run.train[index] for index in chosen]
    rows = rows_of(training, run.loaded, conversations, run.rng)
    figures = sft_update(
        run.learner,
        rows,
        training.tokens_per_micro_batch,
        loss_denominator(training, conversations, rows),
        elbo_weights(training, rows),
    )
    figures["lr"] = run.learner.scheduler.get_last_lr()[0]
    figures["epoch"] = (run.step + 1) * training.batch_size / len(run.train)
    figures["tokens"] = sum(tokens_of(conversation) for conversation in conversations)
    return figures


def tokens_of(conversation: Conversation) -> int:
    """Tokens of a conversation through its last stop token."""
    return len(conversation[-1].prompt_ids) + conversation[-1].length


def report_line(run: Run, figures: dict[str, float]) -> str:
    """One line on the console."""
    line = f"finetuning step {run.step}/{run.steps}  loss {figures.get('loss', float('nan')):.3f}"
    if "eval/loss" in figures:
        line += f"  validation {figures['eval/loss']:.3f}"
    if "eval/accuracy" in figures:
        line += f"  accuracy {figures['eval/accuracy']:.3f}"
    return f"{line}  {figures['tokens_per_second']:,.0f} tokens/s"


def next_interval(training: SFTTrainingConfig, accuracy: float) -> int:
    """Updates until accuracy is measured again: four times `eval_every` while it is under half of where to stop."""
    far = training.stop_at_accuracy is not None and accuracy < training.stop_at_accuracy / 2
    return training.eval_every * (4 if far else 1)


# --- measurements


def measure_if_due(run: Run) -> dict[str, float]:
    """The measurements after this update, if it is one of those that have them and they are not made yet."""
    due = run.step > run.measured and (run.step % run.interval == 0 or run.step == run.steps)
    if not due:
        return {}
    measured, stop_at = measure(run), run.config.training.stop_at_accuracy
    accuracy = measured.get("eval/accuracy", 0.0)
    run.measured, run.interval = run.step, next_interval(run.config.training, accuracy)
    run.good_enough = bool(run.tasks) and stop_at is not None and accuracy >= stop_at
    return measured


def measure(run: Run) -> dict[str, float]:
    """Validation loss and sampling accuracy, as far as the config gives data for them; the best model is kept.

    `eval/accuracy` is the first evaluation setting's. No best model is kept where accuracy decides when to stop: the
    last is the best then.
    """
    config, figures = run.config, {}
    if run.held_out:
        figures["eval/loss"] = validation_loss(run.learner, run.loaded, run.held_out, config.training)
    if run.tasks:
        figures |= sampled_figures(config, whole_model(run.loaded, run.learner), run.tasks)
    score = figures.get("eval/accuracy", -figures.get("eval/loss", np.inf))
    better = run.best is None or score > run.best
    if figures and better and config.training.stop_at_accuracy is None:
        run.best = score
        write_folder(run.folder / "ckpt" / "best", lambda writer: write_model(run.loaded, writer))
    return figures


def sampled_figures(config: SFTConfig, loaded: LoadedModel, tasks: list[Task]) -> dict[str, float]:
    """Accuracy and tokens per forward of sampled responses under every evaluation setting."""
    results = evaluate(
        Engine(loaded.model, loaded.mask_id, loaded.stop_ids),
        loaded,
        tasks,
        settings_of(config.evaluation),
        evaluation_scorer(config.reward, config.dataset.data_type),
        config.dataset,
        config.evaluation.max_prompt_len,
        config.training.seed,
    )
    figures: dict[str, float] = {"eval/accuracy": next(iter(results.values())).accuracy}
    for name, result in results.items():
        figures[f"eval/{name}/accuracy"] = result.accuracy
        figures[f"eval/{name}/tokens_per_forward"] = result.tokens_per_forward
    return figures


# --- checkpoints


def write_model(loaded: LoadedModel, writer: Writer, folder: str = "") -> None:
    """The network in the family's own format. All ranks must call it."""
    place = Path(writer.folder, folder)
    writer.do(save_model, loaded.model, loaded.tokenizer, place, whole_state_dict(loaded.model))


def whole_model(loaded: LoadedModel, learner: Learner) -> LoadedModel:
    """The model as it is, or where ranks share its weights out, a whole copy for an engine. All ranks must call it."""
    if not learner.sharded:
        return loaded
    with whole_networks(learner.accelerator):
        copy = type(loaded.model)(loaded.model.config)
    copy = copy.to(loaded.model.device, loaded.model.dtype).eval()
    own = dict(copy.named_parameters())
    with torch.no_grad():
        for name, tensor in whole_weights(loaded.model):
            own[name].copy_(tensor)
    return dataclasses.replace(loaded, model=copy)


def save(run: Run) -> None:
    """A checkpoint from which the run goes on as if it had not stopped. All ranks must call it."""
    state = {name: getattr(run, name) for name in KEPT}
    state |= {"order": run.order.tolist(), "rng": run.rng.bit_generator.state}

    def write(writer: Writer) -> None:
        write_model(run.loaded, writer, "model")
        save_learner(run.learner, writer, "learner")
        writer.do(writer.path("trainer.json").write_text, json.dumps(state))

    save_step(run.folder / "ckpt", run.step, write, run.config.experiment.keep_last)


def resume(run: Run, checkpoint: Path) -> None:
    """Take up a checkpoint, also one by another number of ranks; UserError where it was made with other data."""
    state = json.loads((checkpoint / "trainer.json").read_text())
    if max(state["order"], default=0) >= len(run.train):
        raise UserError(
            f"experiment.start_from_scratch=False: {checkpoint} was made with more samples than the {len(run.train)} "
            "of dataset.optimization_data; name the same data"
        )
    with whole_networks(run.learner.accelerator):
        saved = load_network(checkpoint / "model", run.config.model.model_base).state_dict()
        load_learner(run.learner, checkpoint / "learner", saved)
    run.rng.bit_generator.state = state["rng"]
    run.order = np.array(state["order"], dtype=np.int64)
    for name in KEPT:
        setattr(run, name, state[name])
    console.print(f"resumed from {checkpoint} after update {run.step}")
