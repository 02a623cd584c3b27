"""Rewards: the boxed answer, comparison of answers, hostile answers, and rewards of the user's own."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.coin_flip import coin_flip
from common.boxed import extract_boxed
from common.errors import UserError
from common.schema import RewardConfig, RLRewardConfig
from common.trajectory import Score, Task, Trajectory
from reward import math_reward
from reward.math_reward import MATH_VERIFY, MathVerify, answers_equal, math_score
from reward.score import check_tasks, make_scorer

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT.parent / "shared" / "data"
TASK = Task("7", "4+2+8+1", "15")


def published(name: str) -> list[dict]:
    path = PUBLISHED / name
    if not path.is_file():
        pytest.skip(f"the publisher's file {name} is not in shared/data beside the repository")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"so \boxed{15}", "15"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{ x \right.} done", r"\left\{ x \right."),
        (r"} { \boxed {7} }", "7"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{}", ""),
        ("15", None),
        (r"so \boxed 15 is it", "15"),
        (r"$\boxed 5$", "5"),
        (r"$\boxed5.$", "5"),
        (r"\(\boxed x\)", "x"),
        (r"$\boxed \frac{1}{2}$.", r"\frac{1}{2}"),
        (r"it is \boxed \frac12 as said", r"\frac12"),
        (r"$\boxed (3, 4]$", "(3, 4]"),
        (r"\boxed{5}. I used \boxed to show it", "5"),
        (r"put it in `\boxed`, then $x$", None),
        (r"\fbox{5}", "5"),
        (r"\boxed{4} or rather \fbox{5}", "5"),
        (r"\boxed{5}, as asked for in \boxed{}", "5"),
        (r"\boxed{1} and \boxed{2}", "1, 2"),
        (r"$\boxed{1}$, $\boxed{2}$, and $\boxed{3}$", "1, 2, 3"),
        (r"\boxed{1}\text{ or }\boxed{2}", "1, 2"),
        (r"$x=\boxed{3}$ or $x=\boxed{5}$", "3, 5"),
        (r"$x_1=\boxed{3},\quad x_2=\boxed{5}$", "3, 5"),
        (r"$x=\boxed{3}$ and $y=\boxed{5}$", "5"),
        (r"\boxed{3}, and so the length is \boxed{5}", "5"),
        ("\\boxed{5}\n\\boxed{6}", "6"),
        (r"\boxed{5}, \boxed{5}", "5"),
        (r"<think>so \boxed{15}</think> It is \boxed{16}.", "16"),
        (r"<think>so \boxed{15}</think> It is 16.", None),
        (r"<think>so \boxed{15}</think> ", "15"),
        (r"<think>so \boxed{15}", "15"),
        (r"\boxed{15", None),
        ("", None),
    ],
)
def test_the_last_complete_box(text, boxed):
    assert extract_boxed(text) == boxed


@pytest.mark.parametrize(
    "text",
    [
        "{" * 10**6,
        "\\boxed{" * 150_000,
        "\\boxed{" + "{" * 500_000 + "}" * 500_000 + "}",
        "\\boxed" + " " * 10**6,
        "\\boxed{15}" + "{}" * 500_000,
        "\\boxed" * 150_000,
        "\\boxed x" * 120_000,
        "".join(f"\\boxed{{{number}}}," for number in range(70_000)),
        "</think>" * 125_000,
    ],
    ids=["braces", "boxes", "nested", "spaces", "after", "bare", "bare letters", "list", "thoughts"],
)
def test_a_megabyte_of_braces_takes_linear_time(text):
    start = time.process_time()
    math_score(text, "15")
    assert time.process_time() - start < 5


EQUAL = [
    ("15", " 15. "),
    ("70000", "70,000"),
    ("70000", "70{,}000"),
    ("10,\\!080", "10080"),
    ("58,500", "58500.0"),
    ("0.30000000000000004", "0.3"),
    (".0000672", "0.0000672"),
    ("15", "14+1=15"),
    ("-15", "−15"),
    ("0.75", "\\frac{3}{4}"),
    ("\\frac43", "4/3"),
    ("1\\frac{4}{5}", "\\dfrac{9}{5}"),
    ("58500", "5.85 \\times 10^4"),
    ("2k+2", "2(k+1)"),
    ("70 \\sqrt{2}", "70\\sqrt2"),
    ("6 - 5i", "-5i+6"),
    ("x=5", "5"),
    ("y = 2x + 3", "y=3+2x"),
    ("(3,4]", "\\left(3, 4\\right]"),
    ("x \\in [-2,7]", "[-2,7]"),
    ("(0,9) \\cup (9,36)", "(9,36)\\cup(0,9)"),
    ("\\{1,2\\}", "\\{2,1\\}"),
    ("1 \\pm \\sqrt{19}", "1-\\sqrt{19}, 1+\\sqrt{19}"),
    ("\\begin{pmatrix} -1/3 \\\\ 2 \\end{pmatrix}", "\\begin{bmatrix} -\\frac13 \\\\ 2 \\end{bmatrix}"),
    ("50\\%", "50%"),
    ("864 \\mbox{ inches}^2", "864"),
    ("12", "12 \\text{ apples}"),
    ("90^\\circ", "90"),
    ("\\$18.90", "18.9"),
    ("\\text{Evelyn}", "Evelyn"),
    ("\\text{(C)}", "C"),
]
UNEQUAL = [
    ("15", "16"),
    ("15", "1515"),
    ("15", "15.5"),
    ("0.0000001", "0.0000002"),
    ("99999999999", "99999999998"),
    ("15", "4+2+8+1"),
    ("15", "{4+2+8+1}"),
    ("15", "\\frac{4+2+8+1}{1}"),
    ("15", "3 \\times 5"),
    ("-15", "10 - 25"),
    ("15", "15=14"),
    ("15", "15, 14"),
    ("15", "15+"),
    ("15", "fifteen apples"),
    ("\\frac12", "\\frac{2}{3}"),
    ("(3,4]", "[3,4]"),
    ("(6,31,-1)", "(6,31,1)"),
    ("p - q", "q - p"),
    ("x^2+1", "y^2+1"),
    ("\\text{east}", "\\text{west}"),
    ("\\text{even}", "neve"),
    ("5", "\\sqrt{"),
]


@pytest.mark.parametrize(("reference", "predicted"), EQUAL)
def test_equal_answers(reference, predicted):
    assert answers_equal(predicted, reference)


@pytest.mark.parametrize(("reference", "predicted"), UNEQUAL)
def test_unequal_answers(reference, predicted):
    assert not answers_equal(predicted, reference)


def test_verdicts():
    assert math_score(r"\boxed{15}", "15") == Score(1.0, True, "passed")
    assert math_score(r"\boxed{16}", "15") == Score(0.0, False, "failed")
    assert math_score("15", "15") == Score(0.0, False, "no_answer")
    assert math_score(r"\boxed{ }", "15") == Score(0.0, False, "no_answer")


def test_arithmetic_needs_no_worker():
    MATH_VERIFY.worker.close()
    start = time.process_time()
    for number in range(2000):
        math_score(f"4+2=6;6+8=14;14+1=15;\\boxed{{{number}}}", "15")
        math_score(f"\\boxed{{4+{number}+1}}", "15")
    assert MATH_VERIFY.worker.process is None
    assert time.process_time() - start < 2  # about 10 µs each


HOSTILE = [
    ("9**9**9", "15"),
    ("9^{9^{9}}", "15"),
    ("100000!!!!", "3"),
    ("{" * 400 + "}" * 400, "15"),
    ("\\frac{" * 190 + "1" + "}{2}" * 190, "x"),
    ("1" * 10**6, "15"),
    ("1" * 10**6, "1" * 10**6 + "0"),
    ("((((" * 200, "15"),
    ("\\boxed{" * 100, "x"),
    ("\x00\ud800", "15"),
]


def test_hostile_answers_are_bounded_and_failed(capfd, monkeypatch):
    own = MathVerify(cpu_seconds=1.0)
    monkeypatch.setattr(math_reward, "MATH_VERIFY", own)
    for predicted, reference in HOSTILE:
        start = time.perf_counter()
        assert not answers_equal(predicted, reference), predicted[:40]
        assert time.perf_counter() - start < 60, predicted[:40]
    assert capfd.readouterr().err.count("took too long") == 1
    assert answers_equal("\\frac{2x}{4}", "\\frac x2"), "the next comparison has a fresh worker"
    own.worker.close()


def test_a_worker_that_is_gone_is_replaced():
    assert answers_equal("\\frac{3x}{6}", "\\frac x2")
    MATH_VERIFY.worker.process.kill()
    MATH_VERIFY.worker.process.wait()
    assert answers_equal("\\frac{4x}{8}", "\\frac x2")


def test_an_interrupted_comparison_leaves_no_stale_answer(monkeypatch):
    assert answers_equal("\\frac{5x}{10}", "\\frac x2")

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(MATH_VERIFY.worker.connection, "recv_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answers_equal("\\frac{6x}{12}", "\\frac x2")
    assert not answers_equal("\\frac{x}{3}", "\\frac x2")


def test_comparison_works_outside_the_main_thread():
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: answers_equal(f"\\frac{{{n}x}}{{14}}", "\\frac x2"), range(1, 15)))
    assert found == [n == 7 for n in range(1, 15)]


def test_a_worker_that_cannot_start_is_no_wrong_answer(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setattr(math_reward, "MATH_VERIFY", MathVerify())
    with pytest.raises(RuntimeError, match="could not start"):
        answers_equal("\\frac{7x}{15}", "\\frac x2")


def test_the_worker_ends_with_its_parent():
    code = (
        "import os\nfrom reward import math_reward as m\nassert m.answers_equal('\\\\frac{2x}4', '\\\\frac x2')\n"
        "print(m.MATH_VERIFY.worker.process.pid, flush=True)\nos._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    pid = int(done.stdout)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the worker outlives its parent"
        time.sleep(0.05)


def test_gsm8k_answers():
    rows = published("gsm8k_test.jsonl")
    answers = [row["answer"].split("####")[1].strip() for row in rows]
    assert len(answers) == 1319
    for answer in answers:
        assert math_score(f"So it is $\\boxed{{{answer}}}$.", answer).correct, answer
        number = float(answer.replace(",", ""))
        assert math_score(f"\\boxed{{{number:,.2f}}}", answer).correct, answer
        assert not math_score(f"\\boxed{{{int(number)}1}}", answer).correct, answer


def test_math500_answers():
    rows = published("math500.jsonl")
    assert len(rows) == 500
    wrong = [row["answer"] for row in rows if not math_score(f"\\boxed{{{row['answer']}}}", row["answer"]).correct]
    assert wrong == []
    wrong = [row["unique_id"] for row in rows if not math_score(row["solution"], row["answer"]).correct]
    assert wrong == [], "the published solutions box the published answers"


# Answers of neighbouring tasks that are written differently and are equal all the same.
TRULY_EQUAL = {("5", "x=5")}


def test_math500_answers_do_not_equal_the_next_tasks():
    answers = [row["answer"] for row in published("math500.jsonl")]
    pairs = [(a, b) for a, b in zip(answers, [*answers[1:], answers[0]]) if a != b]
    assert len(pairs) > 480
    assert {(a, b) for a, b in pairs if answers_equal(a, b)} == TRULY_EQUAL


def test_gsm8k_answers_do_not_equal_the_next_tasks():
    answers = [row["answer"].split("####")[1].strip() for row in published("gsm8k_test.jsonl")]
    pairs = [(a, b) for a, b in zip(answers, [*answers[1:], answers[0]]) if a != b]
    assert len(pairs) > 1250
    assert [(a, b) for a, b in pairs if answers_equal(a, b)] == []


@pytest.mark.parametrize(
    ("response", "reference", "reward"),
    [
        ("The answer: Paris.", "paris", 1),
        ("so \\boxed{New  York}", "new york", 1),
        ("Final answer is: the sea\nmore", "The Sea!", 1),
        ("Berlin", "Paris", 0),
        ("-3", "3", 0),
        ("state-of-the-art", "state-of-the-art", 1),
        ("№", "No", 1),
        ("?", "!", 0),
        ("x > 3", "x < 3", 0),
        ("x >= 3", "x > 3", 0),
        ("x>3", "x > 3", 1),
        ("x != 3", "x = 3", 0),
        ("(2,7]", "[2,7)", 0),
        ("(2,7]", "(2, 7]", 1),
        ("C#", "C", 0),
        ("C++", "C", 0),
        (".NET", "net", 0),
        ("-x", "x", 0),
        ("x²", "x2", 0),
        ("a*b", "ab", 0),
        ("5%", "5", 0),
        ("1.5", "15", 0),
        ("1,5", "15", 0),
        ("1,000", "1000", 1),
        ("1000", "1,000", 1),
        ("The answer is B.", "B", 1),
        ("The answer is **B**.", "B", 1),
        ("I think the answer is B, or rather: the answer is C", "B", 0),
        ("Answer:\nParis", "Paris", 1),
        ("(B)", "B", 1),
        ("\\text{Paris}", "Paris", 1),
        ("\\boxed{\\text{Paris}}", "Paris", 1),
        ("Paris, France.", "Paris France", 1),
        ("**'Paris'**", "Paris", 1),
        ("it’s", "it's", 1),
        ("<think>answer: Rome</think>Paris", "Paris", 1),
        ("<think>answer: Rome</think>Paris", "Rome", 0),
        ("x" * 30000, "x" * 30000, 1),
        ("x" * 30000, "x" * 30000 + "y", 0),
    ],
)
def test_general_exact(response, reference, reward):
    score = make_scorer(RewardConfig(kind="general"))(response, Task("1", "q", reference), False)
    assert score == Score(reward, bool(reward), "passed" if reward else "failed")


@pytest.mark.parametrize(
    "text",
    ["\n" * 40_000, "answer" + "\n" * 40_000, "answer is" + " " * 40_000, "answer " * 6000, "-" * 40_000,
     "1,0" * 13_000, "\\text{" * 7000, "a'" * 20_000, "." * 40_000, "answer:\n" * 5000],
)  # fmt: skip
def test_general_takes_linear_time(text):
    start = time.process_time()
    make_scorer(RewardConfig(kind="general"))(text, Task("1", "q", "x"), False)
    assert time.process_time() - start < 0.1


def test_general_fuzzy():
    scorer = make_scorer(RewardConfig(match="fuzzy", fuzzy_threshold=0.8), "general")
    near = scorer("the battle of Hastings", Task("1", "q", "Battle of Hastings"), False)
    assert near.correct and 0.8 < near.reward < 1
    far = scorer("the fall of Rome", Task("1", "q", "Battle of Hastings"), False)
    assert not far.correct and far.reward < 0.8 and far.verdict == "failed"
    assert scorer("", Task("1", "q", "x"), False).verdict == "no_answer"


def test_a_hostile_text_is_compared_in_bounded_time():
    scorer = make_scorer(RewardConfig(match="fuzzy"), "general")
    begin = time.process_time()
    scorer("ab" * 10**6, Task("1", "q", "ba" * 10**6), False)
    assert time.process_time() - begin < 20


def test_make_scorer_math():
    scorer = make_scorer(RewardConfig(), "math")
    assert scorer(r"\boxed{15}", TASK, False) == Score(1.0, True, "passed")
    assert scorer(r"\boxed{15}", TASK, True) == Score(0.0, False, "truncated")


def test_an_answer_marked_as_gsm8k_marks_it():
    """Without a box the first line `#### 15` counts, as the examples of a few-shot prompt write it; else the box."""
    scorer = make_scorer(RewardConfig(), "math")
    for text in ("So 15.\n#### 15", "#### 15\n\nQuestion: next?\nAnswer: 3\n#### 3", "#### $15.00", "#### 15."):
        assert scorer(text, TASK, False).verdict == "passed", text
    assert scorer("#### 16", TASK, False).verdict == "failed"
    assert scorer("\\boxed{16}\n#### 15", TASK, False).verdict == "failed"
    for text in ("#### Step 15", "#### 15 apples", "It is #### 15", "15"):
        assert scorer(text, TASK, False).verdict == "no_answer", text


@pytest.mark.parametrize(
    ("reward", "lengths"),
    [
        (RewardConfig(), []),  # evaluations and `python -m reward`
        (RLRewardConfig(truncated_is_wrong=False, truncated_margin=5), []),
        (RLRewardConfig(), ["20 cut"]),
        (RLRewardConfig(truncated_margin=0), ["20 cut", "20"]),
        (RLRewardConfig(truncated_margin=5), ["20 cut", "20", "16", "15"]),  # the original's rule: length ≥ limit − 5
    ],
)
def test_what_counts_as_truncated_of_twenty_tokens(reward, lengths):
    scorer = make_scorer(reward, "math")
    drawn = {"20 cut": (20, "length"), "20": (20, "stop"), "16": (16, "stop"), "15": (15, "stop"), "14": (14, "stop")}
    trajectories = {
        name: Trajectory("1", 0, [], [], [], [], [], 1.0, reason, length, 1, 1, 1.0)
        for name, (length, reason) in drawn.items()
    }
    assert [name for name, one in trajectories.items() if scorer.is_truncated(one, 20)] == lengths


def test_unknown_kinds_are_told():
    with pytest.raises(UserError, match=r"dataset.data_type: 'maths' is unknown; did you mean 'math'"):
        make_scorer(RewardConfig(), "maths")
    with pytest.raises(UserError, match=r"reward.kind: 'nope' is unknown; use math"):
        make_scorer(RewardConfig(kind="nope"), "math")


@pytest.fixture
def own_reward(tmp_path, monkeypatch):
    """Writes a reward module into a current directory of its own, and makes a scorer from it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))

    def make(body: str, name: str = "my_reward", module: str = "my_rewards_for_test"):
        (tmp_path / "my_rewards_for_test.py").write_text(body)
        return make_scorer(RewardConfig(function=f"{module}:{name}"), "math")

    return make


