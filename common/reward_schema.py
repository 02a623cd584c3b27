"""The keys of `reward:`, the judge's among them; part of common.schema."""

# ruff: noqa: RUF009 — `key` and `section` make fields, which is what dataclass defaults are for

from dataclasses import dataclass

from common.keys import key, section

KINDS = ("math", "code", "general")  # of tasks; reward/score.py has a function for each


@dataclass
class JudgeConfig:
    """A model behind an OpenAI-compatible endpoint that scores responses; used where base_url is given."""

    base_url: str = key("", "of the endpoint, as http://127.0.0.1:8000/v1; empty: no judge")
    model: str = key("", "name by which the endpoint knows the model")
    api_key_env: str = key("OPENAI_API_KEY", "environment variable that holds the key; it may be unset")
    reward_chunk_length: int | None = key(
        None, "score every chunk of so many tokens (process rewards); null: the response as a whole", low=1
    )
    k_sample: int = key(1, "votes on each score; the reward is their mean", low=1)
    temperature: float = key(0.6, "of the judge", low=0)
    max_generation_token: int = key(10000, "longest answer of the judge in tokens", low=1)
    timeout: float = key(600.0, "seconds to wait for one answer", low=0.01)
    retries: int = key(5, "further attempts after a failed request, each after twice the wait", low=0)
    first_wait: float = key(1.0, "seconds before the first further attempt", low=0)
    parallel: int = key(8, "requests at once from one scoring process", low=1)
    prompt: str | None = key(
        None, "instruction with {question}, {response}, {chunk}, {reference}; null: as in reward/judge.py"
    )


@dataclass
class ScoringConfig:
    """How an answer is checked against the task's own."""

    truncated_is_wrong: bool = key(True, "a response cut at the length limit earns nothing")
    workers: int = key(1, "processes that score beside the rollout; 0 scores in the rollout's own", low=0)
    time_limit: float = key(5.0, "code: seconds of processor time where a task has no test_time_limit", low=0.01)
    memory_mb: int = key(1024, "code: memory of a program", low=64)
    output_mb: int = key(16, "code: what a program may write to stdout and stderr", low=1)
    float_tolerance: float = key(
        1e-6, "code: how far a printed number may be from the wanted one, absolutely or relative to it", low=0
    )
    match: str = key("exact", "general: exact, or fuzzy (the reward is the similarity)", choices=("exact", "fuzzy"))
    fuzzy_threshold: float = key(0.8, "general, fuzzy: similarity from which a response is correct", low=0, high=1)


@dataclass
class RewardConfig(ScoringConfig):
    kind: str | None = key(
        None,
        "math, code, general or judge: what decides whether a response is correct; null: dataset.data_type",
        choices=(*KINDS, "judge"),
    )
    function: str | None = key(
        None, "my_module:my_reward, called with (response, task), returns a number or one for each token", function=True
    )
    judge: JudgeConfig = section(JudgeConfig)
