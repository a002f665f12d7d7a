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


def test_importing_changes_nothing_elsewhere():
    """Until `register()`, or `from anon_dist import Anon`, which calls it."""
    check = """
import sys
import torch
before = set(dir(torch.optim)), len(sys.meta_path)
import anon_dist.optim, anon_dist.engines.register
assert (set(dir(torch.optim)), len(sys.meta_path)) == before, "an import has changed something"
assert anon_dist.optim.Anon(torch.nn.Linear(2, 2).parameters())
assert not hasattr(torch.optim, "Anon")
from anon_dist import Anon
assert torch.optim.Anon is Anon is anon_dist.optim.Anon
count = len(sys.meta_path)
anon_dist.register()
assert len(sys.meta_path) == count
"""
    root = Path(anon_dist.__file__).parents[1]
    subprocess.run([sys.executable, "-c", check], cwd=root, timeout=60, check=True)
