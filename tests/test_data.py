"""Data: arithmetic splits, reading of sets, what is said of broken ones, and the data order of RL."""

import datetime
import gzip
import hashlib
import json
import subprocess
import sys
import types
from itertools import chain
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from common.errors import UserError
from data import tasks as tasks_module
from data.arithmetic import arithmetic_tasks
from data.download_data import convert_records
from data.tasks import load_records, load_tasks, task_batch

ROOT = Path(__file__).resolve().parents[1]
GOOD = {"question": "2+2", "ground_truth_answer": "4"}


def test_an_arithmetic_record():
    records = {
        record["question"]: record for split in ("train", "dev", "test") for record in arithmetic_tasks(4, split)
    }
    assert records["4+2+8+1"] == {
        "question": "4+2+8+1",
        "ground_truth_answer": "15",
        "prompt": "4+2+8+1",
        "response": "4+2=6;6+8=14;14+1=15;\\boxed{15}",
    }
    assert len(records) == 9**4
    for question, record in records.items():
        assert eval(question) == int(record["ground_truth_answer"])
        for step in record["response"].split(";")[:-1]:
            left, right = step.split("=")
            assert eval(left) == int(right)


def test_splits_are_disjoint_and_stable():
    splits = {split: [r["question"] for r in arithmetic_tasks(4, split)] for split in ("train", "dev", "test")}
    questions = list(chain(*splits.values()))
    assert len(questions) == len(set(questions)) == 6561
    sizes = {split: len(questions) for split, questions in splits.items()}
    assert sizes == {"train": 5593, "dev": 328, "test": 640}
    digests = {s: hashlib.sha256("\n".join(q).encode()).hexdigest()[:16] for s, q in splits.items()}
    # Recorded: results on one version's test split must mean the same on the next.
    assert digests == {"train": "40b5552c963c0914", "dev": "2d702fc748d93aa2", "test": "1b3df27d37d06056"}


def test_a_tuple_is_in_the_same_split_whatever_the_difficulty():
    test = {record["question"] for record in arithmetic_tasks(3, "test", largest=9)}
    harder = {record["question"] for record in arithmetic_tasks(3, "test", largest=20)}
    assert test == {q for q in harder if all(int(n) <= 9 for n in q.split("+"))}


def test_large_spaces_are_sampled_without_replacement():
    splits = {s: [r["question"] for r in arithmetic_tasks(6, s)] for s in ("train", "dev", "test")}
    questions = list(chain(*splits.values()))
    assert len(questions) == len(set(questions)) == 50_000
    assert len(splits["test"]) == pytest.approx(5000, rel=0.06)
    numbers = [int(n) for q in splits["test"] for n in q.split("+")]
    assert set(numbers) == set(range(1, 10)) and len(numbers) == 6 * len(splits["test"])
    assert splits["test"] != [r["question"] for r in arithmetic_tasks(6, "test", seed=1)]


def test_the_arithmetic_command_writes_files_that_load(tmp_path):
    command = [sys.executable, "-m", "data.arithmetic", "--operands", "3", "--out", str(tmp_path / "a")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    for split in ("train", "dev", "test"):
        assert load_tasks(str(tmp_path / "a" / f"{split}.jsonl")) == load_tasks(f"arithmetic_3_{split}")


def test_arithmetic_by_name():
    assert len(load_tasks("arithmetic_4_test")) == 640
    assert load_records("arithmetic_4_dev", "x") == arithmetic_tasks(4, "dev")
    assert [t.question for t in load_tasks("arithmetic_2_30_test")] == [
        r["question"] for r in arithmetic_tasks(2, "test", largest=30)
    ]
    with pytest.raises(UserError, match=r"dataset.eval_dataset: 'arithmetic_1_test'"):
        load_tasks("arithmetic_1_test", "dataset.eval_dataset")


def write(path: Path, records) -> str:
    if path.suffix == ".gz":
        plain = Path(write(path.with_suffix(""), records))
        path.write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
        plain.unlink()
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records), encoding="utf-8")
    else:
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        path.write_text("\ufeff" + "".join(lines) + "\n", encoding="utf-8")
    return str(path)


