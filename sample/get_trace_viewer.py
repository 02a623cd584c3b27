"""A page on which to watch a response being denoised: python sample/get_trace_viewer.py model=PATH prompt="…"

`num_response_per_task=4` draws four. `samples=runs/X/samples.jsonl` shows responses that an evaluation or a rollout
wrote, instead of new ones; `task_id=…` those of one task.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # launched as a file, the repo is not on the path
if str(Path(__file__).resolve().parent) in sys.path:
    sys.path.remove(str(Path(__file__).resolve().parent))  # transformers imports a library `kernels`, not the one here

from common.config import parse_or_help
from common.errors import one_line_errors


@one_line_errors
def run() -> None:
    """The command."""
    config = parse_or_help("trace", sys.argv[1:], __doc__)
    from sample.traces import main  # torch and the rest, which --help does without

    main(config)


if __name__ == "__main__":
    run()
