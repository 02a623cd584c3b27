"""benchmarks/versus.py: sides in turn and what is told of them; ours and the stand-ins do the same."""

import json
from pathlib import Path

import pytest

from benchmarks import ours, stand_ins, versus_rows
from benchmarks.versus import Side, agreement, inputs_of, main, versus
from benchmarks.versus_rows import ROWS, SHAPES, Row, block_row, code_row, full_row, rl_row, sft_row

SIDES = """
import time

def quick(inputs):
    return lambda: [[len(inputs["prompts"]), inputs["tokens"]]]

def slow(inputs):
    held = []

    def run():
        end = time.process_time() + 0.05
        while time.process_time() < end:
            held.append(bytearray(1 << 20)) if len(held) < 32 else None
        print("this is no answer")
        return [[len(inputs["prompts"]), inputs["tokens"]]]

    return run

def broken(inputs):
    raise RuntimeError("no such checkpoint")
"""


@pytest.fixture
def sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module of sides, the current one."""
    (tmp_path / "made_sides.py").write_text(SIDES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_two_sides_are_timed_in_turn(sides: Path) -> None:
    inputs = inputs_of({"prompts": "3", "tokens": "8", "rounds": "2"})
    assert len(inputs["prompts"]) == 3 and inputs["tokens"] == 8 and "rounds" not in inputs
    with Side("made_sides") as one, Side("made_sides") as other:
        row = versus(one, other, "made_sides:quick", "made_sides:slow", inputs, rounds=2)
        again = versus(one, other, "made_sides:slow", "made_sides:slow", inputs, rounds=1)
    assert row["results"] == "1 of 1 equal" and row["rounds"] == 2
    assert row["their seconds"] >= 0.05 > row["our seconds"] and row["ratio"] > 5
    assert row["range"][0] <= row["ratio"] <= row["range"][1]
    assert row["their memory"] > 20 > row["our memory"]
    assert 0.2 < again["ratio"] < 5


def test_the_command_and_its_mistakes(sides: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["our=made_sides:quick", "their=made_sides:quick", "tokens=4", "rounds=1"])
    printed = capsys.readouterr().out
    assert "theirs / ours" in printed and "1 of 1 equal" in printed
    for words, line in (
        (["their=made_sides:quick"], "error: our: give MODULE:FUNCTION"),
        (["rows=all", "checkpoint=x"], "error: checkpoint: with rows= there are out and rounds"),
        (["rows=block huge"], "error: rows=block huge: no row has these words; the rows: block tiny, batch 1"),
        (["our=a:b", "their=a:c", "rounds=0"], "error: rounds=0: a whole number above 0, as rounds=5"),
        (
            ["our=made_sides:broken", "their=made_sides:quick"],
            "error: made_sides:broken: the process ended with code 1",
        ),
        (["our=a:b", "their=a:c", "prompts=none.json"], "error: prompts=none.json: a number, or a JSON file"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2 and line in capsys.readouterr().err


def test_agreement_is_said() -> None:
    assert agreement([[1, 2], [3]], [[1, 2], [4]]) == "1 of 2 equal"
    assert agreement([[1]], [[1], [2]]) == "differ: 1 and 2"
    assert agreement([1.0, 2.0], [1.0, 2.002]) == "apart by 1e-03"
    assert agreement([1.0], [1.0]) == "equal" and agreement(None, [[1]]) == "not compared"


def test_rows_are_written_one_by_one_and_not_measured_again(
    sides: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [Row(name, "made_sides:quick", "made_sides:quick", {"prompts": [], "tokens": 1}) for name in ("a", "b, c")]
    monkeypatch.setattr(versus_rows, "ROWS", rows)
    monkeypatch.setattr(versus_rows, "ROOMS", ("made_sides", "made_sides"))
    main(["rows=a", "rounds=1", "out=told"])
    assert [file.name for file in Path("told").iterdir()] == ["a.json"]
    kept = json.loads(Path("told/a.json").read_text())
    Path("told/a.json").write_text(json.dumps(kept | {"ratio": 123.0}))
    capsys.readouterr()
    main(["rows=all", "rounds=1", "out=told"])
    assert "123.00" in capsys.readouterr().out and Path("told/b-c.json").is_file()


def test_names_of_rows_differ() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


SHORT = [
    block_row("mini", 3, 8),
    block_row("mini", 3, 8, remasking_strategy=versus_rows.DYNAMIC),
    *(full_row("mini", 3, 16, way) for way in ("no cache", "prefix cache", "threshold")),
    rl_row("mini", "sdar", "real", [16, 24]),
    rl_row("mini", "llada", "static", [8]),
    sft_row("mini", "sdar", [24, 40]),
    sft_row("mini", "llada", [24, 40]),
]


@pytest.mark.parametrize("row", SHORT, ids=lambda row: row.name)
def test_a_stand_in_does_the_same(row: Row, checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "mini", {"width": 32, "layers": 2, "words": 39})
    monkeypatch.setattr(versus_rows, "SURE", 2.0)  # where more is 1 in float32, ties decide
    inputs = row.with_checkpoint(checkpoints)
    own, other = (getattr(module, name.partition(":")[2])(inputs)()
                  for module, name in ((ours, row.our), (stand_ins, row.their)))  # fmt: skip
    if isinstance(own[0], float):
        assert own == pytest.approx(other, rel=1e-4, abs=1e-7)
    else:
        assert own == other and len(own) == 3


def test_programs_are_scored_the_same() -> None:
    row = code_row(2)
    own = getattr(ours, row.our.partition(":")[2])(row.inputs)()
    assert own == getattr(stand_ins, row.their.partition(":")[2])(row.inputs)() == [0.0, 1.0]
