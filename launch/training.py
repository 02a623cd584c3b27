"""Where RL runs: in this process, in a rank for each device of this node, or in ranks on many nodes.

Over nodes Ray starts the ranks, and after a loss new ones that go on from the last checkpoint.
"""

import os
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from common.checkpoint import newest_step
from common.config_files import accelerate_config
from common.errors import UserError
from common.jobs import RLConfig
from common.runtime import Stopwatch, console
from common.stop import STOP_FILE, exit_code, exit_code_of, signals_noted, stop_requested
from launch.accelerate import launch_ranks, launched
from launch.engines import RemoteEngines
from launch.ray_cluster import device_options, live_nodes, role_of, use_own_interface, wait_for_nodes
from launch.start_model import make_missing_model

SETTLE = 5.0  # seconds until Ray knows that a lost node is gone
DEEPSPEED_KEYS = {
    "zero_stage": "ACCELERATE_DEEPSPEED_ZERO_STAGE",
    "offload_optimizer_device": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "offload_param_device": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
}


def train_here(config: RLConfig, arguments: Sequence[str]) -> int:
    """Run rl.py's job, started with these arguments, on this node; returns the exit code."""
    if config.experiment.rollout_nodes:
        raise UserError(
            f"experiment.rollout_nodes={config.experiment.rollout_nodes} is of multinode_rl.py, and rl.py runs on one "
            "node: start multinode_rl.py on every node, or set it to 0"
        )
    if config.experiment.deepspeed_file and not launched():
        return launch_ranks(config, "rl.py", arguments)
    from train.rl_trainer import read_inputs, reinforce

    def job() -> None:
        inputs, stages = read_inputs(config), Stopwatch()  # a mistake in the data is told before a model is made
        with stages("sft"):
            made = make_missing_model(config)
        if not made:
            stages.seconds.pop("sft")
        reinforce(config, inputs, stages)

    return exit_code_of(job)


class Rank:
    """One process of the trainer; its environment says which."""

    def address(self) -> tuple[str, int]:
        """Where the first rank can be found: this node's address and a free port."""
        import ray

        with socket.socket() as listener:
            listener.bind(("", 0))
            return ray.util.get_node_ip_address(), listener.getsockname()[1]

    def run(self, arguments: list[str], host: str, port: int, trainers: int) -> int:
        """Train to the end; returns the exit code. The first `trainers` nodes train, engines of the others draw."""
        os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
        use_own_interface()
        sys.argv = ["multinode_rl.py", *arguments]  # for the line that says how to go on
        from common.config import load_config
        from train.rl_trainer import main

        config = load_config("rl", arguments)
        engines = partial(engines_behind, config, trainers) if config.experiment.rollout_nodes else None
        return main(config, engines)


def engines_behind(config: RLConfig, trainers: int) -> RemoteEngines:
    """Engines on the nodes that come behind those that train."""
    return RemoteEngines(
        config.model.pretrained_model,
        config.model.model_base,
        config.model.dtype,
        config.experiment.join_timeout,
        nodes=lambda: [node for node in live_nodes() if role_of(node) >= trainers],
        trained=True,
    )


def training_nodes(trainers: int) -> list[dict]:
    """Those of the first `trainers` nodes that are there."""
    return [node for node in live_nodes() if role_of(node) < trainers]


def train_over_nodes(config: RLConfig, arguments: Sequence[str], nodes: int) -> int:
    """Run rl.py's job on all devices of the cluster; returns the exit code.

    Where a node or a rank is lost, the run goes on from its last checkpoint, up to `max_failures` times: with the node
    if it is back within `join_timeout`, else with those that are left.
    """
    experiment = config.experiment
    trainers = nodes - experiment.rollout_nodes
    if trainers < 1:
        raise UserError(
            f"experiment.rollout_nodes={experiment.rollout_nodes} leaves none of the {nodes} nodes to train: lower "
            "it, or start more nodes"
        )
    make_missing_model(config)
    folder, arguments = Path(experiment.runs_dir) / experiment.project, list(arguments)
    with signals_noted():
        for failures in range(experiment.max_failures + 1):
            here = wait_for_nodes(trainers, experiment.join_timeout, nodes=partial(training_nodes, trainers))
            if here < trainers:
                console.print(f"{here} of {trainers} nodes are there: the run goes on with them")
            lost = attempt(config, arguments, trainers)
            if lost is None:
                return exit_code()
            time.sleep(SETTLE)
            step = max(newest_step(folder), 0)
            left = experiment.max_failures - failures
            console.print(f"lost {lost} (experiment.max_failures allows {left} more); going on after step {step}")
            # what was there before this job is aside by now; the run itself is resumed
            key = "experiment.start_from_scratch"
            arguments = [argument for argument in arguments if not argument.startswith(f"{key}=")] + [f"{key}=False"]
    return 1


def attempt(config: RLConfig, arguments: list[str], trainers: int) -> str | None:
    """Train on those of the first `trainers` nodes that are there; None where it came to its end, else what is lost."""
    import ray

    folder = Path(config.experiment.runs_dir)
    folder.mkdir(parents=True, exist_ok=True)
    # a file, not made yet, that all nodes see
    with tempfile.TemporaryDirectory(dir=folder, prefix=".stop-") as name:
        stop = Path(name).resolve() / "stop"
        ranks = start_ranks(training_nodes(trainers), config.experiment.deepspeed_file, stop)
        running, where = {}, ranks[0][1]
        try:
            host, port = ray.get(ranks[0][0].address.remote())
            running = {actor.run.remote(arguments, host, port, trainers): address for actor, address in ranks}
            while running:
                ready, _ = ray.wait(list(running), timeout=0.5)
                for result in ready:
                    where = running.pop(result)
                    ray.get(result)
                if stop_requested():
                    stop.touch()
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)  # of what a rank raised itself
            if "UserError" in type(error).__name__ or isinstance(cause, ValueError):
                raise cause from None
            # the nodes that are gone, else the rank that failed first
            alive = {node["NodeManagerAddress"] for node in live_nodes()}
            gone = sorted({where, *running.values()} - alive)
            last_line = str(error).strip().splitlines()[-1]
            return f"node {', '.join(gone)}" if gone else f"a rank on {where} ({last_line})"
        finally:
            for actor, _ in ranks:
                ray.kill(actor)
    return None


def start_ranks(nodes: list[dict], deepspeed_file: str | None, stop: Path) -> list[tuple[Any, str]]:
    """A Rank on every device of every node, with the address of its node, rank 0 on the first node."""
    import ray

    devices = [(node["NodeManagerAddress"], options) for node in nodes for options in device_options(node)]
    shared = deepspeed_environment(deepspeed_file) | {"WORLD_SIZE": str(len(devices)), STOP_FILE: str(stop)}
    ranks = []
    for number, (address, options) in enumerate(devices):
        # a device of its own is all that a rank sees, so its local rank is 0
        variables = shared | {"RANK": str(number), "LOCAL_RANK": "0"}
        kind = ray.remote(Rank).options(runtime_env={"env_vars": variables}, **options)
        ranks.append((kind.remote(), address))
    return ranks


def deepspeed_environment(name: str | None) -> dict[str, str]:
    """What `accelerate launch` would put into the ranks' environment for that file; nothing for none."""
    if not name:
        return {}
    settings = yaml.safe_load(accelerate_config(name).read_text()).get("deepspeed_config") or {}
    found = {variable: str(settings[key]) for key, variable in DEEPSPEED_KEYS.items() if key in settings}
    return {"ACCELERATE_USE_DEEPSPEED": "true"} | found if settings else {}
