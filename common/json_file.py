"""A JSON file that a user brings, read or refused in one line."""

import json
from pathlib import Path
from typing import Any

from common.errors import UserError


def read_object(file: Path, key: str) -> dict[str, Any]:
    """The object that a file holds; UserError, naming the config's key, where it is damaged or holds something else."""
    where = f"{key}: {file}"
    try:
        content = json.loads(file.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text ({error.reason} at byte {error.start}); copy it anew") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); copy it anew") from error
    if not isinstance(content, dict):
        raise UserError(f"{where} holds a {type(content).__name__}, not keys and values; copy it anew")
    return content
