"""Scoring in processes of their own, `python -m reward`, and the code in docs/rewards.md."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.errors import UserError
from common.runtime import Stopwatch
from common.schema import JudgeConfig, PromptsConfig, RewardConfig, RLRewardConfig, TaskSampling
from common.trajectory import Response, Score, Task
from models.prompts import instruction
from reward.score import RewardScorer, check_tasks, make_scorer
from rollout.collect import collect, kind_of

ROOT = Path(__file__).resolve().parents[1]
TASK = Task("7", "4+2+8+1", "15")


@pytest.fixture
def own(tmp_path, monkeypatch):
    """own(body): a scorer whose function is `my_reward` of a module with that body; closed at the end of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    with contextlib.ExitStack() as scorers:

        def make(body: str, workers: int = 1) -> RewardScorer:
            (tmp_path / "my_rewards_for_workers.py").write_text(body)
            reward = RewardConfig(function="my_rewards_for_workers:my_reward", workers=workers)
            return scorers.enter_context(make_scorer(reward, "math"))

        yield make


def test_workers_score_in_other_processes_and_in_order(own):
    body = "import os\ndef my_reward(response, task):\n    print('noise')\n    return [float(response), os.getpid()]"
    submit = own(body, workers=2).submit
    waiting = [submit(str(n), TASK, False) for n in range(20)]
    scores = [one.result() for one in waiting]
    assert [score.token_rewards[0] for score in scores] == list(range(20))
    processes = {score.token_rewards[1] for score in scores}
    assert os.getpid() not in processes and len(processes) <= 2
    assert submit("1", TASK, False).result().token_rewards[1] in processes, "kept from step to step"


def test_no_workers_score_at_once(own):
    body = "import os\ndef my_reward(response, task): return os.getpid()"
    submit = own(body, workers=0).submit
    assert submit("x", TASK, False).result().reward == os.getpid()


def test_workers_know_the_config_and_the_tokens(own):
    scorer = own("def my_reward(response, task): return [len(token) for token in response.tokens]")
    score = scorer.submit(Response.of("abbccc", ["a", "bb", "ccc"]), TASK, False).result()
    assert score == Score(2.0, True, "passed", [1.0, 2.0, 3.0])
    assert scorer.submit("x", TASK, True).result().verdict == "truncated"


def test_errors_come_back(own):
    scorer = own("def my_reward(response, task):\n    return 'x' if response == 'user' else 1 / 0")
    with pytest.raises(UserError, match="task '7'; it must return a finite number"):
        scorer.submit("user", TASK, False).result()
    with pytest.raises(RuntimeError, match=r"response to task '7' failed:(?s:.*)ZeroDivisionError"):
        scorer.submit("own", TASK, False).result()


def test_a_worker_that_dies_is_replaced(own, tmp_path):
    body = (
        "import os\ndef my_reward(response, task):\n"
        "    if response == 'always' or not os.path.exists('died'):\n        open('died', 'w')\n        os._exit(9)\n"
        "    return 1"
    )
    scorer = own(body)
    assert scorer.submit("once", TASK, False).result().reward == 1
    with pytest.raises(RuntimeError, match=r"ended twice \(exit code 9\) on a response to task '7'"):
        scorer.submit("always", TASK, False).result()
    assert scorer.submit("x", TASK, False).result().reward == 1


def gone(pid: int) -> bool:
    """Whether a process ends within ten seconds; one that nobody has waited for is a zombie then."""
    process, deadline = Path(f"/proc/{pid}"), time.monotonic() + 10
    while process.exists() and (process / "stat").read_text().split()[2] != "Z":
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_workers_end_with_their_scorer(own):
    scorer = own("import os\ndef my_reward(response, task): return os.getpid()")
    first = int(scorer.submit("x", TASK, False).result().reward)
    scorer.close()
    assert not Path(f"/proc/{first}").exists()
    second = int(scorer.submit("x", TASK, False).result().reward)
    assert second not in (first, os.getpid()), "a closed scorer starts a process again"
    dropped = make_scorer(scorer.reward, "math")
    third = int(dropped.submit("x", TASK, False).result().reward)
    del dropped
    assert gone(third), "a scorer that is forgotten ends its process"


