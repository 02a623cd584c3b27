"""A node that the first starts by ssh: python -m launch.join NODES PORT PATIENCE ROLE HEAD HOST, token on stdin."""

import sys

from common.errors import one_line_errors
from common.schema import EvalExperimentConfig
from launch.nodes import Place
from launch.ray_cluster import follow


@one_line_errors
def main(arguments: list[str]) -> None:
    """Join, stay until the job is over, and end with its exit code."""
    nodes, port, patience, role, head, host = arguments
    hosts = (head, *[host] * int(role))
    place = Place(int(role), int(nodes), hosts, int(port))
    experiment = EvalExperimentConfig(join_timeout=float(patience))
    sys.exit(follow(place, experiment, token=sys.stdin.readline().strip()))


if __name__ == "__main__":
    main(sys.argv[1:])
