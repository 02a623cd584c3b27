"""Reinforcement learning of a diffusion language model: python rl.py config=configs/rl_tiny.yaml [key=value …]"""

import sys

from common.config import parse_or_help
from common.errors import one_line_errors


@one_line_errors
def main() -> None:
    config = parse_or_help("rl", sys.argv[1:], __doc__)
    from launch.training import train_here  # torch and transformers, which --help does without

    sys.exit(train_here(config, sys.argv[1:]))


if __name__ == "__main__":
    main()
