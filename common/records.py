"""JSON that a user gives, read so that a mistake is one line: which file, which line, which field, what to do."""

import gzip
import json
import math
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError

Record = dict[str, Any]
# JSON may escape half of a character that needs two, which no text can hold: 😀 is \ud83d\ude00.
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
SURROGATE = re.compile("[\ud800-\udfff]")


def read_bytes(path: Path, key: str) -> bytes:
    """A file's content, unpacked where its name ends in .gz; UserError where it cannot be read whole."""
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{key}: '{path}' is torn or no gzip file ({error}); copy or download it again") from None
    except OSError as error:
        raise UserError(f"{key}: '{path}' cannot be read: {error.strerror or error}") from None


def read_text(path: Path, key: str) -> str:
    """A UTF-8 file's text, without a byte-order mark, which is no part of the first record."""
    try:
        return read_bytes(path, key).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: '{path}' is not UTF-8 (byte {error.start}); convert it") from None


def read_lines(path: Path, key: str) -> Iterator[tuple[int, Any]]:
    """Number and content of every line of a JSON lines file that is not blank; a bad line is the UserError about it."""
    # Not splitlines: it also splits at U+2028, which JSON allows inside a string.
    for number, line in enumerate(read_text(path, key).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{key}: line {number} of '{path}'"
        try:
            content, doubtful = parse(line, where)
        except UserError as error:
            yield number, error
            continue
        fault = fault_of(content) if doubtful else None
        yield number, UserError(f"{where} {fault}") if fault else content


def read_object(file: Path, key: str) -> dict[str, Any]:
    """The object that a file holds.

    UserError, naming the config's key, where there is no such file, it is damaged or it holds something else.
    """
    where = f"{key}: {file}"
    try:
        content = json.loads(file.read_bytes().decode("utf-8"))
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror}; name another") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text ({error.reason} at byte {error.start}); copy it anew") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); copy it anew") from error
    if not isinstance(content, dict):
        raise UserError(f"{where} holds a {type(content).__name__}, not keys and values; copy it anew")
    return content


def parse(text: str, where: str) -> tuple[Any, bool]:
    """What a JSON text holds, and whether `fault_of` must look at that: it takes longer than parsing.

    UserError where it is no JSON.
    """
    try:
        return json.loads(text), bool(SURROGATE_ESCAPE.search(text))
    except json.JSONDecodeError as error:
        place = f" (line {error.lineno})" if "\n" in text.strip() else ""
        raise UserError(f"{where} is not valid JSON{place}: {error.msg} at column {error.colno}; correct it") from None
    except ValueError:  # an integer that Python does not read
        return json.loads(text, parse_int=_integer), True
    except RecursionError:
        raise UserError(f"{where} is nested too deeply to read; correct it") from None


def fault_of(value: Any) -> str | None:
    """What is wrong within a record's values, as words behind the record's place; None where JSON can hold them all."""
    for field, inner in value.items() if isinstance(value, dict) else [("", value)]:
        place = f"has in `{field}`" if field else "has"
        for one in (field, *_leaves(inner)):
            if isinstance(one, str) and SURROGATE.search(one):
                shown = SURROGATE.search(one)[0].encode("unicode_escape").decode()
                return f"{place.encode(errors='replace').decode()} half a character ({shown}); correct the text"
            if isinstance(one, LongInteger):
                return f"{place} a number of {one.digits} digits; write it as text"
            if one is not None and not isinstance(one, (str, int, float)):
                return f"{place} a {type(one).__name__}, which JSON does not know; write it as text or leave it out"
    return None


def present(record: Record) -> Record:
    """A record without its empty fields: null, and NaN, which pandas writes for it.

    Tables have every column in every row, so that an empty one must mean the same as none.
    """
    return {field: value for field, value in record.items() if not is_empty(value)}


def is_empty(value: Any) -> bool:
    """Whether a field's value is null or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


@dataclass(frozen=True)
class LongInteger:
    """Stands for an integer of more digits than Python reads."""

    digits: int


def _integer(digits: str) -> int | LongInteger:
    count = len(digits.lstrip("-"))
    return int(digits) if count <= (sys.get_int_max_str_digits() or count) else LongInteger(count)


def _leaves(value: Any) -> Iterator[Any]:
    """Everything within lists and objects that is neither, the objects' keys too."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            waiting += [*one, *one.values()]
        elif isinstance(one, (list, tuple)):
            waiting += one
        else:
            yield one
