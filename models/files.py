"""The files of a checkpoint, looked at before anything is made of them: what is damaged is told in one line."""

import json
import struct
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.records import read_object

KEY = "model.pretrained_model"
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    *INDEXES,
)
TEXT_FILES = ("merges.txt", "chat_template.jinja")
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' words
# What libraries raise where a file is JSON but not of the shape that they expect.
MALFORMED = (AssertionError, AttributeError, ImportError, IndexError, KeyError, TypeError, ValueError)


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint; UserError where there is none to read."""
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"model.pretrained_model: {folder} has no config.json; give the folder of a checkpoint")
    return read_object(file, KEY)


def check_files(folder: Path) -> None:
    """UserError for the first file that is damaged, or holds weights of a kind that is not read here."""
    check_texts(folder)
    for name in INDEXES:
        if (folder / name).is_file():
            _check_index(folder / name)
    _check_not_quantised(folder)


def check_texts(folder: Path) -> None:
    """UserError for the first file of config or tokenizer that is not what its name says."""
    for name in JSON_FILES:
        if (folder / name).is_file():
            read_object(folder / name, KEY)
    for name in TEXT_FILES:
        if (folder / name).is_file():
            try:
                (folder / name).read_bytes().decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"model.pretrained_model: {folder / name} is not UTF-8 text; copy it anew") from error


def _check_index(file: Path) -> None:
    """Hold an index of shards to its form; whether the shards are there is found when they are read."""
    index = read_object(file, KEY)
    shards = index.get("weight_map")
    whole = isinstance(shards, dict) and shards and isinstance(index.get("metadata"), dict)
    if not whole or not all(isinstance(name, str) and Path(name).name == name for name in shards.values()):
        raise UserError(
            f"model.pretrained_model: {file} is no index of shards (`metadata`, and a `weight_map` from tensors to "
            "files beside it); copy it anew"
        )


def _check_not_quantised(folder: Path) -> None:
    """UserError where the weights are no floats as they stand."""
    way_out = "quantised weights are not read here: give the checkpoint in bfloat16 or float32"
    quantised = read_config(folder).get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise UserError(
            f"model.pretrained_model: {folder}/config.json has a quantization_config ({method or quantised!r}); "
            f"{way_out}"
        )
    for file in sorted(folder.glob("model*.safetensors")):
        for name, tensor in tensors_in(file).items():
            if tensor["dtype"] not in FLOATS:
                raise UserError(
                    f"model.pretrained_model: tensor {name} of {file} is of type {tensor['dtype']}; {way_out}"
                )


def tensors_in(file: Path) -> dict[str, dict[str, Any]]:
    """A safetensors file's tensors by name, each with its dtype and shape; none where the header is damaged, which
    safetensors itself tells when the file is read."""
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        header = stream.read(length) if length <= file.stat().st_size else b""
    try:
        content = json.loads(header)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {name: one for name, one in content.items() if isinstance(one, dict) and "dtype" in one}