SUFFIXES = [".json", ".jsonl", ".parquet", ".json.gz", ".jsonl.gz", ".parquet.gz"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_of_every_kind(tmp_path, suffix):
    records = [GOOD | {"level": 1}, {"question": "π\u2028?", "ground_truth_answer": "3.1", "level": 2}]
    tasks = load_tasks(write(tmp_path / f"x{suffix}", records))
    assert [(t.id, t.question, t.ground_truth_answer, t.record["level"]) for t in tasks] == [
        ("0", "2+2", "4", 1),
        ("1", "π\u2028?", "3.1", 2),
    ]


def test_a_name_is_a_file_in_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks_module, "DATA_DIR", tmp_path)
    write(tmp_path / "MySet.json", [GOOD])
    assert load_tasks("MySet")[0].question == "2+2"
    assert load_tasks("MySet.json")[0].question == "2+2"
    write(tmp_path / "Packed.jsonl.gz", [GOOD])
    assert load_tasks("Packed")[0].question == load_tasks("Packed.jsonl.gz")[0].question == "2+2"
    with pytest.raises(UserError, match="did you mean 'MySet'"):
        load_tasks("MySets")


def test_ids(tmp_path):
    records = [GOOD | {"id": 5}, {"task_id": "b"} | GOOD, GOOD | {"id": None}]
    assert [t.id for t in load_tasks(write(tmp_path / "x.jsonl", records))] == ["5", "b", "2"]
    reordered = [dict(reversed(record.items())) for record in records]
    assert [t.id for t in load_tasks(write(tmp_path / "y.jsonl", reordered))] == ["5", "b", "2"]
    with pytest.raises(UserError, match=r"records 1 and 3 of .* have the same id 'a'"):
        load_tasks(write(tmp_path / "z.jsonl", [GOOD | {"id": "a"}, GOOD, GOOD | {"id": "a"}]))


def test_numbers_are_answers(tmp_path):
    path = write(tmp_path / "x.json", [GOOD | {"ground_truth_answer": 4}, GOOD | {"ground_truth_answer": 0.5}])
    assert [t.ground_truth_answer for t in load_tasks(path)] == ["4", "0.5"]


