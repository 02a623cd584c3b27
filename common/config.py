"""From a YAML file and the command line to a checked, typed config.

Order, later wins: schema defaults < the layers a YAML names under `base:` < its recipe < the YAML < the command line's
recipe < the command line.
`python -m common.config configs/X.yaml [key=value …]` prints the result, `--keys` the table of all keys.
"""

import difflib
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import reduce
from operator import attrgetter, getitem
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.config_files import (
    DEFAULT_FAMILY,
    accelerate_config,
    configs_of,
    find_config,
    infer_job,
    merge_layers,
    read_layers,
    read_recipe,
    reference_of,
    split_arguments,
)
from common.errors import UserError, one_line, one_line_errors, show
from common.jobs import JOBS, Job, RLConfig
from common.keys import Key, Schedule, keys_of
from common.older_keys import UPDATE_SIZE_KEYS, derive_update_size, original_objective
from common.schema import ATTENTION, SETTINGS, Sampling

Settings = TypeVar("Settings", bound=Sampling)
TYPE_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
MADE_FROM = {int: (int, str), float: (int, float, str), str: (str, int, float, bool)}  # numbers may be quoted
TRUTH = dict.fromkeys(("true", "yes", "y", "on", "1"), True) | dict.fromkeys(("false", "no", "n", "off", "0"), False)
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

README_HEAD = """# Config keys

Written by `python -m common.config --keys > configs/README.md` from `common/jobs.py`; do not edit.

A config is a short YAML: `base: [name, …]` takes the layers `base/<name>.yaml` (`{name: [family, …]}`: for those
families only), its own keys come on top, and `key=value` arguments on the command line win over both.
`recipe=NAME` takes a published objective of RL whole, `base/objective_NAME.yaml`: in a YAML that file's own keys win
over it, on the command line it wins over the file (`python -m train.recipes` lists them).
Lists are typed `key=[0,1]`, nothing is `key=null`.
`${section.key}` takes another key's value. `python -m common.config configs/X.yaml` prints a config in full.

In evaluation `remasking_strategy`, `block_size`, `top_k`, `temperature`, `top_p` and `dynamic_threshold` may be
lists of one length: entry i of each makes setting i, and a single value holds for all.

Of the sampling keys that neither YAML nor command line sets, `block_size` is the checkpoint's own (config.json), with
as many denoising steps a block, and full attention has its family's (`sampling` in its row under `models/`), with a
step for every token. What was taken so is printed, and stands in the run's config.yaml.
"""


def load_config(name: str, argv: list[str]) -> Any:
    """The config of the job of that name in JOBS, from arguments as typed: `config=X.yaml key=value …`.

    Returns the job's dataclass from common.jobs with references resolved and every value checked.
    Raises UserError, one line, at the first mistake. What older keys became is reported on stderr.
    """
    job = JOBS[name]
    path, overrides = split_arguments(job, argv)
    family = overrides.get("model.model_base") or overrides.get("model_base")
    layers = read_layers(path, family) if path else []
    written_in = [*layers, ("the command line", overrides)]
    if name == "rl" and "recipe" in overrides:
        chosen = [layer.get("model.model_base") for _, layer in layers]
        family = family or next(filter(None, reversed(chosen)), DEFAULT_FAMILY)
        layers += read_recipe(overrides.pop("recipe"), family)
    inferred = infer_job(layers)
    if inferred not in (None, name):
        raise UserError(f"config={path} is a config for {JOBS[inferred].script}, not for {job.script}")
    for source, layer in written_in:
        recipe = layer.pop("recipe", None)
        if recipe is not None and name != "rl":
            raise UserError(
                f"recipe={show(recipe)} in {source}: {job.script} does not read it, only rl.py; leave it out"
            )

    values, notes = merge_layers(job, [*layers, ("the command line", overrides)])
    if path and not values.get("experiment.project") and "experiment.project" in keys_of(job.config):
        values["experiment.project"] = path.stem  # before references are resolved: others refer to it
    cfg = typed(job, values)
    cfg.written = written_keys(values)
    for key in job.required:
        if not attrgetter(key)(cfg):
            in_file = f"in {path} or " if path else ""
            raise UserError(f"{key} is empty: set it {in_file}as {key}=… on the command line")
    if name == "rl":
        notes += follow_schedule(cfg)
    for section in vars(cfg).values():
        if isinstance(section, Sampling):
            # a block size that is not set comes with the model, and is checked then
            check_sampling(section, check_steps=f"{section.prefix}block_size" in cfg.written)
    if values.keys() & set(UPDATE_SIZE_KEYS):
        notes.append(derive_update_size(name, cfg, values, devices_of(cfg)))
    originals = any(key in layer for _, layer in layers for key in UPDATE_SIZE_KEYS)
    full = name == "sft" and cfg.model.model_base in ATTENTION["full"]
    if full and originals and "training.canvas" not in values:
        cfg.training.canvas = "full"
        notes.append("a file of the original's → training.canvas=full (batch fills up to the longest of four samples)")
    if name == "rl":
        if originals:
            notes += original_objective(cfg, values)
        if "training.keep_accuracy" not in values:
            notes += groups_to_keep(cfg)
    for fault in cfg.faults():
        raise UserError(fault)
    if os.environ.get("RANK", "0") == "0":  # one device speaks for all
        for note in notes:
            print(f"config: {note}", file=sys.stderr)
    return cfg


