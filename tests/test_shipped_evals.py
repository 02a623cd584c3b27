"""The shipped evaluations of published models, on tiny models: benchmarks/shipped_evals.py."""

import json
from pathlib import Path

import pytest
import yaml

from benchmarks.shipped_evals import run, shipped_configs, tiny_arguments
from common.config import load_config, settings_of


def test_every_family_has_its_evaluations() -> None:
    found = {path.stem: yaml.safe_load(path.read_text())["model_base"] for path in shipped_configs()}
    assert set(found.values()) == {"sdar", "trado", "dream", "llada", "mmada"}
    published = {name for name in found if name.endswith("_published")}
    assert published == {f"{name}_eval_published" for name in ("llada", "dream", "diffucoder", "mmada")}


@pytest.mark.parametrize("path", shipped_configs(), ids=lambda path: path.stem)
def test_a_tiny_model_keeps_what_a_config_is_about(path: Path) -> None:
    shipped = load_config("eval", [f"config={path}"])
    tiny = load_config("eval", tiny_arguments(path))
    for key in ("temperature", "top_k", "top_p", "remasking_strategy", "target", "use_cache", "start_with_think"):
        assert getattr(tiny.rollout, key) == getattr(shipped.rollout, key), key
    assert tiny.model_base == shipped.model_base and tiny.rollout.num_task == 32
    blocks = [config.rollout.max_token // settings_of(config.rollout)[0].block_size for config in (shipped, tiny)]
    assert (blocks[0] == 1) == (blocks[1] == 1)


def test_a_shipped_config_runs_on_a_tiny_model(tiny_sdar: Path, tmp_path: Path) -> None:
    (path,) = [path for path in shipped_configs() if path.stem == "trado_longcot_eval"]
    arguments = [f"model={tiny_sdar}", "made_by=null", "rollout.num_task=3", f"experiment.runs_dir={tmp_path}"]
    (row,) = run(path, arguments)
    (result,) = json.loads((tmp_path / "shipped_trado_longcot_eval" / "results.json").read_text()).values()
    assert (row["config"], row["setting"], row["tasks"]) == ("trado_longcot_eval.yaml", "dynamic", 3)
    assert row["accuracy, %"] == round(100 * result["accuracy"], 1)
    assert row["tokens per forward"] == pytest.approx(result["tokens_per_forward"], abs=0.01)
    samples = (tmp_path / "shipped_trado_longcot_eval" / "samples.jsonl").read_text().splitlines()
    assert len(samples) == 3 and all(1 <= json.loads(line)["length"] <= 40 for line in samples)
