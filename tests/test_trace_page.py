"""The trace page in Chromium, driven by keys; and what goes into it."""

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.board import board_of
from common.config import load_config
from common.errors import UserError
from common.page import allow_script, embed_json, fill_page
from common.trajectory import Score, ScoredTrajectory, Task, Trajectory
from models import load_model
from rollout.samples import write_samples
from sample.traces import TEMPLATE, main, pieces_of, trace_page
from tests.browser import chromium, open_page, read_data

HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(2)</script><!--\u2028]]>&amp;"


def trace(count: int = 10, **changes: Any) -> dict[str, Any]:
    """A response of `count` tokens, two a step from the left, blocks of 4, the last two after its end."""
    made = {
        "name": "one",
        "setting": "static",
        "verdict": "passed",
        "reference": "12",
        "prompt": "what is it",
        "pieces": [f"w{i} " for i in range(count)],
        "special": [count - 3],
        "steps": [i // 2 for i in range(count)],
        "confidence": [(i % 10) / 10 for i in range(count)],
        "logp": [-0.1] * count,
        "first": 2,
        "block_size": 4,
        "length": count - 2,
        "denoising_steps": (count + 1) // 2,
        "forwards": count,
        "finish": "stop",
    }
    return made | changes


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as one:
        yield one


def shown(page: Any) -> str:
    return page.evaluate("[...document.querySelectorAll('.t.on')].map(e => e.textContent).join('')")


def test_driven_by_keys(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "trace.html"
    second = trace(6, name="two", verdict="failed", steps=[2, 1, 0, 3, -1, -1])
    file.write_text(trace_page([trace(), second], "title", "sub"), encoding="utf-8")
    page, faults = open_page(browser, file)
    assert page.title() == "title · trace"
    assert shown(page) == "".join(f"w{i} " for i in range(10))  # it opens on the whole response
    page.keyboard.press("Home")
    assert shown(page) == "" and page.inner_text("#now") == "0"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert shown(page) == "w0 w1 w2 w3 " and page.inner_text("#now") == "2"
    assert page.evaluate("[...document.querySelectorAll('.t.now')].map(e => e.textContent).join('')") == "w2 w3 "
    page.keyboard.press("ArrowLeft")
    assert shown(page) == "w0 w1 "
    page.keyboard.press("Shift+ArrowRight")  # to the first step of the next block, which begins at token 2
    assert page.inner_text("#now") == "2"
    page.keyboard.press("Shift+ArrowRight")
    assert page.inner_text("#now") == "4"
    assert page.evaluate("[...document.querySelectorAll('.b')].map(e => e.querySelectorAll('.t').length)") == [2, 4, 4]
    facts = page.inner_text("#facts")
    assert "tokens per forward\n1.60" in facts and "blocks of 4\n3" in facts
    page.keyboard.press(".")
    assert "confidence\n0.0000" in page.inner_text("#look")
    page.keyboard.press("ArrowDown")
    assert "failed" in page.inner_text("#verdict") and page.evaluate("location.hash") == "#2"
    assert shown(page) == "w0 w1 w2 w3 "  # tokens that were never unmasked stay masks
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert shown(page) == "w2 "
    page.keyboard.press("c")
    assert page.evaluate("document.body.dataset.colour") == "confidence"
    page.keyboard.press("?")
    assert page.is_visible("#keys")
    page.keyboard.press("Escape")
    page.locator("#keys").wait_for(state="hidden")
    page.keyboard.press("Space")
    page.locator("#now", has_text="4").wait_for()
    page.locator("#play[aria-label=Play]").wait_for()
    assert not faults


def test_it_plays_once(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "trace.html"
    file.write_text(trace_page([trace(), trace(6)], "title"), encoding="utf-8")
    page, faults = open_page(browser, file, motion="no-preference")
    page.locator("#play[aria-label=Pause]").wait_for()
    assert len(shown(page)) < len("".join(trace()["pieces"]))
    page.keyboard.press("+")
    page.keyboard.press("+")
    page.locator("#play[aria-label=Play]").wait_for()
    assert page.inner_text("#now") == "5"
    page.keyboard.press("ArrowDown")  # the next response stands whole
    assert page.inner_text("#now") == "3" and page.locator("#play[aria-label=Play]").count()
    page, more = open_page(browser, file, motion="no-preference", at="2@1")
    assert page.inner_text("#now") == "1" and page.locator("#play[aria-label=Play]").count()
    assert not faults and not more


def test_words_are_explained(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "trace.html"
    file.write_text(trace_page([trace(60)], "title"), encoding="utf-8")
    page, faults = open_page(browser, file)
    meanings = {"tokens": "a mask first", "forwards": "Passes of the network", "blocks of 4": "block after block"}
    for word, meaning in meanings.items():
        page.mouse.move(0, 0)
        assert page.is_hidden("#tip")
        page.hover(f".term:text-is('{word}')")
        assert meaning in page.inner_text("#tip")
        box = page.locator("#tip").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 1200 and box["y"] >= 0
    page.click("#help")
    assert "Passes of the network" in page.inner_text("#terms")
    assert not faults


def test_the_slider_and_clicks(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "trace.html"
    file.write_text(trace_page([trace(), trace(6)], "title"), encoding="utf-8")
    page, faults = open_page(browser, file, scheme="dark")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    box = page.locator("#scrub").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.4, box["y"] + 20)
    assert page.inner_text("#now") == "2"
    page.click(".chip >> nth=1")
    assert page.evaluate("document.querySelectorAll('.t').length") == 6
    page.click("#back")
    assert page.inner_text("#now") == "2" and page.inner_text("#of") == "/ 3 steps"
    page.keyboard.press("t")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    assert not faults


def test_hostile_text_stays_text(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "trace.html"
    names = dict.fromkeys(("name", "setting", "verdict", "reference", "prompt"), HOSTILE)
    made = trace(6, pieces=[HOSTILE, "a\nb", "", " ", "\ud800", "x"], **names)
    file.write_text(trace_page([made, made], HOSTILE, HOSTILE), encoding="utf-8")
    page, faults = open_page(browser, file)
    page.keyboard.press(".")
    assert page.text_content(".t") == HOSTILE
    assert page.text_content("#prompt") == page.text_content("#title") == HOSTILE
    assert page.evaluate("document.querySelectorAll('img, #canvas script').length") == 0
    assert not faults


def test_edits_and_revocations(browser: Any, tmp_path: Path) -> None:
    """Token 1 is edited in steps 1 and 3; token 2 is revoked in step 2 and comes back in step 4."""
    history = [[0, 1, "old ", -0.5], [0, 2, "gone ", -0.5], [1, 1, "new ", -0.5], [2, 2, None, 0]]
    made = trace(4, steps=[0, 3, 4, 1], overwritten=history, length=4, special=[], first=0)
    file = tmp_path / "trace.html"
    file.write_text(trace_page([made, trace(4)], "title"), encoding="utf-8")
    page, faults = open_page(browser, file)
    assert page.text_content("#heading") == "Response · 2 edits · 1 revoked"

    def row() -> list[str]:
        return page.evaluate("[...document.querySelectorAll('.t')].map(e => e.matches('.on') ? e.innerHTML : '?')")

    assert row() == ["w0 ", "<s>new </s>w1 ", "w2 ", "w3 "]
    assert "before, in step 1\nold␣" in (page.evaluate("look(1)"), page.inner_text("#look"))[1]
    stages = [
        (["?", "?", "?", "?"], 0),
        (["w0 ", "old ", "gone ", "?"], 3),
        (["w0 ", "<s>old </s>new ", "gone ", "w3 "], 4),
        (["w0 ", "<s>old </s>new ", "?", "w3 "], 3),
        (["w0 ", "<s>new </s>w1 ", "?", "w3 "], 3),
        (["w0 ", "<s>new </s>w1 ", "w2 ", "w3 "], 4),
    ]
    page.keyboard.press("Home")
    for key, walk in (("ArrowRight", stages), ("ArrowLeft", stages[::-1])):
        for stage, (expected, count) in enumerate(walk):
            assert row() == expected and page.inner_text("#have") == f"{count} of 4 tokens"
            if stage < len(walk) - 1:
                page.keyboard.press(key)
        if key == "ArrowRight":
            assert page.evaluate("document.querySelectorAll('.t.now').length") == 1
    page.keyboard.press("ArrowDown")
    assert page.text_content("#heading") == "Response"
    assert not faults


def test_the_shipped_page_opens(browser: Any) -> None:
    for width in (1200, 360):
        page, faults = open_page(browser, TEMPLATE, width=width)
        assert page.evaluate("document.querySelectorAll('.t.on').length") > 20
        assert "passed" in page.inner_text("#verdict")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        lines = page.evaluate("[...document.querySelectorAll('.t.whole')].map(e => e.getClientRects().length)")
        assert len(lines) > 20 and set(lines) == {1}, "a token is broken across lines"
        if width == 1200:  # the largest type that fits
            assert page.evaluate("document.documentElement.scrollHeight <= window.innerHeight")
            assert page.evaluate("parseFloat(getComputedStyle(canvas).fontSize)") >= 34
        page.click("#help")
        assert page.is_visible("#keys") and "`" not in page.inner_text("body")
        assert not faults


def test_the_page_reaches_nothing() -> None:
    page = TEMPLATE.read_text(encoding="utf-8")
    assert allow_script(page) == page, "run: python -m common.page sample/trace.viewer.html"
    assert "default-src 'none'" in page and "http:" not in page and "https:" not in page
    assert "innerHTML" not in page and "insertAdjacentHTML" not in page


def test_embedded_json() -> None:
    text = embed_json({"a": HOSTILE, "b": "\ud800"})
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text)["a"] == HOSTILE
    page = fill_page(TEMPLATE.read_text(encoding="utf-8"), {"title": HOSTILE, "x": "\\1 \\g<0>"})
    assert read_data(page) == {"title": HOSTILE, "x": "\\1 \\g<0>"}


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(ids).decode("utf-8", "replace")

    def batch_decode(self, many: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return [self.decode(ids, skip_special_tokens) for ids in many]


def test_pieces_of_characters() -> None:
    assert pieces_of(Bytes(), list("aé漢!".encode())) == ["a", "é", "", "漢", "", "", "!"]
    assert pieces_of(Bytes(), [0xE6, 0x41]) == ["\ufffd", "A"]  # half a character


def test_the_command(tiny_sdar: Path, tmp_path: Path) -> None:
    arguments = [f"model={tiny_sdar}", "max_token=8", "num_response_per_task=2", f"out={tmp_path}/page/trace.html"]
    page = main(load_config("trace", [*arguments, "prompt=1+2"])).read_text(encoding="utf-8")
    traces = read_data(page)["responses"]
    loaded = load_model(tiny_sdar, "sdar")
    assert [one["name"] for one in traces] == ["response 1", "response 2"]
    for one in traces:
        assert "1+2" in one["prompt"] and one["first"] == len(loaded.tokenizer(one["prompt"])["input_ids"])
        assert len(one["pieces"]) == len(one["steps"]) == len(one["confidence"]) >= one["length"]
    with pytest.raises(UserError, match="prompt is empty"):
        main(load_config("trace", arguments))
    with pytest.raises(UserError, match="samples: no file nowhere"):
        main(load_config("trace", [*arguments, "samples=nowhere.jsonl"]))
    for line, fault in {
        '{"task_id": "0", "step': "line 1 of .* is not valid JSON",
        '{"task": 0, "response": "x"}': "line 1 of .* is no response as eval.py and rl.py write them",
        '{"task_id": "0", "step_map": [0]}': "line 1 of .* is no response as eval.py and rl.py write them",
        '{"task_id": "0", "step_map": []}': "holds no traces",
    }.items():
        (tmp_path / "samples.jsonl").write_text(line + "\n")
        with pytest.raises(UserError, match=f"samples: .*{fault}"):
            main(load_config("trace", [*arguments, f"samples={tmp_path}/samples.jsonl"]))


def test_samples_of_a_sudoku_have_their_board(tiny_sdar: Path, tmp_path: Path) -> None:
    """The puzzle is the question, or stands beside one in other words; a task of another kind has no board."""
    loaded = load_model(tiny_sdar, "sdar")
    ids, puzzle = loaded.tokenizer.encode("\\boxed{2431312412434312}"), SUDOKU.record["puzzle"]
    count = len(ids)
    drawn = Trajectory("1", 0, [5], ids, [0] * count, [-1.0] * count, [0.5] * count, 1.0, "stop", count, 1, 1, 1.0)
    puzzles = [Task("1", puzzle, SUDOKU.ground_truth_answer, SUDOKU.record), SUDOKU, Task("1", "4+2", "6")]
    scored = [ScoredTrajectory(task, drawn, Score(1.0, True, "passed")) for task in puzzles]
    write_samples(tmp_path / "samples.jsonl", [scored])
    arguments = [f"model={tiny_sdar}", "num_response_per_task=3", f"out={tmp_path}/trace.html"]
    page = main(load_config("trace", [*arguments, f"samples={tmp_path}/samples.jsonl"])).read_text(encoding="utf-8")
    boards = [one.get("board") for one in read_data(page)["responses"]]
    assert [board and board["puzzle"] for board in boards] == [puzzle, puzzle, None] and len(boards[0]["cells"]) == 16


SUDOKU = Task("1", "q", "2431312412434312", {"puzzle": "0401002010030310"})


def test_a_sudoku_is_filled_step_by_step(browser: Any, tmp_path: Path) -> None:
    pieces = ["\\boxed{", "24", "\n", *"3131241243431", "3", "}", "<eos>"]  # the last cell is wrong
    steps = [0, 2, 2, *range(3, 16), 1, 16, 17]
    count = len(pieces)
    made = trace(count, pieces=pieces, steps=steps, confidence=[0.5] * count, length=count, special=[count - 1])
    file = tmp_path / "trace.html"
    with_board = made | {"board": board_of(SUDOKU.record["puzzle"], SUDOKU.ground_truth_answer, pieces)}
    file.write_text(trace_page([with_board, trace()], "title"), encoding="utf-8")
    page, faults = open_page(browser, file)
    filled = (
        "[...document.querySelectorAll('.cell')].map(e => e.classList.contains('on') ? e.textContent : '.').join('')"
    )
    assert page.evaluate(filled) == "2431312412434313"
    assert page.evaluate("[...document.querySelectorAll('.cell.wrong')].map(e => e.title)") == ["should be 2"]
    page.keyboard.press("Home")
    assert page.evaluate(filled) == "." * 16
    given = "[...document.querySelectorAll('.cell')].map(e => e.dataset.given || '0').join('')"
    assert page.evaluate(given) == SUDOKU.record["puzzle"]
    for _ in range(2):
        page.keyboard.press("ArrowRight")
    assert page.evaluate(filled) == "." * 15 + "3"
    page.keyboard.press("ArrowRight")  # one token that holds two digits
    assert page.evaluate(filled) == "24" + "." * 13 + "3"
    assert page.evaluate("document.querySelectorAll('.cell.now').length") == 2
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(filled) == "." * 15 + "3"
    page.hover(".cell >> nth=15")
    assert "position\n16" in page.inner_text("#look")
    page.keyboard.press("ArrowDown")
    assert page.is_hidden("#board")
    assert not faults


def test_where_the_digits_of_a_board_stand() -> None:
    pieces = ["1111 ", "\\boxed{", "2431", "3124\n1243", "4312", "}"]
    board = board_of(SUDOKU.record["puzzle"], SUDOKU.ground_truth_answer, pieces)
    assert "".join(pieces[token][offset] for token, offset in board["cells"]) == SUDOKU.ground_truth_answer
    assert board["cells"][0] == (2, 0) and board["cells"][8] == (3, 5)
    assert board_of(SUDOKU.record["puzzle"], SUDOKU.ground_truth_answer, pieces[:4]) is None, "no board"
    assert board_of(None, "6", ["\\boxed{", "6", "}"]) is None, "no sudoku"


def test_the_command_imports_no_file_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Started as a file, its folder comes first on the path: its kernels.py has the name of a library."""
    beside = str(TEMPLATE.parent)
    monkeypatch.setattr(sys, "path", [beside, *sys.path])
    runpy.run_path(f"{beside}/get_trace_viewer.py", run_name="imported")
    assert beside not in sys.path
