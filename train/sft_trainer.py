"""Supervised finetuning: records → views → packed rows → cross-entropy, with the machinery of RL."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import ranks
from common.checkpoint import Writer, write_folder
from common.config import dump_config, load_config, settings_of
from common.errors import UserError
from common.metrics import MetricsLog, draw_curves, open_metrics
from common.runtime import Stopwatch, console, device_and_dtype, prepare_run_folder, progress, seed_everything
from common.schema import RewardConfig, SFTConfig, SFTTrainingConfig
from data.tasks import load_sft_records, load_tasks
from models import LoadedModel, load_model, save_model
from models.prompts import encode_prompt, instruction
from models.tiny import build_tiny
from reward.score import make_scorer
from rollout.evaluate import evaluate
from sample.engine import Engine
from train.devices import make_accelerator, whole_networks, whole_weights
from train.learner_state import whole_state_dict
from train.optimize import Learner, make_learner, micro_batches, update
from train.packing import PackedBatch, Row, make_rows
from train.policy import Policy
from train.views import SFT_METHODS

TINY = "tiny"  # as model.pretrained_model: a new small network of the family, made in the run's folder


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt with the response to learn; `length` counts through the stop token, what follows is filled with it."""

    prompt_ids: list[int]
    response_ids: list[int]
    length: int


def main(config: SFTConfig) -> Path:
    """Finetune as the config says; returns the folder of the finetuned model."""
    seed_everything(config.training.seed)
    bf16 = device_and_dtype(config.model.dtype)[1] == torch.bfloat16
    make_accelerator("bf16" if bf16 else "no")  # before any network: ZeRO-3 shards it as it is loaded
    records = load_sft_records(config.dataset.optimization_data)
    tasks = load_tasks(config.dataset.eval_dataset, "dataset.eval_dataset") if config.dataset.eval_dataset else []
    tasks = tasks[: config.evaluation.num_task or None]
    if config.training.stop_at_accuracy is not None and not tasks:
        raise UserError("dataset.eval_dataset: empty, but training.stop_at_accuracy needs tasks to measure it on")
    experiment = config.experiment
    folder = prepare_run_folder(experiment.runs_dir, experiment.project, experiment.start_from_scratch)
    if ranks.is_main():
        (folder / "config.yaml").write_text(dump_config(config))
    loaded = load(config, folder)
    methods = SFT_METHODS[loaded.family.attention]
    if config.training.method not in methods:
        raise UserError(
            f"training.method={config.training.method}: {loaded.family.name} has {loaded.family.attention} attention, "
            f"for which there is {' or '.join(methods)}"
        )
    examples = make_examples(config, loaded, records)
    steps = config.training.max_steps or config.training.num_train_epochs * -(
        -len(examples) // config.training.batch_size
    )
    learner = make_learner(
        Policy(loaded.model, loaded.mask_id),
        config.optimizer.params,
        config.lr_scheduler,
        steps,
        config.training,
        mixed_precision="bf16" if bf16 else "no",
    )
    metrics = open_metrics(folder, experiment.trackers, experiment.project, dataclasses.asdict(config))
    train(config, loaded, learner, examples, tasks, steps, metrics)
    metrics.close()
    if ranks.is_main():
        draw_curves(folder / "metrics.jsonl", folder / "curves.png")
    target = folder / "ckpt" / config.model.optimized_name
    write_folder(target, lambda writer: write_model(loaded, writer))
    console.print(f"finetuned model: {target}")
    return target


def write_model(loaded: LoadedModel, writer: Writer) -> None:
    """The network in the family's own format. All ranks must call it."""
    writer.do(save_model, loaded.model, loaded.tokenizer, writer.folder, whole_state_dict(loaded.model))


def load(config: SFTConfig, folder: Path) -> LoadedModel:
    """The model to finetune; a new tiny one where the config asks for it. Weights are float32."""
    path = config.model.pretrained_model
    if path == TINY:
        path = folder / "untrained"
        if ranks.is_main():
            build_tiny(config.model.model_base, path, config.training.seed)
        ranks.wait_for_all()
    device, _ = device_and_dtype(config.model.dtype)
    loaded = load_model(path, config.model.model_base, torch.float32, device)
    if config.training.gradient_checkpointing_enable:
        loaded.model.gradient_checkpointing_enable()
    return loaded


