"""What a config leaves open, taken from the checkpoint and its family once the model is loaded."""

from typing import Any

from common.config import check_sampling
from common.jobs import OneModel
from common.runtime import console, device_and_dtype
from common.schema import RolloutConfig, Sampling
from models.family import LoadedModel, family_of, load_model


def load_one(config: OneModel) -> LoadedModel:
    """The model that a config names, of the family that reads it unless one is named; the config's defaults are set."""
    device, dtype = device_and_dtype(config.dtype)
    loaded = load_model(config.model, config.model_base or family_of(config.model), dtype, device)
    take_defaults(config, loaded)
    return loaded


def take_defaults(config: Any, loaded: LoadedModel) -> None:
    """Set, in a job's config, the sampling keys and the block sizes that its user did not.

    The block size is the checkpoint's own; where the config sets another, a line says so. What was set is printed.
    UserError where the values do not go together.
    """
    if config.written is None:
        return
    sections = {f"{name}.": section for name, section in vars(config).items() if isinstance(section, Sampling)}
    if isinstance(config, Sampling):
        sections[""] = config
    if hasattr(getattr(config, "training", None), "block_size"):
        sections["training."] = config.training
    taken, differing = [], []
    for prefix, section in sections.items():
        written = {key.removeprefix(prefix) for key in config.written if key.startswith(prefix)}
        for key, value in open_keys(section, written, loaded).items():
            if getattr(section, key) != value:
                taken.append(f"{prefix}{key}={value}")
                setattr(section, key, value)
        size = section.block_size
        if loaded.block_size not in (None, size[0] if isinstance(size, dict) else size):  # where a schedule begins
            differing.append(f"{prefix}block_size={size}")
        if isinstance(section, Sampling):
            check_sampling(section)
    if taken:
        console.print(f"not set, so as the model's kind is sampled: {', '.join(taken)}")
    if differing:
        console.print(
            f"the checkpoint's own block_size is {loaded.block_size}, the config's another: {', '.join(differing)}"
        )


def open_keys(section: Any, written: set[str], loaded: LoadedModel) -> dict[str, Any]:
    """The values of those of a section's keys that its user did not set."""
    values: dict[str, Any] = {}
    if loaded.block_size is not None and "block_size" not in written:
        values |= {"block_size": loaded.block_size, "denoising_steps_per_block": loaded.block_size}
    if isinstance(section, Sampling):
        values |= loaded.family.sampling
        if loaded.family.attention == "full":  # a step for every token, in blocks no longer than the response
            limit = section.max_token if "max_token" in written else values.get("max_token", section.max_token)
            values["steps"] = limit
            values["block_size"] = min(limit, values.get("block_size", section.block_size))
        if isinstance(section, RolloutConfig):
            values.pop("temperature", None)  # what a model is evaluated at may draw a task's responses all alike
    return {key: value for key, value in values.items() if key not in written and hasattr(section, key)}
