"""tools/ and tools/claims hold scripts, which import each other by name, as scripts of one folder do."""

import sys
from pathlib import Path

TOOLS = Path(__file__).parents[2] / "tools"
sys.path[:0] = [str(TOOLS / "claims"), str(TOOLS)]
