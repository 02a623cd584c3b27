"""The way that the project takes on a GPU, on an emulated one: sampling, training, and whole jobs."""

from collections.abc import Iterator
from typing import Any

import pytest
from apart import Apart

BLOCK_RECIPES = ["tracerl", "random_masking", "coupled", "ebpo", "just_grpo", "dapo"]
FULL_RECIPES = ["coupled_grpo", "diffu_grpo", "espo", "gdpo"]
# by name: scenario, arguments, keywords
SCENARIOS: dict[str, tuple[str, list, dict[str, Any]]] = {
    "strategies, commits merged": ("on_engine.strategies", ["sdar", {}, True], {}),
    "strategies, commits alone": ("on_engine.strategies", ["sdar", {}, False], {}),
    "strategies, full attention": ("on_engine.strategies", ["dream", {}], {}),
    "tokens overwritten, commits merged": ("on_engine.overwriting", [True], {}),
    "tokens overwritten, commits alone": ("on_engine.overwriting", [False], {}),
    "targets, full attention": ("on_engine.targets", ["llada"], {}),
    "full attention cached": ("on_engine.full_cached", ["dream"], {}),
    "longer, shorter: block attention": ("on_engine.longer_and_shorter", ["sdar"], {}),
    "longer, shorter: commits alone": ("on_engine.longer_and_shorter", ["sdar"], {"merge_commit": False}),
    "longer, shorter: shifted logits": ("on_engine.longer_and_shorter", ["dream"], {}),
    "longer, shorter: full attention": ("on_engine.longer_and_shorter", ["llada"], {}),
    "longer, shorter: cached": ("on_engine.longer_and_shorter", ["dream"], {"use_cache": True}),
    "full attention, cached and not": ("on_engine.cached_and_not", [], {}),
    "memory pressure 384 to 592": ("on_engine.memory_pressure", [[384, 448, 520, 592]], {}),
    "memory pressure 656 to 800": ("on_engine.memory_pressure", [[656, 720, 800]], {}),
    "coming and going": ("on_engine.coming_and_going", ["sdar"], {}),
    "coming and going, samples of a prompt": ("on_engine.coming_and_going", ["sdar", 8], {}),
    "coming and going, full attention": ("on_engine.coming_and_going", ["llada"], {"use_cache": True}),
    "in parts, commits alone": ("on_engine.in_parts", ["sdar"], {"merge_commit": False}),
    "in parts, cached": ("on_engine.in_parts", ["dream"], {"use_cache": True}),
    "little memory": ("on_engine.little_memory", [], {}),
    "mixture of experts, sdar_moe": ("on_engine.mixture", ["sdar_moe"], {}),
    "mixture of experts, llada2": ("on_engine.mixture", ["llada2"], {}),
    "sleep, wake, new weights": ("on_engine.sleep_and_wake", [], {}),
    "generate.py's functions": ("on_engine.generate_functions", [], {}),
    "deterministic algorithms": ("on_engine.deterministic", [], {}),
    "attention kernels, float32": ("on_engine.attention_kernels", ["float32", ["efficient"]], {}),
    "attention kernels, bfloat16": ("on_engine.attention_kernels", ["bfloat16", ["efficient", "flash, pool"]], {}),
    "attention without a mask, blocks": ("on_engine.attention_without_a_mask", ["sdar"], {}),
    "attention without a mask, windows": ("on_engine.attention_without_a_mask", ["dream"], {}),
    "attention without a mask, blocks in spans": ("on_engine.attention_without_a_mask", ["sdar", True], {}),
    "attention without a mask, windows in spans": ("on_engine.attention_without_a_mask", ["dream", True], {}),
    "many settings": ("on_engine.many_settings", [], {}),
    "failed capture": ("on_engine.failed_capture", [], {}),
    "broken device": ("on_engine.broken_device", [], {}),
    "routes of a mixture, commits merged": ("on_engine.routes", ["sdar_moe", True], {}),
    "routes of a mixture, commits alone": ("on_engine.routes", ["llada2", False], {}),
    "beside another thread": ("on_engine.beside_another_thread", [], {}),
    "objectives, float32": ("on_training.objectives", ["sdar", "float32"], {}),
    "objectives, bfloat16": ("on_training.objectives", ["sdar", "auto"], {}),
    "objectives, full attention": ("on_training.objectives", ["dream", "float32"], {}),
    "objectives, full attention, bfloat16": ("on_training.objectives", ["llada", "auto"], {}),
    "activation checkpointing": (
        "on_training.objectives",
        ["sdar", "auto"],
        {"training__gradient_checkpointing_enable": True},
    ),
    "recipes, float32": ("on_training.recipes", ["sdar", BLOCK_RECIPES, "float32"], {}),
    "recipes, bfloat16": ("on_training.recipes", ["sdar", BLOCK_RECIPES, "auto"], {}),
    "recipes, full attention": ("on_training.recipes", ["dream", FULL_RECIPES, "float32"], {}),
    "recipes, full attention, bfloat16": ("on_training.recipes", ["llada", FULL_RECIPES, "auto"], {}),
    "rows in pieces, float32": ("on_training.pieces", ["float32"], {}),
    "rows in pieces, bfloat16": ("on_training.pieces", ["auto"], {}),
    "value model, float32": ("on_training.value_model", ["float32"], {}),
    "value model, bfloat16": ("on_training.value_model", ["auto"], {}),
    "adapters": ("on_training.adapters_and_the_engine", ["auto"], {}),
    "rl.py, sdar": ("on_jobs.rl", ["sdar", True], {}),
    "rl.py, dream": ("on_jobs.rl", ["dream"], {}),
    "rl.py, llada, adapters": ("on_jobs.rl", ["llada"], {"model__lora__r": 4}),
    "rl.py, value model": ("on_jobs.rl_with_value", [], {}),
    "eval.py, sdar": ("on_jobs.evaluation", ["sdar"], {}),
    "eval.py, mmada": ("on_jobs.evaluation", ["mmada"], {}),
    "sft_sdar.py": ("on_jobs.finetuning", ["sdar"], {}),
    "sft_trado.py": ("on_jobs.finetuning", ["trado"], {}),
    "sft_dream.py": ("on_jobs.finetuning", ["dream"], {"training__method": "ar"}),
    "sft_llada.py": ("on_jobs.finetuning", ["llada"], {"training__method": "random_masking"}),
    "sft_mmada.py": ("on_jobs.finetuning", ["mmada"], {"model__lora__r": 4}),
}
# what each planted fault is caught by
FAULTS = {
    "mixed_dtype_in_flex": "Backward pass with mixed query, key, and value dtype",
    "stale_row": "device-side assert triggered",
    "host_read_in_the_step": "steps wait for the device: [('_local_scalar_dense'",
    "tensor_made_in_the_step": "steps wait for the device: [('copy from the host'",
    "nonzero_in_the_step": "steps wait for the device: [('nonzero'",
    "boolean_index_in_the_step": "steps wait for the device: [('boolean index'",
    "host_tensor_in_the_step": "Expected all tensors to be on the same device: aten.eq.Tensor",
    "counter_in_the_step": "is stop on the device, length on the CPU",
    "memory_replaced": "response_ids is",
    "copy_not_waited_for": "unmasked nothing in some step",
    "uninitialised_memory": "response_ids is",
}


@pytest.fixture(scope="module")
def apart() -> Iterator[Apart]:
    """One interpreter for the scenarios of this process."""
    interpreter = Apart()
    yield interpreter
    interpreter.close()


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(apart: Apart, name: str) -> None:
    scenario, args, named = SCENARIOS[name]
    assert apart.run(scenario, *args, **named) is not None


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(apart: Apart, fault: str) -> None:
    found = apart.run("planted.caught", fault)["error"]
    assert FAULTS[fault] in found, found


def test_every_recipe_is_tried() -> None:
    from common.config_files import recipes  # apart.py, which takes SCENARIOS from here, does without the project

    assert sorted(BLOCK_RECIPES + FULL_RECIPES) == list(recipes())


def test_the_device_is_as_a_gpu(apart: Apart) -> None:
    assert apart.run("planted.properties_of_the_device")["checked"] > 10


def test_a_scenario_that_hangs_is_ended(apart: Apart) -> None:
    with pytest.raises(AssertionError, match="longer than it may"):
        apart.run("planted.hangs", limit=1)