def test_workers_end_with_their_parent(tmp_path):
    (tmp_path / "my_pid.py").write_text("import os\ndef reward(response, task): return os.getpid()")
    program = (
        f"import os, sys\nsys.path.append({str(ROOT)!r})\nfrom common.schema import RewardConfig\n"
        "from common.trajectory import Task\nfrom reward.score import make_scorer\n"
        "scorer = make_scorer(RewardConfig(function='my_pid:reward'), 'math')\n"
        "print(int(scorer.submit('x', Task('7', 'q', '1'), False).result().reward), flush=True)\nos._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert gone(int(done.stdout))


def test_lists_for_tokens_are_checked(own):
    scorer = own("def my_reward(response, task): return [1, 2]", workers=0)
    with pytest.raises(UserError, match=r"returned 2 rewards for task '7'; the response has 3 tokens"):
        scorer(Response.of("abc", list("abc")), TASK, False)
    assert scorer("a b c", TASK, False).token_rewards == [1.0, 2.0]


def reward_command(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "reward", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_reward_command(tmp_path):
    tests = ["assert f(2) == 4"]
    tasks = [
        {"question": "2+2", "ground_truth_answer": "4"},
        {"question": "f", "test_method": "function", "test_list": tests, "test_time_limit": 0.5},
        {"question": "io", "test_method": "stdio", "test_input": ["3"], "test_output": ["6"], "test_time_limit": 0.5},
    ]
    programs = {
        "def f(x): return 2 * x": "passed",
        "def f(x): return 5": "failed",
        "def f(x):\n    while True: pass": "timeout",
        "def f(x): return bytearray(10**10)": "memory",
        "def f(x):\n    while True: print('x' * 10**5)": "output_limit",
        "import os; os._exit(0)": "crashed",
    }
    expected = [(1, f"```python\n{program}\n```", verdict) for program, verdict in programs.items()]
    expected += [(0, "\\boxed{4}", "passed"), (0, "\\boxed{5}", "failed"), (0, "4", "no_answer")]
    expected += [(2, "```python\nprint(2 * int(input()))\n```", "passed"), (1, "none", "no_answer")]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    given = [{"task": task, "response": response, "note": n} for n, (task, response, _) in enumerate(expected)]
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in given))
    files = [f"data={tmp_path}/tasks.json", f"responses={tmp_path}/responses.jsonl", f"out={tmp_path}/out.jsonl"]
    done = reward_command(*files, "workers=2", "output_mb=1")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["verdict"] for line in lines] == [verdict for *_, verdict in expected]
    for line, before in zip(lines, given):
        right = line["verdict"] == "passed"
        assert line == before | {"correct": right, "reward": float(right), "verdict": line["verdict"]}
    assert "11 responses, 3 correct" in done.stdout


