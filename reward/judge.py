"""A model behind an OpenAI-compatible endpoint that scores a response, or each chunk of it."""

import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from common.boxed import extract_boxed, final_part
from common.errors import UserError
from common.schema import JudgeConfig
from common.trajectory import Response, Score, Task
from reward import notation

if TYPE_CHECKING:
    import openai  # loaded where a judge is asked: it takes a second

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)  # a server that is busy or starting
CORRECT_FROM = 0.5
WHOLE = """You judge an answer.

Question:
{question}
{reference}
Answer:
{response}

How good is the answer, from 0 (useless or wrong) to 1 (right and complete)? Think it over, \
then put the number in \\boxed{}."""
CHUNK = """You judge one part of an answer that is still being written.

Question:
{question}
{reference}
The answer so far:
{response}

The part to judge:
{chunk}

How good is this part, from 0 (wrong or no help) to 1 (right and a step ahead)? Judge this part only. Think it over, \
then put the number in \\boxed{}."""
LABEL = re.compile(r"[^\d:=]{0,60}\b(?:score|rating|grade|vote|verdict)\b[\s*]*(?:is\b|[:=])?[\s*:]*", re.IGNORECASE)
WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}")
OUT_OF = re.compile(r"\s*\bout of\b\s*")
FIELD = re.compile(r"\{(question|reference|response|chunk)\}")


def judged_score(response: str, task: Task, judge: JudgeConfig) -> Score:
    """The mean vote on the response, or per-token rewards from the votes on its chunks.

    Verdict infrastructure where no vote held a number: nothing is known of the response then.
    """
    if judge.reward_chunk_length is None:
        prompts, lengths = [_prompt(judge, task, response, "")], [0]
    else:
        prompts, lengths = _chunk_prompts(judge, task, response)
    if not prompts:
        return Score(0.0, False, "no_answer")
    asked = [prompt for prompt in prompts for _ in range(judge.k_sample)]
    with _client(judge) as client, ThreadPoolExecutor(judge.parallel) as pool:
        votes = [_number(answer) for answer in pool.map(lambda prompt: ask(client, judge, prompt), asked)]
    scores = [_mean(votes[place : place + judge.k_sample]) for place in range(0, len(votes), judge.k_sample)]
    known = [score for score in scores if score is not None]
    if not known:
        return Score(0.0, False, "infrastructure")
    # A chunk without a vote takes the mean of the others, which moves nothing.
    filled = [sum(known) / len(known) if score is None else score for score in scores]
    tokens = [score for score, length in zip(filled, lengths) for _ in range(length)] or None
    reward = sum(tokens) / len(tokens) if tokens else filled[0]
    correct = reward >= CORRECT_FROM
    return Score(reward, correct, "passed" if correct else "failed", tokens)


def _client(judge: JudgeConfig) -> "openai.OpenAI":
    try:
        import openai
    except ImportError:
        raise UserError("reward.judge needs: pip install openai") from None
    # A client wants a key: `ask` sends none where there is none. It is `ask` that tries again, as the config says.
    key = os.environ.get(judge.api_key_env) or "none"
    return openai.OpenAI(base_url=judge.base_url, api_key=key, timeout=judge.timeout, max_retries=0)


def ask(client: "openai.OpenAI", judge: JudgeConfig, prompt: str) -> str:
    """One answer of the judge; UserError, in one line, where it cannot be had."""
    import openai

    url = judge.base_url.rstrip("/") + "/chat/completions"
    anonymous = {} if os.environ.get(judge.api_key_env) else {"Authorization": openai.Omit()}
    trouble = ""
    for attempt in range(judge.retries + 1):
        if attempt:
            time.sleep(judge.first_wait * 2 ** (attempt - 1))
        try:
            answer = client.chat.completions.create(
                model=judge.model,
                messages=[{"role": "user", "content": prompt}],
                temperature=judge.temperature,
                max_tokens=judge.max_generation_token,
                extra_headers=anonymous,
            )
            content = answer.choices[0].message.content
            return content if isinstance(content, str) else ""
        except openai.APIStatusError as error:
            trouble = f"HTTP {error.status_code}: {_one_line(error.response.text)}"
            if error.status_code not in RETRIED:
                raise UserError(f"reward.judge: {url} refused ({trouble}); see base_url, model and key") from None
        except (openai.OpenAIError, ValueError, LookupError, TypeError, AttributeError) as error:  # no sense in it
            trouble = _one_line(str(error.__cause__ or error)) or type(error).__name__
    raise UserError(
        f"reward.judge: {url} gave no answer in {judge.retries + 1} attempts ({trouble}); is it running? "
        "Correct reward.judge.base_url or start it, then resume the run"
    )


def _chunk_prompts(judge: JudgeConfig, task: Task, response: str) -> tuple[list[str], list[int]]:
    """A prompt for each chunk and the tokens in it; without tokens (a file of responses) words stand for them."""
    tokens = response.tokens if isinstance(response, Response) else None
    tokens = tokens if tokens is not None else re.findall(r"\s*\S+", response)
    size = judge.reward_chunk_length or len(tokens)
    chunks = [tokens[start : start + size] for start in range(0, len(tokens), size)]
    prompts = []
    for number, chunk in enumerate(chunks, start=1):
        so_far = "".join(tokens[: number * size])
        prompts.append(_prompt(judge, task, so_far, "".join(chunk)))
    return prompts, [len(chunk) for chunk in chunks]


def _prompt(judge: JudgeConfig, task: Task, response: str, chunk: str) -> str:
    template = judge.prompt or (WHOLE if judge.reward_chunk_length is None else CHUNK)
    reference = task.ground_truth_answer
    shown = f"\nReference answer:\n{reference}\n" if reference and judge.prompt is None else reference or ""
    values = {"question": task.question, "reference": shown, "response": response, "chunk": chunk}
    return FIELD.sub(lambda field: values[field[1]], template)


def _number(answer: str) -> float | None:
    """The vote: the boxed number, else the last line where that is a number and no more; None outside 0 and 1."""
    boxed = extract_boxed(answer)
    vote = boxed if boxed is not None else (final_part(answer).strip().splitlines() or [""])[-1]
    vote = notation.without_text(LABEL.sub("", vote[:200], count=1).strip("*$ ").removesuffix("."))
    vote = OUT_OF.sub("/", vote)
    # `3 steps` is no vote, though it would be an answer.
    found = None if WORD.search(vote) else notation.number(notation.plain(vote))
    value = None if found is None else found.value / (100 if found.is_percent else 1)
    return float(value) if value is not None and 0 <= value <= 1 else None  # 8, of a judge that counts to 10, is none


def _mean(votes: list[float | None]) -> float | None:
    known = [vote for vote in votes if vote is not None]
    return sum(known) / len(known) if known else None


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]
