"""Accuracy and speed of a diffusion language model: python eval.py config=configs/eval_tiny.yaml [key=value …]"""

from __future__ import annotations

import sys

from common.config import parse_or_help
from common.errors import one_line_errors


@one_line_errors
def main() -> None:
    config = parse_or_help("eval", sys.argv[1:], __doc__)
    from rollout.evaluate_job import main as evaluate  # torch and transformers, which --help does without
    from train.sft_trainer import make_model_if_missing

    runs_dir = config.experiment.runs_dir
    make_model_if_missing(config.model, config.made_by, config.model_base, config.seed, runs_dir)
    evaluate(config)


if __name__ == "__main__":
    main()