def test_a_reward_of_ones_own(own_reward):
    scorer = own_reward("def my_reward(text, task): return len(text) * 0.5 - float(task.ground_truth_answer) + 14")
    assert scorer("abcd", TASK, False) == Score(1.0, True, "passed")
    assert scorer("", TASK, False) == Score(-1.0, False, "failed")
    assert scorer("ab", TASK, False) == Score(0.0, False, "failed")
    assert scorer("abcd", TASK, True) == Score(0.0, False, "truncated")


@pytest.mark.parametrize("value", ["True", "1", "np.float32(1)", "np.array(1)", "np.bool_(True)"])
def test_every_kind_of_number_is_taken(own_reward, value):
    score = own_reward(f"import numpy as np\ndef my_reward(text, task): return {value}")("x", TASK, False)
    assert score == Score(1.0, True, "passed") and type(score.reward) is float and type(score.correct) is bool


@pytest.mark.parametrize(
    "value", ["None", "float('nan')", "float('inf')", "np.ones((1, 1))", "'1'", "1j", "['1']", "[None]"]
)
def test_what_is_no_finite_number_is_told(own_reward, value):
    scorer = own_reward(f"import numpy as np\ndef my_reward(text, task): return {value}")
    with pytest.raises(UserError, match=r"reward.function: .* task '7'; it must return a finite number") as caught:
        scorer("x", TASK, False)
    assert "\n" not in str(caught.value)


