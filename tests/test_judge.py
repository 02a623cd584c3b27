"""The judge: votes, chunks, retries and a clear stop, against a small real HTTP server."""

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from common.errors import UserError
from common.schema import JudgeConfig, RewardConfig
from common.trajectory import Response, Score, Task
from reward.judge import judged_score
from reward.score import make_scorer

TASK = Task("7", "What is 2 + 2?", "4")


class Handler(BaseHTTPRequestHandler):
    """Answers with what the test's `answer` function says: text, or (status, body)."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.requests.append({"path": self.path, "key": self.headers["Authorization"], **body})
            said = server.answer(body["messages"][0]["content"], len(server.requests))
        status, text = said if isinstance(said, tuple) else (200, None)
        reply = text if text is not None else json.dumps({"choices": [{"message": {"content": said}}]})
        self.send_response(status)
        self.send_header("Content-Length", str(len(reply.encode())))
        self.end_headers()
        self.wfile.write(reply.encode())

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests, server.lock = [], threading.Lock()
        server.answer = lambda prompt, number: "\\boxed{1}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()


def judge(server, **keys) -> JudgeConfig:
    url = f"http://127.0.0.1:{server.server_address[1]}/v1/"
    return JudgeConfig(**{"base_url": url, "model": "m", "first_wait": 0.001, "retries": 2, "timeout": 20.0, **keys})


def test_a_whole_response(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    server.answer = lambda prompt, number: "2 of 3 things are right: \\boxed{0.75}"
    score = judged_score("It is {question} 4", TASK, judge(server, api_key_env="JUDGE_KEY", temperature=0.25))
    assert score == Score(0.75, True, "passed")
    (request,) = server.requests
    assert request["path"] == "/v1/chat/completions" and request["key"] == "Bearer secret"
    assert request["model"] == "m" and request["temperature"] == 0.25 and request["max_tokens"] == 10000
    prompt = request["messages"][0]["content"]
    assert "What is 2 + 2?" in prompt and "It is {question} 4" in prompt and "Reference answer:\n4" in prompt


def test_without_a_key_none_is_sent(server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert judged_score("r", TASK, judge(server)).reward == 1
    assert server.requests[0]["key"] is None


def test_a_judge_that_does_not_answer_in_time(server):
    server.answer = lambda prompt, number: time.sleep(0.5) or "1"
    with pytest.raises(UserError, match=r"gave no answer in 2 attempts \(timed out\)"):
        judged_score("r", TASK, judge(server, timeout=0.1, retries=1))


@pytest.mark.parametrize(
    ("answers", "reward"),
    [
        (["\\boxed{1}", "\\boxed{0}", "\\boxed{0}"], 1 / 3),
        (["\\boxed{1}", "no idea", "\\boxed{0}"], 0.5),
        (["7", "-3", "0.2"], 0.2),
    ],
)
def test_votes(server, answers, reward):
    server.answer = lambda prompt, number: answers[number - 1]
    score = judged_score("r", TASK, judge(server, k_sample=3))
    assert score.reward == pytest.approx(reward) and score.correct == (reward >= 0.5) and len(server.requests) == 3


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("\\boxed{8/10}", 0.8),
        ("\\boxed{80\\%}", 0.8),
        ("\\boxed{.5}", 0.5),
        ("\\boxed{\\frac12}", 0.5),
        ("\\boxed{½}", 0.5),
        ("\\boxed{\\text{0.9}}", 0.9),
        ("\\boxed{Score: 0.8}", 0.8),
        ("\\boxed{1e-3}", 0.001),
        ("\\boxed 0.3$", 0.3),
        ("1e-3", 0.001),
        ("It has 3 steps.\nFinal score: 7/10", 0.7),
        ("**Score:** 8 out of 10", 0.8),
        ("<think>\\boxed{1}</think> 0.25", 0.25),
        ("\\boxed{-0.5}", None),
        ("3 steps, all wrong", None),
        ("\\boxed{3 steps, all wrong}", None),
        ("\\boxed{3 steps}", None),
        ("The number of errors is 3.", None),
        ("\\boxed{1 - 0.2}", None),
        ("\\boxed{0.5}, \\boxed{0.7}", None),
        ("\\boxed{8}", None),
        ("\\boxed{8}/10", None),
        ("\\boxed{-0.1}", None),
        ("\\boxed{1}", 1.0),
        ("\\boxed{nan}", None),
        ("\\boxed{1/0}", None),
        ("\\boxed{}", None),
        ("", None),
    ],
)
def test_a_vote_is_a_number_and_no_more(server, answer, reward):
    server.answer = lambda prompt, number: answer
    score = judged_score("r", TASK, judge(server))
    if reward is None:
        assert score == Score(0.0, False, "infrastructure")
    else:
        assert score == Score(reward, reward >= 0.5, "passed" if reward >= 0.5 else "failed")


def test_no_vote_is_no_wrong_answer(server):
    server.answer = lambda prompt, number: "I cannot say"
    assert judged_score("r", TASK, judge(server, k_sample=2)) == Score(0.0, False, "infrastructure")


def test_chunks(server):
    pieces = [f"t{n} " for n in range(7)]
    server.answer = lambda prompt, number: "\\boxed{0.5}" if "t3" in prompt.rpartition("part to judge")[2] else "1"
    score = judged_score(Response.of("".join(pieces), pieces), TASK, judge(server, reward_chunk_length=3))
    assert score.chunk_votes == [(3, 1), (6, 1), (7, 1)]
    assert score.token_rewards == [1, 1, 1, 0.5, 0.5, 0.5, 1] and score.reward == pytest.approx(5.5 / 7)
    prompts = sorted((one["messages"][0]["content"] for one in server.requests), key=len)
    assert len(prompts) == 3
    assert "t2" in prompts[0] and "t3" not in prompts[0], "a chunk is judged by what comes before it"
    words = judged_score("a b c d", TASK, judge(server, reward_chunk_length=3))
    assert words.token_rewards == [1, 1, 1, 1]
    assert judged_score("", TASK, judge(server, reward_chunk_length=3)).verdict == "no_answer"


def test_votes_on_a_chunk_that_differ(server):
    asked = Counter()

    def answer(prompt, number):
        part = prompt.rpartition("part to judge")[2].strip(" :\n")[0]
        asked[part] += 1
        return {"a": "1", "b": "0.2", "c": str(asked[part] % 2)}[part]

    server.answer = answer
    config = judge(server, reward_chunk_length=1, k_sample=2, prompt="the part to judge {chunk}")
    score = judged_score(Response.of("abc", ["a", "b", "c"]), TASK, config)
    assert score.chunk_votes == [(1, 1), (2, -1), (3, 0)]


def test_a_chunk_without_votes_takes_the_mean(server):
    server.answer = lambda prompt, number: "none" if "b" in prompt.rpartition("part to judge")[2] else "1"
    pieces = ["a", "b", "c"]
    config = judge(server, reward_chunk_length=1, prompt="the part to judge {chunk}")
    assert judged_score(Response.of("abc", pieces), TASK, config).token_rewards == [1, 1, 1]


@pytest.mark.parametrize("trouble", [(503, "starting"), (429, "slow down"), (200, "{}"), (200, "no json")])
def test_trouble_is_retried(server, trouble):
    server.answer = lambda prompt, number: trouble if number < 3 else "\\boxed{1}"
    assert judged_score("r", TASK, judge(server)).reward == 1 and len(server.requests) == 3


def test_waits_double(server, monkeypatch):
    waits = []
    monkeypatch.setattr("reward.judge.time.sleep", waits.append)
    server.answer = lambda prompt, number: (500, "broken\nbadly")
    with pytest.raises(UserError, match=r"gave no answer in 5 attempts \(HTTP 500: broken badly\)") as caught:
        judged_score("r", TASK, judge(server, retries=4, first_wait=0.5))
    assert waits == [0.5, 1, 2, 4] and "\n" not in str(caught.value)


def test_a_refusal_is_told_at_once(server):
    server.answer = lambda prompt, number: (401, '{"error": "no such key"}')
    with pytest.raises(UserError, match=r"refused \(HTTP 401: .*no such key.*\); see base_url, model and key"):
        judged_score("r", TASK, judge(server))
    assert len(server.requests) == 1


def test_a_judge_that_is_down(server):
    config = judge(server)
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"gave no answer in 3 attempts .*refused.*is it running\?") as caught:
        judged_score("r", TASK, config)
    assert "\n" not in str(caught.value)


def test_a_judge_beside_a_kind_gives_the_rewards(server):
    server.answer = lambda prompt, number: "\\boxed{0.25}"
    scorer = make_scorer(RewardConfig(judge=judge(server)), "math")
    assert scorer("\\boxed{4}", TASK, False) == Score(0.25, True, "passed")
    assert scorer("\\boxed{5}", TASK, False) == Score(0.25, False, "failed")
    assert scorer("\\boxed{4}", TASK, True) == Score(0.0, False, "truncated")
    alone = make_scorer(RewardConfig(kind="judge", judge=judge(server)), "math")
    assert alone("\\boxed{4}", TASK, False) == Score(0.25, False, "failed")


def test_what_a_judge_needs_is_told():
    with pytest.raises(UserError, match=r"reward.kind=judge needs reward.judge.base_url"):
        make_scorer(RewardConfig(kind="judge"), "math")
    with pytest.raises(UserError, match=r"reward.judge.model is empty"):
        make_scorer(RewardConfig(judge=JudgeConfig(base_url="http://127.0.0.1:1/v1")), "math")
    with pytest.raises(UserError, match=r"reward.judge.model=some/prm without reward.judge.base_url: serve the model"):
        make_scorer(RewardConfig(judge=JudgeConfig(model="some/prm")), "math")
