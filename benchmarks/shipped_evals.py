"""The shipped evaluations of published models, each on a tiny model of its family:

    python -m benchmarks.shipped_evals [key=value …]

One table: config, model, tasks, accuracy, tokens per forward. Every config is run as it is but for its data and sizes,
which are those that the tiny networks were made for, on 32 tasks. The models are made by `configs/sft_tiny.yaml` where
they are missing. Further keys go to every evaluation: tiny models learn bare questions, so that
`dataset.prompt_style=template dataset.prompts.math={question}` shows what they can, where a published prompt is text of
unknown characters.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.config import load_config
from common.errors import one_line_errors
from common.metrics import print_table
from launch.start_model import make_missing_model
from models.family import find_family
from rollout import evaluate

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
TINY = "${experiment.runs_dir}/sft_tiny_${model_base}_${seed}/ckpt/optimized"


def shipped_configs() -> list[Path]:
    """The configs of eval.py on one node, of published models."""
    found = [*CONFIGS.glob("*_eval.yaml"), *CONFIGS.glob("*_eval_published.yaml")]
    return sorted(path for path in found if "multinode" not in path.stem)


def tiny_arguments(path: Path) -> list[str]:
    """What a shipped config needs so that a tiny model can run it, as arguments of eval.py."""
    config = load_config("eval", [f"config={path}"])
    values: dict[str, Any] = {
        "config": path,
        "experiment.project": f"shipped_{path.stem}",
        "model": TINY,
        "made_by": "configs/sft_tiny.yaml",
        "seed": 1,
        "dataset.data_type": "math",
        "dataset.few_shot": 0,
        "rollout.num_task": 32,
    }
    if config.model_base in ("llada", "mmada"):
        values["dataset.prompt_style"] = "template"  # the tiny tokenizers lack the marks of their published turns
    if find_family(config.model_base).attention == "block":
        values |= {"dataset.eval_dataset": "arithmetic_4_test", "rollout.max_token": 40}
    else:
        whole = config.rollout.block_size == config.rollout.max_token
        values |= {"dataset.eval_dataset": "arithmetic_3_test", "rollout.max_token": 20, "rollout.steps": 20}
        values["rollout.block_size"] = 20 if whole else 10
    return [f"{key}={value}" for key, value in values.items()]


def run(path: Path, further: Sequence[str]) -> list[dict[str, Any]]:
    """Run a shipped config on the tiny model of its family: a row of figures for each of its settings."""
    config = load_config("eval", [*tiny_arguments(path), *further])
    make_missing_model(config)
    return [
        {
            "config": path.name,
            "model": config.model,
            "setting": result.setting,
            "tasks": result.tasks,
            "accuracy, %": round(100 * result.accuracy, 1),
            "tokens per forward": round(result.tokens_per_forward, 2),
        }
        for result in evaluate.main(config).values()
    ]


@one_line_errors
def main(argv: Sequence[str]) -> None:
    """Run all, and print the table."""
    if {"-h", "--help"} & set(argv):
        print(__doc__.strip())
        return
    print_table([row for path in shipped_configs() for row in run(path, argv)])


if __name__ == "__main__":
    main(sys.argv[1:])
