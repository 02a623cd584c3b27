"""Supervised finetuning: the loss against the plain one, a set memorised, the script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import training_reference as plain
from accelerate import Accelerator

from common.config import load_config
from common.errors import UserError
from common.schema import SFTConfig
from models import load_model, load_network
from train import sft_trainer
from train.optimize import Learner
from train.packing import make_row
from train.policy import Policy
from train.views import random_block_views

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "sdar"
RECORDS = [
    {"prompt": "1+2", "response": "1+2=3;\\boxed{3}"},
    {"prompt": "4+4", "response": "4+4=8;\\boxed{8}"},
    {"prompt": "5+2+1", "response": "5+2=7;7+1=8;\\boxed{8}"},
]


def sft_config(folder: Path, records: list[dict], **changes: object) -> SFTConfig:
    """The tiny config on records of ours; keywords are keys with __ for the dot."""
    data = folder / "records.json"
    tasks = [{"question": one["prompt"], "ground_truth_answer": one["response"][-2]} for one in RECORDS]
    data.write_text(json.dumps(records))
    (folder / "tasks.json").write_text(json.dumps(tasks))
    values = {
        "dataset.optimization_data": data,
        "dataset.eval_dataset": folder / "tasks.json",
        "experiment.runs_dir": folder / "runs",
        "experiment.project": "sft",
        "experiment.trackers": "[]",
        "training.stop_at_accuracy": "null",
        "training.batch_size": len(RECORDS),
        "evaluation.max_token": 24,
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    arguments = [f"config={ROOT}/configs/sft_tiny.yaml", *(f"{key}={value}" for key, value in values.items())]
    return load_config("sft", arguments)


def finetune(config: SFTConfig) -> tuple[Path, list[dict]]:
    """The finetuned model's folder and the rows of metrics."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft_trainer, "draw_curves", lambda *_: None)
        target = sft_trainer.main(config)
    return target, [json.loads(line) for line in (target.parents[1] / "metrics.jsonl").read_text().splitlines()]


