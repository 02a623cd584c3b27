"""rl.py over the devices of one node: what is done once, before a process is started for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from common.launch import accelerate_config, check_devices, launch
from common.schema import RLConfig
from train.sft_trainer import make_model_if_missing


def launch_ranks(config: RLConfig, script: Path, arguments: Sequence[str]) -> int:
    """Run the script under the accelerate config of experiment.deepspeed_file; returns the exit code."""
    name = config.experiment.deepspeed_file
    file = accelerate_config(name)
    check_devices(name, file, torch.cuda.device_count())
    make_model_if_missing(
        config.model.pretrained_model,
        config.model.made_by,
        config.model.model_base,
        config.training.seed,
        config.experiment.runs_dir,
    )
    return launch(file, script, arguments)
