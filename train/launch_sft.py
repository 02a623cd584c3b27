"""What the per-family SFT scripts share: the command line."""

import sys

from common.config import parse_or_help
from common.errors import one_line_errors


@one_line_errors
def run(family: str, description: str) -> None:
    """Read the config, name the family where it does not, and finetune."""
    argv = sys.argv[1:]
    if not any(argument.startswith("model.model_base=") for argument in argv):
        argv.append(f"model.model_base={family}")
    config = parse_or_help("sft", argv, description)
    from train.sft_trainer import main  # torch and transformers, which --help does without

    sys.exit(main(config))
