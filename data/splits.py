"""Which split a made task falls into depends on nothing but a hash of what makes it the task it is."""

import hashlib
from collections.abc import Callable, Iterable
from typing import TypeVar

from common.errors import UserError

SPLITS = {"test": (0.0, 0.10), "dev": (0.10, 0.15), "train": (0.15, 1.0)}  # shares of the hash's range
T = TypeVar("T")


def in_split(items: Iterable[T], split: str, key: Callable[[T], str]) -> list[T]:
    """The items of one split, ordered by the hash of their `key`, so that equal keys are together.

    UserError where there is no such split.
    """
    if split not in SPLITS:
        raise UserError(f"split '{split}' is unknown: use {', '.join(SPLITS)}")
    low, high = SPLITS[split]
    hashed = sorted((_hash(key(item)), item) for item in items)
    return [item for value, item in hashed if low <= value / 2**64 < high]


def _hash(text: str) -> int:
    """64 bits of SHA-256: the same in every process, unlike hash()."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
