"""Sets by name from the hub, and publishers' own files, in the project's format.

python data/download_data.py --dataset MATH500            download into data/MATH500.jsonl
python data/download_data.py --from FILE [--out FILE]     convert a publisher's file (GSM8K, MATH, HumanEval, MBPP, …)
python data/download_data.py --list                       what there is
"""

import argparse
import ast
import csv
import difflib
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also when called from inside data/
if str(Path(__file__).resolve().parent) in sys.path:
    sys.path.remove(str(Path(__file__).resolve().parent))  # no file of this folder stands in for a library

from common.boxed import extract_boxed
from common.errors import UserError, one_line_errors
from common.records import Record, fault_of, present, read_text
from data.tasks import DATA_DIR, load_from_hub, load_records, load_tasks


@dataclass(frozen=True)
class Source:
    """Where a set lies on the hub; `convert` is found by its fields."""

    hub_id: str
    split: str
    use: str
    config: str | None = None


SOURCES: dict[str, Source] = {
    "MATH500": Source("HuggingFaceH4/MATH-500", "test", "evaluation, 500 tasks"),
    "GSM8K": Source("openai/gsm8k", "test", "evaluation, 1,319 tasks", "main"),
    "AIME2024": Source("HuggingFaceH4/aime_2024", "train", "evaluation, 30 tasks"),
    "LiveCodeBench": Source("Gen-Verse/LiveCodeBench", "test", "evaluation, code"),
    "LiveBench": Source("Gen-Verse/LiveBench", "test", "evaluation, code"),
    "MBPP": Source("google-research-datasets/mbpp", "test", "evaluation, 500 code tasks", "full"),
    "HumanEval": Source("openai/openai_humaneval", "test", "evaluation, 164 code tasks"),
    "MATH_train": Source("Gen-Verse/MATH_train", "train", "training"),
    "PrimeIntellect": Source("Gen-Verse/PrimeIntellect", "train", "training, code"),
    "demon_openr1math": Source("Gen-Verse/demon_openr1math", "train", "training"),
    "Countdown": Source("Jiayi-Pan/Countdown-Tasks-3to4", "train", "training, countdown"),
}


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help=", ".join(SOURCES))
    parser.add_argument(
        "--from", dest="file", type=Path, help="a publisher's csv, jsonl, json or parquet; the last three also as .gz"
    )
    parser.add_argument("--out", type=Path, help="file to write; default data/NAME.jsonl")
    parser.add_argument("--list", action="store_true", help="list the sets")
    args = parser.parse_args()
    if args.list:
        for name, source in SOURCES.items():
            print(f"{name:18} {source.use:30} {source.hub_id}")
    elif args.file:
        name = args.dataset or args.file.name.partition(".")[0]
        is_csv = args.file.suffix == ".csv"
        rows = read_csv(args.file) if is_csv else load_records(str(args.file), "--from")
        records = convert_records(rows, str(args.file))
        write(records, args.out or DATA_DIR / f"{name}.jsonl")
    elif args.dataset:
        download(args.dataset, args.out)
    else:
        parser.error("give --dataset NAME, --from FILE or --list")


def download(name: str, out: Path | None) -> None:
    """Fetch a set from the hub, convert and write it."""
    if name not in SOURCES:
        close = difflib.get_close_matches(name, SOURCES, n=1, cutoff=0.4)
        hint = f"did you mean '{close[0]}'?" if close else f"use {', '.join(SOURCES)}"
        raise UserError(f"--dataset: '{name}' is unknown; {hint} (any other hub id: dataset.train_dataset=org/name)")
    source, out = SOURCES[name], out or DATA_DIR / f"{name}.jsonl"
    try:
        loaded = load_from_hub(source.hub_id, source.config)
        split = source.split if source.split in loaded else next(iter(loaded))
        rows = [dict(row) for row in loaded[split]]
    except ImportError:
        raise UserError("--dataset needs: pip install datasets; or --from FILE converts a publisher's file") from None
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(
            f"--dataset: '{name}' could not be loaded from the hub ({reason}); without a network, fetch "
            f"https://huggingface.co/datasets/{source.hub_id} elsewhere and put its records at {out}, or convert the "
            f"publisher's file: python data/download_data.py --from FILE --out {out}"
        ) from None
    write(convert_records(rows, name), out)


def convert_records(rows: Sequence[Record], name: str = "the file") -> list[Record]:
    """Records of a publisher's in the project's format; those that are in it already stay as they are."""
    converted = []
    for number, row in enumerate(map(present, rows), 1):
        fields = next((fields for fields in CONVERTERS if fields <= row.keys()), None)
        if fields is None:
            found = ", ".join(map(str, row)) or "none"
            raise UserError(
                f"{name}: record {number} has the fields {found:.200}; known are the formats of "
                "GSM8K, MATH, AIME, HumanEval, MBPP, countdown, sudoku and this project (data/README.md)"
            )
        try:
            for field in sorted(fields):
                if not isinstance(row[field], TYPES.get(field, str)):
                    raise ValueError(f"its `{field}` is a {type(row[field]).__name__}")
            record = CONVERTERS[fields](row)
            if fault := fault_of(record):
                raise ValueError(f"it {fault}")
        except (ValueError, TypeError, SyntaxError, RecursionError) as error:
            raise UserError(f"{name}: record {number} cannot be converted: {error}") from None
        converted.append(record)
    return converted


