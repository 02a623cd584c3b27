"""The model that a job starts from, made by a finetuning config where it is not there yet (`made_by`)."""

from pathlib import Path

from common.config import load_config
from common.errors import UserError
from common.jobs import EvalConfig, RLConfig
from common.runtime import console


def make_missing_model(config: RLConfig | EvalConfig) -> bool:
    """Run the config's `made_by` where the folder of its model is missing; returns whether it did.

    A finetuning that was stopped goes on. UserError where the model is made elsewhere. Raises Stopped, after a
    checkpoint, where a signal came.
    """
    if isinstance(config.model, str):  # evaluation
        path, made_by, family, seed = config.model, config.made_by, config.model_base, config.seed
    else:
        path, made_by, family = config.model.pretrained_model, config.model.made_by, config.model.model_base
        seed = config.training.seed
    if not made_by or Path(path).exists():
        return False
    from train.sft_trainer import finetune

    console.print(f"{path} is not there yet: finetuning by {made_by} makes it")
    arguments = {"model.model_base": family, "training.seed": seed, "experiment.runs_dir": config.experiment.runs_dir}
    arguments["experiment.start_from_scratch"] = False  # what an earlier call was stopped in goes on
    made = finetune(load_config("sft", [f"config={made_by}", *(f"{key}={value}" for key, value in arguments.items())]))
    if made.resolve() != Path(path).resolve():
        raise UserError(f"made_by: {made_by} makes {made}, but the model's path is {path}")
    return True
