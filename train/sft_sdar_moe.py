"""Supervised finetuning of SDAR's MoE: accelerate launch … train/sft_sdar_moe.py config=configs/sft_sdar_moe.yaml"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # launched as a file, the repo is not on the path

from train.launch_sft import run

if __name__ == "__main__":
    run("sdar_moe", __doc__)
