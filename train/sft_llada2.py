"""Supervised finetuning of a LLaDA2 model: accelerate launch … train/sft_llada2.py config=configs/sft_llada2.yaml"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # launched as a file, the repo is not on the path

from train.launch_sft import run

if __name__ == "__main__":
    run("llada2", __doc__)
