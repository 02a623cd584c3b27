"""Draw responses from a diffusion language model: python generate.py model=PATH [prompt="…"] [key=value …]

Without a prompt it is a chat in the terminal.

From Python: `from generate import block_diffusion_generate, diffusion_generate`, which also makes transformers' Auto
classes read every family's checkpoints.
"""

import sys

from common.config import parse_or_help
from common.errors import one_line_errors

if __name__ != "__main__":  # torch, transformers and the families, which --help does without
    from sample.functions import block_diffusion_generate, diffusion_generate, generate_ids

__all__ = ["block_diffusion_generate", "diffusion_generate", "generate_ids"]


@one_line_errors
def main() -> None:
    config = parse_or_help("generate", sys.argv[1:], __doc__)
    from sample.show import main as show

    show(config)


if __name__ == "__main__":
    main()
