"""A job takes the keys that its code reads, and refuses the others."""

import ast

import pytest
from key_reads import Reader, unread

from common import jobs, schema
from common.config import load_config
from common.errors import UserError
from common.jobs import JOBS, EvalConfig, RLConfig

SCRIPTS = {
    "rl": ("rl.py", "multinode_rl.py"),
    "eval": ("eval.py", "multinode_eval.py"),
    "sft": ("train/sft_sdar.py", "train/prepare_sft.py"),
    "generate": ("generate.py",),
    "trace": ("sample/get_trace_viewer.py",),
    "serve": ("serve.py",),
    "reward": ("reward/__main__.py",),
    "adapt": ("models/adapt.py",),
}
ONE_CHOICE = {"optimizer.name"}  # adamw: to name another is refused, so there is nothing to read


@pytest.mark.parametrize("job", JOBS)
def test_a_job_reads_all_its_keys(job: str) -> None:
    assert set(unread(JOBS[job].config, SCRIPTS[job])) - ONE_CHOICE == set()


def test_what_only_others_read_is_found() -> None:
    found = unread(RLConfig, SCRIPTS["serve"])
    assert {"experiment.total_step", "training.beta", "reward.judge.timeout"} <= set(found)
    assert "rollout.temperature" not in found  # the engine reads it, of any job


CODE = """
def f(config: RLConfig, one: ExperimentConfig | None, other: Any):
    part, n = config.experiment, other.port
    if isinstance(other, JudgeConfig):
        print(other.retries)
    return lambda: part.total_step + one.save_every

class C:
    def g(self):
        return self.kept.timeout

    def __init__(self, given: JudgeConfig):
        self.kept = given
        self.config = load_config("eval", [])
        print(self.config.seed, getattr(self.kept, "parallel"))
"""


def test_reads_are_followed_through_names() -> None:
    reader = Reader(vars(schema) | vars(jobs))
    reader.block(ast.parse(CODE), {})
    assert {(read.job, read.key) for read in reader.found} == {
        (RLConfig, "experiment"),
        (RLConfig, "total_step"),
        (None, "save_every"),
        (None, "retries"),
        (None, "timeout"),
        (None, "parallel"),
        (EvalConfig, "seed"),
    }


REFUSED = [
    ("eval", "experiment.total_step=3", "eval.py does not read it, only rl.py"),
    ("eval", "experiment.train_value_every=2", "eval.py does not read it, only rl.py"),
    ("eval", "experiment.trackers=[wandb]", "eval.py does not read it, only rl.py, train/sft_<family>.py"),
    ("eval", "dataset.train_dataset=MATH_train", "eval.py does not read it, only rl.py"),
    ("eval", "reward.truncated_is_wrong=True", "eval.py does not read it, only rl.py"),
    ("sft", "reward.truncated_margin=5", "train/sft_<family>.py does not read it, only rl.py"),
    ("sft", "evaluation.eval_dataset=MATH500", "did you mean dataset.eval_dataset?"),
    ("sft", "evaluation.data_type=code", "did you mean dataset.data_type?"),
    ("sft", "model.made_by=configs/sft_tiny.yaml", "train/sft_<family>.py does not read it, only rl.py"),
    ("sft", "reward.function=my_module:my_reward", "train/sft_<family>.py does not read it, only rl.py, eval.py"),
    ("generate", "num_response_per_task=4", "generate.py does not read it, only sample/get_trace_viewer.py"),
    ("serve", "num_response_per_task=4", "serve.py does not read it, only sample/get_trace_viewer.py"),
    ("serve", "seed=1", "serve.py does not read it, only eval.py"),
]
CONFIG = {"rl": "configs/rl_tiny.yaml", "eval": "configs/eval_tiny.yaml", "sft": "configs/sft_tiny.yaml"}


@pytest.mark.parametrize(("job", "argument", "told"), REFUSED, ids=[f"{one[0]}-{one[1]}" for one in REFUSED])
def test_a_key_of_another_job_is_refused(job: str, argument: str, told: str) -> None:
    start = [f"config={CONFIG[job]}"] if job in CONFIG else ["model=M"]
    with pytest.raises(UserError) as caught:
        load_config(job, [*start, argument])
    message = str(caught.value)
    assert argument.split("=")[0] in message and told in message and "\n" not in message
