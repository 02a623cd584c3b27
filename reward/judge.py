"""A model behind an OpenAI-compatible endpoint that scores a response, or each chunk of it."""

import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import TYPE_CHECKING

from common.boxed import extract_boxed, final_part
from common.errors import UserError
from common.schema import JudgeConfig
from common.trajectory import Score, Task
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
    try:
        import openai
    except ImportError:
        raise UserError("reward.judge needs: pip install openai") from None
    parts = _parts(response, judge.reward_chunk_length)
    if not parts:
        return Score(0.0, False, "no_answer")
    prompts = [_prompt(judge, task, *texts) for *texts, _ in parts for _ in range(judge.k_sample)]
    # A client wants a key: `ask` sends none where there is none. It is `ask` that tries again, as the config says.
    key = os.environ.get(judge.api_key_env) or "none"
    client = openai.OpenAI(base_url=judge.base_url, api_key=key, timeout=judge.timeout, max_retries=0)
    with client, ThreadPoolExecutor(judge.parallel) as pool:
        votes = [_number(answer) for answer in pool.map(lambda prompt: ask(client, judge, prompt), prompts)]
    of_parts = [votes[place : place + judge.k_sample] for place in range(0, len(votes), judge.k_sample)]
    scores = [_mean(part) for part in of_parts]
    mean = _mean(scores)
    if mean is None:
        return Score(0.0, False, "infrastructure")
    # A chunk without a vote takes the mean of the others, which moves nothing.
    filled = [mean if score is None else score for score in scores]
    tokens = [score for score, (*_, length) in zip(filled, parts) for _ in range(length)]
    reward = _mean(tokens) if tokens else mean
    correct = reward >= CORRECT_FROM
    ends = accumulate(length for *_, length in parts)
    chunks = [(end, _agreed(part)) for end, part in zip(ends, of_parts)] if tokens else None
    return Score(reward, correct, "passed" if correct else "failed", tokens or None, chunks)


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


def _parts(response: str, size: int | None) -> list[tuple[str, str, int]]:
    """For each chunk of `size` tokens: the response up to its end, the chunk, and the number of its tokens.

    Where `size` is None the whole response is one part, in which no tokens are counted.
    """
    if size is None:
        return [(response, "", 0)]
    tokens = getattr(response, "tokens", None)
    if tokens is None:  # a file of responses: words stand for them
        tokens = re.findall(r"\s*\S+", response)
    chunks = {start + size: tokens[start : start + size] for start in range(0, len(tokens), size)}
    return [("".join(tokens[:end]), "".join(chunk), len(chunk)) for end, chunk in chunks.items()]


def _prompt(judge: JudgeConfig, task: Task, response: str, chunk: str) -> str:
    template = judge.prompt or (WHOLE if judge.reward_chunk_length is None else CHUNK)
    reference = task.ground_truth_answer or ""
    if reference and judge.prompt is None:
        reference = f"\nReference answer:\n{reference}\n"
    values = {"question": task.question, "reference": reference, "response": response, "chunk": chunk}
    return FIELD.sub(lambda field: values[field[1]], template)


def _number(answer: str) -> float | None:
    """The vote: the boxed number, else the last line where that is a number and no more; None outside 0 and 1."""
    boxed = extract_boxed(answer)
    vote = boxed if boxed is not None else (final_part(answer).strip().splitlines() or [""])[-1]
    vote = notation.without_text(LABEL.sub("", vote[:200], count=1).strip("*$ ").removesuffix("."))
    vote = OUT_OF.sub("/", vote)
    # `3 steps` is no vote, though it would be an answer.
    found = None if WORD.search(vote) else notation.number(notation.plain(vote))
    if found is None:
        return None
    value = found.value / (100 if found.is_percent else 1)
    return float(value) if 0 <= value <= 1 else None  # 8, of a judge that counts to 10, is none


def _agreed(votes: Sequence[float | None]) -> int:
    """1 where all known votes call it good, -1 where all call it bad, 0 where they differ or there are none."""
    opinions = {vote >= CORRECT_FROM for vote in votes if vote is not None}
    return 0 if len(opinions) != 1 else 1 if True in opinions else -1


def _mean(votes: Sequence[float | None]) -> float | None:
    """The mean of those that are known; None where none is."""
    known = [vote for vote in votes if vote is not None]
    return sum(known) / len(known) if known else None


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]
