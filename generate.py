"""Draw responses from a diffusion language model: python generate.py model=PATH [prompt="…"] [key=value …]

Without a prompt it is a chat in the terminal.

From Python: `from generate import block_diffusion_generate, diffusion_generate`, which also makes transformers' Auto
classes read every family's checkpoints.
"""

import sys
from typing import TYPE_CHECKING, Any

from common.config import parse_or_help
from common.errors import one_line_errors

if TYPE_CHECKING:
    from sample.functions import block_diffusion_generate, diffusion_generate, generate_ids

__all__ = ["block_diffusion_generate", "diffusion_generate", "generate_ids"]


def __getattr__(name: str) -> Any:
    """The functions, loaded with torch and the rest when they are asked for: --help does without."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sample import functions  # registers the families

    return getattr(functions, name)


@one_line_errors
def main() -> None:
    config = parse_or_help("generate", sys.argv[1:], __doc__)
    from sample.show import main as show

    show(config)


if __name__ == "__main__":
    main()
