"""What `training.canvas` changes: tiny full-attention models that learned on canvases cut to blocks, or on whole ones.

    python -m benchmarks.canvas [--seeds 2 3] [--lengths 20 40] [--updates 300] [--out FOLDER]

Answers have 16 to 20 tokens with their end. Each model is finetuned by random masking and sampled on a whole canvas of
`length` tokens in blocks of 10: 8 responses at temperature 1 to each of the 66 held-out tasks. Every model has a file
under --out; one that is there is not made again.
"""

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import use_threads
from common.config import load_config
from common.metrics import print_table, read_rows
from common.runtime import Stopwatch

FAMILY = "llada"
CANVASES = ("batch", "full")
CUT_TO = 2  # the block to which a batch's canvas is rounded up
DRAWN_IN = 10  # the block in which responses are drawn
RESPONSES = 8  # to each held-out task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--lengths", type=int, nargs="+", default=[20, 40], help="tokens of the whole canvas")
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("runs/canvas"))
    args = parser.parse_args()
    use_threads(1)
    rows = []
    for length, seed, canvas in product(args.lengths, args.seeds, CANVASES):
        file = args.out / f"{length}-{seed}-{canvas}-{args.updates}.json"
        if not file.exists():
            result = measure(length, seed, canvas, args.updates, args.out)
            file.write_text(json.dumps(result) + "\n", encoding="utf-8")
        rows.append(shown(length, seed, canvas, json.loads(file.read_text(encoding="utf-8"))))
    print_table(rows, title=f"{args.updates} updates of {FAMILY}, one thread")


def measure(length: int, seed: int, canvas: str, updates: int, out: Path) -> dict[str, Any]:
    """Finetune a model, draw responses to the held-out tasks.

    Of both ways of drawing: accuracy, its error, mean length, and the share without an end.
    """
    from rollout.evaluate import main as evaluate
    from train.sft_trainer import finetune

    project, watch = f"{length}-{seed}-{canvas}", Stopwatch()
    folder = f"experiment.runs_dir={out}"
    model = finetune(
        load_config(
            "sft",
            [
                "config=configs/sft_tiny.yaml",
                f"model.model_base={FAMILY}",
                f"training.seed={seed}",
                f"training.canvas={canvas}",
                f"training.block_size={CUT_TO}",
                f"training.max_gen_length={length}",
                f"training.post_num={length}",
                f"training.max_steps={updates}",
                "training.stop_at_accuracy=null",
                "dataset.eval_dataset=",
                folder,
                f"experiment.project={project}",
                "experiment.trackers=[]",
            ],
        )
    )
    seconds = watch.total()
    results = evaluate(
        load_config(
            "eval",
            [
                "config=configs/eval_tiny.yaml",
                f"model_base={FAMILY}",
                f"model={model}",
                "made_by=null",
                f"seed={seed}",
                "dataset.eval_dataset=arithmetic_3_test",
                f"rollout.num_response_per_task={RESPONSES}",
                f"rollout.max_token={length}",
                f"rollout.steps={length}",
                f"rollout.block_size={DRAWN_IN}",
                folder,
                f"experiment.project={project}-drawn",
            ],
        )
    )
    losses = [row["loss"] for row in read_rows(out / project / "metrics.jsonl")]
    figures = {
        name: [one.accuracy, one.standard_error, one.response_length, one.truncated] for name, one in results.items()
    }
    return {"seconds": seconds, "loss": sum(losses[-15:]) / 15, "drawn": figures}


def shown(length: int, seed: int, canvas: str, result: dict[str, Any]) -> dict[str, str]:
    """A model as the table has it."""
    row = {"canvas": f"{canvas} of {length}", "seed": str(seed), "last loss": f"{result['loss']:.2f}"}
    for name, (accuracy, error, tokens, truncated) in result["drawn"].items():
        row[name] = f"{100 * accuracy:.1f} ± {100 * error:.1f} %"
        row[f"{name}: tokens"] = f"{tokens:.1f}, {100 * truncated:.0f} % without end"
    return row | {"seconds to learn": f"{result['seconds']:.0f}"}


if __name__ == "__main__":
    main()
