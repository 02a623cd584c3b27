"""Tokenizers: always transformers' fast ones, never a class that a checkpoint brings as Python code."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from tokenizers import Tokenizer
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from common.errors import UserError, names_of
from models.files import KEY, MALFORMED, TOKENIZER_FILES, check_texts

LISTED = 100  # tokens of a vocabulary that a line names one by one
_OURS: set[str] = set()  # model types whose tokenizers AutoTokenizer leaves to load_tokenizer
_auto_from_pretrained = AutoTokenizer.from_pretrained


def has_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint's folder holds a fast tokenizer, or the files of which one is made."""
    parts = [folder / "vocab.json", folder / "merges.txt"]
    return (folder / "tokenizer.json").is_file() or all(part.is_file() for part in parts)


def load_tokenizer(folder: str | Path, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Return the fast tokenizer of a checkpoint's folder; UserError if it has none, or its files are damaged.

    kwargs: from_pretrained's.
    """
    folder = Path(folder)
    if not has_tokenizer(folder):
        raise UserError(f"{KEY}: {folder} has no tokenizer; copy the base model's tokenizer.json there")
    check_texts(folder)
    whole = folder / "tokenizer.json"
    kind = Qwen2Tokenizer  # Dream publishes Qwen2's files with a class of its own, which is Qwen2's
    if whole.is_file():
        kind = PreTrainedTokenizerFast
        try:
            Tokenizer.from_str(whole.read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers has no class of its own for it
            raise UserError(
                f"{KEY}: {whole} is no tokenizer ({error}); copy the base model's tokenizer.json there"
            ) from error
    try:
        return kind.from_pretrained(str(folder), **kwargs)
    except MALFORMED as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{KEY}: the tokenizer's files in {folder} do not fit each other ({reason}); copy the base model's there"
        ) from error


class Unreadable(UserError):
    """A text with characters that the tokenizer has no token for; `reason` is the message without the key."""

    def __init__(self, key: str, reason: str):
        super().__init__(f"{key}: {reason}")
        self.reason = reason


def unknown_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of whatever the tokenizer has no token for; None where it reads everything, as byte-level ones do."""
    model = tokenizer.backend_tokenizer.model
    token = getattr(model, "unk_token", None)
    return None if token is None or getattr(model, "byte_fallback", False) else model.token_to_id(token)


def check_readable(tokenizer: PreTrainedTokenizerBase, text: str, key: str) -> None:
    """Unreadable, in one line that names the key, where the text has characters that the tokenizer has no token for."""
    unknown = unknown_token(tokenizer)
    if unknown is None:
        return
    parts = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    missing = dict.fromkeys(repr(text[slice(*at)]) for id, at in zip(parts.ids, parts.offsets) if id == unknown)
    if missing:
        raise Unreadable(key, f"the model has no token for {names_of(missing)}; it reads {readable(tokenizer)}")


def check_ids_readable(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int], key: str) -> None:
    """As `check_readable`, of a text's ids, which do not tell the characters any more."""
    unknown = unknown_token(tokenizer)
    if unknown is not None and unknown in ids:
        token = tokenizer.convert_ids_to_tokens(unknown)
        raise Unreadable(key, f"has {token}, of characters without a token; the model reads {readable(tokenizer)}")


def readable(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a tokenizer with few tokens reads, in words: its visible characters, and its longer tokens."""
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = sorted((id, token) for token, id in tokenizer.get_vocab().items() if id not in special)
    tokens = [token for _, token in ids if token.isprintable() and not token.isspace()]
    if len(tokens) > LISTED:
        return f"the {len(tokens)} words of its vocabulary"
    characters = "".join(token for token in tokens if len(token) == 1)
    return " and ".join(filter(None, [characters, ", ".join(token for token in tokens if len(token) > 1)]))


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write the tokenizer: the files it came from, byte for byte, unless it was changed since."""
    source, folder = Path(tokenizer.name_or_path or ""), Path(folder)
    fresh = load_tokenizer(source) if tokenizer.name_or_path and source.is_dir() else None
    if fresh is None or (fresh.get_vocab(), fresh.chat_template) != (tokenizer.get_vocab(), tokenizer.chat_template):
        tokenizer.save_pretrained(str(folder))
    elif source.resolve() != folder.resolve():
        # copied, for transformers 5 would write a tokenizer class that transformers 4 does not know
        for file in (source / name for name in TOKENIZER_FILES if (source / name).is_file()):
            (folder / file.name).write_bytes(file.read_bytes())


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