def test_a_missing_reward_function_is_told(own_reward):
    with pytest.raises(UserError, match="there is no module 'no_such_module'"):
        own_reward("", module="no_such_module")
    with pytest.raises(UserError, match="has no function 'my_rewards'; did you mean 'my_reward'"):
        own_reward("def my_reward(text, task): return 1", name="my_rewards")
    with pytest.raises(UserError, match="is not of the form module:function"):
        make_scorer(RewardConfig(function="my_module.my_reward"), "math")


def test_a_broken_reward_module_shows_its_own_error(own_reward):
    with pytest.raises(ModuleNotFoundError, match="not_installed_here"):
        own_reward("import not_installed_here")


def test_coin_flip_is_fair_and_stable():
    scorer = make_scorer(RewardConfig(function="benchmarks.coin_flip:coin_flip"), "math")
    flips = [scorer(f"response {n}", TASK, False).reward for n in range(2000)]
    assert set(flips) == {0.0, 1.0} and np.mean(flips) == pytest.approx(0.5, abs=0.05)
    assert flips[:8] == [coin_flip(f"response {n}", TASK) for n in range(8)] == [1, 0, 0, 1, 0, 0, 1, 1]
    other = [coin_flip(f"response {n}", Task("8", "", "")) for n in range(64)]
    assert other != flips[:64]


