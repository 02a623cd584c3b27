"""Tasks and records by name: made on the spot, a file, or a set on the hub; and the data order of RL."""

import difflib
import functools
import io
import logging
import math
import random
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.code_tests import check_input_output, checked_usage
from common.errors import UserError
from common.records import Record, fault_of, parse, present, read_bytes, read_lines, read_text
from common.trajectory import Task
from data.arithmetic import arithmetic_tasks
from data.countdown import countdown_tasks
from data.published import SETS
from data.splits import SPLITS
from data.sudoku import sudoku_tasks

DATA_DIR = Path(__file__).resolve().parent
SUFFIXES = (".jsonl", ".json", ".parquet")
# The sets that are made on the spot: a name's form, and what makes its records from the groups of it that are there.
MADE: dict[re.Pattern[str], Callable[..., list[Record]]] = {
    re.compile(r"arithmetic_(?P<operands>\d+)(?:_(?P<largest>\d+))?_(?P<split>train|dev|test)"): arithmetic_tasks,
    re.compile(r"countdown_(?P<count>\d+)(?:_(?P<largest>\d+))?_(?P<split>train|dev|test)"): countdown_tasks,
    re.compile(r"sudoku_4(?:_(?P<empty>\d+))?_(?P<split>train|dev|test)"): sudoku_tasks,
}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?")

LETTERS = "ABCDEFGHIJ"  # of the options of a multiple choice
# What a code task needs, by its `test_method`.
TEST_FIELDS = {"function": ("test_list",), "stdio": ("test_input", "test_output")}


def load_tasks(name_or_path: str, key: str = "dataset.train_dataset") -> list[Task]:
    """The tasks of a set: records with question and ground_truth_answer, or with tests. `key` names the setting."""
    tasks = []
    for index, record in enumerate(load_records(name_or_path, key)):
        where = f"{key}: record {index + 1} of '{name_or_path}'"
        if fault := fault_of(record):
            raise UserError(f"{where} {fault}")
        record = with_options(record, where)
        question, answer = _text(record, "question", where), None
        if record.get("test_method") is None:
            answer = _text(record, "ground_truth_answer", where)
            if record.get("prefix"):
                raise UserError(f"{where} has a `prefix`, which begins the program of a code task; leave it out")
        else:
            record = with_setup(record)
            check_tests(record, where)
        tasks.append(Task(str(record.get("id", record.get("task_id", index))), question, answer, record))
    first: dict[str, int] = {}
    for number, task in enumerate(tasks, 1):
        if first.setdefault(task.id, number) != number:
            raise UserError(
                f"{key}: records {first[task.id]} and {number} of '{name_or_path}' have the same id '{task.id}'; "
                "give every record its own `id`, or none at all"
            )
    return tasks


@functools.cache
def worked_examples(name_or_path: str, count: int) -> tuple[tuple[str, str], ...]:
    """Question and solution of the first `count` records of a set, as GSM8K's have them; UserError where they lack."""
    key = "dataset.few_shot_dataset"
    records = load_records(name_or_path, key)[:count] if count else []
    if len(records) < count:
        raise UserError(f"dataset.few_shot={count}, but {key} '{name_or_path}' has only {len(records)} records")
    examples = []
    for number, record in enumerate(records, 1):
        where = f"{key}: record {number} of '{name_or_path}'"
        published = "answer" in record and "solution" not in record  # under the publisher's own name
        solution = "answer" if published else "solution"
        examples.append((_text(record, "question", where).strip(), _text(record, solution, where).strip()))
    return tuple(examples)


def load_records(name_or_path: str, key: str) -> list[Record]:
    """The raw records of a set, in its own order; UserError for the first that cannot be read."""
    records = []
    for _, record in located_records(name_or_path, key):
        if isinstance(record, UserError):
            raise record
        records.append(record)
    return records


