"""The files of a checkpoint, looked at before anything is made of them: what is damaged is told in one line."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from common.errors import UserError
from common.records import read_object

KEY = "model.pretrained_model"  # of the config: what errors about a checkpoint begin with
FAMILY_KEY = "model.model_base"  # and those about its family
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' words
# What libraries raise where a file is JSON but not of the shape that they expect.
MALFORMED = (AssertionError, AttributeError, ImportError, IndexError, KeyError, TypeError, ValueError)


@contextlib.contextmanager
def told_as(key: str, family: str = FAMILY_KEY) -> Iterator[None]:
    """Let errors about a checkpoint and its family begin with the keys by which their user gave them."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(KEY, key, 1).replace(FAMILY_KEY, family, 1)) from error


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint; UserError where there is none to read."""
    file = folder / "config.json"
    if not file.is_file():
        trained = folder / "ckpt" / "optimized"
        way_out = trained if (trained / file.name).is_file() else "the folder of a checkpoint"
        raise UserError(f"{KEY}: {folder} has no config.json; give {way_out}")
    return read_object(file, KEY)


def check_files(folder: Path) -> None:
    """UserError for the first file that is damaged, or holds weights of a kind that is not read here."""
    check_texts(folder)
    for file in (folder / name for name in INDEXES if (folder / name).is_file()):
        index = read_object(file, KEY)
        shards = index.get("weight_map")  # whether they are there is found when they are read
        whole = isinstance(shards, dict) and shards and isinstance(index.get("metadata"), dict)
        if not whole or not all(isinstance(name, str) and Path(name).name == name for name in shards.values()):
            raise UserError(
                f"{KEY}: {file} is no index of shards (`metadata`, and a `weight_map` from tensors to files "
                "beside it); copy it anew"
            )
    way_out = "quantised weights are not read here: give the checkpoint in bfloat16 or float32"
    quantised = read_config(folder).get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise UserError(f"{KEY}: {folder}/config.json has a quantization_config ({method or quantised!r}); {way_out}")
    for file in sorted(folder.glob("model*.safetensors")):
        with contextlib.suppress(SafetensorError), safe_open(file, "pt") as tensors:  # damage is told when it is read
            for name in tensors.offset_keys():
                if (kind := tensors.get_slice(name).get_dtype()) not in FLOATS:
                    raise UserError(f"{KEY}: tensor {name} of {file} is of type {kind}; {way_out}")


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a checkpoint's safetensors files, by name; none where it has no such files.

    A file that is damaged is passed over: that is told when it is read.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with contextlib.suppress(SafetensorError), safe_open(file, "pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.offset_keys()}
    return shapes


def check_texts(folder: Path) -> None:
    """UserError for the first file of config or tokenizer that is not what its name says."""
    names = ("config.json", "generation_config.json", *TOKENIZER_FILES, *INDEXES)
    for file in (folder / name for name in names if (folder / name).is_file()):
        if file.suffix == ".json":
            read_object(file, KEY)
            continue
        try:
            file.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{KEY}: {file} is not UTF-8 text; copy it anew") from error
