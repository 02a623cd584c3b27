"""The family that docs/families.md registers from outside goes through the whole main job."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_rl import run_rl

from common.errors import UserError
from models import FAMILIES, find_family, load_model, save_model
from models.tiny import build_tiny

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"
NAME = "my_family:RIVER"


@pytest.fixture
def river(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of the page's family, my_family.py in the current folder."""
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
    assert len(code.splitlines()) < 40
    (tmp_path / "my_family.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    build_tiny(NAME, tmp_path / "model", seed=3)
    yield tmp_path / "model"
    del FAMILIES["river"]


def test_names_are_the_checkpoints_own_and_saving_keeps_every_byte(river: Path, tmp_path: Path) -> None:
    tensors, config = load_file(river / "model.safetensors"), json.loads((river / "config.json").read_text())
    assert config["model_type"] == "river" and config["depth"] == 4 and "num_hidden_layers" not in config
    assert "body.layer.0.attention.q_proj.weight" in tensors
    loaded = load_model(river, NAME)
    assert loaded.family.name == "river" and loaded.tokenizer.mask_token == "<|hole|>"
    save_model(loaded.model, loaded.tokenizer, tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_a_step_of_reinforcement_learning(river: Path, tmp_path: Path) -> None:
    tasks = {"dataset__train_dataset": "arithmetic_4_train", "dataset__eval_dataset": "arithmetic_4_test"}
    folder = run_rl(river, tmp_path / "runs", model__model_base=NAME, experiment__total_step=1, **tasks)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    step = next(row for row in rows if "logp_diff_max" in row)
    assert step["updates"] > 0 and 0 <= step["logp_diff_max"] < 1e-5
    trained, start = (load_file(path / "model.safetensors") for path in (folder / "ckpt" / "optimized", river))
    assert trained.keys() == start.keys() and not all(torch.equal(trained[name], start[name]) for name in start)


def test_a_name_that_is_no_family(river: Path) -> None:
    with pytest.raises(UserError, match=r"model\.model_base: .*no family 'RIVAR'; did you mean 'RIVER'"):
        find_family("my_family:RIVAR")
    with pytest.raises(UserError, match=r"model\.model_base: 'river_typo' is no model family.*my_module:MY_FAMILY"):
        find_family("river_typo")