def located_records(name_or_path: str, key: str) -> list[tuple[str, Record | UserError]]:
    """The records of a set without their empty fields, each with words for its place.

    One that cannot be read is the UserError about it.
    """
    name = str(name_or_path).strip()
    if not name:
        raise UserError(f"{key} is empty: give a name such as arithmetic_4_train, a path or a hub id")
    made = next((found for form in MADE if (found := form.fullmatch(name))), None)
    if made:
        sizes = {group: text if group == "split" else int(text) for group, text in made.groupdict().items() if text}
        try:
            records = _numbered(MADE[made.re](**sizes))
        except UserError as error:
            raise UserError(f"{key}: '{name}': {error}") from None
    elif path := _find_file(name, key):
        records = _read_file(path, key)
    elif HUB_ID.fullmatch(name):
        records = _numbered(_from_hub(name, key))
    else:
        raise UserError(f"{key}: '{name}' was not found{_nearest(name)}; {_ways(name)}")
    if not records:
        raise UserError(f"{key}: '{name}' has no records; choose a set that is not empty")
    located: list[tuple[str, Record | UserError]] = []
    for words, record in records:
        place = f"{words} of '{name}'"
        if isinstance(record, dict):
            record = present(record)
        elif not isinstance(record, UserError):
            record = UserError(f"{key}: {place} is a {type(record).__name__}, not an object")
        located.append((place, record))
    return located


