"""Checkpoints of a run, from which it goes on as if it had not stopped, and the models it leaves."""

import json
from pathlib import Path

from common import ranks
from common.checkpoint import Writer, newest_step, save_step, step_folders, write_folder
from common.errors import UserError
from common.metrics import truncate_after
from common.runtime import console
from models import load_network, save_model
from models.value import load_value, save_value
from train.learner import whole_networks, whole_weights
from train.learner_state import (
    load_learner,
    load_random_state,
    save_learner,
    save_random_state,
    whole_state_dict,
    write_adapter,
)
from train.rl_setup import Run


def save(run: Run) -> None:
    """A checkpoint from which the run goes on as if it had not stopped. All ranks must call it."""

    def write(writer: Writer) -> None:
        write_policy(run, writer, "model")
        save_learner(run.learner, writer, "learner")
        if run.critic is not None:
            write_value(run, writer, "value")
            save_learner(run.critic, writer, "critic")
        save_random_state(writer, "random.pt")
        writer.do(writer.path("trainer.json").write_text, json.dumps({"step": run.step, "cursor": run.cursor}))

    save_step(run.folder / "ckpt", run.step, write, run.config.experiment.keep_last)


def resume(run: Run) -> None:
    """Take up the newest whole checkpoint of the run's folder, if there is one; also one by another number of ranks."""
    checkpoints = step_folders(run.folder / "ckpt")
    if ranks.is_main():
        truncate_after(run.folder / "samples.jsonl", newest_step(run.folder))
    if not checkpoints:
        return
    step, folder = checkpoints[-1]
    if run.critic is not None and not (folder / "critic").exists():
        raise UserError(
            f"model.value_base_model is set, but {folder} holds no value model: the run was started without one; "
            "give another experiment.project, or experiment.start_from_scratch=True"
        )
    family = run.config.model.model_base
    with whole_networks(run.learner.accelerator):
        load_learner(run.learner, folder / "learner", load_network(folder / "model", family).state_dict())
        if run.critic is not None:
            load_learner(run.critic, folder / "critic", load_value(folder / "value", family).state_dict())
    run.engine.load_weights(whole_weights(run.learner.network.backbone))
    load_random_state(folder / "random.pt")
    state = json.loads((folder / "trainer.json").read_text())
    run.step, run.cursor = state["step"], state["cursor"]
    console.print(f"resumed from {folder} after step {step}")


def export(run: Run) -> None:
    """The trained model in the family's own format, and the value model beside it. All ranks must call it."""
    names, folder = run.config.model, run.folder / "ckpt"
    write_folder(folder / names.optimized_name, lambda writer: write_policy(run, writer))
    write_adapter(run.learner.network.backbone, names, folder)
    if run.critic is not None:
        write_folder(folder / names.optimized_value_name, lambda writer: write_value(run, writer))


def write_policy(run: Run, writer: Writer, folder: str = "") -> None:
    """The policy in the family's own format. All ranks must call it."""
    network = run.learner.network.backbone
    writer.do(save_model, network, run.loaded.tokenizer, Path(writer.folder, folder), whole_state_dict(network))


def write_value(run: Run, writer: Writer, folder: str = "") -> None:
    """The value model likewise."""
    network = run.critic.network.value_network
    writer.do(save_value, network, run.loaded.tokenizer, Path(writer.folder, folder), whole_state_dict(network))
