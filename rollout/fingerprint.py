"""What an evaluation's figures depend on, as hashes and values: two with the same fingerprint should agree."""

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.jobs import EvalConfig
from common.runtime import device_and_dtype, versions
from common.schema import STRATEGY_KEYS, Sampling
from common.trajectory import Task
from models import LoadedModel
from models.family import local_folder
from models.prompts import task_text, words_around
from rollout.collect import Prompt, kind_of

SHA256 = re.compile(r"[0-9a-f]{64}")
MODEL_FILES = ("*.safetensors", "config.json", "generation_config.json", "tokenizer*", "vocab.json", "merges.txt")
# Of the settings, those that change speed and nothing else; they stand outside the id.
SPEED_ONLY = ("max_active", "merge_commit", "cache_tokens", "free_cache", "tensor_parallel_size")

Fingerprint = dict[str, Any]


def fingerprint_of(
    config: EvalConfig, loaded: LoadedModel, prompts: Sequence[Prompt], settings: Mapping[str, Sampling]
) -> Fingerprint:
    """Hashes of model, data and prompts, the settings, the versions; `id` is a hash over all but versions and speed.

    The hash of the prompts, the long ones too, is over token ids: it covers instruction, chat template and tokenizer.
    """
    device, dtype = device_and_dtype(config.dtype)
    tasks = [task for task, _ in prompts]
    dataset, thinking = config.dataset, config.rollout.start_with_think
    kind = kind_of(tasks[0], dataset.data_type)
    words = words_around(loaded.family, kind, dataset, thinking)
    if dataset.prompt_style == "published":
        words = task_text(loaded.tokenizer, loaded.family, Task("", "{question}"), kind, dataset, thinking)
    fingerprint: Fingerprint = {
        "model": {
            "name": config.model,
            "family": config.model_base,
            "dtype": str(dtype).removeprefix("torch."),
            "files": file_hashes(local_folder(config.model)),
        },
        "data": {
            "name": config.dataset.eval_dataset,
            "tasks": len(tasks),
            "sha256": hash_json([[task.id, task.question, task.ground_truth_answer, task.record] for task in tasks]),
        },
        "prompts": {
            "template": words,
            "max_prompt_len": config.max_prompt_len,
            "sha256": hash_json([ids for _, ids in prompts]),
        },
        "reward": dataclasses.asdict(config.reward) | {"data_type": config.dataset.data_type},
        "seed": config.seed,
        "settings": {name: _keys_read(setting) for name, setting in settings.items()},
    }
    identity = {"id": hash_json(_what_counts(fingerprint))[:12]}
    return identity | fingerprint | {"device": device.type, "versions": versions()}


def _keys_read(setting: Sampling) -> dict[str, Any]:
    """A setting's keys without those that another strategy alone reads; functions of the user's own may read all."""
    strategy = setting.remasking_strategy
    others = [] if ":" in strategy else [keys for other, keys in STRATEGY_KEYS.items() if other != strategy]
    foreign = set(itertools.chain(*others))
    return {key: value for key, value in dataclasses.asdict(setting).items() if key not in foreign}


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each of a checkpoint's files, by name; the number that the hub shows for its weights."""
    hashes = {}
    for file in sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern)}):
        hashes[file.name] = file.resolve().name  # the hub's cache keeps large files under their hash
        if not SHA256.fullmatch(hashes[file.name]):
            with file.open("rb") as stream:
                hashes[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes


def hash_json(thing: Any) -> str:
    """SHA-256 of a value written as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(thing, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def check_resumable(folder: Path, now: Fingerprint) -> None:
    """UserError where a run's folder holds an evaluation of something else; more settings than before are fine."""
    file = folder / "fingerprint.json"
    if not file.is_file():
        return
    before, after = _what_counts(json.loads(file.read_text(encoding="utf-8"))), _what_counts(now)
    shared = before["settings"].keys() & after["settings"].keys()
    for part in (before, after):
        part["settings"] = {name: part["settings"][name] for name in shared}
    changes = differences(before, after)
    if changes:
        raise UserError(
            f"experiment.start_from_scratch=False: {folder} holds an evaluation that differs ({changes[0]}); "
            "set it to True, or name another experiment.project"
        )


def differences(before: Any, after: Any, name: str = "") -> list[str]:
    """Every value that differs between two nested dicts, as `key: old → new`."""
    if isinstance(before, dict) and isinstance(after, dict):
        lines = []
        for key in dict.fromkeys([*before, *after]):
            lines += differences(before.get(key), after.get(key), f"{name}.{key}" if name else str(key))
        return lines
    old, new = (json.dumps(value, ensure_ascii=False) for value in (before, after))
    old, new = (text if len(text) <= 40 else text[:37] + "…" for text in (old, new))
    return [] if before == after else [f"{name}: {old} → {new}"]


def _what_counts(fingerprint: Fingerprint) -> Fingerprint:
    """The part that decides a result: no names of folders, no versions, no speed."""
    counts = {key: fingerprint[key] for key in ("prompts", "reward", "seed")}
    counts["model"] = {key: fingerprint["model"][key] for key in ("files", "dtype")}
    counts["data"] = {key: fingerprint["data"][key] for key in ("tasks", "sha256")}
    counts["settings"] = {
        name: {key: value for key, value in setting.items() if key not in SPEED_ONLY}
        for name, setting in fingerprint["settings"].items()
    }
    return counts
