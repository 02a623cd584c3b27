"""Sets by name from the hub, and publishers' own files, in the project's format.

python data/download_data.py --dataset MATH500                       download into data/MATH500.jsonl
python data/download_data.py --dataset MATH500 --source publisher    from the set's own publisher
python data/download_data.py --from FILE [--out FILE]                convert a publisher's file
python data/download_data.py --list                                  what there is, and from where

By default a set comes from Gen-Verse, whose records stand behind the published figures of TraceRL.
"""

import argparse
import ast
import csv
import difflib
import json
import random
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also when called from inside data/
if str(Path(__file__).resolve().parent) in sys.path:
    sys.path.remove(str(Path(__file__).resolve().parent))  # no file of this folder stands in for a library

from common.boxed import extract_boxed
from common.errors import UserError, one_line_errors
from common.records import Record, fault_of, present, read_text
from data.published import SETS, Source
from data.tasks import DATA_DIR, LETTERS, lettered, load_from_hub, load_records, load_tasks


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help=", ".join(SETS))
    parser.add_argument("--source", choices=("gen-verse", "publisher"), help="whose records; see --list")
    parser.add_argument(
        "--from", dest="file", type=Path, help="a publisher's csv, jsonl, json or parquet; the last three also as .gz"
    )
    parser.add_argument("--out", type=Path, help="file to write; default data/NAME.jsonl")
    parser.add_argument("--list", action="store_true", help="list the sets")
    args = parser.parse_args()
    if args.list:
        for name, found in SETS.items():
            places = ", ".join(f"{source}: {place.hub_id}" for source, place in found.sources.items())
            print(f"{name:18} {found.use:22} {places}")
    elif args.file:
        name = args.dataset or args.file.name.partition(".")[0]
        is_csv = args.file.suffix == ".csv"
        rows = read_csv(args.file) if is_csv else load_records(str(args.file), "--from")
        records = convert_records(rows, str(args.file))
        write(records, args.out or DATA_DIR / f"{name}.jsonl")
    elif args.dataset:
        download(args.dataset, args.source, args.out)
    else:
        parser.error("give --dataset NAME, --from FILE or --list")


def download(name: str, source: str | None = None, out: Path | None = None) -> None:
    """Fetch a set from the hub, from its first source or the named one; convert and write it."""
    if name not in SETS:
        close = difflib.get_close_matches(name, SETS, n=1, cutoff=0.4)
        hint = f"did you mean '{close[0]}'?" if close else f"use {', '.join(SETS)}"
        raise UserError(f"--dataset: '{name}' is unknown; {hint} (any other hub id: dataset.train_dataset=org/name)")
    sources = SETS[name].sources
    source = source or next(iter(sources))
    if source not in sources:
        raise UserError(f"--source: '{source}' has no {name}; use --source {next(iter(sources))}")
    place, out = sources[source], out or DATA_DIR / f"{name}.jsonl"
    try:
        rows = hub_records(place)
    except ImportError:
        raise UserError("--dataset needs: pip install datasets; or --from FILE converts a publisher's file") from None
    except (OSError, ValueError, RuntimeError, LookupError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(
            f"--dataset: '{name}' could not be loaded from the hub ({reason}); without a network, fetch "
            f"https://huggingface.co/datasets/{place.hub_id} elsewhere and put its records at {out}, or convert the "
            f"publisher's file: python data/download_data.py --from FILE --out {out}"
        ) from None
    write(convert_records(rows, name), out)


def hub_records(place: Source) -> list[Record]:
    """The raw records at a place on the hub; what the hub's libraries raise where it cannot be reached."""
    if place.file:
        import huggingface_hub

        return load_records(huggingface_hub.hf_hub_download(place.hub_id, place.file, repo_type="dataset"), "--dataset")
    return [dict(row) for row in load_from_hub(place.hub_id, place.config)[place.split]]


def convert_records(rows: Sequence[Record], name: str = "the file") -> list[Record]:
    """Records of a publisher's in the project's format; those that are in it already stay as they are."""
    converted = []
    for number, row in enumerate(map(present, rows), 1):
        fields = next((fields for fields in CONVERTERS if fields <= row.keys()), None)
        if fields is None:
            found = ", ".join(map(str, row)) or "none"
            raise UserError(
                f"{name}: record {number} has the fields {found:.200}; known are the formats of "
                "GSM8K, MATH, AIME, HumanEval, MBPP, MMLU-Pro, GPQA, countdown, sudoku and here (data/README.md)"
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
        "setup": prompt[:place],
        "entry_point": name,
        "test_time_limit": 5,
    }


def from_mbpp(row: Record) -> Record:
    """Asserts on the function that the reference defines; one of them is shown, so that its name is known."""
    question, tests, imports = row.get("text") or row.get("prompt"), row["test_list"], row.get("test_imports") or []
    if not isinstance(question, str) or not question.strip() or not tests:
        raise ValueError("its `text` or its `test_list` is empty or of another type")
    if not isinstance(imports, list):
        raise ValueError("its `test_imports` is no list")
    defined = [node.name for node in ast.parse(row["code"]).body if isinstance(node, ast.FunctionDef)]
    called = [name for name in defined if f"{name}(" in tests[0]]
    setup = "\n".join([*imports, row.get("test_setup_code") or ""]).strip()
    record = {
        "question": f"{question.strip()}\nYour code should satisfy this test:\n{tests[0]}",
        "id": str(row["task_id"]),
        "test_method": "function",
        "test_list": tests,
        "setup": setup,
        "test_time_limit": 5,
    }
    return record | ({"entry_point": called[-1]} if called else {})


def from_mmlu_pro(row: Record) -> Record:
    """`answer` is the letter of the right one of `options`, up to ten."""
    record = lettered(row["question"], row["options"], row["answer"])
    return record | {"id": str(row["question_id"])} | {key: row[key] for key in ("category", "src") if key in row}


def from_gpqa(row: Record) -> Record:
    """The right answer stands in a column of its own: the options are shuffled, by a seed that is the question."""
    question, right = row["Question"].strip(), row["Correct Answer"].strip()
    options = [right, *(row[f"Incorrect Answer {number}"].strip() for number in (1, 2, 3))]
    random.Random(question).shuffle(options)
    record = lettered(question, options, LETTERS[options.index(right)])
    fields = {"id": "Record ID", "category": "High-level domain", "subject": "Subdomain"}
    return record | {field: row[column] for field, column in fields.items() if column in row}


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
TYPES = {"test_list": list, "options": list, "nums": list, "target": int} | dict.fromkeys(
    ("answer", "Answer", "ID", "task_id", "question_id", "ground_truth_answer"), (str, int, float)
)
# The fields that tell a format, the first that fits counts.
CONVERTERS: dict[frozenset[str], Callable[[Record], Record]] = {
    frozenset({"question", "ground_truth_answer"}): dict,
    frozenset({"question", "test_method"}): dict,
    frozenset({"question_id", "question", "options", "answer"}): from_mmlu_pro,
    frozenset({"Question", "Correct Answer", *(f"Incorrect Answer {number}" for number in (1, 2, 3))}): from_gpqa,
    frozenset({"task_id", "prompt", "test", "entry_point"}): from_humaneval,
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
