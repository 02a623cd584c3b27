"""Accuracy and speed of a diffusion language model: python eval.py config=configs/eval_tiny.yaml [key=value …]"""

from __future__ import annotations

import sys
from pathlib import Path

from common.config import parse_or_help
from common.errors import one_line_errors
from common.launch import launch_ranks, launched
from common.stop import Stopped, resume_command


@one_line_errors
def main() -> None:
    config = parse_or_help("eval", sys.argv[1:], __doc__)
    from rollout.evaluate_job import main as evaluate  # torch and transformers, which --help does without
    from train.sft_trainer import make_model_if_missing

    def prepare() -> None:
        runs_dir = config.experiment.runs_dir
        make_model_if_missing(config.model, config.made_by, config.model_base, config.seed, runs_dir)

    if config.experiment.deepspeed_file and not launched():
        sys.exit(launch_ranks(config.experiment.deepspeed_file, Path(__file__), sys.argv[1:], prepare))
    if not launched():
        prepare()
    try:
        evaluate(config)
    except Stopped:
        print(f"stopped; to go on: {resume_command()}")


if __name__ == "__main__":
    main()
