"""From a YAML file and the command line to a checked, typed config.

Order, later wins: schema defaults < the layers a YAML names under `base:` < the YAML < the command line.
`python -m common.config configs/X.yaml [key=value …]` prints the result, `--keys` the table of all keys.
"""

import difflib
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import Field, replace
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.errors import UserError, one_line_errors
from common.help import key_tables, usage
from common.keys import default_of, keys_of
from common.layers import (
    ENTRY_SCRIPTS,
    find_config,
    infer_job,
    merge_layers,
    one_line,
    processes_of,
    read_layers,
    show,
    split_arguments,
)
from common.older_keys import FULL_ATTENTION, UPDATE_SIZE_KEYS
from common.schema import JOBS, RolloutConfig, Sampling, TaskSampling

REQUIRED = {
    "rl": ("model.pretrained_model", "dataset.train_dataset"),
    "eval": ("model", "dataset.eval_dataset"),
    "sft": ("model.pretrained_model", "dataset.optimization_data"),
    "generate": ("model",),
    "trace": ("model",),
    "serve": ("model",),
}
TYPE_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
# The keys that take a list in evaluation: entry i of every list makes setting i.
ZIPPED = tuple(name for name, hint in get_type_hints(Sampling).items() if hint is Any)

FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

# (jobs, what is wrong, how it is told), after every single value was found good.
COMBINATIONS: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (
        ("rl", "sft"),
        lambda c: c.training.lower_p > c.training.upper_p,
        "training.lower_p={c.training.lower_p} is above training.upper_p={c.training.upper_p}",
    ),
    (
        ("sft",),
        lambda c: c.training.loss_weight == "elbo" and c.training.method in ("trace", "ar"),
        "training.loss_weight=elbo weighs by a masking probability, which training.method={c.training.method} "
        "does not have; set it to none",
    ),
    (
        ("rl",),
        lambda c: c.rollout.num_response_per_task < 2 and not c.model.value_base_model,
        "rollout.num_response_per_task={c.rollout.num_response_per_task}: "
        "a task's responses are compared with each other, so it takes at least 2",
    ),
    (
        ("rl",),
        lambda c: c.training.updates_per_step > c.rollout.num_task_per_step * c.rollout.num_response_per_task,
        "training.updates_per_step={c.training.updates_per_step} is more than the responses of a step, "
        "rollout.num_task_per_step={c.rollout.num_task_per_step} × "
        "rollout.num_response_per_task={c.rollout.num_response_per_task}",
    ),
    (
        ("rl",),
        lambda c: (keep := c.training.keep_accuracy) is not None and (len(keep) != 2 or keep[0] > keep[1]),
        "training.keep_accuracy={c.training.keep_accuracy}: expected two ascending numbers, as [0.2, 0.8], or null",
    ),
    (
        ("rl",),
        lambda c: c.training.old_logp == "detach" and c.training.updates_per_step > 1,
        "training.old_logp=detach allows one update, but training.updates_per_step={c.training.updates_per_step}",
    ),
    (
        ("rl",),
        lambda c: c.model.value_base_model and c.training.method != "TraceRL",
        "model.value_base_model with training.method={c.training.method}: a value model learns over the steps of a "
        "trace; set training.method=TraceRL, or model.value_base_model=null",
    ),
    (
        ("rl",),
        lambda c: c.model.value_base_model and c.training.ratio_level == "sequence",
        "model.value_base_model with training.ratio_level=sequence: a sequence has one advantage, a value model gives "
        "one to each token; set training.ratio_level=token, or model.value_base_model=null",
    ),
    (
        ("rl",),
        lambda c: c.training.tis_cap is not None and c.training.old_logp == "engine",
        "training.tis_cap={c.training.tis_cap} with training.old_logp=engine: the ratio holds that weight already; "
        "set training.old_logp=auto, or training.tis_cap=null",
    ),
    (
        ("rl",),
        lambda c: c.model.pretrained_model == "tiny",
        "model.pretrained_model=tiny is a new, untrained network, for SFT only: "
        "give a trained model's folder (model.made_by names the SFT config that makes it)",
    ),
)


