"""A short chaos: some faults of each kind that there may be here, none unnamed, nothing lost."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "chaos.py"


@pytest.mark.slow
def test_a_run_that_is_disturbed_at_random_ends_with_the_weights_of_one_that_is_not():
    command = [sys.executable, str(TOOL), "--minutes", "10", "--faults", "12", "--seed", "1"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=1800, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    row = r"\| all \| (\d+) \|[^|]+\| (\d+) \|[^|]+\| (\d+) \| (\d+) \|"
    times, named, older, lost = re.search(row, done.stdout).groups()
    assert int(times) >= 8
    assert (named, older, lost) == (times, "0", "0")
