"""What the user wrote, read: the arguments, the YAML and its base layers, older keys put into today's words.

Every layer is a flat mapping of dotted keys to values; common.config gives the merged one its types and checks it.
"""

import difflib
import fnmatch
import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.errors import UserError, names_of, one_line, show
from common.jobs import JOBS, Job
from common.keys import keys_of
from common.older_keys import OBSOLETE_KEYS, RENAMED_KEYS, RENAMED_VALUES, UPDATE_SIZE, UPDATE_SIZE_KEYS

ROOT = Path(__file__).resolve().parents[1]
ACCELERATE_CONFIGS = ROOT / "accelerate_configs"
DEFAULT_FAMILY = "sdar"
Layer = tuple[str, dict[str, Any]]  # where it was written, its keys


def split_arguments(job: Job, argv: list[str]) -> tuple[Path | None, dict[str, Any]]:
    """The config's path, None where a job does without, and the overrides, values parsed as YAML scalars."""
    path: Path | None = None
    overrides: dict[str, Any] = {}
    for argument in argv:
        key, equals, text = argument.partition("=")
        bare = key.lstrip("-+")
        if not equals or not bare or bare != key:
            wanted = f"{bare}={text or '…'}" if bare else job.example
            raise UserError(f"{argument}: arguments are key=value, as in {wanted}")
        if key == "config":
            path = find_config(text)
        else:
            key = key.removeprefix(f"{job.section}.") if job.section else key
            overrides[key] = parse_value(job, key, text)
    if path is None and not job.arguments:
        raise UserError(f"config= is missing; for {job.script} choose one of: {names_of(configs_of(job))}")
    return path, flatten(overrides)


def parse_value(job: Job, key: str, text: str) -> Any:
    """The value of `key=text`, read as YAML; for a key of type text, taken as typed unless quoted or null."""
    known = keys_of(job.config).get(key)
    wants_text = known is not None and known.kind is str and not (known.is_list or known.setting)
    if not text or (wants_text and text != "null" and text[0] not in "'\""):
        return text
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{key}={text}: not a YAML value ({one_line(error)})") from None


def find_config(text: str) -> Path:
    """The file a user named, looked for from here and from the project's folder."""
    for path in (Path(text), ROOT / text):
        if path.is_file():
            return path
    folders = {Path(text).parent.resolve(), ROOT / "configs"}
    shown = [shown_path(one) for folder in folders for one in sorted(folder.glob("*.yaml"))]
    by_stem = {Path(one).stem: one for one in shown}
    near = difflib.get_close_matches(Path(text).stem, by_stem, 1, 0.5)
    hint = f"did you mean config={by_stem[near[0]]}?" if near else f"there are: {names_of(shown)}"
    raise UserError(f"config={text}: no such file; {hint}")


def accelerate_config(name: str) -> Path:
    """The file that experiment.deepspeed_file names: of accelerate_configs/, or a path; UserError if there is none."""
    for path in (Path(name), ACCELERATE_CONFIGS / name, ACCELERATE_CONFIGS / f"{name}.yaml"):
        if path.is_file():
            return path
    names = sorted(path.stem for path in ACCELERATE_CONFIGS.glob("*.yaml"))
    near = difflib.get_close_matches(name, names, 1, cutoff=0)
    raise UserError(f"experiment.deepspeed_file={name}: no such file in accelerate_configs/; did you mean {near[0]}?")


def read_layers(path: Path, family: str | None = None, chain: tuple[Path, ...] = ()) -> list[Layer]:
    """A YAML's base layers, deepest first, and then the YAML itself, each as (file, dotted keys).

    An entry `{name: [family, …]}` of `base` is a layer for those families only; `family` is that of the command line,
    without which the file's own counts. A `recipe` stands in its file's keys still, its layers before them.
    """
    if path in chain:
        raise UserError(f"{shown_path(path)}: base layers name each other in a circle")
    content = read_yaml(path)
    bases = content.pop("base", None) or []
    recipe = content.pop("recipe", None)
    values = flatten(content)
    family = family or values.get("model.model_base") or values.get("model_base") or DEFAULT_FAMILY
    layers = []
    for base in [bases] if isinstance(bases, str) else bases:
        if isinstance(base, dict):
            ((base, families),) = base.items()
            if family not in families:
                continue
        layers += read_layers(find_base(path, base), family, (*chain, path))
    if recipe is not None:
        layers += read_recipe(recipe, family)
        values["recipe"] = recipe
    return [*layers, (shown_path(path), values)]


