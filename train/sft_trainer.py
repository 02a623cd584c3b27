"""Supervised finetuning: samples → views → packed rows → cross-entropy, with the machinery of RL."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import ranks
from common.checkpoint import write_folder
from common.errors import UserError
from common.jobs import SFTConfig
from common.metrics import draw_curves
from common.runtime import Stopwatch, console, progress
from common.schema import SFTTrainingConfig
from common.stop import Stopped, exit_code_of, stop_requested
from data.tasks import load_tasks
from models import FAMILIES, Family, LoadedModel, find_family
from models.defaults import take_defaults
from models.tiny import build_tiny
from rollout.collect import check_questions, encode_tasks
from sample.engine import Engine
from train.learner import Learner, batch_logp, batch_outputs, micro_batches, update
from train.learner_state import write_network
from train.loading import load_trained, policy_learner, whole_model
from train.packing import PackedBatch, Row, make_rows
from train.run import (
    Progress,
    Run,
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
from train.sft_data import Conversation, Samples, level, make_samples, read_samples, split
from train.views import SFT_METHODS, Layout, Views, join_views, layout_of

TINY = "tiny"  # as model.pretrained_model: a new small network of the family, made in the run's folder
REPORT_SECONDS = 60.0  # between lines on a console that shows no progress bar


@dataclass(kw_only=True)
class SFTProgress(Progress):
    """How far a finetuning run is."""

    rng: dict[str, Any]  # state of the generator of the data order and the noise
    order: list[int] = field(default_factory=list)  # samples to come, by index; refilled epoch by epoch
    interval: int  # updates between measurements
    measured: int = 0  # updates done when it was last measured
    best: float | None = None  # the best measurement so far, higher is better
    good_enough: bool = False  # training.stop_at_accuracy is reached


@dataclass(kw_only=True)
class SFTRun(Run):
    """All that lives through a finetuning run."""

    config: SFTConfig
    progress: SFTProgress
    samples: Samples
    learned: list[Conversation]
    validation: list[Conversation]
    updates: int  # of the whole run
    unit: str = "update"


def main(config: SFTConfig) -> int:
    """Finetune as the config says, until the end or a signal.

    Returns the program's exit code: 130 where Ctrl-C stopped it, else 0. All ranks must call it.
    """
    return exit_code_of(lambda: finetune(config))


def finetune(config: SFTConfig) -> Path:
    """Returns the folder of the finetuned model. Raises Stopped, after a checkpoint, where a signal came."""
    run = set_up(config)
    with until_stopped(run):
        resume(run)
        figures = train(run)
    run.metrics.close()
    target = export(run)
    samples = {"learned": len(run.learned), "validation": len(run.validation), "left_out": run.samples.left_out}
    results = {"samples": samples, "updates": run.progress.step, "last": figures}
    if ranks.is_main():
        draw_curves(run.folder / "metrics.jsonl", run.folder / "curves.png")
        (run.folder / "results.json").write_text(json.dumps(results, indent=2))
    console.print(f"finetuned model: {target}")
    return target


def set_up(config: SFTConfig) -> SFTRun:
    """Read the data and load the network; then, when no mistake can be found any more, open the run's records."""
    begin(config)
    dataset, training, model_config = config.dataset, config.training, config.model
    check_method(training.method, find_family(model_config.model_base))
    check_corruption(training, find_family(model_config.model_base))
    located = read_samples(dataset)
    tasks = load_tasks(dataset.eval_dataset, "dataset.eval_dataset") if dataset.eval_dataset else []
    held_out = held_out_tasks(config, tasks, "dataset.eval_dataset", dataset.data_type, dataset.data_type)
    if training.stop_at_accuracy is not None and not tasks:
        raise UserError("dataset.eval_dataset: empty, but training.stop_at_accuracy needs tasks to measure it on")
    path, folder = model_config.pretrained_model, None
    if path == TINY:  # the run's folder is opened before the samples are encoded: the new network lies in it
        folder = make_folder(config)
        path = folder / "untrained"
        if ranks.is_main():
            build_tiny(model_config.model_base, path, training.seed)
        ranks.wait_for_all()
    loaded = load_trained(model_config, training, path)
    take_defaults(config, loaded)
    if loaded.block_size not in (None, training.block_size):
        loaded.model.config.block_size = training.block_size  # what it learns is written with it
    if training.corrupt_p:
        loaded.model.config.trained_to_edit = True  # config.json says so to who samples from it
    check_questions(loaded, tasks, "dataset.eval_dataset")
    encode_tasks(loaded, tasks[:1], held_out.dataset, config.evaluation.start_with_think)  # a mistake shows here
    samples = make_samples(config, loaded, located)
    if reasons := samples.reasons(training):
        console.print(f"samples left out: {reasons}")
    learned, validation = split(samples.conversations, dataset.validation_share, training.seed)
    updates = training.max_steps or training.num_train_epochs * -(-len(learned) // training.batch_size)
    learner = policy_learner(config, loaded, updates)
    folder = folder or make_folder(config)
    metrics, checkpoint, state = open_records(config, folder)
    fresh = {"rng": np.random.default_rng(training.seed).bit_generator.state, "interval": next_interval(training, 0.0)}
    run = SFTRun(
        config=config,
        folder=folder,
        metrics=metrics,
        checkpoint=checkpoint,
        progress=SFTProgress(**fresh | state),
        held_out=held_out,
        loaded=loaded,
        learner=learner,
        samples=samples,
        learned=learned,
        validation=validation,
        updates=updates,
    )
    if max(run.progress.order, default=0) >= len(learned):
        raise UserError(
            f"experiment.start_from_scratch=False: {checkpoint} was made with more samples than the {len(learned)} "
            "of dataset.optimization_data; name the same data"
        )
    return run


def check_method(method: str, family: Family) -> None:
    """UserError where the family's attention or logits do not go with the method."""
    methods = [name for name in SFT_METHODS[family.attention] if name != "ar" or family.logit_offset == -1]
    if method not in methods:
        shifted = " and logits that are not shifted" if method == "ar" and family.attention == "full" else ""
        raise UserError(
            f"training.method={method}: {family.name} has {family.attention} attention{shifted}, "
            f"for which there is {' or '.join(methods)}"
        )


def check_corruption(training: SFTTrainingConfig, family: Family) -> None:
    """UserError where tokens are to be corrupted under an attention whose sampling does not edit."""
    if training.corrupt_p and family.attention != "block":
        others = ", ".join(sorted(name for name, one in FAMILIES.items() if one.attention == "block"))
        raise UserError(
            f"training.corrupt_p={training.corrupt_p}: {family.name} has full attention, where no sampling edits; "
            f"set it to 0, or take a family of block attention ({others})"
        )


# --- the updates


def train(run: SFTRun) -> dict[str, float]:
    """Updates over shuffled epochs, until all are done, or until sampling accuracy reaches `stop_at_accuracy`.

    Returns the figures of the last one. Raises Stopped where the run is to end.
    """
    state, save_every, reported = run.progress, run.config.experiment.save_every, time.perf_counter()
    goal = run.config.training.stop_at_accuracy
    figures = measure_if_due(run)  # it may have been stopped within that
    if figures:
        run.metrics.log({"step": state.step} | figures)
    with progress("finetuning", run.updates, state.step, at_most=goal is not None) as advance:
        while state.step < run.updates and not state.good_enough:
            watch = Stopwatch()
            figures = train_step(run)
            figures["seconds_train"] = watch.total()
            figures["tokens_per_second"] = figures.pop("tokens") / figures["seconds_train"]
            state.step += 1
            try:
                measured = measure_if_due(run)
                figures |= measured
            finally:
                run.metrics.log({"step": state.step, "seconds": watch.total()} | figures)
            advance(f"loss {figures.get('loss', float('nan')):.3f}  {figures['tokens_per_second']:,.0f} tokens/s")
            if measured or (not console.is_terminal and time.perf_counter() - reported > REPORT_SECONDS):
                reported = time.perf_counter()
                console.print(report_line(run, figures))
            if save_every and state.step % save_every == 0 and state.step < run.updates:
                save(run)
            if ranks.any_rank(stop_requested()) and state.step < run.updates and not state.good_enough:
                raise Stopped
    if goal is not None and "eval/accuracy" in figures:
        console.print(
            f"finetuning ended after {state.step} of at most {run.updates} updates: accuracy "
            f"{100 * figures['eval/accuracy']:.1f} % on {run.config.dataset.eval_dataset}, "
            f"training.stop_at_accuracy={goal:g} {'reached' if state.good_enough else 'not reached'}"
        )
    return figures


def train_step(run: SFTRun) -> dict[str, float]:
    """One update on the next `batch_size` samples; its figures, and `tokens`: those of prompts and responses."""
    training, state = run.config.training, run.progress
    rng = np.random.default_rng()
    rng.bit_generator.state = state.rng
    while len(state.order) < training.batch_size:
        state.order += rng.permutation(len(run.learned)).tolist()
    chosen, state.order = state.order[: training.batch_size], state.order[training.batch_size :]
    conversations = level([run.learned[index] for index in chosen], run.loaded, training)
    rows = rows_of(training, run.loaded, conversations, rng, run.learner)
    state.rng = rng.bit_generator.state
    weights = loss_weights(training, conversations, rows)
    figures = sft_update(run.learner, rows, training.tokens_per_micro_batch, *weights)
    figures["lr"] = run.learner.scheduler.get_last_lr()[0]
    figures["epoch"] = (state.step + 1) * training.batch_size / len(run.learned)
    last_turns = [conversation[-1] for conversation in conversations]  # their prompts hold the turns before
    figures["tokens"] = sum(len(example.prompt_ids) + example.length for example in last_turns)
    return figures


def rows_of(
    training: SFTTrainingConfig,
    loaded: LoadedModel,
    conversations: Sequence[Conversation],
    rng: np.random.Generator,
    learner: Learner | None = None,
) -> list[Row]:
    """Packed rows of conversations under freshly drawn views; `learner` draws what its model is to corrupt."""
    method, layout = SFT_METHODS[loaded.family.attention][training.method], layout_of(loaded, training.block_size)
    views = [
        join_views([method(example, layout, training, rng) for example in conversation])
        for conversation in conversations
    ]
    if training.corrupt_p and training.corrupt_from == "model":
        views = with_drafts(learner, conversations, views, layout, training.tokens_per_micro_batch, rng)
    return packed(conversations, views, layout)


def packed(conversations: Sequence[Conversation], views: Sequence[Views], layout: Layout) -> list[Row]:
    """The rows of conversations, given the views of each."""
    rows = []
    for number, (conversation, own) in enumerate(zip(conversations, views)):
        last = conversation[-1]  # its prompt holds the examples before it
        rows += make_rows(number, last.prompt_ids, last.response_ids, own, layout.logit_offset)
    return rows


def with_drafts(
    learner: Learner,
    conversations: Sequence[Conversation],
    views: Sequence[Views],
    layout: Layout,
    token_budget: int,
    rng: np.random.Generator,
) -> list[Views]:
    """The views with tokens that the model draws, all at once at temperature 1, in place of their drafted masks."""
    sizes = [int(one.drafted.sum()) for one in views]
    rows = packed(conversations, [replace(one, predict=one.drafted) for one in views], layout)
    uniform = torch.from_numpy(rng.uniform(size=sum(sizes)).astype(np.float32))

    def draw(batch: PackedBatch) -> Tensor:
        return learner.forward(batch, 1.0, uniform[batch.predicted].to(batch.ids.device))[0]

    drawn = batch_outputs(learner, micro_batches(rows, token_budget), draw)  # ids are exact in float32 up to 2^24
    filled = []
    for one, tokens in zip(views, drawn.long().split(sizes)):
        inputs = one.inputs.copy()
        inputs[one.drafted] = tokens.numpy()
        filled.append(replace(one, inputs=inputs))
    return filled


def loss_weights(
    training: SFTTrainingConfig, conversations: Sequence[Conversation], rows: Sequence[Row]
) -> tuple[float, Tensor | None]:
    """What the summed losses are divided by, and the weight of each, (predicted,), in the order of the rows.

    Without weights (None) each counts 1 and the divisor is their number; under the ELBO that of all predictable tokens.
    Where visible tokens are predicted beside masked ones it is the sum of their weights.
    """
    if training.corrupt_p:
        weight = torch.from_numpy(np.concatenate([row.weight for row in rows])).float()
        return float(weight.sum()), weight
    if training.loss_weight == "none":
        return sum(len(row.target) for row in rows), None
    examples = [example for conversation in conversations for example in conversation]
    predictable = [min(one.length + training.post_num, len(one.response_ids)) for one in examples]
    weight = torch.from_numpy(np.concatenate([row.weight for row in rows])).float()
    return training.mask_times_per_sample * sum(predictable), weight


def sft_update(
    learner: Learner,
    rows: Sequence[Row],
    token_budget: int | None,
    denominator: float | None = None,
    weight: Tensor | None = None,
) -> dict[str, float]:
    """One update on the weighted sum of the predicted tokens' cross-entropies over `denominator`, or on their mean."""
    count = sum(len(row.target) for row in rows)

    def loss(batch: PackedBatch) -> Tensor:
        logp, _ = learner.forward(batch)
        if weight is not None:
            logp = logp * weight[batch.predicted].to(logp.device)
        return -logp.sum() / (denominator or count)

    done = update(learner, micro_batches(rows, token_budget), loss)
    figures = {"loss": done.loss, "grad_norm": done.grad_norm} if done.taken else {}
    return figures | done.routing | {"predicted_tokens": count, "bad_steps": int(not done.taken)}


def report_line(run: SFTRun, figures: dict[str, float]) -> str:
    """One line on the console."""
    goal = run.config.training.stop_at_accuracy
    line = f"finetuning step {run.progress.step}/{run.updates}  loss {figures.get('loss', float('nan')):.3f}"
    if "eval/loss" in figures:
        line += f"  validation {figures['eval/loss']:.3f}"
    if "eval/accuracy" in figures:
        line += f"  accuracy {100 * figures['eval/accuracy']:.1f} %" + (f" of {100 * goal:g}" if goal else "")
    return f"{line}  {figures['tokens_per_second']:,.0f} tokens/s"


# --- measurements


def measure_if_due(run: SFTRun) -> dict[str, float]:
    """The measurements after this update, if it is one of those that have them and they are not made yet."""
    state, training = run.progress, run.config.training
    if state.step <= state.measured or (state.step % state.interval and state.step != run.updates):
        return {}
    figures = measure(run)
    accuracy = figures.get("eval/accuracy", 0.0)
    state.measured, state.interval = state.step, next_interval(training, accuracy)
    state.good_enough = training.stop_at_accuracy is not None and accuracy >= training.stop_at_accuracy
    return figures


def next_interval(training: SFTTrainingConfig, accuracy: float) -> int:
    """Updates until accuracy is measured again: four times `eval_every` while it is under half of where to stop."""
    far = training.stop_at_accuracy is not None and accuracy < training.stop_at_accuracy / 2
    return training.eval_every * (4 if far else 1)


def measure(run: SFTRun) -> dict[str, float]:
    """Validation loss and sampling accuracy, as far as the config gives data for them; the best model is kept.

    `eval/accuracy` is the first evaluation setting's. No best model is kept where accuracy decides when to stop: the
    last is the best then.
    """
    figures: dict[str, float] = {}
    if run.validation:
        figures["eval/loss"] = validation_loss(run.learner, run.loaded, run.validation, run.config.training)
    if run.held_out.tasks:
        whole = whole_model(run.loaded, run.learner)
        engine = Engine(whole.model, whole.mask_id, whole.stop_ids)
        results, sampled = evaluate_held_out(run, engine, whole)
        figures |= {"eval/accuracy": next(iter(results.values())).accuracy} | sampled
    score = figures.get("eval/accuracy", -figures.get("eval/loss", np.inf))
    better = run.progress.best is None or score > run.progress.best
    if figures and better and run.config.training.stop_at_accuracy is None:
        run.progress.best = score
        best = run.folder / "ckpt" / "best"
        write_folder(best, lambda writer: write_network(run.learner, run.loaded.tokenizer, writer))
    return figures


def validation_loss(
    learner: Learner, loaded: LoadedModel, conversations: Sequence[Conversation], training: SFTTrainingConfig
) -> float:
    """The loss on samples that are not learned, under the same noise every time."""
    conversations = level(conversations, loaded, training)
    rows = rows_of(training, loaded, conversations, np.random.default_rng([training.seed, 1]), learner)
    logp = batch_logp(learner, micro_batches(rows, training.tokens_per_micro_batch), 1.0)  # (predicted,)
    denominator, weight = loss_weights(training, conversations, rows)
    return -float((logp if weight is None else logp * weight).sum()) / denominator
