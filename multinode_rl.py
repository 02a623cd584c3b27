"""Reinforcement learning over nodes, as the command of every node of a job: python multinode_rl.py config=X.yaml"""

import sys

from common.config import parse_or_help
from common.errors import one_line_errors


@one_line_errors
def main() -> None:
    config = parse_or_help("rl", sys.argv[1:], __doc__)
    from launch.ray_cluster import drive_or_follow  # torch and Ray, which --help does without
    from launch.training import train_over_nodes

    sys.exit(drive_or_follow(config.experiment, lambda nodes: train_over_nodes(config, sys.argv[1:], nodes)))


if __name__ == "__main__":
    main()