def follow_schedule(cfg: RLConfig) -> Iterator[str]:
    """Give a schedule of `rollout.block_size` to the keys that follow it where they are not set; says so."""
    schedule, followers = cfg.rollout.block_size, []
    if not isinstance(schedule, dict):
        return
    for sampling in (cfg.rollout, cfg.evaluation):
        for name in ("block_size", "denoising_steps_per_block"):
            follows = name == "block_size" or sampling.block_size == schedule
            if follows and f"{sampling.prefix}{name}" not in cfg.written:
                setattr(sampling, name, dict(schedule))
                followers.append(f"{sampling.prefix}{name}")
    if followers:
        cfg.written |= set(followers)
        yield f"rollout.block_size={schedule} → {', '.join(followers)} likewise"


def groups_to_keep(cfg: RLConfig) -> Iterator[str]:
    """Set `keep_accuracy` where it is not set and accuracy is not what groups are learned from; says so."""
    if cfg.model.value_base_model and cfg.training.value_reward == "raw":
        cfg.training.keep_accuracy = None  # groups are not compared
        yield "model.value_base_model is set → training.keep_accuracy=null (set it to drop groups)"
    elif cfg.reward.code_reward == "share":
        cfg.training.keep_accuracy, cfg.training.drop_equal = None, True  # programs that fail are compared too
        yield "reward.code_reward=share → training.keep_accuracy=null, training.drop_equal=True"


def load_any(path: Path, arguments: list[str]) -> tuple[str, Any]:
    """The job that a file and the further arguments are for, as their keys tell, and its config."""
    layers = read_layers(path)
    typed_in = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    job = infer_job(layers) or infer_job([*layers, ("the command line", typed_in)]) or "rl"
    return job, load_config(job, [f"config={path}", *arguments])


def written_keys(values: dict[str, Any]) -> frozenset[str]:
    """The keys that are set; one that only refers to another, as ${rollout.block_size}, counts where that is set."""

    def is_set(key: str) -> bool:
        reference = reference_of(values.get(key))
        return key in values and (reference is None or is_set(reference))

    return frozenset(filter(is_set, values))


def devices_of(cfg: Any) -> int:
    """How many processes train: as many as were launched, else as many as experiment.deepspeed_file will launch."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    name = getattr(cfg.experiment, "deepspeed_file", None)
    return yaml.safe_load(accelerate_config(name).read_text())["num_processes"] if name else 1


def dump_config(cfg: Any) -> str:
    """The config as YAML, resolved, which load_config reads back to the same."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(cfg)), resolve=True)


# Settings of an evaluation --------------------------------------------------------------------------------------------