def recipes() -> dict[str, Path]:
    """The published objectives by name, each a layer of configs/base/."""
    files = sorted((ROOT / "configs" / "base").glob("objective_*.yaml"))
    return {path.stem.removeprefix("objective_"): path for path in files}


def read_recipe(name: Any, family: str) -> list[Layer]:
    """The layers of a published objective; UserError where there is none of that name."""
    known = recipes()
    if not isinstance(name, str) or name not in known:  # a YAML may have a list there
        near = difflib.get_close_matches(str(name).lower(), known, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {names_of(known)}"
        raise UserError(f"recipe={show(name)}: no such objective; {hint}")
    return read_layers(known[name], family)


def find_base(path: Path, base: str) -> Path:
    """The file of a base layer that `path` names: in the folder base beside it, among the project's, or beside it."""
    here = path.parent if path.parent.name == "base" else path.parent / "base"
    for folder in (here, ROOT / "configs" / "base", path.parent):
        if (folder / f"{base}.yaml").is_file():
            return folder / f"{base}.yaml"
    there = names_of(sorted(one.stem for one in (ROOT / "configs" / "base").glob("*.yaml")))
    raise UserError(f"{shown_path(path)}: base={base}: no file {shown_path(here)}/{base}.yaml; there are: {there}")


def read_yaml(path: Path) -> dict[str, Any]:
    """A file's content, interpolations kept."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{shown_path(path)}{line}: broken YAML: {one_line(error.problem or error)}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError, OmegaConfBaseException) as error:
        raise UserError(f"{shown_path(path)}: broken YAML: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{shown_path(path)}: broken YAML: expected keys, found a list")
    return content


def flatten(content: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; lists are values, and so are mappings by numbers."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, dict) and not any(isinstance(one, int) for one in value):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def infer_job(layers: list[Layer]) -> str | None:
    """Which job the keys of a file's layers belong to; None where they do not tell."""
    values = {key: value for _, layer in layers for key, value in layer.items()}
    if isinstance(values.get("model"), str) or "model_base" in values:
        return "eval"
    sections = {key.split(".")[0] for key in values}
    if "rollout" in sections:
        return "rl" if sections & {"training", "optimizer"} or "model.pretrained_model" in values else None
    return "sft" if values.keys() & {"training.method", "dataset.optimization_data"} else None


def configs_of(job: Job) -> dict[str, str]:
    """The shipped configs that fit a job, those for one node first: path → first comment line."""
    found = {}
    for path in sorted((ROOT / "configs").glob("*.yaml"), key=lambda path: ("multinode" in path.stem, path)):
        try:
            layers = read_layers(path)
        except UserError:  # a broken file must not keep others from being listed
            continue
        if infer_job(layers) == job.name:
            comments = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
            found[shown_path(path)] = comments[0].lstrip("# ") if comments else ""
    return found


def merge_layers(job: Job, layers: list[Layer]) -> tuple[dict[str, Any], list[str]]:
    """One mapping of the job's keys, later layers winning, and what there is to tell about older keys.

    The keys of UPDATE_SIZE_KEYS stay in it where they were written after the key they stand for.
    """
    merged: dict[str, Any] = {}
    idle: dict[str, str] = {}
    renamed: dict[str, str] = {}
    target = UPDATE_SIZE.get(job.name, "")
    for source, layer in layers:
        values = translate(job, source, layer, idle, renamed)
        if target in values:
            for key in UPDATE_SIZE_KEYS:
                if key in merged or key in values:
                    idle[key] = f"{target} counts"
                merged.pop(key, None)
                values.pop(key, None)
        elif values.keys() & set(UPDATE_SIZE_KEYS):
            merged.pop(target, None)
        merged |= values
    notes = []
    if idle:
        reasons: dict[str, list[str]] = {}
        for key, why in idle.items():
            reasons.setdefault(why, []).append(key)
        notes.append("without effect here: " + "; ".join(f"{', '.join(keys)} ({why})" for why, keys in reasons.items()))
    if renamed:
        notes.append("read as: " + "; ".join(f"{old} → {new}" for old, new in renamed.items()))
    return merged, notes


def translate(
    job: Job, source: str, layer: dict[str, Any], idle: dict[str, str], renamed: dict[str, str]
) -> dict[str, Any]:
    """The layer in the job's own keys; fills `idle` (key → why) and `renamed` (old=value → new=value)."""
    known = keys_of(job.config)
    values: dict[str, Any] = {}
    for key, value in layer.items():
        new, reference = RENAMED_KEYS.get(key), reference_of(value)
        inside = [one for one in known if one.startswith(f"{key}.")]  # of a section
        obsolete = next((p for p in OBSOLETE_KEYS if fnmatch.fnmatch(key, p) or p == f"{key}.*"), None)
        if key in known or (key in UPDATE_SIZE_KEYS and job.name in UPDATE_SIZE):
            values[key] = value
        elif inside and value is None:  # a section with all its keys commented out
            continue
        elif new in known and (RENAMED_KEYS.get(reference, reference) == new or layer.get(new) == value):
            idle[key] = f"{new} counts"
        elif new in known and new in layer:
            idle[f"{key}={show(value)}"] = f"{new}={show(layer[new])} counts"
        elif new in known:
            words = RENAMED_VALUES.get(key)
            if words and value not in words:
                raise UserError(f"{key}={show(value)}: not supported; set {new} to one of {', '.join(words.values())}")
            values[new] = words[value] if words else value
            renamed[f"{key}={show(value)}"] = f"{new}={show(values[new])}"
        elif obsolete:
            idle[obsolete] = OBSOLETE_KEYS[obsolete]
        elif inside:
            raise UserError(f"{key}={show(value)} in {source}: {key} is a section; its keys are {names_of(inside)}")
        else:
            raise UserError(refusal(job, key, value, source))
    return values


def reference_of(value: Any) -> str | None:
    """The key whose value is taken, as in ${rollout.block_size}; None where a value is more than a reference."""
    found = re.fullmatch(r"\$\{([\w.]+)\}", str(value))
    return found[1] if found else None


def refusal(job: Job, key: str, value: Any, source: str) -> str:
    """What to tell of a key that the job does not read: that others do, or which key was meant."""
    known, leaf = list(keys_of(job.config)), key.rpartition(".")[2]
    by_leaf = {one.rpartition(".")[2]: one for one in reversed(known)}
    readers = ", ".join(other.script for other in JOBS.values() if key in keys_of(other.config))
    if readers and leaf not in by_leaf:
        return f"{key}={show(value)} in {source}: {job.script} does not read it, only {readers}; leave it out"
    if leaf in by_leaf:  # in another section
        same_leaf = [one for one in known if one.rpartition(".")[2] == leaf]
        near = [max(same_leaf, key=lambda one: difflib.SequenceMatcher(None, key, one).ratio())]
    else:  # misspelt, or its section is missing altogether
        near = difflib.get_close_matches(key, known, 1, 0.6)
        near = near or [by_leaf[one] for one in difflib.get_close_matches(leaf, by_leaf, 1, 0.6)]
    hint = f"did you mean {near[0]}?" if near else "all keys are in configs/README.md"
    return f"unknown key {key}={show(value)} in {source}; {hint}"


def shown_path(path: Path) -> str:
    """The path as a user would type it from here, or from the project's folder."""
    full = path.resolve()
    for folder in (Path.cwd(), ROOT):
        if full.is_relative_to(folder):
            return str(full.relative_to(folder))
    return str(path)
