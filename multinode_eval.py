"""Evaluation over many nodes, as the command of every node of a job: python multinode_eval.py config=X.yaml"""

import sys

from common.config import parse_or_help
from common.errors import one_line_errors


@one_line_errors
def main() -> None:
    config = parse_or_help("eval", sys.argv[1:], __doc__)
    from launch.evaluation import evaluate_over_nodes
    from launch.ray_cluster import drive_or_follow  # torch and Ray, which --help does without

    sys.exit(drive_or_follow(config.experiment, lambda nodes: evaluate_over_nodes(config)))


if __name__ == "__main__":
    main()
