"""What the prefix cache of full attention costs and saves: python -m benchmarks.full_attention_cache [PATH …]

Each PATH is a tiny model finetuned by configs/sft_tiny.yaml (default: those under runs/). Accuracy and tokens per
forward are measured on held-out additions, speed on a canvas of 256 tokens, where a cache has something to save. The
table in docs/full_attention.md is rewritten.
"""

import re
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from common.schema import EvalDatasetConfig, PromptsConfig, RewardConfig, TaskSampling
from common.trajectory import Request
from data.tasks import load_tasks
from models import LoadedModel, load_model
from models.family import family_of
from reward.score import make_scorer
from rollout.evaluate import evaluate
from sample.engine import Engine

DOCS = Path(__file__).resolve().parents[1] / "docs" / "full_attention.md"
TABLE = re.compile(r"<!-- cache -->.*<!-- end -->", re.DOTALL)
HEAD = ("family", "strategy", "cache", "accuracy", "tokens per forward", "speed, 256 tokens")
CACHES = {
    "none": {},
    "prefix": {"use_cache": True},
    "prefix, horizon 5": {"use_cache": True, "further_horizon": 5},
    "prefix, horizon 0": {"use_cache": True, "further_horizon": 0},
}
SHORT = TaskSampling(max_token=20, block_size=5, steps=20, num_response_per_task=8)
LONG = TaskSampling(max_token=256, block_size=32, steps=64)
HORIZON = {5: 32, 0: 0}  # of the short canvas → of the long one
REPEATS = 3


def accuracies(loaded: LoadedModel, engine: Engine, strategy: str) -> dict[str, tuple[float, float, float]]:
    """By cache: accuracy, its standard error, tokens per forward."""
    tasks = load_tasks("arithmetic_3_test", "dataset.eval_dataset")
    dataset = EvalDatasetConfig(data_type="math", prompts=PromptsConfig(math="{question}"))
    scorer = make_scorer(RewardConfig(), "math")
    found = {}
    for name, cache in CACHES.items():
        setting = replace(SHORT, remasking_strategy=strategy, **cache)
        (result,) = evaluate(engine, loaded, tasks, [setting], scorer, dataset, 64, seed=1).values()
        found[name] = (result.accuracy, result.standard_error, result.tokens_per_forward)
    return found


def speeds(engine: Engine, strategy: str) -> dict[str, float]:
    """By cache: the speed of drawing 4 responses without a stop token, as a multiple of the uncached one."""
    requests = [Request(str(n), list(range(8)), seed=n) for n in range(4)]
    seconds: dict[str, list[float]] = {name: [] for name in CACHES}
    for _ in range(REPEATS):
        for name, cache in CACHES.items():
            long = {
                key: HORIZON.get(value, value) if key == "further_horizon" else value for key, value in cache.items()
            }
            start = time.perf_counter()
            list(engine.generate(requests, replace(LONG, remasking_strategy=strategy, **long), stop_ids=()))
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds["none"]) / statistics.median(values) for name, values in seconds.items()}


def main(paths: list[str]) -> None:
    """Measure every model under both strategies and rewrite the table."""
    torch.manual_seed(0)
    rows = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    for path in paths or sorted(str(one) for one in Path("runs").glob("sft_tiny_*/ckpt/optimized")):
        loaded = load_model(path, family_of(path))
        if loaded.family.attention != "full":
            continue
        engine = Engine(loaded.model, loaded.mask_id, loaded.stop_ids)
        for strategy in ("low_confidence_static", "low_confidence_dynamic"):
            speed = speeds(engine, "low_confidence_static") if strategy == "low_confidence_static" else None
            for cache, (accuracy, error, per_forward) in accuracies(loaded, engine, strategy).items():
                cells = (loaded.family.name, strategy.removeprefix("low_confidence_"), cache)
                figures = (f"{100 * accuracy:.1f} ± {100 * error:.1f} %", f"{per_forward:.2f}")
                rows.append(f"| {' | '.join((*cells, *figures, f'{speed[cache]:.2f}×' if speed else ''))} |")
                print(rows[-1], flush=True)
    table = "\n".join(["<!-- cache -->", *rows, "<!-- end -->"])
    DOCS.write_text(TABLE.sub(lambda _: table, DOCS.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