def check_sampling(sampling: Sampling, check_steps: bool = True) -> None:
    """As `settings_of` checks, at every step of schedules."""
    schedules = [value for value in vars(sampling).values() if isinstance(value, dict)]
    for done in sorted({0}.union(*schedules)):
        settings_of(sampling.at_step(done + 1), check_steps)


def settings_of(sampling: Settings, check_steps: bool = True) -> list[Settings]:
    """One such object for each sampling setting: entry i of every list; a single value holds for all.

    Raises UserError where lists have different lengths, or where a block has more steps than tokens, unless
    `check_steps` is False.
    """
    lists = {key: value for key in SETTINGS if isinstance(value := getattr(sampling, key), list)}
    lengths = {key: len(value) for key, value in lists.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        each = ", ".join(f"{sampling.prefix}{key} has {length}" for key, length in lengths.items())
        raise UserError(f"lists of settings must have the same number of entries: {each}")
    count = next(iter(lengths.values()), 1)
    settings = [replace(sampling, **{key: value[i] for key, value in lists.items()}) for i in range(count)]
    for setting in settings if check_steps else ():
        steps, size, prefix = setting.denoising_steps_per_block, setting.block_size, setting.prefix
        if steps > size:
            raise UserError(
                f"{prefix}denoising_steps_per_block={steps} is more than {prefix}block_size={size}: "
                "each step unmasks at least one token"
            )
    return settings


# Types and single values ----------------------------------------------------------------------------------------------


def typed(job: Job, values: dict[str, Any]) -> Any:
    """The job's config filled with values: references resolved, each of its key's type and within its limits."""
    cfg, known = job.config(), keys_of(job.config)
    tree = OmegaConf.create(asdict(cfg))
    for key, value in values.items():
        try:
            if key in known:
                OmegaConf.update(tree, key, value, merge=False)
        except OmegaConfBaseException:
            raise wrong_type(key, show(value), known[key]) from None
    try:
        resolved = OmegaConf.to_container(tree, resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        key = str(getattr(error, "full_key", "") or "")
        culprit = f"{key}={show(values.get(key, ''))}: " if key else ""
        raise UserError(f"{culprit}{one_line(error)}") from None
    for key, limits in known.items():
        if key in values:
            path, _, leaf = key.rpartition(".")
            value = reduce(getitem, key.split("."), resolved)
            holder = attrgetter(path)(cfg) if path else cfg
            setattr(holder, leaf, checked(job, key, value, limits, show(values[key])))
    return cfg


def checked(job: Job, key: str, value: Any, limits: Key, written: str) -> Any:
    """The value in its key's type; UserError where it has none or is beyond the key's limits."""
    if value is None and limits.optional:
        return None
    if isinstance(value, dict) and limits.schedule:
        return checked_schedule(key, value, limits)
    several = isinstance(value, list)
    try:
        if several != limits.is_list and not (several and limits.setting):
            raise TypeError
        entries = [convert(entry, limits.kind) for entry in (value if several else [value])]
    except (TypeError, ValueError, KeyError):
        meaning = f" ({show(value)})" if "${" in written else ""
        raise wrong_type(key, written + meaning, limits) from None
    for entry in entries:
        if fault := fault_of(entry, limits):
            raise UserError(f"{key}={show(entry)}: {fault}")
    if several and limits.setting and not limits.lists:
        what = "training" if job.name == "rl" else job.script
        raise UserError(f"{key}={entries}: {what} samples under one setting; lists belong to evaluation")
    return entries if several else entries[0]


def checked_schedule(key: str, value: dict[Any, Any], limits: Key) -> Schedule:
    """A schedule of whole numbers; UserError where its steps do not ascend from 0, or a number is beyond the limits."""
    try:
        schedule = {convert(done, int): convert(number, int) for done, number in value.items()}
    except (TypeError, ValueError, KeyError):
        raise wrong_type(key, show(value), limits) from None
    if next(iter(schedule), None) != 0 or sorted(schedule) != list(schedule) or len(schedule) < len(value):
        raise UserError(f"{key}={show(value)}: the steps of a schedule ascend from 0, as in {{0: 4, 40: 8}}")
    for number in schedule.values():
        if fault := fault_of(number, limits):
            raise UserError(f"{key}={show(value)}: {fault}")
    return schedule


def convert(value: Any, kind: type) -> Any:
    """The value as an int, float, bool or str; TypeError, ValueError or KeyError where it is none."""
    if kind is bool:
        return TRUTH[str(value).lower()]
    if type(value) not in MADE_FROM[kind]:
        raise TypeError
    return kind(value)


def fault_of(value: Any, limits: Key) -> str:
    """What is wrong with a value of the right type, or an entry of a list; empty if nothing."""
    if isinstance(value, str):
        ways = [*limits.choices, *(["my_module:my_function"] if limits.function else [])]
        if not ways or value in limits.choices or (limits.function and FUNCTION.fullmatch(value)):
            return ""
        near = [choice for choice in limits.choices if value and value in choice]
        near = near or difflib.get_close_matches(value, limits.choices, 1)
        return f"expected {', '.join(ways)}" + (f"; did you mean {near[0]}?" if near else "")
    low, high = limits.low, limits.high
    if (low is None or value >= low) and (high is None or value <= high):  # written so that nan is a fault
        return ""
    return f"must be at least {low}" if high is None else f"must be between {low} and {high}"


def wrong_type(key: str, written: str, limits: Key) -> UserError:
    """The error for a value that its key's type does not take."""
    if limits.is_list:
        expected = f"a list of {'numbers' if limits.kind is float else 'words'}"
    else:
        expected = TYPE_WORDS[limits.kind] + (", or a list of such" if limits.lists else "")
        expected += ", or a schedule as {0: 4, 40: 8}" if limits.schedule else ""
    return UserError(f"{key}={written}: expected {expected}{' or null' if limits.optional else ''}")


# --help, the table of keys, and this module as a command --------------------------------------------------------------


def parse_or_help(name: str, argv: list[str], description: str) -> Any:
    """load_config, or the usage and exit code 0 when `--help`, `-h` or `help` is among the arguments."""
    if {"--help", "-h", "help"} & set(argv):
        print(usage(name, description), flush=True)
        sys.exit(0)
    return load_config(name, argv)


def usage(name: str, description: str) -> str:
    """The text of `--help`: what the script does, how keys are set, which configs fit."""
    job = JOBS[name]
    configs = configs_of(job)
    command = job.script if job.script.startswith("python ") else f"python {sys.argv[0]}"
    width = max(map(len, configs), default=0)
    listed = "".join(f"  {path.ljust(width)}  {comment}".rstrip() + "\n" for path, comment in configs.items())
    fitting = f"configs that fit:\n{listed}\n" if configs else ""
    return f"""usage: {command} {job.arguments or "config=FILE.yaml"} [key=value …]

{description.strip()}

Any key can be set after the config, as in {job.example}; lists are key=[0,1], nothing is key=null.
A wrong key or value ends the program at once and names the right one.

{fitting}All keys with their defaults: configs/README.md"""


def key_tables() -> str:
    """Markdown: one table per section, for all jobs that share it."""
    tables: dict[tuple[str, str], list[str]] = {}  # (section, its rows) → scripts
    for job in JOBS.values():
        sections: dict[str, list[str]] = {}
        for key, limits in keys_of(job.config).items():
            section = key.split(".")[0] if "." in key else "top level"
            default = json.dumps(limits.default, ensure_ascii=False)
            sections.setdefault(section, []).append(f"| `{key}` | `{default}` | {limits.help} |\n")
        for section, rows in sections.items():
            tables.setdefault((section, "".join(rows)), []).append(f"`{job.script}`")
    text = README_HEAD
    for (section, rows), scripts in tables.items():
        text += f"\n## {section} ({', '.join(scripts)})\n\n| key | default | what it is |\n|---|---|---|\n{rows}"
    return text


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
    _, config = load_any(find_config(argv[0].removeprefix("config=")), argv[1:])
    print(dump_config(config), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