def load_config(job: str, argv: list[str]) -> Any:
    """The config of a job ("rl", "eval" or "sft") from arguments as typed: `config=X.yaml key=value …`.

    Returns the job's dataclass from common.schema with interpolations resolved and every value checked.
    Raises UserError, one line, at the first mistake. What older keys became is reported on stderr.
    """
    path, overrides = split_arguments(job, argv)
    family = overrides.get("model.model_base") or overrides.get("model_base")
    layers = read_layers(path, family) if path else []
    meant = infer_job({key: value for _, layer in layers for key, value in layer.items()})
    if meant not in (None, job):
        raise UserError(f"config={path} is a config for {ENTRY_SCRIPTS[meant]}, not for {ENTRY_SCRIPTS[job]}")

    values, notes = merge_layers(job, [*layers, ("the command line", overrides)])
    if path and not values.get("experiment.project") and "experiment.project" in keys_of(JOBS[job]):
        values["experiment.project"] = path.stem  # before interpolations are resolved: others refer to it
    cfg = to_dataclass(job, values)
    cfg.written = written_keys(values)
    check_values(cfg)
    for key in REQUIRED[job]:
        if not value_at(cfg, key):
            place = f"in {path} or " if path else ""
            raise UserError(f"{key} is empty: set it {place}as {key}=… on the command line")
    for name, section in vars(cfg).items():
        if isinstance(section, Sampling):
            # a block size that is not set comes with the model, and is held against the steps then
            (settings_of if f"{name}.block_size" in cfg.written else zipped)(section)
    notes += filter(None, [derive_update_size(job, cfg, values), derive_keep_accuracy(job, cfg, values)])
    for jobs, is_wrong, message in COMBINATIONS:
        if job in jobs and is_wrong(cfg):
            raise UserError(message.format(c=cfg))
    if os.environ.get("RANK", "0") == "0":  # one device speaks for all
        for note in notes:
            print(f"config: {note}", file=sys.stderr)
    return cfg


def written_keys(values: dict[str, Any]) -> frozenset[str]:
    """The keys that are set; one that only refers to another, as ${rollout.block_size}, counts where that is set."""

    def is_set(key: str) -> bool:
        reference = re.fullmatch(r"\$\{([\w.]+)\}", str(values.get(key)))
        return key in values and (reference is None or is_set(reference[1]))

    return frozenset(filter(is_set, values))


def settings_of(evaluation: TaskSampling) -> list[TaskSampling]:
    """One object per sampling setting: entry i of every list; a single value holds for all of them.

    Expects a section of a loaded config; raises UserError where lists have different lengths, or a block more steps
    than tokens.
    """
    name, settings = section_name(evaluation), zipped(evaluation)
    for one in settings:
        if one.denoising_steps_per_block > one.block_size:
            steps = one.denoising_steps_per_block
            raise UserError(
                f"{name}.denoising_steps_per_block={steps} is more than {name}.block_size={one.block_size}: "
                "each step unmasks at least one token"
            )
    return settings


def section_name(evaluation: Sampling) -> str:
    """How messages call a sampling section."""
    return next((one for one in ("rollout", "evaluation") if one in type(evaluation).__name__.lower()), "sampling")


def zipped(evaluation: Sampling) -> list[Sampling]:
    """As `settings_of`, of a section whose block size may not be known yet."""
    name = section_name(evaluation)
    lists = {key: value for key in ZIPPED if isinstance(value := getattr(evaluation, key), list)}
    lengths = {key: len(value) for key, value in lists.items()}
    if lists and isinstance(evaluation, RolloutConfig):
        key, value = next(iter(lists.items()))
        raise UserError(f"{name}.{key}={value}: training samples under one setting; lists belong to evaluation")
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        told = ", ".join(f"{name}.{key} has {length}" for key, length in lengths.items())
        raise UserError(f"lists of settings must have the same number of entries: {told}")
    count = next(iter(lengths.values()), 1)
    return [replace(evaluation, **{key: value[i] for key, value in lists.items()}) for i in range(count)]


def dump_config(cfg: Any) -> str:
    """The config as YAML, resolved, which load_config reads back to the same."""
    return OmegaConf.to_yaml(OmegaConf.structured(cfg), resolve=True)


