"""`anon-dist bench`, for who has no `anon-dist` in the path: time and memory of optimizer steps.

python tools/bench_step.py --help
"""

import sys

from anon_dist.bench.cli import main

main(sys.argv[1:])