@pytest.mark.parametrize("bad", [None, "", "  ", True, ["4"], {"a": 1}, float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["question", "ground_truth_answer"])
def test_a_record_without_a_field_is_told(tmp_path, field, bad):
    path = write(tmp_path / "x.json", [GOOD, GOOD | {field: bad}])
    with pytest.raises(UserError, match=f"dataset.train_dataset: record 2 of .* has no `{field}`") as caught:
        load_tasks(path)
    assert "\n" not in str(caught.value)


NOISE = {"noise": [hashlib.sha256(b"%d" % n).hexdigest() for n in range(9)]}
TORN = gzip.compress(json.dumps(GOOD | NOISE).encode(), mtime=0)  # with a time every process would have its own
TORN = TORN[: len(TORN) // 2]
LONE = '{"question": "what is \\ud83d?", "ground_truth_answer": "4"}'
LONG = '{"question": "2+2", "ground_truth_answer": ' + "1" * 5000 + "}"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"a": 1}\n\n{"a": \n', r"line 3 of .* is not valid JSON"),
        ("x.json", '[\n{"a": 1},\n{"a" 2}]', r"is not valid JSON \(line 3\)"),
        ("x.json", '{"a": 1}', "holds one dict; a .json file is a list"),
        ("x.json", "[1]", "record 1 of .* is a int, not an object"),
        ("x.json", "[" * 100_000, "nested too deeply"),
        ("x.json", "[]", "has no records"),
        ("x.jsonl", "\n", "has no records"),
        ("x.json", b"\xff\xfe", "is not UTF-8"),
        ("x.parquet", "no parquet", "cannot be read"),
        ("x.csv", "a,b", "has the ending '.csv'; use .jsonl, .json, .parquet"),
        ("x.csv.gz", "a,b", "has the ending '.csv'; use .jsonl, .json, .parquet"),
        ("x.jsonl.gz", TORN, r"x.jsonl.gz' is torn or no gzip file \(.*end-of-stream.*\); copy or download it again"),
        ("x.parquet.gz", TORN, "is torn or no gzip file"),
        ("x.json.gz", "plain text", "is torn or no gzip file"),
        ("x.jsonl.gz", TORN[:20] + b"\x55" * 40, "is torn or no gzip file"),
        ("x.jsonl.gz", gzip.compress(b"\n\xff", mtime=0), "is not UTF-8 \\(byte 1\\)"),
        ("x.jsonl", LONE, r"line 1 of .* has in `question` half a character \(\\ud83d\); correct the text"),
        ("x.json", f"[{{}}, {LONE}]", r"record 2 of .* has in `question` half a character"),
        ("x.jsonl", '{"a": [{"\\uDC00": 1}]}', r"line 1 of .* has in `a` half a character \(\\udc00\)"),
        ("x.jsonl", '{"\\ud800": 1}', "has in `\\?` half a character"),
        ("x.jsonl", LONG, "line 1 of .* has in `ground_truth_answer` a number of 5000 digits; write it as text"),
        ("x.json", f"[{LONG}]", "record 1 of .* has in `ground_truth_answer` a number of 5000 digits"),
        ("x.jsonl", '{"a": [[-' + "7" * 6000 + "]]}", "has in `a` a number of 6000 digits"),
    ],
)
def test_broken_files_are_told(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        load_tasks(str(path), "dataset.eval_dataset")
    assert str(caught.value).startswith("dataset.eval_dataset") and "\n" not in str(caught.value)


def test_whole_characters_and_long_numbers_are_read(tmp_path):
    """Escapes in pairs are one character; numbers of up to 4,300 digits are numbers; longer ones may be text."""
    (tmp_path / "x.jsonl").write_text(
        '{{"question": "\\ud83d\\ude00", "ground_truth_answer": {}, "x": "{}"}}'.format("1" * 4300, "2" * 5000)
    )
    (task,) = load_tasks(str(tmp_path / "x.jsonl"))
    assert (task.question, task.ground_truth_answer) == ("\U0001f600", "1" * 4300)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_empty_fields_are_none(tmp_path, suffix):
    """A table has every column in every row: kinds of tasks mix, and what is empty is as if it were not there."""
    columns = {"question": None, "ground_truth_answer": None, "test_method": None, "test_list": None, "setup": None}
    code = {"question": "f", "test_method": "function", "test_list": ["assert f(1) == 1"]}
    answer, program = load_tasks(write(tmp_path / f"x{suffix}", [columns | GOOD, columns | code]))
    assert (answer.ground_truth_answer, answer.record) == ("4", GOOD)
    assert (program.ground_truth_answer, program.record) == (None, code)
    nan = float("nan")
    (task,) = load_tasks(write(tmp_path / f"y{suffix}", [GOOD | {"test_time_limit": nan, "level": nan}]))
    assert task.record == GOOD


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (datetime.datetime(2026, 1, 2), r"record 1 of .*x\.parquet' has in `extra` a datetime,"),
        (datetime.date(2026, 1, 2), "has in `extra` a date,"),
        (b"\x89PNG", "has in `extra` a bytes,"),
        ([{"at": datetime.timedelta(seconds=1)}], "has in `extra` a timedelta,"),
    ],
)
def test_values_that_json_does_not_know_are_told(tmp_path, value, message):
    path = write(tmp_path / "x.parquet", [GOOD | {"extra": value}])
    with pytest.raises(UserError, match=message + ".*JSON does not know; write it as text or leave it out"):
        load_tasks(path)
    with pytest.raises(UserError, match="--from: record 1 cannot be converted: it has in `extra`"):
        convert_records(load_records(path, "--from"), "--from")
    converted = convert_records([{"problem": "p", "answer": "4", "at": value}])
    assert converted == [{"question": "p", "ground_truth_answer": "4"}], "what is not kept may be anything"


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array([0, 9 * 10**18], pyarrow.timestamp("us")),
        pyarrow.array([0, 1], pyarrow.timestamp("us", "Nowhere/Else")),
        pyarrow.Array.from_buffers(
            pyarrow.string(), 2, [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"a\xff")]
        ),
    ],
)
def test_a_column_that_cannot_be_read_is_named(tmp_path, column):
    table = pyarrow.table({"question": ["1", "2"], "extra": column})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet': the column `extra` cannot be read \(.*leave it out") as caught:
        load_tasks(str(tmp_path / "x.parquet"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "dataset.train_dataset is empty"),
        ("arithmetic_4_tset", "was not found; did you mean 'arithmetic_4_test'"),
        ("no/such/file.jsonl", "does not exist; give arithmetic_4_train"),
        (str(ROOT), "is a folder"),
    ],
)
def test_what_is_not_there_is_told(name, message):
    with pytest.raises(UserError, match=message):
        load_tasks(name)