# ---- options


@pytest.mark.parametrize(
    ("box", "right"),
    [(text, True) for text in ("C", "(C)", "C.", "c", "\\text{C}", "\\textbf{(C)}", "$C$", "C: 4", "C) four", "**C**")]
    + [(text, False) for text in ("B", "4", "C, D", "C and D", "CD", "(B) not C", "C. red and D. blue", "Cat")],
)
def test_an_option_is_right_by_its_letter(box, right):
    scorer = make_scorer(RewardConfig(), "option")
    expected = Score(1.0, True, "passed") if right else Score(0.0, False, "failed")
    assert scorer(f"It is \\boxed{{{box}}}.", Task("1", "q", "C"), False) == expected


def test_a_letter_outside_a_box_is_no_answer():
    assert make_scorer(RewardConfig(), "option")("The answer is C", Task("1", "q", "C"), False).verdict == "no_answer"


def test_options_are_judged_by_a_letter():
    scorer = make_scorer(RewardConfig(), "option")
    check_tasks(scorer, [Task("1", "q", "A"), Task("2", "q", "J")], "data")
    for answer in ("4", "K", "AB"):
        with pytest.raises(UserError, match=f"data: task '3' has the answer '{answer}', but an option is judged by"):
            check_tasks(scorer, [Task("3", "q", answer)], "data")
    with pytest.raises(UserError, match="data: task '4' has no `ground_truth_answer`"):
        check_tasks(scorer, [Task("4", "q")], "data")
