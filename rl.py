"""Reinforcement learning of a diffusion language model: python rl.py config=configs/rl_tiny.yaml [key=value …]"""

from __future__ import annotations

import sys
from pathlib import Path

from common.config import parse_or_help
from common.errors import one_line_errors
from common.launch import launch_ranks, launched


@one_line_errors
def main() -> None:
    config = parse_or_help("rl", sys.argv[1:], __doc__)
    if config.experiment.deepspeed_file and not launched():
        from train.rl_setup import make_start

        name = config.experiment.deepspeed_file
        sys.exit(launch_ranks(name, Path(__file__), sys.argv[1:], prepare=lambda: make_start(config)))
    from train.rl_trainer import main as train  # torch and transformers, which --help does without

    sys.exit(train(config))


if __name__ == "__main__":
    main()