def make_examples(config: SFTConfig, loaded: LoadedModel, records: Sequence[dict]) -> list[Example]:
    """Records as ids, responses ended by the stop token and filled up with it; too long ones are counted."""
    training = config.training
    around = instruction(loaded.family, config.dataset.data_type, config.dataset.prompts)
    stop = loaded.tokenizer.eos_token_id
    full = loaded.family.attention == "full"  # the canvas is as long as at sampling time, filled with the stop token
    canvas = -(-training.max_gen_length // training.block_size) * training.block_size
    examples, long_prompts, long_responses = [], 0, 0
    for record in records:
        prompt = encode_prompt(loaded, record["prompt"], around)
        response = [*loaded.tokenizer.encode(record["response"], add_special_tokens=False), stop]
        if len(prompt) > training.max_prompt_len:
            long_prompts += 1
        elif len(response) > training.max_gen_length:
            long_responses += 1
        else:
            padding = -(len(prompt) + len(response)) % training.block_size
            if full:
                padding = canvas - len(response)
            examples.append(Example(prompt, response + [stop] * padding, len(response)))
    if long_prompts or long_responses:
        console.print(
            f"{long_prompts} samples dropped for prompts over training.max_prompt_len {training.max_prompt_len}, "
            f"{long_responses} for responses over training.max_gen_length {training.max_gen_length}"
        )
    if not examples:
        raise UserError(f"dataset.optimization_data: no sample of {config.dataset.optimization_data} is short enough")
    return examples


def train(
    config: SFTConfig,
    loaded: LoadedModel,
    learner: Learner,
    examples: Sequence[Example],
    tasks: Sequence,
    steps: int,
    metrics: MetricsLog,
) -> None:
    """Updates over shuffled epochs, until `steps`, or until sampling accuracy reaches `stop_at_accuracy`."""
    training, watch = config.training, Stopwatch()
    interval = next_interval(training, 0.0)
    order = np.empty(0, dtype=np.int64)
    rng = np.random.default_rng(training.seed)
    with progress("finetuning", steps) as advance:
        for step in range(1, steps + 1):
            while len(order) < training.batch_size:
                order = np.concatenate([order, rng.permutation(len(examples))])
            chosen, order = order[: training.batch_size], order[training.batch_size :]
            with watch("train"):
                rows = [row for n, i in enumerate(chosen) for row in view_rows(config, loaded, n, examples[i], rng)]
                figures = sft_update(learner, rows, training.tokens_per_micro_batch)
            figures["lr"] = learner.scheduler.get_last_lr()[0]
            accuracy = None
            if tasks and (step % interval == 0 or step == steps):
                with watch("evaluation"):
                    accuracy = sampled_accuracy(config, whole_model(loaded, learner), tasks)
                figures["eval/accuracy"] = accuracy
                interval = next_interval(training, accuracy)
            metrics.log({"step": step} | figures)
            advance()
            if accuracy is not None:
                shown = f"loss {figures.get('loss', float('nan')):.3f}  accuracy {accuracy:.3f}"
                console.print(f"finetuning step {step}/{steps}  {shown}")
                if training.stop_at_accuracy is not None and accuracy >= training.stop_at_accuracy:
                    break


def next_interval(training: SFTTrainingConfig, accuracy: float) -> int:
    """Updates until accuracy is measured again: four times `eval_every` while it is under half of where to stop."""
    far = training.stop_at_accuracy is not None and accuracy < training.stop_at_accuracy / 2
    return training.eval_every * (4 if far else 1)


def view_rows(
    config: SFTConfig, loaded: LoadedModel, number: int, example: Example, rng: np.random.Generator
) -> list[Row]:
    """Packed rows of one example under freshly drawn views."""
    prompt, response, family = example.prompt_ids, example.response_ids, loaded.family
    method = SFT_METHODS[family.attention][config.training.method]
    views = method(prompt, response, example.length, loaded.mask_id, config.training, rng)
    return make_rows(number, prompt, response, views, family.logit_offset)


def sft_update(learner: Learner, rows: Sequence[Row], token_budget: int) -> dict[str, float]:
    """One update on the mean cross-entropy of all predicted tokens."""
    count = sum(len(row.target) for row in rows)

    def loss(batch: PackedBatch) -> Tensor:
        logp, _ = learner.forward(batch)
        return -logp.sum() / count

    done = update(learner, micro_batches(rows, token_budget), loss)
    figures = {"loss": done.loss, "grad_norm": done.grad_norm} if done.taken else {}
    return figures | {"predicted_tokens": count, "bad_steps": int(not done.taken)}


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


def sampled_accuracy(config: SFTConfig, loaded: LoadedModel, tasks: Sequence) -> float:
    """Accuracy of sampled responses under the first evaluation setting."""
    scorer = make_scorer(RewardConfig(), config.dataset.data_type)
    settings = settings_of(config.evaluation)[:1]
    engine = Engine(loaded.model, loaded.mask_id, loaded.stop_ids)
    training = config.training
    results = evaluate(engine, loaded, tasks, settings, scorer, config.dataset, training.max_prompt_len, training.seed)
    return next(iter(results.values())).accuracy


def make_model_if_missing(path: str, made_by: str | None, model_base: str, seed: int, runs_dir: str) -> bool:
    """Run the SFT config `made_by` where the folder `path` is missing; returns whether it did."""
    if Path(path).exists() or not made_by:
        return False
    console.print(f"{path} is not there yet: made by {made_by}")
    arguments = {"model.model_base": model_base, "training.seed": seed, "experiment.runs_dir": runs_dir}
    made = main(load_config("sft", [f"config={made_by}", *(f"{key}={value}" for key, value in arguments.items())]))
    if made.resolve() != Path(path).resolve():
        raise UserError(f"made_by: {made_by} makes {made}, but the model's path is {path}")
    return True
