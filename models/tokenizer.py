"""Tokenizers: always transformers' fast ones, never a class that a checkpoint brings as Python code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from common.errors import UserError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)

_OURS: set[str] = set()  # model types whose tokenizers AutoTokenizer leaves to load_tokenizer
_auto_from_pretrained = AutoTokenizer.from_pretrained


def load_tokenizer(folder: str | Path, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Return the fast tokenizer of a checkpoint's folder; UserError if it has none. kwargs: from_pretrained's."""
    if (Path(folder) / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(str(folder), **kwargs)
    if (Path(folder) / "vocab.json").is_file() and (Path(folder) / "merges.txt").is_file():
        # Dream publishes Qwen2's files with a class of its own, which is Qwen2's
        return Qwen2Tokenizer.from_pretrained(str(folder), **kwargs)
    raise UserError(f"model.pretrained_model: {folder} has no tokenizer; copy the base model's tokenizer.json there")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write the tokenizer: the files it came from, byte for byte, unless it was changed since."""
    source = Path(tokenizer.name_or_path or "")
    if not tokenizer.name_or_path or not source.is_dir():
        tokenizer.save_pretrained(str(folder))
        return
    fresh = load_tokenizer(source)
    if fresh.get_vocab() != tokenizer.get_vocab() or fresh.chat_template != tokenizer.chat_template:
        tokenizer.save_pretrained(str(folder))
        return
    # transformers 5 would write a tokenizer class that transformers 4 does not know
    for file in (source / name for name in TOKENIZER_FILES):
        if file.is_file() and source.resolve() != Path(folder).resolve():
            (Path(folder) / file.name).write_bytes(file.read_bytes())


def special_token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int | None:
    """Return the id of `token` if it is a special token of this tokenizer's own, else None."""
    special = {str(added): index for index, added in tokenizer.added_tokens_decoder.items() if added.special}
    return special.get(token)


def no_code_for(model_type: str) -> None:
    """Have AutoTokenizer read checkpoints of this model type by `load_tokenizer`, whatever their auto_map says."""
    _OURS.add(model_type)


def _from_pretrained(name_or_path: str | Path, *inputs: Any, **kwargs: Any) -> PreTrainedTokenizerBase:
    hub = {key: kwargs[key] for key in ("revision", "cache_dir", "token", "local_files_only") if key in kwargs}
    if _model_type(name_or_path, kwargs.get("config"), hub) not in _OURS:
        return _auto_from_pretrained(name_or_path, *inputs, **kwargs)
    for key in ("trust_remote_code", "use_fast", "tokenizer_type", "code_revision", "config", *hub):
        kwargs.pop(key, None)
    folder = Path(name_or_path)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(name_or_path), allow_patterns=[*TOKENIZER_FILES, "config.json"], **hub))
    return load_tokenizer(folder, **kwargs)


def _model_type(name_or_path: str | Path, config: Any, hub: dict[str, Any]) -> str | None:
    if config is not None:
        return config.model_type
    try:
        return PreTrainedConfig.get_config_dict(str(name_or_path), **hub)[0].get("model_type")
    except OSError:
        return None  # no config: AutoTokenizer knows what to say


# AutoTokenizer has no table that comes before auto_map once trust_remote_code is set, so its entry is replaced. A class
# attribute, not a subclass: users and libraries hold the name `AutoTokenizer` already.
AutoTokenizer.from_pretrained = staticmethod(_from_pretrained)
