"""Supervised finetuning as a job: a set memorised, validation, checkpoints, a run taken up again, the scripts."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common.config import load_config
from common.errors import UserError
from common.jobs import EvalConfig, SFTConfig
from common.stop import Stopped
from launch.start_model import make_missing_model
from models import load_model
from train import run as shared_run
from train import sft_trainer
from train.learner import Learner

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml"]
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
        target = sft_trainer.finetune(config)
    return target, [json.loads(line) for line in (target.parents[1] / "metrics.jsonl").read_text().splitlines()]


def untimed(rows: list[dict]) -> list[dict]:
    """Rows of metrics without what a clock says."""
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def test_a_small_set_is_memorised_and_training_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    ended = f"ended after {rows[-1]['step']} of at most 400 updates: accuracy {100 * rows[-1]['eval/accuracy']:.1f} %"
    assert ended in (printed := capsys.readouterr().out) and "training.stop_at_accuracy=0.6 reached" in printed
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
    """Every pass over three samples takes two updates of two; the last one is filled from the next pass.

    The model says in what blocks it learned.
    """
    short = {"training__max_steps": 0, "training__num_train_epochs": 2, "training__batch_size": 2}
    target, rows = finetune(sft_config(tmp_path, RECORDS, dataset__eval_dataset="", training__block_size=8, **short))
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert load_model(target, "sdar").block_size == 8


def test_the_same_command_gives_the_same_model(tmp_path: Path) -> None:
    models = []
    for seed in (1, 1, 2):
        changes = {"training__max_steps": 2, "dataset__eval_dataset": "", "training__seed": seed}
        target, rows = finetune(sft_config(tmp_path, RECORDS, lr_scheduler__params__warmup_steps=0, **changes))
        models.append(((target / "model.safetensors").read_bytes(), untimed(rows)))
    assert models[0] == models[1]
    assert models[0][0] != models[2][0]


def test_stop_at_accuracy_needs_tasks(tmp_path: Path) -> None:
    config = sft_config(tmp_path, RECORDS, training__stop_at_accuracy=0.5, dataset__eval_dataset="")
    with pytest.raises(UserError, match=r"dataset\.eval_dataset: empty, but training\.stop_at_accuracy"):
        sft_trainer.finetune(config)


def test_a_missing_model_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`made_by` runs the SFT config once, on from where it was stopped; what it makes must be at the model's path."""
    sft_config(tmp_path, RECORDS)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"experiment: {{project: made, trackers: []}}\n"
        f"model: {{pretrained_model: tiny}}\n"
        f"dataset: {{optimization_data: {tmp_path}/records.json, prompts: {{math: '{{question}}'}}}}\n"
        f"training: {{max_steps: 2}}\n"
    )
    runs = tmp_path / "runs"
    path = runs / "made" / "ckpt" / "optimized"

    def start(model: Path, made_by: Path | str = recipe) -> EvalConfig:
        values = {"model": model, "made_by": made_by, "seed": 3, "experiment.runs_dir": runs}
        arguments = ["config=configs/eval_tiny.yaml", *(f"{key}={value}" for key, value in values.items())]
        return load_config("eval", arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft_trainer, "draw_curves", lambda *_: None)
        with pytest.MonkeyPatch.context() as signal_came, pytest.raises(Stopped):
            signal_came.setattr(sft_trainer, "stop_requested", lambda: True)
            make_missing_model(start(path))
        assert make_missing_model(start(path)) and "resumed from" in capsys.readouterr().out
        assert load_model(path, "sdar").family.name == "sdar"
        assert not make_missing_model(start(path))
        assert not make_missing_model(start(tmp_path / "absent", "null"))
        with pytest.raises(UserError, match="made_by"):
            make_missing_model(start(tmp_path / "elsewhere"))


def test_validation_and_the_best_checkpoint(tmp_path: Path) -> None:
    """A share of the prompts is never learned; the model of the lowest loss on them is kept beside the last."""
    records = [{"prompt": f"{a}+{b}", "response": f"{a + b}"} for a in range(1, 4) for b in range(1, 4)]
    changes = {"dataset__validation_share": 0.3, "dataset__eval_dataset": "", "training__eval_every": 2}
    config = sft_config(tmp_path, records, **changes, training__max_steps=6)
    measured, weights, validation_loss = [], [], sft_trainer.validation_loss

    def scripted(learner: Learner, *rest: object) -> float:
        measured.append([validation_loss(learner, *rest) for _ in range(2)])
        weights.append(learner.network.backbone.lm_head.weight.detach().clone())
        return [2.0, 1.0, 3.0][len(weights) - 1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft_trainer, "validation_loss", scripted)
        target, rows = finetune(config)
    assert [row.get("eval/loss") for row in rows] == [None, 2.0, None, 1.0, None, 3.0]
    assert all(first == second for first, second in measured), "the same noise every time"
    assert measured[0][0] > measured[2][0] > 0
    best = load_model(target.with_name("best"), "sdar").model.lm_head.weight
    assert torch.equal(best, weights[1]) and not torch.equal(best, weights[2])
    results = json.loads((target.parents[1] / "results.json").read_text())
    assert results["samples"] == {"learned": 6, "validation": 3, "left_out": {}} and results["updates"] == 6


