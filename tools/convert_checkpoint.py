#!/usr/bin/env python
"""Write a checkpoint in another format, for another world size or optimizer: `anon-dist ckpt convert`, which see.

python tools/convert_checkpoint.py --help
"""

import sys

from anon_dist.checkpoint.cli import run

if __name__ == "__main__":
    run("convert", sys.argv[1:])
