"""Starting one process per device by `accelerate launch`, and passing on the wish to stop."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from common.config_files import accelerate_config
from common.errors import UserError
from common.jobs import EvalConfig, RLConfig
from common.runtime import ROOT
from common.stop import STOP_FILE, exit_code, signals_noted, stop_requested
from launch.start_model import make_missing_model


def launched() -> bool:
    """Whether a launcher started this process: for a single one accelerate's sets no rank, and `launch_ranks` tells."""
    return "LOCAL_RANK" in os.environ or STOP_FILE in os.environ


def check_devices(name: str, file: Path, gpus: int) -> None:
    """UserError unless the file is for one node that has as many GPUs as it asks for."""
    asked = yaml.safe_load(file.read_text())
    if asked["num_machines"] > 1:
        raise UserError(
            f"experiment.deepspeed_file={name} is for {asked['num_machines']} nodes: start multinode_rl.py on each of "
            "them, or name a file for one node"
        )
    if "cpu" not in file.stem and asked["num_processes"] > gpus:
        raise UserError(
            f"experiment.deepspeed_file={name} is for {asked['num_processes']} GPUs, but this machine has {gpus}: "
            "name another file of accelerate_configs/, or null for one process"
        )


def launch_ranks(config: RLConfig | EvalConfig, script: str, arguments: Sequence[str]) -> int:
    """Run the script under the accelerate config of experiment.deepspeed_file; returns the exit code.

    A missing model is made before, once. SIGTERM and Ctrl-C let the ranks save first.
    """
    import torch  # --help does without

    name = config.experiment.deepspeed_file
    file = accelerate_config(name)
    check_devices(name, file, torch.cuda.device_count())
    make_missing_model(config)
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(file)]
    command += [str(ROOT / script), *arguments]
    with tempfile.TemporaryDirectory() as folder, signals_noted():
        stop_file = Path(folder) / "stop"
        # a session of its own: Ctrl-C reaches this process alone
        job = subprocess.Popen(command, env=os.environ | {STOP_FILE: str(stop_file)}, start_new_session=True)
        while True:
            try:
                code = job.wait(timeout=0.5)
                return exit_code() if stop_requested() and code == 0 else code
            except subprocess.TimeoutExpired:
                if stop_requested():
                    stop_file.touch()
