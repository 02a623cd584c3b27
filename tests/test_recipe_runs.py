"""Every published objective through whole small runs: resumed bit for bit, and with adapters in the weights' place."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_rl import rows_of, run_rl

from common.config_files import recipes
from common.schema import NEEDS
from models import tiny
from train.recipes import keys_of_recipe

SMALL = {
    "experiment__total_step": 2,
    "experiment__eval_every": 0,
    "rollout__num_task_per_step": 3,
    "rollout__num_response_per_task": 3,
    "rollout__max_token": 8,
    "rollout__max_resample": 3,
    "training__updates_per_step": 1,
    "evaluation__num_task": 1,
    "evaluation__max_token": 4,
    "evaluation__remasking_strategy": "low_confidence_dynamic",
    "evaluation__denoising_steps_per_block": 4,
    "reward__workers": 0,
}
FULL = {"rollout__block_size": 4, "rollout__steps": 8, "evaluation__block_size": 4, "evaluation__steps": 4}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained model for each attention, and tasks."""
    folder = tmp_path_factory.mktemp("inputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "LAYERS", 2)  # enough for what is held here
        for family in ("sdar", "dream"):
            tiny.build_tiny(family, folder / family, seed=3)
    tasks = [{"question": f"{n}+{n}", "ground_truth_answer": str(2 * n)} for n in range(12)]
    (folder / "tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    return folder


def run(recipe: str, inputs: Path, runs: Path, **changes: object) -> Path:
    """Two steps by a recipe, in at most two epochs, on the model of its attention; the run's folder."""
    keys = keys_of_recipe(recipe)
    full = NEEDS.get(keys["training.method"]) == "full"
    family, tasks = "dream" if full else "sdar", inputs / "tasks.jsonl"
    values = SMALL | (FULL if full else {}) | {"model__model_base": family, "recipe": recipe}
    values |= {"training__epochs_per_step": min(2, keys["training.epochs_per_step"])}
    values |= {"dataset__train_dataset": tasks, "dataset__eval_dataset": tasks}
    return run_rl(inputs / family, runs, **values | changes)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("recipe", recipes())
def test_a_run_goes_on_bit_for_bit(recipe: str, inputs: Path, tmp_path: Path) -> None:
    """Two steps, and the second again from the first one's checkpoint: figures, weights and moments are the same."""
    whole = run(recipe, inputs, tmp_path / "whole")
    stopped = tmp_path / "parts" / whole.name
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "ckpt" / "step-0002")
    parts = run(recipe, inputs, stopped.parent, experiment__start_from_scratch=False)
    rows = rows_of(whole, untimed=True)
    assert rows == rows_of(parts, untimed=True)
    steps = [row for row in rows if "reward" in row]
    assert [row["step"] for row in steps] == [1, 2]
    assert all(row["updates"] and row["logp_diff_max"] <= 2e-5 and row["grad_norm"] > 0 for row in steps)
    files = sorted(whole.glob("ckpt/**/*.safetensors"))
    assert len(files) == 5, "of two steps model and moments, and the model at last"
    for file in files:
        assert file.read_bytes() == (parts / file.relative_to(whole)).read_bytes(), file


@pytest.mark.parametrize("recipe", recipes())
def test_adapters_learn(recipe: str, inputs: Path, tmp_path: Path) -> None:
    """They move, nothing beside them does, and the engine draws the second step by what they make of the weights."""
    changes = {"model__lora__r": 2, "training__epochs_per_step": 1, "optimizer__params__learning_rate": 1e-2}
    folder = run(recipe, inputs, tmp_path, **changes)
    steps = [row for row in rows_of(folder) if "reward" in row]
    assert all(row["updates"] and row["logp_diff_max"] <= 2e-5 for row in steps) and len(steps) == 2
    (family,) = (name for name in ("sdar", "dream") if f"model_base: {name}" in (folder / "config.yaml").read_text())
    first, last = weights(inputs / family), weights(folder / "ckpt" / "optimized")
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    assert moved and all("proj" in name for name in moved)
