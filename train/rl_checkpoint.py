"""Checkpoints of a run, from which it goes on as if it had not stopped, and the models it leaves."""

from __future__ import annotations

from pathlib import Path

import torch

from common.checkpoint import newest_step, save_step, step_folders, write_folder
from common.errors import UserError
from common.metrics import truncate_after
from common.runtime import console
from models import load_model, save_model
from models.value import load_value, save_value
from train.rl_setup import Run


def save(run: Run) -> None:
    """A checkpoint from which the run goes on as if it had not stopped."""

    def write(folder: Path) -> None:
        save_model(run.learner.network.model, run.loaded.tokenizer, folder / "model")
        state = {"step": run.step, "cursor": run.cursor, "learner": run.learner.state_dict()}
        if run.critic is not None:
            save_value(run.critic.network.model, run.loaded.tokenizer, folder / "value")
            state["critic"] = run.critic.state_dict()
        torch.save(state, folder / "trainer.pt")

    save_step(run.folder / "ckpt", run.step, write, run.config.experiment.keep_last)


def resume(run: Run) -> None:
    """Take up the newest checkpoint of the run's folder, if there is one."""
    checkpoints = step_folders(run.folder / "ckpt")
    truncate_after(run.folder / "samples.jsonl", newest_step(run.folder))
    if not checkpoints:
        return
    step, folder = checkpoints[-1]
    state = torch.load(folder / "trainer.pt", weights_only=True)
    saved = load_model(folder / "model", run.config.model.model_base, torch.float32, "cpu").model
    run.learner.network.model.load_state_dict(saved.state_dict())
    run.engine.load_weights(run.learner.network.model.named_parameters())
    run.learner.load_state_dict(state["learner"])
    if run.critic is not None:
        if "critic" not in state:
            raise UserError(
                f"model.value_base_model is set, but {folder} holds no value model: the run was started without one; "
                "give another experiment.project, or experiment.start_from_scratch=True"
            )
        value = load_value(folder / "value", run.config.model.model_base, torch.float32, "cpu")
        run.critic.network.model.load_state_dict(value.state_dict())
        run.critic.load_state_dict(state["critic"])
    run.step, run.cursor = state["step"], state["cursor"]
    console.print(f"resumed from {folder} after step {step}")


def export(run: Run) -> None:
    """The trained model in the family's own format, and the value model beside it."""
    names, tokenizer = run.config.model, run.loaded.tokenizer
    target = run.folder / "ckpt" / names.optimized_name
    write_folder(target, lambda folder: save_model(run.learner.network.model, tokenizer, folder))
    if run.critic is not None:
        target = run.folder / "ckpt" / names.optimized_value_name
        write_folder(target, lambda folder: save_value(run.critic.network.model, tokenizer, folder))