def test_a_mistyped_path_names_its_neighbour(tmp_path):
    write(tmp_path / "train.jsonl", [GOOD])
    with pytest.raises(UserError, match=r"did you mean '.*/train\.jsonl'"):
        load_tasks(str(tmp_path / "trian.jsonl"))


def test_hub_ids(monkeypatch):
    """The hub stands behind a double: the machine that runs the tests may have no network."""

    def load_dataset(hub_id):
        if hub_id == "org/none":
            raise FileNotFoundError("Dataset 'org/none' doesn't exist\non the Hub")
        return {"train": [GOOD]} if hub_id == "org/one" else {"train": [GOOD], "test": [GOOD, GOOD]}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert len(load_tasks("org/one")) == 1
    assert len(load_tasks("org/two:test")) == 2
    with pytest.raises(UserError, match="has the splits train, test; name one, as 'org/two:train'"):
        load_tasks("org/two")
    with pytest.raises(UserError, match="has no split 'dev'; use train, test"):
        load_tasks("org/two:dev")
    with pytest.raises(UserError, match="could not be loaded from the hub: Dataset 'org/none' doesn't exist;"):
        load_tasks("org/none")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        load_tasks("org/one")


def draw(num_tasks: int, batches: list[int], seed: int = 1, cursor: int = 0) -> list[list[int]]:
    drawn = []
    for batch in batches:
        indices, cursor = task_batch(num_tasks, batch, cursor, seed)
        drawn.append(indices)
    return drawn


@pytest.mark.parametrize(("num_tasks", "batch"), [(10, 4), (10, 10), (3, 8), (1, 2), (97, 32), (640, 64)])
def test_every_epoch_has_every_task_once(num_tasks, batch):
    stream = list(chain(*draw(num_tasks, [batch] * 60)))
    assert len(stream) == 60 * batch
    epochs = [stream[start : start + num_tasks] for start in range(0, len(stream) - num_tasks + 1, num_tasks)]
    assert all(sorted(epoch) == list(range(num_tasks)) for epoch in epochs)
    if num_tasks > 3:
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs), "every epoch has an order of its own"


def test_batch_sizes_do_not_change_the_order():
    assert list(chain(*draw(30, [7, 1, 20, 32]))) == list(chain(*draw(30, [60])))


def test_a_resumed_run_draws_the_same_tasks():
    whole = draw(50, [16] * 10)
    tasks_module._epoch_order.cache_clear()  # a resumed run is a new process
    assert draw(50, [16] * 4, cursor=6 * 16) == whole[6:]
    assert draw(50, [16] * 10, seed=2) != whole


def test_no_batch_has_a_task_twice_where_epochs_meet():
    for num_tasks in (9, 30, 100):
        batch = num_tasks // 3
        for start in range(batch):
            batches = draw(num_tasks, [start] + [batch] * 30)
            assert all(len(set(indices)) == len(indices) for indices in batches)
