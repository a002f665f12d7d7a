"""The Python blocks of the pages, by name. Each is run as it stands, with nothing but what its page calls the reader's own.

`users/launched.py` runs all but DeepSpeed's, which `distributed/deepspeed_cases.py` does; `test_readmes.py` finds blocks that have no name.
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page
    for folder in ("anon_dist", "configs", "launch", "tests", "tools")
    for page in (ROOT / folder).rglob("*.md")
    if page.name == "README.md"
) + sorted(ROOT.glob("*.md"))

ENGINES, OPTIM = "anon_dist/engines/README.md", "anon_dist/optim/README.md"
SNIPPETS = {
    "settings": ("README.md", "anon = {"),
    "deepspeed": ("README.md", "deepspeed.initialize"),
    "fsdp2": ("README.md", "fully_shard(model)"),
    "trainer": ("README.md", "Trainer(model"),
    "deepspeed, gamma": (ENGINES, "deepspeed.initialize"),
    "trainer, resumed": (ENGINES, "Trainer(model"),
    "accelerate, resumed": (ENGINES, "Accelerator("),
    "fsdp2, resumed": (ENGINES, "fully_shard(model)"),
    "zero1, resumed": ("tests/users/README.md", "ZeroRedundancyOptimizer(groups"),
    "arguments": (OPTIM, "gamma=1.0,"),
    "bases": (OPTIM, "basis_block=128"),
    "matched": (OPTIM, "matched(groups"),
}
"""The page, and words that no other block of it has."""


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def run(name: str, **yours: Any) -> dict[str, Any]:
    """Run a block that finds these names; what names there are afterwards."""
    page, words = SNIPPETS[name]
    (block,) = (b for b in blocks(ROOT / page) if words in b)
    exec(block, yours)
    return yours
