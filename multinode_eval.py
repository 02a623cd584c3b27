"""Evaluation over many nodes, as the command of every node of a job: python multinode_eval.py config=X.yaml"""

import os
import sys
from pathlib import Path

from common.config import parse_or_help
from common.errors import one_line_errors
from launch.nodes import find_place


@one_line_errors
def main() -> None:
    config = parse_or_help("eval", sys.argv[1:], __doc__)
    place = find_place(os.environ)
    from launch.evaluation import evaluate_over_nodes
    from launch.ray_cluster import drive_or_follow  # torch and Ray, which --help does without

    sys.exit(drive_or_follow(place, config.experiment, lambda: evaluate_over_nodes(config), Path(__file__).resolve()))


if __name__ == "__main__":
    main()
