"""Model families. Importing this package makes transformers' Auto classes read every family's checkpoints."""

import sys

from transformers.utils import logging

from models.dream import DREAM
from models.family import FAMILIES, Family, LoadedModel, find_family, load_model, load_network, register, save_model
from models.llada import LLADA, MMADA
from models.llada2 import LLADA2
from models.sdar import SDAR, TRADO
from models.sdar_moe import SDAR_MOE
from models.tokenizer import load_tokenizer, save_tokenizer

if not sys.stderr.isatty():  # bars redrawn in a log are noise
    logging.disable_progress_bar()

for _family in (SDAR, TRADO, SDAR_MOE, DREAM, LLADA, MMADA, LLADA2):
    register(_family)

__all__ = [
    "FAMILIES",
    "Family",
    "LoadedModel",
    "find_family",
    "load_model",
    "load_network",
    "load_tokenizer",
    "register",
    "save_model",
    "save_tokenizer",
]
