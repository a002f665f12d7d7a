"""Importing the package must not wait for what only a preparation needs."""

import subprocess
import sys
from pathlib import Path

import anon_dist


def test_heavy_libraries_are_not_imported():
    check = "import sys, anon_dist.data; print([m for m in ('datasets','transformers','sentencepiece','pyarrow') if m in sys.modules])"
    root = Path(anon_dist.__file__).parents[1]
    out = subprocess.run(
        [sys.executable, "-c", check], cwd=root, capture_output=True, text=True, timeout=300, check=True
    )
    assert out.stdout.strip() == "[]"