def parse_or_help(job: str, argv: list[str], description: str) -> Any:
    """load_config, or the usage and exit code 0 when `--help` or `-h` is among the arguments."""
    if "--help" in argv or "-h" in argv:
        print(usage(job, description))
        sys.exit(0)
    return load_config(job, argv)


# Types and single values -----------------------------------------------------------------------------------------


def to_dataclass(job: str, values: dict[str, Any]) -> Any:
    """The job's dataclass filled with values, each converted to its key's type."""
    cfg = OmegaConf.structured(JOBS[job])
    known = keys_of(JOBS[job])
    for key, value in values.items():
        if key in known:
            try:
                OmegaConf.update(cfg, key, value, merge=False)
            except OmegaConfBaseException:
                raise wrong_type(key, value, known[key]) from None
    try:
        return OmegaConf.to_object(cfg)
    except (OmegaConfBaseException, RecursionError) as error:
        key = str(getattr(error, "full_key", "") or "")
        culprit = f"{key}={show(values.get(key, ''))}: " if key else ""
        raise UserError(f"{culprit}{one_line(error)}") from None


def check_values(cfg: Any) -> None:
    """Hold every value to the choices and bounds of its key; entries of lists one by one."""
    for key, (hint, one) in keys_of(type(cfg)).items():
        value = value_at(cfg, key)
        if hint is Any:  # a scalar or a list: OmegaConf did not look at it
            kind = type(default_of(one))
            entries = [convert(entry, kind) for entry in (value if isinstance(value, list) else [value])]
            if None in entries:
                raise wrong_type(key, value, (hint, one))
            *path, leaf = key.split(".")
            setattr(value_at(cfg, ".".join(path)), leaf, entries if isinstance(value, list) else entries[0])
            value = entries
        for entry in value if isinstance(value, list) else [value]:
            if entry is not None and (fault := fault_of(entry, one.metadata)):
                raise UserError(f"{key}={show(entry)}: {fault}")


def convert(value: Any, kind: type) -> Any:
    """The value as int, float or str; None where it is not one. Numbers may be quoted, as in "1e-6"."""
    if isinstance(value, bool) or (kind is str and not isinstance(value, str)):
        return None
    if kind is int and isinstance(value, float):
        return None
    try:
        return kind(value)
    except (TypeError, ValueError):
        return None


def fault_of(entry: Any, limits: Any) -> str:
    """What is wrong with a value given its key's metadata; empty if nothing."""
    if isinstance(entry, str):
        if (limits["function"] and FUNCTION.fullmatch(entry)) or not (limits["choices"] or limits["function"]):
            return ""
        if entry in limits["choices"]:
            return ""
        ways = [*limits["choices"], *(["my_module:my_function"] if limits["function"] else [])]
        near = [one for one in limits["choices"] if entry and entry in one]
        near = near or difflib.get_close_matches(entry, limits["choices"], 1)
        return f"expected {', '.join(ways)}" + (f"; did you mean {near[0]}?" if near else "")
    low, high = limits["low"], limits["high"]
    if low is not None and not entry >= low:  # written so that nan fails
        return f"must be at least {low}" if high is None else f"must be between {low} and {high}"
    if high is not None and not entry <= high:
        return f"must be between {low} and {high}"
    return ""


def wrong_type(key: str, value: Any, info: tuple[Any, Field]) -> UserError:
    """The error for a value that its key's type does not take."""
    hint, one = info
    options = [option for option in get_args(hint) or (hint,) if option is not NoneType]
    if get_origin(hint) is list or get_origin(options[0]) is list:
        entry = get_args(hint if get_origin(hint) is list else options[0])[0]
        expected = f"a list of {'numbers' if entry is float else 'words'}"
    elif hint is Any:
        expected = f"{TYPE_WORDS[type(default_of(one))]}, or a list of such"
    else:
        expected = TYPE_WORDS[options[0]]
    return UserError(f"{key}={show(value)}: expected {expected}{' or null' if NoneType in get_args(hint) else ''}")