def read_csv(path: Path) -> list[Record]:
    """The rows of a table with a line of names, all as text: the cells of a board may begin with 0."""
    return list(csv.DictReader(read_text(path, "--from").splitlines()))


def write(records: list[Record], out: Path) -> None:
    """Write records as JSON lines, once they load as tasks."""
    if not out.parent.is_dir():
        raise UserError(f"--out: the folder {out.parent} does not exist; make it or name another")
    part = out.with_name(f"{out.stem}.part.jsonl")
    part.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    try:
        tasks = load_tasks(str(part), "--out")
    except UserError:
        part.unlink()
        raise
    part.replace(out)
    print(f"{out}: {len(tasks)} tasks")


def from_gsm8k(row: Record) -> Record:
    """`answer` ends in `#### 18`."""
    _, marks, answer = str(row["answer"]).rpartition("####")
    if not marks:
        raise ValueError("its `answer` has no ####")
    return {"question": row["question"], "ground_truth_answer": answer.strip(), "solution": row["answer"]}


def from_math(row: Record) -> Record:
    r"""`answer` where there is one, else the last box of the solution."""
    answer = row.get("answer")
    if answer is None:
        answer = extract_boxed(row["solution"])
        if not answer:
            raise ValueError("its `solution` has no \\boxed{…}")
    record = {"question": row["problem"], "ground_truth_answer": str(answer)}
    record |= {key: row[key] for key in ("unique_id", "subject", "level", "type") if key in row}
    return record | ({"solution": row["solution"]} if row.get("solution") else {})


def from_aime(row: Record) -> Record:
    """The form with capitals."""
    return {"question": row["Problem"], "ground_truth_answer": str(row["Answer"]), "id": str(row["ID"])}


def from_humaneval(row: Record) -> Record:
    """The tests call `check` on the function; what stands before it in the prompt is theirs too."""
    name, prompt = row["entry_point"], row["prompt"]
    place = prompt.rindex(f"def {name}(")
    return {
        "question": f"Complete the following Python function.\n\n{prompt}",
        "id": row["task_id"],
        "test_method": "function",
        "test_list": [f"{row['test']}\ncheck({name})"],
        "prefix": prompt[:place],
        "entry_point": name,
        "test_time_limit": 5,
    }


def from_mbpp(row: Record) -> Record:
    """Asserts on the function that the reference defines; one of them is shown, so that its name is known."""
    question, tests = (row.get("text") or row.get("prompt") or "").strip(), row["test_list"]
    if not question or not tests:
        raise ValueError("its `text` or its `test_list` is empty")
    defined = [node.name for node in ast.parse(row["code"]).body if isinstance(node, ast.FunctionDef)]
    called = [name for name in defined if f"{name}(" in tests[0]]
    prefix = "\n".join([*(row.get("test_imports") or []), row.get("test_setup_code") or ""]).strip()
    record = {
        "question": f"{question}\nYour code should satisfy this test:\n{tests[0]}",
        "id": str(row["task_id"]),
        "test_method": "function",
        "test_list": tests,
        "prefix": prefix,
        "test_time_limit": 5,
    }
    return record | ({"entry_point": called[-1]} if called else {})


def from_countdown(row: Record) -> Record:
    """`nums` and `target` as in TinyZero's set, or `input` 30,100,93 and `output` 23 as in d1's test."""
    numbers = row["nums"] if "nums" in row else [int(number) for number in row["input"].split(",")]
    if not all(isinstance(number, int) for number in numbers):
        raise ValueError("its `nums` are no whole numbers")
    target = int(row["target"] if "target" in row else row["output"])
    question = f"{','.join(map(str, numbers))}={target}"
    return {"question": question, "ground_truth_answer": str(target), "numbers": numbers}


def from_sudoku(row: Record) -> Record:
    """Board and solution as d1's tables have them, each sixteen digits."""
    puzzle, solution = row["Puzzle"], row["Solution"]
    if not re.fullmatch("[0-4]{16}", puzzle) or not re.fullmatch("[1-4]{16}", solution):
        raise ValueError("its `Puzzle` or its `Solution` is no board of 4 × 4 cells")
    return {"question": puzzle, "ground_truth_answer": solution, "puzzle": puzzle}


# The types of fields that are not text, or may be numbers too.
TYPES = {"test_list": list, "nums": list, "target": int} | dict.fromkeys(
    ("answer", "Answer", "ID", "task_id", "ground_truth_answer"), (str, int, float)
)
# The fields that tell a format, the first that fits counts.
CONVERTERS: dict[frozenset[str], Callable[[Record], Record]] = {
    frozenset({"question", "ground_truth_answer"}): dict,
    frozenset({"question", "test_method"}): dict,
    frozenset({"prompt", "test", "entry_point"}): from_humaneval,
    frozenset({"code", "test_list", "task_id"}): from_mbpp,
    frozenset({"problem", "answer"}): from_math,
    frozenset({"problem", "solution"}): from_math,
    frozenset({"Problem", "Answer", "ID"}): from_aime,
    frozenset({"question", "answer"}): from_gsm8k,
    frozenset({"nums", "target"}): from_countdown,
    frozenset({"Puzzle", "Solution"}): from_sudoku,
    frozenset({"input", "output"}): from_countdown,
}

if __name__ == "__main__":
    main()
