"""Publishers' files converted, files checked, and what is said without a network."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from data import download_data
from data.check import check_file
from data.download_data import SETS, convert_records, download
from data.tasks import load_records, load_tasks

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT.parent / "shared" / "data"
EVALUATION = ["MATH500", "GSM8K", "AIME2024", "LiveCodeBench", "LiveBench", "MBPP", "HumanEval"]
TRAINING = ["MATH_train", "PrimeIntellect", "demon_openr1math"]
OPTIONS = ["MMLU-Pro", "GPQA", "GPQA_diamond"]
CODE = {"question": "q", "test_method": "function", "test_list": ["assert f(1) == 1"]}
STDIO = {"question": "q", "test_method": "stdio", "test_input": ["1", "2"], "test_output": ["1", "2"]}
MBPP = {
    "task_id": 126,
    "text": "Write a function to find the sum of common divisors.",
    "code": "def helper(x): return x\ndef sum(a, b): return helper(6)",
    "test_list": ["assert sum(10, 15) == 6", "assert sum(100, 150) == 93"],
    "test_setup_code": "import math",
}


def script(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("folder", [".", "data"])
@pytest.mark.parametrize(
    ("source", "hub_id"), [((), "Gen-Verse/AIME2024"), (("--source", "publisher"), "HuggingFaceH4/aime_2024")]
)
def test_without_a_network_one_line_says_what_to_put_where(folder, source, hub_id):
    path = "data/download_data.py" if folder == "." else "download_data.py"
    done = script(path, "--dataset", "AIME2024", *source, cwd=ROOT / folder)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert f"huggingface.co/datasets/{hub_id} " in line and "data/AIME2024.jsonl" in line
    assert "Traceback" not in done.stderr


def test_every_set_is_listed_with_its_sources():
    assert list(SETS) == [*EVALUATION, *OPTIONS, *TRAINING, "GSM8K_train", "Countdown"]
    lines = script("data/download_data.py", "--list").stdout.splitlines()
    listed = {line.split()[0]: line for line in lines}
    assert list(listed) == list(SETS)
    assert "gen-verse: Gen-Verse/GSM8K, publisher: openai/gsm8k" in listed["GSM8K"]
    assert "gen-verse: Gen-Verse/LiveBench" in listed["LiveBench"] and "publisher" not in listed["LiveBench"]
    assert "publisher: TIGER-Lab/MMLU-Pro" in listed["MMLU-Pro"] and "Gen-Verse" not in listed["MMLU-Pro"]


@pytest.mark.parametrize("name", [*EVALUATION, *TRAINING])
def test_the_published_records_are_the_file_of_that_name(tmp_path, monkeypatch, name):
    """The hub stands behind a double that has these files and no others."""
    split = "train" if name in TRAINING else "test"
    records = [CODE | {"prefix": "import math"}, {"question": "q", "ground_truth_answer": "4", "level": 3}]
    (tmp_path / "hub.json").write_text(json.dumps(records))

    def hf_hub_download(repo_id, filename, repo_type):
        assert (repo_id, filename, repo_type) == (f"Gen-Verse/{name}", f"{split}/{name}.json", "dataset")
        return str(tmp_path / "hub.json")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    download(name, out=tmp_path / "out.jsonl")
    assert [task.record for task in load_tasks(str(tmp_path / "out.jsonl"))] == records


def test_a_publishers_own_set(tmp_path, monkeypatch):
    """Where a publisher has the set, its own records are converted; where it has not, one line says who has."""
    asked = []

    def load_from_hub(*names):
        asked.append(names)
        return {
            split: [{"question": "q", "answer": f"so\n#### {answer}"}] for split, answer in (("train", 3), ("test", 7))
        }

    monkeypatch.setattr(download_data, "load_from_hub", load_from_hub)
    download("GSM8K", "publisher", tmp_path / "gsm.jsonl")
    assert asked == [("openai/gsm8k", "main")]
    assert [task.ground_truth_answer for task in load_tasks(str(tmp_path / "gsm.jsonl"))] == ["7"]
    download("GSM8K_train", out=tmp_path / "train.jsonl")
    (task,) = load_tasks(str(tmp_path / "train.jsonl"))
    assert (task.ground_truth_answer, task.record["solution"]) == ("3", "so\n#### 3")  # of which examples are made
    with pytest.raises(UserError, match="--source: 'publisher' has no LiveBench; use --source gen-verse"):
        download("LiveBench", "publisher")
    with pytest.raises(UserError, match="--source: 'gen-verse' has no GPQA; use --source publisher"):
        download("GPQA", "gen-verse")


MMLU = {"question_id": 70, "question": "Which?", "options": ["x", "y", "z"], "answer": "C", "answer_index": 2}
GPQA = {"Question": "Why?\n", "Correct Answer": "right", "Record ID": "rec1", "High-level domain": "Physics"}
GPQA |= {f"Incorrect Answer {number}": f"wrong {number}" for number in (1, 2, 3)}


def test_options_are_lettered(tmp_path):
    (record,) = convert_records([MMLU | {"category": "law"}])
    assert record == {"question": "Which?\nA. x\nB. y\nC. z", "ground_truth_answer": "C", "id": "70", "category": "law"}
    ten = MMLU | {"options": list("abcdefghij"), "answer": "J"}
    assert convert_records([ten])[0]["question"].endswith("\nI. i\nJ. j")
    for bad in ({"answer": "D"}, {"options": list("abcdefghijk"), "answer": "A"}):
        with pytest.raises(UserError, match=r"record 1 cannot be converted: its answer .* is none of its"):
            convert_records([MMLU | bad])


def test_the_right_option_of_gpqa_is_anywhere_and_always_in_the_same_place():
    rows = [GPQA | {"Question": f"Why {number}?", "Record ID": f"rec{number}"} for number in range(200)]
    records = convert_records(rows)
    assert records == convert_records(rows)  # whatever was converted before
    assert records[7:9] == convert_records(rows[7:9])
    for row, record in zip(rows, records):
        question, *lines = record["question"].split("\n")
        assert question == row["Question"] and record["category"] == "Physics" and record["id"] == row["Record ID"]
        assert f"{record['ground_truth_answer']}. right" in lines
        assert sorted(line[:3] for line in lines) == ["A. ", "B. ", "C. ", "D. "]
        assert sorted(line[3:] for line in lines) == ["right", "wrong 1", "wrong 2", "wrong 3"]
    letters = [record["ground_truth_answer"] for record in records]
    assert all(30 <= letters.count(letter) <= 70 for letter in "ABCD")


def test_a_wrong_name_is_told():
    done = script("data/download_data.py", "--dataset", "MATH50")
    assert done.returncode == 2 and "did you mean 'MATH500'?" in done.stderr


def test_a_converted_file_is_used_by_name_and_path(tmp_path):
    rows = [{"question": f"q{n}", "answer": f"so\n#### {n},000"} for n in range(1, 4)]
    with gzip.open(tmp_path / "gsm.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "mine.jsonl"
    done = script("data/download_data.py", "--from", str(tmp_path / "gsm.jsonl.gz"), "--out", str(out))
    assert done.returncode == 0 and "mine.jsonl: 3 tasks" in done.stdout
    assert [task.ground_truth_answer for task in load_tasks(str(out))] == ["1,000", "2,000", "3,000"]
    assert list(tmp_path.glob("*.part*")) == []


def test_math_records():
    row = {"problem": "p", "solution": "first \\boxed{1}, then \\boxed{\\frac{1}{2}}.", "level": "Level 5"}
    (record,) = convert_records([row])
    assert record["question"] == "p" and record["ground_truth_answer"] == "\\frac{1}{2}"
    written = {
        "$\\boxed 5$.": "5",
        "\\fbox{7}": "7",
        "$\\boxed{1}$ or $\\boxed{2}$": "1, 2",
        "$\\boxed{3}$ \\boxed{}": "3",
    }
    rows = [row | {"solution": f"It is {text}"} for text in written]
    assert [record["ground_truth_answer"] for record in convert_records(rows)] == list(written.values())
    assert convert_records([row | {"answer": "3"}])[0]["ground_truth_answer"] == "3"
    with pytest.raises(UserError, match="record 2 cannot be converted: its `solution` has no"):
        convert_records([row, row | {"solution": "none"}])


def test_mbpp_records():
    (record,) = convert_records([MBPP])
    assert record["entry_point"] == "sum" and record["setup"] == "import math" and len(record["test_list"]) == 2
    assert "assert sum(10, 15) == 6" in record["question"] and "== 93" not in record["question"]


def test_a_prefix_need_not_be_python_by_itself(tmp_path):
    """It begins the assistant's turn. What stood in that field of older files goes before the tests, as today's."""
    prefixes = ["```python\ndef f(x):\n", "def f(x):", "```python\n", "import math\n"]
    tasks = loaded_from(tmp_path, [CODE | {"prefix": prefix} for prefix in prefixes])
    assert [task.prefix for task in tasks] == ["```python\ndef f(x):", "def f(x):", "```python", "import math"]
    assert [task.record["prefix"] for task in tasks] == prefixes and "setup" not in tasks[3].record
    assert [task.prefix for task in loaded_from(tmp_path, [CODE])] == [""]


def test_older_files_kept_the_setup_in_the_prefix(tmp_path):
    humaneval = {"task_id": "HumanEval/0", "prompt": "import math\n\n\ndef f(x):\n", "entry_point": "f"}
    records = convert_records([MBPP, humaneval | {"test": "def check(g):\n    assert g(1) == 1"}])
    assert [record["setup"] for record in records] == ["import math", "import math\n\n\n"]
    older = [{"prefix" if key == "setup" else key: value for key, value in record.items()} for record in records]
    for now, before in zip(loaded_from(tmp_path, records), loaded_from(tmp_path, older)):
        assert before == now and before.prefix == "" and before.record["setup"].strip() == "import math"


def test_multiple_choices_as_mmlu_and_mmlu_pro_have_them(tmp_path):
    records = [
        {"question": "2+2?\n", "options": ["3", 4, "5"], "answer": "B", "answer_index": 1, "category": "math"},
        {"question": "2+2?", "choices": ["4", "5"], "answer": 0},
        {"question": "Which?\nA. this\nB. that", "ground_truth_answer": "A"},
    ]
    tasks = loaded_from(tmp_path, records)
    assert [(task.question, task.ground_truth_answer) for task in tasks] == [
        ("2+2?\nA. 3\nB. 4\nC. 5", "B"),
        ("2+2?\nA. 4\nB. 5", "A"),
        ("Which?\nA. this\nB. that", "A"),
    ]
    assert tasks[0].record["category"] == "math"
    for answer in (2, "C", "AB", "", True, ["A"]):
        with pytest.raises(UserError, match=r"record 1 of .* cannot be read: its answer .* is none of its 2 options"):
            loaded_from(tmp_path, [records[1] | {"answer": answer}])
    with pytest.raises(UserError, match=r"is none of its 11 options \(A to J at most\)"):
        loaded_from(tmp_path, [{"question": "q", "options": list(range(11)), "answer": "A"}])


def loaded_from(folder, records):
    path = folder / "tasks.json"
    path.write_text(json.dumps(records))
    return load_tasks(str(path))


def test_countdown_records():
    rows = [{"target": 23, "nums": [30, 100, 93]}, {"input": "30,100,93", "output": "23"}]
    one, other = convert_records(rows)
    assert one == other == {"question": "30,100,93=23", "ground_truth_answer": "23", "numbers": [30, 100, 93]}


def test_a_table_of_sudokus_keeps_its_zeros(tmp_path):
    table = tmp_path / "4x4.csv"
    table.write_text("Puzzle,Solution\n0401002010030310,2431312412434312\n")
    done = script("data/download_data.py", "--from", str(table), "--out", str(tmp_path / "sudoku.jsonl"))
    assert done.returncode == 0, done.stderr
    (task,) = load_tasks(str(tmp_path / "sudoku.jsonl"))
    assert task.question == task.record["puzzle"] == "0401002010030310"
    assert task.ground_truth_answer == "2431312412434312"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"nums": [1, 2.5], "target": 3}, "its `nums` are no whole numbers"),
        ({"nums": "1,2", "target": 3}, "its `nums` is a str"),
        ({"input": "Name a colour.", "output": "blue"}, "invalid literal"),
        ({"Puzzle": "12", "Solution": "2431312412434312"}, "its `Puzzle` or its `Solution` is no board of 4 × 4 cells"),
        ({"question": "q", "answer": 5}, "its `answer` has no ####"),
        ({"question": "q", "answer": ["#### 5"]}, "its `answer` is a list"),
        ({"question": ["q"], "answer": "#### 5"}, "its `question` is a list"),
        ({"problem": "p", "solution": 3}, "its `solution` is a int"),
        (MBPP | {"test_list": []}, "its `text` or its `test_list` is empty"),
        (MBPP | {"text": None}, "its `text` or its `test_list` is empty"),
        (MBPP | {"test_list": [1]}, "argument of type 'int'"),
        (MBPP | {"text": 5}, "its `text` or its `test_list` is empty or of another type"),
        (MBPP | {"test_imports": "import os"}, "its `test_imports` is no list"),
        (MMLU | {"options": ["a", None], "answer": "A"}, "its option B is a NoneType; give text or a number"),
        ({"task_id": 1, "prompt": "def f(x):", "test": "", "entry_point": 3}, "its `entry_point` is a int"),
    ],
)
def test_fields_of_another_type_are_told(row, message):
    with pytest.raises(UserError, match=f"FILE: record 2 cannot be converted: {message}"):
        convert_records([MBPP, row], "FILE")


def test_a_torn_file_is_told_by_the_command(tmp_path):
    packed = gzip.compress(b"".join(json.dumps({"question": str(n), "answer": "#### 1"}).encode() for n in range(99)))
    (tmp_path / "gsm.jsonl.gz").write_bytes(packed[:-20])
    done = script("data/download_data.py", "--from", str(tmp_path / "gsm.jsonl.gz"), "--out", str(tmp_path / "x.jsonl"))
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "x.jsonl").exists()
    assert done.stderr.startswith("error: --from: '") and "copy or download it again" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_function_without_a_name_of_its_task_is_told():
    with pytest.raises(UserError, match="FILE: record 1 has the fields prompt, test, entry_point; known are"):
        convert_records([{"prompt": "def f(x):", "test": "def check(f): assert f", "entry_point": "f"}], "FILE")


def test_unknown_formats_are_told():
    with pytest.raises(UserError, match="record 1 has the fields a, b; known are the formats of GSM8K"):
        convert_records([{"a": 1, "b": 2}])


BAD = {
    "test_method": (CODE | {"test_method": "functions"}, "`test_method` 'functions'; use function or stdio"),
    "test_list": ({"question": "q", "test_method": "function"}, "has no `test_list`"),
    "test_list of numbers": (CODE | {"test_list": [1]}, "has no `test_list`"),
    "test_list empty": (CODE | {"test_list": []}, "has no `test_list`"),
    "test_list not Python": (CODE | {"test_list": ["assert f(1) = 1"]}, "`test_list` entry 1 is not valid Python"),
    "test_list as a text": (CODE | {"test_list": '["assert f(1) == 1"]'}, "`test_list` is a list written as one text"),
    "test_list that calls nothing": (CODE | {"test_list": ["def check(c): assert c(1)"]}, "no assertion that is run"),
    "test_list without the program": (CODE | {"test_list": ["assert 1 + 1 == 2"]}, "uses nothing of the program's"),
    "test_output empty": (STDIO | {"test_output": ["", " \n"]}, "`test_output` is empty everywhere"),
    "lists as texts": (STDIO | {"test_input": '["1"]', "test_output": '["2"]'}, "are lists written as one text"),
    "setup not Python": (CODE | {"setup": "import"}, "`setup` is not valid Python"),
    "prefix no text": (CODE | {"prefix": ["import"]}, "`prefix` that is no text"),
    "prefix of an answer": (
        {"question": "q", "ground_truth_answer": "1", "prefix": "It is"},
        "has a `prefix`, which begins the program of a code task; leave it out",
    ),
    "entry_point": (CODE | {"entry_point": 3}, "`entry_point` that is no text"),
    "test_output": (STDIO | {"test_output": ["1"]}, "2 `test_input` but 1 `test_output`"),
    "test_time_limit": (CODE | {"test_time_limit": "1s"}, "`test_time_limit` '1s'"),
    "test_time_limit 0": (STDIO | {"test_time_limit": 0}, "`test_time_limit` 0"),
    "no answer": ({"question": "q"}, "has no `ground_truth_answer`"),
    "no question": ({"ground_truth_answer": "1"}, "has no `question`"),
}


@pytest.mark.parametrize("name", BAD)
def test_the_first_bad_record_and_field_are_named(tmp_path, name):
    bad, message = BAD[name]
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps([CODE, STDIO, bad, {}]))
    with pytest.raises(UserError) as caught:
        check_file(str(path))
    assert f"record 3 of '{path}'" in str(caught.value) and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_check_command(tmp_path):
    path = tmp_path / "tasks.jsonl"
    rows = [CODE, CODE, STDIO, {"question": "r", "ground_truth_answer": 3}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = script("-m", "data.check", str(path))
    assert done.returncode == 0 and "4 tasks (2 function, 1 stdio, 1 answer); 2 questions" in done.stdout
    path.write_text(json.dumps({"prompt": "p", "response": "r", "step_map": [0]}) + "\n")
    assert "1 SFT samples (1 answers), 1 with a step map" in check_file(str(path))
    path.write_text("{}\n")
    done = script("-m", "data.check", str(path))
    assert done.returncode == 2 and "record 1" in done.stderr and "`question`" in done.stderr


@pytest.mark.parametrize(
    ("name", "count"), [("gsm8k_test.jsonl", 1319), ("math500.jsonl", 500), ("HumanEval.jsonl.gz", 164)]
)
def test_publishers_files(tmp_path, name, count):
    if not (PUBLISHED / name).is_file():
        pytest.skip(f"the publisher's file {name} is not in shared/data beside the repository")
    shutil.copy(PUBLISHED / name, tmp_path)
    records = convert_records(load_records(str(tmp_path / name), "--from"))
    path = tmp_path / "converted.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert len(load_tasks(str(path))) == count and f"{count} tasks" in check_file(str(path))