def test_a_stopped_run_goes_on_as_if_it_had_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same weights and the same rows of metrics, data order, noise, schedule and best checkpoint included."""
    changes = {"training__max_steps": 6, "training__eval_every": 2, "training__batch_size": 2}
    changes |= {"experiment__save_every": 2, "dataset__validation_share": 0.2, "dataset__eval_dataset": ""}
    changes |= {"lr_scheduler__scheduler": "cosine", "lr_scheduler__params__min_lr_scale": 0.1}
    records = RECORDS + [{"prompt": f"{n}+1", "response": f"{n + 1}"} for n in range(5)]
    whole, wanted = finetune(sft_config(tmp_path, records, experiment__project="whole", **changes))
    config = sft_config(tmp_path, records, **changes)
    learned = sft_trainer.train_step

    def stopping(run: sft_trainer.SFTRun) -> dict[str, float]:
        if run.progress.step == 5:
            raise KeyboardInterrupt
        return learned(run)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sft_trainer, "train_step", stopping)
        sft_trainer.finetune(config)
    config.experiment.start_from_scratch = False
    target, rows = finetune(config)
    assert "ckpt/step-0004 after update 4" in capsys.readouterr().out
    assert untimed(rows) == untimed(wanted) and [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for name in ("optimized", "best"):
        ours, theirs = (folder.with_name(name) / "model.safetensors" for folder in (target, whole))
        assert ours.read_bytes() == theirs.read_bytes(), name
    config.dataset.optimization_data = str(tmp_path / "fewer.json")
    (tmp_path / "fewer.json").write_text(json.dumps(records[:3]))
    with pytest.raises(UserError, match=r"start_from_scratch=False: .* was made with more samples than the 2"):
        sft_trainer.finetune(config)


def test_a_mistake_in_the_data_leaves_an_older_run_where_it_is(tmp_path: Path, tiny_sdar: Path) -> None:
    finished = tmp_path / "runs" / "sft" / "results.json"
    finished.parent.mkdir(parents=True)
    finished.write_text("{}")
    config = sft_config(tmp_path, [*RECORDS, {"prompt": "1", "response": ""}], model__pretrained_model=tiny_sdar)
    with pytest.raises(UserError, match=r"record 4 of .* has an empty `response`"):
        sft_trainer.finetune(config)
    with pytest.raises(UserError, match=r"training\.method=random_masking: sdar has block attention"):
        sft_trainer.finetune(sft_config(tmp_path, RECORDS, training__method="random_masking"))
    assert [path.name for path in finished.parent.iterdir()] == ["results.json"]


def test_rows_of_an_epoch_are_all_learned(tmp_path: Path) -> None:
    """Two samples an update of five: the tail of an epoch stands at the head of the next update."""
    records = [{"prompt": f"{n}+1", "response": f"{n + 1}"} for n in range(5)]
    config = sft_config(tmp_path, records, training__batch_size=2, dataset__eval_dataset="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft_trainer, "sft_update", lambda *_: {"loss": 0.0})
        run = sft_trainer.set_up(config)
        prompts: list[int] = []
        patch.setattr(
            sft_trainer,
            "rows_of",
            lambda training, loaded, chosen, *_: prompts.extend(one[0].prompt_ids[1] for one in chosen) or [],
        )
        for _ in range(5):
            figures = sft_trainer.train_step(run)
            run.progress.step += 1
    assert sorted(prompts[:5]) == sorted(prompts[5:]) == [0, 1, 2, 3, 4] and figures["epoch"] == 2.0


@pytest.mark.parametrize("launcher", [[], LAUNCH], ids=["alone", "launched"])
def test_the_script(launcher: list[str], tmp_path: Path) -> None:
    """By itself and by accelerate's launcher, on one device."""
    arguments = [
        "config=configs/sft_tiny.yaml",
        "training.max_steps=2",
        "training.batch_size=4",
        "evaluation.num_task=4",
        "evaluation.max_token=8",
        f"experiment.runs_dir={tmp_path}",
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    script = [sys.executable, *launcher, "train/sft_trado.py", *arguments]
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "sft_tiny_trado_1"
    assert f"finetuned model: {folder}/ckpt/optimized" in done.stdout
    assert "WARNING" not in done.stdout + done.stderr, "a library complains of what is as it should be"
    assert {"config.yaml", "metrics.jsonl", "curves.png", "tensorboard"} <= {path.name for path in folder.iterdir()}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and "eval/accuracy" in rows[1]
    assert load_model(folder / "ckpt" / "optimized", "trado").model.dtype == torch.float32


@pytest.mark.parametrize("moment", ["update", "evaluation"])
def test_a_signal_saves_and_the_run_goes_on_as_if_it_had_not_come(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """SIGTERM in the middle of the fourth update, or of the measurement after it."""
    changes = {"training__max_steps": 6, "training__eval_every": 2, "training__batch_size": 2}
    changes |= {"experiment__save_every": 0}
    records = RECORDS + [{"prompt": f"{n}+1", "response": f"{n + 1}"} for n in range(5)]
    whole, wanted = finetune(sft_config(tmp_path, records, experiment__project="whole", **changes))
    config = sft_config(tmp_path, records, **changes)
    at = {"update": (sft_trainer, "train_step", 4), "evaluation": (shared_run, "evaluate", 2)}
    module, name, number = at[moment]
    real, calls = getattr(module, name), []

    def signalled(*args: object, **named: object) -> object:
        calls.append(None)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **named)

    monkeypatch.setattr(module, name, signalled)
    assert sft_trainer.main(config) == 0
    monkeypatch.undo()
    out = " ".join(capsys.readouterr().out.split())
    assert re.search(r"stopped after update 4 to go on: \S*python .* experiment.start_from_scratch=False", out)
    config.experiment.start_from_scratch = False
    target, rows = finetune(config)
    once = {}
    for row in rows:  # the measurement that was cut short has a row of its own
        once[row["step"]] = once.get(row["step"], {}) | row
    assert untimed(list(once.values())) == untimed(wanted)
    ours, theirs = (folder / "model.safetensors" for folder in (target, whole))
    assert ours.read_bytes() == theirs.read_bytes()
