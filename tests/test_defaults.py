"""What a config leaves open comes from the checkpoint and its family; what it says stays, and is told once."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from common.config import load_config
from common.errors import UserError
from common.jobs import GenerateConfig
from common.runtime import Stopwatch
from models import LoadedModel, load_model
from models.defaults import take_defaults
from models.tiny import build_tiny
from rollout.lm_harness import make_harness_model
from train import rl_trainer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedModel]:
    root = tmp_path_factory.mktemp("models")
    for name in ("sdar", "llada", "mmada", "dream"):
        build_tiny(name, root / name, seed=3)
    return {name: load_model(root / name, name) for name in ("sdar", "llada", "mmada", "dream")}


def generate(loaded: LoadedModel, *arguments: str) -> GenerateConfig:
    config = load_config("generate", ["model=x", *arguments])
    take_defaults(config, loaded)
    return config


@pytest.mark.parametrize(
    "family, arguments, values",
    [
        ("sdar", [], {"max_token": 2000, "block_size": 4, "temperature": 1.0, "denoising_steps_per_block": 4}),
        ("llada", [], {"max_token": 256, "block_size": 8, "temperature": 0.0, "steps": 256}),
        ("mmada", [], {"max_token": 256, "block_size": 64, "temperature": 0.0, "steps": 256}),
        ("dream", [], {"max_token": 256, "block_size": 256, "temperature": 0.1, "top_p": 0.9, "target": "neg_entropy"}),
        ("dream", ["max_token=100"], {"max_token": 100, "block_size": 100, "steps": 100}),
        (
            "dream",
            ["max_token=512", "block_size=32", "temperature=1"],
            {"block_size": 32, "steps": 512, "temperature": 1},
        ),
        ("llada", ["temperature=1.0", "steps=64"], {"temperature": 1.0, "steps": 64, "max_token": 256}),
        (
            "llada",
            ["block_size=4", "remasking_strategy=sequential"],
            {"block_size": 4, "remasking_strategy": "sequential"},
        ),
    ],
)
def test_a_family_has_sampling_defaults(
    family: str, arguments: list[str], values: dict[str, object], tiny: dict[str, LoadedModel]
) -> None:
    config = generate(tiny[family], *arguments)
    assert {key: getattr(config, key) for key in values} == values


@pytest.mark.parametrize("size", [8, 32])
def test_a_checkpoints_block_size_is_the_default(
    size: int, tiny: dict[str, LoadedModel], capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = dataclasses.replace(tiny["sdar"], block_size=size)
    config = generate(loaded)
    assert (config.block_size, config.denoising_steps_per_block) == (size, size)
    assert f"block_size={size}" in capsys.readouterr().out
    config = generate(loaded, "denoising_steps_per_block=6")  # more than the schema's block of 4
    assert (config.block_size, config.denoising_steps_per_block) == (size, 6)
    assert generate(loaded, "block_size=4", "denoising_steps_per_block=2").block_size == 4
    assert capsys.readouterr().out.count(f"own block_size is {size}, the config's another: block_size=4") == 1
    with pytest.raises(UserError, match=rf"denoising_steps_per_block={size + 1} is more than .*block_size={size}"):
        generate(loaded, f"denoising_steps_per_block={size + 1}")


@pytest.mark.parametrize("config", ["eval_tiny", "sdar_eval"])
def test_evaluation_takes_it(config: str, tiny: dict[str, LoadedModel]) -> None:
    made = load_config("eval", [f"config={ROOT}/configs/{config}.yaml", "rollout.denoising_steps_per_block=8"])
    take_defaults(made, dataclasses.replace(tiny["sdar"], block_size=16))
    assert (made.rollout.block_size, made.rollout.denoising_steps_per_block) == (16, 8)


@pytest.mark.parametrize("job, trained", [("rl", "rollout"), ("sft", "training")])
def test_training_takes_it_and_evaluation_follows(job: str, trained: str, tiny: dict[str, LoadedModel]) -> None:
    path = f"config={ROOT}/configs/{job}_sdar.yaml"
    loaded = dataclasses.replace(tiny["sdar"], block_size=16)
    config = load_config(job, [path])
    take_defaults(config, loaded)
    assert getattr(config, trained).block_size == config.evaluation.block_size == 16
    config = load_config(job, [path, f"{trained}.block_size=8"])
    take_defaults(config, loaded)
    assert getattr(config, trained).block_size == config.evaluation.block_size == 8


def test_rollouts_are_not_drawn_greedily(tiny: dict[str, LoadedModel], tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(
        "model: {pretrained_model: x, model_base: llada}\ndataset: {train_dataset: x}\n"
        "rollout: {num_response_per_task: 4}\n"
    )
    config = load_config("rl", [f"config={tmp_path}/x.yaml"])
    take_defaults(config, tiny["llada"])
    assert (config.rollout.temperature, config.rollout.max_token, config.rollout.block_size) == (1.0, 256, 8)
    assert (config.evaluation.temperature, config.evaluation.max_token) == (0.0, 256)


def test_a_config_made_in_python_is_meant(tiny: dict[str, LoadedModel]) -> None:
    config = GenerateConfig(model="x", block_size=2, denoising_steps_per_block=2)
    take_defaults(config, tiny["llada"])
    assert (config.block_size, config.max_token, config.temperature) == (2, 2000, 1.0)


def wide(tiny_sdar: Path, folder: Path) -> Path:
    """A checkpoint whose config.json says blocks of 8."""
    shutil.copytree(tiny_sdar, folder)
    content = json.loads((folder / "config.json").read_text()) | {"block_size": 8}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_the_file_is_read_on_the_way(tiny_sdar: Path, tmp_path: Path) -> None:
    """From config.json to the sampler's settings: in the harness, and in a run of RL and the config that it leaves."""
    folder = wide(tiny_sdar, tmp_path / "model")
    assert make_harness_model(str(folder)).settings.block_size == 8
    arguments = [f"model.pretrained_model={folder}", f"experiment.runs_dir={tmp_path / 'runs'}"]
    config = load_config("rl", [f"config={ROOT}/configs/rl_tiny.yaml", *arguments])
    run = rl_trainer.set_up(config, rl_trainer.read_inputs(config), Stopwatch())
    assert run.config.rollout.block_size == run.config.evaluation.block_size == 8
    assert "block_size: 8" in (run.folder / "config.yaml").read_text()
