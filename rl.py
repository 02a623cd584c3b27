"""Reinforcement learning of a diffusion language model: python rl.py config=configs/rl_tiny.yaml [key=value …]"""

from __future__ import annotations

import sys

from common.config import parse_or_help
from common.errors import one_line_errors


@one_line_errors
def main() -> None:
    config = parse_or_help("rl", sys.argv[1:], __doc__)
    from train.rl_trainer import main as train  # torch and transformers, which --help does without

    train(config)


if __name__ == "__main__":
    main()
