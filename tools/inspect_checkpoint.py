#!/usr/bin/env python
"""Show what a checkpoint is: `anon-dist ckpt inspect`, which see.

python tools/inspect_checkpoint.py --help
"""

import sys

from anon_dist.checkpoint.cli import run

if __name__ == "__main__":
    run("inspect", sys.argv[1:])
