#!/usr/bin/env python
"""Pretrain a GPT-style model: the script to give to `accelerate launch`, `torchrun` or `python`.

accelerate launch --config_file configs/accelerate/fsdp2.yaml launch/pretrain.py --config configs/train/gpt2-small.yaml
"""

from anon_dist.cli import train
from anon_dist.launcher import leave

if __name__ == "__main__":
    train(prog="launch/pretrain.py")
    leave()
