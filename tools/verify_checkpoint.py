#!/usr/bin/env python
"""Compare two checkpoints, bit for bit: `anon-dist ckpt verify`, which see.

python tools/verify_checkpoint.py --help
"""

import sys

from anon_dist.checkpoint.cli import run

if __name__ == "__main__":
    run("verify", sys.argv[1:])
