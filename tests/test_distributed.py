"""Several ranks give what one process gives: DeepSpeed's ZeRO-2 and ZeRO-3 over gloo, without a GPU."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from shipped import shipped

from common.config_files import recipes
from models import tiny
from tests import distributed_job
from train.learner_state import load_learner

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = shipped("accelerate_configs", "*.yaml")
STAGES = ("zero2", "zero3")


def accelerate_launch(*arguments: object) -> subprocess.CompletedProcess:
    """`accelerate launch` with those arguments, to its end."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def alone(tiny_sdar: Path, folder: Path) -> dict[str, Any]:
    """What one process gives."""
    return distributed_job.run(tiny_sdar, folder / "alone")


@pytest.fixture(scope="module")
def small(folder: Path) -> Path:
    """The folder of untrained models of two layers, one for each attention."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "LAYERS", 2)
        for family in ("sdar", "dream"):
            tiny.build_tiny(family, folder / "small" / family, seed=3)
    return folder / "small"


@pytest.fixture(scope="module")
def together(tiny_sdar: Path, small: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """What two processes give, by stage."""
    config = ROOT / "accelerate_configs" / "1_node_2_cpus_deepspeed_zero3.yaml"
    done = accelerate_launch("--config_file", config, "--module", "tests.distributed_job", tiny_sdar, small, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return {stage: torch.load(folder / stage / "result.pt", weights_only=False) for stage in STAGES}


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 1e-4) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.shape == other[name].shape and (tensor - other[name]).abs().max() <= tolerance, name


@pytest.mark.parametrize("stage", STAGES)
def test_steps_of_two_processes_equal_those_of_one(alone: dict, together: dict, stage: str) -> None:
    """Policy, value model and finetuning: every figure, every weight, and no rank without responses of its own."""
    two = together[stage]
    assert two["world"] == 2 and two["sharded"] == (stage == "zero3") and not alone["sharded"]
    for one, other in zip(alone["steps"], two["steps"], strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if key == "own_responses":
                assert value == 5 and other[key] in (2, 3)
                continue
            # of a value that has not moved yet it is chance which side of the clip is larger
            assert other[key] == pytest.approx(value, rel=1e-4, abs=0.1 if "clip" in key else 1e-4), key
    for one, other in zip(alone["end"], two["end"], strict=True):
        assert_close(one, other)


def test_every_recipe_is_the_same_on_two_ranks(together: dict, small: Path) -> None:
    """A step of each, with the first model to refer to; the weights that the last one leaves."""
    alone, two = distributed_job.all_recipes(small), together["zero3"]["recipes"]
    assert sorted([*alone["block"]["steps"], *alone["full"]["steps"]]) == list(recipes())
    for attention, found in alone.items():
        for name, figures in found["steps"].items():
            other = two[attention]["steps"][name]
            assert figures["updates"] >= 1 and figures.keys() == other.keys()
            for key, value in figures.items():
                assert other[key] == pytest.approx(value, rel=1e-4, abs=0.1 if "clip" in key else 1e-4), (name, key)
        assert_close(found["end"], two[attention]["end"])


@pytest.mark.parametrize("stage", STAGES)
def test_the_engine_has_the_gathered_weights(together: dict, stage: str) -> None:
    policy, engine = together[stage]["end"][0], together[stage]["engine"]
    assert policy.keys() == engine.keys() and all(torch.equal(policy[name], engine[name]) for name in policy)


@pytest.mark.parametrize("stage", STAGES)
def test_updates_without_a_signal_are_skipped_on_all_ranks(alone: dict, together: dict, stage: str) -> None:
    assert alone["equal"] == together[stage]["equal"] == {"updates": 0, "skipped": 2, "unchanged": True}


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_is_bad_on_one_rank_is_skipped_on_all(alone: dict, together: dict, stage: str) -> None:
    assert alone["bad"] == together[stage]["bad"] == [{"taken": False, "unchanged": True, "bad_in_a_row": 1}] * 2


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_goes_on_with_the_same_and_with_other_ranks(
    alone: dict, together: dict, stage: str, tiny_sdar: Path, folder: Path
) -> None:
    """Two ranks read what two wrote, and one process what two wrote; then the next step is the same."""
    two = together[stage]
    for one, other in zip(two["end"], two["resumed"]["end"], strict=True):
        assert_close(one, other, 1e-6)
    networks = distributed_job.set_up(tiny_sdar)
    for learner, name, weights in zip((networks.learner, networks.critic), ("learner", "critic"), two["saved"]):
        load_learner(learner, folder / stage / name, weights)
    networks.engine.load_weights(networks.learner.network.backbone.named_parameters())
    distributed_job.rl_step(networks, 3)
    assert_close(two["end"][0], distributed_job.tensors(networks.learner))
    assert_close(two["end"][1], distributed_job.tensors(networks.critic))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_every_config(path: Path) -> None:
    """Names say what is in them: nodes, devices of a node, stage."""
    config = load_config_from_file(str(path))
    if path.stem == "cpu":
        assert config.num_processes == 1 and config.use_cpu
        return
    nodes, devices = (int(part) for part in path.stem.split("_")[0:3:2])
    assert (config.num_machines, config.num_processes) == (nodes, nodes * devices)
    assert config.mixed_precision == ("bf16" if "gpus" in path.stem else "no")
    if "zero" in path.stem:
        assert config.deepspeed_config["zero_stage"] == int(path.stem.split("zero")[1][0])
        offload = "cpu" if path.stem.endswith("offload") else "none"
        assert config.deepspeed_config["offload_optimizer_device"] == offload
        assert config.deepspeed_config["offload_param_device"] == "none"


def test_every_size_has_both_stages() -> None:
    sizes = [(nodes, 8) for nodes in (1, 2, 4, 8, 16)] + [(1, 4), (4, 4), (1, 1)]
    wanted = {f"{nodes}_node_{gpus}_gpus_deepspeed_zero{stage}" for nodes, gpus in sizes for stage in (2, 3)}
    assert wanted <= {path.stem for path in CONFIGS}


def test_one_process_goes_on_exactly(alone: dict) -> None:
    for one, other in zip(alone["end"], alone["resumed"]["end"], strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert alone["resumed"]["step"] == alone["steps"][-1]