def task_batch(num_tasks: int, batch: int, cursor: int, seed: int) -> tuple[list[int], int]:
    """Indices of the next `batch` tasks of RL, and the new cursor.

    The cursor counts tasks drawn since the start, so that a run resumed with the same cursor goes on exactly. Each
    epoch is a seeded permutation; a batch may span epochs, and one of up to num_tasks // 3 repeats no task.
    """
    if num_tasks < 1 or batch < 0 or cursor < 0:
        raise ValueError(f"num_tasks {num_tasks}, batch {batch}, cursor {cursor}: none may be negative, nor tasks 0")
    places = range(cursor, cursor + batch)
    return [_epoch_order(num_tasks, place // num_tasks, seed)[place % num_tasks] for place in places], cursor + batch


@functools.lru_cache(maxsize=4)
def _epoch_order(num_tasks: int, epoch: int, seed: int) -> tuple[int, ...]:
    order = _shuffled(num_tasks, epoch, seed)
    third = num_tasks // 3
    if epoch == 0 or third == 0:
        return tuple(order)
    # A task at the end of one epoch and at the start of the next would be twice in a batch, with the same draws.
    # The last third stays where the shuffle put it, so that an epoch depends on no order but the one before.
    just_seen = set(_shuffled(num_tasks, epoch - 1, seed)[num_tasks - third :])
    front, back = order[: num_tasks - third], order[num_tasks - third :]
    return tuple(sorted(front, key=lambda index: index in just_seen) + back)


def _shuffled(num_tasks: int, epoch: int, seed: int) -> list[int]:
    order = list(range(num_tasks))
    random.Random(f"tasks/{seed}/{epoch}").shuffle(order)
    return order


def as_text(value: Any) -> Any:
    """A number as its text, as it was written; anything else as it is."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) != math.inf
    return str(value) if is_number else value


def _text(record: Record, field: str, where: str) -> str:
    """A field as text; anything but text or a number is the user's mistake."""
    value = as_text(record.get(field))
    if not isinstance(value, str) or not value.strip():
        fields = ", ".join(record) or "none"
        raise UserError(f"{where} has no `{field}` (its fields: {fields:.200}); rename or add it, see data/README.md")
    return value


def check_tests(record: Record, where: str) -> None:
    """UserError for the first field that a code task lacks or has wrong."""
    method = record["test_method"]
    if method not in TEST_FIELDS:
        raise UserError(f"{where} has the `test_method` {method!r:.40}; use {' or '.join(TEST_FIELDS)}")
    tests = {}
    for field in TEST_FIELDS[method]:
        value = record.get(field)
        tests[field] = [value] if isinstance(value, str) else value
        if not (isinstance(tests[field], list) and tests[field] and all(isinstance(one, str) for one in tests[field])):
            raise UserError(f"{where} has no `{field}` that is a text or a list of texts, which {method} needs")
    if len({len(texts) for texts in tests.values()}) > 1:
        counts = " but ".join(f"{len(texts)} `{field}`" for field, texts in tests.items())
        raise UserError(f"{where} has {counts}; give an output for every input")
    for number, test in enumerate(tests.get("test_list", ()), 1):
        check_python(test, f"{where}: `test_list` entry {number}")
    for field in ("prefix", "setup", "entry_point"):
        if not isinstance(record.get(field) or "", str):
            raise UserError(f"{where} has a `{field}` that is no text")
    check_python(record.get("setup") or "", f"{where}: `setup`")
    if method == "function":
        checked_usage(record, where)
    else:
        check_input_output(record, where)
    limit = record.get("test_time_limit")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 < limit <= 3600):
        raise UserError(f"{where} has the `test_time_limit` {limit!r:.40}; give seconds, above 0 and up to 3600")


def with_options(record: Record, where: str) -> Record:
    """A record whose question holds its options, where it has them in fields of their own, as MMLU and MMLU-Pro do.

    These are `options` or `choices`, and `answer`: the right one's letter, or its index from 0.
    """
    options, answer = record.get("options") or record.get("choices"), record.get("answer")
    if "ground_truth_answer" in record or not isinstance(options, list) or answer is None:
        return record
    try:
        return record | lettered(_text(record, "question", where), options, answer)
    except ValueError as error:
        raise UserError(f"{where} cannot be read: {error}") from None


def lettered(question: str, options: Sequence[Any], answer: Any) -> Record:
    """A question with its options below it, a line and a letter for each, and the letter of the right one.

    `answer` is that letter, or an index from 0. ValueError where it is none of the options, where these are too many,
    or where one is neither text nor a number.
    """
    letters = LETTERS[: len(options)]
    letter = letters[answer] if type(answer) is int and 0 <= answer < len(letters) else answer
    if len(options) != len(letters) or letter not in list(letters):
        raise ValueError(
            f"its answer {answer!r:.40} is none of its {len(options)} options ({LETTERS[0]} to {LETTERS[-1]} at most)"
        )
    texts = [as_text(option) for option in options]
    for label, text in zip(letters, texts):
        if not isinstance(text, str):
            raise ValueError(f"its option {label} is a {type(text).__name__}; give text or a number")
    lines = [question.strip(), *(f"{label}. {text}" for label, text in zip(letters, texts))]
    return {"question": "\n".join(lines), "ground_truth_answer": letter}


def with_setup(record: Record) -> Record:
    """A code record as today's; in older files that download_data.py made of HumanEval and MBPP, `prefix` is `setup`.

    Those are known by their questions: the one holds the prefix itself, the other ends in the first test.
    """
    prefix, question, tests = record.get("prefix"), str(record["question"]), record.get("test_list")
    if not prefix or not isinstance(prefix, str) or not isinstance(tests, list) or not tests:
        return record
    older = question.startswith(f"Complete the following Python function.\n\n{prefix}def ")
    older = older or question.endswith(f"\nYour code should satisfy this test:\n{tests[0]}")
    if not older:
        return record
    return {"setup" if field == "prefix" else field: value for field, value in record.items()}


def check_python(source: str, where: str) -> None:
    """UserError where a source cannot be compiled: every program would fail such a test."""
    try:
        with warnings.catch_warnings(action="ignore"):
            compile(source, "test", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{where} is not valid Python: {_one_line(error)}") from None


def _find_file(name: str, key: str) -> Path | None:
    """The file that a name or path means; None where it may still be a hub id."""
    path = Path(name).expanduser()
    if path.is_dir():
        raise UserError(f"{key}: '{name}' is a folder; give one of its files ({', '.join(SUFFIXES)})")
    named = _ending(path) in SUFFIXES
    inside = [path] if named else [f"{name}{suffix}{packed}" for packed in ("", ".gz") for suffix in SUFFIXES]
    found = next((file for file in (path, *(DATA_DIR / file for file in inside)) if file.is_file()), None)
    if named and found is None:
        raise UserError(f"{key}: file '{name}' does not exist{_nearest(name)}; {_ways(name)}")
    return found


def _ending(path: Path) -> str:
    """What a file holds by its name: its ending, or the one before .gz."""
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _numbered(records: list[Any]) -> list[tuple[str, Any]]:
    """Records with words for their places, which count from 1."""
    return [(f"record {number}", record) for number, record in enumerate(records, 1)]


def _read_file(path: Path, key: str) -> list[tuple[str, Any]]:
    """What a file holds: lines or records with words for their places."""
    ending = _ending(path)
    if ending == ".jsonl":
        return [(f"line {number}", content) for number, content in read_lines(path, key)]
    if ending == ".json":
        return _numbered(_read_list(path, key))
    if ending == ".parquet":
        return _numbered(_read_table(path, key))
    raise UserError(f"{key}: '{path}' has the ending '{ending}'; use {', '.join(SUFFIXES)}, or one of them and .gz")


def _read_list(path: Path, key: str) -> list[Any]:
    """The records of a .json file; one with what no program can hold is the UserError about it."""
    text = read_text(path, key)
    records, doubtful = parse(text, f"{key}: '{path}'") if text.strip() else ([], False)
    if not isinstance(records, list):
        raise UserError(f"{key}: '{path}' holds one {type(records).__name__}; a .json file is a list of records")
    if doubtful:
        for index, record in enumerate(records):
            if fault := fault_of(record):
                records[index] = UserError(f"{key}: record {index + 1} of '{path}' {fault}")
    return records


def _read_table(path: Path, key: str) -> list[Record]:
    """The rows of a .parquet file."""
    import pyarrow.parquet

    content = read_bytes(path, key)
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(content))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{key}: '{path}' cannot be read: {_one_line(error)}") from None
    columns = []
    for name, column in zip(table.column_names, table.columns):
        try:
            columns.append(column.to_pylist())
        except (ValueError, ArithmeticError, LookupError) as error:  # text that is no UTF-8, dates beyond Python's
            raise UserError(
                f"{key}: '{path}': the column `{name}` cannot be read ({_one_line(error)}); correct it or leave it out"
            ) from None
    return [dict(zip(table.column_names, row)) for row in zip(*columns)]


def load_from_hub(hub_id: str, *config: str | None) -> Any:
    """`datasets.load_dataset`, without a line for every attempt at a host that is not there."""
    import datasets

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    return datasets.load_dataset(hub_id, *config)


def _from_hub(name: str, key: str) -> list[Record]:
    """`org/name`, or `org/name:split` where the set has several splits."""
    hub_id, _, split = name.partition(":")
    try:
        loaded = load_from_hub(hub_id)
    except ImportError:
        raise UserError(f"{key}: '{name}' is a hub id, which needs: pip install datasets; or give a file") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{key}: '{name}' is no file here and could not be loaded from the hub: {_one_line(error)}; {_ways(name)}"
        ) from None
    splits = list(loaded)
    if not split and len(splits) > 1:
        raise UserError(f"{key}: '{hub_id}' has the splits {', '.join(splits)}; name one, as '{hub_id}:{splits[0]}'")
    if split and split not in splits:
        raise UserError(f"{key}: '{hub_id}' has no split '{split}'; use {', '.join(splits)}")
    return [dict(record) for record in loaded[split or splits[0]]]


def _nearest(name: str) -> str:
    """`; did you mean 'x'?` from the sets at hand, empty where none is near."""
    parent = Path(name).expanduser().parent
    names = [
        f"{made}_{split}" for made in ("arithmetic_4", "countdown_3", "countdown_4", "sudoku_4") for split in SPLITS
    ]
    names += [path.name.partition(_ending(path))[0] for path in DATA_DIR.iterdir() if _ending(path) in SUFFIXES]
    names += [str(path) for path in parent.iterdir() if _ending(path) in SUFFIXES] if parent.is_dir() else []
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def _ways(name: str) -> str:
    if name in SETS:
        return f"get it by: python data/download_data.py --dataset {name}"
    return (
        "give arithmetic_4_train, countdown_3_train or sudoku_4_train (or dev, or test), "
        f"a path ({', '.join(SUFFIXES)}), a hub id org/name, or put {Path(name).stem}.jsonl into data/ "
        "(published sets: python data/download_data.py --list)"
    )


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
