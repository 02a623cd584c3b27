"""Accuracy and speed of a diffusion language model: python eval.py config=configs/eval_tiny.yaml [key=value …]"""

import sys

from common.config import parse_or_help
from common.errors import one_line_errors


@one_line_errors
def main() -> None:
    config = parse_or_help("eval", sys.argv[1:], __doc__)
    from launch.evaluation import evaluate_here  # torch and transformers, which --help does without

    sys.exit(evaluate_here(config, sys.argv[1:]))


if __name__ == "__main__":
    main()