@pytest.mark.parametrize(
    ("line", "arguments", "message"),
    [
        ('{"task": 1, "response": "x"}', [], "line 1 of .* task 1 does not exist; data has the tasks 0 to 0"),
        ('{"task": 0}', [], "line 1 of .* is not"),
        ("{", [], "line 1 of .* is not valid JSON"),
        ("", [], "has no lines"),
        ('{"task": 0, "response": "\\ud83d"}', [], r"line 1 of .* has in `response` half a character \(\\ud83d\)"),
        ('{"task": 0, "response": "x", "n": 1%s}' % ("0" * 5000), [], "has in `n` a number of 5001 digits"),
        ("[" * 10**5, [], "line 1 of .* is nested too deeply"),
        ('{"task": 0, "response": "x"}', ["kind=code"], "data: task '0' has no `test_method`, which reward.kind=code"),
        (
            '{"task": 0, "response": "x"}',
            ["kind=maths"],
            "kind=maths: expected math, code, general, option, countdown, sudoku, judge; did you mean math",
        ),
        ('{"task": 0, "response": "x"}', ["memory_mb=1"], "memory_mb=1: must be at least 64"),
        ('{"task": 0, "response": "x"}', ["workers=x"], "workers=x: expected a whole number"),
        ('{"task": 0, "response": "x"}', ["judge.k_sample=0"], r"judge.k_sample=0: must be at least 1"),
        ('{"task": 0, "response": "x"}', ["speed=1"], "unknown key speed=1 in the command line;"),
        (
            '{"task": 0, "response": "x"}',
            ["truncated_is_wrong=True"],
            "unknown key truncated_is_wrong",
        ),
        ('{"task": 0, "response": "x"}', ["out=/no/where/x"], "out: the folder /no/where does not exist"),
    ],
)
def test_mistakes_of_the_reward_command(tmp_path, monkeypatch, capsys, line, arguments, message):
    from reward.__main__ import main

    (tmp_path / "tasks.jsonl").write_text('{"question": "q", "ground_truth_answer": "1"}\n')
    (tmp_path / "responses.jsonl").write_text(line + "\n")
    files = [f"data={tmp_path}/tasks.jsonl", f"responses={tmp_path}/responses.jsonl", f"out={tmp_path}/out.jsonl"]
    monkeypatch.setattr(sys, "argv", ["reward", *files, *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1 and re.search(message, told)


@pytest.mark.parametrize(
    ("kind", "reward", "record", "lacks"),
    [
        ("math", {}, {"ground_truth_answer": "1"}, None),
        ("general", {}, {"ground_truth_answer": "1"}, None),
        ("code", {}, {"test_method": "stdio"}, None),
        ("code", {}, {"ground_truth_answer": "1"}, "`test_method`, which dataset.data_type=code"),
        ("math", {"kind": "code"}, {"ground_truth_answer": "1"}, "`test_method`, which reward.kind=code"),
        ("math", {}, {"test_method": "stdio"}, "`ground_truth_answer`, which dataset.data_type=math"),
        ("general", {}, {"test_method": "stdio"}, "`ground_truth_answer`, which dataset.data_type=general"),
        ("code", {"kind": "general"}, {"test_method": "stdio"}, "`ground_truth_answer`, which reward.kind=general"),
        ("code", {"function": "benchmarks.coin_flip:coin_flip"}, {"ground_truth_answer": "1"}, None),
        ("math", {"kind": "judge", "judge": JudgeConfig("http://x/v1", "m")}, {"test_method": "stdio"}, None),
    ],
)
def test_tasks_that_no_response_could_pass_are_refused(kind, reward, record, lacks):
    scorer = make_scorer(RewardConfig(**reward), kind)
    both = {"ground_truth_answer": "1", "test_method": "stdio"}
    tasks = [Task(str(n), "q", one.get("ground_truth_answer"), one) for n, one in enumerate((both, record))]
    if lacks is None:
        assert check_tasks(scorer, tasks, "dataset.train_dataset") is None
    else:
        with pytest.raises(UserError, match=f"dataset.train_dataset: task '1' has no {lacks} .*set .* to"):
            check_tasks(scorer, tasks, "dataset.train_dataset")


def test_the_rewards_of_the_docs(tmp_path, monkeypatch):
    """The module shown in docs/rewards.md, saved as it tells to, does what it says there."""
    text = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    (module,) = re.findall(r"```python\n(# my_rewards\.py\n.*?)```", text, re.DOTALL)
    (tmp_path / "my_rewards.py").write_text(module)
    (tmp_path / "tasks.jsonl").write_text('{"question": "q", "ground_truth_answer": "15"}\n')
    responses = ["so \\boxed{15}", "so \\boxed{16}", "x" * 5000 + "\\boxed{15}"]
    lines = [json.dumps({"task": 0, "response": response}) for response in responses]
    (tmp_path / "responses.jsonl").write_text("\n".join(lines))
    for name, rewards in (("short_and_right", [1.0, 0.0, 0.5]), ("no_repetition", [1.0, 1.0, 1.0])):
        done = reward_command(
            "data=tasks.jsonl",
            "responses=responses.jsonl",
            "out=out.jsonl",
            f"function=my_rewards:{name}",
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert [line["reward"] for line in found] == rewards


def test_a_rollout_is_scored_beside_and_in_order(own):
    """`collect` hands responses over as they finish, whatever their order, with their tokens, and counts the lost."""
    tokenizer = SimpleNamespace(
        decode=lambda ids, skip_special_tokens: "".join(map(str, ids)),
        batch_decode=lambda rows: ["".join(map(str, ids)) for ids in rows],
    )
    loaded = SimpleNamespace(stop_ids=[9], tokenizer=tokenizer)
    finished = [("b", 0, [4, 5]), ("a", 1, [6]), ("a", 0, [1, 2, 3]), ("b", 1, [7, 8])]

    def generate(requests, settings, **others):
        for task_id, sample, ids in finished:
            own = {"task_id": task_id, "sample": sample, "response_ids": [*ids, 9], "length": len(ids)}
            yield SimpleNamespace(**own, finish_reason="stop", truncated=False, text="")

    scorer = own("def my_reward(response, task): return [int(token) for token in response.tokens]")
    prompts = [(Task("a", "q"), [0]), (Task("b", "q"), [0])]
    settings = TaskSampling(num_response_per_task=2)
    engine = SimpleNamespace(generate=generate, tensor_group=1)
    groups = collect(engine, loaded, prompts, settings, scorer, Stopwatch(), seed=0)
    assert [[one.score.token_rewards for one in group] for group in groups] == [[[1, 2, 3], [6]], [[4, 5], [7, 8]]]
    assert [[one.trajectory.text for one in group] for group in groups] == [["123", "6"], ["45", "78"]]
    scorer.reward = RLRewardConfig(**vars(scorer.reward), truncated_margin=1)
    settings.max_token = 4
    groups = collect(engine, loaded, prompts, settings, scorer, Stopwatch(), seed=0)
    verdicts = [[one.score.verdict for one in group] for group in groups]
    assert verdicts == [["truncated", "passed"], ["passed", "passed"]], "3 tokens are within 1 of the limit"


def test_instructions_by_kind_of_task():
    """The config's own words come first, then the family's, a thinking wording where the turn begins with a thought."""
    words = {"code_stdio": "S {question}", "math": "M {question}", "math_think": "T {question}"}
    family, own = SimpleNamespace(instructions=words), PromptsConfig(general="G {question}")
    stdio, function = (Task("c", "q", None, {"test_method": method}) for method in ("stdio", "function"))
    assert [kind_of(task, "code") for task in (stdio, function)] == ["code_stdio", "code_function"]
    assert kind_of(stdio, "math") == "math"
    assert [instruction(family, "code_stdio", own, thinking) for thinking in (False, True)] == ["S {question}"] * 2
    assert instruction(family, "code_function", own) == "{question}"
    assert instruction(family, "general", own) == "G {question}"
    assert [instruction(family, "math", own, thinking) for thinking in (False, True)] == [
        "M {question}",
        "T {question}",
    ]
    assert instruction(family, "math", PromptsConfig(math="{question}!"), thinking=True) == "{question}!"
    with pytest.raises(UserError, match=r"dataset\.prompts\.math: 'Solve it' lacks the task.*\{question\}"):
        instruction(family, "math", PromptsConfig(math="Solve it"))