def value_at(cfg: Any, key: str) -> Any:
    """The value under a dotted key; the config itself under an empty one."""
    for name in filter(None, key.split(".")):
        cfg = getattr(cfg, name)
    return cfg


def derive_update_size(job: str, cfg: Any, values: dict[str, Any]) -> str:
    """Set the size of an update from the original's keys, where they are given, and tell how."""
    if not any(key in values for key in UPDATE_SIZE_KEYS):
        return ""
    counts = {key: convert(values.get(key, 1), int) for key in UPDATE_SIZE_KEYS}
    for key, count in counts.items():
        if not count or count < 1:
            raise UserError(f"{key}={show(values[key])}: expected a whole number, at least 1")
    devices = devices_of(cfg)
    rows = devices * math.prod(counts.values())
    told = " × ".join(f"{key}={count}" for key, count in counts.items())
    told += f" × {devices} device{'s' * (devices > 1)} = {rows} rows an update"
    made, why = rows_of_response(job, cfg, values)
    if job == "sft":
        cfg.training.batch_size = max(round(rows / made), 1)
        return f"{told}, {made} of a sample ({why}) → training.batch_size={cfg.training.batch_size}"
    responses = cfg.rollout.num_task_per_step * cfg.rollout.num_response_per_task
    cfg.training.updates_per_step = min(max(round(responses * made / rows), 1), responses)
    return (
        f"{told}, {responses} responses × {made} rows a step ({why}) → "
        f"training.updates_per_step={cfg.training.updates_per_step} (set it to choose another)"
    )


def devices_of(cfg: Any) -> int:
    """How many processes train: as many as were launched, else as many as experiment.deepspeed_file will launch."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    name = getattr(cfg.experiment, "deepspeed_file", None)
    return processes_of(name) if name else 1


def rows_of_response(job: str, cfg: Any, values: dict[str, Any]) -> tuple[int, str]:
    """How many rows the original made of one response, as far as the config tells, and of what.

    Here all views of a response count as one.
    """
    training = cfg.training
    if training.method in ("random_masking", "coupled") or (job == "sft" and training.method == "semi-ar"):
        pairs = 2 if training.method == "coupled" else 1
        return training.mask_times_per_sample * pairs, "noised copies"
    if job == "sft" or training.method != "TraceRL":
        return 1, f"training.method={training.method}"
    rollout, family = cfg.rollout, cfg.model.model_base
    if family in FULL_ATTENTION or (":" in family and "rollout.steps" in values):
        steps, of = min(rollout.steps, rollout.max_token), "rollout.steps"
    elif rollout.remasking_strategy in ("low_confidence_static", "low_confidence_dynamic", "sequential"):
        steps, of = rollout.denoising_steps_per_block, "rollout.denoising_steps_per_block"
    else:
        steps, of = rollout.block_size, "rollout.block_size"
    return math.ceil(steps / training.shrink), of if training.shrink == 1 else f"{of} / training.shrink"


def derive_keep_accuracy(job: str, cfg: Any, values: dict[str, Any]) -> str:
    """With a value model groups are not compared, so none is dropped unless the config asks for it; tell so."""
    if job != "rl" or not cfg.model.value_base_model or "training.keep_accuracy" in values:
        return ""
    cfg.training.keep_accuracy = None
    return "model.value_base_model is set → training.keep_accuracy=null (set it to drop groups)"


@one_line_errors
def main(argv: list[str]) -> None:
    """python -m common.config configs/X.yaml [key=value …] | --keys"""
    if "--keys" in argv:
        print(key_tables(), end="")
        return
    if not argv or argv[0] in ("-h", "--help"):
        print(
            "usage: python -m common.config configs/X.yaml [key=value …]   the resolved config\n"
            "       python -m common.config --keys                        every key, as configs/README.md"
        )
        return
    path = find_config(argv[0].removeprefix("config="))
    written = {key: value for _, layer in read_layers(path) for key, value in layer.items()}
    overrides = dict(argument.split("=", 1) for argument in argv[1:] if "=" in argument)
    job = infer_job(written) or infer_job(written | overrides) or "rl"
    print(dump_config(load_config(job, [f"config={path}", *argv[1:]])), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