def test_loss_and_gradient_equal_the_reference() -> None:
    """The mean cross-entropy of all masked tokens of the batch, packed in whatever way."""
    model = load_network(GOLDEN, "sdar")
    mask_id, vocabulary = model.config.mask_token_id, model.config.vocab_size
    rng = np.random.default_rng(4)
    rows, views_of, trajectories = [], [], []
    for prompt_length, blocks in ((5, 2), (8, 1), (3, 4), (1, 1)):
        one = plain.random_trajectory(rng, prompt_length, blocks, 4, vocabulary, mask_id)
        views = random_block_views(one.prompt_ids, one.response_ids, one.length, 4, mask_id, rng, 0.1, 0.9, 1)
        rows.append(make_row(0, one.prompt_ids, one.response_ids, views))
        views_of.append(views)
        trajectories.append(one)
    logp = []
    for one, views in zip(trajectories, views_of):
        for n in range(len(views)):
            start, offsets = int(views.block[n]) * 4, np.flatnonzero(views.predict[n]).tolist()
            targets = [(one.prompt_ids + one.response_ids)[start + offset] for offset in offsets]
            view = plain.PlainView(start, views.inputs[n].tolist(), offsets, targets, [], [])
            logp.append(plain.view_logp(model, one, [view], 4, mask_id))
    wanted = -torch.cat(logp).mean()
    wanted.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
    for budget in (1, 100, 10**6):
        model.zero_grad()
        found: dict[str, torch.Tensor] = {}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer.register_step_pre_hook(
            lambda *_, kept=found: kept.update({name: p.grad.clone() for name, p in model.named_parameters()})
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        learner = Learner(Policy(model, mask_id), optimizer, scheduler, Accelerator(), 1e9)
        figures = sft_trainer.sft_update(learner, rows, budget)
        assert figures["loss"] == pytest.approx(float(wanted.detach()), abs=1e-5)
        assert figures["predicted_tokens"] == sum(int(views.predict.sum()) for views in views_of)
        assert figures["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
        for name, gradient in gradients.items():
            assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_a_small_set_is_memorised_and_training_stops(tmp_path: Path) -> None:
    """The loss falls until responses drawn to the very prompts are right; then training stops, long before the end."""
    config = sft_config(
        tmp_path,
        RECORDS,
        training__stop_at_accuracy=0.6,
        training__max_steps=400,
        training__eval_every=5,
        lr_scheduler__params__warmup_steps=5,
    )
    target, rows = finetune(config)
    losses = [row["loss"] for row in rows]
    assert np.mean(losses[-5:]) < 0.4 * np.mean(losses[:5])
    accuracies = {row["step"]: row["eval/accuracy"] for row in rows if "eval/accuracy" in row}
    before = [0.0, *accuracies.values()]
    gaps = np.diff([0, *accuracies]).tolist()
    assert gaps == [5 if accuracy >= 0.3 else 20 for accuracy in before[: len(gaps)]], "more often near the end"
    assert rows[-1]["step"] < 400 and accuracies.popitem()[1] >= 0.6
    assert all(value < 0.6 for value in accuracies.values())
    assert rows[0]["lr"] == pytest.approx(1e-3 / 5) and rows[-1]["lr"] == pytest.approx(1e-3)
    assert load_model(target, "sdar").mask_id >= 0
    assert (target.parents[1] / "config.yaml").exists()


def test_no_stop_without_being_asked(tmp_path: Path) -> None:
    """Accuracy is measured every so often and at the end; an accuracy of 0 does stop where 0 was asked for."""
    target, rows = finetune(sft_config(tmp_path, RECORDS, training__max_steps=5, training__eval_every=2))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [2, 4, 5]
    stopping = {"training__max_steps": 5, "training__eval_every": 2, "training__stop_at_accuracy": 0.0}
    _, rows = finetune(sft_config(tmp_path, RECORDS, **stopping))
    assert [row["step"] for row in rows] == [1, 2]
    assert (target.parents[2] / "sft.old-1" / "metrics.jsonl").exists()


def test_epochs_without_a_number_of_steps(tmp_path: Path) -> None:
    """Every pass over three samples takes two updates of two; the last one is filled from the next pass."""
    short = {"training__max_steps": 0, "training__num_train_epochs": 2, "training__batch_size": 2}
    _, rows = finetune(sft_config(tmp_path, RECORDS, dataset__eval_dataset="", **short))
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


def test_the_same_command_gives_the_same_model(tmp_path: Path) -> None:
    models = []
    for seed in (1, 1, 2):
        changes = {"training__max_steps": 2, "dataset__eval_dataset": "", "training__seed": seed}
        target, rows = finetune(sft_config(tmp_path, RECORDS, lr_scheduler__params__warmup_steps=0, **changes))
        models.append(((target / "model.safetensors").read_bytes(), rows))
    assert models[0] == models[1]
    assert models[0][0] != models[2][0]


def test_too_long_samples_are_counted(tiny_sdar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lengths in tokens: a prompt is its characters and two, a response its characters and the stop token."""
    long = [
        {"prompt": "1" * 11, "response": "1"},
        {"prompt": "1", "response": "1" * 30},
        {"prompt": "2", "response": "2" * 29},
    ]
    limits = {"training__max_prompt_len": 12, "training__max_gen_length": 30}
    config = sft_config(tmp_path, RECORDS + long, **limits)
    loaded = load_model(tiny_sdar, "sdar")
    records = json.loads(Path(config.dataset.optimization_data).read_text())
    examples = sft_trainer.make_examples(config, loaded, records)
    out = capsys.readouterr().out
    assert "1 samples dropped for prompts over training.max_prompt_len 12" in out
    assert "1 for responses over training.max_gen_length 30" in out
    assert len(examples) == 4
    stop = loaded.tokenizer.eos_token_id
    for example, record in zip(examples, [*RECORDS, long[2]]):
        assert (len(example.prompt_ids) + len(example.response_ids)) % 4 == 0
        text, end = example.response_ids[: example.length - 1], example.response_ids[example.length - 1 :]
        assert loaded.tokenizer.decode(text) == record["response"]
        assert set(end) == {stop} and len(end) <= 4
        assert loaded.tokenizer.decode(example.prompt_ids, skip_special_tokens=True) == record["prompt"]
    with pytest.raises(UserError, match=r"dataset\.optimization_data: no sample of .* is short enough"):
        sft_trainer.make_examples(config, loaded, long[:2])


def test_stop_at_accuracy_needs_tasks(tmp_path: Path) -> None:
    config = sft_config(tmp_path, RECORDS, training__stop_at_accuracy=0.5, dataset__eval_dataset="")
    with pytest.raises(UserError, match=r"dataset\.eval_dataset: empty, but training\.stop_at_accuracy"):
        sft_trainer.main(config)


def test_a_missing_model_is_made(tmp_path: Path) -> None:
    """`made_by` runs the SFT config once; what it makes must be where the model's path says."""
    sft_config(tmp_path, RECORDS)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"experiment: {{project: made, trackers: []}}\n"
        f"model: {{pretrained_model: tiny}}\n"
        f"dataset: {{optimization_data: {tmp_path}/records.json, prompts: {{math: '{{question}}'}}}}\n"
        f"training: {{max_steps: 1}}\n"
    )
    runs = tmp_path / "runs"
    path = runs / "made" / "ckpt" / "optimized"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft_trainer, "draw_curves", lambda *_: None)
        assert sft_trainer.make_model_if_missing(str(path), str(recipe), "sdar", 3, str(runs))
        assert load_model(path, "sdar").family.name == "sdar"
        assert not sft_trainer.make_model_if_missing(str(path), str(recipe), "sdar", 3, str(runs))
        assert not sft_trainer.make_model_if_missing(str(tmp_path / "absent"), None, "sdar", 3, str(runs))
        with pytest.raises(UserError, match="made_by"):
            sft_trainer.make_model_if_missing(str(tmp_path / "elsewhere"), str(recipe), "sdar", 3, str(runs))


def test_the_script(tmp_path: Path) -> None:
    arguments = [
        "config=configs/sft_tiny.yaml",
        "training.max_steps=2",
        "training.batch_size=4",
        "evaluation.num_task=4",
        "evaluation.max_token=8",
        f"experiment.runs_dir={tmp_path}",
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    script = [sys.executable, "train/sft_sdar.py", *arguments]
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "sft_tiny_sdar_1"
    assert f"finetuned model: {folder}/ckpt/optimized" in done.stdout
    assert {"config.yaml", "metrics.jsonl", "curves.png", "tensorboard"} <= {path.name for path in folder.iterdir()}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and "eval/accuracy" in rows[1]
    assert load_model(folder / "ckpt" / "optimized", "sdar").model.dtype == torch.float32
