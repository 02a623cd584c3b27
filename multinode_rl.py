"""Reinforcement learning over nodes, as the command of every node of a job: python multinode_rl.py config=X.yaml"""

import os
import sys
from pathlib import Path

from common.config import parse_or_help
from common.errors import one_line_errors
from launch.nodes import find_place


@one_line_errors
def main() -> None:
    config = parse_or_help("rl", sys.argv[1:], __doc__)
    place = find_place(os.environ)
    from launch.ray_cluster import drive_or_follow  # torch and Ray, which --help does without
    from launch.training import train_over_nodes

    def drive() -> int:
        return train_over_nodes(config, sys.argv[1:], place.nodes)

    sys.exit(drive_or_follow(place, config.experiment, drive, Path(__file__).resolve()))


if __name__ == "__main__":
    main()
